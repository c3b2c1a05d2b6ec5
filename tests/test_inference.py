# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The folded path: its numbers, and that it notices every change."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import inference


@pytest.fixture
def block():
    made = rf.BasicBlock(8, 8).eval()
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return made


X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(5))


def eager(block, x):
    other = tv.BasicBlock(8, 8).to(x.dtype)
    other.load_state_dict(block.state_dict())
    return other.eval()(x)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_folded_once(block, layout, monkeypatch):
    calls = []
    convolve = inference.ops.fused_convolution
    monkeypatch.setattr(inference.ops, "fused_convolution", lambda *a: calls.append(1) or convolve(*a))
    built = []
    coefficients = inference.ops.bn_coefficients
    monkeypatch.setattr(inference.ops, "bn_coefficients", lambda *a: built.append(1) or coefficients(*a))
    x = X.to(memory_format=layout)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 6 and len(built) == 2


@pytest.mark.parametrize("where", ["weight", "running_mean", "shortcut"])
def test_what_is_not_finite_is_not_hidden(where):
    unit = rf.ConvBNAct2d(8, 8, 3).eval()
    shortcut = torch.zeros(2, 8, 7, 7)
    target = {"weight": unit.conv.weight, "running_mean": unit.bn.running_mean, "shortcut": shortcut}[where]
    with torch.no_grad():
        target[1] = float("nan")
        z = unit(X, shortcut)
        expected = torch.relu(unit.bn(unit.conv(X)) + shortcut)
    assert expected.isnan().any()
    assert torch.equal(z.isnan(), expected.isnan())


CHANGES = {
    "optimiser_step": lambda b: b.conv1.weight.add_(0.1),
    "running_mean": lambda b: b.bn1.running_mean.add_(1),
    "running_var": lambda b: b.bn2.running_var.mul_(3),
    "affine": lambda b: (b.bn2.weight.mul_(2), b.bn1.bias.sub_(1)),
    "replaced_parameter": lambda b: setattr(b.conv2, "weight", nn.Parameter(torch.randn(8, 8, 3, 3))),
    "replaced_data": lambda b: setattr(b.conv2.weight, "data", torch.randn(8, 8, 3, 3)),
    "eps": lambda b: setattr(b.bn1, "eps", 0.5),
    "load_state_dict": lambda b: b.load_state_dict(rf.BasicBlock(8, 8).state_dict()),
    "train_step": lambda b: (b.train(), b(X), b.eval()),
    "data_write_then_eval": lambda b: (b.conv1.weight.data.mul_(2), b.eval()),
    "replaced_norm": lambda b: setattr(b, "bn1", nn.BatchNorm2d(8, eps=0.1).eval()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rebuilt_when_something_changes(block, name):
    with torch.no_grad():
        before = block(X)
        CHANGES[name](block)
        expected = rf.BasicBlock(8, 8).eval()
        for a, b in (("bn1", "bn1"), ("bn2", "bn2")):
            getattr(expected, a).eps = getattr(block, b).eps
        expected.load_state_dict(block.state_dict())
        with rf.engine("reference"):
            expected = expected(X)
        after = block(X)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after)


def test_many_input_sizes_share_the_weights(block):
    with torch.no_grad():
        for n, h, w in ((1, 7, 7), (3, 14, 9), (2, 1, 1), (1, 33, 20)):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(n, 8, h, w).to(memory_format=layout)
                torch.testing.assert_close(block(x), eager(block, x), atol=1e-5, rtol=1e-5)


def test_gradients_in_evaluation_are_differentiated(block):
    x = X.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and block.conv1.weight.grad is not None


def test_inference_mode(block):
    with torch.inference_mode():
        torch.testing.assert_close(block(X), eager(block, X), atol=1e-5, rtol=1e-5)
        made_inside = rf.BasicBlock(8, 8).eval()
        first = made_inside(X)
        made_inside.conv1.weight.mul_(2)
        assert not torch.allclose(first, made_inside(X))


def test_autocast(block):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = block(X.bfloat16())
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), eager(block, X), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(block, dtype):
    block = block.to(dtype)
    x = X.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(block(x), eager(block, x), atol=1e-2, rtol=1e-2)
