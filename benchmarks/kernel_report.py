# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What nvcc made of the CUDA kernels: registers, memory accesses, tensor cores, occupancy. Needs no GPU.

The exit status is 1 if a kernel spills registers or uses local memory, if an instance for vectors of 16 bytes does not
access its activations in such, or if a convolution does without tensor cores or such accesses, or asks more of a pipe
for its product than benchmarks/kernel_counts.json says (MOST_GROWTH) or than BOUNDS allow. `--write` makes that table
anew; the predictions of benchmarks/predict.py take their counts from it.

Shared memory that a launch asks for is not in the library: for a kernel with such, the occupancy is an upper bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from benchmarks import pipes
from benchmarks.tables import table

SOURCES = Path(__file__).parents[1] / "csrc"

VECTOR_BYTES = 16
VALUE_BYTES = {"Float64": 8, "Float32": 4, "BFloat16": 2, "Float16": 2}  # the storage types of types.cuh

# The convolutions' bodies are empty for architectures below, sm_75 for one (RESNET_FUSED_TENSOR_CORES in
# csrc/cuda/conv/launch_conv.cuh): the kernels need instructions that those lack, and are not launched there.
CONVOLUTIONS_FROM = 80
# Whether the kernel writes activations: wgrad leaves partial sums, two neighbouring floats at a time.
CONVOLUTIONS = {"fprop_kernel": True, "dgrad_kernel": True, "wgrad_kernel": False, "backward_kernel": True}

# Of the convolutions' main loops, by architecture and kernel: what `--write` found. The predictions read it, and a
# build is held to it: a change of the kernels that takes more than MOST_GROWTH of a pipe for the same product is a
# regression. Less than that may come of any edit, after which nvcc schedules otherwise.
COUNTS = Path(__file__).parent / "kernel_counts.json"
MOST_GROWTH = 1.05
PREDICTED_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
PREDICTED_DTYPE = "BFloat16"

# What a stage of the largest tile may take at most, in cycles of a block, while the tensor cores take 512: of issue
# slots and of shared memory. The last template arguments: whether with a halo, and, of fprop, whether in inference.
BOUNDS_ARCH = "sm_80"
LARGEST = "BFloat16, BlockTile<128, 128, 2, 2, 2>"
BOUNDS: dict[str, tuple[float, float]] = {
    f"fprop_kernel<{LARGEST}, AffineRelu, false, false>": (340, 560),
    f"dgrad_kernel<{LARGEST}, BackwardAffine, false>": (480, 700),
    f"wgrad_kernel<{LARGEST}, BackwardAffine, AffineRelu>": (620, 760),
    f"fprop_kernel<{LARGEST}, AffineRelu, true, false>": (340, 440),
    f"dgrad_kernel<{LARGEST}, BackwardAffine, true>": (480, 440),
}
# With a halo, ldmatrix and B's copies are every stage's; of what else is laid out for a stage, two chunks per thread,
# this part runs: 128 pixels with a halo of 29 on either side, image rows of 28, are 186 / 32 chunks for nine taps.
HALO_SHARED = 256 + 64
HALO_RUNS = (128 + 2 * 29) / 32 / 9 / 2

DEFAULT_THREADS = 256  # of a block, where a kernel has no launch bound
PART_REGISTERS = 16384  # of a sub-core, in which a warp stays
REGISTER_UNIT = 256  # a warp's registers are rounded up to it


@dataclass(frozen=True)
class Multiprocessor:
    """Limits from "Technical Specifications per Compute Capability" in the CUDA Programming Guide."""

    threads: int
    blocks: int
    shared: int
    reserved: int = 1024  # shared bytes of each block that are the system's
    shared_unit: int = 128
    counted: bool = False  # whether ptxas counts the system's bytes as the kernel's where that has some of its own


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10, reserved=0, shared_unit=256),
    "sm_80": Multiprocessor(2048, 32, 164 << 10),
    "sm_86": Multiprocessor(1536, 16, 100 << 10),
    "sm_89": Multiprocessor(1536, 24, 100 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, counted=True),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, counted=True),
    "sm_120": Multiprocessor(1536, 24, 100 << 10, counted=True),
}


