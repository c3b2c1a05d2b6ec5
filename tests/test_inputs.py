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


class Arguments:
    """Those of the functions, on one device."""

    def __init__(self, device):
        self.x = torch.ones(2, 3, 4, 4, device=device)
        self.w = torch.ones(5, 3, 3, 3, device=device)
        self.conv = Conv(self.w, padding=(1, 1))
        self.unit = Unit(self.conv, Norm(torch.ones(5, device=device), torch.zeros(5, device=device)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: functional.residual(a.x[0], [a.unit]), ValueError, r"x: expected a \[N, C, H, W\] tensor, got 3"),
        (lambda a: functional.residual(a.x.int(), [a.unit]), TypeError, "x: expected float64.*int32"),
        (lambda a: functional.residual([1.0], [a.unit]), TypeError, "x: expected a tensor, got list"),
        (lambda a: functional.residual(a.x, []), ValueError, "units: expected at least one"),
        (lambda a: functional.residual(a.x[:, :2], [a.unit]), ValueError, r"units\[0\].conv.weight: expected 2 input"),
        (lambda a: functional.residual(a.x, [a.unit], memory="low"), ValueError, "memory: expected one of"),
        (lambda a: functional.residual(a.x, [a.unit], a.x), ValueError, r"shortcut: expected shape \(2, 5, 4, 4\)"),
        (
            lambda a: functional.residual(a.x, [a.unit], a.x.new_ones(2, 5, 4, 4).double()),
            TypeError,
            "shortcut: expected dtype torch.float32",
        ),
        (
            lambda a: functional.residual(a.x, [a.unit], torch.ones(2, 5, 4, 4, device="meta")),
            ValueError,
            "shortcut: expected device (cpu|cuda:0), got meta",
        ),
        (
            lambda a: functional.conv_bn_act(a.x, a.conv, Norm(a.x.new_ones(4), None)),
            ValueError,
            r"units\[0\].norm.weight: expected shape \(5,\), got \(4,\)",
        ),
        (
            lambda a: functional.conv_bn_act(a.x, a.conv, Norm(None, None, eps=-1e-5)),
            ValueError,
            "eps: expected a number >= 0, got -1e-05",
        ),
        (
            lambda a: functional.conv_bn_act(a.x, a.conv, Norm(None, None, batch_statistics=False)),
            ValueError,
            "running_mean and running_var are needed",
        ),
        (
            lambda a: functional.residual(a.x, [a.unit], Unit(Conv(a.w[:4], padding=(1, 1)), Norm(None, None))),
            ValueError,
            "shortcut.conv.weight: expected 5 output channels",
        ),
        (
            lambda a: functional.conv_bn_act(a.x, a.conv, Norm(None, torch.ones(5, device="meta"))),
            ValueError,
            r"units\[0\].norm.bias: expected device (cpu|cuda:0), got meta",
        ),
        (
            lambda a: functional.conv_bn_act(a.x, Conv(a.w.to("meta"), padding=(1, 1)), a.unit.norm),
            ValueError,
            r"units\[0\].conv.weight: expected device (cpu|cuda:0), got meta",
        ),
        (lambda a: functional.bn_act(a.x[:1, :, :1, :1], Norm(None, None)), ValueError, "more than 1 value per"),
        (lambda a: rf.BasicBlock(8, 8, groups=2), ValueError, "groups, base_width"),
    ],
)
def test_errors_of_functions(device, call, error, message):
    with pytest.raises(error, match=message):
        call(Arguments(device))


def blocks(device):
    fused, eager = rf.BasicBlock(4, 4), tv.BasicBlock(4, 4)
    fused.load_state_dict(eager.state_dict())
    return fused.to(device), eager.to(device)


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
def test_modules_raise_what_eager_raises(device, x):
    fused, eager = blocks(device)
    if isinstance(x, torch.Tensor) and x.device.type != "meta":
        x = x.to(device)
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever eager's is)
        eager(x)
    with pytest.raises(expected.type):
        fused(x)


def outcome(call):
    """The result, or the type of what is raised."""
    try:
        return call()
    except Exception as e:
        return type(e)


