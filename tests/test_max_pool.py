# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Max pooling by this package's kernels: PyTorch's bits, and the networks in which `fuse` has it run."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from test_ops import not_had
from thinning import slow_but
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import resnet_fused as rf
from resnet_fused import ops, pooling
from resnet_fused.testing import assert_passed, compare_modules, observe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WINDOWS = {  # kernel_size, stride, padding, dilation, ceil_mode, and the input's plane
    "stem": (3, 2, 1, 1, False, (14, 11)),
    "halving": (2, None, 0, 1, False, (9, 8)),
    "ceil": (2, 2, 0, 1, True, (7, 9)),
    "ceil, a last window in the padding": (2, 3, 1, 1, True, (6, 8)),
    "overlapping": (5, 1, 2, 1, True, (6, 6)),
    "two numbers": ((3, 2), (1, 2), (1, 0), (1, 2), False, (9, 8)),
    "gaps": (1, (2, 3), 0, 1, False, (6, 7)),
    "as large as can be": ((15, 17), 2, (7, 8), 1, False, (20, 30)),
}
CHANNELS = [2, 16, 20, 37, 128, 150]  # below, at and beside the widths of vectors


def values(kind, shape, dtype):
    """Channels_last, of the kind that decides which of a window's values is the maximum."""
    x = torch.randn(shape)
    if kind == "ties":
        x = x.round()
    elif kind == "NaN":
        x[torch.rand(shape) < 0.1] = float("nan")
        x = torch.where(torch.rand(shape) < 0.5, x, -x)  # NaN of both signs
    elif kind == "-inf":
        x = torch.where(torch.rand(shape) < 0.05, x, -torch.inf)
    elif kind == "zeros of both signs":
        x = torch.where(x < 0, 0.0, -0.0)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_same_bits(a, b):
    """But for those of NaN."""
    assert a.dtype == b.dtype and a.stride() == b.stride()
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    assert torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])