def multiprocessor(arch: str) -> Multiprocessor | None:
    return MULTIPROCESSORS.get(arch.rstrip("af"))


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one architecture."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    threads: int  # of a block
    instructions: Counter[tuple[str, int]]  # by operation and bits that they access: ("LDG", 128), ("HMMA", 0)
    loop: pipes.Loop | None = None  # that multiplies

    def count(self, operations: str, fewest: int = 0, most: int = VECTOR_BYTES * 8) -> int:
        """How many instructions there are of these operations, with so many bits."""
        chosen = operations.split()
        return sum(n for (op, bits), n in self.instructions.items() if op in chosen and fewest <= bits <= most)

    @property
    def local(self) -> int:
        """Accesses to local memory, where spilled registers go."""
        return self.count("LDL STL")

    @property
    def narrow(self) -> int:
        """Accesses to 8 or 16 bits of global memory."""
        return self.count("LDG LDGSTS STG", most=16)

    @property
    def loads(self) -> int:
        """Loads of 128 bits, those of cp.async among them."""
        return self.count("LDG LDGSTS", fewest=VECTOR_BYTES * 8)

    @property
    def stores(self) -> int:
        """Stores of 128 bits."""
        return self.count("STG", fewest=VECTOR_BYTES * 8)

    @property
    def tensor_cores(self) -> int:
        """Tensor-core instructions."""
        return self.count(" ".join(pipes.TENSOR_CORES))

    @property
    def template(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def warps(self) -> int:
        return math.ceil(self.threads / pipes.WARP_THREADS)

    @property
    def cycles(self) -> pipes.Cycles | None:
        """Of a block and iteration of the main loop."""
        return None if self.loop is None else self.loop.cycles(self.arch, self.warps)

    @property
    def vector_of(self) -> int | None:
        """Bytes of a value if the last template argument says how many of them fill a vector."""
        types = re.findall(rf"\b({'|'.join(VALUE_BYTES)})\b", self.name)
        width = re.search(r", (\d+)>$", self.name)
        if not types or not width:
            return None
        size = VALUE_BYTES[types[0]]
        return size if size * int(width[1]) == VECTOR_BYTES else None

    @property
    def occupancy(self) -> tuple[int, float] | None:
        """Blocks that a multiprocessor holds at once, and the share of its threads that they are."""
        processor = multiprocessor(self.arch)
        if processor is None:
            return None
        warps = self.warps
        warps_of_a_part = PART_REGISTERS // round_up(self.registers * pipes.WARP_THREADS, REGISTER_UNIT)
        shared = round_up(self.shared + processor.reserved, processor.shared_unit)
        blocks = min(
            processor.blocks,
            processor.threads // (warps * pipes.WARP_THREADS),
            pipes.SUB_CORES * warps_of_a_part // warps,
            processor.shared // shared if shared else processor.blocks,
        )
        return blocks, blocks * warps * pipes.WARP_THREADS / processor.threads

    @property
    def violations(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.local:
            found.append(f"{self.local} accesses to local memory")
        if self.vector_of:
            if not self.loads:
                found.append("no 128-bit load")
            # Statistics write no activations, only what they found.
            if not self.stores and not self.name.startswith("statistics_"):
                found.append("no 128-bit store")
            # Coefficients have 32 bits or more, so that whatever is narrower is an activation.
            if self.vector_of == 2 and self.narrow:
                found.append(f"{self.narrow} global accesses of 8 or 16 bits")
        if self.template in CONVOLUTIONS and int(re.sub(r"\D", "", self.arch)) >= CONVOLUTIONS_FROM:
            if not self.tensor_cores:
                found.append("no tensor-core instruction")
            elif self.loop is None:
                found.append("no loop with tensor-core instructions")
            else:
                table = counted().get(self.arch, {})
                if table and PREDICTED_DTYPE in self.name and self.name not in table:
                    found.append(f"not in {COUNTS.name}, which --write makes anew")
                found += growth(self, table.get(self.name)) + beyond_bounds(self)
            if not self.loads:
                found.append("no 128-bit load")
            if not self.stores and CONVOLUTIONS[self.template]:
                found.append("no 128-bit store")
        return [f"{self.arch} {self.name}: {violation}" for violation in found]


def growth(kernel: Kernel, before: dict | None) -> list[str]:
    """Which pipes one multiply-add takes longer than it did, by more than MOST_GROWTH."""
    if before is None:
        return []
    assert kernel.loop is not None
    was = pipes.Loop(**before["loop"])
    then, now = was.cycles(kernel.arch, before["warps"]), kernel.cycles
    products = (was.multiply_adds * before["warps"], kernel.loop.multiply_adds * kernel.warps)
    found = []
    for pipe in ("issue", "alu", "shared"):
        a, b = (getattr(c, pipe) / n for c, n in zip((then, now), products, strict=True))
        if b > MOST_GROWTH * a:
            found.append(
                f"{pipe}: {b / a - 1:.0%} more cycles per product than in {COUNTS.name} (most: {MOST_GROWTH - 1:.0%})"
            )
    if kernel.occupancy and kernel.occupancy[0] < before["blocks"]:
        found.append(f"{kernel.occupancy[0]} blocks on a multiprocessor; {COUNTS.name} has {before['blocks']}")
    return found


def beyond_bounds(kernel: Kernel) -> list[str]:
    """Which of BOUNDS a main loop takes more than."""
    bounds = BOUNDS.get(kernel.name) if kernel.arch == BOUNDS_ARCH else None
    cycles = kernel.cycles
    if bounds is None or cycles is None:
        return []
    shared = (cycles.shared + cycles.shared_most) / 2
    if kernel.name.startswith(("fprop_kernel", "dgrad_kernel")) and ", true" in kernel.name:
        shared = HALO_SHARED + HALO_RUNS * (shared - HALO_SHARED)
    taken = {"issue": cycles.issue, "shared": shared}
    return [
        f"{pipe}: {found:.0f} cycles of a stage; at most {bound:.0f} are wanted"
        for (pipe, found), bound in zip(taken.items(), bounds, strict=True)
        if found > bound
    ]


@cache
def counted() -> dict[str, dict[str, dict]]:
    """By architecture and kernel what `--write` left."""
    return json.loads(COUNTS.read_text())["kernels"] if COUNTS.exists() else {}


def write_counts(kernels: Iterable[Kernel]) -> None:
    """Makes the table of COUNTS anew; of architectures that are not among ``kernels`` it keeps what it has."""
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for k in kernels:
        if k.loop and k.arch in PREDICTED_ARCHS and PREDICTED_DTYPE in k.name:
            blocks = k.occupancy[0] if k.occupancy else 1
            found[k.arch][k.name] = {"warps": k.warps, "blocks": blocks, "loop": asdict(k.loop)}
    whole = dict(sorted({**counted(), **found}.items()))
    note = "generated by python -m benchmarks.kernel_report --write"
    # One line per kernel, so that tables compare line by line.
    archs = []
    for arch, of in whole.items():
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in sorted(of.items()))
        archs.append(f"{json.dumps(arch)}: {{\n{lines}\n}}")
    COUNTS.write_text(f'{{"note": {json.dumps(note)}, "kernels": {{\n{",".join(archs)}\n}}}}\n')


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# What cuobjdump prints: of each cubin its architecture, then its kernels, each with a header and what belongs to it.
Key = tuple[str, str]  # architecture, mangled name
ARCHITECTURE = re.compile(r"arch = (\w+)")
RESOURCE_HEADER = re.compile(r" Function (\S+):")
ATTRIBUTE_HEADER = re.compile(r"\.nv\.info\.(\S+)")
SASS_HEADER = re.compile(r"\s+Function : (\S+)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
REPORTED = frozenset("LDG LDGSTS STG LDL STL HMMA HGMMA".split())


def of_kernels(lines: Iterable[str], header: re.Pattern[str]) -> Iterator[tuple[Key, str]]:
    """Each line, with the kernel that it belongs to."""
    arch, name = "", ""
    for line in lines:
        if found := ARCHITECTURE.match(line):
            arch, name = found[1], ""
        elif found := header.match(line):
            name = found[1]
        elif name:
            yield (arch, name), line


def launch_bounds(lines: Iterable[str]) -> dict[Key, int]:
    """Threads of a block, from the output of ``cuobjdump -elf``."""
    bounds, attribute = {}, ""
    for key, line in of_kernels(lines, ATTRIBUTE_HEADER):
        field, _, value = line.strip().partition(":")
        if field == "Attribute":
            attribute = value.strip()
        elif field == "Value" and attribute == "EIATTR_MAX_THREADS":
            bounds[key] = math.prod(int(extent, 16) for extent in value.split())
    return bounds


Counts = tuple[Counter[tuple[str, int]], pipes.Loop | None]


def counted_instructions(lines: Iterable[str]) -> dict[Key, Counts]:
    """Instructions by operation and bits, and the main loop, from the output of ``cuobjdump -sass``."""
    found: dict[Key, Counts] = {}
    for key, group in groupby(of_kernels(lines, SASS_HEADER), key=lambda pair: pair[0]):
        # One kernel's at a time: a library has millions.
        kernel = [i for _, line in group if (i := pipes.instruction(line))]
        counts: Counter[tuple[str, int]] = Counter()
        for i in kernel:
            if i.operation in REPORTED:
                counts[i.operation, 0 if i.operation in pipes.TENSOR_CORES else i.bits] += 1
        found[key] = counts, pipes.count(kernel)
    return found


def parse(resources: Iterable[str], attributes: Iterable[str], sass: Iterable[str]) -> list[Kernel]:
    """The kernels, from the output of ``cuobjdump`` with ``-res-usage``, ``-elf`` and ``-sass``."""
    found = {}
    for key, line in of_kernels(resources, RESOURCE_HEADER):
        if usage := RESOURCES.search(line):
            found[key] = [int(value) for value in usage.groups()]
    bounds, instructions = launch_bounds(attributes), counted_instructions(sass)
    names = demangled({name for _, name in found})
    kernels = [
        Kernel(
            arch=arch,
            name=readable(names[name]),
            registers=registers,
            stack=stack + local,
            shared=own_shared(arch, shared),
            threads=bounds.get((arch, name), DEFAULT_THREADS),
            instructions=counts,
            loop=loop,
        )
        for (arch, name), (registers, stack, shared, local) in found.items()
        for counts, loop in (instructions.get((arch, name), (Counter(), None)),)
    ]
    return sorted(kernels, key=lambda kernel: (len(kernel.arch.rstrip("af")), kernel.arch, kernel.name))


def own_shared(arch: str, counted: int) -> int:
    processor = multiprocessor(arch)
    return counted - processor.reserved if processor and processor.counted and counted else counted


def demangled(names: Iterable[str]) -> dict[str, str]:
    mangled = sorted(names)
    filtered = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return dict(zip(mangled, filtered.stdout.splitlines(), strict=True))


@cache
def enumerators() -> dict[str, list[str]]:
    """The names in each enum of the sources, which the compiler replaced by numbers."""
    found = {}
    for path in SOURCES.rglob("*.*h"):
        for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}=]*)\}", path.read_text()):
            found[name] = [enumerator.strip() for enumerator in body.split(",")]
    return found


