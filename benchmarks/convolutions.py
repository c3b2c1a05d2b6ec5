# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The convolutions of ResNet-18's and ResNet-50's blocks: the native kernels against the library's, pass by pass, raw
and fused.

`benchmarks/passes.py` says what that means. On a GPU a call is timed alone, out of cold caches, without its launching;
on the CPU by the clock on the wall.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import nn

from benchmarks import report
from benchmarks.cases import DTYPES, Settings
from benchmarks.device_clock import DeviceClock
from benchmarks.networks import NETWORKS
from benchmarks.passes import PASSES, Passes, Shape
from benchmarks.timing import Effort, Race, Spread, race
from resnet_fused import ops, testing
from resnet_fused.checks import Check

BATCHES = (32, 256)  # images
FORMS = ("raw", "fused")
HEAD_START = 0.001  # seconds: longer than it takes to launch the library's fused dgrad
SECONDS = 0.1  # of timing, per case


@dataclass(frozen=True)
class Case:
    """What is measured. ``dtype`` names a key of `DTYPES`; a GPU multiplies float32 as TF32."""

    name: str
    shape: Shape
    behind_norm: bool
    batch: int
    dtype: str
    which: str
    form: str

    @property
    def fused(self) -> bool:
        return self.form == "fused"

    def __str__(self) -> str:
        return f"{self.name} {self.shape}, batch {self.batch}, {self.dtype}, {self.form} {self.which}"


@dataclass(frozen=True)
class Outcome:
    """What was found. The race is between "native" and "library"; ``hidden``: whether launching is not in its times."""

    case: Case
    check: Check
    race: Race
    hidden: bool

    @property
    def speed(self) -> Spread:
        """The library's time over the native one's."""
        return self.race.speed("native", "library")


