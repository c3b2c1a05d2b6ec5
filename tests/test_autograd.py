# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""First and second derivatives of every block in float64, and what is kept for backward."""

import copy

import pytest
import torch
from simulator import simulated
from thinning import slow_but
from torch import nn

import resnet_fused as rf
from resnet_fused import functional, ops
from resnet_fused.functional import Conv, Norm, Unit

IN = 4


def projection(channels, stride=1, bias=False):
    return nn.Sequential(nn.Conv2d(IN, channels, 1, stride, bias=bias), nn.BatchNorm2d(channels))


def pooled():
    """ResNet-D's shortcut: arbitrary to a block."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(IN, 8, 1), nn.BatchNorm2d(8))


BLOCKS = {
    "conv_bn_relu": lambda: rf.ConvBNAct2d(IN, 5, bias=True),
    "conv_bn": lambda: rf.ConvBNAct2d(IN, 5, stride=2, relu=False),
    "bn_relu": lambda: rf.BatchNormAct2d(IN),
    "bn_relu_no_affine": lambda: rf.BatchNormAct2d(IN, affine=False),
    "basic_identity": lambda: rf.BasicBlock(IN, IN),
    "basic_projection": lambda: rf.BasicBlock(IN, 8, 2, projection(8, 2)),
    "basic_arbitrary": lambda: rf.BasicBlock(IN, 8, 2, pooled()),
    "bottleneck_identity": lambda: rf.Bottleneck(IN, 1),
    "bottleneck_projection": lambda: rf.Bottleneck(IN, 2, 2, projection(8, 2)),
    "bottleneck_grouped_dilated": lambda: rf.Bottleneck(IN, 1, 1, None, 2, 64, 2),
    "resblk": lambda: rf.ResBlk(IN, IN),
    "resblk_projection": lambda: rf.ResBlk(IN, 6, 2),
    "resblk_no_relu": lambda: rf.ResBlk(IN, IN, relu=False),
}


def make(name, mode, device="cpu"):
    block = BLOCKS[name]().double().to(device)
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    for b in block.buffers():
        if b.is_floating_point():
            nn.init.uniform_(b, 0.5, 1.5)
    block.train(mode == "train")
    if mode == "frozen":  # training with batch norm in evaluation
        block.train()
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    return block


def as_function(block):
    names = [n for n, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    return run


# Only a projection of the derivatives on random vectors where each entry's differences, two runs of the kernels for
# each value, would take minutes.
FAST = {"fast_mode": simulated()}


def is_fused(z):
    return type(z.grad_fn).__name__ == "_BlockBackward"


@pytest.mark.parametrize("memory", ["default", "minimal"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients(device, name, mode, memory):
    block = make(name, mode, device)
    rf.set_memory(block, memory)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert is_fused(block(x))
    assert torch.autograd.gradcheck(as_function(block), (x, *block.parameters()), **FAST)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", slow_but(["conv_bn_relu"], BLOCKS, "differences of each entry"))
def test_second_derivatives(device, name, mode):
    block = make(name, mode, device)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(as_function(block), (x, *block.parameters()), **FAST)


# Of each join, and a chain that begins with a batch norm.
BATCHED = ("conv_bn_relu", "bn_relu", "basic_identity", "basic_projection", "basic_arbitrary", "resblk_no_relu")


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_of_gradients(device, name, mode):
    block = make(name, mode, device)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, *block.parameters())
    z = block(x)
    assert is_fused(z)
    vectors = torch.randn(3, *z.shape, dtype=torch.float64, device=device)
    batched = torch.autograd.grad(z, inputs, vectors, is_grads_batched=True, retain_graph=True)
    assert not any(g.requires_grad for g in batched)
    single = [torch.autograd.grad(z, inputs, v, retain_graph=True) for v in vectors]
    for found, *expected in zip(batched, *single, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", BATCHED)
def test_vectorised_jacobian(name, twice):
    block = make(name, "train")
    x = torch.randn(2, IN, 2, 2, dtype=torch.float64)
    function = torch.autograd.functional.hessian if twice else torch.autograd.functional.jacobian

    def run(x):
        return block(x).square().sum() if twice else block(x)

    found = function(run, x, vectorize=True)
    with rf.engine("reference"):
        torch.testing.assert_close(found, function(run, x))


def test_gradient_of_each_sample():
    block = make("basic_identity", "eval")
    x = torch.randn(3, 1, IN, 4, 4, dtype=torch.float64)

    def loss(x):
        return block(x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(found, torch.stack([torch.autograd.functional.jacobian(loss, v) for v in x]))


def test_tensors_that_depend_on_each_other(device):
    """One weight in two units, and a batch norm's that is made of the input: create_graph=True changes nothing."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    norm = Norm(x.mean((0, 2, 3)) + 1, None)
    unit = Unit(Conv(w, padding=(1, 1)), norm)
    loss = functional.residual(x, [unit, unit], x).square().sum()
    expected = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for found, e in zip(torch.autograd.grad(loss, (x, w), create_graph=True), expected, strict=True):
        torch.testing.assert_close(found.detach(), e)


