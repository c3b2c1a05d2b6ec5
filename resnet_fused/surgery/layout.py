# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whether a whole network may run on a copy of its input in channels_last, with nobody inside or outside to see it.

Else each block copies its input and its output (:func:`resnet_fused.inference.prefers_channels_last`).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.inference import prefers_channels_last
from resnet_fused.surgery.context import compute_dtype, fusible
from resnet_fused.surgery.layers import fused_forward_called, is_hooked, is_plain, is_sequence
from resnet_fused.surgery.program import Program

# What computes the same in any layout and hands on no view of its memory.
_MODULES = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Linear,
    nn.Identity,
    nn.Dropout,
)
_FUNCTIONS = (operator.add, operator.iadd, torch.add, F.relu, torch.relu, torch.flatten)
_FORGETS_LAYOUT = (nn.Linear, torch.flatten)


def in_channels_last(module: nn.Module, program: Program, x: Tensor) -> Tensor:
    """``x``, or a copy of it in channels_last if ``program`` of ``module`` runs faster on that and nobody sees it."""
    if torch.is_grad_enabled() or not prefers_channels_last(x, compute_dtype(x)) or not fusible(x):
        return x
    op, target = program.end
    end = type(module.get_submodule(target)) if op == "call_module" else target
    return ops.to_channels_last(x) if end in _FORGETS_LAYOUT and _is_neutral(module, program) else x


def _is_neutral(module: nn.Module, program: Program) -> bool:
    return all(
        _is_neutral_module(module.get_submodule(target)) if op == "call_module" else target in _FUNCTIONS
        for op, target in program.rest
    )


def _is_neutral_module(module: nn.Module) -> bool:
    if type(module) in _MODULES:
        return is_plain(module)
    if is_hooked(module):
        return False
    forward = fused_forward_called(module)
    if forward is not None:
        program = forward.usual(module.training)
        return isinstance(program, Program) and _is_neutral(module, program)
    return is_sequence(module) and is_plain(module) and all(map(_is_neutral_module, module))
