# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What nvcc made of the CUDA kernels spills no registers, moves activations in 16 bytes and multiplies on tensor cores;
the report sees if not.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernel_report import (
    Kernel,
    find_cuobjdump,
    first_violations,
    kernel_table,
    parse,
    read,
)
from resnet_fused import _C

needs_names = pytest.mark.skipif(not shutil.which("c++filt"), reason="no c++filt, which comes with a C++ compiler")

# Excerpts of what cuobjdump 13.1 printed about three kernels, one of which spills registers.
APPLY = (
    "_ZN12resnet_fused4cuda16elementwise_rowsINS0_44_GLOBAL__N__8d952f3f_11_bn_apply_cu_9bbb5d95"
    "5ApplyINS0_8BFloat16ELNS0_8ShortcutE1EEELi8EEEvT_ll"
)
STATISTICS = (
    "_ZN12resnet_fused4cuda49_GLOBAL__N__ab5119d2_16_bn_statistics_cu_9a5e0e54"
    "15statistics_rowsINS0_7Float32ELi4EEEvPKNT_5ValueEPNS4_3AccEll"
)
INCREMENT = "_ZN12resnet_fused4cuda47_GLOBAL__N__09b6eaeb_14_bn_finalize_cu_d58aefe99incrementEPl"

RESOURCES = f"""
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux
compile_size = 64bit
identifier = bn_apply.cu

Resource usage:
 Common:
  GLOBAL:0
 Function {APPLY}:
  REG:108 STACK:0 SHARED:3328 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {INCREMENT}:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {STATISTICS}:
  REG:64 STACK:8 SHARED:8192 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ATTRIBUTES = f"""
arch = sm_90a

.nv.info.{APPLY}
\t<0x9>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
\t<0x12>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1


.nv.info.{INCREMENT}
\t<0x9>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
arch = sm_80

.nv.info.{STATISTICS}
\t<0x13>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x4 0x1
"""

SASS = f"""
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : {APPLY}
\t.headerflags\t@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*02d0*/                   LDG.E R4, desc[UR8][R4.64] ;                    /* 0x0000000804047981 */
        /*06b0*/              @!P0 LDG.E R12, desc[UR8][R4.64] ;                   /* 0x00000008040c8981 */
        /*0f00*/               @P0 LDG.E.128 R36, desc[UR8][R90.64] ;              /* 0x000000085a240981 */
        /*0f20*/               @P5 LDG.E.128 R40, desc[UR8][R70.64] ;              /* 0x0000000846285981 */
        /*1ac0*/                   STG.E.128 desc[UR8][R90.64], R68 ;              /* 0x000000445a007986 */

\t\tFunction : {INCREMENT}
        /*0030*/                   LDG.E.64 R2, desc[UR4][R4.64] ;                 /* 0x0000000404027981 */
        /*0060*/                   STG.E.64 desc[UR4][R4.64], R2 ;                 /* 0x0000000204007986 */
arch = sm_80

\t\tFunction : {STATISTICS}
        /*00e0*/                   STL.64 [R1], R4 ;                               /* 0x0000000401007387 */
        /*0540*/                   LDL.64 R4, [R1] ;                               /* 0x0000000001047983 */
        /*0750*/              @!P4 LDG.E.128.CONSTANT R20, [R54.64] ;              /* 0x000000043614c981 */
        /*2e80*/                   LDL.LU.64 R12, [R1] ;                           /* 0x00000000010c7983 */
        /*3440*/                   STG.E [R8.64], R2 ;                             /* 0x0000000208007986 */
"""


def parsed(sass: str = SASS) -> dict[str, Kernel]:
    kernels = parse(RESOURCES.splitlines(), ATTRIBUTES.splitlines(), sass.splitlines())
    return {kernel.name.partition("<")[0]: kernel for kernel in kernels}


@needs_names
def test_the_table():
    header, _, *rows = kernel_table(parsed().values()).splitlines()
    found = [dict(zip(re.split(" {2,}", header), re.split(" {2,}", row), strict=True)) for row in rows]
    columns = (
        *("kernel", "arch", "registers", "shared", "stack", "local", "128-bit loads", "stores", "8, 16 bits"),
        "HMMA, HGMMA",
    )
    assert [tuple(row[name] for name in columns) for row in found] == [
        ("statistics_rows<Float32, 4>", "sm_80", "64", "8192", "8", "3", "1", "0", "0", "0"),
        ("elementwise_rows<Apply<BFloat16, kPlain>, 8>", "sm_90a", "108", "2304", "0", "0", "2", "1", "0", "0"),
        ("increment", "sm_90a", "8", "0", "0", "0", "0", "0", "0", "0"),
    ]
    # 512 threads of 64 registers, 256 of 108, and 256 of 8, where no launch bound is known.
    assert [(row["threads"], row["blocks"], row["occupancy"]) for row in found] == [
        ("512", "2", "50%"),
        ("256", "2", "25%"),
        ("256", "8", "100%"),
    ]


@needs_names
def test_spilled_registers_are_violations():
    kernels = parsed()
    assert kernels["statistics_rows"].violations == [
        "sm_80 statistics_rows<Float32, 4>: a stack frame of 8 bytes",
        "sm_80 statistics_rows<Float32, 4>: 3 accesses to local memory",
    ]
    assert not kernels["elementwise_rows"].violations and not kernels["increment"].violations


@needs_names
@pytest.mark.parametrize(
    ("access", "instead", "violations"),
    [
        ("LDG.E.128 ", "LDG.E.64 ", ["no 128-bit load"]),
        ("LDG.E.128 ", "LDGSTS.E.BYPASS.128 ", []),
        ("STG.E.128 ", "STG.E ", ["no 128-bit store"]),
        ("STG.E.128 ", "STG.E.U16 ", ["no 128-bit store", "1 global accesses of 8 or 16 bits"]),
        ("@!P0 LDG.E ", "@!P0 LDG.E.U16.CONSTANT ", ["1 global accesses of 8 or 16 bits"]),
        ("@!P0 LDG.E ", "@!P0 LDL ", ["1 accesses to local memory"]),
    ],
)
def test_vector_kernels_may_have_no_narrow_accesses(access, instead, violations):
    name = "sm_90a elementwise_rows<Apply<BFloat16, kPlain>, 8>"
    assert access in SASS
    kernel = parsed(SASS.replace(access, instead))["elementwise_rows"]
    assert kernel.violations == [f"{name}: {violation}" for violation in violations]


# From what cuobjdump printed about a convolution for sm_80.
CONVOLUTION = """
        /*0f70*/                   LDGSTS.E.BYPASS.128 [R11], [R2.64], P1 ;                  /* 0x00000000020b7fae */
        /*2d00*/                   HMMA.16816.F32.BF16 R28, R40, R44.reuse, R28 ;            /* 0x0000002c281c723c */
        /*2d10*/                   HMMA.16816.F32.BF16 R24, R36, R44, R24 ;                  /* 0x0000002c2418723c */
        /*2d20*/              @!P0 BRA 0xf70 ;                                               /* 0xffffe24000008947 */
        /*3db0*/                   STG.E.128.STRONG.SM [R36.64], R16 ;                       /* 0x0000001024007986 */
