// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
#include <stdint.h>

// Raw register in, raw register out: fragments are built on the host.
#define LOAD(arr, n, src) uint32_t arr[n]; for (int i = 0; i < n; ++i) arr[i] = src[i * 32 + threadIdx.x];
#define STORE(dst, arr, n) for (int i = 0; i < n; ++i) dst[i * 32 + threadIdx.x] = arr[i];
#define MMA4_2(name, text) extern "C" __global__ void name(const uint32_t* A, const uint32_t* B, const uint32_t* C, uint32_t* D) { \
  LOAD(a, 4, A) LOAD(b, 2, B) LOAD(c, 4, C) \
  asm volatile(text " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); STORE(D, c, 4) }
#define MMA2_1(name, text) extern "C" __global__ void name(const uint32_t* A, const uint32_t* B, const uint32_t* C, uint32_t* D) { \
  LOAD(a, 2, A) LOAD(b, 1, B) LOAD(c, 4, C) \
  asm volatile(text " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0])); STORE(D, c, 4) }
#define F32(t) "{.reg .f32 x0,x1,x2,x3; mov.b32 x0,%0; mov.b32 x1,%1; mov.b32 x2,%2; mov.b32 x3,%3; " t
#define BACK " mov.b32 %0,x0; mov.b32 %1,x1; mov.b32 %2,x2; mov.b32 %3,x3;}"
#define MMAF4_2(name, text) extern "C" __global__ void name(const uint32_t* A, const uint32_t* B, const uint32_t* C, uint32_t* D) { \
  LOAD(a, 4, A) LOAD(b, 2, B) LOAD(c, 4, C) \
  asm volatile(F32(text) " {x0,x1,x2,x3}, {%4,%5,%6,%7}, {%8,%9}, {x0,x1,x2,x3};" BACK \
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); STORE(D, c, 4) }
#define MMAF2_1(name, text) extern "C" __global__ void name(const uint32_t* A, const uint32_t* B, const uint32_t* C, uint32_t* D) { \
  LOAD(a, 2, A) LOAD(b, 1, B) LOAD(c, 4, C) \
  asm volatile(F32(text) " {x0,x1,x2,x3}, {%4,%5}, {%6}, {x0,x1,x2,x3};" BACK \
    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0])); STORE(D, c, 4) }
