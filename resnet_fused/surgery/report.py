# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What :func:`resnet_fused.fuse` did, module by module: :class:`FuseReport`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Entry:
    """One line of a :class:`FuseReport`.

    ``name``: the module's name in the model, empty for the model itself; ``original``: its class; ``status``:
    ``"fused"`` or ``"left"``; ``reason``: the runs in it and what runs by itself, or why it was left; ``runs``: its
    runs, each as ``"conv+bn+relu conv+bn +identity+relu"``, with ``" (inference)"`` behind those that only evaluation
    without gradients fuses.
    """

    name: str
    original: type
    status: str
    reason: str
    runs: tuple[str, ...] = ()


class Share(NamedTuple):
    """Of how many layers of a kind how many run fused."""

    training: int
    inference: int
    total: int

    def __str__(self) -> str:
        def percent(part: int) -> str:
            return f"{part} of {self.total} ({100 * part / self.total:.0f} %)" if self.total else "0 of 0"

        return f"{percent(self.training)} in training, {percent(self.inference)} in inference"


@dataclass
class FuseReport:
    """What :func:`resnet_fused.fuse` did, one :class:`Entry` per module it considered. ``str()`` gives a table.

    ``convolutions``, ``batch_norms``: how many of the model's run fused.
    """

    entries: list[Entry] = field(default_factory=list)
    convolutions: Share = Share(0, 0, 0)
    batch_norms: Share = Share(0, 0, 0)

    @property
    def fused(self) -> list[Entry]:
        """The entries of modules in which something runs fused."""
        return [e for e in self.entries if e.status == "fused"]

    @property
    def left(self) -> list[Entry]:
        """The entries of modules that were left as they are."""
        return [e for e in self.entries if e.status == "left"]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}, left: {len(self.left)}"]
        rows = [("module", "class", "status", "what / why")]
        rows += [(e.name or "(model)", e.original.__name__, e.status, e.reason) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]))
        lines.append(f"convolutions fused: {self.convolutions}; batch norms: {self.batch_norms}")
        return "\n".join(lines)
