# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Fused models that move between devices, and what users combine with them on each: autocast, GradScaler, layouts,
minimal memory, the reference engine."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from user_models import LectureNet, assert_same_results, classes, fused_copy, nontrivial, sequence, switched

import resnet_fused as rf
from resnet_fused.testing import assert_passed, compare_modules


def stages(block):
    """torchvision's stem and two of its stages, each with a projection or an identity: many values per channel."""
    network = ResNet(block, [2, 2, 1, 1])
    return nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2)


STAGES = {"basic": lambda: stages(BasicBlock), "bottleneck": lambda: stages(Bottleneck)}
MODELS = {
    **STAGES,
    "lecture": LectureNet,
    "sequence": sequence,
    "vgg": lambda: torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True),
    "without batch norm": lambda: torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"]),
}


def inputs(name, device, layout=torch.channels_last):
    if name == "lecture":  # views its last activation as [batch, -1]
        layout = torch.contiguous_format
    side = 48 if name == "lecture" else 32
    return torch.randn(3, 3, side, side).to(device, memory_format=layout)


def placed(model):
    return {t.device.type for t in model.state_dict().values()}


def assert_right_in_inference(fused, eager, x):
    """``eager`` is given the state of ``fused``."""
    eager.load_state_dict(fused.state_dict())
    eager.to(x.device)
    assert_passed(compare_modules(fused.eval(), eager.eval(), x, gradients=False))


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_fused_before_or_after_moving(name):
    eager = nontrivial(MODELS[name]()).cuda()
    after, _ = fused_copy(eager)
    before, _ = fused_copy(copy.deepcopy(eager).cpu())
    before.cuda()
    assert classes(before) == classes(after) == classes(eager)
    assert switched(before) == switched(after) and not switched(eager)
    assert placed(before) == placed(after) == {"cuda"}
    x = inputs(name, "cuda")
    assert torch.equal(before.eval()(x), after.eval()(x))
    assert_same_results(before, eager, x)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    """Folded on the CPU, trained on the GPU, back on the CPU: at every stop what the parameters are now counts."""
    eager = nontrivial(MODELS[name]())
    fused, _ = fused_copy(eager)
    original, running_fused = classes(eager), switched(fused)
    x = inputs(name, "cpu")
    for _ in range(2):
        assert_right_in_inference(fused.cpu(), eager, x)
        fused.cuda()
        assert placed(fused) == {"cuda"} and switched(fused) == running_fused
        assert_right_in_inference(fused, eager, x.cuda())
        fused.train()(x.cuda()).square().mean().backward()
        with torch.no_grad():
            for p in fused.parameters():
                p.sub_(p.grad.sign(), alpha=0.02 * p.abs().mean().item())
                p.grad = None
        assert_right_in_inference(fused, eager, x.cuda())
    next(fused.parameters()).data.mul_(-1)  # no version counter tells of it; moving does
    assert_right_in_inference(fused.cpu(), eager, x)
    assert classes(rf.unfuse(fused)) == original and not switched(fused)
    assert placed(fused) == {"cpu"}
    assert_right_in_inference(fused, eager, x)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_folded_models_move(name):
    model = nontrivial(MODELS[name]()).eval()
    x = inputs(name, "cpu")
    here = rf.fold(model)
    there = rf.fold(copy.deepcopy(model).cuda())
    assert placed(there) == {"cuda"}
    for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-7)
    for folded, device in ((here.cuda(), "cuda"), (there.cpu(), "cpu")):
        comparisons = compare_modules(folded, copy.deepcopy(model).to(device), x.to(device), gradients=False)
        assert_passed([c for c in comparisons if c.name == "output"])  # its batch norms' buffers are gone


@pytest.mark.cuda
@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_saved_on_one_device_and_loaded_on_another(source, target, tmp_path):
    eager = nontrivial(LectureNet())
    fused, _ = fused_copy(eager.to(source))
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False, map_location=target)
    assert classes(loaded) == classes(fused) and switched(loaded) == switched(fused)
    assert placed(loaded) == {target}
    assert_right_in_inference(loaded, eager, inputs("lecture", target))
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    other = rf.unfuse(copy.deepcopy(loaded)).to(target)
    other.load_state_dict(torch.load(tmp_path / "state.pt", map_location=target))
    assert_right_in_inference(loaded, other, inputs("lecture", target))


@pytest.mark.parametrize(
    ("memory", "layout"),
    [
        ("default", torch.channels_last),
        ("minimal", torch.channels_last),
        ("default", torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_precisions_layouts_and_memory(device, name, dtype, memory, layout):
    eager = nontrivial(STAGES[name]()).to(device, memory_format=layout)
    fused, _ = fused_copy(eager)
    # The sequence with the stem, four blocks, and the shortcuts' sequences.
    assert rf.set_memory(fused, memory) == {"basic": 6, "bottleneck": 7}[name]
    x = inputs(name, device, layout)
    assert_same_results(fused, eager, x, autocast=None if dtype == torch.float32 else dtype)
    for training in (True, False):
        assert fused.train(training)(x).stride() == eager.train(training)(x).stride()


@pytest.mark.parametrize("name", MODELS)
def test_reference_engine(device, name):
    eager = nontrivial(MODELS[name]()).to(device)
    fused, _ = fused_copy(eager)
    with rf.engine("reference"):
        assert_same_results(fused, eager, inputs(name, device))


def test_grad_scaler(device):
    """A step whose gradients overflow is left out as in eager, and the next ones are taken."""
    eager = nontrivial(nn.Sequential(STAGES["basic"](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 8)))
    fused, _ = fused_copy(eager.to(device))
    x, labels = inputs("basic", device).repeat(2, 1, 1, 1), torch.arange(6, device=device)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-32)
        steps = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                loss = F.cross_entropy(model(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            steps.append((scaler.get_scale(), model[0][4][0].conv1.weight.detach().clone(), loss.item()))
        return steps

    first = eager[0][4][0].conv1.weight.detach().clone()
    steps = list(zip(train(fused), train(eager), strict=True))
    assert [ours[0] for ours, _ in steps] == [theirs[0] for _, theirs in steps] == [2.0**8] * 3
    assert torch.equal(steps[0][0][1], first) and torch.equal(steps[0][1][1], first)
    for (_, ours, loss), (_, theirs, other) in steps[1:]:
        taken = (theirs - first).norm()
        assert taken > 0 and (ours - theirs).norm() <= 0.1 * taken
        assert abs(loss - other) < 0.02
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01, msg=name)


def test_gradients_accumulate_and_frozen_layers_stay(device):
    """Two backward passes add up; a frozen stem and a batch norm in evaluation mode are left alone."""
    eager = nontrivial(STAGES["basic"]()).to(device)
    fused, _ = fused_copy(eager)
    x = inputs("basic", device)
    for model in (fused, eager):
        model.train()
        model[0].weight.requires_grad_(False)
        model[4][0].bn1.eval()
        for part in x.split(1):
            model(part).square().mean().backward()
    assert fused[0].weight.grad is None
    assert fused[4][0].bn1.num_batches_tracked == 0
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
