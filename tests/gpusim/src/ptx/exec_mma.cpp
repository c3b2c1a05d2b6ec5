// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// mma.sync, ldmatrix, stmatrix, movmatrix.
//
// Products are exact; sums are kept in f64 and rounded once to the accumulator
// type (nearest even). Hardware sums in narrower, truncating adders, so results
// agree to accumulation error, not bit by bit.
#include <cmath>

#include "checks.h"
#include "fragments.h"
#include "lanes.h"

namespace gpusim::ptx {

// One row of 32 registers (32-bit) holding packed elements of type t, as floats:
// out[lane * per + j].
int unpack_row(const u32* row, Type t, float* out) {
  switch (t) {
    case Type::F16: {
      const u16* h = reinterpret_cast<const u16*>(row);
#if defined(__AVX512F__)
      for (int i = 0; i < 64; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h + i))));
#else
      for (int i = 0; i < 64; ++i) out[i] = f16_to_f32(h[i]);
#endif
      return 2;
    }
    case Type::BF16: {
      const u16* h = reinterpret_cast<const u16*>(row);
      u32* o = reinterpret_cast<u32*>(out);
      for (int i = 0; i < 64; ++i) o[i] = u32(h[i]) << 16;
      return 2;
    }
    case Type::TF32: case Type::F32: case Type::B32: {
      u32* o = reinterpret_cast<u32*>(out);
      for (int i = 0; i < 32; ++i) o[i] = row[i] & ~0x1fffu;
      return 1;
    }
    case Type::S8: { const s8* b = reinterpret_cast<const s8*>(row); for (int i = 0; i < 128; ++i) out[i] = b[i]; return 4; }
    case Type::U8: { const u8* b = reinterpret_cast<const u8*>(row); for (int i = 0; i < 128; ++i) out[i] = b[i]; return 4; }
    case Type::E4M3: case Type::E5M2: {
      static const auto table = [] {
        std::array<std::array<float, 256>, 2> v;
        for (int i = 0; i < 256; ++i) { v[0][i] = e4m3_to_f32(u8(i)); v[1][i] = e5m2_to_f32(u8(i)); }
        return v;
      }();
      const auto& tab = table[t == Type::E5M2];
      const u8* b = reinterpret_cast<const u8*>(row);
      for (int i = 0; i < 128; ++i) out[i] = tab[b[i]];
      return 4;
    }
    default: return 0;
  }
}

namespace {

// ext->r: d, a, b, c registers in order; imm: m | n << 8 | k << 16; m0: satfinite; m1: a type,
// m2: b type; e: d type; c: c type; d2: register counts nd | na << 8 | nb << 16 | nc << 24
struct Shape { int m, n, k; };
Shape shape(const Instr& in) { return {int(in.imm & 0xff), int(in.imm >> 8 & 0xff), int(in.imm >> 16 & 0xffff)}; }

// Row i of the accumulator tile, 8 columns wide.
typedef double Row8 __attribute__((vector_size(64)));

// acc += a * b. The products are exact in f64, so fusing changes nothing.
template <int M> __attribute__((optimize("fp-contract=fast"))) void multiply(const double* a, const Row8* b, Row8* out, int k) {
  Row8 acc[M];
  for (int i = 0; i < M; ++i) acc[i] = out[i];
  for (int t = 0; t < k; ++t) {
    const Row8 y = b[t];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) acc[i] += a[t * M + i] * y;
  }
  for (int i = 0; i < M; ++i) out[i] = acc[i];
}

