# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the benchmarks leave behind: tables, JSON and plots."""

from __future__ import annotations

import json
import platform
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torchvision

import resnet_fused
from benchmarks.cases import Outcome
from benchmarks.tables import table
from benchmarks.timing import Race, Spread

# Contestants as they are listed, each with its colour and its mark in plots.
STYLES = {
    "eager": ("#9aa5b1", "|"),
    "contiguous": ("#5c6773", "v"),
    "fused": ("#4f8fe6", "|"),
    "minimal": ("#2da44e", "s"),
    "fold": ("#14746f", "^"),
    "native": ("#b0457a", "o"),
    "compiled": ("#d9822b", "D"),
    "onnxruntime": ("#7a5195", "P"),
    "openvino": ("#c1121f", "X"),
}
NETWORK_COLOUR = "#1f4e9c"


class HasAbsent(Protocol):
    @property
    def absent(self) -> dict[str, str]: ...


def device_name(device: torch.device) -> str:
    """The hardware's name, for a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = model[1] if model else name
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """``name`` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "resnet_fused": {key: str(value) for key, value in resnet_fused.build_info().items()},
        **(cuda_environment() if device.type == "cuda" else {}),
    }


def cuda_environment() -> dict[str, object]:
    """What the numbers of a GPU depend on besides; float32 convolutions round to TF32 if that is allowed."""
    cudnn = torch.backends.cudnn
    return {
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "cudnn_benchmark": cudnn.benchmark,
        "tf32_convolutions": cudnn.allow_tf32,
    }


def milliseconds(spread: Spread, batch: int) -> str:
    """Median and quartiles per image, from seconds per batch."""
    median, low, high = (1e3 * s / batch for s in (spread.median, spread.low, spread.high))
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}]"


def entered(outcomes: Sequence[Outcome]) -> list[str]:
    """The contestants of any of the outcomes, those that are absent, too."""
    names = {name for o in outcomes for name in (*o.race.seconds, *o.absent)}
    return [name for name in STYLES if name in names]


def speed_of(name: str, outcome: Outcome) -> str:
    """Eager's time over the contestant's, if both are there and differ."""
    return ratio(outcome.race.speed(name, "eager")) if name in outcome.race.compared else ""


def time_of(name: str, outcome: Outcome) -> str:
    """The contestant's time, or why there is none."""
    if name in outcome.race.seconds:
        return milliseconds(outcome.race.time(name), outcome.batch)
    return outcome.absent.get(name, "").partition(":")[0]


