# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Drop-in modules: fused where their children are what they seem, composed of those children where not.

All keep real ``nn.Conv2d`` and ``nn.BatchNorm2d`` children under the familiar names, so state_dicts, optimisers,
initialisation, conversion to SyncBatchNorm, deepcopy, pickle and DDP see what they know. A child that is hooked,
parametrized or replaced by something unknown makes the block run composed, by calling its children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import autograd, functional, inference
from resnet_fused.engine import current_engine, without_autocast
from resnet_fused.recognise import (
    compute_dtype,
    conv_of,
    conv_reason,
    fusible,
    is_hooked,
    is_identity,
    is_relu,
    norm_of,
    norm_reason,
)
from resnet_fused.reference import residual as reference_residual
from resnet_fused.units import Unit

__all__ = ["BasicBlock", "BatchNormAct2d", "Bottleneck", "ConvBNAct2d", "ResBlk", "run_unit"]

Pair = tuple[nn.Module | None, nn.Module | None]


def _composed_unit(x: Tensor, conv: nn.Module | None, norm: nn.Module | None) -> Tensor:
    y = x if conv is None else conv(x)
    return y if norm is None else norm(y)


def _known(pair: Pair) -> bool:
    conv, norm = pair
    return (conv is None or conv_reason(conv) is None) and (is_identity(norm) or norm_reason(norm) is None)


