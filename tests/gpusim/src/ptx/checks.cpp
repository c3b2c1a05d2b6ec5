// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "checks.h"

#include <algorithm>

namespace gpusim::ptx {

// ---- global memory ----
namespace {

bool module_memory(const Warp& w, u64 a, u64 bytes, bool write) {
  const ModuleData& md = *w.launch->program->module;
  if (a >= md.storage_begin && a + bytes <= md.storage_end) return true;
  const u64 ws = reinterpret_cast<u64>(w.launch->grid_workspace);
  if (a >= ws && a + bytes <= ws + sizeof w.launch->grid_workspace) return true;
  if (write) return false;
  if (a >= md.const_begin && a + bytes <= md.const_end) return true;
  const u64 pb = reinterpret_cast<u64>(w.launch->params.data());
  return a >= pb && a + bytes <= pb + w.launch->params.size();
}

// Kernel parameters and constants behind generic addresses: no traffic of global memory.
bool constant_memory(const Warp& w, u64 a) {
  const ModuleData& md = *w.launch->program->module;
  const u64 pb = reinterpret_cast<u64>(w.launch->params.data());
  return a - pb < w.launch->params.size() || a - md.const_begin < md.const_end - md.const_begin;
}

[[noreturn]] void bad_access(Warp& w, const Instr& in, int lane, const char* what, const char* space, u64 a, u64 bytes, bool write) {
  char buf[200];
  snprintf(buf, sizeof buf, "%s: %s of %llu bytes at %s address 0x%llx", what, write ? "write" : "read", (unsigned long long)bytes, space, (unsigned long long)a);
  w.fault(in, lane, buf);
}

}  // namespace

bool global_ok(Warp& w, u64 a, u64 bytes, bool write) {
  if (!w.launch->options->check_memory) return true;
  const MemoryCheck& check = *w.launch->check;
  const u64 page = a >> 12;
  u64* cache = write ? w.host->good_write : w.host->good_read;
  u64& entry = cache[page & (HostThread::kPages - 1)];
  if (entry == page && page == (a + bytes - 1) >> 12) return true;
  if (module_memory(w, a, bytes, write)) return true;
  if ((a & kWindowMask) != 0 || !check) return !check && !(a & kWindowMask);
  if (check(page << 12, 4096, write)) {
    entry = page;
    if (page == (a + bytes - 1) >> 12) return true;
  }
  return check(a, bytes, write);
}

void global_range(Warp& w, const Instr& in, int lane, u64 a, u64 bytes, bool write) {
  if (!global_ok(w, a, bytes, write)) bad_access(w, in, lane, "invalid global access", "global", a, bytes, write);
}

u32 count_sectors(u32 m, const u64* addr, u32 bytes) {
  u64 s[32];
  u32 n = 0;
  bool sorted = true;
  u32 distinct = 0;
  for (; m; m &= m - 1) {
    u64 x = addr[__builtin_ctz(m)] >> 5;
    if (n) { sorted &= x >= s[n - 1]; distinct += x != s[n - 1]; }
    s[n++] = x;
  }
  (void)bytes;
  if (!n) return 0;
  if (sorted) return distinct + 1;
  std::sort(s, s + n);
  return u32(std::unique(s, s + n) - s);
}

void map_global(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p) {
  u64 bits = 0;
  for (u32 k = m; k; k &= k - 1) bits |= addr[__builtin_ctz(k)];
  if (bits & (bytes - 1)) {
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (addr[l] & (bytes - 1)) bad_access(w, in, l, "misaligned access", "global", addr[l], bytes, write);
    }
  }
  if (w.launch->options->check_memory) {
    u64* cache = write ? w.host->good_write : w.host->good_read;
    u64 last = ~0ull, lo = ~0ull, hi = 0;
    bool span_ok = false;
    for (u32 k = m; k && !span_ok; k &= k - 1) {
      int l = __builtin_ctz(k);
      const u64 page = addr[l] >> 12;
      if (page == last) continue;
      if (cache[page & (HostThread::kPages - 1)] == page) { last = page; continue; }
      if (!hi) {  // one question for all lanes before asking for each
        for (u32 j = m; j; j &= j - 1) { const u64 a = addr[__builtin_ctz(j)]; lo = std::min(lo, a); hi = std::max(hi, a); }
        if (hi - lo < 1 << 16 && global_ok(w, lo, hi - lo + bytes, write)) { span_ok = true; break; }
      }
      if (!global_ok(w, addr[l], bytes, write)) bad_access(w, in, l, "invalid global access (outside every live allocation)", "global", addr[l], bytes, write);
    }
  }
  for (int l = 0; l < 32; ++l) p[l] = reinterpret_cast<u8*>(addr[l]);
  if (!write && m && constant_memory(w, addr[__builtin_ctz(m)])) return;
  const u32 lanes = __builtin_popcount(m), sectors = count_sectors(m, addr, bytes);
  if (write) { w.st.global_store_bytes += u64(lanes) * bytes; w.st.global_store_sectors += sectors; }
  else { w.st.global_load_bytes += u64(lanes) * bytes; w.st.global_load_sectors += sectors; }
  if (w.launch->options->count_distinct)
    for (u32 k = m; k; k &= k - 1) note_sectors(w, addr[__builtin_ctz(k)], bytes, write);
}

