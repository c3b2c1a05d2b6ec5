// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// cvt and cvt.pack.
#include <cfenv>
#include <cmath>
#include <limits>

#include "half.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

struct F16 { u16 v; };
struct BF16 { u16 v; };
struct E4 { u8 v; };
struct E5 { u8 v; };

struct Flags {
  Round round = Round::RN;
  bool to_int = false;      // .rni etc.: round to an integral value
  bool ftz = false, sat = false, relu = false, satfinite = false;
};
u64 pack_flags(const Flags& f) { return u64(f.round) | f.to_int << 4 | f.ftz << 5 | f.sat << 6 | f.relu << 7 | f.satfinite << 8; }
Flags unpack_flags(u64 v) { return {Round(v & 15), bool(v >> 4 & 1), bool(v >> 5 & 1), bool(v >> 6 & 1), bool(v >> 7 & 1), bool(v >> 8 & 1)}; }

template <class T> constexpr bool is_num = std::is_arithmetic_v<T>;
template <class T> constexpr bool is_fp = std::is_floating_point_v<T> || std::is_same_v<T, F16> || std::is_same_v<T, BF16> || std::is_same_v<T, E4> || std::is_same_v<T, E5>;

inline double value(F16 x) { return f16_to_f32(x.v); }
inline double value(BF16 x) { return bf16_to_f32(x.v); }
inline double value(E4 x) { return e4m3_to_f32(x.v); }
inline double value(E5 x) { return e5m2_to_f32(x.v); }
inline double value(float x) { return x; }
inline double value(double x) { return x; }

double round_integral(double x, Round r) {
  switch (r) {
    case Round::RZ: return std::trunc(x);
    case Round::RM: return std::floor(x);
    case Round::RP: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

template <class D> D to_int(double x, Round r, bool wide_nan) {
  if (x != x) return wide_nan ? D(std::make_unsigned_t<D>(1) << (8 * sizeof(D) - 1)) : D(0);
  x = round_integral(x, r);
  constexpr double hi = sizeof(D) == 8 ? (std::is_signed_v<D> ? 9223372036854775808.0 : 18446744073709551616.0) : double(std::numeric_limits<D>::max()) + 1;
  if (x >= hi) return std::numeric_limits<D>::max();
  if (x <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  return D(x);
}

// f64 -> f32 in a rounding mode.
float narrow(double x, Round r) {
  float f = float(x);
  if (r == Round::RN || f != f || double(f) == x) return f;
  float down = double(f) > x ? std::nextafter(f, -INFINITY) : f, up = double(f) < x ? std::nextafter(f, INFINITY) : f;
  switch (r) {
    case Round::RZ: return x > 0 ? down : up;
    case Round::RM: return down;
    default: return up;
  }
}
template <class S> float int_to_f32(S v, Round r) {
  if (r == Round::RN) return float(v);
  float f = float(v);
  using X = __int128;
  X exact = X(v), got = X(f);
  float down = got > exact ? std::nextafter(f, -INFINITY) : f, up = got < exact ? std::nextafter(f, INFINITY) : f;
  return r == Round::RZ ? (exact >= 0 ? down : up) : r == Round::RM ? down : up;
}
template <class S> double int_to_f64(S v, Round r) {
  double f = double(v);
  if (r == Round::RN) return f;
  using X = __int128;
  X exact = X(v), got = X(f);
  double down = got > exact ? std::nextafter(f, -INFINITY) : f, up = got < exact ? std::nextafter(f, INFINITY) : f;
  return r == Round::RZ ? (exact >= 0 ? down : up) : r == Round::RM ? down : up;
}

template <class D, class S> D convert(S s, const Flags& f) {
  if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
    if (!f.sat) return D(s);
    using X = __int128;
    X x = X(s), lo = X(std::numeric_limits<D>::min()), hi = X(std::numeric_limits<D>::max());
    return D(x < lo ? lo : x > hi ? hi : x);
  } else if constexpr (std::is_integral_v<S>) {
    if constexpr (std::is_same_v<D, float>) { float r = int_to_f32(s, f.round); return f.sat ? (r > 0 ? std::min(r, 1.0f) : 0.0f) : r; }
    else if constexpr (std::is_same_v<D, double>) { double r = int_to_f64(s, f.round); return f.sat ? (r > 0 ? std::min(r, 1.0) : 0.0) : r; }
    else if constexpr (std::is_same_v<D, F16>) return F16{f32_to_f16(to_f32_odd(double(s)), f.round)};
    else if constexpr (std::is_same_v<D, BF16>) return BF16{f32_to_bf16(to_f32_odd(double(s)), f.round)};
    else return D{};
  } else if constexpr (std::is_integral_v<D>) {
    double x = value(s);
    if constexpr (std::is_same_v<S, float>) if (f.ftz && std::fabs(x) < 1.17549435e-38) x = 0;
    return to_int<D>(x, f.round, sizeof(D) == 8 || std::is_same_v<S, double>);
  } else {
    double x = value(s);
    if (f.to_int) x = round_integral(x, f.round);
    if constexpr (std::is_same_v<S, float>) if (f.ftz && std::fabs(x) < 1.17549435e-38) x = std::copysign(0.0, x);
    if (f.sat) x = x > 0 ? (x < 1 ? x : 1) : 0;
    if (f.relu) x = x > 0 ? x : x != x ? x : 0;
    const Round r = f.to_int ? Round::RN : f.round;
    if constexpr (std::is_same_v<D, double>) return x;
    else if constexpr (std::is_same_v<D, float>) {
      float y = narrow(x, r);
      return f.ftz && std::fabs(y) < 1.17549435e-38f ? std::copysign(0.0f, y) : y;
    } else if constexpr (std::is_same_v<D, F16>) {
      u16 h = f64_to_f16(x, r);
      if (f.satfinite && (h & 0x7fff) == 0x7c00) h = (h & 0x8000) | 0x7bff;
      return F16{h};
    } else if constexpr (std::is_same_v<D, BF16>) {
      u16 h = f64_to_bf16(x, r);
      if (f.satfinite && (h & 0x7fff) == 0x7f80) h = (h & 0x8000) | 0x7f7f;
      return BF16{h};
    } else if constexpr (std::is_same_v<D, E4>) return E4{f32_to_e4m3_sat(to_f32_odd(x))};
    else return E5{f32_to_e5m2_sat(to_f32_odd(x))};
  }
}

template <class T> void put(u8* row, int stride, int l, T v) {
  if (stride == int(sizeof(T))) { std::memcpy(row + l * stride, &v, sizeof v); return; }
  u64 x = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) x = u64(s64(v));
  else std::memcpy(&x, &v, sizeof v);
  std::memcpy(row + l * stride, &x, std::min<int>(stride, 8));
}

// m0, m1: register bytes of destination and source; imm: Flags
template <class D, class S> void h_cvt(Warp& w, const Instr& in, u32 m) {
  const Flags f = unpack_flags(u64(in.imm));
  u8* d = w.dst<u8>(in.d);
  const u8* a = w.src<u8>(in.a);
  const int ds = in.m0, as = in.m1;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    S s;
    std::memcpy(&s, a + l * as, sizeof s);
    put<D>(d, ds, l, convert<D, S>(s, f));
  }
}
// Plain C++ conversions that need no modifier, register widths equal to the types.
template <class D, class S> void h_cvt_fast(Warp& w, const Instr& in, u32 m) {
  const S* a = w.src<S>(in.a);
  each_lane(w.dst<D>(in.d), m, [=](int l) __attribute__((always_inline)) { return D(a[l]); });
}
void h_f16_to_f32(Warp& w, const Instr& in, u32 m) {
  const u16* a = w.src<u16>(in.a);
  alignas(64) float t[32];
#if defined(__AVX512F__)
  _mm512_store_ps(t, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)a)));
  _mm512_store_ps(t + 16, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(a + 16))));
