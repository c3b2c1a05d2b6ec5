// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The partial sums of a weight's gradient, one of each split of the pixels, become the gradient. Reads the partials
// once, writes dW once.
#pragma once

#include "../device/reduce.cuh"
#include "../launch.cuh"
#include "launch_conv.cuh"

namespace resnet_fused::cuda {

// Adds the splits and converts, four values per lane. There are few values, where there are many splits: each warp of a
// block adds every kGroups-th of them, and the first one adds the warps' sums in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits(const float* __restrict__ workspace, typename T::Value* __restrict__ dw, int64_t vectors, int splits) {
  constexpr int kGroups = kThreads / kWarpThreads;
  __shared__ Vector<float, 4> parts[kGroups][kWarpThreads];
  const int lane = threadIdx.x % kWarpThreads, group = threadIdx.x / kWarpThreads;
  for (int64_t first = int64_t{blockIdx.x} * kWarpThreads; first < vectors;
       first += int64_t{gridDim.x} * kWarpThreads) {
    const int64_t v = first + lane;
    Vector<float, 4> sum = {};
    if (v < vectors) {
#pragma unroll 8
      for (int split = group; split < splits; split += kGroups) {
        const auto part = load_vector<4>(workspace + 4 * (split * vectors + v));
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += part[i];
      }
    }
    parts[group][lane] = sum;
    __syncthreads();
    if (group == 0 && v < vectors) {
#pragma unroll
      for (int g = 1; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += parts[g][lane][i];
      }
      Vector<typename T::Value, 4> result;
#pragma unroll
      for (int i = 0; i < 4; ++i) result[i] = T::store(sum[i]);
      store_vector(dw + 4 * v, result);
    }
    __syncthreads();  // the next ones are written
  }
}

// `values` of dW, a multiple of four.
inline cudaError_t launch_add_splits(const float* workspace, int splits, int64_t values, void* dw, DType dtype,
                                     cudaStream_t stream) {
  const int64_t vectors = values / 4;
  const unsigned blocks = grid_size(ceil_div(vectors, kWarpThreads));
  const auto launch = [&](auto t) {
    using T = decltype(t);
    add_splits<T><<<blocks, kThreads, 0, stream>>>(workspace, static_cast<typename T::Value*>(dw), vectors, splits);
    return cudaGetLastError();
  };
  return dispatch_conv_dtype(dtype, launch);
}

}  // namespace resnet_fused::cuda
