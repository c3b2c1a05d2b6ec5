# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the fused path may look inside of: modules of known type, unhooked, in an ordinary context.

Everything else runs composed, by calling the modules themselves, and is right without our knowing it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.units import DTYPES, Conv, Norm

# The attribute in which a folded convolution has its resnet_fused.snapshot.Packed.
PACKED = "_packed"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    state = module.__dict__
    return bool(
        state.get("_forward_hooks")
        or state.get("_forward_pre_hooks")
        or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
        or "forward" in state
    )


def any_global_hooks() -> bool:
    """Whether hooks on all modules are registered (profilers, operation counters)."""
    registry = torch.nn.modules.module
    return bool(
        registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
    )


def is_relu(module: object) -> bool:
    """An ``nn.ReLU`` that does nothing else."""
    return type(module) is nn.ReLU and not is_hooked(module)


def is_identity(module: nn.Module | None) -> bool:
    """None, ``nn.Identity`` or an empty ``nn.Sequential``."""
    if module is None:
        return True
    empty = type(module) is nn.Identity or (isinstance(module, nn.Sequential) and len(module) == 0)
    return empty and not is_hooked(module)


def frozen_batch_norm(module: object) -> bool:
    """torchvision's (or detectron2's) FrozenBatchNorm2d, told without importing either."""
    cls = type(module)
    return cls.__name__ == "FrozenBatchNorm2d" and cls.__module__.split(".")[0] in ("torchvision", "detectron2")


def conv_reason(module: object) -> str | None:
    """Why ``module`` cannot be fused as a convolution; None if it can."""
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not a plain nn.Conv2d"
    if is_hooked(module):
        return "the convolution has hooks"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if module.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ):
        return "padding='same' is asymmetric here"
    return None


def norm_reason(module: object) -> str | None:
    """Why ``module`` cannot be fused as a batch norm; None if it can."""
    if type(module) is not nn.BatchNorm2d and not frozen_batch_norm(module):
        return f"{type(module).__name__} is not a plain nn.BatchNorm2d"
    return "the batch norm has hooks" if is_hooked(module) else None


def _tensors(module: nn.Module, registered: dict[str, Tensor | None], *names: str) -> list[Tensor | None]:
    """The attributes of those names; looked up where they are registered, which takes a tenth of getattr's time."""
    return [registered[n] if n in registered else getattr(module, n) for n in names]


def conv_of(module: nn.Conv2d) -> Conv:
    """The data of a convolution for which :func:`conv_reason` is None."""
    padding = module.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    packed = None if torch.compiler.is_compiling() else module.__dict__.get(PACKED)
    weight, bias = _tensors(module, module._parameters, "weight", "bias")
    return Conv(weight, bias, module.stride, padding, module.dilation, module.groups, packed)


def norm_of(module: nn.Module) -> Norm:
    """The data of a batch norm for which :func:`norm_reason` is None, in its present mode."""
    if frozen_batch_norm(module):
        return Norm(module.weight, module.bias, module.running_mean, module.running_var, None, False, 0.0, module.eps)
    weight, bias = _tensors(module, module._parameters, "weight", "bias")
    mean, var, counter = _tensors(module, module._buffers, "running_mean", "running_var", "num_batches_tracked")
    batch_statistics = module.training or mean is None
    tracked = module.training and module.track_running_stats
    if batch_statistics and not tracked:
        mean = var = None
    if not tracked:
        counter = None
    return Norm(weight, bias, mean, var, counter, batch_statistics, module.momentum, module.eps)


def fusible(x: object) -> bool:
    """Whether the fused path understands ``x`` and the context it comes in.

    Not: symbolic (a proxy is no tensor) or recorded tracing, functional transforms and forward-mode
    differentiation, tensor subclasses, devices without kernels, and inputs on which eager raises or does nothing
    (which it then does itself).
    """
    if not isinstance(x, Tensor) or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():
        return ops.has_kernels(x.device) and x.dim() == 4 and x.dtype in DTYPES
    return (
        type(x) in (Tensor, nn.Parameter)
        and ops.has_kernels(x.device)
        and x.layout is torch.strided
        and x.dim() == 4
        and x.dtype in DTYPES
        and x.numel() > 0
        and not any_global_hooks()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd.forward_ad._current_level >= 0
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: its own, or autocast's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
