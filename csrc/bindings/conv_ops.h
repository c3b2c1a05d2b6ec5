// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the Python module tells about the native convolutions.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>

#include "../conv_params.h"

namespace resnet_fused {

// Raises NotImplementedError for a device without.
const ConvBackend& conv_backend_of(c10::DeviceType device);

// How many tiles conv_fprop's statistics ("fprop"), conv_dgrad's sums ("dgrad"), or those of one kernel for both of
// conv_backward's passes ("one_read", 0 where there is none) have; sizes [N, C, H, W] and [K, C, R, S].
int64_t conv_tiles(c10::DeviceType device, DType dtype, const std::string& pass, at::IntArrayRef x,
                   at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

// By which algorithm the CPU's native fprop in inference multiplies.
const char* conv_algorithm(DType dtype, at::IntArrayRef x, at::IntArrayRef weight, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool packed);

}  // namespace resnet_fused