void map_const(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, u8** p) {
  const ModuleData& md = *w.launch->program->module;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (addr[l] & (bytes - 1)) bad_access(w, in, l, "misaligned access", "constant", addr[l], bytes, false);
    bool ok = addr[l] >= md.const_begin && addr[l] + bytes <= md.const_end;
    if (!ok) bad_access(w, in, l, "out of bounds", "constant", addr[l], bytes, false);
    p[l] = reinterpret_cast<u8*>(addr[l]);
  }
}

// ---- local memory ----
void map_local(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p) {
  const u32 size = w.launch->program->local_bytes;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u64 a = addr[l];
    if (a & (bytes - 1)) bad_access(w, in, l, "misaligned access", "local", a, bytes, write);
    if (a >= size || a + bytes > size) bad_access(w, in, l, "out of bounds", "local", a, bytes, write);
    p[l] = w.local + size_t(l) * size + a;
  }
}

// ---- shared memory ----
Block& shared_owner(Warp& w, const Instr& in, int lane, u64 addr) {
  u32 r = u32(addr) >> kClusterShift;
  if (r == 0) return *w.block;
  Cluster& c = *w.block->cluster;
  if (r > c.blocks.size() || r > w.launch->config.cluster.count()) bad_access(w, in, lane, "no such block in the cluster", "shared", addr, 1, false);
  return *c.blocks[r - 1];
}

u8* shared_range(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes, u32 align, bool write) {
  u32 off = u32(addr) & kSharedOffsetMask;
  if (off & (align - 1)) bad_access(w, in, lane, "misaligned access", "shared", addr, bytes, write);
  Block& b = shared_owner(w, in, lane, addr);
  if (off < kSharedBase || off + bytes > b.shared_bytes || addr >> 32) {
    char buf[200];
    snprintf(buf, sizeof buf, "out of bounds: %s of %u bytes at shared offset %lld (the block has %u bytes)", write ? "write" : "read", bytes,
             (long long)(s64(addr) - s64(kSharedBase)), b.shared_bytes - kSharedBase);
    w.fault(in, lane, buf);
  }
  return b.shared + off;
}

void count_wavefronts(Warp& w, u32 m, const u64* addr, u32 bytes) {
  const int per = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;  // lanes per phase
  for (int first = 0; first < 32; first += per) {
    u32 pm = per == 32 ? m : (m >> first) & ((1u << per) - 1);
    if (!pm) continue;
    ++w.st.shared_ideal_wavefronts;
    u32 lo = ~0u, hi = 0;
    const u32 words = bytes <= 4 ? 1 : bytes / 4;
    for (u32 k = pm; k; k &= k - 1) {
      u32 x = u32(addr[first + __builtin_ctz(k)]) >> 2;
      lo = std::min(lo, x);
      hi = std::max(hi, x + words - 1);
    }
    if (hi - lo < 32) { ++w.st.shared_wavefronts; continue; }
    u32 seen[32][32];
    u8 count[32] = {};
    u32 worst = 1;
    for (u32 k = pm; k; k &= k - 1) {
      u32 x = u32(addr[first + __builtin_ctz(k)]) >> 2;
      for (u32 j = 0; j < words; ++j, ++x) {
        u32 bank = x & 31, n = count[bank], i = 0;
        while (i < n && seen[bank][i] != x) ++i;
        if (i == n) { seen[bank][n] = x; count[bank] = u8(n + 1); worst = std::max(worst, n + 1); }
      }
    }
    w.st.shared_wavefronts += worst;
  }
}

