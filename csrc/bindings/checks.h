// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Argument checks and conversions shared by the operators. Each error names the argument, what was expected and
// what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "../params.h"

namespace resnet_fused {

inline DType dtype_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::Float64;
    case at::kFloat: return DType::Float32;
    case at::kBFloat16: return DType::BFloat16;
    case at::kHalf: return DType::Float16;
    default: TORCH_CHECK_TYPE(false, name, ": expected float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline at::ScalarType acc_type(DType dtype) { return dtype == DType::Float64 ? at::kDouble : at::kFloat; }

inline void check_activation(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4, name, ": expected a [N, C, H, W] tensor, got ", t.dim(), " dimensions, ", t.sizes());
  dtype_of(t, name);
}

// A second activation: shape, dtype and device of the first, named one.
inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, ": expected the shape of ", like_name, ", ", like.sizes(),
                    ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected the device of ", like_name, ", ", like.device(),
                    ", got ", t.device());
}

// A table [rows, C] of dtype acc.
inline void check_table(const at::Tensor& t, const char* name, int64_t rows, int64_t channels, at::ScalarType acc,
                        const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == channels, name, ": expected shape [", rows, ", ",
                    channels, "], got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == acc, name, ": expected dtype ", acc, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected device ", like.device(), ", got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": expected a contiguous tensor, got strides ", t.strides());
}

inline ChannelVector channel_vector(const std::optional<at::Tensor>& t, const char* name, int64_t channels,
                                    c10::Device device) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels, name, ": expected shape [", channels, "], got ",
                    t->sizes());
  TORCH_CHECK_VALUE(t->device() == device, name, ": expected device ", device, ", got ", t->device());
  TORCH_CHECK_VALUE(t->is_contiguous(), name, ": expected a contiguous tensor, got strides ", t->strides());
  return {t->data_ptr(), dtype_of(*t, name)};
}

// The layout that the kernels walk: a tensor in its suggested memory format, copied into it if it is not dense.
struct Dense {
  at::Tensor tensor;
  at::MemoryFormat format;

  explicit Dense(const at::Tensor& t) : format(t.suggest_memory_format()) { tensor = t.contiguous(format); }

  at::Tensor conform(const at::Tensor& t) const { return t.contiguous(format); }

  Extent extent() const {
    const int64_t n = tensor.size(0), c = tensor.size(1), plane = tensor.size(2) * tensor.size(3);
    return format == at::MemoryFormat::ChannelsLast ? Extent{n * plane, c, 1} : Extent{n, c, plane};
  }
};

}  // namespace resnet_fused
