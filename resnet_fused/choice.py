# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What ``engine("auto")`` takes on the CPU: native or the library's, per pass and class of shapes, as measured.

Time of the library's way (its convolution and the one-pass kernels around it; for ``PACKED`` oneDNN's convolution with
packed weights and post-ops) over the native one's: ResNet-50's shapes, channels_last, 224x224, both in turn, medians,
2 cores with AVX-512 and AMX, torch 2.14.1. The range over the shapes; ``python -m benchmarks --convolutions`` measures
the training passes anew.

=============================== ============ ============ ============ ============
                                float32, 16  bfloat16, 16 float32, 1   bfloat16, 1
                                images       images       image        image
=============================== ============ ============ ============ ============
``FPROP`` 1x1                   1.0 to 1.9   0.7 to 2.5   1.2 to 3.3   1.2 to 2.9
``FPROP`` 3x3                   1.0 to 1.7   0.9 to 1.3   0.4 to 1.6   1.1 to 1.9
``FPROP`` 3x3, stride 2         0.9 to 1.1   1.2 to 1.5   1.0 to 1.2   1.3 to 2.0
``FPROP`` 3 channels            0.9          0.4          0.9          0.5
``BACKWARD`` all                0.9 to 1.5   0.8 to 1.9   0.7 to 1.9   0.7 to 1.9
``INFERENCE`` 1x1               1.0 to 1.2   0.8 to 1.6   1.1 to 1.7   1.1 to 2.2
``INFERENCE`` 3x3               1.1 to 1.7   0.8 to 0.9   0.9 to 1.4   1.2 to 1.4
``INFERENCE`` 3x3, stride 2     0.9          0.9 to 1.3   0.8 to 0.9   1.2 to 1.8
``PACKED`` 1x1                  0.8 to 1.0   0.7 to 1.2   1.0 to 1.4   1.1 to 1.8
``PACKED`` 3x3                  1.3 to 1.6   0.6 to 0.9   0.6 to 1.6   0.9 to 1.3
``PACKED`` 3x3, stride 2        0.8 to 0.9   0.8 to 1.3   0.8 to 1.0   0.8 to 1.5
=============================== ============ ============ ============ ============
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import Enum

import torch

from resnet_fused.units import output_plane


class Use(Enum):
    """What a convolution is run for."""

    FPROP = "fprop"  # in training: normalised operand, statistics behind
    BACKWARD = "backward"  # dgrad and wgrad
    INFERENCE = "inference"  # weights as they are given
    PACKED = "packed"  # weights packed before


FEW_CHANNELS = 8  # below, a filter row is too short a product
FEW_PIXELS = 1024  # of all images' output: the library's own cost per call shows
FEW_PIXELS_FLOAT = 3136
FEWEST_TILES = 32  # of 2x2 outputs that pay for reading Winograd's 16 values per weight
TRANSFORMATION_TILES = {2: 181, 4: 300}  # what transforming the filter costs, see csrc/cpu/conv/winograd.cpp


@functools.lru_cache(maxsize=4096)  # it is asked for every unit in every call
def native_is_faster(
    use: Use,
    dtype: torch.dtype,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether a native convolution on the CPU was measured to be at least as fast as the library's; sizes as in
    ``[N, C, H, W]`` and ``[K, C, R, S]``."""
    if use is Use.BACKWARD:
        return True
    if weight_shape[1] < FEW_CHANNELS:
        return False
    if use is Use.FPROP:
        return True
    height, width = output_plane(x_shape[2:], weight_shape[2:], stride, padding, dilation)
    pixels = x_shape[0] * height * width
    pointwise = weight_shape[2] == weight_shape[3] == 1
    if dtype == torch.float32:
        if tuple(weight_shape[2:]) == (3, 3) and tuple(stride) == tuple(dilation) == (1, 1) and max(padding) <= 2:
            tiles = {size: x_shape[0] * -(-height // size) * -(-width // size) for size in (2, 4)}
            if use is Use.PACKED:
                return tiles[2] >= FEWEST_TILES
            return min((size + 2) ** 2 * (n + TRANSFORMATION_TILES[size]) for size, n in tiles.items()) <= 9 * pixels
        return pointwise and (use is Use.INFERENCE or pixels <= FEW_PIXELS_FLOAT)
    return pixels <= FEW_PIXELS or (pointwise and use is Use.INFERENCE)
