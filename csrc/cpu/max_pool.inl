// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Max pooling, included by kernels.inl. Data movement: forward writes each maximum and one byte that says where in its
// window it was; backward gathers, so that each value of the gradient is summed in a register, in the order of the
// windows, and written once. Rows of the input that windows share are in the cache.

namespace resnet_fused::cpu {
namespace {

// Values as forward compares them, in vectors of a register: of wider ones, compared, the compiler makes poor code.
// `Integers` are as wide as the values.
struct ComparedFloats {
  using Value = float;
  using Integer = int32_t;
  static constexpr int kLanes = kRegisterLanes;
  template <int kLanes>
  struct Vectors {
    using Values [[gnu::vector_size(4 * kLanes)]] = float;
    using Integers [[gnu::vector_size(4 * kLanes)]] = int32_t;
    using Halves [[gnu::vector_size(2 * kLanes)]] = int16_t;
    using Bytes [[gnu::vector_size(kLanes)]] = uint8_t;
  };

  template <int kLanes>
  RESNET_FUSED_INLINE static auto lowest() {
    return typename Vectors<kLanes>::Values{} - __builtin_inff();
  }
  template <class V>
  RESNET_FUSED_INLINE static V key(V v) {
    return v;
  }
  template <class V>
  RESNET_FUSED_INLINE static auto is_nan(V key) {
    return key != key;
  }
};

// 16-bit floats by their bits: magnitudes with their sign, in two's complement, are ordered as the values are.
template <int16_t kInfinity>
struct ComparedHalves {
  using Value = uint16_t;
  using Integer = int16_t;
  static constexpr int kLanes = 2 * kRegisterLanes;
  template <int kLanes>
  struct Vectors {
    using Values [[gnu::vector_size(2 * kLanes)]] = int16_t;
    using Integers = Values;
    using Bytes [[gnu::vector_size(kLanes)]] = uint8_t;
  };

  template <int kLanes>
  RESNET_FUSED_INLINE static auto lowest() {
    return typename Vectors<kLanes>::Values{} + static_cast<int16_t>(kInfinity | -0x8000);
  }
  template <class V>
  RESNET_FUSED_INLINE static V key(V bits) {
    const V magnitude = bits & int16_t{0x7fff};
    return ((bits < 0) & (magnitude <= kInfinity)) ? -magnitude : magnitude;  // a NaN's sign doesn't count
  }
  template <class V>
  RESNET_FUSED_INLINE static auto is_nan(V key) {
    return key > kInfinity;
  }
};

template <class Call>
RESNET_FUSED_INLINE void dispatch_compared(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float32: return call(ComparedFloats{});
    case DType::BFloat16: return call(ComparedHalves<0x7f80>{});
    case DType::Float16: return call(ComparedHalves<0x7c00>{});
    case DType::Float64: return;  // PyTorch's own
  }
}

// Calls body(lanes, c) for vectors that cover [c, channels). The last one overlaps what is before where it has to: what
// body writes twice is the same.
template <int kLanes, class Body>
RESNET_FUSED_INLINE void for_channels(int64_t c, int64_t channels, Body body) {
  for (; c + kLanes <= channels; c += kLanes) body(Lanes<kLanes>{}, c);
  if (c == channels) return;
  if (channels >= kLanes) return body(Lanes<kLanes>{}, channels - kLanes);
  for (; c < channels; ++c) body(Lanes<1>{}, c);
}

struct Span {  // [first, end)
  int64_t first, end;
};

// The taps of a window at `start` that are inside [0, size).
RESNET_FUSED_INLINE Span taps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  int64_t first = 0, end = kernel;
  while (first < kernel && start + first * dilation < 0) ++first;
  while (end > first && start + (end - 1) * dilation >= size) --end;
  return {first, end};
}

// As in PyTorch the first of equal values is the maximum, the last NaN if there are any, and the window's first
// position where all are minus infinity.
template <class T>
void max_pool_rows(const MaxPoolParams& p, int64_t begin, int64_t end) {
  using Value = typename T::Value;
  const int64_t channels = p.channels, height = p.input.height, width = p.input.width;
  const auto [kernel, stride, padding, dilation] = p.window;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.output.height, top = row % p.output.height * stride.height - padding.height;
    const Span rows = taps_inside(top, kernel.height, dilation.height, height);
    for (int64_t column = 0; column < p.output.width; ++column) {
      const int64_t left = column * stride.width - padding.width;
      const Span columns = taps_inside(left, kernel.width, dilation.width, width);
      const int64_t at = (row * p.output.width + column) * channels;
      for_channels<T::kLanes>(0, channels, [&](auto lanes, int64_t c) {
        constexpr int kLanes = decltype(lanes)::value;
        using V = typename T::template Vectors<kLanes>;
        using Values = typename V::Values;
        using Integers = typename V::Integers;
        Values best = T::template lowest<kLanes>(), best_key = T::key(best);
        Integers best_tap = Integers{} + static_cast<typename T::Integer>(rows.first * kernel.width + columns.first);
        for (int64_t r = rows.first; r < rows.end; ++r) {
          for (int64_t s = columns.first; s < columns.end; ++s) {
            const int64_t pixel = (n * height + top + r * dilation.height) * width + left + s * dilation.width;
            const Values v = load_raw<Values>(static_cast<const Value*>(p.x) + pixel * channels + c);
            const Values v_key = T::key(v);
            const auto wins = (v_key > best_key) | T::is_nan(v_key);
            best = wins ? v : best;
            best_key = wins ? v_key : best_key;
            best_tap = wins ? Integers{} + static_cast<typename T::Integer>(r * kernel.width + s) : best_tap;
          }
        }
        store_raw(static_cast<Value*>(p.z) + at + c, best);
        if (p.taps) store_raw(p.taps + at + c, __builtin_convertvector(best_tap, typename V::Bytes));
      });
    }
  }
}

