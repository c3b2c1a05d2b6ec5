// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the native convolutions do around their matrix products; see kernels.h. Data movement: every function reads its
// tensors and writes its result once; what it leaves for the microkernel, and what that left for it, is in cache.
#include "../vector.inl"

namespace resnet_fused::cpu {
namespace {

// Transposes 16 vectors: log2(16) rounds, each exchanging halves of ever smaller blocks.
template <int kStep>
RESNET_FUSED_INLINE void exchange(Float<16>& a, Float<16>& b) {
  using Index [[gnu::vector_size(64)]] = int32_t;
  const Index low = [] {
    Index index{};
    for (int i = 0; i < 16; ++i) index[i] = (i & kStep) ? 16 + i - kStep : i;
    return index;
  }();
  const Index high = [] {
    Index index{};
    for (int i = 0; i < 16; ++i) index[i] = (i & kStep) ? 16 + i : i + kStep;
    return index;
  }();
  const Float<16> first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

template <int kStep>
RESNET_FUSED_INLINE void exchange_all(Float<16> (&v)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep]);
  }
}

// Where the vectors don't fit the registers anyway, one function: inlined it took 12 s of the 33 to compile the baseline.
#if RESNET_FUSED_REGISTER == 64
RESNET_FUSED_INLINE
#else
[[gnu::noinline]]
#endif
void transpose(Float<16> (&v)[16]) {
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
}

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

template <class T, class To, Prologue kPrologue>
void load_pixels(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, typename To::Value* out,
                 int64_t pitch) {
  for (int64_t p = 0; p < pixels.count; ++p, out += pitch) {
    const int64_t pixel = pixels.first + p * pixels.step;
    if constexpr (kPrologue == Prologue::kNone && sizeof(typename T::Value) == sizeof(typename To::Value)) {
      __builtin_memcpy(out, static_cast<const typename T::Value*>(o.x) + pixel * o.channels + channel,
                       width * sizeof(typename T::Value));
    } else {
      for_lanes(width, [&](auto lanes, int64_t c) {
        const auto v = read<T, kPrologue, lanes.value>(o, pixel, channel + c);
        store<To, lanes.value>(out + c, kPrologue == Prologue::kNone ? v : round_to<T, lanes.value>(v));
      });
    }
    for (int64_t c = width; c < pitch; ++c) out[c] = 0;
  }
}

void load(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, void* out, int64_t pitch) {
  dispatch_conv_dtype(o.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_prologue(o.prologue, [&](auto prologue) {
      load_pixels<T, T, prologue.value>(o, pixels, channel, width, static_cast<typename T::Value*>(out), pitch);
    });
  });
}

void load_floats(const Operand& o, const Pixels& pixels, int64_t channel, int64_t width, float* out, int64_t pitch) {
  dispatch_conv_dtype(o.dtype, [&](auto t) {
    dispatch_prologue(o.prologue, [&](auto prologue) {
      load_pixels<decltype(t), Float32, prologue.value>(o, pixels, channel, width, out, pitch);
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

// Calls body(lanes, vectors, i) for pieces of a pixel's channels that cover [0, n): a panel's vectors together, so that
// a tensor is read and written in runs of cache lines that the processor fetches ahead.
template <class Body>
RESNET_FUSED_INLINE void for_pieces(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) body(Lanes<16>{}, Lanes<kPanel / 16>{}, i);
  for_lanes(n - i, [&](auto lanes, int64_t rest) { body(lanes, Lanes<1>{}, i + rest); });
}

// The epilogue of kVectors*kLanes channels of some pixels: its constants and sums in registers, results one by one.
template <class T, bool kAffine, bool kShortcut, bool kRelu, bool kSums, int kLanes, int kVectors>
struct ForwardPiece {
  using V = Float<kLanes>;
  using Value = typename T::Value;

  ForwardPiece(const ForwardEpilogue& e, const Pixels& pixels, int64_t channel, PanelSums* panel, int64_t i)
      : step(pixels.step * e.channels) {
    const int64_t c = channel + i, first = pixels.first * e.channels + c;
    y = static_cast<Value*>(e.y) + first;
    if constexpr (kShortcut) shortcut = static_cast<const Value*>(e.shortcut) + first;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = j * kLanes;
      if constexpr (kAffine) {
        scale[j] = load_raw<V>(e.scale + c + at), shift[j] = load_raw<V>(e.shift + c + at);
      } else if (e.bias) {
        shift[j] = load_raw<V>(e.bias + c + at);
      }
      if constexpr (kSums) {
        origin[j] = load_raw<V>(panel->origin + i + at);
        sum[j] = load_raw<V>(panel->sum + i + at), second[j] = load_raw<V>(panel->second + i + at);
      }
    }
  }

  RESNET_FUSED_INLINE void finish(int64_t pixel, int j, V v) {
    const int64_t at = pixel * step + j * kLanes;
    v = kAffine ? v * scale[j] + shift[j] : v + shift[j];
    if constexpr (kShortcut) v += load<T, kLanes>(shortcut + at);
    if constexpr (kRelu) v = relu(v);
    store<T, kLanes>(y + at, v);
    if constexpr (kSums) {
      const V d = round_to<T, kLanes>(v) - origin[j];
      sum[j] += d;
      second[j] += d * d;
    }
  }

  RESNET_FUSED_INLINE void prefetch(int64_t pixel, int j) const {
    const int64_t at = pixel * step + j * kLanes;
    if constexpr (kShortcut) __builtin_prefetch(shortcut + at);
    __builtin_prefetch(y + at, 1);
  }

  void save(PanelSums* panel, int64_t i) const {
    if constexpr (kSums) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        store_raw(panel->sum + i + j * kLanes, sum[j]), store_raw(panel->second + i + j * kLanes, second[j]);
      }
    }
  }

  int64_t step;
  Value* y;
  const Value* shortcut = nullptr;
  V scale[kVectors]{}, shift[kVectors]{}, origin[kVectors]{}, sum[kVectors]{}, second[kVectors]{};
};

template <class T, bool kAddend, bool kMask, int kLanes, int kVectors>
struct BackwardPiece {
  using V = Float<kLanes>;
  using Value = typename T::Value;

  BackwardPiece(const BackwardEpilogue& e, const Pixels& pixels, int64_t channel, PanelSums* panel, int64_t i)
      : step(pixels.step * e.channels) {
    const int64_t c = channel + i, first = pixels.first * e.channels + c;
    dx = static_cast<Value*>(e.dx) + first;
    if constexpr (kAddend) addend = static_cast<const Value*>(e.addend) + first;
    if constexpr (kMask) {
      mask_y = static_cast<const Value*>(e.mask_y) + first;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = j * kLanes;
        scale[j] = load_raw<V>(e.scale + c + at), shift[j] = load_raw<V>(e.shift + c + at);
        mean[j] = load_raw<V>(e.mean + c + at);
        sum[j] = load_raw<V>(panel->sum + i + at), second[j] = load_raw<V>(panel->second + i + at);
      }
    }
  }

  RESNET_FUSED_INLINE void finish(int64_t pixel, int j, V v) {
    const int64_t at = pixel * step + j * kLanes;
    if constexpr (kAddend) v += load<T, kLanes>(addend + at);
    if constexpr (kMask) {
      const V y = load<T, kLanes>(mask_y + at);
      v = round_to<T, kLanes>(v);
      // Rounded as forward stored it: a value that underflowed to zero was stopped.
      v = round_to<T, kLanes>(y * scale[j] + shift[j]) <= 0 ? V{} : v;
      sum[j] += v;
      second[j] += v * (y - mean[j]);
    }
    store<T, kLanes>(dx + at, v);
  }

  RESNET_FUSED_INLINE void prefetch(int64_t pixel, int j) const {
    const int64_t at = pixel * step + j * kLanes;
    if constexpr (kAddend) __builtin_prefetch(addend + at);
    if constexpr (kMask) __builtin_prefetch(mask_y + at);
    __builtin_prefetch(dx + at, 1);
  }

  void save(PanelSums* panel, int64_t i) const {
    if constexpr (kMask) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        store_raw(panel->sum + i + j * kLanes, sum[j]), store_raw(panel->second + i + j * kLanes, second[j]);
      }
    }
  }

  int64_t step;
  Value* dx;
  const Value *addend = nullptr, *mask_y = nullptr;
  V scale[kVectors]{}, shift[kVectors]{}, mean[kVectors]{}, sum[kVectors]{}, second[kVectors]{};
};

