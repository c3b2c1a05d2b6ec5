// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// A of fprop and dgrad where nine taps read the same pixels: those of the block, and a halo.
#pragma once

#include "tap_operands.cuh"

namespace resnet_fused::cuda {

// A slice of kTileK channels of the block's pixels and the halo (halo_pixels) is copied and transformed once, while the
// nine taps multiply the slice before; a tap reads it some rows on. Rows whose tap is padding read zeros, in the banks
// where they would have read.
template <class T, class Tile, class Prologue>
class HaloPixels {
 public:
  using Layout = KMajorTile<T, Tile::kM>;
  using Copies = Copier<T, Layout, Prologue::kSources, Tile::kBlockThreads>;
  using Dealt = typename Copies::Dealt;
  using Ring = CoefficientRing<T, Prologue>;
  static constexpr int kStageBytes = 0;  // the ring is B's alone
  static constexpr bool kAhead = Prologue::kTables > 0;
  static constexpr bool kTapsInner = true;

  static constexpr int rows(int halo) { return Tile::kM + 2 * halo; }
  static constexpr int source_bytes(int halo) { return rows(halo) * Layout::kRowBytes; }
  static constexpr int shared_bytes(int halo) {
    return kBanksBytes + 2 * Prologue::kSources * source_bytes(halo) + Ring::kBytes;
  }

  __device__ HaloPixels(const void* tensor, const void* second, const void* table, unsigned char* memory,
                        const Gather& gh, const Gather& gw, int channels, const PixelGrid& grid, int64_t first_row)
      : copies_(tensor, second),
        halo_(abs(gh.add) * grid.width + abs(gw.add)),
        coefficients_(table, channels, memory + kBanksBytes + 2 * Prologue::kSources * source_bytes(halo_)),
        zeros_(ptx::shared_address(memory)),
        slices_(memory + kBanksBytes),
        channels_(channels) {
    if (threadIdx.x < kBanksBytes / 4) reinterpret_cast<uint32_t*>(memory)[threadIdx.x] = 0;
    pixels_ = static_cast<int>(grid.pixels());
    pixel_ = static_cast<int>(first_row) - halo_ + Dealt::row(0);
    column_ = Dealt::column() * kChunkValues<T>;
    ptx::keep(column_);
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
        const bool inside = gh.inside(h + tap / 3 * gh.step) && gw.inside(w + tap % 3 * gw.step);
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
      for (int i = 0; i < kAtATime; ++i)
        copy(memory_of(slice_of_issued_ ^ 1), (issued_ - kFirst) * kAtATime + i, next_channel_);
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
        transform_chunks(memory_of(slice_ ^ 1), (tap_ - kFirst) * kAtATime);
      }
      if (tap_ == kTaps - 1) coefficients_.advance();
    }
  }

  __device__ void enter(uint32_t) {
    const uint32_t first = ptx::shared_address(memory_of(slice_)) + row_ * Layout::kRowBytes;
    const uint32_t at = first + ((threadIdx.x % 32 / 16 ^ row_ >> 1) & 3) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      at_[i] = inside_[i] >> tap_ & 1 ? at + i * 16 * Layout::kRowBytes : zeros_ + at % kBanksBytes;
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
  static constexpr int kMostChunks = rows(kMostHaloPixels) / Dealt::kRowStep;
  static_assert(rows(kMostHaloPixels) % Dealt::kRowStep == 0);
  static constexpr int kAtATime = (kMostChunks + kTaps - kFirst - 1) / (kTaps - kFirst);

  // Of an even or odd slice.
  __device__ unsigned char* memory_of(int slice) const {
    return slices_ + slice * (Prologue::kSources * source_bytes(halo_));
  }

  // The thread's i-th chunk of a slice. Beyond the pixels there is nothing that a tap reads.
  __device__ void copy(unsigned char* slice, int i, int first_channel) const {
    const int row = i * Dealt::kRowStep, pixel = pixel_ + row, channel = first_channel + column_;
    if (Dealt::row(0) + row >= rows(halo_)) return;
    const bool valid = static_cast<unsigned>(pixel) < static_cast<unsigned>(pixels_) && channel < channels_;
    copies_.copy(slice, i, int64_t{pixel} * channels_ + channel, valid, source_bytes(halo_));
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
        copies_.template transform<Prologue>(slice, first + i, true, c, source_bytes(halo_));
      }
    }
  }

  Copies copies_;
  int halo_;
  Ring coefficients_;
  uint32_t zeros_;
  unsigned char* slices_;
  int channels_, pixels_;
  int pixel_, column_;  // the thread's first chunk: its pixel, its channel in a slice
  int issued_ = 0, next_channel_ = kTileK<T>, slice_of_issued_ = 0;  // the tap that is issued next, the slice behind it
  int tap_ = 0, read_channel_ = 0, slice_ = 0;                       // what is multiplied
  int row_, step_, step_of_rows_;  // the slice's row that the lane reads at this tap, and the way to the next one
  uint32_t inside_[Tile::kFragmentsM], at_[Tile::kFragmentsM];  // a bit per tap; where the lane reads at this tap
};

}  // namespace resnet_fused::cuda
