# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The native convolutions of each device: every pass, prologue and epilogue alone against float64, and whole blocks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from native import needs_native
from pairs import PAIRS, assert_policy
from simulator import needs_tensor_cores
from torch import nn

import resnet_fused as rf
from resnet_fused import functional, ops
from resnet_fused.functional import Conv, Norm, Unit
from resnet_fused.testing import FLOORS, compare_modules, errors

on_cuda = (pytest.mark.cuda, needs_tensor_cores)

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]


def rounding(dtype, device):
    """What one rounding of an operand or result may change. On a GPU float32's operands are rounded to TF32, both of
    them; on the CPU a sum of thousands of products is rounded at each step."""
    if dtype == torch.float32:
        return 2.0**-10 if device.type == "cuda" else 4 * FLOORS[dtype]
    return FLOORS[dtype]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_cuda)])
def device(request):
    return torch.device(request.param)


def dtype_of(device):
    """One that the device's native convolutions take."""
    return torch.float16 if device.type == "cuda" else torch.float32


# (N, C, H, W, K, filter, stride, padding, dilation)
GEOMETRIES = {
    "1x1": (2, 64, 14, 14, 64, 1, 1, 0, 1),
    "1x1_stride": (2, 40, 8, 8, 72, 1, 2, 0, 1),
    "3x3": (2, 16, 9, 7, 24, 3, 1, 1, 1),
    "3x3_one_image": (1, 128, 14, 13, 128, 3, 1, 1, 1),
    "3x3_stride": (1, 64, 13, 9, 136, 3, 2, 1, 1),
    "3x3_stride_even": (3, 8, 8, 10, 8, 3, 2, 1, 1),
    "3x3_stride_odd": (1, 8, 17, 17, 8, 3, 2, 1, 1),  # its four parities have 2, 2, 2 and 1 tiles in dgrad
    "3x3_stride_one_pixel": (2, 16, 1, 1, 16, 3, 2, 1, 1),
    "3x3_stride_of_rows": (1, 16, 17, 13, 16, 3, (2, 1), 1, 1),
    "1x1_stride_of_columns": (1, 8, 13, 17, 8, 1, (1, 2), 0, 1),
    "3x3_dilated": (3, 72, 7, 7, 64, 3, 1, 2, 2),
    "3x3_stride_dilated": (2, 32, 12, 12, 32, 3, 2, 2, 2),
    "3x3_no_padding": (2, 24, 6, 5, 8, 3, 1, 0, 1),
    "3x3_one_pixel": (4, 16, 1, 1, 16, 3, 1, 1, 1),
    "3x3_planes_of_half_a_stage": (3, 16, 4, 4, 24, 3, 1, 1, 1),
    "stem_7x7": (1, 8, 15, 15, 16, 7, 2, 3, 1),
    "5x1": (2, 8, 9, 9, 16, (5, 1), (1, 2), (2, 0), (1, 1)),
    "wide_to_narrow": (2, 2048, 2, 2, 8, 1, 1, 0, 1),
    "narrow_to_wide": (2, 8, 2, 2, 2048, 1, 1, 0, 1),
    "wide": (1, 512, 2, 2, 2048, 1, 1, 0, 1),
    "tile_128x64": (2, 8, 96, 96, 64, 1, 1, 0, 1),
    # Three taps: dgrad's products of as many channels take the longest of all on a simulated GPU.
    "tile_128x128": (2, 16, 96, 96, 136, (1, 3), (1, 1), (0, 1), (1, 1)),
    "tile_128x128_of_dgrad": (2, 136, 96, 96, 16, 1, 1, 0, 1),
    "tile_128x64_stride": (2, 8, 99, 99, 8, 3, 2, 1, 1),
    # Where CUDA copies pixels with their halo: the widest planes that it does so for, the next, and large tiles.
    "halo_of_63": (1, 16, 5, 63, 16, 3, 1, 1, 1),
    "halo_of_64": (1, 16, 5, 64, 16, 3, 1, 1, 1),
    "halo_128x64": (6, 8, 53, 53, 8, 3, 1, 1, 1),
    "halo_128x128": (6, 72, 53, 53, 72, 3, 1, 1, 1),
    "many_splits": (4, 72, 40, 40, 72, 1, 1, 0, 1),
}

