// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Branches, calls, returns, block and cluster barriers.
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "decode.h"
#include "warp.h"

namespace gpusim::ptx {
namespace {

// ---- branches ----
void h_bra(Warp& w, const Instr& in, u32 m) {
  const u32 target = in.e;
  if (m == w.active) {
    w.pc = target;
    return;
  }
  ++w.st.divergent_branches;
  w.park(m, target);
  w.park(w.active & ~m, w.pc);
  w.active = 0;  // both sides parked
  w.resched();
}

void h_brx(Warp& w, const Instr& in, u32 m) {
  const u32* idx = w.src<u32>(in.a);
  const auto& t = in.ext->targets;
  u32 first = idx[__builtin_ctz(m)];
  bool uniform = true;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (idx[l] >= t.size()) w.fault(in, l, "brx.idx index " + std::to_string(idx[l]) + " is past the branch table");
    w.lane_pc[l] = t[idx[l]];
    uniform &= idx[l] == first;
  }
  if (!uniform || m != w.active) ++w.st.divergent_branches;
  w.park(w.active & ~m, w.pc);
  w.active = 0;
  w.resched();
}

void h_exit(Warp& w, const Instr&, u32 m) {
  w.park(w.active & ~m, w.pc);
  w.exit_lanes(m);
}

void h_trap(Warp& w, const Instr& in, u32 m) { w.fault(in, __builtin_ctz(m), "trap"); }
void h_nop(Warp&, const Instr&, u32) {}

// ---- calls ----
void copy_param(u8* dst_frame, const ParamSlot& d, const u8* src_frame, const ParamSlot& s, int lane) {
  std::memcpy(dst_frame + d.offset + lane * d.stride, src_frame + s.offset + lane * s.stride, std::min(d.size, s.size));
}

// ext->r holds (offset, stride, size) triples: returns first (m0 of them), then arguments.
ParamSlot slot(const Ext& e, size_t i) { return {e.r[3 * i], e.r[3 * i + 1], e.r[3 * i + 2]}; }

void enter(Warp& w, const Instr& in, u32 m, const FunctionInfo& callee, const FunctionInfo& caller) {
  const u32 frame = w.frame_off + caller.frame_bytes;
  w.need_frame(frame + callee.frame_bytes + 64);
  const size_t nargs = in.ext->r.size() / 3 - in.m0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    w.stack[l].push_back({w.pc, w.frame_off, w.local_base[l], &in, &callee});
    for (size_t a = 0; a < nargs && a < callee.params.size(); ++a)
      copy_param(w.regs + frame, callee.params[a], w.regs + w.frame_off, slot(*in.ext, in.m0 + a), l);
    w.local_base[l] += caller.local_bytes;
    if (w.local_base[l] + callee.local_bytes > w.launch->program->local_bytes) w.fault(in, l, "stack overflow: recursion too deep");
    if (w.stack[l].size() > 4096) w.fault(in, l, "stack overflow: more than 4096 nested calls");
    w.lane_pc[l] = callee.entry_pc;
    w.lane_frame[l] = frame;
    w.lane_depth[l] = w.depth + 1;
  }
}

const FunctionInfo& current_function(Warp& w, const Instr& in) {
  const Program& p = *w.launch->program;
  const Function* f = p.source[&in - p.code.data()].fn;
  for (auto& i : p.functions) if (i->ast == f) return *i;
  w.fault(in, 0, "internal: unknown function");
}

void h_call(Warp& w, const Instr& in, u32 m) {
  const FunctionInfo& caller = *reinterpret_cast<const FunctionInfo*>(in.imm);
  enter(w, in, m, *in.ext->callee, caller);
  w.park(w.active & ~m, w.pc);
  w.active = 0;
  w.resched();
}

void h_call_indirect(Warp& w, const Instr& in, u32 m) {
  const Program& p = *w.launch->program;
  const FunctionInfo& caller = current_function(w, in);
  u64 addr[32];  // a copy: entering may move the frame
  std::memcpy(addr, w.src<u64>(in.a), sizeof addr);
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    u64 i = (addr[l] - kFunctionWindow) / 16;
    if (addr[l] < kFunctionWindow || i >= p.module->ast.functions.size()) w.fault(in, l, "call through a bad function address");
    auto it = p.by_name.find(p.module->ast.functions[i]->name);
    if (it == p.by_name.end()) w.fault(in, l, "call of a function without a body: " + p.module->ast.functions[i]->name);
    enter(w, in, 1u << l, *it->second, caller);
  }
  w.park(w.active & ~m, w.pc);
  w.active = 0;
  w.resched();
}

