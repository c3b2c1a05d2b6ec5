// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Clusters with distributed shared memory, and a tensor map read by TMA.
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace cg = cooperative_groups;

__global__ void exchange(int* out) {
  __shared__ int inbox;
  auto cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank();
  *cluster.map_shared_rank(&inbox, (rank + 1) % cluster.num_blocks()) = int(blockIdx.x);
  cluster.sync();
  out[blockIdx.x] = inbox;
}

constexpr int kRows = 8, kColumns = 16;

__global__ void tile(const __grid_constant__ CUtensorMap map, float* out, int x, int y) {
  __shared__ alignas(128) float box[kRows * kColumns];
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t b = uint32_t(__cvta_generic_to_shared(&barrier));
  const uint32_t s = uint32_t(__cvta_generic_to_shared(box));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b));
    asm volatile("fence.proxy.async.shared::cta;");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(int(sizeof box)));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(s),
        "l"(&map), "r"(x), "r"(y), "r"(b)
        : "memory");
  }
  __syncthreads();
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(b)
        : "memory");
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) out[i] = box[i];
}

int main() {
  int* ranks;
  cudaMalloc(&ranks, 8 * sizeof(int));
  cudaLaunchConfig_t config = {};
  config.gridDim = 8;
  config.blockDim = 1;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {4, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  std::printf("%s", cudaGetErrorName(cudaLaunchKernelEx(&config, exchange, ranks)));
  int host[8];
  cudaMemcpy(host, ranks, sizeof host, cudaMemcpyDefault);
  for (int v : host) std::printf(" %d", v);
  cluster.val.clusterDim = {3, 1, 1};
  std::printf("\n%s\n", cudaGetErrorName(cudaLaunchKernelEx(&config, exchange, ranks)));
  cudaGetLastError();

  const int height = 20, width = 24;
  std::vector<float> values(height * width);
  for (int i = 0; i < height * width; ++i) values[i] = float(i + 1);
  float *device, *out;
  cudaMalloc(&device, values.size() * sizeof(float));
  cudaMalloc(&out, kRows * kColumns * sizeof(float));
  cudaMemcpy(device, values.data(), values.size() * sizeof(float), cudaMemcpyDefault);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  CUtensorMap map;
  const cuuint64_t size[2] = {width, height}, pitch[1] = {width * sizeof(float)};
  const cuuint32_t box[2] = {kColumns, kRows}, step[2] = {1, 1};
  const CUresult encoded = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, device, size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  const int x = 12, y = 15;  // reaches past both ends
  tile<<<1, 32>>>(map, out, x, y);
  std::vector<float> got(kRows * kColumns);
  cudaMemcpy(got.data(), out, got.size() * sizeof(float), cudaMemcpyDefault);
  int wrong = 0;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = y + r < height && x + c < width;
      wrong += got[r * kColumns + c] != (inside ? values[(y + r) * width + x + c] : 0.f);
    }
  std::printf("%d %s %d\n", int(encoded), cudaGetErrorName(cudaGetLastError()), wrong);
}
