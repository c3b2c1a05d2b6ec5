# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The forward that :func:`resnet_fused.fuse` puts on a module: :class:`FusedForward`.

It stands in the instance's ``__dict__``, where ``nn.Module`` looks first. The class stays what it is, and wherever a
call is not plain its own forward runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fused.opaque import assume_constant_result
from resnet_fused.planner import decide
from resnet_fused.surgery.context import is_ordinary, is_tensor
from resnet_fused.surgery.layout import in_channels_last
from resnet_fused.surgery.program import Program
from resnet_fused.surgery.recording import TENSOR, Left

_ONE_TENSOR: tuple[tuple[Any, ...], dict[str, Any]] = ((TENSOR,), {})
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
# A module whose calls need more programs than this changes too often to be worth following.
_MOST_PROGRAMS = 16

_ATTRIBUTES = ("forward", "__prepare_scriptable__", "_replicate_for_data_parallel")


class FusedForward:
    """A module's forward with the runs inside it fused.

    Args:
        module: whose forward; held weakly, since it holds this.
        memory: what runs keep for backward.
        born_fused: :func:`resnet_fused.unfuse` leaves it.
        is_snapshot: made by :func:`resnet_fused.fold`: whoever calls the module may look through it, whatever it does.
    """

    def __init__(
        self, module: nn.Module, memory: str = "default", born_fused: bool = False, is_snapshot: bool = False
    ):
        self._module: Callable[[], Any] = weakref.ref(module)
        self.memory = memory
        self.born_fused = born_fused
        self.active = True
        self.is_snapshot = is_snapshot
        self._programs: dict[tuple, list[Program | Left]] = {}
        self._count = 0
        self._for_compiler: dict[tuple, Any] = {}  # programs, or None
        self._last: Program | None = None  # of the calls with one tensor

    # Calls -----------------------------------------------------------------------------------------------------

    def __call__(self, *args, **kwargs) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward is gone: keep it, and call the module")
        if torch.compiler.is_compiling():
            return self._call_compiling(module, args, kwargs)
        single = len(args) == 1 and not kwargs and is_tensor(args[0])
        # Whatever has changed since plans left the last call to eager, this is right. To ask what might have took 1.0
        # of 15.7 ms, ResNet-50 on a contiguous image of 64x64.
        left = self._last.eager_in if single and self._last is not None else None
        if left is not None and left == decide.situation(args[0]):
            return type(module).forward(module, args[0])
        if self.active and is_ordinary():
            if single:
                program, tensors = self._program(module, None, _ONE_TENSOR), args
                self._last = program
                if program is not None and program.rest:
                    tensors = (in_channels_last(module, program, args[0]),)
            else:
                program, tensors = self._program_for(module, args, kwargs)
            if program is not None:
                return program(module, tensors)
        return type(module).forward(module, *args, **kwargs)

    def _call_compiling(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = (*args, *kwargs.values())
        # Exported programs run anywhere, without this package.
        if self.active and not torch.compiler.is_exporting() and all(isinstance(t, Tensor) for t in tensors):
            call = (module.training, len(args), tuple(kwargs))
            if self._is_ready_for_compiler(*call):
                program = self._for_compiler[call]
                if program.guards.hold_for_compiler(module):
                    return program(module, tensors)
        return type(module).forward(module, *args, **kwargs)

    @assume_constant_result
    def _is_ready_for_compiler(self, training: bool, count: int, keywords: tuple[str, ...]) -> bool:
        """Finds the program at the time of compilation; torch.compile need not look into how."""
        program = None
        if is_ordinary():
            pattern = ((TENSOR,) * count, dict.fromkeys(keywords, TENSOR))
            program = self._program(self._module(), *_keyed(pattern))
        self._for_compiler[training, count, keywords] = program
        return program is not None

    def _program_for(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The program for these arguments, and the tensors among them."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if is_tensor(leaf)]
        if any(not is_tensor(leaf) and type(leaf) not in _CONSTANTS for leaf in leaves):
            return None, tensors
        pattern = pytree.tree_unflatten([TENSOR if is_tensor(leaf) else leaf for leaf in leaves], structure)
        return self._program(module, *_keyed(pattern)), tensors

    def _program(self, module: nn.Module, key: object, pattern: tuple) -> Program | None:
        for program in self._programs.get((key, module.training), ()):
            if isinstance(program, Left):
                return None
            if program.guards.hold(module):
                return program if program.runs else None
        if self._count >= _MOST_PROGRAMS:
            return None
        program = self._record(module, key, pattern, module.training)
        return program if isinstance(program, Program) and program.runs else None

    def _record(self, module: nn.Module, key: object, pattern: tuple, training: bool) -> Program | Left:
        self._count += 1
        try:
            program: Program | Left = Program(module, pattern, training, self.memory)
        except Left as reason:
            program = Left(str(reason))  # without a traceback, which would hold the module
        modes = (training,) if isinstance(program, Left) or program.reads_training else (True, False)
        for mode in modes:
            self._programs.setdefault((key, mode), []).append(program)
        return program

    def forget(self) -> None:
        """Records anew what it is asked from now on."""
        self._programs.clear()
        self._count = 0
        self._last = None

    def programs(self) -> list[Program]:
        """Those that calls have asked for so far."""
        kept = {id(p): p for of_key in self._programs.values() for p in of_key if isinstance(p, Program)}
        return list(kept.values())

    # What fuse asks --------------------------------------------------------------------------------------------

    def usual(self, training: bool) -> Program | Left:
        """The program for a call with a tensor for each parameter that has no default."""
        module = self._module()
        key, pattern = _keyed(_usual_pattern(module))
        for program in self._programs.get((key, training), ()):
            if isinstance(program, Program) and program.guards.hold(module):
                return program
        return self._record(module, key, pattern, training)

    def passes_through(self) -> bool:
        """Whether whoever calls the module may take its layers for a part of the caller's own run."""
        if not self.active:
            return False
        program = self.usual(self._module().training)
        return isinstance(program, Program) and (program.is_one_unit or self.is_snapshot)

    def set_memory(self, memory: str) -> None:
        self.memory = memory
        for program in self.programs():
            for call in program.calls:
                call.memory = memory

    # What others ask -------------------------------------------------------------------------------------------

    @property
    def __wrapped__(self) -> Any:
        """The method that would be here: for inspect, and for all else that looks at a forward rather than calls it."""
        module = self._module()
        return type(module).forward.__get__(module)

    @property
    def __func__(self) -> Callable[..., Any]:
        """For whoever wraps a method's function and binds it again, as accelerate does: it runs fused."""
        method = type(self._module()).forward

        @functools.wraps(method)
        def forward(module: nn.Module, *args, **kwargs) -> Any:
            call = self if module is self._module() else method.__get__(module)
            return call(*args, **kwargs)

        return forward

    def __getattr__(self, name: str) -> Any:
        if name == "_module":  # of an object in the making
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __deepcopy__(self, memo: dict) -> FusedForward:
        return FusedForward(copy.deepcopy(self._module(), memo), self.memory, self.born_fused, self.is_snapshot)

    def __reduce__(self):
        # Made before its module is looked at: some modules pickle their attributes before they are themselves.
        return FusedForward.__new__, (FusedForward,), (self._module(), self.memory, self.born_fused, self.is_snapshot)

    def __setstate__(self, state: tuple) -> None:
        FusedForward.__init__(self, *state)

    def prepare_scriptable(self) -> nn.Module:
        """For TorchScript, which reads the source of forward: the module and those in it as they were."""
        return without_fusion(self._module())

    def replicate(self) -> nn.Module:
        """For nn.DataParallel: a replica has children of its own in every call, and runs its class's forward."""
        module = self._module()
        replica = type(module)._replicate_for_data_parallel(module)
        for name in _ATTRIBUTES:
            replica.__dict__.pop(name, None)
        return replica


def _keyed(pattern: tuple) -> tuple[object, tuple]:
    """What programs for ``pattern`` are kept under, and the pattern; None for a single tensor."""
    leaves, structure = pytree.tree_flatten(pattern)
    if pattern == _ONE_TENSOR:
        return None, pattern
    return (structure, tuple((type(leaf), leaf) for leaf in leaves)), pattern


def _usual_pattern(module: nn.Module) -> tuple:
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError, NameError):
        return _ONE_TENSOR
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind in positional]
    keywords = {p.name: _usual_argument(p) for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    return tuple(map(_usual_argument, required)) or (TENSOR,), keywords


def _usual_argument(parameter: inspect.Parameter) -> Any:
    """A tensor, or two in a list where the annotation says list."""
    annotation = str(parameter.annotation)
    return [TENSOR, TENSOR] if annotation.startswith(("typing.List[", "List[", "list[")) else TENSOR


def install(module: nn.Module, born_fused: bool = False) -> FusedForward:
    """Put a fused forward on ``module``."""
    forward = FusedForward(module, born_fused=born_fused)
    values = (forward, forward.prepare_scriptable, forward.replicate)
    module.__dict__.update(zip(_ATTRIBUTES, values, strict=True))
    return forward


def fused_forward(module: nn.Module) -> FusedForward | None:
    """What :func:`install` has put on ``module``, even if somebody has wrapped or replaced its forward since."""
    method = module.__dict__.get("__prepare_scriptable__")
    forward = getattr(method, "__self__", None)
    return forward if isinstance(forward, FusedForward) else None


def remove(module: nn.Module) -> None:
    """Undo :func:`install`. A forward that somebody has put in its place stays."""
    forward = fused_forward(module)
    if forward is None:
        return
    forward.active = False
    for name, value in zip(_ATTRIBUTES, (forward, forward.prepare_scriptable, forward.replicate), strict=True):
        if module.__dict__.get(name) == value:
            del module.__dict__[name]


def without_fusion(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of ``module`` and all in it with the same tensors and without fused forwards."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    twin: nn.Module = object.__new__(type(module))  # FSDP2's classes have a __new__ of their own
    memo[id(module)] = twin
    own = _ATTRIBUTES if fused_forward(module) is not None else ()
    twin.__dict__.update((k, v) for k, v in module.__dict__.items() if k not in own)
    twin.__dict__["_modules"] = type(module._modules)(
        (name, None if child is None else without_fusion(child, memo)) for name, child in module._modules.items()
    )
    return twin
