// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Blocks, clusters and the host threads that run them.
#include <algorithm>
#include <cstring>
#include <map>
#include <thread>

#include "async.h"
#include "checks.h"
#include "warp.h"

namespace gpusim::ptx {

namespace {
constexpr u64 kSlice = 4096;      // warp instructions between looks at the other warps
constexpr u32 kSpinHints = 64;    // polls in a round after which other blocks get a turn

u8* aligned(std::vector<u8>& v, size_t bytes) {
  if (v.size() < bytes + 1024) v.resize(bytes + 1024);
  return reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(v.data()) + 1023) & ~uintptr_t(1023));
}
}  // namespace

void Block::start(Launch& l, HostThread& h, Cluster* c, Dim3 id, u32 r) {
  const Program& p = *l.program;
  launch = &l;
  host = &h;
  cluster = c;
  ctaid = id;
  rank = r;
  const Dim3 dim = l.config.block;
  threads = u32(dim.count());
  nwarps = (threads + 31) / 32;
  done = false;
  instructions = 0;
  for (auto& b : barriers) b = Barrier();
  shared_bytes = l.shared_bytes;
  shared = aligned(shared_storage, shared_bytes + 64);
  std::memset(shared, l.options->poison_shared ? 0xff : 0, shared_bytes);
  if (l.options->check_uninitialized) init_bits.assign(shared_bytes, 0);
  else init_bits.clear();
  if (l.options->check_races) {
    if (!races) races = std::make_unique<RaceChecker>();
    races->start(shared_bytes, nwarps);
  } else {
    races.reset();
  }
  if (local_storage.size() < size_t(nwarps) * 32 * p.local_bytes) local_storage.resize(size_t(nwarps) * 32 * p.local_bytes);
  while (warps.size() < nwarps) warps.push_back(std::make_unique<Warp>());
  for (u32 i = 0; i < nwarps; ++i) {
    Warp& w = *warps[i];
    w.id = i;
    w.block = this;
    w.launch = &l;
    w.host = &h;
    if (!w.async) w.async = std::make_unique<AsyncState>();
    w.async->clear();
    w.need_frame(p.frame_bytes + 64);
    std::memset(w.regs, 0, std::min<size_t>(p.frame_bytes, w.regs_bytes));
    w.base[1] = const_cast<u8*>(p.pool.data());
    w.local = local_storage.data() + size_t(i) * 32 * p.local_bytes;
    const u32 lanes = std::min(32u, threads - i * 32);
    w.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    w.exited = 0;
    w.bar_wait = w.warp_wait = w.sync_wait = 0;
    w.rotate = w.yielded = false;
    w.turns_exhausted = 0;
    w.turn = 0;
    w.n_warp = w.n_thread = 0;
    w.sync_clock = 1;
    w.st = LaunchStats();
    const FunctionInfo* f = p.functions[0].get();
    for (u32 k = 0; k < 32; ++k) {
      w.lane_pc[k] = f->entry_pc;
      w.lane_frame[k] = w.lane_depth[k] = w.local_base[k] = 0;
      w.lane_ran[k] = 0;
      w.stack[k].clear();
      w.cluster_phase[k] = 0;
      u32 t = i * 32 + k;
      w.tid[0][k] = t % dim.x;
      w.tid[1][k] = t / dim.x % dim.y;
      w.tid[2][k] = t / (dim.x * dim.y);
    }
  }
}

bool Block::step(u64 slice) {
  bool any = false, alive = false;
  const u64 limit = launch->options->max_instructions;
  for (u32 i = 0; i < nwarps; ++i) {
    Warp& w = *warps[i];
    if (!w.live) continue;
    u64 before = w.n_warp;
    any |= w.run(slice);
    instructions += w.n_warp - before;
    if (limit && instructions > limit) {
      int lane = w.live ? __builtin_ctz(w.live) : 0;
      w.fault(launch->program->code[w.lane_pc[lane]], lane,
              "the block ran more than " + std::to_string(limit) + " instructions (endless loop or waiting for something that never happens)" + stuck("is"));
    }
    alive |= w.live != 0;
  }
  if (!alive) {
    for (u32 i = 0; i < nwarps; ++i) alive |= warps[i]->live != 0;
  }
  done = !alive;
  return any;
}

