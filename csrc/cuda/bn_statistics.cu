// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Per-channel count, mean and M2 of every tile of the activations, from one read. A thread takes the mean of the few
// values it holds in registers, then their squared deviations from it, and merges; nothing cancels.
#include "elementwise.cuh"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

constexpr int kHeld = 8;  // vectors in a thread's registers
// At least, per multiprocessor: without the bound ptxas spills to reach more.
constexpr int kBlocks = 2;

// Merges `valid` values of each of kWidth channels, held in `raw`, into the moments. kFull: valid is kHeld, and the
// compiler knows.
template <class T, int kWidth, bool kFull>
__device__ void merge_held(const Vector<typename T::Value, kWidth> (&raw)[kHeld], int valid, typename T::Acc& count,
                           typename T::Acc (&mean)[kWidth], typename T::Acc (&m2)[kWidth]) {
  using Acc = typename T::Acc;
  if constexpr (kFull) valid = kHeld;
  const Acc held = static_cast<Acc>(valid);
  const Acc inverse = Acc(1) / held;
  const Acc weight = held / (count + held);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    // About the first value: exact where the values are equal, whatever their magnitude.
    const Acc origin = T::load(raw[0][e]);
    Acc sum = 0, squares = 0;
#pragma unroll
    for (int u = 1; u < kHeld; ++u) {
      if (u < valid) sum += T::load(raw[u][e]) - origin;
    }
    const Acc held_mean = fma(sum, inverse, origin);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const Acc deviation = T::load(raw[u][e]) - held_mean;
      if (u < valid) squares = fma(deviation, deviation, squares);
    }
    const Acc delta = held_mean - mean[e];
    mean[e] = fma(delta, weight, mean[e]);
    m2[e] += fma(delta * weight, delta * count, squares);
  }
  count += held;
}

template <class T, int kWidth>
__device__ void merge_held(const Vector<typename T::Value, kWidth> (&raw)[kHeld], int valid, typename T::Acc& count,
                           typename T::Acc (&mean)[kWidth], typename T::Acc (&m2)[kWidth]) {
  valid == kHeld ? merge_held<T, kWidth, true>(raw, valid, count, mean, m2)
                 : merge_held<T, kWidth, false>(raw, valid, count, mean, m2);
}

template <class Acc>
__device__ void write_moments(Acc* statistics, int64_t tile, int64_t channels, int64_t channel,
                              const Moments<Acc>& moments) {
  Acc* out = statistics + tile * kStatisticsRows * channels + channel;
  out[kCount * channels] = moments.count;
  out[kTileMean * channels] = moments.mean;
  out[kM2 * channels] = moments.m2;
}

// channels_last. Block (x, y): x vectors of channels, y rows at a time; grid: channels, tiles.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    statistics_rows(const typename T::Value* __restrict__ y, typename T::Acc* __restrict__ statistics, int64_t rows,
                    int64_t channels) {
  using Acc = typename T::Acc;
  using Slots = Interleaved<Acc, kWidth>;
  __shared__ __align__(kVectorBytes) Acc means[Slots::template kSize<kThreads>];
  __shared__ __align__(kVectorBytes) Acc m2s[Slots::template kSize<kThreads>];

  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x * kWidth;
  const int64_t channel = first + threadIdx.x * kWidth;
  Acc count = 0, mean[kWidth] = {}, m2[kWidth] = {};
  if (channel < channels) {
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y * kHeld) {
      Vector<typename T::Value, kWidth> raw[kHeld];
      int valid = 0;
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t r = row + u * blockDim.y;
        if (r < end) {
          raw[u] = load_vector<kWidth>(y + r * channels + channel);
          valid = u + 1;
        }
      }
      merge_held<T, kWidth>(raw, valid, count, mean, m2);
    }
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  Slots::template put<kThreads>(means, thread, mean);
  Slots::template put<kThreads>(m2s, thread, m2);
  __syncthreads();

  const int slot = thread;  // a channel of the block's x * kWidth <= kThreads
  if (slot >= blockDim.x * kWidth || first + slot >= channels) return;
  Moments<Acc> total{0, 0, 0};
  for (int part = 0; part < blockDim.y; ++part) {
    const int64_t part_rows = end - begin - part + blockDim.y - 1;
    const int index = Slots::template index<kThreads>(part * blockDim.x + slot / kWidth, slot % kWidth);
    total.merge({static_cast<Acc>(part_rows > 0 ? part_rows / blockDim.y : 0), means[index], m2s[index]});
  }
  write_moments(statistics, blockIdx.y, channels, first + slot, total);
}

// Contiguous: a block takes the range of vectors that is its tile of one channel, plane after plane.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    statistics_planes(const typename T::Value* __restrict__ y, typename T::Acc* __restrict__ statistics,
                      const Extent extent) {
  using Acc = typename T::Acc;
  const int64_t vectors = extent.outer * (extent.inner / kWidth);
  const int64_t begin = vectors * blockIdx.y / gridDim.y, end = vectors * (blockIdx.y + 1) / gridDim.y;
  for (int64_t channel = blockIdx.x; channel < extent.channels; channel += gridDim.x) {
    Acc count = 0, mean[kWidth] = {}, m2[kWidth] = {};
    for (int64_t v = begin + threadIdx.x; v < end; v += kThreads * kHeld) {
      Vector<typename T::Value, kWidth> raw[kHeld];
      int valid = 0;
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t w = v + u * kThreads;
        if (w < end) {
          raw[u] = load_vector<kWidth>(y + offset_of_vector<kWidth>(extent, channel, w));
          valid = u + 1;
        }
      }
      merge_held<T, kWidth>(raw, valid, count, mean, m2);
    }
    Moments<Acc> total{0, 0, 0};
#pragma unroll
    for (int e = 0; e < kWidth; ++e) total.merge({count, mean[e], m2[e]});
    merge_over_block<kThreads>(total);
    if (threadIdx.x == 0) write_moments(statistics, blockIdx.y, extent.channels, channel, total);
  }
}

template <class T, int kWidth>
cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream) {
  const auto* y = static_cast<const typename T::Value*>(p.y);
  auto* statistics = static_cast<typename T::Acc*>(p.statistics);
  const auto tiles = static_cast<unsigned>(reduction_tiles(p.extent));
  if (p.extent.inner == 1) {
    const int x = threads_along_channels(p.extent.channels, kWidth);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.extent.channels, int64_t{x} * kWidth)), tiles);
    statistics_rows<T, kWidth>
        <<<grid, dim3(x, kThreads / x), 0, stream>>>(y, statistics, p.extent.outer, p.extent.channels);
  } else {
    statistics_planes<T, kWidth>
        <<<dim3(grid_size(p.extent.channels), tiles), kThreads, 0, stream>>>(y, statistics, p.extent);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t statistics(const StatisticsParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kWidth = kVectorWidth<T>;
    const int64_t run = p.extent.inner == 1 ? p.extent.channels : p.extent.inner;
    const void* pointers[] = {p.y};
    return run % kWidth == 0 && all_aligned(pointers) ? launch_statistics<T, kWidth>(p, stream)
                                                      : launch_statistics<T, 1>(p, stream);
  });
}

}  // namespace resnet_fused::cuda
