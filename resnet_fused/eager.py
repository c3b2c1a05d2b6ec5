# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A block as its modules compose it in eager PyTorch: what runs where a plan found nothing faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.units import Unit


def residual(x: Tensor, units: Sequence[Unit], shortcut: Tensor | Unit | None, relu: bool) -> Tensor:
    """Arguments as in :func:`resnet_fused.functional.residual`; autocast is off."""
    a = x
    for u in units[:-1]:
        a = _unit(a, u).relu_()
    z = _unit(a, units[-1])
    if shortcut is not None:
        z += _unit(x, shortcut) if isinstance(shortcut, Unit) else shortcut
    return z.relu_() if relu else z


def _unit(x: Tensor, unit: Unit) -> Tensor:
    conv, norm = unit
    if conv is not None:
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        x = torch.conv2d(x, conv.weight.to(x.dtype), bias, *conv[2:6])
    if norm is None:
        return x
    momentum = norm.momentum
    if norm.batch_statistics and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.batch_statistics,
        0.0 if momentum is None else momentum,
        norm.eps,
    )
