# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Where plans are remembered: in this process, and in a JSON file in the user's cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from resnet_fused.planner.entry import Entry
from resnet_fused.planner.keys import Key, machine

try:
    import fcntl
except ImportError:  # no POSIX system: files are still replaced whole, but what two write at once is not merged
    fcntl = None  # type: ignore[assignment]

FORMAT = 1

# By machine, as the JSON of its fields, and block.
Plans = dict[str, dict[str, Entry]]


def path() -> Path:
    """The user's file: in ``RESNET_FUSED_CACHE``, ``XDG_CACHE_HOME/resnet_fused`` or ``~/.cache/resnet_fused``."""
    folder = os.environ.get("RESNET_FUSED_CACHE")
    if folder:
        return Path(folder) / "plans.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resnet_fused" / "plans.json"


def say(message: str) -> None:
    """A line to stderr. No warning: those can be turned into errors, and a file is no reason to fail in forward."""
    print(f"resnet_fused: {message}", file=sys.stderr, flush=True)


def parse(text: str) -> Plans:
    """The plans of a file's text.

    Raises:
        ValueError: if it is none.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        return {
            json.dumps(dict(record["machine"]), sort_keys=True): {
                str(block): Entry.from_json(entry) for block, entry in record["blocks"].items()
            }
            for record in content["machines"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a file of plans: {error!r}") from error


def render(plans: Plans) -> str:
    """A file's text."""
    machines = [
        {"machine": json.loads(name), "blocks": {block: entry.as_json() for block, entry in blocks.items()}}
        for name, blocks in plans.items()
    ]
    return json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n"


def merge(into: Plans, plans: Plans) -> None:
    """Adds ``plans`` to ``into``, in place of what is there for the same block."""
    for name, blocks in plans.items():
        into.setdefault(name, {}).update(blocks)


def write(file: Path, plans: Plans) -> None:
    """Adds ``plans`` to those in ``file``, whole or not at all, whoever else writes at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        merged: Plans = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # what is no file of plans is written over
            merged = parse(file.read_text())
        merge(merged, plans)
        replace(file, render(merged))


def replace(file: Path, text: str) -> None:
    """``text`` as ``file``: readers see the old or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w") as f:
            f.write(text)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "w") as f:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


class Store:
    """The plans that this process knows. The file is read when a plan is first looked for."""

    def __init__(self) -> None:
        self._plans: Plans | None = None
        self._said: set[str] = set()

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            say(message)

    @property
    def plans(self) -> Plans:
        if self._plans is None:
            self._plans = {}
            file = path()
            try:
                self._plans = parse(file.read_text())
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                self._say_once(f"{file} is ignored: {error}")
        return self._plans

    def find(self, key: Key) -> Entry | None:
        """What is known for ``key`` on this machine with these versions."""
        here = machine(key.device)
        entry = self.plans.get(json.dumps(here, sort_keys=True), {}).get(str(key))
        if entry is not None and len(entry.choices) in (0, len(key.units)):
            return entry
        for name in self.plans:
            there = json.loads(name)
            changed = [
                f"{field} {there.get(field)}, now {value}"
                for field, value in here.items()
                if field != "threads" and there.get(field) != value
            ]
            if there.get("device") == here["device"] and changed:
                self._say_once(f"plans made with {'; '.join(changed)} are ignored")
        return None

    def add(self, key: Key, entry: Entry) -> None:
        """Remembers ``entry``, also in the file, if that can be written."""
        found = {json.dumps(machine(key.device), sort_keys=True): {str(key): entry}}
        merge(self.plans, found)
        try:
            write(path(), found)
        except OSError as error:
            self._say_once(f"plans are not kept in {path()}: {error}")

    def load(self, plans: Plans) -> None:
        """Adds ``plans`` in this process only."""
        merge(self.plans, plans)

    def forget(self) -> None:
        """Nothing is known then until the file is read again."""
        self._plans = None
        self._said.clear()
