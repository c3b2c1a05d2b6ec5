// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the native convolutions do around their matrix products, compiled once per instruction set: operands are read,
// transformed (prologue) and laid out for the microkernel; its float results are finished (epilogue) and stored. Each
// call is a piece of the work on one thread, small enough for the cache. No torch here.
#pragma once

#include "../../params.h"

namespace resnet_fused::cpu {

// Output channels of a product. Results of a block of pixels by so many channels stay in the first-level cache.
inline constexpr int64_t kPanel = 64;

enum class Prologue { kNone, kActivation, kGradient };

// A channels_last operand as a convolution reads it: x; relu(first*x + second); or first*x + second*y + third.
struct Operand {
  DType dtype;
  Prologue prologue;
  int64_t channels;
  const void* x;
  const void* y;
  const float* first;   // [C]: scale or a
  const float* second;  // shift or b
  const float* third;   // c
};

// Pixels first, first + step, ... of a channels_last tensor, counted through all images and rows.
struct Pixels {
  int64_t first;
  int64_t step;
  int64_t count;
};

// Sums of one panel's channels over a block of pixels, about an origin.
struct PanelSums {
  float origin[kPanel];
  float sum[kPanel];
  float second[kPanel];  // squares (statistics), or products with mask_y - mean (the sums of a batch norm's backward)
};

// fprop: y = acc + bias with its sums, or z = relu(scale*acc + shift + shortcut).
struct ForwardEpilogue {
  DType dtype;
  int64_t channels;
  const float* bias;   // null, or [K]
  const float* scale;  // null, or [K], with shift
  const float* shift;
  const void* shortcut;  // null, or like y
  bool relu;
  void* y;
};

// dgrad: dx = acc + addend, stopped where scale*mask_y + shift is not positive, with its sums.
struct BackwardEpilogue {
  DType dtype;
  int64_t channels;
  const void* addend;  // null, or like dx
  const void* mask_y;  // null, or like dx
  const float* mean;   // [C], the mask's
  const float* scale;
  const float* shift;
  void* dx;
};

// Rows of `depth` neighbouring values, `pixel_pitch` apart, by rows of a packed panel; the products are summed.
struct ProductRun {
  const void* a;
  const void* b;
  int64_t depth;
};

struct Products {
  const ProductRun* runs;
  int count;
  int64_t pixel_pitch;
  int64_t first;  // the row of the first pixel
};

// A filter tap's matrix, element (n, d) at n*stride_n + d*stride_d, as a panel of the microkernel's second operand:
// [depth, kPanel], or of pairs [depth/2, kPanel, 2], zero behind `width` and `depth`.
struct WeightPanel {
  DType from, to;
  bool pairs;
  const void* weight;
  int64_t stride_n, stride_d;
  int64_t width, depth;
  int64_t padded_depth;
  void* out;
};

// Sixteen rows of the depth of a 3x3 filter's panel in the precision of `to`, transformed: G g G' in float as one matrix
// for each of a tile's products, `out_pitch` values apart.
struct WinogradWeights {
  WeightPanel panel;
  int64_t tap_pitch;  // between the filter's taps
  bool flipped;       // the last tap first
  int64_t out_pitch;
};

// Rows [rows, columns] of wgrad's sums, added over the splits, as part of dw: element (row, column) at
// row*row_step + column*column_step, of which one is 1. At most 16 rows.
struct WeightGradient {
  DType dtype;
  const float* sums;
  int64_t splits, split_pitch;
  int64_t rows, columns, pitch;
  int64_t row_step, column_step;
  void* dw;
};

// Winograd's transformations of a row of tiles, of `tile` x `tile` results each, by (tile + 2)^2 products; float32,
// channels in multiples of 16.
struct WinogradKernels {
  // B'dB of (tile + 2)^2 pixels: out[i*out_pitch + tile*channels + c].
  void (*source)(const float* source, int64_t row_pitch, int64_t channels, int64_t tiles, float* out,
                 int64_t out_pitch);
  // A'mA of the products m[i*pitch + tile*kPanel + c], c < width: rows of results, `row_pitch` apart.
  void (*results)(const float* products, int64_t pitch, int64_t width, int64_t tiles, float* out, int64_t row_pitch);
  void (*weights)(const WinogradWeights&);
  // A dy A' of a tile's pixels, kPanel channels: out[i*out_pitch + tile*kPanel + c].
  void (*gradient)(const float* source, int64_t row_pitch, int64_t tiles, float* out, int64_t out_pitch);
  // G' m G of the products' sums, `product_pitch` apart: 3x3 taps of dw, `tap_pitch` apart.
  void (*finish_weights)(const WeightGradient&, int64_t product_pitch, int64_t tap_pitch);
};

// Products of kPanel channels, finished; null where the instruction set cannot multiply them in registers, or nobody asks.
struct PanelProducts {
  void (*forward)(const Products&, const ForwardEpilogue&, const Pixels&, int64_t channel, PanelSums* sums);
  void (*backward)(const Products&, const BackwardEpilogue&, const Pixels&, int64_t channel, PanelSums* sums);
};

struct ConvKernels {
  // Channels [channel, channel + width) of the pixels as rows of `pitch` values, zero behind the width.
  void (*load)(const Operand&, const Pixels&, int64_t channel, int64_t width, void* out, int64_t pitch);
  // The same as floats, in the operand's precision.
  void (*load_floats)(const Operand&, const Pixels&, int64_t channel, int64_t width, float* out, int64_t pitch);
  // The same as [width, pitch]: out[c*pitch + p]. Up to 15 values behind the
  // last pixel of each become zero.
  void (*load_transposed)(const Operand&, const Pixels&, int64_t channel, int64_t width, void* out, int64_t pitch);
  // The same as pairs of pixels: out[(p/2)*2*pitch + 2*c + p%2], an odd last one with zero. Nothing behind the width.
  void (*load_pairs)(const Operand&, const Pixels&, int64_t channel, int64_t width, void* out, int64_t pitch);
  // `acc` is [pixels, acc_pitch]; `sums` null, or added to.
  void (*finish_forward)(const ForwardEpilogue&, const float* acc, int64_t acc_pitch, const Pixels&, int64_t channel,
                         int64_t width, PanelSums* sums);
  void (*finish_backward)(const BackwardEpilogue&, const float* acc, int64_t acc_pitch, const Pixels&, int64_t channel,
                          int64_t width, PanelSums* sums);
  PanelProducts products_float32, products_bfloat16;
  // Products of float32, `rows` by `columns` of the second operand, at most kPanel each, as out[column*kPanel + row]; what lies
  // behind them is undefined. Null likewise.
  void (*multiply_transposed)(const Products&, int64_t rows, int64_t columns, float* out);
  // The same for few columns, whose second operand is [columns, depth].
  void (*dot_rows)(const Products&, int64_t rows, int64_t columns, float* out);
  void (*pack)(const WeightPanel&);
  void (*finish_weights)(const WeightGradient&);
  WinogradKernels winograd2, winograd4;  // of tiles of 2x2 and 4x4 results

  const WinogradKernels& winograd(int tile) const { return tile == 2 ? winograd2 : winograd4; }
};

extern const ConvKernels conv_kernels_baseline;
extern const ConvKernels conv_kernels_avx2;
extern const ConvKernels conv_kernels_avx512;
extern const ConvKernels conv_kernels_avx512_bf16;

// The ones in use, by the choice that the one-pass kernels make.
const ConvKernels& conv_kernels();

}  // namespace resnet_fused::cpu
