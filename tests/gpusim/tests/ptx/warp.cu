// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <stdint.h>
extern "C" __global__ void shuffles(const int* x, int* out) {
  int l = threadIdx.x, v = x[l];
  int* o = out + l * 8;
  o[0] = __shfl_sync(~0u, v, (l * 7 + 3) & 31);
  o[1] = __shfl_up_sync(~0u, v, 3);
  o[2] = __shfl_down_sync(~0u, v, 5);
  o[3] = __shfl_xor_sync(~0u, v, 13);
  o[4] = __shfl_sync(~0u, v, l + 2, 8);
  o[5] = __shfl_up_sync(~0u, v, 3, 16);
  o[6] = __shfl_down_sync(~0u, v, 5, 8);
  o[7] = __shfl_xor_sync(~0u, v, 20, 16);
}
extern "C" __global__ void warp_reduce(const float* x, int n, float* out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31, wid = threadIdx.x >> 5;
  __shared__ float s[32];
  float v = i < n ? x[i] : 0;
  for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(~0u, v, k);
  if (lane == 0) s[wid] = v;
  __syncthreads();
  if (wid == 0) {
    v = lane < blockDim.x / 32 ? s[lane] : 0;
    for (int k = 16; k; k >>= 1) v += __shfl_down_sync(~0u, v, k);
    if (lane == 0) out[blockIdx.x] = v;
  }
}
extern "C" __global__ void votes(const int* x, unsigned* out) {
  int l = threadIdx.x, v = x[l];
  unsigned* o = out + l * 10;
  o[0] = __ballot_sync(~0u, v & 1);
  o[1] = __all_sync(~0u, v > -1000000);
  o[2] = __any_sync(~0u, v == 17);
  o[3] = __match_any_sync(~0u, v & 3);
  int pred;
  o[4] = __match_all_sync(~0u, v >> 30, &pred);
  o[5] = pred;
  o[6] = __reduce_add_sync(~0u, (unsigned)v);
  o[7] = __reduce_max_sync(~0u, v);
  o[8] = __reduce_xor_sync(~0u, (unsigned)v);
  if (v & 4) o[9] = __activemask(); else o[9] = ~__activemask();
}
// Warp-synchronous operations in divergent code.
extern "C" __global__ void divergent_sync(const int* x, int* out) {
  int l = threadIdx.x & 31, v = x[threadIdx.x], r;
  if (l < 16) {
    r = __shfl_xor_sync(0x0000ffffu, v, 3);
    for (int k = 0; k < (l & 3); ++k) r += k;
    __syncwarp(0x0000ffffu);
    r += __shfl_sync(0x0000ffffu, r, 5);
  } else {
    r = -__shfl_xor_sync(0xffff0000u, v, 5);
    if (l & 1) r *= 2; else r += 7;
    r += __reduce_add_sync(0xffff0000u, r);
  }
  unsigned odd = __ballot_sync(~0u, l & 1);
  if (odd >> l & 1) r += __popc(__ballot_sync(odd, r > 0)) * 1000;
  out[threadIdx.x] = r;
}
// One lane waits in a loop for another lane of its own warp.
extern "C" __global__ void lane_spin(int* out) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncwarp();
  if (threadIdx.x == 3) { while (flag == 0) {} out[3] = flag; }
  else if (threadIdx.x == 20) { __threadfence_block(); flag = 77; out[20] = 1; }
  __syncwarp();
  if (threadIdx.x == 9) out[9] = flag + 1;
}
extern "C" __global__ void block_votes(const int* x, int* out) {
  int v = x[threadIdx.x];
  int c = __syncthreads_count(v & 1), a = __syncthreads_and(v > -5), o = __syncthreads_or(v == 1234567);
  out[threadIdx.x] = c * 100 + a * 10 + o;
}
// Named barriers: warps 0-1 produce, warps 2-3 consume.
extern "C" __global__ void named_barriers(int* out) {
  __shared__ int buf[64];
  int w = threadIdx.x / 32, t = threadIdx.x & 63;
  if (w < 2) {
    for (int i = 0; i < 4; ++i) {
      asm volatile("bar.sync 2, 128;" ::: "memory");   // buffer free
      buf[t] = i * 100 + t;
      asm volatile("bar.arrive 1, 128;" ::: "memory"); // buffer full
    }
  } else {
    int s = 0;
    for (int i = 0; i < 4; ++i) {
      asm volatile("bar.arrive 2, 128;" ::: "memory");
      asm volatile("bar.sync 1, 128;" ::: "memory");
      s += buf[(t + 13) & 63];
    }
    out[t] = s;
  }
}
extern "C" __global__ void early_return_barrier(int n, int* out) {
  __shared__ int s[128];
  if (threadIdx.x >= n) return;
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[n - 1 - threadIdx.x];
}
extern "C" __global__ void spin_between_warps(int* out) {
  __shared__ volatile int turn;
  if (threadIdx.x == 0) turn = 0;
  __syncthreads();
  int w = threadIdx.x / 32;
  if ((threadIdx.x & 31) == 0) {
    while (turn != w) {}
    out[w] = w * w;
    __threadfence_block();
    turn = w + 1;
  }
}
extern "C" __global__ void exited_member(int* y) {
  if (threadIdx.x == 5) return;
  y[threadIdx.x] = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);
  __syncwarp();
  y[32 + threadIdx.x] = __ballot_sync(~0u, 1);
}

// One lane waits in a loop for another warp while the others go on to the next round's
// warp-wide instruction: they have to wait there for it, though it comes from behind.
extern "C" __global__ void spin_between_rounds(int delay, int shuffle, const unsigned* in, unsigned* out) {
  __shared__ volatile int flag;
  const int l = threadIdx.x & 31;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x >= 32) {
    for (int i = 0; i < delay; ++i) asm volatile("");
    flag = 1;
    return;
  }
  unsigned v = in[l];
#pragma unroll 1
  for (int r = 0; r < 3; ++r) {
    if (shuffle) v += __shfl_xor_sync(~0u, v, 5);
    else asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
    if (r == 1 && l == 5) while (!flag) {}
    v += l;
  }
  out[l] = v;
}
extern "C" __global__ void partial_movmatrix(unsigned* out) {
  unsigned v = threadIdx.x;
  if (threadIdx.x < 20) asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
  out[threadIdx.x] = v;
}
