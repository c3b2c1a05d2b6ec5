// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Batch norm's affine map, the shortcut and the ReLU: reads y and the shortcut once, writes z once.
#include "elementwise.cuh"
#include "join.cuh"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

template <class T, Shortcut kShortcut>
struct Apply {
  using Storage = T;
  using Value = typename T::Value;
  using Acc = typename T::Acc;
  static constexpr int kInputs = kShortcut == Shortcut::kNone ? 1 : 2;
  static constexpr int kOutputs = 1;
  static constexpr int kCoefficients = kJoinCoefficients<kShortcut>;

  const Value* inputs[kInputs];
  Value* outputs[kOutputs];
  const Acc* coefficients[kCoefficients];
  bool relu;

  explicit Apply(const ApplyParams& p) : relu(p.relu) {
    inputs[0] = static_cast<const Value*>(p.y);
    if constexpr (kShortcut != Shortcut::kNone) inputs[1] = static_cast<const Value*>(p.shortcut.data);
    outputs[0] = static_cast<Value*>(p.z);
    fill_join_coefficients<kShortcut>(coefficients, p.extent.channels, p.coefficients, p.shortcut);
  }

  template <int kWidth, class Coefficient>
  __device__ void operator()(const Vector<Value, kWidth> (&raw)[kInputs], Coefficient coefficient,
                             Vector<Value, kWidth> (&result)[kOutputs]) const {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const Acc z = join<kShortcut>(coefficient, e, T::load(raw[0][e]), T::load(raw[kInputs - 1][e]));
      result[0][e] = T::store(relu ? relu_of(z) : z);
    }
  }
};

}  // namespace

cudaError_t apply(const ApplyParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return dispatch_shortcut(p.shortcut, [&](auto shortcut) {
      return run_elementwise(Apply<decltype(t), shortcut.value>(p), p.extent, stream);
    });
  });
}

}  // namespace resnet_fused::cuda
