// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Between CUDA tensors and CPU tensors on the same memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <unordered_map>
#include <vector>

namespace gpusim::torch_plugin {

// The CPU side of one operator call: every CUDA tensor among the arguments is
// replaced by a CPU tensor that aliases its memory, and results are mapped back.
class Aliases {
 public:
  // A copy of the argument in which nothing is on the CUDA device any more.
  c10::IValue to_cpu(const c10::IValue& value);
  at::Tensor to_cpu(const at::Tensor& tensor);

  // An alias gives back the tensor it stands for; any other CPU tensor becomes
  // a new CUDA tensor with the same sizes and strides.
  c10::IValue to_cuda(const c10::IValue& value);
  at::Tensor to_cuda(const at::Tensor& tensor);

  // After the call: an operator may have resized what it wrote to.
  void follow_resize(const c10::IValue& original);

  // Every defined tensor seen in an argument.
  const std::vector<at::Tensor>& seen() const { return seen_; }
  c10::Device device() const { return device_.value_or(c10::Device(c10::kCUDA, 0)); }
  bool has_device() const { return device_.has_value(); }
  void set_device(c10::Device device) { device_ = device; }

  // Results already produced for CPU tensors, for capture and replay.
  const std::vector<std::pair<at::Tensor, at::Tensor>>& fresh() const { return fresh_; }
  at::Tensor original_of(const at::Tensor& alias) const;

 private:
  void follow_resize(const at::Tensor& original);
  at::Tensor sparse_to_cpu(const at::Tensor& tensor);
  at::Tensor sparse_to_cuda(const at::Tensor& tensor);

  std::optional<c10::Device> device_;
  std::vector<at::Tensor> seen_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> alias_of_;      // CUDA impl -> CPU tensor
  std::unordered_map<c10::TensorImpl*, at::Tensor> original_of_;   // CPU impl -> CUDA tensor
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_;   // CUDA storage -> CPU storage
  std::unordered_map<c10::StorageImpl*, c10::Storage> back_;       // CPU storage -> CUDA storage
  std::vector<std::pair<at::Tensor, at::Tensor>> fresh_;           // CPU result, CUDA result
};

// Copies a CPU tensor's memory, whatever its strides, into a CUDA tensor of the same strides.
void copy_memory(const at::Tensor& cuda, const at::Tensor& cpu);

}  // namespace gpusim::torch_plugin
