# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Builds resnet_fused and its one extension, resnet_fused._C, against the torch that is installed.

    pip install --no-build-isolation .

The CUDA kernels are compiled for the visible GPUs. Environment: FORCE_CUDA=1 builds them without one, and for all
usual GPUs; TORCH_CUDA_ARCH_LIST says for which. RESNET_FUSED_LINEINFO=1 lets profilers and tests/gpusim name source
lines; RESNET_FUSED_PTX_ONLY=1 compiles the PTX in that list alone, which is all that tests/gpusim reads. CXX names the
compiler, MAX_JOBS bounds parallel compilation, RESNET_FUSED_WERROR=1 turns warnings into errors.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"
TORCH_MIN, TORCH_END = (2, 11), (2, 16)
BUILT_AGAINST = "built_against.txt"
# Of wheels, and of PTX for cards between these or beyond them, the oldest that the convolutions run on and the newest.
DEFAULT_CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
PTX_ARCH = "8.0"
LEAST_CAPABILITY = (7, 5)

CPP_SOURCES = [
    "csrc/bindings/library.cpp",
    "csrc/bindings/bn_ops.cpp",
    "csrc/bindings/conv_ops.cpp",
    "csrc/bindings/pool_ops.cpp",
    "csrc/bindings/module.cpp",
    "csrc/cpu/bn_cpu.cpp",
    "csrc/cpu/max_pool.cpp",
    "csrc/cpu/memory_pool.cpp",
    "csrc/cpu/kernels_baseline.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/conv/backend.cpp",
    "csrc/cpu/conv/direct.cpp",
    "csrc/cpu/conv/direct_plan.cpp",
    "csrc/cpu/conv/kernels_baseline.cpp",
    "csrc/cpu/conv/kernels_avx2.cpp",
    "csrc/cpu/conv/kernels_avx512.cpp",
    "csrc/cpu/conv/kernels_avx512_bf16.cpp",
    "csrc/cpu/conv/microkernel.cpp",
    "csrc/cpu/conv/results.cpp",
    "csrc/cpu/conv/transposed.cpp",
    "csrc/cpu/conv/wgrad.cpp",
    "csrc/cpu/conv/wgrad_plan.cpp",
    "csrc/cpu/conv/winograd.cpp",
    "csrc/cpu/conv/winograd_wgrad.cpp",
]
WITHOUT_CUDA_SOURCES = ["csrc/bindings/without_cuda.cpp"]
CUDA_SOURCES = [
    "csrc/cuda/backend.cpp",
    "csrc/cuda/bn_apply.cu",
    "csrc/cuda/bn_backward_apply.cu",
    "csrc/cuda/bn_backward_reduce.cu",
    "csrc/cuda/bn_finalize.cu",
    "csrc/cuda/bn_statistics.cu",
    "csrc/cuda/conv/backward.cu",
    "csrc/cuda/conv/dgrad.cu",
    "csrc/cuda/conv/fprop.cu",
    "csrc/cuda/conv/wgrad.cu",
    "csrc/cuda/relu_backward_add.cu",
    "csrc/cuda/served.cu",
]

# No -march: the files in csrc/cpu name their instruction set themselves and are chosen between at run time.
# -fopenmp, when compiling only: at::parallel_for is an inline function that runs serially without it. Linking
# with it would load the system's OpenMP next to the one in torch, with a second pool of threads; left
# undefined, its functions are found in torch's.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# -g0: Python's own flags may ask for debug information, a third of the time to compile and most of the file.
CXX_FLAGS += ["-g0"]
# -Wno-psabi: csrc/cpu/conv's vectors are wider than the default target's; they never cross a call that is not inlined.
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
# None may contain the letters "arch", or torch drops what it makes of TORCH_CUDA_ARCH_LIST, as `ptx_only` wants it.
# Include paths, which may, belong in include_dirs.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-g0,-Wall,-Wextra,-fvisibility=hidden"]

CXX20_PROBE = "#include <concepts>\ntemplate <std::integral T> T twice(T x) { return x + x; }\n"


