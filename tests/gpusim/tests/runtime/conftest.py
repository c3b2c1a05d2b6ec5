# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
import os

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ext():
    """The extension of kernels.cu, built by PyTorch's own machinery with nvcc."""
    from torch.utils.cpp_extension import load

    build_directory = os.path.join(os.environ["GPUSIM_BUILD"], "tests")
    os.makedirs(build_directory, exist_ok=True)
    return load(
        name="gpusim_test_kernels",
        sources=[os.path.join(HERE, "kernels.cu")],
        build_directory=build_directory,
        extra_cuda_cflags=["-O3", "-lineinfo", "-std=c++20"],
        verbose=False,
    )
