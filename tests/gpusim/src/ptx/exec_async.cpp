// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// cp.async and mbarrier.
#include "async.h"

#include <algorithm>

#include "checks.h"
#include "lanes.h"
#include "mbarrier.h"

namespace gpusim::ptx {
namespace {

u64 address_of(const Warp& w, const Instr&, u32 row, u32 bytes, s64 off, int l) {
  return bytes == 8 ? w.src<u64>(row)[l] + u64(off) : bytes == 4 ? u64(u32(w.src<u32>(row)[l] + u32(off))) : u64(off);
}

// ---- cp.async ----
// a, imm, m0: destination; b, d2, m1: source; m2: bytes; c: source size row (m-bit in e: 1 size, 2 ignore predicate)
void h_cp_async(Warp& w, const Instr& in, u32 m) {
  const u32 n = in.m2;
  const bool late = w.launch->options->late_async_copies;
  RaceChecker* races = w.block->races.get();
  u64 global[32];
  u32 reading = 0;
  for (u32 k = m; k; k &= k - 1) {
    const int l = __builtin_ctz(k);
    const u64 dst = address_of(w, in, in.a, in.m0, in.imm, l), src = address_of(w, in, in.b, in.m1, s32(in.d2), l);
    u8* to = shared_range(w, in, l, dst, n, n, true);
    u32 take = n;
    if (in.e == 1) take = w.src<u32>(in.c)[l];
    else if (in.e == 2 && (w.pred(in.c) >> l & 1)) take = 0;
    if (take > n) w.fault(in, l, "cp.async source size " + std::to_string(take) + " exceeds the copy size");
    AsyncCopy c{u32(dst), u8(n), {}};
    if (take) {
      if (src & (n - 1)) w.fault(in, l, "misaligned access: cp.async from global address " + std::to_string(src));
      global_range(w, in, l, src, take, false);
      std::memcpy(c.data, reinterpret_cast<const u8*>(src), take);
      global[l] = src;
      reading |= 1u << l;
      w.st.global_load_bytes += take;
      note_sectors(w, src, take, false);
    }
    w.st.async_copy_bytes += n;
    if (races) races->async_issue(w, in, l, u32(dst) & kSharedOffsetMask, n);
    if (!late) std::memcpy(to, c.data, n);
    w.async->lane[l].copies.push_back(c);
  }
  if (reading) w.st.global_load_sectors += count_sectors(reading, global, n);
}

// Makes the oldest `n` copies of a lane visible.
void complete(Warp& w, const Instr& in, int l, size_t n) {
  LaneCopies& c = w.async->lane[l];
  const bool late = w.launch->options->late_async_copies;
  Block& b = *w.block;
  for (size_t i = 0; i < n; ++i) {
    const AsyncCopy& x = c.copies[i];
    u8* p = shared_range(w, in, l, x.dst, x.bytes, 1, true);
    if (late) std::memcpy(p, x.data, x.bytes);
    const u32 off = x.dst & kSharedOffsetMask;
    if (!b.init_bits.empty()) std::fill_n(b.init_bits.begin() + off, x.bytes, u8(1));
    if (b.races) b.races->async_done(w, l, off, x.bytes);
  }
  c.copies.erase(c.copies.begin(), c.copies.begin() + n);
}

void h_commit(Warp& w, const Instr&, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    LaneCopies& c = w.async->lane[__builtin_ctz(k)];
    c.group_end.push_back(u32(c.copies.size()));
  }
}
void h_wait_group(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    const int l = __builtin_ctz(k);
    LaneCopies& c = w.async->lane[l];
    const size_t keep = size_t(in.imm);
    if (c.group_end.size() <= keep) continue;
    const size_t groups = c.group_end.size() - keep;
    const u32 n = c.group_end[groups - 1];
    complete(w, in, l, n);
    c.group_end.erase(c.group_end.begin(), c.group_end.begin() + groups);
    for (auto& e : c.group_end) e -= n;
  }
}
void h_wait_all(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    const int l = __builtin_ctz(k);
    LaneCopies& c = w.async->lane[l];
    complete(w, in, l, c.copies.size());
    c.group_end.clear();
  }
}
// cp.async.mbarrier.arrive: all earlier copies of the thread land, then it arrives.
// m1: noinc
void h_cp_async_mbarrier(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    const int l = __builtin_ctz(k);
    complete(w, in, l, w.async->lane[l].copies.size());
    w.async->lane[l].group_end.clear();
    const u64 a = address_of(w, in, in.a, in.m0, in.imm, l);
    if (in.m1) mbarrier_update(w, in, l, a, 1, 0);
    else mbarrier_at(w, in, l, a);  // one more pending arrival and one arrival cancel out
    if (w.block->races) w.block->races->release(w, u32(a) & kSharedOffsetMask);
  }
}

