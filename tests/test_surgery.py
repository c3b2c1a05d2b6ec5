# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""fuse, unfuse, fold and set_memory on torchvision's models, the lecture's block, and blocks of other writers."""

import contextlib
import copy
import io
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lecture import ResBlk, ResBlkOpen
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused.sequential import FusedUnit
from resnet_fused.testing import assert_passed, compare_modules

# ---------------------------------------------------------------------------------------------------------------
# Blocks as users write them


class LectureNet(nn.Module):
    """The lecture's network, narrower."""

    def __init__(self, block=ResBlk):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3, stride=3, padding=0), nn.BatchNorm2d(8))
        self.blk1 = block(8, 16, stride=2)
        self.blk2 = block(16, 32, stride=2)
        self.blk3 = block(32, 64, stride=2)
        self.blk4 = block(64, 64, stride=1)
        self.outlayer = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = self.blk4(self.blk3(self.blk2(self.blk1(x))))
        x = x.view(x.size(0), -1)
        return self.outlayer(x)


class NamedOtherwise(nn.Module):
    """The CIFAR block in wide use: functional ReLU, a child called shortcut."""

    def __init__(self, planes=8):
        super().__init__()
        self.first = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(planes)
        self.second = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()

    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        return F.relu(out)


class OwnBottleneck(nn.Module):
    def __init__(self, planes=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 2 * planes, 1, bias=False), nn.BatchNorm2d(2 * planes)
        self.shortcut = nn.Sequential(nn.Conv2d(planes, 2 * planes, 1, bias=False), nn.BatchNorm2d(2 * planes))

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(out))
        return torch.add(self.shortcut(x), out).relu_()


class InSequence(nn.Module):
    """The main branch in one Sequential, a ReLU made in forward."""

    def __init__(self, planes=8):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class ConvShortcut(nn.Module):
    """The shortcut is a bare convolution, or absent."""

    def __init__(self, planes=8, projected=True):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.conv3 = nn.Conv2d(planes, planes, 1) if projected else None
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3:
            x = self.conv3(x)
        y += x
        return F.relu(y)


