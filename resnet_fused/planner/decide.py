# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The one place where a block asks what runs natively: :func:`choices`.

Under ``engine("auto")`` a key is decided once per process: from a plan that is known, by measuring, or by the shipped
table; what was decided stays, so that checkpoints, backward in other threads and captured graphs see one plan.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import opaque, ops
from resnet_fused.choice import Use, eager_infers_faster, eager_trains_faster, library_spares_packing, native_is_faster
from resnet_fused.engine import current_engine
from resnet_fused.planner.entry import EAGER, Choices, Entry, all_library, both
from resnet_fused.planner.keys import Key, key_of, settings
from resnet_fused.planner.recording import Call, recorded
from resnet_fused.planner.store import Store, say
from resnet_fused.units import Join, Unit, output_plane

MODES = ("auto", "off", "file", "measure")
MOST_DECIDED = 4096  # keys; beyond, as with inputs of ever other sizes, all are decided anew
MOST_SECONDS = 120.0  # of measuring on first use, in a process
QUIET_SECONDS = 1.0  # what takes longer is announced


store = Store()
_decided: dict[Key, tuple[Choices, str]] = {}
_lock = threading.RLock()
_generation = 0  # of decisions: counts what `decide` and `forget` change
_spent = 0.0  # seconds of measuring on first use


def mode() -> str:
    """What ``RESNET_FUSED_PLAN`` says.

    Raises:
        ValueError: if that is none of ``MODES``.
    """
    value = os.environ.get("RESNET_FUSED_PLAN", "auto")
    if value not in MODES:
        raise ValueError(f"RESNET_FUSED_PLAN: expected one of {MODES}, got {value!r}")
    return value


def possible(training: bool, x: Tensor, chain: Sequence[Unit]) -> Choices:
    """What the native convolutions take: between its units activations keep x's dtype and layout."""
    found = []
    for conv, norm in chain:
        fprop = conv is not None and ops.native_reason(x, conv.weight, *conv[2:6]) is None
        # A last convolution without a batch norm gets its gradient as it comes, which is the library's business.
        found.append((fprop, training and fprop and norm is not None))
    return tuple(found)


def shipped(training: bool, minimal: bool, x: Tensor, chain: Sequence[Unit], join: Join, native: Choices) -> Choices:
    """Of what is possible, what the shipped table calls faster; on a GPU nobody has measured yet."""
    if x.device.type != "cpu":
        return all_library(chain)
    found = []
    plain = []
    packed, most = False, 0
    shape = x.shape
    for i, (conv, norm) in enumerate(chain):
        if join is Join.PROJECTION and i == len(chain) - 1:
            shape = x.shape
        if conv is None:
            found.append((False, False))
            most = max(most, shape.numel())
            continue
        about = (x.dtype, tuple(shape), conv.weight.shape, *conv[2:5])
        if training:
            plain.append(library_spares_packing(*about[:3]) and conv.groups == 1)
            found.append((native_is_faster(Use.FPROP, *about), native_is_faster(Use.BACKWARD, *about)))
        else:
            packs = norm is None and conv.packed is not None and not conv.weight.requires_grad
            packed = packed or packs
            use = Use.PACKED if packs and ops.has_fused_convolution(x.dtype) else Use.INFERENCE
            found.append((native_is_faster(use, *about), False))
        plane = output_plane(shape[2:], conv.weight.shape[2:], *conv[2:5])
        shape = torch.Size((shape[0], conv.weight.shape[0], *plane))
        most = max(most, shape.numel())
    if training:
        eager = eager_trains_faster(plain) and not minimal  # eager keeps more for backward
    else:
        eager = eager_infers_faster(x.dtype, x.is_contiguous(memory_format=torch.channels_last), packed, most)
    return EAGER if eager else both(native, tuple(found))


def choices(
    training: bool,
    x: Tensor,
    chain: Sequence[Unit],
    join: Join,
    relu: bool,
    minimal: bool = False,
    cast_weights: bool = False,
    reads_joined: bool = False,
    within: str = "",
) -> Choices:
    """Per unit of ``chain``, the projection's last, whether its fprop is native, and its dgrad and wgrad.

    Or `EAGER`, but not of batch norms that are synchronised.
    """
    if x.shape[0] == 0:
        return all_library(chain)  # without a choice to make: where other processes have images
    engine = current_engine()
    recording = recorded()
    if recording is None and engine != "auto":
        return possible(training, x, chain) if engine == "native" else all_library(chain)
    key = key_of(training, x, chain, join, relu, minimal, cast_weights, reads_joined, within)
    if recording is None:
        found = _decided.get(key)
        chosen = found[0] if found is not None else _decide(key, x, chain)
        if chosen:
            return chosen
        # What is compiled has an operator of its own for a block, which eager is not; eager does not exchange.
        exchanges = any(u.norm is not None and u.norm.exchange is not None for u in chain)
        return all_library(chain) if exchanges or opaque.in_operator() else chosen
    native = possible(training, x, chain)
    table = shipped(training, minimal, x, chain, join, native)
    chosen, source = all_library(chain), engine
    if engine == "native":
        chosen = native
    elif engine == "auto":
        chosen, source = _decided.get(key) or _known(key, native) or (table, "table")
    recording.calls.append(Call(key, chosen, source, native, table))
    return chosen


