# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The benchmarks work from end to end on small shapes, and a failed check fails them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fused

# Appended, so that the package is still imported from where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import blocks, bottleneck, depth, networks, report  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.checks import DRAWS, check  # noqa: E402
from benchmarks.memory import bytes_kept  # noqa: E402
from benchmarks.photographs import photographs  # noqa: E402
from benchmarks.timing import Effort, Spread, race  # noqa: E402

CPU = torch.device("cpu")


def results(folder, name):
    return json.loads((folder / report.slug(report.device_name(CPU)) / name).read_text())


def test_a_block_from_the_command_line_to_the_files(tmp_path, capsys):
    assert main(["--quick", "--blocks", "resnet18.layer1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "[1/4]" in shown and "all checks passed" in shown
    found = results(tmp_path, "residual.json")
    assert found["environment"]["torch"] == torch.__version__
    cases = [(o["subject"], o["mode"], o["dtype"]) for o in found["outcomes"]]
    assert cases == [
        ("resnet18.layer1.1 identity", mode, dtype)
        for mode in ("training", "inference")
        for dtype in ("float32", "bfloat16")
    ]
    for outcome in found["outcomes"]:
        assert outcome["check"]["passed"]
        assert outcome["rounds"] == 2
        assert outcome["eager_seconds"]["median"] > 0 and outcome["fused_seconds"]["median"] > 0
        kept = outcome["kept_bytes_per_image"]
        assert not kept or kept["minimal"] < kept["fused"] < kept["eager"]
    plots = {path.name for path in tmp_path.glob("*/*.png")}
    assert plots == {"speed.png", "kept.png"}


def test_a_network(tmp_path):
    choice = ["--networks", "resnet18", "--mode", "inference", "--dtype", "float32"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    (outcome,) = results(tmp_path, "residual.json")["outcomes"]
    assert outcome["subject"] == "resnet18"


def test_a_network_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "build", None)  # not here
    choice = ["--networks", "resnet18", "--mode", "training", "--dtype", "bfloat16"]
    how = ["--size", "64", "--batch", "2", "--repeats", "2"]
    assert main([*choice, *how, "--output", str(tmp_path)]) == 0
    (outcome,) = results(tmp_path, "residual.json")["outcomes"]
    assert outcome["check"]["passed"] and outcome["rounds"] == 2


def test_the_bottleneck(tmp_path, capsys):
    choice = ["--bottleneck", "--mode", "inference", "--dtype", "float32"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    assert "589,824" in capsys.readouterr().out
    outcomes = results(tmp_path, "bottleneck.json")["outcomes"]
    assert [o["weights"] for o in outcomes] == [589_824, 69_632]
    plain, narrow = (o["operations_per_image"] for o in outcomes)
    assert plain == 2 * 589_824 * 16**2 and narrow == 2 * 69_632 * 16**2


def test_a_failed_check_fails_the_run(tmp_path, capsys, monkeypatch):
    fuse = resnet_fused.fuse

    def wrong(model):
        model.bn2.bias.data.add_(0.1)
        return fuse(model)

    monkeypatch.setattr(resnet_fused, "fuse", wrong)
    choice = ["--blocks", "resnet18.layer1", "--mode", "inference", "--dtype", "float32"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 1
    assert "outside the tolerance policy: resnet18.layer1.1 identity, inference, float32" in capsys.readouterr().out
    (outcome,) = results(tmp_path, "residual.json")["outcomes"]
    assert not outcome["check"]["passed"] and outcome["check"]["failures"]


def test_nothing_selected_is_an_error(tmp_path):
    with pytest.raises(SystemExit):
        main(["--blocks", "resnet9000", "--output", str(tmp_path)])


class WrongGradient(nn.Conv2d):
    """A convolution whose input gradient is off for inputs whose first value is below ``limit``."""

    limit = 0.0

    def forward(self, x):
        if x.requires_grad and x.flatten()[0] < self.limit:
            x.register_hook(lambda gradient: gradient * 1.01)
            x = x * 1.0
        return super().forward(x)


@pytest.mark.parametrize(("limit", "draws", "passed"), [(0.0, 1, True), (2.5, 4, True), (9.0, DRAWS, False)])
def test_a_gradient_gets_further_inputs_but_not_without_end(limit, draws, passed):
    torch.manual_seed(0)
    eager = nn.Conv2d(1, 2, 3)
    fused = WrongGradient(1, 2, 3)
    fused.load_state_dict(eager.state_dict())
    fused.limit = limit
    verdict = check(
        eager, {"fused": fused}, lambda draw: torch.full((1, 1, 4, 4), float(draw)), autocast=None, gradients=True
    )
    assert verdict.passed is passed and verdict.draws == draws


def test_an_output_gets_no_further_input():
    eager, fused = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
    verdict = check(eager, {"fused": fused}, lambda draw: torch.ones(1, 1, 4, 4), autocast=None, gradients=True)
    assert not verdict.passed and verdict.draws == 1


def test_bytes_kept_counts_distinct_storages_without_parameters():
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Sigmoid())
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    images = 2 * 5 * 5 * 4  # bytes per channel
    assert bytes_kept(module, lambda: module(x)) == (3 + 8 + 4) * images

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    assert bytes_kept(module, autocast) == (3 + 8 + 4) * images // 2


def test_a_race_alternates():
    calls = []
    result = race(lambda: calls.append("e"), lambda: calls.append("f"), CPU, Effort.exactly(3))
    assert "".join(calls) == "ef" + "ef" + "fe" + "ef"
    assert len(result.eager_seconds) == len(result.fused_seconds) == 3


def test_a_race_ends_in_time():
    def nothing():
        pass

    assert len(race(nothing, nothing, CPU, Effort(0.0, fewest_rounds=2)).eager_seconds) == 2
    assert len(race(nothing, nothing, CPU, Effort(60.0, most_rounds=5)).eager_seconds) == 5


def test_spread_has_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_photographs_are_normalised_and_repeatable():
    images = photographs(4, 32)
    assert images.shape == (4, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    assert images.abs().max() < 3 and images.std() > 0.5
    assert torch.equal(images, photographs(4, 32))
    assert not torch.equal(images, photographs(4, 32, seed=1))


def test_selection():
    assert [len(found) for found in blocks.select("").values()] == [7, 8]
    assert blocks.select("resnet50.layer1") == {"resnet50": ["layer1.0", "layer1.1"]}
    assert blocks.select(None) == {}
    assert networks.select("50") == ["resnet50"] and networks.select(None) == []


def test_depth_counts_parameters():
    millions = {name: round(depth.size_of(name)[0] / 1e6, 1) for name in depth.LAYERS}
    assert millions == {
        "alexnet": 61.1,
        "vgg19": 143.7,
        "resnet18": 11.7,
        "resnet50": 25.6,
        "resnet101": 44.5,
        "resnet152": 60.2,
    }


def test_bottleneck_weights():
    assert [bottleneck.size_of(name, 224)[0] for name in bottleneck.contenders()] == [589_824, 69_632]
