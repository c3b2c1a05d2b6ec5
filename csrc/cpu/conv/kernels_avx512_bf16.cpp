// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The convolutions' kernels compiled for AVX-512 with conversions to bfloat16.
#include "kernels.h"

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Standard headers stay above this line, see ../kernels_avx512.cpp.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c,prfchw")
// GCC 12 reads the whole file before it heeds the pragma: __AVX512F__ and its like are not defined behind it.
#define RESNET_FUSED_AVX512_BF16
#define RESNET_FUSED_REGISTER 64
#define RESNET_FUSED_CONV_KERNELS conv_kernels_avx512_bf16
#include "kernels.inl"
#else
namespace resnet_fused::cpu {
const ConvKernels conv_kernels_avx512_bf16{};  // never chosen, see ../bn_cpu.cpp
}  // namespace resnet_fused::cpu
#endif