# Any channels and strides; in float32 also what Winograd's algorithm takes: planes of even and odd sizes, paddings.
CPU_GEOMETRIES = {
    "odd_channels": (2, 3, 9, 9, 5, 3, 1, 1, 1),
    "odd_channels_1x1": (2, 33, 7, 7, 17, 1, 1, 0, 1),
    "stem": (2, 3, 64, 61, 64, 7, 2, 3, 1),
    "stride_3": (2, 16, 11, 11, 8, 3, 3, 1, 1),
    "stride_3_of_two_taps": (1, 8, 11, 12, 8, 2, 3, 0, 2),
    "5x5_dilated": (1, 16, 12, 12, 16, 5, 1, 2, 2),
    "no_tap_meets": (1, 8, 1, 1, 8, 1, 2, 1, 1),
    "1x1_whose_planes_are_of_one_size": (1, 16, 3, 3, 128, 1, 2, 1, 1),
    "1x1_stride_wide": (1, 64, 5, 4, 64, 1, 2, 0, 1),
    "winograd": (2, 64, 28, 28, 80, 3, 1, 1, 1),
    "winograd_odd": (3, 40, 21, 19, 24, 3, 1, 1, 1),
    "winograd_no_padding": (2, 16, 33, 30, 16, 3, 1, 0, 1),
    "winograd_full_padding": (2, 16, 27, 28, 16, 3, 1, 2, 1),
    "winograd_many_images": (24, 48, 7, 7, 72, 3, 1, 1, 1),
    "winograd_wide": (8, 272, 12, 12, 272, 3, 1, 1, 1),
    "winograd_4x4": (4, 64, 56, 52, 72, 3, 1, 1, 1),
    "winograd_4x4_odd": (3, 41, 55, 49, 23, 3, 1, 1, 1),
    "winograd_4x4_no_padding": (3, 16, 54, 51, 24, 3, 1, 0, 1),
    "winograd_4x4_full_padding": (3, 24, 45, 48, 16, 3, 1, 2, 1),
    "winograd_4x4_many_images": (48, 136, 12, 11, 72, 3, 1, 1, 1),
    "many_images": (9, 136, 7, 7, 200, 3, 2, 1, 1),
    "rows_of_an_image": (1, 256, 40, 56, 64, 3, 2, 1, 1),
}


def two(value):
    return value if isinstance(value, tuple) else (value, value)


class Case:
    """The tensors of one convolution, on the CPU, and what float64 makes of them; arguments on the device."""

    def __init__(self, geometry, dtype, prologue, device):
        self.device = device
        n, c, h, w, k, taps, *rest = geometry
        self.filter, self.geometry = two(taps), tuple(two(v) for v in rest)
        self.dtype, self.prologue = dtype, prologue
        self.x = self.channels_last(torch.randn(n, c, h, w))
        fan_in = c * self.filter[0] * self.filter[1]
        self.weight = (torch.randn(k, c, *self.filter) / fan_in**0.5).to(dtype)
        self.bias = torch.randn(k)
        self.coefficients = self.table(4, c)
        self.backward_coefficients = self.table(5, k) / 64  # sums over many pixels stay within float16
        activation = self.x.double()
        if prologue:
            activation = self.affine(activation, self.coefficients).relu().to(dtype).double()
        self.activation = activation
        self.exact = F.conv2d(activation, self.weight.double(), None, *self.geometry)
        self.y, self.grad = (self.channels_last(torch.randn(self.exact.shape)) for _ in range(2))
        g = self.grad.double()
        if prologue:
            a, b, shift = (v.double().view(1, -1, 1, 1) for v in self.backward_coefficients[2:])
            g = (a * g + b * self.y.double() + shift).to(dtype).double()
        self.output_gradient = g

    def channels_last(self, t):
        return t.to(self.dtype).to(memory_format=torch.channels_last)

    def on(self, t):
        return t.to(self.device)

    @staticmethod
    def table(rows, channels):
        table = torch.rand(rows, channels) + 0.5
        table[3:] = torch.randn(rows - 3, channels)
        return table

    @staticmethod
    def affine(t, table):
        scale, shift = (v.double().view(1, -1, 1, 1) for v in table[2:4])
        return t.double() * scale + shift

    def fprop_arguments(self):
        return self.on(self.x), self.on(self.coefficients) if self.prologue else None, self.on(self.weight)

    def output_gradient_of_float32(self):
        """As kernels form it: a value between two of 16 bits may be rounded to the other one than from float64."""
        a, b, shift = (v.double().view(1, -1, 1, 1) for v in self.backward_coefficients[2:])
        inner = (b * self.y.double() + shift).float()  # a fused multiply-add, as the next
        return (a * self.grad.double() + inner.double()).float().to(self.dtype).double()

    def gradient_arguments(self):
        if not self.prologue:
            return self.on(self.grad), None, None
        return self.on(self.grad), self.on(self.y), self.on(self.backward_coefficients)


