// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Logic, shifts, bit manipulation, comparison and selection.
#include <bit>
#include <cmath>

#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

struct And { template <class T> static T f(T a, T b) { return a & b; } };
struct Or { template <class T> static T f(T a, T b) { return a | b; } };
struct Xor { template <class T> static T f(T a, T b) { return a ^ b; } };
struct Not { template <class T> static T f(T a) { return ~a; } };
struct Cnot { template <class T> static T f(T a) { return a == 0; } };
// Shift amounts clamp at the width.
struct Shl { template <class T> static T f(T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(a << (n & (8 * sizeof(T) - 1))); } };
struct Shr { template <class T> static T f(T a, u32 n) {
  constexpr u32 bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>) return T(a >> (n >= bits ? bits - 1 : n));
  else return n >= bits ? T(0) : T(a >> (n & (bits - 1))); } };
// shf: c is the shift of the 64-bit value b:a.
struct ShfL { static u32 f(u32 a, u32 b, u32 n) { return u32((((u64(b) << 32) | a) << (n & 31)) >> 32); } };
struct ShfR { static u32 f(u32 a, u32 b, u32 n) { return u32(((u64(b) << 32) | a) >> (n & 31)); } };
struct ShfLClamp { static u32 f(u32 a, u32 b, u32 n) { return n >= 32 ? a : ShfL::f(a, b, n); } };
struct ShfRClamp { static u32 f(u32 a, u32 b, u32 n) { return n >= 32 ? b : ShfR::f(a, b, n); } };

template <class T> T bfe(T a, u32 pos, u32 len) {
  constexpr u32 bits = 8 * sizeof(T);
  pos &= 0xff; len &= 0xff;
  using X = std::make_unsigned_t<T>;
  if (len == 0) return 0;
  if constexpr (std::is_signed_v<T>) {
    u32 msb = std::min(pos + len - 1, bits - 1);
    bool sign = (X(a) >> msb) & 1;
    X r = 0;
    for (u32 i = 0; i < bits; ++i) {
      bool bit = (i < len && pos + i < bits) ? (X(a) >> (pos + i)) & 1 : sign;
      r |= X(bit) << i;
    }
    return T(r);
  } else {
    if (pos >= bits) return 0;
    X r = X(a) >> pos;
    return len >= bits ? r : X(r & ((X(1) << len) - 1));
  }
}
struct Bfe { template <class T> static T f(T a, u32 pos, u32 len) { return bfe(a, pos, len); } };
template <class T> void h_bfi(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const u32 *c = w.src<u32>(in.c), *e = w.src<u32>(in.e);
  active_lanes(w.dst<T>(in.d), m, [=](int l) {
    constexpr u32 bits = 8 * sizeof(T);
    u32 pos = c[l] & 0xff, len = e[l] & 0xff;
    if (pos >= bits || !len) return b[l];
    T mask = len >= bits ? ~T(0) : T((T(1) << len) - 1);
    mask = T(mask << pos);
    return T((b[l] & ~mask) | ((a[l] << pos) & mask));
  });
}
struct Popc { template <class T> static u32 f(T a) { return std::popcount(a); } };
struct Clz { template <class T> static u32 f(T a) { return std::countl_zero(a); } };
struct Brev32 { static u32 f(u32 v) {
  v = (v >> 1 & 0x55555555) | (v & 0x55555555) << 1;
  v = (v >> 2 & 0x33333333) | (v & 0x33333333) << 2;
  v = (v >> 4 & 0x0f0f0f0f) | (v & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(v); } };
struct Brev64 { static u64 f(u64 v) { return u64(Brev32::f(u32(v))) << 32 | Brev32::f(u32(v >> 32)); } };
template <bool Shift> struct Bfind { template <class T> static u32 f(T a) {
  using X = std::make_unsigned_t<T>;
  X v = (std::is_signed_v<T> && a < 0) ? X(~X(a)) : X(a);
  if (!v) return 0xffffffffu;
  u32 n = 8 * sizeof(T) - 1 - std::countl_zero(v);
  return Shift ? 8 * sizeof(T) - 1 - n : n; } };
struct Bmsk { static u32 f(u32 a, u32 b) { return a >= 32 ? 0 : (b >= 32 ? ~0u : (1u << b) - 1) << a; } };
struct BmskWrap { static u32 f(u32 a, u32 b) { a &= 31; b &= 31; return ((1u << b) - 1) << a; } };
struct SzextU { static u32 f(u32 a, u32 b) { return b >= 32 ? a : a & ((1u << b) - 1); } };
struct SzextS { static u32 f(u32 a, u32 b) { return b >= 32 ? a : b == 0 ? 0 : u32(s32(a << (32 - b)) >> (32 - b)); } };

u32 prmt(u32 a, u32 b, u32 c, int mode) {
  const u64 v = u64(b) << 32 | a;
  auto byte = [&](u32 i) { return u32(v >> (8 * (i & 7))) & 0xff; };
  static const u8 table[7][4][4] = {
      {},                                                            // default: by selector
      {{0, 1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 6}},      // f4e
      {{0, 7, 6, 5}, {1, 0, 7, 6}, {2, 1, 0, 7}, {3, 2, 1, 0}},      // b4e
      {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 2, 2, 2}, {3, 3, 3, 3}},      // rc8
      {{0, 1, 2, 3}, {1, 1, 2, 3}, {2, 2, 2, 3}, {3, 3, 3, 3}},      // ecl
      {{0, 0, 0, 0}, {0, 1, 1, 1}, {0, 1, 2, 2}, {0, 1, 2, 3}},      // ecr
      {{0, 1, 0, 1}, {2, 3, 2, 3}, {0, 1, 0, 1}, {2, 3, 2, 3}}};     // rc16
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u32 x;
    if (mode == 0) {
      u32 s = c >> (4 * k) & 15;
      x = byte(s & 7);
      if (s & 8) x = x & 0x80 ? 0xff : 0;
    } else {
      x = byte(table[mode][c & 3][k]);
    }
    r |= x << (8 * k);
  }
  return r;
}
void h_prmt(Warp& w, const Instr& in, u32 m) {
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  const int mode = in.m0;
  active_lanes(w.dst<u32>(in.d), m, [=](int l) { return prmt(a[l], b[l], c[l], mode); });
}

