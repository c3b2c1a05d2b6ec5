# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The examples run, and notice when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import environment, load

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"


def run_digits(*arguments):
    return subprocess.run(
        [sys.executable, DIGITS, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def digits():
    return load(DIGITS)


@pytest.mark.slow(reason="five epochs of two networks")
def test_digits_trains_eager_and_fused_alike(tmp_path):
    plot = tmp_path / "curves.png"
    result = run_digits("--epochs", "5", "--output", plot)
    assert result.returncode == 0, result.stderr
    assert "fused: 4, left: 0" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == [str(len(line.split()) + 1)]]
    assert rows and len(rows[-1]) == 4  # epoch 5: both losses and their difference
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_digits_refuses_no_epochs(digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        digits.main(["--epochs", "0", "--output", str(tmp_path / "none.png")])
    assert refusal.value.code == 2
    assert "--epochs: expected at least 1, got 0" in capsys.readouterr().err


def test_digits_notices_what_is_wrong(digits):
    good = digits.Run([0.5, 0.1], 0.98, 1.0)
    assert digits.problems(good, good._replace(losses=[0.5, 0.1001])) == []
    assert "losses of epoch 2 differ" in digits.problems(good, good._replace(losses=[0.5, 0.2]))[0]
    assert "losses of epoch 2 differ" in digits.problems(good, good._replace(losses=[0.5, float("nan")]))[0]
    assert "accuracies" in digits.problems(good, good._replace(accuracy=0.96))[0]
    bad = good._replace(accuracy=0.9)
    assert [p.split(":")[0] for p in digits.problems(bad, bad)] == ["eager", "fused"]


def test_digits_exit_status(digits, tmp_path, monkeypatch, capsys):
    runs = iter([digits.Run([0.5], 0.98, 1.0), digits.Run([0.9], 0.98, 1.0)])
    monkeypatch.setattr(digits, "train", lambda *args, **kwargs: next(runs))
    monkeypatch.setattr(digits.torch, "set_num_threads", lambda n: None)
    assert digits.main(["--epochs", "1", "--output", str(tmp_path / "curves.png")]) == 1
    assert "FAILED: the losses of epoch 1 differ" in capsys.readouterr().err
