// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The operands of the implicit GEMMs: which 16 bytes of which tensor go where in a stage (issue), and what happens to
// them before the tensor cores read them (transform, the prologue). A thread transforms the chunks that it copied
// itself, so that its own copies' arrival is all it waits for; whether a chunk was padding it remembers in one bit, and
// padding stays zero whatever the prologue makes of zero.
#pragma once

#include <climits>

#include "../device/reduce.cuh"
#include "tile.cuh"

namespace resnet_fused::cuda {

// ---- prologues -------------------------------------------------------------------------------------------------

// What becomes of kValues neighbouring values of an operand. Their channels' coefficients are kTables rows of a table,
// from kFirstRow on.
template <class Prologue, int kValues>
struct Coefficients {
  float tables[Prologue::kTables > 0 ? Prologue::kTables : 1][kValues];

  __device__ float (&operator[](int t))[kValues] { return tables[t]; }
  __device__ const float (&operator[](int t) const)[kValues] { return tables[t]; }
};

// The operand as it is in memory.
struct Raw {
  static constexpr int kSources = 1, kTables = 0, kFirstRow = 0;
};

// relu(scale*v + shift): the batch norm and ReLU in front of a convolution.
struct AffineRelu {
  static constexpr int kSources = 1, kTables = 2;
  static constexpr int kFirstRow = kScale;
  static_assert(kShift == kScale + 1);

  // A NaN passes, as in eager.
  template <class T, int kValues>
  static __device__ void apply(Vector<typename T::Value, kValues>& v, const Vector<typename T::Value, kValues>&,
                               const Coefficients<AffineRelu, kValues>& c) {
    float z[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) z[i] = fmaf(c[0][i], T::load(v[i]), c[1][i]);
    if constexpr (sizeof(typename T::Value) == 2) {
      uint32_t words[kValues / 2];
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) words[i] = ptx::relu_pair<T>(z[2 * i], z[2 * i + 1]);
      memcpy(&v, words, sizeof(v));
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[i] = z[i] < 0.0f ? 0.0f : z[i];
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
                               const Coefficients<BackwardAffine, kValues>& c) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      g[i] = T::store(fmaf(c[0][i], T::load(g[i]), fmaf(c[1][i], T::load(y[i]), c[2][i])));
    }
  }
};

// The coefficients of a channel, of the table's `channels`; zero beyond them.
template <class Prologue>
__device__ float coefficient(const void* table, int t, int channel, int channels) {
  return channel < channels ? static_cast<const float*>(table)[(Prologue::kFirstRow + t) * channels + channel] : 0.0f;
}

// The coefficients of the channels of one stage after another, copied a stage ahead: the barrier of the stage that they
// came with publishes them, and the next one's transform reads them. The ring's constructor copies the first ones.
template <class T, class Prologue>
class CoefficientRing {
 public:
  static constexpr int kFloats = Prologue::kTables * kTileK<T>;
  static constexpr int kSlotBytes = kFloats * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kStages * kSlotBytes;

  __device__ CoefficientRing(const void* table, int channels, unsigned char* shared) : channels_(channels) {
    if constexpr (kFloats > 0) {
      const int row = threadIdx.x / kTileK<T>, first = threadIdx.x % kTileK<T>;
      left_ = threadIdx.x < kFloats ? channels - first : INT_MIN;
      source_ = static_cast<const float*>(table) + (Prologue::kFirstRow + row) * channels + first;
      base_ = ptx::shared_address(shared);
      copy();
    }
  }

  // Of the next stage, a thread one float.
  __device__ void copy() {
    if constexpr (kFloats > 0) {
      if (left_ != INT_MIN) {
        ptx::cp_async_4(base_ + write_ + threadIdx.x * 4, source_ + channel_, channel_ < left_);
      }
      channel_ = channel_ + kTileK<T> < channels_ ? channel_ + kTileK<T> : 0;
      write_ = write_ + kSlotBytes < kBytes ? write_ + kSlotBytes : 0;
    }
  }