def _together(x: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are on ``x``'s device. Elsewhere eager raises, or, for the counter of a batch norm, does not care."""
    device = x.device
    for t in tensors:
        if t is not None and t.device != device:
            return False
    return True


def _unit(conv: nn.Module | None, norm: nn.Module | None, dtype: torch.dtype, autocast: bool) -> Unit | None:
    """The data of a pair, or None where it has to be composed."""
    c = n = None
    if conv is not None:
        if conv_reason(conv) is not None:
            return None
        c = conv_of(conv)
        if c.weight.dtype != dtype and not autocast:
            return None  # eager's error
    if not is_identity(norm):
        if norm_reason(norm) is not None:
            return None
        n = norm_of(norm)
        if type(norm) is not nn.BatchNorm2d and torch.promote_types(dtype, n.running_mean.dtype) != dtype:
            return None  # eager's output leaves dtype, as a frozen batch norm's float32 buffers make it
    return Unit(c, n)


def _differentiates(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _residual(
    x: Tensor,
    pairs: Sequence[Pair],
    shortcut: Tensor | Pair | None,
    relu: bool,
    memory: str,
) -> Tensor | None:
    """The fused block, or None where it has to be composed.

    ``shortcut``: a tensor, a (convolution, norm) pair applied to ``x``, or None.
    """
    if not fusible(x):
        return None
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = compute_dtype(x) if autocast else x.dtype
    units = []
    for conv, norm in pairs:
        unit = _unit(conv, norm, dtype, autocast)
        if unit is None:
            return None
        units.append(unit)
    projection = joined = None
    if isinstance(shortcut, tuple):
        projection = _unit(*shortcut, dtype, autocast)
        if projection is None:
            return None
    elif shortcut is not None:
        joined = shortcut
        if joined.dtype != dtype or type(joined) not in (Tensor, nn.Parameter) or not _together(x, (joined,)):
            return None  # eager promotes or raises, or a subclass decides
        if tuple(joined.shape) != functional.output_shape(x, units):
            return None  # eager broadcasts, or raises
    chain = [*units, projection] if projection is not None else units
    bare, frozen = False, True
    tensors = []
    for c, n in chain:
        if c is not None:
            tensors += c[:2]
        if n is None:
            bare = True
        else:
            tensors += n[:5]
            frozen = frozen and not n.batch_statistics
    if not _together(x, tensors):
        return None  # eager's error, or, for a batch norm's counter, eager's indifference
    reference = current_engine() == "reference"
    infers = frozen and not reference and not _differentiates((x, joined, *tensors))
    if bare and not infers:
        return None  # folded: convolution, shortcut and ReLU are differentiated by their own modules
    cast = x if x.dtype == dtype else x.to(dtype)
    joined = projection if projection is not None else cast if joined is x else joined
    if infers and not autocast:
        return inference.residual(cast, units, joined, relu)
    with without_autocast(device):
        if infers:
            return inference.residual(cast, units, joined, relu)
        if reference:
            return reference_residual(cast, units, joined, relu)
        return autograd.residual(cast, units, joined, relu, memory, autocast)


def run_unit(
    x: Tensor,
    conv: nn.Module | None,
    norm: nn.Module | None,
    relu: bool,
    shortcut: Tensor | None = None,
    memory: str = "default",
) -> Tensor:
    """``relu(norm(conv(x)) + shortcut)`` of modules, fused where they are known, else by calling them.

    Args:
        x: ``[N, C, H, W]``.
        conv: an ``nn.Conv2d``, another module, or None.
        norm: an ``nn.BatchNorm2d``, a FrozenBatchNorm2d, another module, or None or ``nn.Identity`` (folded).
        relu: whether a ReLU follows.
        shortcut: a tensor of the output's shape, or None.
        memory: as in :func:`resnet_fused.functional.residual`.
    """
    z = _residual(x, [(conv, norm)], shortcut, relu, memory)
    if z is None:
        z = _composed_unit(x, conv, norm)
        z = z if shortcut is None else z + shortcut
        z = F.relu(z) if relu else z
    return z


def _shortcut_of(module: nn.Module | None) -> nn.Module | Pair | None:
    """A shortcut branch as None (identity), a known (convolution, norm) pair, or the module to call."""
    if is_identity(module):
        return None
    if type(module) in _PLAIN_SEQUENTIALS and not is_hooked(module) and len(module) == 2:
        pair = (module[0], module[1])
        if _known(pair):
            return pair
    return module


# FusedSequential (resnet_fused.sequential) adds itself: it runs its children as nn.Sequential does.
_PLAIN_SEQUENTIALS: list[type] = [nn.Sequential]


def run_block(
    x: Tensor, pairs: Sequence[Pair], shortcut: nn.Module | None, relu: bool, memory: str
) -> Tensor | None:
    """A residual block of modules, or None where it has to be composed; ``shortcut`` is None for an identity."""
    branch = _shortcut_of(shortcut)
    if branch is None:
        return _residual(x, pairs, x, relu, memory)
    if isinstance(branch, tuple):
        return _residual(x, pairs, branch, relu, memory)
    if not fusible(x) or not all(_known(p) for p in pairs):
        return None  # before the shortcut runs: composed calls it
    value = branch(x)
    z = _residual(x, pairs, value, relu, memory)
    if z is None:
        z = x
        for pair in pairs[:-1]:
            z = F.relu(_composed_unit(z, *pair))
        z = _composed_unit(z, *pairs[-1]) + value
        z = F.relu(z) if relu else z
    return z


class _Fused(nn.Module):
    """What :func:`resnet_fused.set_memory` sets."""

    memory = "default"


class ConvBNAct2d(_Fused):
    """Convolution, batch norm, optional shortcut, optional ReLU: children ``conv`` and ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``nn.Conv2d``'s;
            ``padding=None`` keeps the plane's size at stride 1.
        relu: whether a ReLU follows.
        norm_layer: makes the batch norm from the number of channels.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, P, Q]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        relu: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        if padding is None:
            kernel, spread = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, dilation))
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, spread, strict=True))
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = norm_layer(out_channels)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return run_unit(x, self.conv, self.bn, self.relu, shortcut, self.memory)


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (all its arguments, its state_dict) with an optional shortcut and an optional ReLU.

    Args:
        relu: whether a ReLU follows, keyword only.

    Shape: ``[N, C, H, W]`` to the same; the shortcut likewise.
    """

    def __init__(self, *args, relu: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        joins = shortcut is None or (
            isinstance(shortcut, Tensor) and isinstance(x, Tensor) and shortcut.shape == x.shape
            and shortcut.dtype == x.dtype
        )
        if fusible(x) and joins and x.shape[1] == self.num_features:
            norm = norm_of(self)
            if _together(x, (*norm[:5], shortcut)):
                return functional.bn_act(x, norm, self.relu, shortcut)
        z = super().forward(x)
        z = z if shortcut is None else z + shortcut
        return F.relu(z) if self.relu else z


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


class BasicBlock(_Fused):
    """Two 3x3 convolutions and a shortcut (He et al. 2015), with torchvision's constructor and state_dict.

    Shape: ``[N, inplanes, H, W]`` to ``[N, planes, H/stride, W/stride]``.
    ``memory``: ``"default"`` or ``"minimal"``, see :func:`resnet_fused.functional.residual`.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"groups, base_width: BasicBlock expects 1 and 64, got {groups} and {base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"dilation: BasicBlock expects 1, got {dilation}")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if is_relu(self.relu):
            pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2))
            z = run_block(x, pairs, self.downsample, True, self.memory)
            if z is not None:
                return z
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(_Fused):
    """1x1 to fewer maps, 3x3, 1x1 back, and a shortcut (He et al. 2015, stride on the 3x3), with torchvision's
    constructor and state_dict: ResNet-50 to 152, ResNeXt, Wide ResNet, dilated.

    Shape: ``[N, inplanes, H, W]`` to ``[N, 4*planes, H/stride, W/stride]``.
    ``memory``: ``"default"`` or ``"minimal"``, see :func:`resnet_fused.functional.residual`.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if is_relu(self.relu):
            pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
            z = run_block(x, pairs, self.downsample, True, self.memory)
            if z is not None:
                return z
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResBlk(_Fused):
    """The lecture's basic block: two biased 3x3 convolutions, and a 1x1 convolution with batch norm, ``extra``, where
    the shape changes.

    Args:
        ch_in, ch_out: channels.
        stride: of the first convolution and of ``extra``.
        relu: whether the block ends in a ReLU; the lecture shows both.

    Shape: ``[N, ch_in, H, W]`` to ``[N, ch_out, H/stride, W/stride]``.
    """

    final_relu = True

    def __init__(self, ch_in: int, ch_out: int, stride: int = 1, relu: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(ch_out)
        self.conv2 = nn.Conv2d(ch_out, ch_out, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(ch_out)
        self.extra = nn.Sequential()
        if ch_out != ch_in or stride != 1:
            self.extra = nn.Sequential(nn.Conv2d(ch_in, ch_out, 1, stride), nn.BatchNorm2d(ch_out))
        self.final_relu = relu

    def forward(self, x: Tensor) -> Tensor:
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        z = run_block(x, pairs, self.extra, self.final_relu, self.memory)
        if z is not None:
            return z
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.extra(x) + out
        return F.relu(out) if self.final_relu else out
