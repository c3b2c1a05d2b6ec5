# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""How near the one-pass kernels come to the memory's speed: the bytes they must move per second against a copy's.

What a kernel must move are its activations, each input once and each output once; the vectors of its channels are
next to nothing. Caches don't help: a lap of calls goes round as many sets of operands as fill the last level cache
several times, results are kept until their set's next turn, and on a GPU every lap starts after other data was read
through the cache. Kernel and copy take turns lap by lap.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cases import DTYPES, Settings
from benchmarks.device_clock import CACHES, DeviceClock
from benchmarks.timing import Effort, Race, Spread, race, seconds
from resnet_fused import ops

CHANNELS = 256  # as behind ResNet-50's first stage
WIDTH = 32  # pixels; the height makes the size

MEGABYTES = {"cuda": (1.0, 8.0, 32.0, 128.0, 512.0), "cpu": (1.0, 8.0, 32.0)}  # of one activation
QUICK_MEGABYTES = (0.05,)
QUICK_CALLS = 2  # per lap

FEWEST_CALLS, MOST_CALLS = 4, 400  # per lap
CPU_CACHE = 32 << 20  # bytes, where the system doesn't tell
HEAD_START = 0.008  # seconds: longer than it takes to launch the most calls

SECONDS = 0.4  # of timing, per case


@dataclass(frozen=True)
class Operands:
    """What any of the kernels needs: activations of one shape and dtype, and tables of their channels."""

    y: Tensor
    grad: Tensor
    shortcut: Tensor
    out: Tensor
    coefficients: Tensor
    backward: Tensor

    @classmethod
    def of(cls, size: float, dtype: torch.dtype, device: torch.device) -> Operands:
        """Of ``size`` bytes per activation, nearly."""
        height = max(1, round(size / (CHANNELS * WIDTH * dtype.itemsize)))
        like = torch.empty((1, CHANNELS, height, WIDTH), dtype=dtype, device=device)
        like = like.to(memory_format=torch.channels_last)
        y, grad, shortcut, out = (torch.randn_like(like) for _ in range(4))
        coefficients, backward = (torch.rand(rows, CHANNELS, device=device) for rows in (4, 5))
        return cls(y, grad, shortcut, out, coefficients, backward)


@dataclass(frozen=True)
class Kernel:
    """One kernel of the vocabulary: how many activations it must read and write, and a call of it."""

    name: str
    reads: int
    writes: int
    call: Callable[[Operands], object]


KERNELS = (
    Kernel("statistics", 1, 0, lambda o: ops.bn_statistics(o.y)),
    Kernel("apply", 1, 1, lambda o: ops.bn_apply(o.y, o.coefficients, relu=True)),
    Kernel("apply, plain", 2, 1, lambda o: ops.bn_apply(o.y, o.coefficients, o.shortcut, relu=True)),
    Kernel(
        "apply, affine", 2, 1, lambda o: ops.bn_apply(o.y, o.coefficients, o.shortcut, o.coefficients, relu=True)
    ),
    Kernel("reduce", 2, 0, lambda o: ops.bn_backward_reduce(o.grad, o.y, o.coefficients, relu=True)),
    Kernel(
        "reduce, plain", 3, 0, lambda o: ops.bn_backward_reduce(o.grad, o.y, o.coefficients, o.shortcut, relu=True)
    ),
    Kernel(
        "reduce, affine",
        3,
        0,
        lambda o: ops.bn_backward_reduce(o.grad, o.y, o.coefficients, o.shortcut, o.coefficients, relu=True),
    ),
    Kernel(
        "backward_apply", 2, 1, lambda o: ops.bn_backward_apply(o.grad, o.y, o.coefficients, o.backward, relu=True)
    ),
    Kernel(
        "backward_apply, plain",
        3,
        1,
        lambda o: ops.bn_backward_apply(o.grad, o.y, o.coefficients, o.backward, o.shortcut, relu=True),
    ),
    Kernel(
        "backward_apply, pair",
        3,
        2,
        lambda o: ops.bn_backward_apply_pair(
            o.grad, o.y, o.coefficients, o.backward, o.shortcut, o.coefficients, o.backward, True, True, True
        ),
    ),
    Kernel(
        "relu_backward_add",
        4,
        1,
        lambda o: ops.relu_backward_add_(o.out, o.grad, o.y, o.coefficients, o.shortcut),
    ),
)
COPY = Kernel("copy", 1, 1, lambda o: o.out.copy_(o.y))


