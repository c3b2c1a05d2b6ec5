# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What only a CUDA device has: launch shapes, alignment, streams, graphs, autocast with GradScaler, several devices.

References are computed on the CPU in float64.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from simulator import simulated
from torch import nn

import resnet_fused as rf
from resnet_fused import _C, ops, reference
from resnet_fused.testing import FLOORS, assert_passed, compare, errors

pytestmark = pytest.mark.cuda

LAYOUTS = [torch.channels_last, torch.contiguous_format]
EPS = 1e-5


def everything(y, grad, weight, bias):
    """What a batch norm + ReLU computes with the vocabulary: the output, the coefficients, all gradients."""
    coefficients = ops.bn_finalize(ops.bn_statistics(y), weight, bias, None, None, None, 0.1, EPS)
    z = ops.bn_apply(y, coefficients, relu=True)
    _, sums, _ = ops.bn_backward_reduce(grad, y, coefficients, relu=True)
    backward = ops.bn_backward_finalize(sums, coefficients, 0, y.numel() // y.shape[1], True)
    dy = ops.bn_backward_apply(grad, y, coefficients, backward, relu=True)
    return {"z": z, "mean": coefficients[0], "invstd": coefficients[1], "d_weight": backward[0], "d_bias": backward[1],
            "dy": dy}


def eager(y, grad, weight, bias):
    """The same by autograd."""
    y, weight, bias = (t.detach().requires_grad_() for t in (y, weight, bias))
    z = F.relu(F.batch_norm(y, None, None, weight, bias, True, 0.1, EPS))
    z.backward(grad)
    mean = y.mean((0, 2, 3))
    invstd = (y.var((0, 2, 3), unbiased=False) + EPS).rsqrt()
    return {"z": z, "mean": mean, "invstd": invstd, "d_weight": weight.grad, "d_bias": bias.grad, "dy": y.grad}


def assert_right(y, grad, weight, bias):
    found = everything(*(t.cuda() for t in (y, grad, weight, bias)))
    by_eager = eager(y, grad, weight.to(y.dtype), bias.to(y.dtype))
    exact = eager(y.double(), grad.double(), weight.double(), bias.double())
    # Where z is zero but for rounding the mask is a matter of luck; such values are rare and the sums forgive them.
    near = exact["z"].abs() < 1e-2
    for name in ("z", "mean", "invstd", "d_weight", "d_bias", "dy"):
        f, e, x = (v[name].detach().cpu() for v in (found, by_eager, exact))
        if name in ("z", "dy"):
            f, e, x = (v.masked_fill(near, 0) for v in (f, e, x))
        assert_passed([compare(name, f.to(e.dtype), e, x, precision=y.dtype)])


def drawn(shape, dtype, layout):
    y, grad = (torch.randn(shape).to(dtype).to(memory_format=layout) for _ in range(2))
    return y, grad, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 7, 20, 33, 64, 65, 1000])