// Fragments (g = lane / 4, t = lane % 4, e elements per register):
//   A register r: row g + 8 * (r % 2) (m16), columns 4e * (r / 2) + t * e ...
//   B register r: rows 4e * r + t * e ..., column g
//   C element i:  row g + 8 * (i / 2), column 2t + i % 2
// so a whole register row is an 8 x 4e block in lane order.
template <int M> void mma(Warp& w, const Instr& in, const Shape& s) {
  const Type at = Type(in.m1), bt = Type(in.m2), dt = Type(in.e), ct = Type(in.c);
  const int nd = in.d2 & 255, na = in.d2 >> 8 & 255, nb = in.d2 >> 16 & 255;
  const u32 *rd = in.ext->r.data(), *ra = rd + nd, *rb = ra + na, *rc = rb + nb;
  constexpr int groups = M / 8;
  float tmp[128];
  double a[64 * M];                 // [k][row]
  alignas(64) double b[64][8];      // [k][column]
  for (int r = 0; r < na; ++r) {
    const int width = 4 * unpack_row(w.src<u32>(ra[r]), at, tmp);
    const int row0 = M == 16 ? 8 * (r & 1) : 0, col0 = (M == 16 ? r >> 1 : r) * width;
    for (int c = 0; c < width; ++c)
      for (int g = 0; g < 8; ++g) a[(col0 + c) * M + row0 + g] = tmp[g * width + c];
  }
  for (int r = 0; r < nb; ++r) {
    const int width = 4 * unpack_row(w.src<u32>(rb[r]), bt, tmp);
    for (int c = 0; c < width; ++c)
      for (int g = 0; g < 8; ++g) b[r * width + c][g] = tmp[g * width + c];
  }
  alignas(64) double acc[M * 8];
  for (int h = 0; h < groups; ++h) {
    double* o = acc + 64 * h;
    if (ct == Type::F16) {
      const u16* c = w.src<u16>(rc[h]);
      for (int i = 0; i < 64; ++i) o[i] = f16_to_f32(c[i]);
    } else if (ct == Type::S32) {
      const s32 *c0 = w.src<s32>(rc[2 * h]), *c1 = w.src<s32>(rc[2 * h + 1]);
      for (int l = 0; l < 32; ++l) { o[2 * l] = c0[l]; o[2 * l + 1] = c1[l]; }
    } else {
      const float *c0 = w.src<float>(rc[2 * h]), *c1 = w.src<float>(rc[2 * h + 1]);
      for (int l = 0; l < 32; ++l) { o[2 * l] = c0[l]; o[2 * l + 1] = c1[l]; }
    }
  }
  multiply<M>(a, reinterpret_cast<const Row8*>(b), reinterpret_cast<Row8*>(acc), s.k);
  for (int h = 0; h < groups; ++h) {
    const double* o = acc + 64 * h;
    if (dt == Type::F16) {
      u16* d = w.dst<u16>(rd[h]);
      for (int i = 0; i < 64; ++i) d[i] = f64_to_f16(o[i]);
    } else if (dt == Type::S32) {
      s32 *d0 = w.dst<s32>(rd[2 * h]), *d1 = w.dst<s32>(rd[2 * h + 1]);
      auto put = [&](double v) {
        s64 x = s64(v);
        if (in.m0) x = x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x;
        return s32(u32(u64(x)));
      };
      for (int l = 0; l < 32; ++l) { d0[l] = put(o[2 * l]); d1[l] = put(o[2 * l + 1]); }
    } else {
      float *d0 = w.dst<float>(rd[2 * h]), *d1 = w.dst<float>(rd[2 * h + 1]);
      for (int l = 0; l < 32; ++l) { d0[l] = float(o[2 * l]); d1[l] = float(o[2 * l + 1]); }
    }
  }
}

void h_mma(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "mma.sync")) return;
  ++w.sync_clock;
  const Shape s = shape(in);
  if (s.m == 16) mma<16>(w, in, s); else mma<8>(w, in, s);
  ++w.st.mma_instructions;
  w.st.mma_flops += 2ull * s.m * s.n * s.k;
}

