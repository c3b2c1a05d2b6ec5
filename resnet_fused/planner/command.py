# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``resnet_fused.plan``: planning a model, and what is known."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fused.distributed import alone
from resnet_fused.engine import engine
from resnet_fused.planner import decide, store
from resnet_fused.planner.decide import Call, recording
from resnet_fused.planner.entry import Choices, Entry
from resnet_fused.planner.keys import Key


@dataclass(frozen=True)
class BlockPlan:
    """One kind of block of a model. ``source``: "measured" or "table"; ``entry``: what was measured."""

    key: Key
    calls: int  # in one forward
    choices: Choices
    source: str
    entry: Entry | None

    def __str__(self) -> str:
        times = f"{self.calls} x " if self.calls > 1 else ""
        if self.entry is None:
            return f"{times}{self.key}\n    by the shipped table"
        return f"{times}{self.key}\n{_describe(self.entry)}"


def _describe(entry: Entry) -> str:
    found = sorted(entry.seconds.items(), key=lambda item: item[1])
    lines = [f"    {entry.chosen}: {entry.why}"]
    if found:
        lines.append("    " + ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in found))
    lines += [f"    disqualified: {name}: {reason}" for name, reason in entry.disqualified.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanReport:
    """What :data:`resnet_fused.plan` found, in the order in which the model runs its blocks."""

    blocks: list[BlockPlan]
    note: str = ""

    def __str__(self) -> str:
        return "\n".join([*map(str, self.blocks), self.note or f"{len(self.blocks)} kinds of blocks"])


class Planner:
    """``plan(model, example_input)`` and the plans that are known."""

    def __call__(self, model: nn.Module, example_input: Any, training: bool = True) -> PlanReport:
        """Finds for each kind of fused block of ``model`` what runs it the fastest, and prints that.

        Args:
            model: fused already; on the device, in the dtype and layout, and called within the autocast that it will
                be used with. Its forward runs once, in this process alone: fused batch norms that are synchronised
                exchange nothing. Its buffers, mode, gradients and random numbers stay.
            example_input: what ``model`` is called with: a tensor, or a tuple of arguments.
            training: forward and backward in training mode; False: evaluation without gradients.

        Returns:
            What was chosen and why. It holds for this process and, in the user's file, for later ones.

        Raises:
            ValueError: if no block of ``model`` runs fused, or ``RESNET_FUSED_PLAN`` has a wrong value.
        """
        from resnet_fused.planner import search  # it runs blocks, which ask `decide`

        if decide.mode() == "off":
            note = "RESNET_FUSED_PLAN=off: the shipped table decides"
        elif torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
            note = "deterministic algorithms: the shipped table decides"
        else:
            note = ""
        calls = _calls(model, example_input, training)
        counts = Counter(call.key for call in calls)
        blocks, shown = [], time.perf_counter()
        for index, call in enumerate({call.key: call for call in calls}.values(), 1):
            if note:
                blocks.append(BlockPlan(call.key, counts[call.key], call.table, "table", None))
                continue
            if time.perf_counter() - shown > decide.QUIET_SECONDS:
                shown = time.perf_counter()
                store.say(f"planning {index} of {len(counts)} kinds of blocks")
            known = decide.store.find(call.key)
            entry = search.plan_block(call.key, call.native, call.table, known)
            decide.store.add(call.key, entry)
            decide.decide(call.key, entry)
            blocks.append(BlockPlan(call.key, counts[call.key], entry.choices, "measured", entry))
        report = PlanReport(blocks, note)
        print(report)
        return report

    def path(self) -> Path:
        """The file where plans are kept."""
        return store.path()

    def show(self) -> None:
        """Prints what is known, of this machine and others, and where it is kept."""
        print(f"RESNET_FUSED_PLAN={decide.mode()}, {self.path()}")
        for name, blocks in decide.store.plans.items():
            print(", ".join(f"{field} {value}" for field, value in json.loads(name).items()))
            for block, entry in blocks.items():
                print(f"  {block}\n{_describe(entry)}")

    def export(self, path: str | os.PathLike[str]) -> None:
        """Writes what is known to ``path``, for :meth:`load`."""
        store.replace(Path(path), store.render(decide.store.plans))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Uses the plans in ``path`` in this process, in place of those known of the same blocks.

        Raises:
            OSError, ValueError: if ``path`` cannot be read, or is no file of plans.
        """
        try:
            plans = store.parse(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        decide.store.load(plans)
        decide.forget(plans=False)

    def clear(self) -> None:
        """Forgets all plans, in this process and in the user's file."""
        self.path().unlink(missing_ok=True)
        decide.forget(plans=True)


def _calls(model: nn.Module, example_input: Any, training: bool) -> list[Call]:
    """The fused blocks of one forward."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # whose forward has no collectives
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    with _unchanged(model), engine("auto"), torch.set_grad_enabled(training), alone(), recording() as calls:
        model.train(training)
        model(*arguments)
    if not calls:
        raise ValueError("model: expected fused blocks, none ran; see resnet_fused.fuse")
    return calls


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Keeps the buffers and modes of ``model`` and the random numbers as they were."""
    gpus = {t.get_device() for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


plan = Planner()
