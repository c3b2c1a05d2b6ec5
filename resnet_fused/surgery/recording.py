# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a module's ``forward`` does, read off one symbolic execution of it (torch.fx), and what that depended on.

The forward runs on a twin: a copy of the module's attributes whose children are stand-ins that record their calls. So
nothing of torch is patched while it runs, other threads may use the model meanwhile, and what the forward assigns stays
in the twin. A profile function of this thread watches what the forward calls and looks up: what a graph could not
repeat, or nobody could see change, is refused before it happens.
"""

from __future__ import annotations

import copy
import enum
import gc
import operator
import random
import sys
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fused.surgery.code import is_of, is_standard, is_users, lookups
from resnet_fused.surgery.guards import REGISTRIES, Guards, items_of, same_items
from resnet_fused.surgery.layers import any_global_hooks, is_container, is_hooked, is_layer, is_plain, is_sequence
from resnet_fused.surgery.symbols import Child, Symbol, TensorSymbol


class Left(Exception):
    """Why a module stays as it is."""


class Tensors(enum.Enum):
    """Stands for a tensor among the arguments of a call."""

    TENSOR = enum.auto()


TENSOR = Tensors.TENSOR


class Recording(NamedTuple):
    """A forward as a graph.

    ``graph``: its placeholders are the tensors among the arguments, in order; its ``call_module`` and ``get_attr``
    nodes name children by path from the module; it returns the tensors among the results, which ``result`` puts in
    their places. ``guards``: what has to be as it was for the graph to be what the forward does, apart from the
    module's own ``training``, which is the one recorded if ``reads_training``.
    """

    graph: fx.Graph
    result: pytree.TreeSpec
    guards: Guards
    reads_training: bool


def _looks_through(module: nn.Module) -> bool:
    """Whether a child's own forward is recorded in place of a call of it."""
    if is_hooked(module):
        return False
    if is_sequence(module):
        return len(module) == 0 or any(is_layer(child) or _looks_through(child) for child in module)
    forward = module.__dict__.get("forward")
    if forward is not None:
        # A module that is fused itself has a forward on the instance, and what it stands for is known.
        return hasattr(forward, "passes_through") and forward.passes_through()
    return type(module).__name__ == "FloatFunctional" and is_plain(module)


# ---------------------------------------------------------------------------------------------------------------
# Recording

# Where torch's functions may come from that a forward calls itself. Others have effects that a graph lacks:
# checkpointing, profiling ranges, collectives, random numbers.
_TORCH = (
    "torch.nn.",
    "torch.functional",
    "torch.fx",
    "torch._tensor",
    "torch.overrides",
    "torch._jit_internal",
    "torch.jit._",
    "torch.ao.nn.",
    "torch.compiler",
    "torch._dynamo.utils",  # whose weak references notice modules that a forward makes and drops
)
_OF_TORCH_ITSELF = ("_assert",)  # in torch/__init__.py
# Decorators of a forward, which are called by nobody but us.
_CONTEXTS = ("torch.utils._contextlib", "torch.amp.", "torch.autograd.grad_mode")
_PURE_LIBRARY = ("functools", "contextlib", "collections", "typing", "enum", "copy", "abc", "operator", "itertools")
# Layers and functions that return one tensor.
_GIVE_TENSORS: tuple[type, ...] = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish),
    nn.Linear,
    nn.Dropout,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_FUNCTIONS_GIVE_TENSORS = (F.relu, torch.relu, torch.cat, torch.add, operator.add, operator.iadd)
# What may answer differently the next time.
_CHANGING = {"time", "perf_counter", "monotonic", "is_grad_enabled", "is_inference_mode_enabled"} | {
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "get_autocast_dtype",
    "is_anomaly_enabled",
}
_RANDOM = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "manual_seed", "seed"}


def _context() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _is_generator(owner: object) -> bool:
    """Whether ``owner`` draws random numbers: Python's, numpy's or torch's."""
    return isinstance(owner, random.Random | torch.Generator) or type(owner).__module__.startswith("numpy.random")


