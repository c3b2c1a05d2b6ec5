// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Storage types of activations: each names its value in memory, the type it is computed in, and the largest value of
// that type which is stored as zero (half of the smallest denormal; ties round to even).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace resnet_fused::cuda {

struct Float64 {
  using Value = double;
  using Acc = double;
  static constexpr Acc kLargestZero = 0;
  static __device__ Acc load(Value v) { return v; }
  static __device__ Value store(Acc v) { return v; }
};

struct Float32 {
  using Value = float;
  using Acc = float;
  static constexpr Acc kLargestZero = 0;
  static __device__ Acc load(Value v) { return v; }
  static __device__ Value store(Acc v) { return v; }
};

struct BFloat16 {
  using Value = __nv_bfloat16;
  using Acc = float;
  static constexpr Acc kLargestZero = 0x1p-134f;
  static __device__ Acc load(Value v) { return __bfloat162float(v); }
  static __device__ Value store(Acc v) { return __float2bfloat16_rn(v); }
};

struct Float16 {
  using Value = __half;
  using Acc = float;
  static constexpr Acc kLargestZero = 0x1p-25f;
  static __device__ Acc load(Value v) { return __half2float(v); }
  static __device__ Value store(Acc v) { return __float2half_rn(v); }
};

}  // namespace resnet_fused::cuda
