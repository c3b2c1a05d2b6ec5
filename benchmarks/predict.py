# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Predicted time of training on GPUs that nobody has at hand. Nothing here is measured; see HEADER.

A native kernel takes the p-norm of what it asks of DRAM, L2, tensor cores, issue slots and shared memory, each as if it
were alone. What it asks comes from its SASS (benchmarks/kernel_counts.json), from the shapes, and from the rates of
CARDS. The library's convolutions are a share of the card's peak, passes over activations a share of its bandwidth.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from benchmarks import pipes
from benchmarks.kernel_report import COUNTS, counted, multiprocessor, round_up
from benchmarks.tables import table

BATCH = 256
ERROR = 0.3  # of a time, at most, against PUBLISHED
NORM = 4  # of resources that are used at the same time: 1 is one after the other, infinity perfect overlap
OVERLAP = 0.88  # what latencies, fill and drain leave of that
LAUNCH = 3e-6  # seconds
DRAM_SHARE = 0.92  # of a card's achievable bandwidth, in a convolution
EAGER_NORM, OUR_NORM = 0.80, 0.90  # the same, in PyTorch's passes of batch norm, ReLU and addition, and in ours
VALUE = 2  # bytes, bfloat16

# The library's convolutions: what they reach of the bandwidth, what latencies, fill and drain leave of the whole, and
# the share of the rate of a card (CARDS) that 1x1 filters and dgrad of stride 2 reach. Guesses, no source: with them
# eager's published rate comes out (PUBLISHED).
CUDNN_DRAM_SHARE, CUDNN_OVERLAP = 0.90, 0.97
CUDNN_1X1, CUDNN_STRIDED_DGRAD = 0.95, 0.70
# The network's first convolution has three channels: what it reaches of the bandwidth, and of the peak. Guesses too.
STEM_DRAM_SHARE, STEM_PEAK_SHARE = 0.85, 0.22
# Passes over the first convolution's output: batch norm and ReLU, as eager_block and our_block count them; then over it
# and over the pooled tensor, in pooling.
STEM_PASSES_EAGER, STEM_PASSES_OURS = 13, 8
POOLING_PASSES, POOLED_PASSES = 2, 10
# Of SGD with momentum and of autocast's copies of the weights, 25 million of ResNet-50; and what else a step has of
# small kernels.
UPDATE_BYTES = 0.65e9
SMALL_KERNELS = 0.6e-3  # seconds
STEM_LAUNCHES = 6

# Published training throughput, images/s: where the model was held against what others measured. The native rows are
# another implementation of the same fusion, which on the H100 has kernels for it; ours are those of 8.0.
PUBLISHED = (
    ("A100", "native", 3574, "MLPerf training v3.0 to v4.0: MXNet with this fusion, float16"),
    ("H100", "native", 7162, "MLPerf training v3.0 to v4.0: MXNet with this fusion, float16"),
    ("A100", "eager", 2470, "NVIDIA's PyTorch example, AMP: about, quoted from memory"),
)

HEADER = f"""PREDICTED, not measured: by a model, +-{ERROR:.0%}, from counts of the compiled kernels and assumed rates.
Training in bfloat16, channels_last, {BATCH} images of 224 pixels. best mix: each convolution, forward and backward
apart, native or the library's, whatever the model finds fastest. ratio: of eager's time to this."""


@dataclass(frozen=True)
class Card:
    """Rates are assumptions of what can be had, not peaks, where nothing else is said."""

    name: str
    arch: str
    multiprocessors: int
    ghz: float
    peak_rate: float  # 16-bit multiply-adds with float32 sums per cycle and multiprocessor
    dram: float  # bytes/s
    l2: float  # bytes/s
    # Share of the peak that cuDNN's convolutions reach: of 128 and more columns, of 64.
    cudnn_shares: dict[str, tuple[float, float]] = field(hash=False)

    @property
    def peak(self) -> float:
        return 2 * self.peak_rate * self.multiprocessors * self.ghz * 1e9


