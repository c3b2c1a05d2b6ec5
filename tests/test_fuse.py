# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""fuse on torchvision's networks, the lecture's block, and blocks of other writers: they compute the same."""

import copy

import pytest
import torch
import torchvision
from lecture import ResBlk, ResBlkOpen
from thinning import slow_but
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d
from user_models import OWN_BLOCKS, LectureNet, assert_same_results, classes, fused_copy, nontrivial

import resnet_fused as rf

TWO = "conv+bn+relu conv+bn"
RUNS = {
    "lecture, identity": [f"{TWO} +identity+relu"],
    "lecture, projection": [f"{TWO} +projection+relu"],
    "lecture, no last ReLU": [f"{TWO} +identity"],
    "lecture, no last ReLU, projection": [f"{TWO} +projection"],
    "other names": [f"{TWO} +identity+relu"],
    "bottleneck": [f"conv+bn+relu {TWO} +projection+relu"],
    "in a sequence": [f"{TWO} +identity+relu"],
    "bare convolution": [f"{TWO} +add+relu"],
    "no shortcut module": [f"{TWO} +identity+relu"],
    "ReLU modules": [f"{TWO} +identity+relu"],
    "squeeze and excitation": ["conv+bn+relu conv+bn"],
    "pre-activation": ["bn+relu conv+bn+relu conv +identity"],
    "pre-activation, projection": ["bn+relu", "conv+bn+relu conv +add"],
    "anti-aliased": ["conv+bn+relu", "conv+bn +add+relu"],
    "three inputs": [f"{TWO} +add+relu"],
    "concatenation": ["bn+relu conv+bn+relu conv"],
    "other activation": ["conv+bn", "conv+bn"],
    "nested units": [f"{TWO} +identity+relu"],
    "child called memory": [f"{TWO} +identity+relu"],
}


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_own_blocks(device, name):
    eager = nontrivial(OWN_BLOCKS[name]()).to(device)
    fused, report = fused_copy(eager)
    assert [(e.name, e.status, list(e.runs)) for e in report.entries] == [("", "fused", RUNS[name])]
    assert type(fused) is type(eager)
    assert_same_results(fused, eager, torch.randn(2, 8, 8, 8, device=device))


@pytest.mark.parametrize("block", [ResBlk, ResBlkOpen])
def test_last_relu_is_decided_by_the_forward(block):
    fused, _ = fused_copy(block(8, 8))
    assert (fused(torch.randn(2, 8, 6, 6)) < 0).any().item() is (block is ResBlkOpen)


@pytest.mark.parametrize("block", [ResBlk, ResBlkOpen])
def test_lecture_network(device, block):
    eager = nontrivial(LectureNet(block)).to(device)
    fused, report = fused_copy(eager)
    assert [e.name for e in report.fused] == ["", "blk1", "blk2", "blk3", "blk4"]
    assert report.fused[0].runs == ("conv+bn+relu",)
    assert not report.left
    assert_same_results(fused, eager, torch.randn(3, 3, 48, 48, device=device))


def test_lecture_network_channels_last(device):
    # A channels_last output cannot be viewed as [batch, -1], in eager just as fused; reshape can.
    eager = nontrivial(nn.Sequential(ResBlk(3, 8), ResBlk(8, 8), nn.Flatten()))
    eager.to(device, memory_format=torch.channels_last)
    fused, _ = fused_copy(eager)
    x = torch.randn(2, 3, 8, 8).to(device, memory_format=torch.channels_last)
    assert fused[0].eval()(x).is_contiguous(memory_format=torch.channels_last)
    assert_same_results(fused, eager, x)


NETWORKS = {"resnet18": (64, 9), "resnet50": (64, 17), "vgg19_bn": (32, 1), "vgg19": (32, 1), "alexnet": (64, 1)}


@pytest.mark.parametrize("name", slow_but(["resnet18", "alexnet"], NETWORKS, "a large network, in float64 too"))
def test_torchvision_networks(device, name):
    size, fused_modules = NETWORKS[name]
    eager = nontrivial(getattr(torchvision.models, name)(num_classes=10))
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that both runs in training see the same network
    if not name.startswith("resnet"):  # average pooling to 49 equal pixels: 200 MB and more of weights
        channels = [m for m in eager.features if isinstance(m, nn.Conv2d)][-1].out_channels
        eager.avgpool, eager.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 10)
    fused, report = fused_copy(eager.to(device))
    assert len(report.fused) == fused_modules
    assert not report.left
    assert report.convolutions.inference == report.convolutions.total
    # In training a convolution without a batch norm is its own.
    assert report.convolutions.training == (0 if name in ("vgg19", "alexnet") else report.convolutions.total)
    assert_same_results(fused, eager, torch.randn(2, 3, size, size, device=device))