// lop3: the sum of the minterms of the table.
void h_lop3(Warp& w, const Instr& in, u32 m) {
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  const u32 t = u32(in.imm);
  u32 k[8];
  for (int i = 0; i < 8; ++i) k[i] = (t >> i & 1) ? ~0u : 0;
  alignas(64) u32 r[32];
  for (int l = 0; l < 32; ++l) {
    u32 x = a[l], y = b[l], z = c[l];
    r[l] = (k[0] & ~x & ~y & ~z) | (k[1] & ~x & ~y & z) | (k[2] & ~x & y & ~z) | (k[3] & ~x & y & z) |
           (k[4] & x & ~y & ~z) | (k[5] & x & ~y & z) | (k[6] & x & y & ~z) | (k[7] & x & y & z);
  }
  if (in.d != kNone) each_lane(w.dst<u32>(in.d), m, [&](int l) { return r[l]; });
  if (in.d2 != kNone) {  // lop3.BoolOp: p = (d != 0) op q
    u32 nz = lane_bits([&](int l) { return r[l] != 0; }), q = w.pred(in.e);
    w.set_pred(in.d2, m, in.m0 ? nz & q : nz | q);
  }
}

void h_fns(Warp& w, const Instr& in, u32 m) {
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  active_lanes(w.dst<u32>(in.d), m, [=](int l) -> u32 {
    u32 mask = a[l], base = b[l];
    s32 n = s32(c[l]);
    if (n == 0) return mask >> (base & 31) & 1 ? base : ~0u;
    int found = 0, want = n < 0 ? -n : n;
    for (s32 p = s32(base); p >= 0 && p < 32; p += n < 0 ? -1 : 1)
      if (mask >> p & 1 && ++found == want) return u32(p);
    return ~0u;
  });
}

