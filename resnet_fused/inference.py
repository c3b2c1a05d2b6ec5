# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Evaluation without gradients: a block of frozen units, each run natively, by the library, or from packed weights.

Everything is computed in the call from the tensors that are given; nothing is kept. What :func:`resnet_fused.fold`
packed comes with the convolution, as ``Conv.packed``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused import eager, opaque, ops
from resnet_fused.engine import current_engine
from resnet_fused.planner import decide
from resnet_fused.planner.entry import Choices
from resnet_fused.units import Join, Norm, Unit, is_channels_last

# ``relu(norm(conv(x)) + shortcut)`` of x, the shortcut, whether there is a ReLU, and whether the shortcut's memory may
# be written over.
Step = Callable[..., Tensor]
# Is given a block's units, the projection's last, and what is native of each.
Keep = Callable[[Sequence[Unit], Choices], None]


def residual(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Tensor | Unit | None,
    relu: bool,
    overwrite: bool = False,
    within: str = "",
    keep: Keep | None = None,
) -> Tensor | None:
    """A block as in :func:`resnet_fused.functional.residual`, its units frozen and nothing to differentiate.

    Args:
        x: ``[N, C, H, W]`` of the dtype to compute in; autocast is off.
        units: their ``norm`` may be None where the convolution is all there is.
        shortcut: of the output's shape and ``x``'s dtype if it is a tensor.
        overwrite: nobody reads the shortcut's tensor afterwards, and its memory may be written over.
        within: as in :class:`resnet_fused.planner.keys.Key`.
        keep: is told how the block runs, if it runs in ``x``'s layout.

    Returns:
        None where a plan leaves the block to eager PyTorch, in the layout that it came in.
    """
    if torch.compiler.is_compiling():
        return _compiled(x, units, shortcut, relu)
    contiguous = _copies_layout(x, units)
    identity = shortcut is x
    if contiguous:
        x = ops.to_channels_last(x)
    if identity:
        shortcut = x
    chain = (*units, shortcut) if isinstance(shortcut, Unit) else tuple(units)
    choices = decide.choices(False, x, chain, Join.of(x, shortcut), relu, within=within)
    if not choices and not contiguous:
        return None
    if keep is not None and choices and not contiguous:
        keep(chain, choices)
    z = run_units(x, units, shortcut, relu, choices, overwrite)
    return ops.to_contiguous(z) if contiguous else z


def run_units(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Tensor | Unit | None,
    relu: bool,
    choices: Choices,
    overwrite: bool = False,
) -> Tensor:
    """:func:`residual` in ``x``'s layout, with what is native of each unit, the projection's last."""
    if not choices:
        return eager.residual(x, units, shortcut, relu)
    chain = (*units, shortcut) if isinstance(shortcut, Unit) else units
    steps = [functools.partial(_unit, u, native) for u, (native, _) in zip(chain, choices, strict=True)]
    return run_steps(x, steps[: len(units)], steps[-1] if isinstance(shortcut, Unit) else shortcut, relu, overwrite)


def run_steps(x: Tensor, steps: Sequence[Step], shortcut: Tensor | Step | None, relu: bool, overwrite: bool) -> Tensor:
    """:func:`run_units` of units as functions."""
    if callable(shortcut):
        shortcut, overwrite = shortcut(x, None, False), True
    for step in steps[:-1]:
        x = step(x, None, True)
    return steps[-1](x, shortcut, relu, overwrite)


def lasting_step(dtype: torch.dtype, unit: Unit, native: bool) -> Step:
    """A unit as a function of inputs of ``dtype`` in native's layout, while its data are what they are.

    And while :func:`resnet_fused.snapshot.address` of its tensors is the same and none of them requires a gradient, if
    its convolution has packed weights.
    """
    conv, norm = unit
    if native and conv is not None and norm is None and conv.packed is not None and not conv.weight.requires_grad:
        return conv.packed.native(dtype, conv)
    return functools.partial(_unit, unit, native)


def prefers_channels_last(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether convolutions of contiguous ``x`` in ``dtype`` are worth a copy to channels_last and one back.

    ResNet-50, 224x224, 2 cores with AMX: in bfloat16 eager takes 2.0 times as long in contiguous layout at batch 16,
    and a fused block with both copies 0.55 of that. In float32 the copies cost a block more than they save, and
    oneDNN's error in channels_last is twice that in contiguous layout, which the tolerance policy does not allow.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)
    )


