# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The operators' fake kernels, for torch.compile: shape, dtype and layout of what the functions of `ops` return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from resnet_fused import _C
from resnet_fused.ops import NATIVE_DTYPES, acc_dtype, pooled_plane
from resnet_fused.units import output_plane


def _fake(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the fake kernel of an operator.

    One meta tensor among real ones is enough for PyTorch to choose the fake kernel, whose results are uninitialised
    memory: so devices are compared here, as in the operators.
    """

    def register(kernel: Callable) -> Callable:
        names = inspect.signature(kernel).parameters

        def checked(*arguments):
            # Arguments with a default may be left out.
            given = {n: t for n, t in zip(names, arguments, strict=False) if isinstance(t, Tensor)}
            (first, expected), *others = given.items()
            for argument, t in others:
                if t.device != expected.device:
                    raise ValueError(f"{argument}: expected the device of {first}, {expected.device}, got {t.device}")
            return kernel(*arguments)

        return register_fake(f"resnet_fused::{name}")(checked)

    return register


def _empty_tiles(y: Tensor, rows: int) -> Tensor:
    n, channels, height, width = y.shape
    plane = height * width
    if torch._prims_common.suggest_memory_format(y) is torch.channels_last:
        extent = (n * plane, channels, 1)
    else:
        extent = (n, channels, plane)
    tiles = _C.reduction_tiles(y.device.type, *map(int, extent))
    return y.new_empty((tiles, rows, channels), dtype=acc_dtype(y.dtype))


@_fake("bn_statistics")
def _(y):
    return _empty_tiles(y, 3)


@_fake("bn_merge_statistics")
def _(statistics):
    return statistics.new_empty((1, *statistics.shape[1:]))


@_fake("bn_finalize")
def _(statistics, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps):
    return statistics.new_empty(4, statistics.shape[2])


@_fake("bn_coefficients")
def _(running_mean, running_var, weight, bias, eps, acc_dtype):
    return running_mean.new_empty(4, running_mean.shape[0], dtype=acc_dtype)


def _empty_conv_output(x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    plane = output_plane(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *plane)).contiguous(memory_format=torch.channels_last)


@_fake("conv_fprop")
def _(x, coefficients, weight, bias, stride, padding, dilation):
    y = _empty_conv_output(x, weight, stride, padding, dilation)
    tiles = _conv_tiles("fprop", x, x.shape, weight.shape, stride, padding, dilation)
    return y, x.new_empty((tiles, 3, weight.shape[0]), dtype=torch.float32)


@_fake("conv_fprop_inference")
def _(x, coefficients, weight, affine, shortcut, relu, stride, padding, dilation, packed=None):
    return _empty_conv_output(x, weight, stride, padding, dilation)


def _conv_tiles(pass_: str, like: Tensor, *sizes) -> int:
    numbers = ([int(v) for v in values] for values in sizes)
    return _C.conv_tiles(like.device.type, NATIVE_DTYPES[like.dtype], pass_, *numbers)


@_fake("conv_dgrad")
def _(
    grad,
    y,
    backward_coefficients,
    weight,
    input_plane,
    stride,
    padding,
    dilation,
    addend,
    mask_y,
    mask_coefficients,
):
    shape = (grad.shape[0], weight.shape[1], *input_plane)
    tiles = 0
    if mask_y is not None:
        tiles = _conv_tiles("dgrad", grad, shape, weight.shape, stride, padding, dilation)
    dx = grad.new_empty(shape).contiguous(memory_format=torch.channels_last)
    return dx, grad.new_empty((tiles, 2, weight.shape[1]), dtype=torch.float32)


@_fake("conv_wgrad")
def _(grad, y, backward_coefficients, x, coefficients, filter, stride, padding, dilation, dtype):
    dw = x.new_empty((grad.shape[1], x.shape[1], *filter), dtype=dtype)
    return dw.contiguous(memory_format=torch.channels_last)


@_fake("conv_backward")
def _(grad, y, backward_coefficients, weight, x, coefficients, stride, padding, dilation, addend, dtype):
    tiles = 0
    if coefficients is not None:
        sizes = (x.shape, weight.shape, stride, padding, dilation)
        at_once = _conv_tiles("one_read", x, *sizes) if y is not None else 0
        tiles = at_once or _conv_tiles("dgrad", x, *sizes)
    dx = x.new_empty(x.shape).contiguous(memory_format=torch.channels_last)
    dw = x.new_empty(weight.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return dx, x.new_empty((tiles, 2, x.shape[1]), dtype=torch.float32), dw


def _empty_dense(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch._prims_common.suggest_memory_format(like))


@_fake("bn_apply")
def _(y, coefficients, shortcut, shortcut_coefficients, relu):
    return _empty_dense(y)


@_fake("bn_backward_reduce")
def _(grad, y, coefficients, shortcut, shortcut_coefficients, z, relu, write_grad, write_activation=False):
    sums = _empty_tiles(y, 2 if shortcut_coefficients is None else 3)
    masked, activation = (_empty_dense(y) if written else y.new_empty(0) for written in (write_grad, write_activation))
    return masked, sums, activation


@_fake("bn_backward_finalize")
def _(sums, coefficients, branch, count, batch_statistics):
    return sums.new_empty(5, sums.shape[2])


@_fake("bn_backward_merge_")
def _(backward_coefficients, gathered, coefficients, branch):
    return None


@_fake("bn_backward_apply")
def _(grad, y, coefficients, backward_coefficients, shortcut, z, relu, batch_statistics):
    return _empty_dense(y)


@_fake("bn_backward_apply_")
def _(grad, y, coefficients, backward_coefficients, shortcut, z, relu, batch_statistics):
    return None


@_fake("bn_backward_apply_pair")
def _(
    grad,
    y,
    coefficients,
    backward_coefficients,
    shortcut,
    shortcut_coefficients,
    shortcut_backward_coefficients,
    relu,
    batch_statistics,
    shortcut_batch_statistics,
    z=None,
):
    return _empty_dense(y), _empty_dense(y)


@_fake("relu_backward_add_")
def _(out, grad, y, coefficients, shortcut, z):
    return None


def _empty_channels_last(like: Tensor, plane: Sequence[int], dtype: torch.dtype) -> Tensor:
    shape = (*like.shape[:2], *plane)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@_fake("max_pool2d")
def _(x, kernel_size, stride, padding, dilation, ceil_mode, write_taps):
    plane = pooled_plane(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    taps = _empty_channels_last(x, plane, torch.uint8) if write_taps else x.new_empty(0, dtype=torch.uint8)
    return _empty_channels_last(x, plane, x.dtype), taps


@_fake("max_pool2d_backward")
def _(grad, taps, input_plane, kernel_size, stride, padding, dilation, ceil_mode):
    return _empty_channels_last(grad, input_plane, grad.dtype)
