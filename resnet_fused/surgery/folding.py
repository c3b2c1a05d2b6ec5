# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Inference copies without batch norms: :func:`fold`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resnet_fused.distributed import copy_of
from resnet_fused.snapshot import Packed
from resnet_fused.surgery.forward import fused_forward
from resnet_fused.surgery.layers import PACKED, normalises_and_activates
from resnet_fused.surgery.program import Program
from resnet_fused.surgery.runs import Pair
from resnet_fused.surgery.switch import check_model, fuse


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, its batch norms folded into the convolutions before them.

    The copy is fused, in evaluation mode, and none of its parameters requires a gradient. Each folded batch norm
    is an ``nn.Identity``; the convolution has the product as its weight and a bias, computed in float64. Not folded
    are batch norms that :func:`fuse` does not find behind a convolution, that keep no running statistics, that
    share a convolution or are shared, and pairs with hooks.

    The copy is a snapshot. On the CPU its convolutions keep their weights packed from their first call on: later
    writes to the copy's weights need not be seen (``load_state_dict`` and ``to`` are, and :func:`unfuse` ends it).
    There ReLUs that oneDNN fuses into its convolutions return 0 for NaN.

    Raises:
        TypeError: if ``model`` is no module.
    """
    check_model(model)
    model = copy_of(model).eval().requires_grad_(False)
    fuse(model)
    owners: list[tuple[nn.Module, str, Any]] = [
        (m, name, child) for m in model.modules() for name, child in m._modules.items()
    ]
    uses = Counter(id(child) for _, _, child in owners)
    folded: dict[int, tuple] = {
        id(norm): (conv, norm) for conv, norm in _pairs(model) if uses[id(conv)] == uses[id(norm)] == 1
    }
    for owner, name, child in owners:
        if id(child) in folded:
            _fold_pair(*folded[id(child)])
            owner._modules[name] = child.act if normalises_and_activates(child) else nn.Identity().eval()
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__dict__[PACKED] = Packed()
    for module in model.modules():
        forward = fused_forward(module)
        if forward is not None:
            forward.is_snapshot = True
    # Once more: of what was folded, and with the blocks looked through, so that a program sees what is read last.
    fuse(model)
    return model


def _pairs(model: nn.Module) -> Iterator[Pair]:
    """Convolutions and batch norms with running statistics that run fused, each pair once."""
    programs = [
        program
        for module in model.modules()
        if (forward := fused_forward(module)) is not None and isinstance(program := forward.usual(False), Program)
    ]
    seen: set[int] = set()
    for pair in (p for program in programs for run in program.runs for p in run.pairs):
        conv, norm = pair
        if conv is None or norm is None or norm.running_mean is None or norm.running_var is None:
            continue
        if normalises_and_activates(norm) and type(norm.drop) is not nn.Identity:
            continue
        calling = [p for p in programs if any(id(m) in p.calls_of for m in pair)]
        if id(norm) not in seen and all(id(m) in p.called_once for p in calling for m in pair):
            seen.add(id(norm))
            yield pair


def _fold_pair(conv: nn.Conv2d, norm: Any) -> None:
    dtype = conv.weight.dtype
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    exact: Iterator[Any] = (None if t is None else t.detach().double() for t in tensors)
    weight, bias, mean, variance, gamma, beta = exact
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gamma, beta)
    conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