// Logic on predicates.
template <int Op> void h_pred_logic(Warp& w, const Instr& in, u32 m) {
  u32 a = w.pred(in.a), b = Op == 3 ? 0 : w.pred(in.b);
  w.set_pred(in.d, m, Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : ~a);
}

template <class Op, int N> void d_logic(Decoder& d) {
  Type t = d.type();
  if (t == Type::Pred) {
    u32 a = d.pred_src(d.op(1)), b = d.pred_src(d.op(2)), r = d.dst(d.op(0));
    Instr& i = d.emit(h_pred_logic<N>);
    i.a = a; i.b = b; i.d = r;
    return;
  }
  int n = type_bytes(t);
  emit2(d, n == 2 ? h_bin<Op, u16, u16, u16> : n == 4 ? h_bin<Op, u32, u32, u32> : h_bin<Op, u64, u64, u64>, t, t);
}
void d_not(Decoder& d) {
  Type t = d.type();
  if (t == Type::Pred) {
    u32 a = d.pred_src(d.op(1)), r = d.dst(d.op(0));
    Instr& i = d.emit(h_pred_logic<3>);
    i.a = a; i.d = r;
    return;
  }
  int n = type_bytes(t);
  emit1(d, n == 2 ? h_un<Not, u16, u16> : n == 4 ? h_un<Not, u32, u32> : h_un<Not, u64, u64>, t);
}
void d_shl(Decoder& d) {
  int n = type_bytes(d.type());
  emit2(d, n == 2 ? h_bin<Shl, u16, u16, u32> : n == 4 ? h_bin<Shl, u32, u32, u32> : h_bin<Shl, u64, u64, u32>, d.type(), Type::U32);
}
void d_shr(Decoder& d) {
  emit2(d, by_int(d, d.type(), [](auto z) -> Handler { using T = decltype(z); return h_bin<Shr, T, T, u32>; }), d.type(), Type::U32);
}

