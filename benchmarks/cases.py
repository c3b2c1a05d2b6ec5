# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""One case: a module and its contestants, checked, their kept bytes counted, timed in turn in this process."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.peers import compiled
from benchmarks.timing import Effort, Race, race, reason_of
from resnet_fused import testing
from resnet_fused.checks import Check, check
from resnet_fused.counting import bytes_kept

MODES = ("training", "inference")
# Of small work besides: evaluation that records a graph, and a frozen network's gradient of its input.
MORE_MODES = ("evaluation", "input gradient")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The engine that each contestant runs on.
ENGINES = {"eager": "auto", "fused": "auto", "minimal": "auto", "fold": "auto", "native": "native"}

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
    layout: torch.memory_format = torch.channels_last

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
    seconds: float | None = None  # of timing: of a block's case, of each process of a network
    peers: bool = False  # whether other software takes part
    native: bool = False  # whether fused with native convolutions takes part
    plan: bool = False  # whether fused blocks are planned first
    quick: bool = False

    @property
    def apart(self) -> bool:
        """Whether a network's contestants run in processes of their own; on a GPU nothing depends on the C library."""
        return self.device.type == "cpu"

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
        """The number of rounds asked for, or else some that take the seconds asked for, or else ``seconds``."""
        return Effort.exactly(self.rounds) if self.rounds else Effort(self.seconds or seconds)


def enter(name: str, module: nn.Module, case: Case) -> nn.Module:
    """``module`` itself, or a copy, made the contestant of that name, a key of `ENGINES`."""
    module = module.to(case.module_dtype).to(memory_format=case.layout).train(case.training)
    if name == "fold":
        return resnet_fused.fold(module)
    if name != "eager":
        resnet_fused.fuse(module)
    if name == "minimal":
        resnet_fused.set_memory(module, "minimal")
    return module


def contestants(module: nn.Module, case: Case, names: Iterable[str]) -> dict[str, nn.Module]:
    """Copies of ``module`` for the case, one for each name."""
    return {name: enter(name, copy.deepcopy(module), case) for name in names}


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
    if case.mode == "inference":
        return inference_step(module, x, case)
    if case.mode == "evaluation":
        return lambda: forward(module, x, case)
    if case.mode == "input gradient":
        return block_training_step(module.requires_grad_(False), x, case)
    return network_training_step(module, x, case) if case.is_network else block_training_step(module, x, case)


def on_engine(name: str, step: Callable[[], object]) -> Callable[[], object]:
    """``step`` on one of resnet_fused's engines."""

    def run() -> None:
        with resnet_fused.engine(name):
            step()

    return run


def compiled_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """`make_step` of a copy of ``module`` under torch.compile, compiled already; what goes wrong raises."""
    with compiled(copy.deepcopy(module), training=case.training) as network:
        step = make_step(network, x, case)
        step()
    return step


def contiguous_step(module: nn.Module, x: Tensor, case: Case) -> Callable[[], object]:
    """`make_step` of a copy of ``module`` that is eager in the contiguous layout."""
    case = replace(case, layout=torch.contiguous_format)
    return make_step(enter("eager", copy.deepcopy(module), case), x.contiguous(), case)


def verify(
    modules: dict[str, nn.Module], x: Tensor, draw: Callable[[int], Tensor], case: Case
) -> tuple[Check, dict[str, float]]:
    """Hold the others of ``modules`` against "eager" on ``draw(0)``, ...; bytes per image of ``x`` that each keeps."""
    verdict = check(
        modules["eager"],
        {name: module for name, module in modules.items() if name != "eager"},
        lambda index: draw(index).to(case.input_dtype),
        autocast=case.autocast,
        gradients=case.training,
        engines=ENGINES,
    )
    kept = {}
    if case.training:
        for name, module in modules.items():
            with resnet_fused.engine(ENGINES[name]):
                kept[name] = bytes_kept(module, partial(forward, module, x, case)) / len(x)
    return verdict, kept


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
    plan: bool = False

    def run(self) -> Outcome:
        """Check and time it."""
        case = self.case
        racing = ("eager", "fused", *(("native",) if self.native else ()))
        modules = contestants(self.module, case, (*racing, *(("minimal",) if case.training else ())))
        x = self.x.to(case.input_dtype)
        if self.plan:
            self.make_plans(modules["fused"], x)
        verdict, kept = verify(modules, x, self.draw, case)
        steps = {name: on_engine(ENGINES[name], make_step(modules[name], x, case)) for name in racing}
        if case.is_network and x.is_cuda:  # where users have either layout
            steps["contiguous"] = contiguous_step(self.module, x, case)
        absent = {}
        if self.compile:
            try:
                steps["compiled"] = compiled_step(modules["eager"], x, case)
            except Exception as error:  # whatever a compiler may raise: the others race without it
                absent["compiled"] = reason_of(error)
        return Outcome(case, len(x), verdict, race(steps, x.device, self.effort), kept, absent)

    def make_plans(self, module: nn.Module, x: Tensor) -> None:
        """Plans ``module``, in silence: the plans are in the user's file."""
        casting = torch.autocast(x.device.type, self.case.autocast) if self.case.autocast else contextlib.nullcontext()
        with casting, contextlib.redirect_stdout(io.StringIO()):
            resnet_fused.plan(module, x, training=self.case.training)
