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

template <class T, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> load(const typename T::Value* p) {
  if constexpr (sizeof(typename T::Value) == 4) {
    return load_raw<Float<kLanes>>(p);
  } else {
    const auto bits = __builtin_convertvector(load_raw<typename Vectors<kLanes>::Half>(p), Word<kLanes>);
    return T::template widen<Word<kLanes>, Float<kLanes>>(bits);
  }
}

// The bits of a value rounded to a 16-bit type, in words.
template <class T, int kLanes>
RESNET_FUSED_INLINE Word<kLanes> narrow(Float<kLanes> v) {
#ifdef RESNET_FUSED_AVX512_BF16
  if constexpr (kLanes == 16 && T::kIsBFloat16) {
    return __builtin_convertvector(bit_cast<typename Vectors<16>::Half>(_mm512_cvtneps_pbh(v)), Word<16>);
  }
#endif
  return T::template narrow<Word<kLanes>, Float<kLanes>>(v);
}

template <class T, int kLanes>
RESNET_FUSED_INLINE void store(typename T::Value* p, Float<kLanes> v) {
  if constexpr (sizeof(typename T::Value) == 4) {
    store_raw(p, v);
  } else {
    store_raw(p, __builtin_convertvector(narrow<T, kLanes>(v), typename Vectors<kLanes>::Half));
  }
}

// What storing and loading make of a value.
template <class T, int kLanes>
RESNET_FUSED_INLINE Float<kLanes> round_to(Float<kLanes> v) {
  if constexpr (sizeof(typename T::Value) == 4) {
    return v;
  } else {
    return T::template widen<Word<kLanes>, Float<kLanes>>(narrow<T, kLanes>(v));
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

RESNET_FUSED_INLINE void transpose(Float<16> (&v)[16]) {
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
}

}  // namespace
}  // namespace resnet_fused::cpu