@pytest.mark.parametrize("relu", [True, False])
def test_shortcut_from_elsewhere(device, relu):
    shapes = (2, 3, 4, 5), (2, 3, 4, 5), (3, 3, 3, 3), (3,), (3,)
    x, s, w, g, b = (torch.randn(*v, dtype=torch.float64, device=device, requires_grad=True) for v in shapes)

    def run(x, s, w, g, b):
        return functional.conv_bn_act(x, Conv(w, padding=(1, 1)), Norm(g, b), relu, s)

    assert torch.autograd.gradcheck(run, (x, s, w, g, b), **FAST)
    assert torch.autograd.gradgradcheck(run, (x, s, w, g, b), **FAST)


def test_gradients_are_the_reference_engines(device):
    block = make("basic_projection", "train", device)
    x = torch.randn(2, IN, 6, 6, dtype=torch.float64, device=device)

    def gradients():
        b = copy.deepcopy(block)
        b(x).square().sum().backward()
        return [p.grad for p in b.parameters()] + list(b.buffers())

    fused = gradients()
    with rf.engine("reference"):
        expected = gradients()
        assert not is_fused(block(x))
    for a, e in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shortcut", [None, "identity"])
def test_chain_that_begins_with_a_batch_norm(device, shortcut):
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    vectors = [torch.rand(4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(4)]

    def run(x, w, *vectors):
        units = [Unit(None, Norm(*vectors[:2])), Unit(Conv(w, padding=(1, 1)), Norm(*vectors[2:]))]
        return functional.residual(x, units, x if shortcut else None)

    assert torch.autograd.gradcheck(run, (x, w, *vectors), **FAST)


def test_engine_argument():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    conv = Conv(torch.randn(8, 3, 1, 1, requires_grad=True))
    norm = Norm(torch.ones(8), torch.zeros(8))
    assert not is_fused(functional.conv_bn_act(x, conv, norm, engine="reference"))
    with rf.engine("reference"):
        assert is_fused(functional.conv_bn_act(x, conv, norm, engine="library"))
        assert not is_fused(functional.conv_bn_act(x, conv, norm))
    with pytest.raises(ValueError, match="engine: expected one of"):
        functional.conv_bn_act(x, conv, norm, engine="quick")


@pytest.mark.parametrize("frozen", ["input", "weights", "norms", "first"])
def test_only_what_is_asked_for(device, frozen):
    block = make("basic_projection", "train", device)
    x = torch.randn(2, IN, 6, 6, dtype=torch.float64, device=device, requires_grad=frozen != "input")
    for name, p in block.named_parameters():
        p.requires_grad_(
            not (
                (frozen == "weights" and p.dim() == 4)
                or (frozen == "norms" and p.dim() == 1)
                or (frozen == "first" and name.startswith(("conv1", "bn1")))
            )
        )
    everything = copy.deepcopy(block).requires_grad_()
    full = x.detach().clone().requires_grad_()
    everything(full).square().sum().backward()
    block(x).square().sum().backward()
    pairs = [(x, full), *zip(block.parameters(), everything.parameters(), strict=True)]
    for got, want in pairs:
        if got.requires_grad:
            torch.testing.assert_close(got.grad, want.grad)
        else:
            assert got.grad is None


def test_backward_twice_and_changed_inputs(device):
    block = make("bottleneck_identity", "train", device)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64, device=device)
    z = block(x)
    z.sum().backward(retain_graph=True)
    first = block.conv2.weight.grad.clone()
    z.sum().backward()
    torch.testing.assert_close(block.conv2.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()
    z = block(x)
    with torch.no_grad():
        block.conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def kept_bytes(block, x):
    """Bytes of all distinct storages saved for backward, parameters excepted."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = block(x)
    assert z.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "bound"), [("BasicBlock", 0.80), ("Bottleneck", 0.87)])
@pytest.mark.parametrize("projected", [False, True])
def test_bytes_kept_for_backward(device, name, bound, projected, dtype):
    from torchvision.models import resnet

    inplanes, planes = (64, 64) if name == "BasicBlock" else (256, 64)
    stride, downsample = 1, None
    if projected:
        expansion = getattr(resnet, name).expansion
        inplanes, stride = inplanes // 2, 2
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, planes * expansion, 1, 2, bias=False), nn.BatchNorm2d(planes * expansion)
        )
    eager = getattr(resnet, name)(inplanes, planes, stride, downsample).to(device, dtype)
    fused = getattr(rf, name)(inplanes, planes, stride, copy.deepcopy(downsample)).to(device, dtype)
    x = torch.randn(4, inplanes, 32, 32, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    # What eager keeps is counted from the block's own start: its input is a leaf that both keep.
    by_eager = kept_bytes(eager, x)
    assert kept_bytes(fused, x) <= bound * by_eager
    rf.set_memory(fused, "minimal")
    assert kept_bytes(fused, x) <= 0.60 * by_eager


def test_checkpointing(device):
    from torch.utils.checkpoint import checkpoint

    block = make("basic_identity", "train", device)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    block(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_frozen_network_reduces_nothing_and_recomputes_no_activation(device, monkeypatch):
    block = rf.BasicBlock(8, 8).to(device).eval().requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    z = block(x)
    calls = []
    for name in ("bn_apply", "bn_backward_reduce", "bn_backward_finalize", "convolution_backward"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: calls.append(n) or f(*a, **k))
    (found,) = torch.autograd.grad(z.square().sum(), x)
    assert calls == ["convolution_backward"] * 2
    with rf.engine("reference"):
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory", ["default", "minimal"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("join", ["none", "identity", "tensor", "projection"])
def test_a_last_convolution_without_a_batch_norm(device, join, relu, memory):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)

    x, s = leaf(2, 3, 4, 4), leaf(2, 3, 4, 4)
    front = Unit(None, Norm(leaf(3), leaf(3)))
    middle = Unit(Conv(leaf(4, 3, 1, 1)), Norm(leaf(4), leaf(4)))
    last = Unit(Conv(leaf(3, 4, 3, 3), leaf(3), padding=(1, 1)), None)
    projection = Unit(Conv(leaf(3, 3, 1, 1)), Norm(leaf(3), leaf(3)))
    shortcut = {"none": None, "identity": x, "tensor": s, "projection": projection}[join]
    inputs = [x, s, *front.norm[:2], middle.conv.weight, *middle.norm[:2], *last.conv[:2], *projection.norm[:2]]

    def block(*_):
        return functional.residual(x, (front, middle, last), shortcut, relu, memory)

    z = block()
    assert is_fused(z)
    torch.testing.assert_close(
        z, functional.residual(x, (front, middle, last), shortcut, relu, engine="reference"), rtol=1e-10, atol=1e-10
    )
    used = [t for t in inputs if torch.autograd.grad(z.sum(), t, retain_graph=True, allow_unused=True)[0] is not None]
    assert torch.autograd.gradcheck(block, used, **FAST)
    assert torch.autograd.gradgradcheck(block, used, fast_mode=True)  # of a block: thousands of entries
    if not relu and join != "projection":
        block().add_(1).sum().backward()  # as eager's: a convolution does not keep its output


def test_what_may_come_without_a_batch_norm():
    x, conv = torch.randn(1, 3, 4, 4), Conv(torch.randn(3, 3, 1, 1))
    norm = Norm(None, None)
    for units, i in (((Unit(conv, None),), 0), ((Unit(conv, None), Unit(conv, norm)), 0)):
        with pytest.raises(ValueError, match=rf"units\[{i}\].norm: only the last of several units"):
            functional.residual(x, units)
    with pytest.raises(ValueError, match="shortcut.norm: expected a batch norm"):
        functional.residual(x, (Unit(conv, norm),), Unit(conv, None))


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("engine", ["library", "native"])
@pytest.mark.parametrize("learns", ["gamma", "beta", "nothing"])
def test_frozen_norms_keep_no_joined_values(device, projects, engine, learns):
    """z, which whoever reads it keeps anyway, gives the mask, and the weight's gradient gamma's."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)) if projects else None
    block = rf.BasicBlock(8, 8, downsample=shortcut).to(device).eval()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.zeros_(block.bn2.weight[:4].detach())  # its gradient is not to be divided by it
    x = torch.randn(2, 8, 6, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    joined = [block.conv2.weight] + ([block.downsample[0].weight] if projects else [])
    for weight in joined:
        weight.requires_grad_(False)
    with_values = kept_bytes(block, x)
    for weight in joined:
        weight.requires_grad_(True)
    for norm in norms:
        norm.weight.requires_grad_(learns == "gamma")
        norm.bias.requires_grad_(learns != "nothing")
    # In place of the last convolution's output, and of the projection's, z.
    assert kept_bytes(block, x) == with_values - (x.nbytes if projects else 0)
    learnt = [x, *(p for p in block.parameters() if p.requires_grad)]
    with rf.engine(engine):
        found = torch.autograd.grad(block(x).square().sum(), learnt)
    with rf.engine("reference"):
        expected = torch.autograd.grad(block(x).square().sum(), learnt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_passes_of_an_identity_block_s_backward(device, monkeypatch):
    """The masked gradient is written once, and activations by the reduction that reads their norm's input."""
    block = rf.Bottleneck(16, 4).to(device).train()
    x = torch.randn(2, 16, 6, 6, device=device, requires_grad=True)
    z = block(x)
    calls = []
    for name in ("bn_apply", "bn_backward_reduce", "bn_backward_apply", "bn_backward_apply_", "relu_backward_add_"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: calls.append(n) or f(*a, **k))
    z.sum().backward()
    assert calls == ["bn_backward_reduce", "bn_backward_apply"] + ["bn_backward_reduce", "bn_backward_apply_"] * 2
