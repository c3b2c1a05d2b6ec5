// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The operands of fprop and dgrad, whose reduction runs over taps and channels.
#pragma once

#include "operands.cuh"

namespace resnet_fused::cuda {

// Walks the reduction: channels within a tap, or (kTapsInner) taps within a slice of kTileK channels.
template <bool kTapsInner>
struct TapWalk {
  int taps_h, taps_w, channel_tiles;
  int h = 0, w = 0, channel_tile = 0;

  __device__ int iterations() const { return taps_h * taps_w * channel_tiles; }
  __device__ void advance() {
    if constexpr (!kTapsInner) {
      if (++channel_tile < channel_tiles) return;
      channel_tile = 0;
    }
    if (++w < taps_w) return;
    w = 0;
    if constexpr (kTapsInner) {
      if (++h < taps_h) return;
      h = -1;
      ++channel_tile;
    }
    ++h;
  }
};

// Where the output pixels of a (sub-)problem are: image n, position (u, v) of a grid.
struct PixelGrid {
  int images, height, width;

  __device__ int64_t pixels() const { return int64_t{images} * height * width; }
};

// A: rows are output pixels, gathered from an NHWC tensor, tap by tap.
template <class T, class Tile, class Prologue>
class GatheredPixels : public StagedRows<KMajorTile<T, Tile::kM>, Tile> {
 public:
  using Layout = KMajorTile<T, Tile::kM>;
  using Copies = Copier<T, Layout, Prologue::kSources, Tile::kBlockThreads>;
  using Ring = CoefficientRing<T, Prologue>;
  static constexpr int kStageBytes = Copies::kStageBytes;
  static constexpr bool kAhead = Prologue::kTables > 0;
  static constexpr bool kTapsInner = false;
  static constexpr int shared_bytes(int) { return Ring::kBytes; }

  // `table`: of the prologue's coefficients; `memory`: shared_bytes.
  __device__ GatheredPixels(const void* tensor, const void* second, const void* table, unsigned char* memory,
                            const Gather& gh, const Gather& gw, int channels, const PixelGrid& grid, int64_t first_row)
      : copies_(tensor, second), coefficients_(table, channels, memory), gh_(gh), gw_(gw) {
    walk_ = {gh.taps, gw.taps, (channels + kTileK<T> - 1) / kTileK<T>};
    channels_ = channels;
    column_ = Copies::Dealt::column() * kChunkValues<T>;
    ptx::keep(column_);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t row = first_row + Copies::Dealt::row(i);
      const bool exists = row < grid.pixels();
      const int pixel = exists ? static_cast<int>(row) : 0;
      const int v = pixel % grid.width, nu = pixel / grid.width;
      image_[i] = nu / grid.height * gh.size * gw.size;
      // A row that doesn't exist is padding at every tap.
      h_[i] = exists ? nu % grid.height * gh.multiply + gh.add : INT_MIN / 2;
      w_[i] = v * gw.multiply + gw.add;
    }
  }

  __device__ int iterations() const { return walk_.iterations(); }
  __device__ void begin() {}

  __device__ void issue(unsigned char* stage) {
    valid_.next();
    if (walk_.channel_tile == 0) enter_tap();
    const int channel = walk_.channel_tile * kTileK<T> + column_;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const bool valid = pixel_[i] >= 0 && channel < channels_;
      copies_.copy(stage, i, int64_t{pixel_[i]} * channels_ + channel, valid);
      if constexpr (kAhead) valid_.add(i, valid);
    }
    coefficients_.copy();
    walk_.advance();
  }

  __device__ void skip() { valid_.next(); }

  __device__ void transform(unsigned char* stage) {
    if constexpr (kAhead) {
      Coefficients<Prologue, kChunkValues<T>> c;
      coefficients_.read(column_, c);
      copies_.template transform<Prologue>(stage, valid_.oldest(), c);
      coefficients_.advance();
    }
  }

 private:
  static constexpr int kChunks = Copies::Dealt::kChunks;

  // Where the tap reads, once for all its stages.
  __device__ void enter_tap() {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int h = h_[i] + walk_.h * gh_.step, w = w_[i] + walk_.w * gw_.step;
      pixel_[i] = gh_.inside(h) && gw_.inside(w) ? image_[i] + h * gw_.size + w : -1;
    }
  }

  Copies copies_;
  Ring coefficients_;
  ValidChunks<kChunks> valid_;
  Gather gh_, gw_;
  TapWalk<false> walk_;
  int channels_, column_;  // the thread's first channel in a stage
  int image_[kChunks], h_[kChunks], w_[kChunks];
  int pixel_[kChunks];  // at this tap; -1: padding
};

