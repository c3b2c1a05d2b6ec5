# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The fastest proven candidate for a block."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from resnet_fused.planner.entry import EAGER, Choices, Entry, all_library, both, name_of
from resnet_fused.planner.keys import Key, machine
from resnet_fused.planner.measure import Clock, apart, cache_bytes, clock_for, medians, ran_out_of_memory
from resnet_fused.planner.proof import Proof
from resnet_fused.planner.scratch import Scratch, copies, make

HYSTERESIS = 0.03  # by so much native kernels have to be faster than what needs no proof, the library and eager
MOST_COPIES = 16
# A block's run takes several times what it is given: activations, gradients, and the proof's copies.
WORKING_SHARE = 6


def plan_block(
    key: Key, native: Choices, table: Choices, known: Entry | None = None, clock: Clock | None = None
) -> Entry:
    """Proves and measures candidates for ``key``.

    Args:
        native: what can run natively.
        table: what the shipped table says.
        known: an entry whose disqualified kernels stay so.
        clock: another way to get a call's seconds.

    An out-of-memory error means the library.
    """
    try:
        return apart(key.device, lambda: _Search(key, native, known, clock).entry(table))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return Entry(all_library(key.units), "library", "not enough memory to measure", {}, {})


def _available(device: torch.device) -> int:
    """Bytes that can be had, on a CPU: there nobody says no before the system kills someone."""
    if device.type != "cpu" or "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 1 << 62
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _flips(of: Choices, native: Choices) -> Iterator[Choices]:
    """``of`` with one pass of one unit changed, where both engines have it."""
    for i, passes in enumerate(native):
        for j in range(2):
            if passes[j]:
                unit = tuple(not c if k == j else c for k, c in enumerate(of[i]))
                yield (*of[:i], (unit[0], unit[1]), *of[i + 1 :])


def _combined(of: Choices, changed: Sequence[Choices]) -> Choices:
    """``of`` with all that one of ``changed`` has otherwise."""

    def choice(i: int, j: int) -> bool:
        return of[i][j] != any(c[i][j] != of[i][j] for c in changed)

    return tuple((choice(i, 0), choice(i, 1)) for i in range(len(of)))


class _Search:
    def __init__(self, key: Key, native: Choices, known: Entry | None, clock: Clock | None):
        self.key, self.native = key, native
        self.library = all_library(key.units)
        self.disqualified: dict[str, str] = dict(known.disqualified) if known is not None else {}
        self.proven: dict[Choices, bool] = {self.library: True, EAGER: True}
        first = make(key, seed=0)
        if WORKING_SHARE * first.bytes > _available(key.device):
            raise MemoryError
        self.proof = Proof(key, first) if any(any(unit) for unit in native) else None
        self.operands = list(copies(first, 2 * cache_bytes(key.device), MOST_COPIES))
        self.clock = clock or clock_for(key.device)
        self.seconds: dict[str, float] = {}

    def name(self, choices: Choices) -> str:
        return name_of(choices, self.key.training)

    def time(self, choices: Choices) -> float:
        """Seconds, as measured last."""
        return self.seconds[self.name(choices)]

    def holds(self, choices: Choices) -> bool:
        """Whether ``choices`` compute what the library does; those that don't are disqualified, with a warning."""
        if choices not in self.proven:
            name = self.name(choices)
            if name not in self.disqualified:
                assert self.proof is not None
                try:
                    failure = self.proof.failure(choices)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    failure = f"{type(error).__name__}: {error}"
                if failure is not None:
                    self.disqualified[name] = failure
                    warnings.warn(
                        f"resnet_fused: native kernels differ from the library's and are not used here: {name}, for "
                        f"{self.key}, on {machine(self.key.device)['device']}: {failure}. Please report this.",
                        stacklevel=2,
                    )
            self.proven[choices] = name not in self.disqualified
        return self.proven[choices]

    def strike(self) -> None:
        """Takes from ``native`` each pass that is wrong alone."""
        for single in _flips(self.library, self.native):
            if not self.holds(single):
                self.native = tuple(
                    (n[0] and not s[0], n[1] and not s[1]) for n, s in zip(self.native, single, strict=True)
                )

    def race(self, *candidates: Choices) -> Choices:
        """The fastest of those that hold; their times are noted."""
        holding = {self.name(c): c for c in candidates if self.holds(c)}

        def runner(choices: Choices) -> Callable[[Scratch], object]:
            return lambda scratch: scratch.run(choices)

        found = medians({name: runner(c) for name, c in holding.items()}, self.operands, self.clock)
        self.seconds |= found
        return holding[min(found, key=lambda name: found[name])]

    def entry(self, table: Choices) -> Entry:
        # Eager keeps more for backward, which minimal memory forbids.
        composed = () if self.key.minimal else (EAGER,)
        if not self.holds(self.native):
            self.strike()
        allowed = self.native
        fused = {self.library, allowed, both(table, allowed) if table else self.library}
        self.race(*fused, *composed)
        best = min(filter(self.holds, fused), key=self.time)
        flips = [c for c in _flips(best, allowed) if c not in fused]
        if flips:
            self.race(best, *flips)
            gains = [c for c in flips if self.holds(c) and self.time(c) < self.time(best)]
            gains.sort(key=self.time)
            # Flips that gain alone are taken together, too: whole candidates decide.
            best = self.race(self.library, best, *gains[:1], _combined(best, gains), *composed)
        else:
            best = min((best, *composed), key=self.time)
        plain = min((self.library, *composed), key=self.time)
        ratio = self.time(plain) / self.time(best)
        if best in (self.library, EAGER):
            why = f"{self.name(best)} is the fastest"
        elif ratio * (1 - HYSTERESIS) <= 1:
            why = f"{self.name(best)} is only {ratio:.2f} times as fast as {self.name(plain)}"
            best = plain
        else:
            why = f"{ratio:.2f} times as fast as {self.name(plain)}"
        return Entry(best, self.name(best), why, self.seconds, self.disqualified)
