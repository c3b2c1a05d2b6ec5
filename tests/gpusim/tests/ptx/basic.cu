// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <cuda_fp16.h>
#include <stdint.h>
#include <stdio.h>
#include <assert.h>

extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
struct Table { int v[64]; };
__device__ __noinline__ int look_up(const int* p, int i) { return p[i]; }
extern "C" __global__ void param_table(const __grid_constant__ Table t, int* out) {
  int i = threadIdx.x;
  out[i] = t.v[i ^ 3] + look_up(t.v, 63 - i);
}
extern "C" __global__ void vec4(int n4, const float4* x, float4* y) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += gridDim.x * blockDim.x) {
    float4 v = x[i];
    y[i] = make_float4(v.w, v.z * 2, v.y + 1, fmaxf(v.x, 0.f));
  }
}
extern "C" __global__ void block_sum(int n, const float* x, float* out) {
  __shared__ float s[256];
  float v = 0;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) v += x[i];
  s[threadIdx.x] = v;
  __syncthreads();
  for (int k = 128; k > 0; k >>= 1) {
    if (threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = s[0];
}
extern "C" __global__ void last_block(int n, const float* x, float* partial, unsigned* count, float* out) {
  __shared__ float s[128];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) v += x[i];
  s[threadIdx.x] = v;
  __syncthreads();
  for (int k = 64; k > 0; k >>= 1) { if (threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k]; __syncthreads(); }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = s[0];
    __threadfence();
    last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float t = 0;
    for (int i = 0; i < gridDim.x; ++i) t += ((volatile float*)partial)[i];
    *out = t;
  }
}
// Grid barrier by spinning: every block waits for all others.
extern "C" __global__ void grid_barrier(unsigned* arrived, int* data, int* out) {
  if (threadIdx.x == 0) {
    data[blockIdx.x] = blockIdx.x * 3;
    __threadfence();
    atomicAdd(arrived, 1);
    while (*(volatile unsigned*)arrived < gridDim.x) {}
    __threadfence();
  }
  __syncthreads();
  int s = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) s += ((volatile int*)data)[i];
  atomicAdd(out + blockIdx.x, s);
}
extern "C" __global__ void gemm_tiled(int m, int n, int k, const float* a, const float* b, float* c) {
  __shared__ float sa[16][17], sb[16][17];
  int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
  float acc = 0;
  for (int t = 0; t < k; t += 16) {
    sa[threadIdx.y][threadIdx.x] = row < m && t + threadIdx.x < k ? a[row * k + t + threadIdx.x] : 0;
    sb[threadIdx.y][threadIdx.x] = col < n && t + threadIdx.y < k ? b[(t + threadIdx.y) * n + col] : 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; ++i) acc += sa[threadIdx.y][i] * sb[i][threadIdx.x];
    __syncthreads();
  }
  if (row < m && col < n) c[row * n + col] = acc;
}
extern "C" __global__ void diverge(int n, const int* x, int* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i], r = 0;
  for (int k = 0; k < (v & 15); ++k) {
    if (k % 3 == 0) { if (v & 32) r += k; else r -= 2 * k; }
    else if (k == 7) break;
    else r ^= k;
  }
  switch (v % 7) {
    case 0: r += 100; break;
    case 1: r *= 3; break;
    case 2: r = -r; if (v & 64) return; break;
    case 3: while (r > 10) r /= 2; break;
    case 4: r += v >> 3; break;
    default: r ^= 0x55;
  }
  y[i] = r;
}
__device__ __noinline__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
struct Pair { int a; double b; short c; };
__device__ __noinline__ Pair make_pair_(int a, Pair p) { p.a += a; p.b *= 2; p.c = (short)(p.c - a); return p; }
extern "C" __global__ void calls(const int* x, int* y, double* z) {
  int i = threadIdx.x;
  y[i] = fib(x[i] % 12);
  Pair p{i, 1.5 * i, (short)(i * 2)};
  p = make_pair_(x[i], p);
  z[i] = p.a + p.b + p.c;
}
typedef int (*Fn)(int);
__device__ __noinline__ int twice(int v) { return 2 * v; }
__device__ __noinline__ int plus3(int v) { return v + 3; }
__device__ Fn table[2] = {twice, plus3};
extern "C" __global__ void indirect(const int* x, int* y) { y[threadIdx.x] = table[x[threadIdx.x] & 1](x[threadIdx.x]); }
extern "C" __global__ void local_array(const int* x, int* y) {
  int a[16];
  for (int i = 0; i < 16; ++i) a[i] = i * i + threadIdx.x;
  int v = x[threadIdx.x];
  a[v & 15] = -1;
  a[(v >> 4) & 15] += 5;
  int s = 0;
  for (int i = 0; i < 16; ++i) s = s * 3 + a[(i + v) & 15];
  y[threadIdx.x] = s;
}
struct Params { int n; float w[7]; const float* x; long long k; unsigned char t[3]; };
extern "C" __global__ void struct_params(const __grid_constant__ Params p, float* y, int shift) {
  int i = threadIdx.x;
  if (i < p.n) y[i] = p.x[i] * p.w[(i + shift) % 7] + p.k + p.t[i % 3];
}
__constant__ float coeffs[4] = {1.f, -2.f, 0.5f, 8.f};
__device__ int counter = 7;
__device__ int* counter_ptr = &counter;
extern "C" __global__ void globals(float* y) {
  y[threadIdx.x] = coeffs[threadIdx.x & 3] + *counter_ptr;
  if (threadIdx.x == 0) atomicAdd(&counter, 5);
}
extern "C" __global__ void print_it(int v) { if (threadIdx.x < 2) printf("value %d %s %5.2f %c %llx\n", v + threadIdx.x, "text", 1.25 * v, 'x', 0x123456789abcull); }
extern "C" __global__ void assert_it(int v) { assert(threadIdx.x + v < 40); }
extern "C" __global__ void dynamic_shared(int n, const int* x, int* y) {
  extern __shared__ int s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = s[n - 1 - i];
}
extern "C" __global__ void atomics(const int* x, int n, int* i32, unsigned* u32, float* f32, double* f64, unsigned long long* u64) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i];
  atomicAdd(i32, v); atomicMin(i32 + 1, v); atomicMax(i32 + 2, v);
  atomicOr(u32, 1u << (v & 31)); atomicAnd(u32 + 1, ~(1u << (v & 15))); atomicXor(u32 + 2, (unsigned)v);
  atomicInc(u32 + 3, 100); atomicDec(u32 + 4, 50);
  atomicAdd(f32, 0.5f); atomicAdd(f64, 0.25); atomicAdd(u64, (unsigned long long)(v & 0xffff) << 20);
  unsigned old = u32[5], assumed;
  do { assumed = old; old = atomicCAS(u32 + 5, assumed, assumed + 3); } while (old != assumed);
  atomicMax(u64 + 1, (unsigned long long)v & 0xffffff); atomicExch(u64 + 2, 42ull);
}
extern "C" __global__ void shared_atomics(const int* x, int n, int* hist) {
  __shared__ int h[16];
  if (threadIdx.x < 16) h[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&h[x[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) hist[threadIdx.x] = h[threadIdx.x];
}
extern "C" __global__ void int_ops(const int* a, const int* b, int n, long long* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int x = a[i], y = b[i];
  unsigned ux = x, uy = y;
  long long* o = out + (size_t)i * 24;
  o[0] = (long long)x * y; o[1] = __mulhi(x, y); o[2] = __umulhi(ux, uy);
  o[3] = y ? x / y : 0; o[4] = y ? x % y : 0; o[5] = y ? ux / uy : 0; o[6] = y ? ux % uy : 0;
  o[7] = __popc(x); o[8] = __clz(x); o[9] = __brev(ux); o[10] = __ffs(x);
  o[11] = __byte_perm(ux, uy, 0x4162); o[12] = __funnelshift_l(ux, uy, y); o[13] = __funnelshift_r(ux, uy, y);
  o[14] = x >> (y & 31); o[15] = ux >> (uy & 31); o[16] = ux << (uy & 31);
  o[17] = min(x, y); o[18] = max(ux, uy); o[19] = abs(x); o[20] = __sad(x, y, 3u);
  o[21] = (long long)(((unsigned long long)ux << 32 | uy) / (unsigned long long)(uy | 1));
  o[22] = __mul64hi((long long)x << 20, (long long)y << 15);
  o[23] = __dp4a(x, y, 11);
}
extern "C" __global__ void float_ops(const float* a, const float* b, int n, float* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float x = a[i], y = b[i];
  float* o = out + i * 24;
  o[0] = x + y; o[1] = x - y; o[2] = x * y; o[3] = fmaf(x, y, 1.5f); o[4] = x / y; o[5] = sqrtf(fabsf(x));
  o[6] = fminf(x, y); o[7] = fmaxf(x, y); o[8] = expf(x); o[9] = logf(fabsf(x) + 1e-3f); o[10] = sinf(x); o[11] = cosf(y * 50);
  o[12] = tanhf(x); o[13] = rsqrtf(fabsf(x) + 0.1f); o[14] = (float)(int)(x * 100); o[15] = rintf(x * 7); o[16] = floorf(y * 3);
  o[17] = __fadd_rz(x, y); o[18] = __fmul_ru(x, y); o[19] = __frcp_rd(y); o[20] = __saturatef(x);
  o[21] = (float)((double)x * 1.1 + (double)y / 3.0); o[22] = powf(fabsf(x), 1.7f); o[23] = erff(x);
}
extern "C" __global__ void carry(const unsigned long long* a, const unsigned long long* b, unsigned long long* out) {
  int i = threadIdx.x;
  unsigned long long a0 = a[2 * i], a1 = a[2 * i + 1], b0 = b[2 * i], b1 = b[2 * i + 1], r0, r1, s0, s1;
  asm("add.cc.u64 %0, %2, %4; addc.u64 %1, %3, %5;" : "=&l"(r0), "=l"(r1) : "l"(a0), "l"(a1), "l"(b0), "l"(b1));
  asm("sub.cc.u64 %0, %2, %4; subc.u64 %1, %3, %5;" : "=&l"(s0), "=l"(s1) : "l"(a0), "l"(a1), "l"(b0), "l"(b1));
  out[4 * i] = r0; out[4 * i + 1] = r1; out[4 * i + 2] = s0; out[4 * i + 3] = s1;
}
// Reads the launch shape in three dimensions.
extern "C" __global__ void dims(int* out) {
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[b * blockDim.x * blockDim.y * blockDim.z + t] = blockIdx.z * 100000 + blockIdx.y * 10000 + blockIdx.x * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x;
}
extern "C" __global__ void spin_alu(int n, unsigned* out) {
  unsigned a = threadIdx.x, b = 12345, c = 7, d = 99;
  for (int i = 0; i < n; ++i) {
    a = a * 1664525u + 1013904223u; b ^= a >> 3; c += b & 0xff; d = (d << 1) ^ c;
    a += d; b = b + c * 3; c ^= a; d -= b;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = a ^ b ^ c ^ d;
}
extern "C" __global__ void spin_fma(int n, float* out) {
  float a = threadIdx.x, b = 1.0001f, c = 0.5f, d = 0.25f;
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) { a = a * b + c; d = d * b - c; c = fmaf(a, 1e-3f, c * 0.5f); }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = a + d + c;
}
