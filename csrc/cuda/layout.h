// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// How a tensor is cut into blocks of threads: pure functions of its shape.
#pragma once

#include <cstdint>

#include "../params.h"

namespace resnet_fused::cuda {

inline constexpr int kThreads = 256;  // per block, in every kernel over activations

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least `value` and no more than `most`.
inline int power_of_two(int64_t value, int most) {
  int result = 1;
  while (result < value && result < most) result *= 2;
  return result;
}

// channels_last: a block is `x` threads along the channels, `width` channels each, times kThreads / x rows.
inline int threads_along_channels(int64_t channels, int width) { return power_of_two(ceil_div(channels, width), 32); }

// Reductions are cut into tiles by the shape alone, never by the device, so that their results do not depend on it. A
// tile of kSmallTile values takes longer than its merging; kFewBlocks of those keep most of a large card busy. Beyond
// that tiles of kLargeTile values keep what they leave below 3 % of what they read, and kManyBlocks fill any card.
inline constexpr int64_t kSmallTile = 16384;
inline constexpr int64_t kLargeTile = 65536;
inline constexpr int64_t kFewBlocks = 96;
inline constexpr int64_t kManyBlocks = 384;
inline constexpr int64_t kBlockChannels = 256;  // at most, in channels_last

inline int64_t reduction_tiles(const Extent& extent) {
  const bool rows = extent.inner == 1;
  const int64_t in_block = rows ? (extent.channels < kBlockChannels ? extent.channels : kBlockChannels) : 1;
  if (extent.numel() == 0) return 1;
  const int64_t channel_blocks = ceil_div(extent.channels, in_block), values = extent.per_channel() * in_block;
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t few = smaller(values / kSmallTile, ceil_div(kFewBlocks, channel_blocks));
  const int64_t many = smaller(values / kLargeTile, ceil_div(kManyBlocks, channel_blocks));
  const int64_t tiles = few > many ? few : many;
  return tiles < 1 ? 1 : tiles;
}

// A convolution leaves a tile per block, thousands where activations are large: too many for the few blocks that
// finalize has, 32 channels each. Groups of them are then merged first, by a block each.
constexpr int64_t merge_groups(int64_t tiles) {
  constexpr int64_t kAtOnce = 512, kGroup = 128, kMost = 32768;  // no more than a grid's y
  const int64_t groups = ceil_div(tiles, kGroup);
  return tiles <= kAtOnce ? 0 : groups < kMost ? groups : kMost;
}

}  // namespace resnet_fused::cuda
