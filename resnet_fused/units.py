# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The pieces a residual block is made of, as plain data: :class:`Conv`, :class:`Norm`, :class:`Unit`,
:class:`Join`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from resnet_fused.distributed import Exchange
    from resnet_fused.snapshot import Packed

# The dtypes of activations that have kernels.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Conv(NamedTuple):
    """A 2-d convolution with zero padding.

    ``weight``: ``[K, C/groups, R, S]``; ``bias``: ``[K]`` or None; ``packed``: what :func:`resnet_fused.fold` keeps;
    the others as in ``nn.Conv2d``.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    packed: Packed | None = None


# In the place of a convolution that is not there: without a weight.
NO_CONV = Conv._make((None, *Conv._field_defaults.values()))


def is_channels_last(t: Tensor) -> bool:
    """Whether ``t`` is channels_last and not, as with one channel or one pixel, contiguous as well."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def output_plane(
    plane: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of what a convolution with ``filter`` (R, S) makes of ``plane`` (H, W)."""
    (h, w), (r, q), (sh, sw), (ph, pw), (dh, dw) = plane, filter, stride, padding, dilation
    return [(h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (q - 1) - 1) // sw + 1]


class Norm(NamedTuple):
    """A batch norm over ``C`` channels.

    ``weight``, ``bias``, ``running_mean``, ``running_var``: ``[C]`` or None; ``num_batches_tracked``: one int64
    or None.
    ``batch_statistics``: normalise by the batch's own statistics (training), else by the running ones.
    The running statistics are updated where ``batch_statistics`` and they are given. ``momentum=None`` is the
    cumulative average. ``exchange``: the batch is that of several processes.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    batch_statistics: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    exchange: Exchange | None = None


class Unit(NamedTuple):
    """A convolution (or None) and the batch norm behind it; None for a convolution that ends a chain without one."""

    conv: Conv | None
    norm: Norm | None


class Join(Enum):
    """What is added to the last unit's output."""

    NONE = 0
    IDENTITY = 1  # the block's input
    TENSOR = 2  # a tensor from elsewhere
    PROJECTION = 3  # a unit applied to the block's input

    @staticmethod
    def of(x: Tensor, shortcut: Tensor | Unit | None) -> Join:
        """How ``shortcut`` joins a block on ``x``."""
        if shortcut is None:
            return Join.NONE
        if isinstance(shortcut, Unit):
            return Join.PROJECTION
        return Join.IDENTITY if shortcut is x else Join.TENSOR
