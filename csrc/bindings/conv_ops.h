// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the Python module tells about the native convolutions.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>

namespace resnet_fused {

#ifdef RESNET_FUSED_WITH_CUDA
// How many tiles conv_fprop's statistics ("fprop") or conv_dgrad's sums ("dgrad") have; sizes [N, C, H, W] and
// [K, C, R, S].
int64_t conv_tiles(const std::string& pass, at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation);
#endif

}  // namespace resnet_fused
