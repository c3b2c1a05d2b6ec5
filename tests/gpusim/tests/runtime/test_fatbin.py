# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Fat binaries: every way nvcc compresses PTX, and which image is chosen. Also
what only compute capability 9.0 has. The programs have no PyTorch in them:
plain CUDA programs run too, if they link the shared runtime."""

import os
import shutil
import subprocess

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")]


def build(path, *flags, source="arch.cu"):
    subprocess.run(["nvcc", "-cudart", "shared", os.path.join(HERE, source), "-o", str(path), *flags],
                   check=True, capture_output=True, env={**os.environ, "LD_PRELOAD": ""})
    return str(path)


def run(program, device="a100"):
    library = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64")
    return subprocess.run([program], capture_output=True, text=True,
                          env={**os.environ, "GPUSIM_DEVICE": device, "LD_LIBRARY_PATH": library})


@pytest.mark.parametrize("mode", ["none", "speed", "balance", "size"])
def test_compression(tmp_path, mode):
    program = build(tmp_path / "p", "-gencode", "arch=compute_80,code=compute_80", f"--compress-mode={mode}")
    p = run(program)
    assert p.stdout.split() == ["cudaSuccess", "800", "1"], p.stderr


def test_choice_of_image(tmp_path):
    program = build(tmp_path / "p", *(f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("75", "80", "90", "90a")))
    for device, arch in (("t4", 750), ("a100", 800), ("rtx4090", 800), ("h100", 901)):
        p = run(program, device)
        assert p.stdout.split() == ["cudaSuccess", str(arch), "1"], p.stderr


def test_no_usable_image(tmp_path):
    program = build(tmp_path / "p", "-gencode", "arch=compute_80,code=sm_80")
    p = run(program)
    assert p.stdout.startswith("cudaErrorNoKernelImageForDevice")
    assert "machine code for sm_80" in p.stderr and "compute_80" in p.stderr and "arch" in p.stderr


def test_cooperative_launch(tmp_path):
    flags = "-std=c++17", "-gencode", "arch=compute_80,code=compute_80"
    program = build(tmp_path / "p", *flags, source="cooperative.cu")
    p = run(program)
    assert p.stdout.splitlines() == ["cudaSuccess 36", "cudaErrorCooperativeLaunchTooLarge"], p.stderr


def test_hopper(tmp_path):
    program = build(tmp_path / "p", "-std=c++17", "-gencode", "arch=compute_90a,code=compute_90a", source="hopper.cu")
    p = run(program, "h100")
    exchange, refused, tile = p.stdout.splitlines()
    assert exchange == "cudaSuccess 3 0 1 2 7 4 5 6", p.stderr
    assert refused == "cudaErrorInvalidClusterSize"
    assert tile == "0 cudaSuccess 0", p.stderr
