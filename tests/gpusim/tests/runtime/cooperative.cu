// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Blocks that wait for each other.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>

__global__ void gather(int* values, int* sum) {
  auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) values[blockIdx.x] = blockIdx.x + 1;
  grid.sync();
  if (grid.thread_rank() == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) *sum += values[i];
}

int main() {
  int *values, *sum, host = 0;
  cudaMalloc(&values, 8 * sizeof(int));
  cudaMalloc(&sum, sizeof(int));
  cudaMemset(sum, 0, sizeof(int));
  void* arguments[] = {&values, &sum};
  const cudaError_t launched = cudaLaunchCooperativeKernel(reinterpret_cast<void*>(gather), 8, 64, arguments);
  cudaMemcpy(&host, sum, sizeof(int), cudaMemcpyDeviceToHost);
  std::printf("%s %d\n", cudaGetErrorName(launched), host);
  std::printf("%s\n", cudaGetErrorName(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(gather), 100000, 64, arguments)));
}
