// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU's native convolutions: which algorithm computes a shape, and the memory it needs.
#include "direct.h"
#include "operand.h"
#include "scratch.h"
#include "wgrad.h"
#include "winograd.h"
#include "winograd_wgrad.h"

namespace resnet_fused::cpu {
namespace {

DirectPlan fprop_plan(const ConvShape& s, DType dtype) {
  return plan_fprop(s, static_cast<int>(bytes_of(dtype)), microkernel(dtype).pairs);
}

DirectPlan dgrad_plan(const ConvShape& s, DType dtype) {
  return plan_dgrad(s, static_cast<int>(bytes_of(dtype)), microkernel(dtype).pairs);
}

bool multiplies(DType dtype) { return microkernel(dtype).available; }

int64_t fprop_tiles(const ConvShape& s, DType dtype) {
  return winograd_applies(s, dtype) ? plan_winograd(s, true).chunks : fprop_plan(s, dtype).chunks;
}

int64_t dgrad_tiles(const ConvShape& s, DType dtype) {
  return winograd_applies(s, dtype) ? plan_winograd(s, false).chunks : dgrad_plan(s, dtype).chunks;
}

// fprop or dgrad, whose parameters name their parts alike.
template <class Params>
void convolve(const Params& p, bool forward, const Operand& source) {
  const Microkernel& kernel = microkernel(p.dtype);
  if (winograd_applies(p.shape, p.dtype)) {
    const WinogradPlan plan = plan_winograd(p.shape, forward);
    const Scratch packed(plan.packed_floats() * 4);
    transform_weights(plan, p.shape, forward, p.weight, p.weight_dtype, packed.at<float>());
    run_winograd(plan, source, kernel, packed.at<float>(), Results(p));
    return;
  }
  const DirectPlan plan = forward ? fprop_plan(p.shape, p.dtype) : dgrad_plan(p.shape, p.dtype);
  const Scratch packed(packed_bytes(plan, p.dtype));
  pack_weights(plan, p.shape, forward, p.weight, p.weight_dtype, p.dtype, kernel.pairs, packed.at());
  run_direct(plan, source, kernel, packed.at(), Results(p));
}

// Packed weights serve inputs of any size, so that what suits large ones is chosen: the filter is transformed once.
int64_t weight_bytes(const ConvShape& s, DType dtype) {
  return winograd_fits(s, dtype) ? plan_winograd(s, true).packed_floats() * 4
                                 : packed_bytes(fprop_plan(s, dtype), dtype);
}

void pack(const FpropParams& p, void* packed) {
  if (winograd_fits(p.shape, p.dtype)) {
    transform_weights(plan_winograd(p.shape, true), p.shape, true, p.weight, p.weight_dtype,
                      static_cast<float*>(packed));
  } else {
    pack_weights(fprop_plan(p.shape, p.dtype), p.shape, true, p.weight, p.weight_dtype, p.dtype,
                 microkernel(p.dtype).pairs, packed);
  }
}

void fprop_packed(const FpropParams& p, const Operand& source) {
  const Microkernel& kernel = microkernel(p.dtype);
  if (winograd_fits(p.shape, p.dtype)) {
    run_winograd(plan_winograd(p.shape, true), source, kernel, static_cast<const float*>(p.packed), Results(p));
  } else {
    run_direct(fprop_plan(p.shape, p.dtype), source, kernel, p.packed, Results(p));
  }
}

void fprop(const FpropParams& p) {
  const Operand source = activation_operand(p.dtype, p.shape.c, p.x, p.coefficients);
  p.packed ? fprop_packed(p, source) : convolve(p, true, source);
}

void dgrad(const DgradParams& p) { convolve(p, false, gradient_operand(p.dtype, p.shape.k, p.grad)); }

int64_t workspace(const ConvShape& s, DType dtype, DType) {
  return winograd_applies(s, dtype) ? winograd_wgrad_workspace(s) : wgrad_workspace(s, dtype);
}

void wgrad(const WgradParams& p) {
  const auto run = winograd_applies(p.shape, p.dtype) ? run_winograd_wgrad : run_wgrad;
  run(p, microkernel(p.dtype));
}

}  // namespace
}  // namespace resnet_fused::cpu

namespace resnet_fused {

const ConvBackend& cpu_conv_backend() {
  static const ConvBackend backend = {
      {.channel_multiple = 1, .channels = 1 << 16, .taps = 255, .stride = 255, .pixels = (int64_t{1} << 31) - 1024},
      cpu::multiplies,
      cpu::fprop_tiles,
      cpu::dgrad_tiles,
      cpu::workspace,
      cpu::fprop,
      cpu::dgrad,
      cpu::wgrad,
      cpu::weight_bytes,
      cpu::pack,
  };
  return backend;
}

}  // namespace resnet_fused
