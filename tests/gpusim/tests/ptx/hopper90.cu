// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <stdint.h>

__device__ __forceinline__ uint32_t sa(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mbar_init(uint32_t b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n)); }
__device__ __forceinline__ void mbar_expect(uint32_t b, int n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void mbar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
__device__ __forceinline__ void mbar_wait(uint32_t b, int parity) {
  asm volatile("{\n.reg .pred P1;\nLAB_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n@P1 bra DONE;\nbra LAB_WAIT;\nDONE:\n}" :: "r"(b), "r"(parity) : "memory");
}
struct __align__(64) Map { char opaque[128]; };

extern "C" __global__ void tma_load2d(const __grid_constant__ Map map, int x, int y, int bytes, uint8_t* out, int wait) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(sa(&bar), 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
    mbar_expect(sa(&bar), bytes);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :: "r"(sa(s)), "l"(&map), "r"(x), "r"(y), "r"(sa(&bar)) : "memory");
  }
  __syncthreads();
  if (wait) mbar_wait(sa(&bar), 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = s[i];
}
extern "C" __global__ void tma_load4d(const __grid_constant__ Map map, int c, int w, int h, int n, int bytes, uint8_t* out) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(sa(&bar), 1);
    mbar_expect(sa(&bar), bytes);
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
      :: "r"(sa(s)), "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(sa(&bar)) : "memory");
  }
  __syncthreads();
  mbar_wait(sa(&bar), 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = s[i];
}
extern "C" __global__ void tma_im2col(const __grid_constant__ Map map, int c, int w, int h, int n, int ow, int oh, int bytes, uint8_t* out) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(sa(&bar), 1);
    mbar_expect(sa(&bar), bytes);
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};"
      :: "r"(sa(s)), "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(sa(&bar)), "h"((uint16_t)ow), "h"((uint16_t)oh) : "memory");
  }
  __syncthreads();
  mbar_wait(sa(&bar), 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = s[i];
}
extern "C" __global__ void tma_store2d(const __grid_constant__ Map map, int x, int y, int n, const float* in, int reduce) {
  extern __shared__ __align__(1024) uint8_t s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) ((float*)s)[i] = in[i];
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x == 0) {
    if (reduce) asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" :: "l"(&map), "r"(x), "r"(y), "r"(sa(s)) : "memory");
    else asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" :: "l"(&map), "r"(x), "r"(y), "r"(sa(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
// A map is changed in shared memory, published, used, then changed in place.
extern "C" __global__ void tma_replace(const __grid_constant__ Map map, Map* global, const void* first, const void* second, int w, int h, uint64_t pitch, int bytes, uint8_t* out) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ __align__(128) Map m;
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x < 32) ((uint32_t*)&m)[threadIdx.x] = ((const uint32_t*)&map)[threadIdx.x];
  if (threadIdx.x == 0) mbar_init(sa(&bar), 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" :: "l"((uint64_t)sa(&m)), "l"(first) : "memory");
    asm volatile("tensormap.replace.tile.rank.shared::cta.b1024.b32 [%0], %1;" :: "l"((uint64_t)sa(&m)), "r"(1) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;" :: "l"((uint64_t)sa(&m)), "r"(w) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" :: "l"((uint64_t)sa(&m)), "r"(h) : "memory");
    asm volatile("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %1;" :: "l"((uint64_t)sa(&m)), "l"(pitch) : "memory");
    asm volatile("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%0], 1, %1;" :: "l"((uint64_t)sa(&m)), "r"(4) : "memory");
    asm volatile("tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%0], 1, %1;" :: "l"((uint64_t)sa(&m)), "r"(1) : "memory");
    asm volatile("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%0], 1;" :: "l"((uint64_t)sa(&m)) : "memory");
    asm volatile("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%0], 0;" :: "l"((uint64_t)sa(&m)) : "memory");
    asm volatile("tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%0], 0;" :: "l"((uint64_t)sa(&m)) : "memory");
  }
  __syncwarp();
  if (threadIdx.x < 32)
    asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" :: "l"(global), "r"(sa(&m)) : "memory");
  for (int round = 0; round < 2; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      if (round) {
        asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" :: "l"(global), "l"(second) : "memory");
        asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
      }
      asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"(global) : "memory");
      mbar_expect(sa(&bar), bytes);
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(sa(s)), "l"(global), "r"(0), "r"(0), "r"(sa(&bar)) : "memory");
    }
    __syncthreads();
    mbar_wait(sa(&bar), round);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[round * bytes + i] = s[i];
  }
}
// Every lane of the first warp issues the store; lanes below `split` to x, the others to x + 32.
extern "C" __global__ void tma_store_by_warp(const __grid_constant__ Map map, int x, int split, int n, const float* in, int reduce) {
  extern __shared__ __align__(1024) uint8_t s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) ((float*)s)[i] = in[i];
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x < 32) {
    if (int(threadIdx.x) >= split) x += 32;
    if (reduce) asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" :: "l"(&map), "r"(x), "r"(0), "r"(sa(s)) : "memory");
    else asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" :: "l"(&map), "r"(x), "r"(0), "r"(sa(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
extern "C" __global__ void tma_im2col_store(const __grid_constant__ Map map, int c, int w, int h, int n, int count, const float* in, int reduce) {
  extern __shared__ __align__(1024) uint8_t s[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) ((float*)s)[i] = in[i];
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x == 0) {
    if (reduce) asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.im2col_no_offs.bulk_group [%0, {%1, %2, %3, %4}], [%5];" :: "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(sa(s)) : "memory");
    else asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.im2col_no_offs.bulk_group [%0, {%1, %2, %3, %4}], [%5];" :: "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(sa(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
extern "C" __global__ void bulk_copy(const int* in, int* out, int n) {
  extern __shared__ __align__(1024) int si[];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(sa(&bar), 1);
    mbar_expect(sa(&bar), n * 4);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(sa(si)), "l"(in), "r"(n * 4), "r"(sa(&bar)) : "memory");
  }
  __syncthreads();
  mbar_wait(sa(&bar), 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) si[i] *= 3;
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(out), "r"(sa(si)), "r"(n * 4) : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
// mbarrier as a producer/consumer ring between warps.
extern "C" __global__ void mbar_ring(int rounds, int* out) {
  __shared__ int buf[2][32];
  __shared__ __align__(8) uint64_t full[2], empty[2];
  if (threadIdx.x == 0) for (int i = 0; i < 2; ++i) { mbar_init(sa(full + i), 32); mbar_init(sa(empty + i), 32); }
  __syncthreads();
  int l = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    for (int r = 0; r < rounds; ++r) {
      mbar_wait(sa(empty + (r & 1)), ((r >> 1) & 1) ^ 1);
      buf[r & 1][l] = r * 1000 + l;
      mbar_arrive(sa(full + (r & 1)));
    }
  } else {
    int s = 0;
    for (int r = 0; r < rounds; ++r) {
      mbar_wait(sa(full + (r & 1)), (r >> 1) & 1);
      s += buf[r & 1][31 - l];
      mbar_arrive(sa(empty + (r & 1)));
    }
    out[l] = s;
  }
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_exchange(int* out) {
  __shared__ int v[32];
  uint32_t rank, n;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  v[threadIdx.x] = blockIdx.x * 100 + threadIdx.x;
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  uint32_t remote;
  int got;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(sa(v + threadIdx.x)), "r"(rank ^ 1));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(got) : "r"(remote));
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  out[blockIdx.x * 32 + threadIdx.x] = got + n * 10000;
}

