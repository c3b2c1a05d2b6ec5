// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Prologues, what becomes of an operand between memory and the tensor cores, and where their coefficients come from.
#pragma once

#include <climits>

#include "tile.cuh"

namespace resnet_fused::cuda {

// What becomes of kValues neighbouring values of an operand. Their channels' coefficients are kTables rows of a table,
// from kFirstRow on.
template <class Prologue, int kValues>
struct Coefficients {
  float row[Prologue::kTables > 0 ? Prologue::kTables : 1][kValues];
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
    for (int i = 0; i < kValues; ++i) z[i] = fmaf(c.row[0][i], T::load(v[i]), c.row[1][i]);
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
      g[i] = T::store(fmaf(c.row[0][i], T::load(g[i]), fmaf(c.row[1][i], T::load(y[i]), c.row[2][i])));
    }
  }
};

// The coefficients of a channel, of the table's `channels`; zero beyond them.
template <class Prologue>
__device__ float coefficient(const void* table, int t, int channel, int channels) {
  return channel < channels ? static_cast<const float*>(table)[(Prologue::kFirstRow + t) * channels + channel] : 0.0f;
}

// Those of neighbouring channels from `first` on.
template <class Prologue, int kValues>
__device__ void read_coefficients(Coefficients<Prologue, kValues>& c, const void* table, int first, int channels) {
#pragma unroll
  for (int t = 0; t < Prologue::kTables; ++t) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) c.row[t][i] = coefficient<Prologue>(table, t, first + i, channels);
  }
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
        float* to = values.row[t] + i;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
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

// A chunk in shared memory, and the second tensor's `apart` bytes behind it, become what the prologue makes of them.
// Padding goes through all but the store, so that nothing branches.
template <class T, class Prologue>
__device__ void transform_chunk(unsigned char* at, int apart, bool valid,
                                const Coefficients<Prologue, kChunkValues<T>>& c) {
  using Chunk = Vector<typename T::Value, kChunkValues<T>>;
  Chunk v = *reinterpret_cast<const Chunk*>(at), other = v;
  if constexpr (Prologue::kSources == 2) other = *reinterpret_cast<const Chunk*>(at + apart);
  Prologue::template apply<T>(v, other, c);
  if (valid) *reinterpret_cast<Chunk*>(at) = v;
}

}  // namespace resnet_fused::cuda
