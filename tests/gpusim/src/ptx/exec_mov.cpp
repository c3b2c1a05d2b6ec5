// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// mov (copies, packing, special registers, addresses), cvta, isspacep.
#include <chrono>

#include "lanes.h"

namespace gpusim::ptx {
namespace {

template <class T> void h_mov(Warp& w, const Instr& in, u32 m) {
  const T* a = w.src<T>(in.a);
  each_lane(w.dst<T>(in.d), m, [=](int l) __attribute__((always_inline)) { return a[l]; });
}
struct Wide128 { u64 x, y; };

void h_mov_pred(Warp& w, const Instr& in, u32 m) { w.set_pred(in.d, m, w.pred(in.a)); }

// d = {r[0], r[1], ...}, elements of m0 bytes into a row of m1 bytes.
void h_pack(Warp& w, const Instr& in, u32 m) {
  const int n = in.m0, row = in.m1;
  u8* d = w.dst<u8>(in.d);
  u8 tmp[16];
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    for (size_t i = 0; i < in.ext->r.size(); ++i) std::memcpy(tmp + i * n, w.src<u8>(in.ext->r[i]) + l * in.ext->size[i], n);
    std::memcpy(d + l * row, tmp, row);
  }
}
template <class D, class S> void h_pack2(Warp& w, const Instr& in, u32 m) {
  const S *a = w.src<S>(in.a), *b = w.src<S>(in.b);
  each_lane(w.dst<D>(in.d), m, [=](int l) { return D(a[l]) | D(b[l]) << (8 * sizeof(S)); });
}
void h_unpack(Warp& w, const Instr& in, u32 m) {
  const int n = in.m0, row = in.m1;
  const u8* a = w.src<u8>(in.a);
  u8 tmp[16];
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    std::memcpy(tmp, a + l * row, row);
    for (size_t i = 0; i < in.ext->r.size(); ++i) {
      if (in.ext->r[i] == kNone) continue;
      u8* d = w.dst<u8>(in.ext->r[i]) + l * in.ext->size[i];
      std::memset(d, 0, in.ext->size[i]);
      std::memcpy(d, tmp + i * n, n);
    }
  }
}
template <class D, class S> void h_unpack2(Warp& w, const Instr& in, u32 m) {
  const S* a = w.src<S>(in.a);
  S v[32];
  for (int l = 0; l < 32; ++l) v[l] = a[l];
  if (in.d != kNone) each_lane(w.dst<D>(in.d), m, [&](int l) { return D(v[l]); });
  if (in.d2 != kNone) each_lane(w.dst<D>(in.d2), m, [&](int l) { return D(v[l] >> (8 * sizeof(D))); });
}

// Address of a function's local variable: the lane's stack base plus an offset.
template <class T> void h_local_address(Warp& w, const Instr& in, u32 m) {
  const u32 off = u32(in.imm);
  each_lane(w.dst<T>(in.d), m, [&](int l) { return T(w.local_base[l] + off); });
}
// Address of a kernel parameter: host memory.
void h_param_address(Warp& w, const Instr& in, u32 m) {
  const u64 a = reinterpret_cast<u64>(w.launch->params.data()) + u64(in.imm);
  each_lane(w.dst<u64>(in.d), m, [=](int) { return a; });
}