// ---- setp / set ----
enum class Cmp : u8 { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
template <Cmp C, class T> inline bool compare(T a, T b) {
  switch (C) {
    case Cmp::Eq: return a == b;
    case Cmp::Ne: if constexpr (std::is_floating_point_v<T>) return a < b || a > b; else return a != b;
    case Cmp::Lt: return a < b;
    case Cmp::Le: return a <= b;
    case Cmp::Gt: return a > b;
    case Cmp::Ge: return a >= b;
    case Cmp::Equ: return !(a < b || a > b);
    case Cmp::Neu: return !(a == b);
    case Cmp::Ltu: return !(a >= b);
    case Cmp::Leu: return !(a > b);
    case Cmp::Gtu: return !(a <= b);
    case Cmp::Geu: return !(a < b);
    case Cmp::Num: return a == a && b == b;
    case Cmp::Nan: return a != a || b != b;
  }
  return false;
}

u32 combine(u32 v, u32 c, int op) { return op == 1 ? v & c : op == 2 ? v | c : op == 3 ? v ^ c : v; }

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// m0: boolean op (0 none, 1 and, 2 or, 3 xor); m1: flush subnormals; m2: result of set (0 pred, 1 f32, 2 u32/s32, 3 f16, 4 bf16 or u16)
template <Cmp C, class T> void h_setp(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  u32 v;
  if constexpr (std::is_same_v<T, float>) {
    if (in.m1) v = lane_bits([=](int l) { return compare<C, T>(flush(a[l]), flush(b[l])); });
    else v = lane_bits([=](int l) { return compare<C, T>(a[l], b[l]); });
  } else {
    v = lane_bits([=](int l) { return compare<C, T>(a[l], b[l]); });
  }
  u32 c = in.m0 ? w.pred(in.c) : 0;
  if (in.d != kNone) w.set_pred(in.d, m, combine(v, c, in.m0));
  if (in.d2 != kNone) w.set_pred(in.d2, m, combine(~v, c, in.m0));
}

template <class T> Handler setp_for(Decoder& d, Cmp c) {
  switch (c) {
    case Cmp::Eq: return h_setp<Cmp::Eq, T>;
    case Cmp::Ne: return h_setp<Cmp::Ne, T>;
    case Cmp::Lt: return h_setp<Cmp::Lt, T>;
    case Cmp::Le: return h_setp<Cmp::Le, T>;
    case Cmp::Gt: return h_setp<Cmp::Gt, T>;
    case Cmp::Ge: return h_setp<Cmp::Ge, T>;
    default: break;
  }
  if constexpr (std::is_floating_point_v<T>) {
    switch (c) {
      case Cmp::Equ: return h_setp<Cmp::Equ, T>;
      case Cmp::Neu: return h_setp<Cmp::Neu, T>;
      case Cmp::Ltu: return h_setp<Cmp::Ltu, T>;
      case Cmp::Leu: return h_setp<Cmp::Leu, T>;
      case Cmp::Gtu: return h_setp<Cmp::Gtu, T>;
      case Cmp::Geu: return h_setp<Cmp::Geu, T>;
      case Cmp::Num: return h_setp<Cmp::Num, T>;
      case Cmp::Nan: return h_setp<Cmp::Nan, T>;
      default: break;
    }
  }
  d.fail("unsupported comparison");
}

Cmp parse_cmp(Decoder& d) {
  static const std::pair<const char*, Cmp> names[] = {
      {"eq", Cmp::Eq}, {"ne", Cmp::Ne}, {"lt", Cmp::Lt}, {"le", Cmp::Le}, {"gt", Cmp::Gt}, {"ge", Cmp::Ge},
      {"lo", Cmp::Lt}, {"ls", Cmp::Le}, {"hi", Cmp::Gt}, {"hs", Cmp::Ge}, {"equ", Cmp::Equ}, {"neu", Cmp::Neu},
      {"ltu", Cmp::Ltu}, {"leu", Cmp::Leu}, {"gtu", Cmp::Gtu}, {"geu", Cmp::Geu}, {"num", Cmp::Num}, {"nan", Cmp::Nan}};
  for (auto& [n, c] : names)
    if (d.in->op[1] == n) return c;
  d.fail("unknown comparison");
}

// set: writes 1.0 / all ones or zero from a temporary predicate. m0: 0 u32, 1 f32, 2 f16, 3 bf16, 4 u16
void h_set_from(Warp& w, const Instr& in, u32 m) {
  u32 p = w.pred(in.a);
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    bool v = p >> l & 1;
    switch (in.m0) {
      case 0: w.dst<u32>(in.d)[l] = v ? ~0u : 0; break;
      case 1: w.dst<float>(in.d)[l] = v ? 1.0f : 0.0f; break;
      case 2: w.dst<u16>(in.d)[l] = v ? 0x3c00 : 0; break;
      case 3: w.dst<u16>(in.d)[l] = v ? 0x3f80 : 0; break;
      default: w.dst<u16>(in.d)[l] = v ? 0xffff : 0; break;
    }
  }
}

