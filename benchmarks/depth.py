# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The revolution of depth: AlexNet, VGG-19 and the ResNets, from 8 to 152 layers, eager and fused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks, report
from benchmarks.cases import Outcome, Settings

# Layers with weights, as the papers count them: shortcuts' projections left out.
LAYERS = {"alexnet": 8, "vgg19": 19, "resnet18": 18, "resnet50": 50, "resnet101": 101, "resnet152": 152}

BATCH = 4  # images, on a CPU
CUDA_SECONDS = 5.0  # of timing, per case


def size_of(name: str) -> tuple[int, int]:
    """(parameters, floating-point operations of one 224 x 224 image forward) of torchvision's network."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = torchvision.models.get_model(name, weights=None).eval()
        network(torch.empty(1, 3, 224, 224))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def jobs(settings: Settings) -> Iterator[networks.NetworkJob]:
    """Every case of the six networks."""
    return networks.jobs(list(LAYERS), settings, batch=BATCH, variants=False, cuda_seconds=CUDA_SECONDS)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per network, mode and dtype."""
    rows = []
    speed_header, *speeds = report.speed_columns(outcomes)
    for o, cells in zip(outcomes, speeds, strict=True):
        parameters, operations = size_of(o.case.subject)
        rows.append(
            (
                o.case.subject,
                str(LAYERS[o.case.subject]),
                f"{parameters / 1e6:.1f} M",
                f"{operations / 1e9:.1f} G",
                o.case.mode,
                o.case.dtype,
                *cells,
                str(o.check),
            )
        )
    header = ("", "layers", "parameters", "operations/image", "mode", "dtype", *speed_header, "check")
    return report.table(header, rows)


def records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON."""
    found = []
    for o in outcomes:
        parameters, operations = size_of(o.case.subject)
        size = {"layers": LAYERS[o.case.subject], "parameters": parameters, "operations_per_image": operations}
        found.append({**report.as_record(o), **size})
    return found


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Time per image over the networks in the order of their depth, one panel per mode and dtype."""
    names = [f"{name}\n{layers} layers" for name, layers in LAYERS.items()]
    report.plot_times(outcomes, list(LAYERS), names, path, "The revolution of depth")
