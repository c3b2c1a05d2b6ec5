// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The identity shortcut's gradient: out += the gradient behind the ReLU. Reads out, the gradient and what the mask
// needs once, writes out once.
#include "elementwise.cuh"
#include "join.cuh"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

template <class T, Shortcut kShortcut>
struct ReluBackwardAdd {
  using Storage = T;
  using Value = typename T::Value;
  using Acc = typename T::Acc;
  static constexpr int kInputs = kBackwardInputs<kShortcut> + 1;
  static constexpr int kOutputs = 1;
  static constexpr int kCoefficients = kJoinCoefficients<kShortcut>;

  const Value* inputs[kInputs];
  Value* outputs[kOutputs];
  const Acc* coefficients[kCoefficients];
  bool relu, from_output;

  explicit ReluBackwardAdd(const ReluBackwardAddParams& p) : relu(p.mask.relu), from_output(p.mask.z != nullptr) {
    fill_backward_inputs<kShortcut>(inputs, p.grad, from_output || !relu ? nullptr : p.y, p.mask, p.shortcut);
    if constexpr (kShortcut != Shortcut::kNone) {
      if (from_output || !relu) inputs[kShortcutInput] = nullptr;
    }
    inputs[kInputs - 1] = outputs[0] = static_cast<Value*>(p.out);
    fill_join_coefficients<kShortcut>(coefficients, p.extent.channels, p.coefficients, p.shortcut);
  }

  template <int kWidth, class Coefficient>
  __device__ void operator()(const Vector<Value, kWidth> (&raw)[kInputs], Coefficient coefficient,
                             Vector<Value, kWidth> (&result)[kOutputs]) const {
    Acc g[kWidth];
    masked_grad<T, kShortcut, kWidth>(relu, from_output, raw, coefficient, g);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) result[0][e] = T::store(T::load(raw[kInputs - 1][e]) + g[e]);
  }
};

}  // namespace

cudaError_t relu_backward_add(const ReluBackwardAddParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return p.shortcut.data ? run_elementwise(ReluBackwardAdd<decltype(t), Shortcut::kPlain>(p), p.extent, stream)
                           : run_elementwise(ReluBackwardAdd<decltype(t), Shortcut::kNone>(p), p.extent, stream);
  });
}

}  // namespace resnet_fused::cuda
