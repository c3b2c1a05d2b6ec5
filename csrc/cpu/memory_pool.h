// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Memory for activations and gradients on the CPU. The C library gives large blocks back to the system when they are
// freed, and touching fresh ones page by page costs several times what a one-pass kernel does; here freed blocks
// wait to be used again.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <cstdint>

namespace resnet_fused::cpu {

inline constexpr size_t kPooledBytes = size_t{1} << 20;
inline constexpr int64_t kMaxAge = 1024;

// Serves at least kPooledBytes at a time and leaves what is smaller to PyTorch's allocator. A waiting block serves
// several smaller tensors, too. Blocks of which nothing is used go back to the system if all are more than once were in
// use together, in whole or in part, or after kMaxAge allocations.
c10::Allocator& memory_pool();

struct PoolState {
  size_t in_use;   // bytes
  size_t waiting;  // bytes
};
PoolState memory_pool_state();

// Gives every waiting block back to the system, and forgets how much was in use together.
void empty_memory_pool();

// While one lives, tensors that PyTorch's own operators allocate on this thread come from the pool too: the outputs
// of a convolution can be had in no other way.
class Pooling {
 public:
  Pooling();
  ~Pooling();
  Pooling(const Pooling&) = delete;
  Pooling& operator=(const Pooling&) = delete;
};

}  // namespace resnet_fused::cpu