@dataclass(frozen=True)
class Job:
    """A case, its operands, and what to time it by."""

    case: Case
    passes: Passes
    effort: Effort
    clock: DeviceClock | None  # None on the CPU

    def run(self) -> Outcome:
        """Check the native pass by the library's error, then time both."""
        case, passes = self.case, self.passes
        calls = {
            "native": passes.call_native(case.which, fused=case.fused),
            "library": passes.call_library(case.which, fused=case.fused),
        }
        found, seen = (passes.compared(case.which, call()) for call in calls.values())
        exact = passes.exact(case.which, fused=case.fused)
        if case.which == "dgrad" and case.fused:
            seen, exact = passes.stopped(seen), passes.stopped(exact)
        verdict = testing.compare({"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[case.which], found, seen, exact)
        del found, seen, exact
        failures = [] if verdict.passed else [str(verdict)]
        if self.clock is not None:
            self.clock.hidden = True
        raced = race(calls, passes.x.device, self.effort, self.clock)
        return Outcome(case, Check(1, 1, verdict, failures), raced, self.clock is None or self.clock.hidden)


class Role(NamedTuple):
    """A convolution as a block has it: reading the block's input, or behind a batch norm and a ReLU."""

    shape: Shape
    behind_norm: bool


@functools.cache
def roles(size: int) -> dict[Role, list[str]]:
    """The distinct convolutions of both networks for images of ``size`` pixels, with the dotted names of each."""
    found: dict[Role, list[str]] = {}

    def note(name: str, conv: nn.Conv2d, arguments: tuple[torch.Tensor]) -> None:
        shape = Shape(conv.in_channels, arguments[0].shape[2], conv.out_channels, conv.kernel_size[0], conv.stride[0])
        assert conv.padding == (shape.padding,) * 2 and conv.groups == 1 and conv.dilation == (1, 1)
        behind_norm = not name.endswith(("conv1", "downsample.0"))
        found.setdefault(Role(shape, behind_norm), []).append(name)

    for network in NETWORKS:
        with torch.device("meta"):
            model = torchvision.models.get_model(network, weights=None).eval()
            for name, module in model.named_modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(functools.partial(note, f"{network}.{name}"))
            model(torch.empty(1, 3, size, size))
    return found


def select(part: str, size: int) -> dict[str, Role]:
    """The convolutions one of whose names contains ``part``, by that name."""
    matches = {role: [name for name in names if part in name] for role, names in roles(size).items()}
    return {names[0]: role for role, names in matches.items() if names}


def not_native(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a convolution is not native on the device, or None."""

    def empty(n: int, channels: int, side: int) -> torch.Tensor:
        t = torch.empty((n, channels, side, side), dtype=dtype, device=device)
        return t.to(memory_format=torch.channels_last)

    x, weight = empty(1, shape.channels, shape.side), empty(shape.filters, shape.channels, shape.taps)
    return ops.native_reason(x, weight, *shape.geometry, 1)


def native_only(chosen: Mapping[str, Role], settings: Settings) -> tuple[dict[str, Role], list[str], dict[str, str]]:
    """Of the convolutions and the settings' dtypes those that are native; and why others are not, by name."""
    device, smallest = settings.device, Shape(8, 1, 8, 1, 1)
    reasons = {dtype: not_native(smallest, DTYPES[dtype], device) for dtype in settings.dtypes}
    dtypes = [dtype for dtype in settings.dtypes if reasons[dtype] is None]
    for dtype in dtypes[:1]:
        reasons |= {name: not_native(role.shape, DTYPES[dtype], device) for name, role in chosen.items()}
    convolutions = {name: role for name, role in chosen.items() if reasons.get(name) is None}
    return convolutions, dtypes, {name: reason for name, reason in reasons.items() if reason}


def jobs(chosen: Mapping[str, Role], dtypes: Sequence[str], settings: Settings) -> Iterator[Job]:
    """Every pass of every convolution in both forms, with the batches asked for or `BATCHES`."""
    clock = DeviceClock(settings.device, HEAD_START) if settings.device.type == "cuda" else None
    for (name, role), dtype, batch in itertools.product(chosen.items(), dtypes, batches(settings)):
        passes = Passes(role.shape, batch, DTYPES[dtype], settings.device, behind_norm=role.behind_norm)
        for which, form in itertools.product(PASSES, FORMS):
            yield Job(Case(name, *role, batch, dtype, which, form), passes, settings.effort(SECONDS), clock)


def cases_per_shape(settings: Settings) -> int:
    """How many cases a convolution has in one dtype."""
    return len(PASSES) * len(FORMS) * len(batches(settings))


def batches(settings: Settings) -> tuple[int, ...]:
    return (settings.batch,) if settings.batch else BATCHES


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    return f"check {outcome.check}, speed {report.ratio(outcome.speed)}"


def tflops(outcome: Outcome, contestant: str) -> float:
    """10^12 floating-point operations per second, of the convolution alone."""
    return outcome.case.shape.flops(outcome.case.batch) / outcome.race.time(contestant).median / 1e12


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per convolution, batch, dtype and pass; both forms side by side."""
    lines: dict[tuple[str, ...], list[Outcome]] = {}
    for o in outcomes:
        c = o.case
        lines.setdefault((f"{c.name} {c.shape}", str(c.batch), c.dtype, c.which), []).append(o)
    rows = []
    for key, forms in lines.items():
        cells = []
        for o in forms:
            mark = "" if o.hidden else "*"
            times = (f"{1e6 * o.race.time(name).median:.1f}{mark}" for name in ("native", "library"))
            cells += [*times, f"{o.speed.median:.2f}x", f"{tflops(o, 'native'):.1f}"]
        rows.append((*key, *cells, " ".join(dict.fromkeys(str(o.check) for o in forms))))
    columns = [f"{form} {column}" for form in FORMS for column in ("native us", "library us", "speed", "TFLOP/s")]
    text = report.table(("", "batch", "dtype", "pass", *columns, "check"), rows)
    return text if all(o.hidden for o in outcomes) else f"{text}\n* the time of launching is in it"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Geometric means of the speeds and how often native won, by batch, dtype, pass and form."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for o in outcomes:
        key = (f"{o.case.form} {o.case.which}", str(o.case.batch), o.case.dtype)
        groups.setdefault(key, []).append(o.speed.median)
    rows = [
        (*key, f"{statistics.geometric_mean(s):.2f}x", f"{sum(v > 1 for v in s)} of {len(s)}")
        for key, s in sorted(groups.items())
    ]
    return report.table(("geometric mean of speeds", "batch", "dtype", "speed", "native wins"), rows)


def records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON; times in seconds."""
    return [
        {
            "convolution": o.case.name,
            **o.case.shape._asdict(),
            "behind_norm": o.case.behind_norm,
            "batch": o.case.batch,
            "dtype": o.case.dtype,
            "pass": o.case.which,
            "form": o.case.form,
            "check": {"passed": o.check.passed, "worst": str(o.check.worst)},
            **{f"{name}_seconds": asdict(o.race.time(name)) for name in o.race.seconds},
            "speed": asdict(o.speed),
            "native_tflops": tflops(o, "native"),
            "library_tflops": tflops(o, "library"),
            "rounds": o.race.rounds,
            "launching_hidden": o.hidden,
        }
        for o in outcomes
    ]


def plot(outcomes: Sequence[Outcome], path: Path, device: torch.device) -> None:
    """The fused passes' speeds, one panel per dtype and batch."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.case.form == "fused":
            groups.setdefault(f"{o.case.dtype}, batch {o.case.batch}", []).append(o)
    names = list(dict.fromkeys(o.case.name for o in outcomes))
    shape = (2 + 3 * len(groups), 1.4 + 0.4 * len(names))
    figure, axes = report.plt.subplots(1, len(groups), figsize=shape, squeeze=False, sharex=True, sharey=True)
    height = 0.8 / len(PASSES)
    for ax, (title, group) in zip(axes[0], groups.items(), strict=True):
        for index, which in enumerate(PASSES):
            speeds = [o.speed.median for o in group if o.case.which == which]
            rows = [row + height * (index - 1) for row in range(len(names))]
            ax.barh(rows, speeds, height=height, label=which)
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set_title(title, fontsize=10)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.supxlabel("the library's time / the native one's; above 1 native is faster", fontsize=9)
    figure.suptitle(f"Fused passes, native against library: {report.device_name(device)}", fontsize=11)
    figure.tight_layout()
    report.save(figure, path)
