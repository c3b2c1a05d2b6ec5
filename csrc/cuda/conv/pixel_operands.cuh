// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The operands of wgrad, whose reduction runs over pixels.
#pragma once

#include "../device/reduce.cuh"
#include "tap_operands.cuh"

namespace resnet_fused::cuda {

// A: rows are output channels, the reduction runs over the pixels [begin, end) where dy lies. The prologue is applied
// to fragments, since there a lane's rows are channels: their coefficients stay in its registers. What it makes of the
// pixels beyond `end` is multiplied by zeros of B.
template <class T, class Tile, class Prologue>
class GradientRows : public StagedRows<MnMajorTile<T, Tile::kM>, Tile> {
 public:
  using Layout = MnMajorTile<T, Tile::kM>;
  using Copies = Copier<T, Layout, Prologue::kSources, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;
  static constexpr bool kAhead = false;

  __device__ GradientRows(const void* tensor, const void* second, const void* table, int begin, int end, int channels,
                          int first_channel)
      : copies_(tensor, second), pixel_(begin + Copies::Dealt::row(0)), end_(end), channels_(channels) {
    channel_ = first_channel + Copies::Dealt::column() * kChunkValues<T>;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kFragmentsM; ++i) {
      const int channel = first_channel + warp_row<Tile>() + threadIdx.x % 32 / 4 + 8 * i;
#pragma unroll
      for (int t = 0; t < Prologue::kTables; ++t) {
        coefficients_[i][t] = coefficient<Prologue>(table, t, channel, channels);
      }
    }
  }

  __device__ void issue(unsigned char* stage) {
    const int64_t offset = int64_t{pixel_} * channels_ + channel_;
#pragma unroll
    for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
      const int rows = i * Copies::Dealt::kRowStep;
      copies_.copy(stage, i, offset + rows * channels_, pixel_ + rows < end_ && channel_ < channels_);
    }
    pixel_ += kTileK<T>;
  }
  __device__ void skip() {}
  __device__ void transform(unsigned char*) {}

  __device__ void fragment(uint32_t (&r)[4], int m, int step) const {
    StagedRows<Layout, Tile>::fragment(r, m, step);
    if constexpr (Prologue::kTables > 0) {
      // A register holds neighbouring pixels of one row; the second and the fourth are of the row eight below.
      constexpr int kValues = kChunkValues<T> / 4;
      uint32_t second[4] = {};
      if constexpr (Prologue::kSources == 2) this->fragment_behind(second, Layout::kBytes, m, step);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Coefficients<Prologue, kValues> c;
#pragma unroll
        for (int t = 0; t < Prologue::kTables; ++t) {
#pragma unroll
          for (int i = 0; i < kValues; ++i) c.row[t][i] = coefficients_[m / 8 + e % 2][t];
        }
        Vector<typename T::Value, kValues> v, other;
        memcpy(&v, &r[e], sizeof(v));
        memcpy(&other, &second[e], sizeof(other));
        Prologue::template apply<T>(v, other, c);
        memcpy(&r[e], &v, sizeof(v));
      }
    }
  }

 private:
  Copies copies_;
  int pixel_, end_, channels_, channel_;
  float coefficients_[2 * Tile::kFragmentsM][Prologue::kTables > 0 ? Prologue::kTables : 1];
};

// The pixels that one tap reads for the output pixels [begin, end), where x lies, a stage of kTileK after another. The
// gathers' `add` is the tap's. Of a stage's rows a lane follows one.
template <class T>
class TapPixels {
 public:
  __device__ TapPixels(const Gather& gh, const Gather& gw, const PixelGrid& grid, int begin, int end)
      : gh_(gh), gw_(gw), grid_(grid) {
    static_assert(kTileK<T> <= 32);
    const int pixel = begin + threadIdx.x % 32 % kTileK<T>;
    left_ = end - pixel;
    step_w_ = kTileK<T> % grid.width;
    step_h_ = kTileK<T> / grid.width % grid.height;
    step_n_ = kTileK<T> / grid.width / grid.height;
    // One before the first is the last of an image that isn't there, whose pixels count below zero.
    const int nu = pixel < 0 ? -1 : pixel / grid.width;
    v_ = pixel - nu * grid.width;
    n_ = pixel < 0 ? -1 : nu / grid.height;
    u_ = nu - n_ * grid.height;
  }