  // Of the oldest stage, from its `first` channel on, a multiple of four.
  template <int kValues>
  __device__ void read(int first, Coefficients<Prologue, kValues>& values) const {
#pragma unroll
    for (int t = 0; t < Prologue::kTables; ++t) {
#pragma unroll
      for (int i = 0; i < kValues; i += 4) {
        const float4 v = ptx::load_shared_128(base_ + read_ + first * 4 + (t * kTileK<T> + i) * 4);
        values[t][i] = v.x, values[t][i + 1] = v.y, values[t][i + 2] = v.z, values[t][i + 3] = v.w;
      }
    }
  }
  __device__ void advance() { read_ = read_ + kSlotBytes < kBytes ? read_ + kSlotBytes : 0; }

 private:
  const float* source_;
  uint32_t base_;
  int channels_, left_;
  int channel_ = 0, write_ = 0, read_ = 0;
};

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

// A chunk in shared memory, and the second tensor's `apart` bytes behind it, become what the prologue makes of them. All
// but the store is done for padding too, so that nothing branches.
template <class T, class Prologue>
__device__ void transform_chunk(unsigned char* at, int apart, bool valid,
                                const Coefficients<Prologue, kChunkValues<T>>& c) {
  using Chunk = Vector<typename T::Value, kChunkValues<T>>;
  Chunk v = *reinterpret_cast<const Chunk*>(at), other = v;
  if constexpr (Prologue::kSources == 2) other = *reinterpret_cast<const Chunk*>(at + apart);
  Prologue::template apply<T>(v, other, c);
  if (valid) *reinterpret_cast<Chunk*>(at) = v;
}

// Copies an operand's chunks, of kSources tensors that lie behind each other in a stage.
template <class T, class Layout, int kSources, int kThreads>
class Copier {
 public:
  using Dealt = Deal<Layout, kThreads>;
  static constexpr int kStageBytes = Layout::kBytes * kSources;

  __device__ Copier(const void* first, const void* second)
      : first_(static_cast<const typename T::Value*>(first)),
        second_(static_cast<const typename T::Value*>(second)),
        offset_(Dealt::first_offset()) {
    ptx::keep(offset_);
  }

  // Chunk i of the stage from element `offset` of the tensors, or zeros.
  __device__ void copy(unsigned char* stage, int i, int64_t offset, bool valid) {
    const uint32_t to = ptx::shared_address(stage) + offset_ + i * Dealt::kStepBytes;
    ptx::cp_async_16(to, first_ + offset, valid);
    if constexpr (kSources == 2) ptx::cp_async_16(to + Layout::kBytes, second_ + offset, valid);
  }

  // The chunks of a stage that has arrived become what the prologue makes of them, those whose bit is set in `valid`.
  template <class Prologue>
  __device__ void transform(unsigned char* stage, uint32_t valid,
                            const Coefficients<Prologue, kChunkValues<T>>& c) const {
#pragma unroll
    for (int i = 0; i < Dealt::kChunks; ++i) {
      transform_chunk<T, Prologue>(stage + offset_ + i * Dealt::kStepBytes, Layout::kBytes, valid >> i & 1, c);
    }
  }

 private:
  const typename T::Value* first_;
  const typename T::Value* second_;
  int offset_;  // bytes into a stage, of the first chunk
};

// Which of a thread's chunks are not padding, a bit per chunk and stage under way, the stage issued last uppermost.
template <int kChunks>
class ValidChunks {
 public:
  static_assert(kChunks * kStages <= 32);

  // Stages are issued, or skipped, and transformed in turn, a transformed one kStages - 2 behind the one issued last.
  __device__ void next() { bits_ >>= kChunks; }
  __device__ void add(int i, bool valid) {
    if (valid) bits_ |= 1u << ((kStages - 1) * kChunks + i);
  }
  __device__ uint32_t oldest() const { return bits_ >> kChunks; }  // above them the later stages'


