# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What `make test` leaves to `make test-all`: further cases of a parametrised test, and those that take long. And which
cases can't run here, so that others are chosen."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import pytest


def covering(cases: Sequence[dict[str, str]]) -> set[int]:
    """The indices of a few of ``cases`` in which each value that a parameter takes occurs.

    A case maps each parameter to its value. Greedily: of those that bring the most values, one whose pairs of values
    were chosen the fewest times, so that a value doesn't meet one and the same other all over; of those the first, so
    that the same cases are chosen each time.
    """
    values = [set(case.items()) for case in cases]
    pairs = [list(itertools.combinations(sorted(case.items()), 2)) for case in cases]
    times = Counter()
    missing = set().union(*values)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(values[i] & missing), -sum(times[p] for p in pairs[i])))
        chosen.add(best)
        missing -= values[best]
        times.update(pairs[best])
    return chosen


def slow_but(quick: Sequence[str], names: Iterable[str], reason: str) -> list:
    """``names`` as a test's parameters, all but ``quick`` marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow(reason=reason)) for name in names]


def skip_reason(item: pytest.Item) -> str | None:
    """Why a case is skipped (``skip_where``); None if it isn't.

    A mark's function, its ``reason``, is called with those of the case's parameters that it takes, and returns a reason
    or None.
    """
    given = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("skip_where"):
        function = mark.kwargs["reason"]
        taken = inspect.signature(function).parameters
        if reason := function(**{name: value for name, value in given.items() if name in taken}):
            return reason
    return None


def missing(*modules: str) -> str | None:
    """That one of them is not installed, or None."""
    absent = [module for module in modules if find_spec(module) is None]
    return f"needs {', '.join(absent)}" if absent else None
