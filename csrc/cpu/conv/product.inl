// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Float products whose results go from the registers through the epilogue: what a tile stores and reads of tensors
// passes while the next is multiplied. The microkernel, which leaves its results in cache, makes memory and arithmetic
// wait for each other. Included by kernels.inl; for AVX-512, whose 32 registers hold a tile.

#ifdef RESNET_FUSED_AVX512

// 7 pixels by a panel: 28 registers of sums and 4 of weights; 7 divides the rows of 56, 28, 14 and 7 pixels.
constexpr int kTilePixels = 7;

template <int kPixels, class Piece>
RESNET_FUSED_INLINE void multiply_tile(const Products& products, int64_t pixel, Piece& piece) {
  using V = Float<16>;
  constexpr int kVectors = kPanel / 16;
  V sums[kPixels][kVectors]{};
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.prefetch(pixel + i, j);
  }
  for (int run = 0; run < products.count; ++run) {
    const float* a = static_cast<const float*>(products.runs[run].a) + (products.first + pixel) * products.pixel_pitch;
    const auto* b = static_cast<const float*>(products.runs[run].b);
    for (int64_t k = 0; k < products.runs[run].depth; ++k, b += kPanel) {
      V weights[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) weights[j] = load_raw<V>(b + j * 16);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) {
        const float x = a[i * products.pixel_pitch + k];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] += x * weights[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.finish(pixel + i, j, sums[i][j]);
  }
}

template <class Epilogue>
void multiply_panel(const Products& products, const Epilogue& e, const Pixels& pixels, int64_t channel,
                    PanelSums* sums) {
  dispatch_epilogue<Float32>(e, sums, [&](auto kind) {
    typename decltype(kind)::template Piece<16, kPanel / 16> piece(e, pixels, channel, sums, 0);
    int64_t p = 0;
    for (; p + kTilePixels <= pixels.count; p += kTilePixels) multiply_tile<kTilePixels>(products, p, piece);
    for (; p + 3 <= pixels.count; p += 3) multiply_tile<3>(products, p, piece);
    for (; p < pixels.count; ++p) multiply_tile<1>(products, p, piece);
    piece.save(sums, 0);
  });
}

constexpr auto kProductForward = multiply_panel<ForwardEpilogue>;
constexpr auto kProductBackward = multiply_panel<BackwardEpilogue>;

#else

constexpr decltype(ConvKernels::multiply_forward) kProductForward = nullptr;
constexpr decltype(ConvKernels::multiply_backward) kProductBackward = nullptr;

#endif
