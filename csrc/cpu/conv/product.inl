// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Products of floats, and of bfloat16 where AVX-512 multiplies it, whose results go from the registers through the
// epilogue: what a tile stores and reads of tensors passes while the next is multiplied. The microkernel, which leaves its
// results in cache, makes memory and arithmetic wait for each other. Included by kernels.inl; for AVX-512, whose 32
// registers hold a tile.

#if RESNET_FUSED_REGISTER == 64

// Up to 7 rows of 4 vectors: 28 registers of sums; 7 divides the rows of 56, 28, 14 and 7 pixels.
constexpr int kTileRows = 7;

// A step of the depth: what a row holds of it times vectors of 16 columns, added to their sums.
template <class T>
struct Step;

template <>
struct Step<Float32> {
  static constexpr int kDepth = 1;
  using Columns = Float<16>;

  template <int kVectors>
  RESNET_FUSED_INLINE static void add(Float<16> (&sums)[kVectors], const float* row, const Columns (&columns)[kVectors],
                                      const float*) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[j] += *row * columns[j];
  }
};

#ifdef RESNET_FUSED_AVX512_BF16

// Two values of the depth at once, paired in both operands.
template <>
struct Step<BFloat16> {
  static constexpr int kDepth = 2;
  using Columns = Word<16>;

  // By hand, since a full tile takes 28 registers, three vectors of columns and the row's pair the others: the fourth
  // vector is read from the cache for each row. Spread from memory for each vector, the pair would take more loads than
  // there are multiplications.
  template <int kVectors>
  RESNET_FUSED_INLINE static void add(Float<16> (&sums)[kVectors], const uint16_t* row,
                                      const Columns (&columns)[kVectors], const uint16_t* b) {
    uint32_t pair;
    __builtin_memcpy(&pair, row, 4);
    const Columns x = Columns{} + pair;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      if (j < 3) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sums[j]) : "v"(x), "v"(columns[j]));
      } else {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sums[j]) : "v"(x), "m"(*reinterpret_cast<const Columns*>(b + j * 32)));
      }
    }
  }
};

#endif

template <class T, int kRows, int kVectors, class Piece>
RESNET_FUSED_INLINE void multiply_tile(const Products& products, int64_t row, Piece& piece) {
  using S = Step<T>;
  using Value = typename T::Value;
  Float<16> sums[kRows][kVectors]{};
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.prefetch(row + i, j);
  }
  for (int run = 0; run < products.count; ++run) {
    const Value* a = static_cast<const Value*>(products.runs[run].a) + (products.first + row) * products.pixel_pitch;
    const auto* b = static_cast<const Value*>(products.runs[run].b);
    const Value* ahead = a + kRows * products.pixel_pitch;  // the next rows, which often lie behind these
    for (int64_t k = 0; k < products.runs[run].depth; k += S::kDepth) {
      __builtin_prefetch(ahead);
      typename S::Columns columns[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) columns[j] = load_raw<typename S::Columns>(b + j * 16 * S::kDepth);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        S::add(sums[i], a + i * products.pixel_pitch + k, columns, b);
      }
      b += kPanel * S::kDepth, ahead += kRows * S::kDepth;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) piece.finish(row + i, j, sums[i][j]);
  }
}

template <class T, int kVectors, int kRows = kTileRows, class Piece>
RESNET_FUSED_INLINE void multiply_rows(const Products& products, int64_t rows, Piece& piece) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) multiply_tile<T, kRows, kVectors>(products, row, piece);
  for (; row + 3 <= rows; row += 3) multiply_tile<T, 3, kVectors>(products, row, piece);
  for (; row < rows; ++row) multiply_tile<T, 1, kVectors>(products, row, piece);
}

template <class T, class Epilogue>
void multiply_panel(const Products& products, const Epilogue& e, const Pixels& pixels, int64_t channel,
                    PanelSums* sums) {
  dispatch_epilogue<T>(e, sums, [&](auto kind) {
    typename decltype(kind)::template Piece<16, kPanel / 16> piece(e, pixels, channel, sums, 0);
    multiply_rows<T, kPanel / 16>(products, pixels.count, piece);
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
    // 8 divides a panel's rows.
    case 1: multiply_rows<Float32, 1, 8>(products, rows, piece); break;
    case 2: multiply_rows<Float32, 2, 8>(products, rows, piece); break;
    case 3: multiply_rows<Float32, 3, 8>(products, rows, piece); break;
    case 4: multiply_rows<Float32, 4>(products, rows, piece); break;
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

// Four rows of the first operand at a time: read from memory for the first column, from the cache for the others. The
// second operand is small enough to stay there.
void dot_rows(const Products& products, int64_t rows, int64_t columns, float* out) {
  constexpr int kRows = 4;
  const int64_t depth = products.runs[0].depth, vectors = depth / 16;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int count = rows - row < kRows ? static_cast<int>(rows - row) : kRows;
    const float* a[kRows];
    for (int i = 0; i < kRows; ++i) {
      a[i] = static_cast<const float*>(products.runs[0].a) + (row + (i < count ? i : 0)) * products.pixel_pitch;
    }
    for (int64_t column = 0; column < columns; ++column) {
      const float* b = static_cast<const float*>(products.runs[0].b) + column * depth;
      Float<16> sums[kRows]{};
      for (int64_t v = 0; v < vectors; ++v) {
        const auto values = load_raw<Float<16>>(b + v * 16);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sums[i] += load_raw<Float<16>>(a[i] + v * 16) * values;
      }
      for (int i = 0; i < count; ++i) {
        float sum = 0;
        for (int lane = 0; lane < 16; ++lane) sum += sums[i][lane];
        for (int64_t k = vectors * 16; k < depth; ++k) sum += a[i][k] * b[k];
        out[column * kPanel + row + i] = sum;
      }
    }
  }
}

constexpr PanelProducts kProductsFloat32{multiply_panel<Float32, ForwardEpilogue>,
                                         multiply_panel<Float32, BackwardEpilogue>};
constexpr auto kProductTransposed = multiply_transposed_panel;
constexpr auto kDotRows = dot_rows;

#else

constexpr PanelProducts kProductsFloat32{};
constexpr decltype(ConvKernels::multiply_transposed) kProductTransposed = nullptr;
constexpr decltype(ConvKernels::dot_rows) kDotRows = nullptr;

#endif

#ifdef RESNET_FUSED_AVX512_BF16
constexpr PanelProducts kProductsBFloat16{multiply_panel<BFloat16, ForwardEpilogue>, nullptr};
#else
constexpr PanelProducts kProductsBFloat16{};
#endif
