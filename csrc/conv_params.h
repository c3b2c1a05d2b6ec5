// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What crosses from the convolution operators to their kernels. Activations are NHWC, weights KRSC, both of one dtype:
// BFloat16, Float16, or Float32, which is multiplied as TF32. "acc" is float.
#pragma once

#include <cstdint>

#include "params.h"

namespace resnet_fused {

// What shapes the native convolutions take.
inline constexpr int64_t kChannelMultiple = 8;  // 16 bytes of 16-bit values; the same for float32
inline constexpr int64_t kMostChannels = 2048;  // the prologue's tables have to fit into shared memory
inline constexpr int64_t kMostTaps = 7;         // per dimension
inline constexpr int64_t kMostPixels = (int64_t{1} << 31) - 1024;  // kernels count them in 32 bits, a stage too far

// A 2-d convolution by the names of the literature: x [N, H, W, C], weight [K, R, S, C], y [N, P, Q, K].
struct ConvShape {
  int n, h, w, c;
  int k, r, s;
  int p, q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct FpropParams {
  ConvShape shape;
  DType dtype;
  const void* x;
  const void* coefficients;  // null, or [4, C] acc: the convolution reads relu(scale*x + shift), padding stays 0
  const void* weight;
  const void* bias;  // null, or [K] acc
  void* y;
  void* statistics;  // [tiles, 3, K] acc of the stored y, tiles = fprop_tiles
  // Instead of bias and statistics: z = relu(scale*y + shift + shortcut).
  const void* affine;    // null, or [4, K] acc
  const void* shortcut;  // null, or like y
  bool relu;
};

// The gradient of a convolution's output: g itself, or a batch norm's a*g + b*y + c.
struct OutputGradient {
  const void* g;
  const void* y = nullptr;                      // null: g itself
  const void* backward_coefficients = nullptr;  // [5, K] acc
};

struct DgradParams {
  ConvShape shape;
  DType dtype;
  OutputGradient grad;
  const void* weight;
  void* dx;
  const void* addend;  // null, or like dx: added
  // Null, or: dx is stopped where scale*y + shift, stored, is not above 0, and summed for y's batch norm.
  const void* mask_y;
  const void* mask_coefficients;  // [4, C] acc
  void* sums;                     // [tiles, 2, C] acc: dx, dx*(mask_y - mean); tiles = dgrad_tiles
};

struct WgradParams {
  ConvShape shape;
  DType dtype;
  OutputGradient grad;
  const void* x;
  const void* coefficients;  // null, or [4, C] acc, as in fprop
  float* workspace;          // wgrad_workspace floats
  void* dw;                  // [K, R, S, C]
  DType dw_dtype;
};

// One device's convolutions. Every entry returns after the work is enqueued.
struct ConvBackend {
  int64_t (*fprop_tiles)(const ConvShape&);  // by shape alone, as dgrad's
  int64_t (*dgrad_tiles)(const ConvShape&);
  int64_t (*wgrad_workspace)(const ConvShape&, DType dw);  // floats
  void (*fprop)(const FpropParams&);
  void (*dgrad)(const DgradParams&);
  void (*wgrad)(const WgradParams&);
};

#ifdef RESNET_FUSED_WITH_CUDA
const ConvBackend& cuda_conv_backend();
#endif

}  // namespace resnet_fused
