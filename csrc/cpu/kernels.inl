// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU kernels, compiled once per instruction set. Torch-free and free of standard library functions; the
// loops are written for the compiler's vectoriser. Everything lives in an unnamed namespace, so that no copy can
// stand in for another instruction set's.
//
// Data movement: every kernel reads each input once and writes each output once. Statistics read a strip of a
// few kilobytes twice (mean, then squared deviations), the second time from the first-level cache.

#include "vector.inl"
#include "max_pool.inl"

namespace resnet_fused::cpu {
namespace {

// ---- loops over a dense tensor ---------------------------------------------------------------------------------

// Per-channel values along a slice: a vector for a row of channels, one value for a plane.
template <class Acc, bool kPerChannel>
struct Along {
  const Acc* vector;
  Acc value;
  Along(const Acc* row, int64_t channel) : vector(row + channel), value(row[channel]) {}
  inline Acc operator[](int64_t i) const { return kPerChannel ? vector[i] : value; }
};

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// Calls body(per_channel, offset, length, channel) for each slice in [begin, end).
template <class Body>
inline void for_each_slice(const Extent& extent, int64_t begin, int64_t end, Body body) {
  if (extent.inner == 1) {
    for (int64_t s = begin; s < end; ++s) body(Bool<true>{}, s * extent.channels, extent.channels, int64_t{0});
  } else {
    for (int64_t s = begin; s < end; ++s) {
      body(Bool<false>{}, s * extent.inner, extent.inner, s % extent.channels);
    }
  }
}

// ---- the forward value and the ReLU's mask ---------------------------------------------------------------------

enum class Shortcut { kNone, kPlain, kAffine };
enum class Mask { kNone, kOutput, kValue, kValuePlain, kValueAffine };

constexpr Shortcut shortcut_of(Mask mask) {
  return mask == Mask::kValuePlain    ? Shortcut::kPlain
         : mask == Mask::kValueAffine ? Shortcut::kAffine
                                      : Shortcut::kNone;
}

// scale * y + shift (+ shortcut): one definition, so that backward finds the signs that forward saw.
template <class T, Shortcut kShortcut, bool kPerChannel>
struct Join {
  using Acc = typename T::Acc;
  using Vector = Along<Acc, kPerChannel>;
  Vector scale, shift, shortcut_scale, shortcut_shift;
  const typename T::Value* y;
  const typename T::Value* shortcut;

  Join(const void* y_data, const void* coefficients, const ShortcutInput& input, const Extent& extent, int64_t offset,
       int64_t channel)
      : scale(row(coefficients, kScale, extent), channel),
        shift(row(coefficients, kShift, extent), channel),
        shortcut_scale(row(kShortcut == Shortcut::kAffine ? input.coefficients : coefficients, kScale, extent),
                       channel),
        shortcut_shift(row(kShortcut == Shortcut::kAffine ? input.coefficients : coefficients, kShift, extent),
                       channel),
        y(static_cast<const typename T::Value*>(y_data) + offset),
        shortcut(kShortcut == Shortcut::kNone ? nullptr : static_cast<const typename T::Value*>(input.data) + offset) {}

  static const Acc* row(const void* coefficients, CoefficientRow which, const Extent& extent) {
    return static_cast<const Acc*>(coefficients) + which * extent.channels;
  }

  inline Acc operator[](int64_t i) const {
    Acc v = T::load(y[i]) * scale[i] + shift[i];
    if constexpr (kShortcut == Shortcut::kPlain) v += T::load(shortcut[i]);
    if constexpr (kShortcut == Shortcut::kAffine) {
      v += T::load(shortcut[i]) * shortcut_scale[i] + shortcut_shift[i];
    }
    return v;
  }
};

// The gradient behind the ReLU. As in eager, a NaN in front of it lets the gradient pass.
template <class T, Mask kMask, bool kPerChannel>
struct MaskedGrad {
  using Acc = typename T::Acc;
  const typename T::Value* grad;
  const typename T::Value* z;
  // Without a mask to recompute, the join is never evaluated; any coefficients and y will do to form it.
  Join<T, shortcut_of(kMask), kPerChannel> join;

