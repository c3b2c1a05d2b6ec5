// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Which devices this build has code for.
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

// Stands for all kernels, which are in the library for the same architectures.
__global__ void probe() {}

}  // namespace

cudaError_t code_version(int* version) {
  cudaFuncAttributes attributes = {};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  *version = attributes.ptxVersion;
  return status == cudaSuccess ? status : cudaGetLastError();  // which forgets it
}

std::string built_for() {
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // nvcc's, 800 for 8.0
  std::string text;
  for (const int arch : kArchs) {
    text += (text.empty() ? "" : ", ") + std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10);
  }
  return text;
}

}  // namespace resnet_fused::cuda
