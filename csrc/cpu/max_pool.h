// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Max pooling of channels_last tensors on the CPU. On CUDA PyTorch's own is taken: no measurement says that another
// would be faster there.
#pragma once

#include "../params.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kMaxPoolTaps = 255;  // of a window: a byte says which one

struct Plane {
  int64_t height, width;
};

struct Window {
  Plane kernel, stride, padding, dilation;
};

struct MaxPoolParams {
  int64_t images, channels;
  Plane input, output;
  Window window;
  DType dtype;    // not Float64
  const void* x;  // [images, input, channels]
  void* z;        // [images, output, channels]
  uint8_t* taps;  // null, or like z: the maximum's position in its window, counted row by row
};

struct MaxPoolBackwardParams {
  int64_t images, channels;
  Plane input, output;
  Window window;
  DType dtype;
  const void* grad;     // like z
  const uint8_t* taps;  // as forward left them
  void* grad_x;         // like x
};

void run_max_pool(const MaxPoolParams&);
void run_max_pool_backward(const MaxPoolBackwardParams&);

}  // namespace resnet_fused::cpu
