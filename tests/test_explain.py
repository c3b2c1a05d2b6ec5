# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""explain: its figures agree with what is counted elsewhere, and the user's model stays as it was."""

import builtins
import copy
import gc

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import resnet_fused as rf
from resnet_fused import _C
from resnet_fused.counting import Operators, bytes_kept
from resnet_fused.planner import decide
from resnet_fused.planner.entry import EAGER, Entry, all_library
from resnet_fused.planner.recording import recording

CHANNELS, SIDE, IMAGES = 16, 12, 2


def network():
    """A stem, a projecting block and a block with an identity, twice."""
    downsample = nn.Sequential(nn.Conv2d(CHANNELS, 2 * CHANNELS, 1, 2, bias=False), nn.BatchNorm2d(2 * CHANNELS))
    wide = 2 * CHANNELS
    stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    blocks = (BasicBlock(CHANNELS, wide, 2, downsample), BasicBlock(wide, wide), BasicBlock(wide, wide))
    return nn.Sequential(stem, *blocks).to(memory_format=torch.channels_last)


def images(device="cpu", side=SIDE):
    return torch.randn(IMAGES, 3, side, side, device=device).to(memory_format=torch.channels_last)


def state_of(model):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    return copy.deepcopy(model.state_dict()), grads, modes, ["forward" in m.__dict__ for m in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_blocks(device, training, fused):
    model, x = network().to(device), images(device)
    if fused:
        rf.fuse(model)
    found = rf.explain(model, x, training=training, rounds=1)
    assert [b.module for b in found.blocks] == ["", "1", "2", "3"]
    assert [b.run.count("conv") for b in found.blocks] == [1, 2, 2, 2]
    assert [len(b.convolutions) for b in found.blocks] == [1, 3, 2, 2]
    assert [c.name for c in found.blocks[1].convolutions] == ["conv1", "conv2", "downsample.0"]
    assert found.blocks[2].shape == (IMAGES, 2 * CHANNELS, SIDE // 2, SIDE // 2)
    passes = {"fprop", "dgrad", "wgrad"} if training else {"fprop"}
    assert all(set(c.passes) == passes for b in found.blocks[1:] for c in b.convolutions)
    assert set(found.blocks[0].convolutions[0].passes) == passes - {"dgrad"}
    for block in found.blocks:
        assert block.seconds > 0 and block.eager_seconds > 0 and "library" in block.alternatives
        assert 0 < block.least <= block.moved
        # On a GPU partial sums outweigh so few values; test_cuda_cost.py holds the kernels to their bytes.
        assert device.type != "cpu" or block.moved < block.eager_moved
        assert (0 < block.kept < block.eager_kept) if training else block.kept == block.eager_kept == 0
    assert found.report.convolutions.training == 8
    text = str(found)
    assert "2: conv+bn+relu conv+bn +identity+relu" in text and "1.downsample.0" in text and "whole model" in text


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chosen", ["library", "eager"])
def test_a_plan_is_the_reason(chosen, training):
    model, x = network()[0].train(training), images()
    rf.fuse(model)
    with torch.set_grad_enabled(training), recording() as noted:
        model(x)
    planned = {"library": all_library(noted.calls[0].key.units), "eager": EAGER}[chosen]
    decide.decide(noted.calls[0].key, Entry(planned, chosen, "", {}, {}))
    try:
        found = rf.explain(model, x, rounds=1)
    finally:
        decide.forget(plans=False)
    engines = {engine for c in found.blocks[0].convolutions for engine in c.passes.values()}
    assert engines == {(chosen, "measured to be the faster: resnet_fused.plan")}


def test_nothing_is_kept_behind():
    model = BasicBlock(64, 64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 64, 64).to(memory_format=torch.channels_last)
    gc.collect()
    before = _C.memory_pool_state()["in_use"]
    for norm in (model.bn1, model.bn2):
        norm.eval().requires_grad_(False)  # the block's output is what its backward reads
    rf.explain(model, x, training=None, rounds=1)
    gc.collect()
    assert _C.memory_pool_state()["in_use"] == before


def test_totals_and_least():
    model, x = network(), images()
    found = rf.explain(model, x, rounds=1)
    assert found.eager_kept == bytes_kept(model, lambda: model(x))
    first, width = found.blocks[0], 4
    weights = 27 * CHANNELS + 3 * CHANNELS
    z = IMAGES * CHANNELS * SIDE**2
    # Read and written forward, and their gradients and another reading backward; the images have none.
    assert first.least == width * (2 * x.numel() + 2 * z + 3 * weights)


def test_engines_and_reasons():
    model, x = network(), images()
    with rf.engine("library"):
        found = rf.explain(model, x, rounds=1)
        assert not found.blocks[0].alternatives
    named = {e for b in found.blocks for c in b.convolutions for e in c.passes.values()}
    assert {e.name for e in named} == {"library"} and any('engine("library")' in e.why for e in named)
    contiguous = rf.explain(model.to(memory_format=torch.contiguous_format), x.contiguous(), rounds=1)
    reasons = {e.why for b in contiguous.blocks for c in b.convolutions for e in c.passes.values()}
    assert reasons == {"not native: the input is not channels_last"}


@pytest.mark.skipif(rf.ops.native_device_reason(torch.device("cpu")) is not None, reason="no native convolutions here")
@pytest.mark.parametrize("training", [True, False])
def test_native_is_said_where_it_ran(training):
    model, x = rf.fold(network().eval()) if not training else network(), images()
    with rf.engine("native"):
        found = rf.explain(model, x, training=training, rounds=1)
    assert {e.name for c in found.blocks[2].convolutions for e in c.passes.values()} == {"native"}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(training):
    model = network().train(not training)
    model(images()).sum().backward()
    model[0][0].weight.requires_grad_(False)
    x = images().requires_grad_()
    before, random = state_of(model), torch.get_rng_state()
    rf.explain(model, x, training=training, rounds=1)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random) and x.grad is None


def test_autocast_and_a_convolution_that_is_hooked():
    model = network()
    handle = model[2].conv1.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        found = rf.explain(model, images(), rounds=1)
    handle.remove()
    assert {b.dtype for b in found.blocks} == {torch.bfloat16}
    hooked = next(b for b in found.blocks if b.module == "2")
    assert hooked.run == "bn+relu conv+bn +add+relu" and [c.name for c in hooked.convolutions] == ["conv2"]


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: expected an nn.Module, got int"):
        rf.explain(3, images())
    with pytest.raises(ValueError, match="input: expected a tensor, .* got str"):
        rf.explain(network(), "images")
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        rf.explain(network(), images(), rounds=0)


def test_plot(tmp_path, monkeypatch):
    found = rf.explain(network(), images(), rounds=1)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    original = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="plot: needs matplotlib"):
        found.plot(tmp_path / "other.png")


def test_operators_without_views_and_allocations():
    x = torch.randn(4, 4)
    with Operators() as operators:
        torch.empty(100).view(10, 10)
        x.t().add_(1.0)
    assert operators.names == ["aten.add_"] and operators.bytes == 4 * 16


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_read_twice_for_statistics(training):
    norm, x = nn.BatchNorm2d(4).train(training), torch.randn(2, 4, 8, 8)
    with Operators() as operators, torch.no_grad():
        norm(x)
    assert operators.bytes == pytest.approx((3 if training else 2) * x.nbytes, rel=0.1)  # vectors of channels besides
