// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What crosses from the convolution operators to their kernels. Activations are NHWC, weights KRSC, of one dtype:
// BFloat16, Float16, or Float32, which CUDA multiplies as TF32. On the CPU weights may be Float32 beside any of them.
// "acc" is float.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"

namespace resnet_fused {

// What shapes a device's native convolutions take.
struct ConvLimits {
  int64_t channel_multiple;
  int64_t channels;
  int64_t taps;  // per dimension
  int64_t stride;
  int64_t pixels;  // of all images
};

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
  DType weight_dtype;
  const void* packed;  // null, or what `pack` made of the weight, which is then not read; CPU
  const void* bias;    // null, or [K] acc
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
  DType weight_dtype;
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

// dgrad and wgrad from one read of what forms dy, and of x.
struct BackwardParams {
  ConvShape shape;
  DType dtype;
  OutputGradient grad;  // with y
  const void* weight;
  const void* x;
  const void* coefficients;  // null, or [4, C] acc: as in fprop, and as dgrad's of a mask that is x
  const void* addend;        // null, or like dx: added
  void* dx;
  void* sums;        // [tiles, 2, C] acc, where there are coefficients; tiles = one_read_tiles
  float* workspace;  // [tiles, K, C]
  void* dw;          // [K, C]
  DType dw_dtype;
};

// One device's convolutions. Every entry returns after the work is enqueued (CPU: done).
struct ConvBackend {
  ConvLimits limits;
  bool (*multiplies)(DType);                        // whether convolutions of this dtype are native here
  int64_t (*fprop_tiles)(const ConvShape&, DType);  // by shape and dtype alone, as dgrad's
  int64_t (*dgrad_tiles)(const ConvShape&, DType);
  int64_t (*wgrad_workspace)(const ConvShape&, DType, DType dw);  // floats
  void (*fprop)(const FpropParams&);
  void (*dgrad)(const DgradParams&);
  void (*wgrad)(const WgradParams&);
  // Why none of these runs on the device of this index, empty if they do; null where that is no question.
  const std::string& (*reason)(int device);
  // Weights as fprop multiplies them, whatever the size of its input; null where a device packs nothing.
  int64_t (*packed_bytes)(const ConvShape&, DType);
  void (*pack)(const FpropParams&, void* packed);
  // By which algorithm fprop in inference multiplies, with weights as they are given or `packed`; null where there is one.
  const char* (*algorithm)(const ConvShape&, DType, bool packed);
  // In how many tiles `backward` leaves its sums, by shape and dtype alone; 0 where it does not take them. Null where
  // a device has none.
  int64_t (*one_read_tiles)(const ConvShape&, DType);
  void (*backward)(const BackwardParams&);
};

const ConvBackend& cpu_conv_backend();
const ConvBackend* cuda_conv_backend();  // null in a build without csrc/cuda

}  // namespace resnet_fused
