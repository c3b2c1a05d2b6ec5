// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The operands of the implicit GEMMs: which 16 bytes of which tensor go where in a stage (issue), and what happens to
// them before the tensor cores read them (transform, the prologue). A thread transforms the chunks that it copied
// itself, so that its own copies' arrival is all it waits for; whether a chunk was padding it remembers in one bit, and
// padding stays zero whatever the prologue makes of zero.
#pragma once

#include <climits>

#include "tile.cuh"

namespace resnet_fused::cuda {

// ---- prologues -------------------------------------------------------------------------------------------------

// Per-channel tables in shared memory. The two halves of every eight channels lie apart, so that threads on
// neighbouring chunks read neighbouring 16 bytes; half a round of banks apart, so that a fill meets no bank twice.
class ChannelTables {
 public:
  static constexpr int floats(int tables, int channels) { return tables * 2 * half(channels); }
  static constexpr int bytes(int tables, int channels) {
    return floats(tables, channels) * static_cast<int>(sizeof(float));
  }

  __device__ ChannelTables(float* shared, int channels) : shared_(shared), half_(half(channels)), channels_(channels) {}

  // The first `count` channels of a table. Every thread of the block has to call it; followed by a barrier before the
  // tables are read.
  __device__ void fill(int table, const float* source, int count) {
    for (int c = threadIdx.x; c < channels_ && c < count; c += blockDim.x) *at(table, c) = source[c];
  }
  // kCount: 4 or 8, and `channel` a multiple of it.
  template <int kCount>
  __device__ void read(int table, int channel, float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(at(table, channel + i));
      values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
    }
  }

 private:
  static constexpr int half(int channels) { return (channels / 2 + 31) / 32 * 32 + 16; }

  __device__ float* at(int table, int c) const {
    return shared_ + table * 2 * half_ + c / 4 % 2 * half_ + c / 8 * 4 + c % 4;
  }

  float* shared_;
  int half_, channels_;
};

// The operand as it is in memory.
struct Raw {
  static constexpr int kSources = 1, kTables = 0;
};

// A prologue's coefficients are kTables rows of a table, from kFirstRow on.

// relu(scale*v + shift): the batch norm and ReLU in front of a convolution.
struct AffineRelu {
  static constexpr int kSources = 1, kTables = 2;
  static constexpr int kFirstRow = kScale;
  static_assert(kShift == kScale + 1);

  template <class T, int kValues>
  static __device__ void apply(Vector<typename T::Value, kValues>& v, const Vector<typename T::Value, kValues>&,
                               const float (&c)[kTables][kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float z = fmaf(c[0][i], T::load(v[i]), c[1][i]);
      v[i] = T::store(z < 0.0f ? 0.0f : z);  // a NaN passes, as in eager
    }
  }
};

// a*g + b*y + c: the gradient behind a batch norm, from g and y.
struct BackwardAffine {
  static constexpr int kSources = 2, kTables = 3;
  static constexpr int kFirstRow = kA;
  static_assert(kB == kA + 1 && kC == kA + 2);

  template <class T, int kValues>
  static __device__ void apply(Vector<typename T::Value, kValues>& g, const Vector<typename T::Value, kValues>& y,
                               const float (&c)[kTables][kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      g[i] = T::store(fmaf(c[0][i], T::load(g[i]), fmaf(c[1][i], T::load(y[i]), c[2][i])));
    }
  }
};

// Fills the tables with `count` channels from `first` on, of the `channels` that there are.
template <class Prologue>
__device__ void fill_tables(ChannelTables& tables, const void* coefficients, int channels, int first, int count) {
  if constexpr (Prologue::kTables > 0) {
    const auto* source = static_cast<const float*>(coefficients) + Prologue::kFirstRow * channels + first;
    const int left = channels - first;
#pragma unroll
    for (int t = 0; t < Prologue::kTables; ++t) tables.fill(t, source + t * channels, count < left ? count : left);
  }
}

// ---- chunks of one thread --------------------------------------------------------------------------------------

