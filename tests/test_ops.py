# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Every operator of the vocabulary, on every device with kernels, against resnet_fused.reference on the CPU in float64.

The tests' tensors are the CPU's; :class:`Moved` carries them to a device and the results back.
"""

import os
import subprocess
import sys

import pytest
import torch
from thinning import slow_but

from resnet_fused import ops, reference
from resnet_fused.testing import FLOORS, errors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
SHAPES = [(1, 1, 5, 1), (2, 3, 7, 7), (4, 20, 1, 1), (3, 33, 13, 9), (2, 65, 5, 1), (1, 260, 4, 6), (8, 8, 40, 50)]
JOINS = ["none", "plain", "affine"]


class Moved:
    """The vocabulary on another device, for tensors of the CPU: arguments are moved there, results back.

    What an operator changes in place changes in the CPU's tensors.
    """

    def __init__(self, device):
        self.device = device

    def __getattr__(self, name):
        def call(*args, **kwargs):
            there = [self.to_device(a) for a in args]
            kwargs_there = {k: self.to_device(a) for k, a in kwargs.items()}
            result = getattr(ops, name)(*there, **kwargs_there)
            for here, moved in zip([*args, *kwargs.values()], [*there, *kwargs_there.values()], strict=True):
                if isinstance(here, torch.Tensor) and not torch.equal(here.nan_to_num(7), moved.cpu().nan_to_num(7)):
                    here.copy_(moved)
            return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

        return call

    def to_device(self, value):
        return value.to(self.device) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def kernels(device):
    """The vocabulary of ``device`` for tensors of the CPU."""
    return ops if device.type == "cpu" else Moved(device)


def merged(statistics):
    """Count, mean and M2 of all tiles together, in float64."""
    count, mean, m2 = statistics.double().unbind(1)
    total = count.sum(0)
    # About the first tile's mean, so that a large mean does not cancel.
    whole = mean[0] + (count * (mean - mean[0])).sum(0) / total
    return torch.stack((total, whole, (m2 + count * (mean - whole).square()).sum(0)))


def assert_near(actual, expected, dtype):
    """Within the dtype's floor alone: a kernel rounds once, on storing."""
    floor = FLOORS[dtype]
    e = errors(actual, expected)
    assert e.maximum <= floor and e.two_norm <= floor, f"{e} exceeds {floor}"


def activations(shape, dtype, layout, count=1, mean=0.5):
    tensors = [
        (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout) for _ in range(count)
    ]
    return tensors[0] if count == 1 else tensors


def table(y):
    """Coefficients such as a batch norm of y has."""
    c = y.shape[1]
    return ops.bn_finalize(
        ops.bn_statistics(y), torch.rand(c) + 0.5, torch.randn(c), None, None, None, 0.1, 1e-5
    )


def join_of(kind, y):
    if kind == "none":
        return {}
    s = torch.empty_like(y).copy_(torch.randn(y.shape))
    return {"shortcut": s} if kind == "plain" else {"shortcut": s, "shortcut_coefficients": table(s)}


