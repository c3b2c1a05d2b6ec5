# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Every operator that a step calls on the CPU: how long it took, what it computed and what it had to move."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm")


@dataclass(frozen=True)
class Signature:
    """Of a convolution: its input's and its weight's shape, and its stride."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]

    def __str__(self) -> str:
        filters, channels, height, width = self.weight
        groups = self.input[1] // channels
        kind = f" /{self.stride[0]}" if self.stride[0] > 1 else ""
        kind += f" in {groups} groups" if groups > 1 else ""
        return f"{self.input[1]}->{filters} {height}x{width}{kind} on {'x'.join(map(str, self.input[2:]))}"


@dataclass(frozen=True)
class Call:
    """Of an operator. ``bytes``: of all operands and results, each once; ``of``: what it works on.

    That is a convolution's signature, or else a matrix product's sizes (m, k, n), or the first operand's shape.
    """

    phase: str
    operator: str
    what: str
    of: Signature | tuple[int, ...]
    seconds: float
    flops: int
    bytes: int


class Recorder(TorchDispatchMode):
    """Records the calls of one step, to be run inside."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.own = 0.0  # seconds that recording took
        self._was_backward = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        begin = time.perf_counter()
        result = func(*args, **kwargs)
        elapsed = time.perf_counter() - begin
        bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        self.calls.append(call_of(str(func._overloadpacket), self._phase(), bound, result, elapsed))
        self.own += time.perf_counter() - begin - elapsed
        return result

    def _phase(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            self._was_backward = True
            return "backward"
        return "optimiser" if self._was_backward else "forward"


def call_of(operator: str, phase: str, bound: Mapping[str, Any], result: object, seconds: float) -> Call:
    """The record of a call with the arguments ``bound``, by their names in the operator's schema."""
    tensors = {id(t): t for t in tree_leaves((list(bound.values()), result)) if isinstance(t, Tensor)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    signature = signature_of(operator, bound)
    if signature is not None:
        what = passes_of(operator, bound)
        written = first_of(bound, "grad", "grad_output")
        written = tree_leaves(result)[0] if written is None else written
        flops = 2 * written.numel() * torch.Size(signature.weight[1:]).numel() * max(1, len(what.split()))
        return Call(phase, operator, what, signature, seconds, flops, moved)
    shapes = [tuple(t.shape) for t in tensors.values()]
    if operator.removeprefix("aten.") in PRODUCTS:
        sizes = (*bound.get("mat1", bound["self"]).shape, bound["mat2"].shape[-1])
        return Call(phase, operator, "", sizes, seconds, 2 * torch.Size(sizes).numel(), moved)
    return Call(phase, operator, "", shapes[0] if shapes else (), seconds, 0, moved)


def passes_of(operator: str, bound: Mapping[str, Any]) -> str:
    """Which of a convolution's passes the operator runs."""
    if "output_mask" in bound:
        return " ".join(name for name, wanted in zip(("dgrad", "wgrad"), bound["output_mask"], strict=False) if wanted)
    return next((name for name in ("dgrad", "wgrad") if name in operator), "fprop")


def signature_of(operator: str, bound: Mapping[str, Any]) -> Signature | None:
    """The convolution that the operator runs a pass of, if it does."""
    if "conv" not in operator or "stride" not in bound or "reorder" in operator:
        return None
    x = first_of(bound, "x", "input", "X")
    weight = first_of(bound, "weight", "W")
    if weight is not None:
        filters = tuple(weight.shape)
    elif "filter" in bound:
        filters = (bound["grad"].shape[1], x.shape[1], *bound["filter"])
    else:
        return None
    images = tuple(x.shape) if x is not None else (len(bound["grad"]), filters[1], *bound["input_plane"])
    return Signature(images, filters, tuple(bound["stride"])) if len(filters) == 4 else None


def first_of(bound: Mapping[str, Any], *names: str) -> Any:
    """The first of the named arguments that is there, or None."""
    return next((bound[name] for name in names if bound.get(name) is not None), None)