// How the chunks of a tile are dealt to kThreads threads: a thread keeps its column of chunks and takes every
// kRowStep-th row, which is swizzled as the first.
template <class Layout, int kThreads>
struct Deal {
  static constexpr int kRowStep = kThreads / Layout::kRowChunks;
  static constexpr int kChunks = Layout::kRows / kRowStep;
  static constexpr int kStepBytes = kRowStep * Layout::kRowBytes;  // from a chunk to the next
  static_assert(kThreads % Layout::kRowChunks == 0 && Layout::kRows % kRowStep == 0);
  static_assert(kRowStep % Layout::kPeriod == 0);

  static __device__ int column() { return threadIdx.x % Layout::kRowChunks; }
  static __device__ int row(int i) { return threadIdx.x / Layout::kRowChunks + i * kRowStep; }
  static __device__ int first_offset() { return Layout::offset(row(0), column()); }
};

// Issues an operand's chunks, remembers which are not padding, and applies the prologue to those.
template <class T, class Layout, class Prologue, int kThreads>
class Copier {
 public:
  using Dealt = Deal<Layout, kThreads>;
  static constexpr int kStageBytes = Layout::kBytes * Prologue::kSources;
  static_assert(Dealt::kChunks * kStages <= 32, "one bit per chunk and stage");

  __device__ Copier(const void* first, const void* second, const ChannelTables& tables)
      : first_(static_cast<const typename T::Value*>(first)),
        second_(static_cast<const typename T::Value*>(second)),
        tables_(tables),
        offset_(Dealt::first_offset()) {}

  // Stages are issued, or skipped, and transformed in turn, a transformed one kStages - 2 behind the one issued last.
  __device__ void next() { valid_ >>= Dealt::kChunks; }

  // Chunk i of the stage from element `offset` of the tensor, or zeros.
  __device__ void copy(unsigned char* stage, int i, int64_t offset, bool valid) {
    const uint32_t to = ptx::shared_address(stage) + offset_ + i * Dealt::kStepBytes;
    ptx::cp_async_16(to, first_ + offset, valid);
    if constexpr (Prologue::kSources == 2) ptx::cp_async_16(to + Layout::kBytes, second_ + offset, valid);
    if constexpr (Prologue::kTables > 0) {
      if (valid) valid_ |= 1u << ((kStages - 1) * Dealt::kChunks + i);
    }
  }

  // `channel`: of this thread's column of chunks in this stage, as the tables count.
  __device__ void transform(unsigned char* stage, int channel) const {
    if constexpr (Prologue::kTables > 0) {
      const uint32_t valid = valid_ >> Dealt::kChunks & ((1u << Dealt::kChunks) - 1);
      if (valid == 0) return;  // among others where the channel doesn't exist
      using Chunk = Vector<typename T::Value, kChunkValues<T>>;
      unsigned char* first = stage + offset_;
      float coefficients[Prologue::kTables][kChunkValues<T>];
#pragma unroll
      for (int t = 0; t < Prologue::kTables; ++t) tables_.read(t, channel, coefficients[t]);
#pragma unroll
      for (int i = 0; i < Dealt::kChunks; ++i) {
        if (valid >> i & 1) {
          auto* chunk = reinterpret_cast<Chunk*>(first + i * Dealt::kStepBytes);
          Chunk v = *chunk, other = v;
          if constexpr (Prologue::kSources == 2) {
            other = *reinterpret_cast<const Chunk*>(first + Layout::kBytes + i * Dealt::kStepBytes);
          }
          Prologue::template apply<T>(v, other, coefficients);
          *chunk = v;
        }
      }
    }
  }

 private:
  const typename T::Value* first_;
  const typename T::Value* second_;
  ChannelTables tables_;
  int offset_;          // bytes into a stage, of the first chunk
  uint32_t valid_ = 0;  // a bit per chunk and stage, the stage issued last uppermost
};

// ---- the reduction over taps and channels: fprop and dgrad -----------------------------------------------------

// Walks the reduction: channels within a tap, taps within a row of taps.
struct TapWalk {
  int taps_h, taps_w, channel_tiles;
  int h = 0, w = 0, channel_tile = 0;