#else
  for (int l = 0; l < 32; ++l) t[l] = f16_to_f32(a[l]);
#endif
  each_lane(w.dst<float>(in.d), m, [&](int l) { return t[l]; });
}
void h_bf16_to_f32(Warp& w, const Instr& in, u32 m) {
  const u16* a = w.src<u16>(in.a);
  each_lane(w.dst<u32>(in.d), m, [=](int l) { return u32(a[l]) << 16; });
}
void h_f32_to_f16(Warp& w, const Instr& in, u32 m) {
  const float* a = w.src<float>(in.a);
  alignas(64) u16 t[32];
  for (int l = 0; l < 32; ++l) t[l] = f32_to_f16(a[l]);
  each_lane(w.dst<u16>(in.d), m, [&](int l) { return t[l]; });
}
void h_f32_to_bf16(Warp& w, const Instr& in, u32 m) {
  const u32* a = w.src<u32>(in.a);
  each_lane(w.dst<u16>(in.d), m, [=](int l) {
    u32 b = a[l], r = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return u16((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : r);
  });
}
// d = {b in the low half, a in the high half}, narrowed. m0: 0 f16x2, 1 bf16x2, 2 e4m3x2, 3 e5m2x2
void h_cvt_pair(Warp& w, const Instr& in, u32 m) {
  const float *a = w.src<float>(in.a), *b = w.src<float>(in.b);
  const Flags f = unpack_flags(u64(in.imm));
  const bool plain = f.round == Round::RN && !f.relu && !f.satfinite;
  if (in.m0 <= 1) {
    u32* d = w.dst<u32>(in.d);
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (in.m0 == 0) d[l] = plain ? u32(f32_to_f16(a[l])) << 16 | f32_to_f16(b[l]) : u32(convert<F16>(a[l], f).v) << 16 | convert<F16>(b[l], f).v;
      else d[l] = plain ? u32(f32_to_bf16(a[l])) << 16 | f32_to_bf16(b[l]) : u32(convert<BF16>(a[l], f).v) << 16 | convert<BF16>(b[l], f).v;
    }
  } else {
    u8* d = w.dst<u8>(in.d);
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      u16 v = in.m0 == 2 ? u16(convert<E4>(a[l], f).v << 8 | convert<E4>(b[l], f).v) : u16(convert<E5>(a[l], f).v << 8 | convert<E5>(b[l], f).v);
      put<u16>(d, in.m1, l, v);
    }
  }
}
// f16x2 <-> fp8x2. m0: 0 f16x2 -> e4m3x2, 1 f16x2 -> e5m2x2, 2 e4m3x2 -> f16x2, 3 e5m2x2 -> f16x2, 4/5 bf16x2
void h_cvt_fp8_half(Warp& w, const Instr& in, u32 m) {
  const Flags f = unpack_flags(u64(in.imm));
  u8* d = w.dst<u8>(in.d);
  const u8* a = w.src<u8>(in.a);
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (in.m0 <= 1) {
      u32 v;
      std::memcpy(&v, a + l * in.m2, 4);
      auto one = [&](u16 h) -> u16 { return in.m0 == 0 ? convert<E4>(F16{h}, f).v : convert<E5>(F16{h}, f).v; };
      put<u16>(d, in.m1, l, u16(one(u16(v >> 16)) << 8 | one(u16(v))));
    } else {
      u16 v;
      std::memcpy(&v, a + l * in.m2, 2);
      auto one = [&](u8 e) -> u32 { return in.m0 == 2 ? convert<F16>(E4{e}, f).v : convert<F16>(E5{e}, f).v; };
      put<u32>(d, in.m1, l, one(u8(v >> 8)) << 16 | one(u8(v)));
    }
  }
}
void h_cvt_tf32(Warp& w, const Instr& in, u32 m) {
  const float* a = w.src<float>(in.a);
  const Flags f = unpack_flags(u64(in.imm));
  active_lanes(w.dst<float>(in.d), m, [&](int l) { float x = f32_to_tf32(a[l], f.round); return f.relu && x < 0 ? 0.0f : x; });
}

