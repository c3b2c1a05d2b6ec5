# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whole networks in the benchmarks: the race of processes, peers, small work, and the profile."""

import os
from collections import OrderedDict

import pytest
import torch
from benchmarking import results
from thinning import missing
from torch import nn

from benchmarks import (
    cases,
    ceilings,
    entrant,
    layers,
    networks,
    peers,
    processes,
    recorder,
    small,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.photographs import photographs
from benchmarks.timing import Spread


@pytest.mark.slow(reason="six processes, each of which imports torch")
def test_networks_race_in_processes_of_their_own(tmp_path, capsys):
    choice = ["--networks", "resnet18", "--dtype", "float32", "--repeats", "1"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "all checks passed" in shown and "missing" not in shown
    training, inference = results(tmp_path, "residual.json")["outcomes"]
    assert set(training["peak_bytes"]) == {"eager", "fused", "minimal"}
    assert set(inference["peak_bytes"]) == {"eager", "fused", "fold"}
    for outcome in training, inference:
        assert outcome["subject"] == "resnet18" and outcome["check"]["passed"] and outcome["rounds"] == 1
        for name, peak in outcome["peak_bytes"].items():
            assert outcome[f"{name}_seconds"]["median"] > 0
            assert peak > 45e6  # more than the parameters
        assert "eager_speed" not in outcome and outcome["fused_speed"]["median"] > 0
    assert {path.name for path in tmp_path.glob("*/*.png")} == {"speed.png", "kept.png"}


def lap_of(seconds, peak=0, others=0.0):
    return processes.Lap(seconds, peak, others)


def test_processes_take_turns_and_who_goes_first_rotates():
    calls = []

    def run(name):
        calls.append(name)
        return lap_of(float(len(calls)), peak=len(calls), others=0.5 * (len(calls) % 2))

    found, absent = processes.race("efc", 4, run)
    assert "".join(calls) == "efc" + "fce" + "cef" + "efc"
    assert found.seconds == {"e": [1.0, 6.0, 8.0, 10.0], "f": [2.0, 4.0, 9.0, 11.0], "c": [3.0, 5.0, 7.0, 12.0]}
    assert found.time("e") == Spread(7.0, 4.75, 8.5) and found.rounds == 4
    assert found.peak == {"e": 10, "f": 11, "c": 12} and found.others == 0.25 and not absent


def test_whose_process_fails_is_out_of_the_race_and_the_others_go_on():
    calls = []

    def run(name):
        calls.append(name)
        if len(calls) == 4:
            raise processes.Failed("RuntimeError: no more")
        return lap_of(1.0)

    found, absent = processes.race("efc", 3, run)
    assert "".join(calls) == "efc" + "fce" + "ec"
    assert absent == {"f": "RuntimeError: no more"}
    assert found.seconds == {"e": [1.0] * 3, "c": [1.0] * 3} and set(found.peak) == {"e", "c"}


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first}\n{second}")


def raises():
    raise Unpicklable("one", "two")


def test_a_process_of_its_own():
    assert processes.apart(os.getpid) != os.getpid()
    assert processes.apart(os.getppid) != os.getpid()  # what the server forks starts from nothing but imports
    with pytest.raises(processes.Failed, match="^Unpicklable: one two$"):
        processes.apart(raises)
    with pytest.raises(processes.Failed, match="BrokenProcessPool"):
        processes.apart(os._exit, 1)  # as one that is killed for its memory


def test_the_process_s_peak_is_its_own():
    """Not its parent's, which a child that is started otherwise may begin with."""
    mine = torch.ones(1 << 28)
    assert processes.apart(entrant.peak) < mine.nbytes < entrant.peak()


@pytest.mark.parametrize("name", ["eager", "fused"])
def test_everything_but_the_one_that_failed_is_reported(name, tmp_path, capsys, monkeypatch):
    right = processes.apart

    def apart(function, entered, *arguments):
        if entered == name:
            raise processes.Failed("MemoryError: too little")
        return right(function, entered, *arguments)

    monkeypatch.setattr(processes, "apart", apart)
    choice = ["--networks", "resnet18", "--mode", "inference", "--dtype", "float32", "--repeats", "1"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"missing from the race: {name}: MemoryError: too little (1 of 1 cases)" in shown
    (outcome,) = results(tmp_path, "residual.json")["outcomes"]
    assert outcome["absent"] == {name: "MemoryError: too little"} and f"{name}_seconds" not in outcome
    assert outcome["fold_seconds"]["median"] > 0 and ("fold_speed" in outcome) == (name != "eager")


def test_peers_that_are_not_there_are_listed(tmp_path, capsys, monkeypatch):
    """The export, in a process of its own, finds no onnxscript: whether it is installed is not for a test to say."""
    right = processes.apart

    def apart(function, *arguments):
        if function is networks._export:
            raise processes.Failed("ModuleNotFoundError: No module named 'onnxscript'")
        if arguments[0] == "compiled":
            return lap_of(1e-3)
        return right(function, *arguments)

    monkeypatch.setattr(processes, "apart", apart)
    choice = ["--networks", "resnet18", "--mode", "inference", "--peers", "--repeats", "1"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    reason = "not exported: ModuleNotFoundError: No module named 'onnxscript'"
    assert f"missing from the race: onnxruntime: {reason} (1 of 2 cases)" in shown
    assert f"missing from the race: openvino: {reason} (2 of 2 cases)" in shown
    for outcome in results(tmp_path, "residual.json")["outcomes"]:
        assert outcome["compiled_seconds"]["median"] == 1e-3 and outcome["fold_seconds"]["median"] > 0


def test_which_peers_take_part():
    def named(mode, dtype):
        return networks.others(Case("resnet18", is_network=True, mode=mode, dtype=dtype))

    assert named("training", "float32") == named("training", "bfloat16") == ("compiled",)
    assert named("inference", "float32") == ("compiled", "onnxruntime", "openvino")
    assert named("inference", "bfloat16") == ("compiled", "openvino")


@pytest.mark.skip_where(reason=lambda name: missing("onnx", "onnxscript", name))
@pytest.mark.parametrize(("name", "dtype"), [("onnxruntime", "float32"), ("openvino", "float32")])
def test_a_runtime_computes_what_the_network_does(name, dtype, tmp_path):
    stored = entrant.Stored(tmp_path)
    images = photographs(2, 64)
    network = networks.build("resnet18", images)
    stored.save(network, images)
    networks._export(stored)
    case = Case("resnet18", is_network=True, mode="inference", dtype=dtype)
    outputs = entrant.step_of(name, stored, case)()
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(outputs[0]), network.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_compiling_freezes_for_inference_alone(training, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    with peers.compiled(nn.Conv2d(1, 1, 1), training=training):
        assert inductor.freezing is not training
    assert not inductor.freezing


def test_small_work(tmp_path, capsys, monkeypatch):
    chosen = [c for c in small.CASES if c.subject == "mobilenet_v2" or c.mode == "evaluation"]
    monkeypatch.setattr(small, "CASES", chosen)
    right = processes.apart

    def apart(function, name, stored, case, effort):
        if case.mode == "evaluation" and case.batch == 1 and name == "fused":
            raise processes.Failed("RuntimeError: no")
        return right(function, name, stored, case, effort)

    monkeypatch.setattr(processes, "apart", apart)
    assert main(["--quick", "--small", "--repeats", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "missing from the race: fused: RuntimeError: no (1 of 3 cases)" in shown and "checks" not in shown
    first, second, third = results(tmp_path, "small.json")["outcomes"]
    assert first["absent"] == {"fused": "RuntimeError: no"} and "fused_speed" not in first
    for outcome in second, third:
        assert outcome["pixels"] == 64 and outcome["batch"] == 2 and set(outcome["peak_bytes"]) == {"eager", "fused"}
        eager, fused = (outcome[f"{name}_seconds"]["median"] for name in ("eager", "fused"))
        assert outcome["fused_speed"]["median"] == pytest.approx(eager / fused)


def test_small_cases_are_those_that_were_slower():
    known = {(c.subject, c.mode, c.dtype, small.LAYOUTS[c.layout], c.batch, c.size) for c in small.CASES}
    assert len(known) == len(small.CASES)
    f32, bf16 = "float32", "bfloat16"
    expected = {("resnet50", "inference", f32, layout, 1, 224) for layout in ("channels_last", "contiguous")}
    expected |= {("resnet50", mode, f32, "channels_last", n, 64) for mode in cases.MODES for n in (1, 16)}
    expected |= {("resnet50", "inference", bf16, "contiguous", 4, 224)}
    expected |= {("mobilenet_v2", "training", f32, "channels_last", 4, 224)}
    expected |= {("resnet50", "input gradient", f32, "channels_last", 4, 224)}
    assert expected < known and {c.mode for c in small.CASES} == {*cases.MODES, *cases.MORE_MODES}


@pytest.mark.parametrize("mode", [*cases.MODES, *cases.MORE_MODES])
def test_what_a_mode_s_step_does(mode):
    case = Case("convolution", is_network=True, mode=mode, dtype="float32")
    seen = []

    class Module(nn.Conv2d):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), x.requires_grad, self.weight.requires_grad, self.training))
            return super().forward(x).flatten(1)

    module = cases.enter("eager", Module(1, 2, 1), case)
    before = module.weight.detach().clone()
    step = cases.make_step(module, torch.ones(1, 1, 2, 2), case)
    step()
    expected = {
        "training": (True, False, True, True),
        "inference": (False, False, True, False),
        "evaluation": (True, False, True, False),
        "input gradient": (True, True, False, False),
    }
    assert seen[-1] == expected[mode]
    assert torch.equal(before, module.weight) == (mode != "training")
    assert (module.weight.grad is None) == (mode != "training")


def tiny_network():
    """Two convolutions of different shapes, each with a batch norm and a ReLU, and a linear layer."""
    layers = {
        "conv1": nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(8),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 16, 1, bias=False),
        "bn2": nn.BatchNorm2d(16),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(16, 4),
    }
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("mode", cases.MODES)
def test_profile_of_a_tiny_network(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "SMALLEST_SHARE", 0.0)
    monkeypatch.setitem(cases.ENGINES, "fused", "library")
    stored = entrant.Stored(tmp_path)
    stored.save(tiny_network(), torch.randn(2, 3, 16, 16))
    case = Case("tiny", is_network=True, mode=mode, dtype="float32")
    found = layers.profile(stored, case, quick=True)
    convolved = [line for line in found.lines if line.layers.startswith("conv")]
    first, second = "3->8 3x3 /2 on 16x16", "8->16 1x1 on 8x8"
    # Multiply-adds: 3*9 and 8 for each of the 2*8*8 pixels of 8 and 16 channels; each pass takes as many.
    flops = {first: 2 * 128 * 8 * 27, second: 2 * 128 * 16 * 8}
    expected = [
        ("forward", "conv1", f"fprop {first}", flops[first]),
        ("forward", "conv2", f"fprop {second}", flops[second]),
        ("backward", "conv2", f"dgrad {second}", flops[second]),
        ("backward", "conv2", f"wgrad {second}", flops[second]),
        ("backward", "conv1", f"wgrad {first}", flops[first]),
    ]
    seen = [(line.phase, line.layers, line.what, line.flops) for line in convolved]
    assert seen == expected[: None if case.training else 2]
    assert any(line.layers == "fc" and line.flops == 2 * 2 * 16 * 4 for line in found.lines)
    assert 0 < sum(line.seconds for line in found.lines) < found.seconds
    phases = {line.phase for line in found.lines}
    if case.training:
        assert phases == {"forward", "backward", "optimiser"}
        assert convolved[0].bytes == 4 * (2 * 3 * 256 + 8 * 27 + 2 * 8 * 64)
        applied = [(line.layers, line.what) for line in found.lines if line.operator == "resnet_fused.bn_apply"]
        # What the second convolution read comes out of the reduction of the first batch norm's backward.
        assert applied == [("bn1", "2x8x8x8"), ("bn2", "2x16x8x8")]
    else:
        assert phases == {"forward"}


def test_the_profile_s_table_and_what_is_too_short_for_a_line():
    signature = recorder.Signature((2, 8, 4, 4), (16, 8, 3, 3), (1, 1))
    calls = [
        recorder.Call("forward", "aten.convolution", "fprop", signature, 0.3, 10**9, 10**8),
        recorder.Call("forward", "aten.mul", "", (2, 2), 0.001, 0, 32),
        recorder.Call("forward", "aten.convolution", "fprop", signature, 0.2, 10**9, 10**8),
        recorder.Call("backward", "aten.mm", "", (32, 16, 8), 0.3, 10**8, 10**6),
    ]
    lines = layers.summed(calls, {signature: ["a.conv", "b.conv"], (32, 8, 16): ["c"]}, 1.0)
    assert [(line.phase, line.layers, line.operator, line.calls) for line in lines] == [
        ("forward", "a.conv +1", "aten.convolution", 2),
        ("forward", "", "others", 1),
        ("backward", "c", "aten.mm", 1),
    ]
    case = Case("network", is_network=True, mode="training", dtype="float32")
    found = layers.Profile(case, 2, lines, 1.0, ceilings.Ceilings(flops=8e9, bytes=1e9))
    rows = [line.split("  ") for line in layers.table(found).splitlines()[3:]]
    convolution, others, product, forward, backward, between, step = ([c.strip() for c in row if c] for row in rows)
    rates = ["2", "500.00", "50.0%", "4.0", "50%", "0.4", "40%"]
    assert convolution == ["forward", "a.conv +1", "fprop 8->16 3x3 on 4x4", "aten.convolution", *rates]
    assert others == ["forward", "others", "1", "1.00", "0.1%"]
    assert product[1:4] == ["c", "(32, 16) x (16, 8)", "aten.mm"]
    assert (forward, backward) == (["all forward", "501.00", "50.1%"], ["all backward", "300.00", "30.0%"])
    assert (between, step) == (["between operators", "199.00", "19.9%"], ["step", "1000.00", "100.0%"])


def test_profile_from_the_command_line(tmp_path, capsys):
    choice = ["--profile", "resnet18", "--mode", "inference", "--dtype", "float32"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    assert "resnet18, inference, float32, 2 images, fused; a product has" in capsys.readouterr().out
    (found,) = results(tmp_path, "layers.json")["outcomes"]
    assert found["ceilings"]["flops"] > 0 and found["ceilings"]["bytes"] > 0 and found["lines"]
    with pytest.raises(SystemExit):
        main(["--profile", "resnet9000", "--output", str(tmp_path)])


@pytest.mark.parametrize("name", ["conv_fprop", "conv_fprop_inference", "conv_dgrad", "conv_wgrad"])
def test_the_native_passes_are_recognised_by_their_schemas(name):
    x, weight, y = torch.empty(2, 8, 6, 6), torch.empty(16, 8, 3, 3), torch.empty(2, 16, 3, 3)
    geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    known = {"x": x, "weight": weight, "grad": y, "input_plane": (6, 6), "filter": (3, 3), **geometry}
    schema = getattr(torch.ops.resnet_fused, name).default._schema
    bound = {a.name: known[a.name] for a in schema.arguments if a.name in known}
    result = {"conv_dgrad": x, "conv_wgrad": weight}.get(name, y)
    call = recorder.call_of(f"resnet_fused.{name}", "forward", bound, result, 1.0)
    assert call.of == recorder.Signature((2, 8, 6, 6), (16, 8, 3, 3), (2, 2))
    assert call.flops == 2 * y.numel() * 8 * 9
    assert call.what == {"conv_dgrad": "dgrad", "conv_wgrad": "wgrad"}.get(name, "fprop")
    operands = {"conv_dgrad": (y, weight, x), "conv_wgrad": (y, x, weight)}.get(name, (x, weight, y))
    assert call.bytes == sum(t.nbytes for t in operands)
