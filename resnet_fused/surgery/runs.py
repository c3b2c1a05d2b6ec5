# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The runs in a recorded forward: convolutions, batch norms and ReLUs in a row, and an addition behind, that one call
of the fused Function computes.

A chain is found first: units of a convolution and its batch norm with a ReLU between one and the next, each result used
once. Where a chain's end is added to something, the addition joins it: the chain's own input (an identity shortcut), a
second chain of one unit from the same input (a projection), or any other tensor.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.surgery.layers import (
    conv_reason,
    is_identity,
    is_layer,
    is_plain,
    is_relu,
    norm_reason,
    normalises_and_activates,
)
from resnet_fused.units import Join

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_OVERWRITES_FIRST = (operator.iadd, "add_")


class Pair(NamedTuple):
    """A unit of a run: a convolution and the batch norm behind it. One of them may be None."""

    conv: nn.Module | None
    norm: nn.Module | None


@dataclass(frozen=True)
class Run:
    """Nodes that are computed together.

    ``source``: the node that it reads; ``shortcut``: the node that is added, for a join with a tensor; ``behind``:
    modules that are called on the result, one after the other (an activation that is part of a batch norm's module).
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    units: tuple[Pair, ...]
    relu: bool
    join: Join = Join.NONE
    shortcut: fx.Node | None = None
    projection: Pair | None = None
    behind: tuple[nn.Module, ...] = ()
    silent: tuple[nn.Module, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.units if self.projection is None else (*self.units, self.projection)

    @property
    def for_inference_only(self) -> bool:
        """Whether a convolution without a batch norm stands where only evaluation without gradients fuses it."""
        inner = self.pairs[: len(self.units) - 1] + (() if self.projection is None else (self.projection,))
        return any(p.norm is None for p in inner) or (len(self.units) == 1 and self.units[0].norm is None)

    @property
    def layers(self) -> list[nn.Module]:
        """Its convolutions and batch norms."""
        return [m for p in self.pairs for m in p if m is not None]

    @property
    def leaves(self) -> list[nn.Module]:
        """The modules that it does not call."""
        return [*self.layers, *self.silent]

    def __str__(self) -> str:
        text = " ".join(_spelt(p, relu) for p, relu in self._steps())
        join = {Join.IDENTITY: " +identity", Join.TENSOR: " +add", Join.PROJECTION: " +projection"}.get(self.join, "")
        last = "+relu" if self.relu and self.join is not Join.NONE else ""
        return f"{text}{join}{last}"

    def _steps(self) -> Iterator[tuple[Pair, bool]]:
        for i, pair in enumerate(self.units):
            last = i == len(self.units) - 1
            yield pair, not last or (self.relu and self.join is Join.NONE)


def _spelt(pair: Pair, relu: bool) -> str:
    parts = (("conv", pair.conv is not None), ("bn", pair.norm is not None), ("relu", relu))
    return "+".join(name for name, there in parts if there)


# ---------------------------------------------------------------------------------------------------------------
# Nodes


class _Kind(Enum):
    CONV = "conv"
    NORM = "norm"
    RELU = "relu"
    IDENTITY = "identity"
    ADD = "add"
    OTHER = "other"


@dataclass
class _Chain:
    """Units in a row. ``end``: the last node; ``relu``: it is a ReLU."""

    source: fx.Node
    units: list[Pair] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    silent: list[nn.Module] = field(default_factory=list)
    relu: bool = False
    behind: tuple[nn.Module, ...] = ()

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


class Finder:
    """Finds the runs of ``graph``, whose ``call_module`` nodes name children of ``module``."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        self.module = module
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.uses = Counter(id(self.child(n)) for n in self.nodes if n.op == "call_module")
        # What the forward reads of a layer's own, besides calling it.
        self.read = {
            id(module.get_submodule(n.target.rpartition(".")[0])) for n in self.nodes if n.op == "get_attr"
        }

    # What a node is ------------------------------------------------------------------------------------------

    def child(self, node: fx.Node) -> Any:
        """The module that ``node`` calls, or None."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> _Kind:
        if node.op in ("call_function", "call_method"):
            if node.target in _RELUS and _operand(node) is not None:
                return _Kind.RELU
            if node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
                if all(isinstance(a, fx.Node) for a in node.args):
                    return _Kind.ADD
            return _Kind.OTHER
        child = self.child(node)
        if child is None or _operand(node) is None:
            return _Kind.OTHER
        if is_relu(child):
            return _Kind.RELU
        if is_identity(child):
            return _Kind.IDENTITY
        if isinstance(child, nn.Conv2d) and conv_reason(child) is None:
            return _Kind.CONV
        return _Kind.NORM if norm_reason(child) is None else _Kind.OTHER

    def follower(self, node: fx.Node) -> fx.Node | None:
        """The one node that uses ``node``, once."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        return user if [*_arguments(user)].count(node) == 1 else None

    # Chains --------------------------------------------------------------------------------------------------

    def chains(self) -> list[_Chain]:
        found: list[_Chain] = []
        taken: set[fx.Node] = set()
        for node in self.nodes:
            if node not in taken and self.kind(node) in (_Kind.CONV, _Kind.NORM):
                for chain in self.chain_from(node):
                    taken.update(chain.nodes)
                    found.append(chain)
        return found

    def chain_from(self, first: fx.Node) -> Iterator[_Chain]:
        """The chain that begins at ``first``, in pieces that one call of the Function can take each."""
        chain = _Chain(_operand(first))
        seen: set[nn.Module] = set()
        node: fx.Node | None = first
        while node is not None:
            unit, following = self.unit_from(node)
            (pair,) = unit.units
            if any(m in seen for m in pair if m is not None):
                break
            if chain.units and self.splits(chain, pair):
                yield chain
                chain = _Chain(chain.end)
            seen.update(m for m in pair if m is not None)
            chain.units.append(pair)
            chain.nodes += unit.nodes
            chain.silent += unit.silent
            chain.relu, chain.behind = unit.relu, unit.behind
            goes_on = unit.relu and following is not None and self.kind(following) is _Kind.CONV
            node = following if goes_on else None
        if chain.units:
            yield chain

    def splits(self, chain: _Chain, pair: Pair) -> bool:
        """Whether ``pair`` cannot follow: a convolution without a batch norm ends a chain, or all are such."""
        bare = [p.norm is None for p in chain.units]
        return (all(bare) and pair.norm is not None) or (bare[-1] and not all(bare))

    def unit_from(self, node: fx.Node) -> tuple[_Chain, fx.Node | None]:
        """The unit that begins at ``node``, a convolution or a batch norm, and the node that alone uses it."""
        conv = norm = None
        unit = _Chain(_operand(node))

        def advance(current: fx.Node) -> fx.Node | None:
            unit.nodes.append(current)
            following = self.follower(current)
            while following is not None and self.kind(following) is _Kind.IDENTITY:
                unit.nodes.append(following)
                unit.silent.append(self.child(following))
                following = self.follower(following)
            return following

        following: fx.Node | None = node
        if self.kind(node) is _Kind.CONV:
            conv = self.child(node)
            following = advance(node)
        if following is not None and self.kind(following) is _Kind.NORM:
            norm = self.child(following)
            following = advance(following)
            if normalises_and_activates(norm):
                unit.relu, unit.behind = _activation_of(norm)
                if unit.relu:
                    unit.silent += [norm.drop, norm.act]
        activated = unit.relu or unit.behind
        if not activated and following is not None and self.kind(following) is _Kind.RELU:
            unit.relu = True
            if following.op == "call_module":
                unit.silent.append(self.child(following))
            following = advance(following)
        unit.units.append(Pair(conv, norm))
        return unit, None if unit.behind else following

    # Joins ---------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Every run, in the order of execution."""
        chains = self.chains()
        ends = {c.end: c for c in chains if not c.relu and not c.behind and len(c.end.users) == 1}
        chained = {node for c in chains for node in c.nodes}
        found: list[Run] = []
        joined: set[int] = set()
        for node in self.nodes:
            if self.kind(node) is not _Kind.ADD:
                continue
            run, used = self.joined_at(node, ends, chained)
            if run is not None:
                found.append(run)
                joined.update(map(id, used))
                for chain in used:
                    ends.pop(chain.end, None)
        found += [run for c in chains if id(c) not in joined for run in self.plain_runs(c)]
        return sorted(found, key=lambda run: self.position[run.nodes[-1]])

    def joined_at(
        self, addition: fx.Node, ends: dict[fx.Node, _Chain], chained: set[fx.Node]
    ) -> tuple[Run | None, list[_Chain]]:
        operands: tuple[Any, ...] = addition.args
        a, b = operands
        if a is b:
            return None, []
        options: list[tuple[int, int, _Chain, _Chain | None, Any]] = []
        for main_node, side in ((a, b), (b, a)):
            main = ends.get(main_node)
            if main is None:
                continue
            other = ends.get(side)
            if other is not None and self.is_projection(other, main):
                options.append((2, len(main.units), main, other, None))
            elif addition.target in _OVERWRITES_FIRST and main_node is not a:
                continue  # the shortcut, perhaps the caller's own tensor, would be overwritten
            else:
                options.append((1, len(main.units), main, None, side))
        for _, _, main, projection, side in sorted(options, key=lambda o: o[:2], reverse=True):
            nodes = [*main.nodes, *(projection.nodes if projection else ()), addition]
            silent = [*main.silent, *(projection.silent if projection else ())]
            while side is not None and side not in chained and self.kind(side) is _Kind.IDENTITY:
                if len(side.users) != 1:
                    break
                nodes.append(side)
                silent.append(self.child(side))
                side = _operand(side)
            following, relu = self.follower(addition), False
            if following is not None and self.kind(following) is _Kind.RELU:
                relu = True
                nodes.append(following)
                if following.op == "call_module":
                    silent.append(self.child(following))
            join = Join.PROJECTION if projection else Join.IDENTITY if side is main.source else Join.TENSOR
            run = Run(
                tuple(sorted(nodes, key=self.position.__getitem__)),
                main.source,
                tuple(main.units),
                relu,
                join,
                side if join is Join.TENSOR else None,
                projection.units[0] if projection else None,
                silent=tuple(silent),
            )
            if self.may_move(run):
                return run, [main, *([projection] if projection else [])]
        return None, []

    def is_projection(self, chain: _Chain, main: _Chain) -> bool:
        pair = chain.units[0]
        bare = all(p.norm is None for p in main.units)
        return (
            len(chain.units) == 1
            and chain.source is main.source
            and pair.conv is not None
            and (pair.norm is None) == bare
            and not any(m is not None and m in p for m in pair for p in main.units)
        )

    def plain_runs(self, chain: _Chain) -> Iterator[Run]:
        """A chain without a join, if there are two layers or more in it to compute together."""
        run = Run(
            tuple(chain.nodes),
            chain.source,
            tuple(chain.units),
            chain.relu,
            behind=chain.behind,
            silent=tuple(chain.silent),
        )
        layers = sum(m is not None for p in chain.units for m in p) + (chain.relu or len(chain.units) > 1)
        if layers > 1 and self.may_move(run):
            yield run

    # Order ---------------------------------------------------------------------------------------------------

    def may_move(self, run: Run) -> bool:
        """Whether the run may execute where its last node stands: nothing in between writes or has effects."""
        first, last = self.position[run.nodes[0]], self.position[run.nodes[-1]]
        members = set(run.nodes)
        own = {id(m) for m in run.leaves}
        return all(node in members or self.is_pure(node, own) for node in self.nodes[first:last])

    def is_pure(self, node: fx.Node, own: set[int]) -> bool:
        """Whether ``node`` computes a result and does nothing else, from nothing of the run's ``own`` modules."""
        if node.op == "get_attr":
            return id(self.module.get_submodule(str(node.target).rpartition(".")[0])) not in own
        child = self.child(node)
        if child is not None:
            return _is_pure(child) and id(child) not in own
        if node.op != "call_function" or "out" in node.kwargs:
            return node.op == "placeholder" or (node.op == "call_method" and node.target in _PURE_METHODS)
        if node.target is getattr:
            return node.args[1] in ("shape", "dtype", "device", "ndim")
        name = getattr(node.target, "__name__", "")
        flags = [*node.args, *node.kwargs.values()]
        return name in _PURE_FUNCTIONS and not any(f is True for f in flags)

    # What is left --------------------------------------------------------------------------------------------

    def left(self, runs: Iterable[Run]) -> Iterator[tuple[nn.Module, str]]:
        """Convolutions and batch norms among the children that no run computes, each with the reason."""
        covered = {id(m) for run in runs for m in run.leaves}
        for node in self.nodes:
            child = self.child(node)
            if child is None or id(child) in covered or not is_layer(child):
                continue
            reason = conv_reason(child) if isinstance(child, nn.modules.conv._ConvNd) else norm_reason(child)
            yield child, reason or self.why_alone(node)

    def why_alone(self, node: fx.Node) -> str:
        name = type(self.child(node)).__name__
        if len(node.users) != 1:
            return f"{name} whose result is used {len(node.users)} times"
        follower = next(iter(node.users))
        if follower.op == "output":
            return f"{name} before the end"
        return f"{name} before {self.describe(follower)}"

    def describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.child(node)).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_PURE_METHODS = ("mean", "sum", "size", "dim", "view", "reshape", "flatten", "chunk", "split", "sigmoid", "contiguous")
