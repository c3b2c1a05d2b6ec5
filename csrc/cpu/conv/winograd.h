// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// fprop and dgrad of 3x3 convolutions of stride 1, computed in float32, by Winograd's minimal filtering F(2x2, 3x3) and F(4x4, 3x3)
// (Lavin & Gray 2015): y = A' [(G g G') * (B' d B)] A for each tile of 2x2 or 4x4 results, d being the 4x4 or 6x6 pixels
// that they read. The products over channels are 16 or 36 matrix products over tiles: 4 or 2.25 multiplications per
// result instead of 9, and sums of C terms instead of 9*C. What is not finite may reach all results of its tile.
#pragma once

#include "../../conv_params.h"
#include "kernels.h"
#include "microkernel.h"
#include "results.h"

namespace resnet_fused::cpu {

// A plane of results, each of 3x3 source pixels. dgrad's source is the output's gradient.
struct WinogradPlan {
  int tile;  // rows and columns of its results
  int images, source_height, source_width, source_channels, padded_channels;
  int target_height, target_width, target_channels;
  int pad_h, pad_w;
  int tile_rows, tile_columns;  // of an image
  int rows_per_block, images_per_block;
  int blocks, chunks;
  int panels, panel_groups;

  int64_t tiles() const { return int64_t{images_per_block} * rows_per_block * tile_columns; }  // of a block
  int products() const { return (tile + 2) * (tile + 2); }
  int64_t packed_floats() const { return int64_t{panels} * products() * padded_channels * kPanel; }
};

// The tiles by which a convolution is the fastest, 0 where direct sums are: in fprop and dgrad; in wgrad; with weights that
// are packed once for planes of any size.
int winograd_tile(const ConvShape& s, DType dtype);
int winograd_wgrad_tile(const ConvShape& s, DType dtype);
int kept_winograd_tile(const ConvShape& s, DType dtype);

WinogradPlan plan_winograd(const ConvShape& s, bool forward, int tile);

void transform_weights(const WinogradPlan& plan, const ConvShape& s, bool forward, const void* weight, DType from,
                       DType to, float* packed);

void run_winograd(const WinogradPlan& plan, const Operand& source, const Microkernel& kernel, const float* packed,
                  const Results& results);

}  // namespace resnet_fused::cpu
