// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the Python module tells about the native convolutions.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>

namespace resnet_fused {

// What shapes the native convolutions take.
inline constexpr int64_t kChannelMultiple = 8;   // 16 bytes of 16-bit values; the same for float32
inline constexpr int64_t kMostChannels = 2048;   // the prologue's tables have to fit into shared memory
inline constexpr int64_t kMostTaps = 7;          // per dimension

#ifdef RESNET_FUSED_WITH_CUDA
// How many tiles conv_fprop's statistics ("fprop") or conv_dgrad's sums ("dgrad") have; sizes [N, C, H, W] and
// [K, C, R, S].
int64_t conv_tiles(const std::string& pass, at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation);
#endif

}  // namespace resnet_fused