def _copies_layout(x: Tensor, units: Sequence[Unit]) -> bool:
    """Whether a block runs in channels_last though eager's output is contiguous."""
    if not prefers_channels_last(x, x.dtype):
        return False
    convs = [u.conv for u in units if u.conv is not None]
    return bool(convs) and not any(is_channels_last(c.weight) for c in convs)


def _unit(
    unit: Unit, native: bool, x: Tensor, shortcut: Tensor | None, relu: bool, overwrite: bool = False
) -> Tensor:
    """``relu(norm(conv(x)) + shortcut)``. ``native``: by this package's convolution, if ``x`` came in its layout."""
    conv, norm = unit
    if conv is None:
        assert norm is not None
        return ops.bn_apply(x, _coefficients(norm, x.dtype), shortcut, None, relu)
    native = native and x.is_contiguous(memory_format=torch.channels_last)
    if norm is None and conv.packed is not None:
        z = conv.packed.convolve(x, conv, shortcut, relu, native, overwrite)
        if z is not None:
            return z
    weight, bias = conv.weight, conv.bias
    geometry = conv.stride, conv.padding, conv.dilation
    if weight.dtype != x.dtype and not (native and ops.casts_weight(x, weight)):
        weight = weight.to(x.dtype)
    if native:
        affine = _affine(norm, weight, bias, x.dtype)
        return ops.conv_fprop_inference(x, None, weight, affine, shortcut, relu, *geometry)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = ops.convolution(x, weight, bias, *geometry, conv.groups)
    if norm is not None:
        # Not folded into the weight first: that writes 100 MB for ResNet-50, at batch 1 a third of its time.
        return ops.bn_apply(y, _coefficients(norm, x.dtype), shortcut, None, relu)
    if shortcut is not None:
        y += shortcut
    return y.relu_() if relu else y


def _coefficients(n: Norm, dtype: torch.dtype) -> Tensor:
    assert n.running_mean is not None and n.running_var is not None
    return ops.bn_coefficients(n.running_mean, n.running_var, n.weight, n.bias, n.eps, dtype)


def _affine(norm: Norm | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[4, K]``: what stands behind a native convolution without a bias of its own."""
    if norm is None:
        table = weight.new_zeros((4, weight.shape[0]), dtype=ops.acc_dtype(dtype))
        table[2] = 1
    else:
        table = _coefficients(norm, dtype)
    if bias is not None:
        table[3] += table[2] * bias
    return table


def _compiled(x: Tensor, units: Sequence[Unit], shortcut: Tensor | Unit | None, relu: bool) -> Tensor:
    """:func:`residual` as one operator."""
    join = Join.of(x, shortcut)
    chain = (*units, shortcut) if isinstance(shortcut, Unit) else tuple(units)
    external = shortcut if join is Join.TENSOR else None
    return _block_inference(
        x, external, opaque.tensors_of(chain), *opaque.describe(chain), current_engine(), join.value, relu
    )


def _take_apart(
    x: Tensor, shortcut: Tensor | None, chain: list[Unit], join: Join
) -> tuple[list[Unit], Tensor | Unit | None]:
    """The units and the shortcut of :func:`residual`."""
    if join is Join.PROJECTION:
        return chain[:-1], chain[-1]
    return chain, x if join is Join.IDENTITY else shortcut


@opaque.operator("block_inference", "Tensor x, Tensor? shortcut, Tensor?[] tensors", "Tensor")
def _block_inference(x, shortcut, tensors, sizes, numbers, groups, engine, join, relu):
    units, joined = _take_apart(x, shortcut, opaque.restore(tensors, sizes, numbers, groups), Join(join))
    z = residual(x, units, joined, relu)
    assert z is not None  # what is compiled is never eager
    return opaque.conform(z, _layout(x, units))


@_block_inference.register_fake
def _(x, shortcut, tensors, sizes, numbers, groups, engine, join, relu):
    units, _ = _take_apart(x, shortcut, opaque.restore(tensors, sizes, numbers, groups), Join(join))
    *_, (shape, _) = opaque.outputs(x, units, Join.NONE)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, units))


def _layout(x: Tensor, units: Sequence[Unit]) -> torch.memory_format:
    """Of a block's output."""
    if _copies_layout(x, units):
        return torch.contiguous_format
    *_, (_, layout) = opaque.outputs(x, units, Join.NONE)
    return layout
