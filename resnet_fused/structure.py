# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a module's ``forward`` computes, read off its symbolic execution (torch.fx): a chain of convolutions, batch
norms and ReLUs, perhaps with a shortcut. :mod:`resnet_fused.surgery` switches a module only if that is all there is.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from resnet_fused.recognise import conv_reason, is_hooked, is_identity, is_relu, norm_reason
from resnet_fused.sequential import FusedSequential


class Left(Exception):
    """Why a module stays as it is."""


class Silent(NamedTuple):
    """A ReLU, Identity or Sequential of a traced module that fused execution does not call."""

    path: str
    cls: type
    length: int

    def unchanged(self, module: nn.Module) -> bool:
        child = descend(module, self.path)
        return type(child) is self.cls and len(child._modules) == self.length and not is_hooked(child)


def descend(module: nn.Module, path: str) -> nn.Module:
    """The child at a dotted path of children; ``get_submodule`` would follow a fused class's aliases, too."""
    for name in path.split("."):
        module = module._modules[name]
    return module


_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_IN_PLACE = (operator.iadd, "add_")


class Structure(NamedTuple):
    """A chain of (convolution, batch norm) pairs with a ReLU between them; perhaps a shortcut, perhaps a ReLU.

    Children by path; ``shortcut``: None without an addition, ``""`` if the input itself is added.
    """

    pairs: tuple[tuple[str | None, str | None], ...]
    shortcut: str | None
    final_relu: bool
    silent: tuple[Silent, ...]


def _context() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Proxy(fx.Proxy):
    def __iadd__(self, other: object) -> fx.Proxy:  # fx.Proxy would record x += y as x = x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Records calls of a module's children without looking into them."""

    def __init__(self):
        super().__init__()
        self.context = _context()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if m not in self.submodule_paths and is_relu(m):
            return forward(*args, **kwargs)  # nn.ReLU()(x), made for the occasion
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _context() != self.context:
            raise Left("forward changes grad mode or autocast")
        return super().create_node(*args, **kwargs)


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    # What forward assigns to its module stays in the twin; children are shared.
    twin = copy.copy(module)
    twin.training = training
    attributes = dict(twin.__dict__)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        graph = _Tracer().trace(twin)
    except Left:
        raise
    except Exception as error:  # anything may go wrong in a forward that is given a symbol
        message = str(error).strip().partition("\n")[0]
        raise Left(f"forward cannot be traced: {message or type(error).__name__}") from None
    if random.getstate() != python_state or not torch.equal(torch.get_rng_state(), torch_state):
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        raise Left("forward draws random numbers")
    if twin.__dict__.keys() != attributes.keys() or any(twin.__dict__[k] is not v for k, v in attributes.items()):
        raise Left("forward assigns to attributes of its module")
    return graph


