// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The convolutions' kernels compiled for AVX2 and FMA.
#include "kernels.h"

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Standard headers stay above this line, see ../kernels_avx2.cpp.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define RESNET_FUSED_CONV_KERNELS conv_kernels_avx2
#define RESNET_FUSED_REGISTER 32
#include "kernels.inl"
#else
namespace resnet_fused::cpu {
const ConvKernels conv_kernels_avx2{};  // never chosen, see ../bn_cpu.cpp
}  // namespace resnet_fused::cpu
#endif
