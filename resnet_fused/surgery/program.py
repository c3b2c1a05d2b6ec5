# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A module's forward with its runs fused, every other step being the module's own: :class:`Program`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import linecache
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fused.inference import Keep
from resnet_fused.planner import decide
from resnet_fused.planner.recording import recorded
from resnet_fused.surgery.execution import COMPOSED, PoolCall, pool_by_functional, pool_by_torch, run_block
from resnet_fused.surgery.layers import fused_forward_called, normalises_and_activates
from resnet_fused.surgery.recording import record
from resnet_fused.surgery.repetition import Repetition, circumstances
from resnet_fused.surgery.runs import Finder, Run
from resnet_fused.units import Join

_numbers = itertools.count()

# Calls after which one in the same circumstances learns how such calls run. Where sizes are ever others, to learn each
# time took 4 to 12 % of a ResNet-50 on images of 64x64 and 96x96.
LEARN_AFTER = 1
_MOST_REPETITIONS = 8


class _Place:
    """Stands in a graph for a run or a pooling. Graphs are cycles: what they hold is freed late."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args):
        raise NotImplementedError


class RunCall:
    """A run as a function of its inputs."""

    def __init__(self, run: Run, memory: str, overwrite: bool, within: str):
        self.overwrite, self.within = overwrite, within
        self.pairs, self.relu, self.memory = run.units, run.relu, memory
        self.join, self.projection, self.behind = run.join, run.projection, run.behind
        self.run = run
        self._steps: Callable | None = None
        self.composed_in: int | None = None  # the thread in whose call, the last one, a plan had the modules called

    def __call__(self, module: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Any:
        return self.finish(self.fused(x, shortcut), module, x, shortcut)

    def fused(self, x: Tensor, shortcut: Tensor | None, keep: Keep | None = None) -> Any:
        """As :func:`run_block` has it."""
        joins_tensor = self.join is Join.TENSOR
        added = x if self.join is Join.IDENTITY else shortcut if joins_tensor else self.projection
        z = None
        if added is not None or not joins_tensor:  # whatever adds None, eager says what becomes of it
            z = run_block(x, self.pairs, added, self.relu, self.memory, self.overwrite, self.within, keep)
        if not torch.compiler.is_compiling():
            self.composed_in = threading.get_ident() if z is COMPOSED else None
        return z

    def finish(self, z: Any, module: nn.Module, x: Tensor, shortcut: Tensor | None) -> Any:
        """The run's result from :meth:`fused`'s."""
        if z is None or z is COMPOSED:
            return self.step_by_step(module, x, shortcut)
        for m in self.behind:
            z = m(z)
        return z

    def step_by_step(self, module: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Any:
        """What the module does itself."""
        if self._steps is None:
            self._steps = self._compile_steps()
        return self._steps(module, x, shortcut) if self.join is Join.TENSOR else self._steps(module, x)

    def _compile_steps(self) -> Callable:
        """The recorded steps one by one."""
        graph = fx.Graph()
        inputs = [self.run.source] + ([self.run.shortcut] if self.run.shortcut is not None else [])
        copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
        for node in self.run.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[self.run.nodes[-1]])
        return _compiled(graph, "steps", {})


class Program:
    """What a module's forward computes for one pattern of arguments in one mode, with every run fused.

    Args:
        module: whose forward; not referred to afterwards.
        pattern: as in :func:`resnet_fused.surgery.recording.record`.
        training: the mode.
        memory: what its runs keep for backward.

    Raises:
        Left: where the forward is no graph.
    """

    def __init__(self, module: nn.Module, pattern: tuple[tuple, dict[str, Any]], training: bool, memory: str):
        graph, result, guards, self.reads_training = record(module, pattern, training)
        finder = Finder(module, graph)
        self.runs = finder.runs()
        self.left = dict(finder.left(self.runs))
        # By id, the modules that the forward calls or looks into, and those that it calls once and nothing else: what
        # fold may change.
        self.calls_of = {*finder.uses} | finder.read
        self.called_once = {i for i, count in finder.uses.items() if count == 1 and i not in finder.read}
        for leaf in itertools.chain.from_iterable(run.leaves for run in self.runs):
            guards.add_plain(leaf)
            if normalises_and_activates(leaf):
                guards.add_attribute(leaf, "drop")
                guards.add_attribute(leaf, "act")
        guards.close()
        self.guards = guards
        made = {run.nodes[-1]: run for run in self.runs if not run.behind}
        within = _digest(graph, self.runs)
        self.calls = [RunCall(run, memory, _reads_last(run, made), within) for run in self.runs]
        members = {node for run in self.runs for node in run.nodes}
        rest = [n for n in graph.nodes if n not in members and n.op not in ("placeholder", "output")]
        # The steps besides the runs, and the one that the result comes from, as (op, target).
        self.rest: list[tuple[str, Any]] = [(n.op, n.target) for n in rest]
        results = next(n for n in graph.nodes if n.op == "output").args[0]
        only = results[0] if len(results) == 1 else None
        self.end: tuple[str | None, Any] = (only.op, only.target) if isinstance(only, fx.Node) else (None, None)
        # One run without a join and nothing besides: a part of whatever calls the module.
        self.is_one_unit = len(self.runs) == 1 and not rest and self.runs[0].join is Join.NONE
        # None, and not called, where there are no runs.
        self._function: Any = self._compile(graph, module) if self.runs else None
        self._result = None if result.is_leaf() else result
        self._graph = graph
        self._layers = tuple(layer for run in self.runs for layer in run.layers)
        self._synchronises = any(isinstance(layer, nn.SyncBatchNorm) for layer in self._layers)
        self._steps: Callable | None = None
        # The circumstances in which plans left all runs to eager, last.
        self._composed: tuple | None = None
        # The same for whoever calls the module's own forward then; None where that would run some of it fused.
        self.eager_in: tuple | None = None
        # Of the last calls, if they were inference, by their circumstances; or how many calls were like that.
        self._repetitions: dict[tuple, Repetition | int] = {}
        self._watched = False

    def __call__(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        if torch.compiler.is_compiling():
            results = self._function(module, module, *tensors)
        elif self._composed is not None and self._composed == self._circumstances(tensors):
            results = self._step_by_step(module, *tensors)
        else:
            repetition = self._repetition_for(tensors)
            noted = recorded()
            with (
                contextlib.nullcontext()
                if noted is None
                else noted.module(module, self._run_by_run, self._step_by_step, tensors)
            ):
                results = (repetition or self._run_by_run)(module, *tensors)
            # Whether a batch norm is synchronised, and so never eager, may change from call to call.
            thread = threading.get_ident()
            if not self._synchronises and all(call.composed_in == thread for call in self.calls):
                self._composed = self._circumstances(tensors)
                alone = len(tensors) == 1 and not self._fused_below(module)
                self.eager_in = decide.situation(tensors[0]) if alone else None
        return results[0] if self._result is None else pytree.tree_unflatten(results, self._result)

    def _repetition_for(self, tensors: Sequence[Tensor]) -> Repetition | None:
        """How calls like this one run; None where runs have to be asked."""
        around = None if self._watched else circumstances(tensors)
        if around is None:
            self._repetitions.clear()
            return None
        found = self._repetitions.get(around, 0)
        if isinstance(found, Repetition):
            if found.layers_are_as_before():
                return found
            self._repetitions.clear()  # they are of the same layers, whose former tensors they hold
            found = 0
        elif around not in self._repetitions and len(self._repetitions) >= _MOST_REPETITIONS:
            self._repetitions.clear()
        if found < LEARN_AFTER:
            self._repetitions[around] = found + 1
            return None
        repetition = self._repetitions[around] = Repetition(self._function, self._names, self.calls)
        return repetition

    def _circumstances(self, tensors: Sequence[Tensor]) -> tuple | None:
        """What the plans of all runs depend on; None where they have to be asked.

        Asking them run by run took 3 to 6 % more of blocks of MobileNet-v2 in inference, of 3 ms.
        """
        found: list[Any] = [self.calls[0].memory]
        for t in tensors:
            around = decide.circumstances(t)
            if around is None:
                return None
            found.append(around)
        found += [layer.training for layer in self._layers]
        if torch.is_grad_enabled():
            for layer in self._layers:
                found += [p is not None and p.requires_grad for p in layer._parameters.values()]
        return tuple(found)

    def _fused_below(self, module: nn.Module) -> bool:
        """Whether calling a module in ``module`` runs layers of these runs fused."""
        layers = set(self._layers)
        below = (m for m in module.modules() if m is not module and fused_forward_called(m) is not None)
        return any(not layers.isdisjoint(m.modules()) for m in below)

    def _run_by_run(self, module: nn.Module, *tensors: Tensor) -> Any:
        """With the runs fused."""
        return self._function(module, module, *tensors)

    def _step_by_step(self, module: nn.Module, *tensors: Tensor) -> Any:
        """What the module does itself."""
        if self._steps is None:
            # Called as they are: to find them by their names took 60 us of 1230, a block of MobileNet-v2 in inference.
            graph = fx.Graph()
            copies: dict[fx.Node, fx.Node] = {}
            children: dict[_Place, Callable] = {}
            for node in self._graph.nodes:
                copy = copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "call_module":
                    copy.op, copy.target = "call_function", _Place(f"module_{len(children)}")
                    children[copy.target] = module.get_submodule(str(node.target))
            self._steps = _compiled(graph, type(module).__name__, children)
        return self._steps(module, *tensors)

    def watch(self, wrap: Callable[[RunCall], Callable]) -> None:
        """Until :meth:`unwatch`, what ``wrap`` makes of a run's call is called in its place."""
        self._composed = self.eager_in = None
        self._repetitions.clear()
        self._watched = True
        self._put({call: wrap(call) for call in self.calls})

    def unwatch(self) -> None:
        """Undoes :meth:`watch`."""
        self._watched = False
        self._put({call: call for call in self.calls})

    def _put(self, calls: dict[RunCall, Callable]) -> None:
        if self._function is not None:
            # The function calls runs by these names.
            self._function.__globals__.update(zip(self._names, calls.values(), strict=True))

    def _compile(self, graph: fx.Graph, module: nn.Module) -> Callable:
        ends = {run.nodes[-1]: i for i, run in enumerate(self.runs)}
        places = [_Place(f"run_{i}") for i in range(len(self.runs))]
        members = {node for run in self.runs for node in run.nodes}
        calls: dict[_Place, Callable] = dict(zip(places, self.calls, strict=True))
        fused = fx.Graph()
        called = fused.placeholder("module")
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node in ends:
                run = self.runs[ends[node]]
                inputs = (run.source,) if run.shortcut is None else (run.source, run.shortcut)
                copies[node] = fused.call_function(places[ends[node]], (called, *(copies[n] for n in inputs)))
            elif node not in members:
                copy = copies[node] = fused.node_copy(node, copies.__getitem__)
                if node.op == "call_function":
                    copy.target = _POOLS.get(node.target, node.target)
                elif node.op == "call_module" and type(child := module.get_submodule(str(node.target))) is nn.MaxPool2d:
                    copy.op, copy.target = "call_function", _Place(f"pool_{len(calls)}")
                    calls[copy.target] = PoolCall(child)
        function = _compiled(fused, type(module).__name__, calls)
        names = {id(value): name for name, value in function.__globals__.items()}
        self._names = [names[id(call)] for call in self.calls]
        return function


