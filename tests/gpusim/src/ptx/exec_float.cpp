// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// f32 and f64 arithmetic.
#include <cfenv>
#include <cmath>

#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

constexpr float kTiny = 1.17549435e-38f;
inline float ftz(float x) { return std::fabs(x) < kTiny ? std::copysign(0.0f, x) : x; }
inline double ftz(double x) { return x; }
template <class T> inline T sat(T x) { return x > T(0) ? (x < T(1) ? x : T(1)) : T(0); }  // NaN becomes 0

struct Add { template <class T> static T f(T a, T b) { return a + b; } };
struct Sub { template <class T> static T f(T a, T b) { return a - b; } };
struct Mul { template <class T> static T f(T a, T b) { return a * b; } };
struct Div { template <class T> static T f(T a, T b) { return a / b; } };
struct Fma { template <class T> static T f(T a, T b, T c) { return std::fma(a, b, c); } };
struct Rcp { template <class T> static T f(T a) { return T(1) / a; } };
struct Sqrt { template <class T> static T f(T a) { return std::sqrt(a); } };
struct Rsqrt { static float f(float a) { return float(1.0 / std::sqrt(double(a))); } static double f(double a) { return 1.0 / std::sqrt(a); } };
struct Ex2 { static float f(float a) { return std::exp2(a); } };
struct Lg2 { static float f(float a) { return std::log2(a); } };
struct Sin { static float f(float a) { return std::sin(a); } };
struct Cos { static float f(float a) { return std::cos(a); } };
struct Tanh { static float f(float a) { return std::tanh(a); } };
struct Abs { template <class T> static T f(T a) { return std::fabs(a); } };
struct Neg { template <class T> static T f(T a) { return -a; } };
// One NaN: the other operand; -0 is less than +0.
struct Min { template <class T> static T f(T a, T b) {
  T r = a < b ? a : b < a ? b : std::signbit(a) ? a : b;
  return a != a ? b : b != b ? a : r; } };
struct Max { template <class T> static T f(T a, T b) {
  T r = a > b ? a : b > a ? b : std::signbit(a) ? b : a;
  return a != a ? b : b != b ? a : r; } };
struct MinNaN { static float f(float a, float b) { return a != a || b != b ? bits_f32(0x7fffffff) : Min::f(a, b); } };
struct MaxNaN { static float f(float a, float b) { return a != a || b != b ? bits_f32(0x7fffffff) : Max::f(a, b); } };
template <class Op> struct XorSign { static float f(float a, float b) {
  float r = Op::f(std::fabs(a), std::fabs(b));
  return bits_f32(f32_bits(r) ^ ((f32_bits(a) ^ f32_bits(b)) & 0x80000000u)); } };
struct CopySign { template <class T> static T f(T a, T b) { return std::copysign(b, a); } };

// m1: bit 0 ftz, bit 1 sat
template <class Op, class T, bool F> void h_f1(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  if (in.m1 & 2) each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) { T r = Op::f(F ? ftz(a[l]) : a[l]); return sat(F ? ftz(r) : r); });
  else each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) { T r = Op::f(F ? ftz(a[l]) : a[l]); return F ? ftz(r) : r; });
}
// Transcendentals go lane by lane through libm.
template <class Op, class T, bool F> void h_libm(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  active_lanes(w.dst<T>(in.d), m, [=](int l) { T r = Op::f(F ? ftz(a[l]) : a[l]); return F ? ftz(r) : r; });
}
template <class Op, class T, bool F> void h_f2(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  if (in.m1 & 2) each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) {
      T r = F ? ftz(Op::f(ftz(a[l]), ftz(b[l]))) : Op::f(a[l], b[l]); return sat(r); });
  else each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) {
      return F ? ftz(Op::f(ftz(a[l]), ftz(b[l]))) : Op::f(a[l], b[l]); });
}
template <class Op, class T, bool F> void h_f3(Warp& w, const Instr& in, u32 m) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b), *c = w.src<T>(in.c);
  if (in.m1 & 2) each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) {
      T r = F ? ftz(Op::f(ftz(a[l]), ftz(b[l]), ftz(c[l]))) : Op::f(a[l], b[l], c[l]); return sat(r); });
  else each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) {
      return F ? ftz(Op::f(ftz(a[l]), ftz(b[l]), ftz(c[l]))) : Op::f(a[l], b[l], c[l]); });
}

// Directed rounding: run the plain handler (in ext->value) under another mode.
void h_rounded(Warp& w, const Instr& in, u32 m) {
  std::fesetround(in.m2 == 1 ? FE_TOWARDZERO : in.m2 == 2 ? FE_DOWNWARD : FE_UPWARD);
  reinterpret_cast<Handler>(in.ext->value)(w, in, m);
  std::fesetround(FE_TONEAREST);
}

#define PICK(H, OP) (f64 ? (Handler)H<OP, double, false> : fz ? (Handler)H<OP, float, true> : (Handler)H<OP, float, false>)

template <class T> bool testp(T x, int kind) {
  bool inf = std::isinf(x), nan = x != x, sub = x != 0 && std::fabs(x) < (sizeof(T) == 4 ? T(kTiny) : T(2.2250738585072014e-308));
  switch (kind) {
    case 0: return !inf && !nan;
    case 1: return inf;
    case 2: return !nan;
    case 3: return nan;
    case 4: return !inf && !nan && !sub && x != 0;
    default: return sub;
  }
}
template <class T> void h_testp(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  w.set_pred(in.d, m, lane_bits([&](int l) { return testp(a[l], in.m0); }));
}

