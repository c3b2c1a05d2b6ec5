# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Time on a GPU without its launching, and out of cold caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks.timing import seconds

CACHES = 4  # what empties a cache is so many times as large
HEAD_START_BYTES = 512 << 20  # at least, read at a time


class DeviceClock:
    """Measures by events how long a GPU works on a call's kernels, launched while it was busy with other work.

    ``head_start``: seconds of that work, which has to be longer than Python needs to launch the call's kernels, some
    10 us each. It reads more than the cache holds.
    """

    def __init__(self, device: torch.device, head_start: float):
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.zeros(max(HEAD_START_BYTES, CACHES * cache) // 4, device=device)
        self.other.sum()
        # Several at a time, so that launching them and waiting for them counts but once.
        self.passes = math.ceil(head_start / seconds(self.other.sum, device, calls=10))
        self.hidden = True  # whether all calls since this was set were launched before they began

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of one ``call``."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Only read: what it leaves in the cache need not be written back at the call's expense.
            for _ in range(self.passes):
                self.other.sum()
            begin.record()
            call()
            self.hidden &= not begin.query()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3
