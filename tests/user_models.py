# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Blocks and networks as users write them, in eager PyTorch, and what the tests of fuse compare them with."""

import copy

import torch
import torch.nn.functional as F
from lecture import ResBlk, ResBlkOpen
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused.testing import assert_passed, compare_modules


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


class SqueezeExcite(NamedOtherwise):
    """A foreign step before the addition."""

    def __init__(self, planes=8):
        super().__init__(planes)
        self.fc1, self.fc2 = nn.Conv2d(planes, 2, 1), nn.Conv2d(2, planes, 1)

    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        gate = self.fc2(F.silu(self.fc1(out.mean((2, 3), keepdim=True))))
        return F.relu(out * torch.sigmoid(gate) + self.shortcut(x))


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution (He et al. 2016)."""

    def __init__(self, planes=8, projected=False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, padding=1)
        self.shortcut = nn.Conv2d(planes, planes, 1) if projected else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += x
        return out


class AntiAliased(NamedOtherwise):
    """A pooling between the units."""

    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)))
        out = F.avg_pool2d(out, 3, 1, 1)
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        return F.relu(out)


class ThreeInputs(NamedOtherwise):
    """As in DLA: the shortcut comes from outside, or is the input; a third input goes unused."""

    def forward(self, x, shortcut=None, children=None):
        if shortcut is None:
            shortcut = x * 0.5
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += shortcut
        return F.relu(out)


class Concatenating(nn.Module):
    """DenseNet's layer."""

    def __init__(self, planes=8):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 16, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3, padding=1, bias=False)

    def forward(self, x):
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class OtherActivation(NamedOtherwise):
    def forward(self, x):
        out = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.second_norm(self.second(out)) * 0.5 + x)


class NestedUnits(nn.Module):
    """Units with a forward of their own, as timm's ConvNormAct."""

    def __init__(self, planes=8):
        super().__init__()
        self.unit1, self.unit2 = ConvBNRelu(planes, planes), ConvBNRelu(planes, planes)
        self.unit2.act = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x):
        shortcut = x
        x = self.unit2(self.unit1(x))
        x = x + shortcut
        return self.act(x)


class MemoryChild(nn.Module):
    """Children under names that some package might want for itself."""

    def __init__(self, planes=8):
        super().__init__()
        self.memory, self.conv = nn.Conv2d(planes, planes, 1), nn.BatchNorm2d(planes)
        self.relu, self.final_relu = nn.Conv2d(planes, planes, 1), nn.BatchNorm2d(planes)

    def forward(self, inputs):
        return F.relu(self.final_relu(self.relu(F.relu(self.conv(self.memory(inputs))))) + inputs)


class ConvBNRelu(nn.Module):
    def __init__(self, cin=3, cout=8):
        super().__init__()
        self.c = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.n(self.c(x)))


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


def classifier(block=BasicBlock, **options):
    """torchvision's stem, a stage of an identity or a projection, one of a projection, and a head."""
    network = ResNet(block, [1, 1, 1, 1], **options)
    features = [network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128 * block.expansion, 4))


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
    "squeeze and excitation": SqueezeExcite,
    "pre-activation": PreActivation,
    "pre-activation, projection": lambda: PreActivation(projected=True),
    "anti-aliased": AntiAliased,
    "three inputs": ThreeInputs,
    "concatenation": Concatenating,
    "other activation": OtherActivation,
    "nested units": NestedUnits,
    "child called memory": MemoryChild,
}


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


def assert_same_results(fused, eager, x, training=(False, True), autocast=None):
    """The policy; a gradient may take several inputs, see assert_policy in test_modules.py for why."""
    for mode in training:
        comparisons = compare_modules(fused.train(mode), eager.train(mode), x, autocast=autocast)
        assert_passed([c for c in comparisons if not c.name.startswith("gradient")])
        failed = {c.name for c in comparisons if not c.passed}
        for _ in range(5):
            if failed:
                other = torch.empty_like(x).copy_(torch.randn(x.shape))
                again = compare_modules(fused, eager, other, autocast=autocast)
                failed -= {c.name for c in again if c.passed}
        assert not failed, f"outside the policy on every input: {sorted(failed)}"


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def switched(model):
    """The modules that run fused."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def tensors(model):
    return {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
