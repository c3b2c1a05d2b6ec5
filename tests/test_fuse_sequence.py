# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""fuse on nn.Sequential: what runs together, and that it stays the container it was."""

import contextlib

import pytest
import torch
from lecture import ResBlk
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation
from user_models import ConvBNRelu, ReluModules, assert_same_results, fused_copy, nontrivial, sequence

import resnet_fused as rf


def test_sequence_runs(device):
    eager = nontrivial(sequence()).to(device)
    fused, report = fused_copy(eager)
    assert type(fused) is nn.Sequential
    assert [e.reason for e in report.entries] == [
        "1 conv+bn+relu, 1 conv+relu (inference), 1 bn+relu conv+bn"
    ]
    assert_same_results(fused, eager, torch.randn(2, 3, 16, 16, device=device))


def test_sequence_is_a_container():
    eager = nontrivial(sequence()).eval()
    fused, _ = fused_copy(eager)
    x = torch.randn(2, 3, 16, 16)
    assert fused[1] is fused._modules["1"]
    for part in (slice(0, 4), slice(1, 3), slice(0, 0)):
        piece = fused[part]
        assert type(piece) is nn.Sequential
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


def test_torchvision_sequence_subclass_keeps_its_type(device):
    eager = nontrivial(Conv2dNormActivation(3, 8)).to(device)
    fused, report = fused_copy(eager)
    assert [e.runs for e in report.entries] == [("conv+bn+relu",)]
    assert type(fused) is Conv2dNormActivation
    assert_same_results(fused, eager, torch.randn(2, 3, 8, 8, device=device))


def test_sequence_that_is_fused_from_birth(device):
    eager = nontrivial(sequence()).to(device)
    fused = rf.FusedSequential(*sequence()).to(device)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 3, 16, 16, device=device)
    assert_same_results(fused, eager, x)
    del fused[3:]
    assert type(fused.train()(x).grad_fn).__name__ == "_BlockBackward"


def test_unbatched_input(device):
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(device)
    fused, _ = fused_copy(eager)
    x = torch.randn(3, 8, 8, device=device)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_hook_on_a_child_of_a_fused_sequence_fires(device, position):
    eager = nontrivial(sequence()[:3]).to(device)
    fused, _ = fused_copy(eager)
    for model in (eager, fused):
        model[position].register_forward_hook(lambda module, args, output: output * 2)
    assert_same_results(fused, eager, torch.randn(2, 3, 8, 8, device=device))


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
