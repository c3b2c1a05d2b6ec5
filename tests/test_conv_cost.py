# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What native convolutions and whole blocks cost, counted by the simulator: memory, tensor cores, shared memory."""

import pytest
from simulator import needs_tensor_cores

from benchmarks.counted_cost import (
    BLOCKS,
    CONVOLUTIONS,
    SECTOR,
    BlockStep,
    CountedPasses,
    of_ours,
    total,
)
from benchmarks.passes import PASSES, Shape
from resnet_fused.autograd import _Block

pytestmark = [pytest.mark.cuda, needs_tensor_cores]


NARROW = (Shape(64, 28, 256, 1, 1), Shape(256, 28, 64, 1, 1), Shape(64, 29, 64, 1, 1))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_one_pass(sim_counters, name, which):
    passes = CountedPasses(*CONVOLUTIONS[name])
    c = of_ours(sim_counters(passes.call(which)))[0]
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]

    # Whole tiles are multiplied: at most what rounding both sides up to 128, and dgrad's four parities, may add.
    rows, columns = (-(-v // 128) * 128 / v for v in (passes.rows[which], passes.columns[which]))
    assert 1 <= c["mma_flops"] / passes.flops <= rows * columns * 1.15

    # Every operand crosses memory once; how often tiles read it again is for the caches.
    read, written = passes.least[which]
    _, shape = CONVOLUTIONS[name]
    tables = 16 * 4 * (shape.channels + shape.filters)
    assert read <= c["global_distinct_load_sectors"] * SECTOR <= 1.02 * read + tables
    if which != "wgrad":  # which writes partials of its splits
        partials = 3 * 4 * passes.columns[which] * -(-passes.rows[which] // 64)
        stored = c["global_store_sectors"] * SECTOR
        assert written <= stored <= written + 1.3 * partials + 8192
        assert stored == c["global_distinct_store_sectors"] * SECTOR


@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_dgrad_and_wgrad_at_once(sim_counters, shape):
    """Of narrow filters: g, y, x and the addend cross memory once, for both."""
    passes = CountedPasses(1, shape)
    c, sums = of_ours(sim_counters(passes.call_at_once))
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]
    assert sums["shared_wavefronts"] == sums["shared_ideal_wavefronts"]

    tiles = -(-(shape.side**2) // 32)
    assert c["mma_flops"] == 2 * 2 * tiles * 32 * shape.channels * shape.filters
    read, written = passes.least_at_once
    tables = 16 * 4 * (shape.channels + shape.filters)
    assert read <= c["global_distinct_load_sectors"] * SECTOR <= read + tables
    # The rest is a block's: its share of dw, and sums.
    blocks = -(-tiles // 8)
    left = blocks * 4 * (shape.channels * shape.filters + 2 * shape.channels)
    stored = c["global_store_sectors"] * SECTOR
    assert stored == c["global_distinct_store_sectors"] * SECTOR == written + left
    # Each block asks for the weights and, thread by thread, for coefficients; all else is asked for once.
    assert c["global_load_sectors"] * SECTOR <= read + blocks * (passes.passes.weight.nbytes + 12 * tables)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_moves_what_the_model_says(sim_counters, name):
    """Forward and backward of training against the count of tensors that have to be read and written."""
    step = BlockStep(*BLOCKS[name])
    forward = of_ours(sim_counters(step.forward))
    assert isinstance(step.z.grad_fn, _Block._backward_cls)
    backward = of_ours(sim_counters(step.backward))

    read, write = step.least["forward"]
    stores = total(forward, "global_store_sectors") * SECTOR
    # No activation in between is written: tensors of the model and per-channel vectors, nothing else.
    assert write <= stores <= 1.1 * write
    assert total(forward, "global_distinct_load_sectors") * SECTOR <= 1.1 * (read + step.weights)

    # Without the partials of the splits that wgrad leaves, alone or with dgrad, and their sum reads.
    read, write = step.least["backward"]
    stores = total((c for c in backward if "wgrad" not in c["kernel"]), "global_distinct_store_sectors") * SECTOR
    stores -= step.partials
    assert write + step.weights <= stores <= 1.1 * (write + step.weights)
    loads = total((c for c in backward if "add_splits" not in c["kernel"]), "global_distinct_load_sectors") * SECTOR
    assert loads <= 1.1 * (read + step.weights)
