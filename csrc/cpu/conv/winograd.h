// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// fprop and dgrad of 3x3 convolutions of stride 1 in float32 by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray
// 2015): y = A' [(G g G') * (B' d B)] A for each tile of 2x2 results, d being the 4x4 pixels that they read. The products
// over channels are 16 matrix products over tiles: 4 multiplications per result instead of 9, and sums of C terms
// instead of 9*C, by which the error is the smaller one. What is not finite may reach all four results of its tile.
#pragma once

#include "../../conv_params.h"
#include "kernels.h"
#include "microkernel.h"
#include "results.h"

namespace resnet_fused::cpu {

// A plane of results, each of 3x3 source pixels. dgrad's source is the output's gradient.
struct WinogradPlan {
  int images, source_height, source_width, source_channels, padded_channels;
  int target_height, target_width, target_channels;
  int pad_h, pad_w;
  int tile_rows, tile_columns;  // of an image
  int rows_per_block, images_per_block;
  int blocks, chunks;
  int panels, panel_groups;

  int64_t tiles() const { return int64_t{images_per_block} * rows_per_block * tile_columns; }  // of a block
  int64_t packed_floats() const { return int64_t{panels} * 16 * padded_channels * kPanel; }
};

// Whether the algorithm computes this convolution, and whether it is the faster one where the filter's transformation
// has to be paid for.
bool winograd_fits(const ConvShape& s, DType dtype);
bool winograd_applies(const ConvShape& s, DType dtype);

WinogradPlan plan_winograd(const ConvShape& s, bool forward);

void transform_weights(const WinogradPlan& plan, const ConvShape& s, bool forward, const void* weight, DType from,
                       float* packed);

void run_winograd(const WinogradPlan& plan, const Operand& source, const Microkernel& kernel, const float* packed,
                  const Results& results);

}  // namespace resnet_fused::cpu
