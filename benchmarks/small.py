# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Small and unusual work, eager against fused on the CPU: whether fused is ever slower."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import processes, report
from benchmarks.cases import Case, Settings
from benchmarks.entrant import Stored, lap
from benchmarks.networks import ROUNDS, SECONDS, build
from benchmarks.photographs import photographs
from benchmarks.timing import Effort, Race

NAMES = ("eager", "fused")
MOST_STEPS = 200  # of a process

LAYOUTS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True)
class SmallCase(Case):
    """A case of a network on ``batch`` images of ``size`` pixels."""

    batch: int = 1
    size: int = 224

    def __str__(self) -> str:
        pixels = f"{self.size}x{self.size}"
        return f"{self.subject}, {self.mode}, {self.dtype}, {LAYOUTS[self.layout]}, {self.batch} of {pixels}"


def case(
    network: str,
    mode: str,
    *,
    batch: int,
    size: int = 224,
    dtype: str = "float32",
    layout: torch.memory_format = torch.channels_last,
) -> SmallCase:
    return SmallCase(network, True, mode, dtype, layout, batch, size)


CASES = (
    case("resnet50", "inference", batch=1),
    case("resnet50", "inference", batch=1, layout=torch.contiguous_format),
    case("resnet50", "inference", batch=1, size=64),
    case("resnet50", "inference", batch=16, size=64),
    case("resnet50", "training", batch=1, size=64),
    case("resnet50", "training", batch=16, size=64),
    case("resnet50", "evaluation", batch=1),
    case("resnet50", "evaluation", batch=4),
    case("resnet50", "inference", batch=4, dtype="bfloat16", layout=torch.contiguous_format),
    case("mobilenet_v2", "training", batch=4),
    case("resnet50", "input gradient", batch=4),
)
QUICK_BATCH, QUICK_SIZE = 2, 64  # images and pixels at most


@dataclass(frozen=True)
class Outcome:
    """What was found; ``absent``: why a contestant is missing from the race."""

    case: SmallCase
    race: Race
    absent: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A case, how many rounds of processes it gets, and how long each measures."""

    case: SmallCase
    rounds: int
    effort: Effort

    def run(self) -> Outcome:
        """Time it."""
        case = self.case
        with tempfile.TemporaryDirectory() as folder:
            stored = Stored(Path(folder))
            images = photographs(case.batch, case.size)
            stored.save(build(case.subject, images), images)
            found = processes.race(
                NAMES, self.rounds, lambda name: processes.apart(lap, name, stored, case, self.effort)
            )
        return Outcome(case, *found)


def select(settings: Settings) -> list[SmallCase]:
    """The cases of the settings' dtypes."""
    chosen = [c for c in CASES if c.dtype in settings.dtypes]
    if not settings.quick:
        return chosen
    return [replace(c, batch=min(c.batch, QUICK_BATCH), size=min(c.size, QUICK_SIZE)) for c in chosen]


def jobs(settings: Settings) -> Iterator[Job]:
    """Every selected case."""
    effort = Effort.exactly(1) if settings.quick else Effort(settings.seconds or SECONDS, 2, MOST_STEPS)
    for chosen in select(settings):
        yield Job(chosen, settings.rounds or ROUNDS, effort)


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    return ", ".join([*(f"{name}: {reason}" for name, reason in outcome.absent.items()), speed(outcome)])


def speed(outcome: Outcome) -> str:
    return report.ratio(outcome.race.speed("fused", "eager")) if "fused" in outcome.race.compared else ""


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per case."""
    rows = []
    for o in outcomes:
        times = [
            report.milliseconds(o.race.time(name), 1) if name in o.race.seconds else o.absent[name].partition(":")[0]
            for name in NAMES
        ]
        c = o.case
        rows.append((c.subject, c.mode, c.dtype, LAYOUTS[c.layout], str(c.batch), str(c.size), *times, speed(o)))
    header = ("", "mode", "dtype", "layout", "batch", "pixels", *(f"{name} ms" for name in NAMES), "speed")
    return report.table(header, rows)


def records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON; times in seconds per batch."""
    return [
        {
            "subject": o.case.subject,
            "mode": o.case.mode,
            "dtype": o.case.dtype,
            "layout": LAYOUTS[o.case.layout],
            "batch": o.case.batch,
            "pixels": o.case.size,
            **{f"{name}_seconds": asdict(o.race.time(name)) for name in o.race.seconds},
            **{f"{name}_speed": asdict(o.race.speed(name, "eager")) for name in o.race.compared},
            "peak_bytes": o.race.peak,
            "cores_busy_with_others": o.race.others,
            "rounds": o.race.rounds,
            **({"absent": o.absent} if o.absent else {}),
        }
        for o in outcomes
    ]
