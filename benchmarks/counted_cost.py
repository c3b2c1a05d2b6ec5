# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the CUDA kernels move and multiply, counted by the simulator of tests/gpusim, against what they have to.

`make counted-cost` runs it. The counts are exact; tests/gpusim/README.md explains them. The shapes and the bytes that
have to move are here for tests/test_conv_cost.py and tests/test_cuda_cost.py too, which hold the kernels to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import resnet_fused as rf
from benchmarks.passes import PASSES, Passes, Shape
from benchmarks.tables import table
from resnet_fused import ops

SECTOR = 32  # bytes
Counters = list[dict]  # of each launch

# ResNet-50's convolutions, and how many images.
CONVOLUTIONS = {
    "layer1.conv1": (4, Shape(64, 56, 64, 1, 1)),
    "layer1.conv2": (2, Shape(64, 56, 64, 3, 1)),
    "layer1.conv3": (2, Shape(64, 56, 256, 1, 1)),
    "layer2.conv1": (2, Shape(256, 56, 128, 1, 1)),
    "layer2.conv2": (2, Shape(128, 56, 128, 3, 2)),
    "layer2.downsample": (2, Shape(256, 56, 512, 1, 2)),
    "layer3.conv2": (4, Shape(256, 14, 256, 3, 1)),
    "layer4.conv1": (8, Shape(2048, 7, 512, 1, 1)),
}


