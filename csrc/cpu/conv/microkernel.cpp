// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "microkernel.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <exception>
#include <type_traits>
#include <vector>

namespace resnet_fused::cpu {
namespace {

using at::native::cpublas::brgemm;

template <class T, bool kPairs>
void multiply(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a,
              const void* b, float* c) {
  brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const T*>(a), static_cast<const T*>(b), c, kPairs);
}

// Small integers, whose products and sums are exact in every type; rows of A overlap.
template <class T, bool kPairs>
bool works() {
  constexpr int64_t m = 9, n = 32, k = 24, lda = 8;
  std::vector<T> a(m * lda + k), b(k * n);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(static_cast<int>(i * 7 % 11) - 5);
  const auto value = [](int64_t row, int64_t column) { return static_cast<float>((row * 5 + column * 3) % 9 - 4); };
  for (int64_t row = 0; row < k; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const int64_t at = kPairs ? (row / 2) * 2 * n + 2 * column + row % 2 : row * n + column;
      b[at] = value(row, column);
    }
  }
  std::vector<float> c(m * n, 1.0f);
  try {
    multiply<T, kPairs>(m, n, k, lda, n, n, true, a.data(), b.data(), c.data());
    at::native::cpublas::brgemm_release(kPairs);
  } catch (const std::exception&) {  // whatever PyTorch or oneDNN raises: not here
    return false;
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      float expected = 1;
      for (int64_t i = 0; i < k; ++i) expected += static_cast<float>(a[row * lda + i]) * value(i, column);
      if (c[row * n + column] != expected) return false;
    }
  }
  return true;
}

// Where oneDNN has no microkernel PyTorch computes products of unpaired 16-bit rows too, by a loop.
template <class T>
bool multiplies_unpaired() {
  if constexpr (std::is_same_v<T, float>) return true;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<T, c10::Half>) return __builtin_cpu_supports("avx512fp16");
#endif
  return false;
}

// Whatever oneDNN makes of it: its limits (ONEDNN_MAX_CPU_ISA) are not asked for.
template <class T>
bool has_tiles() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (std::is_same_v<T, c10::BFloat16>) return __builtin_cpu_supports("amx-bf16");
#endif
  return false;
}

template <class T>
Microkernel find() {
  if constexpr (sizeof(T) == 2) {
    if (works<T, true>()) return {true, true, has_tiles<T>(), multiply<T, true>};
  }
  if (multiplies_unpaired<T>() && works<T, false>()) return {true, false, false, multiply<T, false>};
  return {};
}

}  // namespace

const Microkernel& microkernel(DType dtype) {
  static const Microkernel none{};
  switch (dtype) {
    case DType::Float32: {
      static const Microkernel found = find<float>();
      return found;
    }
    case DType::BFloat16: {
      static const Microkernel found = find<c10::BFloat16>();
      return found;
    }
    case DType::Float16: {
      static const Microkernel found = find<c10::Half>();
      return found;
    }
    default: return none;
  }
}

MicrokernelScope::~MicrokernelScope() { at::native::cpublas::brgemm_release(pairs_); }

}  // namespace resnet_fused::cpu
