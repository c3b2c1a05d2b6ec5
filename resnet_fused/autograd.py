# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The autograd Function of a whole residual block: what is saved, what is recomputed, the order of kernels.

One Function serves every block: a chain of units (one: ConvBNAct, two: BasicBlock, three: Bottleneck) and a join.
Saved for backward are the block's input, the raw convolution outputs and the per-channel coefficients; the
activations between the convolutions are recomputed from them, and the ReLUs' masks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import ops, reference
from resnet_fused.units import Conv, Norm, Unit

MEMORY_MODES = ("default", "minimal")

_TENSORS_PER_UNIT = 7


class Join(Enum):
    """What is added to the last unit's output."""

    NONE = 0
    IDENTITY = 1  # the block's input
    TENSOR = 2  # a tensor from elsewhere
    PROJECTION = 3  # a unit applied to the block's input


class _UnitPlan(NamedTuple):
    """A unit without its tensors."""

    convolves: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    batch_statistics: bool
    momentum: float | None
    eps: float


class _Plan(NamedTuple):
    """A block without its tensors. ``units`` ends with the projection's if the join has one."""

    units: tuple[_UnitPlan, ...]
    join: Join
    relu: bool
    minimal: bool
    cast_weights: bool  # autocast: parameters follow the input's dtype

    @property
    def last(self) -> int:
        return len(self.units) - (2 if self.join is Join.PROJECTION else 1)

    @property
    def projection(self) -> int:
        return len(self.units) - 1


def _split(u: Unit) -> tuple[_UnitPlan, tuple[Tensor | None, ...]]:
    conv, norm = u
    c = conv if conv is not None else Conv(None)
    plan = _UnitPlan(conv is not None, *c[2:], norm.batch_statistics, norm.momentum, norm.eps)
    return plan, (c.weight, c.bias, *norm[:5])