// cvt.pack.sat.ct.at: d = {sat(a), sat(b)} (16-bit), or bytes above c's (8-bit).
void h_cvt_pack(Warp& w, const Instr& in, u32 m) {
  const s32 *a = w.src<s32>(in.a), *b = w.src<s32>(in.b);
  const u32* c = in.c == kNone ? nullptr : w.src<u32>(in.c);
  const bool sign = in.m0;
  const int bits = in.m1;
  const s64 lo = sign ? -(1ll << (bits - 1)) : 0, hi = sign ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1;
  const bool au = in.m2;
  active_lanes(w.dst<u32>(in.d), m, [&](int l) {
    auto s = [&](s32 x) { s64 v = au ? s64(u32(x)) : s64(x); v = v < lo ? lo : v > hi ? hi : v; return u32(v) & u32((1ull << bits) - 1); };
    u32 r = s(a[l]) << bits | s(b[l]);
    if (c) r |= c[l] << (2 * bits);
    return r;
  });
}

template <class D> Handler cvt_from(Decoder& d, Type s, bool fast) {
  auto pick = [&](auto z) -> Handler {
    using S = decltype(z);
    if constexpr (std::is_arithmetic_v<S> && std::is_arithmetic_v<D> && !(std::is_floating_point_v<S> && std::is_integral_v<D>))
      if (fast) return h_cvt_fast<D, S>;
    return h_cvt<D, S>;
  };
  switch (s) {
    case Type::U8: case Type::B8: return pick(u8{});
    case Type::S8: return pick(s8{});
    case Type::U16: case Type::B16: return pick(u16{});
    case Type::S16: return pick(s16{});
    case Type::U32: case Type::B32: return pick(u32{});
    case Type::S32: return pick(s32{});
    case Type::U64: case Type::B64: return pick(u64{});
    case Type::S64: return pick(s64{});
    case Type::F16: return pick(F16{});
    case Type::BF16: return pick(BF16{});
    case Type::F32: case Type::TF32: return pick(float{});
    case Type::F64: return pick(double{});
    default: d.fail("unsupported conversion source");
  }
}

