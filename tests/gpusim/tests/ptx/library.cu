// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Code as libraries write it: CUB, cooperative groups, cuda::barrier, complex arithmetic.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cub/cub.cuh>
#include <cuda/barrier>
#include <cuda/atomic>
#include <cuda_pipeline.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
namespace cg = cooperative_groups;

extern "C" __global__ void cub_block(const int* x, int* sum, int* scan, int* sorted) {
  using Reduce = cub::BlockReduce<int, 128>;
  using Scan = cub::BlockScan<int, 128>;
  using Sort = cub::BlockRadixSort<int, 128, 4>;
  __shared__ union { typename Reduce::TempStorage r; typename Scan::TempStorage s; typename Sort::TempStorage o; } t;
  int v[4], base = blockIdx.x * 512;
  for (int i = 0; i < 4; ++i) v[i] = x[base + threadIdx.x * 4 + i];
  int total = Reduce(t.r).Sum(v);
  if (threadIdx.x == 0) sum[blockIdx.x] = total;
  __syncthreads();
  int e[4];
  Scan(t.s).ExclusiveSum(v, e);
  for (int i = 0; i < 4; ++i) scan[base + threadIdx.x * 4 + i] = e[i];
  __syncthreads();
  Sort(t.o).Sort(v);
  for (int i = 0; i < 4; ++i) sorted[base + threadIdx.x * 4 + i] = v[i];
}
extern "C" __global__ void groups(const float* x, float* out, int n) {
  auto block = cg::this_thread_block();
  auto tile = cg::tiled_partition<8>(block);
  int i = block.group_index().x * block.size() + block.thread_rank();
  float v = i < n ? x[i] : 0;
  float s = cg::reduce(tile, v, cg::plus<float>());
  if (tile.thread_rank() == 0) out[i / 8] = s;
  if (i < n && v > 0) {
    auto active = cg::coalesced_threads();
    if (active.thread_rank() == 0) atomicAdd(out + 128, (float)active.size());
  }
}
extern "C" __global__ void std_barrier(const int* x, int* y) {
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  __shared__ int s[128];
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  for (int r = 0; r < 3; ++r) {
    cuda::memcpy_async(&s[threadIdx.x], &x[threadIdx.x + r * 128], sizeof(int), bar);
    bar.arrive_and_wait();
    y[threadIdx.x + r * 128] = s[127 - threadIdx.x] + r;
    bar.arrive_and_wait();
  }
}
extern "C" __global__ void pipeline(const int4* x, int4* y, int n) {
  __shared__ int4 s[2][64];
  for (int i = 0; i < 2; ++i) { if (i < n) __pipeline_memcpy_async(&s[i][threadIdx.x], &x[i * 64 + threadIdx.x], 16); __pipeline_commit(); }
  for (int i = 0; i < n; ++i) {
    __pipeline_wait_prior(1);
    __syncthreads();
    int4 v = s[i & 1][63 - threadIdx.x];
    y[i * 64 + threadIdx.x] = make_int4(v.w, v.z, v.y, v.x);
    __syncthreads();
    if (i + 2 < n) __pipeline_memcpy_async(&s[i & 1][threadIdx.x], &x[(i + 2) * 64 + threadIdx.x], 16);
    __pipeline_commit();
  }
}
extern "C" __global__ void scoped_atomics(int* a, int n) {
  cuda::atomic_ref<int, cuda::thread_scope_device> r(*a);
  r.fetch_add(1, cuda::memory_order_acq_rel);
  cuda::atomic_ref<int, cuda::thread_scope_block> q(a[1]);
  q.fetch_max(threadIdx.x, cuda::memory_order_relaxed);
  int e = r.load(cuda::memory_order_acquire);
  while (!cuda::atomic_ref<int, cuda::thread_scope_system>(a[2]).compare_exchange_weak(e, e + 2)) {}
}
extern "C" __global__ void math_functions(const float* x, double* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  double d = v, *p = o + i * 16;
  p[0] = exp(d); p[1] = log(fabs(d) + 0.1); p[2] = sin(d * 30); p[3] = pow(fabs(d), 1.3); p[4] = tanh(d); p[5] = erf(d);
  p[6] = sinf(v * 1e5f); p[7] = logf(fabsf(v)); p[8] = cbrtf(v); p[9] = atan2f(v, 0.3f); p[10] = fmodf(v * 100, 0.7f); p[11] = expm1f(v);
  p[12] = normcdff(v); p[13] = __expf(v) + __logf(fabsf(v) + 1) ; p[14] = lgammaf(fabsf(v) + 1); p[15] = (double)llrintf(v * 1000) + (double)__float2uint_rd(fabsf(v) * 10);
}
extern "C" __global__ void fp8_roundtrip(const float* x, float* y, unsigned char* raw, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __nv_fp8_e4m3 a(x[i]);
  __nv_fp8_e5m2 b(x[i]);
  y[2 * i] = float(a); y[2 * i + 1] = float(b);
  raw[2 * i] = a.__x; raw[2 * i + 1] = b.__x;
}
template <class T> __device__ T reduce_any(T v) { for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(~0u, v, k); return v; }
extern "C" __global__ void welford(const float* x, float* mean, float* var, int n) {
  float m = 0, s = 0, c = 0;
  for (int i = threadIdx.x; i < n; i += 32) { c += 1; float d = x[blockIdx.x * n + i] - m; m += d / c; s += d * (x[blockIdx.x * n + i] - m); }
  for (int k = 16; k; k >>= 1) {
    float m2 = __shfl_down_sync(~0u, m, k), s2 = __shfl_down_sync(~0u, s, k), c2 = __shfl_down_sync(~0u, c, k);
    float t = c + c2, d = m2 - m;
    if (t > 0) { m += d * c2 / t; s += s2 + d * d * c * c2 / t; }
    c = t;
  }
  if (threadIdx.x == 0) { mean[blockIdx.x] = m; var[blockIdx.x] = s / n; }
}
extern "C" __global__ void grid_sync(int* data, int* out, int rounds) {
  auto grid = cg::this_grid();
  int s = 0;
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x == 0) data[blockIdx.x] = r * 10 + blockIdx.x;
    grid.sync();
    s += data[(blockIdx.x + 1) % gridDim.x];
    grid.sync();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = s;
}