def pooled(x, window, pool=pooling.max_pool2d):
    """The output and a function from its gradient to the input's."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = pool(x, *window[:5])
    assert z is not None
    return z, lambda grad: torch.autograd.grad(z, x, grad, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["normal", "ties", "NaN", "-inf", "zeros of both signs"])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_eagers(dtype, name, channels, kind):
    window = WINDOWS[name]
    x = values(kind, (2, channels, *window[5]), dtype)
    z, backward = pooled(x, window)
    expected, eager_backward = pooled(x, window, F.max_pool2d)
    assert z.grad_fn.name() == "_MaxPoolBackward"
    assert_same_bits(z, expected)
    with torch.no_grad():
        assert_same_bits(pooling.max_pool2d(x, *window[:5]), expected)
    grad = torch.randn(z.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        assert_same_bits(backward(grad), eager_backward(grad))
    else:  # eager rounds each sum; here float64's is rounded
        _, exact = pooled(x.double(), window, F.max_pool2d)
        assert_same_bits(backward(grad), exact(grad.double()).float().to(dtype))
    # A gradient of another layout, and one that is not dense.
    for other in (grad.contiguous(), grad[:1, :1, :1, :1].expand_as(grad)):
        assert torch.equal(backward(other), backward(other.contiguous(memory_format=torch.channels_last)))


@pytest.mark.skip_where(reason=not_had)
@pytest.mark.parametrize("capability", slow_but(["default"], ["default", "avx2"], "half of this file's tests anew"))
def test_other_instruction_sets(capability):
    quick = ["-k", "bits_are_eagers", "-m", "not further", "-q", "-p", "no:cacheprovider"]
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    subprocess.run([sys.executable, "-m", "pytest", __file__, *quick], env=environment, check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(dtype):
    x = values("ties", (2, 64, 57, 56), dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            z, backward = pooled(x, WINDOWS["stem"])
            found.append((z, backward(z.detach())))
    finally:
        torch.set_num_threads(before)
    for z, grad in found[1:]:
        assert torch.equal(z, found[0][0]) and torch.equal(grad, found[0][1])


def distinct(*shape):
    """Channels_last float32 whose values are a quarter or more apart: differences of their maxima are exact."""
    x = torch.randperm(torch.Size(shape).numel()).view(shape) / 4
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("name", ["stem", "ceil, a last window in the padding", "two numbers"])
def test_gradients(name):
    window = WINDOWS[name]
    x = distinct(1, 2, 6, 5)
    settings = {"eps": 2.0**-4, "atol": 1e-4, "rtol": 1e-4}

    def run(x):
        return pooling.max_pool2d(x.contiguous(memory_format=torch.channels_last), *window[:5])

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(run, x, fast_mode=False, **settings)
    grad = torch.randn_like(run(x), requires_grad=True)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradgradcheck(run, x, grad, **settings)


@pytest.mark.parametrize("name", WINDOWS)
def test_second_derivatives_and_batches_of_gradients_are_eagers(name):
    window = WINDOWS[name]
    x = distinct(2, 3, *window[5])
    found = []
    for pool in (pooling.max_pool2d, F.max_pool2d):
        z = pool(x, *window[:5])
        seeds = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
        (batch,) = torch.autograd.grad(z, x, seeds, is_grads_batched=True)
        found.append((grad, second, batch))
    for ours, eagers in zip(*found, strict=True):
        torch.testing.assert_close(ours, eagers)


def test_opcheck():
    x = values("normal", (2, 20, 9, 8), torch.float32)
    for window in (((3, 3), (2, 2), (1, 1), (1, 1), False), ((2, 2), (2, 3), (0, 1), (1, 1), True)):
        for write_taps in (True, False):
            torch.library.opcheck(torch.ops.resnet_fused.max_pool2d.default, (x, *window, write_taps))
        z, taps = ops.max_pool2d(x, *window, write_taps=True)
        torch.library.opcheck(torch.ops.resnet_fused.max_pool2d_backward.default, (z, taps, (9, 8), *window))


GOOD = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "ceil_mode": False}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kernel_size": (0, 3)}, ValueError, r"kernel_size: expected two numbers >= 1, got \[0, 3\]"),
        ({"kernel_size": (16, 16)}, ValueError, r"kernel_size: expected at most 255 positions, got \[16, 16\]"),
        ({"kernel_size": (9, 9)}, ValueError, r"kernel_size: expected a window within the input of 6 x 5, got"),
        ({"stride": (2, 0)}, ValueError, r"stride: expected two numbers >= 1, got \[2, 0\]"),
        ({"padding": (-1, 0)}, ValueError, r"padding: expected two numbers >= 0, got \[-1, 0\]"),
        ({"padding": (2, 1)}, ValueError, r"padding: expected at most half of the window, kernel_size \[3, 3\]"),
        ({"dilation": (1, 0)}, ValueError, r"dilation: expected two numbers >= 1, got \[1, 0\]"),
        ({"dtype": torch.float64}, TypeError, "expected float32, bfloat16 or float16, got float64"),
        ({"dtype": torch.int32}, TypeError, "expected float64, float32, bfloat16 or float16, got Int"),
        ({"x": (2, 6, 5)}, ValueError, r"expected a \[N, C, H, W\] tensor, got 3 dimensions"),
    ],
)
def test_operators_name_what_is_wrong(change, error, message):
    x = torch.zeros(change.get("x", (2, 4, 6, 5)), dtype=change.get("dtype", torch.float32))
    window = {name: change.get(name, value) for name, value in GOOD.items()}
    with pytest.raises(error, match=message):
        ops.max_pool2d(x, **window, write_taps=True)
    with pytest.raises(error, match=message):
        ops.max_pool2d_backward(x, torch.zeros_like(x, dtype=torch.uint8), (6, 5), **window)


def test_backward_operator_names_what_is_wrong():
    grad, taps = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    assert ops.max_pool2d_backward(grad, taps, (6, 5), **GOOD).shape == (2, 4, 6, 5)
    with pytest.raises(ValueError, match=r"grad: expected a plane of 4 x 3, got \[2, 4, 3, 3\]"):
        ops.max_pool2d_backward(grad, taps, (7, 5), **GOOD)
    with pytest.raises(ValueError, match=r"taps: expected the shape of grad, \[2, 4, 3, 3\], got \[2, 4, 3, 2\]"):
        ops.max_pool2d_backward(grad, taps[..., :2], (6, 5), **GOOD)
    with pytest.raises(TypeError, match="taps: expected uint8, got Int"):
        ops.max_pool2d_backward(grad, taps.int(), (6, 5), **GOOD)
    with pytest.raises(ValueError, match=r"input_plane: expected two numbers >= 1, got \[6\]"):
        ops.max_pool2d_backward(grad, taps, (6,), **GOOD)


class Marked(torch.Tensor):
    """A subclass that anybody may write."""


LEFT = {
    "contiguous": lambda x: (x.contiguous(), 3),
    "float64": lambda x: (x.double(), 3),
    "integers": lambda x: (x.int(), 3),
    "three dimensions": lambda x: (x[0], 3),
    "strided": lambda x: (x[:, :, ::2], 3),
    "empty batch": lambda x: (x[:0], 3),
    "another device": lambda x: (x.to("meta"), 3),
    "a subclass": lambda x: (x.as_subclass(Marked), 3),
    "over 255 positions": lambda x: (x, (16, 16)),
    "indices": lambda x: (x, 3, 2, 1, 1, False, True),
    "dilated padding": lambda x: (x, 2, 1, 1, 3),
    "too much padding": lambda x: (x, 2, 2, 2),
    "too large": lambda x: (x, (3, 15), (2, 40), 0, (12, 1)),
    "no stride": lambda x: (x, 2, 0),
    "one number in a tuple": lambda x: (x, 2, (0,)),
    "three numbers": lambda x: (x, (2, 2, 2)),
    "no number": lambda x: (x, "2"),
    "a fraction": lambda x: (x, 2.5),
}


@pytest.mark.parametrize("name", LEFT)
def test_all_else_is_left_to_pytorch(name):
    assert pooling.max_pool2d(*LEFT[name](values("normal", (2, 4, 20, 20), torch.float32))) is None


def test_engines():
    x = values("normal", (2, 4, 20, 20), torch.float32)
    for engine, ours in (("auto", True), ("library", True), ("native", True), ("reference", False)):
        with rf.engine(engine):
            assert (pooling.max_pool2d(x, 3) is not None) == ours


# ---------------------------------------------------------------------------------------------------------------
# In networks


class Net(nn.Module):
    """A stem that pools as its users do: by a module, or by one of the functions."""

    def __init__(self, by="module"):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, bias=False)
        self.bn = nn.BatchNorm2d(20)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.by = by

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        if self.by == "module":
            return self.pool(x)
        if self.by == "torch":
            return torch.max_pool2d(x, [3, 3], 2, 1)
        return F.max_pool2d(x, 3, stride=2, padding=1)


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that pooled."""
    made = []
    for name in ("max_pool2d", "max_pool2d_backward"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: made.append(n) or f(*a, **k))
    return made


