# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for each test, whichever tests run."""
    torch.manual_seed(0)
