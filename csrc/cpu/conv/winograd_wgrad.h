// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// wgrad of 3x3 convolutions of stride 1 in float32 by Winograd's F(3x3, 2x2) and F(3x3, 4x4): dw = G' [sum over tiles of
// (B' d B) * (A dy A')] G, the transposition of winograd.h's forward pass. The sums over tiles are 16 or 36 matrix
// products: 4 or 2.25 multiplications per output pixel and pair of channels instead of 9.
#pragma once

#include "../../conv_params.h"
#include "microkernel.h"

namespace resnet_fused::cpu {

// Floats; for shapes of which winograd_wgrad_tile is not 0.
int64_t winograd_wgrad_workspace(const ConvShape& shape, DType dtype);

void run_winograd_wgrad(const WgradParams& p, const Microkernel& kernel);

}  // namespace resnet_fused::cpu
