// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "direct_plan.h"

#include <algorithm>
#include <climits>

#include "kernels.h"

namespace resnet_fused::cpu {
namespace {

constexpr int kProductRows = 112;              // of a product: enough to hide what it costs to begin one
constexpr int kBlockRows = 256;                // of a block whose weights do not stay in cache
constexpr int64_t kCachedWeights = 512 << 10;  // bytes
constexpr int64_t kBlockScratch = 512 << 10;   // bytes
constexpr int kMostChunks = 64;
constexpr int kFewBlocks = 16;  // below, panels are spread over threads as well

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Tap {
  int offset, index;  // in the source, in the filter
};

// Source offsets of one dimension's taps for target positions first, first + step, ...
std::vector<Tap> fprop_taps(int taps, int pad, int dilation) {
  std::vector<Tap> result;
  for (int r = 0; r < taps; ++r) result.push_back({r * dilation - pad, r});
  return result;
}

// Target h of dgrad receives from source p where h = p*stride - pad + r*dilation.
std::vector<Tap> dgrad_taps(int taps, int pad, int dilation, int stride, int first) {
  std::vector<Tap> result;
  for (int r = taps - 1; r >= 0; --r) {
    const int distance = first + pad - r * dilation;
    if (distance % stride == 0) result.push_back({distance / stride, r});
  }
  return result;
}

Parity make_parity(const std::vector<Tap>& rows, const std::vector<Tap>& columns, int filter_columns, int channels) {
  Parity parity{};
  for (const Tap& row : rows) {
    for (size_t i = 0; i < columns.size(); ++i) {
      const bool follows = i > 0 && columns[i].offset == columns[i - 1].offset + 1;
      if (!follows) {
        parity.runs.push_back({row.offset, columns[i].offset, {}, 0, parity.depth});
      }
      TapRun& run = parity.runs.back();
      run.taps.push_back(row.index * filter_columns + columns[i].index);
      run.depth += channels;
      parity.depth += channels;
    }
  }
  return parity;
}

void finish(DirectPlan& p, int value_bytes, bool unit_filter) {
  int last_column = INT_MIN;
  p.first_row = p.first_column = INT_MAX;
  p.last_row = INT_MIN;
  bool one_column = true;
  int most_rows = 0, most_columns = 0, column = INT_MAX;  // the columns' common offset so far
  for (Parity& parity : p.parities) {
    parity.first_weight_row = p.weight_rows;
    p.weight_rows += parity.depth;
    most_rows = std::max(most_rows, parity.rows);
    most_columns = std::max(most_columns, parity.columns);
    for (const TapRun& run : parity.runs) {
      p.first_row = std::min(p.first_row, run.row);
      p.last_row = std::max(p.last_row, run.row);
      p.first_column = std::min(p.first_column, run.column);
      last_column = std::max(last_column, run.column + static_cast<int>(run.taps.size()) - 1);
      one_column = one_column && run.taps.size() == 1 && (column == INT_MAX || run.column == column);
      column = run.column;
    }
  }
  if (p.weight_rows == 0) p.first_row = p.last_row = p.first_column = last_column = 0;  // no tap meets the target
  const bool unit_steps = p.source_step_h * p.source_step_w * p.target_step_h * p.target_step_w == 1;
  p.pointwise = unit_filter && unit_steps && p.first_row == 0 && p.first_column == 0 &&
                p.source_height == p.target_height && p.source_width == p.target_width;
  p.in_place = p.pointwise && p.padded_channels == p.source_channels;
  p.panels = ceil_div(p.target_channels, kPanel);

  if (p.pointwise) {
    const int64_t pixels = int64_t{p.images} * p.target_height * p.target_width;
    p.rows_per_unit = kProductRows / 16 * 16;
    p.units = ceil_div(pixels, p.rows_per_unit);
    p.product_rows = p.rows_per_unit;
    p.scratch_values = int64_t{p.rows_per_unit} * p.padded_channels;
  } else {
    // A single column of taps reads every source_step_w-th pixel and no other.
    p.column_step = one_column ? p.source_step_w : 1;
    p.column_stride = one_column ? 1 : p.source_step_w;
    int columns = one_column ? most_columns : (most_columns - 1) * p.source_step_w + last_column - p.first_column + 1;
    if (!one_column && p.source_step_w == 1) {
      const int left = std::max(0, -p.first_column), right = most_columns - 1 + last_column - (p.source_width - 1);
      p.shared_columns = std::clamp(right, 0, left);
      columns -= p.shared_columns;
    }
    p.pitch = ceil_div(columns, p.column_stride) * p.column_stride;
    const int positions = p.pitch / p.column_stride;  // of a target row in the copy
    p.rows_per_unit = std::clamp((kProductRows + positions / 2) / positions, 1, most_rows);
    p.units = p.images * ceil_div(most_rows, p.rows_per_unit);
    p.product_rows = int64_t{p.rows_per_unit - 1} * positions + most_columns;
    const int source_rows = (p.rows_per_unit - 1) * p.source_step_h + p.last_row - p.first_row + 1;
    p.scratch_rows = int64_t{ceil_div(source_rows, p.source_step_h)} * p.source_step_h;
    p.scratch_values = (p.scratch_rows * p.pitch + p.shared_columns) * p.padded_channels;
  }

  const int64_t weight_bytes = p.weight_rows * p.panels * kPanel * value_bytes;
  const int64_t unit_bytes = std::max<int64_t>(1, p.scratch_values * value_bytes);
  int units_per_block = 1;
  if (weight_bytes > kCachedWeights) {
    units_per_block = ceil_div(kBlockRows, p.product_rows);
    units_per_block = std::min<int64_t>(units_per_block, std::max<int64_t>(1, kBlockScratch / unit_bytes));
  }
  p.units_per_block = std::max(1, std::min(units_per_block, p.units));
  const int blocks = p.blocks();
  p.chunks = std::max(1, std::min(blocks, kMostChunks));
  p.panel_groups = blocks >= kFewBlocks ? 1 : std::min(p.panels, ceil_div(kFewBlocks, std::max(1, blocks)));
}

int padded(int channels, bool pairs) { return pairs ? (channels + 1) / 2 * 2 : channels; }

}  // namespace

DirectPlan plan_fprop(const ConvShape& s, int value_bytes, bool pairs) {
  DirectPlan p{};
  p.images = s.n;
  p.source_height = s.h, p.source_width = s.w, p.source_channels = s.c, p.padded_channels = padded(s.c, pairs);
  p.target_height = s.p, p.target_width = s.q, p.target_channels = s.k;
  p.source_step_h = s.stride_h, p.source_step_w = s.stride_w, p.target_step_h = p.target_step_w = 1;
  Parity all = make_parity(fprop_taps(s.r, s.pad_h, s.dilation_h), fprop_taps(s.s, s.pad_w, s.dilation_w), s.s,
                           p.padded_channels);
  all.rows = s.p, all.columns = s.q;
  p.parities.push_back(std::move(all));
  finish(p, value_bytes, s.r * s.s == 1);
  return p;
}

DirectPlan plan_dgrad(const ConvShape& s, int value_bytes, bool pairs) {
  DirectPlan p{};
  p.images = s.n;
  p.source_height = s.p, p.source_width = s.q, p.source_channels = s.k, p.padded_channels = padded(s.k, pairs);
  p.target_height = s.h, p.target_width = s.w, p.target_channels = s.c;
  p.source_step_h = p.source_step_w = 1, p.target_step_h = s.stride_h, p.target_step_w = s.stride_w;
  for (int h = 0; h < std::min(s.stride_h, s.h); ++h) {
    for (int w = 0; w < std::min(s.stride_w, s.w); ++w) {
      Parity parity = make_parity(dgrad_taps(s.r, s.pad_h, s.dilation_h, s.stride_h, h),
                                  dgrad_taps(s.s, s.pad_w, s.dilation_w, s.stride_w, w), s.s, p.padded_channels);
      parity.first_row = h, parity.first_column = w;
      parity.rows = ceil_div(s.h - h, s.stride_h), parity.columns = ceil_div(s.w - w, s.stride_w);
      p.parities.push_back(std::move(parity));
    }
  }
  finish(p, value_bytes, s.r * s.s == 1);
  return p;
}

}  // namespace resnet_fused::cpu
