# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The CPU's native convolutions beside their numbers: threads, instruction sets, packed weights, and who chooses."""

import os
import subprocess
import sys

import pytest
import torch
from native import needs_native, not_multiplied
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.choice import Use, native_is_faster
from resnet_fused.testing import FLOORS, assert_close, errors

GEOMETRY = ((1, 1), (1, 1), (1, 1))


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


pytestmark = needs_native


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = {  # N, C, H, W, K, filter, stride: direct, Winograd's, both kinds of wgrad
    "pointwise": (3, 72, 30, 30, 40, 1, 1),
    "strided": (3, 40, 21, 20, 72, 3, 2),
    "winograd": (3, 48, 30, 29, 80, 3, 1),
    "winograd_4x4": (3, 48, 54, 53, 80, 3, 1),
    "wide": (2, 320, 14, 14, 320, 3, 1),
    "wide_pointwise": (3, 640, 9, 9, 768, 1, 1),
    "few_pixels": (2, 75, 15, 13, 200, 3, 2),
    "narrowing_pointwise": (4, 1024, 14, 14, 512, 1, 1),
}


def all_passes(name, dtype):
    """A function of a factor for the activation that runs every pass of a shape."""
    n, c, h, w, k, taps, stride = SHAPES[name]
    geometry = ((stride, stride), (taps // 2, taps // 2), (1, 1))
    x, weight = channels_last(n, c, h, w, dtype=dtype), channels_last(k, c, taps, taps, dtype=dtype)
    table, affine, backward = torch.rand(4, c), torch.rand(4, k), torch.rand(5, k)
    y, _ = ops.conv_fprop(x, table, weight, None, *geometry)
    grad = torch.randn_like(y)

    def run(factor=1.0):
        a, g = x * factor, grad * factor
        return (
            *ops.conv_fprop(a, table, weight, None, *geometry),
            ops.conv_fprop_inference(a, table, weight, affine, g, True, *geometry),
            *ops.conv_dgrad(g, y, backward, weight, (h, w), *geometry, a, a, table),
            ops.conv_wgrad(g, y, backward, a, table, (taps, taps), *geometry, torch.float32),
        )

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_left_in_the_scratch(name, dtype):
    """The memory pool's blocks of all sizes hold NaNs when a convolution takes them, and nobody reads them."""
    run = all_passes(name, dtype)
    expected = run()
    sizes = [int(2**18 * 1.1**i) for i in range(36)]  # values, from 1 MiB on
    held = [ops.bn_apply(torch.full((1, 1, 1, n), float("nan")), torch.ones(4, 1)) for n in sizes]
    assert all(t.isnan().all() for t in held)
    del held
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_for_any_number_of_threads(threads, name, dtype):
    run = all_passes(name, dtype)

    found = []
    for count in (1, 2, 8):
        threads(count)
        found.append(run())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# N, C, plane, K, filter, stride: pixels of full vectors and 0 to 5 more, channels that are gathered in parts.
FEW_PIXELS = [
    (1, 520, (7, 7), 130, 1, 1),
    (2, 300, (5, 5), 200, 1, 1),
    (1, 600, (3, 17), 128, 1, 1),
    (1, 290, (2, 2), 128, 3, 1),
    (1, 260, (4, 13), 192, 3, 1),
    (1, 270, (13, 13), 140, 3, 2),
    (1, 1030, (8, 8), 128, 1, 1),
    (1, 257, (1, 53), 129, 1, 1),
    (4, 513, (7, 7), 128, 1, 1),
]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", FEW_PIXELS, ids=str)
def test_inference_on_few_pixels(shape, normalised):
    n, c, plane, k, taps, stride = shape
    geometry = (stride,) * 2, (taps // 2,) * 2, (1, 1)
    x, weight = channels_last(n, c, *plane), channels_last(k, c, taps, taps)
    table, affine = torch.rand(4, c), torch.rand(4, k)
    a = (x * table[2].view(1, -1, 1, 1) + table[3].view(1, -1, 1, 1)).relu() if normalised else x
    exact = torch.conv2d(a.double(), weight.double(), None, *geometry)
    shortcut = channels_last(*exact.shape)
    exact = (exact * affine[2].view(1, -1, 1, 1) + affine[3].view(1, -1, 1, 1) + shortcut).relu()
    arguments = (x, table if normalised else None, weight, affine, shortcut, True, *geometry)
    for packed in (None, ops.conv_pack(weight, torch.float32, *geometry)):
        z = ops.conv_fprop_inference(*arguments, packed)
        assert errors(z, exact).maximum <= 4 * FLOORS[torch.float32]


# Every pass of a direct and of a Winograd convolution against float64; prints the instruction set and what is native.
PASSES = """
import torch, resnet_fused as rf
from resnet_fused import ops
from torch.nn.grad import conv2d_input, conv2d_weight
torch.manual_seed(0)
x = torch.randn(2, 24, 27, 26).to(memory_format=torch.channels_last)
worst = 0.0
for stride in (1, 2):
    weight = torch.randn(40, 24, 3, 3)
    geometry = ((stride,) * 2, (1, 1), (1, 1))
    exact = torch.conv2d(x.double(), weight.double(), None, *geometry)
    y, _ = ops.conv_fprop(x, None, weight, None, *geometry)
    grad = torch.randn_like(y)
    dx, _ = ops.conv_dgrad(grad, None, None, weight, (27, 26), *geometry)
    dw = ops.conv_wgrad(grad, None, None, x, None, (3, 3), *geometry, torch.float32)
    of_x = conv2d_input(x.shape, weight.double(), grad.double(), *geometry)
    of_weight = conv2d_weight(x.double(), weight.shape, grad.double(), *geometry)
    for found, expected in ((y, exact), (dx, of_x), (dw, of_weight)):
        worst = max(worst, float((found.double() - expected).abs().max() / expected.abs().max()))
half = torch.ones(1, 8, 1, 1, dtype=torch.bfloat16)
reason = ops.native_reason(half, half, (1, 1), (0, 0), (1, 1), 1)
print(rf.build_info()["cpu_instruction_set"], worst, reason or "native", sep="|")
"""


def run_passes(**environment):
    found = subprocess.run(
        [sys.executable, "-c", PASSES], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    instruction_set, worst, bfloat16 = found.stdout.strip().split("|")
    assert float(worst) <= 4 * FLOORS[torch.float32]
    return instruction_set, bfloat16


def not_built(expected):
    return None if expected in rf.build_info()["cpu_instruction_sets"] else f"built without {expected}"


@pytest.mark.skip_where(reason=not_built)
@pytest.mark.parametrize(("capability", "expected"), [("default", "baseline"), ("avx2", "avx2")])
def test_every_instruction_set(capability, expected):
    assert run_passes(ATEN_CPU_CAPABILITY=capability)[0] == expected


def test_a_processor_that_does_not_multiply_bfloat16_says_so():
    assert "no microkernel for torch.bfloat16" in run_passes(ONEDNN_MAX_CPU_ISA="AVX2")[1]


@pytest.mark.parametrize(("channels", "plane"), [(64, 56), (128, 28)])
def test_large_tiles_are_as_exact_as_policy_asks(channels, plane):
    """Winograd's 4x4 tiles against float64 and eager, behind a ReLU as in a network."""
    x = channels_last(3, channels, plane, plane).relu_()
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    exact = torch.conv2d(x.double(), weight.double(), padding=1)
    y, _ = ops.conv_fprop(x, None, weight, None, *GEOMETRY)
    assert_close("y", y, torch.conv2d(x, weight, padding=1), exact)
    grad = torch.randn_like(y)
    dx, _ = ops.conv_dgrad(grad, None, None, weight, (plane, plane), *GEOMETRY)
    dw = ops.conv_wgrad(grad, None, None, x, None, (3, 3), *GEOMETRY, torch.float32)
    eager = [conv2d_input(x.shape, weight, grad, padding=1), conv2d_weight(x, weight.shape, grad, padding=1)]
    x, weight, grad = x.double(), weight.double(), grad.double()
    assert_close("dx", dx, eager[0], conv2d_input(x.shape, weight, grad, padding=1))
    assert_close("dw", dw, eager[1], conv2d_weight(x, weight.shape, grad, padding=1))


@pytest.mark.parametrize("plane", [8, 56])
def test_what_is_not_finite_stays_in_the_tiles_that_read_it(plane):
    """At least where eager has it, and no further than a tile of 4x4 results reaches."""
    x, weight = channels_last(2, 64, plane, plane), channels_last(64, 64, 3, 3)
    x[1, 5, plane // 2, 3] = float("inf")
    y, _ = ops.conv_fprop(x, None, weight, None, *GEOMETRY)
    found, expected = ~y.isfinite(), ~torch.conv2d(x, weight, padding=1).isfinite()
    assert found[expected].all()
    near = nn.functional.max_pool2d(expected.float(), 7, 1, 3) > 0
    assert not found[~near].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [1, 3])
def test_packed_weights(taps, dtype):
    """The same convolution for inputs of any size, whatever dtype the weight comes in."""
    geometry = ((1, 1), (taps // 2, taps // 2), (1, 1))
    weight, affine = channels_last(40, 24, taps, taps), torch.rand(4, 40)
    packed = ops.conv_pack(weight, dtype, *geometry)
    again = ops.conv_pack(weight.to(dtype), dtype, *geometry)
    assert torch.equal(packed.view(torch.uint8), again.view(torch.uint8))
    for shape in ((1, 24, 3, 3), (2, 24, 30, 31), (3, 24, 56, 56)):
        x = channels_last(*shape, dtype=dtype)
        arguments = (x, None, weight.to(dtype), affine, None, True, *geometry)
        z = ops.conv_fprop_inference(*arguments, packed)
        exact = torch.conv2d(x.double(), weight.to(dtype).double(), None, *geometry)
        exact = (exact * affine[2].view(1, -1, 1, 1) + affine[3].view(1, -1, 1, 1)).relu()
        assert errors(z, exact).maximum <= 4 * FLOORS[dtype]
    with pytest.raises(ValueError, match="packed: expected what conv_pack makes of this weight"):
        ops.conv_fprop_inference(*arguments, packed[:-1])
    with pytest.raises(TypeError, match="packed: expected the dtype of x"):
        ops.conv_fprop_inference(*arguments, packed.double())


def test_pack_refuses_other_dtypes():
    with pytest.raises(TypeError, match="weight: expected float32 or dtype"):
        ops.conv_pack(torch.ones(8, 8, 1, 1, dtype=torch.float64), torch.float32, (1, 1), (0, 0), (1, 1))


@pytest.mark.parametrize("use", list(Use))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_follows_the_table(use, dtype):
    """Each rule of resnet_fused.choice on a shape of either side."""
    weight3, one = (64, 64, 3, 3), ((1, 1), (1, 1), (1, 1))

    def faster(x, weight, geometry=one):
        return native_is_faster(use, dtype, x, weight, *geometry)

    stem = faster((16, 3, 224, 224), (64, 3, 7, 7), ((2, 2), (3, 3), (1, 1)))
    assert stem == (use is Use.BACKWARD)
    sizes = (16, 64, 56, 56), weight3
    winograd = ops.conv_algorithm(dtype, *sizes, *one, packed=use is Use.PACKED) == "winograd"
    assert faster(*sizes) == (use in (Use.BACKWARD, Use.FPROP) or winograd)
    direct = faster((32, 512, 7, 7), (512, 512, 3, 3))  # in bfloat16
    assert direct == (use in (Use.BACKWARD, Use.FPROP) or dtype == torch.float32)
    wide = (16, 256, 14, 14), (1024, 256, 1, 1), ((1, 1), (0, 0), (1, 1))
    registers = ops.conv_algorithm(dtype, *wide[:2], *wide[2], packed=True) == "registers"
    assert faster(*wide) == (use is not Use.PACKED or dtype == torch.float32 or registers)
    trains_float32 = use in (Use.BACKWARD, Use.FPROP) and dtype == torch.float32
    small = faster((1, 512, 7, 7), (512, 512, 3, 3))
    assert small == (not trains_float32)
    halved = ((2, 2), (1, 1), (1, 1))
    assert faster((1, 512, 14, 14), (512, 512, 3, 3), halved) == (not trains_float32)
    assert faster((1, 512, 7, 7), (2048, 512, 1, 1), ((1, 1), (0, 0), (1, 1)))
    assert faster((1, 512, 2, 2), (2048, 512, 1, 1), ((1, 1), (0, 0), (1, 1))) == (not trains_float32)
    assert faster((4, 512, 2, 2), (2048, 512, 1, 1), ((1, 1), (0, 0), (1, 1)))
    assert faster((1, 64, 16, 16), weight3) == (not trains_float32)  # PyTorch's plain product
    some = faster((1, 128, 28, 28), (128, 128, 3, 3), halved)
    assert some == (use in (Use.BACKWARD, Use.FPROP) or dtype == torch.bfloat16)


@pytest.mark.parametrize("engine", ["auto", "library", "native"])
def test_the_engine_rules(engine):
    """auto leaves the stem's forward to the library, not its wgrad; the others are wholly one or the other."""
    unit = rf.ConvBNAct2d(3, 16, 7, 2).to(memory_format=torch.channels_last)
    x = channels_last(2, 3, 32, 32)
    with rf.engine(engine), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        unit(x).sum().backward()
    names = {e.key for e in profile.key_averages()}
    assert ("resnet_fused::conv_fprop" in names) == (engine == "native")
    assert ("resnet_fused::conv_wgrad" in names) == (engine != "library")


@pytest.mark.skip_where(reason=lambda: not_multiplied(dtype=torch.bfloat16))
def test_autocast_casts_no_weight_of_a_native_convolution():
    """It is rounded while it is packed: to the same bits, without a copy."""
    block = rf.Bottleneck(32, 8).to(memory_format=torch.channels_last)
    x = channels_last(2, 32, 6, 6, dtype=torch.bfloat16)
    with rf.engine("native"), torch.autocast("cpu", torch.bfloat16):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            z = block(x)
        weights = [m.weight for m in block.modules() if isinstance(m, nn.Conv2d)]
        for w in weights:
            w.data = w.bfloat16().float()
    assert "aten::_to_copy" not in {e.key for e in profile.key_averages()}
    with rf.engine("native"), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), z)
