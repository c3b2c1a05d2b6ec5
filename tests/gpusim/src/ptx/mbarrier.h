// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// mbarrier objects: 8 bytes of shared memory in a layout of our own.
#pragma once
#include "warp.h"

namespace gpusim::ptx {

struct Mbarrier {
  // bits 0-19 pending arrivals, 20-39 expected arrivals, 40 phase parity,
  // 41 valid, 42-63 transaction count (signed)
  u64 v = 0;
  u32 pending() const { return v & 0xfffff; }
  u32 expected() const { return v >> 20 & 0xfffff; }
  u32 phase() const { return v >> 40 & 1; }
  bool valid() const { return v >> 41 & 1; }
  s64 tx() const { return s64(v) >> 42; }
  void set(u32 pending, u32 expected, u32 phase, s64 tx) {
    v = u64(pending & 0xfffff) | u64(expected & 0xfffff) << 20 | u64(phase) << 40 | 1ull << 41 | u64(tx) << 42;
  }
};

// The object at a shared (cluster) address; faults if it is not initialised.
u8* mbarrier_at(Warp& w, const Instr& in, int lane, u64 addr, bool must_be_valid = true);
// Counts arrivals and transactions; returns the state before.
u64 mbarrier_update(Warp& w, const Instr& in, int lane, u64 addr, s64 arrivals, s64 tx, s64 drop = 0);

}  // namespace gpusim::ptx
