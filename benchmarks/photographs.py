# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Batches of real photographs, cut out of the two that scikit-learn ships."""

from __future__ import annotations

import functools

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

# ImageNet's statistics, which torchvision's networks expect their inputs to be normalised by.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

SMALLEST_CROP = 224  # pixels


@functools.cache
def originals() -> Tensor:
    """A temple and a flower: ``[2, 3, 427, 640]``, float32, 0 to 1."""
    from sklearn.datasets import load_sample_images  # takes 0.6 s, in each of the processes that race

    images = numpy.stack(load_sample_images().images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def photographs(count: int, size: int = 224, *, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """Random square crops of both photographs in turn, some mirrored, downscaled and normalised.

    Returns ``[count, 3, size, size]``, float32, channels_last; ``size`` in pixels. Equal seeds give equal crops.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    crops = []
    for index in range(count):
        image = originals()[index % 2]
        height, width = image.shape[1:]
        side = draw(SMALLEST_CROP, height)
        top, left = draw(0, height - side), draw(0, width - side)
        crop = image[:, top : top + side, left : left + side]
        if draw(0, 1):
            crop = crop.flip(-1)
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        crops.append((crop.clamp(0, 1) - MEAN) / STD)
    return torch.stack(crops).to(device, memory_format=torch.channels_last)
