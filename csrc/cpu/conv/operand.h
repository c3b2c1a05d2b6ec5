// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The operators' parameters as the kernels' operands.
#pragma once

#include "../../conv_params.h"
#include "kernels.h"

namespace resnet_fused::cpu {

inline int64_t bytes_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }

// x, or relu(scale*x + shift).
inline Operand activation_operand(DType dtype, int64_t channels, const void* x, const void* coefficients) {
  Operand o{dtype, Prologue::kNone, channels, x, nullptr, nullptr, nullptr, nullptr};
  if (coefficients) {
    const auto* table = static_cast<const float*>(coefficients);
    o.prologue = Prologue::kActivation;
    o.first = table + kScale * channels, o.second = table + kShift * channels;
  }
  return o;
}

// g, or a*g + b*y + c.
inline Operand gradient_operand(DType dtype, int64_t channels, const OutputGradient& grad) {
  Operand o{dtype, Prologue::kNone, channels, grad.g, grad.y, nullptr, nullptr, nullptr};
  if (grad.backward_coefficients) {
    const auto* table = static_cast<const float*>(grad.backward_coefficients);
    o.prologue = Prologue::kGradient;
    o.first = table + kA * channels, o.second = table + kB * channels, o.third = table + kC * channels;
  }
  return o;
}

}  // namespace resnet_fused::cpu
