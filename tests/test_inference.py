# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Evaluation without gradients: its numbers, and that it notices every change.

The CPU folds batch norms into weights that are built once; CUDA applies coefficients computed in every call.
"""

import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import inference


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
def test_folded_once(block, x, layout, monkeypatch):
    calls = []
    convolve = inference.ops.fused_convolution
    monkeypatch.setattr(inference.ops, "fused_convolution", lambda *a: calls.append(1) or convolve(*a))
    built = []
    coefficients = inference.ops.bn_coefficients
    monkeypatch.setattr(inference.ops, "bn_coefficients", lambda *a: built.append(1) or coefficients(*a))
    x = x.to(memory_format=layout)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 6 and len(built) == 2


@pytest.mark.parametrize("where", ["weight", "running_mean", "shortcut"])
def test_what_is_not_finite_is_not_hidden(x, where):
    unit = rf.ConvBNAct2d(8, 8, 3).eval().to(x.device)
    shortcut = torch.zeros_like(x)
    target = {"weight": unit.conv.weight, "running_mean": unit.bn.running_mean, "shortcut": shortcut}[where]
    with torch.no_grad():
        target[1] = float("nan")
        z = unit(x, shortcut)
        expected = torch.relu(unit.bn(unit.conv(x)) + shortcut)
    assert expected.isnan().any()
    assert torch.equal(z.isnan(), expected.isnan())


CHANGES = {
    "optimiser_step": lambda b, x: b.conv1.weight.add_(0.1),
    "running_mean": lambda b, x: b.bn1.running_mean.add_(1),
    "running_var": lambda b, x: b.bn2.running_var.mul_(3),
    "affine": lambda b, x: (b.bn2.weight.mul_(2), b.bn1.bias.sub_(1)),
    "replaced_parameter": lambda b, x: setattr(b.conv2, "weight", nn.Parameter(torch.randn_like(b.conv2.weight))),
    "replaced_data": lambda b, x: setattr(b.conv2.weight, "data", torch.randn_like(b.conv2.weight)),
    "eps": lambda b, x: setattr(b.bn1, "eps", 0.5),
    "load_state_dict": lambda b, x: b.load_state_dict(rf.BasicBlock(8, 8).state_dict()),
    "train_step": lambda b, x: (b.train(), b(x), b.eval()),
    "data_write_then_eval": lambda b, x: (b.conv1.weight.data.mul_(2), b.eval()),
    "replaced_norm": lambda b, x: setattr(b, "bn1", nn.BatchNorm2d(8, eps=0.1).to(x.device).eval()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_shows(block, x, name):
    with torch.no_grad():
        before = block(x)
        CHANGES[name](block, x)
        expected = rf.BasicBlock(8, 8).eval().to(x.device)
        for a, b in (("bn1", "bn1"), ("bn2", "bn2")):
            getattr(expected, a).eps = getattr(block, b).eps
        expected.load_state_dict(block.state_dict())
        with rf.engine("reference"):
            expected = expected(x)
        after = block(x)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after)


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
@pytest.mark.parametrize("change", [lambda m: m.eval(), lambda m: m.double().float()], ids=["eval", "moved"])
def test_the_whole_network_forgets(device, name, change):
    """Writes through .data have no version counter; they are noticed at the next eval() or to()."""
    network = NETWORKS[name](rf.BasicBlock, [1, 1, 1, 1]).to(device).eval()
    x = torch.randn(1, 3, 32, 32, device=device)
    with torch.no_grad():
        for path in ("conv1.weight", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight"):
            before = network(x)
            network.get_parameter(path).data.mul_(-1)
            change(network)
            with rf.engine("reference"):
                expected = network(x)
            assert not torch.allclose(expected, before, atol=1e-3)
            torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)


def test_many_input_sizes_share_the_weights(block, device):
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
