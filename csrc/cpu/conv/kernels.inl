// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the native convolutions do around their matrix products; see kernels.h. Data movement: every function reads its
// tensors and writes its result once; what it leaves for the microkernel, and what that left for it, is in cache.
#include "vector.inl"

namespace resnet_fused::cpu {
namespace {

template <class Call>
RESNET_FUSED_INLINE void dispatch_conv_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float32: return call(Float32{});
    case DType::BFloat16: return call(BFloat16{});
    case DType::Float16: return call(Float16{});
    case DType::Float64: return;  // no native convolution
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <class Call>
RESNET_FUSED_INLINE void dispatch_flag(bool value, Call call) {
  value ? call(Flag<true>{}) : call(Flag<false>{});
}

template <Prologue kPrologue>
struct PrologueConstant {
  static constexpr Prologue value = kPrologue;
};

template <class Call>
RESNET_FUSED_INLINE void dispatch_prologue(Prologue prologue, Call call) {
  switch (prologue) {
    case Prologue::kNone: return call(PrologueConstant<Prologue::kNone>{});
    case Prologue::kActivation: return call(PrologueConstant<Prologue::kActivation>{});
    case Prologue::kGradient: return call(PrologueConstant<Prologue::kGradient>{});
  }
}

// ---- operands --------------------------------------------------------------------------------------------------

// Channels [c, c + kLanes) of a pixel, as the convolution reads them.
template <class T, Prologue kPrologue, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> read(const Operand& o, int64_t pixel, int64_t c) {
  const int64_t at = pixel * o.channels + c;
  Float<kLanes> v = load<T, kLanes>(static_cast<const typename T::Value*>(o.x) + at);
  if constexpr (kPrologue != Prologue::kNone) {
    const auto first = load_raw<Float<kLanes>>(o.first + c), second = load_raw<Float<kLanes>>(o.second + c);
    if constexpr (kPrologue == Prologue::kActivation) {
      v = relu(v * first + second);
    } else {
      const auto y = load<T, kLanes>(static_cast<const typename T::Value*>(o.y) + at);
      v = first * v + (second * y + load_raw<Float<kLanes>>(o.third + c));
    }
  }
  return v;
}

template <class T, Prologue kPrologue>
void load_pixels(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out_data,
                 int64_t pitch) {
  auto* out = static_cast<typename T::Value*>(out_data);
  for (int64_t p = 0; p < pixels.count; ++p, out += pitch) {
    const int64_t pixel = pixels.first + p * pixels.step;
    if constexpr (kPrologue == Prologue::kNone) {
      __builtin_memcpy(out, static_cast<const typename T::Value*>(o.x) + pixel * o.channels + channel,
                       width * sizeof(typename T::Value));
    } else {
      for_lanes(width, [&](auto lanes, int64_t c) {
        store<T, lanes.value>(out + c, read<T, kPrologue, lanes.value>(o, pixel, channel + c));
      });
    }
    for (int64_t c = width; c < pitch; ++c) out[c] = 0;
  }
}

void load(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out, int64_t pitch) {
  dispatch_conv_dtype(o.dtype, [&](auto t) {
    dispatch_prologue(o.prologue, [&](auto prologue) {
      load_pixels<decltype(t), prologue.value>(o, pixels, channel, width, out, pitch);
    });
  });
}

template <class T, Prologue kPrologue>
void load_pixels_transposed(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out_data,
                            int64_t pitch) {
  auto* out = static_cast<typename T::Value*>(out_data);
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) {
    int64_t p = 0;
    for (; p + 16 <= pixels.count; p += 16) {
      Float<16> block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = read<T, kPrologue, 16>(o, pixels.first + (p + i) * pixels.step, channel + c);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store<T, 16>(out + (c + i) * pitch + p, block[i]);
    }
    if (p < pixels.count) {
      Float<16> block[16] = {};
      for (int64_t i = 0; p + i < pixels.count; ++i) {
        block[i] = read<T, kPrologue, 16>(o, pixels.first + (p + i) * pixels.step, channel + c);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store<T, 16>(out + (c + i) * pitch + p, block[i]);
    }
  }
  for (; c < width; ++c) {
    for (int64_t p = 0; p < pixels.count; ++p) {
      store<T, 1>(out + c * pitch + p, read<T, kPrologue, 1>(o, pixels.first + p * pixels.step, channel + c));
    }
  }
}

void load_transposed(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out, int64_t pitch) {
  dispatch_conv_dtype(o.dtype, [&](auto t) {
    dispatch_prologue(o.prologue, [&](auto prologue) {
      load_pixels_transposed<decltype(t), prologue.value>(o, pixels, channel, width, out, pitch);
    });
  });
}

template <class T, Prologue kPrologue>
void load_pixel_pairs(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out_data,
                      int64_t pitch) {
  if constexpr (sizeof(typename T::Value) == 2) {
    auto* out = static_cast<uint32_t*>(out_data);
    for (int64_t p = 0; p < pixels.count; p += 2, out += pitch) {
      const int64_t even = pixels.first + p * pixels.step, odd = even + pixels.step;
      const bool whole = p + 1 < pixels.count;
      for_lanes(width, [&](auto lanes, int64_t c) {
        constexpr int kLanes = lanes.value;
        const auto bits = [&](int64_t pixel) {
          return narrow<T, kLanes>(read<T, kPrologue, kLanes>(o, pixel, channel + c));
        };
        store_raw(out + c, whole ? bits(even) | (bits(odd) << 16) : bits(even));
      });
    }
  }
}

void load_pairs(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out, int64_t pitch) {
  dispatch_conv_dtype(o.dtype, [&](auto t) {
    dispatch_prologue(o.prologue, [&](auto prologue) {
      load_pixel_pairs<decltype(t), prologue.value>(o, pixels, channel, width, out, pitch);
    });
  });
}

// ---- results ---------------------------------------------------------------------------------------------------

template <class T, bool kAffine, bool kShortcut, bool kRelu, bool kSums, int kLanes>
RESNET_FUSED_INLINE void finish_forward_lanes(const ForwardEpilogue& e, const float* acc, int64_t acc_pitch,
                                              const Pixels& pixels, int64_t channel, int64_t i, PanelSums* sums) {
  using V = Float<kLanes>;
  using Value = typename T::Value;
  const int64_t c = channel + i;
  V scale{}, shift{}, origin{}, sum{}, second{};
  if constexpr (kAffine) {
    scale = load_raw<V>(e.scale + c), shift = load_raw<V>(e.shift + c);
  } else if (e.bias) {
    shift = load_raw<V>(e.bias + c);
  }
  if constexpr (kSums) {
    origin = load_raw<V>(sums->origin + i), sum = load_raw<V>(sums->sum + i), second = load_raw<V>(sums->second + i);
  }
  const int64_t step = pixels.step * e.channels;
  Value* y = static_cast<Value*>(e.y) + pixels.first * e.channels + c;
  const Value* shortcut = kShortcut ? static_cast<const Value*>(e.shortcut) + pixels.first * e.channels + c : nullptr;
  for (int64_t p = 0; p < pixels.count; ++p) {
    V v = load_raw<V>(acc + p * acc_pitch + i);
    v = kAffine ? v * scale + shift : v + shift;
    if constexpr (kShortcut) v += load<T, kLanes>(shortcut + p * step);
    if constexpr (kRelu) v = relu(v);
    store<T, kLanes>(y + p * step, v);
    if constexpr (kSums) {
      const V d = round_to<T, kLanes>(v) - origin;
      sum += d;
      second += d * d;
    }
  }
  if constexpr (kSums) store_raw(sums->sum + i, sum), store_raw(sums->second + i, second);
}

void finish_forward(const ForwardEpilogue& e, const float* acc, int64_t acc_pitch, const Pixels& pixels,
                    int64_t channel, int64_t width, PanelSums* sums) {
  dispatch_conv_dtype(e.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto affine, auto shortcut, auto relu, auto with_sums) {
      for_lanes(width, [&](auto lanes, int64_t i) {
        finish_forward_lanes<T, affine.value, shortcut.value, relu.value, with_sums.value, lanes.value>(
            e, acc, acc_pitch, pixels, channel, i, sums);
      });
    };
    if (sums) return run(Flag<false>{}, Flag<false>{}, Flag<false>{}, Flag<true>{});
    dispatch_flag(e.scale != nullptr, [&](auto affine) {
      dispatch_flag(e.shortcut != nullptr, [&](auto shortcut) {
        dispatch_flag(e.relu, [&](auto relu) { run(affine, shortcut, relu, Flag<false>{}); });
      });
    });
  });
}