  MaskedGrad(const void* grad_data, const ReluMask& mask, const void* y, const void* coefficients,
             const ShortcutInput& shortcut, const Extent& extent, int64_t offset, int64_t channel)
      : grad(static_cast<const typename T::Value*>(grad_data) + offset),
        z(kMask == Mask::kOutput ? static_cast<const typename T::Value*>(mask.z) + offset : nullptr),
        join(y, coefficients, shortcut, extent, offset, channel) {}

  inline Acc operator[](int64_t i) const {
    const Acc g = T::load(grad[i]);
    if constexpr (kMask == Mask::kNone) return g;
    if constexpr (kMask == Mask::kOutput) return T::load(z[i]) <= Acc(0) ? Acc(0) : g;
    // Rounded as forward stored it: a value that underflowed to zero was stopped.
    return T::load(T::store(join[i])) <= Acc(0) ? Acc(0) : g;
  }
};

// ---- choosing the instance ------------------------------------------------------------------------------------

template <class Call>
inline void dispatch_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float64: return call(Float64{});
    case DType::Float32: return call(Float32{});
    case DType::BFloat16: return call(BFloat16{});
    case DType::Float16: return call(Float16{});
  }
}

template <Mask kMask>
struct MaskConstant {
  static constexpr Mask value = kMask;
};

template <class Call>
inline void dispatch_mask(const ReluMask& mask, const ShortcutInput& shortcut, Call call) {
  if (!mask.relu) return call(MaskConstant<Mask::kNone>{});
  if (mask.z) return call(MaskConstant<Mask::kOutput>{});
  if (!shortcut.data) return call(MaskConstant<Mask::kValue>{});
  if (!shortcut.coefficients) return call(MaskConstant<Mask::kValuePlain>{});
  return call(MaskConstant<Mask::kValueAffine>{});
}

template <class Call>
inline void dispatch_bool(bool value, Call call) {
  value ? call(Bool<true>{}) : call(Bool<false>{});
}

// Whether backward comes across it: a shortcut has coefficients where it is the second of a pair, only there. The other
// instances would be a third of what is compiled.
template <Mask kMask, bool kPair>
constexpr bool kOccurs = shortcut_of(kMask) == Shortcut::kAffine ? kPair : !kPair || kMask <= Mask::kOutput;

// ---- element-wise kernels --------------------------------------------------------------------------------------

template <class T, bool kRelu, Shortcut kShortcut, bool kPerChannel>
inline void write_join(const Join<T, kShortcut, kPerChannel>& join, typename T::Value* z, int64_t length) {
  using Acc = typename T::Acc;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const Acc v = join[i];
    z[i] = T::store(kRelu && v < Acc(0) ? Acc(0) : v);  // a NaN passes, as in eager
  }
}

template <class T, Shortcut kShortcut, bool kRelu>
void apply_slices(const ApplyParams& p, int64_t begin, int64_t end) {
  for_each_slice(p.extent, begin, end, [&](auto per_channel, int64_t offset, int64_t length, int64_t channel) {
    const Join<T, kShortcut, per_channel.value> join(p.y, p.coefficients, p.shortcut, p.extent, offset, channel);
    write_join<T, kRelu>(join, static_cast<typename T::Value*>(p.z) + offset, length);
  });
}

void apply(const ApplyParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    dispatch_bool(p.relu, [&](auto relu) {
      using T = decltype(t);
      if (!p.shortcut.data) return apply_slices<T, Shortcut::kNone, relu.value>(p, begin, end);
      if (!p.shortcut.coefficients) return apply_slices<T, Shortcut::kPlain, relu.value>(p, begin, end);
      return apply_slices<T, Shortcut::kAffine, relu.value>(p, begin, end);
    });
  });
}

