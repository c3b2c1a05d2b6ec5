// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "wgrad_plan.h"

#include <algorithm>

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kSplitSums = 1280 << 10;  // bytes of partial sums that stay in cache while pixels pass
constexpr int64_t kGroupBytes = 768 << 10;  // of a group's operands, where a thread works on them alone
constexpr int64_t kSharedBytes = 16 << 20;  // where all threads do
constexpr int kMostSplits = 8;
constexpr int kPointwiseRow = 512;  // pixels

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Positions that a dimension of `size` inputs and `outputs` outputs takes if neighbours share their padding.
int shared_pitch(int size, int outputs, int pad, int extent) {
  const int behind = outputs - 1 + extent - pad - (size - 1);
  return std::max(size + std::max({pad, behind, 0}), outputs);
}

}  // namespace

ConvShape wgrad_shape(const ConvShape& s) {
  const bool pointwise = s.r * s.s * s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  if (!pointwise) return s;
  const int rows = s.n * s.h;
  int together = 1;
  for (int i = 1; i <= rows && i * s.w <= kPointwiseRow; ++i) {
    if (rows % i == 0) together = i;
  }
  ConvShape result = s;
  result.n = 1, result.h = result.p = rows / together, result.w = result.q = s.w * together;
  return result;
}

WgradPlan plan_wgrad(const ConvShape& s, int value_bytes, bool pairs) {
  WgradPlan p{};
  p.taps = s.r * s.s;
  const int extent_h = (s.r - 1) * s.dilation_h, extent_w = (s.s - 1) * s.dilation_w;
  const bool pointwise = p.taps == 1 && s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  p.swapped = pointwise && s.k < s.c;
  p.rows_channels = p.swapped ? s.k : s.c, p.columns_channels = p.swapped ? s.c : s.k;
  p.padded_columns = (p.columns_channels + 15) / 16 * 16;

  p.lead_column = s.stride_w == 1 ? s.pad_w : 0;
  p.pitch = s.stride_w == 1 ? shared_pitch(s.w, s.q, s.pad_w, extent_w) : s.q + extent_w / s.stride_w;
  if (pairs) p.pitch = (p.pitch + 1) / 2 * 2;
  p.image_rows = s.stride_h == 1 ? shared_pitch(s.h, s.p, s.pad_h, extent_h) : s.p + extent_h / s.stride_h;
  p.phases_h = s.r == 1 ? 1 : s.stride_h, p.phases_w = s.s == 1 ? 1 : s.stride_w;
  const int phases = p.phases_h * p.phases_w;

  p.by_tiles = p.sums() * static_cast<int64_t>(sizeof(float)) > kSplitSums;
  const int64_t position_bytes = (int64_t{p.rows_channels} * phases + p.columns_channels) * value_bytes;
  const int64_t budget = std::max<int64_t>(1, (p.by_tiles ? kSharedBytes : kGroupBytes) / (position_bytes * p.pitch));
  if (budget >= p.image_rows) {
    const int fit = static_cast<int>(std::min<int64_t>(budget / p.image_rows, s.n));
    p.images_per_group = p.by_tiles ? fit : std::max(1, std::min(fit, ceil_div(s.n, kMostSplits)));
    p.rows_per_group = s.p;
    p.groups = ceil_div(s.n, p.images_per_group);
    p.lead_row = s.stride_h == 1 ? s.pad_h : 0;
    p.positions = (int64_t{p.images_per_group - 1} * p.image_rows + s.p) * p.pitch;
  } else {
    p.images_per_group = 1;
    p.rows_per_group = static_cast<int>(std::clamp<int64_t>(budget - extent_h / s.stride_h, 1, s.p));
    p.groups = s.n * ceil_div(s.p, p.rows_per_group);
    p.positions = int64_t{p.rows_per_group} * p.pitch;
  }
  p.lead = int64_t{p.lead_row} * p.pitch + p.lead_column;
  // Behind the last position: what the farthest tap reads, and what the transposition writes of a vector.
  const int64_t reach = int64_t{extent_h / s.stride_h} * p.pitch + extent_w / s.stride_w;
  p.phase_length = (p.lead + p.positions + reach + kWgradSlack + 31) / 32 * 32;
  p.row_length = p.phase_length * phases + 32;  // no power of two, or channels would share cache sets
  p.splits = p.by_tiles ? 1 : std::min(p.groups, kMostSplits);
  return p;
}

}  // namespace resnet_fused::cpu