void d_cvt(Decoder& d) {
  Flags f;
  for (auto& m : d.in->op) {
    if (m == "rn" || m == "rni") f.round = Round::RN;
    else if (m == "rz" || m == "rzi") f.round = Round::RZ;
    else if (m == "rm" || m == "rmi") f.round = Round::RM;
    else if (m == "rp" || m == "rpi") f.round = Round::RP;
    else if (m == "rna") f.round = Round::RNA;
    if (m == "rni" || m == "rzi" || m == "rmi" || m == "rpi") f.to_int = true;
    if (m == "ftz") f.ftz = true;
    if (m == "sat") f.sat = true;
    if (m == "relu") f.relu = true;
    if (m == "satfinite") f.satfinite = true;
  }
  if (d.has("pack")) {
    const Type ct = d.type(d.nops() > 3 ? 2 : 1), at = d.type(d.nops() > 3 ? 1 : 0);
    u32 a = d.src(d.op(1), Type::S32), b = d.src(d.op(2), Type::S32), c = d.nops() > 3 ? d.src(d.op(3), Type::B32) : kNone, r = d.dst(d.op(0));
    Instr& i = d.emit(h_cvt_pack);
    i.a = a; i.b = b; i.c = c; i.d = r;
    i.m0 = is_signed(ct); i.m1 = u8(8 * type_bytes(ct)); i.m2 = at == Type::U32;
    return;
  }
  const Type s = d.type(0), t = d.type(1);
  const u64 flags = pack_flags(f);
  const int db = d.reg_bytes(d.op(0));
  if (t == Type::F16x2 || t == Type::BF16x2 || t == Type::E4M3x2 || t == Type::E5M2x2) {
    if (s == Type::F32) {
      Instr& i = emit2(d, h_cvt_pair, s, s);
      i.imm = s64(flags);
      i.m0 = t == Type::F16x2 ? 0 : t == Type::BF16x2 ? 1 : t == Type::E4M3x2 ? 2 : 3;
      i.m1 = u8(db);
      return;
    }
    Instr& i = emit1(d, h_cvt_fp8_half, s);
    i.imm = s64(flags);
    if (s == Type::F16x2 && t == Type::E4M3x2) i.m0 = 0;
    else if (s == Type::F16x2 && t == Type::E5M2x2) i.m0 = 1;
    else if (s == Type::E4M3x2 && t == Type::F16x2) i.m0 = 2;
    else if (s == Type::E5M2x2 && t == Type::F16x2) i.m0 = 3;
    else d.fail("unsupported packed conversion");
    i.m1 = u8(db);
    i.m2 = u8(d.reg_bytes(d.op(1)));
    return;
  }
  if (t == Type::TF32) { emit1(d, h_cvt_tf32, Type::F32).imm = s64(flags); return; }
  const int sb = d.reg_bytes(d.op(1)) ? d.reg_bytes(d.op(1)) : bytes_of_row(s);
  const bool plain = f.round == Round::RN && !f.to_int && !f.ftz && !f.sat && !f.relu && !f.satfinite;
  const bool exact = db == type_bytes(t) && sb == type_bytes(s);
  Handler h;
  if (plain && exact && t == Type::F32 && s == Type::F16) h = h_f16_to_f32;
  else if (exact && !f.sat && !f.to_int && t == Type::F32 && s == Type::BF16) h = h_bf16_to_f32;
  else if (plain && exact && t == Type::F16 && s == Type::F32) h = h_f32_to_f16;
  else if (plain && exact && t == Type::BF16 && s == Type::F32) h = h_f32_to_bf16;
  else {
    const bool fast = plain && exact;
    switch (t) {
      case Type::U8: case Type::B8: h = cvt_from<u8>(d, s, fast); break;
      case Type::S8: h = cvt_from<s8>(d, s, fast); break;
      case Type::U16: case Type::B16: h = cvt_from<u16>(d, s, fast); break;
      case Type::S16: h = cvt_from<s16>(d, s, fast); break;
      case Type::U32: case Type::B32: h = cvt_from<u32>(d, s, fast); break;
      case Type::S32: h = cvt_from<s32>(d, s, fast); break;
      case Type::U64: case Type::B64: h = cvt_from<u64>(d, s, fast); break;
      case Type::S64: h = cvt_from<s64>(d, s, fast); break;
      case Type::F16: h = cvt_from<F16>(d, s, false); break;
      case Type::BF16: h = cvt_from<BF16>(d, s, false); break;
      case Type::F32: h = cvt_from<float>(d, s, fast); break;
      case Type::F64: h = cvt_from<double>(d, s, fast); break;
      default: d.fail("unsupported conversion");
    }
  }
  Instr& i = emit1(d, h, s);
  i.m0 = u8(db);
  i.m1 = u8(sb);
  i.imm = s64(flags);
}

}  // namespace

void register_cvt() { op_table()["cvt"] = d_cvt; }

}  // namespace gpusim::ptx