CARDS = (
    Card("A100", "sm_80", 108, 1.38, 1024, 1.78e12, 5.4e12,
         {"fprop": (0.74, 0.52), "dgrad": (0.68, 0.48), "wgrad": (0.62, 0.42)}),
    Card("H100", "sm_90a", 132, 1.70, 2048, 2.95e12, 9.0e12,
         {"fprop": (0.60, 0.38), "dgrad": (0.56, 0.35), "wgrad": (0.48, 0.28)}),
    # A GeForce multiplies at a quarter of the A100's rate per cycle, which cuDNN therefore comes closer to. Held
    # against nothing published.
    Card("RTX 4090", "sm_89", 128, 2.52, 256, 0.93e12, 5.0e12,
         {"fprop": (0.85, 0.75), "dgrad": (0.80, 0.70), "wgrad": (0.75, 0.65)}),
)  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    channels: int
    filters: int
    taps: int  # 1 or 3
    side: int  # of the input
    stride: int
    behind_norm: bool  # reads a raw output, whose batch norm and ReLU are its prologue

    @property
    def output_side(self) -> int:
        return (self.side - 1) // self.stride + 1

    @property
    def pixels(self) -> int:
        return BATCH * self.side**2

    @property
    def output_pixels(self) -> int:
        return BATCH * self.output_side**2

    @property
    def x(self) -> int:
        return VALUE * self.pixels * self.channels

    @property
    def y(self) -> int:
        return VALUE * self.output_pixels * self.filters

    @property
    def weight(self) -> int:
        return VALUE * self.channels * self.filters * self.taps**2

    @property
    def multiply_adds(self) -> int:
        return self.output_pixels * self.channels * self.filters * self.taps**2

    @property
    def reads_once(self) -> bool:
        """Whether dgrad and wgrad are one kernel; as csrc/cuda/conv/shapes.h has it."""
        narrow, wide = sorted((self.channels, self.filters))
        return self.taps == 1 and self.stride == 1 and narrow <= NARROW and wide <= WIDE


@dataclass(frozen=True)
class Block:
    chain: tuple[Convolution, ...]
    projection: Convolution | None

    @property
    def units(self) -> tuple[Convolution, ...]:
        return self.chain + ((self.projection,) if self.projection else ())


def network(name: str) -> list[Block]:
    """The residual blocks of ``resnet18`` or ``resnet50``."""
    counts, bottleneck = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}[name]
    blocks, channels, side = [], 64, 56
    for stage, count in enumerate(counts):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for i in range(count):
            stride = 2 if stage and not i else 1
            small = (side - 1) // stride + 1
            if bottleneck:
                chain: tuple[Convolution, ...] = (
                    Convolution(channels, width, 1, side, 1, False),
                    Convolution(width, width, 3, side, stride, True),
                    Convolution(width, out, 1, small, 1, True),
                )
            else:
                chain = (
                    Convolution(channels, width, 3, side, stride, False),
                    Convolution(width, out, 3, small, 1, True),
                )
            projects = stride != 1 or channels != out
            blocks.append(Block(chain, Convolution(channels, out, 1, side, stride, False) if projects else None))
            channels, side = out, small
    return blocks


@dataclass(frozen=True)
class Instance:
    """A compiled kernel."""

    rows: int
    columns: int
    prologues: tuple[str, ...]
    flags: tuple[bool, ...]
    warps: int
    blocks: int  # that a multiprocessor holds, as far as registers say
    loop: pipes.Loop

    @property
    def depth(self) -> float:
        """Of the reduction, per iteration."""
        return self.loop.multiply_adds * self.warps / (self.rows * self.columns)


