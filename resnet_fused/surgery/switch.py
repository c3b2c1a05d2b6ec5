# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Switching a model to fused execution and back: :func:`fuse`, :func:`unfuse`, :func:`set_memory`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from resnet_fused.autograd import MEMORY_MODES
from resnet_fused.surgery.forward import FusedForward, fused_forward, install, remove
from resnet_fused.surgery.layers import PACKED, is_container, is_layer, is_sequence
from resnet_fused.surgery.program import Program
from resnet_fused.surgery.recording import Left
from resnet_fused.surgery.report import Entry, FuseReport, Share
from resnet_fused.surgery.runs import Run


def check_model(model: object) -> None:
    """Raises TypeError if ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def fuse(model: nn.Module, verbose: bool = False) -> FuseReport:
    """Switch ``model`` to fused execution, in place.

    The forward of each module is executed once symbolically, its children as they are. What it does in a row
    (convolution, batch norm, ReLU; an addition and a ReLU behind) becomes one call of a fused function; every other
    step stays the module's own. A module whose forward is no graph is left, with the reason.

    Only ``forward`` on the instance is new, and what TorchScript and ``nn.DataParallel`` ask for: classes, parameters,
    buffers, children, hooks, state_dict and flags are untouched, and the results are those of the original up to
    rounding. Whenever a call is not plain, the forward of the module's class runs: hooks, functions and attributes that
    are added, replaced or changed take effect, before and after. Fusing a second time looks anew at what was left.

    Args:
        model: any module; it may be a block itself.
        verbose: print the report.

    Returns:
        what was fused, and what was left and why.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_model(model)
    named = _modules(model)
    known = {id(m) for _, m in named if fused_forward(m) is not None}
    reasons: dict[int, str] = {}
    programs: dict[int, tuple[Program, Program]] = {}
    for _, module in reversed(named):  # children first: a parent looks through some of them
        try:
            found = _programs(module)
        except Left as reason:
            reasons[id(module)] = str(reason)
            if id(module) not in known:
                remove(module)
        else:
            if found is not None:
                programs[id(module)] = found
    report = _report(model, named, programs, reasons, known)
    if verbose:
        print(report)
    return report


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module that has a forward of its own and no TorchScript module above it."""
    compiled: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and id(module) not in compiled:
            compiled.update(id(m) for m in module.modules() if m is not module)
    return [(name, m) for name, m in model.named_modules() if id(m) not in compiled]


def _programs(module: nn.Module) -> tuple[Program, Program] | None:
    """The programs in training and in evaluation; None if there is nothing to fuse in ``module``."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Left("compiled by TorchScript")
    if is_container(module) or not any(map(is_layer, module.modules())) or is_layer(module):
        return None
    forward = fused_forward(module)
    if forward is None:
        if "forward" in module.__dict__:
            raise Left("its forward is replaced on the instance")
        forward = install(module)
    forward.forget()
    found = []
    for training in (True, False):
        program = forward.usual(training)
        if isinstance(program, Left):
            raise program
        found.append(program)
    if not any(program.runs for program in found):
        if not forward.born_fused:
            remove(module)
        if not found[0].left:
            return None
        raise Left(_listing(module, found[0]))
    return found[0], found[1]


def _listing(module: nn.Module, program: Program) -> str:
    """What runs by itself, each with its name."""
    names = {id(m): name for name, m in module.named_modules()}
    return "; ".join(f"{names[id(m)]}: {reason}" for m, reason in program.left.items())


def _report(
    model: nn.Module,
    named: Iterable[tuple[str, nn.Module]],
    programs: dict[int, tuple[Program, Program]],
    reasons: dict[int, str],
    known: set[int],
) -> FuseReport:
    report = FuseReport()
    covered: tuple[set[int], set[int]] = set(), set()  # layers, in training and in inference
    said: set[int] = set()
    for name, module in named:
        if id(module) in programs:
            training, evaluation = programs[id(module)]
            fused = [run for run in training.runs if not run.for_inference_only]
            layers = {id(m) for run in evaluation.runs for m in run.layers}
            if not layers <= covered[1]:
                report.entries.append(_entry(name, module, training, evaluation, id(module) in known))
            said |= layers | {id(m) for m in evaluation.left}
            covered[0].update(id(m) for run in fused for m in run.layers)
            covered[1].update(layers)
        elif id(module) in reasons:
            own = _own_layers(module)
            if isinstance(module, torch.jit.ScriptModule) or (own and not own <= said):
                report.entries.append(Entry(name, type(module), "left", reasons[id(module)]))
                said |= own
    for kind, is_kind in (("convolutions", True), ("batch_norms", False)):
        layers = {id(m) for m in model.modules() if is_layer(m) and isinstance(m, nn.modules.conv._ConvNd) is is_kind}
        setattr(report, kind, Share(len(layers & covered[0]), len(layers & covered[1]), len(layers)))
    return report


def _own_layers(module: nn.Module) -> set[int]:
    """Layers among the children, those in sequences and in containers that are never called included."""
    found: set[int] = set()
    for child in module.children():
        if is_layer(child):
            found.add(id(child))
        elif is_container(child) or (is_sequence(child) and any(map(is_layer, child))):
            found |= _own_layers(child)
    return found


def _entry(name: str, module: nn.Module, training: Program, evaluation: Program, known: bool) -> Entry:
    def spell(run: Run) -> str:
        return f"{run} (inference)" if run.for_inference_only else str(run)

    runs = tuple(spell(run) for run in evaluation.runs)
    counts = Counter(runs)
    what = ", ".join(f"{count} {run}" if count > 1 or len(counts) > 1 else run for run, count in counts.items())
    if training.runs and [spell(r) for r in training.runs] != list(runs):
        what += f" (in training: {', '.join(map(spell, training.runs))})"
    if evaluation.left:
        what += f" (alone: {_listing(module, evaluation)})"
    return Entry(name, type(module), "fused", f"already: {what}" if known else what, runs)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place: every module runs the forward of its class. Returns ``model``.

    Modules that were made as this package's own (``resnet_fused.BasicBlock(...)``) stay. A forward that somebody has
    put on a module since stays, too.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_model(model)
    for module in model.modules():
        forward = fused_forward(module)
        if forward is not None and not forward.born_fused:
            remove(module)
        module.__dict__.pop(PACKED, None)
    return model


def set_memory(model: nn.Module, memory: str) -> int:
    """Choose what the fused modules in ``model`` keep for backward.

    Args:
        model: any module.
        memory: ``"default"`` or ``"minimal"``, see :func:`resnet_fused.functional.residual`.

    Returns:
        how many modules were set; 0 if none is fused.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``memory`` is anything else.
    """
    check_model(model)
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory: expected one of {MEMORY_MODES}, got {memory!r}")
    chosen: list[FusedForward] = [f for m in model.modules() if (f := fused_forward(m)) is not None]
    for forward in chosen:
        forward.set_memory(memory)
    return len(chosen)
