# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whole networks of torchvision, set up for measuring."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.cases import Case, Job, Outcome, Settings
from benchmarks.photographs import photographs

NETWORKS = ("resnet18", "resnet50")

# Checked on smaller images than timed: float64 is slow, and every kernel sees the same kind of work.
CHECK_BATCH = 8  # images
CHECK_SIZE = 64  # pixels

BATCH = 16  # images, on a CPU
SECONDS = 12.0  # of timing, per case


def select(part: str | None) -> list[str]:
    """The networks whose name contains ``part``; none for None."""
    return [name for name in NETWORKS if part is not None and part in name]


def build(name: str, images: Tensor) -> nn.Module:
    """torchvision's network of that name from a fixed seed, channels_last.

    Batch norms get weights and biases that differ from one and zero, so that a mixed-up channel shows, and the
    running statistics of ``images``. Dropout is off: being random, it would drown the comparison.
    """
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    network.to(images.device, memory_format=torch.channels_last)
    _calibrate(network, images)
    return network


@torch.no_grad()
def _calibrate(network: nn.Module, images: Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of this one batch
    network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def check_images(device: torch.device, draw: int) -> Tensor:
    """The input for a numerical check of a whole network, another one for every ``draw``."""
    return photographs(CHECK_BATCH, CHECK_SIZE, seed=draw, device=device)


@dataclass(frozen=True)
class NetworkJob:
    """A case of a network by its name."""

    case: Case
    settings: Settings
    batch: int
    seconds: float

    def run(self) -> Outcome:
        """Check and time it, in a process of its own if the settings say so.

        What a process did before decides whether the C library keeps freed memory or returns it, by which a network's
        time on the CPU changes by a third; users start a process for one network and one purpose.
        """
        if not self.settings.isolated:
            return self.run_here()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(self.run_here)

    def run_here(self) -> Outcome:
        settings = self.settings
        images = photographs(settings.batch_or(self.batch), settings.size, device=settings.device)
        draw = functools.partial(check_images, settings.device)
        network = build(self.case.subject, images)
        effort = settings.effort(self.seconds)
        return Job(self.case, network, images, draw, effort, settings.compile, settings.native).run()


def jobs(
    names: Sequence[str], settings: Settings, *, batch: int = BATCH, seconds: float = SECONDS
) -> Iterator[NetworkJob]:
    """Every case of the named networks; ``batch`` is for CPUs and what the settings may override."""
    for name in names:
        for case in settings.cases(name, is_network=True):
            yield NetworkJob(case, settings, batch, seconds)
