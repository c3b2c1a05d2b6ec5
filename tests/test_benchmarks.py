# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The benchmarks work from end to end on small shapes, and a failed check fails them."""

import dataclasses
import functools
import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from simulator import needs_tensor_cores, simulated
from torch import nn

import resnet_fused
from resnet_fused import ops
from resnet_fused.engine import current_engine

# Appended, so that the package is still imported from where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import (  # noqa: E402
    bandwidth,
    blocks,
    bottleneck,
    cases,
    ceilings,
    convolutions,
    depth,
    device_clock,
    entrant,
    layers,
    networks,
    peers,
    processes,
    recorder,
    report,
    small,
)
from benchmarks.__main__ import main, parse  # noqa: E402
from benchmarks.cases import Case, Job, Outcome, compiled_step  # noqa: E402
from benchmarks.checks import DRAWS, Check, check  # noqa: E402
from benchmarks.memory import bytes_kept  # noqa: E402
from benchmarks.photographs import photographs  # noqa: E402
from benchmarks.timing import Effort, Race, Spread, race  # noqa: E402

CPU = torch.device("cpu")


BLOCK = ["--quick", "--blocks", "resnet18.layer1"]


def results(folder, name, device=CPU):
    return json.loads((folder / report.slug(report.device_name(device)) / name).read_text())


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


@pytest.mark.parametrize(("name", "dtype"), [("onnxruntime", "float32"), ("openvino", "float32")])
def test_a_runtime_computes_what_the_network_does(name, dtype, tmp_path):
    for module in ("onnx", "onnxscript", name):
        pytest.importorskip(module)
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
        ("backward", "conv2", f"dgrad wgrad {second}", 2 * flops[second]),
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


class Slow(nn.Module):
    """What a compiler might return: a module that takes at least `SECONDS`."""

    SECONDS = 0.05

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        time.sleep(self.SECONDS)
        return self.module(x)


class Broken(Slow):
    """What torch.compile returns where there is no compiler."""

    def forward(self, x):
        raise RuntimeError("no compiler:\nlook elsewhere")


