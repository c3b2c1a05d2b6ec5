# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whose code runs; what it looks up, read off its bytecode, and what in it no recording could repeat."""

from __future__ import annotations

import dis
import functools
import sysconfig
from types import CodeType, FrameType
from typing import NamedTuple

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")

# Builtins that tell a symbol from a tensor, reach around attribute access, or have effects.
_REFUSED = {"type", "id", "callable", "vars", "dir", "globals", "locals", "eval", "exec", "setattr", "delattr"} | {
    "print",
    "input",
    "open",
    "suppress",
}
_ASKING = {"getattr", "hasattr"}


class Lookups(NamedTuple):
    """What code looks up.

    ``globals``: names in the module and among the builtins; ``attributes``: names in objects, those ``asked`` for
    included; ``asked``: constant strings, where ``getattr`` or ``hasattr`` are used; ``nested``: the code of functions
    inside; ``reason``: why it cannot be recorded, or None.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    asked: frozenset[str]
    nested: tuple[CodeType, ...]
    reason: str | None


@functools.lru_cache(maxsize=1024)
def lookups(code: CodeType) -> Lookups:
    """What ``code`` and the functions inside it look up."""
    found_globals: set[str] = set()
    attributes: set[str] = set()
    nested: list[CodeType] = []
    reason = None
    previous = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            found_globals.add(instruction.argval)
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(instruction.argval)
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            reason = f"forward assigns to the global {instruction.argval}"
        elif name in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "CHECK_EG_MATCH"):
            reason = "forward handles exceptions"
        elif name == "IS_OP" and not _is_singleton(previous):
            reason = "forward compares by identity"
        previous = instruction
    strings = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    asked = strings if found_globals & _ASKING else set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = lookups(constant)
            found_globals |= inner.globals
            attributes |= inner.attributes
            asked |= inner.asked
            nested += (constant, *inner.nested)
            reason = reason or inner.reason
    for name in sorted(found_globals & _REFUSED):
        reason = reason or f"forward calls {name}"
    return Lookups(frozenset(found_globals), frozenset(attributes | asked), frozenset(asked), tuple(nested), reason)


def _is_singleton(instruction: dis.Instruction | None) -> bool:
    return (
        instruction is not None
        and instruction.opname.startswith("LOAD_CONST")
        and (instruction.argval is None or isinstance(instruction.argval, bool))
    )


def is_of(frame: FrameType | None, package: str) -> bool:
    """Whether ``frame`` runs code of ``package``."""
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name == package or name.startswith(f"{package}.")


def is_standard(frame: FrameType) -> bool:
    """Whether ``frame`` runs code of Python's standard library."""
    file = frame.f_code.co_filename
    return (file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file) or file.startswith("<frozen")


def is_users(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs neither torch's code, nor this package's surgery, nor the standard library's."""
    return frame is not None and not (is_of(frame, "torch") or is_of(frame, __package__) or is_standard(frame))
