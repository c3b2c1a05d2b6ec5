// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Warp-level communication: shfl, vote, match, activemask, redux, elect.
#include <bit>

#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

// m0: 0 up, 1 down, 2 bfly, 3 idx. a: value, b: lane argument, c: clamp/segment mask, e: members
void h_shfl(Warp& w, const Instr& in, u32 m) {
  if (in.e != kNone && !(m = sync_gate(w, in, m, w.src<u32>(in.e)))) return;
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  u32 out[32], valid = 0;
  for (u32 k = m; k; k &= k - 1) {
    const int l = __builtin_ctz(k);
    const s32 bv = s32(b[l] & 31), cv = s32(c[l] & 31), seg = s32(c[l] >> 8 & 31);
    const s32 max_lane = (l & seg) | (cv & ~seg), min_lane = l & seg;
    s32 j;
    bool p;
    switch (in.m0) {
      case 0: j = l - bv; p = j >= max_lane; break;
      case 1: j = l + bv; p = j <= max_lane; break;
      case 2: j = l ^ bv; p = j <= max_lane; break;
      default: j = min_lane | (bv & ~seg); p = j <= max_lane; break;
    }
    if (!p) j = l;
    if (in.e != kNone && !(m >> j & 1)) {
      // Reading a lane that does not take part gives an undefined value.
      out[l] = 0xdeadbeefu;
    } else {
      out[l] = a[j];
    }
    valid |= u32(p) << l;
  }
  u32* d = in.d == kNone ? nullptr : w.dst<u32>(in.d);
  if (d) for (u32 k = m; k; k &= k - 1) d[__builtin_ctz(k)] = out[__builtin_ctz(k)];
  if (in.d2 != kNone) w.set_pred(in.d2, m, valid);
}
void d_shfl(Decoder& d) {
  const bool sync = d.has("sync");
  u32 a = d.src(d.op(1), Type::B32), b = d.src(d.op(2), Type::B32), c = d.src(d.op(3), Type::B32), e = sync ? d.src(d.op(4), Type::B32) : kNone;
  u32 r, p = kNone;
  if (d.op(0).kind == Operand::Pair) { r = d.dst(d.op(0).sub[0]); p = d.dst(d.op(0).sub[1]); } else r = d.dst(d.op(0));
  Instr& i = d.emit(h_shfl);
  i.a = a; i.b = b; i.c = c; i.e = e; i.d = r; i.d2 = p;
  i.m0 = d.has("up") ? 0 : d.has("down") ? 1 : d.has("bfly") ? 2 : 3;
}

// m0: 0 all, 1 any, 2 uni, 3 ballot; m1: negated source
void h_vote(Warp& w, const Instr& in, u32 m) {
  u32 full[32];
  const u32* members = full;
  if (in.e != kNone) {
    if (!(m = sync_gate(w, in, m, w.src<u32>(in.e)))) return;
    members = w.src<u32>(in.e);
  } else {
    for (auto& x : full) x = m;
  }
  u32 p = w.pred(in.a);
  if (in.m1) p = ~p;
  u32 ballot[32], bits = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u32 mm = members[l] & ~w.exited, v = p & mm;
    ballot[l] = v;
    bool r = in.m0 == 0 ? v == mm : in.m0 == 1 ? v != 0 : v == 0 || v == mm;
    bits |= u32(r) << l;
  }
  if (in.m0 == 3) {
    u32* d = w.dst<u32>(in.d);
    for (u32 k = m; k; k &= k - 1) d[__builtin_ctz(k)] = ballot[__builtin_ctz(k)];
  } else {
    w.set_pred(in.d, m, bits);
  }
}
void d_vote(Decoder& d) {
  Operand p = d.op(1);
  bool neg = p.neg;
  p.neg = false;
  u32 a = d.pred_src(p), e = d.has("sync") ? d.src(d.op(2), Type::B32) : kNone, r = d.dst(d.op(0));
  Instr& i = d.emit(h_vote);
  i.a = a; i.e = e; i.d = r;
  i.m0 = d.has("all") ? 0 : d.has("any") ? 1 : d.has("uni") ? 2 : 3;
  i.m1 = neg;
}