def test_compile_is_a_contestant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: Slow(module))
    assert main([*BLOCK, "--peers", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "compiled ms/image" in shown and "compiled speed" in shown and "missing" not in shown
    outcomes = results(tmp_path, "residual.json")["outcomes"]
    assert [o["mode"] for o in outcomes] == ["training", "inference"]
    for o in outcomes:
        assert o["compiled_seconds"]["low"] > Slow.SECONDS
        assert "compiled_speed" in o and "absent" not in o


def outcome_of(times, absent):
    """An outcome with these seconds per batch of two images."""
    case = Case("resnet18.layer1.0", is_network=False, mode="inference", dtype="float32")
    race = Race({name: [t] for name, t in times.items()}, others=0.0)
    return Outcome(case, 2, Check(1, 1, None, []), race, {}, absent)


def test_columns_of_the_contestants():
    first = outcome_of({"eager": 0.6, "fused": 0.2}, {"compiled": "TritonMissing: no Triton"})
    second = outcome_of({"eager": 0.6, "fused": 0.2, "native": 0.3, "compiled": 0.1}, {})
    fused = ("300.00 [300.00, 300.00]", "100.00 [100.00, 100.00]", "3.00x [3.00, 3.00]")
    native = ("150.00 [150.00, 150.00]", "2.00x [2.00, 2.00]")
    assert report.speed_columns([first, second]) == [
        ("eager ms/image", *(f"{n} {what}" for n in ("fused", "native", "compiled") for what in ("ms/image", "speed"))),
        (*fused, "", "", "TritonMissing", ""),
        (*fused, *native, "50.00 [50.00, 50.00]", "6.00x [6.00, 6.00]"),
    ]
    assert report.progress(first) == "check ok, fused 3.00x [3.00, 3.00], compiled: TritonMissing"
    speeds = "fused 3.00x [3.00, 3.00], native 2.00x [2.00, 2.00], compiled 6.00x [6.00, 6.00]"
    assert report.progress(second) == f"check ok, {speeds}"
    assert report.summary([first, second]).split()[-3:] == ["3.00x", "2.00x", "6.00x"]
    assert report.as_record(second)["compiled_speed"]["median"] == pytest.approx(6.0)
    without = outcome_of({"eager": 0.6, "fused": 0.2}, {})
    assert report.speed_columns([without])[1:] == [fused]


def test_a_network_has_a_line_for_each_contestant():
    race = Race({"eager": [0.6], "fused": [0.2]}, others=0.0, peak={"eager": 3 * 10**9, "fused": 2 * 10**9})
    case = Case("resnet18", is_network=True, mode="training", dtype="float32")
    absent = {"minimal": "MemoryError: too little"}
    outcome = Outcome(case, 2, Check(1, 1, None, []), race, {"eager": 4e6, "fused": 3e6, "minimal": 2e6}, absent)
    *_, eager, fused, minimal = report.outcome_table([outcome]).splitlines()
    assert eager.split() == "resnet18 training float32 2 eager 300.00 [300.00, 300.00] 3.00 4.00 ok".split()
    assert fused.split() == "fused 100.00 [100.00, 100.00] 3.00x [3.00, 3.00] 2.00 3.00".split()
    assert minimal.split() == "minimal MemoryError 2.00".split()


class Noting(nn.Conv2d):
    """A convolution that notes on which engine its copies run; the reference in float64 does not count."""

    noted: list = []  # the class's, so that copies share it

    def forward(self, x):
        if x.dtype != torch.float64:
            self.noted.append(current_engine())
        return super().forward(x)


@pytest.mark.parametrize("native", [False, True])
def test_the_native_contestant_runs_on_the_native_engine(native, monkeypatch):
    module = Noting(1, 1, 1)
    monkeypatch.setattr(Noting, "noted", [])
    case = Case("convolution", is_network=False, mode="training", dtype="float32")
    x = torch.ones(1, 1, 2, 2)
    outcome = Job(case, module, x, lambda draw: x, Effort.exactly(1), compile=False, native=native).run()
    assert ("native" in outcome.race.seconds) == ("native" in outcome.kept) == native
    # Check, kept bytes, warm-up, one round.
    assert module.noted.count("native") == (4 if native else 0)
    assert outcome.check.passed and len(module.noted) > 4


def test_a_compiler_that_fails_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: Broken(module))
    assert main([*BLOCK, "--peers", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("resnet18.layer1.1 identity"))
    assert "RuntimeError" in line
    assert "compiled: RuntimeError: no compiler: look elsewhere (2 of 2 cases)" in shown
    for o in results(tmp_path, "residual.json")["outcomes"]:
        assert o["absent"] == {"compiled": "RuntimeError: no compiler: look elsewhere"}
        assert o["fused_seconds"]["median"] > 0
        assert "compiled_seconds" not in o and "compiled_speed" not in o


def test_compile_shows_where_times_are_plotted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: Slow(module))
    choice = ["--bottleneck", "--mode", "inference", "--dtype", "float32", "--peers"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    assert "compiled ms/image" in capsys.readouterr().out
    assert all("compiled_seconds" in o for o in results(tmp_path, "bottleneck.json")["outcomes"])


@pytest.mark.slow
def test_torch_compile(tmp_path):
    choice = ["--mode", "inference", "--dtype", "float32", "--peers"]
    assert main([*BLOCK, *choice, "--output", str(tmp_path)]) == 0
    (outcome,) = results(tmp_path, "residual.json")["outcomes"]
    assert outcome["compiled_seconds"]["median"] > 0


def test_every_case_is_compiled_however_many_there_are(monkeypatch):
    """torch.compile gives up on a forward of which it has compiled eight versions."""
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    case = Case("convolution", is_network=False, mode="inference", dtype="float32")
    for index in range(10):
        module = nn.Sequential(nn.Conv2d(1, 2 + index, 1))
        compiled_step(module, torch.ones(1, 1, 2, 2), case)
        assert len(compiled) == index + 1


def test_defaults_of_a_device():
    on_cpu, on_gpu = parse([]), parse(["--device", "cuda"])
    assert on_cpu.dtype == ("float32", "bfloat16") and on_gpu.dtype == ("float32", "bfloat16", "float16")
    assert on_gpu.peers and not on_cpu.peers
    assert not parse(["--device", "cuda", "--no-peers"]).peers
    assert on_cpu.blocks == on_cpu.networks == on_gpu.blocks == on_gpu.networks == ""
    assert on_cpu.bandwidth is None
    assert on_cpu.batch == 8 and on_gpu.batch is None
    assert parse(["--quick"]).batch is None and parse(["--batch", "3"]).batch == 3
    assert parse(["--networks"]).batch is None and parse(["--small"]).networks is None


def test_a_cuda_build_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(ops, "_WITH_CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.native_device_reason(torch.device("cuda")) == "no GPU is visible"
    assert not parse(["--device", "cuda"]).native


@pytest.mark.parametrize(("with_kernels", "expected"), [(True, []), (False, None)])
def test_bandwidth_is_in_a_gpu_s_default_run(monkeypatch, with_kernels, expected):
    monkeypatch.setattr(resnet_fused.ops, "has_kernels", lambda device: with_kernels)
    assert parse(["--device", "cuda"]).bandwidth == expected
    assert parse(["--device", "cuda", "--blocks", "layer1"]).bandwidth is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "float16"],
        ["--bandwidth", "--device", "meta"],
        ["--small", "--device", "cuda"],
        ["--profile", "--device", "cuda"],
        ["--native", "--device", "meta"],
        ["--convolutions", "--device", "meta"],
    ],
)
def test_what_a_device_cannot_run_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


