// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// New tensors for activations, gradients and workspaces: on the CPU from the memory pool.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include "../cpu/memory_pool.h"

namespace resnet_fused {

inline at::Tensor empty_pooled(const at::TensorOptions& options, at::IntArrayRef sizes, at::MemoryFormat format) {
  if (!options.device().is_cpu()) return at::empty(sizes, options.memory_format(format));
  return at::detail::empty_generic(sizes, &cpu::memory_pool(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), format);
}

inline at::Tensor empty_pooled(const at::Tensor& like, at::IntArrayRef sizes, at::MemoryFormat format) {
  return empty_pooled(like.options(), sizes, format);
}

}  // namespace resnet_fused
