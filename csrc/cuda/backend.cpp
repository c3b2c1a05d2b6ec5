// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CUDA backend: the kernels on PyTorch's current stream, errors as PyTorch's exceptions.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
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
  // More than 48 KB have to be asked for, and the part of the first cache for more than one block too: cp.async leaves
  // the rest of it unused.
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
  if (status == cudaSuccess) {
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (status == cudaSuccess) prepared.insert(key);
  return status;
}

namespace {

// Why kernels do not run on a device; empty where they do.
struct Reasons {
  std::string kernels, convolutions;
};

Reasons find_reasons(int device) {
  int major = 0, minor = 0, version = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const cudaError_t status = code_version(&version);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  const std::string card = "device cuda:" + std::to_string(device) + " has compute capability " + capability;
  const std::string build = "this build of resnet_fused is for " + built_for();
  const std::string again = "; build it again with TORCH_CUDA_ARCH_LIST=" + capability;
  switch (status) {
    case cudaSuccess: break;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: {  // of a driver older than nvcc
      const std::string reason = card + ", and " + build + again;
      return {reason, reason};
    }
    default: C10_CUDA_CHECK(status);
  }
  if (version >= 80) return {};  // without tensor cores their bodies are empty
  const std::string needed = card + ", and native convolutions need 8.0";
  return {"", major < 8 ? needed : needed + " or later in the build too: " + build + again};
}

const Reasons& reasons(int device) {
  static std::mutex mutex;
  static std::map<int, Reasons> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, find_reasons(device)).first->second;
}

template <auto kEnqueue, class Params, std::string Reasons::* kReason = &Reasons::kernels>
void on_current_stream(const Params& p) {
  const std::string& reason = reasons(c10::cuda::current_device()).*kReason;
  TORCH_CHECK_NOT_IMPLEMENTED(reason.empty(), reason);
  C10_CUDA_CHECK(kEnqueue(p, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace cuda

const Backend* cuda_backend() {
  static const Backend backend = {
      cuda::reduction_tiles,
      cuda::merge_groups,
      cuda::on_current_stream<cuda::statistics, StatisticsParams>,
      cuda::on_current_stream<cuda::merge_statistics, MergeStatisticsParams>,
      cuda::on_current_stream<cuda::finalize, FinalizeParams>,
      cuda::on_current_stream<cuda::coefficients, CoefficientsParams>,
      cuda::on_current_stream<cuda::apply, ApplyParams>,
      cuda::on_current_stream<cuda::backward_reduce, BackwardReduceParams>,
      cuda::on_current_stream<cuda::backward_finalize, BackwardFinalizeParams>,
      cuda::on_current_stream<cuda::backward_merge, BackwardMergeParams>,
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
      cuda::on_current_stream<cuda::fprop, FpropParams, &cuda::Reasons::convolutions>,
      cuda::on_current_stream<cuda::dgrad, DgradParams, &cuda::Reasons::convolutions>,
      cuda::on_current_stream<cuda::wgrad, WgradParams, &cuda::Reasons::convolutions>,
      [](int device) -> const std::string& { return cuda::reasons(device).convolutions; },
      nullptr,
      nullptr,
      nullptr,
      cuda::one_read_tiles,
      cuda::on_current_stream<cuda::backward, BackwardParams, &cuda::Reasons::convolutions>,
  };
  return &backend;
}

}  // namespace resnet_fused
