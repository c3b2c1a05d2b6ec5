// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Conversions between f32/f64 and the narrow floating-point formats.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "types.h"

namespace gpusim::ptx {

inline float bits_f32(u32 b) { return std::bit_cast<float>(b); }
inline u32 f32_bits(float f) { return std::bit_cast<u32>(f); }

// Rounding of a narrow conversion.
enum class Round : u8 { RN, RZ, RM, RP, RNA };

// f64 -> f32 rounded to odd: a later rounding to 22 bits or fewer is then exact
// (no double rounding).
inline float to_f32_odd(double d) {
  float f = float(d);
  if (double(f) == d || std::isnan(d)) return f;
  u32 b = f32_bits(f);
  if (std::isinf(f)) return bits_f32((b & 0x80000000u) | 0x7f7fffffu);
  if (std::fabs(double(f)) > std::fabs(d)) --b;  // truncate toward zero
  return bits_f32(b | 1);
}

inline float bf16_to_f32(u16 h) { return bits_f32(u32(h) << 16); }

inline float f16_to_f32(u16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  u32 s = u32(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 31) return bits_f32(s | 0x7f800000 | (m << 13));
  if (e == 0) {
    float v = float(m) * 5.9604644775390625e-8f;
    return s ? -v : v;
  }
  return bits_f32(s | ((e + 112) << 23) | (m << 13));
#endif
}

// Rounds |x| (given as f32 bits) to a format of `ebits` exponent and `mbits`
// mantissa bits with the IEEE layout; overflow goes to the format's infinity
// code (all-ones exponent) or, where the mode rounds down, its largest finite.
inline u32 round_narrow(float x, int ebits, int mbits, Round r) {
  const u32 b = f32_bits(x), sign = b >> 31;
  const int bias = (1 << (ebits - 1)) - 1;
  const u32 inf = ((1u << ebits) - 1) << mbits;
  const u32 a = b & 0x7fffffff;
  u32 out;
  if (a > 0x7f800000) {
    out = inf | ((1u << mbits) - 1);  // canonical NaN
    return out;                        // positive
  }
  if (a == 0x7f800000) {
    out = inf;
  } else if (a == 0) {
    out = 0;
  } else {
    int e = int(a >> 23) - 127;
    u64 m = a & 0x7fffff;
    if (a >> 23) m |= 0x800000; else e = -126;
    int shift = 23 - mbits;                      // bits to drop
    int te = e + bias;                           // target exponent field
    if (te < 1) { shift += 1 - te; te = 1; }
    if (shift > 40) shift = 40;
    u64 q = m >> shift, rem = m & ((1ull << shift) - 1), half = shift ? 1ull << (shift - 1) : 0;
    bool up = false;
    if (rem) switch (r) {
      case Round::RN: up = rem > half || (rem == half && (q & 1)); break;
      case Round::RNA: up = rem >= half; break;
      case Round::RZ: break;
      case Round::RM: up = sign; break;
      case Round::RP: up = !sign; break;
    }
    q += up;
    // q includes the hidden bit when normal: adding folds carries into the exponent.
    u64 v = (u64(te - 1) << mbits) + q;
    if (v >= inf) {
      bool to_inf = r == Round::RN || r == Round::RNA || (r == Round::RP && !sign) || (r == Round::RM && sign);
      v = to_inf ? inf : inf - 1;
    }
    out = u32(v);
  }
  return out | (sign << (ebits + mbits));
}

inline u16 f32_to_f16(float f, Round r = Round::RN) {
#if defined(__F16C__)
  if (r == Round::RN && f == f) return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#endif
  if (f != f) return 0x7fff;
  return u16(round_narrow(f, 5, 10, r));
}
inline u16 f32_to_bf16(float f, Round r = Round::RN) {
  if (f != f) return 0x7fff;
  u32 b = f32_bits(f);
  if (r == Round::RN) return u16((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  if (r == Round::RZ) return u16(b >> 16);
  return u16(round_narrow(f, 8, 7, r));
}
inline u16 f64_to_f16(double d, Round r = Round::RN) { return f32_to_f16(to_f32_odd(d), r); }
inline u16 f64_to_bf16(double d, Round r = Round::RN) { return f32_to_bf16(to_f32_odd(d), r); }

// tf32: an f32 whose low 13 mantissa bits are dropped.
inline float f32_to_tf32(float f, Round r) {
  if (f != f) return bits_f32(0x7fffffff);
  u32 b = f32_bits(f);
  if ((b & 0x7f800000) == 0x7f800000) return f;
  u32 rem = b & 0x1fff, q = b & ~0x1fffu;
  bool up = false;
  if (r == Round::RNA) up = rem >= 0x1000;
  else if (r == Round::RN) up = rem > 0x1000 || (rem == 0x1000 && (q & 0x2000));
  return bits_f32(q + (up ? 0x2000 : 0));
}
// What the tensor core reads of an f32 given as tf32 operand.
inline float tf32_operand(float f) { return bits_f32(f32_bits(f) & ~0x1fffu); }

// fp8. e4m3 has no infinity: 0x7f is NaN and 448 the largest value.
inline float e5m2_to_f32(u8 v) { return f16_to_f32(u16(v) << 8); }
inline float e4m3_to_f32(u8 v) {
  int e = (v >> 3) & 15, m = v & 7;
  float r = (e == 15 && m == 7) ? NAN : e ? std::ldexp(float(8 + m), e - 10) : std::ldexp(float(m), -9);
  return v & 0x80 ? -r : r;
}
inline u8 f32_to_e5m2_sat(float f) {
  if (f != f) return 0x7f;
  u32 v = round_narrow(f, 5, 2, Round::RN);
  if ((v & 0x7f) >= 0x7c) v = (v & 0x80) | 0x7b;
  return u8(v);
}
inline u8 f32_to_e4m3_sat(float f) {
  if (f != f) return 0x7f;
  u8 s = std::signbit(f) ? 0x80 : 0;
  float a = std::fabs(f);
  if (a >= 448.0f) return s | 0x7e;
  if (a == 0) return s;
  int e;
  std::frexp(a, &e);           // a = m * 2^e, m in [0.5, 1)
  e = e - 1 < -6 ? -6 : e - 1; // exponent of the leading bit, subnormals share -6
  float q = std::nearbyint(std::ldexp(a, 3 - e));  // in units of 2^(e-3)
  int n = int(q);
  if (n >= 16) { n = 8; ++e; }
  int code = n < 8 ? n : ((e + 7) << 3) | (n - 8);
  if (code > 0x7e) code = 0x7e;
  return s | u8(code);
}

}  // namespace gpusim::ptx
