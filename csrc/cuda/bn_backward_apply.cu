// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Batch norm's gradient dy = a*g + b*y + c of one or two branches, g being the gradient behind the ReLU. Reads the
// gradient, y, and what the mask or the second branch needs of the shortcut once; writes one or two gradients once.
#include "elementwise.cuh"
#include "join.cuh"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

// With an affine shortcut both branches: the one case in which a shortcut has a batch norm of its own.
template <class T, Shortcut kShortcut>
struct BackwardApply {
  using Storage = T;
  using Value = typename T::Value;
  using Acc = typename T::Acc;
  static constexpr bool kPair = kShortcut == Shortcut::kAffine;
  static constexpr int kJoin = kJoinCoefficients<kShortcut>;
  static constexpr int kInputs = kBackwardInputs<kShortcut>;
  static constexpr int kOutputs = kPair ? 2 : 1;
  static constexpr int kCoefficients = kJoin + (kPair ? 6 : 3);

  const Value* inputs[kInputs];
  Value* outputs[kOutputs];
  const Acc* coefficients[kCoefficients];
  bool relu, from_output, statistics[kOutputs];

  explicit BackwardApply(const BackwardApplyParams& p) : relu(p.mask.relu), from_output(p.mask.z != nullptr) {
    const bool recomputes = relu && !from_output;
    fill_backward_inputs<kShortcut>(inputs, p.grad, p.batch_statistics || recomputes ? p.y : nullptr, p.mask,
                                    p.shortcut);
    if constexpr (kShortcut == Shortcut::kPlain) {
      if (!recomputes) inputs[kShortcutInput] = nullptr;
    }
    fill_join_coefficients<kShortcut>(coefficients, p.extent.channels, p.coefficients, p.shortcut);
    fill(0, p.backward_coefficients, p.batch_statistics, p.grad_y, p.extent.channels);
    if constexpr (kPair) {
      fill(1, p.shortcut_backward_coefficients, p.shortcut_batch_statistics, p.grad_shortcut, p.extent.channels);
    }
  }

  void fill(int branch, const void* backward, bool batch_statistics, void* output, int64_t channels) {
    for (int k = 0; k < 3; ++k) {
      coefficients[kJoin + 3 * branch + k] = static_cast<const Acc*>(backward) + (kA + k) * channels;
    }
    statistics[branch] = batch_statistics;
    outputs[branch] = static_cast<Value*>(output);
  }

  template <int kWidth, class Coefficient>
  __device__ void operator()(const Vector<Value, kWidth> (&raw)[kInputs], Coefficient coefficient,
                             Vector<Value, kWidth> (&result)[kOutputs]) const {
    Acc g[kWidth];
    masked_grad<T, kShortcut, kWidth>(relu, from_output, raw, coefficient, g);
    gradient<0>(g, raw[kY], coefficient, result[0]);
    if constexpr (kPair) gradient<1>(g, raw[kShortcutInput], coefficient, result[1]);
  }

  template <int kBranch, int kWidth, class Coefficient>
  __device__ void gradient(const Acc (&g)[kWidth], const Vector<Value, kWidth>& y, Coefficient coefficient,
                           Vector<Value, kWidth>& result) const {
    constexpr int k = kJoin + 3 * kBranch;
    // Constant statistics: b*y is left out rather than multiplied by b = 0, which would make NaN of an infinite y.
    if (statistics[kBranch]) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const Acc by = fma(coefficient(k + 1, e), T::load(y[e]), coefficient(k + 2, e));
        result[e] = T::store(fma(coefficient(k, e), g[e], by));
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) result[e] = T::store(coefficient(k, e) * g[e]);
    }
  }
};

}  // namespace

cudaError_t backward_apply(const BackwardApplyParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return dispatch_shortcut(p.shortcut, [&](auto shortcut) {
      return run_elementwise(BackwardApply<decltype(t), shortcut.value>(p), p.extent, stream);
    });
  });
}

}  // namespace resnet_fused::cuda
