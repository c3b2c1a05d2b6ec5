// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The convolutions' kernels compiled for the instruction set that the compiler targets by default.
#include "kernels.h"

#define RESNET_FUSED_CONV_KERNELS conv_kernels_baseline
#define RESNET_FUSED_REGISTER 16
#include "kernels.inl"