  __device__ int iterations() const { return taps_h * taps_w * channel_tiles; }
  __device__ void advance() {
    if (++channel_tile < channel_tiles) return;
    channel_tile = 0;
    if (++w < taps_w) return;
    w = 0;
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
class GatheredPixels {
 public:
  using Layout = KMajorTile<T, Tile::kM>;
  using Copies = Copier<T, Layout, Prologue, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ GatheredPixels(const void* tensor, const void* second, const ChannelTables& tables, const Gather& gh,
                            const Gather& gw, int channels, const PixelGrid& grid, int64_t first_row)
      : copies_(tensor, second, tables), gh_(gh), gw_(gw), channels_(channels) {
    walk_ = {gh.taps, gw.taps, (channels + kTileK<T> - 1) / kTileK<T>};
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

  __device__ void issue(unsigned char* stage) {
    copies_.next();
    if (walk_.channel_tile == 0) enter_tap();
    const int channel = walk_.channel_tile * kTileK<T> + Copies::Dealt::column() * kChunkValues<T>;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      copies_.copy(stage, i, int64_t{pixel_[i]} * channels_ + channel, pixel_[i] >= 0 && channel < channels_);
    }
    walk_.advance();
  }

  __device__ void skip() { copies_.next(); }

  __device__ void transform(unsigned char* stage) {
    copies_.transform(stage, transformed_ * kTileK<T> + Copies::Dealt::column() * kChunkValues<T>);
    if (++transformed_ == walk_.channel_tiles) transformed_ = 0;
  }

 private:
  static constexpr int kChunks = Copies::Dealt::kChunks;

  // Where the tap reads, once for all its stages.
  __device__ void enter_tap() {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int h = h_[i] + walk_.h * gh_.step, w = w_[i] + walk_.w * gw_.step;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(gh_.size) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(gw_.size);
      pixel_[i] = inside ? image_[i] + h * gw_.size + w : -1;
    }
  }

  Copies copies_;
  Gather gh_, gw_;
  int channels_;
  TapWalk walk_;
  int transformed_ = 0;  // channel tile
  int image_[kChunks], h_[kChunks], w_[kChunks];
  int pixel_[kChunks];  // at this tap; -1: padding
};

// B of fprop: rows are output channels, the reduction runs along KRSC's memory. Weights have fewer than 2^31 elements.
template <class T, class Tile>
class WeightRows {
 public:
  using Layout = KMajorTile<T, Tile::kN>;
  using Copies = Copier<T, Layout, Raw, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ WeightRows(const void* weight, const ConvShape& s, int first_column)
      : copies_(weight, nullptr, ChannelTables(nullptr, 0)), channels_(s.c) {
    walk_ = {s.r, s.s, (s.c + kTileK<T> - 1) / kTileK<T>};
    const int row = first_column + Copies::Dealt::row(0), elements = s.r * s.s * s.c;
    tap_ = row * elements;
    step_ = Copies::Dealt::kRowStep * elements;
    rows_left_ = s.k - row;
  }

  __device__ void issue(unsigned char* stage) {
    const int channel = walk_.channel_tile * kTileK<T> + Copies::Dealt::column() * kChunkValues<T>;
#pragma unroll
    for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
      const bool valid = i * Copies::Dealt::kRowStep < rows_left_ && channel < channels_;
      copies_.copy(stage, i, tap_ + channel + i * step_, valid);
    }
    walk_.advance();
    if (walk_.channel_tile == 0) tap_ += channels_;
  }
  __device__ void transform(unsigned char*) {}
  __device__ void skip() {}

 private:
  Copies copies_;
  TapWalk walk_;
  int channels_, rows_left_;
  int tap_, step_;  // elements: to the tap of this thread's first row, and from a row of its to the next
};

// B of dgrad: the reduction runs over output channels, columns are input channels.
template <class T, class Tile>
class WeightColumns {
 public:
  using Layout = MnMajorTile<T, Tile::kN>;
  using Copies = Copier<T, Layout, Raw, Tile::kBlockThreads>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ WeightColumns(const void* weight, const ConvShape& s, const Gather& gh, const Gather& gw, int first_column)
      : copies_(weight, nullptr, ChannelTables(nullptr, 0)), gh_(gh), gw_(gw), width_(s.s), channels_(s.c), k_(s.k) {
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
  TapWalk walk_;
  int width_, channels_, k_, channel_;
  int elements_;  // of one output channel
};

// ---- the reduction over pixels: wgrad --------------------------------------------------------------------------

// The output pixels themselves, [begin, end): where dy lies. `Dealt` says which of a stage's rows are this thread's.
template <class T, class Dealt>
class OwnPixels {
 public:
  __device__ OwnPixels(int begin, int end) : pixel_(begin + Dealt::row(0)), end_(end) {}

