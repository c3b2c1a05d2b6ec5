// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// How a tensor is cut into blocks of threads: pure functions of its shape, tested without a GPU.
#pragma once

#include <cstdint>

#include "../params.h"

namespace resnet_fused::cuda {

inline constexpr int kThreads = 256;  // per block, in every kernel over activations

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least `value` and no more than `most`.
inline int power_of_two(int64_t value, int most) {
  int result = 1;
  while (result < value && result < most) result *= 2;
  return result;
}

// channels_last: a block is `x` threads along the channels, `width` channels each, times kThreads / x rows.
inline int threads_along_channels(int64_t channels, int width) { return power_of_two(ceil_div(channels, width), 32); }

// Reductions are cut into tiles by the shape alone, never by the device, so that their results do not depend on it.
// Tiles over about kReductionBlocks blocks fill any card; below kTileRows rows, or kTileValues of a contiguous plane,
// a tile costs more to merge than it spreads.
inline constexpr int64_t kReductionBlocks = 384;
inline constexpr int64_t kTileRows = 32;
inline constexpr int64_t kTileValues = 4096;
inline constexpr int64_t kBlockChannels = 256;

inline int64_t reduction_tiles(const Extent& extent) {
  const bool rows = extent.inner == 1;
  const int64_t blocks = rows ? ceil_div(extent.channels, kBlockChannels) : extent.channels;
  const int64_t most = ceil_div(kReductionBlocks, blocks < 1 ? 1 : blocks);
  const int64_t useful = extent.per_channel() / (rows ? kTileRows : kTileValues);
  const int64_t tiles = useful < most ? useful : most;
  return tiles < 1 ? 1 : tiles;
}

}  // namespace resnet_fused::cuda
