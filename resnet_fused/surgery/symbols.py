# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a forward is given while it is recorded: symbols for tensors, stand-ins for children.

Both answer as what they stand for would, and refuse what nobody could answer.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn

from resnet_fused.surgery.code import is_users

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


class Symbol(fx.Proxy):
    """A value of the recorded execution."""

    tracer: Any  # a recording.Recorder

    def _ask(self) -> type:
        """What ``isinstance`` asks for, of the forward's own code: nobody knows of most values."""
        if is_users(sys._getframe(1)):
            if self.tracer.gives_a_tensor(self.node):
                return Tensor
            self.tracer.refuse("forward asks for the class of a value")
        return Symbol

    __class__ = property(_ask)

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        if not hasattr(Tensor, name) and is_users(sys._getframe(1)):
            self.tracer.refuse(f"forward asks for {name} of a value")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node"):
            self.tracer.refuse(f"forward assigns to {name} of a tensor")
        super().__setattr__(name, value)


def _record_in_place(name: str) -> Callable:
    def method(self: Symbol, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:  # fx.Proxy would record x += y as x = x + y
    setattr(Symbol, f"__{_name}__", _record_in_place(_name))


class TensorSymbol(Symbol):
    """A tensor that the forward is given or its module has: also to those who ask with ``isinstance``."""

    __class__ = property(lambda self: Tensor)


class Child:
    """Stands in for a child: its calls are recorded, its attributes are the child's."""

    def __init__(self, recorder: Any, module: nn.Module, path: str):
        self.__dict__.update(_recorder=recorder, _module=module, _path=path)

    __class__ = property(lambda self: type(self.__dict__["_module"]))

    def __call__(self, *args, **kwargs) -> fx.Proxy:
        state = self.__dict__
        return state["_recorder"].create_proxy("call_module", state["_path"], args, kwargs)

    def __getattr__(self, name: str) -> Any:
        recorder, module, path = (self.__dict__[key] for key in ("_recorder", "_module", "_path"))
        value = getattr(module, name)
        if isinstance(value, MethodType | nn.Module) or isinstance(getattr(type(module), name, None), property):
            recorder.refuse(f"forward uses {path}.{name}")
        if isinstance(value, Tensor):
            return recorder.create_proxy("get_attr", f"{path}.{name}", (), {})
        recorder.read(module, name)
        return recorder.mode_of(module) if name == "training" else value

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__["_recorder"].refuse(f"forward assigns to {self.__dict__['_path']}.{name}")

    def __bool__(self) -> bool:
        return bool(self.__dict__["_module"])

    def __len__(self) -> int:
        return len(self.__dict__["_module"])

    def __iter__(self) -> Any:
        self.__dict__["_recorder"].refuse(f"forward looks into {self.__dict__['_path']}")

    __getitem__ = __contains__ = __iter__