// Packed pair of f32 (f32x2): add, sub, mul, fma.
template <int Op> void h_f32x2(Warp& w, const Instr& in, u32 m) {
  const u64 *a = w.src<u64>(in.a), *b = w.src<u64>(in.b), *c = Op == 3 ? w.src<u64>(in.c) : nullptr;
  active_lanes(w.dst<u64>(in.d), m, [=](int l) {
    u64 r = 0;
    for (int k = 0; k < 2; ++k) {
      float x = bits_f32(u32(a[l] >> 32 * k)), y = bits_f32(u32(b[l] >> 32 * k)), z;
      z = Op == 0 ? x + y : Op == 1 ? x - y : Op == 2 ? x * y : std::fma(x, y, bits_f32(u32(c[l] >> 32 * k)));
      r |= u64(f32_bits(z)) << 32 * k;
    }
    return r;
  });
}

}  // namespace

void decode_float_arith(Decoder& d) {
  const Type t = d.type();
  const std::string& op = d.in->op[0];
  if (t == Type::F32x2) {
    if (op == "add") emit2(d, h_f32x2<0>, t, t);
    else if (op == "sub") emit2(d, h_f32x2<1>, t, t);
    else if (op == "mul") emit2(d, h_f32x2<2>, t, t);
    else if (op == "fma") emit3(d, h_f32x2<3>, t, t, t);
    else d.fail("unsupported f32x2 operation");
    return;
  }
  if (t != Type::F32 && t != Type::F64) return decode_half_arith(d);
  if (type_bytes(d.type(1)) == 2 && (op == "add" || op == "sub" || op == "fma")) d.fail("mixed-precision arithmetic");
  const bool f64 = t == Type::F64, fz = d.has("ftz"), nan = d.has("NaN"), xs = d.has("xorsign");
  int n = 0;
  Handler h = nullptr;
  if (op == "add") { n = 2; h = PICK(h_f2, Add); }
  else if (op == "sub") { n = 2; h = PICK(h_f2, Sub); }
  else if (op == "mul") { n = 2; h = PICK(h_f2, Mul); }
  else if (op == "div") { n = 2; h = PICK(h_f2, Div); }
  else if (op == "fma" || op == "mad") { n = 3; h = PICK(h_f3, Fma); }
  else if (op == "rcp") { n = 1; h = PICK(h_f1, Rcp); }
  else if (op == "sqrt") { n = 1; h = PICK(h_f1, Sqrt); }
  else if (op == "rsqrt") { n = 1; h = PICK(h_f1, Rsqrt); }
  else if (op == "abs") { n = 1; h = PICK(h_f1, Abs); }
  else if (op == "neg") { n = 1; h = PICK(h_f1, Neg); }
  else if (op == "min" && xs) { n = 2; h = nan ? h_f2<XorSign<MinNaN>, float, false> : h_f2<XorSign<Min>, float, false>; }
  else if (op == "max" && xs) { n = 2; h = nan ? h_f2<XorSign<MaxNaN>, float, false> : h_f2<XorSign<Max>, float, false>; }
  else if (op == "min") { n = 2; h = nan ? (fz ? h_f2<MinNaN, float, true> : h_f2<MinNaN, float, false>) : PICK(h_f2, Min); }
  else if (op == "max") { n = 2; h = nan ? (fz ? h_f2<MaxNaN, float, true> : h_f2<MaxNaN, float, false>) : PICK(h_f2, Max); }
  else if (op == "copysign") { n = 2; h = PICK(h_f2, CopySign); }
  else if (!f64) {
    n = 1;
    if (op == "ex2") h = fz ? h_libm<Ex2, float, true> : h_libm<Ex2, float, false>;
    else if (op == "lg2") h = fz ? h_libm<Lg2, float, true> : h_libm<Lg2, float, false>;
    else if (op == "sin") h = fz ? h_libm<Sin, float, true> : h_libm<Sin, float, false>;
    else if (op == "cos") h = fz ? h_libm<Cos, float, true> : h_libm<Cos, float, false>;
    else if (op == "tanh") h = fz ? h_libm<Tanh, float, true> : h_libm<Tanh, float, false>;
  }
  if (!h) d.fail("unsupported floating-point operation");
  int round = d.has("rz") ? 1 : d.has("rm") ? 2 : d.has("rp") ? 3 : 0;
  Handler use = round ? h_rounded : h;
  Instr& i = n == 1 ? emit1(d, use, t) : n == 2 ? emit2(d, use, t, t) : emit3(d, use, t, t, t);
  i.m1 = u8(fz | d.has("sat") << 1);
  if (round) { i.m2 = u8(round); d.ext(i).value = reinterpret_cast<u64>(h); }
}

void register_float() {
  auto& t = op_table();
  for (const char* n : {"fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign"}) t[n] = decode_float_arith;
  t["testp"] = [](Decoder& d) {
    const char* kinds[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    u32 a = d.src(d.op(1), d.type()), r = d.dst(d.op(0));
    Instr& i = d.emit(d.type() == Type::F64 ? h_testp<double> : h_testp<float>);
    i.a = a; i.d = r;
    for (u8 k = 0; k < 6; ++k) if (d.has(kinds[k])) i.m0 = k;
  };
}

}  // namespace gpusim::ptx
