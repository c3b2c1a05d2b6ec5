# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a module's ``forward`` does, read off one symbolic execution of it (torch.fx), and what that depended on.

The forward runs on a twin: a copy of the module's attributes whose children are stand-ins that record their calls. So
nothing of torch is patched while it runs, other threads may use the model meanwhile, and whatever the forward assigns
stays in the twin.
"""

from __future__ import annotations

import enum
import gc
import operator
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fused.surgery.guards import Guards
from resnet_fused.surgery.layers import any_global_hooks, is_container, is_hooked, is_layer, is_plain, is_sequence


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


# ---------------------------------------------------------------------------------------------------------------
# Symbols

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


class _Symbol(fx.Proxy):
    """A value of the recorded execution."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node"):
            raise Left(f"forward assigns to {name} of a tensor")
        super().__setattr__(name, value)


def _record_in_place(name: str) -> Callable:
    def method(self: _Symbol, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:  # fx.Proxy would record x += y as x = x + y
    setattr(_Symbol, f"__{_name}__", _record_in_place(_name))


class _TensorSymbol(_Symbol):
    """A tensor that the forward is given or its module has: also to those who ask with ``isinstance``."""

    __class__ = property(lambda self: Tensor)


# ---------------------------------------------------------------------------------------------------------------
# Children


class _Child:
    """Stands in for a child: its calls are recorded, its attributes are the child's."""

    def __init__(self, recorder: _Recorder, module: nn.Module, path: str):
        self.__dict__.update(_recorder=recorder, _module=module, _path=path)

    __class__ = property(lambda self: type(self.__dict__["_module"]))

    def __call__(self, *args, **kwargs) -> fx.Proxy:
        state = self.__dict__
        return state["_recorder"].create_proxy("call_module", state["_path"], args, kwargs)

    def __getattr__(self, name: str) -> Any:
        recorder, module, path = (self.__dict__[key] for key in ("_recorder", "_module", "_path"))
        value = getattr(module, name)
        if isinstance(value, MethodType | nn.Module):
            recorder.refuse(f"forward uses {path}.{name}")
        if isinstance(value, Tensor):
            return recorder.create_proxy("get_attr", f"{path}.{name}", (), {})
        recorder.read(module, name)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__["_recorder"].refuse(f"forward assigns to {self.__dict__['_path']}.{name}")

    def __bool__(self) -> bool:
        return bool(self.__dict__["_module"])

    def __len__(self) -> int:
        return len(self.__dict__["_module"])

    def __iter__(self) -> Iterator:
        self.__dict__["_recorder"].refuse(f"forward looks into {self.__dict__['_path']}")

    __getitem__ = __contains__ = __iter__


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
    "torch.utils._contextlib",
    "torch.compiler",
    "torch._dynamo.utils",  # whose weak references notice modules that a forward makes and drops
)
_OF_TORCH_ITSELF = ("_assert", "is_tensor")  # in torch/__init__.py
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PURE_LIBRARY = ("functools", "contextlib", "collections", "typing", "enum", "copy", "abc", "operator", "itertools")
# What a graph cannot repeat, or what may answer differently the next time.
_IMPURE = {
    "print",
    "input",
    "open",
    "time",
    "perf_counter",
    "monotonic",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "get_autocast_dtype",
    "is_anomaly_enabled",
}


def _context() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _random_state() -> tuple:
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()[1].tobytes()
    return random.getstate(), torch.get_rng_state(), state