// ---- special registers ----
enum Sreg : u8 {
  TidX, TidY, TidZ, NtidX, NtidY, NtidZ, CtaX, CtaY, CtaZ, NctaX, NctaY, NctaZ, LaneId, WarpId, NwarpId, SmId, NsmId, GridId,
  Clock, GlobalTimer, LaneEq, LaneLe, LaneLt, LaneGe, LaneGt, DynSmem, TotalSmem, ClusterIdX, ClusterIdY, ClusterIdZ,
  NclusterX, NclusterY, NclusterZ, ClCtaX, ClCtaY, ClCtaZ, ClNctaX, ClNctaY, ClNctaZ, ClRank, ClNrank, Explicit, Zero, WarpSz, SmemBegin, ClockHi, GlobalTimerHi, EnvReg1, EnvReg2,
};
int sreg_code(const std::string& n) {
  static const std::unordered_map<std::string, int> map = {
      {"%tid.x", TidX}, {"%tid.y", TidY}, {"%tid.z", TidZ}, {"%ntid.x", NtidX}, {"%ntid.y", NtidY}, {"%ntid.z", NtidZ},
      {"%ctaid.x", CtaX}, {"%ctaid.y", CtaY}, {"%ctaid.z", CtaZ}, {"%nctaid.x", NctaX}, {"%nctaid.y", NctaY}, {"%nctaid.z", NctaZ},
      {"%laneid", LaneId}, {"%warpid", WarpId}, {"%nwarpid", NwarpId}, {"%smid", SmId}, {"%nsmid", NsmId}, {"%gridid", GridId},
      {"%clock", Clock}, {"%clock64", Clock}, {"%clock_hi", ClockHi}, {"%globaltimer", GlobalTimer}, {"%globaltimer_lo", GlobalTimer},
      {"%globaltimer_hi", GlobalTimerHi}, {"%lanemask_eq", LaneEq}, {"%lanemask_le", LaneLe}, {"%lanemask_lt", LaneLt},
      {"%lanemask_ge", LaneGe}, {"%lanemask_gt", LaneGt}, {"%dynamic_smem_size", DynSmem}, {"%total_smem_size", TotalSmem},
      {"%aggr_smem_size", TotalSmem}, {"%is_explicit_cluster", Explicit}, {"%clusterid.x", ClusterIdX}, {"%clusterid.y", ClusterIdY},
      {"%clusterid.z", ClusterIdZ}, {"%nclusterid.x", NclusterX}, {"%nclusterid.y", NclusterY}, {"%nclusterid.z", NclusterZ},
      {"%cluster_ctaid.x", ClCtaX}, {"%cluster_ctaid.y", ClCtaY}, {"%cluster_ctaid.z", ClCtaZ}, {"%cluster_nctaid.x", ClNctaX},
      {"%cluster_nctaid.y", ClNctaY}, {"%cluster_nctaid.z", ClNctaZ}, {"%cluster_ctarank", ClRank}, {"%cluster_nctarank", ClNrank},
      {"WARP_SZ", WarpSz}, {"%reserved_smem_offset_begin", Zero}, {"%reserved_smem_offset_end", SmemBegin}, {"%reserved_smem_offset_cap", SmemBegin},
      {"%reserved_smem_offset_0", Zero}, {"%reserved_smem_offset_1", Zero}, {"%current_graph_exec", Zero},
      {"%envreg1", EnvReg1}, {"%envreg2", EnvReg2}};
  auto it = map.find(n);
  if (it != map.end()) return it->second;
  return n.starts_with("%pm") || n.starts_with("%envreg") ? Zero : -1;
}