class _Matcher:
    """Reads a :class:`Structure` off a graph, from the output back to the input."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        self.module = module
        self.nodes = list(graph.nodes)
        self.read: set[fx.Node] = set()
        self.silent: dict[str, Silent] = {}

    def structure(self) -> Structure:
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise Left(f"forward takes {len(inputs)} inputs")
        self.input = inputs[0]
        node = self.nodes[-1].args[0]
        if not isinstance(node, fx.Node):
            raise Left(f"forward returns a {type(node).__name__}")
        before = self.relu_operand(node)
        end = node if before is None else before
        if end is self.input:
            raise Left("forward has no convolution")
        operands = self.addition_operands(end)
        if operands is None:
            steps, shortcut = self.steps(node), None
        else:
            if before is not None:
                self.note_relu(node)
            steps, shortcut = self.branches(end, *operands)
        pairs, relu = self.pairs(steps)
        unread = [n for n in self.nodes if n not in self.read and n.op not in ("placeholder", "output")]
        if unread:
            raise Left(f"forward also does {self.describe(unread[0])}, which no fused module computes")
        final_relu = relu if operands is None else before is not None
        if operands is not None and relu:
            raise Left("a ReLU stands before the addition")
        return Structure(pairs, shortcut, final_relu, tuple(self.silent.values()))

    def describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(descend(self.module, node.target)).__name__})"
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def relu_operand(self, node: fx.Node) -> fx.Node | None:
        """The input of ``node`` if it is a ReLU."""
        relu = (
            (node.op == "call_function" and node.target in _RELUS)
            or (node.op == "call_method" and node.target in ("relu", "relu_"))
            or (node.op == "call_module" and is_relu(descend(self.module, node.target)))
        )
        return self.operand(node) if relu else None

    def operand(self, node: fx.Node) -> fx.Node:
        operand = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(operand, fx.Node) or len(node.all_input_nodes) != 1:
            raise Left(f"{self.describe(node)} has other operands than a tensor")
        return operand

    def addition_operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        added = (node.op == "call_function" and node.target in _ADDITIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        if not added:
            return None
        if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            raise Left("the addition is not of two tensors")
        return node.args

    def note_relu(self, node: fx.Node) -> None:
        self.read.add(node)
        if node.op == "call_module":
            self.note_silent(node.target)

    def note_silent(self, path: str) -> None:
        child = descend(self.module, path)
        self.silent[path] = Silent(path, type(child), len(child._modules))

    def branches(self, addition: fx.Node, a: fx.Node, b: fx.Node) -> tuple[list[tuple[str, str]], str]:
        """The steps of the main branch and the shortcut's path, which may be added in either order."""
        self.read.add(addition)
        first_reason = None
        for main, side in ((a, b), (b, a)):
            if addition.target in _IN_PLACE and main is not a:
                continue  # the shortcut, perhaps the block's own input, would be overwritten
            if side is self.input:
                shortcut = ""
            elif side.op == "call_module" and side.args == (self.input,) and not side.kwargs:
                shortcut = side.target
            else:
                continue
            read = set(self.read)
            try:
                steps = self.steps(main)
            except Left as reason:
                first_reason = first_reason or reason
                self.read = read
                continue
            if side is not self.input:
                self.sole_use(side)
                self.read.add(side)
            return steps, shortcut
        raise first_reason or Left("what is added is neither the input nor a child's output of it")

    def sole_use(self, node: fx.Node) -> None:
        if len(node.users) != 1:
            raise Left(f"the result of {self.describe(node)} is used {len(node.users)} times")

    def steps(self, node: fx.Node) -> list[tuple[str, str]]:
        """(kind, path) of the layers between the input and ``node``, in the order of execution."""
        found: list[tuple[str, str]] = []
        while node is not self.input:
            self.sole_use(node)
            operand = self.relu_operand(node)
            if operand is not None:
                self.note_relu(node)
                found.insert(0, ("relu", ""))
            elif node.op == "call_module":
                operand = self.operand(node)
                found[:0] = self.layers(node.target)
            else:
                raise Left(f"forward does {self.describe(node)}, which no fused module computes")
            self.read.add(node)
            node = operand
        return found

    def layers(self, path: str) -> list[tuple[str, str]]:
        child = descend(self.module, path)
        if is_relu(child) or is_identity(child):
            self.note_silent(path)
            return [("relu" if is_relu(child) else "identity", path)]
        if type(child) in (nn.Sequential, FusedSequential) and not is_hooked(child):
            self.note_silent(path)
            return [step for name in child._modules for step in self.layers(f"{path}.{name}")]
        if isinstance(child, nn.Conv2d):
            kind, reason = "conv", conv_reason(child)
        elif isinstance(child, _NormBase) or "norm" in type(child).__name__.lower():
            kind, reason = "norm", norm_reason(child)
        else:
            kind = reason = f"{type(child).__name__}{' with hooks' if is_hooked(child) else ''}"
        if reason is not None:
            raise Left(f"{path}: {reason}")
        return [(kind, path)]

    def pairs(self, steps: list[tuple[str, str]]) -> tuple[tuple[tuple[str | None, str | None], ...], bool]:
        """The chain's (convolution, batch norm) pairs, and whether it ends in a ReLU."""
        pairs: list[tuple[str | None, str | None]] = []
        relu = True  # the state in which a pair may begin
        for kind, path in steps:
            conv, norm = pairs[-1] if pairs else (None, None)
            if kind == "conv" and relu:
                pairs.append((path, None))
                relu = False
            elif kind == "norm" and not relu and norm is None:
                pairs[-1] = (conv, path)
            elif kind == "norm" and not pairs:
                pairs.append((None, path))
                relu = False
            elif kind == "relu" and not relu:
                relu = True
            elif kind == "identity":
                # Behind a convolution it is a batch norm that was folded, elsewhere nothing.
                if pairs and not relu and norm is None:
                    pairs[-1] = (conv, path)
                    self.silent.pop(path)
            else:
                order = ", ".join(kind for kind, _ in steps)
                raise Left(f"its layers are {order}")
        children = [descend(self.module, path) for pair in pairs for path in pair if path is not None]
        if len(set(map(id, children))) != len(children):
            raise Left("a child is used more than once")
        return tuple(pairs), relu and bool(pairs)


def structure_of(module: nn.Module) -> Structure:
    """What ``module.forward`` computes, in training and in evaluation. Raises :class:`Left`."""
    structures = [_Matcher(module, _trace(module, training)).structure() for training in (True, False)]
    if structures[0] != structures[1]:
        raise Left("forward differs between training and evaluation")
    return structures[0]
