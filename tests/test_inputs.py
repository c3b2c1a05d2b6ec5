# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Bad and unusual input: the right result or eager's behaviour, or an error that names the argument."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import functional
from resnet_fused.functional import Conv, Norm, Unit

X = torch.ones(2, 3, 4, 4)
W = torch.ones(5, 3, 3, 3)
UNIT = Unit(Conv(W, padding=(1, 1)), Norm(torch.ones(5), torch.zeros(5)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.residual(X[0], [UNIT]), ValueError, r"x: expected a \[N, C, H, W\] tensor, got 3"),
        (lambda: functional.residual(X.int(), [UNIT]), TypeError, "x: expected float64.*int32"),
        (lambda: functional.residual([1.0], [UNIT]), TypeError, "x: expected a tensor, got list"),
        (lambda: functional.residual(X, []), ValueError, "units: expected at least one"),
        (lambda: functional.residual(X[:, :2], [UNIT]), ValueError, r"units\[0\].conv.weight: expected 2 input"),
        (lambda: functional.residual(X, [UNIT], memory="low"), ValueError, "memory: expected one of"),
        (lambda: functional.residual(X, [UNIT], X), ValueError, r"shortcut: expected shape \(2, 5, 4, 4\), got"),
        (
            lambda: functional.residual(X, [UNIT], torch.ones(2, 5, 4, 4).double()),
            TypeError,
            "shortcut: expected dtype torch.float32",
        ),
        (
            lambda: functional.residual(X, [UNIT], torch.ones(2, 5, 4, 4, device="meta")),
            ValueError,
            "shortcut: expected device cpu, got meta",
        ),
        (
            lambda: functional.conv_bn_act(X, UNIT.conv, Norm(torch.ones(4), None)),
            ValueError,
            r"units\[0\].norm.weight: expected shape \(5,\), got \(4,\)",
        ),
        (
            lambda: functional.conv_bn_act(X, UNIT.conv, Norm(None, None, eps=-1e-5)),
            ValueError,
            "eps: expected a number >= 0, got -1e-05",
        ),
        (
            lambda: functional.conv_bn_act(X, UNIT.conv, Norm(None, None, batch_statistics=False)),
            ValueError,
            "running_mean and running_var are needed",
        ),
        (
            lambda: functional.residual(X, [UNIT], Unit(Conv(W[:4], padding=(1, 1)), Norm(None, None))),
            ValueError,
            "shortcut.conv.weight: expected 5 output channels",
        ),
        (lambda: functional.bn_act(torch.ones(1, 3, 1, 1), Norm(None, None)), ValueError, "more than 1 value per"),
        (lambda: rf.BasicBlock(8, 8, groups=2), ValueError, "groups, base_width"),
    ],
)
def test_errors_of_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def blocks():
    fused, eager = rf.BasicBlock(4, 4), tv.BasicBlock(4, 4)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 5, 5),
        torch.ones(2, 4, 5),
        torch.ones(2, 4, 5, 5, dtype=torch.int64),
        torch.ones(2, 4, 5, 5, dtype=torch.float64),
        torch.ones(2, 4, 5, 5, dtype=torch.complex64),
        torch.ones(2, 4, 5, 5, device="meta"),
        torch.ones(1, 4, 1, 1),
        torch.ones(2, 4, 5, 5).to_sparse(),
        None,
        "image",
    ],
    ids=str,
)
def test_modules_raise_what_eager_raises(x):
    fused, eager = blocks()
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever eager's is)
        eager(x)
    with pytest.raises(expected.type):
        fused(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)])
def test_empty_input_is_as_in_eager(shape, training):
    results = []
    for block in blocks():
        block.train(training)
        try:
            results.append(block(torch.ones(shape)).shape)
        except Exception as e:
            results.append(type(e))
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
def test_special_values_spread_as_in_eager(mode, value):
    x = torch.randn(2, 4, 9, 9)
    x[0, 1, 2, 3] = value
    fused, eager = (b.train(mode == "training") for b in blocks())
    with torch.set_grad_enabled(mode != "inference"):
        a, b = fused(x), eager(x)
    assert b.isnan().any() or b.isinf().any()
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :4, 1:-1, ::2],
        lambda x: x[:1, :4].expand(3, 4, 10, 12),
        lambda x: x[:, :4].transpose(2, 3),
        lambda x: x[:, :1, :, :].expand(2, 4, 10, 12),
        lambda x: x.flatten()[1 : 1 + 2 * 4 * 5 * 6].view(2, 4, 5, 6),
    ],
)
def test_views(view):
    fused, eager = blocks()
    base = torch.randn(2, 8, 10, 12)
    for training in (True, False):
        leaf, other = base.clone().requires_grad_(), base.clone().requires_grad_()
        a, b = fused.train(training)(view(leaf)), eager.train(training)(view(other))
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(leaf.grad, other.grad, atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(fused(view(leaf)), eager(view(leaf)), atol=1e-5, rtol=1e-4)


def test_expanded_gradients():
    """sum() hands backward a gradient of stride 0."""
    fused, eager = blocks()
    x = torch.randn(2, 4, 6, 6)
    fused(x).sum().backward()
    eager(x).sum().backward()
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_shortcut_that_broadcasts_or_promotes_is_added_as_in_eager():
    unit = rf.ConvBNAct2d(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    for shortcut in (torch.randn(2, 4, 1, 1), torch.randn(4, 1, 1), torch.randn(2, 4, 6, 6).double()):
        expected = torch.relu(unit.bn(unit.conv(x)) + shortcut)
        torch.testing.assert_close(unit(x, shortcut), expected)
    with pytest.raises(RuntimeError, match="size"):
        unit(x, torch.randn(2, 4, 5, 6))


def test_same_padding():
    for kernel, dilation in ((3, 1), (5, 2), (4, 1), (2, 1)):
        unit = rf.ConvBNAct2d(4, 4, kernel, padding="same", dilation=dilation)
        x = torch.randn(2, 4, 6, 6)
        expected = torch.relu(nn.functional.batch_norm(unit.conv(x), None, None, training=True))
        torch.testing.assert_close(unit(x), expected, atol=1e-5, rtol=1e-4)