 private:
  uint32_t bits_ = 0;
};

// How a warp reads an operand where nothing else is said: as A's rows and as B's columns lie in the stage.
template <class Layout, class Tile>
class StagedRows {
 public:
  __device__ void enter(uint32_t stage) { at_ = stage + lane_; }
  __device__ void fragment(uint32_t (&r)[4], int m, int step) const { Layout::fragment_a(r, at_, m, step); }
  // Of the tensor that lies `bytes` behind in the stage.
  __device__ void fragment_behind(uint32_t (&r)[4], int bytes, int m, int step) const {
    Layout::fragment_a(r, at_ + bytes, m, step);
  }

 private:
  int lane_ = Layout::lane_a(warp_row<Tile>());
  uint32_t at_;
};

template <class Layout, class Tile>
class StagedColumns {
 public:
  __device__ void enter(uint32_t stage) { at_ = stage + lane_; }
  __device__ void fragment(uint32_t (&r)[4], int n, int step) const { Layout::fragment_b(r, at_, n, step); }

 private:
  int lane_ = Layout::lane_b(warp_column<Tile>());
  uint32_t at_;
};

// ---- the reduction over taps and channels: fprop and dgrad -----------------------------------------------------

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
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(gh_.size) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(gw_.size);
      pixel_[i] = inside ? image_[i] + h * gw_.size + w : -1;
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

// The same where all taps read the same pixels (halo_pixels). A slice of channels of the block's own pixels and the halo
// is copied and transformed once, while the nine taps multiply the slice before; a tap reads it some rows on. Rows whose
// tap is padding read zeros, in the banks where they would have read.
template <class T, class Tile, class Prologue>
class HaloPixels {
 public:
  using Layout = KMajorTile<T, Tile::kM>;
  using Dealt = Deal<Layout, Tile::kBlockThreads>;
  using Ring = CoefficientRing<T, Prologue>;
  static constexpr int kStageBytes = 0;  // the ring is B's alone
  static constexpr bool kAhead = Prologue::kTables > 0;
  static constexpr bool kTapsInner = true;

  static constexpr int rows(int halo) { return Tile::kM + 2 * halo; }
  static constexpr int source_bytes(int halo) { return (rows(halo) + 1) / 2 * 2 * Layout::kRowBytes; }
  static constexpr int shared_bytes(int halo) {
    return kZeroBytes + 2 * Prologue::kSources * source_bytes(halo) + Ring::kBytes;
  }