template <class T, bool kPerChannel>
struct BackwardAffine {
  using Acc = typename T::Acc;
  using Vector = Along<Acc, kPerChannel>;
  Vector a, b, c;

  BackwardAffine(const void* coefficients, const Extent& extent, int64_t channel)
      : a(static_cast<const Acc*>(coefficients) + kA * extent.channels, channel),
        b(static_cast<const Acc*>(coefficients) + kB * extent.channels, channel),
        c(static_cast<const Acc*>(coefficients) + kC * extent.channels, channel) {}

  inline Acc operator()(Acc g, Acc y, int64_t i) const { return a[i] * g + (b[i] * y + c[i]); }
};

// dy = a*g + b*y + c, or a*g where the statistics were constants.
template <class T, Mask kMask, bool kStatistics>
void backward_apply_slices(const BackwardApplyParams& p, int64_t begin, int64_t end) {
  using Acc = typename T::Acc;
  for_each_slice(p.extent, begin, end, [&](auto per_channel, int64_t offset, int64_t length, int64_t channel) {
    const MaskedGrad<T, kMask, per_channel.value> grad(p.grad, p.mask, p.y, p.coefficients, p.shortcut, p.extent,
                                                       offset, channel);
    const BackwardAffine<T, per_channel.value> affine(p.backward_coefficients, p.extent, channel);
    const auto* y = static_cast<const typename T::Value*>(p.y) + offset;
    auto* grad_y = static_cast<typename T::Value*>(p.grad_y) + offset;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const Acc g = grad[i];
      grad_y[i] = T::store(kStatistics ? affine(g, T::load(y[i]), i) : affine.a[i] * g);
    }
  });
}

// The same for the two batch norms that a projection block joins: one read of the gradient serves both.
template <class T, Mask kMask, bool kStatistics, bool kShortcutStatistics>
void backward_apply_pair_slices(const BackwardApplyParams& p, int64_t begin, int64_t end) {
  using Acc = typename T::Acc;
  for_each_slice(p.extent, begin, end, [&](auto per_channel, int64_t offset, int64_t length, int64_t channel) {
    const MaskedGrad<T, kMask, per_channel.value> grad(p.grad, p.mask, p.y, p.coefficients, p.shortcut, p.extent,
                                                       offset, channel);
    const BackwardAffine<T, per_channel.value> affine(p.backward_coefficients, p.extent, channel);
    const BackwardAffine<T, per_channel.value> shortcut_affine(p.shortcut_backward_coefficients, p.extent, channel);
    const auto* y = static_cast<const typename T::Value*>(p.y) + offset;
    const auto* shortcut = static_cast<const typename T::Value*>(p.shortcut.data) + offset;
    auto* grad_y = static_cast<typename T::Value*>(p.grad_y) + offset;
    auto* grad_shortcut = static_cast<typename T::Value*>(p.grad_shortcut) + offset;
    // Two loops: the second finds its inputs in the cache, and each is small enough for the vectoriser.
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const Acc g = grad[i];
      grad_y[i] = T::store(kStatistics ? affine(g, T::load(y[i]), i) : affine.a[i] * g);
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const Acc g = grad[i];
      grad_shortcut[i] =
          T::store(kShortcutStatistics ? shortcut_affine(g, T::load(shortcut[i]), i) : shortcut_affine.a[i] * g);
    }
  });
}

void backward_apply(const BackwardApplyParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    dispatch_mask(p.mask, p.shortcut, [&](auto mask) {
      dispatch_bool(p.batch_statistics, [&](auto statistics) {
        using T = decltype(t);
        if constexpr (kOccurs<mask.value, false>) {
          if (!p.grad_shortcut) return backward_apply_slices<T, mask.value, statistics.value>(p, begin, end);
        }
        if constexpr (kOccurs<mask.value, true>) {
          dispatch_bool(p.shortcut_batch_statistics, [&](auto shortcut_statistics) {
            backward_apply_pair_slices<T, mask.value, statistics.value, shortcut_statistics.value>(p, begin, end);
          });
        }
      });
    });
  });
}