@dataclass(frozen=True)
class Case:
    """What is measured. ``size``: bytes asked for of one activation; ``dtype`` names a key of `DTYPES`."""

    kernel: Kernel
    dtype: str
    size: float

    def __str__(self) -> str:
        return f"{self.kernel.name}, {self.dtype}, {self.size / 1e6:g} MB"


@dataclass(frozen=True)
class Outcome:
    """What was found. The race is between "kernel" and "copy", in seconds per lap of ``calls`` calls.

    ``activation``: bytes of one; ``hidden``: whether every lap on a GPU was launched before it began.
    """

    case: Case
    activation: int
    calls: int
    race: Race
    hidden: bool

    def speed(self, contestant: str) -> Spread:
        """Bytes per second of "kernel" or "copy"."""
        kernel = self.case.kernel if contestant == "kernel" else COPY
        moved = (kernel.reads + kernel.writes) * self.activation * self.calls
        return Spread.of([moved / s for s in self.race.seconds[contestant]])

    @property
    def ratio(self) -> Spread:
        """The kernel's bytes per second over the copy's of the same round."""
        kernel = self.case.kernel
        bytes_ratio = (kernel.reads + kernel.writes) / (COPY.reads + COPY.writes)
        speeds = zip(self.race.seconds["kernel"], self.race.seconds["copy"], strict=True)
        return Spread.of([bytes_ratio * copy / s for s, copy in speeds])


def cache_bytes(device: torch.device) -> int:
    """Size of the last level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << 10 for s in sizes if re.fullmatch(r"\d+K", s)), default=CPU_CACHE)


def calls_per_lap(activation: int, cache: int) -> int:
    """As many calls as read `CACHES` caches of a kernel's only input, if there is but one."""
    return max(FEWEST_CALLS, min(MOST_CALLS, math.ceil(CACHES * cache / activation)))


def lap_of(kernel: Kernel, sets: Sequence[Operands], calls: int) -> Callable[[], None]:
    """``calls`` calls of the kernel on one set after the other; a result lives until the set's next turn."""
    results: list[object] = [None] * len(sets)

    def lap() -> None:
        for index in itertools.islice(itertools.cycle(range(len(sets))), calls):
            results[index] = kernel.call(sets[index])

    return lap


@dataclass(frozen=True)
class Job:
    """A case, its sets of operands, how many calls make a lap, and how long to measure; a GPU's clock."""

    case: Case
    sets: Sequence[Operands]
    calls: int
    effort: Effort
    clock: DeviceClock | None

    def run(self) -> Outcome:
        """Time it."""
        y = self.sets[0].y
        laps = {
            "kernel": lap_of(self.case.kernel, self.sets, self.calls),
            "copy": lap_of(COPY, self.sets, self.calls),
        }
        for lap in laps.values():  # with race's, two: in the second, new results are allocated beside old ones
            lap()
        if self.clock is None:
            found = race(laps, y.device, self.effort, functools.partial(seconds, device=y.device))
            return Outcome(self.case, y.nbytes, self.calls, found, hidden=True)
        self.clock.hidden = True
        found = race(laps, y.device, self.effort, self.clock)
        return Outcome(self.case, y.nbytes, self.calls, found, self.clock.hidden)


def sizes(settings: Settings, megabytes: Sequence[float]) -> list[float]:
    """Bytes of one activation: those asked for, or else the device's."""
    usual = QUICK_MEGABYTES if settings.quick else MEGABYTES[settings.device.type]
    return [1e6 * size for size in megabytes or usual]


