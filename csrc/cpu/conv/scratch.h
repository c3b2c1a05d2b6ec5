// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Memory that a convolution needs while it runs, from the pool for activations.
#pragma once

#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdint>

#include "../memory_pool.h"

namespace resnet_fused::cpu {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(memory_pool().allocate(std::max<int64_t>(bytes, 64))) {}

  template <class T = void>
  T* at(int64_t byte = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_.get()) + byte);
  }

 private:
  c10::DataPtr data_;
};

inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace resnet_fused::cpu