template <class T> void h_match(Warp& w, const Instr& in, u32 m) {
  if (!(m = sync_gate(w, in, m, w.src<u32>(in.e)))) return;
  const T* a = w.src<T>(in.a);
  const u32* members = w.src<u32>(in.e);
  u32 out[32], pred = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u32 same = 0;
    const u32 mm = members[l] & ~w.exited;
    for (u32 j = mm; j; j &= j - 1) if (a[__builtin_ctz(j)] == a[l]) same |= j & -j;
    if (in.m0) {  // all
      bool all = same == mm;
      out[l] = all ? same : 0;
      pred |= u32(all) << l;
    } else {
      out[l] = same;
    }
  }
  if (in.d != kNone) for (u32 k = m; k; k &= k - 1) w.dst<u32>(in.d)[__builtin_ctz(k)] = out[__builtin_ctz(k)];
  if (in.d2 != kNone) w.set_pred(in.d2, m, pred);
}
void d_match(Decoder& d) {
  const Type t = d.type();
  u32 a = d.src(d.op(1), t), e = d.src(d.op(2), Type::B32), r, p = kNone;
  if (d.op(0).kind == Operand::Pair) { r = d.dst(d.op(0).sub[0]); p = d.dst(d.op(0).sub[1]); } else r = d.dst(d.op(0));
  Instr& i = d.emit(type_bytes(t) == 8 ? h_match<u64> : h_match<u32>);
  i.a = a; i.e = e; i.d = r; i.d2 = p;
  i.m0 = d.has("all");
}

void h_activemask(Warp& w, const Instr& in, u32 m) { each_lane(w.dst<u32>(in.d), m, [=](int) { return m; }); }

// m0: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; m1: 0 unsigned, 1 signed, 2 f32; m2: bit 0 abs, bit 1 NaN
void h_redux(Warp& w, const Instr& in, u32 m) {
  if (!(m = sync_gate(w, in, m, w.src<u32>(in.e)))) return;
  const u32 *a = w.src<u32>(in.a), *members = w.src<u32>(in.e);
  u32 out[32];
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    bool first = true;
    u32 r = 0;
    for (u32 j = members[l] & ~w.exited; j; j &= j - 1) {
      u32 v = a[__builtin_ctz(j)];
      if (in.m1 == 2 && in.m2 & 1) v &= 0x7fffffff;
      if (first) { r = v; first = false; continue; }
      if (in.m1 == 2) {
        float x = bits_f32(r), y = bits_f32(v);
        float z = x != x ? ((in.m2 & 2) ? x : y) : y != y ? ((in.m2 & 2) ? y : x) : in.m0 == 1 ? std::fmin(x, y) : std::fmax(x, y);
        r = f32_bits(z);
        continue;
      }
      switch (in.m0) {
        case 0: r += v; break;
        case 1: r = in.m1 ? u32(std::min(s32(r), s32(v))) : std::min(r, v); break;
        case 2: r = in.m1 ? u32(std::max(s32(r), s32(v))) : std::max(r, v); break;
        case 3: r &= v; break;
        case 4: r |= v; break;
        default: r ^= v; break;
      }
    }
    out[l] = r;
  }
  u32* d = w.dst<u32>(in.d);
  for (u32 k = m; k; k &= k - 1) d[__builtin_ctz(k)] = out[__builtin_ctz(k)];
}
void d_redux(Decoder& d) {
  u32 a = d.src(d.op(1), d.type()), e = d.src(d.op(2), Type::B32), r = d.dst(d.op(0));
  Instr& i = d.emit(h_redux);
  i.a = a; i.e = e; i.d = r;
  i.m0 = d.has("add") ? 0 : d.has("min") ? 1 : d.has("max") ? 2 : d.has("and") ? 3 : d.has("or") ? 4 : 5;
  i.m1 = d.type() == Type::F32 ? 2 : is_signed(d.type());
  i.m2 = u8(d.has("abs") | d.has("NaN") << 1);
}

void h_elect(Warp& w, const Instr& in, u32 m) {
  if (!(m = sync_gate(w, in, m, w.src<u32>(in.e)))) return;
  const u32* members = w.src<u32>(in.e);
  u32 leader[32], pred = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    leader[l] = u32(__builtin_ctz(members[l] & ~w.exited));
    pred |= u32(leader[l] == u32(l)) << l;
  }
  if (in.d != kNone) for (u32 k = m; k; k &= k - 1) w.dst<u32>(in.d)[__builtin_ctz(k)] = leader[__builtin_ctz(k)];
  if (in.d2 != kNone) w.set_pred(in.d2, m, pred);
}
void d_elect(Decoder& d) {
  if (d.op(0).kind != Operand::Pair) d.fail("elect.sync needs d|p");
  u32 e = d.src(d.op(1), Type::B32), r = d.dst(d.op(0).sub[0]), p = d.dst(d.op(0).sub[1]);
  Instr& i = d.emit(h_elect);
  i.e = e; i.d = r; i.d2 = p;
}

}  // namespace

void register_warp() {
  auto& t = op_table();
  t["shfl"] = d_shfl;
  t["vote"] = d_vote;
  t["match"] = d_match;
  t["redux"] = d_redux;
  t["elect"] = d_elect;
  t["activemask"] = [](Decoder& d) { u32 r = d.dst(d.op(0)); d.emit(h_activemask).d = r; };
}

}  // namespace gpusim::ptx