def jobs(settings: Settings, chosen: Sequence[float]) -> Iterator[Job]:
    """Every kernel in every dtype, with activations of the ``chosen`` bytes."""
    device = settings.device
    cache = cache_bytes(device)
    clock = DeviceClock(device, HEAD_START) if device.type == "cuda" else None
    for dtype in settings.dtypes:
        for size in chosen:
            first = Operands.of(size, DTYPES[dtype], device)
            calls = QUICK_CALLS if settings.quick else calls_per_lap(first.y.nbytes, cache)
            # No more sets than it takes: large activations leave nothing of the last call in the cache.
            count = min(calls, max(1, math.ceil(CACHES * cache / first.y.nbytes)))
            sets = [first, *(Operands.of(size, DTYPES[dtype], device) for _ in range(count - 1))]
            for kernel in KERNELS:
                yield Job(Case(kernel, dtype, size), sets, calls, settings.effort(SECONDS), clock)


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    return f"{outcome.speed('kernel').median / 1e9:.1f} GB/s, {report.ratio(outcome.ratio)} a copy's"


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per dtype and kernel, below the copy's; columns of GB/s, and its ratio to the copy's, by size."""
    chosen = list(dict.fromkeys(o.case.size for o in outcomes))
    by_case = {(o.case.dtype, o.case.kernel.name, o.case.size): o for o in outcomes}
    rows = []
    for dtype in dict.fromkeys(o.case.dtype for o in outcomes):
        found = {kernel.name: [by_case[dtype, kernel.name, size] for size in chosen] for kernel in KERNELS}
        copies = [Spread.of([o.speed("copy").median for o in column]) for column in zip(*found.values(), strict=True)]
        rows.append((COPY.name, dtype, *(cell for c in copies for cell in (f"{c.median / 1e9:.1f}", ""))))
        for name, line in found.items():
            cells = ((speed_cell(o), f"{o.ratio.median:.2f}x") for o in line)
            rows.append((name, dtype, *itertools.chain.from_iterable(cells)))
    header = ("GB/s of activations of", "dtype", *(cell for s in chosen for cell in (f"{s / 1e6:g} MB", "of copy")))
    text = report.table(header, rows)
    return text if all(o.hidden for o in outcomes) else f"{text}\n* the time of launching is in it"


def speed_cell(outcome: Outcome) -> str:
    return f"{outcome.speed('kernel').median / 1e9:.1f}{'' if outcome.hidden else '*'}"


def records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON; sizes in bytes, times in seconds per call, speeds in bytes per second."""
    return [
        {
            "kernel": o.case.kernel.name,
            "dtype": o.case.dtype,
            "activation_bytes": o.activation,
            "activations_read": o.case.kernel.reads,
            "activations_written": o.case.kernel.writes,
            "seconds": asdict(Spread.of([s / o.calls for s in o.race.seconds["kernel"]])),
            "copy_seconds": asdict(Spread.of([s / o.calls for s in o.race.seconds["copy"]])),
            "bytes_per_second": asdict(o.speed("kernel")),
            "copy_bytes_per_second": asdict(o.speed("copy")),
            "ratio": asdict(o.ratio),
            "cores_busy_with_others": o.race.others,
            "rounds": o.race.rounds,
            "calls_per_round": o.calls,
            "launching_hidden": o.hidden,
        }
        for o in outcomes
    ]


def plot(outcomes: Sequence[Outcome], path: Path, device: torch.device) -> None:
    """The ratio to a copy's bandwidth over the size, one panel per dtype."""
    dtypes = list(dict.fromkeys(o.case.dtype for o in outcomes))
    figure, axes = report.plt.subplots(1, len(dtypes), figsize=(1 + 4 * len(dtypes), 4.5), squeeze=False, sharey=True)
    colours = report.plt.get_cmap("tab20")
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        for index, kernel in enumerate(KERNELS):
            line = [o for o in outcomes if o.case.dtype == dtype and o.case.kernel is kernel]
            ratios = [o.ratio for o in line]
            medians = [r.median for r in ratios]
            spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            sizes_of_line = [o.activation / 1e6 for o in line]
            ax.errorbar(sizes_of_line, medians, spread, marker="o", color=colours(index), label=kernel.name)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_title(dtype, fontsize=10)
    figure.supxlabel("MB of one activation", fontsize=9)
    axes[0][0].set_ylabel("bytes per second / a copy's")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"Bandwidth of the kernels against a copy's: {report.device_name(device)}", fontsize=11)
    figure.tight_layout()
    report.save(figure, path)