def double(kwargs):
    return {k: v.double() for k, v in kwargs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(kernels, shape, dtype, layout):
    y = activations(shape, dtype, layout)
    actual, (expected,) = kernels.bn_statistics(y), reference.bn_statistics(y.double())
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual.dtype == acc and actual.shape[1:] == (3, shape[1])
    for a, e in zip(merged(actual), expected, strict=True):
        assert_near(a, e, acc)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_with_large_mean(kernels, layout):
    y = (torch.randn(4, 16, 31, 17) + 1000).contiguous(memory_format=layout)
    _, mean, m2 = merged(kernels.bn_statistics(y))
    _, expected_mean, expected_m2 = reference.bn_statistics(y.double())[0]
    assert_near(mean, expected_mean, torch.float32)
    assert errors(m2, expected_m2).maximum < 1e-4  # E[x^2] - E[x]^2 in float32 is off by 6e-2 here


@pytest.mark.parametrize("value", [1234.567, 1e20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_constant_are_exact(kernels, layout, value):
    y = torch.full((2, 5, 9, 11), value).contiguous(memory_format=layout)
    for _, mean, m2 in kernels.bn_statistics(y):
        assert torch.equal(mean, torch.full((5,), value)) and not m2.any()


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16, None])
def test_finalize(kernels, momentum, running):
    y = torch.randn(4, 12, 6, 5)
    weight, bias = torch.rand(12), torch.randn(12)
    # Merging in any number of tiles gives the statistics of the whole.
    tiles = torch.cat([kernels.bn_statistics(part) for part in y.split((1, 2, 1))])
    buffers = [None] * 3
    if running is not None:
        buffers = [torch.randn(12).to(running), torch.rand(12).to(running), torch.tensor(6)]
    expected_buffers = [None if b is None else b.float() for b in buffers]
    actual = kernels.bn_finalize(tiles, weight, bias, *buffers, momentum, 1e-3)
    if running is not None:
        factor = 1 / 7 if momentum is None else momentum
        torch.nn.functional.batch_norm(y, *expected_buffers[:2], None, None, True, factor, 1e-3)
        assert buffers[2] == 7
        for a, e in zip(buffers[:2], expected_buffers[:2], strict=True):
            assert_near(a, e.double(), running)
    expected = reference.bn_finalize(
        reference.bn_statistics(y.double()), weight.double(), bias.double(), None, None, None, 0.1, 1e-3
    )
    assert_near(actual, expected, torch.float32)


# Up to 512 tiles are merged at once on CUDA, beyond that in groups; the uneven numbers leave groups of unequal size.
@pytest.mark.parametrize("tiles", [1, 15, 129, 512, 513, 1511])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_tiles(kernels, dtype, tiles):
    channels = 37
    counts = torch.randint(0, 4, (tiles, 1)).expand(tiles, channels).to(dtype)  # some of them empty
    counts[-1] = 3
    statistics = torch.stack((counts, 1 + torch.randn(tiles, channels).to(dtype), counts * torch.rand(channels)), 1)
    statistics *= (counts > 0)[:, None]
    actual = kernels.bn_finalize(statistics, None, None, None, None, None, 0.1, 1e-3)
    expected = reference.bn_finalize(statistics.double(), None, None, None, None, None, 0.1, 1e-3)
    assert_near(actual, expected, dtype)
    actual = kernels.bn_merge_statistics(statistics)
    assert actual.shape == (1, 3, channels)
    assert_near(actual, reference.bn_merge_statistics(statistics.double()), dtype)

    assert not kernels.bn_merge_statistics(torch.zeros(tiles, 3, channels, dtype=dtype)).any()

    table = torch.rand(4, channels, dtype=dtype)
    for branch in (0, 1):
        sums = torch.randn(tiles, 2 + branch, channels, dtype=dtype)
        actual = kernels.bn_backward_finalize(sums, table, branch, 1000, True)
        expected = reference.bn_backward_finalize(sums.double(), table.double(), branch, 1000, True)
        assert_near(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("processes", [1, 3, 70])
def test_sums_of_several_processes(kernels, dtype, processes):
    channels = 37
    coefficients = torch.rand(4, channels, dtype=dtype)
    for branches in (1, 2):
        gathered = torch.randn(processes, 2 * branches + 1, channels, dtype=dtype)
        gathered[:, -1] = torch.randint(0, 3, (processes, 1))  # some of them have no values
        gathered[-1, -1] = 7
        for branch in range(branches):
            own = torch.randn(5, channels, dtype=dtype)
            actual = kernels.bn_backward_merge_(own.clone(), gathered, coefficients, branch)
            expected = reference.bn_backward_merge_(own.double(), gathered.double(), coefficients.double(), branch)
            assert torch.equal(actual[:3], own[:3])  # gradients of gamma and beta are a process's own
            assert_near(actual[3:], expected[3:], dtype)


def test_parts_of_a_batch_merge_to_the_whole(kernels):
    """What processes exchange, computed here by one: of unequal parts, of which one is empty."""
    y, grad = activations((7, 20, 9, 5), torch.float32, torch.channels_last, 2)
    parts = [(y[a:b], grad[a:b]) for a, b in ((0, 4), (4, 4), (4, 5), (5, 7))]
    weight, bias = torch.rand(20), torch.randn(20)

    def backward(y, grad, coefficients):
        _, sums, _ = kernels.bn_backward_reduce(grad, y, coefficients, relu=True)
        return kernels.bn_backward_finalize(sums, coefficients, 0, max(len(y) * 45, 1), True)

    merged = [kernels.bn_merge_statistics(kernels.bn_statistics(part)) for part, _ in parts]
    found, whole = (
        kernels.bn_finalize(statistics, weight, bias, torch.ones(20), torch.ones(20), torch.tensor(3), None, 1e-5)
        for statistics in (torch.cat(merged), kernels.bn_statistics(y))
    )
    assert_near(found, whole.double(), torch.float32)
    own = [backward(*part, found) for part in parts]
    counts = [torch.full((1, 20), float(len(part) * 45)) for part, _ in parts]
    gathered = torch.stack([torch.cat((b[:2], count)) for b, count in zip(own, counts, strict=True)])
    expected = backward(y, grad, found)
    for b in own:
        assert_near(kernels.bn_backward_merge_(b, gathered, found, 0)[2:], expected[2:].double(), torch.float32)
    assert_near(gathered[:, :2].sum(0), expected[:2].double(), torch.float32)


def test_coefficients(kernels):
    mean, var, weight, bias = torch.randn(7), torch.rand(7), torch.rand(7), torch.randn(7)
    args = (mean, var, weight, bias)
    for dtype in DTYPES:
        actual = kernels.bn_coefficients(*args, 1e-5, dtype)
        expected = reference.bn_coefficients(*(v.double() for v in args), 1e-5, torch.float64)
        assert actual.dtype == ops.acc_dtype(dtype)
        assert_near(actual, expected, actual.dtype)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply(kernels, shape, dtype, layout, join, relu):
    y = activations(shape, dtype, layout)
    coefficients, kwargs = table(y), join_of(join, y)
    z = kernels.bn_apply(y, coefficients, relu=relu, **kwargs)
    assert z.dtype == dtype and z.stride() == y.stride()
    assert_near(z, reference.bn_apply(y.double(), coefficients.double(), relu=relu, **double(kwargs)), dtype)


@pytest.mark.parametrize("mask", ["none", "recomputed", "output"])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(kernels, shape, dtype, layout, join, mask):
    y, grad = activations(shape, dtype, layout, 2)
    coefficients, kwargs = table(y), join_of(join, y)
    relu, count = mask != "none", y.numel() // y.shape[1]
    z = kernels.bn_apply(y, coefficients, relu=relu, **kwargs) if mask == "output" else None
    wide = (grad.double(), y.double(), coefficients.double())
    # The reference's mask comes from the very output of forward: a sign is a sign.
    wide_z = kernels.bn_apply(y, coefficients, relu=True, **kwargs).double() if relu else None

    masked, sums, _ = kernels.bn_backward_reduce(grad, y, coefficients, z=z, relu=relu, write_grad=True, **kwargs)
    nothing, again, unwritten = kernels.bn_backward_reduce(grad, y, coefficients, z=z, relu=relu, **kwargs)
    wide_kwargs = double(kwargs)
    expected, expected_sums, _ = reference.bn_backward_reduce(
        *wide, z=wide_z, relu=relu, write_grad=True, **wide_kwargs
    )
    assert torch.equal(masked.double(), expected)
    assert nothing.numel() == unwritten.numel() == 0 and torch.equal(sums, again)
    if join == "none":
        g, same, activation = kernels.bn_backward_reduce(
            grad, y, coefficients, z=z, relu=relu, write_grad=True, write_activation=True
        )
        assert torch.equal(g, masked) and torch.equal(same, sums)
        assert torch.equal(activation, kernels.bn_apply(y, coefficients, relu=True))
        assert activation.stride() == y.stride()
    # A sum cancels: what it may be off by is relative to the sum of its terms' sizes.
    terms = reference.bn_backward_reduce(
        wide[0].abs(), wide[1], wide[2], z=wide_z, relu=relu, **wide_kwargs
    )[1].abs().max()
    whole = sums.double().sum(0, keepdim=True)
    assert errors(whole, expected_sums, scale=terms).maximum * expected_sums.abs().max() <= 1e-6 * terms + 1e-6

    for statistics in (True, False):
        backward = kernels.bn_backward_finalize(sums, coefficients, 0, count, statistics)
        assert_near(
            backward,
            reference.bn_backward_finalize(sums.double(), coefficients.double(), 0, count, statistics),
            torch.float32 if dtype != torch.float64 else dtype,
        )
        expected_dy = reference.bn_backward_apply(
            *wide, backward.double(), z=wide_z, relu=relu, batch_statistics=statistics
        )
        if join != "affine":
            shortcut = kwargs.get("shortcut")
            dy = kernels.bn_backward_apply(grad, y, coefficients, backward, shortcut, z, relu, statistics)
            assert dy.stride() == y.stride()
            assert_near(dy, expected_dy, dtype)
            over = kernels.bn_backward_apply_(
                grad.clone(), y, coefficients, backward, shortcut, z, relu, statistics
            )
            assert torch.equal(over, dy)
        else:
            other = kernels.bn_backward_finalize(sums, kwargs["shortcut_coefficients"], 1, count, not statistics)
            dy, ds = kernels.bn_backward_apply_pair(
                grad, y, coefficients, backward, *kwargs.values(), other, relu, statistics, not statistics, z
            )
            assert_near(dy, expected_dy, dtype)
            s = kwargs["shortcut"].double()
            expected_ds = reference.bn_backward_apply(
                wide[0], s, wide[2], other.double(), z=wide_z, relu=relu, batch_statistics=not statistics
            )
            assert_near(ds, expected_ds, dtype)
    if relu and join != "affine":
        out = torch.empty_like(y).copy_(torch.randn(y.shape))
        expected_sum = out.double() + expected
        kernels.relu_backward_add_(out, grad, y, coefficients, kwargs.get("shortcut"), z)
        assert_near(out, expected_sum, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kernels, dtype, layout):
    y = torch.zeros(1, 4, 3, 5, dtype=dtype).contiguous(memory_format=layout)
    y[0, 0, 0, 0], y[0, 1, 1, 1], y[0, 2, 2, 2] = float("nan"), float("inf"), float("-inf")
    coefficients = torch.zeros(4, 4, dtype=ops.acc_dtype(dtype))
    coefficients[2] = 1
    assert torch.equal(kernels.bn_apply(y, coefficients).nan_to_num(7), y.nan_to_num(7))
    z = kernels.bn_apply(y, coefficients, relu=True)
    assert z[0, 0, 0, 0].isnan() and z[0, 1, 1, 1].isinf() and z[0, 2, 2, 2] == 0
    grad = torch.ones_like(y)
    masked, _, activation = kernels.bn_backward_reduce(
        grad, y, coefficients, relu=True, write_grad=True, write_activation=True
    )
    assert torch.equal(activation.nan_to_num(7), z.nan_to_num(7))
    x = y.clone().requires_grad_()
    torch.relu(x).backward(grad)
    assert torch.equal(masked, x.grad)


def test_sixteen_bit_rounding_is_atens(kernels):
    """All 65536 bit patterns, and floats around every one of them: storing rounds to nearest, ties to even."""
    identity = torch.zeros(4, 1)
    identity[2] = 1
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 256, 256)
        assert torch.equal(kernels.bn_apply(patterns, identity).nan_to_num(9), patterns.nan_to_num(9))
        # scale * y in float32 falls between the type's values, ties (1 + 2^-k) included.
        for scale in (1.0 + 2.0**-11, 1.0 + 2.0**-8, 1.5, 1 / 3, 1 + 2.0**-12):
            scaled = identity.clone()
            scaled[2] = scale
            expected = (patterns.float() * scaled[2]).to(dtype)
            assert torch.equal(kernels.bn_apply(patterns, scaled).nan_to_num(9), expected.nan_to_num(9)), scale


def test_results_do_not_depend_on_threads():
    y, grad = activations((8, 48, 28, 28), torch.float32, torch.channels_last, 2)
    threads = torch.get_num_threads()

    def run():
        coefficients = table_of_ones(y)
        return [
            ops.bn_statistics(y),
            ops.bn_apply(y, coefficients, relu=True),
            *ops.bn_backward_reduce(grad, y, coefficients, relu=True, write_grad=True),
        ]

    def table_of_ones(y):
        return ops.bn_finalize(ops.bn_statistics(y), None, None, None, None, None, 0.1, 1e-5)

    first = run()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), n
    finally:
        torch.set_num_threads(threads)


