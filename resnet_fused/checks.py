# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The tolerance policy on whole networks, by the benchmarks and by ``python -m resnet_fused``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import testing

DRAWS = 4


@dataclass(frozen=True)
class Check:
    """Verdict over all tensors of one case."""

    compared: int  # tensors
    draws: int  # inputs that were needed
    worst: testing.Comparison  # the accepted one nearest to its bound, or the worst failure
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        return "ok" if self.passed else f"FAILED ({len(self.failures)} of {self.compared})"


def check(
    eager: nn.Module,
    fused: dict[str, nn.Module],
    draw: Callable[[int], Tensor],
    *,
    autocast: torch.dtype | None,
    gradients: bool,
    engines: Mapping[str, str],
) -> Check:
    """Compare every module of ``fused``, each on its engine of ``engines``, with ``eager`` on the input ``draw(0)``.

    Outputs and running statistics have to be within the policy at once. A gradient may have up to ``DRAWS``
    inputs to be so once: where an activation in front of a ReLU is zero but for rounding, eager and fused (and
    two eager runs that sum in different order) may see it on different sides of zero. One element of the
    gradient is then wrong altogether, by chance and in either of them, which is not the rounding error that the
    policy is about. A wrong kernel is wrong on every input.
    """
    accepted: dict[tuple[str, str], testing.Comparison] = {}
    for index in range(DRAWS):
        x = draw(index)
        reference = testing.observe_reference(eager, x, gradients=gradients)
        seen = testing.observe(eager, x, autocast=autocast, gradients=gradients)
        failed: dict[tuple[str, str], testing.Comparison] = {}
        for label, module in fused.items():
            with resnet_fused.engine(engines[label]):
                found = testing.observe(module, x, autocast=autocast, gradients=gradients)
            # Folding leaves fewer buffers; where nothing is learnt they say little.
            expected = seen if gradients else {name: seen[name] for name in found}
            for c in testing.compare_observations(found, expected, reference, precision=autocast or x.dtype):
                key = label, c.name
                if c.passed:
                    accepted.setdefault(key, c)
                elif key not in accepted:
                    failed[key] = c
        if not failed or any(not name.startswith("gradient") for _, name in failed):
            break
    return Check(
        compared=len(accepted) + len(failed),
        draws=index + 1,
        worst=max((failed or accepted).values(), key=lambda c: c.severity),
        failures=[f"{label}: {c}" for (label, _), c in failed.items()],
    )