def import_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(
            "resnet_fused: no torch in the build environment. The extension is compiled against the torch that "
            "will load it, so install torch first, then build without isolation:\n"
            "    pip install --no-build-isolation ."
        ) from None
    return torch


def check_torch_version(version: str) -> None:
    major, minor = version.split(".")[:2]
    if not TORCH_MIN <= (int(major), int(minor)) < TORCH_END:
        raise SystemExit(
            f"resnet_fused {VERSION} needs torch >= {TORCH_MIN[0]}.{TORCH_MIN[1]}, "
            f"< {TORCH_END[0]}.{TORCH_END[1]}; installed is {version}"
        )


def use_cuda(sources: list[str], torch_cuda: str | None, nvcc: bool, gpu: bool, force: bool) -> bool:
    """Whether to build the CUDA sources; stops where they were asked for and can't be built."""
    if force and torch_cuda is None:
        raise SystemExit("resnet_fused: FORCE_CUDA=1, but the installed torch is built without CUDA")
    if force and not nvcc:
        raise SystemExit(
            f"resnet_fused: FORCE_CUDA=1, but no nvcc was found. Install the CUDA toolkit {torch_cuda}, the "
            "version that torch was built with, and put its nvcc on PATH or its folder into CUDA_HOME"
        )
    return bool(sources) and torch_cuda is not None and nvcc and (gpu or force)


def known_archs(nvcc: Path) -> list[str]:
    """What `nvcc` compiles for: compute_75, ... Toolkits before 12.8, which torch comes for too, lack the newest."""
    return subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()


def is_known(arch: str, known: list[str]) -> bool:
    return f"compute_{arch.replace('.', '')}" in known


def default_arch_list(known: list[str]) -> str:
    """All usual GPUs of those that nvcc knows, with PTX for others."""
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if is_known(arch, known)]
    return ";".join(arch + "+PTX" * (arch in (PTX_ARCH, archs[-1])) for arch in archs)


def arch_list(capabilities: list[tuple[int, int]], known: list[str], force: bool) -> str:
    """For which GPUs to compile: those that are there, by their compute capabilities.

    All usual ones where that is forced, where there is none that the kernels are for, and where nvcc doesn't know one.
    """
    archs = [f"{major}.{minor}" for major, minor in sorted(set(capabilities)) if (major, minor) >= LEAST_CAPABILITY]
    if force or not archs or not all(is_known(arch, known) for arch in archs):
        return default_arch_list(known)
    return ";".join(archs)


def ptx_only(archs: str) -> list[str]:
    """Flags for nvcc that compile what has ``+PTX`` in a list of torch's to that, and nothing to machine code."""
    named = [arch.removesuffix("+PTX") for arch in archs.replace(" ", ";").split(";") if arch.endswith("+PTX")]
    numbers = [arch.replace(".", "") for arch in named]
    return [f"-gencode=arch=compute_{n},code=compute_{n}" for n in numbers]


