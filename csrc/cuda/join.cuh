// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The forward value of a join and the gradient behind its ReLU: one definition, so that backward finds the signs that
// forward saw.
#pragma once

#include "launch.cuh"

namespace resnet_fused::cuda {

inline constexpr int kPerBranch = 2;  // coefficients: scale, shift

template <Shortcut kShortcut>
inline constexpr int kJoinCoefficients = kShortcut == Shortcut::kAffine ? 2 * kPerBranch : kPerBranch;

// scale * y + shift (+ shortcut) of element e; coefficients: scale, shift and, for a shortcut with its own affine, its
// scale and shift.
template <Shortcut kShortcut, class Acc, class Coefficient>
__device__ Acc join(Coefficient coefficient, int e, Acc y, Acc shortcut) {
  const Acc v = fma(coefficient(0, e), y, coefficient(1, e));
  if constexpr (kShortcut == Shortcut::kPlain) return v + shortcut;
  if constexpr (kShortcut == Shortcut::kAffine) return v + fma(coefficient(2, e), shortcut, coefficient(3, e));
  return v;
}

template <class Acc>
__device__ Acc relu_of(Acc v) {
  return v < Acc(0) ? Acc(0) : v;  // a NaN passes, as in eager
}

template <Shortcut kShortcut, class Acc>
void fill_join_coefficients(const Acc** c, int64_t channels, const void* coefficients, const ShortcutInput& shortcut) {
  const auto* own = static_cast<const Acc*>(coefficients);
  c[0] = own + kScale * channels;
  c[1] = own + kShift * channels;
  if constexpr (kShortcut == Shortcut::kAffine) {
    const auto* other = static_cast<const Acc*>(shortcut.coefficients);
    c[2] = other + kScale * channels;
    c[3] = other + kShift * channels;
  }
}

// The inputs of every backward kernel, in this order. The shortcut's slot is null where the ReLU's mask does not come
// from it and no second batch norm needs it.
enum BackwardInput : int { kGrad = 0, kY = 1, kZ = 2, kShortcutInput = 3 };

template <Shortcut kShortcut>
inline constexpr int kBackwardInputs = kShortcut == Shortcut::kNone ? 3 : 4;

template <Shortcut kShortcut, class Value>
void fill_backward_inputs(const Value** inputs, const void* grad, const void* y, const ReluMask& mask,
                          const ShortcutInput& shortcut) {
  inputs[kGrad] = static_cast<const Value*>(grad);
  inputs[kY] = static_cast<const Value*>(y);
  inputs[kZ] = static_cast<const Value*>(mask.relu ? mask.z : nullptr);
  if constexpr (kShortcut != Shortcut::kNone) inputs[kShortcutInput] = static_cast<const Value*>(shortcut.data);
}

// The gradient behind the ReLU. As in eager, a NaN in front of it lets the gradient pass.
template <class T, Shortcut kShortcut, int kWidth, class Coefficient>
__device__ void masked_grad(bool relu, bool from_output, const Vector<typename T::Value, kWidth>* raw,
                            Coefficient coefficient, typename T::Acc (&g)[kWidth]) {
  using Acc = typename T::Acc;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) g[e] = T::load(raw[kGrad][e]);
  if (!relu) return;
  if (from_output) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (T::load(raw[kZ][e]) <= Acc(0)) g[e] = 0;
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    Acc shortcut = 0;
    if constexpr (kShortcut != Shortcut::kNone) shortcut = T::load(raw[kShortcutInput][e]);
    const Acc z = join<kShortcut>(coefficient, e, T::load(raw[kY][e]), shortcut);
    if (z <= T::kLargestZero) g[e] = 0;  // what forward stored as zero was stopped
  }
}

}  // namespace resnet_fused::cuda