class CountedPasses:
    """A convolution's native passes in bfloat16 with all that is fused into them, and what they have to do."""

    def __init__(self, images: int, shape: Shape):
        self.passes = Passes(shape, images, torch.bfloat16, torch.device("cuda"), behind_norm=True)
        self.flops = shape.flops(images)
        pixels, output_pixels = images * shape.side**2, images * shape.output_side**2
        # Of the matrix product.
        self.rows = {"fprop": output_pixels, "dgrad": pixels, "wgrad": shape.filters}
        self.columns = {"fprop": shape.filters, "dgrad": shape.channels, "wgrad": shape.channels}
        x, y, weight = (t.nbytes for t in (self.passes.x, self.passes.y, self.passes.weight))
        # Bytes to read and to write, every tensor once.
        self.least = {
            "fprop": (x + weight, y),
            "dgrad": (2 * y + x + weight, x),
            "wgrad": (2 * y + x, weight),
        }
        if shape.stride == 2 and shape.taps == 1:  # three pixels of four are not read
            self.least["fprop"] = (x // 4 + weight, y)
            self.least["wgrad"] = (2 * y + x // 4, weight)

    def call(self, which: str) -> Callable[[], object]:
        return self.passes.call_native(which, fused=True)

    @property
    def least_at_once(self) -> tuple[int, int]:
        """Bytes to read and to write of dgrad and wgrad in one kernel, with an addend, without partial sums of dw."""
        x, y, weight = (t.nbytes for t in (self.passes.x, self.passes.y, self.passes.weight))
        return 2 * y + 2 * x + weight, x

    def call_at_once(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.passes
        return ops.conv_backward(
            p.grad,
            p.y,
            p.backward_coefficients,
            p.weight,
            p.x,
            p.coefficients,
            *p.shape.geometry,
            torch.ones_like(p.x),
            torch.float32,
        )


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


# (block, input channels, side): ResNet-50's, two images.
BLOCKS = {
    "layer1.1": (lambda: rf.Bottleneck(256, 64), 256, 56),
    "layer2.0": (lambda: rf.Bottleneck(256, 128, 2, projection(256, 512, 2)), 256, 56),
    "layer3.1": (lambda: rf.Bottleneck(1024, 256), 1024, 14),
}


class BlockStep:
    """Training of one bottleneck in bfloat16 with native convolutions, and the bytes of what it reads and writes."""

    def __init__(self, build: Callable[[], rf.Bottleneck], channels: int, side: int):
        self.block = build().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
        x = torch.randn(2, channels, side, side, dtype=torch.bfloat16, device="cuda")
        self.x = x.to(memory_format=torch.channels_last).requires_grad_()
        self.weights = sum(p.nbytes for p in self.block.parameters() if p.dim() == 4)

    def forward(self) -> None:
        with rf.engine("native"):
            self.z = self.block(self.x)
        self.gradient = torch.randn_like(self.z)

    def backward(self) -> None:
        self.z.backward(self.gradient)

    @property
    def read_once(self) -> tuple[bool, bool]:
        """Whether one kernel is dgrad and wgrad of the last convolution, and of the first."""
        block, x = self.block, self.x
        geometry = ((1, 1), (0, 0), (1, 1))
        small = x.new_empty(x.shape[0], block.conv3.in_channels, *self.z.shape[2:])
        return ops.reads_once(small, block.conv3.weight, *geometry), ops.reads_once(x, block.conv1.weight, *geometry)

    @property
    def partials(self) -> int:
        """Bytes of what dgrad and wgrad in one kernel leave to be added: of each 256 pixels, a weight's gradient."""
        weights = (self.block.conv3.weight, self.block.conv1.weight)
        shares = -(-self.x[:, 0].numel() // 256)
        return sum(4 * w.numel() * shares for w, once in zip(weights, self.read_once, strict=True) if once)

    @property
    def least(self) -> dict[str, tuple[int, int]]:
        """Bytes of activations to read and to write in each direction, without weights, their gradients and vectors."""
        block, x = self.block, self.x.nbytes
        y1 = 2 * self.x.shape[0] * block.conv1.out_channels * self.x.shape[2] * self.x.shape[3]
        y2 = y1 // block.stride**2
        y3 = z = self.z.nbytes
        read = x + y1 + y2 + 2 * y3  # conv1, conv2, conv3; the join reads y3 and the shortcut
        write = y1 + y2 + y3 + z
        # The join: the gradient, y3 and the shortcut (for the mask) in, g out; then per convolution dgrad and wgrad, or
        # both at once.
        last, first = (1 if once else 2 for once in self.read_once)
        read_back = 3 * y3 + last * (2 * y3 + y2) + 2 * (2 * y2 + y1) + first * (2 * y1) + x + x
        write_back = y3 + y2 + y1 + x
        if block.downsample is not None:  # of stride 2
            read += x // 4
            write += y3
            read_back += 2 * 2 * y3 + x // 4
            write_back += x
        return {"forward": (read, write), "backward": (read_back, write_back)}


# Shapes and dtypes of the kernels that pass over activations once.
ONE_PASS_CASES = [
    ((16, 64, 56, 56), torch.bfloat16),
    ((8, 64, 56, 56), torch.float32),
    ((16, 256, 56, 56), torch.bfloat16),
    ((32, 512, 28, 28), torch.bfloat16),
]
ONE_PASS_KERNELS = (
    "statistics",
    "apply",
    "apply_plain",
    "apply_affine",
    "reduce",
    "reduce_plain",
    "reduce_affine",
    "reduce_and_write",
    "reduce_and_activate",
    "backward_apply",
    "backward_apply_plain",
    "backward_apply_frozen",
    "backward_apply_pair",
    "relu_backward_add",
)


class Operands:
    """Activations of one shape and dtype, tables of their channels, and the vocabulary's kernels called on them.

    A kernel's entry is (call, activations that it reads, activations that it writes).
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout=torch.channels_last):
        channels = shape[1]
        y, grad, s, out = (torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout) for _ in range(4))
        c = torch.rand(4, channels, device="cuda")
        b = torch.rand(5, channels, device="cuda")
        self.kernels = {
            "statistics": (lambda: ops.bn_statistics(y), [y], []),
            "apply": (lambda: ops.bn_apply(y, c, relu=True), [y], [y]),
            "apply_plain": (lambda: ops.bn_apply(y, c, s, relu=True), [y, s], [y]),
            "apply_affine": (lambda: ops.bn_apply(y, c, s, c, relu=True), [y, s], [y]),
            "reduce": (lambda: ops.bn_backward_reduce(grad, y, c, relu=True), [grad, y], []),
            "reduce_plain": (lambda: ops.bn_backward_reduce(grad, y, c, s, relu=True), [grad, y, s], []),
            "reduce_affine": (lambda: ops.bn_backward_reduce(grad, y, c, s, c, relu=True), [grad, y, s], []),
            "reduce_and_write": (
                lambda: ops.bn_backward_reduce(grad, y, c, z=s, relu=True, write_grad=True),
                [grad, y, s],
                [y],
            ),
            "reduce_and_activate": (
                lambda: ops.bn_backward_reduce(grad, y, c, relu=True, write_activation=True),
                [grad, y],
                [y],
            ),
            "backward_apply": (lambda: ops.bn_backward_apply(grad, y, c, b, relu=True), [grad, y], [y]),
            "backward_apply_plain": (lambda: ops.bn_backward_apply(grad, y, c, b, s, relu=True), [grad, y, s], [y]),
            "backward_apply_frozen": (
                lambda: ops.bn_backward_apply(grad, y, c, b, relu=False, batch_statistics=False),
                [grad],
                [y],
            ),
            "backward_apply_pair": (
                lambda: ops.bn_backward_apply_pair(grad, y, c, b, s, c, b, True, True, True),
                [grad, y, s],
                [y, s],
            ),
            "relu_backward_add": (lambda: ops.relu_backward_add_(out, grad, y, c, s), [out, grad, y, s], [out]),
        }

    def least(self, name: str) -> int:
        """Bytes of what a kernel has to read and write, with what a reduction leaves behind."""
        _, read, written = self.kernels[name]
        rows = {"statistics": 3, "reduce_affine": 3}.get(name, 2 if name.startswith("reduce") else 0)
        # Float32 per tile, row and channel.
        partials = ops.bn_statistics(read[0]).nbytes // 3 * rows if rows else 0
        return sum(t.nbytes for t in [*read, *written]) + partials


def of_ours(counters: Iterable[dict]) -> Counters:
    """The launches of this package's kernels."""
    return [c for c in counters if "resnet_fused" in c["kernel"]]


def total(launches: Iterable[dict], *fields: str) -> int:
    return sum(c[field] for c in launches for field in fields)


def costs(launches: Counters, least: int) -> list[str]:
    """A row's cells of `HEADER`."""
    moved = SECTOR * total(launches, "global_distinct_load_sectors", "global_distinct_store_sectors")
    requested = SECTOR * total(launches, "global_load_sectors", "global_store_sectors")
    wavefronts, ideal = (total(launches, field) for field in ("shared_wavefronts", "shared_ideal_wavefronts"))
    return [
        *(f"{least / 1e6:.2f}", f"{moved / 1e6:.2f}", f"{moved / least:.3f}", f"{requested / 1e6:.2f}"),
        f"{wavefronts / ideal:.3f}" if ideal else "",
    ]


HEADER = ("least MB", "moved MB", "moved / least", "requested MB", "wavefronts / ideal")


def convolution_table(count: Callable[[Callable], Counters]) -> str:
    rows = []
    for name, arguments in CONVOLUTIONS.items():
        passes = CountedPasses(*arguments)
        for which in PASSES:
            launches = of_ours(count(passes.call(which)))
            multiplied = f"{total(launches, 'mma_flops') / passes.flops:.3f}"
            rows.append([f"{name} {which}", *costs(launches, sum(passes.least[which])), multiplied])
    return table(("convolution", *HEADER, "tensor-core operations / exact"), rows)


def block_table(count: Callable[[Callable], Counters]) -> str:
    rows = []
    for name, arguments in BLOCKS.items():
        step = BlockStep(*arguments)
        for direction in ("forward", "backward"):
            launches = of_ours(count(getattr(step, direction)))
            # The weights are read in both directions; backward writes their gradients, too.
            weights = step.weights * (2 if direction == "backward" else 1)
            rows.append([f"{name} {direction}", *costs(launches, sum(step.least[direction]) + weights)])
    return table(("block", *HEADER), rows)


def one_pass_table(count: Callable[[Callable], Counters]) -> str:
    rows = []
    for shape, dtype in ONE_PASS_CASES:
        operands = Operands(shape, dtype)
        for name in ONE_PASS_KERNELS:
            launches = of_ours(count(operands.kernels[name][0]))
            where = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            rows.append([f"{name} {where}", *costs(launches, operands.least(name))])
    return table(("kernel", *HEADER), rows)


def main() -> None:
    try:
        from gpusim import count
    except ImportError:
        raise SystemExit("the costs are counted by the simulator only: make counted-cost") from None
    if not rf.build_info()["cuda"]:
        raise SystemExit(f"{rf.__file__} is built without its CUDA kernels: make counted-cost")
    torch.manual_seed(0)
    native = torch.cuda.get_device_capability() >= (8, 0)
    print(
        f"Counted on a simulated {torch.cuda.get_device_name()}. least: each tensor once; moved: each 32-byte sector",
        "once a launch, which is what memory sees of perfect caches; requested: what warps ask of the caches.",
        "wgrad writes partial sums of its splits and reads them again, the fewer the images the larger a share.",
        sep="\n",
    )
    if not native:
        print("\nNo convolutions and blocks: native convolutions need compute capability 8.0.")
    for counted in (convolution_table, block_table, one_pass_table) if native else (one_pass_table,):
        print("", counted(count), sep="\n", flush=True)


if __name__ == "__main__":
    main()
