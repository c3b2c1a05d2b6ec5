# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""fold: inference copies without batch norms."""

import copy
import pickle

import pytest
import torch
import torchvision
from lecture import ResBlk
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d
from user_models import (
    ConvBNRelu,
    InSequence,
    LectureNet,
    NamedOtherwise,
    OwnBottleneck,
    classes,
    fused_copy,
    nontrivial,
)

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.testing import assert_passed, compare_modules

FOLDED = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), (2, 3, 64, 64)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=4), (2, 3, 64, 64)),
    "frozen": (lambda: torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d, num_classes=4), (2, 3, 64, 64)),
    "lecture": (LectureNet, (2, 3, 48, 48)),
    "in a sequence": (InSequence, (2, 8, 8, 8)),
    "other names": (NamedOtherwise, (2, 8, 8, 8)),
    "bottleneck": (OwnBottleneck, (2, 8, 8, 8)),
    "unit": (ConvBNRelu, (2, 3, 8, 8)),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(LectureNet()), (2, 3, 48, 48)),
    "native": (lambda: nn.Sequential(rf.ConvBNAct2d(3, 8), rf.ResBlk(8, 16)), (2, 3, 8, 8)),
}


LARGE = pytest.mark.slow(reason="a large network, in float64 too")


@pytest.mark.parametrize(
    ("make", "size"),
    [pytest.param(*case, id=name, marks=LARGE if case[1][-1] == 64 else ()) for name, case in FOLDED.items()],
)
def test_fold(device, make, size):
    model = nontrivial(make()).to(device)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    before_classes = classes(model)
    folded = rf.fold(model)
    assert model.training and not folded.training
    assert classes(model) == before_classes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    norms = nn.modules.batchnorm._NormBase | FrozenBatchNorm2d
    assert not any(isinstance(m, norms) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    x = torch.randn(size, device=device)
    # Folding rounds the weights once more, which the policy's floor of 16 roundoffs allows for.
    for other in (folded, rf.unfuse(copy.deepcopy(folded))):
        comparisons = compare_modules(other, copy.deepcopy(model).eval(), x, gradients=False)
        assert_passed([c for c in comparisons if c.name == "output"])  # its batch norms' buffers are gone
    assert rf.fuse(folded).fused


def test_fold_of_16_bit_weights_is_computed_in_full_precision(device):
    model = nontrivial(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    model[1].running_var.mul_(1e-4)  # bfloat16 would lose eps beside it
    model = model.to(device, torch.bfloat16)
    folded = rf.fold(model)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16
    exact = rf.fold(copy.deepcopy(model).double())
    assert torch.equal(folded[0].weight, exact[0].weight.to(torch.bfloat16))
    assert torch.equal(folded[0].bias, exact[0].bias.to(torch.bfloat16))


def test_fold_leaves_what_it_may_not_touch(device):
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(
        nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SyncBatchNorm(4)),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    )
    model[3][1].register_forward_hook(lambda module, args, output: output + 1)
    leaves = [m for name, m in model.named_modules() if name not in ("2.1", "") and not len(m._modules)]
    nontrivial(nn.ModuleList(leaves))
    model.to(device).eval()
    folded = rf.fold(model)
    assert [type(m[-1]) for m in folded[:4]] == [nn.BatchNorm2d] * 4
    assert type(folded[4][2]) is nn.SyncBatchNorm
    assert type(folded[5][0]) is nn.BatchNorm2d
    x = torch.randn(2, 4, 6, 6, device=device)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_fold_with_tied_weights(device):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    nontrivial(model).to(device).eval()
    folded = rf.fold(model)
    assert type(folded[1]) is nn.Identity
    assert torch.equal(folded[2].weight, model[2].weight)
    x = torch.randn(2, 4, 6, 6, device=device)
    torch.testing.assert_close(folded(x), model(x))


def test_fold_of_a_fused_model_and_after_unfusing(device):
    eager = nontrivial(LectureNet()).to(device).eval()
    fused, _ = fused_copy(eager)
    folded = rf.unfuse(rf.fold(fused))
    assert type(folded.blk1) is ResBlk
    x = torch.randn(2, 3, 48, 48, device=device)
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-5)
    assert len(rf.fuse(folded).fused) == 5
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-5)


