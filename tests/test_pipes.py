# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the report reads out of a kernel's SASS: its main loop, the pipes' cycles, and growth against the table."""

from collections import Counter
from dataclasses import asdict, replace

import pytest

from benchmarks import pipes
from benchmarks.kernel_report import BOUNDS, BOUNDS_ARCH, Kernel, beyond_bounds, counted, growth, pipe_table

HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def instructions(*lines: str) -> list[pipes.Instruction]:
    """As cuobjdump prints them, from address 0x100 in steps of 16."""
    printed = [f"        /*{0x100 + 16 * i:04x}*/          {line} ;   /* 0x0 */" for i, line in enumerate(lines)]
    return [pipes.instruction(line) for line in printed]


# Loops without products, a nest whose inner loop multiplies, and a smaller one that does for what is left.
KERNEL = instructions(
    "S2R R0, SR_TID.X",  # 0x100
    "IADD3 R1, R1, 0x1, RZ",  # 0x110
    "@P0 BRA 0x110",  # 0x120
    "LDGSTS.E.BYPASS.LTC128B.128 [R11], [R2.64], P1",  # 0x130: the outer loop
    "LDSM.16.M88.4 R8, [R20]",  # 0x140: the inner one
    "LDS.128 R16, [R21]",
    "FFMA R16, R16, R17, R18",
    "F2FP.BF16.PACK_AB R16, R16, R17",
    "@!P2 STS.64 [R21], R16",
    "@!P1 BRA 0x1a0",  # 0x190: leaves a part of it out
    HMMA,  # 0x1a0
    HMMA,
    "@P0 BRA 0x140",  # 0x1c0
    "@P3 BRA 0x130",  # 0x1d0
    HMMA,  # 0x1e0
    "@P0 BRA 0x1e0",  # 0x1f0
    "EXIT",
    "BRA 0x210",  # 0x210: to itself, as every kernel ends
)


def test_the_main_loop_is_the_innermost_with_the_most_products():
    assert pipes.main_loop(KERNEL) == (0x140, 0x1C0)


def test_no_loop_multiplies():
    assert pipes.main_loop(instructions("IADD3 R1, R1, 0x1, RZ", "BRA 0x100", HMMA, "EXIT")) is None
    assert pipes.count(instructions(HMMA, "EXIT")) is None


def test_counts_of_an_iteration():
    loop = pipes.count(KERNEL)
    assert (loop.instructions, loop.before, loop.after) == (9, 4, 5)
    assert loop.multiply_adds == 2 * 16 * 8 * 16
    assert (loop.ldsm, loop.lds, loop.sts, loop.ldgsts) == (1, 1, 1, 0)
    assert (loop.fp32, loop.conversions, loop.alu) == (1, 1, 1)
    # Four matrices and 64 bits of every thread; the load at full width, or as many bytes as are written back.
    assert (loop.shared, loop.loads_most, loop.loads_least) == (4 + 2, 4, 2)


def test_cycles_of_a_block():
    loop = pipes.count(KERNEL)
    cycles = loop.cycles("sm_80", warps=8)
    assert cycles.tensor == 8 * 2 * 2048 / 1024
    assert (cycles.issue, cycles.alu) == (8 * 9 / 4, 8 * 1 * 2 / 4)
    assert (cycles.shared, cycles.shared_most) == (8 * (6 + 2), 8 * (6 + 4))
    assert cycles.bound == "shared" and cycles.ceiling == 32 / 64
    assert loop.cycles("sm_90a", 8).tensor == pytest.approx(32 / (2 * 0.62))
    unknown = loop.cycles("sm_999", 8)
    assert unknown.tensor is None and unknown.ceiling is None and unknown.bound == "shared"


@pytest.mark.parametrize(
    ("product", "multiply_adds", "warpgroup", "half_rate"),
    [
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 16 * 8 * 8, False, True),
        ("HMMA.16816.F32 R4, R8, R12, R4", 16 * 8 * 16, False, False),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24", 64 * 128 * 16 // 4, True, False),
        ("HGMMA.64x256x8.F32.TF32 R24, gdesc[UR4], R24", 64 * 256 * 8 // 4, True, True),
    ],
)
def test_products_of_every_kind(product, multiply_adds, warpgroup, half_rate):
    loop = pipes.count(instructions(product, "@P0 BRA 0x100"))
    assert (loop.multiply_adds, loop.warpgroup, loop.half_rate) == (multiply_adds, warpgroup, half_rate)
    rate = 2048 if warpgroup else 2048 * 0.62
    assert loop.cycles("sm_90a", 4).tensor == pytest.approx(4 * multiply_adds / rate * (2 if half_rate else 1))


def kernel(loop: pipes.Loop) -> Kernel:
    return Kernel("sm_80", "fprop_kernel<BFloat16, Tile>", 126, 0, 0, 256, Counter(), loop)


def test_a_pipe_that_takes_longer_is_a_regression():
    loop = pipes.count(KERNEL)
    before = {"warps": 8, "blocks": 2, "loop": asdict(loop)}
    assert growth(kernel(loop), before) == [] and growth(kernel(loop), None) == []
    # The same loop unrolled twice asks the same of every product.
    twice = pipes.Loop(**{k: v if isinstance(v, bool) else 2 * v for k, v in asdict(loop).items()})
    assert growth(kernel(twice), before) == []
    for field, pipe in (("instructions", "issue"), ("alu", "alu"), ("shared", "shared")):
        (found,) = growth(kernel(replace(loop, **{field: 2 * getattr(loop, field)})), before)
        assert found.startswith(f"{pipe}: ") and "more cycles per product" in found
    assert growth(replace(kernel(loop), registers=255), before) == [
        "1 blocks on a multiprocessor; kernel_counts.json has 2"
    ]


@pytest.mark.parametrize("name", BOUNDS)
def test_what_a_stage_may_take(name):
    """Of the kernels as they were counted, and of the same with twice the instructions or accesses."""
    entry = counted()[BOUNDS_ARCH][name]
    found = replace(kernel(pipes.Loop(**entry["loop"])), name=name, threads=32 * entry["warps"])
    assert beyond_bounds(found) == []
    for field, pipe in (("instructions", "issue"), ("shared", "shared")):
        worse = replace(found, loop=replace(found.loop, **{field: 2 * getattr(found.loop, field)}))
        (said,) = beyond_bounds(worse)
        assert said.startswith(f"{pipe}: ") and "at most" in said
    assert beyond_bounds(replace(worse, arch="sm_90a")) == []


def test_a_kernel_that_the_table_lacks_is_said():
    """Else a new template parameter would end the comparison unnoticed."""
    unknown = replace(kernel(pipes.count(KERNEL)), instructions=Counter({("HMMA", 0): 2}))
    said = "sm_80 fprop_kernel<BFloat16, Tile>: not in kernel_counts.json, which --write makes anew"
    assert said in unknown.violations
    assert not any("counts.json" in v for v in replace(unknown, name="fprop_kernel<Float16, Tile>").violations)


def test_the_table_names_the_bound():
    header, _, row = pipe_table([kernel(pipes.count(KERNEL)), replace(kernel(None), name="other")]).splitlines()
    assert header.split()[-3:] == ["bound", "ceiling", "blocks"]
    assert row.startswith("fprop_kernel")
    assert row.split()[-3:] == ["shared", "50%", "2"]
