// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU's native convolutions: which algorithm computes a shape, and the memory it needs.
#include "direct.h"
#include "operand.h"
#include "scratch.h"
#include "transposed.h"
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
  const int tile = winograd_tile(s, dtype);
  return tile ? plan_winograd(s, true, tile).chunks : fprop_plan(s, dtype).chunks;
}

int64_t dgrad_tiles(const ConvShape& s, DType dtype) {
  const int tile = winograd_tile(s, dtype);
  return tile ? plan_winograd(s, false, tile).chunks : dgrad_plan(s, dtype).chunks;
}

// The algorithms of fprop and dgrad behind one set of functions: Winograd's by tiles of some size, or direct sums, 0.
// Weights are packed for one of them.
DirectPlan direct_plan(const ConvShape& s, DType dtype, bool forward) {
  return forward ? fprop_plan(s, dtype) : dgrad_plan(s, dtype);
}

int64_t weight_bytes(const ConvShape& s, DType dtype, bool forward, int tile) {
  return tile ? plan_winograd(s, forward, tile).packed_floats() * 4
              : packed_bytes(direct_plan(s, dtype, forward), dtype);
}

template <class Params>
void pack(const Params& p, bool forward, int tile, void* packed) {
  if (tile) {
    transform_weights(plan_winograd(p.shape, forward, tile), p.shape, forward, p.weight, p.weight_dtype, p.dtype,
                      static_cast<float*>(packed));
  } else {
    pack_weights(direct_plan(p.shape, p.dtype, forward), p.shape, forward, p.weight, p.weight_dtype, p.dtype,
                 microkernel(p.dtype).pairs, packed);
  }
}

template <class Params>
void run_packed(const Params& p, bool forward, int tile, const Operand& source, const void* packed) {
  if (tile) {
    run_winograd(plan_winograd(p.shape, forward, tile), source, microkernel(DType::Float32),
                 static_cast<const float*>(packed), Results(p));
  } else {
    run_direct(direct_plan(p.shape, p.dtype, forward), source, microkernel(p.dtype), packed, Results(p));
  }
}

template <class Params>
void run(const Params& p, bool forward, const Operand& source) {
  const int tile = winograd_tile(p.shape, p.dtype);
  const Scratch packed(weight_bytes(p.shape, p.dtype, forward, tile));
  pack(p, forward, tile, packed.at());
  run_packed(p, forward, tile, source, packed.at());
}

// Weights that are packed once serve inputs of any size, so that the filter's transformation costs nothing.
int64_t kept_bytes(const ConvShape& s, DType dtype) {
  return weight_bytes(s, dtype, true, kept_winograd_tile(s, dtype));
}

void pack_to_keep(const FpropParams& p, void* packed) { pack(p, true, kept_winograd_tile(p.shape, p.dtype), packed); }

const char* algorithm(const ConvShape& s, DType dtype, bool packed) {
  if (packed ? kept_winograd_tile(s, dtype) : winograd_tile(s, dtype)) return "winograd";
  return Results::multiplies_in_inference(dtype) ? "registers" : "microkernel";
}

void fprop(const FpropParams& p) {
  if (transposed_applies(p)) return run_transposed(p);
  const Operand source = activation_operand(p.dtype, p.shape.c, p.x, p.coefficients);
  if (p.packed) {
    run_packed(p, true, kept_winograd_tile(p.shape, p.dtype), source, p.packed);
  } else {
    run(p, true, source);
  }
}

void dgrad(const DgradParams& p) { run(p, false, gradient_operand(p.dtype, p.shape.k, p.grad)); }

int64_t workspace(const ConvShape& s, DType dtype, DType) {
  return winograd_wgrad_tile(s, dtype) ? winograd_wgrad_workspace(s, dtype) : wgrad_workspace(s, dtype);
}

void wgrad(const WgradParams& p) {
  if (winograd_wgrad_tile(p.shape, p.dtype)) {
    run_winograd_wgrad(p, microkernel(DType::Float32));
  } else {
    run_wgrad(p, microkernel(p.dtype));
  }
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
      nullptr,
      cpu::kept_bytes,
      cpu::pack_to_keep,
      cpu::algorithm,
      nullptr,
      nullptr,
  };
  return backend;
}

}  // namespace resnet_fused
