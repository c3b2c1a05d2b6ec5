# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The reference: what every kernel and every block computes, in plain PyTorch, differentiable, short.

The kernels are tested against these functions in float64. Names, shapes and arguments are those of
:mod:`resnet_fused.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.units import Norm, Unit


def _acc(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def bn_statistics(y: Tensor) -> Tensor:
    """Count, mean and M2 per channel: ``[1, 3, C]``."""
    y = _acc(y)
    count = y.numel() // y.shape[1]
    mean = y.sum((0, 2, 3)) / max(count, 1)
    m2 = (y - _channels(mean)).square().sum((0, 2, 3))
    return torch.stack((torch.full_like(mean, count), mean, m2)).unsqueeze(0)


def _coefficients(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    shift = -mean * scale if bias is None else bias.to(mean.dtype) - mean * scale
    return torch.stack((mean, invstd, scale, shift))


def bn_merge_statistics(statistics: Tensor) -> Tensor:
    """One tile of all."""
    counts, means, m2s = statistics.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack((count, mean, m2s.sum(0) + (counts * (means - mean).square()).sum(0))).unsqueeze(0)


def bn_finalize(
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Merge tiles, update the running statistics, return ``[4, C]``: mean, invstd, scale, shift."""
    count, mean, m2 = bn_merge_statistics(statistics)[0]
    with torch.no_grad():
        if num_batches_tracked is not None:
            num_batches_tracked += 1
        if running_mean is not None and running_var is not None:
            factor = momentum
            if factor is None:
                assert num_batches_tracked is not None
                factor = 1.0 / float(num_batches_tracked)
            running_mean.copy_((1 - factor) * running_mean + factor * mean)
            running_var.copy_((1 - factor) * running_var + factor * m2 / (count - 1))
    return _coefficients(mean, (m2 / count + eps).rsqrt(), weight, bias)


def bn_coefficients(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``[4, C]`` of an evaluating batch norm."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return _coefficients(running_mean.to(acc), (running_var.to(acc) + eps).rsqrt(), weight, bias)


def bn_apply(
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``relu(scale*y + shift + s)``."""
    z = _acc(y) * _channels(coefficients[2]) + _channels(coefficients[3])
    if shortcut is not None:
        s = _acc(shortcut)
        if shortcut_coefficients is not None:
            s = s * _channels(shortcut_coefficients[2]) + _channels(shortcut_coefficients[3])
        z = z + s
    return (F.relu(z) if relu else z).to(y.dtype)


def masked_grad(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The gradient behind the ReLU; where the ReLU's input was NaN it passes, as in eager."""
    if not relu:
        return grad
    z = bn_apply(y, coefficients, shortcut, shortcut_coefficients, relu=True) if z is None else z
    return torch.where(z <= 0, torch.zeros_like(grad), grad)


def bn_backward_reduce(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    write_grad: bool = False,
    write_activation: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``g``, the sums of g, g*(y - mean) and, for two batch norms, g*(shortcut - its mean), and the activation."""
    masked = masked_grad(grad, y, coefficients, shortcut, shortcut_coefficients, z, relu)
    g = _acc(masked)
    sums = [g.sum((0, 2, 3)), (g * (_acc(y) - _channels(coefficients[0]))).sum((0, 2, 3))]
    if shortcut_coefficients is not None:
        assert shortcut is not None
        sums.append((g * (_acc(shortcut) - _channels(shortcut_coefficients[0]))).sum((0, 2, 3)))
    activation = bn_apply(y, coefficients, relu=True) if write_activation else y.new_empty(0)
    return (masked if write_grad else y.new_empty(0)), torch.stack(sums).unsqueeze(0), activation


def _shares_of_statistics(
    coefficients: Tensor, d_weight: Tensor, d_bias: Tensor, count: int | Tensor
) -> tuple[Tensor, Tensor]:
    """b and c of ``dy = a*g + b*y + c``, from the sums over ``count`` values."""
    mean, invstd, scale, _ = coefficients
    return -scale * invstd * d_weight / count, scale * (mean * invstd * d_weight - d_bias) / count


def bn_backward_finalize(
    sums: Tensor, coefficients: Tensor, branch: int, count: int, batch_statistics: bool
) -> Tensor:
    """``[5, C]``: d_weight, d_bias, a, b, c with ``dy = a*g + b*y + c`` (Ioffe & Szegedy 2015, section 3)."""
    _, invstd, scale, _ = coefficients
    d_bias, d_weight = sums.sum(0)[0], sums.sum(0)[1 + branch] * invstd
    if batch_statistics:
        b, c = _shares_of_statistics(coefficients, d_weight, d_bias, count)
    else:
        b = c = torch.zeros_like(scale)
    return torch.stack((d_weight, d_bias, scale, b, c))


def bn_backward_merge_(backward_coefficients: Tensor, gathered: Tensor, coefficients: Tensor, branch: int) -> Tensor:
    """b and c over the values of several processes."""
    d_weight, d_bias, count = gathered.sum(0)[[2 * branch, 2 * branch + 1, -1]]
    backward_coefficients[3:] = torch.stack(_shares_of_statistics(coefficients, d_weight, d_bias, count))
    return backward_coefficients


def bn_backward_apply(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    backward_coefficients: Tensor,
    shortcut: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    batch_statistics: bool = True,
    shortcut_coefficients: Tensor | None = None,
) -> Tensor:
    """``dy = a*g + b*y + c``."""
    g = _acc(masked_grad(grad, y, coefficients, shortcut, shortcut_coefficients, z, relu))
    _, _, a, b, c = (_channels(v) for v in backward_coefficients)
    return (a * g + b * _acc(y) + c if batch_statistics else a * g).to(y.dtype)


def _statistics(y: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        zero = torch.zeros(y.shape[1], dtype=_acc(y).dtype, device=y.device)
        return torch.stack((zero, zero + 1, zero + 1, zero))
    if norm.batch_statistics:
        statistics = bn_statistics(y)
        if norm.exchange is not None:
            statistics = norm.exchange.gather_differentiably(statistics)
        return bn_finalize(statistics, *norm[:5], norm.momentum, norm.eps)
    assert norm.running_mean is not None and norm.running_var is not None
    return bn_coefficients(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, y.dtype)


def unit(x: Tensor, u: Unit) -> tuple[Tensor, Tensor]:
    """The raw convolution output and its batch norm's coefficients."""
    if u.conv is None:
        return x, _statistics(x, u.norm)
    c = u.conv
    bias = None if c.bias is None else c.bias.to(x.dtype)
    y = F.conv2d(x, c.weight.to(x.dtype), bias, c.stride, c.padding, c.dilation, c.groups)
    return y, _statistics(y, u.norm)


def residual(
    x: Tensor,
    units: Sequence[Unit],
    shortcut: Tensor | Unit | None = None,
    relu: bool = True,
) -> Tensor:
    """A chain of units with ReLU between them and one join: ``relu(last(x) + shortcut)``.

    ``shortcut`` is a tensor (``x`` itself for an identity), a projection unit applied to ``x``, or None.
    """
    a = x
    for u in units[:-1]:
        a = bn_apply(*unit(a, u), relu=True)
    y, coefficients = unit(a, units[-1])
    if isinstance(shortcut, Unit):
        return bn_apply(y, coefficients, *unit(x, shortcut), relu)
    return bn_apply(y, coefficients, shortcut, None, relu)
