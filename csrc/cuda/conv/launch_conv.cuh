// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Choosing a convolution kernel's instance and launching it with its shared memory.
#pragma once

#include "../launch.cuh"
#include "shapes.h"
#include "tile.cuh"

// A build for older cards too leaves the kernels' bodies empty there; backend.cpp refuses to launch them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define RESNET_FUSED_TENSOR_CORES 1
#else
#define RESNET_FUSED_TENSOR_CORES 0
#endif

namespace resnet_fused::cuda {

// Four warps each: of 64x64, 32x64 and 32x32.
using Tile128x128 = BlockTile<128, 128, 2, 2, 2>;
using Tile128x64 = BlockTile<128, 64, 4, 1, 3>;
using Tile64x64 = BlockTile<64, 64, 2, 2, 4>;
// wgrad's for three taps.
using TileOfTaps = BlockTile<kChannelsOfTaps, 3 * kChannelsOfTaps, 2, 2, 2>;

template <class Call>
cudaError_t dispatch_tile(TileShape shape, Call call) {
  switch (shape) {
    case TileShape::k128x128: return call(Tile128x128{});
    case TileShape::k128x64: return call(Tile128x64{});
    case TileShape::k64x64: return call(Tile64x64{});
  }
  return cudaErrorInvalidValue;
}

// Float32 is multiplied as TF32.
template <class Call>
cudaError_t dispatch_conv_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float32: return call(Float32{});
    case DType::BFloat16: return call(BFloat16{});
    case DType::Float16: return call(Float16{});
    default: return cudaErrorInvalidValue;
  }
}

// Whether the nine taps of a filter share their pixels.
template <class Call>
cudaError_t dispatch_halo(const ConvShape& s, Call call) {
  return halo_pixels(s) >= 0 ? call(std::true_type{}) : call(std::false_type{});
}

// `shared_bytes` of this launch, and the most that the kernel is ever launched with.
template <class Params>
cudaError_t launch_conv(void (*kernel)(const Params), const Params& p, dim3 grid, int threads, int shared_bytes,
                        int most_shared_bytes, cudaStream_t stream) {
  const cudaError_t status = prepare_conv(reinterpret_cast<const void*>(kernel), most_shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

inline constexpr int larger(int a, int b) { return a > b ? a : b; }

}  // namespace resnet_fused::cuda
