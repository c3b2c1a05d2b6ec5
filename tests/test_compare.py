# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``python -m benchmarks compare``."""

import copy
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.compare import changes


def results(median=1.0, width=0.02, kept=1000.0, subject="resnet50"):
    time = {"median": median, "low": median - width / 2, "high": median + width / 2}
    outcome = {"subject": subject, "mode": "training", "dtype": "float32", "batch": 8, "fused_seconds": time}
    return {"environment": {"torch": "2.14"}, "outcomes": [outcome | {"kept_bytes_per_image": {"fused": kept}}]}


def status(tmp_path, first, second):
    paths = []
    for name, content in (("a.json", first), ("b.json", second)):
        paths.append(str(tmp_path / name))
        (tmp_path / name).write_text(json.dumps(content))
    return main(["compare", *paths])


@pytest.mark.parametrize(
    ("second", "expected", "said"),
    [
        (results(1.04), 0, "0 regressions, 0 better"),  # medians of the same code
        (results(1.12), 1, "REGRESSION"),
        (results(1.12, width=0.2), 0, "0 regressions, 0 better"),  # the rounds spread as far
        (results(0.8), 0, "0 regressions, 1 better"),
        (results(kept=1100.0), 1, "fused keeps"),
    ],
)
def test_regressions(tmp_path, capsys, second, expected, said):
    assert status(tmp_path, results(), second) == expected
    assert said in capsys.readouterr().out


def test_what_only_one_has(tmp_path, capsys):
    first, second = results(), copy.deepcopy(results())
    first["outcomes"] += results(subject="resnet18")["outcomes"]
    second["environment"]["torch"] = "2.15"
    assert status(tmp_path, first, second) == 0
    text = capsys.readouterr().out
    assert "only in the first: resnet18, training, float32, batch 8" in text and "differs: torch: 2.14 and 2.15" in text


def test_what_does_not_compare(tmp_path, capsys):
    for second in ({"outcomes": []}, results(subject="vgg"), []):
        with pytest.raises(SystemExit) as error:
            status(tmp_path, results(), second)
        assert error.value.code == 2
    assert "no case in common" in capsys.readouterr().err


def test_noise_is_of_both():
    (time, _) = changes(results(width=0.04), results(median=2.0, width=0.2))
    assert time.ratio == pytest.approx(2.0) and time.noise == pytest.approx(0.04 + 0.1)