void d_cp(Decoder& d) {
  if (d.has("bulk")) return decode_bulk(d);
  if (d.in->op.size() < 2 || d.in->op[1] != "async") d.fail("cp");
  if (d.has("commit_group")) { d.emit(h_commit); return; }
  if (d.has("wait_group")) { d.emit(h_wait_group).imm = s64(d.op(0).imm); return; }
  if (d.has("wait_all")) { d.emit(h_wait_all); return; }
  if (d.has("mbarrier")) {
    Instr& i = d.emit(h_cp_async_mbarrier);
    i.m0 = u8(d.address(i, d.op(0), Space::Shared));
    i.m1 = d.has("noinc");
    return;
  }
  const bool policy = d.has("L2::cache_hint");
  u32 c = kNone, kind = 0;
  if (d.nops() > size_t(3 + policy)) {
    const Operand& o = d.op(3);
    if (d.reg_type(o) == Type::Pred) { kind = 2; c = d.pred_src(o); } else { kind = 1; c = d.src(o, Type::U32); }
  }
  Instr& i = d.emit(h_cp_async);
  i.m1 = u8(d.address(i, d.op(1), Space::Global));
  i.b = i.a;
  i.d2 = u32(i.imm);
  i.m0 = u8(d.address(i, d.op(0), Space::Shared));
  i.m2 = u8(d.op(2).imm);
  i.c = c;
  i.e = kind;
  if (i.m2 != 4 && i.m2 != 8 && i.m2 != 16) d.fail("cp.async size");
}

// ---- mbarrier ----
// a, imm, m0: address; m1: bit 0 generic address; b: count or state; c: second operand
u64 shared_address(Warp& w, const Instr& in, int l) {
  u64 a = address_of(w, in, in.a, in.m0, in.imm, l);
  if (in.m1 & 1) {
    if ((a & kWindowMask) != kSharedWindow) w.fault(in, l, "mbarrier address is not in shared memory");
    a &= ~kWindowMask;
  }
  return a;
}

void h_mbar_init(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u8* p = mbarrier_at(w, in, l, shared_address(w, in, l), false);
    u32 n = w.src<u32>(in.b)[l];
    if (n == 0 || n > 0xfffff) w.fault(in, l, "mbarrier.init count " + std::to_string(n));
    Mbarrier b;
    b.set(n, n, 0, 0);
    std::memcpy(p, &b.v, 8);
  }
}
void h_mbar_inval(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    std::memset(mbarrier_at(w, in, l, shared_address(w, in, l)), 0, 8);
  }
}
// m2: 0 arrive, 1 arrive.expect_tx, 2 expect_tx, 3 complete_tx, 4 arrive_drop, 5 arrive_drop.expect_tx
void h_mbar_arrive(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    const u64 a = shared_address(w, in, l);
    s64 v = in.b == kNone ? 1 : s64(w.src<u32>(in.b)[l]);
    u64 state;
    if (w.block->races) w.block->races->release(w, u32(a) & kSharedOffsetMask);
    switch (in.m2) {
      case 0: state = mbarrier_update(w, in, l, a, v, 0); break;
      case 1: state = mbarrier_update(w, in, l, a, 1, v); break;
      case 2: state = mbarrier_update(w, in, l, a, 0, v); break;
      case 3: state = mbarrier_update(w, in, l, a, 0, -v); break;
      case 4: state = mbarrier_update(w, in, l, a, v, 0, v); break;
      default: state = mbarrier_update(w, in, l, a, 1, v, 1); break;
    }
    if (in.d != kNone) w.dst<u64>(in.d)[l] = state;
  }
}
// m2: bit 0 parity operand, bit 1 try_wait
void h_mbar_wait(Warp& w, const Instr& in, u32 m) {
  w.block->cluster->land_bulk();
  u32 ok = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    const u64 a = shared_address(w, in, l);
    Mbarrier b;
    std::memcpy(&b.v, mbarrier_at(w, in, l, a), 8);
    u32 phase;
    if (in.m2 & 1) phase = w.src<u32>(in.b)[l] & 1;
    else { Mbarrier s; s.v = w.src<u64>(in.b)[l]; phase = s.phase(); }
    if (b.phase() != phase) {
      ok |= 1u << l;
      if (w.block->races) w.block->races->acquire(w, u32(a) & kSharedOffsetMask);
    }
  }
  w.set_pred(in.d, m, ok);
  if (ok != m) { w.yielded = true; w.host->spin_hints += 1; w.resched(); }
}
void h_mbar_pending(Warp& w, const Instr& in, u32 m) {
  const u64* s = w.src<u64>(in.a);
  active_lanes(w.dst<u32>(in.d), m, [=](int l) { return u32(s[l] & 0xfffff); });
}

