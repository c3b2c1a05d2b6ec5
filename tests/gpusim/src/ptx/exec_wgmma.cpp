// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// wgmma: asynchronous warpgroup matrix multiply (sm_90a).
//
// Every warp of the group computes its own 16 rows. With late_async_copies the
// operation runs when wgmma.wait_group covers it, so accumulators read too early
// hold old values and shared memory overwritten too early gives wrong results.
// Sums as for mma: f64, rounded once.
#include "async.h"
#include "checks.h"
#include "fragments.h"
#include "lanes.h"
#include "swizzle.h"

namespace gpusim::ptx {
namespace {

struct Desc { u32 start, lbo, sbo, base; int log2w; };
Desc parse_desc(u64 v) {
  static const int log2w[] = {0, 3, 2, 1};  // none, 128B, 64B, 32B
  return {u32(v & 0x3fff) << 4, u32(v >> 16 & 0x3fff) << 4, u32(v >> 32 & 0x3fff) << 4, u32(v >> 49 & 7), log2w[v >> 62]};
}

// Shared address of element (mn, k). Canonical layouts, T elements per 16 bytes:
//   K-major:  8 rows of one swizzle width (16 bytes unswizzled), row groups SBO apart;
//             unswizzled 16-byte columns are LBO apart.
//   MN-major: 8 k-rows of one swizzle width, k groups SBO apart, mn blocks LBO apart;
//             unswizzled: mn blocks SBO apart, k groups LBO apart.
u32 element_address(const Desc& d, bool mn_major, u32 mn, u32 k, u32 es) {
  const u32 t = 16 / es, width = 16u << d.log2w;
  u32 a = d.start;
  if (!mn_major) {
    a += (mn % 8) * width + (mn / 8) * d.sbo + (k % t) * es + (k / t) * (d.log2w ? 16 : d.lbo);
  } else if (d.log2w) {
    const u32 r = 1u << d.log2w;
    a += (mn % t) * es + (mn / t % r) * 16 + mn / (t * r) * d.lbo + (k % 8) * width + (k / 8) * d.sbo;
  } else {
    a += (mn % t) * es + (mn / t) * d.sbo + (k % 8) * 16 + (k / 8) * d.lbo;
  }
  return swizzle_address(a, d.log2w, d.base);
}

float element(const u8* p, Type t) {
  switch (t) {
    case Type::F16: { u16 v; std::memcpy(&v, p, 2); return f16_to_f32(v); }
    case Type::BF16: { u16 v; std::memcpy(&v, p, 2); return bf16_to_f32(v); }
    case Type::TF32: { float v; std::memcpy(&v, p, 4); return tf32_operand(v); }
    case Type::E4M3: return e4m3_to_f32(*p);
    case Type::E5M2: return e5m2_to_f32(*p);
    case Type::S8: return s8(*p);
    default: return *p;
  }
}

// imm: n | k << 16; m0: bit 0 A in shared memory, 1 transpose A, 2 transpose B, 3 negate A, 4 negate B;
// m1: a type, m2: b type; e: d type; ext->r: d registers, then a registers; ext->value: their count;
// a: descriptor A, b: descriptor B, c: scale-d predicate
void load_shared(Warp& w, const Instr& in, const Desc& d, bool mn_major, u32 mn0, u32 rows, u32 k, Type t, bool neg, float* out, u32 row_stride, u32 k_stride) {
  const u32 es = type_bytes(t);
  for (u32 r = 0; r < rows; ++r)
    for (u32 c = 0; c < k; ++c) {
      const u32 a = element_address(d, mn_major, mn0 + r, c, es);
      if (a < kSharedBase || a + es > w.block->shared_bytes) shared_range(w, in, 0, a, es, es, false);
      if (shared_checked(w)) shared_read(w, in, 0, a, es);
      const float v = element(w.block->shared + a, t);
      out[r * row_stride + c * k_stride] = neg ? -v : v;
    }
}

void execute(Warp& w, const Deferred& op) {
  const Instr& in = *op.in;
  const u32 n = in.imm & 0xffff, k = u32(in.imm >> 16);
  const Type at = Type(in.m1), bt = Type(in.m2), dt = Type(in.e);
  std::vector<float> a(16 * k), b(k * n);
  if (in.m0 & 1) {
    load_shared(w, in, parse_desc(op.desc_a), in.m0 & 2, 16 * (w.id % 4), 16, k, at, in.m0 & 8, a.data(), k, 1);
  } else {
    float tmp[128];
    for (int r = 0; r < 4; ++r) {
      const int e = unpack_row(op.a.data() + 32 * r, at, tmp);
      for (int l = 0; l < 32; ++l)
        for (int j = 0; j < e; ++j) {
          const float v = tmp[l * e + j];
          a[(8 * (r & 1) + l / 4) * k + (r >> 1) * 4 * e + (l % 4) * e + j] = in.m0 & 8 ? -v : v;
        }
    }
  }
  load_shared(w, in, parse_desc(op.desc_b), in.m0 & 4, 0, n, k, bt, in.m0 & 16, b.data(), 1, n);
  u8* frame = w.regs + op.frame_off;
  auto reg = [&](u32 i) { return reinterpret_cast<u32*>(frame + in.ext->r[i]); };
  // Element i of lane l: row l/4 + 8*(i/2%2), column i/4*8 + l%4*2 + i%2.
  const u32 elems = n / 2;
  std::vector<double> acc(16 * n, 0.0);
  auto at_elem = [&](u32 l, u32 i) -> double& { return acc[(l / 4 + 8 * (i / 2 % 2)) * n + i / 4 * 8 + l % 4 * 2 + i % 2]; };
  if (op.scale_d)
    for (u32 l = 0; l < 32; ++l)
      for (u32 i = 0; i < elems; ++i) {
        if (dt == Type::F16) at_elem(l, i) = f16_to_f32(u16(reg(i / 2)[l] >> 16 * (i & 1)));
        else if (dt == Type::S32) at_elem(l, i) = s32(reg(i)[l]);
        else at_elem(l, i) = bits_f32(reg(i)[l]);
      }
  for (u32 i = 0; i < 16; ++i)
    for (u32 t = 0; t < k; ++t) {
      const double x = a[i * k + t];
      double* c = acc.data() + i * n;
      const float* y = b.data() + t * n;
      for (u32 j = 0; j < n; ++j) c[j] += x * double(y[j]);
    }
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < elems; ++i) {
      const double v = at_elem(l, i);
      if (dt == Type::F16) {
        u32& r = reg(i / 2)[l];
        r = i & 1 ? (r & 0xffff) | u32(f64_to_f16(v)) << 16 : (r & 0xffff0000u) | f64_to_f16(v);
      } else if (dt == Type::S32) reg(i)[l] = u32(u64(s64(v)));
      else reg(i)[l] = f32_bits(float(v));
    }
}

void h_wgmma(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "wgmma")) return;
  const u32 n = in.imm & 0xffff, k = u32(in.imm >> 16), nd = u32(in.ext->value);
  Deferred op;
  op.in = &in;
  op.mask = m;
  op.frame_off = w.frame_off;
  if (in.m0 & 1) op.desc_a = w.src<u64>(in.a)[0];
  else for (int r = 0; r < 4; ++r) { const u32* s = w.src<u32>(in.ext->r[nd + r]); op.a.insert(op.a.end(), s, s + 32); }
  op.desc_b = w.src<u64>(in.b)[0];
  op.scale_d = w.pred(in.c) & 1;
  ++w.st.mma_instructions;
  w.st.mma_flops += 2ull * 16 * n * k;
  if (w.launch->options->late_async_copies) w.async->wgmma.push_back(std::move(op));
  else execute(w, op);
}
void h_fence(Warp& w, const Instr& in, u32 m) { whole_warp(w, in, m, "wgmma.fence"); }
void h_commit(Warp& w, const Instr& in, u32 m) {
  if (whole_warp(w, in, m, "wgmma.commit_group")) w.async->wgmma_group_end.push_back(u32(w.async->wgmma.size()));
}
void h_wait(Warp& w, const Instr& in, u32 m) {
  if (!whole_warp(w, in, m, "wgmma.wait_group")) return;
  AsyncState& s = *w.async;
  const size_t keep = size_t(in.imm);
  if (s.wgmma_group_end.size() <= keep) return;
  const size_t groups = s.wgmma_group_end.size() - keep;
  const u32 n = s.wgmma_group_end[groups - 1];
  for (u32 i = 0; i < n; ++i) execute(w, s.wgmma[i]);
  s.wgmma.erase(s.wgmma.begin(), s.wgmma.begin() + n);
  s.wgmma_group_end.erase(s.wgmma_group_end.begin(), s.wgmma_group_end.begin() + groups);
  for (auto& e : s.wgmma_group_end) e -= n;
}
void d_wgmma(Decoder& d) {
  if (d.has("fence")) { d.emit(h_fence); return; }
  if (d.has("commit_group")) { d.emit(h_commit); return; }
  if (d.has("wait_group")) { d.emit(h_wait).imm = s64(d.op(0).imm); return; }
  if (d.has("sp")) d.fail("sparse wgmma");
  int m = 0, n = 0, k = 0;
  for (auto& p : d.in->op) if (sscanf(p.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  const Type bt = d.type(0), at = d.type(1), dt = d.type(2);
  if (m != 64 || n % 8 || n < 8 || n > 256 || k * type_bytes(at) != 32) d.fail("unsupported wgmma shape");
  const bool shared_a = d.op(1).kind == Operand::Reg;
  std::vector<u32> refs;
  for (auto& o : d.op(0).sub) refs.push_back(d.dst_keep(o));
  const size_t nd = refs.size();
  if (nd != size_t(dt == Type::F16 ? n / 4 : n / 2)) d.fail("wgmma accumulator has the wrong number of registers");
  u32 a = kNone;
  if (shared_a) a = d.src(d.op(1), Type::B64);
  else {
    if (d.op(1).sub.size() != 4) d.fail("wgmma needs four A registers");
    for (auto& o : d.op(1).sub) refs.push_back(d.src(o, Type::B32));
  }
  u32 b = d.src(d.op(2), Type::B64), c = d.pred_src(d.op(3));
  auto imm = [&](size_t i) { return d.nops() > i ? s64(d.op(i).imm) : 0; };
  Instr& i = d.emit(h_wgmma);
  d.ext(i).r = refs;
  d.ext(i).value = nd;
  i.a = a; i.b = b; i.c = c;
  i.imm = n | k << 16;
  i.m1 = u8(at); i.m2 = u8(bt); i.e = u32(dt);
  const bool trans_a = shared_a && imm(6), trans_b = imm(shared_a ? 7 : 6);
  i.m0 = u8(shared_a | trans_a << 1 | trans_b << 2 | (imm(4) < 0) << 3 | (imm(5) < 0) << 4);
}

}  // namespace

void register_wgmma() { op_table()["wgmma"] = d_wgmma; }

}  // namespace gpusim::ptx