void map_shared(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p, bool count) {
  u8* base = w.block->shared;
  const u32 limit = w.block->shared_bytes - bytes;
  u64 bits = 0;
  bool own = true;
  for (u32 k = m; k; k &= k - 1) {
    u64 a = addr[__builtin_ctz(k)];
    bits |= a;
    own &= a >= kSharedBase && a <= limit;
  }
  if (own && !(bits & (bytes - 1))) {
    for (u32 k = m; k; k &= k - 1) { int l = __builtin_ctz(k); p[l] = base + addr[l]; }
  } else {
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      p[l] = shared_range(w, in, l, addr[l], bytes, bytes, write);
    }
  }
  if (count) count_wavefronts(w, m, addr, bytes);
}

void map_generic(Warp& w, const Instr& in, u32 m, const u64* addr, u32 bytes, bool write, u8** p, u32* shared_lanes) {
  u32 shared = 0, local = 0, global = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u64 win = addr[l] & kWindowMask;
    if (win == kSharedWindow) shared |= 1u << l;
    else if (win == kLocalWindow) local |= 1u << l;
    else global |= 1u << l;
  }
  *shared_lanes = shared;
  if (global) map_global(w, in, global, addr, bytes, write, p);
  u64 off[32];
  if (shared | local) for (int l = 0; l < 32; ++l) off[l] = addr[l] & ~kWindowMask;
  if (shared) {
    u8* q[32];
    map_shared(w, in, shared, off, bytes, write, q);
    for (u32 k = shared; k; k &= k - 1) p[__builtin_ctz(k)] = q[__builtin_ctz(k)];
  }
  if (local) map_local(w, in, local, off, bytes, write, p);
}

void shared_read(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes) {
  Block& b = shared_owner(w, in, lane, addr);
  u32 off = u32(addr) & kSharedOffsetMask;
  if (!b.init_bits.empty())
    for (u32 i = 0; i < bytes; ++i)
      if (!b.init_bits[off + i]) bad_access(w, in, lane, "read of uninitialised memory", "shared", off + i - kSharedBase, bytes, false);
  if (b.races && &b == w.block) b.races->read(w, in, lane, off, bytes);
}

void shared_write(Warp& w, const Instr& in, int lane, u64 addr, u32 bytes, const u8* data) {
  Block& b = shared_owner(w, in, lane, addr);
  u32 off = u32(addr) & kSharedOffsetMask;
  if (!b.init_bits.empty()) std::fill_n(b.init_bits.begin() + off, bytes, u8(1));
  if (b.races) {
    if (&b == w.block) b.races->write(w, in, lane, off, bytes, data);
    else b.races->forget(off, bytes);
  }
}

// ---- races ----
void RaceChecker::start(u32 bytes, u32 warps) {
  warps_ = warps;
  epoch_ = 1;
  cells_.assign(bytes, Cell());
  vc_.assign(warps, std::vector<u32>(warps, 0));
  epoch_base_.assign(warps, 1);
  for (u32 i = 0; i < warps; ++i) vc_[i][i] = 1;
  barrier_vc_.assign(16, std::vector<u32>(warps, 0));
  objects_.clear();
}

void RaceChecker::hazard(Warp& w, const Instr& in, int lane, u32 off, const char* kind, u32 other, int other_lane) {
  char buf[256];
  if (other_lane >= 0)
    snprintf(buf, sizeof buf, "shared memory race (%s) at shared offset %u with warp %u lane %d, no barrier in between", kind, off - kSharedBase, other, other_lane);
  else
    snprintf(buf, sizeof buf, "shared memory race (%s) at shared offset %u with warp %u, no barrier in between", kind, off - kSharedBase, other);
  w.fault(in, lane, buf);
}

void RaceChecker::read(Warp& w, const Instr& in, int lane, u32 off, u32 n) {
  const u32 id = w.id;
  for (u32 i = off; i < off + n; ++i) {
    Cell& c = cells_[i];
    if (c.pending) hazard(w, in, lane, i, "read of an asynchronous copy that has not been waited for", c.writer, c.write_lane);
    if (c.writer != 0xff) {
      if (c.writer != id) {
        if (vc_[id][c.writer] < c.write_clock) hazard(w, in, lane, i, "read after write", c.writer, c.write_lane);
      } else if (c.write_lane != lane && c.write_sync == w.sync_clock) {
        hazard(w, in, lane, i, "read after write within the warp, no __syncwarp", c.writer, c.write_lane);
      }
    }
    if (c.read_epoch != epoch_) { c.read_epoch = epoch_; c.read_mask = 0; }
    c.read_mask |= 1u << id;
    c.reader = u8(id);
    c.read_clock = vc_[id][id];
  }
}