  // Which pixel the lane's row of the stage is, below zero for padding; then goes on to the next stage.
  __device__ int next() {
    const int h = u_ * gh_.multiply + gh_.add, w = v_ * gw_.multiply + gw_.add;
    const int pixel = gh_.inside(h) && gw_.inside(w) && left_ > 0 ? (n_ * gh_.size + h) * gw_.size + w : -1;
    left_ -= kTileK<T>;
    v_ += step_w_;
    u_ += step_h_;
    n_ += step_n_;
    if (v_ >= grid_.width) v_ -= grid_.width, ++u_;
    if (u_ >= grid_.height) u_ -= grid_.height, ++n_;
    return pixel;
  }

 private:
  Gather gh_, gw_;
  PixelGrid grid_;
  int left_;  // from the lane's row to the end
  int step_n_, step_h_, step_w_;
  int n_, u_, v_;
};

// B: columns are channels of an NHWC tensor, the reduction runs over the pixels that a tap reads of it. A thread's
// chunks are of the same channels throughout: their coefficients stay in its registers.
template <class T, class Tile, class Prologue>
class TapColumns : public StagedColumns<MnMajorTile<T, Tile::kN>, Tile> {
 public:
  using Layout = MnMajorTile<T, Tile::kN>;
  using Copies = Copier<T, Layout, Prologue::kSources, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;
  static constexpr int kTaps = 1, kChannels = Tile::kN, kZeroBytes = 0;

  // The gathers' `add` is the tap's.
  __device__ TapColumns(const void* tensor, const void* table, unsigned char*, const Gather& gh, const Gather& gw,
                        const PixelGrid& grid, int begin, int end, int channels, int first_channel)
      : copies_(tensor, nullptr), pixels_(gh, gw, grid, begin, end), channels_(channels) {
    channel_ = first_channel + Copies::Dealt::column() * kChunkValues<T>;
    read_coefficients(coefficients_, table, channel_, channels);
  }

  __device__ void issue(unsigned char* stage) {
    valid_.next();
    const int of_lane = pixels_.next();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int pixel = __shfl_sync(kWholeWarp, of_lane, Copies::Dealt::row(i));
      const bool valid = pixel >= 0 && channel_ < channels_;
      copies_.copy(stage, i, int64_t{pixel} * channels_ + channel_, valid);
      if constexpr (Prologue::kTables > 0) valid_.add(i, valid);
    }
  }
  __device__ void skip() { valid_.next(); }
  __device__ void transform(unsigned char* stage) {
    if constexpr (Prologue::kTables > 0) {
      copies_.template transform<Prologue>(stage, valid_.oldest(), coefficients_);
    }
  }

  // What a thread holds of the warp's j-th fragment: which of the taps, and the first of two of the block's channels.
  static __device__ int tap_of(int) { return 0; }
  static __device__ int channel_of(int j) { return fragment_column<Tile>(j); }

 private:
  static constexpr int kChunks = Copies::Dealt::kChunks;

  Copies copies_;
  TapPixels<T> pixels_;
  ValidChunks<kChunks> valid_;
  int channels_, channel_;
  Coefficients<Prologue, kChunkValues<T>> coefficients_;
};

