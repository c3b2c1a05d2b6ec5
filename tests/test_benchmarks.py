# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The benchmarks work from end to end on small shapes, and a failed check fails them."""

import dataclasses
import functools
import time

import pytest
import torch
from benchmarking import CPU, results
from simulator import needs_tensor_cores, simulated
from torch import nn

import resnet_fused
from benchmarks import (
    bandwidth,
    blocks,
    bottleneck,
    convolutions,
    depth,
    device_clock,
    networks,
    overhead,
    report,
)
from benchmarks.__main__ import main, parse
from benchmarks.cases import Case, Job, Outcome, compiled_step
from benchmarks.photographs import photographs
from benchmarks.timing import Effort, Race, Spread, race
from resnet_fused import ops
from resnet_fused.checks import DRAWS, Check, check
from resnet_fused.counting import bytes_kept
from resnet_fused.engine import current_engine

BLOCK = ["--quick", "--blocks", "resnet18.layer1"]


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


@pytest.mark.slow(reason="torch.compile generates and compiles C++")
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
    found = passes.compared(which, passes.call_library(which, fused=fused)())
    exact = passes.exact(which, fused=fused)
    assert found.shape == exact.shape and len(exact) == (16 if which == "wgrad" else 2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    if which == "dgrad":
        assert (passes.stopped(exact) == 0).any() == behind_norm


@pytest.mark.cuda
@needs_tensor_cores
@pytest.mark.slow(reason="three convolutions of a ResNet-18, kernel by kernel where the device is simulated")
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
@pytest.mark.slow(reason="six cases of a block, kernel by kernel where the device is simulated")
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
@pytest.mark.slow(reason="a ResNet-18, kernel by kernel where the device is simulated")
def test_a_network_on_the_gpu(tmp_path):
    choice = ["--networks", "resnet18", "--dtype", "bfloat16", "--device", "cuda"]
    assert main(["--quick", *choice, "--output", str(tmp_path)]) == 0
    outcomes = results(tmp_path, "residual.json", torch.device("cuda"))["outcomes"]
    assert [(o["subject"], o["mode"]) for o in outcomes] == [("resnet18", "training"), ("resnet18", "inference")]
    assert all(o["check"]["passed"] for o in outcomes)


@pytest.mark.cuda
@pytest.mark.slow(reason="tensors of 0.03 GB, kernel by kernel where the device is simulated")
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


def test_overhead_measures_every_block_in_every_mode(tmp_path, capsys):
    assert main(["--overhead", "--quick", "--output", str(tmp_path)]) == 0
    measured = results(tmp_path, "overhead.json")["outcomes"]
    assert len(measured) == len(overhead.BLOCKS) * len(overhead.MODES)
    assert all(0 < o["eager"] < 1e6 and 0 < o["fused"] < 1e6 for o in measured)
    assert "forward in training" in capsys.readouterr().out