@cache
def instances(arch: str) -> tuple[str, dict[str, list[Instance]]]:
    """The architecture whose counts serve ``arch``, the latest up to it that was counted, and its kernels by pass."""
    number = {known: int(re.sub(r"\D", "", known)) for known in (arch, *counted())}
    served = [known for known in counted() if number[known] <= number[arch]]
    if not served:
        raise SystemExit(f"{COUNTS}: no kernels of {arch}; make kernel-report, with --write")
    chosen = max(served, key=number.__getitem__)
    found: dict[str, list[Instance]] = {"fprop": [], "dgrad": [], "wgrad": [], "backward": []}
    for name, entry in counted()[chosen].items():
        parsed = re.fullmatch(r"(\w+)_kernel<BFloat16, (?:BlockTile<)?(\d+), (\d+)[^>]*?>?((?:, \w+)+)>", name)
        if parsed is None or parsed[1] not in found:
            continue
        rest = parsed[4].removeprefix(", ").split(", ")
        flags = tuple(word == "true" for word in rest if word in ("true", "false"))
        prologues = tuple(word for word in rest if word not in ("true", "false"))
        loop = pipes.Loop(**entry["loop"])
        found[parsed[1]].append(
            Instance(int(parsed[2]), int(parsed[3]), prologues, flags, entry["warps"], entry["blocks"], loop)
        )
    return chosen, found


# Of the instructions in front of and behind the main loop the share that a block executes, estimated from the kernels:
# dgrad's are four variants, of which one runs.
AROUND = {"fprop": (1.0, 1.0), "dgrad": (0.7, 0.6), "wgrad": (1.0, 0.8)}
ENOUGH_BLOCKS = 128  # choose_tile of csrc/cuda/conv/shapes.h
# Of wgrad, as wgrad_splits has it: blocks at least, of tiles of more than 128x64 and of smaller ones; four times as
# many where partial sums are cheap against the operands; pixels of a split at least, and splits at most.
ENOUGH_SPLITS = (256, 512)
MOST_ROUNDS = 4
SPLIT_PIXELS, MOST_SPLITS = 512, 256
TAIL = 0.65  # of a full wave's time that one with few blocks takes


def norm(*times: float) -> float:
    return sum(t**NORM for t in times) ** (1 / NORM)


def native_seconds(card: Card, c: Convolution, which: str, addend: bool = False) -> float:
    """Of one pass with all that is fused into it."""
    prologue = "AffineRelu" if c.behind_norm else "Raw"
    reduction: float
    prologues: tuple[str, ...]
    if which == "wgrad":
        rows, columns, reduction = c.filters, c.channels * c.taps**2, c.output_pixels
        prologues = ("BackwardAffine", prologue)
        moved = 2 * c.y + c.x
    elif which == "dgrad":
        rows, columns = c.pixels, c.channels
        reduction = c.filters * c.taps**2 / (c.stride**2 if c.taps > 1 else 1)
        prologues = ("BackwardAffine",)
        moved = 2 * c.y + c.x * (1 + c.behind_norm + addend) + c.weight
    else:
        rows, columns, reduction = c.output_pixels, c.filters, c.channels * c.taps**2
        prologues = (prologue,)
        moved = c.x + c.y + c.weight
    k = _instance(card, c, which, prologues, rows, columns)
    blocks = math.ceil(rows / k.rows) * math.ceil(columns / k.columns)
    splits, partial = 1, 0
    if which == "wgrad":
        splits = wgrad_splits(c, blocks, k.rows * k.columns > 128 * 64)
        partial = 4 * c.weight * splits if splits > 1 else 2 * c.weight
    blocks *= splits
    iterations = math.ceil(reduction / k.depth) / splits
    held = resident(card, k, shared_bytes(k, c, which))
    epilogue = 0 if which == "wgrad" else 2 * k.rows * k.columns * VALUE / pipes.SHARED_BYTES
    seconds = _seconds(card, k, blocks, iterations, held, moved + partial, AROUND[which], epilogue)
    return seconds + LAUNCH * (2 if splits > 1 else 1)