u64 sreg_value(const Warp& w, int code, int l) {
  const LaunchConfig& c = w.launch->config;
  const Block& b = *w.block;
  switch (code) {
    case TidX: return w.tid[0][l];
    case TidY: return w.tid[1][l];
    case TidZ: return w.tid[2][l];
    case NtidX: return c.block.x;
    case NtidY: return c.block.y;
    case NtidZ: return c.block.z;
    case CtaX: return b.ctaid.x;
    case CtaY: return b.ctaid.y;
    case CtaZ: return b.ctaid.z;
    case NctaX: return c.grid.x;
    case NctaY: return c.grid.y;
    case NctaZ: return c.grid.z;
    case LaneId: return l;
    case WarpId: return w.id;
    case NwarpId: return b.nwarps;
    case SmId: return (u64(b.ctaid.x) + u64(c.grid.x) * (b.ctaid.y + u64(c.grid.y) * b.ctaid.z)) % std::max(1, w.launch->device->sm_count);
    case NsmId: return w.launch->device->sm_count;
    case GridId: return w.launch->grid_id;
    case Clock: case GlobalTimer: return std::chrono::steady_clock::now().time_since_epoch().count();
    case ClockHi: case GlobalTimerHi: return u64(std::chrono::steady_clock::now().time_since_epoch().count()) >> 32;
    case LaneEq: return 1u << l;
    case LaneLe: return (2ull << l) - 1;
    case LaneLt: return (1u << l) - 1;
    case LaneGe: return ~0u << l;
    case LaneGt: return ~u32((2ull << l) - 1);
    case DynSmem: return c.dynamic_shared_bytes;
    case TotalSmem: return w.launch->shared_bytes - kSharedBase;
    case ClusterIdX: return b.ctaid.x / c.cluster.x;
    case ClusterIdY: return b.ctaid.y / c.cluster.y;
    case ClusterIdZ: return b.ctaid.z / c.cluster.z;
    case NclusterX: return c.grid.x / c.cluster.x;
    case NclusterY: return c.grid.y / c.cluster.y;
    case NclusterZ: return c.grid.z / c.cluster.z;
    case ClCtaX: return b.ctaid.x % c.cluster.x;
    case ClCtaY: return b.ctaid.y % c.cluster.y;
    case ClCtaZ: return b.ctaid.z % c.cluster.z;
    case ClNctaX: return c.cluster.x;
    case ClNctaY: return c.cluster.y;
    case ClNctaZ: return c.cluster.z;
    case ClRank: return b.rank;
    case ClNrank: return c.cluster.count();
    // The address of the workspace that cooperative groups synchronise the grid through.
    case EnvReg1: return c.cooperative ? u32(reinterpret_cast<u64>(w.launch->grid_workspace) >> 32) : 0;
    case EnvReg2: return c.cooperative ? u32(reinterpret_cast<u64>(w.launch->grid_workspace)) : 0;
    case WarpSz: return 32;
    case SmemBegin: return kSharedBase;
    default: return 0;
  }
}
template <class T> void h_sreg(Warp& w, const Instr& in, u32 m) {
  const int code = in.m0;
  if (code <= TidZ) {
    const u32* t = w.tid[code - TidX];
    each_lane(w.dst<T>(in.d), m, [=](int l) { return T(t[l]); });
  } else if (code == LaneId || (code >= LaneEq && code <= LaneGt)) {
    active_lanes(w.dst<T>(in.d), m, [&](int l) { return T(sreg_value(w, code, l)); });
  } else {
    const T v = T(sreg_value(w, code, 0));
    each_lane(w.dst<T>(in.d), m, [=](int) { return v; });
  }
}
void h_is_cluster(Warp& w, const Instr& in, u32 m) { w.set_pred(in.d, m, w.launch->config.cluster.count() > 1 ? ~0u : 0); }

void emit_sreg(Decoder& d, u32 row, const std::string& name, int bytes) {
  int code = sreg_code(name);
  if (code < 0) d.fail("unknown special register " + name);
  Instr& i = d.emit(bytes == 8 ? h_sreg<u64> : bytes == 2 ? h_sreg<u16> : h_sreg<u32>);
  i.d = row;
  i.m0 = u8(code);
}

