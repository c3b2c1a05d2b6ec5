// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Reductions over the threads of a block, in an order that never changes.
#pragma once

#include "vector.cuh"

namespace resnet_fused::cuda {

inline constexpr int kWarpThreads = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// Where the k-th of the kWidth values of a thread lies in shared memory. Values go in 16-byte chunks, the first chunk
// of all threads, then the second: neighbouring threads touch neighbouring chunks. The gap between the two puts the
// second chunk's banks next to the first's when values are read in the order of (thread, k).
template <class Acc, int kWidth>
struct Interleaved {
  static constexpr int kChunk = kWidth == 1 ? 1 : kVectorBytes / static_cast<int>(sizeof(Acc));
  static constexpr int kChunks = kWidth / kChunk;
  static_assert(kWidth % kChunk == 0);

  template <int kThreads>
  static constexpr int kStride = kThreads * kChunk + (kChunks > 1 ? 16 : 0);
  template <int kThreads>
  static constexpr int kSize = kStride<kThreads> * kChunks;

  template <int kThreads>
  static __device__ int index(int thread, int k) {
    return k / kChunk * kStride<kThreads> + thread * kChunk + k % kChunk;
  }

  template <int kThreads>
  static __device__ void put(Acc* shared, int thread, const Acc (&values)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Vector<Acc, kChunk> chunk;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk[i] = values[c * kChunk + i];
      *reinterpret_cast<Vector<Acc, kChunk>*>(shared + index<kThreads>(thread, c * kChunk)) = chunk;
    }
  }

  template <int kThreads>
  static __device__ void get(const Acc* shared, int thread, Acc (&values)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto chunk = load_vector<kChunk>(shared + index<kThreads>(thread, c * kChunk));
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[c * kChunk + i] = chunk[i];
    }
  }
};

// Count, mean and sum of squared deviations of a set of values.
template <class Acc>
struct Moments {
  Acc count, mean, m2;

  // The union's (Chan, Golub & LeVeque 1979).
  __device__ void merge(const Moments& other) {
    const bool empty = other.count == Acc(0);  // chosen at the end: a branch would keep loads from overlapping
    const Acc sum = count + other.count;
    const Acc weight = other.count / (empty ? Acc(1) : sum);
    const Acc delta = other.mean - mean;
    mean = empty ? mean : fma(delta, weight, mean);
    m2 = empty ? m2 : m2 + fma(delta * weight, delta * count, other.m2);
    count = sum;
  }

  __device__ Moments shuffled_down(int lanes) const {
    return {__shfl_down_sync(kWholeWarp, count, lanes), __shfl_down_sync(kWholeWarp, mean, lanes),
            __shfl_down_sync(kWholeWarp, m2, lanes)};
  }
};

// A sum with the interface of Moments.
template <class Acc>
struct Sum {
  Acc value;

  __device__ void merge(const Sum& other) { value += other.value; }
  __device__ Sum shuffled_down(int lanes) const { return {__shfl_down_sync(kWholeWarp, value, lanes)}; }
};

// Merges one Part of every thread of a one-dimensional block of kThreads; the result is thread 0's.
template <int kThreads, class Part>
__device__ void merge_over_block(Part& part) {
  __shared__ Part warps[kThreads / kWarpThreads];
#pragma unroll
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) part.merge(part.shuffled_down(lanes));
  const int warp = threadIdx.x / kWarpThreads;
  if (threadIdx.x % kWarpThreads == 0) warps[warp] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarpThreads; ++w) part.merge(warps[w]);
  }
  __syncthreads();  // the next call writes again
}

}  // namespace resnet_fused::cuda