def _seconds(
    card: Card,
    k: Instance,
    blocks: int,
    iterations: float,
    held: int,
    dram: int,
    shares: tuple[float, float],
    epilogue: float,
) -> float:
    """Without the launch.

    Args:
        blocks, iterations: of a block; ``held``: blocks on a multiprocessor.
        dram: bytes that are moved.
        shares: of the instructions around the main loop, in front and behind, those that run.
        epilogue: cycles of shared memory.
    """
    cycles = k.loop.cycles(card.arch, k.warps)
    assert cycles.tensor is not None
    before, after = shares
    around = (before * k.loop.before + after * k.loop.after) * k.warps / pipes.SUB_CORES
    second = card.multiprocessors * card.ghz * 1e9 / blocks / _quantised(blocks, card.multiprocessors * held)
    times = (
        iterations * cycles.tensor / second,
        (iterations * cycles.issue + around) / second,
        (iterations * (cycles.shared + cycles.shared_most) / 2 + epilogue) / second,
        (blocks * iterations * k.loop.copied * k.warps + dram) / card.l2,
        dram / (card.dram * DRAM_SHARE),
    )
    return norm(*times) / OVERLAP


# Of the kernel that is dgrad and wgrad, as csrc/cuda/conv has them: the sides, a tile's pixels, a block's tiles at
# least, and blocks at most; g and y of so many tiles in shared memory, and x.
NARROW, WIDE = 64, 256
ONE_READ_PIXELS, LEAST_TILES, MOST_BLOCKS = 32, 8, 432
GRADIENT_STAGES, INPUT_STAGES = 2, 3


def native_backward_seconds(card: Card, c: Convolution, addend: bool = False) -> float:
    """Of dgrad and wgrad with all that is fused into them."""
    if not c.reads_once:
        return _native(card, c, "dgrad", addend) + _native(card, c, "wgrad")
    rows, columns = (WIDE if channels > NARROW else NARROW for channels in (c.filters, c.channels))
    of = rows, columns, ("AffineRelu" if c.behind_norm else "Raw",)
    fitting = [k for k in instances(card.arch)[1]["backward"] if (k.rows, k.columns, k.prologues) == of]
    k = _only(fitting, c, "backward")
    tiles = math.ceil(c.pixels / ONE_READ_PIXELS)
    blocks = min(MOST_BLOCKS, math.ceil(tiles / LEAST_TILES))
    # A tile's g, y, dy; x and dx.
    shared = VALUE * ONE_READ_PIXELS * (rows * (2 * GRADIENT_STAGES + 1) + columns * (INPUT_STAGES + 1))
    moved = 2 * c.y + c.x * (2 + addend) + 4 * c.weight * blocks  # partial sums of dW are written and read again
    return _seconds(card, k, blocks, tiles / blocks, resident(card, k, shared), moved, (1.0, 1.0), 0) + 2 * LAUNCH


def wgrad_splits(c: Convolution, blocks: int, large: bool) -> int:
    """As csrc/cuda/conv/shapes.h; ``blocks`` of a split, ``large``: of tiles of more than 128x64."""
    enough = ENOUGH_SPLITS[not large]
    least, most = math.ceil(enough / blocks), math.ceil(MOST_ROUNDS * enough / blocks)
    cheap = c.output_pixels * (2 * c.filters + c.channels) // (4 * c.channels * c.filters * c.taps**2)
    return max(1, min(MOST_SPLITS, max(least, min(cheap, most)), math.ceil(c.output_pixels / SPLIT_PIXELS)))


# As csrc/cuda/conv has them: stages of the ring, bytes of a row or column in a stage, and of a row of all banks.
STAGES, ROW_BYTES, BANKS_BYTES = 3, 64, 128
TABLES = {"Raw": 0, "AffineRelu": 2, "BackwardAffine": 3}  # of coefficients, floats of a stage's channels


