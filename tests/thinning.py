# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What `make test` leaves to `make test-all`: further cases of a parametrised test, and those that take long."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest


def covering(cases: Sequence[dict[str, str]], together: int = 2) -> set[int]:
    """The indices of a few of ``cases`` in which each combination of values that ``together`` parameters have occurs.

    A case maps each parameter to its value. Greedily, the first of those that bring the most, so that the same cases
    are chosen each time.
    """
    brings = [set(itertools.combinations(sorted(case.items()), min(together, len(case)))) for case in cases]
    missing = set().union(*brings)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(brings[i] & missing))
        chosen.add(best)
        missing -= brings[best]
    return chosen


def slow_but(quick: Sequence[str], names: Iterable[str], reason: str) -> list:
    """``names`` as a test's parameters, all but ``quick`` marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow(reason=reason)) for name in names]