def image(dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(2, 3, 15, 14).to(dtype, memory_format=layout)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("by", ["module", "torch", "functional"])
def test_fused_networks_pool_here(by, precision, gradients, calls):
    eager = Net(by).to(memory_format=torch.channels_last).train(gradients)
    x, autocast = image(), torch.bfloat16 if precision == "autocast" else None
    if precision == "bfloat16":
        eager, x = eager.bfloat16(), x.bfloat16()
    fused = copy.deepcopy(eager)
    rf.fuse(fused)
    assert_passed(compare_modules(fused, eager, x, autocast=autocast, gradients=gradients))
    assert calls == (["max_pool2d", "max_pool2d_backward"] if gradients else ["max_pool2d"])
    rf.unfuse(fused)
    fused(x)
    assert len(calls) == (2 if gradients else 1)


def test_only_the_pooling_differs(monkeypatch):
    """In float32 it doesn't: the whole network's bits are those that it has with PyTorch's pooling."""
    model = Net().to(memory_format=torch.channels_last)
    rf.fuse(model)
    x = image()
    ours = observe(model, x)
    monkeypatch.setattr(pooling, "max_pool2d", lambda *args: None)
    torchs = observe(model, x)
    assert ours.keys() == torchs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, torchs[name]), name


def test_kept_for_backward_is_a_byte_per_output():
    x = values("normal", (2, 32, 20, 20), torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = pooling.max_pool2d(x, 3, 2, 1)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, z.shape)]