def shared_bytes(k: Instance, c: Convolution, which: str) -> int:
    """Of dynamic shared memory, that a block is launched with."""
    sources = 2 if k.prologues[0] == "BackwardAffine" else 1
    rows, columns = ROW_BYTES * k.rows * sources, ROW_BYTES * k.columns
    if which == "wgrad":
        if k.columns % 3 == 0:  # three taps share the pixels of a stage and one on either side, of 64 channels
            return STAGES * (rows + round_up((32 + 2) * BANKS_BYTES, 512)) + BANKS_BYTES
        return STAGES * (rows + columns)
    coefficients = STAGES * TABLES[k.prologues[0]] * 32 * 4
    if k.flags[0]:
        slices = 2 * ROW_BYTES * sources * (k.rows + 2 * (c.side + 1))
        ring = STAGES * columns + BANKS_BYTES + slices + coefficients
    else:
        ring = STAGES * (rows + columns) + coefficients
    warps_of_rows = 4 if k.rows > k.columns else 2
    epilogue = VALUE * k.rows * (k.columns + 8) + 2 * 4 * warps_of_rows * k.columns
    return max(ring, epilogue + (4 * k.rows if which == "dgrad" else 0))


def resident(card: Card, k: Instance, shared: int) -> int:
    """Blocks that a multiprocessor holds."""
    processor = multiprocessor(card.arch)
    assert processor is not None, card.arch
    return min(k.blocks, processor.shared // round_up(shared + processor.reserved, processor.shared_unit))


def _instance(card: Card, c: Convolution, which: str, prologues: tuple[str, ...], rows: int, columns: int) -> Instance:
    """The kernel that this convolution is launched with."""
    whole_halo = c.taps == 3 and c.stride == 1
    fitting = [k for k in instances(card.arch)[1][which] if k.prologues == prologues]
    if which == "wgrad":
        side = 128 if c.filters > 64 else 64, 128 if c.filters > 64 and c.channels > 64 else 64
        fitting = [k for k in fitting if (k.columns % 3 == 0 if whole_halo else (k.rows, k.columns) == side)]
    else:
        # The first flag is the halo's, fprop's second that of inference.
        fitting = [k for k in fitting if k.flags[0] == whole_halo and not any(k.flags[1:])]

        def fills(tile: tuple[int, int]) -> bool:
            return math.ceil(rows / tile[0]) * math.ceil(columns / tile[1]) >= ENOUGH_BLOCKS

        tiles = [(128, 128)] * (columns > 64) + [(128, 64), (64, 64)]
        tile = next(filter(fills, tiles), tiles[-1])
        fitting = [k for k in fitting if (k.rows, k.columns) == tile]
    return _only(fitting, c, which)


def _only(fitting: Sequence[Instance], c: Convolution, which: str) -> Instance:
    if len(fitting) != 1:
        raise SystemExit(f"{COUNTS}: {len(fitting)} {which} kernels for {c}, not one; make it anew")
    return fitting[0]


def _quantised(blocks: int, resident: int) -> float:
    """By how much waves of ``resident`` blocks take longer than ``blocks`` would if they could be divided."""
    waves = blocks / resident
    part = waves - math.floor(waves)
    return 1.0 if part < 1e-9 else (math.floor(waves) + TAIL + (1 - TAIL) * part) / waves


def library_seconds(card: Card, c: Convolution, which: str) -> float:
    columns = {"fprop": c.filters, "dgrad": c.channels, "wgrad": min(c.channels, c.filters)}[which]
    share = card.cudnn_shares[which][columns < 128]
    share *= CUDNN_STRIDED_DGRAD if which == "dgrad" and c.stride == 2 else 1
    share *= CUDNN_1X1 if c.taps == 1 else 1
    work = norm((c.x + c.y + c.weight) / (card.dram * CUDNN_DRAM_SHARE), 2 * c.multiply_adds / (card.peak * share))
    return work / CUDNN_OVERLAP + LAUNCH


@dataclass(frozen=True)
class Seconds:
    convolutions: float = 0.0
    norms: float = 0.0  # with ReLUs and joins
    rest: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.convolutions + other.convolutions, self.norms + other.norms, self.rest + other.rest)

    @property
    def total(self) -> float:
        return self.convolutions + self.norms + self.rest


