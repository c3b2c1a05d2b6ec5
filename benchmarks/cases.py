# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""One case: a module, eager, fused, fused with native convolutions, compiled: checked, timed, kept bytes counted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.checks import Check, check
from benchmarks.memory import bytes_kept
from benchmarks.timing import Effort, Race, race
from resnet_fused import testing

MODES = ("training", "inference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The engine that each contestant runs on.
ENGINES = {"eager": "auto", "fused": "auto", "minimal": "auto", "native": "native"}

CUDA_BATCH = 64  # images, of blocks and networks alike: enough to fill a GPU, few enough for 16 GB of its memory


def dtypes_of(device: torch.device) -> tuple[str, ...]:
    """The keys of `DTYPES` that are measured on ``device``: few CPUs compute in float16."""
    return tuple(name for name in DTYPES if name != "float16" or device.type == "cuda")


@dataclass(frozen=True)
class Case:
    """What is measured. ``dtype`` names a key of `DTYPES`: autocast's in training, the module's in inference."""

    subject: str
    is_network: bool
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.subject}, {self.mode}, {self.dtype}"

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def autocast(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.training and self.dtype != "float32" else None

    @property
    def module_dtype(self) -> torch.dtype:
        return torch.float32 if self.training else DTYPES[self.dtype]

    @property
    def input_dtype(self) -> torch.dtype:
        """Networks get float32 images under autocast; blocks what the layers in front of them give under it."""
        return self.module_dtype if self.is_network else DTYPES[self.dtype]


@dataclass(frozen=True)
class Outcome:
    """What was found.

    ``kept`` holds bytes per image by contestant, in training; ``absent`` why a contestant is missing from the race.
    """

    case: Case
    batch: int
    check: Check
    race: Race
    kept: dict[str, float]
    absent: dict[str, str]


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. None leaves a value to the benchmark."""

    device: torch.device
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    size: int = 224  # pixels
    batch: int | None = None  # images
    rounds: int | None = None
    compile: bool = False  # whether torch.compile takes part
    native: bool = False  # whether fused with native convolutions takes part
    quick: bool = False

    @property
    def isolated(self) -> bool:
        """Whether every network's case gets a process of its own; on a GPU nothing depends on the C library."""
        return self.device.type == "cpu" and not self.quick

    def batch_or(self, usual: int) -> int:
        """The number of images asked for, or else what is usual: on a CPU ``usual``."""
        return self.batch or (CUDA_BATCH if self.device.type == "cuda" else usual)

    @property
    def cases_per_subject(self) -> int:
        return len(self.modes) * len(self.dtypes)

    def cases(self, subject: str, *, is_network: bool) -> Iterator[Case]:
        """The subject's case for every mode and dtype."""
        for mode in self.modes:
            for dtype in self.dtypes:
                yield Case(subject, is_network, mode, dtype)

    def effort(self, seconds: float) -> Effort:
        """The number of rounds asked for, or else some that take ``seconds``."""
        return Effort.exactly(self.rounds) if self.rounds else Effort(seconds)


def contestants(module: nn.Module, case: Case, *, native: bool = False) -> dict[str, nn.Module]:
    """Copies of ``module`` for the case: "eager", "fused", in training "minimal" (memory), if asked for "native"."""
    eager = copy.deepcopy(module).to(case.module_dtype, memory_format=torch.channels_last).train(case.training)
    result = {"eager": eager, "fused": copy.deepcopy(eager)}
    resnet_fused.fuse(result["fused"])
    if case.training:
        result["minimal"] = copy.deepcopy(result["fused"])
        resnet_fused.set_memory(result["minimal"], "minimal")
    if native:
        result["native"] = copy.deepcopy(result["fused"])
    return result


def forward(module: nn.Module, x: Tensor, case: Case) -> Tensor:
    """Run ``module`` under the case's autocast, if any."""
    casting = torch.autocast(x.device.type, case.autocast) if case.autocast else contextlib.nullcontext()
    with casting:
        return module(x)


def inference_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """A call that runs ``module`` on ``x`` without recording a graph."""
    return torch.no_grad()(lambda: forward(module, x, case))


def block_training_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """A call that runs ``module`` forward, and backward from a given gradient of its output to its input's."""
    x = x.detach().requires_grad_()
    gradient = testing.cotangent_like(forward(module, x, case))

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        forward(module, x, case).backward(gradient)

    return step


def network_training_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """A call that runs forward, cross-entropy, backward and a step of SGD with momentum."""
    labels = torch.arange(len(x), device=x.device) % 2
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(module, x, case).float(), labels).backward()
        optimizer.step()

    return step


def make_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """The call that is timed."""
    if not case.training:
        return inference_step(module, x, case)
    return network_training_step(module, x, case) if case.is_network else block_training_step(module, x, case)


def on_engine(name: str, step: Callable[[], object]) -> Callable[[], object]:
    """``step`` on one of resnet_fused's engines."""

    def run() -> None:
        with resnet_fused.engine(name):
            step()

    return run


def compiled_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """`make_step` of a copy of ``module`` under torch.compile, compiled already; what goes wrong raises."""
    # Without it the earlier cases' versions of the same forward count, and from the ninth on nothing is compiled.
    torch.compiler.reset()
    # The whole graph, so that nothing falls back to eager unnoticed.
    step = make_step(torch.compile(copy.deepcopy(module), fullgraph=True), x, case)
    step()
    return step


@dataclass(frozen=True)
class Job:
    """A case and what it takes to run it: it is timed on ``x`` and checked on ``draw(0)``, ``draw(1)``, ..."""

    case: Case
    module: nn.Module
    x: Tensor
    draw: Callable[[int], Tensor]
    effort: Effort
    compile: bool
    native: bool

    def run(self) -> Outcome:
        """Check and time it."""
        case = self.case
        modules = contestants(self.module, case, native=self.native)
        x = self.x.to(case.input_dtype)
        verdict = check(
            modules["eager"],
            {name: module for name, module in modules.items() if name != "eager"},
            lambda draw: self.draw(draw).to(case.input_dtype),
            autocast=case.autocast,
            gradients=case.training,
            engines=ENGINES,
        )
        kept = {}
        if case.training:
            for name, module in modules.items():
                with resnet_fused.engine(ENGINES[name]):
                    kept[name] = bytes_kept(module, lambda m=module: forward(m, x, case)) / len(x)
        racing = [name for name in modules if name != "minimal"]
        steps = {name: on_engine(ENGINES[name], make_step(modules[name], x, case)) for name in racing}
        absent = {}
        if self.compile:
            try:
                steps["compiled"] = compiled_step(modules["eager"], x, case)
            except Exception as error:  # whatever a compiler may raise: the others race without it
                absent["compiled"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(case, len(x), verdict, race(steps, x.device, self.effort), kept, absent)