def assert_near(actual, expected, dtype):
    """Within a rounding of ``dtype``, relative to the largest value."""
    e, allowed = errors(actual, expected), rounding(dtype, actual.device)
    assert e.maximum <= allowed and e.two_norm <= allowed, e


@pytest.fixture(params=[*GEOMETRIES, *CPU_GEOMETRIES])
def geometry(request):
    return (GEOMETRIES | CPU_GEOMETRIES)[request.param]


def on_the_cpu_only(device=None, geometry=None):
    """Channels and strides that no other device takes."""
    return "native on the CPU only" if device == "cuda" and geometry in CPU_GEOMETRIES else None


pytestmark = [
    needs_native,
    pytest.mark.skip_where(reason=on_the_cpu_only),
]


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fprop(device, geometry, dtype, prologue):
    case = Case(geometry, dtype, prologue, device=device)
    y, statistics = ops.conv_fprop(*case.fprop_arguments(), case.bias.to(device), *case.geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, case.exact + case.bias.double().view(1, -1, 1, 1), dtype)
    # The statistics are those of the stored output.
    count, mean, m2 = statistics.cpu().double().unbind(1)
    stored = y.cpu().double()
    total = count.sum(0)
    assert torch.equal(total, torch.full_like(total, stored.numel() // stored.shape[1]))
    whole = (count * mean).sum(0) / total
    assert errors(whole, stored.mean((0, 2, 3))).maximum <= FLOORS[torch.float32]
    deviations = stored - stored.mean((0, 2, 3), keepdim=True)
    assert errors((m2 + count * (mean - whole).square()).sum(0), deviations.square().sum((0, 2, 3))).maximum < 1e-5


@pytest.mark.parametrize("epilogue", ["affine", "relu", "shortcut"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fprop_of_inference(device, geometry, dtype, epilogue):
    case = Case(geometry, dtype, prologue=epilogue == "affine", device=device)
    affine = case.table(4, case.exact.shape[1])
    shortcut = case.channels_last(torch.randn(case.exact.shape)) if epilogue == "shortcut" else None
    relu = epilogue != "affine"
    z = ops.conv_fprop_inference(
        *case.fprop_arguments(),
        affine.to(device),
        None if shortcut is None else shortcut.to(device),
        relu,
        *case.geometry,
    )
    expected = case.affine(case.exact, affine)
    if shortcut is not None:
        expected = expected + shortcut.double()
    assert_near(z, expected.relu() if relu else expected, dtype)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dgrad(device, geometry, dtype, prologue):
    case = Case(geometry, dtype, prologue, device=device)
    plane = tuple(case.x.shape[2:])
    weight = case.weight.double()
    exact = nn.grad.conv2d_input(case.x.shape, weight, case.output_gradient, *case.geometry)
    arguments = (*case.gradient_arguments(), case.weight.to(device), plane, *case.geometry)

    dx, sums = ops.conv_dgrad(*arguments)
    assert sums.shape[0] == 0
    assert_near(dx, exact, dtype)

    addend = case.channels_last(torch.randn(case.x.shape))
    dx, _ = ops.conv_dgrad(*arguments, addend.to(device))
    assert_near(dx, exact + addend.double(), dtype)

    table = case.coefficients
    masked, sums = ops.conv_dgrad(*arguments, addend.to(device), case.x.to(device), table.to(device))
    assert_masked_and_summed(case, dx, masked, sums)


def assert_masked_and_summed(case, dx, masked, sums):
    """``masked``: ``dx`` stopped at the ReLU in front, and its sums."""
    table = case.coefficients
    passes = ops.bn_apply(case.on(case.x), case.on(table), relu=True).cpu() > 0
    assert torch.equal(masked.cpu(), torch.where(passes, dx.cpu(), 0))
    stored = masked.cpu().double()
    centred = case.x.double() - table[0].double().view(1, -1, 1, 1)
    expected = torch.stack((stored.sum((0, 2, 3)), (stored * centred).sum((0, 2, 3))))
    terms = torch.stack((stored.abs().sum((0, 2, 3)), (stored * centred).abs().sum((0, 2, 3)))).max()
    assert (sums.cpu().double().sum(0) - expected).abs().max() <= 1e-6 * terms


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgrad(device, geometry, dtype, prologue):
    case = Case(geometry, dtype, prologue, device=device)
    shape = case.weight.shape
    exact = nn.grad.conv2d_weight(case.activation, shape, case.output_gradient, *case.geometry)
    x, coefficients, _ = case.fprop_arguments()
    for out in {torch.float32, dtype}:
        dw = ops.conv_wgrad(
            *case.gradient_arguments(), x, coefficients, case.filter, *case.geometry, out
        )
        assert dw.dtype == out
        e = errors(dw, exact)
        assert e.maximum <= (1e-5 if out != dtype else rounding(dtype, device)), e


# 1x1 filters whose two passes a GPU makes one of in 16 bits, and some that it does not.
READ_ONCE = {
    "64_to_256": (2, 64, 13, 11, 256, 1, 1, 0, 1),  # 286 pixels: the last of nine tiles has 30
    "256_to_64": (2, 256, 13, 11, 64, 1, 1, 0, 1),
    "64_to_64": (3, 64, 9, 29, 64, 1, 1, 0, 1),
    "channels_below_the_tile_s": (1, 40, 12, 11, 200, 1, 1, 0, 1),
    "input_channels_below_the_tile_s": (1, 136, 12, 11, 24, 1, 1, 0, 1),
    "8_to_8_of_three_pixels": (1, 8, 1, 3, 8, 1, 1, 0, 1),
}
BACKWARD_GEOMETRIES = READ_ONCE | {
    "too_wide": (1, 72, 6, 6, 72, 1, 1, 0, 1),
    "1x1_stride": GEOMETRIES["1x1_stride"],
    "1x1_padded": (1, 16, 4, 5, 24, 1, 1, 1, 1),
    "3x3": GEOMETRIES["3x3"],
}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("behind_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKWARD_GEOMETRIES)
def test_backward(device, name, dtype, behind_norm, added):
    """dgrad and wgrad together, of an output in front of a batch norm."""
    case = Case(BACKWARD_GEOMETRIES[name], dtype, prologue=True, device=device)
    x, weight, table = case.on(case.x), case.on(case.weight), case.coefficients
    addend = case.channels_last(torch.randn(case.x.shape)) if added else None

    def run(coefficients, dtype):
        on_device = None if addend is None else addend.to(device)
        return ops.conv_backward(
            *case.gradient_arguments(), weight, x, coefficients, *case.geometry, on_device, dtype
        )

    dx, sums, dw = run(None, torch.float32)
    exact = nn.grad.conv2d_input(case.x.shape, case.weight.double(), case.output_gradient, *case.geometry)
    assert dx.is_contiguous(memory_format=torch.channels_last) and sums.shape[0] == 0
    assert_near(dx, exact if addend is None else exact + addend.double(), dtype)
    if behind_norm:
        masked, sums, dw = run(table.to(device), torch.float32)
        assert_masked_and_summed(case, dx, masked, sums)
    activation = case.activation if behind_norm else case.x.double()
    exact = nn.grad.conv2d_weight(activation, weight.shape, case.output_gradient_of_float32(), *case.geometry)
    allowed = rounding(dtype, device) if dtype == torch.float32 else 1e-5
    assert dw.dtype == torch.float32 and errors(dw, exact).maximum <= allowed
    rounded = run(table.to(device) if behind_norm else None, dtype)[2]
    assert torch.equal(rounded, dw.to(dtype))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)], indirect=True)
@pytest.mark.parametrize("name", BACKWARD_GEOMETRIES)
def test_which_are_read_once(device, name):
    case = Case(BACKWARD_GEOMETRIES[name], torch.bfloat16, prologue=True, device=device)
    x, weight = case.on(case.x), case.on(case.weight)
    assert ops.reads_once(x, weight, *case.geometry) == (name in READ_ONCE)
    assert not ops.reads_once(x.float(), weight.float(), *case.geometry)
    _, sums, _ = ops.conv_backward(
        *case.gradient_arguments(), weight, x, case.on(case.coefficients), *case.geometry, None, torch.float32
    )
    if name in READ_ONCE:  # tiles of at least 256 pixels
        assert sums.shape[0] == -(-x[:, 0].numel() // 256)


def test_padding_is_zero_behind_the_prologue(device):
    """relu(shift) is not zero; what lies outside the image is."""
    x = torch.zeros(1, 16, 5, 6, dtype=dtype_of(device), device=device).to(memory_format=torch.channels_last)
    table = torch.zeros(4, 16, device=device)
    table[3] = 3
    weight = torch.ones(8, 16, 3, 3, dtype=dtype_of(device), device=device)
    y, _ = ops.conv_fprop(x, table, weight, None, (1, 1), (1, 1), (1, 1))
    expected = F.conv2d(torch.full((1, 16, 5, 6), 3.0), torch.ones(8, 16, 3, 3), padding=1)
    assert torch.equal(y.cpu(), expected.to(y.dtype))


def test_special_values(device):
    """NaN and infinity pass the prologue as they pass eager's batch norm and ReLU."""
    case = Case(GEOMETRIES["3x3"], dtype_of(device), prologue=True, device=device)
    case.x[0, 3, 2, 2], case.x[1, 5, 4, 4] = float("nan"), float("inf")
    y, _ = ops.conv_fprop(*case.fprop_arguments(), None, *case.geometry)
    activation = ops.bn_apply(case.x.to(device), case.coefficients.to(device), relu=True)
    expected = F.conv2d(activation.float().cpu(), case.weight.float(), None, *case.geometry)
    assert expected.isnan().any()
    assert torch.equal(y.cpu().isnan(), expected.isnan())


def test_statistics_with_large_mean(device):
    case = Case(GEOMETRIES["1x1"], dtype_of(device), prologue=False, device=device)
    y, statistics = ops.conv_fprop(*case.fprop_arguments(), case.bias.to(device) + 1000, *case.geometry)
    coefficients = ops.bn_finalize(statistics, None, None, None, None, None, 0.1, 0.0)
    stored = y.cpu().double()
    assert errors(coefficients[0], stored.mean((0, 2, 3))).maximum < 1e-6
    assert errors(coefficients[1], stored.var((0, 2, 3), unbiased=False).rsqrt()).maximum < 1e-4


@pytest.mark.parametrize("name", ["3x3", "1x1_stride"])
def test_layouts_and_alignment(device, name):
    """Weights in either memory format, operands that start in the middle of a vector: copied, not misread."""
    case = Case(GEOMETRIES[name], dtype_of(device), prologue=True, device=device)
    x, coefficients, weight = case.fprop_arguments()
    y, _ = ops.conv_fprop(x, coefficients, weight, None, *case.geometry)
    buffer = torch.full((x.numel() + 8,), float("nan"), dtype=x.dtype, device=device)
    shifted = buffer.as_strided(x.shape, x.stride(), 1).copy_(x)
    other = weight.to(memory_format=torch.channels_last)
    for a, b in ((x, other), (shifted, weight), (x.contiguous(), weight)):
        assert torch.equal(ops.conv_fprop(a, coefficients, b, None, *case.geometry)[0], y)


@pytest.mark.parametrize("name", ["1x1", "3x3_stride", "3x3_one_image", "many_splits"])
def test_the_same_bits_every_time(device, name):
    case = Case(GEOMETRIES[name], dtype_of(device), prologue=True, device=device)
    x, coefficients, weight = case.fprop_arguments()
    plane = tuple(x.shape[2:])

    def run():
        gradient = case.gradient_arguments()
        return (
            *ops.conv_fprop(x, coefficients, weight, None, *case.geometry),
            *ops.conv_dgrad(*gradient, weight, plane, *case.geometry, None, x, case.coefficients.to(device)),
            ops.conv_wgrad(*gradient, x, coefficients, case.filter, *case.geometry, torch.float32),
            *ops.conv_backward(*gradient, weight, x, coefficients, *case.geometry, x, torch.float32),
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_no_images(device):
    x = torch.empty(0, 16, 5, 5, dtype=dtype_of(device), device=device)
    weight = torch.ones(8, 16, 3, 3, dtype=dtype_of(device), device=device)
    geometry = ((1, 1), (1, 1), (1, 1))
    y, _ = ops.conv_fprop(x, None, weight, None, *geometry)
    assert y.shape == (0, 8, 5, 5)
    assert ops.conv_dgrad(y, None, None, weight, (5, 5), *geometry)[0].shape == x.shape
    dw = ops.conv_wgrad(y, None, None, x, None, (3, 3), *geometry, torch.float32)
    assert dw.shape == weight.shape and not dw.any()
    dx, sums, dw = ops.conv_backward(y, None, None, weight, x, None, *geometry, None, torch.float32)
    assert dx.shape == x.shape and sums.shape[0] == 0 and dw.shape == weight.shape and not dw.any()


SAMPLES = {
    "conv_fprop": lambda c, g: (*c.fprop_arguments(), c.on(c.bias), *g),
    "conv_fprop_inference": lambda c, g: (
        *c.fprop_arguments(),
        c.on(c.table(4, c.exact.shape[1])),
        c.on(c.y),
        True,
        *g,
    ),
    "conv_dgrad": lambda c, g: (
        *c.gradient_arguments(),
        c.on(c.weight),
        tuple(c.x.shape[2:]),
        *g,
        None,
        c.on(c.x),
        c.on(c.coefficients),
    ),
    "conv_wgrad": lambda c, g: (
        *c.gradient_arguments(),
        c.on(c.x),
        c.on(c.coefficients),
        c.filter,
        *g,
        torch.float32,
    ),
    "conv_backward": lambda c, g: (
        *c.gradient_arguments(),
        c.on(c.weight),
        c.on(c.x),
        c.on(c.coefficients),
        *g,
        c.on(c.x),
        torch.float32,
    ),
}


@pytest.mark.parametrize("geometry", ["3x3_stride", "1x1"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(device, name, geometry):
    case = Case(GEOMETRIES[geometry], dtype_of(device), prologue=True, device=device)
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, SAMPLES[name](case, case.geometry))


ONE = ((1, 1), (0, 0), (1, 1))


@pytest.fixture
def ones(device):
    """Makes tensors of a dtype that the device's native convolutions take."""
    return lambda *shape: torch.ones(shape, dtype=dtype_of(device), device=device)


def fprop(x, weight, stride=(1, 1), coefficients=None):
    return ops.conv_fprop(x, coefficients, weight, None, stride, (0, 0), (1, 1))


def wgrad(grad, x, dtype):
    return ops.conv_wgrad(grad, None, None, x, None, (1, 1), *ONE, dtype)


def backward(grad, y, backward_coefficients, x, addend=None, dtype=torch.float32):
    weight = torch.ones(8, 8, 1, 1, dtype=x.dtype, device=x.device)
    return ops.conv_backward(grad, y, backward_coefficients, weight, x, None, *ONE, addend, dtype)


BAD_ARGUMENTS = {
    "channels": (lambda t: fprop(t(1, 8, 4, 4), t(8, 16, 1, 1)), ValueError, r"weight: expected shape \[K, 8, R, S\]"),
    "dtype": (
        lambda t: fprop(t(1, 8, 4, 4).double(), t(8, 8, 1, 1)),
        TypeError,
        "x: expected float32, bfloat16 or fl",
    ),
    "weight_dtype": (
        lambda t: fprop(t(1, 8, 4, 4), t(8, 8, 1, 1).bfloat16()),
        TypeError,
        "weight: expected the dtype of x",
    ),
    "stride": (
        lambda t: fprop(t(1, 8, 4, 4), t(8, 8, 1, 1), (300, 1)),
        ValueError,
        r"stride: expected two integers in \[1, ",
    ),
    "plane": (
        lambda t: fprop(t(1, 8, 2, 2), t(8, 8, 3, 3)),
        ValueError,
        "x: expected a plane of at least the filter's extent",
    ),
    "plane_of_strides": (
        lambda t: fprop(t(1, 8, 2, 9), t(8, 8, 3, 3), (2, 2)),
        ValueError,
        "x: expected a plane of at least the filter's extent",
    ),
    "coefficients": (
        lambda t: fprop(t(1, 8, 4, 4), t(8, 8, 1, 1), coefficients=t(4, 8).half()),
        TypeError,
        "coefficients: expected dtype Float",
    ),
    "one_of_two": (
        lambda t: ops.conv_dgrad(t(1, 8, 4, 4), t(1, 8, 4, 4), None, t(8, 8, 1, 1), (4, 4), *ONE),
        ValueError,
        "y, backward_coefficients: expected both or neither",
    ),
    "input_plane": (
        lambda t: ops.conv_dgrad(t(1, 8, 4, 4), None, None, t(8, 8, 1, 1), (5, 4), *ONE),
        ValueError,
        "grad: expected shape",
    ),
    "one_of_two_in_both": (
        lambda t: backward(t(1, 8, 4, 4), t(1, 8, 4, 4), None, t(1, 8, 4, 4)),
        ValueError,
        "y, backward_coefficients: expected both or neither",
    ),
    "images_in_both": (
        lambda t: backward(t(1, 8, 4, 4), t(1, 8, 4, 4), t(5, 8).float(), t(2, 8, 4, 4)),
        ValueError,
        r"grad: expected shape \[2, 8, 4, 4\]",
    ),
    "addend_in_both": (
        lambda t: backward(t(1, 8, 4, 4), t(1, 8, 4, 4), t(5, 8).float(), t(1, 8, 4, 4), t(1, 8, 4, 3)),
        ValueError,
        "addend: expected",
    ),
    "result_dtype_in_both": (
        lambda t: backward(t(1, 8, 4, 4), t(1, 8, 4, 4), t(5, 8).float(), t(1, 8, 4, 4), None, torch.float64),
        TypeError,
        "dtype: expected float32 or x's",
    ),
    "images": (
        lambda t: wgrad(t(1, 8, 4, 4), t(2, 8, 4, 4), torch.float32),
        ValueError,
        r"grad: expected shape \[2, 8, 4, 4\]",
    ),
    "result_dtype": (
        lambda t: wgrad(t(1, 8, 4, 4), t(1, 8, 4, 4), torch.float64),
        TypeError,
        "dtype: expected float32 or x's",
    ),
}
CUDA_BAD_ARGUMENTS = {
    "multiple": (lambda t: fprop(t(1, 12, 4, 4), t(8, 12, 1, 1)), ValueError, "x: expected a multiple of 8 channels"),
    "output_multiple": (
        lambda t: fprop(t(1, 8, 4, 4), t(4, 8, 1, 1)),
        ValueError,
        "weight: expected a multiple of 8 output",
    ),
    "stride_3": (
        lambda t: fprop(t(1, 8, 4, 4), t(8, 8, 1, 1), (3, 1)),
        ValueError,
        r"stride: expected two integers in \[1, 2\]",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(ones, name):
    call, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        call(ones)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)], indirect=True)
@pytest.mark.parametrize("name", CUDA_BAD_ARGUMENTS)
def test_bad_arguments_on_cuda(ones, name):
    call, error, message = CUDA_BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        call(ones)


def launches(call):
    """The names of the kernels that ``call`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {e.key for e in profile.key_averages()}


@pytest.mark.parametrize("memory", ["default", "minimal"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_blocks(device, name, training, dtype, memory):
    """Also where only some of a block's convolutions are native: grouped ones stay the library's."""
    channels, build = PAIRS[name]
    fused, eager = build()
    rf.set_memory(fused, memory)
    for m in (fused, eager):
        m.train(training).to(device, dtype, memory_format=torch.channels_last)
    for gradients in (True, False):

        def compare(gradients=gradients):
            x = torch.randn(4, channels, 14, 12).to(device, dtype, memory_format=torch.channels_last)
            with rf.engine("native"):
                return compare_modules(fused, eager, x, gradients=gradients)

        assert_policy(compare, draws=6)


@pytest.mark.parametrize("training", [True, False])
def test_no_activation_between_native_convolutions(device, training):
    block = rf.Bottleneck(32, 8).to(device, dtype_of(device), memory_format=torch.channels_last).train(training)
    x = torch.randn(2, 32, 6, 6).to(device, dtype_of(device), memory_format=torch.channels_last)

    def step():
        with rf.engine("native"):
            block(x.requires_grad_(training)).sum().backward() if training else block(x)

    with torch.set_grad_enabled(training):
        names = launches(step)
    if training:
        assert {"resnet_fused::conv_fprop", "resnet_fused::conv_dgrad", "resnet_fused::conv_wgrad"} <= names
        assert ("resnet_fused::conv_backward" in names) == (device.type == "cuda")
        assert not names & {"resnet_fused::bn_statistics", "resnet_fused::bn_backward_apply_"}
    else:
        assert "resnet_fused::conv_fprop_inference" in names and "resnet_fused::bn_apply" not in names
    assert not {n for n in names if n.startswith("aten::") and "convolution" in n}


def test_compiled_blocks_follow_the_engine(device):
    block = rf.Bottleneck(32, 8).to(device, dtype_of(device), memory_format=torch.channels_last)
    x = torch.randn(2, 32, 6, 6).to(device, dtype_of(device), memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for engine in ("library", "native", "library"):
        with rf.engine(engine):
            names = launches(lambda: compiled(x).float().square().sum().backward())
            assert ("resnet_fused::conv_fprop" in names) == (engine == "native")
            assert torch.equal(compiled(x), block(x))


def test_identity_without_relu_and_frozen_parts(device):
    """The paths on which a gradient is added unmasked, or nobody asks for one."""
    for freeze in ("nothing", "input", "first", "weights"):
        block = rf.ResBlk(16, 16, relu=False).to(device, dtype_of(device), memory_format=torch.channels_last)
        for n, p in block.named_parameters():
            first, weight = n.startswith(("conv1", "bn1")), p.dim() == 4
            p.requires_grad_(not (freeze == "first" and first or freeze == "weights" and weight))
        x = torch.randn(3, 16, 6, 6).to(device, dtype_of(device), memory_format=torch.channels_last)
        gradients = []
        for engine in ("native", "library"):
            b = copy.deepcopy(block)
            own = x.clone().requires_grad_(freeze != "input")
            with rf.engine(engine):
                b(own).square().sum().backward()
            gradients.append([own.grad, *(p.grad for p in b.parameters())])
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b.abs().max() > 1e-2:  # a bias in front of a batch norm: zero but for rounding
                assert errors(a, b.cpu()).two_norm < 2e-2


def test_native_convolution_behind_a_batch_norm(device, ones):
    x, weight = ones(2, 16, 5, 5).to(memory_format=torch.channels_last), ones(16, 16, 3, 3)
    x, weight = (torch.randn_like(t).requires_grad_() for t in (x, weight))
    vectors = [torch.rand(16, device=device, requires_grad=True) for _ in range(4)]
    units = [Unit(None, Norm(*vectors[:2])), Unit(Conv(weight, padding=(1, 1)), Norm(*vectors[2:]))]
    found = []
    for engine in ("native", "library"):
        z = functional.residual(x, units, x, engine=engine)
        found.append([z, *torch.autograd.grad(z.float().square().sum(), (x, weight, *vectors))])
    for a, b in zip(*found, strict=True):
        assert errors(a, b.detach().cpu()).two_norm < 1e-2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)], indirect=True)
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_follows_the_switch_for_tf32(device, monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    x = torch.randn(2, 32, 6, 6, device=device).to(memory_format=torch.channels_last)
    block = rf.Bottleneck(32, 8).to(device)
    found = []

    def step():
        with rf.engine("native"):
            found.append(block(x))

    assert ("resnet_fused::conv_fprop" in launches(step)) == allowed
    exact = copy.deepcopy(block).cpu().double()(x.cpu().double())
    assert errors(found[0].detach(), exact.detach()).two_norm < (1e-2 if allowed else 1e-5)


def test_what_is_not_native_says_why(device, ones, monkeypatch):
    x = ones(1, 16, 4, 4).to(memory_format=torch.channels_last)
    one = ((1, 1), (0, 0), (1, 1), 1)
    assert ops.native_reason(x, ones(8, 16, 1, 1), *one) is None
    reasons = {
        "dtype": ops.native_reason(x.double(), ones(8, 16, 1, 1), *one),
        "channels_last": ops.native_reason(x.contiguous(), ones(8, 16, 1, 1), *one),
        "groups=2": ops.native_reason(x, ones(8, 8, 1, 1), *one[:3], 2),
        "stride=": ops.native_reason(x, ones(8, 16, 1, 1), (300, 3), *one[1:]),
        "taps": ops.native_reason(x, ones(8, 16, 256, 9), *one),
        "device meta": ops.native_reason(x.to("meta"), ones(8, 16, 1, 1), *one),
    }
    if device.type == "cuda":
        reasons["multiples of 8"] = ops.native_reason(x, ones(12, 16, 1, 1), *one)
    *limits, pixels = ops._NATIVE_LIMITS[device.type]
    assert pixels > 2**30
    for most, padding in ((15, 0), (35, 1)):  # the input's pixels, or the output's
        monkeypatch.setitem(ops._NATIVE_LIMITS, device.type, (*limits, most))
        reasons[f"up to {most} pixels"] = ops.native_reason(x, ones(8, 16, 1, 1), (1, 1), (padding,) * 2, (1, 1), 1)
    for part, reason in reasons.items():
        assert reason and part in reason


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_processor_without_the_microkernel_says_so(device, monkeypatch):
    x, weight = torch.ones(1, 16, 4, 4), torch.ones(8, 16, 1, 1)
    for dtype in ops._CPU_MULTIPLIES:  # one dtype alone, whichever this processor has
        monkeypatch.setitem(ops._CPU_MULTIPLIES, dtype, dtype != torch.float32)
    assert "no microkernel for torch.float32" in ops.native_reason(x, weight, (1, 1), (0, 0), (1, 1), 1)
