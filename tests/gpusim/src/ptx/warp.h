// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Run-time state: launch, block, warp.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "sectors.h"
#include "gpusim/ptx.h"
#include "program.h"

namespace gpusim::ptx {

struct Block;
struct Cluster;
struct HostThread;
class RaceChecker;
struct AsyncState;

// Kernel parameters, aligned for tensor maps passed by value.
class AlignedBytes {
 public:
  void resize(size_t n) { store_.assign(n + 128, 0); size_ = n; }
  u8* data() { return reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(store_.data()) + 127) & ~uintptr_t(127)); }
  size_t size() const { return size_; }

 private:
  std::vector<u8> store_;
  size_t size_ = 0;
};

struct Launch {
  const Program* program;
  LaunchConfig config;
  const Device* device;
  const Options* options;
  const MemoryCheck* check;
  AlignedBytes params;
  alignas(16) u32 grid_workspace[16] = {};  // cooperative launches: size, barrier word
  u64 grid_id = 0;
  std::atomic<u64> next_cluster{0};
  std::atomic<u64> resident{0};      // clusters
  std::atomic<bool> stop{false};
  u64 clusters = 0, resident_limit = 1;
  u32 shared_bytes = 0;              // kSharedBase + static + dynamic
  std::mutex mutex;
  std::string fault;
  LaunchStats stats;
  SectorSet loads, stores;
};

struct CallRecord {
  u32 ret_pc, frame_off;
  u32 local_base;
  const Instr* call;
  const FunctionInfo* callee;
};

struct Warp {
  // The running group of lanes.
  u8* base[2];            // frame, constant pool
  u32 pc = 0;             // next instruction
  u32 active = 0;
  u32 reconv = ~0u;       // leave the inner loop once pc >= reconv
  u32 frame_off = 0, depth = 0;
  u64 slice_end = 0;      // warp-instruction count at which backward branches yield
  u64 n_warp = 0, n_thread = 0;

  u32 live = 0;           // lanes not exited
  u32 exited = 0;
  u32 bar_wait = 0;       // at a block or cluster barrier
  u32 warp_wait = 0;      // at bar.warp.sync
  u32 sync_wait = 0;      // at a *.sync instruction whose members are not all there
  u32 id = 0;
  bool yielded = false;   // the lanes asked for other warps to run
  bool rotate = false;    // the last slice ran out: give other groups a turn
  Block* block = nullptr;
  Launch* launch = nullptr;
  HostThread* host = nullptr;
  std::vector<u8> regs_storage;
  u8* regs = nullptr;     // 64-byte aligned
  size_t regs_bytes = 0;
  u8* local = nullptr;    // 32 x program->local_bytes
  u32 lane_pc[32], lane_frame[32], lane_depth[32], local_base[32];
  u64 lane_ran[32];
  u32 bar_id[32];         // barrier a lane in bar_wait waits at
  const Instr* bar_instr[32];
  u32 cluster_phase[32];  // cluster barrier: the phase the lane has arrived for
  u32 warp_mask[32];      // members of the bar.warp.sync a lane waits at
  std::vector<CallRecord> stack[32];
  alignas(64) u32 tid[3][32];
  u64 turn = 0;
  u32 turns_exhausted = 0;
  u32 carry = 0;          // condition-code carry flag, one bit per lane
  u32 sync_clock = 1;     // counts warp-level synchronisations (race checks)
  u32 spin_hints = 0;
  std::unique_ptr<AsyncState> async;
  LaunchStats st;

  Warp();
  ~Warp();
  // Runs until every lane is blocked or exited, or the slice ends. False: nothing could run.
  bool run(u64 slice);
  bool pick();
  void park(u32 lanes, u32 at) { for (u32 m = lanes; m; m &= m - 1) lane_pc[__builtin_ctz(m)] = at; }
  void resched() { reconv = 0; }
  void need_frame(size_t bytes);
  void exit_lanes(u32 lanes);
  void wait_for_others(const Instr& in, u32 lanes);
  // Lets go the lanes of bar.warp.sync whose members have all arrived or exited.
  u32 release_warp_barrier(u32 lanes);
  [[noreturn]] void fault(const Instr& in, int lane, const std::string& what) const;

