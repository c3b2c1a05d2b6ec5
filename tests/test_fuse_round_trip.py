# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What fuse and unfuse keep: tensors, classes, state_dicts, copies, hooks; and later changes that take effect."""

import copy
import pickle

import pytest
import torch
import torchvision
from lecture import ResBlk
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.misc import Conv2dNormActivation
from user_models import (
    OWN_BLOCKS,
    ConvBNRelu,
    InSequence,
    LectureNet,
    NamedOtherwise,
    ReluModules,
    assert_same_results,
    classes,
    fused_copy,
    nontrivial,
    sequence,
    switched,
    tensors,
)

import resnet_fused as rf

ROUND_TRIPS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "lecture": LectureNet,
    "sequence": sequence,
    "others": lambda: nn.ModuleList(
        [make() for make in OWN_BLOCKS.values()] + [ConvBNRelu(), Conv2dNormActivation(3, 4)]
    ),
}


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_fuse_and_unfuse_keep_everything(device, make):
    model = make().to(device)
    model.train()
    batch_norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    batch_norm.eval()
    first = next(model.parameters()).requires_grad_(False)
    before_classes, before_tensors, before_state = classes(model), tensors(model), model.state_dict()
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert rf.fuse(model).fused
    for _ in range(2):
        assert classes(model) == before_classes
        assert tensors(model) == before_tensors
        assert list(model.state_dict()) == list(before_state)
        assert not batch_norm.training
        assert not first.requires_grad
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        rf.set_memory(model, "minimal")
        assert rf.unfuse(model) is model
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_fusing_twice_changes_nothing(make):
    model = make()
    first = rf.fuse(model)
    after = switched(model)
    second = rf.fuse(model)
    assert switched(model) == after and after
    assert [(e.name, e.original, e.status, e.runs) for e in second.entries] == [
        (e.name, e.original, e.status, e.runs) for e in first.entries
    ]
    assert all(e.reason.startswith("already: ") for e in second.fused)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_copies_stay_fused(device, make, duplicate):
    model = make().to(device).eval()
    original = classes(model)
    rf.fuse(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    assert switched(twin) == switched(model) and switched(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not tensors(twin).items() & tensors(model).items()
    assert classes(rf.unfuse(twin)) == original and not switched(twin)


def test_torch_save(device, tmp_path):
    model, _ = fused_copy(LectureNet().to(device).eval())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(1, 3, 48, 48, device=device)
    assert classes(loaded) == classes(model) and switched(loaded) == switched(model)
    assert torch.equal(loaded(x), model(x))


def test_own_pickling_is_respected():
    model, report = fused_copy(Reduced(4, 4))
    assert report.fused
    assert type(pickle.loads(pickle.dumps(model))) is Reduced


class Reduced(ResBlk):
    def __reduce__(self):
        return Reduced, (4, 4)


def test_state_dicts_travel_both_ways():
    eager, other = LectureNet(), LectureNet()
    rf.fuse(other)
    other.load_state_dict(eager.state_dict())
    eager.load_state_dict(other.state_dict())


def test_hooks_of_a_block_fire():
    block = ResBlk(4, 4)
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, output: seen.append("after"))
    block.register_full_backward_hook(lambda module, gradient_in, gradient_out: seen.append("backward"))
    assert rf.fuse(block).fused
    block(torch.randn(1, 4, 4, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    rf.unfuse(block)
    block(torch.randn(1, 4, 4, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"] * 2


def network():
    """torchvision's, without the two stages that have nearly all of its weights."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)
    return model


HOOKED_AFTERWARDS = {
    "lecture": (lambda: ResBlk(8, 8), ["conv1", "bn1", "conv2", "bn2", "extra"]),
    "torchvision": (lambda: BasicBlock(8, 8), ["conv1", "bn1", "relu", "conv2", "bn2"]),
    "ReLU modules": (ReluModules, ["conv1", "bn1", "act1", "conv2", "bn2", "attention", "act2"]),
    "in a sequence": (InSequence, ["residual_function", "residual_function.2", "residual_function.3", "shortcut"]),
    "unit": (lambda: ConvBNRelu(8, 8), ["c", "n", "act"]),
    "network": (network, ["conv1", "bn1", "relu", "maxpool"]),
}


@pytest.mark.parametrize(
    ("make", "child"), [(make, child) for make, children in HOOKED_AFTERWARDS.values() for child in children]
)
def test_hooks_added_afterwards_to_children_take_effect(device, make, child):
    eager = nontrivial(make()).to(device)
    fused, report = fused_copy(eager)
    assert report.fused
    for model in (eager, fused):
        model.get_submodule(child).register_forward_hook(lambda module, args, output: output * 1.5)
    # Of a network a size that leaves the last batch norms more than two values per channel: with two they amplify
    # rounding without bound.
    size = (4, 3, 64, 64) if hasattr(eager, "fc") else (2, 8, 8, 8)
    assert_same_results(fused, eager, torch.randn(size, device=device))


@pytest.mark.parametrize(
    ("make", "child", "replacement"),
    [
        (lambda: ResBlk(8, 8), "bn1", nn.GroupNorm(2, 8)),
        (lambda: ResBlk(8, 8), "extra", nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))),
        (lambda: BasicBlock(8, 8), "relu", nn.SiLU()),
        (ReluModules, "act1", nn.SiLU()),
        (ReluModules, "attention", nn.Sigmoid()),
        (InSequence, "residual_function.2", nn.Tanh()),
        (InSequence, "residual_function", nn.Conv2d(8, 8, 1)),
        (NamedOtherwise, "second_norm", nn.InstanceNorm2d(8)),
        (lambda: ConvBNRelu(8, 8), "act", nn.Hardswish()),
    ],
)
def test_children_replaced_afterwards_take_effect(device, make, child, replacement):
    eager = nontrivial(make()).to(device)
    fused, report = fused_copy(eager)
    assert report.fused
    for model in (eager, fused):
        owner, _, name = child.rpartition(".")
        setattr(model.get_submodule(owner), name, copy.deepcopy(replacement).to(device))
    assert_same_results(fused, eager, torch.randn(2, 8, 8, 8, device=device))
