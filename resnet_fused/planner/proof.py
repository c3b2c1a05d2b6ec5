# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whether a candidate computes what the library's engine computes: the tolerance policy on scratch tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused import testing
from resnet_fused.planner.entry import Choices, all_library
from resnet_fused.planner.keys import Key
from resnet_fused.planner.scratch import Scratch, make

# A gradient has so many draws to be within the policy once: an activation that is zero but for rounding may be on
# either side of its ReLU. A wrong kernel is wrong on every draw.
DRAWS = 4

# float64 is slow: the policy is checked on so few images that forward stays below so many multiply-adds.
MOST_MULTIPLY_ADDS = 2e8


def observe(scratch: Scratch, choices: Choices | None) -> dict[str, Tensor]:
    """All that comes out of a run of a copy of ``scratch``; None: of the reference in float64."""
    own = scratch.copy(torch.float64 if choices is None else None)
    seen = own.run_reference() if choices is None else own.run(choices)
    if scratch.key.training:
        seen |= {name: t for name, t in own.tensors().items() if name.startswith("buffer")}
    return seen


def _multiply_adds(key: Key) -> float:
    """Of forward, for one image, as if nothing had a stride."""
    return math.prod(key.shape[2:]) * sum(math.prod(u.weight) for u in key.units if u.weight is not None)


class Proof:
    """Compares candidates for ``key`` with the library's engine.

    Twice: on a few images, both against float64, under the policy; and on the whole shape, where float64 would take
    long, with each other: in the 2-norm and to the square root of the policy's floor, which no rounding reaches and
    every wrong tile passes.
    """

    def __init__(self, key: Key, whole: Scratch):
        images = max(1, min(key.shape[0], int(MOST_MULTIPLY_ADDS / max(1.0, _multiply_adds(key)))))
        if key.training:
            images = min(key.shape[0], max(images, 2))  # one value per channel has no statistics
        self._few = key._replace(shape=(images, *key.shape[1:]))
        self._library = all_library(key.units)
        self._draws: list[tuple[Scratch, dict[str, Tensor], dict[str, Tensor]]] = []
        self._whole = whole.copy()  # others update the running statistics of theirs
        self._expected = observe(self._whole, self._library)

    def _draw(self, index: int) -> tuple[Scratch, dict[str, Tensor], dict[str, Tensor]]:
        if index == len(self._draws):
            scratch = make(self._few, seed=index + 1)
            self._draws.append((scratch, observe(scratch, self._library), observe(scratch, None)))
        return self._draws[index]

    def failure(self, choices: Choices) -> str | None:
        """In what the candidate differs from the library's engine by more than is allowed, or None."""
        passed: set[str] = set()
        for index in range(DRAWS):
            scratch, library, reference = self._draw(index)
            found = testing.compare_observations(
                observe(scratch, choices), library, reference, precision=self._few.dtype
            )
            failed = [c for c in found if not c.passed and c.name not in passed]
            passed |= {c.name for c in found if c.passed}
            if not failed or any(not c.name.startswith("gradient") for c in failed):
                break
        if failed:
            return str(max(failed, key=lambda c: c.severity))
        return self._failure_of_whole(observe(self._whole, choices))

    def _failure_of_whole(self, seen: dict[str, Tensor]) -> str | None:
        allowed = math.sqrt(testing.FLOORS[self._few.dtype])
        largest = {
            prefix: max(float(t.abs().max()) for n, t in self._expected.items() if n.startswith(prefix))
            for prefix in {name.split()[0] for name in self._expected}
        }
        for name, expected in self._expected.items():
            # Where nothing is expected but rounding, its kind's largest value is what counts.
            scale = max(float(expected.double().norm()), 1e-6 * largest[name.split()[0]] * math.sqrt(expected.numel()))
            distance = float((seen[name].double() - expected.double()).norm()) / (scale or 1.0)
            if not distance <= allowed:
                return f"{name}: FAILED: 2-norm {distance:.2e} from the library's (allowed {allowed:.2e})"
        return None