void d_mov(Decoder& d) {
  const Operand &dst = d.op(0), &src = d.op(1);
  const Type t = d.type();
  if (dst.kind == Operand::Vec || src.kind == Operand::Vec) {
    const Operand& vec = dst.kind == Operand::Vec ? dst : src;
    const int n = int(vec.sub.size()), bytes = type_bytes(t), elem = bytes / n;
    if (dst.kind == Operand::Vec && src.kind == Operand::Vec) {  // mov.v2 style
      for (int k = 0; k < n; ++k) {
        u32 a = d.src(src.sub[k], t), r = d.dst(dst.sub[k]);
        Instr& i = d.emit(bytes == 4 ? h_mov<u32> : bytes == 8 ? h_mov<u64> : h_mov<u16>);
        i.a = a; i.d = r;
      }
      return;
    }
    bool exact = n == 2;
    for (auto& o : vec.sub) exact &= o.kind == Operand::Sink || (o.kind == Operand::Reg && d.reg_bytes(o) == elem) || (&vec == &src && d.is_const(o));
    const Type et = elem == 8 ? Type::B64 : elem == 4 ? Type::B32 : elem == 2 ? Type::B16 : Type::B8;
    if (&vec == &src) {
      if (exact && (bytes == 4 || bytes == 8)) {
        u32 a = d.src(vec.sub[0], et), b = d.src(vec.sub[1], et), r = d.dst(dst);
        Instr& i = d.emit(bytes == 4 ? h_pack2<u32, u16> : h_pack2<u64, u32>);
        i.a = a; i.b = b; i.d = r;
        return;
      }
      std::vector<u32> refs; std::vector<u8> sizes;
      for (auto& o : vec.sub) { refs.push_back(d.src(o, et)); sizes.push_back(o.kind == Operand::Reg ? u8(d.reg_bytes(o)) : u8(bytes_of_row(et))); }
      u32 r = d.dst(dst);
      Instr& i = d.emit(h_pack);
      i.d = r; i.m0 = u8(elem); i.m1 = u8(bytes);
      d.ext(i).r = refs; d.ext(i).size = sizes;
      return;
    }
    u32 a = d.src(src, t);
    if (exact && (bytes == 4 || bytes == 8)) {
      u32 lo = d.dst(vec.sub[0]), hi = d.dst(vec.sub[1]);
      Instr& i = d.emit(bytes == 4 ? h_unpack2<u16, u32> : h_unpack2<u32, u64>);
      i.a = a; i.d = lo; i.d2 = hi;
      return;
    }
    std::vector<u32> refs; std::vector<u8> sizes;
    for (auto& o : vec.sub) { refs.push_back(d.dst(o)); sizes.push_back(u8(d.reg_bytes(o))); }
    Instr& i = d.emit(h_unpack);
    i.a = a; i.m0 = u8(elem); i.m1 = u8(bytes);
    d.ext(i).r = refs; d.ext(i).size = sizes;
    return;
  }
  if (t == Type::Pred) {
    if (src.kind == Operand::SReg) { u32 r = d.dst(dst); d.emit(h_is_cluster).d = r; return; }
    u32 a = d.pred_src(src), r = d.dst(dst);
    Instr& i = d.emit(h_mov_pred);
    i.a = a; i.d = r;
    return;
  }
  if (src.kind == Operand::SReg) { emit_sreg(d, d.dst(dst), src.sym, d.reg_bytes(dst)); return; }
  const int bytes = type_bytes(t);
  if (src.kind == Operand::Sym) {
    bool lane = false;
    Space space = Space::None;
    u64 v = d.symbol_address(src, &space, &lane);
    u32 r = d.dst(dst);
    if (space == Space::Local) {
      Instr& i = d.emit(bytes == 8 ? h_local_address<u64> : h_local_address<u32>);
      i.d = r; i.imm = s64(v);
      return;
    }
    if (space == Space::Param) {
      if (!d.fn.entry) d.fail("address of a function's .param variable");
      Instr& i = d.emit(h_param_address);
      i.d = r; i.imm = s64(v);
      return;
    }
    Instr& i = d.emit(bytes == 8 ? h_mov<u64> : h_mov<u32>);
    i.d = r; i.a = d.constant(v, bytes);
    return;
  }
  if (src.kind == Operand::Reg && d.reg_type(src) == Type::Pred) d.fail("mov of a predicate to a register");
  u32 a = d.src(src, t), r = d.dst(dst);
  Instr& i = d.emit(bytes == 2 ? h_mov<u16> : bytes == 4 ? h_mov<u32> : bytes == 16 ? h_mov<Wide128> : h_mov<u64>);
  i.a = a; i.d = r;
}