void d_setp(Decoder& d) {
  Type t = d.type();
  if (t != Type::F32 && t != Type::F64 && is_float(t)) return decode_half_setp(d, true);
  Cmp c = parse_cmp(d);
  Handler h;
  if (t == Type::F32) h = setp_for<float>(d, c);
  else if (t == Type::F64) h = setp_for<double>(d, c);
  else h = by_int(d, t, [&](auto z) -> Handler { return setp_for<decltype(z)>(d, c); });
  int bop = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  u32 a = d.src(d.op(1), t), b = d.src(d.op(2), t), cc = bop ? d.pred_src(d.op(3)) : kNone, p = kNone, q = kNone;
  if (d.op(0).kind == Operand::Pair) { p = d.dst(d.op(0).sub[0]); q = d.dst(d.op(0).sub[1]); }
  else p = d.dst(d.op(0));
  Instr& i = d.emit(h);
  i.a = a; i.b = b; i.c = cc; i.d = p; i.d2 = q;
  i.m0 = u8(bop);
  i.m1 = d.has("ftz");
}
void d_set(Decoder& d) {
  Type t = d.type(), dt = d.type(1);
  if (t != Type::F32 && t != Type::F64 && is_float(t)) return decode_half_setp(d, false);
  Cmp c = parse_cmp(d);
  Handler h;
  if (t == Type::F32) h = setp_for<float>(d, c);
  else if (t == Type::F64) h = setp_for<double>(d, c);
  else h = by_int(d, t, [&](auto z) -> Handler { return setp_for<decltype(z)>(d, c); });
  int bop = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  u32 a = d.src(d.op(1), t), b = d.src(d.op(2), t), cc = bop ? d.pred_src(d.op(3)) : kNone;
  Operand tmp = d.temp_operand(Type::Pred);
  u32 p = d.dst(tmp);
  {
    Instr& i = d.emit(h);
    i.a = a; i.b = b; i.c = cc; i.d = p;
    i.m0 = u8(bop);
    i.m1 = d.has("ftz");
  }
  u32 r = d.dst(d.op(0));
  Instr& i = d.emit(h_set_from);
  i.a = p; i.d = r;
  i.m0 = dt == Type::F32 ? 1 : dt == Type::F16 ? 2 : dt == Type::BF16 ? 3 : type_bytes(dt) == 2 ? 4 : 0;
}

// ---- selp / slct ----
template <class T> void h_selp(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const u32 p = w.pred(in.c);
  each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) { return (p >> l & 1) ? a[l] : b[l]; });
}
void d_selp(Decoder& d) {
  Type t = d.type();
  u32 c = d.pred_src(d.op(3)), a = d.src(d.op(1), t), b = d.src(d.op(2), t), r = d.dst(d.op(0));
  int n = type_bytes(t);
  Instr& i = d.emit(n == 2 ? h_selp<u16> : n == 4 ? h_selp<u32> : h_selp<u64>);
  i.a = a; i.b = b; i.c = c; i.d = r;
}
template <class T, class C> void h_slct(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const C* c = w.src<C>(in.c);
  each_lane(w.dst<T>(in.d), m, [=](int l) { return c[l] >= C(0) ? a[l] : b[l]; });  // NaN selects b
}
void d_slct(Decoder& d) {
  Type ct = d.type(), t = d.type(1);
  bool f = ct == Type::F32;
  int n = type_bytes(t);
  emit3(d, n == 2 ? (f ? h_slct<u16, float> : h_slct<u16, s32>) : n == 4 ? (f ? h_slct<u32, float> : h_slct<u32, s32>)
                  : (f ? h_slct<u64, float> : h_slct<u64, s32>), t, t, ct);
}

void d_lop3(Decoder& d) {
  bool boolean = d.has("and") || d.has("or");
  const Operand& o = d.op(0);
  u32 a = d.src(d.op(1), Type::B32), b = d.src(d.op(2), Type::B32), c = d.src(d.op(3), Type::B32);
  u32 q = boolean ? d.pred_src(d.op(5)) : kNone, r = kNone, p = kNone;
  if (o.kind == Operand::Pair) { r = d.dst(o.sub[0]); p = d.dst(o.sub[1]); } else r = d.dst(o);
  Instr& i = d.emit(h_lop3);
  i.a = a; i.b = b; i.c = c; i.d = r; i.d2 = p; i.e = q;
  i.imm = s64(d.op(4).imm & 0xff);
  i.m0 = d.has("and");
}

}  // namespace