  // Which pixel the thread's i-th row of this stage is; -1: padding.
  __device__ int operator[](int i) const {
    const int pixel = pixel_ + i * Dealt::kRowStep;
    return pixel < end_ ? pixel : -1;
  }
  __device__ void advance() { pixel_ += kTileK<T>; }

 private:
  int pixel_, end_;
};

// The pixels that one tap reads for the output pixels [begin, end): where x lies. The gathers' `add` is the tap's.
template <class T, class Dealt>
class TapPixels {
 public:
  __device__ TapPixels(const Gather& gh, const Gather& gw, const PixelGrid& grid, int begin, int end)
      : gh_(gh), gw_(gw), grid_(grid), left_(end - begin - Dealt::row(0)) {
    step_w_ = kTileK<T> % grid.width;
    step_h_ = kTileK<T> / grid.width % grid.height;
    step_n_ = kTileK<T> / grid.width / grid.height;
#pragma unroll
    for (int i = 0; i < Dealt::kChunks; ++i) {
      const int pixel = begin + Dealt::row(i);
      v_[i] = pixel % grid.width;
      u_[i] = pixel / grid.width % grid.height;
      n_[i] = pixel / grid.width / grid.height;
    }
  }

  __device__ int operator[](int i) const {
    const int h = u_[i] * gh_.multiply + gh_.add, w = v_[i] * gw_.multiply + gw_.add;
    const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(gh_.size) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(gw_.size);
    return inside && i * Dealt::kRowStep < left_ ? (n_[i] * gh_.size + h) * gw_.size + w : -1;
  }
  __device__ void advance() {
    left_ -= kTileK<T>;
#pragma unroll
    for (int i = 0; i < Dealt::kChunks; ++i) {
      v_[i] += step_w_;
      u_[i] += step_h_;
      n_[i] += step_n_;
      if (v_[i] >= grid_.width) v_[i] -= grid_.width, ++u_[i];
      if (u_[i] >= grid_.height) u_[i] -= grid_.height, ++n_[i];
    }
  }

 private:
  Gather gh_, gw_;
  PixelGrid grid_;
  int left_;  // from the thread's first row to the end
  int step_n_, step_h_, step_w_;
  int n_[Dealt::kChunks], u_[Dealt::kChunks], v_[Dealt::kChunks];
};

// Columns are channels of an NHWC tensor, the reduction runs over its Pixels. The tables hold the block's own channels.
template <class T, class Tile, int kExtent, class Prologue, template <class, class> class PixelsOf>
class PixelColumns {
 public:
  using Layout = MnMajorTile<T, kExtent>;
  using Copies = Copier<T, Layout, Prologue, Tile::kBlockThreads>;
  using Pixels = PixelsOf<T, typename Copies::Dealt>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ PixelColumns(const void* tensor, const void* second, const ChannelTables& tables, const Pixels& pixels,
                          int channels, int first_channel)
      : copies_(tensor, second, tables), pixels_(pixels), channels_(channels) {
    channel_ = first_channel + Copies::Dealt::column() * kChunkValues<T>;
  }

  __device__ void issue(unsigned char* stage) {
    copies_.next();
#pragma unroll
    for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
      const int pixel = pixels_[i];
      copies_.copy(stage, i, int64_t{pixel} * channels_ + channel_, pixel >= 0 && channel_ < channels_);
    }
    pixels_.advance();
  }

  __device__ void skip() { copies_.next(); }

  __device__ void transform(unsigned char* stage) {
    copies_.transform(stage, Copies::Dealt::column() * kChunkValues<T>);
  }

 private:
  Copies copies_;
  Pixels pixels_;
  int channels_, channel_;
};

}  // namespace resnet_fused::cuda