template <class T, bool kAddend, bool kMask, int kLanes>
RESNET_FUSED_INLINE void finish_backward_lanes(const BackwardEpilogue& e, const float* acc, int64_t acc_pitch,
                                               const Pixels& pixels, int64_t channel, int64_t i, PanelSums* sums) {
  using V = Float<kLanes>;
  using Value = typename T::Value;
  const int64_t c = channel + i;
  V scale{}, shift{}, mean{}, sum{}, second{};
  if constexpr (kMask) {
    scale = load_raw<V>(e.scale + c), shift = load_raw<V>(e.shift + c), mean = load_raw<V>(e.mean + c);
    sum = load_raw<V>(sums->sum + i), second = load_raw<V>(sums->second + i);
  }
  const int64_t first = pixels.first * e.channels + c, step = pixels.step * e.channels;
  Value* dx = static_cast<Value*>(e.dx) + first;
  const Value* addend = kAddend ? static_cast<const Value*>(e.addend) + first : nullptr;
  const Value* mask_y = kMask ? static_cast<const Value*>(e.mask_y) + first : nullptr;
  for (int64_t p = 0; p < pixels.count; ++p) {
    V v = load_raw<V>(acc + p * acc_pitch + i);
    if constexpr (kAddend) v += load<T, kLanes>(addend + p * step);
    if constexpr (kMask) {
      const V y = load<T, kLanes>(mask_y + p * step);
      v = round_to<T, kLanes>(v);
      // Rounded as forward stored it: a value that underflowed to zero was stopped.
      v = round_to<T, kLanes>(y * scale + shift) <= 0 ? V{} : v;
      sum += v;
      second += v * (y - mean);
    }
    store<T, kLanes>(dx + p * step, v);
  }
  if constexpr (kMask) store_raw(sums->sum + i, sum), store_raw(sums->second + i, second);
}

