# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""set_memory: what fused modules keep for backward."""

import copy
import pickle

import pytest
import torch
from lecture import ResBlk
from torch import nn
from torchvision.models.resnet import BasicBlock
from user_models import ConvBNRelu, LectureNet, assert_same_results, fused_copy, nontrivial

import resnet_fused as rf


def kept_bytes(model, x):
    """What backward keeps besides parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_set_memory(device):
    eager = nn.Sequential(LectureNet().conv1, ResBlk(8, 8), BasicBlock(8, 8), ConvBNRelu(8, 4), rf.ResBlk(4, 4))
    fused, _ = fused_copy(nontrivial(eager).to(device))
    x = torch.randn(2, 3, 24, 24, device=device)
    fused.train()
    before = kept_bytes(fused, x)
    # The model's own first layers, two sequences' and four modules'.
    assert rf.set_memory(fused, "minimal") == 6
    less = kept_bytes(fused, x)
    assert less < before
    fused.load_state_dict(eager.state_dict())
    assert_same_results(fused, eager, x)
    fused.train()
    assert kept_bytes(copy.deepcopy(fused), x) == kept_bytes(pickle.loads(pickle.dumps(fused)), x) == less
    rf.set_memory(fused, "default")
    assert kept_bytes(fused, x) == before
    assert rf.set_memory(ResBlk(4, 4), "minimal") == 0


def test_set_memory_before_the_first_call():
    block = rf.ResBlk(8, 8)
    rf.set_memory(block, "minimal")
    fresh = rf.ResBlk(8, 8)
    x = torch.randn(2, 8, 8, 8)
    assert kept_bytes(block, x) < kept_bytes(fresh, x)


@pytest.mark.parametrize("memory", ["less", None, 1, ["minimal"]])
def test_set_memory_names_its_argument(memory):
    with pytest.raises(ValueError, match="memory: expected one of"):
        rf.set_memory(rf.ResBlk(4, 4), memory)