def check_compiler(cxx: str) -> None:
    command = [*shlex.split(cxx), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        probe = subprocess.run(command, input=CXX20_PROBE, capture_output=True, text=True)
        problem = probe.stderr if probe.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        raise SystemExit(
            f"resnet_fused: needs a C++20 compiler, GCC 11 for example; '{cxx}' is none:\n{problem}\n"
            "Install one (Debian, Ubuntu: apt-get install g++), or name one: CXX=/path/to/g++"
        )


def find_toolkit(environ) -> None:
    """Sets CUDA_HOME where `nvcc` on PATH is a link to a toolkit elsewhere, or a script that calls it.

    torch would take the folder above this nvcc, and find neither headers nor libraries there.
    """
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is None or environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        return
    commands = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", commands, re.MULTILINE)
    if top and Path(top[1], "include", "cuda_runtime.h").exists():
        environ["CUDA_HOME"] = os.path.normpath(top[1])


def make_extension(torch, environ):
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension, include_paths

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    there = CUDA_HOME is not None and nvcc.exists()
    force = environ.get("FORCE_CUDA") == "1"
    cuda = use_cuda(CUDA_SOURCES, torch.version.cuda, there, torch.cuda.is_available(), force)
    cxx_flags, nvcc_flags = list(CXX_FLAGS), list(NVCC_FLAGS)
    if environ.get("RESNET_FUSED_WERROR") == "1":
        cxx_flags.append("-Werror")
        nvcc_flags.append("-Werror=all-warnings")
    if environ.get("RESNET_FUSED_LINEINFO") == "1":
        nvcc_flags.append("-lineinfo")
    if cuda and not environ.get("TORCH_CUDA_ARCH_LIST"):
        cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        environ["TORCH_CUDA_ARCH_LIST"] = arch_list(cards, known_archs(nvcc), force)
    if cuda and environ.get("RESNET_FUSED_PTX_ONLY") == "1":
        nvcc_flags += ptx_only(environ["TORCH_CUDA_ARCH_LIST"])  # torch then adds none of its own
    extension = (CUDAExtension if cuda else CppExtension)(
        name="resnet_fused._C",
        sources=CPP_SOURCES + (CUDA_SOURCES if cuda else WITHOUT_CUDA_SOURCES),
        depends=[str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in {".h", ".inl", ".cuh"}],
        define_macros=[("RESNET_FUSED_VERSION", f'"{VERSION}"')],
    )
    if there and torch.version.cuda is not None:
        # In builds without CUDA too, so that both have the same commands, and objects, for what both compile.
        # A toolkit may be only a compiler: the headers come with torch. Last, so that a whole one wins.
        wheels = Path(torch.__file__).parents[1] / "nvidia"
        extension.include_dirs = [*include_paths("cuda"), *map(str, sorted(wheels.glob("*/include")))]
    # Only other people's headers are here: as system headers, their warnings don't show.
    cxx_flags += [flag for path in extension.include_dirs for flag in ("-isystem", path)]
    extension.extra_compile_args = {"cxx": cxx_flags, "nvcc": nvcc_flags}
    return extension


def main() -> None:
    torch = import_torch()
    check_torch_version(torch.__version__)
    find_toolkit(os.environ)
    # Imported late, since it looks for the CUDA toolkit when imported.
    from torch.utils.cpp_extension import BuildExtension

    class BuildChecked(BuildExtension):
        def finalize_options(self) -> None:
            # Objects stay between builds; an editable install would take a new folder and compile all of it.
            self.build_temp = self.build_temp or f"build/{sys.implementation.cache_tag}"
            super().finalize_options()
            self.force = True  # ninja knows what to build; setuptools alone misses another torch, other flags

        def build_extensions(self) -> None:
            check_compiler(os.environ.get("CXX", "c++"))
            super().build_extensions()

        def run(self) -> None:
            super().run()
            # For resnet_fused/installation.py, which reads it before the extension is loaded.
            built = [torch.__version__]
            if any(source.endswith(".cu") for source in self.extensions[0].sources):
                built.append(os.environ["TORCH_CUDA_ARCH_LIST"])
            path = Path(self.get_ext_fullpath("resnet_fused._C")).with_name(BUILT_AGAINST)
            path.write_text("".join(f"{line}\n" for line in built))

    # Of another minor version, torch loads the extension with missing symbols or not at all.
    minor = ".".join(torch.__version__.split(".")[:2])
    setup(
        name="resnet_fused",
        version=VERSION,
        description="Fused residual blocks for PyTorch: convolution, batch norm, ReLU and shortcut",
        long_description=Path("README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author="the resnet_fused authors",
        license="BSD-3-Clause",
        keywords="pytorch resnet convolution batch-norm fused-kernels cuda",
        classifiers=[
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: C++",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
        packages=find_packages(include=["resnet_fused", "resnet_fused.*"]),
        package_data={"resnet_fused": ["py.typed", "*.pyi"]},
        python_requires=">=3.10",
        install_requires=[f"torch=={minor}.*"],
        extras_require={
            "test": ["pytest", "torchvision", "scikit-learn"],
            "bench": ["torchvision", "scikit-learn", "matplotlib"],
            "peers": ["onnx", "onnxscript", "onnxruntime", "openvino"],
        },
        ext_modules=[make_extension(torch, os.environ)],
        cmdclass={"build_ext": BuildChecked},
    )


if __name__ == "__main__":
    main()
