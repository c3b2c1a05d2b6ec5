// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// wmma.load/mma/store for f16/bf16/tf32/s8/u8 operands.
//
// The ISA leaves the fragment layout open. Here: element e of an R x C fragment
// with n elements per lane sits in lane e / n, position e % n (row-major e);
// where hardware gives a fragment more registers than elements (f16 operands of
// m16n16k16 use 8 registers for 8 elements per lane) the rest repeat.
#include <cmath>

#include "checks.h"
#include "fragments.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

// imm: m | n << 8 | k << 16; m1: which (0 a, 1 b, 2 c/d); m2: type; m0: address row bytes; e: column major;
// b: stride row (kNone: dense)
struct Dims { int rows, cols; };
Dims dims(const Instr& in) {
  const int m = in.imm & 255, n = in.imm >> 8 & 255, k = in.imm >> 16 & 255;
  return in.m1 == 0 ? Dims{m, k} : in.m1 == 1 ? Dims{k, n} : Dims{m, n};
}

template <bool Store> void h_wmma_mem(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "wmma")) return;
  ++w.sync_clock;
  const Dims d = dims(in);
  const Type t = Type(in.m2);
  const int bytes = type_bytes(t), per_reg = 4 / bytes, total = d.rows * d.cols / 32;
  const u64 base = (in.m0 == 8 ? w.src<u64>(in.a)[0] : in.m0 == 4 ? w.src<u32>(in.a)[0] : 0) + u64(in.d2);
  const u64 stride = in.b == kNone ? u64(in.e ? d.rows : d.cols) : w.src<u32>(in.b)[0];
  const int regs = int(in.ext->r.size());
  for (int pos = 0; pos < regs * per_reg; ++pos) {
    if (Store && pos >= total) break;
    u64 addr[32];
    u8* p[32];
    for (int l = 0; l < 32; ++l) {
      const int e = l * total + pos % total, r = e / d.cols, c = e % d.cols;
      addr[l] = base + (in.e ? u64(c) * stride + r : u64(r) * stride + c) * bytes;
    }
    u32 shared = 0;
    if (in.c == 2) map_shared(w, in, m, addr, bytes, Store, p), shared = m;
    else if (in.c == 1) map_global(w, in, m, addr, bytes, Store, p);
    else map_generic(w, in, m, addr, bytes, Store, p, &shared);
    u8* reg = reinterpret_cast<u8*>(Store ? const_cast<u32*>(w.src<u32>(in.ext->r[pos / per_reg])) : w.dst<u32>(in.ext->r[pos / per_reg]));
    for (int l = 0; l < 32; ++l) {
      u8* q = reg + l * 4 + (pos % per_reg) * bytes;
      if (Store) {
        if (shared && shared_checked(w)) shared_write(w, in, l, addr[l] & ~kWindowMask, bytes, q);
        std::memcpy(p[l], q, bytes);
      } else {
        if (shared && shared_checked(w)) shared_read(w, in, l, addr[l] & ~kWindowMask, bytes);
        std::memcpy(q, p[l], bytes);
      }
    }
  }
}

void gather(Warp& w, const u32* refs, int n, Type t, int elems, double* out) {
  float tmp[128];
  const int total = elems / 32;
  for (int r = 0; r < n; ++r) {
    const u32* row = w.src<u32>(refs[r]);
    int per;
    if (t == Type::F32) { per = 1; for (int l = 0; l < 32; ++l) tmp[l] = bits_f32(row[l]); }
    else if (t == Type::S32) { if (r < total) for (int l = 0; l < 32; ++l) out[l * total + r] = s32(row[l]); continue; }
    else per = unpack_row(row, t, tmp);
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < per; ++j) if (r * per + j < total) out[l * total + r * per + j] = tmp[l * per + j];
  }
}

