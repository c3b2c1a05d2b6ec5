# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whole networks of torchvision, set up for measuring."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import processes
from benchmarks.cases import Case, Job, Outcome, Settings, contestants, verify
from benchmarks.entrant import Stored, lap
from benchmarks.peers import RUNTIMES, export
from benchmarks.photographs import photographs
from benchmarks.timing import Effort

NETWORKS = ("resnet18", "resnet50")

# Checked on smaller images than timed: float64 is slow, and every kernel sees the same kind of work.
CHECK_BATCH = 4  # images
CHECK_SIZE = 64  # pixels

BATCH = 16  # images, on a CPU
ROUNDS = 3  # of processes
SECONDS = 0.5  # of timing in each process, after a step that isn't counted
CUDA_SECONDS = 12.0  # of timing, per case


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


def ours(case: Case, *, variants: bool, native: bool) -> tuple[str, ...]:
    """The contestants of a case on a CPU.

    ``variants``: minimal memory, or folding, takes part; ``native``: so do native convolutions.
    """
    names: tuple[str, ...] = ("eager", "fused")
    if variants:
        names += ("minimal" if case.training else "fold",)
    return (*names, "native") if native else names


def others(case: Case) -> tuple[str, ...]:
    """What else can take part in a case on a CPU."""
    return ("compiled", *(name for name, dtypes in RUNTIMES.items() if not case.training and case.dtype in dtypes))


@dataclass(frozen=True)
class NetworkJob:
    """A case of a network by its name; ``stored``: where all cases of the network find it."""

    case: Case
    settings: Settings
    batch: int
    variants: bool
    cuda_seconds: float
    stored: Stored

    def run(self) -> Outcome:
        """Check and time it."""
        return self.run_apart() if self.settings.apart else self.run_here()

    @property
    def images(self) -> Tensor:
        return photographs(self.settings.batch_or(self.batch), self.settings.size, device=self.settings.device)

    def run_here(self) -> Outcome:
        settings, images = self.settings, self.images
        draw = functools.partial(check_images, settings.device)
        network = build(self.case.subject, images)
        effort = settings.effort(self.cuda_seconds)
        return Job(self.case, network, images, draw, effort, settings.peers, settings.native).run()

    def run_apart(self) -> Outcome:
        """Check it here, time it in processes."""
        case, settings = self.case, self.settings
        if not self.stored.network.exists():
            images = self.images
            self.stored.save(build(case.subject, images), images)
        network, images = self.stored.load()
        names = ours(case, variants=self.variants, native=settings.native)
        x, draw = images.to(case.input_dtype), functools.partial(check_images, settings.device)
        verdict, kept = verify(contestants(network, case, names), x, draw, case)
        del network
        absent = {}
        if settings.peers:
            absent = self.without_export(others(case))
            names += tuple(name for name in others(case) if name not in absent)
        race, failed = processes.race(
            names, settings.rounds or ROUNDS, lambda name: processes.apart(lap, name, self.stored, case, self.effort)
        )
        return Outcome(case, len(images), verdict, race, kept, absent | failed)

    @property
    def effort(self) -> Effort:
        """Of one process."""
        return Effort.exactly(1) if self.settings.quick else Effort(self.settings.seconds or SECONDS, fewest_rounds=1)

    def without_export(self, names: Sequence[str]) -> dict[str, str]:
        """Export the network once for those of ``names`` that need it; why they can't take part, if that fails."""
        needy = [name for name in names if name in RUNTIMES]
        if needy and not self.stored.exported.exists():
            try:
                processes.apart(_export, self.stored)
            except processes.Failed as failure:
                return dict.fromkeys(needy, f"not exported: {failure}")
        return {}


def _export(stored: Stored) -> None:
    export(*stored.load(), stored.exported)


def jobs(
    names: Sequence[str],
    settings: Settings,
    *,
    batch: int = BATCH,
    variants: bool = True,
    cuda_seconds: float = CUDA_SECONDS,
) -> Iterator[NetworkJob]:
    """Every case of the named networks, each to be run before the next is asked for.

    ``batch`` and ``variants``, as in `ours`, are for CPUs, ``cuda_seconds`` of timing for GPUs; the settings may
    override numbers.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for case in settings.cases(name, is_network=True):
                yield NetworkJob(case, settings, batch, variants, cuda_seconds, Stored(Path(folder)))