void h_mma_f64(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "mma.sync")) return;
  ++w.sync_clock;
  const Shape s = shape(in);
  const int nd = in.d2 & 255, na = in.d2 >> 8 & 255, nb = in.d2 >> 16 & 255;
  const u32 *rd = in.ext->r.data(), *ra = rd + nd, *rb = ra + na, *rc = rb + nb;
  double a[16][16], b[16][8], acc[16][8];
  const bool two = s.m == 16;
  for (int r = 0; r < na; ++r)
    for (int l = 0; l < 32; ++l) a[l / 4 + (two ? 8 * (r & 1) : 0)][l % 4 + 4 * (two ? r >> 1 : r)] = w.src<double>(ra[r])[l];
  for (int r = 0; r < nb; ++r)
    for (int l = 0; l < 32; ++l) b[l % 4 + 4 * r][l / 4] = w.src<double>(rb[r])[l];
  for (int i = 0; i < nd; ++i)
    for (int l = 0; l < 32; ++l) acc[l / 4 + 8 * (i >> 1)][(l % 4) * 2 + (i & 1)] = w.src<double>(rc[i])[l];
  for (int i = 0; i < s.m; ++i)
    for (int t = 0; t < s.k; ++t)
      for (int j = 0; j < 8; ++j) acc[i][j] = std::fma(a[i][t], b[t][j], acc[i][j]);
  for (int i = 0; i < nd; ++i)
    for (int l = 0; l < 32; ++l) w.dst<double>(rd[i])[l] = acc[l / 4 + 8 * (i >> 1)][(l % 4) * 2 + (i & 1)];
  ++w.st.mma_instructions;
  w.st.mma_flops += 2ull * s.m * s.n * s.k;
}

bool parse_shape(const std::string& s, Shape& out) {
  return sscanf(s.c_str(), "m%dn%dk%d", &out.m, &out.n, &out.k) == 3;
}

void d_mma(Decoder& d) {
  if (d.has("sp") || d.has("sp::ordered_metadata")) d.fail("sparse mma");
  Shape s{};
  for (auto& p : d.in->op) parse_shape(p, s);
  const Type ct = d.type(0), bt = d.type(1), at = d.type(2), dt = d.type(3);
  std::vector<u32> refs;
  u32 counts = 0;
  auto add = [&](const Operand& o, int slot, bool out, Type t) {
    const u32 n = o.kind == Operand::Vec ? u32(o.sub.size()) : 1;
    counts |= n << (8 * slot);
    for (u32 k = 0; k < n; ++k) {
      const Operand& e = o.kind == Operand::Vec ? o.sub[k] : o;
      refs.push_back(out ? d.dst(e) : d.src(e, t));
    }
    return int(n);
  };
  const Type reg = at == Type::F64 ? Type::F64 : Type::B32;
  int nd = add(d.op(0), 0, true, reg), na = add(d.op(1), 1, false, reg), nb = add(d.op(2), 2, false, reg), nc = add(d.op(3), 3, false, ct == Type::F32 ? Type::F32 : reg);
  int bits = 8 * type_bytes(at);
  if (at == Type::TF32) bits = 32;
  const bool known = at == Type::F16 || at == Type::BF16 || at == Type::TF32 || at == Type::S8 || at == Type::U8 || at == Type::E4M3 || at == Type::E5M2 || at == Type::F64;
  const int reg_bits = at == Type::F64 ? 64 : 32;
  if (!known || s.n != 8 || (s.m != 16 && s.m != 8) || s.k > 64 || na * reg_bits * 32 != s.m * s.k * bits || nb * reg_bits * 32 != s.k * 8 * bits) d.fail("unsupported mma shape or type");
  const int want_d = dt == Type::F16 ? s.m / 8 : s.m / 4, want_c = ct == Type::F16 ? s.m / 8 : s.m / 4;
  if (nd != want_d || nc != want_c) d.fail("mma accumulator has the wrong number of registers");
  Instr& i = d.emit(at == Type::F64 ? h_mma_f64 : h_mma);
  d.ext(i).r = refs;
  i.imm = s.m | s.n << 8 | s.k << 16;
  i.m0 = d.has("satfinite");
  i.m1 = u8(at); i.m2 = u8(bt);
  i.e = u32(dt); i.c = u32(ct);
  i.d2 = counts;
}

