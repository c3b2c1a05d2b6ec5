// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// From a convolution's shape to its plan: tiles, splits and the sub-problems of dgrad. Pure functions of the
// shape alone, constexpr so that kernels may call them.
#pragma once

#include <cstdint>

#include "../../conv_params.h"
#include "../layout.h"

namespace resnet_fused::cuda {

// What shapes the kernels take. Channels: 16 bytes of 16-bit values, the same for float32. Kernels count a weight's
// elements and pixels in 32 bits, pixels a stage too far.
inline constexpr ConvLimits kConvLimits = {
    .channel_multiple = 8, .channels = 2048, .taps = 7, .stride = 2, .pixels = (int64_t{1} << 31) - 1024};

// Rows and columns of the output per block.
enum class TileShape : int { k128x128, k128x64, k64x64 };

constexpr int tile_rows(TileShape t) { return t == TileShape::k64x64 ? 64 : 128; }
constexpr int tile_columns(TileShape t) { return t == TileShape::k128x128 ? 128 : 64; }

// The largest tile that leaves enough blocks to fill a card of about a hundred multiprocessors.
constexpr TileShape choose_tile(int64_t rows, int64_t columns) {
  constexpr int64_t kEnough = 128;
  const auto blocks = [&](TileShape t) { return ceil_div(rows, tile_rows(t)) * ceil_div(columns, tile_columns(t)); };
  if (columns > 64 && blocks(TileShape::k128x128) >= kEnough) return TileShape::k128x128;
  if (blocks(TileShape::k128x64) >= kEnough) return TileShape::k128x64;
  return TileShape::k64x64;
}

constexpr int64_t output_pixels(const ConvShape& s) { return int64_t{s.n} * s.p * s.q; }

constexpr TileShape fprop_tile(const ConvShape& s) { return choose_tile(output_pixels(s), s.k); }
constexpr int64_t fprop_tiles(const ConvShape& s) { return ceil_div(output_pixels(s), tile_rows(fprop_tile(s))); }

// One spatial dimension of a gather: tap j of output coordinate u reads input coordinate u*multiply + add + j*step,
// which is padding outside [0, size). The taps are those with index first + j*every, `taps` of them.
struct Gather {
  int multiply, add, step, size;
  int first, every, taps;

