# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Chains of layers: :class:`FusedSequential`, and :class:`FusedUnit` for a module that is one convolution,
batch norm and ReLU. :func:`resnet_fused.fuse` turns existing modules into these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from resnet_fused.modules import _PLAIN_SEQUENTIALS, _Fused, run_unit
from resnet_fused.recognise import any_global_hooks, frozen_batch_norm, is_identity, is_relu

__all__ = ["FusedSequential", "FusedUnit"]


class Run(NamedTuple):
    """Neighbours in a chain that are computed together: at least two of convolution, batch norm, ReLU."""

    conv: nn.Conv2d | None
    norm: nn.Module | None
    relu: bool
    length: int

    def __str__(self) -> str:
        parts = (("conv", self.conv is not None), ("bn", not is_identity(self.norm)), ("relu", self.relu))
        return "+".join(name for name, present in parts if present)


def run_at(layers: Sequence[nn.Module], start: int) -> Run | None:
    """The run that begins at ``layers[start]``, or None if that layer stands alone.

    Hooks on a convolution or batch norm do not matter here: ``run_unit`` calls a hooked module.
    """
    end = start
    conv = norm = None
    relu = False
    if type(layers[end]) is nn.Conv2d:
        conv = layers[end]
        end += 1
    # Identity is a batch norm that was folded into the convolution before it.
    if end < len(layers) and (
        type(layers[end]) is nn.BatchNorm2d
        or frozen_batch_norm(layers[end])
        or (conv is not None and type(layers[end]) is nn.Identity)
    ):
        norm = layers[end]
        end += 1
    if end > start and end < len(layers) and is_relu(layers[end]):
        relu = True
        end += 1
    return Run(conv, norm, relu, end - start) if end - start > 1 else None


def runs_of(layers: Sequence[nn.Module]) -> Iterator[tuple[int, Run]]:
    """Every run of the chain, with its start."""
    position = 0
    while position < len(layers):
        run = run_at(layers, position)
        if run is not None:
            yield position, run
        position += run.length if run is not None else 1


class FusedSequential(_Fused, nn.Sequential):
    """``nn.Sequential`` whose convolution, batch norm and ReLU neighbours are computed together.

    Recognised are conv+bn+relu, conv+bn, conv+relu and bn+relu, with ``nn.Conv2d``, ``nn.BatchNorm2d`` (or
    FrozenBatchNorm2d) and ``nn.ReLU``, in place or not; every other child is called. Children are looked at in
    every call, so that they may be replaced, added, removed or hooked at any time.

    Shape: as the children's.
    """

    _original_class = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        if any_global_hooks():
            return nn.Sequential.forward(self, input)
        layers = list(self._modules.values())
        position = 0
        while position < len(layers):
            run = run_at(layers, position)
            if run is None:
                input = layers[position](input)
                position += 1
            else:
                input = run_unit(input, run.conv, run.norm, run.relu, memory=self.memory)
                position += run.length
        return input


# A projection shortcut of this type is looked into as an nn.Sequential would be.
_PLAIN_SEQUENTIALS.append(FusedSequential)


class FusedUnit(_Fused):
    """One convolution, batch norm and ReLU: the class that :func:`resnet_fused.fuse` gives a module whose
    ``forward`` is just that, such as Inception's BasicConv2d. ``conv`` or ``bn`` may be None.

    Shape: ``[N, C, H, W]`` to ``[N, K, P, Q]``.
    """

    final_relu = True

    def forward(self, x: Tensor) -> Tensor:
        return run_unit(x, self.conv, self.bn, self.final_relu, memory=self.memory)