class _Recorder(fx.Tracer):
    """Holds the graph and what was read."""

    def __init__(self, module: nn.Module, training: bool):
        super().__init__()
        self.root = module
        self.training = training
        self.graph = fx.Graph(tracer_cls=type(self))
        self.context = _context()
        self.guards = Guards(module)
        self.paths: dict[int, str] = {}  # of tensors that are mere attributes
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
        return (_TensorSymbol if node.op in ("placeholder", "get_attr") else _Symbol)(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _context() != self.context:
            self.refuse("forward changes grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            path = self.paths.get(id(a))
            if path is None:
                self.refuse("forward uses a tensor that is neither an argument nor a parameter")
            return self.create_node("get_attr", path, (), {})
        if isinstance(a, nn.Module):
            self.refuse(f"forward passes on a module, {type(a).__name__}")
        return super().create_arg(a)

    def read(self, module: nn.Module, name: str) -> None:
        """``forward`` has read, or asked for, an attribute of ``module``."""
        if name == "training":
            self.reads_training = True
            if module is not self.root:
                training = module.training if self.training == self.root.training else self.training
                self.guards.add_training(module, training)
            return
        reason = self.guards.add_attribute(module, name)
        if reason is not None:
            self.refuse(reason)

    def twin(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """A copy of ``module``'s attributes with symbols for tensors and stand-ins for children."""
        twin = type(module).__new__(type(module))
        twin.__dict__.update((k, v) for k, v in module.__dict__.items() if k != "forward")
        if self.training != self.root.training:
            twin.__dict__["training"] = self.training
        for registry in ("_parameters", "_buffers"):
            twin.__dict__[registry] = {
                name: None if tensor is None else self.create_proxy("get_attr", f"{prefix}{name}", (), {})
                for name, tensor in module.__dict__[registry].items()
            }
        twin.__dict__["_modules"] = {
            name: None if child is None else self.stand_in(child, f"{prefix}{name}")
            for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                self.paths[id(value)] = f"{prefix}{name}"
        self.twins[id(twin)] = (twin, module)
        self.guards.add_module(module)
        return twin

    def stand_in(self, child: nn.Module, path: str) -> nn.Module | _Child:
        if is_container(child) or _looks_through(child):
            return self.twin(child, f"{path}.")
        return _Child(self, child, path)

    def watch(self, frame: FrameType, event: str, function: object) -> None:
        """A profile function: notes what the forward's own code reads, and refuses what a graph cannot repeat."""
        if event == "c_call":
            name = getattr(function, "__name__", "")
            if name in _IMPURE and _is_users(frame):
                self.refuse(f"forward calls {name}")
        elif event == "call" and not _is_of(frame, __package__):
            self.enter(frame)

    def enter(self, frame: FrameType) -> None:
        code, home = frame.f_code, frame.f_globals.get("__name__", "")
        known = home.startswith(_TORCH) or code.co_name in _OF_TORCH_ITSELF
        if _is_of(frame, "torch") or _is_standard(frame):
            if not known and not home.startswith(_PURE_LIBRARY) and _is_users(frame.f_back):
                self.refuse(f"forward calls {home}.{code.co_name}")
            return
        self.guards.add_globals(frame.f_globals, _names(code))
        holder = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        twin, original = self.twins.get(id(holder), (None, None))
        if twin is not None:
            for name in _names(code):
                if name in twin.__dict__ or hasattr(type(twin), name) or _is_registered(original, name):
                    self.read(original, name)


def _is_registered(module: nn.Module, name: str) -> bool:
    return name in module._modules or name in module._parameters or name in module._buffers


def _is_of(frame: FrameType | None, package: str) -> bool:
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name == package or name.startswith(f"{package}.")


def _is_standard(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return (file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file) or file.startswith("<frozen")


def _is_users(frame: FrameType | None) -> bool:
    return frame is not None and not (_is_of(frame, "torch") or _is_of(frame, __package__) or _is_standard(frame))


def _names(code: CodeType) -> set[str]:
    """What ``code`` may look up by name, ``getattr(self, "name")`` included."""
    names = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return names


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
    before, profile = _random_state(), sys.getprofile()
    try:
        symbols = [
            recorder.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is TENSOR else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(symbols, structure)
        twin = recorder.twin(module)
        attributes = {name: dict(twin.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
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
    except Exception as error:  # anything may go wrong in a forward that is given a symbol
        if recorder.reason is None and not isinstance(error, Left):
            message = str(error).strip().partition("\n")[0]
            recorder.reason = f"forward cannot be traced: {message or type(error).__name__}"
        raise Left(recorder.reason or str(error)) from None
    finally:
        recorder.release()
    reason = recorder.reason or _effects(recorder, twin, attributes, before)
    if reason is not None:
        raise Left(reason)
    for node in [n for n in recorder.graph.nodes if n.op == "get_attr" and not n.users]:
        recorder.graph.erase_node(node)
    return Recording(recorder.graph, result_structure, recorder.guards, recorder.reads_training)


def _effects(recorder: _Recorder, twin: nn.Module, attributes: dict[str, dict], before: tuple) -> str | None:
    """What else the forward did than to compute a result."""
    python_state, torch_state, numpy_state = before
    now = _random_state()
    if now[0] != python_state or not torch.equal(now[1], torch_state) or now[2] != numpy_state:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        return "forward draws random numbers"
    for name, entries in attributes.items():
        present = getattr(twin, name)
        if present.keys() != entries.keys() or any(present[k] is not v for k, v in entries.items()):
            return "forward assigns to attributes of its module"
    return recorder.guards.changed_contents()
