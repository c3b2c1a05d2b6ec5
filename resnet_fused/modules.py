# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Drop-in modules: written as eager PyTorch would write them, and fused from birth as :func:`resnet_fused.fuse` fuses.

All keep real ``nn.Conv2d`` and ``nn.BatchNorm2d`` children under the familiar names, so state_dicts, optimisers,
initialisation, conversion to SyncBatchNorm, deepcopy, pickle and DDP see what they know. A child that is hooked,
parametrized or replaced by something unknown is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.surgery.context import is_ordinary
from resnet_fused.surgery.execution import COMPOSED, run_block
from resnet_fused.surgery.forward import install
from resnet_fused.surgery.layers import is_plain
from resnet_fused.surgery.runs import Pair

__all__ = ["BasicBlock", "BatchNormAct2d", "Bottleneck", "ConvBNAct2d", "FusedSequential", "ResBlk"]


class ConvBNAct2d(nn.Module):
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
            (r, q), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, dilation))
            padding = dh * (r - 1) // 2, dw * (q - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = norm_layer(out_channels)
        self.relu = relu
        install(self, born_fused=True)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        z = self.bn(self.conv(x))
        if shortcut is not None:
            z = z + shortcut
        return F.relu(z) if self.relu else z


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (all its arguments, its state_dict) with an optional shortcut and an optional ReLU.

    Args:
        relu: whether a ReLU follows, keyword only.

    Shape: ``[N, C, H, W]`` to the same; the shortcut likewise.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` puts a batch norm alone in its place.
    """

    def __init__(self, *args, relu: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        # It is a batch norm itself: there is no graph of children to find a run in.
        if is_ordinary() and is_plain(self):
            z = run_block(x, (Pair(None, self),), shortcut, self.relu, "default")
            if z is not None and z is not COMPOSED:
                return z
        z = super().forward(x)
        z = z if shortcut is None else z + shortcut
        return F.relu(z) if self.relu else z


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015), with torchvision's constructor and state_dict.

    Shape: ``[N, inplanes, H, W]`` to ``[N, planes, H/stride, W/stride]``.
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
        install(self, born_fused=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 to fewer maps, 3x3, 1x1 back, and a shortcut (He et al. 2015, stride on the 3x3), with torchvision's
    constructor and state_dict: ResNet-50 to 152, ResNeXt, Wide ResNet, dilated.

    Shape: ``[N, inplanes, H, W]`` to ``[N, 4*planes, H/stride, W/stride]``.
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
        install(self, born_fused=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResBlk(nn.Module):
    """The lecture's basic block: two biased 3x3 convolutions, and a 1x1 convolution with batch norm, ``extra``, where
    the shape changes.

    Args:
        ch_in, ch_out: channels.
        stride: of the first convolution and of ``extra``.
        relu: whether the block ends in a ReLU; the lecture shows both.

    Shape: ``[N, ch_in, H, W]`` to ``[N, ch_out, H/stride, W/stride]``.
    """

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
        install(self, born_fused=True)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.extra(x) + out
        return F.relu(out) if self.final_relu else out


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` whose convolution, batch norm and ReLU neighbours are computed together.

    Children may be replaced, added, removed or hooked at any time.

    Shape: as the children's.
    """

    def __init__(self, *args):
        super().__init__(*args)
        install(self, born_fused=True)
