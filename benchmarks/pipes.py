# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What one iteration of a kernel's main loop asks of a multiprocessor's pipes, from its SASS.

The main loop is found, not named: of the innermost loops that hold tensor-core instructions, the one with the most.
What is laid out in it counts as run in every iteration, an upper bound where a branch leaves something out (a halo is
loaded once for nine taps); code that a branch leads to elsewhere is not counted. Cycles are of a whole block, as if
each pipe were the only one: the largest bounds the loop.

Rates: tensor cores from NVIDIA's architecture white papers (A100, AD102, H100; TF32 at half); that `mma.sync` reaches
62 % of an H100's is an assumption. A sub-core issues an instruction per cycle, of which the ALU takes one in two (16
lanes). Shared memory moves 128 bytes per cycle, and a shuffle takes a cycle of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TENSOR_CORES = ("HMMA", "HGMMA")  # a warp's and a warpgroup's instruction
WARP_THREADS = 32
WARPS_OF_A_GROUP = 4
SUB_CORES = 4
SHARED_BYTES = 128  # per cycle
ALU_CYCLES = 2
ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

# 16-bit multiply-adds with float32 sums per cycle and multiprocessor: by mma.sync, by wgmma. sm_86, 89 and 120 are the
# GeForce cards'; of 10.0 nothing is known.
RATES = {
    "sm_80": (1024, 1024),
    "sm_86": (256, 256),
    "sm_89": (256, 256),
    "sm_90": (2048 * 0.62, 2048),
    "sm_120": (256, 256),
}

# Instructions by what executes them; FP32 and IMAD go to the FMA pipe.
ALU = frozenset(
    "BMSK F2FP FMNMX FSEL FSET FSETP IABS IADD3 IADD IMNMX VIADD ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF "
    "VOTE".split()
)
FP32 = frozenset("FFMA FMUL FADD".split())
CONVERSIONS = frozenset("F2FP PRMT".split())
SHARED = frozenset("LDSM LDS STS LDGSTS SHFL".split())

_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@\S+ )?\s*([A-Z]\w*)((?:\.\w+)*)(.*?);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)")


class Instruction(NamedTuple):
    address: int
    operation: str
    modifiers: tuple[str, ...]
    target: int | None  # of a branch

    @property
    def multiply_adds(self) -> int:
        """Of one warp: m*n*k, written `16816` by mma.sync, and for a warpgroup `64x128x16` by wgmma."""
        for modifier in self.modifiers:
            if shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", modifier):
                return int(shape[1]) * int(shape[2]) * int(shape[3]) // WARPS_OF_A_GROUP
            if shape := re.fullmatch(r"(16)(8)(\d+)", modifier):
                return int(shape[1]) * int(shape[2]) * int(shape[3])
        return 0

    @property
    def bits(self) -> int:
        """Of a thread's access to memory; 32 are not written."""
        return next((ACCESS_BITS[m] for m in self.modifiers if m in ACCESS_BITS), 32)

    @property
    def matrices(self) -> int:
        """8x8 matrices of 16-bit values of an LDSM."""
        return next((int(m) for m in self.modifiers if m in ("2", "4")), 1)


def instruction(line: str) -> Instruction | None:
    """From a line of ``cuobjdump -sass``."""
    found = _LINE.match(line)
    if not found:
        return None
    target = _TARGET.search(found[4]) if found[2] == "BRA" else None
    modifiers = tuple(found[3].split(".")[1:])
    return Instruction(int(found[1], 16), found[2], modifiers, int(target[1], 16) if target else None)


def main_loop(kernel: Sequence[Instruction]) -> tuple[int, int] | None:
    """The first and the last address of the loop that multiplies; None without one."""
    products = [i.address for i in kernel if i.operation in TENSOR_CORES]

    def held(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address in products)

    ends = [(i.target, i.address) for i in kernel if i.target is not None and i.target <= i.address]
    loops = [loop for loop in ends if held(loop)]

    def is_innermost(loop: tuple[int, int]) -> bool:
        return not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)

    return max(filter(is_innermost, loops), key=held, default=None)


