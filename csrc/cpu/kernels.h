// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU kernels as seen by the code that threads them: each call does one piece of the work, on one thread.
#pragma once

#include "../params.h"
#include "max_pool.h"

namespace resnet_fused::cpu {

// Work is cut by shape alone, never by the number of threads, so that results do not depend on it.
//
// Reductions: `tiles` ranges of the outer dimension times blocks of channels.
struct ReductionGrid {
  int64_t tiles;
  int64_t channel_blocks;
};

inline constexpr int64_t kChannelBlock = 256;  // accumulators of a block stay in the first-level cache

inline ReductionGrid reduction_grid(const Extent& extent) {
  constexpr int64_t kMaxTiles = 64;
  constexpr int64_t kValuesPerTile = 256;  // per channel; below, merging costs more than it spreads
  int64_t tiles = extent.per_channel() / kValuesPerTile;
  tiles = tiles < 1 ? 1 : (tiles > kMaxTiles ? kMaxTiles : tiles);
  if (tiles > extent.outer) tiles = extent.outer < 1 ? 1 : extent.outer;
  // A contiguous plane is a loop of its own, so channels need no blocks to share a cache line.
  const int64_t block = extent.inner == 1 ? kChannelBlock : 1;
  return {tiles, (extent.channels + block - 1) / block};
}

// Element-wise kernels: slices are rows of C values (channels_last) or planes of H*W values (contiguous).
inline int64_t slice_count(const Extent& extent) {
  return extent.inner == 1 ? extent.outer : extent.outer * extent.channels;
}

struct Kernels {
  // Piece (tile, channel block) of a reduction; `partials` is [tiles, rows, C] acc.
  void (*statistics)(const StatisticsParams&, void* partials, int64_t tile, int64_t channel_block);
  void (*backward_reduce)(const BackwardReduceParams&, void* partials, int64_t tile, int64_t channel_block);
  // Slices [begin, end).
  void (*apply)(const ApplyParams&, int64_t begin, int64_t end);
  void (*backward_apply)(const BackwardApplyParams&, int64_t begin, int64_t end);
  void (*relu_backward_add)(const ReluBackwardAddParams&, int64_t begin, int64_t end);
  // Rows [begin, end) of all images' outputs, or of their inputs.
  void (*max_pool)(const MaxPoolParams&, int64_t begin, int64_t end);
  void (*max_pool_backward)(const MaxPoolBackwardParams&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// Those in use.
const Kernels& kernels();

// Theirs: "baseline", "avx2" or "avx512".
const char* instruction_set();

}  // namespace resnet_fused::cpu
