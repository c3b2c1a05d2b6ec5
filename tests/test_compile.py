# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""torch.compile: whole blocks without a graph break, one compilation for every size of the batch, the same bits."""

import copy

import pytest
import torch
from pairs import PAIRS, downsample, pair
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import resnet_fused as rf
from resnet_fused import block, compiled, inference, opaque, ops
from resnet_fused.functional import Conv, Norm, Unit
from resnet_fused.opaque import assume_constant_result
from resnet_fused.units import Join

PLANE = (14, 12)
# With these planes engine("auto") chooses otherwise for the last than for the first, in float32 and in 16 bits.
BATCHES = (2, 3, 7)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def pooled(outplanes):
    """ResNet-D's shortcut: a tensor from elsewhere to a block."""
    return nn.Sequential(nn.AvgPool2d(2), *downsample(16, outplanes, 1))


def with_shortcut():
    """A unit whose shortcut is from elsewhere, and is not rectified."""
    return Doubled(rf.ConvBNAct2d(16, 16, bias=True, relu=False))


class Doubled(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return self.unit(x, 2 * x)


def minimal(block):
    rf.set_memory(block, "minimal")
    return block


def shared():
    """One batch norm that is updated twice, which torch.compile takes where nothing is to be differentiated."""
    block = rf.BasicBlock(16, 16)
    block.bn2 = block.bn1
    return block


MADE = {
    **{name: (channels, lambda build=build: build()[0]) for name, (channels, build) in PAIRS.items()},
    "unit": (16, lambda: rf.ConvBNAct2d(16, 24, 3, 2)),
    "unit_shortcut": (16, with_shortcut),
    "pooled": (16, lambda: rf.BasicBlock(16, 24, 2, pooled(24))),
    "minimal": (16, lambda: minimal(pair("Bottleneck", 16, 8, 2, downsample(16, 32, 2))[0])),
    "shared": (16, shared),
    "one_channel": (1, lambda: rf.ResBlk(1, 8)),
}
KINDS = (
    "basic", "bottleneck_stride", "resnext", "frozen", "cumulative", "untracked", "no_affine", "resblk_stride",
    "resblk_no_relu", "unit", "unit_shortcut", "pooled", "minimal",
)  # fmt: skip


def run(module, x, grad, autocast, marked):
    """What comes out of a module: its output, the gradients, the buffers."""
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(grad)
    if marked:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = module(x)
    if grad:
        z.float().square().sum().backward()
    own = getattr(module, "_orig_mod", module)
    found = {"output": z.detach(), "input": x.grad}
    return found | {n: p.grad for n, p in own.named_parameters()} | {n: b.clone() for n, b in own.named_buffers()}


def batches(channels, layout, dtype=torch.float32):
    return [torch.randn(n, channels, *PLANE, dtype=dtype).to(memory_format=layout) for n in BATCHES]


def compare(module, twin, x, grad, autocast=False, marked=True):
    """Bit for bit: the operators run what the module runs."""
    found, expected = run(twin, x, grad, autocast, marked), run(module, x, grad, autocast, False)
    if x.shape[1] > 1:  # else both layouts are x's
        assert found["output"].stride() == expected["output"].stride()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.equal(found[name], value), name


def check(name, backend, training, grad, layout, autocast=False):
    channels, make = MADE[name]
    module = make().to(memory_format=layout).train(training)
    counter = CompileCounterWithBackend(backend)
    twin = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    # Within a network, activations have autocast's dtype; a float32 identity would make eager's result float32.
    for x in batches(channels, layout, torch.bfloat16 if autocast else torch.float32):
        with torch._dynamo.config.patch(error_on_recompile=True):
            compare(module, twin, x, grad, autocast)
    assert counter.frame_count == 1


MODES = {
    "train": dict(training=True, grad=True, layout=torch.channels_last),
    "train_contiguous_autocast": dict(training=True, grad=True, layout=torch.contiguous_format, autocast=True),
    "train_without_gradients": dict(training=True, grad=False, layout=torch.contiguous_format),
    "eval": dict(training=False, grad=True, layout=torch.contiguous_format),
    "eval_autocast": dict(training=False, grad=True, layout=torch.channels_last, autocast=True),
    "infer": dict(training=False, grad=False, layout=torch.channels_last),
    "infer_contiguous_autocast": dict(training=False, grad=False, layout=torch.contiguous_format, autocast=True),
}
INDUCTED = ("train", "train_contiguous_autocast", "infer")
# A FrozenBatchNorm2d's float32 buffers make eager's result float32: such blocks run composed.
COMPOSED = [("frozen", mode) for mode in MODES if "autocast" in mode]


@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in KINDS for m in MODES if (n, m) not in COMPOSED] + [("shared", "train_without_gradients")],
)
def test_one_compilation_for_all_batches(name, mode):
    check(name, "aot_eager", **MODES[mode])


