// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The identity shortcut's gradient: out += the gradient behind the ReLU.
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

  __device__ void operator()(const Acc* c, const Acc* in, Acc* out) const {
    out[0] = in[kInputs - 1] + masked_grad<T, kShortcut>(relu, from_output, c, in);
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
