// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Integer arithmetic.
#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace gpusim::ptx {
namespace {

template <class T> using U = std::make_unsigned_t<T>;
template <class T> struct Wide { using type = void; };
template <> struct Wide<u16> { using type = u32; };
template <> struct Wide<s16> { using type = s32; };
template <> struct Wide<u32> { using type = u64; };
template <> struct Wide<s32> { using type = s64; };
template <> struct Wide<u64> { using type = unsigned __int128; };
template <> struct Wide<s64> { using type = __int128; };
template <class T> using W = typename Wide<T>::type;

struct Add { template <class T> static T f(T a, T b) { return T(U<T>(U<T>(a) + U<T>(b))); } };
struct Sub { template <class T> static T f(T a, T b) { return T(U<T>(U<T>(a) - U<T>(b))); } };
struct MulLo { template <class T> static T f(T a, T b) { return T(U<T>(u64(U<T>(a)) * u64(U<T>(b)))); } };
struct MulHi { template <class T> static T f(T a, T b) { return T((W<T>(a) * W<T>(b)) >> (8 * sizeof(T))); } };
struct MulWide { template <class T> static W<T> f(T a, T b) { return W<T>(a) * W<T>(b); } };
struct MadLo { template <class T> static T f(T a, T b, T c) { return Add::f(MulLo::f(a, b), c); } };
struct MadHi { template <class T> static T f(T a, T b, T c) { return Add::f(MulHi::f(a, b), c); } };
struct MadWide { template <class T> static W<T> f(T a, T b, W<T> c) { return Add::f(W<T>(W<T>(a) * W<T>(b)), c); } };
struct AddSat { static s32 f(s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) + b, INT32_MIN, INT32_MAX)); } };
struct SubSat { static s32 f(s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) - b, INT32_MIN, INT32_MAX)); } };
struct MadHiSat { static s32 f(s32 a, s32 b, s32 c) { return AddSat::f(MulHi::f(a, b), c); } };
// Division by zero yields all ones (quotient) and the dividend (remainder), as on hardware.
struct Div { template <class T> static T f(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(U<T>(0) - U<T>(a));
  return T(a / b); } };
struct Rem { template <class T> static T f(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b); } };
struct Min { template <class T> static T f(T a, T b) { return a < b ? a : b; } };
struct Max { template <class T> static T f(T a, T b) { return a > b ? a : b; } };
struct MinRelu { template <class T> static T f(T a, T b) { T r = a < b ? a : b; return r < 0 ? T(0) : r; } };
struct MaxRelu { template <class T> static T f(T a, T b) { T r = a > b ? a : b; return r < 0 ? T(0) : r; } };
struct Abs { template <class T> static T f(T a) { return a < 0 ? T(U<T>(0) - U<T>(a)) : a; } };
struct Neg { template <class T> static T f(T a) { return T(U<T>(0) - U<T>(a)); } };
struct Sad { template <class T> static T f(T a, T b, T c) { return T(U<T>(c) + U<T>(a > b ? U<T>(a) - U<T>(b) : U<T>(b) - U<T>(a))); } };
struct Mul24Lo { template <class T> static T f(T a, T b) { return T(s64(T(U<T>(a) << 8)) / 256 * (s64(T(U<T>(b) << 8)) / 256)); } };
struct Mad24Lo { template <class T> static T f(T a, T b, T c) { return Add::f(Mul24Lo::f(a, b), c); } };

template <class Op, bool Signed> struct Pair16 {
  using T = std::conditional_t<Signed, s16, u16>;
  static u32 f(u32 a, u32 b) {
    u32 lo = u16(Op::f(T(a), T(b))), hi = u16(Op::f(T(a >> 16), T(b >> 16)));
    return lo | hi << 16;
  }
};

template <class Op> Handler bin_same(Decoder& d, Type t) {
  return by_int(d, t, [](auto z) -> Handler { using T = decltype(z); return h_bin<Op, T, T, T>; });
}
template <class Op> Handler tri_same(Decoder& d, Type t) {
  return by_int(d, t, [](auto z) -> Handler { using T = decltype(z); return h_tri<Op, T, T, T, T>; });
}
// Division evaluates the active lanes only (scalar and slow).
template <class Op, class T> void h_slow_bin(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  const T* b = w.src<T>(in.b);
  active_lanes(w.dst<T>(in.d), m, [=](int l) { return Op::f(a[l], b[l]); });
}
template <class Op> Handler slow_bin(Decoder& d, Type t) {
  return by_int(d, t, [](auto z) -> Handler { using T = decltype(z); return h_slow_bin<Op, T>; });
}

