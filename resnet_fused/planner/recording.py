# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a forward ran, noted on request: its blocks, and the modules whose steps they are (:func:`recording`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.planner.entry import Choices
from resnet_fused.planner.keys import Key


class Call(NamedTuple):
    """A block that ran: what it is, what ran natively, where that came from, and what could be native or is by the
    shipped table."""

    key: Key
    choices: Choices
    source: str  # "measured", "file" or "table" under engine("auto"), else the engine
    native: Choices
    table: Choices


class ModuleCall(NamedTuple):
    """A module that ran its fused blocks.

    ``fused``, ``eager``: of the module and its tensors, with those blocks and by the module's own steps; ``tensors``:
    copies of what it was given; ``keys``: of its blocks.
    """

    module: nn.Module
    fused: Callable[..., Sequence[Any]]
    eager: Callable[..., Sequence[Any]]
    tensors: tuple[Tensor, ...]
    keys: tuple[Key, ...]


@dataclass
class Recording:
    """``calls``: in their order; ``modules``: one of each kind of module in which no other fused module ran."""

    calls: list[Call] = field(default_factory=list)
    modules: dict[tuple[Key, ...], ModuleCall] = field(default_factory=dict)
    entered: int = 0  # modules

    @contextlib.contextmanager
    def module(self, module: nn.Module, fused: Callable, eager: Callable, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Around the blocks of a call of ``module``; see :class:`ModuleCall`."""
        self.entered += 1
        entered, begin = self.entered, len(self.calls)
        copies = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)  # its steps may write
        yield
        keys = tuple(call.key for call in self.calls[begin:])
        if keys and entered == self.entered:
            self.modules.setdefault(keys, ModuleCall(module, fused, eager, copies, keys))


_recording: ContextVar[Recording | None] = ContextVar("resnet_fused_recording", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Notes what this thread runs inside the ``with`` block; meanwhile nothing is measured or decided."""
    noted = Recording()
    token = _recording.set(noted)
    try:
        yield noted
    finally:
        _recording.reset(token)


def recorded() -> Recording | None:
    """The recording that this thread is in."""
    return _recording.get()
