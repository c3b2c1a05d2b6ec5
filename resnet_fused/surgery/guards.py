# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a recorded forward depended on, and whether it is still so: :class:`Guards`.

Compared is by identity, so that a check costs tens of nanoseconds. A value that could change in place without changing
its identity is compared by its items, or is no value that a forward may depend on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.surgery.layers import CALLED, is_hooked, is_plain

_ABSENT = object()

_IMMUTABLE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    type,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    FunctionType,
    BuiltinFunctionType,
    ModuleType,
)
_OF_EVERY_MODULE = {*nn.Module().__dict__}
REGISTRIES = ("_modules", "_parameters", "_buffers")


def _is_immutable(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_immutable, value))
    return isinstance(value, _IMMUTABLE)


def items_of(container: Any) -> list:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def same_items(container: Any, before: list) -> bool:
    now = items_of(container)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


class Guards:
    """Facts about a module, its class, its children and the functions that its forward called.

    The module itself is not referred to: it holds its guards, and would be freed late.
    """

    def __init__(self, module: nn.Module):
        self._own = module.__dict__  # dropped by close()
        self._class = type(module)
        self._own_items: dict[str, object] = {}
        self._own_types: dict[str, type] = {}
        self._own_size = len(module.__dict__)
        self._items: dict[tuple[int, str], tuple[dict, str, object]] = {}
        self._types: dict[tuple[int, str], tuple[dict, str, type]] = {}
        self._classes: dict[tuple[type, str], tuple[type, str, object]] = {}
        self._sizes: dict[int, tuple[dict, int]] = {}
        self._contents: dict[int, tuple[Any, list]] = {}
        self._plain: dict[int, tuple[nn.Module, type]] = {}
        self._unhooked: dict[int, tuple[nn.Module, type]] = {}

    def close(self) -> None:
        """Nothing is added from now on."""
        del self._own
        parts = (self._items, self._types, self._classes, self._sizes, self._contents, self._plain, self._unhooked)
        self._facts: tuple[Any, ...] = tuple(tuple(part.values()) for part in parts)
        self._children = tuple(item for item in self._facts[0] if isinstance(item[2], nn.Module))
        plain = (bool, int, float, str)
        self._settings = tuple((key, v) for key, v in self._own_items.items() if isinstance(v, plain))
        self._class_settings = tuple(item for item in self._facts[2] if isinstance(item[2], plain))

    def hold(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        own = module.__dict__
        if len(own) != self._own_size or type(module) is not self._class:
            return False
        for key, value in self._own_items.items():
            if own.get(key, _ABSENT) is not value:
                return False
        items, types, classes, sizes, contents, plain, unhooked = self._facts
        for mapping, size in sizes:
            if len(mapping) != size:
                return False
        for mapping, key, value in items:
            if mapping.get(key, _ABSENT) is not value:
                return False
        for cls, name, value in classes:
            if getattr(cls, name, _ABSENT) is not value:
                return False
        for leaf, cls in plain:
            if type(leaf) is not cls or not is_plain(leaf):
                return False
        for inner, cls in unhooked:
            if type(inner) is not cls or is_hooked(inner):
                return False
        for key, cls in self._own_types.items():
            if type(own.get(key)) is not cls:
                return False
        for mapping, key, cls in types:
            if type(mapping.get(key)) is not cls:
                return False
        for container, before in contents:
            if not same_items(container, before):
                return False
        return True

    def hold_for_compiler(self, module: nn.Module) -> bool:
        """As :meth:`hold`, of what torch.compile guards in turn: the class, children and settings."""
        if type(module) is not self._class:
            return False
        for mapping, key, value in self._children:
            if mapping[key] is not value:
                return False
        for key, value in self._settings:
            if getattr(module, key) != value:
                return False
        return all(getattr(cls, key, None) == value for cls, key, value in self._class_settings)

    def add_module(self, module: nn.Module) -> None:
        """Nothing may be added to ``module``, or taken away, and its forward stays what it is."""
        if module.__dict__ is not self._own:
            self._sizes[id(module.__dict__)] = (module.__dict__, len(module.__dict__))
            self._unhooked[id(module)] = (module, type(module))
            if "forward" in module.__dict__:
                self._add(module.__dict__, "forward")
        self._sizes[id(module._modules)] = (module._modules, len(module._modules))
        for name in module._modules:
            self._add(module._modules, name)
        for name, value in module.__dict__.items():  # whatever name the forward makes up
            if name not in _OF_EVERY_MODULE and _is_immutable(value):
                self._add(module.__dict__, name)
        self._classes[type(module), "forward"] = (type(module), "forward", type(module).forward)

    def add_training(self, module: nn.Module, training: bool) -> None:
        """``module``, another than the recorded one, is in this mode."""
        self._items[id(module.__dict__), "training"] = (module.__dict__, "training", training)

    def add_plain(self, module: nn.Module) -> None:
        """``module`` runs its class's own functions and nothing else."""
        cls = type(module)
        self._plain[id(module)] = (module, cls)
        if not cls.__module__.startswith("torch.nn.modules."):  # whose functions one check covers for all
            for name in CALLED:
                self._classes[cls, name] = (cls, name, getattr(cls, name, _ABSENT))

    def add_attribute(self, module: nn.Module, name: str) -> str | None:
        """``module``'s attribute ``name`` as it is now. Returns why nothing may depend on it, or None."""
        for mapping in (module.__dict__, module._modules, module._parameters, module._buffers):
            if name in mapping:
                return self._add(mapping, name)
        return self._add_of_class(type(module), name)

    def add_function(self, module: nn.Module, code: CodeType) -> None:
        """If ``code`` is that of a function of ``module``'s class or one of its bases: that it is that function's."""
        for cls in type(module).__mro__:
            function = vars(cls).get(code.co_name)
            if getattr(function, "__code__", None) is code:
                self._classes[cls, code.co_name] = (cls, code.co_name, function)

    def add_globals(self, namespace: dict[str, Any], names: Iterable[str], attributes: Iterable[str]) -> str | None:
        """What code with these globals finds under ``names``, and under ``attributes`` of modules and classes there.

        Returns why nothing may depend on it, or None.
        """
        for name in names:
            value = namespace.get(name, _ABSENT)
            if value is _ABSENT:
                continue  # a builtin
            if not _may_be_read(value):
                return f"forward reads {name}, a {type(value).__name__}, whose changes nobody would see"
            self._items[id(namespace), name] = (namespace, name, value)
            reason = self._add_members(value, attributes)
            if reason is not None:
                return reason
        return None

    def _add_members(self, value: object, attributes: Iterable[str]) -> str | None:
        torchs = _is_torchs(value)
        if isinstance(value, type) and not torchs:
            for name in attributes:
                reason = self._add_of_class(value, name) if hasattr(value, name) else None
                if reason is not None:
                    return reason
        elif isinstance(value, ModuleType):
            for name in attributes:
                member = vars(value).get(name, _ABSENT)
                if member is _ABSENT:
                    continue
                if _may_be_read(member):
                    self._items[id(vars(value)), name] = (vars(value), name, member)
                    if isinstance(member, type | ModuleType) and not torchs and member is not value:
                        reason = self._add_members(member, attributes)
                        if reason is not None:
                            return reason
                elif not torchs:
                    return f"forward reads {name}, a {type(member).__name__}, whose changes nobody would see"
        return None

    def _add_of_class(self, cls: type, name: str) -> str | None:
        value = getattr(cls, name, _ABSENT)
        if value is not _ABSENT and getattr(nn.Module, name, _ABSENT) is value:
            return None
        if isinstance(value, list | dict | set):
            if not all(map(_is_immutable, items_of(value))):
                return f"forward reads {name}, a {type(value).__name__} of things whose changes nobody would see"
            self._contents[id(value)] = (value, items_of(value))
        elif value is not _ABSENT and not _may_be_read(value) and not isinstance(value, property | MethodType):
            if not hasattr(type(value), "__get__"):
                return f"forward reads {name}, a {type(value).__name__}, whose changes nobody would see"
        if not isinstance(value, MethodType):  # of classes they are made anew
            self._classes[cls, name] = (cls, name, value)
        return None

    def _add(self, mapping: dict[str, Any], name: str) -> str | None:
        value = mapping[name]
        own = mapping is self._own
        if isinstance(value, Tensor):
            if own:
                self._own_types[name] = type(value)
            else:
                self._types[id(mapping), name] = (mapping, name, type(value))
            return None
        if own:
            self._own_items[name] = value
        else:
            self._items[id(mapping), name] = (mapping, name, value)
        if name in REGISTRIES or isinstance(value, nn.Module) or _may_be_read(value):
            return None
        if type(value) in (list, dict, set) and all(map(_is_immutable, items_of(value))):
            self._contents[id(value)] = (value, items_of(value))
            return None
        if name == "forward":
            return None  # of a module that is fused itself
        return f"forward reads {name}, a {type(value).__name__}, whose changes nobody would see"


def _may_be_read(value: object) -> bool:
    """Whether ``value`` is known to be the same as long as it is the same object."""
    return _is_immutable(value) or type(value).__module__ == "typing"


def _is_torchs(value: object) -> bool:
    name = getattr(value, "__name__", "") if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return isinstance(name, str) and (name == "torch" or name.startswith("torch."))
