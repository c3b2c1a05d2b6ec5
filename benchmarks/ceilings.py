# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What this machine's CPU can do at most: a large matrix product's operations, a large copy's bytes per second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.bandwidth import cache_bytes
from benchmarks.timing import seconds

CPU = torch.device("cpu")
SIDE = 2048  # of the matrices
SMALLEST_COPY, LARGEST_COPY = 64 << 20, 512 << 20  # bytes
REPEATS = 7  # of which the fastest counts


@dataclass(frozen=True)
class Ceilings:
    flops: float  # per second
    bytes: float  # per second, read and written


def measure(dtype: torch.dtype, *, side: int = SIDE, largest_copy: int = LARGEST_COPY) -> Ceilings:
    """The ceilings of computing in ``dtype``."""
    a, b, c = (torch.ones(side, side, dtype=dtype) for _ in range(3))
    source = torch.ones(min(max(cache_bytes(CPU), SMALLEST_COPY), largest_copy), dtype=torch.uint8)
    target = torch.ones_like(source)

    def fastest(call) -> float:
        return min(seconds(call, CPU) for _ in range(REPEATS))

    product = fastest(lambda: torch.mm(a, b, out=c))
    copy = fastest(lambda: target.copy_(source))
    return Ceilings(2 * side**3 / product, 2 * source.nbytes / copy)
