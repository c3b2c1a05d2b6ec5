# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Fused residual networks for PyTorch: convolution + batch norm + ReLU + shortcut, trained and served."""

import resnet_fused.installation  # noqa: F401  (imports torch, whose libraries the extension needs, and checks it)
from resnet_fused import fake_kernels, functional, ops, reference  # noqa: F401  (the fake kernels are registered)
from resnet_fused._C import build_info
from resnet_fused.engine import engine
from resnet_fused.explain import Explanation, explain
from resnet_fused.models import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from resnet_fused.modules import BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d, FusedSequential, ResBlk
from resnet_fused.ops import empty_cache
from resnet_fused.planner.command import PlanReport, plan
from resnet_fused.surgery import FuseReport, fold, fuse, set_memory, unfuse

__version__ = build_info()["version"]

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "Explanation",
    "FuseReport",
    "FusedSequential",
    "PlanReport",
    "ResBlk",
    "ResNet",
    "build_info",
    "empty_cache",
    "engine",
    "explain",
    "fold",
    "functional",
    "fuse",
    "ops",
    "plan",
    "reference",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "set_memory",
    "unfuse",
]
