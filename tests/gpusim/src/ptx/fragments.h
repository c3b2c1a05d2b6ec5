// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Reading packed tensor-core operands.
#pragma once
#include <array>

#include "half.h"

namespace gpusim::ptx {

// Elements of a row of 32 packed 32-bit registers as floats, lane after lane;
// returns how many each register holds. tf32 operands lose their low 13 bits.
int unpack_row(const u32* row, Type t, float* out);

}  // namespace gpusim::ptx
