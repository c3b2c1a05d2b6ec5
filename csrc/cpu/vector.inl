// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Vectors of 16 floats, or of one for what is left of a row: the compiler's own vector types, which it maps to whatever
// registers the instruction set has. In an unnamed namespace, like all that is compiled once per instruction set.
#include "storage.inl"

namespace resnet_fused::cpu {
namespace {

template <int kLanes>
struct Vectors {
  using Float [[gnu::vector_size(4 * kLanes)]] = float;
  using Word [[gnu::vector_size(4 * kLanes)]] = uint32_t;
  using Half [[gnu::vector_size(2 * kLanes)]] = uint16_t;
};

template <int kLanes>
using Float = typename Vectors<kLanes>::Float;
template <int kLanes>
using Word = typename Vectors<kLanes>::Word;
template <int kLanes>
using Half = typename Vectors<kLanes>::Half;

// Of a register, whose bytes whoever includes this names.
constexpr int kRegisterLanes = RESNET_FUSED_REGISTER / 4;

#define RESNET_FUSED_INLINE [[gnu::always_inline]] inline

template <class V, class Value>
RESNET_FUSED_INLINE V load_raw(const Value* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class Value>
RESNET_FUSED_INLINE void store_raw(Value* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// A register of float16 from and to floats: by an instruction where there is one. Elsewhere by functions of their own,
// since storage.inl's arithmetic in each place that wants it took 13 of the 45 s to compile conv/kernels_baseline.cpp.
#if RESNET_FUSED_REGISTER == 64
// Masked by nothing: GCC 12 warns of the vector that the plain ones leave undefined.
RESNET_FUSED_INLINE Float<16> widen_register(Half<16> v) { return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)); }
RESNET_FUSED_INLINE Half<16> narrow_register(Float<16> v) {
  return bit_cast<Half<16>>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif RESNET_FUSED_REGISTER == 32
RESNET_FUSED_INLINE Float<8> widen_register(Half<8> v) { return _mm256_cvtph_ps(bit_cast<__m128i>(v)); }
RESNET_FUSED_INLINE Half<8> narrow_register(Float<8> v) {
  return bit_cast<Half<8>>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
[[gnu::noinline]] Float<4> widen_register(Half<4> v) {
  return Float16::widen<Word<4>, Float<4>>(__builtin_convertvector(v, Word<4>));
}
[[gnu::noinline]] Half<4> narrow_register(Float<4> v) {
  return __builtin_convertvector(Float16::narrow<Word<4>, Float<4>>(v), Half<4>);
}
#endif

template <class Vector>
struct Halved {
  Vector low, high;
};

template <int kLanes>
RESNET_FUSED_INLINE Float<kLanes> widen_float16(Half<kLanes> v) {
  if constexpr (kLanes == kRegisterLanes) {
    return widen_register(v);
  } else {
    constexpr int kHalf = kLanes / 2;
    const auto half = bit_cast<Halved<Half<kHalf>>>(v);
    return bit_cast<Float<kLanes>>(
        Halved<Float<kHalf>>{widen_float16<kHalf>(half.low), widen_float16<kHalf>(half.high)});
  }
}

template <int kLanes>
RESNET_FUSED_INLINE Half<kLanes> narrow_float16(Float<kLanes> v) {
  if constexpr (kLanes == kRegisterLanes) {
    return narrow_register(v);
  } else {
    constexpr int kHalf = kLanes / 2;
    const auto half = bit_cast<Halved<Float<kHalf>>>(v);
    return bit_cast<Half<kLanes>>(
        Halved<Half<kHalf>>{narrow_float16<kHalf>(half.low), narrow_float16<kHalf>(half.high)});
  }
}

// Values of a 16-bit type from their bits, in words.
template <class T, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> widen(Word<kLanes> bits) {
  if constexpr (kLanes >= kRegisterLanes && !T::kIsBFloat16) {
    return widen_float16<kLanes>(__builtin_convertvector(bits, Half<kLanes>));
  } else {
    return T::template widen<Word<kLanes>, Float<kLanes>>(bits);
  }
}

template <class T, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> load(const typename T::Value* p) {
  if constexpr (sizeof(typename T::Value) == 4) {
    return load_raw<Float<kLanes>>(p);
  } else {
    return widen<T, kLanes>(__builtin_convertvector(load_raw<Half<kLanes>>(p), Word<kLanes>));
  }
}

// The bits of a value rounded to a 16-bit type, in words.
template <class T, int kLanes>
RESNET_FUSED_INLINE Word<kLanes> narrow(Float<kLanes> v) {
#ifdef RESNET_FUSED_AVX512_BF16
  if constexpr (kLanes == 16 && T::kIsBFloat16) {
    return __builtin_convertvector(bit_cast<Half<16>>(_mm512_cvtneps_pbh(v)), Word<16>);
  }
#endif
  if constexpr (kLanes >= kRegisterLanes && !T::kIsBFloat16) {
    return __builtin_convertvector(narrow_float16<kLanes>(v), Word<kLanes>);
  } else {
    return T::template narrow<Word<kLanes>, Float<kLanes>>(v);
  }
}

template <class T, int kLanes>
RESNET_FUSED_INLINE void store(typename T::Value* p, Float<kLanes> v) {
  if constexpr (sizeof(typename T::Value) == 4) {
    store_raw(p, v);
  } else {
    store_raw(p, __builtin_convertvector(narrow<T, kLanes>(v), Half<kLanes>));
  }
}

// What storing and loading make of a value.
template <class T, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> round_to(Float<kLanes> v) {
  if constexpr (sizeof(typename T::Value) == 4) {
    return v;
  } else {
    return widen<T, kLanes>(narrow<T, kLanes>(v));
  }
}

template <int kLanes>
RESNET_FUSED_INLINE Float<kLanes> splat(float v) {
  return Float<kLanes>{} + v;
}

template <class V>
RESNET_FUSED_INLINE V relu(V v) {  // a NaN passes, as in eager
  return v < 0 ? V{} : v;
}

// Calls body(lanes, i) for vectors of 16 that cover [0, n), then for what is left one by one.
template <int kLanes>
struct Lanes {
  static constexpr int value = kLanes;
};

template <class Body>
RESNET_FUSED_INLINE void for_lanes(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(Lanes<16>{}, i);
  for (; i < n; ++i) body(Lanes<1>{}, i);
}

}  // namespace
}  // namespace resnet_fused::cpu
