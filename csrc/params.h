// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What crosses from the operators (csrc/bindings) to the kernels (csrc/cpu and csrc/cuda): plain
// structs of pointers and sizes. No torch here, so that kernels compile without it.
//
// "acc" below is the accumulation type of the tensor dtype: double for Float64, float for all others.
#pragma once

#include <cstdint>

namespace resnet_fused {

enum class DType : int { Float64, Float32, BFloat16, Float16 };

// A dense [N, C, H, W] tensor as outer x channels x inner, row-major:
//   channels_last: outer = N*H*W, inner = 1;   contiguous: outer = N, inner = H*W.
struct Extent {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
  int64_t per_channel() const { return outer * inner; }
};

// Rows of a coefficients tensor [4, C] (acc): z = scale * y + shift.
enum CoefficientRow : int { kMean = 0, kInvstd = 1, kScale = 2, kShift = 3, kCoefficientRows = 4 };

// Rows of a backward coefficients tensor [5, C] (acc): dy = a * g + b * y + c.
enum BackwardRow : int { kGradWeight = 0, kGradBias = 1, kA = 2, kB = 3, kC = 4, kBackwardRows = 5 };

// Rows of a statistics tile [3, C] (acc).
enum StatisticsRow : int { kCount = 0, kTileMean = 1, kM2 = 2, kStatisticsRows = 3 };

// A per-channel vector whose dtype need not be the activations' (float32 parameters of a bfloat16 network).
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::Float32;

  constexpr explicit operator bool() const { return data != nullptr; }
};

struct StatisticsParams {
  Extent extent;
  DType dtype;
  const void* y;
  void* statistics;  // [reduction_tiles, 3, C] acc
};

struct MergeStatisticsParams {
  int64_t channels;
  int64_t tiles;
  bool double_precision;   // acc is double
  const void* statistics;  // [tiles, 3, C] acc
  void* workspace;         // [merge_groups(tiles), 3, C] acc
  void* merged;            // [1, 3, C] acc
};

struct FinalizeParams {
  int64_t channels;
  int64_t tiles;
  bool double_precision;   // acc is double
  const void* statistics;  // [tiles, 3, C] acc
  ChannelVector weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked;  // may be null
  double momentum;               // < 0: cumulative average, 1 / num_batches_tracked
  double eps;
  void* workspace;     // [merge_groups(tiles), 3, C] acc
  void* coefficients;  // [4, C] acc
};

struct CoefficientsParams {
  int64_t channels;
  bool double_precision;
  ChannelVector weight, bias, running_mean, running_var;
  double eps;
  void* coefficients;  // [4, C] acc
};

// The join's input next to y: absent, a tensor, or a tensor with its own affine (a projection shortcut).
struct ShortcutInput {
  const void* data = nullptr;
  const void* coefficients = nullptr;  // [4, C] acc
};

struct ApplyParams {
  Extent extent;
  DType dtype;
  const void* y;
  const void* coefficients;
  ShortcutInput shortcut;
  bool relu;
  void* z;
};

// How a backward kernel knows where the ReLU passed its input on: from the saved output z, or recomputed from
// what the forward read.
struct ReluMask {
  bool relu = false;
  const void* z = nullptr;  // if null: scale * y + shift (+ shortcut) > 0
};

struct BackwardReduceParams {
  Extent extent;
  DType dtype;
  const void* grad;
  const void* y;
  const void* coefficients;
  ShortcutInput shortcut;  // with coefficients: the second branch, whose third sum is formed
  ReluMask mask;
  void* masked_grad;  // null, or receives the gradient behind the ReLU
  void* activation;   // null, or receives relu(scale * y + shift); without a shortcut
  void* sums;         // [reduction_tiles, 2 or 3, C] acc: sum g, sum g*(y - mean), sum g*(shortcut - shortcut_mean)
};

struct BackwardFinalizeParams {
  int64_t channels;
  int64_t tiles;
  int64_t sums_rows;  // 2 or 3
  int64_t branch;     // 0: y's batch norm, 1: the shortcut's
  int64_t count;      // N*H*W
  bool batch_statistics;
  bool double_precision;
  const void* sums;             // [tiles, sums_rows, C] acc
  const void* coefficients;     // [4, C] acc, of this branch
  double* workspace;            // [merge_groups(tiles), 2, C]
  void* backward_coefficients;  // [5, C] acc
};

// Of a batch norm whose statistics are those of several processes.
struct BackwardMergeParams {
  int64_t channels;
  int64_t processes;
  int64_t rows;    // of a process: d_weight and d_bias of one or two branches, and the count
  int64_t branch;  // rows 2*branch and 2*branch + 1
  bool double_precision;
  const void* gathered;         // [processes, rows, C] acc
  const void* coefficients;     // [4, C] acc, of this branch
  void* backward_coefficients;  // [5, C] acc: d_weight, d_bias and a are there, b and c are written
};

struct BackwardApplyParams {
  Extent extent;
  DType dtype;
  const void* grad;
  const void* y;             // null where neither mask nor batch statistics need it
  const void* coefficients;  // for the mask
  const void* backward_coefficients;
  bool batch_statistics;  // false: dy = a * g
  ShortcutInput shortcut;
  ReluMask mask;
  void* grad_y;                                // may be grad itself
  const void* shortcut_backward_coefficients;  // null, or: write the second branch too
  bool shortcut_batch_statistics;
  void* grad_shortcut;
};

struct ReluBackwardAddParams {
  Extent extent;
  DType dtype;
  const void* grad;
  const void* y;
  const void* coefficients;
  ShortcutInput shortcut;
  ReluMask mask;
  void* out;  // out += gradient behind the ReLU
};

// One device's implementation of the vocabulary. Every entry returns after the work is enqueued (CPU: done).
struct Backend {
  int64_t (*reduction_tiles)(const Extent&);  // by shape alone
  int64_t (*merge_groups)(int64_t tiles);     // in how many groups finalize merges them first; 0: at once
  void (*statistics)(const StatisticsParams&);
  void (*merge_statistics)(const MergeStatisticsParams&);
  void (*finalize)(const FinalizeParams&);
  void (*coefficients)(const CoefficientsParams&);
  void (*apply)(const ApplyParams&);
  void (*backward_reduce)(const BackwardReduceParams&);
  void (*backward_finalize)(const BackwardFinalizeParams&);
  void (*backward_merge)(const BackwardMergeParams&);
  void (*backward_apply)(const BackwardApplyParams&);
  void (*relu_backward_add)(const ReluBackwardAddParams&);
};

const Backend& cpu_backend();
const Backend* cuda_backend();  // null in a build without csrc/cuda

}  // namespace resnet_fused