def circumstances(x: Tensor) -> tuple | None:
    """All but the block itself that the answer of :func:`choices` for ``x`` depends on.

    None where it has to be asked: of a subclass, while calls are recorded, and under engines that plans have no say in.
    """
    if type(x) is not Tensor or recorded() is not None or current_engine() != "auto":
        return None
    device = x.device
    kind = device.type
    return (
        _generation,
        x.dtype,
        x.shape,
        x.stride(),
        device,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        *settings(x),
    )


def situation(x: Tensor) -> tuple | None:
    """The part of :func:`circumstances` that says whether eager is the faster one in a call without gradients.

    None where that is not asked. For those alone whom a wrong answer costs time and nothing else.
    """
    if torch.is_grad_enabled() or recorded() is not None or current_engine() != "auto":
        return None
    kind = x.device.type
    return _generation, x.dtype, x.shape, x.stride(), kind, torch.is_autocast_enabled(kind)


def _limited(entry: Entry, native: Choices) -> Choices:
    """A plan's choices as far as they are possible: a file can say anything."""
    return both(entry.choices, native) if entry.choices else EAGER


def _known(key: Key, native: Choices) -> tuple[Choices, str] | None:
    """What was decided or is in a file of a block where it is, else of the block wherever it is."""
    if key.deterministic or mode() == "off":
        return None
    if key.within and (entry := store.find(key)) is not None:
        return _limited(entry, native), "file"
    if key.alone in _decided:
        return _decided[key.alone]
    entry = store.find(key.alone)
    return None if entry is None else (_limited(entry, native), "file")


def _is_real(x: Tensor) -> bool:
    """Whether kernels run in this call: not under tracing, a mode such as that of fake tensors, or a transform."""
    functorch = torch._C._functorch
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not functorch.is_functorch_wrapped_tensor(x)
        and not functorch.is_legacy_batchedtensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def _may_measure(key: Key) -> bool:
    if key.deterministic or opaque.in_operator() or torch._C._current_graph_task_id() != -1:
        return False  # in backward others may wait for what measuring needs
    if mode() != "measure" and not (mode() == "auto" and torch.backends.cudnn.benchmark):
        return False
    if key.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return _spent < MOST_SECONDS


def _decide(key: Key, x: Tensor, chain: Sequence[Unit]) -> Choices:
    native = possible(key.training, x, chain)
    table = shipped(key.training, key.minimal, x, chain, key.join, native)
    if not _is_real(x):
        return (_known(key, native) or (table, "table"))[0]
    # Not waited for in backward: whoever holds the lock may be waiting for this thread.
    in_backward = torch._C._current_graph_task_id() != -1
    if not _lock.acquire(blocking=not in_backward):
        return _decided.setdefault(key, (table, "table"))[0]
    try:
        if key in _decided:
            return _decided[key][0]
        found = _known(key, native)
        if found is None and _may_measure(key):
            found = _measure(key, native, table)
        if len(_decided) >= MOST_DECIDED:
            _decided.clear()
        return _decided.setdefault(key, found or (table, "table"))[0]
    finally:
        _lock.release()


def _measure(key: Key, native: Choices, table: Choices) -> tuple[Choices, str] | None:
    """A plan made in the midst of a user's forward, which it never fails."""
    global _spent
    from resnet_fused.planner import search  # it runs blocks, and blocks ask this module

    begin = time.perf_counter()
    announce = threading.Timer(QUIET_SECONDS, say, [f"measuring {key}"])
    announce.daemon = True
    announce.start()
    try:
        entry = search.plan_block(key.alone, native, table)
    except Exception as error:
        say(f"{key} could not be measured, the shipped table decides: {type(error).__name__}: {error}")
        return None
    finally:
        announce.cancel()
        _spent += time.perf_counter() - begin
        if _spent >= MOST_SECONDS:
            say(f"measured for {_spent:.0f} s; what else is new is left to the shipped table")
    store.add(key.alone, entry)
    _decided[key.alone] = entry.choices, "measured"
    return _decided[key.alone]


def decide(key: Key, entry: Entry) -> None:
    """``key`` is run as ``entry`` says from now on."""
    global _generation
    with _lock:
        _generation += 1
        if not key.within:  # those that follow this one
            for other in [k for k in _decided if k.within and k.alone == key]:
                del _decided[other]
        _decided[key] = entry.choices, "measured"


def forget(*, plans: bool) -> None:
    """Nothing is decided then; with ``plans`` what was read and measured is forgotten too."""
    global _generation
    with _lock:
        _generation += 1
        _decided.clear()
        if plans:
            store.forget()
