// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Several neighbouring values in one memory access.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace resnet_fused::cuda {

inline constexpr int kVectorBytes = 16;

// Values of T in one 16-byte access.
template <class T>
inline constexpr int kVectorWidth = kVectorBytes / sizeof(typename T::Value);

template <class Value, int kWidth>
struct alignas(sizeof(Value) * kWidth) Vector {
  Value values[kWidth];

  __device__ Value& operator[](int i) { return values[i]; }
  __device__ const Value& operator[](int i) const { return values[i]; }
};

// What moves kBytes in one instruction. A vector of 16-bit classes would be copied member by member.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};

// `p` must be aligned to the vector's size; for stores it must be global memory.
template <int kWidth, class Value>
__device__ Vector<Value, kWidth> load_vector(const Value* p) {
  using Word = typename WordOf<sizeof(Value) * kWidth>::Type;
  const Word word = *reinterpret_cast<const Word*>(p);
  Vector<Value, kWidth> v;
  memcpy(&v, &word, sizeof(word));
  return v;
}

template <int kWidth, class Value>
__device__ void store_vector(Value* p, const Vector<Value, kWidth>& v) {
  using Word = typename WordOf<sizeof(Value) * kWidth>::Type;
  Word word;
  memcpy(&word, &v, sizeof(word));
  // Said outright, since the compiler takes an assignment of several words apart.
  if constexpr (sizeof(Word) == 16) {
    ptx::store_global_128(p, word);
  } else if constexpr (sizeof(Word) == 8) {
    ptx::store_global_64(p, word);
  } else {
    *reinterpret_cast<Word*>(p) = word;
  }
}

}  // namespace resnet_fused::cuda
