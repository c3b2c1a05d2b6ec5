# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The constants of a folded network: the only place where packed weights are made, kept and used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.units import Conv, is_channels_last

# How many times as many values an input has as the weight where reordering that does not matter.
_REORDERED = 4


class Packed:
    """A convolution's weight in the layout that its kernel wants, made when an input of a dtype first needs it.

    :func:`resnet_fused.fold` gives one to each convolution of its copy. It is made anew for tensors that were moved,
    replaced or loaded, and in copies and pickles; it does not see other writes.
    """

    def __init__(self) -> None:
        self._source: list[tuple] = []
        self._kept: list[torch.UntypedStorage] = []
        self._made: dict[tuple, tuple[Tensor, Tensor | None]] = {}

    def __deepcopy__(self, memo) -> Packed:
        return Packed()

    def __reduce__(self):
        return Packed, ()

    def convolve(
        self, x: Tensor, conv: Conv, shortcut: Tensor | None, relu: bool, native: bool, overwrite: bool = False
    ) -> Tensor | None:
        """``relu(conv(x) + shortcut)``, or None where nothing is packed for inputs like ``x``.

        Packed are native convolutions, those of 3x3 filters as Winograd's transform where that is how they run, else
        oneDNN's, whose ReLU, fused into its convolution, returns 0 for NaN. ``overwrite``: the shortcut's memory may be
        written over.
        """
        weight, bias = conv.weight, conv.bias
        geometry = conv.stride, conv.padding, conv.dilation
        if torch.compiler.is_compiling() or weight.requires_grad:
            return None
        if native:
            return self.native(x.dtype, conv)(x, shortcut, relu)
        if x.device.type != "cpu" or not ops.has_fused_convolution(x.dtype):
            return None
        if not x.is_contiguous(memory_format=torch.channels_last) and not is_channels_last(weight):
            # Packed weights imply channels_last; in float32 alone oneDNN takes others, but reorders them in the call
            # up to twice the time of a plain convolution. At batch 1, against convolution and ReLU: 256->256 3x3 on
            # 4x4 245 us and 147, 512->512 on 2x2 753 and 381; 64->64 on 16x16 142 and 116.
            if x.dtype != torch.float32 or weight.dtype != x.dtype or x.numel() < _REORDERED * weight.numel():
                return None
            return ops.fused_convolution(x, weight, bias, *geometry, conv.groups, shortcut, relu)
        packed, cast_bias = self._get(
            (x.dtype, "oneDNN"),
            weight,
            bias,
            # oneDNN's layout for one size of input serves all: measured with batches of 1 and 16.
            lambda: (
                ops.prepack_weight(weight.detach().to(x.dtype), *geometry, conv.groups, list(x.shape)),
                None if bias is None else bias.detach().to(x.dtype),
            ),
        )
        return ops.fused_convolution(x, packed, cast_bias, *geometry, conv.groups, shortcut, relu, overwrite)

    def native(self, dtype: torch.dtype, conv: Conv) -> Callable[..., Tensor]:
        """The native convolution of inputs of ``dtype``, of an input, a shortcut and whether a ReLU follows.

        As long as :func:`address` of ``conv``'s weight and bias is what it is now.
        """
        weight, bias = conv.weight, conv.bias
        geometry = conv.stride, conv.padding, conv.dilation
        packed, affine = self._get((dtype, "native"), weight, bias, lambda: _pack(dtype, weight, bias, geometry))

        def convolve(x: Tensor, shortcut: Tensor | None, relu: bool, overwrite: bool = False) -> Tensor:
            return ops.conv_fprop_inference(x, None, weight, affine, shortcut, relu, *geometry, packed)

        return convolve

    def _get(self, key: tuple, weight: Tensor, bias: Tensor | None, make: Callable[[], tuple]) -> tuple:
        """What ``make`` made under ``key`` of these very tensors."""
        tensors = [t for t in (weight, bias) if t is not None]
        source = [address(t) for t in tensors]
        if source != self._source:
            self._source = source
            # Kept, so that no other tensor comes to lie where these lie.
            self._kept = [t.untyped_storage() for t in tensors]
            self._made.clear()
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found


def address(t: Tensor) -> tuple[int, int]:
    """Where ``t``'s values lie, and how many writes to them were counted."""
    return t.data_ptr(), 0 if t.is_inference() else t._version


def _pack(
    dtype: torch.dtype, weight: Tensor, bias: Tensor | None, geometry: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor]:
    """A native convolution's packed weight, and its bias as an affine map ``[4, K]``."""
    weight = weight.detach() if weight.dtype == dtype else weight.detach().float()
    affine = torch.zeros(4, weight.shape[0])
    affine[2] = 1
    if bias is not None:
        affine[3] = bias.detach()
    return ops.conv_pack(weight, dtype, *geometry), affine