void register_logic() {
  auto& t = op_table();
  t["and"] = d_logic<And, 0>;
  t["or"] = d_logic<Or, 1>;
  t["xor"] = d_logic<Xor, 2>;
  t["not"] = d_not;
  t["cnot"] = [](Decoder& d) { int n = type_bytes(d.type()); emit1(d, n == 2 ? h_un<Cnot, u16, u16> : n == 4 ? h_un<Cnot, u32, u32> : h_un<Cnot, u64, u64>, d.type()); };
  t["shl"] = d_shl;
  t["shr"] = d_shr;
  t["shf"] = [](Decoder& d) {
    bool l = d.has("l"), wrap = d.has("wrap");
    emit3(d, l ? (wrap ? h_tri<ShfL, u32, u32, u32, u32> : h_tri<ShfLClamp, u32, u32, u32, u32>)
               : (wrap ? h_tri<ShfR, u32, u32, u32, u32> : h_tri<ShfRClamp, u32, u32, u32, u32>), Type::B32, Type::B32, Type::U32);
  };
  t["bfe"] = [](Decoder& d) {
    Type t = d.type();
    Handler h = t == Type::U32 ? h_tri<Bfe, u32, u32, u32, u32> : t == Type::S32 ? h_tri<Bfe, s32, s32, u32, u32>
              : t == Type::U64 ? h_tri<Bfe, u64, u64, u32, u32> : h_tri<Bfe, s64, s64, u32, u32>;
    emit3(d, h, t, Type::U32, Type::U32);
  };
  t["bfi"] = [](Decoder& d) {
    Type t = d.type();
    u32 e = d.src(d.op(4), Type::U32);
    Instr& i = emit3(d, type_bytes(t) == 4 ? h_bfi<u32> : h_bfi<u64>, t, t, Type::U32);
    i.e = e;
  };
  t["bfind"] = [](Decoder& d) {
    Type t = d.type();
    bool s = d.has("shiftamt");
    emit1(d, by_int(d, t, [&](auto z) -> Handler { using T = decltype(z); return s ? h_un<Bfind<true>, u32, T> : h_un<Bfind<false>, u32, T>; }), t);
  };
  t["brev"] = [](Decoder& d) { emit1(d, type_bytes(d.type()) == 4 ? h_un<Brev32, u32, u32> : h_un<Brev64, u64, u64>, d.type()); };
  t["popc"] = [](Decoder& d) { emit1(d, type_bytes(d.type()) == 4 ? h_un<Popc, u32, u32> : h_un<Popc, u32, u64>, d.type()); };
  t["clz"] = [](Decoder& d) { emit1(d, type_bytes(d.type()) == 4 ? h_un<Clz, u32, u32> : h_un<Clz, u32, u64>, d.type()); };
  t["bmsk"] = [](Decoder& d) { emit2(d, d.has("wrap") ? h_bin<BmskWrap, u32, u32, u32> : h_bin<Bmsk, u32, u32, u32>, Type::B32, Type::B32); };
  t["szext"] = [](Decoder& d) { emit2(d, d.type() == Type::S32 ? h_bin<SzextS, u32, u32, u32> : h_bin<SzextU, u32, u32, u32>, Type::B32, Type::B32); };
  t["prmt"] = [](Decoder& d) {
    Instr& i = emit3(d, h_prmt, Type::B32, Type::B32, Type::B32);
    i.m0 = d.has("f4e") ? 1 : d.has("b4e") ? 2 : d.has("rc8") ? 3 : d.has("ecl") ? 4 : d.has("ecr") ? 5 : d.has("rc16") ? 6 : 0;
  };
  t["lop3"] = d_lop3;
  t["fns"] = [](Decoder& d) { emit3(d, h_fns, Type::B32, Type::B32, Type::S32); };
  t["setp"] = d_setp;
  t["set"] = d_set;
  t["selp"] = d_selp;
  t["slct"] = d_slct;
  register_mov();
}

}  // namespace gpusim::ptx
