# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Which implementation runs: the fused kernels or the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

ENGINES = ("auto", "library", "native", "reference")

_engine: ContextVar[str] = ContextVar("resnet_fused_engine", default="auto")


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """Run every fused function and module inside the ``with`` block through one engine.

    Args:
        name: ``"library"``: the library's convolutions (oneDNN, cuDNN) with this package's one-pass kernels around
            them; ``"native"``: this package's convolutions with everything fused into them where they apply
            (:func:`resnet_fused.ops.native_reason`), the library's elsewhere, also within a block;
            ``"reference"``: plain PyTorch, :mod:`resnet_fused.reference`; ``"auto"``: what was measured to be the
            faster of native and library: by a plan (:data:`resnet_fused.plan`) if there is one, else on the CPU by
            pass and shape (:mod:`resnet_fused.choice`), elsewhere ``"library"``. Blocks of one small image in
            training, of few pixels in contiguous float32 inference, and those that a plan says so of, are eager
            PyTorch's. On the CPU native 3x3 convolutions of stride 1 are Winograd's in float32, and in bfloat16 on
            processors that have no tiles for it: whoever wants direct sums says ``"library"``.

    Raises:
        ValueError: if ``name`` is none of these.

    The choice is per thread (and per ``asyncio`` task). Backward follows the engine that forward used. What
    ``torch.compile`` compiled follows the engine around its call; inside, ``torch.compile`` refuses to change it.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {name!r}")
    token = _engine.set(name)
    try:
        yield
    finally:
        _engine.reset(token)


def current_engine() -> str:
    """The engine in force: ``"auto"``, ``"library"``, ``"native"`` or ``"reference"``."""
    return _engine.get()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """No autocast on ``device_type`` inside the ``with`` block."""
    # Leaving a torch.autocast costs 3 us, as much as a small kernel.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def forced(name: str | None) -> contextlib.AbstractContextManager[None]:
    """:func:`engine` for an ``engine=`` argument: None changes nothing."""
    return contextlib.nullcontext() if name is None else engine(name)
