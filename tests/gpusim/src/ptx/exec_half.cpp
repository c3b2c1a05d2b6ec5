// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// f16, bf16 and their packed pairs: arithmetic and comparison.
#include <cmath>

#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

struct Half { static double get(u16 v) { return f16_to_f32(v); } static u16 put(double x) { return f64_to_f16(x); }
              static bool subnormal(u16 v) { return !(v & 0x7c00) && (v & 0x3ff); } };
struct Bf { static double get(u16 v) { return bf16_to_f32(v); } static u16 put(double x) { return f64_to_bf16(x); }
            static bool subnormal(u16 v) { return !(v & 0x7f80) && (v & 0x7f); } };

enum Op : u8 { OAdd, OSub, OMul, OFma, OMin, OMax, ONeg, OAbs, OEx2, OTanh };

// m0: op; m1: bit 0 ftz, 1 sat, 2 relu, 3 NaN, 4 xorsign.abs; m2: elements per register (1 or 2)
template <class T> u16 one(const Instr& in, u16 x, u16 y, u16 z) {
  const Op op = Op(in.m0);
  if (op == ONeg) return x ^ 0x8000;
  if (op == OAbs) return x & 0x7fff;
  auto in_ = [&](u16 v) { return (in.m1 & 1) && T::subnormal(v) ? u16(v & 0x8000) : v; };
  x = in_(x); y = in_(y); z = in_(z);
  const double a = T::get(x), b = T::get(y);
  u16 r;
  switch (op) {
    case OAdd: r = T::put(a + b); break;
    case OSub: r = T::put(a - b); break;
    case OMul: r = T::put(a * b); break;
    case OFma: r = T::put(a * b + T::get(z)); break;   // exact in f64 before the one rounding
    case OMin: case OMax: {
      u16 p = x, q = y, sign = 0;
      if (in.m1 & 16) { sign = (x ^ y) & 0x8000; p &= 0x7fff; q &= 0x7fff; }
      const double u = T::get(p), v = T::get(q);
      if (u != u || v != v) r = (in.m1 & 8) || (u != u && v != v) ? 0x7fff : u != u ? q : p;
      else if (u == v) r = (op == OMin) == bool(p & 0x8000) ? p : q;  // -0 < +0
      else r = (u < v) == (op == OMin) ? p : q;
      r ^= sign;
      break;
    }
    case OEx2: r = T::put(std::exp2(a)); break;
    default: r = T::put(std::tanh(a)); break;
  }
  if ((in.m1 & 1) && T::subnormal(r)) r &= 0x8000;
  const double v = T::get(r);
  if (in.m1 & 2) r = v > 0 ? (v < 1 ? r : T::put(1.0)) : 0;
  if ((in.m1 & 4) && v < 0) r = 0;
  return r;
}

template <class T> void h_half(Warp& w, const Instr& in, u32 m) {
  if (in.m2 == 1) {
    const u16 *a = w.src<u16>(in.a), *b = in.b == kNone ? a : w.src<u16>(in.b), *c = in.c == kNone ? a : w.src<u16>(in.c);
    active_lanes(w.dst<u16>(in.d), m, [&](int l) { return one<T>(in, a[l], b[l], c[l]); });
  } else {
    const u32 *a = w.src<u32>(in.a), *b = in.b == kNone ? a : w.src<u32>(in.b), *c = in.c == kNone ? a : w.src<u32>(in.c);
    active_lanes(w.dst<u32>(in.d), m, [&](int l) {
      return one<T>(in, u16(a[l]), u16(b[l]), u16(c[l])) | u32(one<T>(in, u16(a[l] >> 16), u16(b[l] >> 16), u16(c[l] >> 16))) << 16;
    });
  }
}

// ---- comparison ----
const char* const kCmp[] = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
bool compare(int c, double a, double b) {
  const bool nan = a != a || b != b;
  switch (c) {
    case 0: return a == b;
    case 1: return !nan && a != b;
    case 2: return a < b;
    case 3: return a <= b;
    case 4: return a > b;
    case 5: return a >= b;
    case 12: return !nan;
    case 13: return nan;
    default: return nan || compare(c - 6, a, b);
  }
}

