# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the CUDA kernels move, counted by the simulator: every operand read once, every result written once.

The counts are exact, so they are the kernels' performance regression tests where there is no GPU.
"""

import pytest
import torch

from resnet_fused import ops

pytestmark = pytest.mark.cuda

SECTOR = 32  # bytes
SLACK = 1.03
CASES = [
    ((16, 64, 56, 56), torch.bfloat16),
    ((8, 64, 56, 56), torch.float32),
    ((16, 256, 56, 56), torch.bfloat16),
    ((32, 512, 28, 28), torch.bfloat16),
]
KERNELS = (
    "statistics",
    "apply",
    "apply_plain",
    "apply_affine",
    "reduce",
    "reduce_plain",
    "reduce_affine",
    "reduce_and_write",
    "backward_apply",
    "backward_apply_plain",
    "backward_apply_frozen",
    "backward_apply_pair",
    "relu_backward_add",
)


class Operands:
    """Activations of one shape and dtype, tables of their channels, and the vocabulary's kernels called on them.

    A kernel's entry is (call, activations that it reads, activations that it writes).
    """

    def __init__(self, shape, dtype, layout=torch.channels_last):
        channels = shape[1]
        y, grad, s, out = (torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout) for _ in range(4))
        c = torch.rand(4, channels, device="cuda")
        b = torch.rand(5, channels, device="cuda")
        self.kernels = {
            "statistics": (lambda: ops.bn_statistics(y), [y], []),
            "apply": (lambda: ops.bn_apply(y, c, relu=True), [y], [y]),
            "apply_plain": (lambda: ops.bn_apply(y, c, s, relu=True), [y, s], [y]),
            "apply_affine": (lambda: ops.bn_apply(y, c, s, c, relu=True), [y, s], [y]),
            "reduce": (lambda: ops.bn_backward_reduce(grad, y, c, relu=True), [grad, y], []),
            "reduce_plain": (lambda: ops.bn_backward_reduce(grad, y, c, s, relu=True), [grad, y, s], []),
            "reduce_affine": (lambda: ops.bn_backward_reduce(grad, y, c, s, c, relu=True), [grad, y, s], []),
            "reduce_and_write": (
                lambda: ops.bn_backward_reduce(grad, y, c, z=s, relu=True, write_grad=True),
                [grad, y, s],
                [y],
            ),
            "backward_apply": (lambda: ops.bn_backward_apply(grad, y, c, b, relu=True), [grad, y], [y]),
            "backward_apply_plain": (lambda: ops.bn_backward_apply(grad, y, c, b, s, relu=True), [grad, y, s], [y]),
            "backward_apply_frozen": (
                lambda: ops.bn_backward_apply(grad, y, c, b, relu=False, batch_statistics=False),
                [grad],
                [y],
            ),
            "backward_apply_pair": (
                lambda: ops.bn_backward_apply_pair(grad, y, c, b, s, c, b, True, True, True),
                [grad, y, s],
                [y, s],
            ),
            "relu_backward_add": (lambda: ops.relu_backward_add_(out, grad, y, c, s), [out, grad, y, s], [out]),
        }


def of_ours(counters):
    """The one launch of this package's kernels among ``counters``."""
    (launch,) = [c for c in counters if "resnet_fused" in c["kernel"]]
    return launch


def partial_bytes(y, rows):
    """What a reduction leaves behind: ``rows`` float32 per tile and channel."""
    return ops.bn_statistics(y).nbytes // 3 * rows


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_bytes_and_sectors(sim_counters, shape, dtype, name):
    call, read, written = Operands(shape, dtype).kernels[name]
    c = of_ours(sim_counters(call))
    least = sum(t.nbytes for t in [*read, *written])
    if name == "statistics":
        least += partial_bytes(read[0], 3)
    elif name.startswith("reduce"):
        least += partial_bytes(read[0], 3 if name == "reduce_affine" else 2)
    moved = c["global_load_bytes"] + c["global_store_bytes"]
    assert least <= moved <= SLACK * least
    sectors = c["global_load_sectors"] + c["global_store_sectors"]
    assert least <= sectors * SECTOR <= SLACK * least
    distinct = c["global_distinct_load_sectors"] + c["global_distinct_store_sectors"]
    assert distinct * SECTOR <= SLACK * least
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]


@pytest.mark.parametrize("name", KERNELS)
def test_contiguous_layout_crosses_memory_once(sim_counters, name):
    """Coefficients are read per plane there, from caches: what counts is that every sector is needed once."""
    call, read, written = Operands((4, 32, 28, 28), torch.bfloat16, torch.contiguous_format).kernels[name]
    c = of_ours(sim_counters(call))
    least = sum(t.nbytes for t in [*read, *written])
    distinct = c["global_distinct_load_sectors"] + c["global_distinct_store_sectors"]
    # Vectors of the channels: at most ten tables of float32, and what reductions leave.
    rest = (10 + 3 * ops.bn_statistics(read[0]).shape[0]) * 32 * 4
    assert least <= distinct * SECTOR <= least + rest + 20 * SECTOR
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]


@pytest.mark.parametrize("channels", [8, 16, 24, 40, 96, 136])
def test_no_bank_conflicts_at_any_width(sim_counters, channels):
    for name, (call, *_) in Operands((2, channels, 12, 10), torch.float16).kernels.items():
        c = of_ours(sim_counters(call))
        assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"], name
