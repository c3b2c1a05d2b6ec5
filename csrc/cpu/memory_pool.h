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

// Serves blocks of at least kPooledBytes and leaves smaller ones to PyTorch's allocator. Never holds more than was
// once in use together; a block that waited for kMaxAge allocations goes back to the system.
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
