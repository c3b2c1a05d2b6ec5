# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Eager blocks and ours of the same state, and the tolerance policy for comparing them."""

import copy

from lecture import ResBlk, ResBlkOpen
from torch import nn
from torchvision.models import resnet as tv
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused.testing import assert_passed


def assert_policy(compare, draws):
    """The policy for what ``compare()`` returns: at once, or for gradients in one of several draws of the input.

    Where rounding decides on which side of a ReLU a value near zero falls (16 bits; deep networks whose last stages
    see few values per channel), a gradient's error is a draw of luck, in eager as in fused code, and either may be
    several times the other's. A wrong kernel is wrong on every input.
    """
    comparisons = compare()
    assert_passed([c for c in comparisons if not c.name.startswith("gradient")])
    failed = {c.name for c in comparisons if not c.passed}
    for _ in range(draws - 1):
        if failed:
            failed -= {c.name for c in compare() if c.passed}
    assert not failed, f"outside the policy in {draws} draws: {sorted(failed)}"


def downsample(inplanes, outplanes, stride, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))


def pair(name, *args, **kwargs):
    """torchvision's block and ours of the same state."""
    eager = getattr(tv, name)(*args, **copy.deepcopy(kwargs))
    for m in eager.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    fused = getattr(rf, name)(*args, **copy.deepcopy(kwargs))
    fused.load_state_dict(eager.state_dict())
    return fused, eager


def lecture_pair(ch_in, ch_out, stride=1, relu=True):
    eager, fused = (ResBlk if relu else ResBlkOpen)(ch_in, ch_out, stride), rf.ResBlk(ch_in, ch_out, stride, relu)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


PAIRS = {
    "basic": (16, lambda: pair("BasicBlock", 16, 16)),
    "basic_stride": (16, lambda: pair("BasicBlock", 16, 24, 2, downsample(16, 24, 2))),
    "bottleneck": (32, lambda: pair("Bottleneck", 32, 8)),
    "bottleneck_stride": (16, lambda: pair("Bottleneck", 16, 8, 2, downsample(16, 32, 2))),
    "resnext": (32, lambda: pair("Bottleneck", 32, 8, groups=4, base_width=32)),
    "dilated": (32, lambda: pair("Bottleneck", 32, 8, dilation=2)),
    "frozen": (
        16,
        lambda: pair(
            "Bottleneck", 16, 8, 2, downsample(16, 32, 2, FrozenBatchNorm2d), norm_layer=FrozenBatchNorm2d
        ),
    ),
    "cumulative": (16, lambda: pair("BasicBlock", 16, 16, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None))),
    "untracked": (
        16,
        lambda: pair("BasicBlock", 16, 16, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    ),
    "no_affine": (16, lambda: pair("BasicBlock", 16, 16, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False))),
    "resblk": (16, lambda: lecture_pair(16, 16)),
    "resblk_stride": (16, lambda: lecture_pair(16, 24, 2)),
    "resblk_no_relu": (16, lambda: lecture_pair(16, 24, 1, False)),
}
