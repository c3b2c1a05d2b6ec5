# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Wall-clock timing of two contestants in turn, so that whatever disturbs the machine disturbs both."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Above this many busy cores of others a time is disturbed: threads that wait for a preempted one wait for
# milliseconds at every parallel region, which favours whoever has fewer of them.
DISTURBED = 0.1


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
    """Times of both contestants, round by round, in seconds per call."""

    eager_seconds: list[float]
    fused_seconds: list[float]
    others: float  # cores that other processes kept busy meanwhile

    @property
    def eager(self) -> Spread:
        return Spread.of(self.eager_seconds)

    @property
    def fused(self) -> Spread:
        return Spread.of(self.fused_seconds)

    @property
    def speed(self) -> Spread:
        """Eager's time over the fused time of the same round; above 1, fused is faster."""
        return Spread.of([e / f for e, f in zip(self.eager_seconds, self.fused_seconds, strict=True)])

    @property
    def disturbed(self) -> bool:
        return self.others > DISTURBED


def others_seconds() -> float:
    """CPU seconds that all other processes have used so far; 0 where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one ``call``, including what it leaves queued on ``device``."""
    accelerated = device.type != "cpu"
    if accelerated:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if accelerated:
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def race(eager: Callable[[], object], fused: Callable[[], object], device: torch.device, effort: Effort) -> Race:
    """Time both in turn, after a warm-up of each; who goes first alternates."""
    eager()
    fused()
    times: tuple[list[float], list[float]] = ([], [])
    lanes = [(eager, times[0]), (fused, times[1])]
    start, others = time.perf_counter(), others_seconds()
    for index in range(effort.most_rounds):
        if index >= effort.fewest_rounds and time.perf_counter() - start > effort.seconds:
            break
        for call, lane in lanes if index % 2 == 0 else reversed(lanes):
            lane.append(seconds(call, device))
    elapsed = time.perf_counter() - start
    return Race(*times, max(0.0, others_seconds() - others) / elapsed)
