// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// atom and red.
#include <algorithm>
#include <bit>
#include <cmath>

#include "checks.h"
#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

enum AtomOp : u8 { AAdd, AMin, AMax, AAnd, AOr, AXor, AInc, ADec, AExch, ACas };

float min_num(float a, float b) { return a != a ? b : b != b ? a : std::min(a, b); }
float max_num(float a, float b) { return a != a ? b : b != b ? a : std::max(a, b); }

u16 half_op(AtomOp op, bool bf, u16 x, u16 y) {
  float a = bf ? bf16_to_f32(x) : f16_to_f32(x), b = bf ? bf16_to_f32(y) : f16_to_f32(y);
  float r = op == AAdd ? a + b : op == AMin ? min_num(a, b) : max_num(a, b);
  return bf ? f32_to_bf16(r) : f32_to_f16(r);
}

// The new value of one element, as bits.
u64 apply(AtomOp op, Type t, u64 old, u64 v, u64 cmp) {
  switch (op) {
    case AExch: return v;
    case ACas: return old == cmp ? v : old;
    case AAnd: return old & v;
    case AOr: return old | v;
    case AXor: return old ^ v;
    case AInc: return u32(old) >= u32(v) ? 0 : u32(old) + 1;
    case ADec: return u32(old) == 0 || u32(old) > u32(v) ? u32(v) : u32(old) - 1;
    default: break;
  }
  switch (t) {
    case Type::F32: {
      float a = bits_f32(u32(old)), b = bits_f32(u32(v));
      return f32_bits(op == AAdd ? a + b : op == AMin ? min_num(a, b) : max_num(a, b));
    }
    case Type::F64: return std::bit_cast<u64>(std::bit_cast<double>(old) + std::bit_cast<double>(v));
    case Type::F16: case Type::BF16: return half_op(op, t == Type::BF16, u16(old), u16(v));
    case Type::F16x2: case Type::BF16x2:
      return half_op(op, t == Type::BF16x2, u16(old), u16(v)) | u32(half_op(op, t == Type::BF16x2, u16(old >> 16), u16(v >> 16))) << 16;
    case Type::S32: return op == AAdd ? u32(old + v) : u32(op == AMin ? std::min(s32(old), s32(v)) : std::max(s32(old), s32(v)));
    case Type::S64: return op == AAdd ? old + v : u64(op == AMin ? std::min(s64(old), s64(v)) : std::max(s64(old), s64(v)));
    case Type::U64: case Type::B64: return op == AAdd ? old + v : op == AMin ? std::min(old, v) : std::max(old, v);
    default: return op == AAdd ? u32(old + v) : op == AMin ? std::min(u32(old), u32(v)) : std::max(u32(old), u32(v));
  }
}

