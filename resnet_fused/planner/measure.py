# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Times of candidates: in turn, out of cold caches, each the median of some rounds."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resnet_fused.engine import without_autocast

Clock = Callable[[Callable[[], object]], float]  # seconds of a call
Found = TypeVar("Found")

SECONDS = 0.4  # of timing, per comparison
FEWEST_ROUNDS, MOST_ROUNDS = 5, 15
HOPELESS = 1.3  # times the fastest
HEAD_START = 2e-3  # seconds of other work on a GPU, longer than a block's launches take
LARGEST_CACHE = 256 << 20  # bytes; a virtual machine may report a cache that it shares with many


def cache_bytes(device: torch.device) -> int:
    """Of the last-level cache."""
    if device.type == "cuda":
        return min(LARGEST_CACHE, torch.cuda.get_device_properties(device).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not size.exists():
        return 32 << 20
    text = size.read_text().strip()
    return min(LARGEST_CACHE, int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))


def wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _Events:
    """Seconds that a GPU works on a call's kernels, which are launched while it is busy with other work."""

    def __init__(self, device: torch.device):
        self._other = torch.zeros(max(1 << 20, cache_bytes(device) // 2), device=device)
        self._passes = 1
        one = self(lambda: [self._other.sum() for _ in range(8)]) / 8
        self._passes = max(1, math.ceil(HEAD_START / max(1e-6, one)))

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._passes):
            self._other.sum()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> Clock:
    """Events on the current stream of a GPU, the wall clock on a CPU."""
    return _Events(device) if device.type == "cuda" else wall_clock


def medians(runs: Mapping[str, Callable[[Any], object]], operands: Sequence[Any], clock: Clock) -> dict[str, float]:
    """Median seconds of each run, in turn, on the next of ``operands`` each time.

    What takes more than ``HOPELESS`` times the fastest's time in the first round gets no other.
    """
    turn = 0

    def once(name: str) -> float:
        nonlocal turn
        operand = operands[turn % len(operands)]
        turn += 1
        return clock(lambda: runs[name](operand))

    for name in runs:
        once(name)  # warm-up
    times = {name: [once(name)] for name in runs}
    fastest = min(t[0] for t in times.values())
    racing = [name for name in runs if times[name][0] <= HOPELESS * fastest]
    total = sum(times[name][0] for name in racing)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / total))) if total else FEWEST_ROUNDS
    for index in range(1, rounds):
        first = index % len(racing)
        for name in racing[first:] + racing[:first]:
            times[name].append(once(name))
    return {name: statistics.median(t) for name, t in times.items()}


def step(call: Callable[[], object], learnt: Sequence[Tensor]) -> None:
    """Forward and, where something is recorded, backward to ``learnt``; nobody's ``grad`` is written."""
    outputs = [t for t in tree_leaves(call()) if isinstance(t, Tensor) and t.requires_grad]
    if outputs and learnt:
        torch.autograd.grad(outputs, learnt, [torch.ones_like(t) for t in outputs], allow_unused=True)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether that is what ``error`` says, of a GPU or of a CPU, where it has no class of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "not enough memory" in str(error) or "allocate memory" in str(error)


def apart(device: torch.device, function: Callable[[], Found]) -> Found:
    """``function()`` without the caller's modes: no autocast, gradients on; on a GPU in a thread and stream of its own.

    On a CPU in the caller's thread, unless that has hooks on saved tensors: the C library's memory of a new thread is
    new to it, too, which costs eager's allocations page faults that they do not have where a user trains.
    """
    if device.type == "cpu" and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast("cpu"):
            return function()
    found: list[Found] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                    found.append(function())
                    torch.cuda.synchronize(device)
            else:
                found.append(function())
        except BaseException as error:  # raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="resnet_fused plans")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