def test_channels(channels, dtype, layout):
    assert_right(*drawn((3, channels, 9, 5), dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 1, 1),
        (1, 8, 7, 7),
        (1, 24, 13, 9),
        (1, 8, 112, 112),
        (1, 8, 56, 56),
        (64, 8, 8, 8),
        (300, 16, 1, 2),
        (1, 4, 1, 5000),
    ],
)
def test_planes_and_batches(shape, dtype, layout):
    assert_right(*drawn(shape, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_storage_offsets(dtype, offset, layout):
    """Slices of a larger buffer that start anywhere: in the middle of a vector, and at the next one."""
    shape = (2, 16, 6, 4)
    y, grad, weight, bias = drawn(shape, dtype, layout)

    def shifted(t):
        buffer = torch.full((t.numel() + 16,), float("nan"), dtype=dtype, device="cuda")
        view = buffer.as_strided(t.shape, t.stride(), offset)
        return view.copy_(t)

    expected = everything(*(t.cuda() for t in (y, grad, weight, bias)))
    found = everything(shifted(y), shifted(grad), weight.cuda(), bias.cuda())
    for name, tensor in expected.items():
        e = errors(found[name], tensor.cpu())
        assert e.maximum <= FLOORS[dtype], f"{name}: {e}"
    joined = ops.bn_apply(shifted(y), torch.ones(4, 16, device="cuda"), shifted(grad))
    assert_passed([compare("z", joined, y + 1 + grad, y.double() + 1 + grad.double())])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean(layout):
    y = (torch.randn(4, 24, 17, 15) + 1000).to(memory_format=layout)
    coefficients = ops.bn_finalize(ops.bn_statistics(y.cuda()), None, None, None, None, None, 0.1, 0.0)
    expected = reference.bn_finalize(reference.bn_statistics(y.double()), None, None, None, None, None, 0.1, 0.0)
    assert errors(coefficients[0], expected[0]).maximum < 1e-6
    assert errors(coefficients[1], expected[1]).maximum < 1e-4  # E[x^2] - E[x]^2 in float32 is off by 3e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_every_time(dtype, layout):
    arguments = [t.cuda() for t in drawn((8, 40, 21, 19), dtype, layout)]
    first = everything(*arguments)
    for _ in range(3):
        again = everything(*arguments)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_tiles_depend_on_the_shape_alone_and_are_few():
    """Partial results are a small share of what a reduction reads, and many enough to fill a card."""
    for batch in (1, 32, 256):
        for channels, side in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7), (512, 7)):
            rows = batch * side * side
            tiles = _C.reduction_tiles("cuda", rows, channels, 1)
            assert 1 <= tiles <= max(1, rows // 32)
            if rows * channels * 2 >= 32 * 2**20:
                assert tiles * 3 * 4 <= 0.03 * rows * 2
                assert tiles * -(-channels // 256) >= 132
    assert _C.reduction_tiles("cuda", 1, 3, 10**7) > 100


def test_current_stream():
    y, grad, weight, bias = (t.cuda() for t in drawn((4, 64, 14, 14), torch.float32, torch.channels_last))
    expected = everything(y, grad, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if not simulated():
            torch.cuda._sleep(50_000_000)  # what ran on another stream would read y before it is there
        late = y.clone()
        found = everything(late, grad, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


BLOCKS = {
    "basic": lambda: rf.BasicBlock(16, 16),
    "bottleneck": lambda: rf.Bottleneck(
        16, 8, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    ),
    "resblk": lambda: rf.ResBlk(16, 24, 2),
    "cumulative": lambda: rf.BasicBlock(16, 16, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None)),
}


@pytest.fixture(
    params=[
        ("library", torch.float32, torch.contiguous_format),
        ("library", torch.float32, torch.channels_last),
        ("native", torch.float16, torch.channels_last),
    ],
    ids=lambda p: f"{p[0]}-{p[2]}",
)
def placement(request):
    """Runs the test on an engine; what modules and activations are moved ``to``, for it to take them."""
    engine, dtype, layout = request.param
    with rf.engine(engine):
        yield {"dtype": dtype, "memory_format": layout}


@pytest.mark.parametrize("name", BLOCKS)
def test_graph_of_a_training_step(name, placement):
    block = BLOCKS[name]().to("cuda", **placement)
    x = torch.randn(2, 16, 8, 8).to("cuda", **placement).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(x).square().sum().backward()  # warm-up
    torch.cuda.current_stream().wait_stream(stream)
    block.zero_grad(set_to_none=True)
    x.grad = None
    expected = copy.deepcopy(block)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = block(x)
        z.square().sum().backward()
    block.load_state_dict(expected.state_dict())  # whatever capturing did
    for _ in range(2):
        other = torch.randn_like(x)
        with torch.no_grad():
            x.copy_(other)
        other.requires_grad_()
        graph.replay()
        expected.zero_grad(set_to_none=True)
        eager_z = expected(other)
        eager_z.square().sum().backward()
        torch.testing.assert_close(z, eager_z)
        torch.testing.assert_close(x.grad, other.grad)
        for a, b in zip(block.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        for a, b in zip(block.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_synchronisation(name, placement):
    block = BLOCKS[name]().to("cuda", **placement)
    x = torch.randn(2, 16, 8, 8).to("cuda", **placement).requires_grad_()
    gradient = torch.ones_like(block(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x).backward(gradient)
        block.eval()
        with torch.no_grad():
            block(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Small(nn.Module):
    """A network of every kind of block."""

    def __init__(self):
        super().__init__()
        self.stem = rf.ConvBNAct2d(3, 16, 3)
        self.blocks = nn.Sequential(BLOCKS["basic"](), BLOCKS["bottleneck"](), rf.ResBlk(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("engine", ["library", "native"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_training_is_the_cpus(precision, engine):
    """Steps of SGD with autocast and GradScaler: as near to float64 as the same training of eager on the CPU."""
    network = Small()
    images, labels = torch.randn(8, 3, 12, 12), torch.arange(8)

    def train(device, engine, dtype=torch.float32):
        model = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16, init_scale=256.0)
        x = images.to(device, dtype, memory_format=torch.channels_last)
        casts = dtype == torch.float32 and precision != torch.float32
        losses = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, precision, enabled=casts), rf.engine(engine):
                loss = F.cross_entropy(model(x), labels.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses).cpu(), **{name: t.cpu() for name, t in model.state_dict().items()}}

    found, eager_found = train("cuda", engine), train("cpu", "reference")
    exact = train("cpu", "reference", torch.float64)
    assert found["losses"][2] < found["losses"][0]
    assert_passed(
        [compare(name, found[name], t, exact[name], precision=precision) for name, t in eager_found.items()]
    )


def test_blocks_are_fused():
    block = BLOCKS["bottleneck"]().cuda()
    z = block(torch.randn(2, 16, 6, 6, device="cuda", requires_grad=True))
    assert type(z.grad_fn).__name__ == "_BlockBackward"


def test_devices_that_differ():
    y = torch.randn(2, 3, 4, 4, device="cuda")
    with pytest.raises(ValueError, match="coefficients: expected device cuda:0, got cpu"):
        ops.bn_apply(y, torch.ones(4, 3))
    with pytest.raises(ValueError, match="shortcut: expected the device of y"):
        ops.bn_apply(y, torch.ones(4, 3, device="cuda"), torch.ones(2, 3, 4, 4))
    block = rf.BasicBlock(3, 3)
    with pytest.raises(RuntimeError, match="same device|same type|cuda"):
        block(y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_second_device(placement):
    block = BLOCKS["bottleneck"]()
    x = torch.randn(2, 16, 6, 6)
    results = []
    for device in ("cuda:0", "cuda:1"):  # the current device stays 0
        b = copy.deepcopy(block).to(device, **placement)
        moved = x.to(device, **placement).requires_grad_()
        z = b(moved)
        z.square().sum().backward()
        assert z.device == moved.device
        results.append([z, moved.grad, *(p.grad for p in b.parameters()), *b.buffers()])
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.slow(reason="4 GB, read several times")
@pytest.mark.skipif(simulated(), reason="a simulated device takes an hour for it")
def test_more_than_two_to_the_31_elements():
    shape = (1, 2, 2**15 + 1, 2**15)
    y = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    y[0, 1, -1] = 3
    identity = torch.zeros(4, 2, device="cuda")
    identity[2] = 1
    for layout in LAYOUTS:
        t = y.to(memory_format=layout)
        coefficients = ops.bn_finalize(ops.bn_statistics(t), None, None, None, None, None, 0.1, 1e-5)
        mean = 3 * shape[3] / (shape[2] * shape[3])
        assert coefficients[0, 0] == 0 and abs(coefficients[0, 1].item() / mean - 1) < 1e-5
        z = ops.bn_apply(t, identity, relu=True)
        assert (z[0, 1, -1] == 3).all() and z[0, 1, -2, -1] == 0 and z[0, 0, 0, 0] == 0


@pytest.mark.skipif(not simulated(), reason="takes the simulator to be another card")
def test_a_card_that_the_build_does_not_serve_is_told_so():
    """A T4, which a build for it serves but for the convolutions, and another one not at all."""
    script = """
import torch
from resnet_fused import ops

def said(call):
    try:
        call()
    except NotImplementedError as error:
        return str(error).splitlines()[0]
    return ""

x = torch.zeros(1, 8, 4, 4, device="cuda").to(memory_format=torch.channels_last)
one = ((1, 1), (0, 0), (1, 1))
print("##", ops.native_reason(x, x[:, :, :1, :1], *one, 1))
print("##", said(lambda: ops.bn_statistics(x)))
print("##", said(lambda: ops.conv_fprop(x, None, torch.ones(8, 8, 1, 1, device="cuda"), None, *one)))
torch.cuda.synchronize()
"""
    environ = os.environ | {"GPUSIM_DEVICE": "t4"}
    result = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    native, statistics, fprop = (line[3:] for line in result.stdout.splitlines() if line.startswith("##"))
    assert native == fprop and native.startswith("device cuda:0 has compute capability 7.5, and ")
    if not statistics:
        assert native.endswith("native convolutions need 8.0")
    else:
        assert statistics == native and "this build of resnet_fused is for " in native
        assert native.endswith("build it again with TORCH_CUDA_ARCH_LIST=7.5")