class ReluModules(nn.Module):
    """One nn.ReLU per use; an Identity where other versions put an attention module."""

    def __init__(self, planes=8):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(planes, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(planes, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()
        self.attention = nn.Identity()

    def forward(self, x):
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.attention(self.bn2(self.conv2(out)))
        return self.act2(out + x)


class ConvBNRelu(nn.Module):
    def __init__(self, cin=3, cout=8):
        super().__init__()
        self.c = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.n(self.c(x)))


OWN_BLOCKS = {
    "lecture, identity": lambda: ResBlk(8, 8),
    "lecture, projection": lambda: ResBlk(8, 16, stride=2),
    "lecture, no last ReLU": lambda: ResBlkOpen(8, 8),
    "lecture, no last ReLU, projection": lambda: ResBlkOpen(8, 12),
    "other names": NamedOtherwise,
    "bottleneck": OwnBottleneck,
    "in a sequence": InSequence,
    "bare convolution": ConvShortcut,
    "no shortcut module": lambda: ConvShortcut(projected=False),
    "ReLU modules": ReluModules,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)


def nontrivial(model):
    """Give every batch norm of `model` weights and statistics that a mix-up would show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | FrozenBatchNorm2d):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_var", 0.5, 1.5)):
                tensor = getattr(module, name)
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
    return model


def fused_copy(model):
    fused = copy.deepcopy(model)
    return fused, rf.fuse(fused)


def assert_same_results(fused, eager, x, training=(False, True)):
    """The policy; a gradient may take several inputs, see assert_policy in test_modules.py for why."""
    for mode in training:
        comparisons = compare_modules(fused.train(mode), eager.train(mode), x)
        assert_passed([c for c in comparisons if not c.name.startswith("gradient")])
        failed = {c.name for c in comparisons if not c.passed}
        for _ in range(5):
            if failed:
                again = compare_modules(fused, eager, torch.empty_like(x).copy_(torch.randn(x.shape)))
                failed -= {c.name for c in again if c.passed}
        assert not failed, f"outside the policy on every input: {sorted(failed)}"


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def tensors(model):
    return {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}


# ---------------------------------------------------------------------------------------------------------------
# What is recognised computes the same


@pytest.mark.parametrize("make", OWN_BLOCKS.values(), ids=OWN_BLOCKS)
def test_own_blocks(make):
    eager = nontrivial(make())
    fused, report = fused_copy(eager)
    assert [(e.name, e.status) for e in report.entries] == [("", "fused")]
    assert isinstance(fused, type(eager))
    assert isinstance(fused, rf.ResBlk | rf.BasicBlock | rf.Bottleneck)
    assert_same_results(fused, eager, torch.randn(2, 8, 8, 8))


@pytest.mark.parametrize("block", [ResBlk, ResBlkOpen])
def test_last_relu_is_decided_by_the_forward(block):
    fused, _ = fused_copy(block(8, 8))
    assert fused.final_relu is (block is ResBlk)
    assert (fused(torch.randn(2, 8, 6, 6)) < 0).any().item() is (block is ResBlkOpen)


@pytest.mark.parametrize("block", [ResBlk, ResBlkOpen])
def test_lecture_network(block):
    eager = nontrivial(LectureNet(block))
    fused, report = fused_copy(eager)
    assert [e.name for e in report.fused] == ["conv1", "blk1", "blk2", "blk3", "blk4"]
    assert not report.left
    assert_same_results(fused, eager, torch.randn(3, 3, 48, 48))


def test_lecture_network_channels_last():
    # A channels_last output cannot be viewed as [batch, -1], in eager just as fused; reshape can.
    eager = nontrivial(nn.Sequential(ResBlk(3, 8), ResBlk(8, 8), nn.Flatten())).to(memory_format=torch.channels_last)
    fused, _ = fused_copy(eager)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert fused[0].eval()(x).is_contiguous(memory_format=torch.channels_last)
    assert_same_results(fused, eager, x)


@pytest.mark.parametrize(
    ("name", "size", "fused_modules"),
    [("resnet18", 64, 9), ("resnet50", 64, 17), ("vgg19_bn", 32, 1), ("vgg19", 32, 1), ("alexnet", 64, 1)],
)
def test_torchvision_networks(name, size, fused_modules):
    eager = nontrivial(getattr(torchvision.models, name)(num_classes=10))
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that both runs in training see the same network
    if name.startswith("vgg"):  # seven times seven average pooling of one pixel: 400 MB of equal weights
        eager.avgpool, eager.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    fused, report = fused_copy(eager)
    assert len(report.fused) == fused_modules
    assert not report.left
    assert_same_results(fused, eager, torch.randn(2, 3, size, size))


def test_sequences_name_what_is_fused():
    reports = {name: rf.fuse(getattr(torchvision.models, name)().features) for name in ("vgg11_bn", "alexnet")}
    assert [e.reason for e in reports["vgg11_bn"].entries] == ["8 conv+bn+relu"]
    assert [e.reason for e in reports["alexnet"].entries] == ["5 conv+relu"]


def test_other_torchvision_families():
    googlenet = torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=4)
    report = rf.fuse(googlenet)
    assert {e.kind for e in report.entries} == {"unit"}
    assert all(isinstance(m, FusedUnit) for m in googlenet.modules() if hasattr(m, "conv"))

    mobilenet = torchvision.models.mobilenet_v2()
    report = rf.fuse(mobilenet)
    assert {e.reason for e in report.entries} == {"1 conv+bn"}  # ReLU6 is called

    dense = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4)
    report = rf.fuse(dense)
    assert "features.transition1" in [e.name for e in report.fused]  # batch norm, ReLU, convolution
    assert all("cat" in e.reason for e in report.left)


@pytest.mark.parametrize(
    "model",
    [
        torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=4).inception3a,
        torchvision.models.mobilenet_v2().features[:4],
        torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4),
        torchvision.models.regnet_x_400mf().trunk_output[0],
    ],
    ids=["inception", "mobilenet", "densenet", "regnet"],
)
def test_other_families_compute_the_same(model):
    eager = nontrivial(copy.deepcopy(model))
    fused, report = fused_copy(eager)
    assert report.fused
    channels = next(m for m in eager.modules() if isinstance(m, nn.Conv2d)).in_channels
    assert_same_results(fused, eager, torch.randn(2, channels, 32, 32))


def test_frozen_batch_norm_backbone():
    network = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    eager = nontrivial(torchvision.models._utils.IntermediateLayerGetter(network, {"layer2": "a", "layer4": "b"}))
    fused, report = fused_copy(eager)
    assert len(report.fused) == 8
    assert [e.name for e in report.left] == [""]  # the stem, which the getter runs child by child
    x = torch.randn(1, 3, 64, 64)
    for key, value in eager(x).items():
        torch.testing.assert_close(fused(x)[key], value, rtol=1e-4, atol=1e-4)


def test_detection_model():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    ).eval()
    fused, report = fused_copy(model)
    assert sum(e.kind == "bottleneck" for e in report.fused) == 16
    with torch.no_grad():
        images = [torch.rand(3, 64, 64)]
        features = model.backbone(torch.stack(images))
        for key, value in fused.backbone(torch.stack(images)).items():
            torch.testing.assert_close(value, features[key], rtol=1e-3, atol=1e-4)
        assert set(fused(images)[0]) == {"boxes", "labels", "scores"}


def test_dilated_segmentation_model():
    model = nontrivial(torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)).eval()
    fused, report = fused_copy(model)
    assert sum(e.kind == "bottleneck" for e in report.fused) == 16
    assert fused.backbone.layer4[1].conv2.dilation == (4, 4)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)["out"]
        torch.testing.assert_close(fused(x)["out"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_subclass_that_keeps_forward():
    class MyBlock(BasicBlock):
        def describe(self):
            return "mine"

    eager = ResNet(MyBlock, [1, 1, 1, 1], num_classes=4)
    fused, report = fused_copy(eager)
    assert len(report.fused) == 5
    assert isinstance(fused.layer1[0], MyBlock)
    assert isinstance(fused.layer1[0], rf.BasicBlock)
    assert fused.layer1[0].describe() == "mine"
    assert_same_results(fused, eager, torch.randn(2, 3, 32, 32))


def test_subclass_of_torchvision_with_an_own_forward_is_traced():
    class Open(BasicBlock):
        def forward(self, x):
            return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x

    eager = nontrivial(Open(8, 8))
    fused, report = fused_copy(eager)
    assert [e.kind for e in report.fused] == ["residual block"]
    assert_same_results(fused, eager, torch.randn(2, 8, 8, 8))


def test_shared_module_is_handled_once():
    block = ResBlk(4, 4)
    model = nn.ModuleDict({"a": block, "b": block})
    report = rf.fuse(model)
    assert [e.name for e in report.entries] == ["a"]
    assert model["a"] is model["b"]


def test_native_modules_are_reported_and_kept():
    model = ResNet(rf.BasicBlock, [1, 1, 1, 1], num_classes=4)
    before = classes(model)
    report = rf.fuse(model)
    assert [e.reason for e in report.fused] == ["stem conv1+bn1+relu"] + ["already"] * 4
    rf.unfuse(model)
    assert classes(model) == before


# ---------------------------------------------------------------------------------------------------------------
# Sequences


def sequence():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
    )


def test_sequence_runs():
    eager = nontrivial(sequence())
    fused, report = fused_copy(eager)
    assert type(fused) is rf.FusedSequential
    assert [e.reason for e in report.entries] == ["1 conv+bn+relu, 1 conv+relu, 1 bn+relu, 1 conv+bn"]
    assert_same_results(fused, eager, torch.randn(2, 3, 16, 16))


def test_sequence_is_a_container():
    eager = nontrivial(sequence()).eval()
    fused, _ = fused_copy(eager)
    x = torch.randn(2, 3, 16, 16)
    assert fused[1] is fused._modules["1"]
    for part in (slice(0, 4), slice(1, 3), slice(0, 0)):
        piece = fused[part]
        assert isinstance(piece, rf.FusedSequential)
        assert len(piece) == len(eager[part])
        y = x if part.start == 0 else eager[:1](x)
        torch.testing.assert_close(piece(y), eager[part](y))
    for model in (fused, eager):
        model.append(nn.Conv2d(8, 4, 1).requires_grad_(False))
        model[11].weight.fill_(0.1)
        model[11].bias.fill_(0.2)
        model[2] = nn.SiLU()
        del model[3]
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert type(rf.unfuse(fused[:2])) is nn.Sequential


def test_torchvision_sequence_subclass_keeps_its_type():
    model = Conv2dNormActivation(3, 8)
    rf.fuse(model)
    assert isinstance(model, rf.FusedSequential)
    assert isinstance(model, Conv2dNormActivation)
    rf.unfuse(model)
    assert type(model) is Conv2dNormActivation


def test_unbatched_input():
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    fused, _ = fused_copy(eager)
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_hook_on_a_child_of_a_fused_sequence_fires(position):
    eager = nontrivial(sequence()[:3])
    fused, _ = fused_copy(eager)
    for model in (eager, fused):
        model[position].register_forward_hook(lambda module, args, output: output * 2)
    assert_same_results(fused, eager, torch.randn(2, 3, 8, 8))


def test_global_hooks_see_every_module():
    model = nn.Sequential(sequence()[:3], ResBlk(8, 8), ConvBNRelu(8, 8), ReluModules(8)).eval()
    x = torch.randn(1, 3, 8, 8)

    def called(module):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, output: seen.append(id(m)))
        with contextlib.closing(contextlib.ExitStack()) as stack:
            stack.callback(handle.remove)
            module(x)
        return seen

    before = called(model)
    rf.fuse(model)
    assert called(model) == before


# ---------------------------------------------------------------------------------------------------------------
# Round trips

ROUND_TRIPS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "lecture": LectureNet,
    "sequence": sequence,
    "others": lambda: nn.ModuleList(
        [make() for make in OWN_BLOCKS.values()] + [ConvBNRelu(), Conv2dNormActivation(3, 4)]
    ),
}


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_fuse_and_unfuse_keep_everything(make):
    model = make()
    model.train()
    batch_norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    batch_norm.eval()
    first = next(model.parameters()).requires_grad_(False)
    before_classes, before_tensors, before_state = classes(model), tensors(model), model.state_dict()
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert rf.fuse(model).fused
    assert classes(model) != before_classes
    for _ in range(2):
        assert tensors(model) == before_tensors
        assert list(model.state_dict()) == list(before_state)
        assert not batch_norm.training
        assert not first.requires_grad
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        rf.set_memory(model, "minimal")
        assert rf.unfuse(model) is model
    assert classes(model) == before_classes
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_fusing_twice_changes_nothing(make):
    model = make()
    first = rf.fuse(model)
    after = classes(model)
    second = rf.fuse(model)
    assert classes(model) == after
    assert [(e.name, e.kind, e.original, e.status) for e in second.entries] == [
        (e.name, e.kind, e.original, e.status) for e in first.entries
    ]
    assert {e.reason for e in second.fused} == {"already"}


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_copies_stay_fused(make, duplicate):
    model = make().eval()
    original = classes(model)
    rf.fuse(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not tensors(twin).items() & tensors(model).items()
    assert classes(rf.unfuse(twin)) == original


def test_torch_save(tmp_path):
    model, _ = fused_copy(LectureNet().eval())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(1, 3, 48, 48)
    assert classes(loaded) == classes(model)
    assert torch.equal(loaded(x), model(x))


def test_own_pickling_is_respected():
    model, _ = fused_copy(Reduced(4, 4))
    assert isinstance(model, rf.ResBlk)
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


HOOKED_AFTERWARDS = {
    "lecture": (lambda: ResBlk(8, 8), ["conv1", "bn1", "conv2", "bn2", "extra"]),
    "torchvision": (lambda: BasicBlock(8, 8), ["conv1", "bn1", "relu", "conv2", "bn2"]),
    "ReLU modules": (ReluModules, ["conv1", "bn1", "act1", "conv2", "bn2", "attention", "act2"]),
    "in a sequence": (InSequence, ["residual_function", "residual_function.2", "residual_function.3", "shortcut"]),
    "unit": (lambda: ConvBNRelu(8, 8), ["c", "n", "act"]),
    "network": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), ["conv1", "bn1", "relu", "maxpool"]),
}


@pytest.mark.parametrize(
    ("make", "child"), [(make, child) for make, children in HOOKED_AFTERWARDS.values() for child in children]
)
def test_hooks_added_afterwards_to_children_take_effect(make, child):
    eager = nontrivial(make())
    fused, report = fused_copy(eager)
    assert report.fused
    for model in (eager, fused):
        model.get_submodule(child).register_forward_hook(lambda module, args, output: output * 1.5)
    size = (2, 3, 32, 32) if hasattr(eager, "fc") else (2, 8, 8, 8)
    assert_same_results(fused, eager, torch.randn(size))


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
def test_children_replaced_afterwards_take_effect(make, child, replacement):
    eager = nontrivial(make())
    fused, report = fused_copy(eager)
    assert report.fused
    for model in (eager, fused):
        owner, _, name = child.rpartition(".")
        setattr(model.get_submodule(owner), name, copy.deepcopy(replacement))
    assert_same_results(fused, eager, torch.randn(2, 8, 8, 8))


# ---------------------------------------------------------------------------------------------------------------
# What is left, and the reason


class Dropping(ResBlk):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        if self.training:
            out = F.dropout(out, 0.5)
        return F.relu(self.extra(x) + self.bn2(self.conv2(out)))


class Stochastic(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out if random.random() > -1 else out)


class Scaled(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + 0.1 * out)


class Subtracting(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) - out)


class Leaky(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class Branching(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if x.mean() > 0 else out


class Remembering(ResBlk):
    def forward(self, x):
        self.last = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + self.last)


class Unused(ResBlk):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        self.bn2(out)
        return F.relu(self.extra(x) + self.bn2(self.conv2(out)))


class Overwriting(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x += out
        return F.relu(x)


class NoGradient(ResBlk):
    @torch.no_grad()
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class NoAutocast(ResBlk):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(self.extra(x) + out)


class TwoInputs(ResBlk):
    def forward(self, x, skip=None):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if skip is None else skip))


class Twice(ResBlk):
    def forward(self, x):
        out = self.bn1(self.conv1(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class PreActivation(ResBlk):
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.extra(x) + self.conv2(F.relu(self.bn2(out)))


class Remembered(ResBlk):
    memory = "a slot for something else"


@pytest.mark.parametrize(
    ("block", "word"),
    [
        (Dropping, "dropout"),
        (Stochastic, "random"),
        (Scaled, "mul"),
        (Subtracting, "sub"),
        (Leaky, "leaky_relu"),
        (Branching, "traced"),
        (Remembering, "assigns"),
        (Unused, "used 2 times"),
        (Overwriting, "added"),
        (NoGradient, "grad mode"),
        (NoAutocast, "autocast"),
        (TwoInputs, "inputs"),
        (Twice, "more than once"),
        (PreActivation, "without a batch norm"),
        (Remembered, "memory"),
    ],
)
def test_forward_that_computes_something_else(block, word):
    model = block(4, 4)
    state = random.getstate(), torch.get_rng_state()
    report = rf.fuse(model)
    assert type(model) is block
    assert [(e.name, e.status) for e in report.entries] == [("", "left")]
    assert word in report.entries[0].reason
    assert "last" not in model.__dict__
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def hooked(block):
    block.conv1.register_forward_hook(lambda module, args, output: None)


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.conv2)


def group_norm(block):
    block.bn2 = nn.GroupNorm(2, 4)


def synchronised(block):
    block.bn1 = nn.SyncBatchNorm(4)


def reflecting(block):
    block.conv1.padding_mode = "reflect"


def replaced_forward(block):
    block.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hooked, ["conv1", "hooks"]),
        (parametrized, ["conv2", "Parametrized"]),
        (group_norm, ["bn2", "GroupNorm"]),
        (synchronised, ["bn1", "SyncBatchNorm"]),
        (reflecting, ["conv1", "reflect"]),
        (replaced_forward, ["forward", "instance"]),
    ],
)
@pytest.mark.parametrize("make", [lambda: ResBlk(4, 4), lambda: BasicBlock(4, 4)], ids=["lecture", "torchvision"])
def test_children_that_are_not_what_they_seem(make, change, words):
    block = make()
    change(block)
    original = type(block)
    report = rf.fuse(block)
    assert type(block) is original
    assert [e.status for e in report.entries] == ["left"]
    assert all(word in report.entries[0].reason for word in words)


def test_other_activation_in_a_torchvision_block():
    block = Bottleneck(16, 4)
    block.relu = nn.SiLU()
    report = rf.fuse(block)
    assert type(block) is Bottleneck
    assert "SiLU" in report.entries[0].reason


def test_fused_after_the_hook_is_gone():
    block = ResBlk(4, 8)
    handle = block.conv1.register_forward_hook(lambda module, args, output: None)
    report = rf.fuse(block)
    assert [(e.name, e.status) for e in report.entries] == [("", "left"), ("extra", "fused")]
    handle.remove()
    report = rf.fuse(block)
    assert [(e.name, e.status) for e in report.entries] == [("", "fused")]
    eager = rf.unfuse(copy.deepcopy(block))
    assert type(eager.extra) is nn.Sequential
    assert_same_results(block, eager, torch.randn(2, 4, 8, 8))


def test_sequences_that_are_left():
    report = rf.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU()))
    assert [e.reason for e in report.left] == ["0: Conv2d before GroupNorm"]
    assert not rf.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU())).entries
    partly = nn.Sequential(*sequence())
    partly[0].register_forward_hook(lambda module, args, output: None)
    (entry,) = rf.fuse(partly).entries
    assert entry.status == "fused"
    assert "0: the convolution has hooks" in entry.reason


def test_torchscript_and_fx_are_left():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    report = rf.fuse(nn.ModuleList([scripted, traced]))
    assert [(e.name, e.status) for e in report.entries] == [("0", "left"), ("1", "left")]


# ---------------------------------------------------------------------------------------------------------------
# Report


def test_report_is_a_table():
    model = nn.Sequential(ResBlk(4, 4), Leaky(4, 4))
    report = rf.fuse(model)
    head, titles, *rows = str(report).splitlines()
    assert head == "fused: 1, left: 1"
    assert titles.split()[:4] == ["module", "kind", "class", "status"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    column = titles.index("status")
    assert [row[column:].split()[0] for row in rows] == ["fused", "left"]
    assert "(model)" in str(rf.fuse(ResBlk(4, 4)))
    assert str(rf.fuse(nn.Linear(2, 2))).startswith("fused: 0, left: 0")


def test_verbose_prints_the_report():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        rf.fuse(ResBlk(4, 4))
        assert not out.getvalue()
        report = rf.fuse(ResBlk(4, 4), verbose=True)
    assert out.getvalue() == f"{report}\n"


# ---------------------------------------------------------------------------------------------------------------
# Fold

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


@pytest.mark.parametrize(("make", "size"), FOLDED.values(), ids=FOLDED)
def test_fold(make, size):
    model = nontrivial(make())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    before_classes = classes(model)
    folded = rf.fold(model)
    assert model.training and not folded.training
    assert classes(model) == before_classes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    norms = nn.modules.batchnorm._NormBase | FrozenBatchNorm2d
    assert not any(isinstance(m, norms) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    x = torch.randn(size)
    # Folding rounds the weights once more, which the policy's floor of 16 roundoffs allows for.
    for other in (folded, rf.unfuse(copy.deepcopy(folded))):
        comparisons = compare_modules(other, copy.deepcopy(model).eval(), x, gradients=False)
        assert_passed([c for c in comparisons if c.name == "output"])  # its batch norms' buffers are gone
    assert rf.fuse(folded).fused


def test_fold_of_16_bit_weights_is_computed_in_full_precision():
    model = nontrivial(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    model[1].running_var.mul_(1e-4)  # bfloat16 would lose eps beside it
    model = model.to(torch.bfloat16)
    folded = rf.fold(model)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16
    exact = rf.fold(copy.deepcopy(model).double())
    assert torch.equal(folded[0].weight, exact[0].weight.to(torch.bfloat16))
    assert torch.equal(folded[0].bias, exact[0].bias.to(torch.bfloat16))


def test_fold_leaves_what_it_may_not_touch():
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
    model.eval()
    folded = rf.fold(model)
    assert [type(m[-1]) for m in folded[:4]] == [nn.BatchNorm2d] * 4
    assert type(folded[4][2]) is nn.SyncBatchNorm
    assert type(folded[5][0]) is nn.BatchNorm2d
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_fold_with_tied_weights():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    nontrivial(model).eval()
    folded = rf.fold(model)
    assert type(folded[1]) is nn.Identity
    assert torch.equal(folded[2].weight, model[2].weight)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(folded(x), model(x))


def test_fold_of_a_fused_model_and_after_unfusing():
    eager = nontrivial(LectureNet()).eval()
    fused, _ = fused_copy(eager)
    folded = rf.unfuse(rf.fold(fused))
    assert type(folded.blk1) is ResBlk
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-5)
    assert len(rf.fuse(folded).fused) == 5
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Memory, and arguments


def test_set_memory():
    eager = nn.Sequential(LectureNet().conv1, ResBlk(8, 8), BasicBlock(8, 8), ConvBNRelu(8, 4), rf.ResBlk(4, 4))
    fused, _ = fused_copy(nontrivial(eager))
    assert all(m.memory == "default" for m in fused)
    assert rf.set_memory(fused, "minimal") == 5
    assert all(m.memory == "minimal" for m in fused)
    assert_same_results(fused, eager, torch.randn(2, 3, 24, 24))
    assert copy.deepcopy(fused)[1].memory == "minimal"
    rf.set_memory(fused, "default")
    assert all(m.memory == "default" for m in fused)
    assert rf.set_memory(ResBlk(4, 4), "minimal") == 0


@pytest.mark.parametrize("memory", ["less", None, 1, ["minimal"]])
def test_set_memory_names_its_argument(memory):
    with pytest.raises(ValueError, match="memory: expected one of"):
        rf.set_memory(rf.ResBlk(4, 4), memory)


@pytest.mark.parametrize("function", [rf.fuse, rf.unfuse, rf.fold, lambda m: rf.set_memory(m, "minimal")])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module, got dict"):
        function({})


def test_module_without_anything_to_fuse():
    assert not rf.fuse(nn.Linear(2, 2)).entries
    assert not rf.fuse(nn.ModuleList()).entries