MMAF4_2(mma_f16_k16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
MMAF4_2(mma_bf16_k16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMAF2_1(mma_f16_k8, "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32")
MMAF2_1(mma_bf16_k8, "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32")
MMAF4_2(mma_tf32_k8, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMAF2_1(mma_tf32_k4, "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32")
MMA4_2(mma_s8_k32, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
MMA4_2(mma_u8s8_k32, "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32")
MMA2_1(mma_s8_k16, "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32")
extern "C" __global__ void mma_f16_k16_h(const uint32_t* A, const uint32_t* B, const uint32_t* C, uint32_t* D) {
  LOAD(a, 4, A) LOAD(b, 2, B) LOAD(c, 2, C)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
    : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  STORE(D, c, 2)
}
extern "C" __global__ void mma_f64(const double* A, const double* B, const double* C, double* D) {
  int l = threadIdx.x;
  double c0 = C[l], c1 = C[32 + l];
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(c0), "+d"(c1) : "d"(A[l]), "d"(B[l]));
  D[l] = c0; D[32 + l] = c1;
}
extern "C" __global__ void ldmatrix_x4(const uint16_t* in, uint32_t* out, int stride, int trans) {
  extern __shared__ __align__(16) uint16_t s[];
  for (int i = threadIdx.x; i < 32 * stride; i += 32) s[i] = in[i];
  __syncwarp();
  uint32_t a = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x * stride), r[4];
  if (trans) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
  else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
  STORE(out, r, 4)
}

// GEMM: C[M][N] = A[M][K] * B[N][K]^T, multistage cp.async into swizzled shared
// memory, ldmatrix, mma. T: 0 f16, 1 bf16, 2 tf32. Leading dimensions are
// multiples of 16 bytes; M, N, K are arbitrary.
template <int T> struct Elem { using type = uint16_t; };
template <> struct Elem<2> { using type = float; };
template <int T, int Stages> __device__ void gemm(int M, int N, int K, const typename Elem<T>::type* A, int lda, const typename Elem<T>::type* B, int ldb, float* C) {
  using E = typename Elem<T>::type;
  constexpr int BK = 64 / sizeof(E), V = 16 / sizeof(E);
  extern __shared__ __align__(1024) unsigned char smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, wm = (warp & 1) * 32, wn = (warp >> 1) * 32;
  const uint32_t base = (uint32_t)__cvta_generic_to_shared(smem);
  auto slot = [](int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1)) & 3) * 16; };
  auto load = [&](int stage, int k0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int id = tid + i * 128, which = id >> 8, row = (id & 255) >> 2, chunk = id & 3;
      int g = (which ? n0 : m0) + row, limit = which ? N : M, k = k0 + chunk * V;
      const E* src = which ? B : A;
      int left = g < limit ? (K - k) * (int)sizeof(E) : 0, bytes = left < 0 ? 0 : left > 16 ? 16 : left;
      const E* p = bytes ? src + (size_t)g * (which ? ldb : lda) + k : src;
      uint32_t d = base + stage * 8192 + which * 4096 + slot(row, chunk);
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(d), "l"(p), "r"(bytes));
    }
  };
  float acc[2][4][4] = {};
  const int tiles = (K + BK - 1) / BK;
  for (int s = 0; s < Stages - 1; ++s) { if (s < tiles) load(s, s * BK); asm volatile("cp.async.commit_group;"); }
  for (int t = 0; t < tiles; ++t) {
    asm volatile("cp.async.wait_group %0;" :: "n"(Stages - 2));
    __syncthreads();
    if (t + Stages - 1 < tiles) load((t + Stages - 1) % Stages, (t + Stages - 1) * BK);
    asm volatile("cp.async.commit_group;");
    const uint32_t sa = base + (t % Stages) * 8192, sb = sa + 4096;
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t p = sa + slot(wm + i * 16 + (lane & 15), kk * 2 + (lane >> 4));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3]) : "r"(p));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t p = sb + slot(wn + j * 16 + (lane & 7) + (lane >> 4) * 8, kk * 2 + ((lane >> 3) & 1));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[2 * j][0]), "=r"(b[2 * j][1]), "=r"(b[2 * j + 1][0]), "=r"(b[2 * j + 1][1]) : "r"(p));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float* c = acc[i][j];
#define GEMM_MMA(text) asm volatile(text " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
            : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]))
          if (T == 0) GEMM_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
          else if (T == 1) GEMM_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
          else GEMM_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
        }
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int e = 0; e < 4; ++e) {
        int r = m0 + wm + i * 16 + lane / 4 + (e >> 1) * 8, c = n0 + wn + j * 8 + (lane & 3) * 2 + (e & 1);
        if (r < M && c < N) C[(size_t)r * N + c] = acc[i][j][e];
      }
}
extern "C" __global__ void __launch_bounds__(128) gemm_f16(int M, int N, int K, const uint16_t* A, int lda, const uint16_t* B, int ldb, float* C) { gemm<0, 3>(M, N, K, A, lda, B, ldb, C); }
extern "C" __global__ void __launch_bounds__(128) gemm_bf16(int M, int N, int K, const uint16_t* A, int lda, const uint16_t* B, int ldb, float* C) { gemm<1, 4>(M, N, K, A, lda, B, ldb, C); }
extern "C" __global__ void __launch_bounds__(128) gemm_tf32(int M, int N, int K, const float* A, int lda, const float* B, int ldb, float* C) { gemm<2, 2>(M, N, K, A, lda, B, ldb, C); }