// ---- cvta / isspacep ----
template <class D, class S> void h_add_window(Warp& w, const Instr& in, u32 m) {
  const S* a = w.src<S>(in.a);
  const u64 k = u64(in.imm);
  each_lane(w.dst<D>(in.d), m, [=](int l) { return D(u64(a[l]) + k); });
}
void d_cvta(Decoder& d) {
  bool to = d.has("to");
  u64 window = d.has("shared") || d.has("shared::cta") || d.has("shared::cluster") ? kSharedWindow : d.has("local") ? kLocalWindow : 0;
  const Operand& s = d.op(1);
  if (s.kind == Operand::Sym) {
    Space space = Space::None;
    bool lane = false;
    u64 v = d.symbol_address(s, &space, &lane);
    u32 r = d.dst(d.op(0));
    if (space == Space::Local) {
      d.emit_local_address(r, v);
      if (!to) { Instr& i = d.emit(h_add_window<u64, u64>); i.a = i.d = r; i.imm = s64(kLocalWindow); }
      return;
    }
    if (space == Space::Param) { Instr& i = d.emit(h_param_address); i.d = r; i.imm = s64(v); return; }
    Instr& i = d.emit(h_mov<u64>);
    i.d = r; i.a = d.constant(to ? v - window : v + window, 8);
    return;
  }
  int sb = d.reg_bytes(s), db = d.reg_bytes(d.op(0));
  u32 a = d.src(s, Type::B64), r = d.dst(d.op(0));
  Instr& i = d.emit(sb == 4 ? (db == 4 ? h_add_window<u32, u32> : h_add_window<u64, u32>) : (db == 4 ? h_add_window<u32, u64> : h_add_window<u64, u64>));
  i.a = a; i.d = r; i.imm = s64(to ? 0 - window : window);
}
// m0: 0 global, 1 shared::cluster, 2 local, 3 const, 4 param, 5 shared::cta
void h_isspacep(Warp& w, const Instr& in, u32 m) {
  const u64* a = w.src<u64>(in.a);
  u32 v = 0;
  const u64 pb = reinterpret_cast<u64>(w.launch->params.data()), pe = pb + w.launch->params.size();
  const ModuleData& md = *w.launch->program->module;
  for (int l = 0; l < 32; ++l) {
    u64 x = a[l], win = x & kWindowMask;
    bool r = false;
    switch (in.m0) {
      case 0: r = win == 0; break;
      case 1: r = win == kSharedWindow; break;
      case 5: { u32 k = u32(x) >> kClusterShift; r = win == kSharedWindow && (k == 0 || k == 1 + w.block->rank); break; }
      case 2: r = win == kLocalWindow; break;
      case 3: r = x >= md.const_begin && x < md.const_end; break;
      case 4: r = x >= pb && x < pe; break;
    }
    v |= u32(r) << l;
  }
  w.set_pred(in.d, m, v);
}
void d_isspacep(Decoder& d) {
  u32 a = d.src(d.op(1), Type::B64), r = d.dst(d.op(0));
  Instr& i = d.emit(h_isspacep);
  i.a = a; i.d = r;
  i.m0 = d.has("global") ? 0 : d.has("shared::cluster") ? 1 : d.has("local") ? 2 : d.has("const") ? 3 : d.has("param") || d.has("param::entry") ? 4 : 5;
}

}  // namespace

void Decoder::emit_local_address(u32 row, u64 offset) {
  Instr& i = emit(h_local_address<u64>);
  i.d = row;
  i.imm = s64(offset);
}
void Decoder::materialise_sreg(u32 row, const std::string& name, int bytes) { emit_sreg(*this, row, name, bytes); }

void register_mov() {
  auto& t = op_table();
  t["mov"] = d_mov;
  t["cvta"] = d_cvta;
  t["isspacep"] = d_isspacep;
}

}  // namespace gpusim::ptx
