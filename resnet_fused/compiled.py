# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Residual blocks with gradients for torch.compile: an operator for forward, one for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused import block, block_backward, opaque, ops
from resnet_fused.block import Kept
from resnet_fused.engine import current_engine
from resnet_fused.opaque import TENSORS_PER_UNIT, learnt
from resnet_fused.units import Join, Unit


def _running(tensors: Sequence[Tensor | None], units: Sequence[Unit]) -> list[int]:
    """Which of a block's tensors forward updates: the running statistics and the counters."""
    return [
        i * TENSORS_PER_UNIT + j
        for i, u in enumerate(units)
        for j in range(4, TENSORS_PER_UNIT)
        if u.norm is not None and u.norm.batch_statistics and tensors[i * TENSORS_PER_UNIT + j] is not None
    ]


def _kept(units: Sequence[Unit], join: Join, minimal: bool, reads: bool) -> list[int]:
    """The units whose convolution's output is kept."""
    return [
        i for i, u in enumerate(units) if block.keeps_output(i, u.conv is not None, len(units), join, minimal, reads)
    ]


_OPTIONS = "bool minimal, bool cast_weights, bool reads"


@opaque.operator("block_forward", f"Tensor x, Tensor? shortcut, Tensor?[] tensors, {_OPTIONS}", "Tensor[]")
def _block_forward(x, shortcut, tensors, minimal, cast_weights, reads, sizes, numbers, groups, engine, join, relu):
    """The output, the convolutions' outputs that are kept, the coefficients, what the running statistics become."""
    # Not updated in place: torch.compile has no functional form of an operator that writes and returns a list.
    tensors, copies = list(tensors), {}
    running = _running(tensors, opaque.restore(tensors, sizes, numbers, groups))
    for i in running:
        key = tensors[i].data_ptr()  # one batch norm may serve two units
        if key not in copies:
            copies[key] = tensors[i].clone()
        tensors[i] = copies[key]
    join, units = Join(join), opaque.restore(tensors, sizes, numbers, groups)
    plan, tensors = block.choose(x, units, join, relu, minimal, cast_weights, reads)
    z, kept = block.forward(plan, x, shortcut, tensors)
    layouts = [layout for _, layout in opaque.outputs(x, units, join)]
    conformed = [opaque.conform(y, layouts[i]) for i, y in enumerate(kept.outputs) if y is not None]
    updated = [tensors[i] for i in running]
    if len(copies) < len(updated):
        updated = [t.clone() for t in updated]
    return [opaque.conform(z, layouts[plan.last]), *conformed, *kept.coefficients, *updated]


@_block_forward.register_fake
def _(x, shortcut, tensors, minimal, cast_weights, reads, sizes, numbers, groups, engine, join, relu):
    join, units = Join(join), opaque.restore(tensors, sizes, numbers, groups)

    def empty(shape, layout):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    described = list(opaque.outputs(x, units, join))
    z = empty(*described[-2 if join is Join.PROJECTION else -1])
    conformed = [empty(*described[i]) for i in _kept(units, join, minimal, reads)]
    acc = ops.acc_dtype(x.dtype)
    coefficients = [torch.empty((4, shape[1]), dtype=acc, device=x.device) for shape, _ in described]
    return [z, *conformed, *coefficients, *(torch.empty_like(tensors[i]) for i in _running(tensors, units))]


@opaque.operator(
    "block_backward",
    "Tensor grad, Tensor x, Tensor? z, Tensor[] outputs, Tensor[] coefficients, Tensor?[] parameters, bool[] needs, "
    + _OPTIONS,
    "Tensor[]",
)
def _block_backward(grad, x, z, outputs, coefficients, parameters, needs, *rest):
    """The gradients that are needed: the input's, the shortcut's, those of four parameters per unit."""
    minimal, cast_weights, reads, sizes, numbers, groups, _, join, relu = rest
    join, units = Join(join), _units(parameters, sizes, numbers, groups)
    plan, _ = block.choose(x, units, join, relu, minimal, cast_weights, reads)
    kept = dict(zip(_kept(units, join, minimal, reads), outputs, strict=True))
    count = len(units)
    # Weights that forward cast are cast again.
    saved = Kept([kept.get(i) for i in range(count)], coefficients, [None] * count)
    grad_x, grad_shortcut, grads = block_backward.backward(
        plan, needs, grad, x, z, saved, block.per_unit(parameters)
    )
    found = [] if grad_x is None else [opaque.conform(grad_x, suggest_memory_format(x))]
    if grad_shortcut is not None:
        layouts = [layout for _, layout in opaque.outputs(x, units, join)]
        found.append(opaque.conform(grad_shortcut, layouts[plan.last]))
    given = zip((g for of_unit in grads for g in of_unit), parameters, strict=True)
    return found + [_like(g, parameter) for g, parameter in given if g is not None]