void h_ret(Warp& w, const Instr& in, u32 m) {
  w.park(w.active & ~m, w.pc);
  u32 leaving = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (w.stack[l].empty()) { leaving |= 1u << l; continue; }
    CallRecord r = w.stack[l].back();
    w.stack[l].pop_back();
    for (size_t i = 0; i < r.callee->returns.size() && i < r.call->m0; ++i)
      copy_param(w.regs + r.frame_off, slot(*r.call->ext, i), w.regs + w.lane_frame[l], r.callee->returns[i], l);
    w.lane_pc[l] = r.ret_pc;
    w.lane_frame[l] = r.frame_off;
    w.lane_depth[l] = u32(w.stack[l].size());
    w.local_base[l] = r.local_base;
  }
  if (leaving) { w.exit_lanes(leaving); }
  w.active = 0;
  w.resched();
  (void)in;
}

// ---- printf and assert ----
u64 arg_of(Warp& w, const Instr& in, size_t i, int lane) {
  ParamSlot s = slot(*in.ext, in.m0 + i);
  u64 v = 0;
  std::memcpy(&v, w.regs + w.frame_off + s.offset + lane * s.stride, std::min(8u, s.size));
  return v;
}

// Device pointer to host pointer: local window or host memory.
const u8* resolve(Warp& w, u64 a, int lane) {
  if ((a & kWindowMask) == kLocalWindow) return w.local + size_t(lane) * w.launch->program->local_bytes + (a - kLocalWindow);
  if ((a & kWindowMask) == kSharedWindow) return w.block->shared + (a & kSharedOffsetMask);
  return reinterpret_cast<const u8*>(a);
}

std::string format(Warp& w, const char* f, const u8* args, int lane) {
  std::string out;
  size_t at = 0;
  auto take = [&](size_t n) { at = (at + n - 1) / n * n; const u8* p = args + at; at += n; return p; };
  while (*f) {
    if (*f != '%') { out += *f++; continue; }
    if (f[1] == '%') { out += '%'; f += 2; continue; }
    std::string spec = "%";
    ++f;
    int longs = 0;
    while (*f && strchr("-+ #0123456789.*hlzjtL", *f)) {
      if (*f == '*') { int v; memcpy(&v, take(4), 4); spec += std::to_string(v); }
      else if (*f == 'l' || *f == 'z' || *f == 'j' || *f == 't') ++longs;
      else if (*f != 'h' && *f != 'L') spec += *f;
      ++f;
    }
    char c = *f ? *f++ : 'd', buf[512];
    if (strchr("diouxXc", c)) {
      if (longs) { long long v; memcpy(&v, take(8), 8); snprintf(buf, sizeof buf, (spec + "ll" + c).c_str(), v); }
      else { int v; memcpy(&v, take(4), 4); snprintf(buf, sizeof buf, (spec + c).c_str(), v); }
    } else if (strchr("eEfFgGaA", c)) {
      double v; memcpy(&v, take(8), 8); snprintf(buf, sizeof buf, (spec + c).c_str(), v);
    } else if (c == 's') {
      u64 v; memcpy(&v, take(8), 8);
      out += v ? reinterpret_cast<const char*>(resolve(w, v, lane)) : "(null)";
      continue;
    } else {
      u64 v; memcpy(&v, take(8), 8); snprintf(buf, sizeof buf, "%p", reinterpret_cast<void*>(v));
    }
    out += buf;
  }
  return out;
}

void h_vprintf(Warp& w, const Instr& in, u32 m) {
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    const char* f = reinterpret_cast<const char*>(resolve(w, arg_of(w, in, 0, l), l));
    u64 a = arg_of(w, in, 1, l);
    std::string s = format(w, f, a ? resolve(w, a, l) : nullptr, l);
    fwrite(s.data(), 1, s.size(), stderr);
    if (in.m0) {
      ParamSlot r = slot(*in.ext, 0);
      int n = int(s.size());
      std::memcpy(w.regs + w.frame_off + r.offset + l * r.stride, &n, 4);
    }
  }
}