@pytest.mark.slow(reason="the C++ that inductor writes is compiled")
@pytest.mark.parametrize("mode", INDUCTED)
def test_inductor_too(mode):
    check("bottleneck_stride", "inductor", **MODES[mode])


@pytest.mark.slow(reason="the C++ that inductor writes is compiled")
def test_inductor_takes_odd_layouts():
    check("one_channel", "inductor", **MODES["train"])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_marked(dynamic, grad):
    """The second size makes the batch dynamic; or all sizes are from the start."""
    module = MADE["basic"][1]().train(grad)
    counter = CompileCounterWithBackend("aot_eager")
    twin = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for x in batches(16, torch.channels_last):
        compare(module, twin, x, grad, marked=False)
        counts.append(counter.frame_count)
    # With dynamic=True torch.compile begins anew, once, when it finds momentum and eps to be constants; of eager, too.
    assert counts == ([1, 2, 2] if dynamic is None else [2, 2, 2])


@pytest.mark.parametrize("engine", ["library", "native"])
def test_backward_follows_the_engine_of_forward(engine, monkeypatch):
    module = MADE["bottleneck_stride"][1]().to(memory_format=torch.channels_last)
    twin = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, *PLANE).to(memory_format=torch.channels_last)
    calls = []
    for name in ("conv_dgrad", "convolution_backward"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    with rf.engine(engine):
        z = twin(x)
    z.sum().backward()
    assert set(calls) == {"conv_dgrad" if engine == "native" else "convolution_backward"}


def test_folded():
    block = rf.fold(pair("BasicBlock", 16, 16)[0].eval())
    twin = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in batches(16, torch.channels_last):
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(twin(x), block(x), atol=1e-5, rtol=1e-5)


def tensors(join):
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    units = [
        Unit(Conv(torch.randn(8, 8, 3, 3), padding=(1, 1)), Norm(*torch.rand(2, 8), *torch.rand(2, 8))),
        Unit(Conv(torch.randn(8, 8, 1, 1), torch.randn(8)), Norm(*torch.rand(2, 8), momentum=None)),
    ]
    return x, units, torch.randn_like(x) if join is Join.TENSOR else None


@pytest.mark.parametrize("join", Join)
def test_opcheck(join):
    x, units, shortcut = tensors(join)
    own, description = opaque.tensors_of(units), (*opaque.describe(units), "native", join.value, True)
    reads = block.reads_joined(units, join, True)
    forward = (x, shortcut, own, False, False, reads, *description)
    torch.library.opcheck(compiled._block_forward, forward)
    z, *found = compiled._block_forward(*forward)
    needs = [True, join is Join.TENSOR, *(t is not None for t in opaque.learnt(own))]
    mask = z if join is Join.TENSOR else None
    saved = x, mask, found[:2], found[2:4], opaque.learnt(own), needs
    torch.library.opcheck(compiled._block_backward, (torch.randn_like(z), *saved, False, False, reads, *description))
    frozen = [Unit(u.conv, Norm(*torch.rand(4, 8), batch_statistics=False)) for u in units]
    description = *opaque.describe(frozen), "auto", join.value, True
    torch.library.opcheck(inference._block_inference, (x, shortcut, opaque.tensors_of(frozen), *description))


def test_units_come_back_as_they_were():
    conv = Conv(torch.ones(4, 2, 3, 3), None, (2, 1), (1, 0), (1, 3), 2)
    units = [Unit(None, Norm(None, None, momentum=None)), Unit(conv, Norm(*torch.ones(4, 4), None, False, 0.5, 1e-3))]
    assert opaque.restore(opaque.tensors_of(units), *opaque.describe(units)) == units
    assert opaque.restore(opaque.tensors_of([Unit(conv, None)]), *opaque.describe([Unit(conv, None)]))[0].norm is None


def test_one_value_per_channel_is_refused():
    unit = torch.compile(rf.ConvBNAct2d(4, 4), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(torch.ones(1, 4, 1, 1))


@pytest.mark.parametrize("learns", ["gamma", "nothing"])
def test_frozen_norms(learns):
    """What is kept depends on what is learnt, which the operators are told: the gradients are eager's."""
    torch.manual_seed(0)
    block = rf.BasicBlock(8, 8).double().eval()
    for norm in (block.bn1, block.bn2):
        norm.requires_grad_(learns == "gamma")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    learnt = [x, *(p for p in block.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(block(x).square().sum(), learnt)
    found = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum(), learnt)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_constants_are_marked_as_torch_does_it():
    ours, theirs = assume_constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