def eager_block(card: Card, block: Block) -> Seconds:
    first, last = block.chain[0], block.chain[-1]
    moved = sum(8 * c.y for c in block.units)  # batch norm: 3 passes forward, 5 backward
    moved += sum(5 * c.y for c in block.chain[:-1])  # ReLU: 2 and 3
    moved += (3 + 2 + 3) * last.y  # addition, the last ReLU and its backward
    moved += 3 * first.x  # the fork's gradients are added
    launches = 4 * len(block.units) + 2 * len(block.chain[:-1]) + 4
    convolutions = sum(library_seconds(card, c, which) for c in block.units for which in AROUND)
    return Seconds(convolutions, moved / (card.dram * EAGER_NORM) + launches * LAUNCH)


Choice = tuple[bool, bool]  # whether a unit's fprop is native, and its dgrad and wgrad


def our_block(card: Card, block: Block, choices: Sequence[Choice]) -> Seconds:
    """With the passes that resnet_fused/block.py makes."""
    units, last = block.units, len(block.chain) - 1
    convolutions = 0.0
    for i, (c, choice) in enumerate(zip(units, choices, strict=True)):
        fprop, backward = choice
        convolutions += (_native if fprop else _library)(card, c, "fprop")
        if backward:
            convolutions += _native_backward(card, c, i == 0)
        else:
            convolutions += _library(card, c, "dgrad") + _library(card, c, "wgrad")
    moved, launches = 0, 4 * len(units)  # bn_finalize and bn_backward_finalize
    for c, (fprop, _) in zip(units, choices, strict=True):
        moved += 0 if fprop else c.y  # bn_statistics
    for i in range(1, last + 1):
        y, (fprop, backward), below = units[i - 1].y, choices[i], choices[i - 1][1]
        moved += 0 if fprop else 2 * y  # the activation
        if not backward:
            moved += 5 * y if below else 3 * y  # bn_backward_reduce: with the activation, or the masked gradient
        if not below:
            moved += 3 * y  # bn_backward_apply
    z, x = units[last].y, units[0].x
    moved += 3 * z  # the join
    if block.projection:
        some = choices[last][1] or choices[-1][1]
        moved += (4 if some else 3) * z
        moved += sum(3 * z for c in (choices[last], choices[-1]) if not c[1]) if some else 5 * z
    else:
        moved += 4 * z + (0 if choices[last][1] else 3 * z)
    moved += 0 if choices[0][1] else 3 * x  # the shortcut's gradient
    return Seconds(convolutions, moved / (card.dram * OUR_NORM) + launches * LAUNCH)


_native, _native_backward, _library = cache(native_seconds), cache(native_backward_seconds), cache(library_seconds)


def best_block(card: Card, block: Block) -> Seconds:
    choices = itertools.product(itertools.product((False, True), (False, True)), repeat=len(block.units))
    return min((our_block(card, block, c) for c in choices), key=lambda s: s.total)


def stem_and_head(card: Card, eager: bool) -> Seconds:
    """The first convolution, the pooling, the classifier, and the update of the weights."""
    y, x, pooled = (VALUE * BATCH * n for n in (112 * 112 * 64, 224 * 224 * 3, 56 * 56 * 64))
    flops = 2 * BATCH * 112 * 112 * 64 * 147
    convolution = 2 * norm((x + y) / (card.dram * STEM_DRAM_SHARE), flops / (card.peak * STEM_PEAK_SHARE))
    passes = STEM_PASSES_EAGER / EAGER_NORM if eager else STEM_PASSES_OURS / OUR_NORM
    moved = y * passes + (POOLING_PASSES * y + POOLED_PASSES * pooled) / EAGER_NORM + UPDATE_BYTES
    return Seconds(rest=convolution + moved / card.dram + SMALL_KERNELS + STEM_LAUNCHES * LAUNCH)


VARIANTS = ("eager", "library", "native", "best mix")


def predicted(card: Card, name: str) -> dict[str, Seconds]:
    """A training step's seconds by variant."""
    blocks = network(name)
    found = {}
    for variant in VARIANTS:
        whole = stem_and_head(card, variant == "eager")
        for block, group in itertools.groupby(blocks):
            if variant == "eager":
                seconds = eager_block(card, block)
            elif variant == "best mix":
                seconds = best_block(card, block)
            else:
                seconds = our_block(card, block, [(variant == "native",) * 2] * len(block.units))
            for _ in group:
                whole += seconds
        found[variant] = whole
    return found


