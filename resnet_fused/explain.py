# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What fusing does for a model on this machine, block by block, measured: :func:`explain`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_fused import ops
from resnet_fused.autograd import _Block
from resnet_fused.block import Plan
from resnet_fused.choice import Use
from resnet_fused.counting import Operators, bytes_kept
from resnet_fused.distributed import copy_of, exchange_of
from resnet_fused.engine import current_engine, engine
from resnet_fused.planner.measure import step
from resnet_fused.planner.recording import recording
from resnet_fused.surgery import FuseReport, fuse
from resnet_fused.surgery.context import compute_dtype
from resnet_fused.surgery.forward import fused_forward, without_fusion
from resnet_fused.surgery.layers import conv_of
from resnet_fused.surgery.program import RunCall
from resnet_fused.surgery.runs import Pair
from resnet_fused.surgery.switch import check_model
from resnet_fused.units import Conv, Join, output_plane

ENGINES = ("library", "native")  # whose times are an engine's alternatives
_CALLS = 10  # that are timed together on an accelerator, which runs behind the processor that feeds it
# The library's convolutions of one unit in inference, as operators.
_LIBRARY = {
    "aten.convolution",
    "aten.mm",
    "aten.addmm",
    "mkldnn._convolution_pointwise",
    "mkldnn._convolution_pointwise_",
}
_NATIVE = "resnet_fused.conv_fprop_inference"


class Engine(NamedTuple):
    """What runs a pass of a convolution: ``name``: ``"native"``, ``"library"`` or ``"eager"``; ``why``."""

    name: str
    why: str


@dataclass(frozen=True)
class Convolution:
    """A convolution of a block: ``name`` within the block's module, ``what`` it is, and its ``passes``.

    ``passes``: :class:`Engine` by ``"fprop"`` and, in training, ``"dgrad"`` and ``"wgrad"``.
    """

    name: str
    what: str
    passes: dict[str, Engine]


