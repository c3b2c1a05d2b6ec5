# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Two files of results, case by case: what became slower, or keeps more, beyond its noise.

A time is a regression if the ratio of medians is above 1 by more than the noise: the two interquartile ranges, each
relative to its median, together, and `LEAST` at least, which is what medians of the same code differ by. Bytes have no
noise but `LEAST_BYTES`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import table

LEAST = 0.05
LEAST_BYTES = 0.005

# What tells one case from another, of any benchmark.
IDENTITY = (
    *("subject", "mode", "dtype", "batch", "layout", "pixels", "layers", "activation_bytes", "kernel", "convolution"),
    *("channels", "side", "filters", "taps", "stride", "behind_norm", "pass", "form"),
)


@dataclass(frozen=True)
class Change:
    """Of one figure: the ratio of the second file's to the first's, and how much of it is noise."""

    case: str
    what: str
    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.noise:
            return "REGRESSION"
        return "better" if self.ratio < 1 / (1 + self.noise) else ""


def cases(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The outcomes by what they are of."""
    named: dict[str, dict[str, Any]] = {}
    for outcome in found["outcomes"]:
        shown = {key: outcome[key] for key in IDENTITY if key in outcome}
        name = ", ".join(value if isinstance(value, str) else f"{key} {value}" for key, value in shown.items())
        if name in named:
            raise ValueError(f"two outcomes of the same case: {name}")
        named[name] = outcome
    return named


def spread(time: Mapping[str, float]) -> float:
    return (time["high"] - time["low"]) / time["median"]


def changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Change]:
    """Every figure that both files have."""
    before, after = cases(first), cases(second)
    for name, a in before.items():
        b = after.get(name, {})
        for key, time in a.items():
            if key.endswith("seconds") and isinstance(time, dict) and key in b:
                noise = max(LEAST, spread(time) + spread(b[key]))
                yield Change(name, key.removesuffix("_seconds"), time["median"], b[key]["median"], noise)
        kept = b.get("kept_bytes_per_image", {})
        for who, count in a.get("kept_bytes_per_image", {}).items():
            if who in kept and count:
                yield Change(name, f"{who} keeps", count, kept[who], LEAST_BYTES)


def report(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, int]:
    """The tables, and how many regressions there are."""
    lines = []
    environments = first["environment"], second["environment"]
    for key in {**environments[0], **environments[1]}:
        a, b = (e.get(key, "not there") for e in environments)
        if a != b:
            lines.append(f"differs: {key}: {a} and {b}")
    names = [cases(f).keys() for f in (first, second)]
    lines += [f"only in the first: {name}" for name in names[0] if name not in names[1]]
    lines += [f"only in the second: {name}" for name in names[1] if name not in names[0]]
    found = list(changes(first, second))
    if not found:
        raise ValueError("the two files have no case in common")
    rows = [(c.case, c.what, f"{c.ratio:.3f}", f"{c.noise:.3f}", c.verdict) for c in found]
    lines.append(table(("case", "", "second / first", "noise", ""), rows))
    regressions = sum(c.verdict == "REGRESSION" for c in found)
    better = sum(c.verdict == "better" for c in found)
    lines.append(f"{len(found)} figures: {regressions} regressions, {better} better, the others within their noise")
    return "\n".join(lines), regressions


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return the exit status, 1 on a regression."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Two files of results, the older one first. The exit status is 1 on a regression beyond noise.",
    )
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    try:
        text, regressions = report(*(json.loads(path.read_text()) for path in options.files))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"not two files of results that compare: {error}")
    print(text)
    return 1 if regressions else 0