void finish_backward(const BackwardEpilogue& e, const float* acc, int64_t acc_pitch, const Pixels& pixels,
                     int64_t channel, int64_t width, PanelSums* sums) {
  dispatch_conv_dtype(e.dtype, [&](auto t) {
    dispatch_flag(e.addend != nullptr, [&](auto addend) {
      dispatch_flag(e.mask_y != nullptr, [&](auto mask) {
        for_lanes(width, [&](auto lanes, int64_t i) {
          finish_backward_lanes<decltype(t), addend.value, mask.value, lanes.value>(e, acc, acc_pitch, pixels, channel,
                                                                                    i, sums);
        });
      });
    });
  });
}

// ---- weights ---------------------------------------------------------------------------------------------------

template <class From>
RESNET_FUSED_INLINE float weight_at(const WeightPanel& p, int64_t n, int64_t d) {
  return From::load(static_cast<const typename From::Value*>(p.weight)[n * p.stride_n + d * p.stride_d]);
}

// A block of 16 output channels by 16 of the depth, as rows of output channels, zero outside.
template <class From>
RESNET_FUSED_INLINE void read_weights(const WeightPanel& p, int64_t n, int64_t d, Float<16> (&rows)[16]) {
  const auto* weight = static_cast<const typename From::Value*>(p.weight);
  const bool whole = n + 16 <= p.width && d + 16 <= p.depth;
  if (whole && p.stride_n == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = load<From, 16>(weight + n + (d + i) * p.stride_d);
  } else if (whole && p.stride_d == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = load<From, 16>(weight + (n + i) * p.stride_n + d);
    transpose(rows);
  } else {
    for (int i = 0; i < 16; ++i) {
      float row[16] = {};
      for (int j = 0; j < 16 && d + i < p.depth && n + j < p.width; ++j) row[j] = weight_at<From>(p, n + j, d + i);
      rows[i] = load_raw<Float<16>>(row);
    }
  }
}

template <class From, class To>
void pack_panel(const WeightPanel& p) {
  const int64_t padded_width = (p.width + 15) / 16 * 16;
  for (int64_t d = 0; d < p.padded_depth; d += 16) {
    const int64_t depth = p.padded_depth - d < 16 ? p.padded_depth - d : 16;
    for (int64_t n = 0; n < padded_width; n += 16) {
      Float<16> rows[16];
      read_weights<From>(p, n, d, rows);
      if (p.pairs) {
        if constexpr (sizeof(typename To::Value) == 2) {
          auto* out = static_cast<uint32_t*>(p.out) + (d / 2) * kPanel + n;
          for (int64_t i = 0; i < depth; i += 2, out += kPanel) {
            const auto even = narrow<To, 16>(rows[i]);
            const auto odd = narrow<To, 16>(rows[i + 1]);
            store_raw(out, even | (odd << 16));
          }
        }
      } else {
        auto* out = static_cast<typename To::Value*>(p.out) + d * kPanel + n;
        for (int64_t i = 0; i < depth; ++i, out += kPanel) store<To, 16>(out, rows[i]);
      }
    }
  }
}

