# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Which cases of a parametrised test are enough of each kind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def covering(cases: Sequence[dict[str, int]]) -> set[int]:
    """The indices of a few of ``cases`` in which every pair of values that two parameters have together occurs.

    A case maps each parameter to the index of its value. Greedily, the first of those that bring the most, so that
    the same cases are chosen each time.
    """
    pairs = [
        set(itertools.combinations(sorted(case.items()), 2)) if len(case) > 1 else set(case.items()) for case in cases
    ]
    missing = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
