// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Loops over the 32 lanes of a warp, written so that the compiler vectorises them.
#pragma once
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decode.h"
#include "warp.h"

namespace gpusim::ptx {

// d[l] = f(l) for the lanes of m. f runs for every lane and must not trap.
template <class D, class F> inline __attribute__((always_inline)) void each_lane(D* __restrict d, u32 m, F f) {
  if (m == 0xffffffffu) {
#pragma GCC ivdep
    for (int l = 0; l < 32; ++l) d[l] = f(l);
    return;
  }
  D t[32];
#pragma GCC ivdep
  for (int l = 0; l < 32; ++l) t[l] = f(l);
  for (; m; m &= m - 1) { int l = __builtin_ctz(m); d[l] = t[l]; }
}

// Only the active lanes are evaluated: for expensive or trapping functions.
template <class D, class F> inline __attribute__((always_inline)) void active_lanes(D* d, u32 m, F f) {
  for (; m; m &= m - 1) { int l = __builtin_ctz(m); d[l] = f(l); }
}

// Bit l = b[l] != 0, for b[l] in {0, 1}.
inline u32 pack_bits(const u8* b) {
#if defined(__AVX2__)
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return u32(_mm256_movemask_epi8(_mm256_cmpgt_epi8(v, _mm256_setzero_si256())));
#else
  u32 r = 0;
  for (int l = 0; l < 32; ++l) r |= u32(b[l] & 1) << l;
  return r;
#endif
}

template <class F> inline __attribute__((always_inline)) u32 lane_bits(F f) {
  alignas(32) u8 b[32];
#pragma GCC ivdep
  for (int l = 0; l < 32; ++l) b[l] = f(l) ? 1 : 0;
  return pack_bits(b);
}

// Handlers of elementwise operations: Op::f(operands...).
template <class Op, class D, class A> void h_un(Warp& w, const Instr& in, u32 m) {
  const A* a = w.src<A>(in.a);
  each_lane(w.dst<D>(in.d), m, [=](int l) __attribute__((always_inline)) { return D(Op::f(a[l])); });
}
template <class Op, class D, class A, class B> void h_bin(Warp& w, const Instr& in, u32 m) {
  const A* a = w.src<A>(in.a);
  const B* b = w.src<B>(in.b);
  each_lane(w.dst<D>(in.d), m, [=](int l) __attribute__((always_inline)) { return D(Op::f(a[l], b[l])); });
}
template <class Op, class D, class A, class B, class C> void h_tri(Warp& w, const Instr& in, u32 m) {
  const A* a = w.src<A>(in.a);
  const B* b = w.src<B>(in.b);
  const C* c = w.src<C>(in.c);
  each_lane(w.dst<D>(in.d), m, [=](int l) __attribute__((always_inline)) { return D(Op::f(a[l], b[l], c[l])); });
}

// Emits d, a{, b{, c}} with every operand of type t (b of tb, c of tc if given).
inline Instr& emit1(Decoder& d, Handler h, Type t) {
  u32 a = d.src(d.op(1), t), r = d.dst(d.op(0));
  Instr& i = d.emit(h);
  i.d = r; i.a = a;
  return i;
}
inline Instr& emit2(Decoder& d, Handler h, Type ta, Type tb) {
  u32 a = d.src(d.op(1), ta), b = d.src(d.op(2), tb), r = d.dst(d.op(0));
  Instr& i = d.emit(h);
  i.d = r; i.a = a; i.b = b;
  return i;
}
inline Instr& emit3(Decoder& d, Handler h, Type ta, Type tb, Type tc) {
  u32 a = d.src(d.op(1), ta), b = d.src(d.op(2), tb), c = d.src(d.op(3), tc), r = d.dst(d.op(0));
  Instr& i = d.emit(h);
  i.d = r; i.a = a; i.b = b; i.c = c;
  return i;
}

// f(T{}) for the C++ type of an integer PTX type (bit types are unsigned).
template <class F> Handler by_int(Decoder& d, Type t, F f) {
  switch (t) {
    case Type::U16: case Type::B16: return f(u16{});
    case Type::U32: case Type::B32: return f(u32{});
    case Type::U64: case Type::B64: return f(u64{});
    case Type::S16: return f(s16{});
    case Type::S32: return f(s32{});
    case Type::S64: return f(s64{});
    default: d.fail("unsupported integer type");
  }
}

}  // namespace gpusim::ptx
