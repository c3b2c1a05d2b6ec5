// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU kernels compiled for AVX-512 (F, BW, VL, DQ).
#include "kernels.h"

#include <cstdint>

// Standard headers stay above this line: an inline function of theirs compiled for a newer processor could be
// the copy that the linker keeps for everybody.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define RESNET_FUSED_KERNELS kernels_avx512
#define RESNET_FUSED_REGISTER 64
#include "kernels.inl"
#else
namespace resnet_fused::cpu {
const Kernels kernels_avx512{};  // never chosen, see bn_cpu.cpp
}  // namespace resnet_fused::cpu
#endif
