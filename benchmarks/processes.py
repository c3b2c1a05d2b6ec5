# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Functions in processes of their own, and a race of such processes, in turn.

What a process did before decides whether the C library keeps freed memory or returns it, by which a network's time on
the CPU changes by a third; users start a process for one network and one purpose.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import TypeVar

from benchmarks.timing import Race, reason_of, rotated

Result = TypeVar("Result")


class Failed(Exception):
    """What went wrong in a process, in one line."""


@functools.cache
def _server() -> BaseContext:
    """Forks processes that have imported what takes seconds, and have computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "benchmarks.entrant"])
    return context


def _answer(function: Callable[..., Result], arguments: Sequence[object]) -> Result:
    # Not every exception can be pickled.
    try:
        return function(*arguments)
    except Exception as error:
        raise Failed(reason_of(error)) from None


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """What ``function(*arguments)`` returns in a process of its own; raises `Failed` if it raises or dies there."""
    try:
        with ProcessPoolExecutor(1, mp_context=_server()) as pool:
            return pool.submit(_answer, function, arguments).result()
    except BrokenExecutor as error:
        raise Failed(reason_of(error)) from None


@dataclass(frozen=True)
class Lap:
    """What a contestant's process found in its turn."""

    seconds: float  # per step, the median
    peak: int  # bytes in memory at most
    others: float  # cores that other processes kept busy meanwhile


def race(names: Sequence[str], rounds: int, run: Callable[[str], Lap]) -> tuple[Race, dict[str, str]]:
    """``run`` for every name in turn, round by round; who goes first rotates.

    Whose lap fails is out of the race: the second result says why.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    absent: dict[str, str] = {}
    for index in range(rounds):
        for name in rotated(list(laps), index):
            try:
                laps[name].append(run(name))
            except Failed as failure:
                absent[name] = str(failure)
                del laps[name]
    seconds = {name: [lap.seconds for lap in own] for name, own in laps.items()}
    peak = {name: max(lap.peak for lap in own) for name, own in laps.items()}
    others = [lap.others for own in laps.values() for lap in own]
    return Race(seconds, sum(others) / max(1, len(others)), peak=peak), absent