template <class T, bool kAffine, bool kShortcut, bool kRelu, bool kSums>
struct Forward {
  template <int kLanes, int kVectors>
  using Piece = ForwardPiece<T, kAffine, kShortcut, kRelu, kSums, kLanes, kVectors>;
};

template <class T, bool kAddend, bool kMask>
struct Backward {
  template <int kLanes, int kVectors>
  using Piece = BackwardPiece<T, kAddend, kMask, kLanes, kVectors>;
};

// call(kind) with the Forward or Backward that does what the epilogue asks for, and nothing else.
template <class T, class Call>
RESNET_FUSED_INLINE void dispatch_epilogue(const ForwardEpilogue& e, const PanelSums* sums, Call call) {
  if (sums) return call(Forward<T, false, false, false, true>{});
  dispatch_flag(e.scale != nullptr, [&](auto affine) {
    dispatch_flag(e.shortcut != nullptr, [&](auto shortcut) {
      dispatch_flag(e.relu, [&](auto relu) { call(Forward<T, affine.value, shortcut.value, relu.value, false>{}); });
    });
  });
}

template <class T, class Call>
RESNET_FUSED_INLINE void dispatch_epilogue(const BackwardEpilogue& e, const PanelSums*, Call call) {
  dispatch_flag(e.addend != nullptr, [&](auto addend) {
    dispatch_flag(e.mask_y != nullptr, [&](auto mask) { call(Backward<T, addend.value, mask.value>{}); });
  });
}

template <class Epilogue>
void finish(const Epilogue& e, const float* acc, int64_t acc_pitch, const Pixels& pixels, int64_t channel,
            int64_t width, PanelSums* sums) {
  dispatch_conv_dtype(e.dtype, [&](auto t) {
    dispatch_epilogue<decltype(t)>(e, sums, [&](auto kind) {
      for_pieces(width, [&](auto lanes, auto vectors, int64_t i) {
        typename decltype(kind)::template Piece<lanes.value, vectors.value> piece(e, pixels, channel, sums, i);
        for (int64_t p = 0; p < pixels.count; ++p) {
#pragma GCC unroll 4
          for (int j = 0; j < vectors.value; ++j) {
            piece.finish(p, j, load_raw<Float<lanes.value>>(acc + p * acc_pitch + i + j * lanes.value));
          }
        }
        piece.save(sums, i);
      });
    });
  });
}

#include "product.inl"

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

#include "winograd.inl"

}  // namespace

const ConvKernels RESNET_FUSED_CONV_KERNELS = {
    load,
    load_floats,
    load_transposed,
    load_pairs,
    finish<ForwardEpilogue>,
    finish<BackwardEpilogue>,
    kProductsFloat32,
    kProductsBFloat16,
    kProductTransposed,
    kDotRows,
    pack,
    finish_weights,
    kWinogradKernels<2>,
    kWinogradKernels<4>,
};

}  // namespace resnet_fused::cpu
