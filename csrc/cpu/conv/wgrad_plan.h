// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// How wgrad becomes matrix products, by shape alone. Pure: no torch, no threads.
//
// Pixels are counted in positions: rows of `pitch`, wide enough that what a filter tap reads beside a row is zero. The
// activation is laid out channel by channel over the positions (one such plane per phase of the stride), the output's
// gradient position by position, zero where there is no output. A tap is then a constant distance between the two, and
// its gradient one product whose depth is the positions. Whole images follow each other where planes are small; large
// ones are cut into rows.
#pragma once

#include <cstdint>

#include "../../conv_params.h"

namespace resnet_fused::cpu {

// Values behind a channel's positions that products may read, multiplied by zero.
inline constexpr int64_t kWgradSlack = 32;

struct WgradPlan {
  bool swapped;          // pointwise with fewer output channels: the gradient is the operand that is transposed
  int rows_channels;     // channels of the operand that is transposed, and of the product's rows
  int columns_channels;  // the other's
  int padded_columns;    // to 16
  int taps;

  int phases_h, phases_w;     // of the stride that some tap reads
  int lead_row, lead_column;  // of the filter's padding, where rows and columns share it with their neighbours
  int pitch, image_rows;      // positions of a row, rows of an image
  int images_per_group;       // whole images; 1 where images are cut
  int rows_per_group;         // output rows
  int groups;
  int64_t lead;          // positions before the first, read by taps and zero
  int64_t positions;     // of a group: depth of its products
  int64_t phase_length;  // values per channel and phase
  int64_t row_length;    // values per channel: all phases

  int splits;     // of the groups, each with partial sums of its own; 1: channel tiles are spread over threads instead
  bool by_tiles;  // the latter

  int64_t sums() const { return int64_t{taps} * rows_channels * padded_columns; }
};

// The same gradient with pixels counted in other rows: where every output reads just its own input, rows of all images
// are joined into long ones.
ConvShape wgrad_shape(const ConvShape& s);

// For a shape that wgrad_shape gave.
WgradPlan plan_wgrad(const ConvShape& s, int value_bytes, bool pairs);

}  // namespace resnet_fused::cpu
