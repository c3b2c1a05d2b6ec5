// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// PTX instructions, one function each (PTX ISA, sections named). cp.async, mma, cvt to TF32 and cvt with relu need
// compute capability 8.0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.cuh"

namespace resnet_fused::cuda::ptx {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Data movement: st.global, of 16 and 8 bytes at a multiple of as many.
__device__ inline void store_global_128(void* global, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ inline void store_global_64(void* global, uint2 value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(value.x), "r"(value.y) : "memory");
}

// Data movement: cp.async. 16 bytes to shared memory, past the registers; zeros where `valid` is false, and then
// `source` is not read and may lie anywhere. The second cache is asked for 128 bytes: neighbours follow.
__device__ inline void cp_async_16(uint32_t shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// The same of 4 bytes, which need no wider alignment.
__device__ inline void cp_async_4(uint32_t shared, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the newest groups of this thread are under way.
template <int kPending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Data movement: prefetch.global.L2. Asks the second cache for a line.
__device__ inline void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Warp-level matrix load: ldmatrix. Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of
// matrix l / 8, and receives of matrix i, in r[i], the values (l / 4, 2 * (l % 4)) and the next; transposed with
// kTrans.
// Untransposed the two halves of a 32-bit value stay together, which serves TF32.
template <bool kTrans>
__device__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  }
}

// Data movement: ld.shared.
__device__ inline uint32_t load_shared_32(uint32_t shared) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}

__device__ inline uint2 load_shared_64(uint32_t shared) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(shared) : "memory");
  return value;
}

__device__ inline float4 load_shared_128(uint32_t shared) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(shared)
               : "memory");
  return value;
}

// Data movement: st.shared, of 8 bytes at a multiple of 8.
__device__ inline void store_shared_64(uint32_t shared, uint2 value) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(value.x), "r"(value.y) : "memory");
}

// Keeps a value in its register: the compiler would rather compute it again wherever it is used.
__device__ inline void keep(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

// Data conversion: cvt.rn.relu. Two floats rounded into one word, `low` in its lower half, negative ones zero; a NaN
// stays one.
template <class T>
__device__ uint32_t relu_pair(float low, float high);

template <>
__device__ inline uint32_t relu_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ inline uint32_t relu_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Data conversion: cvt.rna.tf32. Rounds a float to the 10 bits of mantissa that a TF32 mma reads.
__device__ inline uint32_t to_tf32(uint32_t value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(value)));
  return rounded;
}

// Warp-level matrix multiply-accumulate: mma, m16n8k16 of 16-bit values and m16n8k8 of TF32. d += a * b, a row-major, b
// column-major.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<Float32>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace resnet_fused::cuda::ptx
