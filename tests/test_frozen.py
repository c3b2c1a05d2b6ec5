# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Backbones trained with frozen statistics, as in detection: what is kept for backward, and the gradients.

Frozen batch norms may be folded into the weights within autograd, forward and backward, which keeps of each
convolution its input alone. That is the least that eager operations can do, and what these networks are held to.
"""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d
from user_models import classifier, fused_copy, nontrivial

import resnet_fused as rf
from resnet_fused.counting import bytes_kept
from resnet_fused.testing import assert_passed, compare_modules


class Folding(nn.Conv2d):
    """A convolution with ``norm``, frozen, in its weight: gradients reach the weight, gamma and beta through it."""

    def __init__(self, conv, norm):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.weight, self.norm = conv.weight, norm

    def forward(self, x):
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return self._conv_forward(x, weight, self.norm.bias - self.norm.running_mean * scale)


def folding(model):
    """A copy whose batch norms are in the convolutions."""
    model = copy.deepcopy(model)

    def merge(parent, conv, norm):
        setattr(parent, conv, Folding(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())

    merge(model, "0", "1")
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            for i in range(1, 4 if isinstance(module, Bottleneck) else 3):
                merge(module, f"conv{i}", f"bn{i}")
            if module.downsample is not None:
                merge(module.downsample, "0", "1")
    return model


def backbone(block, norms):
    """In training, its statistics those of what it sees."""
    if norms == "FrozenBatchNorm2d":
        return nontrivial(classifier(block, norm_layer=FrozenBatchNorm2d))
    model = nontrivial(classifier(block))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    model.apply(lambda m: m.reset_running_stats() if isinstance(m, nn.BatchNorm2d) else None)
    with torch.no_grad():
        model(images(8))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(norms == "learnt")
    return model


def images(batch):
    return torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last)


def vectors(model):
    """Bytes of the four numbers per channel that a fused batch norm keeps, however large the batch."""
    norms = nn.BatchNorm2d | FrozenBatchNorm2d
    return sum(16 * len(m.weight) for m in model.modules() if isinstance(m, norms))


@pytest.mark.parametrize("memory", ["default", "minimal"])
@pytest.mark.parametrize(
    ("norms", "amp"),  # under autocast torchvision's FrozenBatchNorm2d returns float32, and runs eagerly
    [("FrozenBatchNorm2d", False), *((norms, amp) for norms in ("learnt", "not learnt") for amp in (False, True))],
)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_keeps_no_more_than_norms_in_the_weights(block, norms, amp, memory):
    eager = backbone(block, norms).to(memory_format=torch.channels_last)
    fused, _ = fused_copy(eager)
    rf.set_memory(fused, memory)
    x = images(4)

    def kept(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return bytes_kept(model, lambda: model(x))

    assert kept(fused) <= kept(folding(eager)) + vectors(eager)


@pytest.mark.parametrize("engine", ["library", "native"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_learnt_and_frozen(block, amp, engine):
    """Gamma's gradient comes from the weight's where it is in front of a join: as near to float64 as eager's."""
    eager = backbone(block, "learnt").to(memory_format=torch.channels_last)
    fused, _ = fused_copy(eager)
    failed = None
    for _ in range(4):  # ReLUs at zero decide otherwise now and then
        with rf.engine(engine):
            comparisons = compare_modules(fused, eager, images(4), autocast=amp)
        names = {c.name for c in comparisons if not c.passed}
        failed = names if failed is None else failed & names
        if not failed:
            return
    assert_passed([c for c in comparisons if c.name in failed])