def test_sequences_name_what_is_fused():
    reports = {name: rf.fuse(getattr(torchvision.models, name)().features) for name in ("vgg11_bn", "alexnet")}
    assert [e.reason for e in reports["vgg11_bn"].entries] == ["2 conv+bn+relu, 3 conv+bn+relu conv+bn+relu"]
    assert [e.reason for e in reports["alexnet"].entries] == [
        "2 conv+relu (inference), 1 conv+relu conv+relu conv+relu (inference)"
    ]


def test_other_torchvision_families():
    googlenet = torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=4)
    report = rf.fuse(googlenet)
    assert not report.left
    assert set().union(*(e.runs for e in report.entries)) == {"conv+bn+relu", "conv+bn+relu conv+bn+relu"}

    mobilenet = torchvision.models.mobilenet_v2()
    report = rf.fuse(mobilenet)
    assert set().union(*(e.runs for e in report.entries)) == {"conv+bn", "conv+bn +add"}  # ReLU6 is called

    dense = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4)
    report = rf.fuse(dense)
    assert report.convolutions.training == report.convolutions.total == 10


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
def test_other_families_compute_the_same(device, model):
    eager = nontrivial(copy.deepcopy(model)).to(device)
    fused, report = fused_copy(eager)
    assert report.fused
    channels = next(m for m in eager.modules() if isinstance(m, nn.Conv2d)).in_channels
    assert_same_results(fused, eager, torch.randn(2, channels, 32, 32, device=device))


def test_frozen_batch_norm_backbone(device):
    network = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    eager = nontrivial(torchvision.models._utils.IntermediateLayerGetter(network, {"layer2": "a", "layer4": "b"}))
    fused, report = fused_copy(eager.to(device))
    assert len(report.fused) == 9  # the stem is in the getter's own forward
    assert not report.left
    x = torch.randn(1, 3, 64, 64, device=device)
    for key, value in eager(x).items():
        torch.testing.assert_close(fused(x)[key], value, rtol=1e-4, atol=1e-4)


def test_detection_model():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    ).eval()
    fused, report = fused_copy(model)
    assert sum(e.original is Bottleneck for e in report.fused) == 16
    with torch.no_grad():
        images = [torch.rand(3, 64, 64)]
        features = model.backbone(torch.stack(images))
        for key, value in fused.backbone(torch.stack(images)).items():
            torch.testing.assert_close(value, features[key], rtol=1e-3, atol=1e-4)
        assert set(fused(images)[0]) == {"boxes", "labels", "scores"}


def test_dilated_segmentation_model():
    model = nontrivial(torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)).eval()
    fused, report = fused_copy(model)
    assert sum(e.original is Bottleneck for e in report.fused) == 16
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
    assert type(fused.layer1[0]) is MyBlock
    assert fused.layer1[0].describe() == "mine"
    assert_same_results(fused, eager, torch.randn(2, 3, 32, 32))


def test_subclass_of_torchvision_with_an_own_forward_is_traced():
    class Open(BasicBlock):
        def forward(self, x):
            return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x

    eager = nontrivial(Open(8, 8))
    fused, report = fused_copy(eager)
    assert [e.runs for e in report.fused] == [("conv+bn+relu conv+bn +identity",)]
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
    assert [e.reason.startswith("already") for e in report.fused] == [False] + [True] * 4
    rf.unfuse(model)
    assert classes(model) == before
    assert rf.fuse(model).convolutions.training == 9 + 3


@pytest.mark.parametrize("function", [rf.fuse, rf.unfuse, rf.fold, lambda m: rf.set_memory(m, "minimal")])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module, got dict"):
        function({})


def test_module_without_anything_to_fuse():
    assert not rf.fuse(nn.Linear(2, 2)).entries
    assert not rf.fuse(nn.ModuleList()).entries