void relu_backward_add(const ReluBackwardAddParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    dispatch_mask(p.mask, p.shortcut, [&](auto mask) {
      using T = decltype(t);
      for_each_slice(p.extent, begin, end, [&](auto per_channel, int64_t offset, int64_t length, int64_t channel) {
        const MaskedGrad<T, mask.value, per_channel.value> grad(p.grad, p.mask, p.y, p.coefficients, p.shortcut,
                                                                p.extent, offset, channel);
        auto* out = static_cast<typename T::Value*>(p.out) + offset;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) out[i] = T::store(T::load(out[i]) + grad[i]);
      });
    });
  });
}

// ---- reductions ------------------------------------------------------------------------------------------------

// Strips of a reduction are summed in Acc and gathered in double: the rounding of a long float sum never builds up.
constexpr int64_t kStripRows = 32;
constexpr int64_t kStripLength = 4096;

struct Range {
  int64_t begin, end;
};

inline Range tile_range(const Extent& extent, int64_t tile) {
  const int64_t tiles = reduction_grid(extent).tiles;
  return {extent.outer * tile / tiles, extent.outer * (tile + 1) / tiles};
}

// Chan, Golub & LeVeque (1979): the mean and M2 of two sets from theirs.
inline void merge(double count, double mean, double m2, double& total, double& total_mean, double& total_m2) {
  const double delta = mean - total_mean;
  const double sum = total + count;
  total_mean += delta * (count / sum);
  total_m2 += m2 + delta * delta * (total * (count / sum));
  total = sum;
}

template <class Acc>
inline void write_statistics(void* partials, int64_t tile, int64_t channels, int64_t channel, double count, double mean,
                             double m2) {
  Acc* out = static_cast<Acc*>(partials) + tile * kStatisticsRows * channels + channel;
  out[kCount * channels] = static_cast<Acc>(count);
  out[kTileMean * channels] = static_cast<Acc>(mean);
  out[kM2 * channels] = static_cast<Acc>(m2);
}

template <class T>
void statistics_rows(const StatisticsParams& p, void* partials, int64_t tile, int64_t block) {
  using Acc = typename T::Acc;
  const int64_t channels = p.extent.channels;
  const int64_t first = block * kChannelBlock;
  const int64_t width = channels - first < kChannelBlock ? channels - first : kChannelBlock;
  const Range rows = tile_range(p.extent, tile);
  double mean[kChannelBlock] = {}, m2[kChannelBlock] = {};
  double count = 0;
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kStripRows) {
    const int64_t r1 = rows.end - r0 < kStripRows ? rows.end : r0 + kStripRows;
    const double strip_count = static_cast<double>(r1 - r0);
    Acc sum[kChannelBlock] = {}, squares[kChannelBlock] = {};
    // Sums are taken about the strip's first row: exact where a strip is constant, whatever its magnitude.
    const auto* origin = static_cast<const typename T::Value*>(p.y) + r0 * channels + first;
    for (int64_t r = r0 + 1; r < r1; ++r) {
      const auto* y = static_cast<const typename T::Value*>(p.y) + r * channels + first;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += T::load(y[i]) - T::load(origin[i]);
    }
    Acc strip_mean[kChannelBlock];
    const Acc inverse = Acc(1) / static_cast<Acc>(strip_count);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) strip_mean[i] = T::load(origin[i]) + sum[i] * inverse;
    for (int64_t r = r0; r < r1; ++r) {
      const auto* y = static_cast<const typename T::Value*>(p.y) + r * channels + first;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const Acc d = T::load(y[i]) - strip_mean[i];
        squares[i] += d * d;
      }
    }
    const double weight = strip_count / (count + strip_count);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const double delta = static_cast<double>(strip_mean[i]) - mean[i];
      mean[i] += delta * weight;
      m2[i] += static_cast<double>(squares[i]) + delta * delta * (count * weight);
    }
    count += strip_count;
  }
  for (int64_t i = 0; i < width; ++i) {
    write_statistics<Acc>(partials, tile, channels, first + i, count, mean[i], m2[i]);
  }
}

