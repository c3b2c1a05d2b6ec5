# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""For tests that have to know which GPU they run on, and whether it is the simulator of tests/gpusim."""

import os

import pytest
import torch


def simulated() -> bool:
    """Whether it is: kernels then take thousands of times as long, so that small shapes are in order."""
    return os.environ.get("GPUSIM") == "1"


needs_tensor_cores = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="native convolutions need compute capability 8.0",
)