  __device__ HaloPixels(const void* tensor, const void* second, const void* table, unsigned char* memory,
                        const Gather& gh, const Gather& gw, int channels, const PixelGrid& grid, int64_t first_row)
      : first_(static_cast<const typename T::Value*>(tensor)),
        second_(static_cast<const typename T::Value*>(second)),
        halo_(abs(gh.add) * grid.width + abs(gw.add)),
        coefficients_(table, channels, memory + kZeroBytes + 2 * Prologue::kSources * source_bytes(halo_)),
        zeros_(ptx::shared_address(memory)),
        slices_(memory + kZeroBytes),
        channels_(channels) {
    if (threadIdx.x < kZeroBytes / 4) reinterpret_cast<uint32_t*>(memory)[threadIdx.x] = 0;
    pixels_ = static_cast<int>(grid.pixels());
    pixel_ = static_cast<int>(first_row) - halo_ + Dealt::row(0);
    column_ = Dealt::column() * kChunkValues<T>;
    offset_ = Dealt::first_offset();
    ptx::keep(column_);
    ptx::keep(offset_);
    step_ = gw.step;
    step_of_rows_ = gh.step * grid.width - 3 * gw.step;
    row_ = warp_row<Tile>() + threadIdx.x % 16 + halo_ + gh.add * grid.width + gw.add;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      const int64_t row = first_row + warp_row<Tile>() + threadIdx.x % 16 + i * 16;
      const int pixel = row < pixels_ ? static_cast<int>(row) : 0;
      const int h = pixel / grid.width % grid.height + gh.add, w = pixel % grid.width + gw.add;
      inside_[i] = 0;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const bool inside = static_cast<unsigned>(h + tap / 3 * gh.step) < static_cast<unsigned>(gh.size) &&
                            static_cast<unsigned>(w + tap % 3 * gw.step) < static_cast<unsigned>(gw.size);
        if (inside && row < pixels_) inside_[i] |= 1u << tap;
      }
    }
    for (int i = 0; i < kMostChunks; ++i) copy(slices_, i, 0);
  }

  __device__ int iterations() const { return kTaps * ((channels_ + kTileK<T> - 1) / kTileK<T>); }

  // The first slice has nothing to be transformed behind.
  __device__ void begin() {
    for (int i = 0; i < kMostChunks; i += kAtATime) transform_chunks(slices_, i);
    coefficients_.advance();
  }

  // Copies of the next slice. Its memory is left by the tap before this slice's first, its coefficients are there a
  // stage before the first transform.
  __device__ void issue(unsigned char*) {
    if (issued_ == 0) coefficients_.copy();
    if (issued_ >= kFirst && next_channel_ < channels_) {
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) copy(other(slice_of_issued_), (issued_ - kFirst) * kAtATime + i, next_channel_);
    }
    if (++issued_ == kTaps) {
      issued_ = 0;
      next_channel_ += kTileK<T>;
      slice_of_issued_ ^= 1;
    }
  }
  __device__ void skip() {}

  __device__ void transform(unsigned char*) {
    if constexpr (kAhead) {
      if (tap_ >= kFirst && read_channel_ + kTileK<T> < channels_) {
        transform_chunks(other(slice_), (tap_ - kFirst) * kAtATime);
      }
      if (tap_ == kTaps - 1) coefficients_.advance();
    }
  }

  __device__ void enter(uint32_t) {
    const uint32_t first = ptx::shared_address(other(slice_ ^ 1)) + row_ * Layout::kRowBytes;
    const uint32_t at = first + ((threadIdx.x % 32 / 16 ^ row_ >> 1) & 3) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      at_[i] = inside_[i] >> tap_ & 1 ? at + i * 16 * Layout::kRowBytes : zeros_ + at % kZeroBytes;
    }
    row_ += step_;
    if (++tap_ % 3 == 0) row_ += step_of_rows_;
    if (tap_ == kTaps) {
      tap_ = 0;
      row_ -= 3 * (step_of_rows_ + 3 * step_);
      read_channel_ += kTileK<T>;
      slice_ ^= 1;
    }
  }
  __device__ void fragment(uint32_t (&r)[4], int m, int step) const {
    ptx::ldmatrix_x4<false>(r, at_[m / 16] ^ (2 * step * kChunkBytes));
  }

 private:
  static constexpr int kTaps = 9, kFirst = kStages - 1;  // the first tap that copies and transforms
  static constexpr int kZeroBytes = 128;                 // of all banks
  static constexpr int kMostChunks = rows(kMostHaloPixels) / Dealt::kRowStep;
  static constexpr int kAtATime = (kMostChunks + kTaps - kFirst - 1) / (kTaps - kFirst);

  // The memory of the slice that is not this one.
  __device__ unsigned char* other(int slice) const {
    return slices_ + (slice ^ 1) * (Prologue::kSources * source_bytes(halo_));
  }

  // The thread's i-th chunk of a slice. Beyond the pixels there is nothing that a tap reads.
  __device__ void copy(unsigned char* slice, int i, int first_channel) const {
    const int row = i * Dealt::kRowStep, pixel = pixel_ + row, channel = first_channel + column_;
    if (Dealt::row(0) + row >= rows(halo_)) return;
    const bool valid = static_cast<unsigned>(pixel) < static_cast<unsigned>(pixels_) && channel < channels_;
    const uint32_t to = ptx::shared_address(slice) + offset_ + i * Dealt::kStepBytes;
    const int64_t from = int64_t{pixel} * channels_ + channel;
    ptx::cp_async_16(to, first_ + from, valid);
    if constexpr (Prologue::kSources == 2) ptx::cp_async_16(to + source_bytes(halo_), second_ + from, valid);
  }

  // kAtATime chunks of a slice, those too which no tap reads.
  __device__ void transform_chunks(unsigned char* slice, int first) const {
    if constexpr (kAhead) {
      if (first * Dealt::kRowStep >= rows(halo_)) return;
      Coefficients<Prologue, kChunkValues<T>> c;
      coefficients_.read(column_, c);
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        if (Dealt::row(0) + (first + i) * Dealt::kRowStep >= rows(halo_)) break;
        transform_chunk<T, Prologue>(slice + offset_ + (first + i) * Dealt::kStepBytes, source_bytes(halo_), true, c);
      }
    }
  }

  const typename T::Value* first_;
  const typename T::Value* second_;
  int halo_;
  Ring coefficients_;
  uint32_t zeros_;
  unsigned char* slices_;
  int channels_, pixels_;
  int pixel_, column_, offset_;  // the thread's first chunk: its pixel, its channel in a slice, bytes into one
  int issued_ = 0, next_channel_ = kTileK<T>, slice_of_issued_ = 0;  // the tap that is issued next, the slice behind it
  int tap_ = 0, read_channel_ = 0, slice_ = 0;                       // what is multiplied
  int row_, step_, step_of_rows_;  // the slice's row that the lane reads at this tap, and the way to the next one
  uint32_t inside_[Tile::kFragmentsM], at_[Tile::kFragmentsM];  // a bit per tap; where the lane reads at this tap
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