template <class T>
void statistics_planes(const StatisticsParams& p, void* partials, int64_t tile, int64_t channel) {
  using Acc = typename T::Acc;
  const Range images = tile_range(p.extent, tile);
  double count = 0, mean = 0, m2 = 0;
  for (int64_t n = images.begin; n < images.end; ++n) {
    const auto* plane = static_cast<const typename T::Value*>(p.y) + (n * p.extent.channels + channel) * p.extent.inner;
    for (int64_t i0 = 0; i0 < p.extent.inner; i0 += kStripLength) {
      const int64_t length = p.extent.inner - i0 < kStripLength ? p.extent.inner - i0 : kStripLength;
      const auto* y = plane + i0;
      double sum = 0;  // eager sums a contiguous plane in double, too
      Acc squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < length; ++i) sum += static_cast<double>(T::load(y[i]));
      const double mean_of_strip = sum / static_cast<double>(length);
      const Acc strip_mean = static_cast<Acc>(mean_of_strip);
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < length; ++i) {
        const Acc d = T::load(y[i]) - strip_mean;
        squares += d * d;
      }
      merge(static_cast<double>(length), mean_of_strip, squares, count, mean, m2);
    }
  }
  write_statistics<Acc>(partials, tile, p.extent.channels, channel, count, mean, m2);
}

void statistics(const StatisticsParams& p, void* partials, int64_t tile, int64_t block) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.extent.inner == 1 ? statistics_rows<T>(p, partials, tile, block) : statistics_planes<T>(p, partials, tile, block);
  });
}

// What the ReLU passed on, of values that the sums read next, from the cache.
template <class T, bool kPerChannel>
inline void write_activation(const BackwardReduceParams& p, int64_t offset, int64_t length, int64_t channel) {
  const Join<T, Shortcut::kNone, kPerChannel> join(p.y, p.coefficients, {}, p.extent, offset, channel);
  write_join<T, true>(join, static_cast<typename T::Value*>(p.activation) + offset, length);
}

// Sums over the gradient g behind the ReLU: g, g*(y - mean) and, for a second batch norm, g*(shortcut - its mean).
// Centred sums do not cancel when the mean is large against the standard deviation.
template <class T, Mask kMask, bool kPair>
void backward_reduce_rows(const BackwardReduceParams& p, void* partials, int64_t tile, int64_t block) {
  using Acc = typename T::Acc;
  constexpr int64_t kRows = kPair ? 3 : 2;
  const int64_t channels = p.extent.channels;
  const int64_t first = block * kChannelBlock;
  const int64_t width = channels - first < kChannelBlock ? channels - first : kChannelBlock;
  const Range rows = tile_range(p.extent, tile);
  const Acc* mean = static_cast<const Acc*>(p.coefficients) + kMean * channels + first;
  const Acc* shortcut_mean = kPair ? static_cast<const Acc*>(p.shortcut.coefficients) + kMean * channels + first : mean;
  double total[kRows][kChannelBlock] = {};
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kStripRows) {
    const int64_t r1 = rows.end - r0 < kStripRows ? rows.end : r0 + kStripRows;
    Acc sum[kRows][kChannelBlock] = {};
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t offset = r * channels + first;
      const MaskedGrad<T, kMask, true> grad(p.grad, p.mask, p.y, p.coefficients, p.shortcut, p.extent, offset, first);
      const auto* y = static_cast<const typename T::Value*>(p.y) + offset;
      const auto* shortcut = kPair ? static_cast<const typename T::Value*>(p.shortcut.data) + offset : y;
      auto* out = p.masked_grad ? static_cast<typename T::Value*>(p.masked_grad) + offset : nullptr;
      if (out) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = T::store(grad[i]);
      }
      if (p.activation) write_activation<T, true>(p, offset, width, first);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const Acc g = grad[i];
        sum[0][i] += g;
        sum[1][i] += g * (T::load(y[i]) - mean[i]);
        if constexpr (kPair) sum[2][i] += g * (T::load(shortcut[i]) - shortcut_mean[i]);
      }
    }
    for (int64_t k = 0; k < kRows; ++k) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) total[k][i] += sum[k][i];
    }
  }
  Acc* out = static_cast<Acc*>(partials) + tile * kRows * channels + first;
  for (int64_t k = 0; k < kRows; ++k) {
    for (int64_t i = 0; i < width; ++i) out[k * channels + i] = static_cast<Acc>(total[k][i]);
  }
}

