# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a recorded forward depended on, and whether it is still so: :class:`Guards`.

Compared is by identity, so that a check costs tens of nanoseconds. A value that could change in place without changing
its identity is compared by its items, or is no value that a forward may depend on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
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
_REGISTRIES = ("_modules", "_parameters", "_buffers")


def _is_immutable(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_immutable, value))
    return isinstance(value, _IMMUTABLE)


def _items(container: Any) -> list:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _same_items(container: Any, before: list) -> bool:
    now = _items(container)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


class Guards:
    """Facts about a module, its class, its children and the functions that its forward called.

    The module itself is not referred to: it holds its guards, and would be freed late.
    """

    def __init__(self, module: nn.Module):
        self._own = module.__dict__  # dropped by close()
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
        self._facts = tuple(tuple(part.values()) for part in parts)
        self._children = tuple(item for item in self._facts[0] if isinstance(item[2], nn.Module))

    def hold(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        own = module.__dict__
        if len(own) != self._own_size:
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
            if not _same_items(container, before):
                return False
        return True

    def hold_for_compiler(self, module: nn.Module) -> bool:
        """As :meth:`hold`, of the children only and in a form that torch.compile guards in turn."""
        return all(mapping[key] is value for mapping, key, value in self._children)

    def changed_contents(self) -> str | None:
        """What was appended to, or taken from, meanwhile."""
        for container, before in self._contents.values():
            if not _same_items(container, before):
                return f"forward changes a {type(container).__name__} of its module"
        return None

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
        value = getattr(type(module), name, _ABSENT)
        if isinstance(value, list | dict | set):
            self._contents[id(value)] = (value, _items(value))
        self._classes[type(module), name] = (type(module), name, value)
        return None

    def add_globals(self, namespace: dict[str, Any], names: Iterable[str]) -> None:
        """The functions, classes and constants of these names that code with these globals finds, in modules too."""
        modules = []
        for name in names:
            value = namespace.get(name, _ABSENT)
            if isinstance(value, ModuleType):
                modules.append(value)
            if value is not _ABSENT and (_is_immutable(value) or callable(value)):
                self._items[id(namespace), name] = (namespace, name, value)
        for module in modules:
            for name in names:
                value = vars(module).get(name, _ABSENT)
                if value is not _ABSENT and (_is_immutable(value) or callable(value)):
                    self._items[id(vars(module)), name] = (vars(module), name, value)

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
        if isinstance(value, list | dict | set):
            if name not in _REGISTRIES:
                self._contents[id(value)] = (value, _items(value))
            return None
        if _is_immutable(value) or isinstance(value, nn.Module) or callable(value):
            return None
        return f"forward reads {name}, a {type(value).__name__}, whose changes nobody would see"
