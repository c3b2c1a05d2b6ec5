# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Why bottlenecks: a 3x3 convolution on 256 maps against 256-64-64-256, in weights, operations and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import blocks, networks, report
from benchmarks.cases import Job, Outcome, Settings

MAPS, NARROW = 256, 64
PLAIN, BOTTLENECK = f"3x3 convolution, {MAPS} maps", f"bottleneck {MAPS}-{NARROW}-{NARROW}-{MAPS}"

SECONDS = 3.0  # of timing, per case


def contenders() -> dict[str, nn.Module]:
    """Both modules, with batch norm and ReLU, from a fixed seed."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(MAPS, MAPS, 3, padding=1, bias=False)
    return {
        PLAIN: nn.Sequential(convolution, nn.BatchNorm2d(MAPS), nn.ReLU(inplace=True)),
        BOTTLENECK: torchvision.models.resnet.Bottleneck(MAPS, NARROW),
    }


def size_of(name: str, size: int) -> tuple[int, int]:
    """(weights of the convolutions, floating-point operations of one image of ``size`` pixels forward)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = contenders()[name]
        module(torch.empty(1, MAPS, size // 4, size // 4))
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
    return weights, counter.get_total_flops()


def jobs(settings: Settings) -> Iterator[Job]:
    """Both modules on what ResNet-50's second block receives: 256 maps of a quarter of the images' size."""
    images = blocks.photographs_for(settings)
    x = blocks.inputs(networks.build("resnet50", images), ["layer1.1"], images)["layer1.1"]
    for name, module in contenders().items():
        yield from blocks.jobs_of(name, module.to(x.device), x, settings, SECONDS)


def table(outcomes: Sequence[Outcome], size: int) -> str:
    """One line per module, mode and dtype."""
    rows = []
    speed_header, *speeds = report.speed_columns(outcomes)
    for o, speed in zip(outcomes, speeds, strict=True):
        weights, operations = size_of(o.case.subject, size)
        cells = (o.case.subject, f"{weights:,}", f"{operations / 1e9:.2f} G", o.case.mode, o.case.dtype)
        rows.append((*cells, *speed, str(o.check)))
    header = ("", "weights", "operations/image", "mode", "dtype", *speed_header, "check")
    return report.table(header, rows)


def records(outcomes: Sequence[Outcome], size: int) -> list[dict[str, object]]:
    """The outcomes as JSON."""
    found = []
    for o in outcomes:
        weights, operations = size_of(o.case.subject, size)
        found.append({**report.as_record(o), "weights": weights, "operations_per_image": operations})
    return found


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Time per image, one panel per mode and dtype."""
    names = [PLAIN, BOTTLENECK]
    report.plot_times(outcomes, names, [n.replace(" ", "\n", 1) for n in names], path, "Bottleneck or 3x3 convolution")