def readable(name: str) -> str:
    """A demangled kernel's name without namespaces, result and parameters, and with enumerators for numbers."""

    def enumerator(cast: re.Match[str]) -> str:
        names = enumerators().get(cast[1], [])
        return names[int(cast[2])] if int(cast[2]) < len(names) else cast[1] + cast[2]

    name = re.sub(r"^void |\(anonymous namespace\)::|resnet_fused::(cuda::)?", "", name)
    return re.sub(r"\((\w+)\)(\d+)", enumerator, name).partition("(")[0]


def find_cuobjdump() -> Path | None:
    """From the CUDA toolkit, else the one that comes with Triton, which comes with torch."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    return Path(found) if found else None


def run_lines(command: Sequence[str | Path]) -> Iterator[str]:
    """A command's output as it comes: the SASS of a library has a few hundred megabytes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None  # they are pipes
        yield from process.stdout
        errors = process.stderr.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def read(cuobjdump: Path, library: Path, arch: str | None = None) -> list[Kernel]:
    """The kernels in a shared library, all of them or those of one architecture."""
    choice = ["-arch", arch] if arch else []
    return parse(*(run_lines([cuobjdump, *choice, what, library]) for what in ("-res-usage", "-elf", "-sass")))


def kernel_table(kernels: Iterable[Kernel]) -> str:
    header = (
        *("kernel", "arch", "registers", "shared", "stack", "local", "128-bit loads", "stores", "8, 16 bits"),
        *("HMMA, HGMMA", "threads", "blocks", "occupancy"),
    )
    rows = []
    for k in kernels:
        accesses = (k.stack, k.local, k.loads, k.stores, k.narrow)
        counts = (k.registers, k.shared, *accesses, k.tensor_cores, k.threads)
        blocks, share = k.occupancy or (None, None)
        full = ("?", "?") if blocks is None else (str(blocks), f"{share:.0%}")
        rows.append((k.name, k.arch, *map(str, counts), *full))
    return table(header, rows)