// m0: comparison; m1: bit 0 ftz, bits 4-5 boolean op; m2: elements. setp: d = p, d2 = q; set: d = register, e = result kind
template <class T, bool ToPred> void h_half_cmp(Warp& w, const Instr& in, u32 m) {
  auto get = [&](u16 v) { return T::get((in.m1 & 1) && T::subnormal(v) ? u16(v & 0x8000) : v); };
  u32 lo = 0, hi = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (in.m2 == 1) lo |= u32(compare(in.m0, get(w.src<u16>(in.a)[l]), get(w.src<u16>(in.b)[l]))) << l;
    else {
      u32 a = w.src<u32>(in.a)[l], b = w.src<u32>(in.b)[l];
      lo |= u32(compare(in.m0, get(u16(a)), get(u16(b)))) << l;
      hi |= u32(compare(in.m0, get(u16(a >> 16)), get(u16(b >> 16)))) << l;
    }
  }
  const int bop = in.m1 >> 4 & 3;
  const u32 c = bop ? w.pred(in.c) : 0;
  auto mix = [&](u32 v) { return bop == 1 ? v & c : bop == 2 ? v | c : bop == 3 ? v ^ c : v; };
  if (ToPred) {
    if (in.d != kNone) w.set_pred(in.d, m, mix(lo));
    if (in.d2 != kNone) w.set_pred(in.d2, m, mix(in.m2 == 1 ? ~lo : hi));
    return;
  }
  lo = mix(lo); hi = mix(hi);
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    bool p = lo >> l & 1, q = hi >> l & 1;
    switch (in.e) {
      case 0: w.dst<u16>(in.d)[l] = p ? 0x3c00 : 0; break;                              // f16
      case 1: w.dst<u16>(in.d)[l] = p ? 0x3f80 : 0; break;                              // bf16
      case 2: w.dst<u16>(in.d)[l] = p ? 0xffff : 0; break;                              // u16
      case 3: w.dst<u32>(in.d)[l] = p ? ~0u : 0; break;                                 // u32 of a scalar
      case 4: w.dst<u32>(in.d)[l] = (p ? 0x3c00u : 0) | (q ? 0x3c000000u : 0); break;   // f16x2
      case 5: w.dst<u32>(in.d)[l] = (p ? 0x3f80u : 0) | (q ? 0x3f800000u : 0); break;   // bf16x2
      case 6: w.dst<u32>(in.d)[l] = (p ? 0xffffu : 0) | (q ? 0xffff0000u : 0); break;   // u32 of a pair
      default: w.dst<float>(in.d)[l] = p ? 1.0f : 0.0f; break;                          // f32
    }
  }
}

bool is_bf(Type t) { return t == Type::BF16 || t == Type::BF16x2; }
bool is_pair(Type t) { return t == Type::F16x2 || t == Type::BF16x2; }

}  // namespace

void decode_half_arith(Decoder& d) {
  static const std::pair<const char*, Op> ops[] = {{"add", OAdd}, {"sub", OSub}, {"mul", OMul}, {"fma", OFma}, {"mad", OFma}, {"min", OMin},
      {"max", OMax}, {"neg", ONeg}, {"abs", OAbs}, {"ex2", OEx2}, {"tanh", OTanh}};
  const Type t = d.type();
  if (t != Type::F16 && t != Type::BF16 && !is_pair(t)) d.fail("unsupported floating-point type");
  int op = -1;
  for (auto& [n, o] : ops) if (d.in->op[0] == n) op = o;
  if (op < 0) d.fail("unsupported half-precision operation");
  Handler h = is_bf(t) ? h_half<Bf> : h_half<Half>;
  Instr& i = op == OFma ? emit3(d, h, t, t, t) : op >= ONeg ? emit1(d, h, t) : emit2(d, h, t, t);
  i.m0 = u8(op);
  i.m1 = u8(d.has("ftz") | d.has("sat") << 1 | d.has("relu") << 2 | d.has("NaN") << 3 | d.has("xorsign") << 4);
  i.m2 = is_pair(t) ? 2 : 1;
}

void decode_half_setp(Decoder& d, bool to_pred) {
  const Type t = d.type();
  int c = -1;
  for (int k = 0; k < 14; ++k) if (d.in->op[1] == kCmp[k]) c = k;
  if (c < 0) d.fail("unknown comparison");
  const int bop = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  u32 a = d.src(d.op(1), t), b = d.src(d.op(2), t), cc = bop ? d.pred_src(d.op(3)) : kNone, p, q = kNone;
  if (d.op(0).kind == Operand::Pair) { p = d.dst(d.op(0).sub[0]); q = d.dst(d.op(0).sub[1]); } else p = d.dst(d.op(0));
  Handler h = is_bf(t) ? (to_pred ? h_half_cmp<Bf, true> : h_half_cmp<Bf, false>) : (to_pred ? h_half_cmp<Half, true> : h_half_cmp<Half, false>);
  Instr& i = d.emit(h);
  i.a = a; i.b = b; i.c = cc; i.d = p; i.d2 = q;
  i.m0 = u8(c);
  i.m1 = u8(d.has("ftz") | bop << 4);
  i.m2 = is_pair(t) ? 2 : 1;
  if (!to_pred) {
    switch (d.type(1)) {
      case Type::F16: i.e = 0; break;
      case Type::BF16: i.e = 1; break;
      case Type::U16: case Type::S16: i.e = 2; break;
      case Type::F16x2: i.e = 4; break;
      case Type::BF16x2: i.e = 5; break;
      case Type::F32: i.e = 7; break;
      default: i.e = is_pair(t) ? 6 : 3; break;
    }
  }
}

}  // namespace gpusim::ptx
