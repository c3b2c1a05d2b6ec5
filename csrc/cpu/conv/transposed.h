// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// fprop in inference for few pixels, float32: y' = w x', so that the weights are read as they lie. Packing them takes as
// long as the product does at batch 1.
#pragma once

#include "../../conv_params.h"

namespace resnet_fused::cpu {

// Whether it was measured to be faster than packing, or than a product of what was packed before.
bool transposed_applies(const FpropParams& p);

void run_transposed(const FpropParams& p);

}  // namespace resnet_fused::cpu