// The same for a row of three taps at once, neighbouring pixels of 16 bits: columns are taps, then channels, and dy is
// read once for all three. A stage holds the pixels of the middle tap, one before and one behind; a tap reads it a row
// further on, and zeros, in the banks where it would have read, for the pixels whose tap is padding. A warp has the
// same channels of every tap.
template <class T, class Tile, class Prologue>
class RowOfTaps {
 public:
  static constexpr int kTaps = 3, kChannels = Tile::kN / kTaps;
  using Layout = MnMajorTile<T, kChannels>;
  using Copies = Copier<T, Layout, 1, Tile::kBlockThreads>;
  using Dealt = typename Copies::Dealt;
  static constexpr int kRows = kTileK<T> + kTaps - 1;
  static constexpr int kStageBytes = (kRows * Layout::kRowBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static constexpr int kZeroBytes = kBanksBytes;  // at `zeros`
  static_assert(sizeof(typename T::Value) == 2 && Layout::kRowBytes == kZeroBytes);

  // The gathers' `add` is the middle tap's.
  __device__ RowOfTaps(const void* tensor, const void* table, unsigned char* zeros, const Gather& gh, const Gather& gw,
                       const PixelGrid& grid, int begin, int end, int channels, int first_channel)
      : copies_(tensor, nullptr),
        pixels_(gh, gw, grid, begin - 1, static_cast<int>(grid.pixels())),
        channels_(channels),
        channel_(first_channel + Dealt::column() * kChunkValues<T>),
        width_(grid.width),
        stage_width_(kTileK<T> % grid.width) {
    next_ = pixels_.next();
    if (threadIdx.x < kZeroBytes / 4) reinterpret_cast<uint32_t*>(zeros)[threadIdx.x] = 0;
    const int row = threadIdx.x % 16, column = warp_column<Tile>() / kTaps / kChunkValues<T> + threadIdx.x % 32 / 16;
    left_ = end - begin - row;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      lane_[tap] = Layout::offset(row + tap, column);
      zeros_[tap] = ptx::shared_address(zeros) + lane_[tap] % kZeroBytes;
    }
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) w_[step] = (begin + row + step * 16) % grid.width;
    read_coefficients(coefficients_, table, channel_, channels);
  }

  __device__ void issue(unsigned char* stage) {
    valid_.next();
    const int of_lane = next_;  // what is beyond a stage is the next one's
    next_ = pixels_.next();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const bool beyond = i * Dealt::kRowStep >= kTileK<T>;
      const int pixel = __shfl_sync(kWholeWarp, beyond ? next_ : of_lane, Dealt::row(i) % kTileK<T>);
      if (beyond && Dealt::row(i) >= kRows) break;
      const bool valid = pixel >= 0 && channel_ < channels_;
      copies_.copy(stage, i, int64_t{pixel} * channels_ + channel_, valid);
      if constexpr (Prologue::kTables > 0) valid_.add(i, valid);
    }
  }
  __device__ void skip() { valid_.next(); }
  __device__ void transform(unsigned char* stage) {
    if constexpr (Prologue::kTables > 0) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (i * Dealt::kRowStep >= kTileK<T> && Dealt::row(i) >= kRows) break;
        copies_.template transform<Prologue>(stage, i, valid_.oldest() >> i & 1, coefficients_);
      }
    }
  }

  __device__ void enter(uint32_t stage) {
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      const bool exists = left_ > step * 16;
      const bool inside[kTaps] = {exists && w_[step] > 0, exists, exists && w_[step] < width_ - 1};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        at_[step][tap] = inside[tap] ? stage + lane_[tap] + step * 16 * Layout::kRowBytes : zeros_[tap];
      }
      w_[step] += stage_width_;
      if (w_[step] >= width_) w_[step] -= width_;
    }
    left_ -= kTileK<T>;
  }
  __device__ void fragment(uint32_t (&r)[4], int n, int step) const {
    constexpr int kWarpChannels = Tile::kWarpN / kTaps;
    ptx::ldmatrix_x4<true>(r, at_[step][n / kWarpChannels] ^ (n % kWarpChannels / 8 * kChunkBytes));
  }

  // What a thread holds of the warp's j-th fragment: which of the taps, and the first of two of the block's channels.
  static __device__ int tap_of(int j) { return j * 8 / (Tile::kWarpN / kTaps); }
  static __device__ int channel_of(int j) {
    constexpr int kWarpChannels = Tile::kWarpN / kTaps;
    return warp_column<Tile>() / kTaps + j * 8 % kWarpChannels + threadIdx.x % 4 * 2;
  }

 private:
  static constexpr int kChunks = (kRows + Dealt::kRowStep - 1) / Dealt::kRowStep;

  Copies copies_;
  TapPixels<T> pixels_;
  ValidChunks<kChunks> valid_;
  int channels_, channel_;
  int width_, stage_width_;  // pixels in a row, and by how much a stage moves within it
  int next_;                 // the pixel of the lane's row in the stage to come
  int left_;                 // pixels from the lane's first to the end
  int w_[kStageSteps], lane_[kTaps];
  uint32_t zeros_[kTaps], at_[kStageSteps][kTaps];
  Coefficients<Prologue, kChunkValues<T>> coefficients_;
};

}  // namespace resnet_fused::cuda
