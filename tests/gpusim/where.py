# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Prints where the CUDA kernels can be tested: `gpu`, `simulator`, or a sentence that says why nowhere."""

import os
import platform
import re
import shlex
import shutil
import subprocess

import torch

GCC_MIN = 12


def on_a_gpu() -> str:
    import resnet_fused

    if resnet_fused.build_info()["cuda"]:
        return "gpu"
    return "resnet_fused was built without its CUDA kernels; if nvcc is here now, run `make clean` and again"


def on_the_simulator() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"no GPU, and the simulator needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    if torch.version.cuda is None:
        return f"no GPU, and torch {torch.__version__} is a build without CUDA"

    # Where torch.utils.cpp_extension looks, which says on importing that there is no GPU.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = f"{home}/bin" if home else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=folders)
    if not nvcc:
        return f"no GPU, and no nvcc to build for the simulator (CUDA toolkit {torch.version.cuda})"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", version)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"no GPU, and {nvcc} is not of CUDA {torch.version.cuda}, which torch is built with"

    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        return f"no GPU, and no {compiler[0]} to build the simulator"
    version = subprocess.run([*compiler, "-dumpversion"], capture_output=True, text=True).stdout
    if int(version.split(".")[0]) < GCC_MIN:
        return f"no GPU, and the simulator needs g++ {GCC_MIN} or later, not {version.strip()}"
    return "simulator"


if __name__ == "__main__":
    print(on_a_gpu() if torch.cuda.is_available() else on_the_simulator())