// ---- the reduction over pixels: wgrad --------------------------------------------------------------------------

// A: rows are output channels, the reduction runs over the pixels [begin, end) where dy lies. The prologue is applied to
// fragments, since there a lane's rows are channels: their coefficients stay in its registers. What it makes of the
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
          for (int i = 0; i < kValues; ++i) c[t][i] = coefficients_[m / 8 + e % 2][t];
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
    // One before the first is the last of a row that isn't there.
    const int nu = pixel < 0 ? -1 : pixel / grid.width;
    v_ = pixel - nu * grid.width;
    n_ = pixel < 0 ? 0 : nu / grid.height;
    u_ = nu - n_ * grid.height;
  }

  // Which pixel the lane's row of the stage is, -1 for padding; then goes on to the next stage.
  __device__ int next() {
    const int h = u_ * gh_.multiply + gh_.add, w = v_ * gw_.multiply + gw_.add;
    const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(gh_.size) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(gw_.size);
    const int pixel = inside && left_ > 0 ? (n_ * gh_.size + h) * gw_.size + w : -1;
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
  using Pixels = TapPixels<T>;
  static constexpr int kStageBytes = Copies::kStageBytes;

  __device__ TapColumns(const void* tensor, const void* table, const Pixels& pixels, int channels, int first_channel)
      : copies_(tensor, nullptr), pixels_(pixels), channels_(channels) {
    channel_ = first_channel + Copies::Dealt::column() * kChunkValues<T>;
#pragma unroll
    for (int t = 0; t < Prologue::kTables; ++t) {
#pragma unroll
      for (int i = 0; i < kChunkValues<T>; ++i) {
        coefficients_[t][i] = coefficient<Prologue>(table, t, channel_ + i, channels);
      }
    }
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

 private:
  static constexpr int kChunks = Copies::Dealt::kChunks;

  Copies copies_;
  Pixels pixels_;
  ValidChunks<kChunks> valid_;
  int channels_, channel_;
  Coefficients<Prologue, kChunkValues<T>> coefficients_;
};

// The same for a row of three taps at once, neighbouring pixels of 16 bits: columns are taps, then channels, and dy is
// read once for all three. A stage holds the pixels of the middle tap, one before and one behind; a tap reads it a row
// further on, and zeros, in the banks where it would have read, for the pixels whose tap is padding. A warp has the same
// channels of every tap.
template <class T, class Tile, class Prologue>
class RowOfTaps {
 public:
  static constexpr int kTaps = 3, kChannels = Tile::kN / kTaps;
  using Layout = MnMajorTile<T, kChannels>;
  using Dealt = Deal<Layout, Tile::kBlockThreads>;
  static constexpr int kRows = kTileK<T> + kTaps - 1;
  static constexpr int kStageBytes = (kRows * Layout::kRowBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static constexpr int kZeroBytes = 128;  // of all banks, at `zeros`
  static_assert(sizeof(typename T::Value) == 2 && Layout::kRowBytes == kZeroBytes);

  // The gathers' `add` is the middle tap's.
  __device__ RowOfTaps(const void* tensor, const void* table, unsigned char* zeros, const Gather& gh, const Gather& gw,
                       const PixelGrid& grid, int begin, int end, int channels, int first_channel)
      : tensor_(static_cast<const typename T::Value*>(tensor)),
        pixels_(gh, gw, grid, begin - 1, static_cast<int>(grid.pixels())),
        channels_(channels),
        channel_(first_channel + Dealt::column() * kChunkValues<T>),
        offset_(Dealt::first_offset()),
        width_(grid.width),
        stage_width_(kTileK<T> % grid.width) {
    ptx::keep(offset_);
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
#pragma unroll
    for (int t = 0; t < Prologue::kTables; ++t) {
#pragma unroll
      for (int i = 0; i < kChunkValues<T>; ++i) {
        coefficients_[t][i] = coefficient<Prologue>(table, t, channel_ + i, channels);
      }
    }
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
      const uint32_t to = ptx::shared_address(stage) + offset_ + i * Dealt::kStepBytes;
      ptx::cp_async_16(to, tensor_ + int64_t{pixel} * channels_ + channel_, valid);
      if constexpr (Prologue::kTables > 0) valid_.add(i, valid);
    }
  }
  __device__ void skip() { valid_.next(); }
  __device__ void transform(unsigned char* stage) {
    if constexpr (Prologue::kTables > 0) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (i * Dealt::kRowStep >= kTileK<T> && Dealt::row(i) >= kRows) break;
        transform_chunk<T, Prologue>(stage + offset_ + i * Dealt::kStepBytes, 0, valid_.oldest() >> i & 1, coefficients_);
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

  // Where the column of fragment j, as the tile counts them, lies: its tap, and its channel of the block's.
  static __device__ int tap_of(int j) { return j * 8 / (Tile::kWarpN / kTaps); }
  static __device__ int channel_of(int j) {
    constexpr int kWarpChannels = Tile::kWarpN / kTaps;
    return warp_column<Tile>() / kTaps + j * 8 % kWarpChannels + threadIdx.x % 4 * 2;
  }

 private:
  static constexpr int kChunks = (kRows + Dealt::kRowStep - 1) / Dealt::kRowStep;

  const typename T::Value* tensor_;
  TapPixels<T> pixels_;
  ValidChunks<kChunks> valid_;
  int channels_, channel_, offset_;
  int width_, stage_width_;  // pixels in a row, and by how much a stage moves within it
  int next_;                 // the pixel of the lane's row in the stage to come
  int left_;                 // pixels from the lane's first to the end
  int w_[kStageSteps], lane_[kTaps];
  uint32_t zeros_[kTaps], at_[kStageSteps][kTaps];
  Coefficients<Prologue, kChunkValues<T>> coefficients_;
};

}  // namespace resnet_fused::cuda
