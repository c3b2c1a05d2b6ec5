// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Checking a launch as the real runtime does, and running it.
#pragma once

#include <cuda_runtime_api.h>

#include "registry.h"

namespace gpusim::runtime {

struct LaunchRequest {
  dim3 grid{1, 1, 1}, block{1, 1, 1}, cluster{1, 1, 1};
  size_t shared = 0;
  bool cooperative = false;
};

cudaError_t check_launch(const Kernel& kernel, const LaunchRequest& request);
cudaError_t run_kernel(const Kernel& kernel, const LaunchRequest& request, void** args);

// Blocks of this shape that fit one multiprocessor at once; 0: none.
int blocks_per_sm(const Kernel& kernel, int block_threads, size_t dynamic_shared);
int assumed_registers(const Kernel& kernel);
size_t dynamic_shared_limit(const Kernel& kernel);

}  // namespace gpusim::runtime