KERNELS = [kernel.name for kernel in bandwidth.KERNELS]


def test_bandwidth(tmp_path, capsys):
    assert main(["--quick", "--repeats", "1", "--bandwidth", "0.05", "0.1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "[44/44] relu_backward_add, bfloat16, 0.1 MB" in shown and "checks" not in shown
    found = results(tmp_path, "bandwidth.json")["outcomes"]
    row = {"float32": 256 * 32 * 4, "bfloat16": 256 * 32 * 2}  # bytes
    heights = [("float32", 2), ("float32", 3), ("bfloat16", 3), ("bfloat16", 6)]
    expected = [(dtype, height * row[dtype], kernel) for dtype, height in heights for kernel in KERNELS]
    assert [(o["dtype"], o["activation_bytes"], o["kernel"]) for o in found] == expected
    for o in found:
        moved = (o["activations_read"] + o["activations_written"]) * o["activation_bytes"]
        assert o["bytes_per_second"]["median"] == pytest.approx(moved / o["seconds"]["median"])
        copied = 2 * o["activation_bytes"] / o["copy_seconds"]["median"]
        assert o["copy_bytes_per_second"]["median"] == pytest.approx(copied)
        assert o["ratio"]["median"] == pytest.approx(o["bytes_per_second"]["median"] / copied)
    assert {path.name for path in tmp_path.glob("*/*")} == {"bandwidth.json", "bandwidth.png"}


@pytest.mark.parametrize("kernel", [*bandwidth.KERNELS, bandwidth.COPY], ids=[*KERNELS, "copy"])
def test_a_kernel_reads_and_writes_what_is_counted(kernel, device):
    operands = bandwidth.Operands.of(1 << 18, torch.float32, device)
    fields = {f.name: getattr(operands, f.name) for f in dataclasses.fields(operands)}

    def run(**changed):
        copies = {name: t.clone() for name, t in {**fields, **changed}.items()}
        result = kernel.call(bandwidth.Operands(**copies))
        return [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]

    usual = run()
    assert sum(t.nbytes == operands.y.nbytes for t in usual) == kernel.writes
    # Another result with NaN in place of an operand: it was read.
    changed = [run(**{name: torch.full_like(fields[name], torch.nan)}) for name in ("y", "grad", "shortcut", "out")]
    assert sum(any(not torch.equal(a, b) for a, b in zip(usual, c, strict=True)) for c in changed) == kernel.reads


def test_a_lap_goes_round_and_keeps_its_results():
    kept = []

    class Result:
        def __init__(self, operands):
            kept.append(operands)

        def __del__(self):
            kept.append(f"{kept[-1]} replaces")

    lap = bandwidth.lap_of(bandwidth.Kernel("fake", 1, 0, Result), ["a", "b", "c"], 4)
    lap()
    assert kept == ["a", "b", "c", "a", "a replaces"]


def test_bandwidth_is_bytes_over_seconds():
    kernel = bandwidth.Kernel("fake", reads=2, writes=1, call=None)
    times = Race({"kernel": [2.0, 4.0], "copy": [1.0, 1.0]}, others=0.0)
    outcome = bandwidth.Outcome(bandwidth.Case(kernel, "float32", 1e6), 1_000_000, 10, times, hidden=True)
    assert outcome.speed("kernel") == Spread.of([15e6, 7.5e6])
    assert outcome.speed("copy") == Spread.of([20e6, 20e6])
    assert outcome.ratio == Spread.of([0.75, 0.375])


def test_laps_fill_the_cache():
    assert bandwidth.calls_per_lap(1_000_000, 50_000_000) == 200
    assert bandwidth.calls_per_lap(512_000_000, 50_000_000) == bandwidth.FEWEST_CALLS
    assert bandwidth.calls_per_lap(1, 50_000_000) == bandwidth.MOST_CALLS
    assert bandwidth.cache_bytes(CPU) >= 1 << 18


def test_convolutions_of_the_networks():
    roles = convolutions.roles(224)
    # In both roles: ResNet-18's 3x3 of stride 1, and what is layer1's conv3 and downsampling in ResNet-50.
    assert len(roles) == len({role.shape for role in roles}) + 5 == 34
    chosen = convolutions.select("", 224)
    assert str(chosen["resnet18.conv1"].shape) == "3->64 7x7/2 on 224x224"
    assert str(chosen["resnet18.layer2.0.downsample.0"].shape) == "64->128 1x1/2 on 56x56"
    assert str(chosen["resnet50.layer3.0.conv2"].shape) == "256->256 3x3/2 on 28x28"
    assert chosen["resnet50.layer3.0.conv2"].behind_norm and not chosen["resnet18.layer1.0.conv1"].behind_norm
    assert chosen["resnet18.layer4.0.conv2"].shape.flops(2) == 2 * 2 * 7 * 7 * 512 * 512 * 9
    # By any of its names, although another network's came first.
    assert "resnet50.layer1.0.conv2" in convolutions.select("resnet50.layer1", 224)
    assert convolutions.select("resnet9000", 224) == {}
    assert len(convolutions.select("", 32)) > 20


def test_what_is_said_of_convolutions(tmp_path):
    role = convolutions.Role(convolutions.Shape(64, 56, 64, 1, 1), True)
    found = []
    for which in convolutions.PASSES:
        for form, native in (("raw", 2e-3), ("fused", 1e-3)):
            case = convolutions.Case("layer1.conv1", *role, 32, "bfloat16", which, form)
            times = Race({"native": [native], "library": [1.5e-3]}, others=0.0)
            found.append(convolutions.Outcome(case, Check(1, 1, None, []), times, hidden=form == "fused"))
    *_, line, footnote = convolutions.table(found).splitlines()
    cells = "layer1.conv1 64->64 1x1 on 56x56 32 bfloat16 wgrad 2000.0* 1500.0* 0.75x 0.4 1000.0 1500.0 1.50x 0.8 ok"
    assert line.split() == cells.split() and footnote == "* the time of launching is in it"
    assert convolutions.summary(found).splitlines()[2].split()[-4:] == ["1.50x", "1", "of", "1"]
    record = convolutions.records(found)[1]
    assert record["speed"]["median"] == 1.5 and record["library_seconds"]["median"] == 1.5e-3
    assert record["native_tflops"] == pytest.approx(2 * 32 * 56 * 56 * 64 * 64 / 1e-3 / 1e12)
    convolutions.plot(found, tmp_path / "convolutions.png", CPU)
    assert (tmp_path / "convolutions.png").stat().st_size > 0


@pytest.mark.parametrize("behind_norm", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", convolutions.PASSES)
def test_the_library_s_passes_are_what_float64_computes(which, fused, behind_norm):
    shape = convolutions.Shape(8, 9, 16, 3, 2)
    passes = convolutions.Passes(shape, 40, torch.float32, CPU, behind_norm=behind_norm)
    found = passes.compared(which, passes.library(which, fused=fused)())
    exact = passes.exact(which, fused=fused)
    assert found.shape == exact.shape and len(exact) == (16 if which == "wgrad" else 2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    if which == "dgrad":
        assert (passes.stopped(exact) == 0).any() == behind_norm


@pytest.mark.cuda
@needs_tensor_cores
def test_convolutions_on_the_gpu(tmp_path, capsys):
    choice = ["--convolutions", "resnet18.layer2.0", "--device", "cuda"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "not native: float32: float32, and torch.backends" in shown and "all checks passed" in shown
    found = results(tmp_path, "convolutions.json", torch.device("cuda"))["outcomes"]
    assert len(found) == 2 * 3 * 6  # dtypes, convolutions, passes in both forms
    assert {o["behind_norm"] for o in found} == {True, False}
    for o in found:
        assert o["batch"] == 2 and o["check"]["passed"] and o["native_seconds"]["median"] > 0


@pytest.mark.cuda
@needs_tensor_cores
def test_a_wrong_convolution_fails_the_run(tmp_path, capsys, monkeypatch):
    right = ops.conv_wgrad
    monkeypatch.setattr(ops, "conv_wgrad", lambda *arguments: right(*arguments) * 1.02)
    choice = ["--convolutions", "resnet18.layer1", "--dtype", "bfloat16", "--device", "cuda"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 1
    assert "fused wgrad: dw: FAILED" in capsys.readouterr().out


@pytest.mark.cuda
def test_a_block_on_the_gpu(tmp_path):
    assert main([*BLOCK, "--device", "cuda", "--output", str(tmp_path)]) == 0
    found = results(tmp_path, "residual.json", torch.device("cuda"))
    assert found["environment"]["cuda"] == torch.version.cuda
    cases = [(o["mode"], o["dtype"]) for o in found["outcomes"]]
    assert cases == [(m, d) for m in ("training", "inference") for d in ("float32", "bfloat16", "float16")]
    for o in found["outcomes"]:
        assert o["check"]["passed"] and o["eager_seconds"]["median"] > 0 and o["fused_seconds"]["median"] > 0
        assert ("native_seconds" in o) == (ops.native_device_reason(torch.device("cuda")) is None)
        # On the simulator there is no Triton; a GPU may do without it, too, but has to say so.
        assert ("compiled_seconds" in o) != ("compiled" in o.get("absent", {}))
        assert "absent" in o or not simulated()


@pytest.mark.cuda
@pytest.mark.slow
def test_a_network_on_the_gpu(tmp_path):
    choice = ["--networks", "resnet18", "--dtype", "bfloat16", "--device", "cuda"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    outcomes = results(tmp_path, "residual.json", torch.device("cuda"))["outcomes"]
    assert [(o["subject"], o["mode"]) for o in outcomes] == [("resnet18", "training"), ("resnet18", "inference")]
    assert all(o["check"]["passed"] for o in outcomes)


@pytest.mark.cuda
def test_bandwidth_on_the_gpu(tmp_path, capsys):
    choice = ["--bandwidth", "0.03", "--device", "cuda"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    found = results(tmp_path, "bandwidth.json", torch.device("cuda"))["outcomes"]
    expected = [(dtype, kernel) for dtype in ("float32", "bfloat16", "float16") for kernel in KERNELS]
    assert [(o["dtype"], o["kernel"]) for o in found] == expected
    assert all(o["ratio"]["median"] > 0 and o["copy_seconds"]["low"] > 0 for o in found)
    # The simulator is done before its caller goes on, so that launching takes part in its times.
    assert not simulated() or "* the time of launching is in it" in capsys.readouterr().out


@pytest.mark.cuda
def test_the_gpu_s_clock():
    device = torch.device("cuda")
    clock, longer = (device_clock.DeviceClock(device, head_start=s) for s in (1e-6, 10.0))
    assert clock.passes == 1 < longer.passes
    x = torch.ones(1 << 20, device=device)
    once, often = (min(clock(lambda n=n: [x.add_(1) for _ in range(n)]) for _ in range(3)) for n in (1, 100))
    assert 10 * once < often < 1.0


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
        eager,
        {"fused": fused},
        lambda draw: torch.full((1, 1, 4, 4), float(draw)),
        autocast=None,
        gradients=True,
        engines={"fused": "auto"},
    )
    assert verdict.passed is passed and verdict.draws == draws


def test_an_output_gets_no_further_input():
    eager, fused = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
    verdict = check(
        eager,
        {"fused": fused},
        lambda draw: torch.ones(1, 1, 4, 4),
        autocast=None,
        gradients=True,
        engines={"fused": "auto"},
    )
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


def test_a_race_takes_turns():
    calls = []
    entrants = {letter: functools.partial(calls.append, letter) for letter in "efc"}
    result = race(entrants, CPU, Effort.exactly(4))
    assert "".join(calls) == "efc" + "efc" + "fce" + "cef" + "efc"
    assert {name: len(times) for name, times in result.seconds.items()} == {"e": 4, "f": 4, "c": 4}


def test_a_race_ends_in_time():
    def nothing():
        pass

    assert race({"a": nothing}, CPU, Effort(0.0, fewest_rounds=2)).rounds == 2
    assert race({"a": nothing}, CPU, Effort(60.0, most_rounds=5)).rounds == 5


def test_a_race_with_another_clock():
    clock = {"a": iter([1.0, 3.0]), "b": iter([4.0, 6.0])}
    result = race({name: lambda n=name: n for name in clock}, CPU, Effort.exactly(2), lambda call: next(clock[call()]))
    assert result.time("a").median == 2.0
    assert result.speed("a", against="b") == Spread.of([4.0, 2.0])


def test_others_disturb_by_the_cores_that_are_not_spare():
    assert Race({}, others=1.5).disturbed
    assert not Race({}, others=1.5, spare=2.0).disturbed
    assert Race({}, others=2.5, spare=2.0).disturbed


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
