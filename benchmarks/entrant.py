# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a contestant's process does in its turn: it takes a network and images from a file and times its steps."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cases import ENGINES, Case, compiled_step, enter, make_step, on_engine
from benchmarks.peers import onnxruntime_step, openvino_step
from benchmarks.processes import Lap
from benchmarks.timing import Effort, race

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """A network and its images as files in ``folder``."""

    folder: Path

    @property
    def network(self) -> Path:
        return self.folder / "network.pt"

    @property
    def exported(self) -> Path:
        """The network as ONNX."""
        return self.folder / "network.onnx"

    def save(self, network: nn.Module, images: Tensor) -> None:
        torch.save((network, images), self.network)

    def load(self) -> tuple[nn.Module, Tensor]:
        return torch.load(self.network, weights_only=False)


def step_of(name: str, stored: Stored, case: Case) -> Callable[[], object]:
    """The contestant's step, ready to be timed but for a warm-up."""
    network, images = stored.load()
    if name == "onnxruntime":
        return onnxruntime_step(stored.exported, images)
    if name == "openvino":
        return openvino_step(stored.exported, images, case.dtype)
    x = images.to(case.input_dtype, memory_format=case.layout)
    if name == "compiled":
        return compiled_step(enter("eager", network, case), x, case)
    return on_engine(ENGINES[name], make_step(enter(name, network, case), x, case))


def peak() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def lap(name: str, stored: Stored, case: Case, effort: Effort) -> Lap:
    """Time the contestant's steps, ``effort.fewest_rounds`` at least, after one that isn't counted."""
    found = race({name: step_of(name, stored, case)}, CPU, effort)
    return Lap(statistics.median(found.seconds[name]), peak(), found.others)
