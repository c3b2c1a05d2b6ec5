# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Switching an existing model to fused execution and back: :func:`fuse`, :func:`unfuse`, :func:`fold`,
:func:`set_memory`.

A module is switched by exchanging its class, so that parameters, buffers, hooks, flags and names stay the very same
objects. The new class inherits from a fused module and from the original class: ``isinstance`` keeps its answer
and the original's other methods keep working. torchvision's classes are known; any other block is executed once
symbolically (torch.fx) and switched only if its ``forward`` is exactly what the fused one computes.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resnet_fused.autograd import MEMORY_MODES
from resnet_fused.models import ResNet
from resnet_fused.modules import BasicBlock, Bottleneck, ConvBNAct2d, ResBlk
from resnet_fused.recognise import (
    PACKED,
    any_global_hooks,
    conv_reason,
    frozen_batch_norm,
    is_hooked,
    is_identity,
    is_relu,
    norm_reason,
)
from resnet_fused.sequential import FusedSequential, FusedUnit, run_at, runs_of
from resnet_fused.snapshot import Packed
from resnet_fused.structure import Left, Silent, descend, structure_of

__all__ = ["Entry", "FuseReport", "fold", "fuse", "set_memory", "unfuse"]


@dataclass(frozen=True)
class Entry:
    """One line of a :class:`FuseReport`.

    ``name``: the module's name in the model, empty for the model itself; ``kind``: what it was taken for;
    ``original``: its class before; ``status``: ``"fused"`` or ``"left"``; ``reason``: what is fused in it, or why it
    was left.
    """

    name: str
    kind: str
    original: type
    status: str
    reason: str