ELSEWHERE = {
    "input": (),
    "shortcut": (),
    "everything": ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"),
    **{name: (name,) for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")},
    "counter": ("bn.num_batches_tracked",),
}


@pytest.mark.parametrize(
    ("device", "other"),
    [("cpu", "meta"), *(pytest.param("cuda", other, marks=pytest.mark.cuda) for other in ("cpu", "meta"))],
    indirect=["device"],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_another_device_are_as_in_eager(device, other, name, training):
    """Eager raises RuntimeError, except that a counter may be anywhere and that meta is not refused everywhere."""
    unit = rf.ConvBNAct2d(4, 4, bias=True).to(device).train(training)
    for path in ELSEWHERE[name]:
        owner, _, child = path.rpartition(".")
        tensor = getattr(unit.get_submodule(owner), child)
        moved = tensor.detach().to(other)
        setattr(unit.get_submodule(owner), child, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)
    x = torch.randn(2, 4, 6, 6, device=other if name == "input" else device)
    shortcut = torch.randn(2, 4, 6, 6, device=other if name == "shortcut" else device)
    act = rf.BatchNormAct2d(4).to(device).train(training)
    for child in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(act, child, getattr(unit.bn, child))

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = outcome(lambda: torch.relu(unit.bn(unit.conv(x)) + shortcut))
            found = outcome(lambda: unit(x, shortcut))
            alone = outcome(lambda: torch.relu(nn.BatchNorm2d.forward(unit.bn, x) + shortcut))
            found_alone = outcome(lambda: act(x, shortcut))
        for a, b in ((found, expected), (found_alone, alone)):
            assert (a if isinstance(a, type) else a.device) == (b if isinstance(b, type) else b.device)
            if name == "counter":
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert (alone if name.startswith("bn") else expected) is RuntimeError or name == "counter" or other == "meta"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)])
def test_empty_input_is_as_in_eager(device, shape, training):
    results = []
    for block in blocks(device):
        block.train(training)
        result = outcome(lambda block=block: block(torch.ones(shape, device=device)))
        results.append(result if isinstance(result, type) else result.shape)
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
def test_special_values_spread_as_in_eager(device, mode, value):
    x = torch.randn(2, 4, 9, 9, device=device)
    x[0, 1, 2, 3] = value
    fused, eager = (b.train(mode == "training") for b in blocks(device))
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
def test_views(device, view):
    fused, eager = blocks(device)
    base = torch.randn(2, 8, 10, 12, device=device)
    for training in (True, False):
        leaf, other = base.clone().requires_grad_(), base.clone().requires_grad_()
        a, b = fused.train(training)(view(leaf)), eager.train(training)(view(other))
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(leaf.grad, other.grad, atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(fused(view(leaf)), eager(view(leaf)), atol=1e-5, rtol=1e-4)


def test_expanded_gradients(device):
    """sum() hands backward a gradient of stride 0."""
    fused, eager = blocks(device)
    x = torch.randn(2, 4, 6, 6, device=device)
    fused(x).sum().backward()
    eager(x).sum().backward()
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_shortcut_that_broadcasts_or_promotes_is_added_as_in_eager(device):
    unit = rf.ConvBNAct2d(4, 4).to(device).eval()
    x = torch.randn(2, 4, 6, 6, device=device)
    for shape, dtype in (((2, 4, 1, 1), x.dtype), ((4, 1, 1), x.dtype), ((2, 4, 6, 6), torch.float64)):
        shortcut = torch.randn(shape, dtype=dtype, device=device)
        expected = torch.relu(unit.bn(unit.conv(x)) + shortcut)
        torch.testing.assert_close(unit(x, shortcut), expected)
    with pytest.raises(RuntimeError, match="size"):
        unit(x, torch.randn(2, 4, 5, 6, device=device))


def test_same_padding(device):
    for kernel, dilation in ((3, 1), (5, 2), (4, 1), (2, 1)):
        unit = rf.ConvBNAct2d(4, 4, kernel, padding="same", dilation=dilation).to(device)
        x = torch.randn(2, 4, 6, 6, device=device)
        expected = torch.relu(nn.functional.batch_norm(unit.conv(x), None, None, training=True))
        torch.testing.assert_close(unit(x), expected, atol=1e-5, rtol=1e-4)