_PURE_FUNCTIONS = ("add", "sub", "mul", "truediv", "getitem", "cat", "mean", "sum", "sigmoid", "relu", "_assert") + (
    "avg_pool2d",
    "max_pool2d",
    "adaptive_avg_pool2d",
    "pad",
    "flatten",
    "chunk",
    "split",
    "interpolate",
)


def _arguments(node: fx.Node) -> Iterator[fx.Node]:
    found: list[fx.Node] = []

    def collect(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.map_arg((node.args, node.kwargs), collect)
    yield from found


def _operand(node: fx.Node) -> Any:
    """The node that ``node`` is applied to; None unless it is all there is but for arguments of no weight."""
    operands = [*_arguments(node)]
    first = node.args[0] if node.args else node.kwargs.get("input")
    if len(operands) != 1 or first is not operands[0]:
        return None
    others = [*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input")]
    if node.op == "call_module":
        return None if others else first
    return first if all(isinstance(o, bool) for o in others) else None


def _activation_of(norm: Any) -> tuple[bool, tuple[nn.Module, ...]]:
    """Of timm's BatchNormAct2d: whether it ends in a ReLU, or what else is called behind the batch norm."""
    if is_identity(norm.drop) and is_relu(norm.act):
        return True, ()
    return False, tuple(m for m in (norm.drop, norm.act) if not (type(m) is nn.Identity and is_plain(m)))


def _is_pure(module: nn.Module) -> bool:
    """Whether calling ``module`` leaves its input as it is: torch's own layers that are not in place."""
    own = type(module).__module__.startswith("torch.nn.modules.") and is_plain(module)
    return own and not getattr(module, "inplace", False) and all(map(_is_pure, module.children()))
