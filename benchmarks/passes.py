# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The three passes of one convolution, by the native kernels and by the library, alone and as in a block's training.

"Raw" is the convolution alone; native fprop leaves statistics all the same. "Fused" is what a pass does inside a block,
where a batch norm follows every convolution, and most have a batch norm and a ReLU in front of them, too:

* fprop reads relu(scale*x + shift), or x, and ends with its output's batch norm, ready to be applied;
* dgrad forms the output's gradient by the batch norm's backward; it stops its result at the ReLU in front, and ends
  with the backward of the batch norm there, ready to be applied;
* wgrad reads the same two operands. For the library, dgrad has written the gradient already, the activation is
  computed again from x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

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
    """Operands of ``shape``'s passes on ``images`` images, channels_last, and calls that run them.

    ``behind_norm``: whether a batch norm and a ReLU are in front of the convolution, in its block.
    """

    CHECKED = 2  # images of y and dx
    CHUNK = 32  # images at a time, where float64 sums over all of them

    def __init__(self, shape: Shape, images: int, dtype: torch.dtype, device: torch.device, *, behind_norm: bool):
        def random(n: int, channels: int, side: int) -> Tensor:
            like = torch.empty((n, channels, side, side), dtype=dtype, device=device)
            return torch.randn_like(like.to(memory_format=torch.channels_last))

        self.shape, self.behind_norm = shape, behind_norm
        self.x = random(images, shape.channels, shape.side)
        self.y, self.grad = (random(images, shape.filters, shape.output_side) for _ in range(2))
        self.weight = random(shape.filters, shape.channels, shape.taps) / (shape.channels * shape.taps**2) ** 0.5
        self.coefficients = torch.rand(4, shape.channels, device=device) + 0.5
        self.coefficients[3] -= 1.0
        self.output_coefficients = torch.rand(4, shape.filters, device=device)
        # Small, so that sums over all pixels stay within float16.
        self.backward_coefficients = torch.randn(5, shape.filters, device=device) / 64

    def table(self, fused: bool) -> Tensor | None:
        """The coefficients that are applied to x while it is read, if any."""
        return self.coefficients if fused and self.behind_norm else None

    def call_native(self, which: str, *, fused: bool) -> Callable[[], Tensor]:
        """A call that runs a pass by the native kernels; returns y, dx or dw."""
        s, x, weight, table = self.shape, self.x, self.weight, self.table(fused)
        gradient: tuple[Tensor, Tensor | None, Tensor | None] = (self.grad, None, None)
        if fused:
            gradient = (self.grad, self.y, self.backward_coefficients)

        def fprop() -> Tensor:
            y, statistics = ops.conv_fprop(x, table, weight, None, *s.geometry)
            if fused:
                normalise(statistics)
            return y

        def dgrad() -> Tensor:
            masked_by = (None, None) if table is None else (x, table)
            dx, sums = ops.conv_dgrad(*gradient, weight, (s.side, s.side), *s.geometry, None, *masked_by)
            if table is not None:
                normalise_backward(sums, table, x)
            return dx

        def wgrad() -> Tensor:
            return ops.conv_wgrad(*gradient, x, table, (s.taps, s.taps), *s.geometry, weight.dtype)

        return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}[which]

    def output_gradient(self) -> Tensor:
        """The gradient that the library's passes take: the batch norm's backward, written."""
        return ops.bn_backward_apply(self.grad, self.y, self.output_coefficients, self.backward_coefficients)

    def call_library(self, which: str, *, fused: bool) -> Callable[[], Tensor]:
        """A call that runs a pass by the library, with one-pass kernels around it; returns y, dx or dw.

        dx comes before the ReLU's mask, which the pass after it applies.
        """
        x, weight, table = self.x, self.weight, self.table(fused)
        geometry = self.shape.geometry

        def activation() -> Tensor:
            return x if table is None else ops.bn_apply(x, table, relu=True)

        def fprop() -> Tensor:
            y = ops.convolution(activation(), weight, None, *geometry, 1)
            if fused:
                normalise(ops.bn_statistics(y))
            return y

        def dgrad() -> Tensor:
            gradient = self.output_gradient() if fused else self.grad
            dx: Any = ops.convolution_backward(gradient, x, weight, *geometry, 1, True, False)[0]
            if table is not None:
                normalise_backward(ops.bn_backward_reduce(dx, x, table, relu=True)[1], table, x)
            return dx

        written = self.output_gradient() if fused and which == "wgrad" else self.grad

        def wgrad() -> Tensor:
            dw: Any = ops.convolution_backward(written, activation(), weight, *geometry, 1, False, True)[1]
            return dw

        return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}[which]

    def stopped(self, dx: Tensor) -> Tensor:
        """``dx`` of the last images behind the ReLU, where there is one: by the mask as kernels round it."""
        if not self.behind_norm:
            return dx
        passes = ops.bn_apply(self.x[-len(dx) :], self.coefficients, relu=True) > 0
        return torch.where(passes, dx, 0)

    def compared(self, which: str, result: Tensor) -> Tensor:
        """What of a pass's result is held against float64: all of dw, of y and dx the last images, farthest in memory.

        Statistics and sums are not; the tests see to them.
        """
        return result if which == "wgrad" else result[-self.CHECKED :]

    def exact(self, which: str, *, fused: bool) -> Tensor:
        """:meth:`compared` of what float64 makes of a pass; dx before the mask."""
        operands = (self.x, self.y, self.grad)
        if which == "wgrad":
            chunks = zip(*(t.split(self.CHUNK) for t in operands), strict=True)
            return torch.stack([self._exact(which, fused, *chunk) for chunk in chunks]).sum(0)
        return self._exact(which, fused, *(t[-self.CHECKED :] for t in operands))

    def _exact(self, which: str, fused: bool, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        x, y, grad, weight = (t.double() for t in (x, y, grad, self.weight))
        if fused:
            if self.behind_norm:
                x = reference.bn_apply(x, self.coefficients.double(), relu=True)
            tables = (self.output_coefficients.double(), self.backward_coefficients.double())
            grad = reference.bn_backward_apply(grad, y, *tables)
        geometry = self.shape.geometry
        if which == "fprop":
            return F.conv2d(x, weight, None, *geometry)
        if which == "dgrad":
            return conv2d_input(x.shape, weight, grad, *geometry)
        return conv2d_weight(x, weight.shape, grad, *geometry)


def normalise(statistics: Tensor) -> None:
    """A batch norm's coefficients from its input's statistics."""
    ops.bn_finalize(statistics, None, None, None, None, None, 0.1, 1e-5)


def normalise_backward(sums: Tensor, coefficients: Tensor, y: Tensor) -> None:
    """A batch norm's backward coefficients from the sums over its input ``y``."""
    ops.bn_backward_finalize(sums, coefficients, 0, y.numel() // y.shape[1], True)
