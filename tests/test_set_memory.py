# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""set_memory: what fused modules keep for backward."""

import copy

import pytest
import torch
from lecture import ResBlk
from torch import nn
from torchvision.models.resnet import BasicBlock
from user_models import ConvBNRelu, LectureNet, assert_same_results, fused_copy, nontrivial

import resnet_fused as rf


def test_set_memory(device):
    eager = nn.Sequential(LectureNet().conv1, ResBlk(8, 8), BasicBlock(8, 8), ConvBNRelu(8, 4), rf.ResBlk(4, 4))
    fused, _ = fused_copy(nontrivial(eager).to(device))
    assert all(m.memory == "default" for m in fused)
    assert rf.set_memory(fused, "minimal") == 5
    assert all(m.memory == "minimal" for m in fused)
    assert_same_results(fused, eager, torch.randn(2, 3, 24, 24, device=device))
    assert copy.deepcopy(fused)[1].memory == "minimal"
    rf.set_memory(fused, "default")
    assert all(m.memory == "default" for m in fused)
    assert rf.set_memory(ResBlk(4, 4), "minimal") == 0


@pytest.mark.parametrize("memory", ["less", None, 1, ["minimal"]])
def test_set_memory_names_its_argument(memory):
    with pytest.raises(ValueError, match="memory: expected one of"):
        rf.set_memory(rf.ResBlk(4, 4), memory)
