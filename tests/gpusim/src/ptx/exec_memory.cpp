// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// ld, st, ldu and the parameter space.
#include "checks.h"
#include "lanes.h"

namespace gpusim::ptx {
namespace {

// Instr fields: m0: bytes of the address row (0: immediate), m1: bit 0 signed,
// bit 1 ordered access (volatile, relaxed, acquire, release: a synchronisation
// rather than data, for the race checker); ext->r/size: the registers.
void addresses(const Warp& w, const Instr& in, u64* out) {
  const u64 off = u64(in.imm);
  if (in.m0 == 8) {
    const u64* a = w.src<u64>(in.a);
    for (int l = 0; l < 32; ++l) out[l] = a[l] + off;
  } else if (in.m0 == 4) {
    const u32* a = w.src<u32>(in.a);
    for (int l = 0; l < 32; ++l) out[l] = u32(a[l] + u32(off));
  } else {
    for (int l = 0; l < 32; ++l) out[l] = off;
  }
}

template <class T> inline T get(const u8* p) { T v; std::memcpy(&v, p, sizeof v); return v; }
struct B16 { u64 lo, hi; };

// Copies element k of every lane from memory to a register row.
template <class T> void load_rows(Warp& w, const Instr& in, u32 m, u8* const* p) {
  const Ext& e = *in.ext;
  for (size_t k = 0; k < e.r.size(); ++k) {
    if (e.r[k] == kNone) continue;
    const size_t off = k * sizeof(T);
    if (e.size[k] == sizeof(T)) {
      T* d = w.dst<T>(e.r[k]);
      for (u32 x = m; x; x &= x - 1) { int l = __builtin_ctz(x); d[l] = get<T>(p[l] + off); }
    } else if constexpr (sizeof(T) < 8) {
      using S = std::make_signed_t<T>;
      for (u32 x = m; x; x &= x - 1) {
        int l = __builtin_ctz(x);
        T v = get<T>(p[l] + off);
        u64 wide = in.m1 & 1 ? u64(s64(S(v))) : u64(v);
        switch (e.size[k]) {
          case 2: w.dst<u16>(e.r[k])[l] = u16(wide); break;
          case 4: w.dst<u32>(e.r[k])[l] = u32(wide); break;
          default: w.dst<u64>(e.r[k])[l] = wide; break;
        }
      }
    }
  }
}
template <class T> void store_rows(Warp& w, const Instr& in, u32 m, u8* const* p) {
  const Ext& e = *in.ext;
  for (size_t k = 0; k < e.r.size(); ++k) {
    const size_t off = k * sizeof(T);
    const u8* s = w.src<u8>(e.r[k]);
    const u32 stride = e.size[k];
    for (u32 x = m; x; x &= x - 1) { int l = __builtin_ctz(x); std::memcpy(p[l] + off, s + l * stride, sizeof(T)); }
  }
}

void check_reads(Warp& w, const Instr& in, u32 m, const u64* a, u32 bytes) {
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (in.m1 & 2) { if (w.block->races) w.block->races->acquire(w, a[l] & kSharedOffsetMask); }
    else shared_read(w, in, l, a[l], bytes);
  }
}
template <class T> void check_writes(Warp& w, const Instr& in, u32 m, const u64* a) {
  const Ext& e = *in.ext;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u8 data[32];
    for (size_t i = 0; i < e.r.size(); ++i) std::memcpy(data + i * sizeof(T), w.src<u8>(e.r[i]) + l * e.size[i], sizeof(T));
    if ((in.m1 & 2) && w.block->races) {
      w.block->races->release(w, a[l] & kSharedOffsetMask);
      if (!w.block->init_bits.empty()) std::fill_n(w.block->init_bits.begin() + (a[l] & kSharedOffsetMask), sizeof(T) * e.r.size(), u8(1));
    } else {
      shared_write(w, in, l, a[l], u32(sizeof(T) * e.r.size()), data);
    }
    // Lanes of one instruction writing one place: the later lane sees the earlier one's bytes.
    if (w.block->races) {
      u8* p = shared_range(w, in, l, a[l], u32(sizeof(T) * e.r.size()), 1, true);
      std::memcpy(p, data, sizeof(T) * e.r.size());
    }
  }
}

