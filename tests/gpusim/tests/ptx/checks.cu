// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <stdint.h>
extern "C" __global__ void oob_read(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
extern "C" __global__ void oob_write(float* y, int n) { y[threadIdx.x + n] = 1; }
extern "C" __global__ void misaligned(const char* x, float* y) { y[0] = *(const float*)(x + 2); }
extern "C" __global__ void null_read(const int* p, int* q) { *q = *p; }
extern "C" __global__ void shared_oob(int* y, int k) { __shared__ int s[64]; s[threadIdx.x + k] = 1; __syncthreads(); y[threadIdx.x] = s[threadIdx.x]; }
extern "C" __global__ void missing_sync(const int* x, int* y) {
  __shared__ int s[128];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void missing_second_sync(const int* x, int* y, int n) {
  __shared__ int s[128];
  int a = 0;
  for (int i = 0; i < n; ++i) {
    s[threadIdx.x] = x[threadIdx.x] + i;
    __syncthreads();
    a += s[127 - threadIdx.x];   // no barrier before the next round's write
  }
  y[threadIdx.x] = a;
}
extern "C" __global__ void missing_warp_sync(int* y) {
  __shared__ volatile int dummy[1];
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  dummy[0] = 0;
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void uninitialised(int* y) { __shared__ int s[64]; if (threadIdx.x < 63) s[threadIdx.x] = 1; __syncthreads(); y[threadIdx.x] = s[threadIdx.x]; }
extern "C" __global__ void missing_cp_wait(const int* x, int* y, int wait) {
  __shared__ __align__(16) int s[128];
  uint32_t d = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x);
  s[threadIdx.x] = -1;
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d), "l"(x + threadIdx.x) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (wait) asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void divergent_barrier(int* y) {
  if (threadIdx.x < 40) { __syncthreads(); y[0] = 1; }
  else { while (*(volatile int*)y == 0) {} }
}
extern "C" __global__ void barrier_deadlock(int* y) {
  if (threadIdx.x & 1) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 2, 64;");
  y[threadIdx.x] = 1;
}
extern "C" __global__ void endless(volatile int* y) { while (*y == 0) {} }
extern "C" __global__ void good_tile(const int* x, int* y, int n) {
  __shared__ int s[128];
  int a = 0;
  for (int i = 0; i < n; ++i) {
    s[threadIdx.x] = x[threadIdx.x] + i;
    __syncthreads();
    a += s[127 - threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = a;
}
extern "C" __global__ void bank_conflicts(float* y, int stride) {
  __shared__ float s[1024];
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = i;
  __syncwarp();
  y[threadIdx.x] = s[(threadIdx.x * stride) & 1023];
}
extern "C" __global__ void strided_store(float* y, int stride) { y[threadIdx.x * stride] = threadIdx.x; }
