// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Asynchronous work of one warp: cp.async groups, bulk groups, wgmma groups.
#pragma once
#include <vector>

#include "types.h"

namespace gpusim::ptx {

struct Warp;
struct Instr;

struct AsyncCopy {
  u32 dst;        // shared address
  u8 bytes;
  u8 data[16];
};

struct LaneCopies {
  std::vector<AsyncCopy> copies;   // issued, not yet visible, oldest first
  std::vector<u32> group_end;      // copies.size() at each commit not yet waited for
};

// A warp-wide operation held back until its group is waited for (wgmma).
struct Deferred {
  const Instr* in;
  u32 mask, frame_off;
  std::vector<u32> a;              // captured register operands
  u64 desc_a = 0, desc_b = 0;
  u32 scale_d = 0;
};

struct AsyncState {
  LaneCopies lane[32];
  std::vector<Deferred> wgmma;
  std::vector<u32> wgmma_group_end;
  void clear() {
    for (auto& l : lane) { l.copies.clear(); l.group_end.clear(); }
    wgmma.clear();
    wgmma_group_end.clear();
  }
  void finish(Warp&) { clear(); }
};

}  // namespace gpusim::ptx
