// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Several neighbouring values in one memory access.
#pragma once

#include <cstdint>

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

// `p` must be aligned to the vector's size.
template <int kWidth, class Value>
__device__ Vector<Value, kWidth> load_vector(const Value* p) {
  return *reinterpret_cast<const Vector<Value, kWidth>*>(p);
}

template <int kWidth, class Value>
__device__ void store_vector(Value* p, const Vector<Value, kWidth>& v) {
  *reinterpret_cast<Vector<Value, kWidth>*>(p) = v;
}

}  // namespace resnet_fused::cuda
