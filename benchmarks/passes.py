# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The three passes of one convolution, by the native kernels and by the library, alone and as in a block's training.

"Raw" is the convolution alone; native fprop leaves statistics all the same. "Fused" is what a pass does inside a block
whose convolutions have a batch norm and a ReLU in front of them and a batch norm behind:

* fprop reads relu(scale*x + shift) and leaves its output's statistics;
* dgrad forms the output's gradient by the batch norm's backward, stops its result at the ReLU and sums it;
* wgrad reads the same two operands. For the library, dgrad has written the gradient already, the activation is
  computed again from x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import ops, reference

PASSES = ("fprop", "dgrad", "wgrad")


class Shape(NamedTuple):
    """A convolution on square planes of ``side`` pixels with a square filter, padded by half of it, without bias."""

    channels: int
    side: int
    filters: int
    taps: int
    stride: int

    @property
    def padding(self) -> int:
        return self.taps // 2

    @property
    def output_side(self) -> int:
        return (self.side + 2 * self.padding - self.taps) // self.stride + 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """stride, padding, dilation"""
        return (self.stride,) * 2, (self.padding,) * 2, (1, 1)

    def flops(self, images: int) -> int:
        """Floating-point operations of a pass."""
        return 2 * images * self.output_side**2 * self.filters * self.channels * self.taps**2

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}->{self.filters} {self.taps}x{self.taps}{stride} on {self.side}x{self.side}"


class Passes:
    """Operands of ``shape``'s passes on ``images`` images, channels_last, and calls that run them."""

    CHECKED = 2  # images of y and dx
    CHUNK = 32  # images at a time, where float64 sums over all of them

    def __init__(self, shape: Shape, images: int, dtype: torch.dtype, device: torch.device):
        def random(n: int, channels: int, side: int) -> Tensor:
            like = torch.empty((n, channels, side, side), dtype=dtype, device=device)
            return torch.randn_like(like.to(memory_format=torch.channels_last))

        self.shape = shape
        self.x = random(images, shape.channels, shape.side)
        self.y, self.grad = (random(images, shape.filters, shape.output_side) for _ in range(2))
        self.weight = random(shape.filters, shape.channels, shape.taps) / (shape.channels * shape.taps**2) ** 0.5
        self.coefficients = torch.rand(4, shape.channels, device=device) + 0.5
        self.coefficients[3] -= 1.0
        self.output_coefficients = torch.rand(4, shape.filters, device=device)
        # Small, so that sums over all pixels stay within float16.
        self.backward_coefficients = torch.randn(5, shape.filters, device=device) / 64

    def native(self, which: str, *, fused: bool) -> Tensor:
        """Run a pass by the native kernels; returns y, dx or dw."""
        s = self.shape
        table = self.coefficients if fused else None
        gradient = (self.grad, self.y, self.backward_coefficients) if fused else (self.grad, None, None)
        if which == "fprop":
            return ops.conv_fprop(self.x, table, self.weight, None, *s.geometry)[0]
        if which == "dgrad":
            masked_by = (self.x, table) if fused else (None, None)
            return ops.conv_dgrad(*gradient, self.weight, (s.side, s.side), *s.geometry, None, *masked_by)[0]
        taps = (s.taps, s.taps)
        return ops.conv_wgrad(*gradient, self.x, table, taps, *s.geometry, self.weight.dtype)

    def output_gradient(self) -> Tensor:
        """The gradient that the library's passes take: the batch norm's backward, written."""
        return ops.bn_backward_apply(self.grad, self.y, self.output_coefficients, self.backward_coefficients)

    def library(self, which: str, *, fused: bool) -> Callable[[], Tensor]:
        """A call that runs a pass by the library, with one-pass kernels around it; returns y, dx or dw.

        dx comes before the ReLU's mask, which the pass after it applies.
        """
        x, weight, table = self.x, self.weight, self.coefficients
        geometry = self.shape.geometry

        def fprop() -> Tensor:
            a = ops.bn_apply(x, table, relu=True) if fused else x
            y = ops.convolution(a, weight, None, *geometry, 1)
            if fused:
                ops.bn_statistics(y)
            return y

        def dgrad() -> Tensor:
            gradient = self.output_gradient() if fused else self.grad
            dx, _ = ops.convolution_backward(gradient, x, weight, *geometry, 1, True, False)
            if fused:
                ops.bn_backward_reduce(dx, x, table, relu=True)
            return dx

        written = self.output_gradient() if fused and which == "wgrad" else self.grad

        def wgrad() -> Tensor:
            a = ops.bn_apply(x, table, relu=True) if fused else x
            return ops.convolution_backward(written, a, weight, *geometry, 1, False, True)[1]

        return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}[which]

    def compared(self, which: str, result: Tensor, *, fused: bool) -> Tensor:
        """What of a pass's result is held against float64: all of dw, of y and dx the last images, farthest in memory.

        dx is stopped at the ReLU for every contestant by the mask as kernels round it, on which rounding decides.
        """
        if which == "wgrad":
            return result
        last = result[-self.CHECKED :]
        if which == "dgrad" and fused:
            last = torch.where(ops.bn_apply(self.x[-self.CHECKED :], self.coefficients, relu=True) > 0, last, 0)
        return last

    def exact(self, which: str, *, fused: bool) -> Tensor:
        """:meth:`compared` of what float64 makes of a pass."""
        operands = (self.x, self.y, self.grad)
        if which == "wgrad":
            chunks = zip(*(t.split(self.CHUNK) for t in operands), strict=True)
            return torch.stack([self._exact(which, fused, *chunk) for chunk in chunks]).sum(0)
        found = self._exact(which, fused, *(t[-self.CHECKED :] for t in operands))
        return self.compared(which, found, fused=fused)

    def _exact(self, which: str, fused: bool, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        x, y, grad, weight = (t.double() for t in (x, y, grad, self.weight))
        if fused:
            x = reference.bn_apply(x, self.coefficients.double(), relu=True)
            tables = (self.output_coefficients.double(), self.backward_coefficients.double())
            grad = reference.bn_backward_apply(grad, y, *tables)
        geometry = self.shape.geometry
        if which == "fprop":
            return F.conv2d(x, weight, None, *geometry)
        if which == "dgrad":
            return nn.grad.conv2d_input(x.shape, weight, grad, *geometry)
        return nn.grad.conv2d_weight(x, weight.shape, grad, *geometry)