void h_assertfail(Warp& w, const Instr& in, u32 m) {
  int l = __builtin_ctz(m);
  auto str = [&](size_t i) { u64 a = arg_of(w, in, i, l); return a ? std::string(reinterpret_cast<const char*>(resolve(w, a, l))) : std::string(); };
  w.fault(in, l, "assertion failed: " + str(0) + " at " + str(1) + ":" + std::to_string(u32(arg_of(w, in, 2, l))) + " in " + str(3));
}

void h_malloc(Warp& w, const Instr& in, u32 m) { w.fault(in, __builtin_ctz(m), "device-side malloc is not supported"); }

void d_call(Decoder& d) {
  const Operand& target = d.op(0);
  Ext tmp;
  auto add = [&](const Operand& o) {
    if (o.var < 0 || d.fn.vars[o.var].space != Space::Param) d.fail("call operand is not a .param variable");
    const Variable& v = d.fn.vars[o.var];
    tmp.r.insert(tmp.r.end(), {d.info.var_offset[o.var], std::max(8u, u32((v.size + 7) / 8 * 8)), u32(v.size)});
  };
  for (auto& o : d.op(1).sub) add(o);
  u8 nret = u8(d.op(1).sub.size());
  for (auto& o : d.op(2).sub) add(o);
  if (target.kind == Operand::Reg) {
    u32 a = d.src(target, Type::B64);
    Instr& i = d.emit(h_call_indirect);
    i.a = a;
    i.m0 = nret;
    d.ext(i).r = tmp.r;
    return;
  }
  auto it = d.prog.by_name.find(target.sym);
  Handler h = h_call;
  if (it == d.prog.by_name.end()) {
    if (target.sym == "vprintf") h = h_vprintf;
    else if (target.sym == "__assertfail") h = h_assertfail;
    else if (target.sym == "malloc" || target.sym == "free") h = h_malloc;
    else d.fail("call of unknown function " + target.sym);
  }
  Instr& i = d.emit(h);
  i.m0 = nret;
  i.imm = reinterpret_cast<s64>(&d.info);
  d.ext(i).r = tmp.r;
  if (it != d.prog.by_name.end()) d.ext(i).callee = it->second;
}

// ---- barriers ----
void h_bar(Warp& w, const Instr& in, u32 m) {
  // m0: 0 sync, 1 arrive; m2: reduction (1 popc, 2 and, 3 or)
  int l = __builtin_ctz(m);
  u32 id = w.src<u32>(in.a)[l];
  u32 count = in.b == kNone ? 0 : w.src<u32>(in.b)[l];
  if (id >= 16) w.fault(in, l, "barrier id " + std::to_string(id) + " is out of range");
  if (count % 32) w.fault(in, l, "barrier thread count " + std::to_string(count) + " is not a multiple of the warp size");
  Block& b = *w.block;
  Barrier& bar = b.barriers[id];
  if (in.m0 == 1 && count == 0) w.fault(in, l, "bar.arrive needs a thread count");
  if (count > b.nwarps * 32) w.fault(in, l, "barrier waits for " + std::to_string(count) + " threads, the block has " + std::to_string(b.threads));
  if (bar.expected && count && bar.expected != count) w.fault(in, l, "barrier " + std::to_string(id) + " used with different thread counts");
  if (count) bar.expected = count;
  if (in.m2) {
    u32 p = w.pred(in.c);
    if (in.m1) p = ~p;
    p &= m;
    bar.red_popc += __builtin_popcount(p);
    if (p != m) bar.red_and = 0;
    if (p) bar.red_or = 1;
  }
  if (b.races) b.races->arrive(w, id);
  if (in.m0 == 1) {
    bar.arrived_only += m == w.live ? 32 : __builtin_popcount(m);
    b.try_release(id);
    return;
  }
  for (u32 k = m; k; k &= k - 1) {
    int j = __builtin_ctz(k);
    w.bar_id[j] = id;
    w.bar_instr[j] = &in;
  }
  w.park(m, w.pc);
  w.bar_wait |= m;
  w.active &= ~m;
  w.resched();
  b.try_release(id);
}

void h_bar_warp(Warp& w, const Instr& in, u32 m) {
  const u32* members = w.src<u32>(in.a);
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    w.warp_mask[l] = members[l];
    if (!(members[l] >> l & 1)) w.fault(in, l, "the calling lane is not in its own membermask");
  }
  w.warp_wait |= m;
  const u32 released = w.release_warp_barrier(m);
  ++w.sync_clock;
  if (released == m && m == w.active) return;  // nobody else was waiting
  u32 blocked = m & ~released;
  w.park(blocked, w.pc);
  w.active &= ~blocked;
  w.resched();
}