void Block::try_release(u32 id) {
  Barrier& b = barriers[id];
  u32 arrived = b.arrived_only;
  bool all = true, some = b.arrived_only != 0;
  for (u32 i = 0; i < nwarps; ++i) {
    Warp& w = *warps[i];
    if (!w.live) continue;
    u32 at = 0;
    for (u32 m = w.bar_wait; m; m &= m - 1)
      if (w.bar_id[__builtin_ctz(m)] == id) at |= m & -m;
    if (at != w.live) all = false;
    if (at) { some = true; arrived += at == w.live ? 32 : __builtin_popcount(at); }
  }
  if (!some) return;
  if (b.expected == 0 ? !all : arrived < b.expected) return;
  if (races) races->barrier(*this, id, b.expected == 0 || b.expected >= nwarps * 32);
  for (u32 i = 0; i < nwarps; ++i) {
    Warp& w = *warps[i];
    for (u32 m = w.bar_wait; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (w.bar_id[l] != id) continue;
      w.bar_wait &= ~(1u << l);
      const Instr* in = w.bar_instr[l];
      if (in->d == kNone) continue;
      u8* row = w.regs + w.lane_frame[l] + in->d;
      switch (in->m2) {  // bar.red
        case 1: reinterpret_cast<u32*>(row)[l] = b.red_popc; break;
        case 2: case 3: {
          u32 v = (in->m2 == 2 ? b.red_and : b.red_or) ? 1u : 0u;
          u32* p = reinterpret_cast<u32*>(row);
          *p = (*p & ~(1u << l)) | (v << l);
          break;
        }
        default: break;
      }
    }
    ++w.sync_clock;
  }
  ++warps[0]->st.barriers;
  b = Barrier();
}

void Block::on_exit(Warp&) {
  for (u32 i = 0; i < 16; ++i) try_release(i);
  cluster_release(*cluster);
}

std::string Block::stuck(const char* verb) const {
  // Warps whose lanes are at the same places share a line.
  const Program& p = *launch->program;
  std::map<std::map<u32, u32>, std::vector<u32>> places;   // lanes by pc, warps
  for (u32 i = 0; i < nwarps; ++i) {
    const Warp& w = *warps[i];
    std::map<u32, u32> at;
    for (u32 m = w.live; m; m &= m - 1) {
      const int l = __builtin_ctz(m);
      at[w.lane_pc[l] - (w.sync_wait >> l & 1 || !w.lane_pc[l] ? 0 : 1)] |= 1u << l;
    }
    if (!at.empty()) places[at].push_back(i);
  }
  std::string s;
  int lines = 0;
  for (auto& [at, ids] : places) {
    std::string who = ids.size() > 1 ? " warps" : " warp";
    for (u32 i : ids) who += (i == ids[0] ? " " : ",") + std::to_string(i);
    for (auto [pc, lanes] : at) {
      if (++lines > 8) return s + "\n  ...";
      if (pc >= p.source.size() || size_t(p.source[pc].inst) >= p.source[pc].fn->body.size()) continue;
      const SourceRef& r = p.source[pc];
      const Inst& in = r.fn->body[r.inst];
      std::string_view t = size_t(in.line) <= p.module->lines.size() && in.line ? p.module->lines[in.line - 1] : "";
      while (!t.empty() && isspace(u8(t[0]))) t.remove_prefix(1);
      char mask[24] = "";
      if (at.size() > 1) snprintf(mask, sizeof mask, " lanes 0x%x", lanes);
      s += "\n  block (" + std::to_string(ctaid.x) + "," + std::to_string(ctaid.y) + "," + std::to_string(ctaid.z) + ")" + who + mask + " " + verb + " at PTX line " +
           std::to_string(in.line) + ": " + std::string(t);
      if (in.loc_line) s += " (source line " + std::to_string(in.loc_line) + ")";
    }
  }
  return s;
}

void cluster_release(Cluster& c) {
  u32 alive = 0, arrived = 0;
  for (auto& b : c.blocks) {
    if (b->done) continue;
    for (u32 i = 0; i < b->nwarps; ++i) {
      Warp& w = *b->warps[i];
      for (u32 m = w.live; m; m &= m - 1) {
        ++alive;
        arrived += w.cluster_phase[__builtin_ctz(m)] == c.phase + 1;
      }
    }
  }
  if (!arrived || arrived != alive) return;
  ++c.phase;
  for (auto& b : c.blocks)
    for (u32 i = 0; i < b->nwarps; ++i) {
      Warp& w = *b->warps[i];
      for (u32 m = w.bar_wait; m; m &= m - 1)
        if (w.bar_id[__builtin_ctz(m)] == kClusterBarrier) w.bar_wait &= ~(m & -m);
      if (b->races) b->races->everything_ordered(*b);
    }
}

