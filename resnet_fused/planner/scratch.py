# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A block made of random tensors, to be run by any candidate: nothing of the user's is read or written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import autograd, block, eager, inference, opaque, reference, testing
from resnet_fused.choice import FEW_CHANNELS
from resnet_fused.planner.entry import Choices
from resnet_fused.planner.keys import Key, UnitKey
from resnet_fused.snapshot import Packed
from resnet_fused.units import Conv, Join, Norm, Unit


@dataclass(frozen=True)
class Scratch:
    """The tensors of a call of ``key``: ``chain`` ends with the projection's unit; ``grad`` is of the output."""

    key: Key
    x: Tensor
    shortcut: Tensor | None
    chain: tuple[Unit, ...]
    grad: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, all but ``grad``: what is learnt and, behind "buffer", what forward updates."""
        named = {"input": self.x, "shortcut": self.shortcut}
        for i, (conv, norm) in enumerate(self.chain):
            named |= {} if conv is None else {f"unit {i} weight": conv.weight, f"unit {i} bias": conv.bias}
            if norm is not None:
                named |= {f"unit {i} norm weight": norm.weight, f"unit {i} norm bias": norm.bias}
                named |= {f"buffer {i} mean": norm.running_mean, f"buffer {i} var": norm.running_var}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors().values(), self.grad))

    def copy(self, dtype: torch.dtype | None = None) -> Scratch:
        """The same values in memory of their own, converted to ``dtype`` if it is given."""

        def fresh(t: Any) -> Any:
            if t is None:
                return None
            made = t.detach().to(dtype or t.dtype, copy=True, memory_format=torch.preserve_format)
            return made.requires_grad_(t.requires_grad)

        chain = []
        for conv, norm in self.chain:
            if conv is not None:
                packed = None if conv.packed is None else Packed()
                conv = conv._replace(weight=fresh(conv.weight), bias=fresh(conv.bias), packed=packed)
            if norm is not None:
                norm = Norm._make((*(fresh(t) for t in norm[:4]), *norm[4:]))
            chain.append(Unit(conv, norm))
        return Scratch(self.key, fresh(self.x), fresh(self.shortcut), tuple(chain), fresh(self.grad))

    def _joined(self) -> tuple[tuple[Unit, ...], Tensor | Unit | None]:
        if self.key.join is Join.PROJECTION:
            return self.chain[:-1], self.chain[-1]
        return self.chain, self.x if self.key.join is Join.IDENTITY else self.shortcut

    def _differentiate(self, z: Tensor) -> dict[str, Tensor]:
        wanted = {name: t for name, t in self.tensors().items() if t.requires_grad}
        grads = torch.autograd.grad(z, list(wanted.values()), self.grad)
        return {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}

    def run(self, choices: Choices) -> dict[str, Tensor]:
        """Forward, and backward in training, as ``choices`` say: the output and the gradients by name."""
        k = self.key
        if k.training and not choices:
            units, shortcut = self._joined()
            z = eager.residual(self.x, units, shortcut, k.relu)
            return {"output": z.detach(), **self._differentiate(z)}
        if k.training:
            plan, tensors = block.assemble(
                choices, self.chain, k.join, k.relu, k.minimal, k.cast_weights, k.reads_joined
            )
            z = autograd.run(plan, self.x, self.shortcut, tensors)
            return {"output": z.detach(), **self._differentiate(z)}
        with torch.no_grad():
            units, shortcut = self._joined()
            return {"output": inference.run_units(self.x, units, shortcut, k.relu, choices)}

    def run_reference(self) -> dict[str, Tensor]:
        """:meth:`run` in plain PyTorch."""
        with torch.set_grad_enabled(self.key.training):
            units, shortcut = self._joined()
            z = reference.residual(self.x, units, shortcut, self.key.relu)
            return {"output": z.detach(), **(self._differentiate(z) if self.key.training else {})}


def make(key: Key, seed: int) -> Scratch:
    """Random activations of unit variance, and weights that keep it."""
    generator = torch.Generator(key.device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype, channels_last: bool = False, scale: float = 1.0) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        values = torch.randn(shape, generator=generator, device=key.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype=dtype, memory_format=layout)

    def vector(channels: int, mean: float, dtype: torch.dtype) -> Tensor:
        return random(channels, dtype=torch.float32, scale=0.1).add_(mean).to(dtype)

    def unit(u: UnitKey, channels: int) -> Unit:
        conv = norm = None
        dtype = u.weight_dtype or key.dtype
        if u.weight is not None:
            scale = math.sqrt(2 / math.prod(u.weight[1:]))
            weight = random(*u.weight, dtype=dtype, channels_last=u.weight_channels_last, scale=scale)
            weight.requires_grad_(key.training)
            channels = u.weight[0]
            bias = vector(channels, 0.0, dtype).requires_grad_(key.training) if u.bias else None
            packed = Packed() if u.packed else None
            conv = Conv(weight, bias, u.stride, u.padding, u.dilation, u.groups, packed)
        if u.normalises:
            gamma, beta = vector(channels, 1.0, dtype), vector(channels, 0.0, dtype)
            if key.training and (u.batch_statistics or key.reads_joined):
                gamma.requires_grad_()
                beta.requires_grad_()
            running = vector(channels, 0.0, dtype), vector(channels, 1.0, dtype)
            norm = Norm(gamma, beta, *running, None, u.batch_statistics)
        return Unit(conv, norm)

    x = random(*key.shape, dtype=key.dtype, channels_last=key.channels_last)
    # Images need no gradient. Whether this call's input does is not asked, see `key_of`.
    x.requires_grad_(key.training and key.shape[1] >= FEW_CHANNELS)
    chain, channels = [], key.shape[1]
    for i, u in enumerate(key.units):
        if key.join is Join.PROJECTION and i == len(key.units) - 1:
            channels = key.shape[1]
        chain.append(unit(u, channels))
        channels = u.weight[0] if u.weight is not None else channels
    outputs = list(opaque.outputs(x, chain, key.join))
    shape, layout = outputs[-2 if key.join is Join.PROJECTION else -1]
    like = torch.empty(shape, dtype=key.dtype, device=key.device, memory_format=layout)
    shortcut = None
    if key.join is Join.TENSOR:
        shortcut = random(*shape, dtype=key.dtype, channels_last=layout is torch.channels_last)
        shortcut.requires_grad_(key.training)
    return Scratch(key, x, shortcut, tuple(chain), testing.cotangent_like(like, seed))


def copies(first: Scratch, total: int, most: int) -> Iterator[Scratch]:
    """``first`` and copies of it, so many that they take ``total`` bytes, but no more than ``most``."""
    yield first
    for _ in range(min(most, math.ceil(total / first.bytes)) - 1):
        yield first.copy()
