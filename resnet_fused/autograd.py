# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The autograd Function of a whole residual block, and which of its kinds a call takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import block, block_backward, compiled, inference, reference
from resnet_fused.block import Kept, Plan
from resnet_fused.opaque import learnt
from resnet_fused.planner import decide
from resnet_fused.units import Conv, Join, Norm, Unit

MEMORY_MODES = ("default", "minimal")


def is_wrapped(t: Tensor) -> bool:
    """Whether ``t`` stands for a batch, of autograd's own vmap or of torch.func's, or for another transform."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(t) or functorch.is_functorch_wrapped_tensor(t)


class _Block(torch.autograd.Function):
    """``apply(plan, x, shortcut, *tensors)``: seven tensors per unit in the order of :class:`Conv`, :class:`Norm`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Tensor:
        z, kept = block.forward(plan, x, shortcut, tensors)
        mask = z if plan.keeps_z else None
        ctx.save_for_backward(x, mask, *kept.outputs, *kept.coefficients, *kept.weights, *learnt(tensors))
        ctx.plan = plan
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        count = len(plan.units)
        x, z, *saved = ctx.saved_tensors
        kept = Kept(*(saved[i * count : (i + 1) * count] for i in range(3)))
        parameters = block.per_unit(saved[3 * count :])
        # create_graph=True, or vmap over gradients (is_grads_batched=True), which knows nothing of our operators.
        if torch.is_grad_enabled() or is_wrapped(grad):
            return _differentiable_backward(ctx, grad, x, z, kept.coefficients, parameters)
        _, of_input, of_shortcut, *of_tensors = ctx.needs_input_grad
        needs = (of_input, of_shortcut, *learnt(of_tensors))
        grad_x, grad_shortcut, grads = block_backward.backward(plan, needs, grad, x, z, kept, parameters)
        return None, grad_x, grad_shortcut, *(g for of_unit in grads for g in (*of_unit, None, None, None))


def _differentiable_backward(ctx, grad, x, z, coefficients, parameters):
    """Backward through PyTorch's own operations, which differentiate again and take batches of gradients.

    The reference runs again from the saved inputs and autograd differentiates it. Frozen statistics are constants,
    read from the saved coefficients. A shortcut from elsewhere enters the join linearly: its value matters only
    to the ReLU's mask, which ``z`` gives.
    """
    plan: Plan = ctx.plan
    again = torch.is_grad_enabled()
    if is_wrapped(grad) and any(u.exchange is not None for u in plan.units):
        raise NotImplementedError("is_grads_batched: batches of gradients of a synchronised batch norm")
    with torch.enable_grad():
        # Where tensors depend on each other, or are the same, each receives its own share: the views end there.
        x = x.view_as(x)
        parameters = [[None if t is None else t.view_as(t) for t in of_unit] for of_unit in parameters]
        units = []
        for unit, (weight, bias, gamma, beta), table in zip(plan.units, parameters, coefficients, strict=True):
            mean, var = (None, None)
            if not unit.batch_statistics:
                # invstd = rsqrt(var + eps), inverted with eps = 0.
                mean, var = table[0], table[1].pow(-2)
            conv = Conv(weight, bias, *unit[1:5]) if unit.convolves else None
            eps = unit.eps if unit.batch_statistics else 0.0
            norm = Norm(gamma, beta, mean, var, None, unit.batch_statistics, 0.0, eps, unit.exchange)
            units.append(Unit(conv, norm if unit.normalises else None))

        if plan.join is Join.TENSOR:
            out = reference.residual(x, units, None, relu=False)
        else:
            shortcut = {Join.PROJECTION: units[-1], Join.IDENTITY: x, Join.NONE: None}[plan.join]
            out = reference.residual(x, units[: plan.last + 1], shortcut, plan.relu)
    masked = grad
    if plan.join is Join.TENSOR and plan.relu:
        masked = torch.where(z <= 0, torch.zeros_like(grad), grad)
    inputs = [None, x, None, *(t for p in parameters for t in (*p, None, None, None))]
    wanted = [i for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]]
    found: tuple[Tensor, ...] = ()
    if wanted:
        found = torch.autograd.grad(out, [inputs[i] for i in wanted], masked, create_graph=again, allow_unused=True)
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
    within: str = "",
) -> Tensor | None:
    """Run a block through the fused Function; arguments as in :func:`resnet_fused.functional.residual`.

    ``within``: as in :class:`resnet_fused.planner.keys.Key`.

    None where a plan leaves the block to eager PyTorch.
    """
    join = Join.of(x, shortcut)
    chain = (*units, shortcut) if isinstance(shortcut, Unit) else tuple(units)
    if not any(u.norm is not None and u.norm.batch_statistics for u in chain):
        given: tuple[Any, ...] = (x, shortcut) if join is Join.TENSOR else (x,)
        given += tuple(t for u in chain for t in (*(u.conv or ())[:2], *(u.norm or ())[:2]))
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)):
            return inference.residual(x, units, shortcut, relu, within=within)
    external: Any = shortcut if join is Join.TENSOR else None
    minimal = memory == "minimal"
    if torch.compiler.is_compiling():
        return compiled.residual(x, external, chain, join, relu, minimal, cast_weights)
    reads = block.reads_joined(chain, join, relu)
    chosen = decide.choices(True, x, chain, join, relu, minimal, cast_weights, reads, within)
    if not chosen:
        return None
    plan, tensors = block.assemble(chosen, chain, join, relu, minimal, cast_weights, reads)
    return run(plan, x, external, tensors)


def run(plan: Plan, x: Tensor, shortcut: Tensor | None, tensors: Sequence[Tensor | None]) -> Tensor:
    """A planned block. ``shortcut``: a tensor from elsewhere; ``tensors``: seven per unit."""
    z: Tensor = _Block.apply(plan, x, shortcut, *tensors)
    return z
