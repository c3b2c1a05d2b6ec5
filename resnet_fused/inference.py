# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Inference: batch norm folded into weights, weights prepacked, shortcut and ReLU as the convolution's post-ops.

A convolution's folded weights are built on first use and rebuilt when a parameter or running statistic of it
changes: storage, version counter, eps, dtype or layout. Writes that bypass the version counter (``tensor.data``) are
noticed when the module next switches between training and evaluation or is moved, through :func:`forget`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.recognise import compute_dtype, conv_of, norm_of

_DTYPES = (torch.float32, torch.bfloat16)


class _Folded(NamedTuple):
    key: tuple
    sources: tuple[torch.UntypedStorage, ...]
    weight: Tensor
    bias: Tensor
    finite: bool


_folded: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Drop the folded weights of every convolution in ``module``."""
    for child in module.modules():
        _folded.pop(child, None)


class ForgetsFolded(nn.Module):
    """Switching between training and evaluation drops folded weights, and so does moving to a device or a dtype."""

    def train(self, mode: bool = True):
        forget(self)
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # behind to(), cuda(), half() and the like; overridden without `recurse` by some
        forget(self)
        return super()._apply(*args, **kwargs)


def available(x: Tensor, convs: Sequence[nn.Conv2d], tensors: Sequence[Tensor]) -> bool:
    """Whether oneDNN's fused convolution serves ``x``, with nothing to differentiate among ``x`` and ``tensors``.

    ``tensors``: every parameter, running statistic and shortcut that takes part.
    """
    dtype = compute_dtype(x)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if dtype not in _DTYPES or not ops.has_fused_convolution():
        return False
    if dtype == torch.bfloat16 and not uses_packed_weights(x, convs):
        return False  # oneDNN takes plain weights in float32 alone
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        return False
    # Inference tensors have no version counter: a change of theirs would go unnoticed.
    if any(t.is_inference() for t in tensors):
        return False
    return is_finite(x)


def is_finite(t: Tensor) -> bool:
    """False if ``t`` holds NaN or infinity, from one read of it; also where its sum overflows, which does no harm.

    oneDNN's ReLU turns NaN into 0, so what is not finite takes the path through our own kernels.
    """
    return math.isfinite(t.sum().item())


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def uses_packed_weights(x: Tensor, convs: Sequence[nn.Conv2d]) -> bool:
    """Whether eager would compute in channels_last: then oneDNN's own layout for weights serves, which implies it."""
    return _is_channels_last(x) or any(_is_channels_last(c.weight) for c in convs)


def _fold(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype, x: Tensor, packed: bool) -> _Folded:
    c = conv_of(conv)
    n = None if norm is None else norm_of(norm)
    tensors = [t for t in (c.weight, c.bias, *(n[:4] if n is not None else ())) if t is not None]
    # Addresses are safe to compare: what was folded is kept, so that no other tensor comes to lie where it lay.
    key = (
        dtype,
        packed,
        None if n is None else n.eps,
        *((id(t), t.data_ptr(), t._version) for t in tensors),
        *c[2:],
    )
    found = _folded.get(conv)
    if found is not None and found.key == key:
        return found
    weight = c.weight.detach()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        acc = ops.acc_dtype(weight.dtype)
        weight = weight.to(acc)
        bias = torch.zeros(weight.shape[0], dtype=acc) if c.bias is None else c.bias.detach().to(acc)
        if n is not None:
            _, _, scale, shift = ops.bn_coefficients(n.running_mean, n.running_var, n.weight, n.bias, n.eps, acc)
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = bias * scale + shift
        weight, bias = weight.to(dtype), bias.to(dtype)
        finite = is_finite(weight) and is_finite(bias)
        if packed:
            weight = ops.prepack_weight(weight, *c[2:], list(x.shape))
        sources = tuple(t.untyped_storage() for t in tensors)
        _folded[conv] = folded = _Folded(key, sources, weight, bias, finite)
    return folded


def convolve(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module | None, shortcut: Tensor | None, relu: bool, packed: bool
) -> Tensor | None:
    """``relu(norm(conv(x)) + shortcut)``; the caller has checked :func:`available` and the modules.

    ``packed``: :func:`uses_packed_weights` of the whole block; it makes the output channels_last. None where the
    folded weights are not finite.
    """
    folded = _fold(conv, norm, x.dtype, x, packed)
    if not folded.finite:
        return None
    return ops.fused_convolution(x, folded.weight, folded.bias, *conv_of(conv)[2:], shortcut, relu)
