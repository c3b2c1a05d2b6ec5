# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The residual blocks of ResNet-18 and ResNet-50, on the activations that photographs give them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from benchmarks.cases import Job, Settings
from benchmarks.networks import NETWORKS, build
from benchmarks.photographs import photographs
from resnet_fused.checks import DRAWS

# Checked on fewer images than timed: float64 is slow. Each further draw takes the next images.
CHECK_BATCH = 2  # images

FURTHER = ("resnext50_32x4d", "mobilenet_v2")

BATCH = 8  # images, on a CPU
SECONDS = 0.2  # of timing, per case, on a CPU
CUDA_SECONDS = 0.8


@functools.cache
def block_names(name: str) -> list[str]:
    """The first two blocks of every stage: with and without downsampling (ResNet-18's first stage has none).

    Of MobileNet-v2, which has no such stages, each block.
    """
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        return [f"features.{i}" for i, m in enumerate(network.features) if isinstance(m, InvertedResidual)]
    names = []
    for stage in range(1, 5):
        blocks = getattr(network, f"layer{stage}")
        first = 0 if blocks[0].downsample is not None else 1
        names += [f"layer{stage}.{index}" for index in range(first, 2)]
    return names


def select(part: str | None) -> dict[str, list[str]]:
    """By network, the blocks whose dotted name contains ``part``, such as "resnet50.layer1"; none for None.

    Those of `FURTHER` are chosen where ``part`` begins with their name.
    """
    if part is None:
        return {}
    names = [*NETWORKS, *(name for name in FURTHER if part.startswith(name))]
    chosen = {name: [b for b in block_names(name) if part in f"{name}.{b}"] for name in names}
    return {name: found for name, found in chosen.items() if found}


@torch.no_grad()
def inputs(network: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What each named block receives when ``images`` run through ``network`` in evaluation mode."""
    received: dict[str, Tensor] = {}

    def receive(name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        received[name] = arguments[0].clone()

    handles = [
        network.get_submodule(name).register_forward_pre_hook(functools.partial(receive, name)) for name in names
    ]
    network.eval()(images)
    for handle in handles:
        handle.remove()
    return received


def photographs_for(settings: Settings) -> Tensor:
    """Photographs to time on, and as many as the checks may need if that is more."""
    return photographs(max(batch_of(settings), DRAWS * CHECK_BATCH), settings.size, device=settings.device)


def batch_of(settings: Settings) -> int:
    return settings.batch_or(BATCH)


def jobs_of(subject: str, block: nn.Module, x: Tensor, settings: Settings, seconds: float) -> Iterator[Job]:
    """Every case of one block that receives ``x``."""

    def draw(index: int) -> Tensor:
        return x[index * CHECK_BATCH :][:CHECK_BATCH]

    for case in settings.cases(subject, is_network=False):
        images = x[: batch_of(settings)].clone()
        yield Job(case, block, images, draw, settings.effort(seconds), settings.peers, settings.native, settings.plan)


def jobs(selection: dict[str, list[str]], settings: Settings) -> Iterator[Job]:
    """Every case of the selected blocks."""
    images = photographs_for(settings)
    seconds = CUDA_SECONDS if settings.device.type == "cuda" else SECONDS
    for name, blocks in selection.items():
        network = build(name, images)
        received = inputs(network, blocks, images)
        for path in blocks:
            block = network.get_submodule(path)
            shortcut = "downsample" if getattr(block, "downsample", None) is not None else "identity"
            if isinstance(block, InvertedResidual) and not block.use_res_connect:
                shortcut = "plain"
            yield from jobs_of(f"{name}.{path} {shortcut}", block, received[path], settings, seconds)