#define R8(o) "%" #o "0,%" #o "1,%" #o "2,%" #o "3,%" #o "4,%" #o "5,%" #o "6,%" #o "7"
#define D32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define C8(d, o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), "+f"(d[o + 7])
#define D8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
__device__ __forceinline__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

template <int TA, int TB> __device__ void wg_f16(float (&d)[32], uint64_t da, uint64_t db, int scale) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32 ", %32, %33, p, 1, 1, %35, %36;}"
    : C8(d, 0), C8(d, 8), C8(d, 16), C8(d, 24) : "l"(da), "l"(db), "r"(scale), "n"(TA), "n"(TB));
}
__device__ void wg_bf16(float (&d)[32], uint64_t da, uint64_t db, int scale) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32 ", %32, %33, p, 1, 1, 0, 0;}"
    : C8(d, 0), C8(d, 8), C8(d, 16), C8(d, 24) : "l"(da), "l"(db), "r"(scale));
}
#define LOAD_IMAGE extern __shared__ __align__(1024) uint8_t s[]; \
  for (int i = threadIdx.x; i < bytes; i += 128) s[i] = image[i]; \
  asm volatile("fence.proxy.async.shared::cta;"); __syncthreads(); \
  uint64_t off = (uint64_t)(sa(s) >> 4); da += off; db += off;
