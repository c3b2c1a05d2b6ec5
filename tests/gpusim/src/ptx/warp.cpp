// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Execution of one warp: independent thread scheduling over lane groups.
//
// Every lane has its own pc. Lanes at the same pc, call depth and frame run as
// one group; the deepest call, then the smallest pc goes first, so groups that
// diverged meet again at the join point.
#include "warp.h"

#include <cstring>

#include "async.h"

namespace gpusim::ptx {

Warp::Warp() = default;
Warp::~Warp() = default;

bool Warp::pick() {
  const u32 here = live & ~(bar_wait | warp_wait);
  u32 runnable = here & ~sync_wait;
  if (!runnable) return false;
  int best = __builtin_ctz(runnable);
  if (rotate) {
    for (u32 m = runnable; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (lane_ran[l] < lane_ran[best]) best = l;
    }
  } else {
    for (u32 m = runnable & (runnable - 1); m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (lane_depth[l] > lane_depth[best] || (lane_depth[l] == lane_depth[best] && lane_pc[l] < lane_pc[best])) best = l;
    }
  }
  pc = lane_pc[best];
  frame_off = lane_frame[best];
  depth = lane_depth[best];
  active = 0;
  reconv = ~0u;
  ++turn;
  for (u32 m = here; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    if (lane_depth[l] != depth || lane_frame[l] != frame_off) continue;
    if (lane_pc[l] == pc) { active |= 1u << l; lane_ran[l] = turn; }
    else if (lane_pc[l] > pc && lane_pc[l] < reconv) reconv = lane_pc[l];
  }
  sync_wait &= ~active;
  base[0] = regs + frame_off;
  return true;
}

bool Warp::run(u64 slice) {
  const u64 start = n_warp;
  slice_end = n_warp + slice;
  yielded = false;
  const Instr* code = launch->program->code.data();
  bool exhausted = false;
  while (!yielded) {
    if (n_warp >= slice_end) { exhausted = true; break; }
    if (!pick()) break;
    u64 threads = 0, count = 0;
    do {
      const Instr& in = code[pc++];
      u32 m = active;
      if (in.guard != kNone) {
        u32 p = *reinterpret_cast<const u32*>(base[0] + in.guard);
        m &= in.guard_neg ? ~p : p;
      }
      ++count;
      threads += __builtin_popcount(m);
      if (m) in.fn(*this, in, m);
    } while (pc < reconv && (count & 4095 || n_warp + count < slice_end));
    n_warp += count;
    n_thread += threads;
    park(active, pc);
  }
  // Lanes that keep running while others of the warp wait for them to pass get
  // the others run now and then.
  if (exhausted || yielded) rotate = (++turns_exhausted & 7) == 0 && turns_exhausted; else rotate = false;
  return n_warp != start;
}

void Warp::need_frame(size_t bytes) {
  if (bytes <= regs_bytes) return;
  size_t grown = std::max(bytes, regs_bytes * 2);
  std::vector<u8> next(grown + 64);
  u8* p = reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(next.data()) + 63) & ~uintptr_t(63));
  if (regs_bytes) std::memcpy(p, regs, regs_bytes);
  regs_storage.swap(next);
  regs = p;
  regs_bytes = grown;
  base[0] = regs + frame_off;
}

void Warp::exit_lanes(u32 lanes) {
  live &= ~lanes;
  exited |= lanes;
  active &= ~lanes;
  sync_wait = 0;  // the others need not wait for these any more: they look again
  release_warp_barrier(live);
  resched();
  block->on_exit(*this);
}

u32 Warp::release_warp_barrier(u32 lanes) {
  u32 released = 0;
  for (u32 k = lanes & warp_wait; k; k &= k - 1) {
    const u32 mask = warp_mask[__builtin_ctz(k)], want = mask & ~exited;
    if ((want & warp_wait) != want) continue;
    bool same = true;
    for (u32 j = want; j; j &= j - 1) same &= warp_mask[__builtin_ctz(j)] == mask;
    if (same) released |= want;
  }
  warp_wait &= ~released;
  return released;
}

// Parks lanes of the running group at an instruction until lanes on other paths get
// there. If some wait there already (the group came from behind), all look again together.
void Warp::wait_for_others(const Instr& in, u32 lanes) {
  const u32 at = u32(&in - launch->program->code.data());
  park(lanes, at);
  sync_wait |= lanes;
  active &= ~lanes;
  u32 others = 0;
  for (u32 m = live & sync_wait & ~lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (lane_pc[l] == at && lane_depth[l] == depth && lane_frame[l] == frame_off) others |= 1u << l;
  }
  if (others) sync_wait &= ~(others | lanes);
  resched();
}

u32 sync_gate(Warp& w, const Instr& in, u32 m, const u32* members) {
  // Common case: the whole group names itself.
  u32 ready = 0;
  for (u32 left = m; left;) {
    int l = __builtin_ctz(left);
    u32 want = members[l], same = 0;
    for (u32 k = left; k; k &= k - 1) {
      int j = __builtin_ctz(k);
      if (members[j] == want) same |= 1u << j;
    }
    left &= ~same;
    if (!(want >> l & 1)) w.fault(in, l, "the calling lane is not in its own membermask");
    if ((want & ~same & ~w.exited) == 0) ready |= same;  // lanes that have exited are not waited for
  }
  u32 blocked = m & ~ready;
  if (blocked) w.wait_for_others(in, blocked);
  if (ready) ++w.sync_clock;
  return ready;
}

bool whole_warp(Warp& w, const Instr& in, u32 m, const char* what) {
  if (m == ~0u) return true;
  if (w.live != ~0u || m != w.active) w.fault(in, __builtin_ctz(m), std::string(what) + " executed by a partial warp");
  w.wait_for_others(in, m);
  return false;
}

void Warp::fault(const Instr& in, int lane, const std::string& what) const {
  const Program& p = *launch->program;
  size_t pc_here = &in - p.code.data();
  std::string s = what;
  if (pc_here < p.source.size()) {
    const SourceRef& ref = p.source[pc_here];
    const Inst* i = size_t(ref.inst) < ref.fn->body.size() ? &ref.fn->body[ref.inst] : nullptr;
    s += "\n  in kernel " + p.kernel->name;
    if (ref.fn != p.kernel) s += ", function " + ref.fn->name;
    if (i) {
      if (i->line >= 1 && size_t(i->line) <= p.module->lines.size()) {
        std::string_view t = p.module->lines[i->line - 1];
        while (!t.empty() && isspace(u8(t[0]))) t.remove_prefix(1);
        s += "\n  at PTX line " + std::to_string(i->line) + ": " + std::string(t);
      }
      if (i->loc_line) {
        auto f = p.module->ast.files.find(i->loc_file);
        s += "\n  source " + (f == p.module->ast.files.end() ? "file " + std::to_string(i->loc_file) : f->second) + ":" + std::to_string(i->loc_line);
      }
    }
  }
  const Dim3& c = block->ctaid;
  char buf[160];
  snprintf(buf, sizeof buf, "\n  block (%u,%u,%u) thread (%u,%u,%u) warp %u lane %d", c.x, c.y, c.z, tid[0][lane], tid[1][lane], tid[2][lane], id, lane);
  throw Fault(s + buf);
}

}  // namespace gpusim::ptx