def packed(model):
    """How many of its convolutions hold packed weights."""
    return sum(bool(m.__dict__["_packed"]._made) for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.fixture
def folded():
    return rf.fold(nontrivial(torchvision.models.resnet18(num_classes=4)).eval())


def not_fused(dtype):
    return None if ops.has_fused_convolution(dtype) else f"this processor's oneDNN does not fuse {dtype}"


@pytest.mark.skip_where(reason=not_fused)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_are_packed_once_per_dtype(folded, layout, dtype, monkeypatch):
    calls = []
    prepack = ops.prepack_weight
    monkeypatch.setattr(ops, "prepack_weight", lambda *a: calls.append(1) or prepack(*a))
    folded = folded.to(dtype, memory_format=layout)
    plain = rf.unfuse(copy.deepcopy(folded))
    for size in ((1, 3, 32, 32), (3, 3, 40, 48)):
        x = torch.randn(size).to(dtype, memory_format=layout)
        with torch.no_grad(), rf.engine("library"):
            z, expected = folded(x), plain(x)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(z, expected, atol=tolerance, rtol=tolerance)
        a, b = torch.randn(2, 64, 9, 9).to(dtype, memory_format=layout), folded.layer1[0]
        with torch.no_grad(), rf.engine("library"):
            assert b(a).stride() == plain.layer1[0](a).stride()
    assert len(calls) == packed(folded)
    if layout is torch.channels_last or dtype != torch.float32:  # contiguous float32 takes the weights as they are
        assert packed(folded) == 20


def test_native_constants_are_packed_once_per_dtype(folded, monkeypatch):
    x = torch.randn(2, 3, 40, 40).to(memory_format=torch.channels_last)
    if reason := ops.native_reason(x, folded.conv1.weight, (2, 2), (3, 3), (1, 1), 1):
        pytest.skip(reason)
    calls = []
    pack = ops.conv_pack
    monkeypatch.setattr(ops, "conv_pack", lambda *a: calls.append(1) or pack(*a))
    folded = folded.to(memory_format=torch.channels_last)
    plain = rf.unfuse(copy.deepcopy(folded))
    for size in ((1, 3, 32, 32), (3, 3, 40, 48)):
        x = torch.randn(size).to(memory_format=torch.channels_last)
        with torch.no_grad(), rf.engine("native"):
            torch.testing.assert_close(folded(x), plain(x), atol=1e-4, rtol=1e-4)
    assert len(calls) == 20
    folded.requires_grad_(True)  # as for fine-tuning: optimisers write where no version counter tells
    with torch.no_grad(), rf.engine("native"):
        for p in (*folded.parameters(), *plain.parameters()):
            p.data.mul_(0.9)
        torch.testing.assert_close(folded(x), plain(x), atol=1e-4, rtol=1e-4)
    assert len(calls) == 20


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "other dtype and back": lambda m: m.double().float(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}) and m,
    "replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 2, requires_grad=False)) or m,
    "replaced data": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight * 2) or m,
    # As for fine-tuning: optimisers write where no version counter tells.
    "requires_grad": lambda m: [p.data.mul_(0.9) for p in m.requires_grad_().parameters()] and m,
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("way", WAYS)
def test_constants_follow(folded, way, layout):
    x = torch.randn(2, 3, 32, 32).to(memory_format=layout)
    with torch.no_grad():
        folded(x)
        folded(x)
        other = WAYS[way](folded)
        assert {"conv1.weight", "conv1.bias"} <= set(other.state_dict())
        expected = rf.unfuse(copy.deepcopy(other))(x)
        for _ in range(2):
            torch.testing.assert_close(other(x), expected, atol=1e-4, rtol=1e-4)


def test_unfusing_drops_the_constants(folded):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        folded(x)
        plain = rf.unfuse(folded)
        assert not any("_packed" in m.__dict__ for m in plain.modules())
        plain.conv1.weight.data.mul_(2)
        expected = plain(x)
        rf.fuse(plain)
        torch.testing.assert_close(plain(x), expected, atol=1e-4, rtol=1e-4)


def test_gradients_through_a_folded_copy(folded):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    folded(x).square().sum().backward()
    rf.unfuse(copy.deepcopy(folded))(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-3, rtol=1e-3)