@dataclass(frozen=True)
class Loop:
    """One warp's instructions in an iteration of the main loop, and around it."""

    instructions: int
    before: int
    after: int
    multiply_adds: int
    warpgroup: bool  # wgmma
    half_rate: bool  # TF32
    fp32: int
    conversions: int
    alu: int
    ldsm: int
    lds: int
    sts: int
    ldgsts: int
    # Cycles of shared memory: all but loads by single threads; these at full width, and at least.
    shared: int
    loads_most: int
    loads_least: int
    copied: int  # bytes by cp.async

    def cycles(self, arch: str, warps: int) -> Cycles:
        rate = RATES.get(arch.rstrip("af"))
        tensor = None
        if rate is not None:
            tensor = warps * self.multiply_adds / rate[self.warpgroup] * (2 if self.half_rate else 1)
        return Cycles(
            tensor=tensor,
            issue=warps * self.instructions / SUB_CORES,
            alu=warps * self.alu * ALU_CYCLES / SUB_CORES,
            shared=warps * (self.shared + self.loads_least),
            shared_most=warps * (self.shared + self.loads_most),
        )


class Cycles(NamedTuple):
    """Of a block and iteration. ``tensor``: None where the card's rate isn't known."""

    tensor: float | None
    issue: float
    alu: float
    shared: float
    shared_most: float

    @property
    def bound(self) -> str:
        """The pipe that takes longest."""
        pipes = {"tensor": self.tensor or 0.0, "issue": self.issue, "ALU": self.alu, "shared": self.shared}
        return max(pipes, key=pipes.__getitem__)

    @property
    def ceiling(self) -> float | None:
        """The share of the tensor cores' rate that the other pipes leave."""
        if self.tensor is None:
            return None
        return min(1.0, self.tensor / max(self.issue, self.alu, self.shared))


def count(kernel: Iterable[Instruction]) -> Loop | None:
    """The main loop of a kernel, given in the order of its addresses."""
    kernel = list(kernel)
    found = main_loop(kernel)
    if found is None:
        return None
    first, last = found
    body = [i for i in kernel if first <= i.address <= last]
    operations = Counter(i.operation for i in body)
    products = [i for i in body if i.operation in TENSOR_CORES]
    wavefronts = Counter({op: sum(_wavefronts(i) for i in body if i.operation == op) for op in SHARED})
    # A load of a table is one wavefront if a warp reads it together. Of data no fewer are read than are written back.
    least = max(operations["LDS"], min(wavefronts["LDS"], wavefronts["STS"]))
    return Loop(
        instructions=len(body),
        before=sum(i.address < first for i in kernel),
        after=sum(i.address > last for i in kernel),
        multiply_adds=sum(i.multiply_adds for i in products),
        warpgroup=any(i.operation == "HGMMA" for i in products),
        half_rate=any("TF32" in i.modifiers for i in products),
        fp32=sum(operations[op] for op in FP32),
        conversions=sum(operations[op] for op in CONVERSIONS),
        alu=sum(operations[op] for op in ALU),
        ldsm=operations["LDSM"],
        lds=operations["LDS"],
        sts=operations["STS"],
        ldgsts=operations["LDGSTS"],
        shared=sum(wavefronts[op] for op in SHARED - {"LDS"}),
        loads_most=wavefronts["LDS"],
        loads_least=least,
        copied=sum(i.bits // 8 * WARP_THREADS for i in body if i.operation == "LDGSTS"),
    )


def _wavefronts(i: Instruction) -> int:
    if i.operation == "LDSM":
        return i.matrices
    if i.operation == "SHFL":
        return 1
    return max(1, i.bits // 8 * WARP_THREADS // SHARED_BYTES)
