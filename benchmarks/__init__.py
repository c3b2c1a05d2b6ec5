# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Fused against eager PyTorch on real photographs: numbers, speed and memory. See ``python -m benchmarks -h``."""
