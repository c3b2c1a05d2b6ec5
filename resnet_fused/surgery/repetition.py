# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Inference again in the circumstances of calls before it, without asking anew what applies: :class:`Repetition`.

Between convolutions, which leave nothing of Python's in the caches, :func:`circumstances` took 30 us and 4 in a loop;
on ResNet-50, one image of 224x224 through a :func:`resnet_fused.fold`, such questions took 1.6 of 33 ms. So they are
asked together, before the first convolution.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused import inference
from resnet_fused.planner import decide
from resnet_fused.planner.entry import Choices
from resnet_fused.snapshot import address
from resnet_fused.surgery.layers import PACKED
from resnet_fused.surgery.runs import Run
from resnet_fused.units import Join, Unit

if TYPE_CHECKING:
    from resnet_fused.surgery.program import RunCall

# What of a layer's own attributes `conv_of` and `norm_of` read.
_SETTINGS = (
    "training",
    *("stride", "padding", "dilation", "groups", "padding_mode", PACKED),
    *("eps", "momentum", "track_running_stats"),
)

_REGISTERED = frozenset({"weight", "bias", "running_mean", "running_var"})


def _description(t: Tensor) -> tuple:
    """What a block asks of an input, and of its own tensors: all but the values."""
    return type(t), t.dtype, t.shape, t.stride(), t.device


def _state(runs: Sequence[Run]) -> list:
    """What the layers of runs are now, but for the values of their tensors."""
    found: list = []
    for layer in (layer for run in runs for layer in run.layers):
        own = layer.__dict__
        found += [own.get(name) for name in _SETTINGS]
        for registered in (own["_parameters"], own["_buffers"]):
            for name, t in registered.items():
                found.append(name if t is None else (name, id(t), *_description(t)))
        if PACKED in own:
            found += [(*address(t), t.requires_grad) for t in own["_parameters"].values() if t is not None]
    return found


def _has_plain(runs: Sequence[Run]) -> bool:
    """Whether a layer has a plain attribute where its class registers a tensor: :func:`_state` does not look there."""
    return any(not _REGISTERED.isdisjoint(layer.__dict__) for run in runs for layer in run.layers)


def circumstances(tensors: Sequence[Tensor]) -> tuple | None:
    """What inference on ``tensors`` depends on besides the layers; None of other calls and where it must be asked."""
    if torch.is_grad_enabled() or any(t.layout is not torch.strided for t in tensors):
        return None
    around = tuple(decide.circumstances(t) for t in tensors)
    autocast = any(torch.is_autocast_enabled(t.device.type) for t in tensors)
    return around if all(around) and not autocast else None


class _Repeated:
    """A run on inputs like those it was seen with: as a function, in the place of a :class:`RunCall`.

    Nothing in it derives from a value but what :func:`resnet_fused.fold` has packed; its tensors are the layers' own.
    """

    def __init__(self, call: RunCall, units: Sequence[Unit], choices: Choices, x: Tensor, shortcut: Tensor | None):
        run = call.run
        self._call, self._join = call, run.join
        in_layout = x.is_contiguous(memory_format=torch.channels_last)
        steps = [
            inference.lasting_step(x.dtype, u, native and in_layout)
            for u, (native, _) in zip(units, choices, strict=True)
        ]
        self._projection = None if run.projection is None else steps.pop()
        self._steps = steps
        self._x = _description(x)
        self._shortcut = None if shortcut is None else _description(shortcut)

    def __call__(self, module: Any, x: Tensor, shortcut: Tensor | None = None) -> Any:
        joined: Any = self._projection
        if self._join is Join.IDENTITY:
            joined = x
        elif self._join is Join.TENSOR:
            joined = shortcut
            if shortcut is None or _description(shortcut) != self._shortcut:
                return self._call(module, x, shortcut)
        if _description(x) != self._x:
            return self._call(module, x, shortcut)
        call = self._call
        z: Any = inference.run_steps(x, self._steps, joined, call.relu, call.overwrite)
        for m in call.behind:
            z = m(z)
        return z


def _run_and_note(
    seen: dict[RunCall, _Repeated], call: RunCall, module: Any, x: Tensor, shortcut: Tensor | None = None
) -> Any:
    """Calls ``call``, and keeps in ``seen`` how it ran, if fused."""

    def keep(units: Sequence[Unit], choices: Choices) -> None:
        seen[call] = _Repeated(call, units, choices, x, shortcut)

    return call.finish(call.fused(x, shortcut, keep), module, x, shortcut)


class Repetition:
    """A program's function for calls in the same :func:`circumstances`. The first finds out how its runs run.

    Args:
        function: the program's, of a module and its inputs.
        names: of the runs' calls among its globals.
        calls: the runs' calls.
    """

    def __init__(self, function: Any, names: Sequence[str], calls: Sequence[RunCall]):
        self._function, self._names, self._calls = function, names, calls
        self._runs = [call.run for call in calls]
        self._state = _state(self._runs)
        self._again: Callable | None = None  # the function as it is called from the second call on

    def layers_are_as_before(self) -> bool:
        """Whether nothing but values has changed in the layers of the runs."""
        return _state(self._runs) == self._state

    def __call__(self, module: Any, *tensors: Tensor) -> Any:
        again = self._again
        return self._first(module, tensors) if again is None else again(module, module, *tensors)

    def _first(self, module: Any, tensors: Sequence[Tensor]) -> Any:
        seen: dict[RunCall, _Repeated] = {}
        results = self._with([partial(_run_and_note, seen, call) for call in self._calls])(module, module, *tensors)
        repeated = [seen.get(call) for call in self._calls]
        self._again = self._with(repeated) if all(repeated) and not _has_plain(self._runs) else self._function
        return results

    def _with(self, calls: Sequence[Any]) -> Callable:
        """The function with ``calls`` in the places of the runs' own."""
        names = {**self._function.__globals__, **dict(zip(self._names, calls, strict=True))}
        return types.FunctionType(self._function.__code__, names, self._function.__name__)