def _digest(graph: fx.Graph, runs: Sequence[Run]) -> str:
    """Tells modules apart by their steps and by the layers of their runs, in each process alike."""
    layers = [_described(layer) for run in runs for layer in run.layers]
    return hashlib.sha256("\n".join([str(graph), *layers]).encode()).hexdigest()[:8]


def _described(layer: nn.Module) -> str:
    """Its sizes and settings. A repr fails on settings that calling it does not, such as a number for two."""
    sizes = [tuple(p.shape) for p in layer.parameters()]
    settings = {k: v for k, v in sorted(vars(layer).items()) if k[0] != "_" and k != "training"}
    plain = {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str | tuple)}
    return f"{type(layer).__name__} {sizes} {plain}"


# What runs in the place of functions that pool.
_POOLS: dict[Any, Callable] = {F.max_pool2d: pool_by_functional, torch.max_pool2d: pool_by_torch}


def _reads_last(run: Run, made: dict[fx.Node, Run]) -> bool:
    """Whether the tensor that ``run`` adds is another run's result that only runs have read, and none reads later.

    ``made``: runs by their last node.
    """
    added = run.source if run.join is Join.IDENTITY else run.shortcut
    if added not in made:
        return False
    readers = [other for other in made.values() if added in (other.source, other.shortcut)]
    order = list(made)
    return (
        all(any(user in other.nodes for other in readers) for user in added.users)
        and run in readers
        and all(order.index(other.nodes[-1]) <= order.index(run.nodes[-1]) for other in readers)
    )


def _compiled(graph: fx.Graph, name: str, calls: dict[_Place, Callable]) -> Callable:
    """A graph as a function of the module that it names children of, and of its inputs."""
    code = graph.python_code("self")
    source = code.src
    filename = f"<resnet_fused {next(_numbers)}: {name}>"
    namespace = {k: calls[v] if isinstance(v, _Place) else v for k, v in code.globals.items()}
    exec(compile(source, filename, "exec"), namespace)
    function = namespace.pop("forward")  # which would be a cycle, too
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function
