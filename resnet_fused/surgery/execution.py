# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Running a block of modules through the fused functions, :func:`run_block`, and max pooling through this package's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import autograd, functional, inference, pooling
from resnet_fused.engine import current_engine, without_autocast
from resnet_fused.opaque import assume_constant_result
from resnet_fused.reference import residual as reference_residual
from resnet_fused.surgery.context import compute_dtype, fusible
from resnet_fused.surgery.layers import conv_of, frozen_batch_norm, is_max_pool, norm_of
from resnet_fused.surgery.runs import Pair
from resnet_fused.units import Norm, Unit

_16_BITS = (torch.bfloat16, torch.float16)

# In the place of a block's output: a plan has its modules called.
COMPOSED: Any = object()


def _together(x: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are ordinary tensors on ``x``'s device. If not eager raises, or a subclass decides, or, for the
    counter of a batch norm, eager does not care."""
    device = x.device
    for t in tensors:
        if t is not None and (t.device != device or type(t) not in (Tensor, nn.Parameter)):
            return False
    return True


def _unit(pair: Pair, dtype: torch.dtype, autocast: bool) -> Unit | None:
    """The data of a pair, or None where eager raises or computes in another dtype."""
    conv, norm = pair
    c = None
    n: Any = None
    channels = None
    if conv is not None:
        c = conv_of(conv)
        if c is None:
            return None
        if c.weight.dtype != dtype and (not autocast or torch.float64 in (dtype, c.weight.dtype)):
            return None
        if c.bias is not None and c.bias.dtype != c.weight.dtype:
            return None
        channels = c.weight.shape[0]
    if norm is not None:
        n = norm_of(norm)
        if not _normal(n, dtype, channels):
            return None
        if frozen_batch_norm(norm) and torch.promote_types(dtype, n.running_mean.dtype) != dtype:
            return None  # eager's output leaves dtype, as a frozen batch norm's float32 buffers make it
    return Unit(c, n)


def _normal(n: Norm, dtype: torch.dtype, channels: int | None) -> bool:
    """Whether a batch norm's state is such as ``nn.BatchNorm2d`` makes it."""
    if (n.running_mean is None) != (n.running_var is None) or (n.weight is None) != (n.bias is None):
        return False
    if n.num_batches_tracked is None and n.batch_statistics and n.momentum is None and n.running_mean is not None:
        return False
    if type(n.eps) is not float or n.eps < 0:
        return False
    if n.momentum is not None and (type(n.momentum) not in (float, int) or n.momentum < 0):
        return False
    first = None
    for v in n[:4]:
        if v is not None:
            if first is None:
                first = v
            elif v.dtype != first.dtype or v.shape != first.shape:
                return False
    if first is None:
        return True
    if first.dim() != 1 or (channels is not None and first.shape[0] != channels):
        return False
    return first.dtype == dtype or (dtype in _16_BITS and first.dtype == torch.float32)


def _differentiates(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run_block(
    x: Tensor,
    pairs: Sequence[Pair],
    shortcut: Tensor | Pair | None,
    relu: bool,
    memory: str,
    overwrite: bool = False,
    within: str = "",
    keep: inference.Keep | None = None,
) -> Tensor | None:
    """A chain of units with a ReLU between them and one join, or None or `COMPOSED` where the modules are to be called.

    Args:
        x: ``[N, C, H, W]``.
        pairs: layers that are what they seem; the last may be a convolution without a batch norm, and in evaluation
            without gradients all may.
        shortcut: ``x`` itself, another tensor, a pair that is applied to ``x``, or None.
        relu: whether a ReLU follows.
        memory: as in :func:`resnet_fused.functional.residual`.
        overwrite: nobody reads a shortcut's tensor afterwards.
        within: as in :class:`resnet_fused.planner.keys.Key`.
        keep: as in :func:`resnet_fused.inference.residual`.
    """
    if not fusible(x):
        return None
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = compute_dtype(x) if autocast else x.dtype
    if autocast and dtype not in (torch.float64, torch.float32, *_16_BITS):
        return None
    units = []
    for pair in pairs:
        unit = _unit(pair, dtype, autocast)
        if unit is None:
            return None
        units.append(unit)
    if units[0].conv is None:
        if x.dtype != dtype:
            return None  # autocast casts the inputs of convolutions only
        if not _has_channels(units[0].norm, x.shape[1]):
            return None
    elif units[0].conv.weight.shape[1] * units[0].conv.groups != x.shape[1]:
        return None  # eager's error
    projection: Any = None
    joined: Any = None
    if isinstance(shortcut, Pair):
        projection = _unit(shortcut, dtype, autocast)
        if projection is None or projection.conv.weight.shape[1] * projection.conv.groups != x.shape[1]:
            return None
    elif shortcut is not None:
        joined = shortcut
        if not isinstance(joined, Tensor) or joined.dtype != dtype or not _together(x, (joined,)):
            return None  # eager promotes or raises, or a subclass decides
        if tuple(joined.shape) != functional.output_shape(x, units):
            return None  # eager broadcasts, or raises
    chain = [*units, projection] if projection is not None else units
    bare, frozen = False, True
    tensors: list[Tensor | None] = []
    for i, (c, n) in enumerate(chain):
        if c is not None:
            tensors += c[:2]
        if n is None:
            bare = bare or i != len(units) - 1 or i == 0
        else:
            tensors += n[:5]
            frozen = frozen and not n.batch_statistics
    if not _together(x, tensors):
        return None
    if x.numel() == 0:
        # As eager has it, but for a batch without images where other processes wait for its statistics.
        if x.shape[0] != 0 or all(n is None or n.exchange is None for _, n in chain):
            return None
    reference = current_engine() == "reference"
    infers = frozen and not reference and not _differentiates((x, joined, *tensors))
    if bare and not infers:
        return None  # a convolution without a batch norm is differentiated by its own module
    cast = x if x.dtype == dtype else x.to(dtype)
    joined = projection if projection is not None else cast if joined is x else joined
    with without_autocast(device):
        if reference:
            return reference_residual(cast, units, joined, relu)
        if infers:
            z = inference.residual(cast, units, joined, relu, overwrite and not autocast, within, keep)
        else:
            z = autograd.residual(cast, units, joined, relu, memory, autocast, within)
    return COMPOSED if z is None else z


def _has_channels(norm: Any, channels: int) -> bool:
    return all(t is None or t.shape[0] == channels for t in norm[:4])


class PoolCall:
    """An ``nn.MaxPool2d`` as a function: by this package's kernels if it is plain, else called."""

    def __init__(self, module: nn.MaxPool2d):
        self.module = module

    def __call__(self, *args, **kwargs) -> Any:
        m, z = self.module, None
        if len(args) == 1 and not kwargs and self._computes_alone():
            z = pooling.max_pool2d(
                args[0], m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
            )
        return m(*args, **kwargs) if z is None else z

    @assume_constant_result
    def _computes_alone(self) -> bool:
        """torch.compile doesn't guard hooks either."""
        return is_max_pool(self.module)


def _pool_by_function(original: Callable) -> Callable:
    def pool(input: Any, *args, **kwargs) -> Any:
        z = pooling.max_pool2d(input, *args, **kwargs)
        return original(input, *args, **kwargs) if z is None else z

    return pool


pool_by_functional = _pool_by_function(F.max_pool2d)
pool_by_torch = _pool_by_function(torch.max_pool2d)
