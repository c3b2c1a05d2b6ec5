# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Wall-clock timing of contestants in turn, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Above this many busy cores of others a time is disturbed: threads that wait for a preempted one wait for
# milliseconds at every parallel region, which favours whoever has fewer of them.
DISTURBED = 0.1

# Work on an accelerator is fed by two threads, forward's and backward's: others may have the remaining cores.
FEEDING_CORES = 2

# On an accelerator so many calls are timed together that the fastest contestant takes this long for them: preparing
# a call then runs beside computing the one before, as it does in training and serving.
STRETCH = 0.02  # seconds
LONGEST_STRETCH = 50  # calls


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds are added until ``seconds`` have passed, within the two limits."""

    seconds: float
    fewest_rounds: int = 3
    most_rounds: int = 25

    @classmethod
    def exactly(cls, rounds: int) -> Effort:
        """A fixed number of rounds, however long they take."""
        return cls(0.0, rounds, rounds)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Race:
    """Times of all contestants by name, round by round, in seconds per call (of a process, its median)."""

    seconds: dict[str, list[float]]
    others: float  # cores that other processes kept busy meanwhile
    spare: float = 0.0  # cores that the contestants had no use for
    peak: dict[str, int] = field(default_factory=dict)  # bytes that a contestant's process had in memory at most

    @property
    def rounds(self) -> int:
        return max(map(len, self.seconds.values()), default=0)

    def time(self, name: str) -> Spread:
        """Seconds per call of the contestant."""
        return Spread.of(self.seconds[name])

    def speed(self, name: str, against: str) -> Spread:
        """The time of ``against`` over the contestant's of the same round; above 1, the contestant is faster."""
        return Spread.of([a / s for a, s in zip(self.seconds[against], self.seconds[name], strict=True)])

    @property
    def compared(self) -> list[str]:
        """Those that have a speed against eager."""
        return [name for name in self.seconds if name != "eager"] if "eager" in self.seconds else []

    @property
    def disturbed(self) -> bool:
        return self.others > self.spare + DISTURBED


def rotated(names: Sequence[str], index: int) -> list[str]:
    """``names`` in the order of the round of that index."""
    first = index % len(names) if names else 0
    return [*names[first:], *names[:first]]


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def others_seconds() -> float:
    """CPU seconds that all other processes have used so far; 0 where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds of one ``call``, including what it leaves queued on ``device``: the mean of ``calls``."""
    accelerated = device.type != "cpu"
    if accelerated:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if accelerated:
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / calls


def stretch(calls: Sequence[Callable[[], object]], device: torch.device) -> int:
    """How many calls to time together: one on the CPU, which has computed what a call returns."""
    if device.type == "cpu":
        return 1
    fastest = min(seconds(call, device) for call in calls)
    return max(1, min(LONGEST_STRETCH, math.ceil(STRETCH / fastest)))


def race(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Race:
    """Time all in turn, after a warm-up of each; who goes first rotates.

    ``measure``: another way to get one call's seconds than the wall clock's.
    """
    for call in contestants.values():
        call()
    if measure is None:
        calls = stretch(list(contestants.values()), device)
        measure = functools.partial(seconds, device=device, calls=calls)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    start, others = time.perf_counter(), others_seconds()
    for index in range(effort.most_rounds):
        if index >= effort.fewest_rounds and time.perf_counter() - start > effort.seconds:
            break
        for name in rotated(names, index):
            times[name].append(measure(contestants[name]))
    elapsed = time.perf_counter() - start
    spare = 0.0 if device.type == "cpu" else max(0.0, (os.cpu_count() or 1) - FEEDING_CORES)
    return Race(times, max(0.0, others_seconds() - others) / elapsed, spare)
