// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Tells which image of a fat binary was chosen.
#include <cuda_runtime.h>

#include <cstdio>

__managed__ int seen;

__global__ void arch(int* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  *out = __CUDA_ARCH__ + 1;
#elif defined(__CUDA_ARCH__)
  *out = __CUDA_ARCH__;
#endif
  seen = *out;
}

int main() {
  int *device = nullptr, value = 0;
  cudaMalloc(&device, sizeof(int));
  arch<<<1, 1>>>(device);
  const cudaError_t launched = cudaGetLastError();
  cudaMemcpy(&value, device, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  std::printf("%s %d %d\n", cudaGetErrorName(launched), value, seen == value);
}