def not_had(capability):
    had = capability == "default" or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return None if had else "this processor has no AVX2"


@pytest.mark.skip_where(reason=not_had)
@pytest.mark.parametrize("capability", slow_but(["default"], ["default", "avx2"], "half of this file's tests anew"))
def test_other_instruction_sets(capability):
    """The kernels for older processors pass the same tests, in a process that is told to use them."""
    expected = {"default": "baseline", "avx2": "avx2"}[capability]
    script = f"""
import sys, pytest, resnet_fused
assert resnet_fused.build_info()["cpu_instruction_set"] == "{expected}"
sys.exit(pytest.main(sys.argv[1:]))
"""
    # One shape of each test: -k excludes this test itself.
    chosen = "(statistics or apply or backward or special or rounding) and not instruction"
    quick = ["-k", chosen, "-m", "not cuda and not slow and not further", "-q", "-x", "-p", "no:cacheprovider"]
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    subprocess.run([sys.executable, "-c", script, __file__, *quick], env=environment, check=True)


@pytest.mark.slow(reason="4 GB, read several times")
def test_more_than_two_to_the_31_elements():
    shape = (1, 2, 2**15 + 1, 2**15)
    y = torch.zeros(shape, dtype=torch.bfloat16)
    y[0, 1, -1] = 3
    statistics = ops.bn_statistics(y)[0]
    count = shape[2] * shape[3]
    assert y.numel() > 2**31
    mean = 3 * shape[3] / count
    assert statistics[1, 0] == 0 and abs(statistics[1, 1].item() / mean - 1) < 1e-5
    identity = torch.zeros(4, 2)
    identity[2] = 1
    z = ops.bn_apply(y, identity, relu=True)
    assert (z[0, 1, -1] == 3).all() and z[0, 1, -2, -1] == 0 and z[0, 0, 0, 0] == 0