// ---- ldmatrix / stmatrix ----
// m0: address row bytes, m1: matrices, m2: transposed
bool matrix_rows(Warp& w, const Instr& in, u32 m, bool write, u8** p, u64* a) {
  if (!whole_warp(w, in, m, "ldmatrix/stmatrix")) return false;
  ++w.sync_clock;
  const int n = 8 * in.m1;
  for (int l = 0; l < n; ++l) {
    a[l] = in.m0 == 8 ? w.src<u64>(in.a)[l] + u64(in.imm) : in.m0 == 4 ? u32(w.src<u32>(in.a)[l] + u32(in.imm)) : u64(in.imm);
    p[l] = shared_range(w, in, l, a[l], 16, 16, write);
  }
  count_wavefronts(w, n == 32 ? ~0u : (1u << n) - 1, a, 16);
  return true;
}
void h_ldmatrix(Warp& w, const Instr& in, u32 m) {
  u8* p[32];
  u64 a[32];
  if (!matrix_rows(w, in, m, false, p, a)) return;
  if (shared_checked(w)) for (int l = 0; l < 8 * in.m1; ++l) shared_read(w, in, l, a[l], 16);
  for (int k = 0; k < in.m1; ++k) {
    u32* d = w.dst<u32>(in.ext->r[k]);
    for (int l = 0; l < 32; ++l) {
      if (in.m2) {
        u16 lo, hi;
        std::memcpy(&lo, p[8 * k + (l % 4) * 2] + (l / 4) * 2, 2);
        std::memcpy(&hi, p[8 * k + (l % 4) * 2 + 1] + (l / 4) * 2, 2);
        d[l] = lo | u32(hi) << 16;
      } else {
        std::memcpy(&d[l], p[8 * k + l / 4] + (l % 4) * 4, 4);
      }
    }
  }
}
void h_stmatrix(Warp& w, const Instr& in, u32 m) {
  u8* p[32];
  u64 a[32];
  if (!matrix_rows(w, in, m, true, p, a)) return;
  for (int k = 0; k < in.m1; ++k) {
    const u32* s = w.src<u32>(in.ext->r[k]);
    u16 mat[8][8];
    for (int l = 0; l < 32; ++l) {
      const u16 lo = u16(s[l]), hi = u16(s[l] >> 16);
      if (in.m2) { mat[(l % 4) * 2][l / 4] = lo; mat[(l % 4) * 2 + 1][l / 4] = hi; }
      else { mat[l / 4][(l % 4) * 2] = lo; mat[l / 4][(l % 4) * 2 + 1] = hi; }
    }
    for (int r = 0; r < 8; ++r) {
      if (shared_checked(w)) shared_write(w, in, 8 * k + r, a[8 * k + r], 16, reinterpret_cast<const u8*>(mat[r]));
      std::memcpy(p[8 * k + r], mat[r], 16);
    }
  }
}
void d_matrix(Decoder& d, bool store) {
  if (!d.has("m8n8") || !d.has("b16")) d.fail("only m8n8 b16 matrices");
  const Operand& v = d.op(store ? 1 : 0);
  std::vector<u32> refs;
  auto add = [&](const Operand& o) { refs.push_back(store ? d.src(o, Type::B32) : d.dst(o)); };
  if (v.kind == Operand::Vec) for (auto& o : v.sub) add(o); else add(v);
  const int n = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  if (int(refs.size()) != n) d.fail("wrong number of registers");
  Instr& i = d.emit(store ? h_stmatrix : h_ldmatrix);
  d.ext(i).r = refs;
  i.m0 = u8(d.address(i, d.op(store ? 0 : 1), Space::Shared));
  i.m1 = u8(n);
  i.m2 = d.has("trans");
}

// movmatrix.trans: transposes an 8x8 b16 matrix held in registers.
void h_movmatrix(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "movmatrix")) return;
  const u32* a = w.src<u32>(in.a);
  u16 mat[8][8];
  for (int l = 0; l < 32; ++l) { mat[l / 4][(l % 4) * 2] = u16(a[l]); mat[l / 4][(l % 4) * 2 + 1] = u16(a[l] >> 16); }
  u32* d = w.dst<u32>(in.d);
  for (int l = 0; l < 32; ++l) d[l] = mat[(l % 4) * 2][l / 4] | u32(mat[(l % 4) * 2 + 1][l / 4]) << 16;
}

}  // namespace

void register_mma() {
  auto& t = op_table();
  t["mma"] = d_mma;
  t["ldmatrix"] = [](Decoder& d) { d_matrix(d, false); };
  t["stmatrix"] = [](Decoder& d) { d_matrix(d, true); };
  t["movmatrix"] = [](Decoder& d) { emit1(d, h_movmatrix, Type::B32); };
  register_wmma();
}

}  // namespace gpusim::ptx
