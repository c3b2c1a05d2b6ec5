# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""For tests that have to know whether the GPU they run on is the simulator of tests/gpusim."""

import os


def simulated() -> bool:
    """Whether it is: kernels then take thousands of times as long, so that small shapes are in order."""
    return os.environ.get("GPUSIM") == "1"