template <class T, Mask kMask, bool kPair>
void backward_reduce_planes(const BackwardReduceParams& p, void* partials, int64_t tile, int64_t channel) {
  using Acc = typename T::Acc;
  constexpr int64_t kRows = kPair ? 3 : 2;
  const int64_t channels = p.extent.channels;
  const Range images = tile_range(p.extent, tile);
  const Acc mean = static_cast<const Acc*>(p.coefficients)[kMean * channels + channel];
  const Acc shortcut_mean = kPair ? static_cast<const Acc*>(p.shortcut.coefficients)[kMean * channels + channel] : mean;
  double total[3] = {};
  for (int64_t n = images.begin; n < images.end; ++n) {
    for (int64_t i0 = 0; i0 < p.extent.inner; i0 += kStripLength) {
      const int64_t length = p.extent.inner - i0 < kStripLength ? p.extent.inner - i0 : kStripLength;
      const int64_t offset = (n * channels + channel) * p.extent.inner + i0;
      const MaskedGrad<T, kMask, false> grad(p.grad, p.mask, p.y, p.coefficients, p.shortcut, p.extent, offset,
                                             channel);
      const auto* y = static_cast<const typename T::Value*>(p.y) + offset;
      const auto* shortcut = kPair ? static_cast<const typename T::Value*>(p.shortcut.data) + offset : y;
      auto* out = p.masked_grad ? static_cast<typename T::Value*>(p.masked_grad) + offset : nullptr;
      if (out) {
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) out[i] = T::store(grad[i]);
      }
      if (p.activation) write_activation<T, false>(p, offset, length, channel);
      Acc sum0 = 0, sum1 = 0, sum2 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2)
      for (int64_t i = 0; i < length; ++i) {
        const Acc g = grad[i];
        sum0 += g;
        sum1 += g * (T::load(y[i]) - mean);
        if constexpr (kPair) sum2 += g * (T::load(shortcut[i]) - shortcut_mean);
      }
      total[0] += sum0;
      total[1] += sum1;
      total[2] += sum2;
    }
  }
  Acc* out = static_cast<Acc*>(partials) + tile * kRows * channels + channel;
  for (int64_t k = 0; k < kRows; ++k) out[k * channels] = static_cast<Acc>(total[k]);
}

void backward_reduce(const BackwardReduceParams& p, void* partials, int64_t tile, int64_t block) {
  dispatch_dtype(p.dtype, [&](auto t) {
    dispatch_mask(p.mask, p.shortcut, [&](auto mask) {
      dispatch_bool(p.shortcut.coefficients != nullptr, [&](auto pair) {
        using T = decltype(t);
        if constexpr (kOccurs<mask.value, pair.value>) {
          p.extent.inner == 1 ? backward_reduce_rows<T, mask.value, pair.value>(p, partials, tile, block)
                              : backward_reduce_planes<T, mask.value, pair.value>(p, partials, tile, block);
        }
      });
    });
  });
}

}  // namespace

const Kernels RESNET_FUSED_KERNELS = {
    statistics, backward_reduce, apply, backward_apply, relu_backward_add, max_pool, max_pool_backward,
};

}  // namespace resnet_fused::cpu