def samples(grad_layout):
    y, grad, s = activations((2, 6, 5, 4), torch.float32, grad_layout, 3)
    coefficients, other = table(y), table(s)
    z = ops.bn_apply(y, coefficients, s, relu=True)
    _, sums, _ = ops.bn_backward_reduce(grad, y, coefficients, s, other)
    backward = ops.bn_backward_finalize(sums, coefficients, 0, 40, True)
    second = ops.bn_backward_finalize(sums, other, 1, 40, True)
    weight, bias, mean, var = torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6)
    return {
        "bn_statistics": (y,),
        "bn_merge_statistics": (ops.bn_statistics(y).repeat(3, 1, 1),),
        "bn_finalize": (ops.bn_statistics(y), weight, bias, mean, var, torch.tensor(3), 0.1, 1e-5),
        "bn_coefficients": (mean, var, weight, bias, 1e-5, torch.float32),
        "bn_apply": (y, coefficients, s, other, True),
        "bn_backward_reduce": (grad, y, coefficients, s, None, z, True, True),
        "bn_backward_reduce, activation": (grad, y, coefficients, None, None, None, True, False, True),
        "bn_backward_finalize": (sums, coefficients, 0, 40, True),
        "bn_backward_merge_": (backward.clone(), torch.rand(2, 3, 6), coefficients, 0),
        "bn_backward_apply": (grad, y, coefficients, backward, s, z, True, True),
        "bn_backward_apply_": (grad.clone(), y, coefficients, backward, s, None, True, True),
        "bn_backward_apply_pair": (grad, y, coefficients, backward, s, other, second, True, True, False),
        "bn_backward_apply_pair, z": (grad, y, coefficients, backward, s, other, second, True, True, False, z),
        "relu_backward_add_": (grad.clone(), grad, y, coefficients, s, None),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", samples(torch.channels_last))
def test_opcheck(name, layout):
    operator = getattr(torch.ops.resnet_fused, name.partition(",")[0])
    torch.library.opcheck(operator.default, samples(layout)[name])


def test_operators_have_no_silent_derivative():
    y = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        ops.bn_statistics(y).sum().backward()


def test_every_layout_is_accepted():
    base = torch.randn(2, 8, 10, 12)
    coefficients = table(base[:, ::2, 1:-1, ::3])
    for y in (base[:, ::2, 1:-1, ::3], base[:1, :4, :8, :4].expand(3, 4, 8, 4), base.transpose(2, 3)[:, :4]):
        assert_near(
            ops.bn_apply(y, coefficients, y, relu=True),
            reference.bn_apply(y.double(), coefficients.double(), y.double(), relu=True),
            torch.float32,
        )
        assert_near(ops.bn_statistics(y)[0, 1], reference.bn_statistics(y.double())[0, 1], torch.float32)


Y = torch.ones(2, 3, 4, 4)
TABLE = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.bn_statistics(torch.ones(3, 4)), ValueError, r"y: expected a \[N, C, H, W\]"),
        (lambda: ops.bn_statistics(Y.int()), TypeError, "y: expected float64.*got Int"),
        (lambda: ops.bn_apply(Y, torch.ones(4, 2)), ValueError, r"coefficients: expected shape \[4, 3\]"),
        (lambda: ops.bn_apply(Y, TABLE.double()), TypeError, "coefficients: expected dtype Float"),
        (lambda: ops.bn_apply(Y, TABLE, Y[:1]), ValueError, "shortcut: expected the shape of y"),
        (lambda: ops.bn_apply(Y, TABLE, Y.double()), TypeError, "shortcut: expected the dtype of y"),
        (lambda: ops.bn_apply(Y, TABLE, None, TABLE), ValueError, "shortcut_coefficients: given without"),
        (lambda: ops.bn_apply(Y, TABLE, Y, TABLE[:, :2]), ValueError, "shortcut_coefficients: expected shape"),
        (
            lambda: ops.bn_finalize(torch.ones(1, 2, 3), None, None, None, None, None, 0.1, 1e-5),
            ValueError,
            r"statistics: expected shape \[tiles, 3, C\]",
        ),
        (
            lambda: ops.bn_finalize(torch.ones(1, 3, 3), None, None, None, None, None, 0.1, -1.0),
            ValueError,
            "eps: expected a number >= 0, got -1",
        ),
        (
            lambda: ops.bn_finalize(torch.ones(1, 3, 3), torch.ones(2), None, None, None, None, 0.1, 1.0),
            ValueError,
            r"weight: expected shape \[3\], got \[2\]",
        ),
        (
            lambda: ops.bn_finalize(
                torch.ones(1, 3, 3), None, None, torch.ones(3), torch.ones(3), None, None, 1.0
            ),
            ValueError,
            "momentum: None, the cumulative average, needs num_batches_tracked",
        ),
        (lambda: ops.bn_apply(Y, TABLE.to("meta")), ValueError, "coefficients: expected the device of y, cpu"),
        (lambda: ops.bn_apply(Y.to("meta"), TABLE), ValueError, "coefficients: expected the device of y, meta"),
        (lambda: ops.bn_backward_reduce(Y[:1], Y, TABLE), ValueError, "grad: expected the shape of y"),
        (
            lambda: ops.bn_backward_reduce(Y, Y, TABLE, Y, write_activation=True),
            ValueError,
            "write_activation: expected no shortcut",
        ),
        (
            lambda: ops.bn_backward_finalize(torch.ones(1, 2, 3), TABLE, 1, 4, True),
            ValueError,
            "branch: expected 0 to 0, got 1",
        ),
        (lambda: ops.bn_merge_statistics(torch.ones(2, 4, 3)), ValueError, r"statistics: expected shape \[tiles, 3, C"),
        (lambda: ops.bn_merge_statistics(torch.ones(2, 3, 3).int()), TypeError, "statistics: expected float32 or floa"),
        (
            lambda: ops.bn_backward_merge_(torch.ones(5, 3), torch.ones(2, 4, 3), TABLE, 0),
            ValueError,
            r"gathered: expected shape \[processes, 3 or 5, C\], got \[2, 4, 3\]",
        ),
        (
            lambda: ops.bn_backward_merge_(torch.ones(5, 3), torch.ones(2, 3, 3), TABLE, 1),
            ValueError,
            "branch: expected 0 to 0, got 1",
        ),
        (
            lambda: ops.bn_backward_merge_(torch.ones(5, 2), torch.ones(2, 3, 3), TABLE, 0),
            ValueError,
            r"backward_coefficients: expected shape \[5, 3\]",
        ),
        (
            lambda: ops.bn_backward_apply_(Y[:, :, :, ::2], Y[:, :, :, ::2], TABLE, torch.ones(5, 3)),
            ValueError,
            "grad: expected a dense tensor",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("plane", [(1, 1), (7, 7), (9, 11), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_convolution_as_matrix_product(dtype, plane, layout):
    x = torch.randn(3, 16, *plane, dtype=dtype).to(memory_format=layout)
    weight, bias = torch.randn(24, 16, 1, 1, dtype=dtype), torch.randn(24, dtype=dtype)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    y = ops.convolution(x, weight, bias, *geometry)
    eager = torch.conv2d(x, weight, bias)
    assert y.shape == eager.shape and y.stride() == eager.stride()
    exact = torch.conv2d(x.double(), weight.double(), bias.double())
    bound = 2 * (eager - exact).abs().max() + torch.finfo(dtype).tiny
    assert (y - exact).abs().max() <= bound

    grad = torch.randn_like(y)
    no_grads = (None, None)
    assert ops.convolution_backward(grad, x, weight, *geometry, False, False) == no_grads
    for needs in [(True, True), (True, False), (False, True)]:
        found = ops.convolution_backward(grad, x, weight, *geometry, *needs)
        mask = (*needs, False)
        arguments = (None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, mask)
        aten = torch.ops.aten.convolution_backward
        expected = aten(grad, x, weight, *arguments)
        exact = aten(grad.double(), x.double(), weight.double(), *arguments)
        for need, f, e, t in zip(needs, found, expected, exact, strict=False):
            assert (f is not None) == need
            if need:
                assert f.shape == e.shape and f.dtype == e.dtype
                assert (f - t).abs().max() <= 2 * (e - t).abs().max() + torch.finfo(dtype).eps