def _convolve(plan: _UnitPlan, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not plan.convolves:
        return x
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    return ops.convolution(x, weight, bias, *plan[1:5])


def _normalise(plan: _UnitPlan, y: Tensor, norm: Sequence[Tensor | None]) -> Tensor:
    weight, bias, running_mean, running_var, num_batches_tracked = norm
    if not plan.batch_statistics:
        return ops.bn_coefficients(running_mean, running_var, weight, bias, plan.eps, y.dtype)
    if y.numel() == y.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    return ops.bn_finalize(
        ops.bn_statistics(y), weight, bias, running_mean, running_var, num_batches_tracked, plan.momentum, plan.eps
    )


class _Block(torch.autograd.Function):
    """``apply(plan, x, shortcut, *tensors)``: seven tensors per unit in the order of :class:`Conv`, :class:`Norm`."""

    @staticmethod
    def forward(ctx, plan: _Plan, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Tensor:
        units = [
            tensors[i * _TENSORS_PER_UNIT : (i + 1) * _TENSORS_PER_UNIT] for i in range(len(plan.units))
        ]
        weights = [u[0] if not plan.cast_weights or u[0] is None else u[0].to(x.dtype) for u in units]
        outputs, coefficients = [], []
        for i, (unit, tensor) in enumerate(zip(plan.units, units, strict=True)):
            if i == 0 or (plan.join is Join.PROJECTION and i == plan.projection):
                a = x
            else:
                a = ops.bn_apply(outputs[-1], coefficients[-1], relu=True)
            y = _convolve(unit, a, weights[i], tensor[1])
            del a
            outputs.append(y)
            coefficients.append(_normalise(unit, y, tensor[2:]))

        last = plan.last
        if plan.join is Join.PROJECTION:
            join = (outputs[plan.projection], coefficients[plan.projection])
        else:
            join = (x if plan.join is Join.IDENTITY else shortcut, None)
        z = ops.bn_apply(outputs[last], coefficients[last], *join, plan.relu)

        kept: list[Tensor | None] = list(outputs)
        cast = [w if w is not u[0] else None for w, u in zip(weights, units, strict=True)]
        if plan.minimal:
            # The join's inputs come back from one convolution each; weights are cast again.
            kept[last] = None
            if plan.join is Join.PROJECTION:
                kept[plan.projection] = None
            cast = [None] * len(cast)
        kept = [None if not u.convolves else y for u, y in zip(plan.units, kept, strict=True)]
        mask = z if plan.relu and plan.join is Join.TENSOR else None
        parameters = [t for u in units for t in u[:4]]
        # A shortcut from elsewhere is not kept: it enters linearly, and z serves the ReLU's mask.
        ctx.save_for_backward(x, mask, *kept, *coefficients, *cast, *parameters)
        ctx.plan = plan
        return z

    @staticmethod
    def backward(ctx, grad: Tensor):
        plan: _Plan = ctx.plan
        count = len(plan.units)
        x, z, *saved = ctx.saved_tensors
        outputs, coefficients, cast = (list(saved[i * count : (i + 1) * count]) for i in range(3))
        parameters = [saved[3 * count + 4 * i : 3 * count + 4 * i + 4] for i in range(count)]
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grad, x, z, coefficients, parameters)

        need_x, need_shortcut = ctx.needs_input_grad[1:3]
        needs = [
            ctx.needs_input_grad[3 + i * _TENSORS_PER_UNIT : 3 + i * _TENSORS_PER_UNIT + 4] for i in range(count)
        ]
        weights = [
            w if w is not None else p[0] if p[0] is None or not plan.cast_weights else p[0].to(x.dtype)
            for w, p in zip(cast, parameters, strict=True)
        ]
        grads: list[list[Tensor | None]] = [[None] * _TENSORS_PER_UNIT for _ in range(count)]
        last, projection = plan.last, plan.projection

        def unit_input(i: int) -> Tensor:
            if i == 0 or (plan.join is Join.PROJECTION and i == projection):
                return x
            return ops.bn_apply(outputs[i - 1], coefficients[i - 1], relu=True)

        def unit_output(i: int, a: Tensor) -> Tensor:
            return outputs[i] if outputs[i] is not None else _convolve(plan.units[i], a, weights[i], parameters[i][1])

        def norm_backward(i: int, sums: Tensor, branch: int, y: Tensor) -> Tensor:
            """Batch norm i's own gradients; returns its backward coefficients. ``y``: its input."""
            statistics = plan.units[i].batch_statistics
            b = ops.bn_backward_finalize(sums, coefficients[i], branch, y.numel() // y.shape[1], statistics)
            _, bias, gamma, beta = parameters[i]
            if needs[i][2]:
                grads[i][2] = b[0].to(gamma.dtype)
            if needs[i][3]:
                grads[i][3] = b[1].to(beta.dtype)
            if needs[i][1]:
                # Under batch statistics a bias shifts the mean and nothing else.
                grads[i][1] = torch.zeros_like(bias) if statistics else (b[2] * b[1]).to(bias.dtype)
            return b

        def conv_backward(i: int, grad_y: Tensor, a: Tensor, need_input: bool) -> Tensor | None:
            unit = plan.units[i]
            if not unit.convolves:
                return grad_y
            grad_a, grad_weight = ops.convolution_backward(
                grad_y, a, weights[i], *unit[1:5], need_input, needs[i][0]
            )
            if grad_weight is not None:
                grads[i][0] = grad_weight.to(parameters[i][0].dtype)
            return grad_a

        a = unit_input(last)
        y = unit_output(last, a)
        grad_shortcut = grad_x = None
        if plan.join is Join.PROJECTION:
            s = unit_output(projection, x)
            _, sums = ops.bn_backward_reduce(
                grad, y, coefficients[last], s, coefficients[projection], None, plan.relu
            )
            grad_y, grad_s = ops.bn_backward_apply_pair(
                grad,
                y,
                coefficients[last],
                norm_backward(last, sums, 0, y),
                s,
                coefficients[projection],
                norm_backward(projection, sums, 1, s),
                plan.relu,
                plan.units[last].batch_statistics,
                plan.units[projection].batch_statistics,
            )
            del s
            grad_x = conv_backward(projection, grad_s, x, need_x)
            del grad_s
        else:
            s = x if plan.join is Join.IDENTITY and plan.relu else None
            masked, sums = ops.bn_backward_reduce(
                grad, y, coefficients[last], s, None, z, plan.relu, write_grad=need_shortcut and plan.relu
            )
            grad_shortcut = (masked if plan.relu else grad) if need_shortcut else None
            grad_y = ops.bn_backward_apply(
                grad,
                y,
                coefficients[last],
                norm_backward(last, sums, 0, y),
                s,
                z,
                plan.relu,
                plan.units[last].batch_statistics,
            )
        for i in range(last, -1, -1):
            need_input = need_x or any(any(n) for n in needs[:i])
            grad_a = conv_backward(i, grad_y, a, need_input)
            grad_y = a = None  # freed before the next allocation
            if i == 0 or not need_input:
                break
            a = unit_input(i - 1)
            below = unit_output(i - 1, a)
            grad_a = ops.dense(grad_a)
            _, sums = ops.bn_backward_reduce(grad_a, below, coefficients[i - 1], relu=True)
            # The gradient is ours: written over, so that no memory is touched for the first time.
            grad_y = ops.bn_backward_apply_(
                grad_a,
                below,
                coefficients[i - 1],
                norm_backward(i - 1, sums, 0, below),
                relu=True,
                batch_statistics=plan.units[i - 1].batch_statistics,
            )
        if not need_x:
            grad_a = None
        elif plan.join is Join.PROJECTION:
            grad_a = grad_x.add_(grad_a)
        elif plan.join is Join.IDENTITY:
            grad_a = ops.dense(grad_a)
            if plan.relu:
                ops.relu_backward_add_(grad_a, grad, y, coefficients[last], x)
            else:
                grad_a.add_(grad)
        return None, grad_a, grad_shortcut, *(g for unit_grads in grads for g in unit_grads)


def _differentiable_backward(ctx, grad, x, z, coefficients, parameters):
    """Backward through differentiable operations, for ``create_graph=True``.

    The reference runs again from the saved inputs and autograd differentiates it. Frozen statistics are constants,
    read from the saved coefficients. A shortcut from elsewhere enters the join linearly: its value matters only
    to the ReLU's mask, which ``z`` gives.
    """
    plan: _Plan = ctx.plan
    units = []
    for unit, (weight, bias, gamma, beta), table in zip(plan.units, parameters, coefficients, strict=True):
        mean, var = (None, None)
        if not unit.batch_statistics:
            # invstd = rsqrt(var + eps), inverted with eps = 0.
            mean, var = table[0], table[1].pow(-2)
        conv = Conv(weight, bias, *unit[1:5]) if unit.convolves else None
        eps = unit.eps if unit.batch_statistics else 0.0
        units.append(Unit(conv, Norm(gamma, beta, mean, var, None, unit.batch_statistics, 0.0, eps)))

    if plan.join is Join.TENSOR:
        out = reference.residual(x, units, None, relu=False)
        masked = torch.where(z <= 0, torch.zeros_like(grad), grad) if plan.relu else grad
    else:
        shortcut = {Join.PROJECTION: units[-1], Join.IDENTITY: x, Join.NONE: None}[plan.join]
        out = reference.residual(x, units[: plan.last + 1], shortcut, plan.relu)
        masked = grad
    inputs = [None, x, None, *(t for p in parameters for t in (*p, None, None, None))]
    wanted = [i for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]]
    found = (
        torch.autograd.grad(out, [inputs[i] for i in wanted], masked, create_graph=True, allow_unused=True)
        if wanted
        else ()
    )
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, g in zip(wanted, found, strict=True):
        result[i] = g
    if ctx.needs_input_grad[2]:
        result[2] = masked
    return tuple(result)


def residual(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Tensor | Unit | None,
    relu: bool,
    memory: str,
    cast_weights: bool,
) -> Tensor:
    """Run a block through the fused Function; arguments as in :func:`resnet_fused.functional.residual`."""
    if shortcut is None:
        join = Join.NONE
    elif isinstance(shortcut, Unit):
        join = Join.PROJECTION
    else:
        join = Join.IDENTITY if shortcut is x else Join.TENSOR
    chain = (*units, shortcut) if join is Join.PROJECTION else tuple(units)
    plans, tensors = zip(*(_split(u) for u in chain), strict=True)
    plan = _Plan(plans, join, relu, memory == "minimal", cast_weights)
    external = shortcut if join is Join.TENSOR else None
    return _Block.apply(plan, x, external, *(t for unit in tensors for t in unit))
