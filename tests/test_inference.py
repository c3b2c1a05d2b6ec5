# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Evaluation without gradients: its numbers, its passes, and that it keeps nothing between calls."""

import ctypes

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv
from user_models import nontrivial

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.surgery import program


@pytest.fixture
def block(device):
    made = rf.BasicBlock(8, 8).eval()
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return made.to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(5)).to(device)


def eager(block, x):
    other = tv.BasicBlock(8, 8).to(x.device, x.dtype)
    other.load_state_dict(block.state_dict())
    return other.eval()(x)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_convolution_and_one_pass(block, x, layout, dtype, monkeypatch):
    """Batch norm, shortcut and ReLU are one pass; every call computes the coefficients of its own."""
    calls = []
    for name in ("convolution", "bn_apply", "bn_coefficients", "bn_statistics", "prepack_weight"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    block, x = block.to(dtype), x.to(dtype, memory_format=layout)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad(), rf.engine("library"):
        for _ in range(2):
            z = block(x)
            expected = eager(block, x)
            torch.testing.assert_close(z, expected, atol=tolerance, rtol=tolerance)
            assert z.stride() == expected.stride()
    assert sorted(calls) == sorted(2 * 2 * ["convolution", "bn_apply", "bn_coefficients"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "running_mean", "shortcut", "input", "overflow"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(x, where, value, layout, dtype):
    unit = rf.ConvBNAct2d(8, 8, 3).eval().to(x.device, dtype)
    x = x.to(dtype, memory_format=layout)
    shortcut = torch.zeros_like(x)
    with torch.no_grad():
        if where == "overflow":  # within the convolution, from finite values
            x.zero_()  # else whether a part of a sum overflows, and which way, hangs on the order
            # In halves: some processors add two neighbours' products exactly, where opposite ones would vanish.
            unit.conv.weight[1, :4], unit.conv.weight[1, 4:] = 1e38, -1e38 if value != value else 1e38
            x[0, :, 2, 2] = 1e38 if value != value else value
        elif where == "running_mean":
            unit.bn.running_mean[1] = value
        else:
            {"weight": unit.conv.weight, "shortcut": shortcut, "input": x}[where][1, 2, 1, 1] = value
        z = unit(x, shortcut)
        expected = torch.relu(unit.bn(unit.conv(x)) + shortcut)
    assert torch.equal(z.isnan(), expected.isnan())
    assert torch.equal(z.isinf(), expected.isinf())
    if value != value or where == "weight":
        assert not expected.isfinite().all()


CHANGES = {
    "optimiser_step": lambda b, x: b.conv1.weight.add_(0.1),
    "running_mean": lambda b, x: b.bn1.running_mean.add_(1),
    "running_var": lambda b, x: b.bn2.running_var.mul_(3),
    "affine": lambda b, x: (b.bn2.weight.mul_(2), b.bn1.bias.sub_(1)),
    "replaced_parameter": lambda b, x: setattr(b.conv2, "weight", nn.Parameter(torch.randn_like(b.conv2.weight))),
    "replaced_data": lambda b, x: setattr(b.conv2.weight, "data", torch.randn_like(b.conv2.weight)),
    "eps": lambda b, x: setattr(b.bn1, "eps", 0.5),
    "settings": lambda b, x: (setattr(b.conv1, "padding", (2, 2)), setattr(b.conv1, "dilation", (2, 2))),
    "load_state_dict": lambda b, x: b.load_state_dict(rf.BasicBlock(8, 8).state_dict()),
    "train_step": lambda b, x: (b.train(), b(x), b.eval()),
    "replaced_norm": lambda b, x: setattr(b, "bn1", nn.BatchNorm2d(8, eps=0.1).to(x.device).eval()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_shows(block, x, name):
    with torch.no_grad():
        before = block(x)
        CHANGES[name](block, x)
        expected = rf.BasicBlock(8, 8).eval().to(x.device)
        expected.bn1.eps, expected.bn2.eps = block.bn1.eps, block.bn2.eps
        expected.conv1.padding, expected.conv1.dilation = block.conv1.padding, block.conv1.dilation
        expected.load_state_dict(block.state_dict())
        with rf.engine("reference"):
            expected = expected(x)
        after = block(x)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after)


# What a block asks about, made to differ: what it is called with then.
ASKED = {
    "parameter": lambda b, x: CHANGES["replaced_parameter"](b, x) or x,
    "setting": lambda b, x: [setattr(b.conv2, name, (2, 2)) for name in ("padding", "dilation")] and x,
    "weights' layout": lambda b, x: b.to(memory_format=torch.channels_last) and x,
    "dtype": lambda b, x: b.double() and x.double(),
    "size": lambda b, x: x[:1],
}


@pytest.mark.parametrize("name", ASKED)
def test_a_block_asks_anew_what_may_have_changed_and_nothing_else(device, name, monkeypatch):
    asked = []
    run_block = program.run_block
    monkeypatch.setattr(program, "LEARN_AFTER", 1)
    monkeypatch.setattr(program, "run_block", lambda *a: asked.append(1) or run_block(*a))
    block = nontrivial(tv.Bottleneck(16, 4)).to(device).eval()
    rf.fuse(block)
    x = torch.randn(2, 16, 7, 7, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for changed in (False, True):
            x = ASKED[name](block, x) if changed else x
            asked.clear()
            results = [block(x) for _ in range(4)]
            assert len(asked) == 2  # the second time to learn
            with rf.engine("reference"):
                expected = block(x)
            torch.testing.assert_close(results, [expected] * 4, atol=1e-5, rtol=1e-5)
        asked.clear()
        with rf.engine("library"):
            block(x)
    block(x).sum().backward()
    assert len(asked) == 2


def step(optimiser, **settings):
    """A training step in eval(), as fine-tuning with frozen statistics does."""

    def write(block, x):
        made = optimiser(block.parameters(), lr=0.1, **settings)
        with torch.enable_grad():
            block(x).square().sum().backward()
        made.step()

    return write


def write_bytes(block, x):
    for t in block.state_dict().values():
        ones = (ctypes.c_float * t.numel())(*[0.7] * t.numel())
        if t.dtype == torch.float32:
            ctypes.memmove(t.data_ptr(), ones, t.nbytes)


def through_numpy(view):
    def write(block, x):
        for t in block.state_dict().values():
            view(t)[...] += 1

    return write


UNCOUNTED = {  # writes that raise no version counter, or that of another tensor
    "adam_fused": step(torch.optim.Adam, fused=True),
    "adamw_fused": step(torch.optim.AdamW, fused=True),
    "sgd_fused": step(torch.optim.SGD, fused=True),
    "data": lambda block, x: [t.data.add_(1) for t in (*block.parameters(), block.bn1.running_mean)],
    "data_of_a_view": lambda block, x: block.conv2.weight.data[2:5].mul_(9),
    "numpy": through_numpy(lambda t: t.numpy()),
    "dlpack": through_numpy(np.from_dlpack),
    "buffer": through_numpy(lambda t: np.asarray(memoryview(t.numpy()))),
    "pointer": write_bytes,
}
HOST = {"numpy", "dlpack", "buffer", "pointer"}


@pytest.mark.skip_where(reason=lambda device, name: "memory of the host" if name in HOST and device != "cpu" else None)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_no_version_counter_tells_shows_at_once(block, x, name, layout):
    block, x = block.to(memory_format=layout), x.to(memory_format=layout)
    with torch.no_grad():
        before = block(x)
    UNCOUNTED[name](block, x)
    with torch.no_grad():
        after = block(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, eager(block, x), atol=1e-4, rtol=1e-4)


def test_weights_in_the_memory_of_an_array():
    unit = rf.ConvBNAct2d(8, 8).eval()
    array = np.random.default_rng(0).standard_normal((8, 8, 3, 3), dtype=np.float32)
    unit.conv.weight.data = torch.from_numpy(array)
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(unit(x), torch.relu(unit.bn(unit.conv(x))), atol=1e-5, rtol=1e-5)
            array *= -2


def test_modules_keep_nothing(block, x):
    """Neither the module nor its children have anything after a call that they did not have before."""
    before = [set(m.__dict__) for m in block.modules()]
    with torch.no_grad():
        block(x)
    assert [set(m.__dict__) for m in block.modules()] == before


def test_replaced_weights_where_the_last_ones_lay(device):
    """Memory that is freed and taken again: neither addresses nor version counters tell these weights apart."""
    unit = rf.ConvBNAct2d(16, 16).to(device).eval()
    x = torch.randn(2, 16, 7, 7, device=device)
    with torch.no_grad():
        for _ in range(30):
            unit(x)
            for _ in range(2):
                unit.conv.weight.data = torch.randn(16, 16, 3, 3, device=device)
            torch.testing.assert_close(unit(x), torch.relu(unit.bn(unit.conv(x))), atol=1e-4, rtol=1e-4)


NETWORKS = {"ours": rf.ResNet, "fused": lambda block, layers: fused(tv.ResNet(tv.BasicBlock, layers))}


def fused(model):
    rf.fuse(model)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_network_follows(device, name):
    network = NETWORKS[name](rf.BasicBlock, [1, 1, 1, 1]).to(device).eval()
    x = torch.randn(1, 3, 32, 32, device=device)
    with torch.no_grad():
        for path in ("conv1.weight", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight"):
            before = network(x)
            network.get_parameter(path).data.mul_(-1)
            with rf.engine("reference"):
                expected = network(x)
            assert not torch.allclose(expected, before, atol=1e-3)
            torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)


def test_many_input_sizes(block, device):
    with torch.no_grad():
        for n, h, w in ((1, 7, 7), (3, 14, 9), (2, 1, 1), (1, 33, 20)):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(n, 8, h, w).to(device, memory_format=layout)
                torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)


def test_gradients_in_evaluation_are_differentiated(block, x):
    x.requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and block.conv1.weight.grad is not None


def test_inference_mode(block, x):
    with torch.inference_mode():
        torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)
        made_inside = rf.BasicBlock(8, 8).eval().to(x.device)
        first = made_inside(x)
        made_inside.conv1.weight.mul_(2)
        assert not torch.allclose(first, made_inside(x))


def test_autocast(block, x):
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        z = block(x.bfloat16())
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), eager(block, x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(block, x, dtype):
    block = block.to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(block(x), eager(block, x), atol=1e-2, rtol=1e-2)


@pytest.mark.cuda
def test_cuda_keeps_nothing_between_calls():
    """Writes that no version counter tells of show at once, also where a graph replays what it has recorded."""
    block = rf.BasicBlock(8, 8).cuda().eval()
    x = torch.randn(2, 8, 7, 7, device="cuda")
    with torch.no_grad():
        block(x)  # warm-up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = block(x)
        for tensor in (block.bn1.running_mean, block.bn2.running_var, block.bn2.weight, block.conv1.weight):
            before = block(x)
            tensor.data.mul_(2).add_(0.5)
            graph.replay()
            assert not torch.allclose(block(x), before)
            torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(replayed, eager(block, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_16_bits_runs_channels_last_inside(device, dtype):
    """One copy of the input instead of two per block; not where a hook, or a module we do not know, would see it."""
    network = NETWORKS["fused"](rf.BasicBlock, [1, 1, 1, 1]).to(dtype).eval()
    x = torch.randn(2, 3, 64, 64).to(dtype)
    formats = []
    convolution = ops.convolution

    def watch(x, *arguments):
        formats.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolution(x, *arguments)

    with torch.no_grad(), rf.engine("library"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "convolution", watch)
        network(x)
        assert len(formats) == 12 and all(formats) == (dtype == torch.bfloat16)
    seen = []
    handle = network.layer2.register_forward_hook(lambda module, args, output: seen.append(output.is_contiguous()))
    with torch.no_grad():
        network(x)
    handle.remove()
    assert seen == [True]
