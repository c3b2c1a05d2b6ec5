// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What every launch needs on the host: grid sizes, alignment, and the choice of a kernel's instance.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "device/types.cuh"
#include "device/vector.cuh"
#include "kernels.h"
#include "layout.h"

namespace resnet_fused::cuda {

// Every kernel walks what its grid does not cover.
inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kMost = 65535;  // what y and z take
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks > kMost ? kMost : blocks));
}

template <class Pointer, size_t kCount>
bool all_aligned(Pointer (&pointers)[kCount]) {
  for (const auto* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % kVectorBytes != 0) return false;
  }
  return true;
}

template <class Call>
cudaError_t dispatch_dtype(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float64: return call(Float64{});
    case DType::Float32: return call(Float32{});
    case DType::BFloat16: return call(BFloat16{});
    case DType::Float16: return call(Float16{});
  }
  return cudaErrorInvalidValue;
}

enum class Shortcut { kNone, kPlain, kAffine };

template <Shortcut kShortcut>
struct ShortcutConstant {
  static constexpr Shortcut value = kShortcut;
};

template <class Call>
cudaError_t dispatch_shortcut(const ShortcutInput& shortcut, Call call) {
  if (!shortcut.data) return call(ShortcutConstant<Shortcut::kNone>{});
  if (!shortcut.coefficients) return call(ShortcutConstant<Shortcut::kPlain>{});
  return call(ShortcutConstant<Shortcut::kAffine>{});
}

}  // namespace resnet_fused::cuda