extern "C" __global__ void wmma_gemm(const __half* A, const __half* B, float* C, int n) {  // one warp, 16 x 16, K = n
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, __half, row_major> a;
  fragment<matrix_b, 16, 16, 16, __half, col_major> b;
  fragment<accumulator, 16, 16, 16, float> c;
  fill_fragment(c, 0.5f);
  for (int k = 0; k < n; k += 16) {
    load_matrix_sync(a, A + k, n);
    load_matrix_sync(b, B + k, n);
    mma_sync(c, a, b, c);
  }
  for (int i = 0; i < c.num_elements; ++i) c.x[i] *= 2;
  store_matrix_sync(C, c, 16, mem_row_major);
}

extern "C" __global__ void half_math(const __half2* a, const __half2* b, const __half2* c, __half2* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __half2* o = out + i * 10;
  o[0] = __hadd2(a[i], b[i]); o[1] = __hsub2(a[i], b[i]); o[2] = __hmul2(a[i], b[i]); o[3] = __hfma2(a[i], b[i], c[i]);
  o[4] = __hmax2(a[i], b[i]); o[5] = __hmin2(a[i], b[i]); o[6] = __hneg2(a[i]); o[7] = __hfma2_relu(a[i], b[i], c[i]);
  o[8] = __hgt2(a[i], b[i]); o[9] = __halves2half2(__hadd(__low2half(a[i]), __high2half(b[i])), __float2half_rz(__low2float(a[i]) * 1.2345f));
}
extern "C" __global__ void bf16_math(const __nv_bfloat162* a, const __nv_bfloat162* b, const __nv_bfloat162* c, __nv_bfloat162* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __nv_bfloat162* o = out + i * 10;
  o[0] = __hadd2(a[i], b[i]); o[1] = __hsub2(a[i], b[i]); o[2] = __hmul2(a[i], b[i]); o[3] = __hfma2(a[i], b[i], c[i]);
  o[4] = __hmax2(a[i], b[i]); o[5] = __hmin2(a[i], b[i]); o[6] = __hneg2(a[i]); o[7] = __hfma2_relu(a[i], b[i], c[i]);
  o[8] = __hgt2(a[i], b[i]); o[9] = __floats2bfloat162_rn(__low2float(a[i]) * 1.2345f, __high2float(b[i]) * 3.3f);
}
extern "C" __global__ void half_atomics(__half2* h, __nv_bfloat162* b) {
  atomicAdd(h, __floats2half2_rn(1.f, 0.5f));
  atomicAdd(b, __floats2bfloat162_rn(1.f, 0.25f));
}
extern "C" __global__ void conversions(const float* x, int n, uint32_t* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  uint32_t* o = out + i * 12;
  uint32_t t;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(o[0]) : "f"(v));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(o[1]) : "f"(v), "f"(v * 3));
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(o[2]) : "f"(v), "f"(-v));
  asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(o[3]) : "f"(v * 1e5f));
  asm("cvt.rni.sat.u8.f32 %0, %1;" : "=r"(o[4]) : "f"(v * 100));
  asm("cvt.rpi.f32.f32 %0, %1;" : "=r"(t) : "f"(v)); o[5] = t;
  asm("{.reg .b16 h; cvt.rz.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(o[6]) : "f"(v));
  asm("cvt.rm.f32.s32 %0, %1;" : "=r"(o[7]) : "r"(__float_as_int(v)));
  asm("{.reg .s8 b; cvt.s8.s32 b, %1; cvt.s32.s8 %0, b;}" : "=r"(o[8]) : "r"(__float_as_int(v)));
  asm("cvt.rmi.u32.f32 %0, %1;" : "=r"(o[9]) : "f"(v * 50));
  asm("{.reg .f64 d; cvt.f64.f32 d, %1; mul.f64 d, d, 0d3FF199999999999A; cvt.rz.f32.f64 %0, d;}" : "=r"(o[10]) : "f"(v));
  asm("cvt.sat.f32.f32 %0, %1;" : "=r"(o[11]) : "f"(v));
}