def constants() -> str:
    """What the model assumes, by name."""
    rows = []
    for card in CARDS:
        library = (f"{a:.2f}, {b:.2f}" for a, b in card.cudnn_shares.values())
        mma, wgmma = pipes.RATES[card.arch.rstrip("af")]
        rates = (f"{card.peak / 1e12:.0f}", f"{mma / wgmma:.0%}", f"{card.dram / 1e12:.2f}", f"{card.l2 / 1e12:.1f}")
        rows.append((card.name, str(card.multiprocessors), f"{card.ghz}", *rates, *library, instances(card.arch)[0]))
    header = ("card", "SMs", "GHz", "TFLOP/s", "mma.sync", "DRAM TB/s", "L2 TB/s")
    shares = tuple(f"cuDNN {which}" for which in AROUND)
    return "\n".join(
        (
            f"Assumed: NORM {NORM}, OVERLAP {OVERLAP}, LAUNCH {LAUNCH * 1e6:.0f} us, DRAM_SHARE {DRAM_SHARE}, "
            f"EAGER_NORM {EAGER_NORM}, OUR_NORM {OUR_NORM}, TAIL {TAIL}, "
            f"AROUND {', '.join(f'{which} {a}, {b}' for which, (a, b) in AROUND.items())};",
            f"of cuDNN: CUDNN_DRAM_SHARE {CUDNN_DRAM_SHARE}, CUDNN_OVERLAP {CUDNN_OVERLAP}, CUDNN_1X1 {CUDNN_1X1}, "
            f"CUDNN_STRIDED_DGRAD {CUDNN_STRIDED_DGRAD};",
            f"of the first convolution and the update: STEM_DRAM_SHARE {STEM_DRAM_SHARE}, "
            f"STEM_PEAK_SHARE {STEM_PEAK_SHARE}, STEM_PASSES_EAGER {STEM_PASSES_EAGER}, "
            f"STEM_PASSES_OURS {STEM_PASSES_OURS}, POOLING_PASSES {POOLING_PASSES}, POOLED_PASSES {POOLED_PASSES}, "
            f"UPDATE_BYTES {UPDATE_BYTES:.2g}, SMALL_KERNELS {SMALL_KERNELS * 1e3} ms, STEM_LAUNCHES {STEM_LAUNCHES}.",
            "Where they come from is said beside them in benchmarks/predict.py.",
            "cuDNN: share of the peak, of 128 columns and more, of 64. counts: the architecture that was counted.",
            table((*header, *shares, "counts"), rows),
        )
    )


def published(results: dict[tuple[str, str], dict[str, Seconds]]) -> str:
    rows = []
    for card, variant, rate, source in PUBLISHED:
        ours = BATCH / results[card, "resnet50"][variant].total
        rows.append((f"ResNet-50, {card}, {variant}", f"{ours:.0f}", str(rate), f"{ours / rate - 1:+.0%}", source))
    header = ("held against", "predicted images/s", "published", "off by", "where")
    return table(header, rows)


def report(names: Iterable[str] = ("resnet18", "resnet50")) -> str:
    """All tables. ``names``: the networks; ResNet-50 is what is held against published results."""
    results = {(card.name, name): predicted(card, name) for name in names for card in CARDS}
    rows = []
    for (card, name), variants in results.items():
        for variant, s in variants.items():
            parts = (f"{1e3 * t:.1f}" for t in (s.convolutions, s.norms, s.rest, s.total))
            ratio = variants["eager"].total / s.total
            rows.append((f"{name}, {card}, {variant}", *parts, f"{BATCH / s.total:.0f}", f"{ratio:.2f}"))
    header = ("PREDICTED", "convolutions ms", "norms, joins", "rest", "step ms", "images/s", "ratio")
    return "\n\n".join((HEADER, constants(), table(header, rows), published(results)))
