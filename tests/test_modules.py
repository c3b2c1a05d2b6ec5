# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Modules against eager PyTorch under the tolerance policy, and the contracts they keep."""

import copy
import pickle

import pytest
import torch
from pairs import PAIRS, assert_policy, downsample, pair
from thinning import slow_but
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.testing import assert_passed, compare_modules

LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_block(device, name, training, precision, layout):
    channels, build = PAIRS[name]
    fused, eager = (m.to(device) for m in build())
    dtype = torch.bfloat16 if precision in ("bfloat16", "autocast") else getattr(torch, precision)
    if precision != "autocast":
        fused.to(dtype), eager.to(dtype)
    for m in (fused, eager):
        m.train(training).to(memory_format=layout)
    autocast = torch.bfloat16 if precision == "autocast" else None
    for gradients in (True, False):

        def compare(gradients=gradients):
            x = torch.randn(4, channels, 14, 12).to(memory_format=layout).to(device, dtype)
            return compare_modules(fused, eager, x, autocast=autocast, gradients=gradients)

        assert_policy(compare, draws=6 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_memory_format_is_eagers(device, training, layout):
    fused, eager = (m.train(training).to(device) for m in pair("BasicBlock", 16, 24, 2, downsample(16, 24, 2)))
    x = torch.randn(2, 16, 8, 8, device=device).to(memory_format=layout)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert fused(x).stride() == eager(x).stride()
    if layout is torch.contiguous_format:
        fused(x).view(2, -1)  # the lecture's network does


NETWORKS = {
    "resnet18": lambda m: m.resnet18(num_classes=10),
    "resnet50": lambda m: m.resnet50(num_classes=10),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", slow_but(["resnet18"], NETWORKS, "a whole network, in float64 too"))
def test_network_from_builder(name, training):
    import torchvision

    eager = NETWORKS[name](torchvision.models)
    fused = NETWORKS[name](rf)
    fused.load_state_dict(eager.state_dict())
    assert list(fused.state_dict()) == list(eager.state_dict())

    def compare():
        x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        return compare_modules(fused.train(training), eager.train(training), x)

    assert_policy(compare, draws=6)


def test_as_block_of_torchvisions_resnet(device):
    eager = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=10)
    fused = tv.ResNet(rf.BasicBlock, [1, 1, 1, 1], num_classes=10)
    fused.load_state_dict(eager.state_dict())
    fused.to(device), eager.to(device)
    # Four values per channel in the last stage.
    assert_policy(lambda: compare_modules(fused, eager, torch.randn(4, 3, 32, 32, device=device)), draws=6)
    tv.ResNet(rf.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])


def test_same_initialisation_as_torchvision():
    import torchvision

    torch.manual_seed(3)
    eager = torchvision.models.resnet18()
    torch.manual_seed(3)
    fused = rf.resnet18()
    for a, b in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def grad_name(z):
    return type(z.grad_fn).__name__


@pytest.mark.parametrize(
    "change",
    [
        lambda b, log: b.bn1.register_forward_hook(lambda *a: log.append("hook")),
        lambda b, log: b.conv2.register_forward_pre_hook(lambda *a: log.append("hook")),
        lambda b, log: b.relu.register_forward_hook(lambda *a: log.append("hook")),
        lambda b, log: b.conv1.register_full_backward_hook(lambda *a: log.append("hook")),
        lambda b, log: setattr(b, "relu", nn.SiLU()),
        lambda b, log: setattr(b, "bn1", nn.GroupNorm(4, 16)),
        lambda b, log: setattr(b, "conv1", nn.Sequential(b.conv1, nn.Dropout(0.0))),
        lambda b, log: nn.utils.parametrizations.weight_norm(b.conv1),
        lambda b, log: nn.utils.parametrizations.spectral_norm(b.conv2),
        lambda b, log: setattr(b, "conv1", nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")),
    ],
)
def test_changed_children_are_respected(change):
    fused, eager = pair("BasicBlock", 16, 16)
    logs = [], []
    for block, log in zip((fused, eager), logs, strict=True):
        torch.manual_seed(1)
        change(block, log)
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    results = []
    for block in (fused, eager):
        z = block(x)
        z.square().sum().backward()
        results.append([z, *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):  # what is left of the block still runs fused, and rounds otherwise
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert logs[0] == logs[1]


def test_global_hooks_fire_on_every_child():
    fused, _ = pair("BasicBlock", 16, 16)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(type(m).__name__))
    try:
        fused(torch.randn(2, 16, 6, 6))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 2 and seen.count("BatchNorm2d") == 2


def test_own_hooks_fire_and_stay_fused():
    fused, _ = pair("BasicBlock", 16, 16)
    seen = []
    fused.register_forward_hook(lambda *a: seen.append(1))
    assert grad_name(fused(torch.randn(2, 16, 6, 6))) == "_BlockBackward" and seen == [1]


def test_copies():
    fused, _ = pair("Bottleneck", 32, 8)
    x = torch.randn(2, 32, 6, 6)
    fused.eval()
    with torch.no_grad():
        expected = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(x), expected)


def test_reference_engine_runs_any_module():
    for name, (channels, build) in PAIRS.items():
        fused, eager = build()
        with rf.engine("reference"):
            assert_passed(compare_modules(fused, eager, torch.randn(2, channels, 6, 6)))
            z = fused(torch.randn(2, channels, 6, 6))
        assert grad_name(z) != "_BlockBackward", name
    with pytest.raises(ValueError, match="engine: expected one of"), rf.engine("fast"):
        pass


@pytest.mark.parametrize("relu", [True, False])
def test_batch_norm_act(device, relu):
    ours = rf.BatchNormAct2d(16, relu=relu).to(device)
    theirs = nn.BatchNorm2d(16).to(device)
    theirs.load_state_dict(ours.state_dict())
    x, s = torch.randn(2, 4, 16, 5, 6, device=device)
    for shortcut in (None, s):
        for training in (True, False):
            z = theirs.train(training)(x) if shortcut is None else theirs.train(training)(x) + s
            torch.testing.assert_close(ours.train(training)(x, shortcut), z.relu() if relu else z)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_repeatable(device, dtype):
    fused, _ = pair("Bottleneck", 16, 8, 2, downsample(16, 32, 2))
    fused.to(device, dtype)
    x = torch.randn(8, 16, 14, 14, dtype=dtype, device=device).to(memory_format=torch.channels_last)

    def run():
        block = copy.deepcopy(fused)
        block(x).float().square().sum().backward()
        return [p.grad for p in block.parameters()] + list(block.buffers())

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_functional_transforms_run_composed():
    fused, eager = (m.eval() for m in pair("BasicBlock", 8, 8))
    x = torch.randn(3, 2, 8, 6, 6)
    torch.testing.assert_close(torch.vmap(fused)(x), torch.vmap(eager)(x))
    tangent = torch.randn_like(x[0])
    pushed = [torch.func.jvp(block, (x[0],), (tangent,)) for block in (fused, eager)]
    for a, b in zip(*pushed, strict=True):
        torch.testing.assert_close(a, b)
    traced = torch.jit.trace(fused, x[0])
    torch.testing.assert_close(traced(x[1]), eager(x[1]))
    symbolic = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(symbolic(x[1]), eager(x[1]))


def test_data_parallel_with_gloo(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fused, eager = pair("BasicBlock", 8, 8)
        x = torch.randn(2, 8, 6, 6)
        wrapped = nn.parallel.DistributedDataParallel(fused)
        wrapped(x).square().sum().backward()
        eager(x).square().sum().backward()
        for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()