@_block_backward.register_fake
def _(grad, x, z, outputs, coefficients, parameters, needs, *rest):
    minimal, cast_weights, reads, sizes, numbers, groups, engine, join, relu = rest
    of_input, of_shortcut, *of_parameters = needs
    found = [torch.empty_like(x, memory_format=suggest_memory_format(x))] if of_input else []
    if of_shortcut:
        *_, (shape, layout) = opaque.outputs(x, _units(parameters, sizes, numbers, groups), Join(join))
        found.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout))
    given = zip(of_parameters, parameters, strict=True)
    return found + [torch.empty_like(parameter) for needed, parameter in given if needed]


def _units(
    parameters: Sequence[Tensor | None], sizes: Sequence[int], numbers: Sequence[float], groups: str
) -> list[Unit]:
    """Units without running statistics."""
    tensors = [t for own in block.per_unit(parameters) for t in (*own, None, None, None)]
    return opaque.restore(tensors, sizes, numbers, groups)


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """``grad`` in memory of its own, of the parameter's strides."""
    alike = all(n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), parameter.stride(), strict=True))
    if alike and grad.dim() > 1:
        return grad
    return torch.empty_like(parameter).copy_(grad)  # gradients of vectors are rows of one table


class _Block(torch.autograd.Function):
    """``apply(call, x, shortcut, *tensors)``: seven tensors per unit. Returns the output and what the running
    statistics become.

    ``call``: minimal, cast_weights, reads (see :func:`block.reads_joined`) and the description of the operators.
    """

    @staticmethod
    def forward(ctx, call, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        minimal, _, reads, sizes, numbers, groups, _, join, relu = call
        units = opaque.restore(tensors, sizes, numbers, groups)
        kept, count = len(_kept(units, Join(join), minimal, reads)), len(units)
        z, *found = _block_forward(x, shortcut, tensors, *call)
        saved, updated = found[: kept + count], found[kept + count :]
        ctx.mark_non_differentiable(*updated)
        mask = z if block.keeps_z(Join(join), relu, minimal, reads) else None
        ctx.save_for_backward(x, mask, *saved, *learnt(tensors))
        ctx.call, ctx.kept, ctx.count = call, kept, count
        return z, *updated

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, mask, *saved = ctx.saved_tensors
        outputs, coefficients = saved[: ctx.kept], saved[ctx.kept : ctx.kept + ctx.count]
        parameters = saved[ctx.kept + ctx.count :]
        _, of_input, of_shortcut, *of_tensors = ctx.needs_input_grad
        relu = ctx.call[-1]
        # Without a ReLU the shortcut's gradient is the output's, and operators return no argument.
        needs = [of_input, of_shortcut and relu, *learnt(of_tensors)]
        found = []
        if any(needs):
            found = list(_block_backward(grad, x, mask, outputs, coefficients, parameters, needs, *ctx.call))
        grads = [found.pop(0) if needed else None for needed in needs]
        if of_shortcut and not relu:
            grads[1] = grad
        own = block.per_unit(grads[2:])
        return None, *grads[:2], *(g for of_unit in own for g in (*of_unit, None, None, None))


def residual(
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[Unit],
    join: Join,
    relu: bool,
    minimal: bool,
    cast_weights: bool,
) -> Tensor:
    """A block, of whose ``units`` the last is the projection if there is one, where torch.compile traces."""
    reads = block.reads_joined(units, join, relu)
    call = (minimal, cast_weights, reads, *opaque.describe(units), current_engine(), join.value, relu)
    tensors: list[Any] = opaque.tensors_of(units)
    z, *updated = _Block.apply(call, x, shortcut, *tensors)
    with torch.no_grad():
        for i, t in zip(_running(tensors, units), updated, strict=True):
            tensors[i].copy_(t)
    return z
