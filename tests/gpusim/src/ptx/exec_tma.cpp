// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// cp.async.bulk: plain bulk copies and tensor copies (tiled and im2col).
//
// Sources are read when the instruction executes; with late_async_copies the
// data reach shared memory, and the mbarrier its transaction bytes, only when a
// thread next tests an mbarrier.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "checks.h"
#include "gpusim/tensor_map.h"
#include "half.h"
#include "lanes.h"
#include "mbarrier.h"
#include "swizzle.h"

namespace gpusim::ptx {
namespace {

struct Ref { u32 row; u32 bytes; s64 offset; };   // an address operand: register row, its size, offset

u64 value_of(const Warp& w, const Ref& r, int l) {
  if (r.bytes == 8) return w.src<u64>(r.row)[l] + u64(r.offset);
  if (r.bytes == 4) return u32(w.src<u32>(r.row)[l] + u32(r.offset));
  return u64(r.offset);
}

enum Kind : u8 { GlobalToShared, SharedToGlobal, SharedToShared, TensorLoad, TensorStore };
enum Reduce : u8 { RNone, RAdd, RMin, RMax, RInc, RDec, RAnd, ROr, RXor };

struct Bulk {
  Kind kind;
  Reduce reduce = RNone;
  Type type = Type::None;      // of a non-tensor reduction
  bool im2col = false, multicast = false;
  int rank = 0;
  Ref dst{}, src{}, bar{};     // tensor: the map is dst (store) or src (load)
  u32 size = kNone, mask = kNone;
  std::vector<u32> coords, offsets;
};

// Writes to shared memory by the copy engine.
void put_shared(Block& b, u32 off, const u8* data, u32 n) {
  std::memcpy(b.shared + off, data, n);
  if (!b.init_bits.empty()) std::fill_n(b.init_bits.begin() + off, n, u8(1));
  if (b.races) b.races->forget(off, n);
}

// Bytes `data` to `dst` in every target block, then the transaction count.
void deliver(Warp& w, const Instr& in, int lane, const Bulk& k, std::vector<u8> data, int log2w) {
  const u64 dst = value_of(w, k.dst, lane), bar = value_of(w, k.bar, lane);
  std::vector<std::pair<u64, u64>> targets;
  if (k.multicast) {
    const u32 mask = w.src<u16>(k.mask)[lane];
    for (u32 r = 0; r < 16; ++r)
      if (mask >> r & 1) {
        const u64 rank = u64(r + 1) << kClusterShift;
        targets.push_back({(dst & kSharedOffsetMask) | rank, (bar & kSharedOffsetMask) | rank});
      }
  } else {
    targets.push_back({dst, bar});
  }
  for (auto& t : targets) {
    shared_range(w, in, lane, t.first, u32(data.size()), 16, true);
    if (log2w && (t.first & 127)) w.fault(in, lane, "misaligned access: tensor copy to shared memory needs 128-byte alignment");
    mbarrier_at(w, in, lane, t.second);
  }
  auto land = [&w, &in, lane, targets, data = std::move(data), log2w] {
    for (auto& [d, b] : targets) {
      Block& block = shared_owner(w, in, lane, d);
      const u32 base = u32(d) & kSharedOffsetMask;
      if (!log2w) put_shared(block, base, data.data(), u32(data.size()));
      else for (u32 i = 0; i < data.size(); i += 16) put_shared(block, swizzle_address(base + i, log2w), data.data() + i, 16);
      mbarrier_update(w, in, lane, b, 0, -s64(data.size()));
    }
  };
  if (w.launch->options->late_async_copies) w.block->cluster->bulk.push_back(std::move(land));
  else land();
}

// ---- reductions ----
template <class T> T reduce_num(Reduce op, T a, T b) {
  switch (op) {
    case RAdd: return T(a + b);
    case RMin: return std::min(a, b);
    case RMax: return std::max(a, b);
    case RInc: return a >= b ? T(0) : T(a + 1);
    case RDec: return a == T(0) || a > b ? b : T(a - 1);
    default: break;
  }
  if constexpr (std::is_integral_v<T>) return op == RAnd ? T(a & b) : op == ROr ? T(a | b) : T(a ^ b);
  return a;
}
template <class T, class F> void cas_loop(u8* p, F f) {
  T* q = reinterpret_cast<T*>(p);
  T old = __atomic_load_n(q, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(q, &old, f(old), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
}
void reduce_one(u8* p, const u8* v, Type t, Reduce op) {
  auto load = [&](auto z) { std::memcpy(&z, v, sizeof z); return z; };
  switch (t) {
    case Type::F32: { float x = load(float{}); cas_loop<u32>(p, [&](u32 o) { return f32_bits(reduce_num(op, bits_f32(o), x)); }); break; }
    case Type::F64: { double x = load(double{}); cas_loop<u64>(p, [&](u64 o) { return std::bit_cast<u64>(reduce_num(op, std::bit_cast<double>(o), x)); }); break; }
    case Type::F16: { float x = f16_to_f32(load(u16{})); cas_loop<u16>(p, [&](u16 o) { return f32_to_f16(reduce_num(op, f16_to_f32(o), x)); }); break; }
    case Type::BF16: { float x = bf16_to_f32(load(u16{})); cas_loop<u16>(p, [&](u16 o) { return f32_to_bf16(reduce_num(op, bf16_to_f32(o), x)); }); break; }
    case Type::S32: { s32 x = load(s32{}); cas_loop<s32>(p, [&](s32 o) { return reduce_num(op, o, x); }); break; }
    case Type::S64: { s64 x = load(s64{}); cas_loop<s64>(p, [&](s64 o) { return reduce_num(op, o, x); }); break; }
    case Type::U64: case Type::B64: { u64 x = load(u64{}); cas_loop<u64>(p, [&](u64 o) { return reduce_num(op, o, x); }); break; }
    default: { u32 x = load(u32{}); cas_loop<u32>(p, [&](u32 o) { return reduce_num(op, o, x); }); break; }
  }
}

// ---- plain bulk copies ----
void bulk_linear(Warp& w, const Instr& in, int l, const Bulk& k) {
  const u32 n = w.src<u32>(k.size)[l];
  const u64 dst = value_of(w, k.dst, l), src = value_of(w, k.src, l);
  if (n % 16) w.fault(in, l, "bulk copy of " + std::to_string(n) + " bytes: not a multiple of 16");
  if (!n) return;
  if ((dst | src) & 15) w.fault(in, l, "misaligned access: bulk copy needs 16-byte alignment");
  w.st.async_copy_bytes += n;
  if (k.kind == GlobalToShared) {
    global_range(w, in, l, src, n, false);
    const u8* p = reinterpret_cast<const u8*>(src);
    w.st.global_load_bytes += n;
    w.st.global_load_sectors += (src + n - 1) / 32 - src / 32 + 1;
    note_sectors(w, src, n, false);
    deliver(w, in, l, k, std::vector<u8>(p, p + n), 0);
  } else if (k.kind == SharedToShared) {
    const u8* p = shared_range(w, in, l, src, n, 16, false);
    deliver(w, in, l, k, std::vector<u8>(p, p + n), 0);
  } else {
    const u8* p = shared_range(w, in, l, src, n, 16, false);
    if (shared_checked(w)) shared_read(w, in, l, src, n);
    global_range(w, in, l, dst, n, true);
    w.st.global_store_bytes += n;
    w.st.global_store_sectors += (dst + n - 1) / 32 - dst / 32 + 1;
    note_sectors(w, dst, n, true);
    if (k.reduce == RNone) std::memcpy(reinterpret_cast<u8*>(dst), p, n);
    else for (u32 i = 0; i < n; i += type_bytes(k.type)) reduce_one(reinterpret_cast<u8*>(dst) + i, p + i, k.type, k.reduce);
  }
}

// ---- tensor copies ----
const TensorMap& map_at(Warp& w, const Instr& in, int l, u64 a, const Bulk& k) {
  if (a & 63) w.fault(in, l, "misaligned access: tensor map");
  global_range(w, in, l, a, sizeof(TensorMap), false);
  const TensorMap& m = *reinterpret_cast<const TensorMap*>(a);
  if (m.magic != TensorMap::kMagic) w.fault(in, l, "not an encoded tensor map");
  if (m.rank != k.rank) w.fault(in, l, "tensor map of rank " + std::to_string(m.rank) + " used as " + std::to_string(k.rank) + "d");
  if ((m.mode == TensorMap::kIm2col) != k.im2col) w.fault(in, l, "tensor map mode does not match the instruction");
  if (m.interleave) w.fault(in, l, "interleaved tensor maps are not supported");
  return m;
}

void fill_out_of_bounds(const TensorMap& m, u8* p, u32 bytes) {
  if (!m.oob_fill) { std::memset(p, 0, bytes); return; }
  const int e = m.element_bytes();
  for (u32 i = 0; i < bytes; i += e)
    for (int b = 0; b < e; ++b) p[i + b] = b == e - 1 ? 0x7f : 0xff;
}

// Calls f(row bytes offset, global address or 0, bytes before and length in bounds) for each
// innermost row of the box, in shared-memory order.
template <class F> u32 each_row(const TensorMap& m, const s32* c, F f) {
  u32 count[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < m.rank; ++i) {
    const u32 s = i ? std::max<u32>(1, m.element_strides[i]) : 1;
    count[i] = (m.box[i] + s - 1) / s;
  }
  const int e = m.element_bytes();
  const u32 row = count[0] * e;
  u32 at = 0;
  for (u32 i4 = 0; i4 < count[4]; ++i4)
    for (u32 i3 = 0; i3 < count[3]; ++i3)
      for (u32 i2 = 0; i2 < count[2]; ++i2)
        for (u32 i1 = 0; i1 < count[1]; ++i1, at += row) {
          const u32 idx[5] = {0, i1, i2, i3, i4};
          bool inside = true;
          u64 addr = m.address;
          for (int d = 1; d < m.rank; ++d) {
            const s64 x = s64(c[d]) + s64(idx[d]) * std::max<u32>(1, m.element_strides[d]);
            if (x < 0 || x >= s64(m.dims[d])) inside = false;
            addr += u64(x) * m.strides[d - 1];
          }
          const s64 lo = std::max<s64>(0, -s64(c[0])), hi = std::min<s64>(count[0], s64(m.dims[0]) - c[0]);
          if (inside && lo < hi) f(at, addr + u64(s64(c[0]) + lo) * e, u32(lo * e), u32((hi - lo) * e), row);
          else f(at, u64(0), 0u, 0u, row);
        }
  return at;
}

// The same for the pixels of an im2col column. Coordinates: c, w{, h{, d}}, n. The walk
// goes over the bounding box of each spatial dimension, innermost first, then to the
// next image; the offsets only move what is accessed.
template <class F> u32 each_pixel(const TensorMap& m, const s32* c, const s32* offset, F f) {
  const int sp = m.rank - 2, e = m.element_bytes();
  s64 pos[3] = {}, n = c[m.rank - 1];
  for (int i = 0; i < sp; ++i) pos[i] = c[1 + i];
  const u32 bytes = m.channels_per_pixel * e;
  const s64 lo = std::max<s64>(0, -s64(c[0])), hi = std::min<s64>(m.channels_per_pixel, s64(m.dims[0]) - c[0]);
  for (u32 p = 0; p < m.pixels_per_column; ++p) {
    bool inside = n >= 0 && n < s64(m.dims[m.rank - 1]);
    u64 addr = m.address + u64(n) * m.strides[m.rank - 2];
    for (int i = 0; i < sp; ++i) {
      const s64 x = pos[i] + offset[i];
      inside &= x >= 0 && x < s64(m.dims[1 + i]);
      addr += u64(x) * m.strides[i];
    }
    if (inside && lo < hi) f(p * bytes, addr + u64(c[0] + lo) * e, u32(lo * e), u32((hi - lo) * e), bytes);
    else f(p * bytes, u64(0), 0u, 0u, bytes);
    int i = 0;
    for (; i < sp; ++i) {
      pos[i] += std::max<int>(1, m.element_strides[1 + i]);
      if (pos[i] <= s64(m.dims[1 + i]) - 1 + m.upper_corner[i]) break;
      pos[i] = m.lower_corner[i];
    }
    if (i == sp) ++n;
  }
  return m.pixels_per_column * bytes;
}

u64 sectors(u64 a, u64 n) { return n ? (a + n - 1) / 32 - a / 32 + 1 : 0; }

void tensor_load(Warp& w, const Instr& in, int l, const Bulk& k) {
  const TensorMap& m = map_at(w, in, l, value_of(w, k.src, l), k);
  s32 c[5] = {};
  for (int i = 0; i < k.rank; ++i) c[i] = w.src<s32>(k.coords[i])[l];
  std::vector<u8> data;
  auto row = [&](u32 at, u64 addr, u32 skip, u32 n, u32 bytes) {
    if (data.size() < at + bytes) data.resize(at + bytes);
    fill_out_of_bounds(m, data.data() + at, bytes);
    if (!n) return;
    global_range(w, in, l, addr, n, false);
    std::memcpy(data.data() + at + skip, reinterpret_cast<const u8*>(addr), n);
    w.st.global_load_bytes += n;
    w.st.global_load_sectors += sectors(addr, n);
    note_sectors(w, addr, n, false);
  };
  if (!k.im2col) {
    each_row(m, c, row);
  } else {
    s32 offset[3] = {};
    for (size_t i = 0; i < k.offsets.size(); ++i) offset[i] = w.src<u16>(k.offsets[i])[l];
    each_pixel(m, c, offset, row);
  }
  w.st.async_copy_bytes += data.size();
  if (data.size() % 16) data.resize((data.size() + 15) / 16 * 16);
  deliver(w, in, l, k, std::move(data), m.swizzle);
}

void tensor_store(Warp& w, const Instr& in, int l, const Bulk& k) {
  const TensorMap& m = map_at(w, in, l, value_of(w, k.dst, l), k);
  s32 c[5] = {};
  for (int i = 0; i < k.rank; ++i) c[i] = w.src<s32>(k.coords[i])[l];
  const u64 src = value_of(w, k.src, l);
  const u32 base = u32(src) & kSharedOffsetMask;
  if (base & 127 && m.swizzle) w.fault(in, l, "misaligned access: tensor store from shared memory needs 128-byte alignment");
  static const Type types[] = {Type::U8, Type::U16, Type::U32, Type::S32, Type::U64, Type::S64, Type::F16, Type::F32, Type::F64, Type::BF16, Type::F32, Type::F32, Type::F32};
  const Type t = types[std::min<int>(m.dtype, 12)];
  const int e = m.element_bytes();
  auto row = [&](u32 at, u64 addr, u32 skip, u32 n, u32) {
    if (!n) return;
    global_range(w, in, l, addr, n, true);
    w.st.global_store_bytes += n;
    w.st.global_store_sectors += sectors(addr, n);
    note_sectors(w, addr, n, true);
    for (u32 i = 0; i < n; i += e) {
      const u32 off = swizzle_address(base + at + skip + i, m.swizzle);
      const u8* p = shared_range(w, in, l, off, e, 1, false);
      if (shared_checked(w)) shared_read(w, in, l, off, e);
      u8* g = reinterpret_cast<u8*>(addr) + i;
      if (k.reduce == RNone) std::memcpy(g, p, e);
      else reduce_one(g, p, t, k.reduce);
    }
  };
  const s32 no_offset[3] = {};
  w.st.async_copy_bytes += k.im2col ? each_pixel(m, c, no_offset, row) : each_row(m, c, row);
}

// Whether two lanes ask for the same copy to global memory.
bool same_store(const Warp& w, const Bulk& k, int a, int b) {
  if (value_of(w, k.dst, a) != value_of(w, k.dst, b) || value_of(w, k.src, a) != value_of(w, k.src, b)) return false;
  if (k.size != kNone && w.src<u32>(k.size)[a] != w.src<u32>(k.size)[b]) return false;
  for (u32 c : k.coords) if (w.src<s32>(c)[a] != w.src<s32>(c)[b]) return false;
  return true;
}

void h_bulk(Warp& w, const Instr& in, u32 m) {
  const Bulk& k = *static_cast<const Bulk*>(in.ext->data.get());
  // The machine issues equal plain stores of a warp once; loads and reductions by lane.
  const bool merge = k.reduce == RNone && (k.kind == SharedToGlobal || k.kind == TensorStore);
  for (u32 x = m; x; x &= x - 1) {
    const int l = __builtin_ctz(x);
    if (merge)
      for (u32 y = x & (x - 1); y; y &= y - 1)
        if (same_store(w, k, l, __builtin_ctz(y))) x &= ~(y & -y);
    switch (k.kind) {
      case TensorLoad: tensor_load(w, in, l, k); break;
      case TensorStore: tensor_store(w, in, l, k); break;
      default: bulk_linear(w, in, l, k); break;
    }
  }
}

// ---- tensor maps changed on the device ----
enum Field : u8 { FAddress, FRank, FBox, FDim, FStride, FElementStride, FType, FInterleave, FSwizzle, FFill };
enum MapSpace : u8 { MGlobal, MShared, MGeneric };

struct MapEdit {
  Ref map{}, from{};          // from: of the copy
  MapSpace space = MGeneric;
  Field field = FAddress;
  u32 ord = 0, value = kNone;
  bool wide = false, stride_sixteenths = false;
};

// The map at an address in shared or global memory, as bytes.
u8* map_bytes(Warp& w, const Instr& in, int l, u64 a, MapSpace space, bool write) {
  if (space == MGeneric && (a & kWindowMask) == kSharedWindow) { a &= ~kWindowMask; space = MShared; }
  if (space != MShared) {
    if (a & 127) w.fault(in, l, "misaligned access: a tensor map to be changed needs 128-byte alignment");
    global_range(w, in, l, a, 128, write);
    return reinterpret_cast<u8*>(a);
  }
  u8* p = shared_range(w, in, l, a, 128, 128, write);
  if (write && shared_checked(w)) {
    const u32 off = u32(a) & kSharedOffsetMask;
    if (!w.block->init_bits.empty()) std::fill_n(w.block->init_bits.begin() + off, 128, u8(1));
    if (w.block->races) w.block->races->forget(off, 128);
  }
  return p;
}

void h_map_replace(Warp& w, const Instr& in, u32 mask) {
  const MapEdit& k = *static_cast<const MapEdit*>(in.ext->data.get());
  for (u32 x = mask; x; x &= x - 1) {
    const int l = __builtin_ctz(x);
    u8* p = map_bytes(w, in, l, value_of(w, k.map, l), k.space, true);
    TensorMap m;
    std::memcpy(static_cast<void*>(&m), p, sizeof m);
    if (m.magic != TensorMap::kMagic) w.fault(in, l, "not an encoded tensor map");
    const u64 v = k.wide ? w.src<u64>(k.value)[l] : w.src<u32>(k.value)[l];
    // Element types in the instruction's numbering.
    static const u8 types[] = {TensorMap::kUint8, TensorMap::kUint16, TensorMap::kUint32, TensorMap::kInt32, TensorMap::kUint64, TensorMap::kInt64, TensorMap::kFloat16,
                               TensorMap::kFloat32, TensorMap::kFloat32Ftz, TensorMap::kFloat64, TensorMap::kBfloat16, TensorMap::kTfloat32, TensorMap::kTfloat32Ftz};
    switch (k.field) {
      case FAddress:
        if (v & 15) w.fault(in, l, "tensor map: the address is not a multiple of 16");
        m.address = v;
        break;
      case FRank: m.rank = u8(v + 1); break;
      case FBox: m.box[k.ord] = u16(v); break;
      case FDim: m.dims[k.ord] = v; break;
      case FStride: {
        const u64 bytes = k.stride_sixteenths ? v << 4 : v;
        if (bytes & 15) w.fault(in, l, "tensor map: the stride is not a multiple of 16 bytes");
        m.strides[k.ord] = bytes;
        break;
      }
      case FElementStride: m.element_strides[k.ord] = u8(v); break;
      case FType:
        if (v >= std::size(types)) w.fault(in, l, "tensor map: unsupported element type");
        m.dtype = types[v];
        break;
      case FInterleave: m.interleave = u8(v); break;
      case FSwizzle:
        if (v > 3) w.fault(in, l, "tensor map: unsupported swizzle");
        m.swizzle = u8(v);
        break;
      case FFill: m.oob_fill = u8(v); break;
    }
    std::memcpy(p, &m, sizeof m);
  }
}

// tensormap.cp_fenceproxy: the map goes from shared to global memory, once per warp.
void h_map_copy(Warp& w, const Instr& in, u32 mask) {
  const MapEdit& k = *static_cast<const MapEdit*>(in.ext->data.get());
  const int l = __builtin_ctz(mask);
  const u8* from = map_bytes(w, in, l, value_of(w, k.from, l), MShared, false);
  u8* to = map_bytes(w, in, l, value_of(w, k.map, l), MGlobal, true);
  std::memcpy(to, from, 128);
  w.st.global_store_bytes += 128;
  w.st.global_store_sectors += 4;
}

void h_nop(Warp&, const Instr&, u32) {}

Ref ref_of(Decoder& d, const Operand& o) {
  Instr tmp;
  Ref r;
  r.bytes = u32(d.address(tmp, o, Space::Generic));
  r.row = tmp.a;
  r.offset = tmp.imm;
  return r;
}

Reduce reduce_of(Decoder& d) {
  const std::pair<const char*, Reduce> ops[] = {{"add", RAdd}, {"min", RMin}, {"max", RMax}, {"inc", RInc}, {"dec", RDec}, {"and", RAnd}, {"or", ROr}, {"xor", RXor}};
  for (auto& [n, o] : ops) if (d.has(n)) return o;
  d.fail("unknown bulk reduction");
}

}  // namespace

void decode_tensormap(Decoder& d) {
  auto k = std::make_shared<MapEdit>();
  k->map = ref_of(d, d.op(0));
  Handler h = h_map_replace;
  if (d.has("cp_fenceproxy")) {
    k->from = ref_of(d, d.op(1));
    if (d.op(2).imm != 128) d.fail("a tensor map has 128 bytes");
    h = h_map_copy;
  } else {
    if (!d.has("replace") || !d.has("tile")) d.fail("unknown tensormap operation");
    const std::pair<const char*, Field> fields[] = {{"global_address", FAddress}, {"rank", FRank}, {"box_dim", FBox}, {"global_dim", FDim}, {"global_stride", FStride},
      {"element_stride", FElementStride}, {"elemtype", FType}, {"interleave_layout", FInterleave}, {"swizzle_mode", FSwizzle}, {"fill_mode", FFill}};
    bool known = false;
    for (auto& [n, f] : fields) if (d.has(n)) { k->field = f; known = true; }
    if (!known) d.fail("unknown field of a tensor map");
    k->space = d.has("global") ? MGlobal : d.has("shared::cta") ? MShared : MGeneric;
    k->wide = d.type() == Type::B64;
    const bool indexed = k->field >= FBox && k->field <= FElementStride;
    if (indexed) {
      k->ord = u32(d.op(1).imm);
      if (k->ord >= (k->field == FStride ? 4 : 5)) d.fail("no such dimension");
    }
    k->value = d.src(d.op(indexed ? 2 : 1), d.type());
    // Until PTX ISA 8.5 strides are given without their four zero bits.
    int major = 0, minor = 0;
    const std::string& text = d.prog.module->text;
    const size_t at = text.find(".version");
    if (at != std::string::npos && sscanf(text.c_str() + at, ".version %d.%d", &major, &minor) == 2) k->stride_sixteenths = major * 10 + minor < 85;
  }
  Instr& i = d.emit(h);
  d.ext(i).data = std::move(k);
}

void decode_bulk(Decoder& d) {
  if (d.has("commit_group") || d.has("wait_group") || d.has("prefetch")) { d.emit(h_nop); return; }
  auto k = std::make_shared<Bulk>();
  const bool reduce = d.in->op[1] == "reduce", policy = d.has("L2::cache_hint");
  if (reduce) { k->reduce = reduce_of(d); k->type = d.type(); }
  k->multicast = d.has("multicast::cluster");
  // Destination comes before the source in the opcode.
  std::vector<std::string> spaces;
  for (auto& p : d.in->op) if (p == "global" || p.starts_with("shared::")) spaces.push_back(p);
  if (spaces.size() != 2) d.fail("bulk copy between which spaces?");
  const bool to_shared = spaces[0] != "global", from_shared = spaces[1] != "global";
  size_t n = d.nops() - policy;
  if (d.has("tensor")) {
    for (int r = 1; r <= 5; ++r) if (d.has(std::to_string(r) + "d")) k->rank = r;
    k->im2col = d.has("im2col") || d.has("im2col_no_offs");
    if (d.has("tile::gather4") || d.has("tile::scatter4") || d.has("im2col::w") || d.has("im2col::w::128")) d.fail("unsupported tensor copy mode");
    const Operand& map = d.op(to_shared ? 1 : 0);
    if (map.kind != Operand::Addr || map.sub.size() != 1) d.fail("expected [tensorMap, {coordinates}]");
    Operand base = map;
    base.sub.clear();
    if (map.sub[0].kind == Operand::Vec) for (auto& c : map.sub[0].sub) k->coords.push_back(d.src(c, Type::S32));
    else k->coords.push_back(d.src(map.sub[0], Type::S32));
    if (int(k->coords.size()) != k->rank) d.fail("wrong number of coordinates");
    if (to_shared) {
      k->kind = TensorLoad;
      k->dst = ref_of(d, d.op(0));
      k->src = ref_of(d, base);
      k->bar = ref_of(d, d.op(2));
      size_t at = 3;
      if (k->im2col) {
        if (k->rank < 3) d.fail("im2col needs 3 to 5 dimensions");
        if (d.op(at).kind == Operand::Vec) for (auto& o : d.op(at).sub) k->offsets.push_back(d.src(o, Type::U16));
        else k->offsets.push_back(d.src(d.op(at), Type::U16));
        if (int(k->offsets.size()) != k->rank - 2) d.fail("wrong number of im2col offsets");
        ++at;
      }
      if (k->multicast) k->mask = d.src(d.op(at), Type::U16);
    } else {
      k->kind = TensorStore;
      k->dst = ref_of(d, base);
      k->src = ref_of(d, d.op(1));
    }
  } else {
    k->kind = to_shared ? (from_shared ? SharedToShared : GlobalToShared) : SharedToGlobal;
    if (reduce && to_shared) d.fail("bulk reduction into shared memory");
    k->dst = ref_of(d, d.op(0));
    k->src = ref_of(d, d.op(1));
    k->size = d.src(d.op(2), Type::U32);
    if (to_shared) k->bar = ref_of(d, d.op(3));
    if (k->multicast) k->mask = d.src(d.op(n - 1), Type::U16);
  }
  Instr& i = d.emit(h_bulk);
  d.ext(i).data = std::move(k);
}

}  // namespace gpusim::ptx