"""


def convolution(arch: str, name: str, sass: str) -> Kernel:
    """The kernel `name` of one architecture with these instructions."""
    resources = f"arch = {arch}\n Function {name}:\n  REG:126 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560\n"
    (kernel,) = parse(resources.splitlines(), [], f"arch = {arch}\n\t\tFunction : {name}\n{sass}".splitlines())
    return kernel


@needs_names
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("name", ["fprop_kernel", "dgrad_kernel", "wgrad_kernel"])
@pytest.mark.parametrize(
    ("instruction", "instead", "violation"),
    [
        ("HMMA.16816.F32.BF16 ", "HGMMA.64x128x16.F32.BF16 ", None),
        ("HMMA.16816.F32.BF16 ", "FFMA ", "no tensor-core instruction"),
        ("LDGSTS.E.BYPASS.128 ", "LDGSTS.E.64 ", "no 128-bit load"),
        ("STG.E.128.", "STG.E.64.", "no 128-bit store"),
    ],
)
def test_convolutions_use_tensor_cores_and_wide_accesses(arch, name, instruction, instead, violation):
    kernel = convolution(arch, name, CONVOLUTION)
    assert kernel.tensor_cores == 2 and not kernel.violations
    assert instruction in CONVOLUTION
    kernel = convolution(arch, name, CONVOLUTION.replace(instruction, instead))
    # wgrad stores partial sums, no activations.
    flagged = violation and not (name == "wgrad_kernel" and "store" in violation)
    assert kernel.violations == ([f"{arch} {name}: {violation}"] if flagged else [])


@needs_names
def test_what_lies_between_two_files_belongs_to_no_kernel():
    """The lines between an architecture and its first kernel, of a library of two files with the same architectures."""
    archs = ("sm_80", "sm_90a")
    files = [(arch, name) for name in ("fprop_kernel", "dgrad_kernel") for arch in archs]
    resources = "".join(
        f"arch = {arch}\n Function {name}:\n  REG:126 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560\n"
        for arch, name in files
    )
    sass = "".join(f"arch = {arch}\n\tcode for {arch}\n\t\tFunction : {name}\n{CONVOLUTION}" for arch, name in files)
    kernels = parse(resources.splitlines(), [], sass.splitlines())
    assert len(kernels) == 4
    assert all(kernel.tensor_cores == 2 and kernel.loop for kernel in kernels)


@needs_names
def test_convolutions_without_a_body():
    """Expected where the architecture lacks the instructions, and wrong where it has them."""
    assert not convolution("sm_75", "fprop_kernel", "").violations
    assert len(convolution("sm_80", "fprop_kernel", "").violations) == 3


def test_of_many_violations_the_first_is_shown():
    kernels = [Kernel("sm_80", f"dgrad_kernel<{i}>", 32, 0, 0, 256, Counter()) for i in range(2)]
    kernels.append(Kernel("sm_80", "increment", 32, 8, 0, 256, Counter()))
    assert first_violations(kernels) == [
        "sm_80 dgrad_kernel<0>: no tensor-core instruction (and 5 more of dgrad_kernel)",
        "sm_80 increment: a stack frame of 8 bytes",
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        ("sm_80", 32, 0, 256, 8),  # by threads
        ("sm_86", 32, 0, 64, 16),  # by blocks
        ("sm_80", 33, 0, 256, 6),  # by registers, in units of 8 a thread
        ("sm_80", 154, 0, 256, 1),
        ("sm_80", 80, 24960, 256, 3),  # by registers
        ("sm_120", 32, 24960, 256, 3),
        ("sm_75", 32, 24960, 256, 2),  # by shared memory
        ("sm_90a", 32, 0, 1024, 2),
    ],
)
def test_resident_blocks(arch, registers, shared, threads, blocks):
    kernel = Kernel(arch, "kernel", registers, 0, shared, threads, Counter())
    assert kernel.occupancy[0] == blocks


@pytest.mark.cuda
@pytest.mark.slow(reason="disassembles every kernel")
def test_the_library_under_test():
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump, which comes with the CUDA toolkit and with Triton")
    kernels = read(cuobjdump, Path(_C.__file__))
    assert any(kernel.vector_of for kernel in kernels)
    violations = first_violations(kernels)
    assert not violations, "\n".join(violations)
