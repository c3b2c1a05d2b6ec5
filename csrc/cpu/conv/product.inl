// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Float products whose results go from the registers through the epilogue: what a tile stores and reads of tensors
// passes while the next is multiplied. The microkernel, which leaves its results in cache, makes memory and arithmetic
// wait for each other. Included by kernels.inl; for AVX-512, whose 32 registers hold a tile.

#ifdef RESNET_FUSED_AVX512

// Up to 7 rows of 4 vectors: 28 registers of sums; 7 divides the rows of 56, 28, 14 and 7 pixels.
constexpr int kTileRows = 7;

template <int kRows, int kVectors, class Piece>
RESNET_FUSED_INLINE void multiply_tile(const Products& products, int64_t row, Piece& piece) {
  using V = Float<16>;
  V sums[kRows][kVectors]{};
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.prefetch(row + i, j);
  }
  for (int run = 0; run < products.count; ++run) {
    const float* a = static_cast<const float*>(products.runs[run].a) + (products.first + row) * products.pixel_pitch;
    const auto* b = static_cast<const float*>(products.runs[run].b);
    const float* ahead = a + kRows * products.pixel_pitch;  // the next rows, which often lie behind these
    for (int64_t k = 0; k < products.runs[run].depth; ++k, b += kPanel, ahead += kRows) {
      __builtin_prefetch(ahead);
      V columns[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) columns[j] = load_raw<V>(b + j * 16);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const float x = a[i * products.pixel_pitch + k];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] += x * columns[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.finish(row + i, j, sums[i][j]);
  }
}

template <int kVectors, class Piece>
RESNET_FUSED_INLINE void multiply_rows(const Products& products, int64_t rows, Piece& piece) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) multiply_tile<kTileRows, kVectors>(products, row, piece);
  for (; row + 3 <= rows; row += 3) multiply_tile<3, kVectors>(products, row, piece);
  for (; row < rows; ++row) multiply_tile<1, kVectors>(products, row, piece);
}

template <class Epilogue>
void multiply_panel(const Products& products, const Epilogue& e, const Pixels& pixels, int64_t channel,
                    PanelSums* sums) {
  dispatch_epilogue<Float32>(e, sums, [&](auto kind) {
    typename decltype(kind)::template Piece<16, kPanel / 16> piece(e, pixels, channel, sums, 0);
    multiply_rows<kPanel / 16>(products, pixels.count, piece);
    piece.save(sums, 0);
  });
}

// Rows of sums where they can be read again.
struct StoredPiece {
  float* out;

  RESNET_FUSED_INLINE void finish(int64_t row, int j, Float<16> v) { store_raw(out + row * kPanel + j * 16, v); }
  RESNET_FUSED_INLINE void prefetch(int64_t, int) const {}
};

void multiply_transposed_panel(const Products& products, int64_t rows, int64_t columns, float* out) {
  alignas(64) float sums[kPanel * kPanel];
  StoredPiece piece{sums};
  const int64_t vectors = (columns + 15) / 16;
  switch (vectors) {
    case 1: multiply_rows<1>(products, rows, piece); break;
    case 2: multiply_rows<2>(products, rows, piece); break;
    case 3: multiply_rows<3>(products, rows, piece); break;
    case 4: multiply_rows<4>(products, rows, piece); break;
  }
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t column = 0; column < vectors * 16; column += 16) {
      Float<16> block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = load_raw<Float<16>>(sums + (row + i) * kPanel + column);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store_raw(out + (column + i) * kPanel + row, block[i]);
    }
  }
}

constexpr auto kProductForward = multiply_panel<ForwardEpilogue>;
constexpr auto kProductBackward = multiply_panel<BackwardEpilogue>;
constexpr auto kProductTransposed = multiply_transposed_panel;

#else

constexpr decltype(ConvKernels::multiply_forward) kProductForward = nullptr;
constexpr decltype(ConvKernels::multiply_backward) kProductBackward = nullptr;
constexpr decltype(ConvKernels::multiply_transposed) kProductTransposed = nullptr;

#endif