  template <class T> const T* src(u32 ref) const {
    return reinterpret_cast<const T*>(base[ref >> 31] + (ref & 0x7fffffffu));
  }
  template <class T> T* dst(u32 ref) { return reinterpret_cast<T*>(base[0] + ref); }
  u32 pred(u32 ref) const { return *src<u32>(ref); }
  void set_pred(u32 ref, u32 mask, u32 value) {
    u32* p = dst<u32>(ref);
    *p = (*p & ~mask) | (value & mask);
  }
};

struct Barrier {
  u32 expected = 0;        // threads; 0: all of the block
  u32 arrived_only = 0;    // threads of bar.arrive
  u32 waiting = 0;         // live threads blocked at it
  u32 red_and = ~0u, red_or = 0, red_popc = 0;
};

struct Block {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  HostThread* host = nullptr;
  Dim3 ctaid;
  u32 rank = 0;            // in the cluster
  u32 threads = 0, nwarps = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<u8> shared_storage;
  u8* shared = nullptr;    // indexed by shared address (offset)
  u32 shared_bytes = 0;
  std::vector<u8> local_storage;
  Barrier barriers[16];
  std::vector<u8> init_bits;       // check_uninitialized: one byte per shared byte
  std::unique_ptr<RaceChecker> races;
  u64 instructions = 0;
  bool done = false;

  void start(Launch& l, HostThread& h, Cluster* c, Dim3 id, u32 rank);
  // One round over the warps. Returns whether anything ran.
  bool step(u64 slice);
  void try_release(u32 barrier);
  void on_exit(Warp& w);
  std::string stuck(const char* verb = "waits") const;   // where its lanes are
};

struct Cluster {
  Dim3 origin;
  std::vector<std::unique_ptr<Block>> blocks;
  u32 phase = 0;          // of the cluster barrier
  // Bulk copies issued but not yet visible; they land when any thread looks at an mbarrier.
  std::vector<std::function<void()>> bulk;
  void land_bulk() { while (!bulk.empty()) { auto all = std::move(bulk); bulk.clear(); for (auto& f : all) f(); } }
};

// Per host thread: caches and recycled blocks.
struct HostThread {
  SectorSet loads, stores;   // with Options::count_distinct
  static constexpr u32 kPages = 1024;
  u64 good_read[kPages], good_write[kPages];   // pages known to be valid
  HostThread() { for (u32 i = 0; i < kPages; ++i) good_read[i] = good_write[i] = ~0ull; }
  u32 spin_hints = 0;
};

// Notes a global access for the distinct-sector counters.
inline void note_sectors(Warp& w, u64 address, u64 bytes, bool write) {
  if (w.launch->options->count_distinct) (write ? w.host->stores : w.host->loads).add(address, bytes);
}

void run_launch(Launch& l);

constexpr u32 kClusterBarrier = 16;
void cluster_release(Cluster& c);   // completes the cluster barrier if all have arrived

// Barrier handling (control.cpp / scheduler.cpp).
void barrier_arrive(Warp& w, const Instr& in, u32 lanes, u32 id, u32 count, bool wait);

// Lanes of `m` whose *.sync members (members[lane]) are all present; the others
// are parked at the instruction until they are.
u32 sync_gate(Warp& w, const Instr& in, u32 m, const u32* members);

// For *.sync.aligned instructions of the whole warp: true if every lane is here. Lanes
// that come first are parked until the others, still on another path, arrive.
bool whole_warp(Warp& w, const Instr& in, u32 m, const char* what);

}  // namespace gpusim::ptx