void pack(const WeightPanel& p) {
  dispatch_conv_dtype(p.from, [&](auto from) {
    dispatch_conv_dtype(p.to, [&](auto to) { pack_panel<decltype(from), decltype(to)>(p); });
  });
}

// ---- gradients of weights --------------------------------------------------------------------------------------

template <int kLanes>
RESNET_FUSED_INLINE Float<kLanes> sum_splits(const WeightGradient& g, int64_t row, int64_t column) {
  const float* sums = g.sums + row * g.pitch + column;
  auto v = load_raw<Float<kLanes>>(sums);
  for (int64_t split = 1; split < g.splits; ++split) v += load_raw<Float<kLanes>>(sums + split * g.split_pitch);
  return v;
}

template <class T>
void finish_weight_rows(const WeightGradient& g) {
  auto* dw = static_cast<typename T::Value*>(g.dw);
  if (g.column_step == 1) {
    for (int64_t row = 0; row < g.rows; ++row) {
      for_lanes(g.columns, [&](auto lanes, int64_t column) {
        store<T, lanes.value>(dw + row * g.row_step + column, sum_splits<lanes.value>(g, row, column));
      });
    }
    return;
  }
  for (int64_t column = 0; column < g.columns; column += 16) {  // sums are padded to 16 columns
    Float<16> block[16] = {};
    for (int64_t row = 0; row < g.rows; ++row) block[row] = sum_splits<16>(g, row, column);
    transpose(block);
    for (int64_t i = 0; i < 16 && column + i < g.columns; ++i) {
      auto* out = dw + (column + i) * g.column_step;
      if (g.rows == 16) {
        store<T, 16>(out, block[i]);
      } else {
        for (int64_t row = 0; row < g.rows; ++row) out[row] = T::store(block[i][row]);
      }
    }
  }
}

void finish_weights(const WeightGradient& g) {
  dispatch_conv_dtype(g.dtype, [&](auto t) { finish_weight_rows<decltype(t)>(g); });
}

// ---- Winograd --------------------------------------------------------------------------------------------------

using V16 = Float<16>;

// B' x of four values: (x0 - x2, x1 + x2, x2 - x1, x1 - x3).
struct Four {
  V16 v[4];
};

RESNET_FUSED_INLINE Four source_column(const V16& x0, const V16& x1, const V16& x2, const V16& x3) {
  return {{x0 - x2, x1 + x2, x2 - x1, x1 - x3}};
}

void winograd_source(const float* source, int64_t row_pitch, int64_t channels, int64_t tiles, float* out,
                     int64_t out_pitch) {
  for (int64_t c = 0; c < channels; c += 16) {
    const float* column = source + c;
    const auto next = [&] {
      const V16 x0 = load_raw<V16>(column), x1 = load_raw<V16>(column + row_pitch);
      const V16 x2 = load_raw<V16>(column + 2 * row_pitch), x3 = load_raw<V16>(column + 3 * row_pitch);
      column += channels;
      return source_column(x0, x1, x2, x3);
    };
    Four first = next(), second = next();  // neighbouring tiles share two columns
    float* to = out + c;
    for (int64_t tile = 0; tile < tiles; ++tile, to += channels) {
      const Four third = next(), fourth = next();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Four row = source_column(first.v[i], second.v[i], third.v[i], fourth.v[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_raw(to + (4 * i + j) * out_pitch, row.v[j]);
      }
      first = third, second = fourth;
    }
  }
}

void winograd_results(const float* products, int64_t pitch, int64_t width, int64_t tiles, float* out,
                      int64_t row_pitch) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; c += 16) {
      const float* m = products + tile * kPanel + c;
      V16 sums[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V16 m0 = load_raw<V16>(m + j * pitch), m1 = load_raw<V16>(m + (4 + j) * pitch);
        const V16 m2 = load_raw<V16>(m + (8 + j) * pitch), m3 = load_raw<V16>(m + (12 + j) * pitch);
        sums[0][j] = m0 + m1 + m2, sums[1][j] = m1 - m2 - m3;
      }
      float* to = out + 2 * tile * kPanel + c;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const V16* s = sums[i];
        store_raw(to + i * row_pitch, s[0] + s[1] + s[2]);
        store_raw(to + i * row_pitch + kPanel, s[1] - s[2] - s[3]);
      }
    }
  }
}

