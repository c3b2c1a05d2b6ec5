# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Modules as a whole: their fused blocks, as planned, against their own steps (:func:`race`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from resnet_fused.planner.entry import Entry
from resnet_fused.planner.measure import clock_for, medians, ran_out_of_memory, step
from resnet_fused.planner.recording import ModuleCall

LEAST_GAIN = 0.01  # by so much a module's own steps have to be faster than its fused blocks


@dataclass(frozen=True)
class ModulePlan:
    """One kind of module: median seconds of a call, in training with its backward, with its fused blocks as planned
    and by its own steps."""

    name: str  # of its class
    seconds: float
    eager_seconds: float

    @property
    def eager(self) -> bool:
        """Whether its blocks are left to eager PyTorch, whatever is the fastest for each alone."""
        return self.eager_seconds < (1 - LEAST_GAIN) * self.seconds

    def __str__(self) -> str:
        times = f"fused {1e3 * self.seconds:.3g} ms, eager {1e3 * self.eager_seconds:.3g} ms"
        return f"{self.name} as a whole: {'eager' if self.eager else 'fused'}: {times}"


def race(call: ModuleCall, entries: Sequence[Entry]) -> ModulePlan | None:
    """Times ``call`` both ways, with its blocks as ``entries`` say, which are decided already.

    Blocks are measured alone, out of cold caches; in a module each reads what was written just before, and on a CPU the
    calls around them take their time. None where there is nothing to choose, or not enough memory to measure.
    """
    exchanges = any(isinstance(m, nn.SyncBatchNorm) for m in call.module.modules())
    if exchanges or any(key.minimal for key in call.keys) or not any(entry.choices for entry in entries):
        return None
    learnt = [t for t in (*call.module.parameters(), *call.tensors) if t.requires_grad]

    def run(way: Callable, tensors: Sequence[Tensor]) -> None:
        views = [t.view_as(t) for t in tensors]  # not leaves: its steps may write over them
        step(partial(way, call.module, *views), learnt)

    runs = {"fused": partial(run, call.fused), "eager": partial(run, call.eager)}
    try:
        seconds = medians(runs, [call.tensors], clock_for(call.keys[0].device))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return None
    return ModulePlan(type(call.module).__name__, seconds["fused"], seconds["eager"])
