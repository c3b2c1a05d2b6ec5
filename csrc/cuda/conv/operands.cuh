// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the implicit GEMMs' operands have in common: which 16 bytes go where in a stage (issue), and what happens to
// them before the tensor cores read them (transform, the prologue). A thread transforms the chunks that it copied
// itself, so that its own copies' arrival is all it waits for; whether a chunk was padding it remembers in one bit, and
// padding stays zero whatever the prologue makes of zero.
#pragma once

#include "prologue.cuh"

namespace resnet_fused::cuda {

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

  // Chunk i of the stage from element `offset` of the tensors, or zeros; the second tensor's, `apart` bytes behind.
  __device__ void copy(unsigned char* stage, int i, int64_t offset, bool valid, int apart = Layout::kBytes) const {
    const uint32_t to = ptx::shared_address(stage) + offset_ + i * Dealt::kStepBytes;
    ptx::cp_async_16(to, first_ + offset, valid);
    if constexpr (kSources == 2) ptx::cp_async_16(to + apart, second_ + offset, valid);
  }

  // Chunk i of a stage that has arrived becomes what the prologue makes of it, where `valid`.
  template <class Prologue>
  __device__ void transform(unsigned char* stage, int i, bool valid, const Coefficients<Prologue, kChunkValues<T>>& c,
                            int apart = Layout::kBytes) const {
    transform_chunk<T, Prologue>(stage + offset_ + i * Dealt::kStepBytes, apart, valid, c);
  }

  // All chunks, those whose bit is set in `valid`.
  template <class Prologue>
  __device__ void transform(unsigned char* stage, uint32_t valid,
                            const Coefficients<Prologue, kChunkValues<T>>& c) const {
#pragma unroll
    for (int i = 0; i < Dealt::kChunks; ++i) {
      transform<Prologue>(stage, i, valid >> i & 1, c);
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

}  // namespace resnet_fused::cuda
