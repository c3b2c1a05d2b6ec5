// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CUDA backend: the kernels on PyTorch's current stream, errors as PyTorch's exceptions.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "conv/shapes.h"
#include "kernels.h"
#include "layout.h"

namespace resnet_fused {
namespace cuda {

int64_t resident_blocks(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> known;
  const int device = c10::cuda::current_device();
  const std::lock_guard lock(mutex);
  int64_t& blocks = known[{device, kernel}];
  if (blocks == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
    blocks = int64_t{multiprocessors} * (per_multiprocessor > 0 ? per_multiprocessor : 1);
  }
  return blocks;
}

cudaError_t prepare_conv(const void* kernel, int most_shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> prepared;
  const std::pair key{c10::cuda::current_device(), kernel};
  const std::lock_guard lock(mutex);
  if (prepared.count(key) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  // Compiled on the card from PTX for an older one, it has no body either.
  if (status == cudaSuccess && attributes.ptxVersion < 80) status = cudaErrorNoKernelImageForDevice;
  if (status == cudaSuccess) {  // more than 48 KB have to be asked for
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
  }
  if (status == cudaSuccess) prepared.insert(key);
  return status;
}

namespace {

template <auto kEnqueue, class Params>
void on_current_stream(const Params& p) {
  C10_CUDA_CHECK(kEnqueue(p, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace cuda

const Backend* cuda_backend() {
  static const Backend backend = {
      cuda::reduction_tiles,
      cuda::merge_groups,
      cuda::on_current_stream<cuda::statistics, StatisticsParams>,
      cuda::on_current_stream<cuda::finalize, FinalizeParams>,
      cuda::on_current_stream<cuda::coefficients, CoefficientsParams>,
      cuda::on_current_stream<cuda::apply, ApplyParams>,
      cuda::on_current_stream<cuda::backward_reduce, BackwardReduceParams>,
      cuda::on_current_stream<cuda::backward_finalize, BackwardFinalizeParams>,
      cuda::on_current_stream<cuda::backward_apply, BackwardApplyParams>,
      cuda::on_current_stream<cuda::relu_backward_add, ReluBackwardAddParams>,
  };
  return &backend;
}

const ConvBackend* cuda_conv_backend() {
  static const ConvBackend backend = {
      cuda::kConvLimits,
      [](DType dtype) { return dtype != DType::Float64; },
      [](const ConvShape& s, DType) { return cuda::fprop_tiles(s); },
      [](const ConvShape& s, DType) { return cuda::dgrad_tiles(s); },
      cuda::wgrad_workspace,
      cuda::on_current_stream<cuda::fprop, FpropParams>,
      cuda::on_current_stream<cuda::dgrad, DgradParams>,
      cuda::on_current_stream<cuda::wgrad, WgradParams>,
      nullptr,
      nullptr,
      nullptr,
  };
  return &backend;
}

}  // namespace resnet_fused
