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
from resnet_fused.planner.entry import EAGER, Choices, Entry
from resnet_fused.planner.keys import Key
from resnet_fused.planner.modules import ModulePlan, race
from resnet_fused.planner.recording import ModuleCall, recording


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
    """What :data:`resnet_fused.plan` found, in the order in which the model runs its blocks, and then its modules."""

    blocks: list[BlockPlan]
    modules: list[ModulePlan]
    note: str = ""

    def __str__(self) -> str:
        kinds = f"{len(self.blocks)} kinds of blocks"
        return "\n".join([*map(str, self.blocks), *map(str, self.modules), self.note or kinds])


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
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # whose forward has no collectives
        with _standing_still(model, training):
            with recording() as noted:
                model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
            if not noted.calls:
                raise ValueError("model: expected fused blocks, none ran; see resnet_fused.fuse")
            counts = Counter(call.key.alone for call in noted.calls)
            blocks, shown = [], time.perf_counter()
            for index, (key, call) in enumerate({call.key.alone: call for call in noted.calls}.items(), 1):
                if note:
                    blocks.append(BlockPlan(key, counts[key], call.table, "table", None))
                    continue
                if time.perf_counter() - shown > decide.QUIET_SECONDS:
                    shown = time.perf_counter()
                    store.say(f"planning {index} of {len(counts)} kinds of blocks")
                entry = search.plan_block(key, call.native, call.table, decide.store.find(key))
                _settle(key, entry)
                blocks.append(BlockPlan(key, counts[key], entry.choices, "measured", entry))
            found = {b.key: b.entry for b in blocks if b.entry is not None}
            modules = [] if note else [_settle_module(module, found) for module in noted.modules.values()]
        report = PlanReport(blocks, [m for m in modules if m is not None], note)
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


def _settle(key: Key, entry: Entry) -> None:
    decide.store.add(key, entry)
    decide.decide(key, entry)


def _settle_module(module: ModuleCall, found: dict[Key, Entry]) -> ModulePlan | None:
    """Leaves the blocks of ``module`` to eager where its own steps are faster. ``found``: of its blocks, alone."""
    entries = [found[key.alone] for key in module.keys]
    for key, entry in zip(module.keys, entries, strict=True):
        if decide.store.find(key) is not None:  # from an earlier race
            _settle(key, entry)
    plan = race(module, entries)
    if plan is not None and plan.eager:
        for key, entry in zip(module.keys, entries, strict=True):
            _settle(key, Entry(EAGER, "eager", str(plan), entry.seconds, entry.disqualified))
    return plan


@contextlib.contextmanager
def _standing_still(model: nn.Module, training: bool) -> Iterator[None]:
    """The mode that is planned for, without exchanges between processes, and ``model`` as it was afterwards."""
    with _unchanged(model), engine("auto"), torch.set_grad_enabled(training), alone():
        model.train(training)
        yield


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
