# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What native convolutions and whole blocks cost, counted by the simulator: memory, tensor cores, shared memory."""

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.autograd import _Block

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(OLD, reason="native convolutions need compute capability 8.0"),
]

SECTOR = 32  # bytes
# ResNet-50's convolutions, fewer images: (N, C, side, K, filter, stride)
CONVOLUTIONS = {
    "layer1.conv1": (4, 64, 56, 64, 1, 1),
    "layer1.conv2": (2, 64, 56, 64, 3, 1),
    "layer1.conv3": (2, 64, 56, 256, 1, 1),
    "layer2.conv1": (2, 256, 56, 128, 1, 1),
    "layer2.conv2": (2, 128, 56, 128, 3, 2),
    "layer2.downsample": (2, 256, 56, 512, 1, 2),
    "layer3.conv2": (4, 256, 14, 256, 3, 1),
    "layer4.conv1": (8, 2048, 7, 512, 1, 1),
}


def channels_last(*shape):
    return torch.randn(shape, device="cuda").bfloat16().to(memory_format=torch.channels_last)


class Passes:
    """The three passes of one convolution with all that is fused into them in a block's training."""

    def __init__(self, n, c, side, k, taps, stride):
        pad = taps // 2
        self.side = (side + 2 * pad - taps) // stride + 1
        x, y, g = channels_last(n, c, side, side), *(channels_last(n, k, self.side, self.side) for _ in range(2))
        weight = channels_last(k, c, taps, taps)
        table, backward = torch.rand(4, c, device="cuda"), torch.rand(5, k, device="cuda")
        geometry = ((stride, stride), (pad, pad), (1, 1))
        self.flops = 2 * n * self.side**2 * k * c * taps**2
        self.rows = {"fprop": n * self.side**2, "dgrad": n * side**2, "wgrad": k}
        self.columns = {"fprop": k, "dgrad": c, "wgrad": c}
        self.x, self.y, self.weight = x, y, weight
        self.calls = {
            "fprop": lambda: ops.conv_fprop(x, table, weight, None, *geometry),
            "dgrad": lambda: ops.conv_dgrad(g, y, backward, weight, (side, side), *geometry, None, x, table),
            "wgrad": lambda: ops.conv_wgrad(g, y, backward, x, table, (taps, taps), *geometry, torch.float32),
        }
        # Every tensor once.
        self.least = {
            "fprop": (x.nbytes + weight.nbytes, y.nbytes),
            "dgrad": (2 * y.nbytes + x.nbytes + weight.nbytes, x.nbytes),
            "wgrad": (2 * y.nbytes + x.nbytes, None),  # writes partials of its splits
        }
        if stride == 2 and taps == 1:  # three pixels of four are not read
            self.least["fprop"] = (x.nbytes // 4 + weight.nbytes, y.nbytes)
            self.least["wgrad"] = (2 * y.nbytes + x.nbytes // 4, None)


def kernels(counters):
    """The launches of this package's kernels."""
    return [c for c in counters if "resnet_fused" in c["kernel"]]


@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_one_pass(sim_counters, name, which):
    passes = Passes(*CONVOLUTIONS[name])
    c = kernels(sim_counters(passes.calls[which]))[0]
    assert c["shared_wavefronts"] == c["shared_ideal_wavefronts"]

    # Whole tiles are multiplied: at most what rounding both sides up to 128, and dgrad's four parities, may add.
    rows, columns = (-(-v // 128) * 128 / v for v in (passes.rows[which], passes.columns[which]))
    assert 1 <= c["mma_flops"] / passes.flops <= rows * columns * 1.15

    # Every operand crosses memory once; how often tiles read it again is for the caches.
    read, written = passes.least[which]
    tables = 16 * 4 * (passes.x.shape[1] + passes.y.shape[1])
    assert read <= c["global_distinct_load_sectors"] * SECTOR <= 1.02 * read + tables
    if written is not None:
        partials = 3 * 4 * passes.columns[which] * -(-passes.rows[which] // 64)
        stored = c["global_store_sectors"] * SECTOR
        assert written <= stored <= written + 1.3 * partials + 8192
        assert stored == c["global_distinct_store_sectors"] * SECTOR


def projection(inplanes, planes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


# (block, input channels, side): ResNet-50's, two images.
BLOCKS = {
    "layer1.1": (lambda: rf.Bottleneck(256, 64), 256, 56),
    "layer2.0": (lambda: rf.Bottleneck(256, 128, 2, projection(256, 512, 2)), 256, 56),
    "layer3.1": (lambda: rf.Bottleneck(1024, 256), 1024, 14),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_moves_what_the_model_says(sim_counters, name):
    """Forward and backward of training against the count of tensors that have to be read and written."""
    build, channels, side = BLOCKS[name]
    block = build().to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    x = channels_last(2, channels, side, side).requires_grad_()
    result = []
    with rf.engine("native"):
        forward = kernels(sim_counters(lambda: result.append(block(x))))
    z = result[0]
    assert isinstance(z.grad_fn, _Block._backward_cls)
    gradient = torch.randn_like(z)
    backward = kernels(sim_counters(lambda: z.backward(gradient)))

    stride = block.stride
    n, planes = x.shape[0], block.conv1.out_channels
    x_bytes, z_bytes = x.nbytes, z.nbytes
    y1 = n * planes * side**2 * 2
    y2 = y1 // stride**2
    y3 = z_bytes
    weights = sum(p.nbytes for p in block.parameters() if p.dim() == 4)
    projected = block.downsample is not None
    read = x_bytes + y1 + y2 + 2 * y3  # conv1, conv2, conv3; the join reads y3 and the shortcut
    write = y1 + y2 + y3 + z_bytes
    if projected:
        read += x_bytes // 4  # conv d, of stride 2
        write += y3
    stores = sum(c["global_store_sectors"] for c in forward) * SECTOR
    # No activation in between is written: tensors of the model and per-channel vectors, nothing else.
    assert write <= stores <= 1.1 * write
    loads = sum(c["global_distinct_load_sectors"] for c in forward) * SECTOR
    assert loads <= 1.1 * (read + weights)

    # The join: the gradient, y3 and the shortcut (for the mask) in, g out; then per convolution dgrad and wgrad.
    read = 3 * y3 + 2 * (2 * y3 + y2) + 2 * (2 * y2 + y1) + 2 * (2 * y1) + x_bytes + x_bytes
    write = y3 + y2 + y1 + x_bytes
    if projected:
        read += 2 * 2 * y3 + x_bytes // 4
        write += x_bytes
    stores = sum(c["global_distinct_store_sectors"] for c in backward if "wgrad" not in c["kernel"]) * SECTOR
    gradients = 2 * weights  # of the weights, in bfloat16
    assert write <= stores <= 1.1 * write + gradients
    loads = sum(c["global_distinct_load_sectors"] for c in backward if "add_splits" not in c["kernel"]) * SECTOR
    assert loads <= 1.1 * (read + 2 * weights)
