# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whole blocks as operators for torch.compile: units as what a schema can carry, and what comes out of them.

What is compiled has one operator per pass of a block and sees nothing inside: neither which implementation is chosen,
nor in how many tiles kernels leave their sums. Both depend on the size of the batch, and a graph that saw them would
serve one size only. The choice is made when the operator runs, as it is without torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.library import CustomOpDef, custom_op

from resnet_fused.distributed import Exchange
from resnet_fused.engine import engine, without_autocast
from resnet_fused.units import NO_CONV, Conv, Join, Norm, Unit, output_plane

TENSORS_PER_UNIT = 7  # in the order of Conv and Norm
LEARNT_PER_UNIT = 4  # the first of them

# The arguments that `describe` makes, and how blocks are joined.
_DESCRIPTION = "int[] sizes, float[] numbers, str groups, str engine, int join, bool relu"
_SIZES_PER_UNIT = 11
_NUMBERS_PER_UNIT = 2

_in_operator: ContextVar[bool] = ContextVar("resnet_fused_in_operator", default=False)


_Function = TypeVar("_Function", bound=Callable)


def assume_constant_result(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which imports torch.compile: 1.1 s of the 2.7 s of importing this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_operator() -> bool:
    """Whether this runs inside one of the operators: called by what was compiled."""
    return _in_operator.get()


Description = tuple[list[int], list[float], str]


def tensors_of(units: Sequence[Unit]) -> list[Tensor | None]:
    """Seven per unit."""
    found: list[Tensor | None] = []
    for conv, norm in units:
        found += (None, None) if conv is None else conv[:2]
        found += (None,) * 5 if norm is None else norm[:5]
    return found


def learnt(tensors: Sequence) -> list:
    """Of seven entries per unit the four that stand for what is learnt."""
    return [t for i, t in enumerate(tensors) if i % TENSORS_PER_UNIT < LEARNT_PER_UNIT]


def describe(units: Sequence[Unit]) -> Description:
    """All of ``units`` but their tensors."""
    sizes: list[int] = []
    numbers: list[float] = []
    groups: list[str] = []
    for conv, norm in units:
        c = NO_CONV if conv is None else conv
        n = Norm(None, None) if norm is None else norm
        sizes += [conv is not None, norm is not None, *c.stride, *c.padding, *c.dilation, c.groups]
        sizes += [n.batch_statistics, n.momentum is not None]
        numbers += [0.0 if n.momentum is None else n.momentum, n.eps]
        groups.append("" if n.exchange is None else n.exchange.group)
    return sizes, numbers, "\n".join(groups)


def restore(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], numbers: Sequence[float], groups: str
) -> list[Unit]:
    """The units that :func:`describe` and :func:`tensors_of` took apart."""
    units = []
    for i, group in enumerate(groups.split("\n")):
        own = tensors[i * TENSORS_PER_UNIT : (i + 1) * TENSORS_PER_UNIT]
        convolves, normalises, *geometry, conv_groups, batch_statistics, tracks = (
            sizes[i * _SIZES_PER_UNIT : (i + 1) * _SIZES_PER_UNIT]
        )
        momentum, eps = numbers[i * _NUMBERS_PER_UNIT : (i + 1) * _NUMBERS_PER_UNIT]
        pairs = (tuple(geometry[j : j + 2]) for j in (0, 2, 4))
        conv = Conv._make((*own[:2], *pairs, conv_groups, None)) if convolves else None
        exchange = Exchange(group) if group else None
        settings = (bool(batch_statistics), momentum if tracks else None, eps, exchange)
        norm = Norm._make((*own[2:], *settings)) if normalises else None
        units.append(Unit(conv, norm))
    return units


def operator(name: str, arguments: str, returns: str) -> Callable[[Callable], CustomOpDef]:
    """Registers the decorated function as operator ``name`` of a block: ``arguments``, then what describes the block.

    The function takes them all and is called under the engine that they name, without autocast.
    """

    def register(function: Callable) -> CustomOpDef:
        def run(x, *given):
            chosen = given[-3]
            token = _in_operator.set(True)
            try:
                with engine(chosen), without_autocast(x.device.type):
                    return function(x, *given)
            finally:
                _in_operator.reset(token)

        return custom_op(
            f"resnet_fused::{name}", run, mutates_args=(), schema=f"({arguments}, {_DESCRIPTION}) -> {returns}"
        )

    return register


def conform(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t`` in the layout that was promised; it has another one in odd cases only, such as with a single channel."""
    return t.contiguous(memory_format=memory_format)


def outputs(x: Tensor, units: Sequence[Unit], join: Join) -> Iterator[tuple[tuple[int, ...], torch.memory_format]]:
    """Shape and layout of each unit's output in a block on ``x``: channels_last behind an operand of that layout."""
    shape, layout = tuple(x.shape), suggest_memory_format(x)
    first = shape, layout
    for i, (conv, _) in enumerate(units):
        if join is Join.PROJECTION and i == len(units) - 1:
            shape, layout = first
        if conv is not None:
            n, _, *plane = shape
            plane = output_plane(plane, conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation)
            shape = (n, conv.weight.shape[0], *plane)
            if layout is not torch.channels_last:
                layout = suggest_memory_format(conv.weight)
        yield shape, layout