@dataclass(frozen=True)
class Block:
    """One fused run. Blocks of the same kind are measured once, and carry the same figures.

    ``module``: its name in the model; ``run``: as in :class:`resnet_fused.FuseReport`; ``shape``, ``dtype``: of what
    it reads; ``seconds``, ``eager_seconds``: of a call, in training with its backward, the median; ``alternatives``:
    seconds with all convolutions on another engine; ``moved``, ``eager_moved``: bytes of operands and results of all
    operators; ``least``: of the block's inputs, parameters, output and, in training, their gradients, each once, and
    the inputs and weights once more for backward: what nothing that computes the same can do without; ``kept``,
    ``eager_kept``: bytes kept for backward, which for a chain of blocks are less than their sum, since the output of
    one is the input of the next.
    """

    module: str
    run: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    convolutions: tuple[Convolution, ...]
    seconds: float
    eager_seconds: float
    alternatives: dict[str, float]
    moved: int
    eager_moved: int
    least: int
    kept: int
    eager_kept: int


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` gives tables.

    ``blocks``: in the order in which they ran; ``seconds``, ``eager_seconds``: of the whole model, in training with
    backward, the median; ``kept``, ``eager_kept``: bytes that the whole model keeps for backward.
    """

    report: FuseReport
    device: str
    training: bool
    engine: str
    blocks: tuple[Block, ...]
    seconds: float
    eager_seconds: float
    kept: int
    eager_kept: int

    def __str__(self) -> str:
        mode = "forward and backward" if self.training else "inference"
        lines = [f"{mode} on {self.device}, engine {self.engine!r}; times in ms, the median; moved and kept in MB", ""]
        alternatives = [name for name in ENGINES if any(name in b.alternatives for b in self.blocks)]
        kept = ("kept", "eager's") if self.training else ()
        header = ("block", "reads", "eager", "fused", "speed", *alternatives, "moved", "eager's", "least", *kept)
        rows = []
        for b in self.blocks:
            others = (_ms(b.alternatives[a]) if a in b.alternatives else "" for a in alternatives)
            bytes_ = (b.moved, b.eager_moved, b.least) + ((b.kept, b.eager_kept) if self.training else ())
            what = f"{b.module or '(model)'}: {b.run}"
            reads = f"{'x'.join(map(str, b.shape))} {str(b.dtype).removeprefix('torch.')}"
            times = (_ms(b.eager_seconds), _ms(b.seconds), f"{b.eager_seconds / b.seconds:.2f}x")
            rows.append((what, reads, *times, *others, *(f"{n / 1e6:.2f}" for n in bytes_)))
        total = (_ms(self.eager_seconds), _ms(self.seconds), f"{self.eager_seconds / self.seconds:.2f}x")
        whole_kept = (f"{self.kept / 1e6:.2f}", f"{self.eager_kept / 1e6:.2f}") if self.training else ()
        rows.append(("the whole model", "", *total, *("" for _ in alternatives), "", "", "", *whole_kept))
        lines += [*_aligned(header, rows), "", *_aligned(*self._engines()), ""]
        lines += [f"left: {e.name or '(model)'}: {e.reason}" for e in self.report.left]
        lines.append(f"convolutions fused: {self.report.convolutions}; batch norms: {self.report.batch_norms}")
        return "\n".join(lines)

    def _engines(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A line per convolution and passes that share an engine and its reason."""
        rows: list[tuple[str, ...]] = []
        for block in self.blocks:
            for conv in block.convolutions:
                shared: dict[Engine, list[str]] = {}
                for which, found in conv.passes.items():
                    shared.setdefault(found, []).append(which)
                name = f"{block.module}.{conv.name}".strip(".")
                rows += [(name, conv.what, " ".join(w), found.name, found.why) for found, w in shared.items()]
        return ("convolution", "", "pass", "engine", "why"), rows

    def plot(self, path: str | Path) -> None:
        """Draw the blocks' times and kept bytes, fused and eager, to a file of the format that its name ends in.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("plot: needs matplotlib, which is not installed (pip install matplotlib)") from error
        panels = [("ms", [(1e3 * b.eager_seconds, 1e3 * b.seconds) for b in self.blocks])]
        if self.training:
            panels.append(("MB kept for backward", [(b.eager_kept / 1e6, b.kept / 1e6) for b in self.blocks]))
        figure = Figure(figsize=(3 + 4 * len(panels), 1.4 + 0.4 * len(self.blocks)), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (label, values) in zip(axes, panels, strict=True):
            for i, name in enumerate(("eager", "fused")):
                places = [row + 0.4 * i - 0.2 for row in range(len(values))]
                ax.barh(places, [pair[i] for pair in values], height=0.38, label=name, color=("#9aa5b1", "#4f8fe6")[i])
            ax.set_xlabel(label)
        names = [f"{b.module or '(model)'}\n{b.run}" for b in self.blocks]
        axes[0].set_yticks(range(len(names)), names, fontsize=7)
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=110)


class _Seen(NamedTuple):
    """A run as it was called."""

    name: str  # the module's
    module: nn.Module
    call: RunCall
    inputs: tuple[Tensor, ...]
    requires_grad: tuple[bool, ...]


def explain(
    model: nn.Module, input: Tensor | Sequence[Any], *, training: bool | None = None, rounds: int = 5
) -> Explanation:
    """Measure what fusing does for ``model`` on ``input``, block by block.

    It runs under the engine and the autocast in force, on copies: a model that is not fused is fused on one.
    Parameters, gradients, buffers, modes and the states of random number generators stay as they are; hooks are copied
    with the model, and run.

    Args:
        model: any module, fused or not.
        input: what its forward takes: a tensor, or a list or tuple of positional arguments.
        training: forward and backward in training mode, or forward in evaluation without gradients; None: as the
            model's flag has it.
        rounds: how often each contestant is timed, in turn with the others.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``rounds`` is less than 1, or ``input`` holds no tensor, or batch norms would exchange
            statistics with other processes: their times would be those of the slowest one.
    """
    check_model(model)
    for name, m in model.named_modules():
        trains = m.training if training is None else training
        if isinstance(m, nn.SyncBatchNorm) and trains and exchange_of(m) is not None:
            raise ValueError(
                f"model: expected one that runs in this process alone, got {name!r}, an nn.SyncBatchNorm of several "
                "processes: explain it before torch.distributed is initialised"
            )
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    arguments = tuple(input) if isinstance(input, (list, tuple)) else (input,)
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(f"input: expected a tensor, or a list or tuple that holds one, got {type(input).__name__}")
    device = tensors[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        return _explain(_copy(model, training), tree_map_only(Tensor, torch.clone, arguments), device, rounds)


def _copy(model: nn.Module, training: bool | None) -> nn.Module:
    twin = copy_of(model)  # parameters without their gradients
    return twin if training is None else twin.train(training)


def _explain(fused: nn.Module, arguments: tuple, device: torch.device, rounds: int) -> Explanation:
    training = fused.training
    report = fuse(fused)
    eager = without_fusion(fused)
    with torch.set_grad_enabled(training):
        seen = _runs(fused, arguments)
        found: dict[tuple, Block] = {}
        blocks = []
        for s in seen:
            kind = _kind(s)
            if kind not in found:
                found[kind] = _measure(s, eager.get_submodule(s.name), training, rounds)
            blocks.append(_renamed(found[kind], s))
        steps = {
            name: partial(step, partial(module, *arguments), [p for p in module.parameters() if p.requires_grad])
            for name, module in (("fused", fused), ("eager", eager))
        }
        kept = {"fused": 0, "eager": 0}
        if training:
            kept = {name: bytes_kept(m, partial(m, *arguments)) for name, m in (("fused", fused), ("eager", eager))}
        times = _times(steps, device, rounds)
    return Explanation(
        report,
        str(device),
        training,
        current_engine(),
        tuple(blocks),
        times["fused"],
        times["eager"],
        kept["fused"],
        kept["eager"],
    )


def _runs(fused: nn.Module, arguments: tuple) -> list[_Seen]:
    """The runs that a call of ``fused`` makes, in their order. It has programs afterwards that do not tell."""
    fused(*arguments)  # makes the programs
    names = {id(m): name for name, m in fused.named_modules()}
    seen: list[_Seen] = []
    kinds: dict[tuple, tuple[Tensor, ...]] = {}

    def wrap(call: RunCall) -> Callable:
        def noting(module: nn.Module, *inputs: Tensor) -> Any:
            s = _Seen(names[id(module)], module, call, inputs, tuple(t.requires_grad for t in inputs))
            # Later steps may write over them; one set for all of a kind.
            stored = kinds.setdefault(_kind(s), tuple(t.detach().clone() for t in inputs))
            seen.append(s._replace(inputs=stored))
            return call(module, *inputs)

        return noting

    programs = [p for m in fused.modules() if (f := fused_forward(m)) is not None for p in f.programs()]
    for program in programs:
        program.watch(wrap)
    try:
        fused(*arguments)
    finally:
        for program in programs:
            program.unwatch()
    return seen


def _kind(s: _Seen) -> tuple:
    """What blocks of the same work have in common."""
    run, call = s.call.run, s.call
    layers = tuple((type(m), m.training, tuple(p.requires_grad for p in m.parameters())) for m in run.layers)
    convs = tuple((c.weight.shape, c.weight.dtype, c.bias is None, *c[2:6]) for _, c in _convolutions(s))
    reads = tuple((t.shape, t.stride(), t.dtype) for t in s.inputs)
    return str(run), len(run.behind), call.overwrite, call.memory, layers, convs, reads, s.requires_grad


def _measure(s: _Seen, eager: nn.Module, training: bool, rounds: int) -> Block:
    # Not leaves: eager may write over them.
    inputs = [t.clone().requires_grad_(r).view_as(t) for t, r in zip(s.inputs, s.requires_grad, strict=True)]
    x, device = inputs[0], inputs[0].device
    parameters = [p for m in s.call.run.layers for p in m.parameters() if p.requires_grad]
    learnt = parameters + [t for t in inputs if t.requires_grad]
    fused = partial(s.call, s.module, *inputs)
    plain = partial(s.call.step_by_step, eager, *inputs)
    z = fused()
    dtype = compute_dtype(x) if torch.is_autocast_enabled(device.type) else x.dtype
    counted = {}
    for name, call in (("fused", fused), ("eager", plain)):
        with Operators() as operators:
            step(call, learnt)
        counted[name] = operators
    with recording() as noted:  # of whom eager has no calls
        fused()
    source = noted.calls[0].source if noted.calls else ""
    convolutions = _engines_of(s, z, dtype, counted["fused"].names, source)
    steps = {"fused": partial(step, fused, learnt), "eager": partial(step, plain, learnt)}
    reasons = [ops.native_reason(*_probe(shape, dtype, x, c)) for _, c, shape in _with_inputs(s, x.shape)]
    forced = [name for name in ENGINES if name == "library" or None in reasons] if convolutions else []
    for name in forced:
        if current_engine() == "auto":
            steps[name] = partial(_on_engine, name, steps["fused"])
    times = _times(steps, device, rounds)
    weights = sum(p.nbytes for m in s.call.run.layers for p in m.parameters())
    least = sum(t.nbytes for t in inputs) + weights + z.nbytes
    if training and z.requires_grad:
        least += z.nbytes + inputs[0].nbytes + weights + sum(t.nbytes for t in learnt)
    kept = [bytes_kept(s.module, fused), bytes_kept(eager, plain)] if training else [0, 0]
    return Block(
        s.name,
        str(s.call.run),
        tuple(x.shape),
        dtype,
        convolutions,
        times.pop("fused"),
        times.pop("eager"),
        times,
        counted["fused"].bytes,
        counted["eager"].bytes,
        least,
        *kept,
    )


def _renamed(block: Block, s: _Seen) -> Block:
    """The figures of ``block`` as those of another one of its kind."""
    names = _names(s)
    convolutions = tuple(Convolution(name, c.what, c.passes) for name, c in zip(names, block.convolutions, strict=True))
    fields = {**vars(block), "module": s.name, "convolutions": convolutions}
    return Block(**fields)


def _convolutions(s: _Seen) -> list[tuple[Pair, Conv]]:
    """In the order of the plan's units."""
    found = ((p, conv_of(p.conv)) for p in s.call.run.pairs if p.conv is not None)
    return [(p, c) for p, c in found if c is not None]


def _names(s: _Seen) -> list[str]:
    names = {id(m): name for name, m in s.module.named_modules()}
    return [names[id(p.conv)] for p, _ in _convolutions(s)]


def _with_inputs(s: _Seen, shape: Sequence[int]) -> Iterator[tuple[Pair, Conv, tuple[int, ...]]]:
    """Each convolution and the shape of what it reads."""
    current = tuple(shape)
    for pair, conv in _convolutions(s):
        if pair is s.call.run.projection:
            current = tuple(shape)
        yield pair, conv, current
        plane = output_plane(current[2:], conv.weight.shape[2:], *conv[2:5])
        current = (current[0], conv.weight.shape[0], *plane)


def _probe(shape: Sequence[int], dtype: torch.dtype, x: Tensor, conv: Conv) -> tuple:
    """The arguments of :func:`resnet_fused.ops.native_reason` for what a convolution inside the block reads."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout), conv.weight, *conv[2:6]


def _engines_of(
    s: _Seen, z: Tensor, dtype: torch.dtype, operators: Sequence[str], source: str
) -> tuple[Convolution, ...]:
    """The engines that ran, from the plan in the graph behind ``z`` or, without one, from the operators.

    ``source``: who chose them, as in :class:`resnet_fused.planner.recording.Call`.
    """
    plan = _plan_of(z)
    native: list[dict[str, bool | None]]
    convs = list(_with_inputs(s, s.inputs[0].shape))
    if plan is not None:
        units = [u for u in plan.units if u.convolves]
        native = [{"fprop": u.native_fprop, "dgrad": u.native, "wgrad": u.native} for u in units]
    else:
        ran = [name for name in operators if name in _LIBRARY or name == _NATIVE]
        if s.call.join is Join.PROJECTION and len(ran) == len(convs):
            ran = [*ran[1:], ran[0]]  # in inference it runs first
        plain = z.requires_grad or len(ran) != len(convs) or not any(n.startswith("resnet_fused.") for n in operators)
        native = [{"fprop": None if plain else name == _NATIVE} for name in (ran if not plain else convs)]
    found = []
    for name, (pair, conv, shape), choices in zip(_names(s), convs, native, strict=True):
        reason = ops.native_reason(*_probe(shape, dtype, s.inputs[0], conv))
        passes = {}
        for which, choice in choices.items():
            if which == "dgrad" and pair in (s.call.run.units[0], s.call.run.projection) and not s.requires_grad[0]:
                continue
            use = Use.BACKWARD if which != "fprop" else Use.FPROP if plan is not None else Use.INFERENCE
            passes[which] = _why(choice, use, reason, pair.norm is not None, s.inputs[0].device, source)
        found.append(Convolution(name, _spelt(conv, shape), passes))
    return tuple(found)


def _why(
    native: bool | None, use: Use, reason: str | None, normalised: bool, device: torch.device, source: str
) -> Engine:
    planned = source in ("file", "measured")
    measured = f"measured to be the faster: {'resnet_fused.plan' if planned else 'resnet_fused/choice.py'}"
    if native is None:
        return Engine("eager", measured if planned or source == "table" else "this call does not run fused")
    asked = current_engine()
    if native:
        return Engine("native", f'engine("{asked}")' if asked == "native" else measured)
    if reason is not None:
        return Engine("library", f"not native: {reason}")
    if use is Use.BACKWARD and not normalised:
        return Engine("library", "no batch norm behind it")
    if asked == "library":
        return Engine("library", 'engine("library")')
    if planned or device.type == "cpu":
        return Engine("library", measured)
    return Engine("library", f"native was not timed on {device.type} yet")


def _plan_of(z: Tensor) -> Plan | None:
    """That of the block's node, in front of which an activation may stand."""
    node: Any = z.grad_fn
    while node is not None:
        if isinstance(node, _Block._backward_cls):
            plan: Plan = getattr(node, "plan")  # noqa: B009  (which the class does not declare)
            return plan
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _spelt(c: Conv, shape: Sequence[int]) -> str:
    filters, _, height, width = c.weight.shape
    stride = f"/{c.stride[0]}" if max(c.stride) > 1 else ""
    groups = f" in {c.groups} groups" if c.groups > 1 else ""
    return f"{shape[1]}->{filters} {height}x{width}{stride}{groups} on {shape[2]}x{shape[3]}"


def _on_engine(name: str, call: Callable[[], None]) -> None:
    with engine(name):
        call()


def _times(steps: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of each step, the median over rounds in turn, after a warm-up."""
    accelerated = device.type != "cpu"
    calls = _CALLS if accelerated else 1

    def seconds(call: Callable[[], object]) -> float:
        if accelerated:
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if accelerated:
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / calls

    for call in steps.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, call in steps.items():
            found[name].append(seconds(call))
    return {name: statistics.median(times) for name, times in found.items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; a column of numbers is aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in columns]
    return [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in (header, *rows)
    ]
