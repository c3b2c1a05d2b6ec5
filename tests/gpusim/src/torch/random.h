// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Random numbers: a CUDA generator's seed and offset choose a CPU generator.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>

namespace gpusim::torch_plugin {

// A CPU generator for one operator call. The CUDA generator's offset moves on,
// so the same seed gives the same sequence and a saved state can be restored.
at::Generator cpu_generator(std::optional<at::Generator> cuda, c10::Device device);

// For operators that draw from the default generator without naming one.
class DefaultGeneratorScope {
 public:
  explicit DefaultGeneratorScope(c10::Device device);
  ~DefaultGeneratorScope();

 private:
  at::Tensor saved_;
};

}  // namespace gpusim::torch_plugin
