// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Memory, race and initialisation checks.
#pragma once
#include <unordered_map>
#include <vector>

#include "warp.h"

namespace gpusim::ptx {

// Shared-memory hazards by happens-before over warps. Every block barrier,
// named barrier, mbarrier and atomic orders what it really orders; where the
// order is uncertain the checker stays silent. Lanes of one warp are only
// compared between two warp-level synchronisations.
class RaceChecker {
 public:
  void start(u32 bytes, u32 warps);
  void read(Warp& w, const Instr& in, int lane, u32 off, u32 n);
  // `data` is what will be stored: rewriting equal bytes is no hazard. Null: unknown.
  void write(Warp& w, const Instr& in, int lane, u32 off, u32 n, const u8* data);
  void async_issue(Warp& w, const Instr& in, int lane, u32 off, u32 n);
  void async_done(Warp& w, int lane, u32 off, u32 n);
  void forget(u32 off, u32 n);               // written by something the checker cannot place
  // Synchronisation.
  void arrive(Warp& w, u32 barrier);
  void barrier(Block& b, u32 id, bool all);
  void release(Warp& w, u64 object);
  void acquire(Warp& w, u64 object);
  void everything_ordered(Block& b);

 private:
  struct Cell {
    u32 write_clock = 0, write_sync = 0, read_epoch = 0, read_mask = 0, read_clock = 0;
    u8 writer = 0xff, write_lane = 0, reader = 0, pending = 0;
  };
  u32 warps_ = 0, epoch_ = 1;
  std::vector<Cell> cells_;
  std::vector<std::vector<u32>> vc_;          // by warp
  std::vector<u32> epoch_base_;               // own clock of each warp at the last full barrier
  std::vector<std::vector<u32>> barrier_vc_;
  std::unordered_map<u64, std::vector<u32>> objects_;
  void join(std::vector<u32>& a, const std::vector<u32>& b) { for (u32 i = 0; i < warps_; ++i) a[i] = std::max(a[i], b[i]); }
  [[noreturn]] void hazard(Warp& w, const Instr& in, int lane, u32 off, const char* kind, u32 other_warp, int other_lane);
};

// Host pointers of the lanes' accesses of `bytes` bytes each, after alignment,
// bounds and validity checks and counting. Inactive lanes' entries are untouched.
void map_global(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p);
void map_shared(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p, bool count = true);
void map_local(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p);
void map_const(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, u8** p);
void map_generic(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p, u32* shared_lanes);

// One shared range of one lane (ldmatrix rows, cp.async, mbarrier): checked pointer.
u8* shared_range(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes, u32 align, bool write);
// One global range: checked.
void global_range(Warp& w, const Instr& in, int lane, u64 addr, u64 bytes, bool write);
bool global_ok(Warp& w, u64 addr, u64 bytes, bool write);

// Race and initialisation bookkeeping of plain shared accesses.
void shared_read(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes);
void shared_write(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes, const u8* data);
inline bool shared_checked(const Warp& w) { return w.block->races || !w.block->init_bits.empty(); }

// The block whose shared memory a shared (cluster) address names.
Block& shared_owner(Warp& w, const Instr& in, int lane, u64 addr);

// Bank model: 32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarters.
void count_wavefronts(Warp& w, u32 m, const u64* addr, u32 bytes);
u32 count_sectors(u32 m, const u64* addr, u32 bytes);

}  // namespace gpusim::ptx