class OwnPool(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) + 1


CHANGES = {
    "hook": lambda net: net.pool.register_forward_hook(lambda m, i, o: o * 2),
    "hook before": lambda net: net.pool.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "backward hook": lambda net: net.pool.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "forward": lambda net: setattr(net.pool, "forward", lambda x: x * 2),
    "another class": lambda net: setattr(net, "pool", OwnPool(3, 2, 1)),
    "class": lambda net: setattr(net.pool, "__class__", OwnPool),
    "average": lambda net: setattr(net, "pool", nn.AvgPool2d(2)),
    "kernel_size": lambda net: setattr(net.pool, "kernel_size", (2, 3)),
    "stride": lambda net: setattr(net.pool, "stride", 1),
    "padding": lambda net: setattr(net.pool, "padding", 0),
    "dilation": lambda net: setattr(net.pool, "dilation", (2, 1)),
    "ceil_mode": lambda net: setattr(net.pool, "ceil_mode", True),
    "return_indices": lambda net: setattr(net.pool, "return_indices", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_shows(name):
    net = Net().to(memory_format=torch.channels_last).eval()
    other = copy.deepcopy(net)
    rf.fuse(net)
    x = image()
    before = net(x)
    for model in (net, other):
        CHANGES[name](model)
    found, expected = net(x), other(x)
    if name == "return_indices":
        assert torch.equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    elif name != "backward hook":
        assert found.shape != before.shape or not torch.allclose(found, before)
    torch.testing.assert_close(found, expected)
    for z in (found, expected):
        z.sum().backward()
    torch.testing.assert_close(net.conv.weight.grad, other.conv.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("owner, name", [(F, "max_pool2d"), (torch, "max_pool2d"), (nn.MaxPool2d, "forward")])
def test_a_function_that_somebody_replaced_is_called(owner, name, monkeypatch):
    net = Net("torch" if owner is torch else "module").to(memory_format=torch.channels_last).eval()
    rf.fuse(net)
    with torch.no_grad():
        before = net(image())
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: torch.full((1,), 7.0))
        assert net(image()).tolist() == [7.0]
        monkeypatch.undo()
        assert net(image()).shape == before.shape


def test_errors_are_eagers():
    net, fused = (Net().to(memory_format=torch.channels_last) for _ in range(2))
    rf.fuse(fused)
    for model in (net, fused):
        model.pool.padding = 2
        with pytest.raises(RuntimeError, match="pad should be at most half of effective kernel size"):
            model(image())


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_compiled(mode, hooked):
    """In one graph with the rest, which without gradients has torch.compile's own pooling."""
    net = Net().to(memory_format=torch.channels_last).train(mode == "training")
    rf.fuse(net)
    if hooked:
        net.pool.register_forward_hook(lambda m, i, o: o * 2)
    other = copy.deepcopy(net)
    pools = []

    def note(graph, inputs):
        pools.extend(str(node.target) for node in graph.graph.nodes if "pool" in str(node.target))
        return make_boxed_func(graph)

    compiled = torch.compile(other, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True)
    x = image()
    with torch.set_grad_enabled(mode == "training"):
        z, expected = compiled(x), net(x)
    torch.testing.assert_close(z, expected)
    if mode == "training":
        z.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(other.conv.weight.grad, net.conv.weight.grad)
    here = ["resnet_fused.max_pool2d.default", "resnet_fused.max_pool2d_backward.default"]
    theirs = ["aten.max_pool2d_with_indices.default", "aten.max_pool2d_with_indices_backward.default"]
    expected_pools = here if mode == "training" and not hooked else theirs
    assert pools == (expected_pools if mode == "training" else expected_pools[:1])
