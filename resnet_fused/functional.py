# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Stateless fused functions: :func:`residual` and the three shapes of it that networks use.

With ``y = conv(x)`` and batch norm as the affine map ``scale*y + shift`` per channel (``scale = weight*invstd``,
``shift = bias - mean*scale``), a chain of units with a join computes ::

    a0 = x;   y_i = conv_i(a_{i-1});   a_i = relu(scale_i*y_i + shift_i);   z = relu(scale_n*y_n + shift_n + s)

with ``s`` a tensor, ``x`` itself, or ``scale_d*conv_d(x) + shift_d``. All functions take and return
``[N, C, H, W]`` of float64, float32, bfloat16 or float16, follow autocast, keep the memory format eager would give,
and differentiate twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import autograd, eager, reference
from resnet_fused.engine import current_engine, forced, without_autocast
from resnet_fused.units import DTYPES, Conv, Norm, Unit, output_plane

__all__ = ["Conv", "Norm", "Unit", "basic_block", "bn_act", "bottleneck", "conv_bn_act", "residual"]


def _check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dim() != 4:
        raise ValueError(f"{name}: expected a [N, C, H, W] tensor, got {t.dim()} dimensions, {tuple(t.shape)}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {t.dtype}")


def _check_unit(name: str, u: Unit, x: Tensor, channels: int) -> int:
    """Check that ``u`` accepts ``channels`` channels on ``x``'s device; returns how many it gives."""
    for part, fields in (("conv", ("weight", "bias")), ("norm", Norm._fields[:5])):
        for field in fields if getattr(u, part) is not None else ():
            tensor = getattr(getattr(u, part), field)
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name}.{part}.{field}: expected device {x.device}, got {tensor.device}")
    if u.conv is not None:
        weight = u.conv.weight
        if weight.dim() != 4:
            raise ValueError(f"{name}.conv.weight: expected [K, C/groups, R, S], got shape {tuple(weight.shape)}")
        if weight.shape[1] * u.conv.groups != channels:
            raise ValueError(
                f"{name}.conv.weight: expected {channels} input channels (groups={u.conv.groups}), "
                f"got shape {tuple(weight.shape)}"
            )
        channels = weight.shape[0]
    if u.norm is None:
        return channels
    if u.norm.eps < 0:
        raise ValueError(f"{name}.norm.eps: expected a number >= 0, got {u.norm.eps}")
    if not u.norm.batch_statistics and (u.norm.running_mean is None or u.norm.running_var is None):
        raise ValueError(f"{name}.norm: running_mean and running_var are needed without batch statistics")
    for field in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(u.norm, field)
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ValueError(f"{name}.norm.{field}: expected shape ({channels},), got {tuple(vector.shape)}")
    return channels


def residual(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Tensor | Unit | None = None,
    relu: bool = True,
    memory: str = "default",
    engine: str | None = None,
) -> Tensor:
    """A chain of units, ReLU between them, and one join.

    Args:
        x: ``[N, C, H, W]``.
        units: one or more; only the first may come without a convolution, only the last of several without a batch
            norm.
        shortcut: ``x`` itself for an identity, any other tensor of the output's shape, a projection unit that
            is applied to ``x``, or None.
        relu: whether the join ends in a ReLU.
        memory: ``"default"``: backward keeps the input and each convolution's output; ``"minimal"``: the join's
            operands are recomputed, one more convolution each.
        engine: as in :func:`resnet_fused.engine`; None leaves it to the context.

    Returns:
        ``[N, K, P, Q]`` in ``x``'s dtype, or autocast's.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_tensor("x", x)
    if not units:
        raise ValueError("units: expected at least one unit, got none")
    if memory not in autograd.MEMORY_MODES:
        raise ValueError(f"memory: expected one of {autograd.MEMORY_MODES}, got {memory!r}")
    channels = x.shape[1]
    for i, u in enumerate(units):
        if i and u.conv is None:
            raise ValueError(f"units[{i}].conv: only the first unit may come without a convolution")
        if u.norm is None and (i != len(units) - 1 or i == 0):
            raise ValueError(f"units[{i}].norm: only the last of several units may come without a batch norm")
        channels = _check_unit(f"units[{i}]", u, x, channels)
    if isinstance(shortcut, Unit):
        if shortcut.conv is None:
            raise ValueError("shortcut.conv: expected a convolution, got None")
        if shortcut.norm is None:
            raise ValueError("shortcut.norm: expected a batch norm, got None")
        if _check_unit("shortcut", shortcut, x, x.shape[1]) != channels:
            raise ValueError(
                f"shortcut.conv.weight: expected {channels} output channels, "
                f"got shape {tuple(shortcut.conv.weight.shape)}"
            )
    elif shortcut is not None:
        _check_tensor("shortcut", shortcut)

    device = x.device.type
    cast_weights = torch.is_autocast_enabled(device)
    if cast_weights and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        identity = shortcut is x
        x = x.to(dtype)
        shortcut = x if identity else shortcut
    if isinstance(shortcut, Tensor):
        expected = output_shape(x, units)
        if tuple(shortcut.shape) != expected:
            raise ValueError(f"shortcut: expected shape {expected}, got {tuple(shortcut.shape)}")
        if shortcut.dtype != x.dtype:
            raise TypeError(f"shortcut: expected dtype {x.dtype}, got {shortcut.dtype}")
        if shortcut.device != x.device:
            raise ValueError(f"shortcut: expected device {x.device}, got {shortcut.device}")
    with without_autocast(device), forced(engine):
        if current_engine() == "reference":
            return reference.residual(x, units, shortcut, relu)
        z = autograd.residual(x, units, shortcut, relu, memory, cast_weights)
        return eager.residual(x, units, shortcut, relu) if z is None else z


def output_shape(x: Tensor, units: Sequence[Unit]) -> tuple[int, ...]:
    n, channels, *plane = x.shape
    for conv, _ in units:
        if conv is not None:
            channels = conv.weight.shape[0]
            plane = output_plane(plane, conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation)
    return (n, channels, *plane)


def conv_bn_act(
    x: Tensor,
    conv: Conv,
    norm: Norm,
    relu: bool = True,
    shortcut: Tensor | None = None,
    memory: str = "default",
    engine: str | None = None,
) -> Tensor:
    """``relu(norm(conv(x)) + shortcut)``; see :func:`residual`."""
    return residual(x, (Unit(conv, norm),), shortcut, relu, memory, engine)


def bn_act(
    x: Tensor, norm: Norm, relu: bool = True, shortcut: Tensor | None = None, engine: str | None = None
) -> Tensor:
    """``relu(norm(x) + shortcut)``; see :func:`residual`."""
    return residual(x, (Unit(None, norm),), shortcut, relu, engine=engine)


def basic_block(
    x: Tensor,
    unit1: Unit,
    unit2: Unit,
    shortcut: Tensor | Unit | None,
    relu: bool = True,
    memory: str = "default",
    engine: str | None = None,
) -> Tensor:
    """``relu(unit2(relu(unit1(x))) + shortcut)``: He et al. 2015, figure 5, left."""
    return residual(x, (unit1, unit2), shortcut, relu, memory, engine)


def bottleneck(
    x: Tensor,
    unit1: Unit,
    unit2: Unit,
    unit3: Unit,
    shortcut: Tensor | Unit | None,
    relu: bool = True,
    memory: str = "default",
    engine: str | None = None,
) -> Tensor:
    """``relu(unit3(relu(unit2(relu(unit1(x))))) + shortcut)``: He et al. 2015, figure 5, right."""
    return residual(x, (unit1, unit2, unit3), shortcut, relu, memory, engine)
