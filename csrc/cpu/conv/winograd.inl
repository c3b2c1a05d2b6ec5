// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Winograd's transformations for tiles of 2x2 and 4x4 results of a 3x3 filter (see winograd.h). Included by kernels.inl.

using V16 = Float<16>;

// One dimension of F(kTile, 3), whose products are those of polynomials at kTile + 1 points and infinity: y = A'[(G g) *
// (B' d)]. A row of B' is the polynomial of all points but its own; what that lacks of the unit is divided out of G.
template <int kTile>
struct Filtering;

// Points 0, 1, -1.
template <>
struct Filtering<2> {
  RESNET_FUSED_INLINE static void source(const V16 (&x)[4], V16 (&out)[4]) {
    out[0] = x[0] - x[2], out[1] = x[1] + x[2], out[2] = x[2] - x[1], out[3] = x[1] - x[3];
  }
  RESNET_FUSED_INLINE static void results(const V16 (&m)[4], V16 (&out)[2]) {
    out[0] = m[0] + m[1] + m[2], out[1] = m[1] - m[2] - m[3];
  }
  RESNET_FUSED_INLINE static void filter(const V16 (&g)[3], V16 (&out)[4]) {
    const V16 even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    out[0] = g[0], out[1] = even + odd, out[2] = even - odd, out[3] = g[2];
  }
  RESNET_FUSED_INLINE static void gradient(const V16 (&y)[2], V16 (&out)[4]) {
    out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = -y[1];
  }
  RESNET_FUSED_INLINE static void taps(const V16 (&m)[4], V16 (&out)[3]) {
    const V16 sum = 0.5f * (m[1] + m[2]);
    out[0] = m[0] + sum, out[1] = 0.5f * (m[1] - m[2]), out[2] = sum + m[3];
  }
};

// Points 0, a, -a, b, -b with a = 1/sqrt(2), b = sqrt(2): reciprocal, so that no power of them is large. The usual 1 and
// 2 have an error several times as large.
template <>
struct Filtering<4> {
  static constexpr float a = 0.70710678f, b = 1.41421356f;

  RESNET_FUSED_INLINE static void source(const V16 (&x)[6], V16 (&out)[6]) {
    const V16 even_a = x[4] - 2.0f * x[2], odd_a = a * x[3] - b * x[1];
    const V16 even_b = x[4] - 0.5f * x[2], odd_b = b * x[3] - a * x[1];
    out[0] = x[0] - 2.5f * x[2] + x[4];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = x[1] - 2.5f * x[3] + x[5];
  }
  RESNET_FUSED_INLINE static void results(const V16 (&m)[6], V16 (&out)[4]) {
    const V16 sum_a = m[1] + m[2], odd_a = a * (m[1] - m[2]);
    const V16 sum_b = m[3] + m[4], odd_b = b * (m[3] - m[4]);
    out[0] = m[0] + sum_a + sum_b, out[1] = odd_a + odd_b;
    out[2] = 0.5f * sum_a + 2.0f * sum_b, out[3] = 0.5f * odd_a + 2.0f * odd_b + m[5];
  }
  RESNET_FUSED_INLINE static void filter(const V16 (&g)[3], V16 (&out)[6]) {
    const V16 even_a = (-2 / 3.0f) * g[0] - (1 / 3.0f) * g[2], odd_a = (-2 / 3.0f * a) * g[1];
    const V16 even_b = (1 / 6.0f) * g[0] + (1 / 3.0f) * g[2], odd_b = (1 / 6.0f * b) * g[1];
    out[0] = g[0];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = g[2];
  }
  RESNET_FUSED_INLINE static void gradient(const V16 (&y)[4], V16 (&out)[6]) {
    const V16 even_a = y[0] + 0.5f * y[2], odd_a = a * (y[1] + 0.5f * y[3]);
    const V16 even_b = y[0] + 2.0f * y[2], odd_b = b * (y[1] + 2.0f * y[3]);
    out[0] = y[0];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = y[3];
  }
  RESNET_FUSED_INLINE static void taps(const V16 (&m)[6], V16 (&out)[3]) {
    const V16 sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    out[0] = m[0] - (2 / 3.0f) * sum_a + (1 / 6.0f) * sum_b;
    out[1] = (1 / 6.0f * b) * (m[3] - m[4]) - (2 / 3.0f * a) * (m[1] - m[2]);
    out[2] = m[5] + (1 / 3.0f) * (sum_b - sum_a);
  }
};

// The rows of T x T' from the columns of T x, each of kOut values: store(i, j, value).
template <int kIn, int kOut, class Transform, class Store>
RESNET_FUSED_INLINE void transform_rows(const V16 (&columns)[kIn][kOut], Transform transform, Store store) {
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    V16 row[kIn], out[kOut];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) row[j] = columns[j][i];
    transform(row, out);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; ++j) store(i, j, out[j]);
  }
}

// Column j of T x, whose elements are load(i, j).
template <int kIn, int kOut, class Transform, class Load>
RESNET_FUSED_INLINE void transform_column(Load load, int j, Transform transform, V16 (&out)[kOut]) {
  V16 x[kIn];
#pragma GCC unroll 6
  for (int i = 0; i < kIn; ++i) x[i] = load(i, j);
  transform(x, out);
}

// T x T'.
template <int kIn, int kOut, class Transform, class Load, class Store>
RESNET_FUSED_INLINE void transform_plane(Load load, Transform transform, Store store) {
  V16 columns[kIn][kOut];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) transform_column<kIn>(load, j, transform, columns[j]);
  transform_rows(columns, transform, store);
}

