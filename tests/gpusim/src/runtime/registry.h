// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the compiled code registered: fat binaries, kernels and variables.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <unordered_map>

#include "gpusim/ptx.h"

namespace gpusim::runtime {

struct Binary {
  const void* data = nullptr;  // the container
  std::string origin;          // the shared object it came from
  bool relocatable = false;    // -rdc=true: would need a device linker
  std::string owned;           // a copy, for cudaLibraryLoadData
  // Filled on first use:
  bool loaded = false;
  std::shared_ptr<Module> module;
  int ptx_arch = 0;            // of the image that was chosen
  cudaError_t error = cudaSuccess;
};

struct Kernel {
  Binary* binary = nullptr;
  std::string name;
  const void* host = nullptr;
  int max_dynamic_shared = -1;  // cudaFuncSetAttribute; -1: not asked
  int preferred_carveout = -1;
  bool non_portable_cluster = false;
  bool have_info = false;
  KernelInfo info;
};

// Host stub or cudaKernel_t to kernel; nullptr: neither.
Kernel* find_kernel(const void* function);
// Parses the module if need be and fills kernel->info. Reports problems itself.
cudaError_t load(Kernel* kernel);
bool symbol_address(const void* symbol, void** address, size_t* bytes);

std::string demangle(const std::string& name);

}  // namespace gpusim::runtime
