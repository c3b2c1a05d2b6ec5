// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Lets a CPU kernel write its results straight into simulated device memory.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include <optional>

namespace gpusim::torch_plugin {

// While one lives, CPU tensors made by this thread get guarded device memory.
class ResultMemoryScope {
 public:
  explicit ResultMemoryScope(c10::Device device);
  ~ResultMemoryScope();

 private:
  int previous_;
};

// The CPU storage's memory as a CUDA storage, if it came from such a scope. The
// CPU storage goes on pointing at the memory but no longer owns it.
std::optional<c10::Storage> adopt(const c10::Storage& cpu, c10::Device device);

}  // namespace gpusim::torch_plugin