def pipe_table(kernels: Iterable[Kernel]) -> str:
    """Of each main loop, per iteration: one warp's instructions, then a whole block's cycles on each pipe."""
    header = (
        *("main loop", "arch", "instructions", "FMA", "LDSM", "LDS+STS", "LDGSTS", "FP32", "cvt+PRMT"),
        *("tensor", "issue", "ALU", "shared", "L2 bytes", "bound", "ceiling", "blocks"),
    )
    rows = []
    for k in kernels:
        loop, cycles = k.loop, k.cycles
        if loop is None or cycles is None:
            continue
        counts = (loop.instructions, loop.multiply_adds, loop.ldsm, loop.lds + loop.sts, loop.ldgsts)
        tensor = "?" if cycles.tensor is None else f"{cycles.tensor:.0f}"
        shared = f"{cycles.shared:.0f}..{cycles.shared_most:.0f}"
        ceiling = "?" if cycles.ceiling is None else f"{cycles.ceiling:.0%}"
        blocks = str(k.occupancy[0]) if k.occupancy else "?"
        rows.append(
            (
                *(k.name, k.arch, *map(str, (*counts, loop.fp32, loop.conversions))),
                *(tensor, f"{cycles.issue:.0f}", f"{cycles.alu:.0f}", shared, str(loop.copied * k.warps)),
                *(cycles.bound, ceiling, blocks),
            )
        )
    return table(header, rows)