  constexpr bool inside(int i) const { return static_cast<unsigned>(i) < static_cast<unsigned>(size); }
};

constexpr Gather fprop_gather(int size, int stride, int pad, int dilation, int taps) {
  return {stride, -pad, dilation, size, 0, 1, taps};
}

// dgrad of stride 1 or 2, for inputs h = parity + stride*u: the taps r with (h + pad - r*dilation) divisible by stride
// read p = (h + pad - r*dilation) / stride. Taps follow each other at `every`: all, or every second.
constexpr Gather dgrad_gather(int size, int stride, int pad, int dilation, int filter, int parity) {
  const int every = stride == 2 && dilation % 2 == 1 ? 2 : 1;
  for (int first = 0; first < every && first < filter; ++first) {
    const int numerator = parity + pad - first * dilation;
    if (numerator % stride != 0) continue;
    // u*1 + numerator/stride, exact for negative numerators too
    return {1,
            numerator / stride,
            -every * dilation / stride,
            size,
            first,
            every,
            static_cast<int>(ceil_div(filter - first, every))};
  }
  return {1, 0, 0, size, 0, 1, 0};
}

// How many of the coordinates 0 ... size-1 have this parity.
constexpr int with_parity(int size, int stride, int parity) { return (size - parity + stride - 1) / stride; }

constexpr int64_t dgrad_pixels(const ConvShape& s, int parity_h, int parity_w) {
  return int64_t{s.n} * with_parity(s.h, s.stride_h, parity_h) * with_parity(s.w, s.stride_w, parity_w);
}

// Whether a filter's nine taps of stride 1 read the plane that they write.
constexpr bool keeps_plane(const ConvShape& s) {
  return s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 && s.p == s.h && s.q == s.w;
}

// Where they do, a tile's pixels and a halo before and behind them are all that it reads: `halo_pixels` each. -1
// elsewhere, and where they would take too much shared memory.
inline constexpr int kMostHaloPixels = 64;
constexpr int halo_pixels(const ConvShape& s) {
  const int64_t pixels = int64_t{s.pad_h} * s.w + s.pad_w;
  return keeps_plane(s) && pixels <= kMostHaloPixels ? static_cast<int>(pixels) : -1;
}

constexpr TileShape dgrad_tile(const ConvShape& s) { return choose_tile(int64_t{s.n} * s.h * s.w, s.c); }

// Tiles of all sub-problems.
constexpr int64_t dgrad_tiles(const ConvShape& s) {
  int64_t tiles = 0;
  for (int h = 0; h < s.stride_h; ++h) {
    for (int w = 0; w < s.stride_w; ++w) tiles += ceil_div(dgrad_pixels(s, h, w), tile_rows(dgrad_tile(s)));
  }
  return tiles;
}

// Which sub-problem a tile belongs to, and where in it the tile begins.
struct SubProblem {
  int parity_h, parity_w;
  int64_t first_row;
};

// The sub-problems take turns, since they read the same of dy; where one has more tiles than another they follow last.
constexpr SubProblem dgrad_sub_problem(const ConvShape& s, int64_t tile, int rows) {
  const int bits = (s.stride_h == 2) + (s.stride_w == 2), parts = 1 << bits;  // strides are 1 and 2
  const auto tiles_of = [&](int part) { return ceil_div(dgrad_pixels(s, part / s.stride_w, part % s.stride_w), rows); };
  const auto at = [&](int part, int64_t index) {
    return SubProblem{part / s.stride_w, part % s.stride_w, index * rows};
  };
  if (parts == 1) return at(0, tile);
  // Of even parity are the most pixels, of odd parity the fewest.
  const int64_t together = tiles_of(parts - 1);
  if (tile < together << bits) return at(static_cast<int>(tile & (parts - 1)), tile >> bits);
  tile -= together << bits;
  for (int part = 0; part < parts; ++part) {
    const int64_t more = tiles_of(part) - together;
    if (tile < more) return at(part, together + tile);
    tile -= more;
  }
  return {0, 0, 0};  // not reached by tiles below dgrad_tiles
}

// wgrad: rows are output channels, columns (tap, input channel); the reduction over pixels is split. Where a row of
// three taps reads neighbouring pixels of the plane that it writes, a block takes all three, of 16-bit types.
constexpr bool wgrad_of_rows(const ConvShape& s, DType dtype) {
  return keeps_plane(s) && s.dilation_w == 1 && dtype != DType::Float32;
}

constexpr TileShape wgrad_tile(const ConvShape& s) {
  return s.k > 64 && s.c > 64 ? TileShape::k128x128 : s.k > 64 ? TileShape::k128x64 : TileShape::k64x64;
}

// Channels of either side in a tile of three taps.
inline constexpr int kChannelsOfTaps = 64;

// Blocks per split.
constexpr int64_t wgrad_row_tiles(const ConvShape& s, DType dtype) {
  return ceil_div(s.k, wgrad_of_rows(s, dtype) ? kChannelsOfTaps : tile_rows(wgrad_tile(s)));
}
constexpr int64_t wgrad_column_tiles(const ConvShape& s, DType dtype) {
  if (wgrad_of_rows(s, dtype)) return s.r * ceil_div(s.c, kChannelsOfTaps);
  return int64_t{s.r} * s.s * ceil_div(s.c, tile_columns(wgrad_tile(s)));
}

// Splits of at least kSplitPixels, so that the blocks fill a card about four times: what the last round leaves idle is
// a small part then. But beyond filling it once only as many as leave fewer bytes of partials than there are of
// operands.
constexpr int64_t wgrad_splits(const ConvShape& s, DType dtype) {
  constexpr int64_t kSplitPixels = 512, kMost = 256, kRounds = 4;
  const bool large = wgrad_of_rows(s, dtype) || wgrad_tile(s) == TileShape::k128x128;
  const int64_t once = large ? 256 : 512;
  const int64_t blocks = wgrad_row_tiles(s, dtype) * wgrad_column_tiles(s, dtype), pixels = output_pixels(s);
  const int64_t operands = pixels * (2 * s.k + s.c), partials = 4 * int64_t{s.k} * s.r * s.s * s.c;  // in 2 bytes
  const int64_t least = ceil_div(once, blocks), cheap = operands / partials;
  const int64_t most = ceil_div(kRounds * once, blocks);
  const int64_t wanted = cheap < least ? least : cheap < most ? cheap : most, useful = ceil_div(pixels, kSplitPixels);
  const int64_t splits = wanted < useful ? wanted : useful;
  return splits < 1 ? 1 : splits > kMost ? kMost : splits;
}

// One split writes a float gradient itself; all others leave partials to be added.
constexpr bool wgrad_is_direct(const ConvShape& s, DType dtype, DType dw) {
  return wgrad_splits(s, dtype) == 1 && dw == DType::Float32;
}

constexpr int64_t wgrad_workspace(const ConvShape& s, DType dtype, DType dw) {
  return wgrad_is_direct(s, dtype, dw) ? 0 : wgrad_splits(s, dtype) * s.k * s.r * s.s * s.c;
}

// dgrad and wgrad of 1x1 filters from one read: dW of all channels stays in a block's registers, so that one side has
// at most kNarrow and the other kWide channels. Of 16-bit types: dy is formed once, in shared memory.
inline constexpr int kNarrow = 64, kWide = 256;

constexpr bool reads_once(const ConvShape& s, DType dtype) {
  const bool plain = s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  const int narrow = s.k < s.c ? s.k : s.c, wide = s.k < s.c ? s.c : s.k;
  return plain && narrow <= kNarrow && wide <= kWide && dtype != DType::Float32;
}

// A block takes every blocks-th tile of kOneReadPixels pixels. At most, three or four blocks follow each other on a
// multiprocessor; the partials of dW are few against the operands, a fifth where a block has kLeastTiles tiles.
inline constexpr int kOneReadPixels = 32;
constexpr int64_t one_read_tiles(const ConvShape& s, DType dtype) {
  constexpr int64_t kLeastTiles = 8, kMostBlocks = 432;
  if (!reads_once(s, dtype)) return 0;
  const int64_t blocks = ceil_div(ceil_div(output_pixels(s), kOneReadPixels), kLeastTiles);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

}  // namespace resnet_fused::cuda
