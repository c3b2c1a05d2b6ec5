# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Max pooling with one byte per output kept for backward: :func:`max_pool2d`.

PyTorch keeps the input and an int64 index per output, and adds gradients where the indices say, on zeros written
before. ResNet's stem (``[16, 64, 112, 112]``, 3x3, stride 2), 2 cores of a Zen 4, torch 2.14.1, ms, processes in turn:

======== ======================= ==========================
         PyTorch's, and backward this package's
======== ======================= ==========================
float32  3.3, 16.2               2.5 to 3.5, 3.0 to 4.1
bfloat16 3.4, 4.4 to 4.7         1.7 to 2.0, 3.3 to 3.5
======== ======================= ==========================

Most of PyTorch's 16 ms are page faults of new memory, which a process that trains need not have. Within a step of
ResNet-18's training (16 images, nearly 600 ms) its pooling took 8.7 ms in float32 and 10.2 in bfloat16, this package's
5.9 and 5.2, and the peak of memory was 0.08 GB lower.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.autograd import is_wrapped
from resnet_fused.engine import current_engine
from resnet_fused.units import is_channels_last

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Pair = tuple[int, int]


class Window(NamedTuple):
    """The arguments of a max pooling, each but the last by height and width."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


class _MaxPool(torch.autograd.Function):
    """``apply(x, window)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        z, taps = ops.max_pool2d(x, *window, write_taps=True)
        ctx.save_for_backward(taps)
        ctx.window, ctx.plane = window, tuple(x.shape[2:])
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        # create_graph=True, or vmap over gradients (is_grads_batched=True), which knows nothing of our operators;
        # torch.compile has neither.
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_wrapped(grad)):
            return _differentiable_backward(grad, taps, ctx.plane, ctx.window), None
        return ops.max_pool2d_backward(grad, taps, ctx.plane, *ctx.window), None


def _differentiable_backward(grad: Tensor, taps: Tensor, plane: Pair, window: Window) -> Tensor:
    """Backward by PyTorch's own operations, which differentiate again and take batches of gradients."""
    (_, columns), stride, padding, dilation, _ = window
    parts = (taps.long() // columns, taps.long() % columns)
    y, x = (
        torch.arange(size).mul_(s).sub_(p).view(shape) + d * part
        for size, shape, s, p, d, part in zip(
            taps.shape[2:], ((-1, 1), (-1,)), stride, padding, dilation, parts, strict=True
        )
    )
    n, channels, *_ = taps.shape
    zeros = grad.new_zeros((n, channels, plane[0] * plane[1]))
    where = (y * plane[1] + x).reshape(n, channels, -1)
    return zeros.scatter_add(2, where, grad.reshape(n, channels, -1)).reshape(n, channels, *plane)


def _pair(value: object) -> Pair | None:
    """``value`` by height and width; None if it is not one or two integers."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not 1 <= len(values) <= 2 or any(type(v) is not int for v in values):
        return None
    return values[0], values[-1]


def _window(plane: Pair, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Window | None:
    """The window, or None where PyTorch's pooling raises, or has to be asked what it does."""
    given = [_pair(v) for v in (kernel_size, kernel_size if stride in (None, ()) else stride, padding, dilation)]
    kernel, step, pad, leap = given
    if kernel is None or step is None or pad is None or leap is None or type(ceil_mode) is not bool:
        return None
    if min(*kernel, *step, *leap) < 1 or min(pad) < 0 or kernel[0] * kernel[1] > ops.MOST_POOL_TAPS:
        return None
    # A window without padding, or within half of itself, has a value; one that leaps may have none.
    if any(p > 0 and (d != 1 or 2 * p > k) for k, p, d in zip(kernel, pad, leap, strict=True)):
        return None
    window = Window(kernel, step, pad, leap, ceil_mode)
    return window if min(ops.pooled_plane(plane, *window)) >= 1 else None


_known_window = functools.lru_cache(maxsize=256, typed=True)(_window)  # it is asked for in every call


def max_pool2d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """``torch.nn.functional.max_pool2d`` by this package's kernels, or None where PyTorch's own is to be called.

    Taken are channels_last float32, bfloat16 and float16 on the CPU, up to 255 positions in a window. On CUDA
    PyTorch's own is called, whose kernel gathers, too; so it is for contiguous tensors, and where torch.compile traces
    without gradients, whose own pooling is as fast. Values are PyTorch's to the bit, NaN and ties included, and
    float32's gradients, too; those of 16-bit types are summed in float32. Differentiates twice.
    """
    if return_indices or current_engine() == "reference":
        return None
    compiling = torch.compiler.is_compiling()
    differentiates = torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad
    if compiling and not differentiates:
        return None
    if not (compiling or type(x) in (Tensor, torch.nn.Parameter)) or not x.is_cpu or x.dim() != 4:
        return None
    if x.dtype not in _DTYPES or x.layout is not torch.strided or x.numel() == 0 or not is_channels_last(x):
        return None
    kernel, step, pad, leap = (tuple(v) if isinstance(v, list) else v for v in (kernel_size, stride, padding, dilation))
    window = (_window if compiling else _known_window)(tuple(x.shape[2:]), kernel, step, pad, leap, ceil_mode)
    if window is None:
        return None
    if differentiates:
        return _MaxPool.apply(x, window)
    return ops.max_pool2d(x, *window, write_taps=False)[0]