@dataclass
class FuseReport:
    """What :func:`fuse` did, one :class:`Entry` per module it considered. ``str()`` gives a table."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def fused(self) -> list[Entry]:
        """The entries of modules that run fused."""
        return [e for e in self.entries if e.status == "fused"]

    @property
    def left(self) -> list[Entry]:
        """The entries of modules that were left as they are."""
        return [e for e in self.entries if e.status == "left"]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}, left: {len(self.left)}"]
        rows = [("module", "kind", "class", "status", "what / why")]
        rows += [(e.name or "(model)", e.kind, e.original.__name__, e.status, e.reason) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]))
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Classes


# What a fused forward reads where the original has no such attribute.
_DEFAULTS = {"relu": nn.ReLU(), "extra": nn.Sequential()}


class _Spec(NamedTuple):
    """A class that runs as ``base`` and is an ``original`` otherwise.

    ``aliases``: attributes that ``base`` reads, each with the path of the child it stands for, or None for its
    default. ``final_relu``: given where ``base`` lets it be chosen. ``silent``: children that have to be as they
    were for the fused forward to be right.
    """

    base: type
    original: type
    aliases: tuple[tuple[str, str | None], ...] = ()
    final_relu: bool | None = None
    silent: tuple[Silent, ...] = ()


@functools.cache
def _fused_class(spec: _Spec) -> type:
    base, original, aliases, final_relu, silent = spec
    if base is FusedSequential and original is nn.Sequential:
        return FusedSequential

    def forward(self, x: Tensor) -> Tensor:
        if any_global_hooks() or not all(s.unchanged(self) for s in silent):
            return original.forward(self, x)
        return base.forward(self, x)

    def __reduce_ex__(self, protocol):
        # The class has no name to be found by: it is made again from its specification.
        constructor, arguments, *rest = original.__reduce_ex__(self, max(protocol, 2))
        if arguments[:1] != (type(self),):
            return constructor, arguments, *rest  # the original class has a pickling of its own
        return _new_instance, (spec,), *rest

    namespace: dict[str, Any] = {
        "__doc__": original.__doc__,
        "__init__": original.__init__,
        "__module__": original.__module__,
        "__reduce_ex__": __reduce_ex__,
        "_original_class": original,
        "_aliases": dict(aliases),
        "_silent": silent,
    }
    if silent:
        namespace["forward"] = forward
    if final_relu is not None:
        namespace["final_relu"] = final_relu
    for name, path in aliases:
        namespace[name] = _DEFAULTS.get(name) if path is None else _alias(path)
    try:
        return type(f"Fused{original.__name__}", (base, original), namespace)
    except TypeError as error:  # metaclasses or orders of inheritance that do not go together
        raise Left(f"{original.__name__}: {error}") from None


def _alias(path: str) -> property:
    return property(lambda self: descend(self, path))


def _new_instance(spec: _Spec) -> nn.Module:
    cls = _fused_class(spec)
    return cls.__new__(cls)


def _switch(module: nn.Module, cls: type) -> None:
    try:
        module.__class__ = cls
    except TypeError as error:  # __slots__
        raise Left(f"{type(module).__name__}: {error}") from None


def _is_ours(module: nn.Module) -> bool:
    return (getattr(type(module).forward, "__module__", None) or "").startswith(f"{__package__}.")


def _original_class(module: nn.Module) -> type:
    return getattr(type(module), "_original_class", type(module))


# ---------------------------------------------------------------------------------------------------------------
# Recognition


class _Plan(NamedTuple):
    """How to switch a module: its kind, its new class, and what that fuses."""

    kind: str
    cls: type
    what: str


_PAIRS: dict[type, tuple[tuple[str, str], ...]] = {
    BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    ResBlk: (("conv1", "bn1"), ("conv2", "bn2")),
    ResNet: (("conv1", "bn1"),),
    FusedUnit: (("conv", "bn"),),
    ConvBNAct2d: (("conv", "bn"),),
}
_SHORTCUT = {BasicBlock: "downsample", Bottleneck: "downsample", ResBlk: "extra"}
_KINDS = {
    BasicBlock: "basic block",
    Bottleneck: "bottleneck",
    ResBlk: "residual block",
    ResNet: "network",
    FusedUnit: "unit",
    ConvBNAct2d: "unit",
    FusedSequential: "sequence",
}


def _base_of(module: nn.Module) -> type | None:
    return next((base for base in (*_PAIRS, FusedSequential) if isinstance(module, base)), None)


def _torchvision_base(module: nn.Module) -> tuple[type, type] | None:
    """The fused counterpart of a torchvision network or block, and the torchvision class."""
    resnet = sys.modules.get("torchvision.models.resnet")  # without it no module can be one of its classes
    if resnet is None:
        return None
    counterparts = ((BasicBlock, resnet.BasicBlock), (Bottleneck, resnet.Bottleneck), (ResNet, resnet.ResNet))
    return next((pair for pair in counterparts if isinstance(module, pair[1])), None)


def _check_children(module: nn.Module, base: type) -> None:
    for names in _PAIRS[base]:
        for name, reason_of in zip(names, (conv_reason, norm_reason), strict=True):
            child = getattr(module, name)
            reason = None if name.startswith("bn") and is_identity(child) else reason_of(child)
            if reason is not None:
                raise Left(f"{name}: {reason}")
    if not is_relu(module.relu):
        hooked = " with hooks" if is_hooked(module.relu) else ""
        raise Left(f"relu: {type(module.relu).__name__}{hooked} is not a plain nn.ReLU")


def _plan_torchvision(module: nn.Module, base: type, original: type) -> _Plan:
    if any(getattr(type(module), f, None) is not getattr(original, f, None) for f in ("forward", "_forward_impl")):
        raise Left(f"{type(module).__name__} overrides {original.__name__}.forward")
    _check_children(module, base)
    what = "stem conv1+bn1+relu" if base is ResNet else _shortcut_text(getattr(module, "downsample", None))
    return _Plan(_KINDS[base], _fused_class(_Spec(base, type(module))), what)


def _shortcut_text(shortcut: nn.Module | None) -> str:
    if is_identity(shortcut):
        return "identity shortcut"
    return "projection shortcut" if _is_projection(shortcut) else f"shortcut {type(shortcut).__name__}"


def _is_projection(module: nn.Module | None) -> bool:
    """A convolution and its batch norm, which a block fuses with its join."""
    if not isinstance(module, nn.Sequential) or is_hooked(module) or len(module) != 2:
        return False
    run = run_at(list(module), 0)
    return run is not None and run.length == 2 and not run.relu


def _plan_traced(module: nn.Module) -> _Plan:
    structure = structure_of(module)
    pairs, shortcut = structure.pairs, structure.shortcut
    if shortcut is None:
        if len(pairs) != 1:
            raise Left(f"{len(pairs)} convolutions without a shortcut")
        base = FusedUnit
    elif any(None in pair for pair in pairs):
        raise Left("a convolution without a batch norm")
    elif len(pairs) == 2:
        base = BasicBlock if structure.final_relu and not hasattr(module, "extra") else ResBlk
    elif len(pairs) == 3 and structure.final_relu:
        base = Bottleneck
    else:
        raise Left(f"a block of {len(pairs)} convolutions{'' if structure.final_relu else ' without a last ReLU'}")

    roles: dict[str, str | None] = {}
    for names, paths in zip(_PAIRS[base], pairs, strict=True):
        roles.update(zip(names, paths, strict=True))
    if base is not FusedUnit:
        roles[_SHORTCUT[base]] = shortcut or None
    if base in (BasicBlock, Bottleneck):
        roles["relu"] = None
    aliases = tuple((role, path) for role, path in roles.items() if _needs_alias(module, role, path))
    final_relu = structure.final_relu if base in (FusedUnit, ResBlk) else None
    if base is FusedUnit:
        what = "+".join(
            name for name, there in (("conv", pairs[0][0]), ("bn", pairs[0][1]), ("relu", final_relu)) if there
        )
    else:
        what = _shortcut_text(descend(module, shortcut) if shortcut else None)
    spec = _Spec(base, type(module), aliases, final_relu, structure.silent)
    return _Plan(_KINDS[base], _fused_class(spec), what)


def _needs_alias(module: nn.Module, role: str, path: str | None) -> bool:
    """Whether the name that fused code reads has to be added; refused if it already means something else."""
    if path == role:
        return False
    if not hasattr(module, role):
        return True
    present = getattr(module, role)
    if path is None and (is_relu(present) if role == "relu" else is_identity(present)):
        return False
    raise Left(f"its attribute {role!r} has another role")


def _plan_sequence(module: nn.Sequential) -> _Plan | None:
    """None for a sequence without a convolution or batch norm of its own."""
    layers = list(module)
    counts: Counter[str] = Counter()
    remarks = []
    for position, run in runs_of(layers):
        reason = None if run.conv is None else conv_reason(run.conv)
        if reason is None and not is_identity(run.norm):
            reason = norm_reason(run.norm)
        if reason is None:
            counts[str(run)] += 1
        else:
            remarks.append(f"{_position(module, position)}: {reason}")
    covered = {i for position, run in runs_of(layers) for i in range(position, position + run.length)}
    for i, layer in enumerate(layers):
        if i in covered or not isinstance(layer, nn.Conv2d | _NormBase):
            continue
        reason = conv_reason(layer) if isinstance(layer, nn.Conv2d) else norm_reason(layer)
        if reason is None:
            follower = type(layers[i + 1]).__name__ if i + 1 < len(layers) else "the end"
            reason = f"{type(layer).__name__} before {follower}"
        remarks.append(f"{_position(module, i)}: {reason}")
    if not counts and not remarks:
        return None
    if not counts:
        raise Left("; ".join(remarks))
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    if remarks:
        what += f" (alone: {'; '.join(remarks)})"
    return _Plan(_KINDS[FusedSequential], _fused_class(_Spec(FusedSequential, type(module))), what)


def _position(module: nn.Module, index: int) -> str:
    return list(module._modules)[index]


def _has_own_layers(module: nn.Module) -> bool:
    return any(isinstance(c, nn.Conv2d | _NormBase) or frozen_batch_norm(c) for c in module.children())


def _has_block_sequence(module: nn.Module) -> bool:
    """Whether a child is a sequence of two or three convolutions with batch norm, as of a residual block."""
    for child in module.children():
        if type(child) in (nn.Sequential, FusedSequential):
            runs = [run for _, run in runs_of(list(child))]
            if len(runs) in (2, 3) and all(run.conv is not None and run.norm is not None for run in runs):
                return True
    return False


def _plan(module: nn.Module) -> _Plan | None:
    """How to switch ``module``; None if there is nothing to say about it. Raises :class:`Left`."""
    if type(module).forward is nn.Module.forward:
        return None  # a container
    if isinstance(module, fx.GraphModule):
        raise Left("a torch.fx graph calls its layers one by one")
    known = _torchvision_base(module)
    if known is not None and (known[0] is ResNet or type(module).forward is known[1].forward):
        plan = functools.partial(_plan_torchvision, module, *known)
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        plan = functools.partial(_plan_sequence, module)
    elif _has_own_layers(module):
        plan = functools.partial(_plan_traced, module)
    elif _has_block_sequence(module):
        try:
            return _plan_traced(module)
        except Left:
            return None  # its sequences are reported by themselves
    else:
        return None
    if "forward" in module.__dict__:
        raise Left("its forward is replaced on the instance")
    found = plan()
    if found is not None and hasattr(module, "memory"):
        raise Left("its attribute 'memory' has another role")
    return found


def _covered(module: nn.Module) -> Iterator[nn.Module]:
    """The sequences inside a fused block that the block runs itself."""
    shortcut = _SHORTCUT.get(_base_of(module))
    if shortcut is not None and _is_projection(getattr(module, shortcut)):
        yield getattr(module, shortcut)
    for silent in getattr(type(module), "_silent", ()):
        yield descend(module, silent.path)


def _kind_of_left(module: nn.Module) -> str:
    known = _torchvision_base(module)
    if known is not None:
        return _KINDS[known[0]]
    return _KINDS[FusedSequential] if isinstance(module, nn.Sequential) else "module"


# ---------------------------------------------------------------------------------------------------------------
# The public functions


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def fuse(model: nn.Module, verbose: bool = False) -> FuseReport:
    """Switch ``model`` to fused execution, in place.

    Recognised are torchvision's ResNet, BasicBlock and Bottleneck; residual blocks of two or three convolutions
    and modules of one convolution, batch norm and ReLU, under any names, if tracing their ``forward`` shows
    that they compute just that; and convolution, batch norm and ReLU neighbours in an ``nn.Sequential``. A
    module's structure is read now: attributes that steer its ``forward`` should not be changed afterwards without
    :func:`unfuse`. Children may be replaced and hooked at any time.

    Parameters, buffers, hooks, state_dict and flags are untouched, and the results are those of the original up
    to rounding. Fusing a second time changes nothing.

    Args:
        model: any module; it may be a block itself.
        verbose: print the report.

    Returns:
        what was fused, and what was left and why.

    Raises:
        TypeError: if ``model`` is no module.
    """
    _check_model(model)
    report = FuseReport()
    skipped: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in skipped:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            skipped.update(module.modules())
            report.entries.append(Entry(name, "module", type(module), "left", "compiled by TorchScript"))
            continue
        original = type(module)
        if _is_ours(module):
            base = _base_of(module)
            if base is None:
                continue
            original = _original_class(module)
            entry = Entry(name, _KINDS[base], original, "fused", "already")
        else:
            try:
                plan = _plan(module)
                if plan is None:
                    continue
                _switch(module, plan.cls)
                entry = Entry(name, plan.kind, original, "fused", plan.what)
            except Left as reason:
                entry = Entry(name, _kind_of_left(module), original, "left", str(reason))
        report.entries.append(entry)
        if entry.status == "fused":
            skipped.update(_covered(module))
    if verbose:
        print(report)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place: every module gets its original class back. Returns ``model``.

    Modules that were made as this package's own (``resnet_fused.BasicBlock(...)``) stay; a ``FusedSequential``
    becomes an ``nn.Sequential``.

    Raises:
        TypeError: if ``model`` is no module.
    """
    _check_model(model)
    for module in model.modules():
        original = _original_class(module)
        if original is not type(module):
            module.__class__ = original
            module.__dict__.pop("memory", None)
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
    _check_model(model)
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory: expected one of {MEMORY_MODES}, got {memory!r}")
    chosen = [m for m in model.modules() if _is_ours(m) and hasattr(type(m), "memory")]
    for module in chosen:
        module.memory = memory
    return len(chosen)


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, its batch norms folded into the convolutions before them.

    The copy is fused, in evaluation mode, and none of its parameters requires a gradient. Each folded batch norm
    is an ``nn.Identity``; the convolution has the product as its weight and a bias, computed in float64. Not folded
    are batch norms that :func:`fuse` does not find behind a convolution, that keep no running statistics, that
    share a convolution or are shared, and pairs with hooks.

    The copy is a snapshot. On the CPU its convolutions keep their weights packed from their first call on: later
    writes to the copy's weights need not be seen (``load_state_dict`` and ``to`` are, and :func:`unfuse` ends it).
    There ReLUs that oneDNN fuses into its convolutions return 0 for NaN.

    Raises:
        TypeError: if ``model`` is no module.
    """
    _check_model(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    # In evaluation a SyncBatchNorm is a batch norm; those that are not folded get their class back.
    synchronised = [m for m in model.modules() if type(m) is nn.SyncBatchNorm]
    for module in synchronised:
        module.__class__ = nn.BatchNorm2d
    fuse(model)
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for parent, conv_path, norm_path in [p for m in model.modules() for p in _folding_pairs(m)]:
        conv, norm = descend(parent, conv_path), descend(parent, norm_path)
        if (
            conv_reason(conv) is None
            and norm_reason(norm) is None
            and norm.running_mean is not None
            and norm.running_var is not None
            and uses[id(conv)] == uses[id(norm)] == 1
        ):
            _fold_pair(conv, norm)
            owner, _, name = norm_path.rpartition(".")
            (descend(parent, owner) if owner else parent)._modules[name] = nn.Identity().eval()
    for module in synchronised:
        module.__class__ = nn.SyncBatchNorm
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__dict__[PACKED] = Packed()
    return model


def _folding_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, path of a convolution, path of the batch norm behind it) that ``module`` runs fused."""
    if not _is_ours(module):
        return
    base = _base_of(module)
    if base is FusedSequential:
        yield from _sequence_pairs(module)
    for names in _PAIRS.get(base, ()):
        aliases = getattr(type(module), "_aliases", {})
        conv, norm = (aliases.get(name, name) for name in names)
        if conv is not None and norm is not None:
            yield module, conv, norm
    for child in _covered(module):
        # A main branch's sequences have their pairs among the aliases above.
        if _is_projection(child):
            yield from _sequence_pairs(child)


def _sequence_pairs(module: nn.Sequential) -> Iterator[tuple[nn.Module, str, str]]:
    names: Sequence[str] = list(module._modules)
    for position, run in runs_of(list(module)):
        if run.conv is not None and run.norm is not None:
            yield module, names[position], names[position + 1]


def _fold_pair(conv: nn.Conv2d, norm: nn.Module) -> None:
    dtype = conv.weight.dtype
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, variance, gamma, beta = (None if t is None else t.detach().double() for t in tensors)
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gamma, beta)
    conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
