# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Where a fused network's time goes on the CPU, layer by layer, and how far each is from the machine's ceilings.

Operations are a direct convolution's, whatever computes it. Bytes are what an operator cannot avoid: its operands and
results, once; out of a cache they come faster than a copy. Layers of the same shapes share a line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import ceilings, processes, report
from benchmarks.cases import DTYPES, Case, Settings, enter
from benchmarks.ceilings import Ceilings
from benchmarks.entrant import Stored, step_of
from benchmarks.networks import BATCH, build
from benchmarks.photographs import photographs
from benchmarks.recorder import Call, Recorder, Signature

STEPS = 3  # recorded, of which the one of median time is shown
SMALLEST_SHARE = 0.003  # of the time: what takes less shares a line
QUICK_CEILINGS = {"side": 128, "largest_copy": 1 << 20}

NORMS = ("bn_", "batch_norm", "relu_backward_add")  # parts of the names of batch norms' operators

Key = tuple[str, str, str, str]  # phase, layers, what, operator


@dataclass(frozen=True)
class Line:
    """All calls of one kind in a step."""

    phase: str
    layers: str
    what: str
    operator: str
    calls: int
    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class Profile:
    """A step's lines; ``seconds`` of the whole step, recording left out; ``ceilings`` of the case's dtype."""

    case: Case
    batch: int
    lines: list[Line]
    seconds: float
    ceilings: Ceilings


def names_of(network: nn.Module, x: Tensor) -> dict[object, list[str]]:
    """The layers' names by what the operators that run them work on.

    By its signature a convolution, by its sizes as a product (images' pixels, channels, filters) one of 1x1 and a
    linear layer, by its input's shape a batch norm.
    """
    found: dict[object, list[str]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        shape = tuple(inputs[0].shape)
        if isinstance(module, nn.Conv2d):
            weight = tuple(module.weight.shape)
            keys: list[object] = [Signature(shape, weight, tuple(module.stride))]
            keys += [(output.numel() // weight[0], *weight[1::-1])] if weight[2:] == (1, 1) else []
        elif isinstance(module, nn.Linear):
            keys = [(len(inputs[0]), module.in_features, module.out_features)]
        else:
            keys = [shape]
        for key in keys:
            found.setdefault(key, []).append(name)

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.register_forward_hook(lambda *a, n=name: note(n, *a))
    with torch.no_grad():
        network(x)
    return found


def key_of(call: Call, names: dict[object, list[str]]) -> Key:
    """What of its kind a call is summed up with."""
    of, what = call.of, call.what
    candidates = [of]
    if isinstance(of, Signature):
        what = f"{what} {of}"
    elif call.flops:
        m, k, n = of[-3:]
        what = f"({m}, {k}) x ({k}, {n})"
        # dgrad multiplies the gradient by the weight, wgrad the gradient, transposed, by the input.
        candidates = [of] if call.phase == "forward" else [(m, n, k), (k, n, m)]
    else:
        what = "x".join(map(str, of))
        candidates = [of] if any(part in call.operator for part in NORMS) else []
    found = next((names[c] for c in candidates if c in names), [])
    layers = f"{found[0]}{f' +{len(found) - 1}' if len(found) > 1 else ''}" if found else ""
    return call.phase, layers, what, call.operator


def summed(calls: Sequence[Call], names: dict[object, list[str]], seconds: float) -> list[Line]:
    """Lines in the order of first calls, and what is too short for one, each phase's together."""
    groups: dict[Key, list[Call]] = {}
    for call in calls:
        groups.setdefault(key_of(call, names), []).append(call)
    rest: dict[str, list[Call]] = {}
    lines = []
    for key, group in groups.items():
        if sum(c.seconds for c in group) < SMALLEST_SHARE * seconds:
            rest.setdefault(key[0], []).extend(group)
        else:
            lines.append(line_of(key, group))
    lines += [line_of((phase, "", "", "others"), group) for phase, group in rest.items()]
    phases = list(dict.fromkeys(c.phase for c in calls))
    return sorted(lines, key=lambda line: phases.index(line.phase))


def line_of(key: Key, calls: Sequence[Call]) -> Line:
    return Line(*key, len(calls), *(sum(getattr(c, what) for c in calls) for what in ("seconds", "flops", "bytes")))


def profile(stored: Stored, case: Case, quick: bool) -> Profile:
    """Record steps of the fused network, in this process."""
    network, images = stored.load()
    names = names_of(enter("eager", network, case).eval(), images.to(case.module_dtype))
    step = step_of("fused", stored, case)
    step()
    recorded = []
    for _ in range(STEPS):
        recorder = Recorder()
        begin = time.perf_counter()
        with recorder:
            step()
        recorded.append((time.perf_counter() - begin - recorder.own, recorder.calls))
    seconds, calls = sorted(recorded, key=lambda r: r[0])[STEPS // 2]
    found = ceilings.measure(DTYPES[case.dtype], **(QUICK_CEILINGS if quick else {}))
    return Profile(case, len(images), summed(calls, names, seconds), seconds, found)


def profiles(names: Sequence[str], settings: Settings) -> Iterator[Profile]:
    """Of every case of the named networks, each in a process of its own."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            stored = Stored(Path(folder))
            images = photographs(settings.batch_or(BATCH), settings.size)
            stored.save(build(name, images), images)
            for case in settings.cases(name, is_network=True):
                yield processes.apart(profile, stored, case, settings.quick)


def rates(line: Line, found: Profile) -> tuple[str, ...]:
    """GFLOP/s and GB/s, each with its share of the ceiling."""
    cells = []
    for amount, most in ((line.flops, found.ceilings.flops), (line.bytes, found.ceilings.bytes)):
        rate = amount / line.seconds
        cells += [f"{rate / 1e9:.1f}", f"{rate / most:.0%}"] if amount and line.operator != "others" else ["", ""]
    return tuple(cells)


def table(found: Profile) -> str:
    """A heading, one line per kind of call, and the time between operators."""
    lines = found.lines
    between = found.seconds - sum(line.seconds for line in lines)

    def row(first: Sequence[str], calls: str, seconds: float, last: Sequence[str]) -> tuple[str, ...]:
        return (*first, calls, f"{1e3 * seconds:.2f}", f"{seconds / found.seconds:.1%}", *last)

    rows = [
        row(
            (o.phase, o.layers, o.what, o.operator),
            str(o.calls),
            o.seconds,
            rates(o, found),
        )
        for o in lines
    ]
    for phase in dict.fromkeys(line.phase for line in lines):
        part = sum(line.seconds for line in lines if line.phase == phase)
        rows.append(row((f"all {phase}", "", "", ""), "", part, ("",) * 4))
    rows.append(row(("between operators", "", "", ""), "", between, ("",) * 4))
    rows.append(row(("step", "", "", ""), "", found.seconds, ("",) * 4))
    header = ("", "layers", "what", "operator", "calls", "ms", "share", "GFLOP/s", "of product", "GB/s", "of copy")
    most = f"a product has {found.ceilings.flops / 1e9:.0f} GFLOP/s, a copy {found.ceilings.bytes / 1e9:.1f} GB/s"
    return f"{found.case}, {found.batch} images, fused; {most}\n{report.table(header, rows)}"


def record(found: Profile) -> dict[str, object]:
    """The profile as JSON; seconds, operations and bytes of one step, ceilings per second."""
    return {
        "subject": found.case.subject,
        "mode": found.case.mode,
        "dtype": found.case.dtype,
        "batch": found.batch,
        "seconds": found.seconds,
        "ceilings": asdict(found.ceilings),
        "lines": [asdict(line) for line in found.lines],
    }