// G x of three values: (x0, (x0 + x1 + x2)/2, (x0 - x1 + x2)/2, x2).
RESNET_FUSED_INLINE Four filter_column(const V16& x0, const V16& x1, const V16& x2) {
  const V16 ends = 0.5f * (x0 + x2), middle = 0.5f * x1;
  return {{x0, ends + middle, ends - middle, x2}};
}

template <class From>
void transform_panel(const WinogradWeights& w) {
  WeightPanel tap = w.panel;
  const auto* weight = static_cast<const typename From::Value*>(w.panel.weight);
  const int64_t width = (w.panel.width + 15) / 16 * 16;
  for (int64_t n = 0; n < width; n += 16) {
    V16 taps[9][16];
    for (int t = 0; t < 9; ++t) {
      tap.weight = weight + (w.flipped ? 8 - t : t) * w.tap_pitch;
      read_weights<From>(tap, n, 0, taps[t]);
    }
    for (int d = 0; d < 16; ++d) {
      const Four columns[3] = {filter_column(taps[0][d], taps[3][d], taps[6][d]),
                               filter_column(taps[1][d], taps[4][d], taps[7][d]),
                               filter_column(taps[2][d], taps[5][d], taps[8][d])};
      float* out = static_cast<float*>(w.panel.out) + d * kPanel + n;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Four row = filter_column(columns[0].v[i], columns[1].v[i], columns[2].v[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_raw(out + (4 * i + j) * w.out_pitch, row.v[j]);
      }
    }
  }
}

void winograd_weights(const WinogradWeights& w) {
  dispatch_conv_dtype(w.panel.from, [&](auto from) { transform_panel<decltype(from)>(w); });
}

// A x of two values: (x0, x0 + x1, x0 - x1, -x1).
RESNET_FUSED_INLINE Four gradient_column(const V16& x0, const V16& x1) { return {{x0, x0 + x1, x0 - x1, -x1}}; }

void winograd_gradient(const float* source, int64_t row_pitch, int64_t tiles, float* out, int64_t out_pitch) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < kPanel; c += 16) {
      const float* x = source + 2 * tile * kPanel + c;
      const Four left = gradient_column(load_raw<V16>(x), load_raw<V16>(x + row_pitch));
      const Four right = gradient_column(load_raw<V16>(x + kPanel), load_raw<V16>(x + row_pitch + kPanel));
      float* to = out + tile * kPanel + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Four row = gradient_column(left.v[i], right.v[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_raw(to + (4 * i + j) * out_pitch, row.v[j]);
      }
    }
  }
}

// G' x of four values: (x0 + (x1 + x2)/2, (x1 - x2)/2, (x1 + x2)/2 + x3).
struct Three {
  V16 v[3];
};

RESNET_FUSED_INLINE Three tap_column(const V16& x0, const V16& x1, const V16& x2, const V16& x3) {
  const V16 sum = 0.5f * (x1 + x2);
  return {{x0 + sum, 0.5f * (x1 - x2), sum + x3}};
}

template <class T>
void winograd_finish_rows(const WeightGradient& g, int64_t product_pitch, int64_t tap_pitch) {
  auto* dw = static_cast<typename T::Value*>(g.dw);
  for (int64_t column = 0; column < g.columns; column += 16) {  // sums are padded to 16 columns
    V16 taps[9][16] = {};
    for (int64_t row = 0; row < g.rows; ++row) {
      V16 m[16];
      for (int64_t i = 0; i < 16; ++i) {
        WeightGradient product = g;
        product.sums += i * product_pitch;
        m[i] = sum_splits<16>(product, row, column);
      }
      Three columns[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) columns[j] = tap_column(m[j], m[4 + j], m[8 + j], m[12 + j]);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const Three t = tap_column(columns[0].v[i], columns[1].v[i], columns[2].v[i], columns[3].v[i]);
        for (int j = 0; j < 3; ++j) taps[3 * i + j][row] = t.v[j];
      }
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

void winograd_finish_weights(const WeightGradient& g, int64_t product_pitch, int64_t tap_pitch) {
  dispatch_conv_dtype(g.dtype, [&](auto t) { winograd_finish_rows<decltype(t)>(g, product_pitch, tap_pitch); });
}

}  // namespace

const ConvKernels RESNET_FUSED_CONV_KERNELS = {
    load,           load_transposed, load_pairs,       finish_forward,   finish_backward,   pack,
    finish_weights, winograd_source, winograd_results, winograd_weights, winograd_gradient, winograd_finish_weights};

}  // namespace resnet_fused::cpu
