# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What planning found for one block (:class:`Entry`), and its form in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Per unit, the projection's last: whether its fprop is native, and its dgrad and wgrad. Those two share a choice, as
# they share the gradient in parts; in inference the second is False.
# Empty: the block runs as eager PyTorch composes it.
Choices = tuple[tuple[bool, bool], ...]
EAGER: Choices = ()

_ENGINES = {False: "library", True: "native"}
_ONE_PASS = {(False, False): "library", (True, True): "native", (True, False): "fprop", (False, True): "backward"}


def name_of(choices: Choices, training: bool) -> str:
    """A candidate's name: per unit what is native of it, in one word where all units agree."""
    if not choices:
        return "eager"
    units = [_ONE_PASS[u] if training else _ENGINES[u[0]] for u in choices]
    return units[0] if len(set(units)) == 1 else " | ".join(units)


@dataclass(frozen=True)
class Entry:
    """The candidate that was chosen for a block, and why.

    ``seconds``: median of each candidate by its name (:func:`name_of`), forward and backward; ``disqualified``: by
    candidate or kernel, in what it differed from the library's.
    """

    choices: Choices
    chosen: str
    why: str
    seconds: dict[str, float]
    disqualified: dict[str, str]

    def as_json(self) -> dict:
        units = [{"fprop": _ENGINES[f], "backward": _ENGINES[b]} for f, b in self.choices]
        return {
            "units": units,
            "chosen": self.chosen,
            "why": self.why,
            "seconds": self.seconds,
            "disqualified": self.disqualified,
        }

    @classmethod
    def from_json(cls, record: dict) -> Entry:
        """Raises ValueError, KeyError, TypeError or AttributeError where ``record`` is no such thing."""
        for unit in record["units"]:
            if not set(unit.values()) <= {"library", "native"}:
                raise ValueError(f"units: expected \"library\" or \"native\", got {unit}")
        choices = tuple((u["fprop"] == "native", u["backward"] == "native") for u in record["units"])
        seconds = {str(name): float(s) for name, s in record["seconds"].items()}
        disqualified = {str(name): str(reason) for name, reason in record["disqualified"].items()}
        return cls(choices, str(record["chosen"]), str(record["why"]), seconds, disqualified)


def both(a: Choices, b: Choices) -> Choices:
    """Native is what is native in ``a`` and in ``b``."""
    return tuple((x[0] and y[0], x[1] and y[1]) for x, y in zip(a, b, strict=True))


def all_library(units: Sequence) -> Choices:
    """The library everywhere."""
    return ((False, False),) * len(units)
