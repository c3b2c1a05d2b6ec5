# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What ``engine("auto")`` takes on the CPU: native or the library's, per pass and class of shapes, as measured.

Time of the library's way (its convolution and the one-pass kernels around it; for ``PACKED`` oneDNN's convolution with
packed weights and post-ops) over the native one's: ResNet-50's shapes, channels_last, 224x224, both in turn, medians,
2 cores with AVX-512 and AMX, torch 2.14.1; ``INFERENCE`` and ``PACKED`` of one image with cold caches. The range over
the shapes; ``python -m benchmarks --convolutions`` measures the training passes anew. ``FPROP`` and ``BACKWARD`` were
measured before float32 products stayed in registers and Winograd's tiles were 4x4.

=============================== ============ ============ ============ ============
                                float32, 16  bfloat16, 16 float32, 1   bfloat16, 1
                                images       images       image        image
=============================== ============ ============ ============ ============
``FPROP`` 1x1                   1.0 to 1.9   0.7 to 2.5   1.2 to 3.3   1.2 to 2.9
``FPROP`` 3x3                   1.0 to 1.7   0.9 to 1.3   0.4 to 1.6   1.1 to 1.9
``FPROP`` 3x3, stride 2         0.9 to 1.1   1.2 to 1.5   1.0 to 1.2   1.3 to 2.0
``FPROP`` 3 channels            0.9          0.4          0.9          0.5
``BACKWARD`` all                0.9 to 1.5   0.8 to 1.9   0.7 to 1.9   0.7 to 1.9
both, small image                                         0.3 to 1.7   0.4 to 2.1
``INFERENCE`` 1x1               1.0 to 1.6   1.0 to 1.5   1.3 to 2.7   0.9 to 2.5
``INFERENCE`` 3x3               1.0 to 1.7   0.7 to 1.3   1.0 to 1.7   0.8 to 1.5
``INFERENCE`` 3x3, stride 2     0.9          0.9 to 1.4   0.9 to 1.9   0.9 to 2.0
``PACKED`` 1x1                  1.0 to 1.3   0.6 to 1.4   1.1 to 1.4   0.9 to 1.8
``PACKED`` 3x3                  1.4 to 1.6   0.6 to 1.3   1.0 to 1.2   1.1 to 1.3
``PACKED`` 3x3, stride 2        0.9          0.8 to 1.5   0.9 to 1.1   1.1 to 1.6
=============================== ============ ============ ============ ============

One small image is one of 64x64, measured later than the rest; in float32 26 of 39 cases lie below 0.75 there, see
:func:`library_spares_packing`. With 4 images of 64x64 native blocks were 0.9 to 1.5 times as fast as the others.

Contiguous float32 has the library's convolutions, and in inference on few pixels there is less to win around them than
fusing costs, see ``FEW_CONTIGUOUS``. ResNet-50 against eager, without that rule and with it: one image of 224x224 0.90
and 0.94 to 0.98, two 1.05 and 1.09 to 1.14, one of 320x320 1.08 and 1.12, 4 of 64x64 0.88 and 0.95 to 1.01, 16 of them
0.98 and 1.02.

Where vectors multiply bfloat16 and no tiles do (AVX-512 BF16 without AMX), Winograd's convolutions in float32 and 1x1
convolutions whose products stay in registers were faster (Zen 4, 16 images): ``INFERENCE`` 3x3 of 64 and 128 channels
1.5 times as fast as oneDNN's convolution alone; ResNet-50 from ``fold`` 19.8 ms an image with 1x1 native and 20.8
with oneDNN's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from enum import Enum

import torch

from resnet_fused import ops
from resnet_fused.units import output_plane


class Use(Enum):
    """What a convolution is run for."""

    FPROP = "fprop"  # in training: normalised operand, statistics behind
    BACKWARD = "backward"  # dgrad and wgrad
    INFERENCE = "inference"  # weights as they are given
    PACKED = "packed"  # weights packed before


FEW_CHANNELS = 8  # below, a filter row is too short a product
FEW_PIXELS = 1024  # of all images' output: the library's own cost per call shows
FEWEST_PIXELS = 64  # weights that are read as they lie, see csrc/cpu/conv/transposed.h
# Of one image in training, in float32, up to which the library was the faster one: of 1x1 filters, and of larger ones.
FEWEST_TRAINED = 16
FEWEST_TRAINED_BY_TAPS = 64
# Elements of the largest result of a block's units up to which contiguous float32 inference is eager's.
FEW_CONTIGUOUS = 409_600
# Of PyTorch's own, ConvParams::use_mkldnn in ATen/native/Convolution.cpp: elements of an input of one image, and
# filters' height and width.
MOST_PLAIN = 20480
MOST_PLAIN_TAPS = 3


def library_spares_packing(dtype: torch.dtype, x_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
    """Whether PyTorch runs a convolution as one plain matrix product, as it does one small image in float32.

    oneDNN and native convolutions pack or transform weights in the call, which then is most of their time.
    """
    single = x_shape[0] == 1 and math.prod(x_shape) <= MOST_PLAIN
    return dtype == torch.float32 and single and max(weight_shape[2:]) <= MOST_PLAIN_TAPS


def eager_trains_faster(plain: Sequence[bool]) -> bool:
    """Whether a block is left to eager in training, by :func:`library_spares_packing` of its convolutions.

    ResNet-50 on one image of 64x64: eager was the fastest in 11 of the 14 blocks with more than half of them, and 0.93
    of the fastest in the others; with fewer, native convolutions, the plain ones left to the library, were 1.1 and 1.2
    times as fast as eager.
    """
    return 2 * sum(plain) > len(plain)


def eager_infers_faster(dtype: torch.dtype, channels_last: bool, packed: bool, most: int) -> bool:
    """Whether a block is left to eager in inference, its units' largest result having ``most`` elements.

    ``packed``: whether it has weights of :func:`resnet_fused.fold`.
    """
    return dtype == torch.float32 and not channels_last and not packed and most <= FEW_CONTIGUOUS


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
    """Whether a native convolution is taken on the CPU; sizes as in ``[N, C, H, W]`` and ``[K, C, R, S]``.

    Where the table's class was mostly at least as fast; training passes are taken as a whole, since each spares the
    next one's work, but for what has few channels or pixels.
    """
    height, width = output_plane(x_shape[2:], weight_shape[2:], stride, padding, dilation)
    pixels = x_shape[0] * height * width
    pointwise = weight_shape[2] == weight_shape[3] == 1
    if use in (Use.FPROP, Use.BACKWARD) and dtype == torch.float32 and x_shape[0] == 1:
        few = pixels <= (FEWEST_TRAINED if pointwise else FEWEST_TRAINED_BY_TAPS)
        if few or library_spares_packing(dtype, x_shape, weight_shape):
            return False
    if use is Use.BACKWARD:
        return True
    if weight_shape[1] < FEW_CHANNELS:
        return False
    if use is Use.FPROP:
        return True
    if dtype == torch.float32:
        by_one = tuple(stride) == tuple(dilation) == (1, 1)
        winograd = tuple(weight_shape[2:]) == (3, 3) and by_one and max(padding) <= 2
        return pointwise or winograd or pixels <= FEWEST_PIXELS
    if pixels <= FEW_PIXELS or (pointwise and use is Use.INFERENCE):
        return True
    algorithm = ops.conv_algorithm(dtype, x_shape, weight_shape, stride, padding, dilation, use is Use.PACKED)
    return algorithm == "winograd" or (pointwise and algorithm == "registers")