template <class T, Space S> void h_ld(Warp& w, const Instr& in, u32 m) {
  u64 a[32];
  u8* p[32];
  addresses(w, in, a);
  const u32 bytes = u32(sizeof(T) * in.ext->r.size());
  if constexpr (S == Space::Global) map_global(w, in, m, a, bytes, false, p);
  else if constexpr (S == Space::Shared) {
    map_shared(w, in, m, a, bytes, false, p);
    if (shared_checked(w)) check_reads(w, in, m, a, bytes);
  } else if constexpr (S == Space::Local) map_local(w, in, m, a, bytes, false, p);
  else if constexpr (S == Space::Const) map_const(w, in, m, a, bytes, p);
  else {
    u32 shared = 0;
    map_generic(w, in, m, a, bytes, false, p, &shared);
    if (shared && shared_checked(w)) {
      for (auto& x : a) x &= ~kWindowMask;
      check_reads(w, in, shared, a, bytes);
    }
  }
  if (in.m1 & 2) w.host->spin_hints += 4;
  load_rows<T>(w, in, m, p);
}
template <class T, Space S> void h_st(Warp& w, const Instr& in, u32 m) {
  u64 a[32];
  u8* p[32];
  addresses(w, in, a);
  const u32 bytes = u32(sizeof(T) * in.ext->r.size());
  if constexpr (S == Space::Global) map_global(w, in, m, a, bytes, true, p);
  else if constexpr (S == Space::Shared) {
    map_shared(w, in, m, a, bytes, true, p);
    if (shared_checked(w)) check_writes<T>(w, in, m, a);
  } else if constexpr (S == Space::Local) map_local(w, in, m, a, bytes, true, p);
  else {
    u32 shared = 0;
    map_generic(w, in, m, a, bytes, true, p, &shared);
    if (shared && shared_checked(w)) {
      for (auto& x : a) x &= ~kWindowMask;
      check_writes<T>(w, in, shared, a);
    }
  }
  store_rows<T>(w, in, m, p);
}

template <class T> Handler ld_for(Decoder& d, Space s) {
  switch (s) {
    case Space::Generic: return h_ld<T, Space::Generic>;
    case Space::Global: return h_ld<T, Space::Global>;
    case Space::Shared: return h_ld<T, Space::Shared>;
    case Space::Local: return h_ld<T, Space::Local>;
    case Space::Const: return h_ld<T, Space::Const>;
    default: d.fail("unsupported state space");
  }
}
template <class T> Handler st_for(Decoder& d, Space s) {
  switch (s) {
    case Space::Generic: return h_st<T, Space::Generic>;
    case Space::Global: return h_st<T, Space::Global>;
    case Space::Shared: return h_st<T, Space::Shared>;
    case Space::Local: return h_st<T, Space::Local>;
    default: d.fail("unsupported state space");
  }
}

// Kernel parameter at a fixed offset: the same value for every lane.
void h_ld_param(Warp& w, const Instr& in, u32 m) {
  const u32 n = in.m2;
  u8* p[32];
  u8* at = w.launch->params.data() + in.imm;
  for (auto& x : p) x = at;
  if (size_t(in.imm) + n * in.ext->r.size() > w.launch->params.size()) w.fault(in, __builtin_ctz(m), "read past the kernel's parameters");
  switch (n) {
    case 1: load_rows<u8>(w, in, m, p); break;
    case 2: load_rows<u16>(w, in, m, p); break;
    case 4: load_rows<u32>(w, in, m, p); break;
    case 8: load_rows<u64>(w, in, m, p); break;
    default: load_rows<B16>(w, in, m, p); break;
  }
}
// Function parameter or call argument: lane-major in the frame. m2: element bytes; c: offset in the variable, e: its stride
template <bool Store> void h_frame_param(Warp& w, const Instr& in, u32 m) {
  u8* p[32];
  u8* base = w.base[0] + in.imm + in.c;
  for (int l = 0; l < 32; ++l) p[l] = base + l * in.e;
  auto go = [&](auto z) {
    using T = decltype(z);
    if constexpr (Store) store_rows<T>(w, in, m, p); else load_rows<T>(w, in, m, p);
  };
  switch (in.m2) {
    case 1: go(u8{}); break;
    case 2: go(u16{}); break;
    case 4: go(u32{}); break;
    case 8: go(u64{}); break;
    default: go(B16{}); break;
  }
}

