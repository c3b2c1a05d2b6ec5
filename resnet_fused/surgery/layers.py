# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The layers that a fused run may stand in for, and when one is plain: its class's own forward is what a call of it
runs, with nothing around it.

Everything else is called as it is, and is right without our knowing it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from resnet_fused.distributed import exchange_of
from resnet_fused.units import Conv, Norm

# The attribute in which a folded convolution has its resnet_fused.snapshot.Packed.
PACKED = "_packed"

# What a call runs, on the instance before the class; nn.Module's own on the class alone.
CALLED = ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_slow_forward", "__call__", "__getattr__")
_CALLED_INSTEAD = CALLED[:5]


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "_compiled_call_impl" in state
    )


def fused_forward_called(module: nn.Module) -> Any:
    """The FusedForward that calling ``module`` runs, or None."""
    forward = module.__dict__.get("forward")
    return forward if hasattr(forward, "usual") else None


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's own functions and nothing else."""
    return not is_hooked(module) and module.__dict__.keys().isdisjoint(_CALLED_INSTEAD)


def any_global_hooks() -> bool:
    """Whether hooks on all modules are registered (profilers, operation counters)."""
    registry = torch.nn.modules.module
    return bool(
        registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
    )


# ---------------------------------------------------------------------------------------------------------------
# Functions that fused execution stands in for, each with the place where a call finds it.

_STOOD_IN_FOR: tuple[tuple[type | ModuleType, tuple[str, ...]], ...] = (
    (nn.Module, ("__call__", "_call_impl", "__getattr__")),
    (nn.Conv2d, ("forward", "_conv_forward", "__call__")),
    (nn.BatchNorm2d, ("forward", "_check_input_dim", "__call__")),
    (nn.SyncBatchNorm, ("forward", "_check_input_dim", "_check_non_zero_input_channels", "__call__")),
    (nn.ReLU, ("forward", "__call__")),
    (nn.MaxPool2d, ("forward", "__call__")),
    (nn.Identity, ("forward", "__call__")),
    (nn.Sequential, ("forward", "__call__")),
    (F, ("conv2d", "batch_norm", "relu", "max_pool2d")),
    (torch, ("conv2d", "batch_norm", "relu", "relu_", "add", "max_pool2d")),
)
# Looked up by one call per owner: this is asked in every call of a fused module.
_GETTERS = [(operator.attrgetter(*names), owner) for owner, names in _STOOD_IN_FOR]
_GENUINE = [(get, owner, get(owner)) for get, owner in _GETTERS]


def _is_torchs_own(function: object) -> bool:
    """Whether ``function`` is built in or comes from torch's own files, rather than from whoever patched it."""
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename.startswith(torch.__file__.rpartition("__init__")[0])


# False for good if somebody had patched torch before this package was imported.
_UNPATCHED_AT_IMPORT = all(_is_torchs_own(f) for *_, functions in _GENUINE for f in functions)


def torch_is_unpatched() -> bool:
    """Whether every function of torch's that fused execution stands in for is torch's own."""
    for get, owner, genuine in _GENUINE:
        if get(owner) != genuine:
            return False
    return _UNPATCHED_AT_IMPORT


# What a subclass may define without changing what a call computes.
_HARMLESS = {"__init__", "__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__qualname__"} | {
    "__repr__",
    "extra_repr",
    "reset_parameters",
    "__parameters__",
    "__orig_bases__",
    "__firstlineno__",
    "__static_attributes__",
}


def _keeps(cls: type, base: type) -> bool:
    """Whether ``cls`` is ``base`` or a subclass that changes none of its functions and attributes."""
    if cls is base:
        return True
    if not issubclass(cls, base):
        return False
    names = {name for k in cls.__mro__[: cls.__mro__.index(base)] for name in vars(k)} - _HARMLESS
    return not any(hasattr(base, name) or name in getattr(base, "__constants__", ()) or name in _DATA for name in names)


# Attributes of instances. A property of the same name, as a parametrization makes, comes before them.
_DATA = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training", "inplace"}


def _genuine(module: nn.Module) -> bool:
    """Whether the forward of ``module``'s class is written where the class is: nobody has replaced it."""
    cls = type(module)
    forward, home = cls.forward, sys.modules.get(cls.__module__)
    code = getattr(forward, "__code__", None)
    return code is not None and home is not None and code.co_filename == getattr(home, "__file__", None)


