# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Which convolutions of a network run fused, told from what was executed and not from what fuse says of itself.

Eager PyTorch shows which convolutions there are and which batch norms stand next to them, whatever modules they are
written as: a dispatch mode sees every operation with the tensors that it takes, and tensors have an identity. In
training the graph that the fused network leaves for backward shows which node took a weight; in inference, where no
graph is left, a dispatch mode shows which operator took a batch norm's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.autograd import _Block
from resnet_fused.surgery.layers import frozen_batch_norm

# What may stand between a batch norm and the convolution behind it, without the underscore of those in place.
ACTIVATIONS = {
    "_prelu_kernel",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "mish",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
}


@dataclass
class Surroundings:
    """The batch norms that take a convolution's output, and those whose output it takes, by module name."""

    behind: set[str] = field(default_factory=set)
    in_front: set[str] = field(default_factory=set)

    @property
    def norms(self) -> set[str]:
        """Those that it should be fused with: the ones in front count where there are none behind."""
        return self.behind or self.in_front


@dataclass(frozen=True)
class Share:
    """The convolutions that ran in one mode, by module name."""

    convolutions: frozenset[str]
    normalised: frozenset[str]  # those with a batch norm behind them, or in front
    fused: frozenset[str]  # of the normalised ones

    @property
    def left(self) -> list[str]:
        """The normalised ones that did not run fused, in the order of their names."""
        return sorted(self.normalised - self.fused)


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or frozen_batch_norm(module)


def convolution_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all two-dimensional convolutions by module name."""
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def norm_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """The floating-point tensors of all batch norms by module name."""
    return {
        name: [t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point()]
        for name, module in model.named_modules()
        if is_norm(module)
    }


class _Operations(TorchDispatchMode):
    """Calls ``see`` with the name, arguments and result of every operation: ``aten.relu_``."""

    def see(self, name: str, arguments: tuple, result: object) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(str(func.overloadpacket), (*args, *(kwargs or {}).values()), result)
        return result


class _Neighbours(_Operations):
    """Follows values from operation to operation through eager code.

    A value is known by its address and size: what views and operations in place leave as it was. Results are kept,
    so that no address is used twice.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: dict[str, Surroundings] = {}
        self._convs = {weight.data_ptr(): name for name, weight in convolution_weights(model).items()}
        self._norms = {t.data_ptr(): name for name, tensors in norm_tensors(model).items() for t in tensors}
        self._convolved: dict[tuple[int, int], str] = {}
        self._normalised: dict[tuple[int, int], str] = {}
        self._kept: list[object] = []
        for name, module in model.named_modules():
            if frozen_batch_norm(module):  # to PyTorch a product and a sum
                module.register_forward_hook(lambda _, args, output, name=name: self._norm(name, args[0], output))

    @staticmethod
    def _key(t: Tensor) -> tuple[int, int]:
        return t.data_ptr(), t.numel()

    def _norm(self, name: str, x: Tensor, output: Tensor) -> None:
        conv = self._convolved.get(self._key(x))
        if conv is not None:
            self.found[conv].behind.add(name)
        self._normalised[self._key(output)] = name

    def see(self, name: str, arguments: tuple, result: Any) -> None:
        self._kept.append(result)
        operation = name.removeprefix("aten.").removesuffix("_")
        given = list(tensors_of(arguments))
        norm = self._normalised.get(self._key(given[0])) if given else None
        for t in tensors_of(result):
            address = self._key(t)
            if any(t is g for g in given):  # in place: it is another value now
                self._convolved.pop(address, None)
                self._normalised.pop(address, None)
            if norm is not None and operation in ACTIVATIONS:
                self._normalised[address] = norm
        if operation == "convolution":
            conv = self._convs.get(given[1].data_ptr())
            if conv is not None:
                around = self.found.setdefault(conv, Surroundings())
                if norm is not None:
                    around.in_front.add(norm)
                self._convolved[self._key(result)] = conv
        elif "batch_norm" in operation:
            names = [self._norms[t.data_ptr()] for t in given[1:] if t.data_ptr() in self._norms]
            if names:
                self._norm(names[0], given[0], next(tensors_of(result)))


class _NormOperators(_Operations):
    """Which batch norms' tensors were taken by operators of resnet_fused, and which by PyTorch's batch norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.fused: set[str] = set()
        self.plain: set[str] = set()
        self._norms = {t.data_ptr(): name for name, tensors in norm_tensors(model).items() for t in tensors}

    def see(self, name: str, arguments: tuple, result: object) -> None:
        library, _, operation = name.partition(".")
        if library == "resnet_fused":
            seen = self.fused
        elif "batch_norm" in operation:
            seen = self.plain
        else:
            return
        seen.update(self._norms[t.data_ptr()] for t in tensors_of(arguments) if t.data_ptr() in self._norms)


def surroundings(model: nn.Module, x: Tensor, *, training: bool) -> dict[str, Surroundings]:
    """The convolutions that eager ``model`` runs on ``x``, and the batch norms next to each."""
    model = copy.deepcopy(model).train(training)
    neighbours = _Neighbours(model)
    with torch.no_grad(), neighbours:
        model(x)
    return neighbours.found


def takers(outputs: object) -> dict[Tensor, set[object]]:
    """For every leaf in the graph behind ``outputs``: the nodes that took it."""
    found: dict[Tensor, set[object]] = {}
    nodes: set[Any] = {t.grad_fn for t in tensors_of(outputs)} - {None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions:
            if hasattr(source, "variable"):
                found.setdefault(source.variable, set()).add(node)
            elif source is not None and source not in nodes:
                nodes.add(source)
                waiting.append(source)
    return found


def fused_in_training(fused: nn.Module, x: Tensor, eager: dict[str, Surroundings]) -> set[str]:
    """The convolutions that ``fused`` runs in its own node of the graph.

    One that has a batch norm in front of it only is the library's even then; it counts if that batch norm is in such
    a node.
    """
    fused = copy.deepcopy(fused).train().requires_grad_(True)
    found = takers(fused(x))
    inside = {t for t, nodes in found.items() if all(isinstance(n, _Block._backward_cls) for n in nodes)}
    weights, norms = convolution_weights(fused), norm_tensors(fused)

    def ran_fused(name: str, around: Surroundings) -> bool:
        if weights[name] in inside:
            return True
        return not around.behind and all(any(t in inside for t in norms[norm]) for norm in around.in_front)

    return {name for name, around in eager.items() if around.norms and ran_fused(name, around)}


def fused_in_inference(fused: nn.Module, x: Tensor, eager: dict[str, Surroundings]) -> set[str]:
    """The convolutions whose batch norms were taken by operators of resnet_fused and by no batch norm of PyTorch's."""
    fused = copy.deepcopy(fused).eval()
    operators = _NormOperators(fused)
    with torch.no_grad(), operators:
        fused(x)
    good = operators.fused - operators.plain
    return {name for name, around in eager.items() if around.norms and around.norms <= good}


def share(eager: nn.Module, fused: nn.Module, x: Tensor, *, training: bool) -> Share:
    """What of ``fused`` ran fused on ``x``; ``eager`` is the same network, not fused. Neither is changed."""
    found = surroundings(eager, x, training=training)
    ran = (fused_in_training if training else fused_in_inference)(fused, x, found)
    normalised = frozenset(name for name, around in found.items() if around.norms)
    return Share(frozenset(found), normalised, frozenset(ran))