def speed_columns(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A table's columns of times and of speeds against eager: their headers, then the cells of every outcome."""
    kinds = (("ms/image", time_of), ("speed", speed_of))
    columns = {f"{name} {what}": (name, cell) for name in entered(outcomes) for what, cell in kinds}
    columns.pop("eager speed", None)
    return [tuple(columns), *(tuple(cell(name, o) for name, cell in columns.values()) for o in outcomes)]


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    speeds = [f"{name} {speed_of(name, outcome)}" for name in outcome.race.compared]
    missing = [f"{name}: {time_of(name, outcome)}" for name in outcome.absent]
    return ", ".join([f"check {outcome.check}", *speeds, *missing])


def absences(outcomes: Sequence[HasAbsent]) -> list[str]:
    """One line per contestant and reason for its absence, as short as lines of a terminal."""
    counts = Counter(f"{name}: {reason}" for o in outcomes for name, reason in o.absent.items())
    return [f"{textwrap.shorten(text, 300)} ({n} of {len(outcomes)} cases)" for text, n in counts.items()]


def kept_ratio(outcome: Outcome, contestant: str) -> str:
    return f"{outcome.kept[contestant] / outcome.kept['eager']:.2f}x" if contestant in outcome.kept else ""


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """One line per case of a block, then one per contestant of a network's."""
    found = [o for o in outcomes if not o.case.is_network], [o for o in outcomes if o.case.is_network]
    return "\n\n".join(make(some) for make, some in zip((block_table, network_table), found, strict=True) if some)


def block_table(outcomes: Sequence[Outcome]) -> str:
    """One line per case."""
    speed_header, *speeds = speed_columns(outcomes)
    header = ("", "mode", "dtype", "batch", *speed_header, "kept MB/image", "fused", "minimal", "check")
    rows = [
        (
            o.case.subject,
            o.case.mode,
            o.case.dtype,
            str(o.batch),
            *cells,
            f"{o.kept['eager'] / 1e6:.2f}" if o.kept else "",
            kept_ratio(o, "fused"),
            kept_ratio(o, "minimal"),
            str(o.check),
        )
        for o, cells in zip(outcomes, speeds, strict=True)
    ]
    return table(header, rows)


def network_table(outcomes: Sequence[Outcome]) -> str:
    """One line per case and contestant; "peak" is of the contestant's process."""
    rows = []
    for o in outcomes:
        case: tuple[str, ...] = (o.case.subject, o.case.mode, o.case.dtype, str(o.batch))
        verdict = str(o.check)
        for name in entered([o]):
            peak = f"{o.race.peak[name] / 1e9:.2f}" if name in o.race.peak else ""
            kept = f"{o.kept[name] / 1e6:.2f}" if name in o.kept else ""
            rows.append((*case, name, time_of(name, o), speed_of(name, o), peak, kept, verdict))
            case, verdict = ("",) * len(case), ""
    header = ("", "mode", "dtype", "batch", "", "ms/image", "speed", "peak GB", "kept MB/image", "check")
    return table(header, rows)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Geometric means of the blocks' speeds and each network's against eager, by mode and dtype."""
    groups: dict[tuple[str, str, str], list[Race]] = {}
    for o in outcomes:
        name = o.case.subject if o.case.is_network else f"{o.case.subject.partition('.')[0]}'s blocks"
        groups.setdefault((name, o.case.mode, o.case.dtype), []).append(o.race)

    def mean(races: Sequence[Race], name: str) -> str:
        speeds = [race.speed(name, "eager").median for race in races if name in race.compared]
        return f"{statistics.geometric_mean(speeds):.2f}x" if speeds else ""

    names = [name for name in entered(outcomes) if name != "eager"]
    rows = [(*key, *(mean(races, name) for name in names)) for key, races in groups.items()]
    return table(("geometric mean of speeds", "mode", "dtype", *names), rows)


def as_record(outcome: Outcome) -> dict[str, object]:
    """The outcome as JSON; times in seconds per batch, speeds against eager, kept bytes per image."""
    case, check, race = outcome.case, outcome.check, outcome.race
    record = {
        "subject": case.subject,
        "mode": case.mode,
        "dtype": case.dtype,
        "batch": outcome.batch,
        "check": {
            "passed": check.passed,
            "tensors": check.compared,
            "inputs": check.draws,
            "worst": str(check.worst),
            "failures": check.failures,
        },
        **{f"{name}_seconds": asdict(race.time(name)) for name in race.seconds},
        **{f"{name}_speed": asdict(race.speed(name, "eager")) for name in race.compared},
        "cores_busy_with_others": race.others,
        "rounds": race.rounds,
        "kept_bytes_per_image": outcome.kept,
    }
    if race.peak:
        record["peak_bytes"] = race.peak
    if outcome.absent:
        record["absent"] = outcome.absent
    return record


def write_json(path: Path, device: torch.device, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)  # one per outcome, so that they compare line by line
    path.write_text(f'{{"environment": {json.dumps(environment(device), indent=1)},\n"outcomes": [\n{lines}\n]}}\n')


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def panels(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes by mode and dtype."""
    found: dict[str, list[Outcome]] = {}
    for o in outcomes:
        found.setdefault(f"{o.case.mode}, {o.case.dtype}", []).append(o)
    return found


def plot_speed(outcomes: Sequence[Outcome], path: Path, device: torch.device) -> None:
    """Speed with quartiles, one panel per mode and dtype; contestants besides fused are marks."""
    groups = panels([o for o in outcomes if "fused" in o.race.compared])
    if not groups:
        return
    most = max(map(len, groups.values()))
    shape = (2 + 3 * len(groups), 1.4 + 0.28 * most)
    figure, axes = plt.subplots(1, len(groups), figsize=shape, squeeze=False, sharex=True, sharey=True)
    marks = {}
    for ax, (title, group) in zip(axes[0], groups.items(), strict=True):
        speeds = [o.race.speed("fused", "eager") for o in group]
        medians = [s.median for s in speeds]
        spread = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
        colours = [NETWORK_COLOUR if o.case.is_network else STYLES["fused"][0] for o in group]
        ax.barh([o.case.subject for o in group], medians, xerr=spread, color=colours, ecolor="#555555")
        for name in entered(group):
            present = [o for o in group if name in o.race.compared]
            if present and name != "fused":
                medians = [o.race.speed(name, "eager").median for o in present]
                subjects = [o.case.subject for o in present]
                colour, mark = STYLES[name]
                (marks[name],) = ax.plot(medians, subjects, mark, color=colour, linestyle="none")
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8)
    axes[0][0].invert_yaxis()
    if marks:
        figure.legend(marks.values(), marks.keys(), fontsize=8, loc="lower left")
    figure.supxlabel("eager's time / fused time (median, quartiles); above 1 is faster", fontsize=9)
    figure.suptitle(f"Speed against eager: {device_name(device)}", fontsize=11)
    figure.tight_layout()
    save(figure, path)