// Carry chains: the carry flag lives in the warp, one bit per lane.
// m0: bit 0 carry in, bit 1 carry out, bit 2 subtract; m1: 0 add, 1 mad.lo, 2 mad.hi
template <class T> void h_carry(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  const T* b = w.src<T>(in.b);
  const T* c = in.c == kNone ? nullptr : w.src<T>(in.c);
  T* d = w.dst<T>(in.d);
  using X = unsigned __int128;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    T x = a[l], y = b[l];
    if (in.m1) {
      X p = in.m2 ? X(__int128(std::make_signed_t<T>(x)) * std::make_signed_t<T>(y)) : X(x) * y;
      x = in.m1 == 1 ? T(p) : T(p >> (8 * sizeof(T)));
      y = c[l];
    }
    u32 cc = in.m0 & 1 ? (w.carry >> l) & 1 : 0;
    bool out;
    if (in.m0 & 4) {
      X r = X(x) - y - cc;
      out = (r >> (8 * sizeof(T))) != 0;   // borrow
      d[l] = T(r);
    } else {
      X r = X(x) + y + cc;
      out = (r >> (8 * sizeof(T))) & 1;
      d[l] = T(r);
    }
    if (in.m0 & 2) w.carry = (w.carry & ~(1u << l)) | u32(out) << l;
  }
}

void d_carry(Decoder& d, bool cin, bool sub, int mad) {
  Type t = d.type();
  bool cout = d.has("cc");
  Handler h = type_bytes(t) == 8 ? h_carry<u64> : h_carry<u32>;
  Instr& i = mad ? emit3(d, h, t, t, t) : emit2(d, h, t, t);
  i.m0 = u8(cin | cout << 1 | sub << 2);
  i.m1 = u8(mad);
  i.m2 = is_signed(t);
}

bool float_type(Decoder& d) { return is_float(d.type()); }

void d_add(Decoder& d) {
  if (float_type(d)) return decode_float_arith(d);
  if (d.has("cc")) return d_carry(d, false, false, 0);
  Type t = d.type();
  if (d.has("sat")) emit2(d, h_bin<AddSat, s32, s32, s32>, t, t);
  else if (t == Type::U16x2 || t == Type::S16x2) emit2(d, h_bin<Pair16<Add, false>, u32, u32, u32>, Type::B32, Type::B32);
  else emit2(d, bin_same<Add>(d, t), t, t);
}
void d_sub(Decoder& d) {
  if (float_type(d)) return decode_float_arith(d);
  if (d.has("cc")) return d_carry(d, false, true, 0);
  Type t = d.type();
  if (d.has("sat")) emit2(d, h_bin<SubSat, s32, s32, s32>, t, t);
  else emit2(d, bin_same<Sub>(d, t), t, t);
}
void d_mul(Decoder& d) {
  if (float_type(d)) return decode_float_arith(d);
  Type t = d.type();
  if (d.has("wide"))
    emit2(d, by_int(d, t, [&](auto z) -> Handler {
      using T = decltype(z);
      if constexpr (sizeof(T) == 8) { d.fail("mul.wide of 64 bits"); return nullptr; }
      else return h_bin<MulWide, W<T>, T, T>;
    }), t, t);
  else emit2(d, d.has("hi") ? bin_same<MulHi>(d, t) : bin_same<MulLo>(d, t), t, t);
}
void d_mad(Decoder& d) {
  if (float_type(d)) return decode_float_arith(d);
  Type t = d.type();
  if (d.has("cc")) return d_carry(d, false, false, d.has("hi") ? 2 : 1);
  if (d.has("wide")) {
    Type wt = type_bytes(t) == 2 ? Type::B32 : Type::B64;
    emit3(d, by_int(d, t, [&](auto z) -> Handler {
      using T = decltype(z);
      if constexpr (sizeof(T) == 8) { d.fail("mad.wide of 64 bits"); return nullptr; }
      else return h_tri<MadWide, W<T>, T, T, W<T>>;
    }), t, t, wt);
  } else if (d.has("sat")) emit3(d, h_tri<MadHiSat, s32, s32, s32, s32>, t, t, t);
  else emit3(d, d.has("hi") ? tri_same<MadHi>(d, t) : tri_same<MadLo>(d, t), t, t, t);
}
void d_minmax(Decoder& d, bool max) {
  if (float_type(d)) return decode_float_arith(d);
  Type t = d.type();
  bool relu = d.has("relu");
  if (t == Type::U16x2) emit2(d, max ? h_bin<Pair16<Max, false>, u32, u32, u32> : h_bin<Pair16<Min, false>, u32, u32, u32>, Type::B32, Type::B32);
  else if (t == Type::S16x2 && relu) emit2(d, max ? h_bin<Pair16<MaxRelu, true>, u32, u32, u32> : h_bin<Pair16<MinRelu, true>, u32, u32, u32>, Type::B32, Type::B32);
  else if (t == Type::S16x2) emit2(d, max ? h_bin<Pair16<Max, true>, u32, u32, u32> : h_bin<Pair16<Min, true>, u32, u32, u32>, Type::B32, Type::B32);
  else if (relu) emit2(d, max ? h_bin<MaxRelu, s32, s32, s32> : h_bin<MinRelu, s32, s32, s32>, t, t);
  else emit2(d, max ? bin_same<Max>(d, t) : bin_same<Min>(d, t), t, t);
}