// A lane waits for the fifth warp between two products.
extern "C" __global__ void wgmma_after_spin(const uint8_t* image, int bytes, uint64_t da, uint64_t db, int delay, float* out) {
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) mbar_init(sa(&bar), 1);
  LOAD_IMAGE
  if (threadIdx.x >= 128) {
    for (int i = 0; i < delay; ++i) asm volatile("");
    if (threadIdx.x == 128) mbar_arrive(sa(&bar));
    return;
  }
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = i;
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    wg_fence();
    wg_f16<0, 0>(d, da, db, 1);
    wg_commit();
    wg_wait<0>();
    if (t == 0 && threadIdx.x == 7) mbar_wait(sa(&bar), 0);
  }
  for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
}
// da, db: descriptors relative to the start of the image. kind: 0 both K-major, 1 A transposed, 2 B transposed, 3 both
extern "C" __global__ void wgmma_f16(const uint8_t* image, int bytes, uint64_t da, uint64_t db, int kind, float* out, int wait) {
  LOAD_IMAGE
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = i;
  wg_fence();
  if (kind == 0) wg_f16<0, 0>(d, da, db, 1); else if (kind == 1) wg_f16<1, 0>(d, da, db, 1); else if (kind == 2) wg_f16<0, 1>(d, da, db, 1); else wg_f16<1, 1>(d, da, db, 1);
  wg_commit();
  if (wait) wg_wait<0>();
  for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
}
extern "C" __global__ void wgmma_f16_reg(const uint8_t* image, int bytes, const uint32_t* a, uint64_t db, float* out) {
  uint64_t da = 0;
  LOAD_IMAGE
  float d[32];
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = a[i * 128 + threadIdx.x];
  for (int i = 0; i < 32; ++i) d[i] = 0;
  wg_fence();
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32 ", {%32,%33,%34,%35}, %36, p, -1, 1, 0;}"
    : C8(d, 0), C8(d, 8), C8(d, 16), C8(d, 24) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db), "r"(0));
  wg_commit();
  wg_wait<0>();
  for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
}
extern "C" __global__ void wgmma_tf32(const uint8_t* image, int bytes, uint64_t da, uint64_t db, float* out) {
  LOAD_IMAGE
  float d[8] = {};
  wg_fence();
  asm volatile("{.reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 " D8 ", %8, %9, p, 1, 1;}" : C8(d, 0) : "l"(da), "l"(db), "r"(1));
  wg_commit();
  wg_wait<0>();
  for (int i = 0; i < 8; ++i) out[i * 128 + threadIdx.x] = d[i];
}
extern "C" __global__ void wgmma_e4m3(const uint8_t* image, int bytes, uint64_t da, uint64_t db, float* out) {
  LOAD_IMAGE
  float d[8] = {};
  wg_fence();
  asm volatile("{.reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 " D8 ", %8, %9, p, 1, 1;}" : C8(d, 0) : "l"(da), "l"(db), "r"(1));
  wg_commit();
  wg_wait<0>();
  for (int i = 0; i < 8; ++i) out[i * 128 + threadIdx.x] = d[i];
}
// C[M][N] = A[M][K] B[N][K]^T in bf16: a producer warp feeds a two-stage ring by TMA
// (64 x 64 tiles, 128-byte swizzle), a warpgroup consumes with wgmma.
extern "C" __global__ void __launch_bounds__(160) tma_gemm(const __grid_constant__ Map ma, const __grid_constant__ Map mb, int M, int N, int K, float* C) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ __align__(8) uint64_t full[2], empty[2];
  const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, tiles = (K + 63) / 64;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) { mbar_init(sa(full + i), 1); mbar_init(sa(empty + i), 128); }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128)
      for (int t = 0; t < tiles; ++t) {
        int st = t & 1;
        mbar_wait(sa(empty + st), ((t >> 1) & 1) ^ 1);
        mbar_expect(sa(full + st), 16384);
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
          :: "r"(sa(s + st * 16384)), "l"(&ma), "r"(t * 64), "r"(m0), "r"(sa(full + st)) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
          :: "r"(sa(s + st * 16384 + 8192)), "l"(&mb), "r"(t * 64), "r"(n0), "r"(sa(full + st)) : "memory");
      }
  } else {
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 0;
    auto desc = [](uint32_t a) { return (uint64_t)((a & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62; };
    for (int t = 0; t < tiles; ++t) {
      int st = t & 1;
      mbar_wait(sa(full + st), (t >> 1) & 1);
      wg_fence();
      for (int k = 0; k < 4; ++k) wg_bf16(d, desc(sa(s + st * 16384 + k * 32)), desc(sa(s + st * 16384 + 8192 + k * 32)), 1);
      wg_commit();
      wg_wait<0>();
      mbar_arrive(sa(empty + st));
    }
    int w = threadIdx.x / 32, l = threadIdx.x & 31;
    for (int i = 0; i < 32; ++i) {
      int r = m0 + w * 16 + l / 4 + (i / 2 % 2) * 8, c = n0 + (i / 4) * 8 + (l % 4) * 2 + i % 2;
      if (r < M && c < N) C[(size_t)r * N + c] = d[i];
    }
  }
}
// Two blocks each fetch half of the data and multicast it to both; then each
// tells the other through the other's mbarrier that it has read everything.
extern "C" __global__ void __cluster_dims__(2, 1, 1) multicast(const int* in, int* out) {
  __shared__ __align__(128) int s[64];
  __shared__ __align__(8) uint64_t full, done;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) { mbar_init(sa(&full), 1); mbar_init(sa(&done), 32); mbar_expect(sa(&full), 256); asm volatile("fence.mbarrier_init.release.cluster;"); }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
      :: "r"(sa(s + rank * 32)), "l"(in + blockIdx.x * 32), "r"(128), "r"(sa(&full)), "h"((uint16_t)3) : "memory");
  mbar_wait(sa(&full), 0);
  int v = s[threadIdx.x] + s[63 - threadIdx.x];
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(sa(&done)), "r"(rank ^ 1));
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(remote) : "memory");
  mbar_wait(sa(&done), 0);
  out[blockIdx.x * 32 + threadIdx.x] = v;
}
