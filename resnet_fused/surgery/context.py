# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whether a call comes in an ordinary context, and with tensors that the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils._device import DeviceContext

from resnet_fused import ops
from resnet_fused.surgery.layers import any_global_hooks, torch_is_unpatched
from resnet_fused.units import DTYPES

_ORDINARY = (Tensor, nn.Parameter)


def is_ordinary() -> bool:
    """Whether nobody listens in, records or transforms what modules and functions do.

    Not: hooks on all modules, tracing by TorchScript, functional transforms, forward-mode differentiation, modes that
    intercept functions (``torch.set_default_device``'s does nothing here), functions of torch that somebody replaced.
    """
    return (
        torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd.forward_ad._current_level >= 0
        and not any_global_hooks()
        and (_len_torch_function_stack() == 0 or _only_default_device())
        and torch_is_unpatched()
    )


def _only_default_device() -> bool:
    stack = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in stack)


def is_tensor(x: object) -> bool:
    """A tensor and no subclass with a mind of its own."""
    return type(x) in _ORDINARY


def fusible(x: Any) -> bool:
    """Whether the kernels take ``x``; eager raises, or does nothing, where they do not."""
    if torch.compiler.is_compiling():
        return isinstance(x, Tensor) and ops.has_kernels(x.device) and x.dim() == 4 and x.dtype in DTYPES
    return (
        type(x) in _ORDINARY
        and x.dim() == 4
        and x.dtype in DTYPES
        and ops.has_kernels(x.device)
        and x.layout is torch.strided
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: its own, or autocast's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