template <class T> u64 rmw(u8* at, AtomOp op, Type t, u64 v, u64 cmp) {
  T* p = reinterpret_cast<T*>(at);
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  for (;;) {
    T next = T(apply(op, t, old, v, T(cmp)));
    if (__atomic_compare_exchange_n(p, &old, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return old;
  }
}

// m0: address row bytes; m1: op; m2: type; e: space (0 generic, 1 global, 2 shared); d2: element count;
// ext->r: results, operands, compares (d2 of each; results empty for red); ext->size: register bytes of the results
void h_atom(Warp& w, const Instr& in, u32 m) {
  const AtomOp op = AtomOp(in.m1);
  const Type t = Type(in.m2);
  const u32 n = in.d2, elem = type_bytes(t), bytes = n * elem;
  const Ext& e = *in.ext;
  const bool result = in.d != kNone;
  u64 a[32];
  u8* p[32];
  const u64 off = u64(in.imm);
  for (int l = 0; l < 32; ++l)
    a[l] = in.m0 == 8 ? w.src<u64>(in.a)[l] + off : in.m0 == 4 ? u32(w.src<u32>(in.a)[l] + u32(off)) : off;
  u32 shared = 0;
  if (in.e == 2) { map_shared(w, in, m, a, bytes, true, p); shared = m; }
  else if (in.e == 1) map_global(w, in, m, a, bytes, true, p);
  else map_generic(w, in, m, a, bytes, true, p, &shared);
  if (shared && shared_checked(w)) {
    for (u32 k = shared; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      u32 o = u32(a[l]) & kSharedOffsetMask;
      Block& b = shared_owner(w, in, l, a[l] & ~kWindowMask);
      if (b.races && &b == w.block) { b.races->acquire(w, o); b.races->release(w, o); }
      if (!b.init_bits.empty()) std::fill_n(b.init_bits.begin() + o, bytes, u8(1));
    }
  }
  w.st.atomics += __builtin_popcount(m);
  w.host->spin_hints += 1;
  const size_t val0 = result ? n : 0, cmp0 = val0 + n;
  auto read = [&](u32 ref, int l) -> u64 {
    switch (elem) {
      case 2: return w.src<u16>(ref)[l];
      case 4: return w.src<u32>(ref)[l];
      default: return w.src<u64>(ref)[l];
    }
  };
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    for (u32 i = 0; i < n; ++i) {
      u64 v = read(e.r[val0 + i], l), c = op == ACas ? read(e.r[cmp0 + i], l) : 0, old;
      u8* at = p[l] + i * elem;
      switch (elem) {
        case 2: old = rmw<u16>(at, op, t, v, c); break;
        case 4: old = rmw<u32>(at, op, t, v, c); break;
        default: old = rmw<u64>(at, op, t, v, c); break;
      }
      if (result && e.r[i] != kNone) {
        switch (elem) {
          case 2: w.dst<u16>(e.r[i])[l] = u16(old); break;
          case 4: w.dst<u32>(e.r[i])[l] = u32(old); break;
          default: w.dst<u64>(e.r[i])[l] = old; break;
        }
      }
    }
  }
}

// 128-bit exchange and compare-and-swap (global memory, under one lock).
void h_atom128(Warp& w, const Instr& in, u32 m) {
  static std::mutex lock;
  struct X { u64 lo, hi; };
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u64 a = in.m0 == 8 ? w.src<u64>(in.a)[l] + u64(in.imm) : u64(in.imm);
    if (a & 15) w.fault(in, l, "misaligned access: 128-bit atomic");
    global_range(w, in, l, a, 16, true);
    std::lock_guard g(lock);
    X* p = reinterpret_cast<X*>(a);
    X old = *p, c = in.m1 == ACas ? w.src<X>(in.b)[l] : old, v = w.src<X>(in.c)[l];
    if (old.lo == c.lo && old.hi == c.hi) *p = v;
    if (in.d != kNone) w.dst<X>(in.d)[l] = old;
  }
  w.st.atomics += __builtin_popcount(m);
}

void d_atom(Decoder& d, bool red) {
  static const std::pair<const char*, AtomOp> ops[] = {{"add", AAdd}, {"min", AMin}, {"max", AMax}, {"and", AAnd}, {"or", AOr},
      {"xor", AXor}, {"inc", AInc}, {"dec", ADec}, {"exch", AExch}, {"cas", ACas}};
  int op = -1;
  for (auto& [n, o] : ops) if (d.has(n)) op = o;
  if (op < 0) d.fail("unknown atomic operation");
  const Type t = d.type();
  const size_t base = red ? 0 : 1;
  const Operand& addr = d.op(base);
  u32 space = d.has("global") ? 1 : (d.has("shared") || d.has("shared::cta") || d.has("shared::cluster")) ? 2 : 0;
  if (t == Type::B128) {
    u32 b = op == ACas ? d.src(d.op(2), t) : kNone, c = d.src(d.op(op == ACas ? 3 : 2), t), r = d.dst(d.op(0));
    Instr& i = d.emit(h_atom128);
    i.b = b; i.c = c; i.d = r; i.m1 = u8(op);
    i.m0 = u8(d.address(i, addr, Space::Global));
    return;
  }
  std::vector<u32> refs;
  u32 n = 1;
  auto list = [&](const Operand& o, bool out) {
    if (o.kind == Operand::Vec) { n = u32(o.sub.size()); for (auto& s : o.sub) refs.push_back(out ? d.dst(s) : d.src(s, t)); }
    else refs.push_back(out ? d.dst(o) : d.src(o, t));
  };
  if (!red) list(d.op(0), true);
  const bool result = !red && d.op(0).kind != Operand::Sink;
  if (!red && !result) refs.clear();
  if (op == ACas) { list(d.op(base + 2), false); list(d.op(base + 1), false); }
  else list(d.op(base + 1), false);
  Instr& i = d.emit(h_atom);
  d.ext(i).r = refs;
  i.d = result ? 0 : kNone;
  i.d2 = n;
  i.e = space;
  i.m1 = u8(op);
  i.m2 = u8(t);
  i.m0 = u8(d.address(i, addr, Space::Generic));
}

}  // namespace

void register_atomic() {
  auto& t = op_table();
  t["atom"] = [](Decoder& d) { if (d.has("async")) d.fail("atom.async"); d_atom(d, false); };
  t["red"] = [](Decoder& d) { if (d.has("async")) d.fail("red.async"); d_atom(d, true); };
}

}  // namespace gpusim::ptx
