// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// How fprop and dgrad become matrix products, by shape alone. Pure: no torch, no threads.
//
// Both read a source plane (fprop: x; dgrad: the output's gradient) and write a target plane. The target is cut into
// parities of its step (dgrad of a strided convolution; one parity otherwise), and target pixel (i, j) of a parity reads
// source rows i*source_step + offset, one per filter row that meets it. In a padded copy of the source rows in cache,
// pixels of one filter row are neighbours, so that a filter row is one product: its rows overlap, a pixel apart, and its
// depth is taps times channels. Several target rows are one product, too: the columns between them are computed and
// dropped.
#pragma once

#include <cstdint>
#include <vector>

#include "../../conv_params.h"

namespace resnet_fused::cpu {

// Taps of one filter row that read neighbouring source pixels.
struct TapRun {
  int row, column;        // source offset of the first
  std::vector<int> taps;  // r*S + s, in the order of the source's columns
  int64_t depth;          // taps * padded channels
  int64_t weight_row;     // where its weights begin in the packed panel
};

struct Parity {
  int first_row, first_column;  // of the target
  int rows, columns;
  std::vector<TapRun> runs;
  int64_t depth;             // of all runs
  int64_t first_weight_row;  // of its packed weights, in rows of kPanel values
};

struct DirectPlan {
  // Source and target planes, N images.
  int images, source_height, source_width, source_channels, padded_channels;
  int target_height, target_width, target_channels;
  int source_step_h, source_step_w, target_step_h, target_step_w;
  std::vector<Parity> parities;

  bool pointwise;  // every target pixel reads just its own source pixel: the plane is a row of pixels
  bool in_place;   // and may read it where it lies, if there is no prologue
  // The padded copy: source columns first_column + j*column_step, `pitch` of them, in rows sorted by i % source_step_h.
  int first_row, last_row, first_column, column_step, pitch, column_stride;
  int shared_columns;  // of the padding on the right, which the next row's padding on the left stands for

  int rows_per_unit;    // target rows of a parity (pixels where pointwise) that are one product
  int units;            // of all images
  int units_per_block;  // share what is read of the weights
  int chunks;           // of blocks, each with statistics of its own
  int panels, panel_groups;

  int64_t weight_rows;     // of kPanel values, of one panel
  int64_t scratch_rows;    // of the padded copy of a unit
  int64_t scratch_values;  // of a unit
  int64_t product_rows;    // at most, of one product
  int blocks() const { return (units + units_per_block - 1) / units_per_block; }
};

// `value_bytes`: of the type that is multiplied; `pairs`: its depth has to be even.
DirectPlan plan_fprop(const ConvShape& s, int value_bytes, bool pairs);
DirectPlan plan_dgrad(const ConvShape& s, int value_bytes, bool pairs);

}  // namespace resnet_fused::cpu