# ---------------------------------------------------------------------------------------------------------------
# Kinds of layers


def is_relu(module: Any) -> bool:
    """An ``nn.ReLU`` that does nothing else."""
    return _keeps(type(module), nn.ReLU) and is_plain(module)


def is_max_pool(module: Any) -> bool:
    """An ``nn.MaxPool2d`` that does nothing else."""
    return type(module) is nn.MaxPool2d and is_plain(module)


def is_identity(module: nn.Module | None) -> bool:
    """None, ``nn.Identity`` or an empty ``nn.Sequential``."""
    if module is None:
        return True
    empty = type(module) is nn.Identity or (is_sequence(module) and len(module) == 0)
    return empty and is_plain(module)


def is_sequence(module: object) -> TypeGuard[nn.Sequential]:
    """An ``nn.Sequential`` that runs its children one after the other, hooked or not."""
    return _keeps(type(module), nn.Sequential)


def is_container(module: nn.Module) -> bool:
    """nn.ModuleList and its like, which are never called."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    return type(module).forward is nn.Module.forward


def is_layer(module: nn.Module) -> bool:
    """A convolution or batch norm, whether or not it can be fused."""
    return isinstance(module, nn.modules.conv._ConvNd | _NormBase) or frozen_batch_norm(module)


def frozen_batch_norm(module: object) -> bool:
    """torchvision's (or detectron2's) FrozenBatchNorm2d, told without importing either."""
    cls = type(module)
    return cls.__name__ == "FrozenBatchNorm2d" and cls.__module__.split(".")[0] in ("torchvision", "detectron2")


def normalises_and_activates(module: object) -> bool:
    """timm's BatchNormAct2d and SyncBatchNormAct: a batch norm, then its children ``drop`` and ``act``."""
    cls = type(module)
    return cls.__name__ in ("BatchNormAct2d", "SyncBatchNormAct") and cls.__module__.split(".")[0] == "timm"


def conv_reason(module: Any) -> str | None:
    """Why ``module`` cannot be fused as a convolution; None if it can."""
    cls = type(module)
    if not _keeps(cls, nn.Conv2d):
        return f"{cls.__name__} is not a plain nn.Conv2d"
    if not is_plain(module):
        return "the convolution has hooks or functions of its own"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if module.padding == "same" and _is_asymmetric(module):
        return "padding='same' is asymmetric here"
    return None


def norm_reason(module: Any) -> str | None:
    """Why ``module`` cannot be fused as a batch norm; None if it can."""
    cls = type(module)
    if not (_keeps(cls, nn.BatchNorm2d) or _keeps(cls, nn.SyncBatchNorm)):
        if not frozen_batch_norm(module) and not normalises_and_activates(module):
            return f"{cls.__name__} is not a plain nn.BatchNorm2d"
        if not _genuine(module):
            return f"the forward of {cls.__name__} has been replaced"
    return None if is_plain(module) else "the batch norm has hooks or functions of its own"


# ---------------------------------------------------------------------------------------------------------------
# Their data


def _tensors(module: nn.Module, registered: Mapping[str, Tensor | None], *names: str) -> list[Any]:
    """The attributes of those names; looked up where they are registered, which takes a tenth of getattr's time."""
    return [registered[n] if n in registered else getattr(module, n) for n in names]


def conv_of(module: Any) -> Conv | None:
    """The data of a convolution for which :func:`conv_reason` was None; None if it has since got another padding."""
    padding = module.padding
    if padding == "same":
        if _is_asymmetric(module):
            return None
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    stride, dilation = module.stride, module.dilation
    if type(padding) is not tuple or type(stride) is not tuple or type(dilation) is not tuple:
        return None  # eager takes numbers, too
    if module.padding_mode != "zeros":
        return None
    weight, bias = _tensors(module, module._parameters, "weight", "bias")
    return Conv(weight, bias, stride, padding, dilation, module.groups, module.__dict__.get(PACKED))


def _is_asymmetric(module: nn.Conv2d) -> bool:
    """Whether padding='same' pads more on one side."""
    return any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))


def norm_of(module: Any) -> Norm:
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
    exchange = exchange_of(module) if module.training and isinstance(module, nn.SyncBatchNorm) else None
    return Norm(weight, bias, mean, var, counter, batch_statistics, module.momentum, module.eps, exchange)
