# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a call of a fused block costs besides its kernels: blocks on 16 pixels, eager and fused, on one thread."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused
from benchmarks import report

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "BasicBlock": lambda: BasicBlock(8, 8),
    "Bottleneck": lambda: Bottleneck(32, 8),
}
MODES = ("training", "forward in training", "evaluation with gradients", "inference")
WARM_UP = 50  # calls


@dataclass(frozen=True)
class Overhead:
    """Median microseconds of a call of either."""

    block: str
    mode: str
    eager: float
    fused: float


def _call(block: nn.Module, mode: str, x: torch.Tensor) -> Callable[[], object]:
    block.train("training" in mode)
    if mode == "training":
        return lambda: block(x).sum().backward()
    if mode == "inference":
        return torch.no_grad()(lambda: block(x))
    return lambda: block(x)


def measure(rounds: int) -> Iterator[Overhead]:
    """Every block in every mode, eager and fused call by call in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make in BLOCKS.items():
            eager: Any = make().to(memory_format=torch.channels_last)
            fused = copy.deepcopy(eager)
            resnet_fused.fuse(fused)
            x = torch.randn(1, eager.conv1.in_channels, 4, 4).to(memory_format=torch.channels_last)
            for mode in MODES:
                calls = [_call(block, mode, x) for block in (eager, fused)]
                times: list[list[float]] = [[], []]
                for index in range(WARM_UP + rounds):
                    for call, found in zip(calls, times, strict=True):
                        start = time.perf_counter()
                        call()
                        if index >= WARM_UP:
                            found.append(time.perf_counter() - start)
                yield Overhead(name, mode, *(1e6 * statistics.median(t) for t in times))
    finally:
        torch.set_num_threads(threads)


def table(found: Sequence[Overhead]) -> str:
    rows = [(o.block, o.mode, f"{o.eager:.0f} us", f"{o.fused:.0f} us", f"{o.fused - o.eager:+.0f} us") for o in found]
    return report.table(("1 image of 4x4, 1 thread", "", "eager", "fused", "more"), rows)


def records(found: Sequence[Overhead]) -> list[dict[str, object]]:
    return [asdict(o) for o in found]
