// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// wgrad as direct sums: one matrix product per tap over the pixels. Both operands are read once per pass, transformed by
// their prologues and laid out in cache; partial sums are added in an order that the shape fixes.
#pragma once

#include "../../conv_params.h"
#include "microkernel.h"

namespace resnet_fused::cpu {

int64_t wgrad_workspace(const ConvShape& shape, DType dtype);

void run_wgrad(const WgradParams& p, const Microkernel& kernel);

}  // namespace resnet_fused::cpu
