# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Every convolution of ResNet-18 and ResNet-50: the native kernels against the library's, pass by pass, raw and fused.

`benchmarks/passes.py` says what that means. A call is timed alone, out of cold caches, without its launching.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn

from benchmarks import report
from benchmarks.cases import DTYPES, Settings
from benchmarks.checks import Check
from benchmarks.device_clock import DeviceClock
from benchmarks.networks import NETWORKS
from benchmarks.passes import PASSES, Passes, Shape
from benchmarks.timing import Effort, Race, Spread, race
from resnet_fused import ops, testing

BATCHES = (32, 256)  # images
FORMS = ("raw", "fused")
HEAD_START = 0.001  # seconds: longer than it takes to launch the library's fused dgrad
SECONDS = 0.1  # of timing, per case


@dataclass(frozen=True)
class Case:
    """What is measured. ``dtype`` names a key of `DTYPES`; float32 is multiplied as TF32."""

    name: str
    shape: Shape
    batch: int
    dtype: str
    which: str
    form: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape}, batch {self.batch}, {self.dtype}, {self.form} {self.which}"


@dataclass(frozen=True)
class Outcome:
    """What was found. The race is between "native" and "library"."""

    case: Case
    check: Check
    race: Race

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
    clock: DeviceClock

    def run(self) -> Outcome:
        """Check the native pass by the library's error, then time both."""
        which, fused = self.case.which, self.case.form == "fused"
        native = functools.partial(self.passes.native, which, fused=fused)
        library = self.passes.library(which, fused=fused)
        found, seen = (self.passes.compared(which, call(), fused=fused) for call in (native, library))
        verdict = testing.compare({"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[which], found, seen, self.exact)
        failures = [] if verdict.passed else [str(verdict)]
        raced = race({"native": native, "library": library}, self.passes.x.device, self.effort, self.clock)
        return Outcome(self.case, Check(1, 1, verdict, failures), raced)

    @property
    def exact(self) -> torch.Tensor:
        return self.passes.exact(self.case.which, fused=self.case.form == "fused")


@functools.cache
def shapes(size: int) -> dict[str, Shape]:
    """The distinct convolutions of both networks for images of ``size`` pixels, by the dotted name of the first."""
    found: dict[Shape, str] = {}

    def note(name: str, conv: nn.Conv2d, arguments: tuple[torch.Tensor]) -> None:
        shape = Shape(conv.in_channels, arguments[0].shape[2], conv.out_channels, conv.kernel_size[0], conv.stride[0])
        assert conv.padding == (shape.padding,) * 2 and conv.groups == 1 and conv.dilation == (1, 1)
        found.setdefault(shape, name)

    for network in NETWORKS:
        with torch.device("meta"):
            model = torchvision.models.get_model(network, weights=None)
            for name, module in model.named_modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(functools.partial(note, f"{network}.{name}"))
            model(torch.empty(1, 3, size, size))
    return {name: shape for shape, name in found.items()}


def select(part: str, settings: Settings) -> tuple[dict[str, Shape], dict[str, str]]:
    """The convolutions whose name contains ``part``, and why others of them, or dtypes, are not native."""
    chosen = {name: shape for name, shape in shapes(settings.size).items() if part in name}
    left = {name: reason for name, shape in chosen.items() if (reason := not_native(shape, settings, torch.float16))}
    some = Shape(8, 1, 8, 1, 1)
    left |= {dtype: r for dtype in settings.dtypes if (r := not_native(some, settings, DTYPES[dtype]))}
    return {name: shape for name, shape in chosen.items() if name not in left}, left


def not_native(shape: Shape, settings: Settings, dtype: torch.dtype) -> str | None:
    """Why a convolution is not native on the device, or None."""
    device = settings.device

    def empty(n: int, channels: int, side: int) -> torch.Tensor:
        t = torch.empty((n, channels, side, side), dtype=dtype, device=device)
        return t.to(memory_format=torch.channels_last)

    x, weight = empty(1, shape.channels, shape.side), empty(shape.filters, shape.channels, shape.taps)
    return ops.native_reason(x, weight, *shape.geometry, 1)


def jobs(chosen: Mapping[str, Shape], dtypes: Sequence[str], settings: Settings) -> Iterator[Job]:
    """Every pass of every convolution in both forms, with the batches asked for or `BATCHES`."""
    clock = DeviceClock(settings.device, HEAD_START)
    for (name, shape), dtype, batch in itertools.product(chosen.items(), dtypes, batches(settings)):
        passes = Passes(shape, batch, DTYPES[dtype], settings.device)
        for which, form in itertools.product(PASSES, FORMS):
            yield Job(Case(name, shape, batch, dtype, which, form), passes, settings.effort(SECONDS), clock)


def cases_per_shape(settings: Settings) -> int:
    """How many cases a convolution has in one dtype."""
    return len(PASSES) * len(FORMS) * len(batches(settings))


def batches(settings: Settings) -> tuple[int, ...]:
    return (settings.batch,) if settings.batch else BATCHES


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    return f"check {outcome.check}, speed {report.ratio(outcome.speed)}"


def microseconds(spread: Spread) -> str:
    return f"{1e6 * spread.median:.1f}"


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
            times = (microseconds(o.race.time(name)) for name in ("native", "library"))
            cells += [*times, f"{o.speed.median:.2f}x", f"{tflops(o, 'native'):.1f}"]
        rows.append((*key, *cells, " ".join(dict.fromkeys(str(o.check) for o in forms))))
    forms = [f"{form} {column}" for form in FORMS for column in ("native us", "library us", "speed", "TFLOP/s")]
    return report.table(("", "batch", "dtype", "pass", *forms, "check"), rows)


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