KEPT_LABELS = {"fused": "fused", "minimal": 'fused, memory="minimal"'}


def plot_kept(outcomes: Sequence[Outcome], path: Path) -> None:
    """Bytes kept for backward relative to eager's, one panel per dtype; training's outcomes only."""
    groups = panels([o for o in outcomes if o.kept])
    if not groups:
        return
    most = max(map(len, groups.values()))
    shape = (3 + 3 * len(groups), 1.4 + 0.34 * most)
    figure, axes = plt.subplots(1, len(groups), figsize=shape, squeeze=False, sharex=True, sharey=True)
    bars = [(name, label, STYLES[name][0]) for name, label in KEPT_LABELS.items()]
    for ax, (title, group) in zip(axes[0], groups.items(), strict=True):
        for index, (name, label, colour) in enumerate(bars):
            positions = [row + 0.4 * index - 0.2 for row in range(len(group))]
            ax.barh(positions, [o.kept[name] / o.kept["eager"] for o in group], height=0.38, color=colour, label=label)
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(group)), [o.case.subject for o in group])
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="lower left")
    figure.supxlabel("bytes kept for backward / eager's", fontsize=9)
    figure.tight_layout()
    save(figure, path)


def plot_times(
    outcomes: Sequence[Outcome], subjects: Sequence[str], names: Sequence[str], path: Path, title: str
) -> None:
    """Milliseconds per image of ``subjects`` (shown as ``names``), one panel per mode and dtype."""
    groups = panels(outcomes)
    colours = {name: STYLES[name][0] for name in entered(outcomes)}
    width = 0.8 / len(colours)
    bars = [((i + 0.5) * width - 0.4, name, colour) for i, (name, colour) in enumerate(colours.items())]
    shape = (1 + 0.9 * len(names) * len(groups), 3.6)
    figure, axes = plt.subplots(1, len(groups), figsize=shape, squeeze=False)
    for ax, (heading, group) in zip(axes[0], groups.items(), strict=True):
        by_subject = {o.case.subject: o for o in group}
        for shift, name, colour in bars:
            shown = {i: by_subject[s] for i, s in enumerate(subjects) if name in by_subject[s].race.seconds}
            times = [1e3 * o.race.time(name).median / o.batch for o in shown.values()]
            ax.bar([i + shift for i in shown], times, width=width, color=colour, label=name)
        ax.set_xticks(range(len(names)), names, fontsize=7)
        ax.set_title(heading, fontsize=10)
    axes[0][0].set_ylabel("ms per image (median)")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save(figure, path)
