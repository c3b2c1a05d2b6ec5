// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CUDA kernels as the host code sees them: each call enqueues its work on `stream` of the current device.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../conv_params.h"
#include "../params.h"

namespace resnet_fused::cuda {

cudaError_t statistics(const StatisticsParams& p, cudaStream_t stream);
cudaError_t merge_statistics(const MergeStatisticsParams& p, cudaStream_t stream);
cudaError_t finalize(const FinalizeParams& p, cudaStream_t stream);
cudaError_t coefficients(const CoefficientsParams& p, cudaStream_t stream);
cudaError_t apply(const ApplyParams& p, cudaStream_t stream);
cudaError_t backward_reduce(const BackwardReduceParams& p, cudaStream_t stream);
cudaError_t backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream);
cudaError_t backward_merge(const BackwardMergeParams& p, cudaStream_t stream);
cudaError_t backward_apply(const BackwardApplyParams& p, cudaStream_t stream);
cudaError_t relu_backward_add(const ReluBackwardAddParams& p, cudaStream_t stream);

// Compute capability 8.0 or later; what shapes they take is checked by csrc/bindings/conv_ops.cpp.
cudaError_t fprop(const FpropParams& p, cudaStream_t stream);
cudaError_t dgrad(const DgradParams& p, cudaStream_t stream);
cudaError_t wgrad(const WgradParams& p, cudaStream_t stream);
cudaError_t backward(const BackwardParams& p, cudaStream_t stream);

// For the launches: how many blocks of kThreads threads of `kernel` the current device runs at the same time.
int64_t resident_blocks(const void* kernel);

// For the launches: lets a convolution use up to so much shared memory on the current device, once.
cudaError_t prepare_conv(const void* kernel, int most_shared_bytes);

// What the current device's code was compiled from, 80 for 8.0; an error where the build has none that it runs.
cudaError_t code_version(int* version);
// The compute capabilities that were compiled for: 8.0, 9.0
std::string built_for();

}  // namespace resnet_fused::cuda