void h_cluster_arrive(Warp& w, const Instr&, u32 m) {
  for (u32 k = m; k; k &= k - 1) w.cluster_phase[__builtin_ctz(k)] = w.block->cluster->phase + 1;
  cluster_release(*w.block->cluster);
}
void h_cluster_wait(Warp& w, const Instr& in, u32 m) {
  u32 blocked = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    if (w.cluster_phase[l] > w.block->cluster->phase) { blocked |= 1u << l; w.bar_id[l] = kClusterBarrier; w.bar_instr[l] = &in; }
  }
  if (!blocked) return;
  w.park(blocked, w.pc);
  w.bar_wait |= blocked;
  w.active &= ~blocked;
  w.resched();
}

void d_bar(Decoder& d) {
  if (d.has("cluster")) {
    if (!d.has("arrive") && !d.has("wait")) d.fail("barrier.cluster");
    d.emit(d.has("arrive") ? h_cluster_arrive : h_cluster_wait);
    return;
  }
  if (d.has("warp")) {
    u32 a = d.src(d.op(0), Type::B32);
    d.emit(h_bar_warp).a = a;
    return;
  }
  if (d.has("red")) {
    bool popc = d.has("popc");
    size_t n = d.nops();  // d, a{, b}, {!}c
    u32 a = d.src(d.op(1), Type::B32), b = n == 4 ? d.src(d.op(2), Type::B32) : kNone;
    Operand c = d.op(n - 1);
    bool neg = c.neg;
    c.neg = false;
    u32 cp = d.pred_src(c), dd = d.dst(d.op(0));
    Instr& i = d.emit(h_bar);
    i.a = a; i.b = b; i.c = cp; i.d = dd;
    i.m1 = neg;
    i.m2 = popc ? 1 : d.has("and") ? 2 : 3;
    return;
  }
  u32 a = d.src(d.op(0), Type::B32), b = d.nops() > 1 ? d.src(d.op(1), Type::B32) : kNone;
  Instr& i = d.emit(h_bar);
  i.a = a; i.b = b;
  i.m0 = d.has("arrive");
}

void d_bra(Decoder& d) {
  Instr& i = d.emit(h_bra);
  d.branch_target(i, d.op(0).sym);
}

void d_brx(Decoder& d) {
  auto it = d.fn.targets.find(d.op(1).sym);
  if (it == d.fn.targets.end()) d.fail("unknown branch table " + d.op(1).sym);
  u32 a = d.src(d.op(0), Type::B32);
  Instr& i = d.emit(h_brx);
  i.a = a;
  for (auto& l : it->second) d.ext(i).targets.push_back(d.label_target(l));
}

void h_nanosleep(Warp& w, const Instr&, u32) {
  w.host->spin_hints += 16;
  w.yielded = true;
  w.resched();
}
void h_zero64(Warp& w, const Instr& in, u32 m) { for (; m; m &= m - 1) w.dst<u64>(in.d)[__builtin_ctz(m)] = 0; }
void h_fence(Warp&, const Instr&, u32) { std::atomic_thread_fence(std::memory_order_seq_cst); }

}  // namespace

void register_control() {
  auto& t = op_table();
  t["bra"] = d_bra;
  t["brx"] = d_brx;
  t["ret"] = [](Decoder& d) { d.emit(h_ret); };
  t["exit"] = [](Decoder& d) { d.emit(h_exit); };
  t["trap"] = [](Decoder& d) { d.emit(h_trap); };
  t["brkpt"] = [](Decoder& d) { d.emit(h_trap); };
  t["call"] = d_call;
  t["bar"] = t["barrier"] = d_bar;
  t["membar"] = t["fence"] = [](Decoder& d) { d.emit(h_fence); };
  for (const char* n : {"pmevent", "setmaxnreg", "griddepcontrol", "discard", "applypriority", "prefetch", "prefetchu"})
    t[n] = [](Decoder& d) { d.emit(h_nop); };
  t["createpolicy"] = [](Decoder& d) {  // cache policies mean nothing here
    u32 r = d.dst(d.op(0));
    d.emit(h_zero64).d = r;
  };
  t["nanosleep"] = [](Decoder& d) { d.emit(h_nanosleep); };
}

}  // namespace gpusim::ptx