class _Recorder(fx.Tracer):
    """Holds the graph and what was read."""

    def __init__(self, module: nn.Module, training: bool):
        super().__init__()
        self.root: Any = module  # until release()
        self.training = training
        self.graph = fx.Graph(tracer_cls=type(self))
        self.context = _context()
        self.guards = Guards(module)
        self.containers: list[tuple[Any, Any]] = []  # copies of the modules' lists and dicts, and those
        self.nested: set[CodeType] = set()  # functions inside those that were called
        self.twins: dict[int, tuple[nn.Module, nn.Module]] = {}  # by id: the twin, which is kept, and its original
        self.reads_training = False
        self.reason: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Kept as well, since the forward may catch what is raised."""
        self.reason = self.reason or reason
        raise Left(reason)

    def release(self) -> None:
        """Twins hold stand-ins, which hold this: without the cycle all is freed at once, the module too."""
        self.twins.clear()
        self.root = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return (TensorSymbol if node.op in ("placeholder", "get_attr") else Symbol)(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _context() != self.context:
            self.refuse("forward changes grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            self.refuse("forward uses a tensor that is neither an argument nor a parameter")
        if isinstance(a, nn.Module):
            self.refuse(f"forward passes on a module, {type(a).__name__}")
        return super().create_arg(a)

    def read(self, module: nn.Module, name: str) -> None:
        """``forward`` has read, or asked for, an attribute of ``module``."""
        if name == "training":
            self.reads_training = True
            if module is not self.root:
                self.guards.add_training(module, self.mode_of(module))
            return
        reason = self.guards.add_attribute(module, name)
        if reason is not None:
            self.refuse(reason)

    def mode_of(self, module: nn.Module) -> bool:
        """The mode to record ``module`` in: its own, unless all are recorded in the other one than the root's."""
        return module.training if self.training == self.root.training else self.training

    def gives_a_tensor(self, node: fx.Node) -> bool:
        """Whether ``node``'s value is known to be a tensor."""
        if node.op == "call_module":
            return type(self.root.get_submodule(node.target)) in _GIVE_TENSORS
        return node.op in ("placeholder", "get_attr") or node.target in _FUNCTIONS_GIVE_TENSORS

    def twin(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """A copy of ``module``'s attributes with symbols for tensors and stand-ins for children."""
        twin: Any = object.__new__(type(module))  # FSDP2's classes have a __new__ of their own
        for name, value in module.__dict__.items():
            if name == "forward":
                continue
            if isinstance(value, Tensor):
                value = self.create_proxy("get_attr", f"{prefix}{name}", (), {})
            elif type(value) in (list, dict, set) and name not in REGISTRIES:
                self.containers.append((copy.copy(value), value))
                value = self.containers[-1][0]  # for the forward to write on
            twin.__dict__[name] = value
        twin.__dict__["training"] = self.mode_of(module)
        for registry in ("_parameters", "_buffers"):
            twin.__dict__[registry] = {
                name: None if tensor is None else self.create_proxy("get_attr", f"{prefix}{name}", (), {})
                for name, tensor in module.__dict__[registry].items()
            }
        twin.__dict__["_modules"] = {
            name: None if child is None else self.stand_in(child, f"{prefix}{name}")
            for name, child in module._modules.items()
        }
        self.twins[id(twin)] = (twin, module)
        self.guards.add_module(module)
        return twin

    def stand_in(self, child: nn.Module, path: str) -> nn.Module | Child:
        if is_container(child) or _looks_through(child):
            return self.twin(child, f"{path}.")
        return Child(self, child, path)

    def watch(self, frame: FrameType, event: str, function: object) -> None:
        """A profile function: notes what the forward's own code reads, and refuses what a graph cannot repeat."""
        if event == "c_call":
            if is_users(frame):
                name = getattr(function, "__name__", "")
                if name in _CHANGING:
                    self.refuse(f"forward calls {name}")
                if name in _RANDOM or _is_generator(getattr(function, "__self__", None)):
                    self.refuse("forward draws random numbers")
        elif event == "call" and not is_of(frame, __package__):
            self.enter(frame)

    def enter(self, frame: FrameType) -> None:
        code, home = frame.f_code, frame.f_globals.get("__name__", "")
        if home.startswith(_CONTEXTS):
            self.refuse("forward changes grad mode or autocast")
        known = home.startswith(_TORCH) or code.co_name in _OF_TORCH_ITSELF
        if is_of(frame, "torch") or is_standard(frame):
            if not known and not home.startswith(_PURE_LIBRARY) and is_users(frame.f_back):
                what = "draws random numbers" if home == "random" else f"calls {home}.{code.co_name}"
                self.refuse(f"forward {what}")
            return
        looked_up = lookups(code)
        reason = looked_up.reason
        if reason is None:
            reason = self.guards.add_globals(frame.f_globals, looked_up.globals, looked_up.attributes)
        if reason is None and code not in self.nested:
            reason = _closure_reason(frame)
        if reason is not None:
            self.refuse(reason)
        self.nested.update(looked_up.nested)
        for twin, original in list(self.twins.values()):
            self.guards.add_function(original, code)
            for name in looked_up.attributes:
                if name in twin.__dict__ or hasattr(type(twin), name) or _is_registered(original, name):
                    self.read(original, name)
            for name in looked_up.asked:
                if not hasattr(original, name):
                    self.guards.add_attribute(original, name)


def _closure_reason(frame: FrameType) -> str | None:
    for name in frame.f_code.co_freevars:
        value = frame.f_locals.get(name)
        if name != "__class__" and not isinstance(value, FunctionType | BuiltinFunctionType | type):
            return f"forward reads {name} of the function around it, whose changes nobody would see"
    return None


def _is_registered(module: nn.Module, name: str) -> bool:
    return name in module._modules or name in module._parameters or name in module._buffers


def record(module: nn.Module, pattern: tuple[tuple, dict[str, Any]], training: bool) -> Recording:
    """Execute ``module.forward`` symbolically.

    Args:
        module: any module.
        training: the mode to record, whatever the module's.
        pattern: its arguments and keyword arguments, nested containers with :data:`TENSOR` in place of tensors.

    Raises:
        Left: with the reason why the forward is no graph.
    """
    if any_global_hooks():
        raise Left("hooks on all modules are registered")
    recorder = _Recorder(module, training)
    leaves, structure = pytree.tree_flatten(pattern)
    profile = sys.getprofile()
    try:
        symbols = [
            recorder.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is TENSOR else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(symbols, structure)
        twin = recorder.twin(module)
        attributes = {name: dict(twin.__dict__[name]) for name in REGISTRIES}
        attributes["__dict__"] = dict(twin.__dict__)
        forward = type(module).forward
        collects = gc.isenabled()
        gc.disable()  # a collection would run others' code in the forward's midst
        sys.setprofile(recorder.watch)
        try:
            result = forward(twin, *args, **kwargs)
        finally:
            sys.setprofile(profile)
            if collects:
                gc.enable()
        results, result_structure = pytree.tree_flatten(result)
        for value in results:
            if not isinstance(value, fx.Proxy | int | float | str | bool | None):
                recorder.refuse(f"forward returns a {type(value).__name__}")
        recorder.create_node("output", "output", (tuple(recorder.create_arg(r) for r in results),), {})
        remaining, remaining_structure = pytree.tree_flatten((args, kwargs))
        if remaining_structure != structure or any(a is not b for a, b in zip(remaining, symbols, strict=True)):
            recorder.refuse("forward changes a container among its arguments")
    except Exception as error:  # anything may go wrong in a forward that is given a symbol
        if recorder.reason is None and not isinstance(error, Left):
            message = str(error).strip().partition("\n")[0]
            recorder.reason = f"forward cannot be traced: {message or type(error).__name__}"
        raise Left(recorder.reason or str(error)) from None
    finally:
        recorder.release()
    reason = recorder.reason or _effects(recorder, twin, attributes)
    if reason is not None:
        raise Left(reason)
    for node in [n for n in recorder.graph.nodes if n.op == "get_attr" and not n.users]:
        recorder.graph.erase_node(node)
    return Recording(recorder.graph, result_structure, recorder.guards, recorder.reads_training)


def _effects(recorder: _Recorder, twin: nn.Module, attributes: dict[str, dict]) -> str | None:
    """What else the forward did than to compute a result."""
    for name, entries in attributes.items():
        present = getattr(twin, name)
        if present.keys() != entries.keys() or any(present[k] is not v for k, v in entries.items()):
            return "forward assigns to attributes of its module"
    for written_on, original in recorder.containers:
        if not same_items(written_on, items_of(original)):
            return f"forward changes a {type(original).__name__} of its module"
    return None