// ext->r: d, a, b, c; ext->size: their counts; m0: a column-major flag unused (fragments are logical);
// m1: a type, m2: b type, e: d type, c: c type
void h_wmma_mma(Warp& w, const Instr& in, u32 mask) {
  if (!whole_warp(w, in, mask, "wmma")) return;
  ++w.sync_clock;
  const int m = in.imm & 255, n = in.imm >> 8 & 255, k = in.imm >> 16 & 255;
  const int nd = in.ext->size[0], na = in.ext->size[1], nb = in.ext->size[2], nc = in.ext->size[3];
  const u32 *rd = in.ext->r.data(), *ra = rd + nd, *rb = ra + na, *rc = rb + nb;
  std::vector<double> a(m * k), b(k * n), c(m * n);
  gather(w, ra, na, Type(in.m1), m * k, a.data());
  gather(w, rb, nb, Type(in.m2), k * n, b.data());
  gather(w, rc, nc, Type(in.c), m * n, c.data());
  for (int i = 0; i < m; ++i)
    for (int t = 0; t < k; ++t)
      for (int j = 0; j < n; ++j) c[i * n + j] += a[i * k + t] * b[t * n + j];
  const int total = m * n / 32;
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < total; ++e) {
      const double v = c[l * total + e];
      if (Type(in.e) == Type::F16) reinterpret_cast<u16*>(w.dst<u32>(rd[e / 2]))[l * 2 + (e & 1)] = f64_to_f16(v);
      else if (Type(in.e) == Type::S32) w.dst<s32>(rd[e])[l] = s32(u32(u64(s64(v))));
      else w.dst<float>(rd[e])[l] = float(v);
    }
  ++w.st.mma_instructions;
  w.st.mma_flops += 2ull * m * n * k;
}

void d_wmma(Decoder& d) {
  int m = 0, n = 0, k = 0;
  for (auto& p : d.in->op) if (sscanf(p.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  if (!m) d.fail("wmma shape");
  const s64 shape = m | n << 8 | k << 16;
  if (d.in->op[1] == "mma") {
    std::vector<u32> refs;
    std::vector<u8> counts;
    for (int o = 0; o < 4; ++o) {
      counts.push_back(u8(d.op(o).sub.size()));
      for (auto& e : d.op(o).sub) refs.push_back(o == 0 ? d.dst(e) : d.src(e, Type::B32));
    }
    // Types: .d.c for f16 operands, .d.a.b.c otherwise.
    std::vector<Type> ts;
    for (auto& p : d.in->op) if (Type t = parse_type(p); t != Type::None) ts.push_back(t);
    Instr& i = d.emit(h_wmma_mma);
    d.ext(i).r = refs;
    d.ext(i).size = counts;
    i.imm = shape;
    i.m1 = u8(ts.size() == 2 ? Type::F16 : ts[1]);
    i.m2 = u8(ts.size() == 2 ? Type::F16 : ts[2]);
    i.e = u32(ts.front());
    i.c = u32(ts.back());
    return;
  }
  const bool store = d.in->op[1] == "store";
  const Operand& v = d.op(store ? 1 : 0);
  const Operand& addr = d.op(store ? 0 : 1);
  std::vector<u32> refs;
  for (auto& e : v.sub) refs.push_back(store ? d.src(e, Type::B32) : d.dst(e));
  u32 stride = d.nops() > 2 ? d.src(d.op(2), Type::U32) : kNone;
  const std::string& which = d.in->op[2];
  Instr& i = d.emit(store ? h_wmma_mem<true> : h_wmma_mem<false>);
  d.ext(i).r = refs;
  i.m0 = u8(d.address(i, addr, Space::Generic));
  i.d2 = u32(i.imm);
  i.imm = shape;
  i.b = stride;
  i.m1 = which == "a" ? 0 : which == "b" ? 1 : 2;
  i.m2 = u8(d.type());
  i.e = d.has("col");
  i.c = d.has("shared") || d.has("shared::cta") ? 2 : d.has("global") ? 1 : 0;
}

}  // namespace

void register_wmma() { op_table()["wmma"] = d_wmma; }

}  // namespace gpusim::ptx