void emit_ldst(Decoder& d, bool store, int n, Type t, Space s, const Operand& addr, const std::vector<u32>& refs, const std::vector<u8>& sizes,
               Handler h, u32 stride, s64 frame_var) {
  if (!h) switch (n) {
    case 1: h = store ? st_for<u8>(d, s) : ld_for<u8>(d, s); break;
    case 2: h = store ? st_for<u16>(d, s) : ld_for<u16>(d, s); break;
    case 4: h = store ? st_for<u32>(d, s) : ld_for<u32>(d, s); break;
    case 8: h = store ? st_for<u64>(d, s) : ld_for<u64>(d, s); break;
    case 16: h = store ? st_for<B16>(d, s) : ld_for<B16>(d, s); break;
    default: d.fail("unsupported access type");
  }
  Instr& i = d.emit(h);
  d.ext(i).r = refs;
  d.ext(i).size = sizes;
  i.m1 = u8(is_signed(t));
  i.m2 = u8(n);
  for (auto& m : d.in->op)
    if (m == "volatile" || m == "relaxed" || m == "acquire" || m == "release" || m == "mmio") i.m1 |= 2;
  if (frame_var >= 0) { i.imm = frame_var; i.c = u32(addr.imm); i.e = stride; return; }
  i.m0 = u8(d.address(i, addr, s));
}

void d_ldst(Decoder& d, bool store) {
  const Type t = d.type();
  const int n = type_bytes(t);
  const Operand& addr = d.op(store ? 0 : 1);
  const Operand& val = d.op(store ? 1 : 0);
  Space s = Space::Generic;
  for (auto& m : d.in->op) {
    if (m == "global") s = Space::Global;
    else if (m == "shared" || m == "shared::cta" || m == "shared::cluster") s = Space::Shared;
    else if (m == "local") s = Space::Local;
    else if (m == "const") s = Space::Const;
    else if (m == "param" || m == "param::entry" || m == "param::func") s = Space::Param;
  }
  std::vector<u32> refs;
  std::vector<u8> sizes;
  auto add = [&](const Operand& o) {
    if (store) { refs.push_back(d.src(o, t)); sizes.push_back(o.kind == Operand::Reg ? u8(d.reg_bytes(o)) : u8(bytes_of_row(t))); }
    else { refs.push_back(d.dst(o)); sizes.push_back(u8(o.kind == Operand::Reg ? d.reg_bytes(o) : n)); }
  };
  if (val.kind == Operand::Vec) for (auto& o : val.sub) add(o); else add(val);

  Handler h = nullptr;
  u32 stride = 0;
  s64 frame_var = -1;
  if (s == Space::Param && addr.reg < 0) {
    if (addr.var < 0) d.fail("unknown parameter");
    const u32 formal = u32(d.fn.params.size());
    if (d.fn.entry && u32(addr.var) < formal) {
      if (store) d.fail("store to a kernel parameter");
      h = h_ld_param;
    } else {
      const Variable& v = d.fn.vars[addr.var];
      stride = std::max(8u, u32((v.size + 7) / 8 * 8));
      frame_var = d.info.var_offset[addr.var];
      if (addr.imm + u64(n) * refs.size() > stride) d.fail("access past a .param variable");
      h = store ? h_frame_param<true> : h_frame_param<false>;
    }
  } else if (s == Space::Param) {
    h = nullptr;
    s = Space::Generic;  // the address of a kernel parameter is a host address
  } else if (s == Space::Local && addr.reg < 0 && (addr.var >= 0)) {
    // [__local_depot + k]: address through a temporary
    Operand tmp = d.temp_operand(Type::B64), sym = addr;
    sym.kind = Operand::Sym;
    u32 row = d.dst(tmp);
    d.emit_local_address(row, d.symbol_address(sym));
    Operand a2;
    a2.kind = Operand::Addr;
    a2.reg = tmp.reg;
    return emit_ldst(d, store, n, t, s, a2, refs, sizes, nullptr, 0, -1);
  }
  emit_ldst(d, store, n, t, s, addr, refs, sizes, h, stride, frame_var);
}

}  // namespace

void register_memory() {
  auto& t = op_table();
  t["ld"] = t["ldu"] = [](Decoder& d) { d_ldst(d, false); };
  t["st"] = [](Decoder& d) { d_ldst(d, true); };
}

}  // namespace gpusim::ptx