void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end) {
  dispatch_compared(p.dtype, [&](auto t) { max_pool_rows<decltype(t)>(p, begin, end); });
}

// The windows that a row or column of the input is in, [first, end); asked for one after the other.
class Covering {
 public:
  Covering(int64_t count, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : count_(count), reach_((kernel - 1) * dilation), stride_(stride), padding_(padding) {}

  RESNET_FUSED_INLINE Span of(int64_t position) {
    while (first_ < count_ && start(first_) + reach_ < position) ++first_;
    while (end_ < count_ && start(end_) <= position) ++end_;
    return {first_, end_};
  }

  RESNET_FUSED_INLINE int64_t start(int64_t window) const { return window * stride_ - padding_; }

 private:
  int64_t count_, reach_, stride_, padding_;
  int64_t first_ = 0, end_ = 0;
};

// As which tap a window reads what is `distance` from its start; negative if it leaps over it.
RESNET_FUSED_INLINE int64_t tap_at(int64_t distance, int64_t dilation) {
  if (dilation == 1) return distance;  // the usual case, without a division
  return distance % dilation == 0 ? distance / dilation : -1;
}

// A window that an input's pixel is in, and as which of its taps.
struct Membership {
  int64_t window;  // in the output
  int32_t tap;
};

// The sums of kVectors * kLanes channels from `c` on of one pixel.
template <class T, int kLanes, int kVectors>
RESNET_FUSED_INLINE void gather(const MaxPoolBackwardParams& p, const Membership* members, int count, int64_t c,
                                typename T::Value* grad_x) {
  using V = ComparedFloats::Vectors<kLanes>;
  Float<kLanes> sum[kVectors] = {};
  for (int i = 0; i < count; ++i) {
    const int64_t at = members[i].window * p.channels + c;
    const auto* grad = static_cast<const typename T::Value*>(p.grad) + at;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto bytes = load_raw<typename V::Bytes>(p.taps + at + v * kLanes);
      // By way of 16 bits: the compiler takes bytes to 32 bits one by one.
      const auto taps =
          __builtin_convertvector(__builtin_convertvector(bytes, typename V::Halves), typename V::Integers);
      const auto is_here = taps == members[i].tap;
      sum[v] = is_here ? sum[v] + load<T, kLanes>(grad + v * kLanes) : sum[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store<T, kLanes>(grad_x + c + v * kLanes, sum[v]);
}

template <class T>
void max_pool_backward_rows(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  const auto [kernel, stride, padding, dilation] = p.window;
  Membership members[kMaxPoolTaps];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.input.height, y = row % p.input.height;
    Covering vertical(p.output.height, kernel.height, stride.height, padding.height, dilation.height);
    Covering horizontal(p.output.width, kernel.width, stride.width, padding.width, dilation.width);
    const Span rows = vertical.of(y);
    for (int64_t x = 0; x < p.input.width; ++x) {
      const Span columns = horizontal.of(x);
      int count = 0;
      for (int64_t i = rows.first; i < rows.end; ++i) {
        const int64_t r = tap_at(y - vertical.start(i), dilation.height);
        for (int64_t j = columns.first; r >= 0 && j < columns.end; ++j) {
          const int64_t s = tap_at(x - horizontal.start(j), dilation.width);
          if (s < 0) continue;
          const int64_t window = (n * p.output.height + i) * p.output.width + j;
          members[count++] = {window, static_cast<int32_t>(r * kernel.width + s)};
        }
      }
      auto* grad_x = static_cast<typename T::Value*>(p.grad_x) + (row * p.input.width + x) * channels;
      constexpr int kLanes = kRegisterLanes, kVectors = 4;
      int64_t c = 0;
      for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
        gather<T, kLanes, kVectors>(p, members, count, c, grad_x);
      }
      for_channels<kLanes>(c, channels, [&](auto lanes, int64_t first) {
        gather<T, decltype(lanes)::value, 1>(p, members, count, first, grad_x);
      });
    }
  }
}

void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::Float32: return max_pool_backward_rows<Float32>(p, begin, end);
    case DType::BFloat16: return max_pool_backward_rows<BFloat16>(p, begin, end);
    case DType::Float16: return max_pool_backward_rows<Float16>(p, begin, end);
    case DType::Float64: return;  // PyTorch's own
  }
}

}  // namespace
}  // namespace resnet_fused::cpu
