# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the CUDA kernels move, counted by the simulator: every operand read once, every result written once.

The counts are exact, so they are the kernels' performance regression tests where there is no GPU.
"""

import pytest
import torch

from benchmarks.counted_cost import (
    ONE_PASS_CASES,
    ONE_PASS_KERNELS,
    SECTOR,
    Operands,
    of_ours,
)
from resnet_fused import ops

pytestmark = pytest.mark.cuda

SLACK = 1.03


def the_launch(counters):
    """The one of this package's kernels among ``counters``."""
    (launch,) = of_ours(counters)
    return launch


@pytest.mark.parametrize("name", ONE_PASS_KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), ONE_PASS_CASES)
def test_bytes_and_sectors(sim_counters, shape, dtype, name):
    operands = Operands(shape, dtype)
    c = the_launch(sim_counters(operands.kernels[name][0]))
    least = operands.least(name)
    moved = c["global_load_bytes"] + c["global_store_bytes"]
    assert least <= moved <= SLACK * least
    sectors = c["global_load_sectors"] + c["global_store_sectors"]
    assert least <= sectors * SECTOR <= SLACK * least
    distinct = c["global_distinct_load_sectors"] + c["global_distinct_store_sectors"]
    assert distinct * SECTOR <= SLACK * least
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]


@pytest.mark.parametrize("name", ONE_PASS_KERNELS)
def test_contiguous_layout_crosses_memory_once(sim_counters, name):
    """Coefficients are read per plane there, from caches: what counts is that every sector is needed once."""
    call, read, written = Operands((4, 32, 28, 28), torch.bfloat16, torch.contiguous_format).kernels[name]
    c = the_launch(sim_counters(call))
    least = sum(t.nbytes for t in [*read, *written])
    distinct = c["global_distinct_load_sectors"] + c["global_distinct_store_sectors"]
    # Vectors of the channels: at most ten tables of float32, and what reductions leave.
    rest = (10 + 3 * ops.bn_statistics(read[0]).shape[0]) * 32 * 4
    assert least <= distinct * SECTOR <= least + rest + 20 * SECTOR
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]


@pytest.mark.parametrize("channels", [8, 16, 24, 40, 96, 136])
def test_no_bank_conflicts_at_any_width(sim_counters, channels):
    for name, (call, *_) in Operands((2, channels, 12, 10), torch.float16).kernels.items():
        c = the_launch(sim_counters(call))
        assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"], name