def summary_table(kernels: Iterable[Kernel]) -> str:
    """Of each architecture the extremes."""
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.arch].append(kernel)
    rows = []
    for arch, group in groups.items():
        shares = [k.occupancy[1] for k in group if k.occupancy]
        counts = (
            len(group),
            sum(k.vector_of is not None for k in group),
            max(k.registers for k in group),
            max(k.shared for k in group),
        )
        violations = sum(len(k.violations) for k in group)
        rows.append((arch, *map(str, counts), f"{min(shares):.0%}" if shares else "?", str(violations)))
    header = ("arch", "kernels", "of vectors", "most registers", "most shared", "least occupancy", "violations")
    return table(header, rows)


def first_violations(kernels: Iterable[Kernel]) -> list[str]:
    """The first of each template and architecture, and how many follow: one mistake shows in every instance."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.arch, kernel.template] += kernel.violations
    return [
        group[0] + (f" (and {len(group) - 1} more of {template})" if len(group) > 1 else "")
        for (_, template), group in groups.items()
        if group
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Report on the library that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.partition("\n")[0])
    library_help = "default: the extension that is imported"
    parser.add_argument("--library", dest="extension", type=Path, metavar="PATH", help=library_help)
    parser.add_argument("--arch", metavar="NAME", help="only this architecture, such as sm_80")
    parser.add_argument("--write", action="store_true", help=f"make {COUNTS.name} anew, then hold the kernels to it")
    options = parser.parse_args(arguments)
    library = options.extension
    if library is None:
        from resnet_fused import _C

        library = Path(_C.__file__)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    try:
        kernels = read(cuobjdump, library, options.arch)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr.strip().partition("\n")[0]) from None
    if not kernels:
        raise SystemExit(f"{library} holds no CUDA kernels" + (f" for {options.arch}" if options.arch else ""))

    if options.write:
        write_counts(kernels)
        counted.cache_clear()
    print(kernel_table(kernels), "", sep="\n")
    if any(kernel.loop for kernel in kernels):
        print("Main loops: a warp's instructions, a block's cycles, per iteration. ceiling: of the tensor cores' rate.")
        print(pipe_table(kernels), "", sep="\n")
    print(summary_table(kernels), "", sep="\n")
    shown = first_violations(kernels)
    print(*(f"violation: {violation}" for violation in shown), sep="\n", end="\n" if shown else "")
    count = sum(len(kernel.violations) for kernel in kernels)
    print(f"{count or 'no'} violations in {len(kernels)} kernels of {library}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