void d_mbarrier(Decoder& d) {
  const std::string& op = d.in->op[1];
  bool generic = true;
  for (auto& p : d.in->op) if (p.starts_with("shared")) generic = false;
  auto finish = [&](Instr& i, const Operand& addr) {
    i.m0 = u8(d.address(i, addr, Space::Shared));
    i.m1 = u8(generic && addr.reg >= 0);
  };
  if (op == "init") {
    u32 b = d.src(d.op(1), Type::U32);
    Instr& i = d.emit(h_mbar_init);
    finish(i, d.op(0));
    i.b = b;
  } else if (op == "inval") {
    finish(d.emit(h_mbar_inval), d.op(0));
  } else if (op == "pending_count") {
    u32 a = d.src(d.op(1), Type::B64), r = d.dst(d.op(0));
    Instr& i = d.emit(h_mbar_pending);
    i.a = a; i.d = r;
  } else if (op == "test_wait" || op == "try_wait") {
    const bool parity = d.has("parity");
    u32 b = d.src(d.op(2), parity ? Type::U32 : Type::B64), r = d.dst(d.op(0));
    Instr& i = d.emit(h_mbar_wait);
    finish(i, d.op(1));
    i.b = b; i.d = r;
    i.m2 = u8(parity | (op == "try_wait") << 1);
  } else {
    const bool tx = d.has("expect_tx");
    int kind = op == "arrive" ? (tx ? 1 : 0) : op == "arrive_drop" ? (tx ? 5 : 4) : op == "expect_tx" ? 2 : op == "complete_tx" ? 3 : -1;
    if (kind < 0) d.fail("unknown mbarrier operation");
    size_t at = d.op(0).kind == Operand::Addr ? 0 : 1;
    u32 r = at ? d.dst(d.op(0)) : kNone;
    u32 b = d.nops() > at + 1 ? d.src(d.op(at + 1), Type::U32) : kNone;
    Instr& i = d.emit(h_mbar_arrive);
    finish(i, d.op(at));
    i.b = b; i.d = r;
    i.m2 = u8(kind);
  }
}

// mapa: the address of the same variable in another block of the cluster.
template <class T> void h_mapa(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  const u32* r = w.src<u32>(in.b);
  active_lanes(w.dst<T>(in.d), m, [&](int l) {
    if (r[l] >= w.launch->config.cluster.count()) w.fault(in, l, "mapa: no block " + std::to_string(r[l]) + " in the cluster");
    return T((a[l] & ~(T(0xff) << kClusterShift)) | T(r[l] + 1) << kClusterShift);
  });
}
template <class T> void h_getctarank(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  active_lanes(w.dst<u32>(in.d), m, [&](int l) { u32 k = u32(a[l]) >> kClusterShift; return k ? k - 1 : w.block->rank; });
}

}  // namespace

u8* mbarrier_at(Warp& w, const Instr& in, int lane, u64 addr, bool must_be_valid) {
  u8* p = shared_range(w, in, lane, addr, 8, 8, true);
  Mbarrier b;
  std::memcpy(&b.v, p, 8);
  if (must_be_valid && (!b.valid() || b.v == ~0ull)) w.fault(in, lane, "mbarrier object is not initialised");
  return p;
}

u64 mbarrier_update(Warp& w, const Instr& in, int lane, u64 addr, s64 arrivals, s64 tx, s64 drop) {
  u8* p = mbarrier_at(w, in, lane, addr);
  Mbarrier b;
  std::memcpy(&b.v, p, 8);
  const u64 before = b.v;
  s64 pending = s64(b.pending()) - arrivals, expected = s64(b.expected()) - drop, t = b.tx() + tx;
  if (pending < 0 || expected < 0) w.fault(in, lane, "mbarrier: more arrivals than expected in this phase");
  if (t > 0xfffff || t < -0xfffff) w.fault(in, lane, "mbarrier: transaction count out of range");
  u32 phase = b.phase();
  if (pending == 0 && t == 0) { phase ^= 1; pending = expected; }
  b.set(u32(pending), u32(expected), phase, t);
  std::memcpy(p, &b.v, 8);
  return before;
}

void register_async() {
  auto& t = op_table();
  t["cp"] = d_cp;
  t["mbarrier"] = d_mbarrier;
  t["tensormap"] = decode_tensormap;
  t["mapa"] = [](Decoder& d) {
    const Type t = d.type();
    u32 b = d.src(d.op(2), Type::U32);
    Instr& i = emit1(d, type_bytes(t) == 8 ? h_mapa<u64> : h_mapa<u32>, t);
    i.b = b;
  };
  t["getctarank"] = [](Decoder& d) { emit1(d, type_bytes(d.type()) == 8 ? h_getctarank<u64> : h_getctarank<u32>, d.type()); };
}

}  // namespace gpusim::ptx