// B of fprop: rows are output channels, the reduction runs along KRSC's memory. Weights have fewer than 2^31 elements.
template <class T, class Tile, bool kTapsInner>
class WeightRows : public StagedColumns<KMajorTile<T, Tile::kN>, Tile> {
 public:
  using Layout = KMajorTile<T, Tile::kN>;
  using Copies = Copier<T, Layout, 1, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ WeightRows(const void* weight, const ConvShape& s, int first_column)
      : copies_(weight, nullptr), channels_(s.c) {
    walk_ = {s.r, s.s, (s.c + kTileK<T> - 1) / kTileK<T>};
    const int row = first_column + Copies::Dealt::row(0), elements = s.r * s.s * s.c;
    row_ = row * elements;
    step_ = Copies::Dealt::kRowStep * elements;
    rows_left_ = s.k - row;
  }

  __device__ void issue(unsigned char* stage) {
    const int channel = walk_.channel_tile * kTileK<T> + Copies::Dealt::column() * kChunkValues<T>;
    const int offset = row_ + (walk_.h * walk_.taps_w + walk_.w) * channels_ + channel;
#pragma unroll
    for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
      const bool valid = i * Copies::Dealt::kRowStep < rows_left_ && channel < channels_;
      copies_.copy(stage, i, offset + i * step_, valid);
    }
    walk_.advance();
  }
  __device__ void transform(unsigned char*) {}
  __device__ void skip() {}

 private:
  Copies copies_;
  TapWalk<kTapsInner> walk_;
  int channels_, rows_left_;
  int row_, step_;  // elements: to this thread's first row, and from a row of its to the next
};

// B of dgrad: the reduction runs over output channels, columns are input channels.
template <class T, class Tile, bool kTapsInner>
class WeightColumns : public StagedColumns<MnMajorTile<T, Tile::kN>, Tile> {
 public:
  using Layout = MnMajorTile<T, Tile::kN>;
  using Copies = Copier<T, Layout, 1, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ WeightColumns(const void* weight, const ConvShape& s, const Gather& gh, const Gather& gw, int first_column)
      : copies_(weight, nullptr), gh_(gh), gw_(gw), width_(s.s), channels_(s.c), k_(s.k) {
    walk_ = {gh.taps, gw.taps, (s.k + kTileK<T> - 1) / kTileK<T>};
    channel_ = first_column + Copies::Dealt::column() * kChunkValues<T>;
    elements_ = s.r * s.s * s.c;
  }

  __device__ void issue(unsigned char* stage) {
    const int tap = (gh_.first + walk_.h * gh_.every) * width_ + gw_.first + walk_.w * gw_.every;
    const int k = walk_.channel_tile * kTileK<T> + Copies::Dealt::row(0);
    const int offset = k * elements_ + tap * channels_ + channel_;
#pragma unroll
    for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
      const bool valid = k + i * Copies::Dealt::kRowStep < k_ && channel_ < channels_;
      copies_.copy(stage, i, offset + i * Copies::Dealt::kRowStep * elements_, valid);
    }
    walk_.advance();
  }
  __device__ void transform(unsigned char*) {}
  __device__ void skip() {}

 private:
  Copies copies_;
  Gather gh_, gw_;
  TapWalk<kTapsInner> walk_;
  int width_, channels_, k_, channel_;
  int elements_;  // of one output channel
};

}  // namespace resnet_fused::cuda