namespace {

void add_stats(LaunchStats& a, const LaunchStats& b) {
  a.warp_instructions += b.warp_instructions;
  a.thread_instructions += b.thread_instructions;
  a.mma_instructions += b.mma_instructions;
  a.mma_flops += b.mma_flops;
  a.global_load_bytes += b.global_load_bytes;
  a.global_store_bytes += b.global_store_bytes;
  a.global_load_sectors += b.global_load_sectors;
  a.global_store_sectors += b.global_store_sectors;
  a.shared_wavefronts += b.shared_wavefronts;
  a.shared_ideal_wavefronts += b.shared_ideal_wavefronts;
  a.barriers += b.barriers;
  a.async_copy_bytes += b.async_copy_bytes;
  a.atomics += b.atomics;
  a.divergent_branches += b.divergent_branches;
}

class Worker {
 public:
  explicit Worker(Launch& l) : l_(l) {}
  void run() {
    try {
      loop();
    } catch (const std::exception& e) {
      std::lock_guard g(l_.mutex);
      if (l_.fault.empty()) l_.fault = e.what();
      l_.stop = true;
    }
    std::lock_guard g(l_.mutex);
    add_stats(l_.stats, stats_);
    l_.loads.merge(host_.loads);
    l_.stores.merge(host_.stores);
  }

 private:
  Launch& l_;
  HostThread host_;
  LaunchStats stats_;
  std::vector<std::unique_ptr<Cluster>> resident_, pool_;

  bool start_next() {
    u64 i = l_.next_cluster.fetch_add(1);
    if (i >= l_.clusters) return false;
    ++l_.resident;
    std::unique_ptr<Cluster> c;
    if (pool_.empty()) c = std::make_unique<Cluster>();
    else { c = std::move(pool_.back()); pool_.pop_back(); }
    const Dim3 g = l_.config.grid, k = l_.config.cluster;
    const u64 nx = g.x / k.x, ny = g.y / k.y;
    c->origin = {u32(i % nx) * k.x, u32(i / nx % ny) * k.y, u32(i / (nx * ny)) * k.z};
    c->phase = 0;
    c->bulk.clear();
    const u32 n = u32(k.count());
    while (c->blocks.size() < n) c->blocks.push_back(std::make_unique<Block>());
    for (u32 r = 0; r < n; ++r) {
      Dim3 id{c->origin.x + r % k.x, c->origin.y + r / k.x % k.y, c->origin.z + r / (k.x * k.y)};
      c->blocks[r]->start(l_, host_, c.get(), id, r);
    }
    resident_.push_back(std::move(c));
    return true;
  }

  // True once every block of the cluster is done.
  bool round(Cluster& c) {
    bool any = false, done = true;
    for (auto& b : c.blocks) {
      if (b->done) continue;
      any |= b->step(kSlice);
      done &= b->done;
    }
    if (done) return true;
    if (!any) {
      std::string where;
      for (auto& b : c.blocks) if (!b->done) where += b->stuck();
      throw Fault("deadlock: every thread of the block waits at a barrier or warp synchronisation that cannot complete\n  in kernel " + l_.program->kernel->name + where);
    }
    return false;
  }

  void retire(Cluster& c) {
    for (auto& b : c.blocks)
      for (u32 i = 0; i < b->nwarps; ++i) {
        Warp& w = *b->warps[i];
        w.async->finish(w);
        w.st.warp_instructions = w.n_warp;
        w.st.thread_instructions = w.n_thread;
        add_stats(stats_, w.st);
      }
  }

  void loop() {
    size_t at = 0;
    while (!l_.stop) {
      if (resident_.empty() && !start_next()) return;
      if (at >= resident_.size()) at = 0;
      host_.spin_hints = 0;
      Cluster& c = *resident_[at];
      if (round(c)) {
        retire(c);
        pool_.push_back(std::move(resident_[at]));
        resident_.erase(resident_.begin() + at);
        --l_.resident;
        continue;
      }
      if (host_.spin_hints >= kSpinHints) {
        // It polls: give the others, or a block not yet started, a turn.
        if (at + 1 == resident_.size() && l_.resident < l_.resident_limit) start_next();
        if (resident_.size() == 1) std::this_thread::yield();
        ++at;
      } else if (resident_.size() > 1 && (++rounds_ & 63) == 0) {
        ++at;
      }
    }
  }
  u64 rounds_ = 0;
};

}  // namespace

void run_launch(Launch& l) {
  const u64 n = std::max<u64>(1, std::min<u64>(std::max(1, l.options->host_threads), l.clusters));
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Worker>> workers;
  for (u64 i = 0; i < n; ++i) workers.push_back(std::make_unique<Worker>(l));
  for (u64 i = 1; i < n; ++i) threads.emplace_back([w = workers[i].get()] { w->run(); });
  workers[0]->run();
  for (auto& t : threads) t.join();
  if (!l.fault.empty()) throw Fault(l.fault);
}

}  // namespace gpusim::ptx
