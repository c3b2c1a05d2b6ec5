// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Shared-memory swizzles of the tensor copy engine and of wgmma: 16-byte chunk
// bits of the address are xored with the bits from 7 up.
#pragma once
#include "types.h"

namespace gpusim::ptx {

// log2w: 0 none, 1: 32-byte, 2: 64-byte, 3: 128-byte swizzle. `phase0` is subtracted
// from the row bits (the descriptor's base offset).
inline u32 swizzle_address(u32 addr, int log2w, u32 phase0 = 0) {
  if (!log2w) return addr;
  const u32 mask = (1u << log2w) - 1;
  return addr ^ ((((addr >> 7) - phase0) & mask) << 4);
}

}  // namespace gpusim::ptx