template <int kTile>
void winograd_source(const float* source, int64_t row_pitch, int64_t channels, int64_t tiles, float* out,
                     int64_t out_pitch) {
  constexpr int n = kTile + 2;
  const auto transform = [](const V16(&x)[n], V16(&y)[n]) { Filtering<kTile>::source(x, y); };
  for (int64_t c = 0; c < channels; c += 16) {
    const float* from = source + c;
    const auto load = [&](int i, int j) { return load_raw<V16>(from + i * row_pitch + j * channels); };
    V16 columns[n][n];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) transform_column<n>(load, j, transform, columns[j]);
    float* to = out + c;
    for (int64_t tile = 0; tile < tiles; ++tile, to += channels, from += kTile * channels) {
#pragma GCC unroll 4
      for (int j = 2; j < n; ++j) transform_column<n>(load, j, transform, columns[j]);
      transform_rows(columns, transform, [&](int i, int j, V16 v) { store_raw(to + (n * i + j) * out_pitch, v); });
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {  // neighbouring tiles share two columns
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) columns[j][i] = columns[kTile + j][i];
      }
    }
  }
}

template <int kTile>
void winograd_results(const float* products, int64_t pitch, int64_t width, int64_t tiles, float* out,
                      int64_t row_pitch) {
  constexpr int n = kTile + 2;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; c += 16) {
      const float* m = products + tile * kPanel + c;
      float* to = out + kTile * tile * kPanel + c;
      transform_plane<n, kTile>([&](int i, int j) { return load_raw<V16>(m + (n * i + j) * pitch); },
                                [](const V16(&x)[n], V16(&y)[kTile]) { Filtering<kTile>::results(x, y); },
                                [&](int i, int j, V16 v) { store_raw(to + i * row_pitch + j * kPanel, v); });
    }
  }
}

template <int kTile, class From, class To>
void transform_panel(const WinogradWeights& w) {
  constexpr int n = kTile + 2;
  WeightPanel tap = w.panel;
  const auto* weight = static_cast<const typename From::Value*>(w.panel.weight);
  const int64_t width = (w.panel.width + 15) / 16 * 16;
  for (int64_t k = 0; k < width; k += 16) {
    V16 taps[9][16];
    for (int t = 0; t < 9; ++t) {
      tap.weight = weight + (w.flipped ? 8 - t : t) * w.tap_pitch;
      read_weights<From>(tap, k, 0, taps[t]);
#pragma GCC unroll 16
      for (auto& row : taps[t]) row = round_to<To, 16>(row);
    }
    for (int d = 0; d < 16; ++d) {
      float* out = static_cast<float*>(w.panel.out) + d * kPanel + k;
      transform_plane<3, n>([&](int i, int j) { return taps[3 * i + j][d]; },
                            [](const V16(&x)[3], V16(&y)[n]) { Filtering<kTile>::filter(x, y); },
                            [&](int i, int j, V16 v) { store_raw(out + (n * i + j) * w.out_pitch, v); });
    }
  }
}

template <int kTile>
void winograd_weights(const WinogradWeights& w) {
  dispatch_conv_dtype(w.panel.from, [&](auto from) {
    dispatch_conv_dtype(w.panel.to, [&](auto to) { transform_panel<kTile, decltype(from), decltype(to)>(w); });
  });
}

template <int kTile>
void winograd_gradient(const float* source, int64_t row_pitch, int64_t tiles, float* out, int64_t out_pitch) {
  constexpr int n = kTile + 2;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < kPanel; c += 16) {
      const float* y = source + kTile * tile * kPanel + c;
      float* to = out + tile * kPanel + c;
      transform_plane<kTile, n>([&](int i, int j) { return load_raw<V16>(y + i * row_pitch + j * kPanel); },
                                [](const V16(&x)[kTile], V16(&z)[n]) { Filtering<kTile>::gradient(x, z); },
                                [&](int i, int j, V16 v) { store_raw(to + (n * i + j) * out_pitch, v); });
    }
  }
}

template <int kTile, class T>
void winograd_finish_rows(const WeightGradient& g, int64_t product_pitch, int64_t tap_pitch) {
  constexpr int n = kTile + 2;
  auto* dw = static_cast<typename T::Value*>(g.dw);
  for (int64_t column = 0; column < g.columns; column += 16) {  // sums are padded to 16 columns
    V16 taps[9][16] = {};
    for (int64_t row = 0; row < g.rows; ++row) {
      WeightGradient product = g;
      transform_plane<n, 3>(
          [&](int i, int j) {
            product.sums = g.sums + (n * i + j) * product_pitch;
            return sum_splits<16>(product, row, column);
          },
          [](const V16(&x)[n], V16(&y)[3]) { Filtering<kTile>::taps(x, y); },
          [&](int i, int j, V16 v) { taps[3 * i + j][row] = v; });
    }
    for (int tap = 0; tap < 9; ++tap) {
      transpose(taps[tap]);
      for (int64_t i = 0; i < 16 && column + i < g.columns; ++i) {
        auto* out = dw + (column + i) * g.column_step + tap * tap_pitch;
        if (g.rows == 16) {
          store<T, 16>(out, taps[tap][i]);
        } else {
          for (int64_t row = 0; row < g.rows; ++row) out[row] = T::store(taps[tap][i][row]);
        }
      }
    }
  }
}

template <int kTile>
void winograd_finish_weights(const WeightGradient& g, int64_t product_pitch, int64_t tap_pitch) {
  dispatch_conv_dtype(g.dtype, [&](auto t) { winograd_finish_rows<kTile, decltype(t)>(g, product_pitch, tap_pitch); });
}

template <int kTile>
constexpr WinogradKernels kWinogradKernels = {winograd_source<kTile>, winograd_results<kTile>, winograd_weights<kTile>,
                                              winograd_gradient<kTile>, winograd_finish_weights<kTile>};