// dp4a / dp2a. m0: a signed, m1: b signed, m2: .hi (dp2a)
void h_dp4a(Warp& w, const Instr& in, u32 m) {
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  active_lanes(w.dst<u32>(in.d), m, [&](int l) {
    u32 r = c[l];
    for (int k = 0; k < 4; ++k) {
      u8 x = u8(a[l] >> 8 * k), y = u8(b[l] >> 8 * k);
      r += u32((in.m0 ? s32(s8(x)) : s32(x)) * (in.m1 ? s32(s8(y)) : s32(y)));
    }
    return r;
  });
}
void h_dp2a(Warp& w, const Instr& in, u32 m) {
  const u32 *a = w.src<u32>(in.a), *b = w.src<u32>(in.b), *c = w.src<u32>(in.c);
  active_lanes(w.dst<u32>(in.d), m, [&](int l) {
    u32 r = c[l];
    for (int k = 0; k < 2; ++k) {
      u16 x = u16(a[l] >> 16 * k);
      u8 y = u8(b[l] >> 8 * (k + 2 * in.m2));
      r += u32((in.m0 ? s32(s16(x)) : s32(x)) * (in.m1 ? s32(s8(y)) : s32(y)));
    }
    return r;
  });
}
void d_dp(Decoder& d, Handler h) {
  Instr& i = emit3(d, h, Type::B32, Type::B32, Type::B32);
  i.m0 = is_signed(d.type(1));
  i.m1 = is_signed(d.type(0));
  i.m2 = d.has("hi");
}

}  // namespace

void register_int() {
  auto& t = op_table();
  t["add"] = d_add;
  t["sub"] = d_sub;
  t["mul"] = d_mul;
  t["mad"] = d_mad;
  t["addc"] = [](Decoder& d) { d_carry(d, true, false, 0); };
  t["subc"] = [](Decoder& d) { d_carry(d, true, true, 0); };
  t["madc"] = [](Decoder& d) { d_carry(d, true, false, d.has("hi") ? 2 : 1); };
  t["mul24"] = [](Decoder& d) { if (d.has("hi")) d.fail("mul24.hi"); emit2(d, d.type() == Type::S32 ? h_bin<Mul24Lo, s32, s32, s32> : h_bin<Mul24Lo, u32, u32, u32>, d.type(), d.type()); };
  t["mad24"] = [](Decoder& d) { if (d.has("hi")) d.fail("mad24.hi"); emit3(d, d.type() == Type::S32 ? h_tri<Mad24Lo, s32, s32, s32, s32> : h_tri<Mad24Lo, u32, u32, u32, u32>, d.type(), d.type(), d.type()); };
  t["div"] = [](Decoder& d) { if (float_type(d)) return decode_float_arith(d); emit2(d, slow_bin<Div>(d, d.type()), d.type(), d.type()); };
  t["rem"] = [](Decoder& d) { emit2(d, slow_bin<Rem>(d, d.type()), d.type(), d.type()); };
  t["min"] = [](Decoder& d) { d_minmax(d, false); };
  t["max"] = [](Decoder& d) { d_minmax(d, true); };
  t["abs"] = [](Decoder& d) {
    if (float_type(d)) return decode_float_arith(d);
    emit1(d, by_int(d, d.type(), [](auto z) -> Handler { using T = decltype(z); return h_un<Abs, T, T>; }), d.type());
  };
  t["neg"] = [](Decoder& d) {
    if (float_type(d)) return decode_float_arith(d);
    emit1(d, by_int(d, d.type(), [](auto z) -> Handler { using T = decltype(z); return h_un<Neg, T, T>; }), d.type());
  };
  t["sad"] = [](Decoder& d) { emit3(d, tri_same<Sad>(d, d.type()), d.type(), d.type(), d.type()); };
  t["dp4a"] = [](Decoder& d) { d_dp(d, h_dp4a); };
  t["dp2a"] = [](Decoder& d) { d_dp(d, h_dp2a); };
}

}  // namespace gpusim::ptx
