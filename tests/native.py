# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""For tests of the native convolutions."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import ops


def not_multiplied(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Why the processor at hand has no native convolutions of ``dtype``; None if it has, and on a GPU."""
    x = torch.empty(1, 8, 1, 1, dtype=dtype)
    return ops.native_reason(x, x, (1, 1), (0, 0), (1, 1), 1) if device == "cpu" else None


needs_native = pytest.mark.skip_where(reason=not_multiplied)