void RaceChecker::write(Warp& w, const Instr& in, int lane, u32 off, u32 n, const u8* data) {
  const u32 id = w.id;
  for (u32 i = off; i < off + n; ++i) {
    Cell& c = cells_[i];
    if (c.pending) hazard(w, in, lane, i, "write over an asynchronous copy in flight", c.writer, c.write_lane);
    const bool same = data && w.block->shared[i] == data[i - off];
    if (c.writer != 0xff && !same) {
      if (c.writer != id) {
        if (vc_[id][c.writer] < c.write_clock) hazard(w, in, lane, i, "write after write", c.writer, c.write_lane);
      } else if (c.write_lane != lane && c.write_sync == w.sync_clock) {
        hazard(w, in, lane, i, "write after write within the warp, no __syncwarp", c.writer, c.write_lane);
      }
    }
    if (c.read_epoch == epoch_ && !same) {
      u32 others = c.read_mask & ~(1u << id);
      if (others && !(others & (others - 1)) && c.reader == u32(__builtin_ctz(others))) {
        if (vc_[id][c.reader] < c.read_clock) hazard(w, in, lane, i, "write after read", c.reader, -1);
      } else {
        for (; others; others &= others - 1) {
          u32 r = __builtin_ctz(others);
          if (vc_[id][r] < epoch_base_[r]) hazard(w, in, lane, i, "write after read", r, -1);
        }
      }
    }
    c.writer = u8(id);
    c.write_lane = u8(lane);
    c.write_clock = vc_[id][id];
    c.write_sync = w.sync_clock;
    c.read_mask = 0;
  }
}

void RaceChecker::async_issue(Warp& w, const Instr& in, int lane, u32 off, u32 n) {
  write(w, in, lane, off, n, nullptr);
  for (u32 i = off; i < off + n; ++i) cells_[i].pending = 1;
}

void RaceChecker::async_done(Warp& w, int lane, u32 off, u32 n) {
  for (u32 i = off; i < off + n; ++i) {
    Cell& c = cells_[i];
    c.pending = 0;
    c.writer = u8(w.id);
    c.write_lane = u8(lane);
    c.write_clock = vc_[w.id][w.id];
    c.write_sync = w.sync_clock;
  }
}

void RaceChecker::forget(u32 off, u32 n) {
  for (u32 i = off; i < off + n; ++i) cells_[i] = Cell();
}

void RaceChecker::arrive(Warp& w, u32 id) {
  join(barrier_vc_[id], vc_[w.id]);
  ++vc_[w.id][w.id];
}

void RaceChecker::barrier(Block& b, u32 id, bool all) {
  for (u32 i = 0; i < warps_; ++i) {
    Warp& w = *b.warps[i];
    bool here = false;
    for (u32 m = w.bar_wait; m; m &= m - 1) here |= w.bar_id[__builtin_ctz(m)] == id;
    if (!here) continue;
    join(vc_[i], barrier_vc_[id]);
    ++vc_[i][i];
  }
  std::fill(barrier_vc_[id].begin(), barrier_vc_[id].end(), 0);
  if (all) {
    ++epoch_;
    for (u32 i = 0; i < warps_; ++i) epoch_base_[i] = vc_[i][i];
  }
}

void RaceChecker::release(Warp& w, u64 object) {
  auto& o = objects_[object];
  if (o.empty()) o.assign(warps_, 0);
  join(o, vc_[w.id]);
  ++vc_[w.id][w.id];
}

void RaceChecker::acquire(Warp& w, u64 object) {
  auto it = objects_.find(object);
  if (it != objects_.end()) join(vc_[w.id], it->second);
}

void RaceChecker::everything_ordered(Block&) {
  std::vector<u32> top(warps_, 0);
  for (auto& v : vc_) join(top, v);
  for (u32 i = 0; i < warps_; ++i) { vc_[i] = top; ++vc_[i][i]; }
  ++epoch_;
  for (u32 i = 0; i < warps_; ++i) epoch_base_[i] = vc_[i][i];
}

}  // namespace gpusim::ptx
