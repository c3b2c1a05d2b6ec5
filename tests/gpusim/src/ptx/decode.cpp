// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Operand resolution and register allocation.
#include "decode.h"

#include <algorithm>
#include <set>

#include "gpusim/ptx.h"
#include "warp.h"

namespace gpusim::ptx {

std::unordered_map<std::string, OpDecoder>& op_table() {
  static std::unordered_map<std::string, OpDecoder> table;
  return table;
}

namespace {

void register_all() {
  static const bool once = [] {
    register_int(); register_logic(); register_float(); register_cvt(); register_control();
    register_memory(); register_atomic(); register_warp(); register_mma(); register_async();
    register_wgmma();
    return true;
  }();
  (void)once;
}

// An instruction the simulator does not know: faults when executed.
void h_unknown(Warp& w, const Instr& in, u32 mask) { w.fault(in, __builtin_ctz(mask), in.ext->text); }
// Falling off the end of a function.
void h_off_end(Warp& w, const Instr& in, u32 mask) { w.fault(in, __builtin_ctz(mask), "control ran past the end of the function"); }

u32 row_bytes(Type t) { return t == Type::Pred ? 4 : 32 * bytes_of_row(t); }

}  // namespace

Instr& Decoder::emit(Handler h) {
  Instr i;
  i.fn = h;
  if (in->guard >= 0) { i.guard = reg_ref(in->guard, false); i.guard_neg = in->guard_neg; }
  prog.code.push_back(i);
  prog.source.push_back({&fn, index});
  return prog.code.back();
}

Ext& Decoder::ext(Instr& i) {
  if (!i.ext) {
    prog.exts.push_back(std::make_unique<Ext>());
    i.ext = prog.exts.back().get();
  }
  return const_cast<Ext&>(*i.ext);
}

Type Decoder::type(int nth) const {
  for (size_t k = in->op.size(); k-- > 1;) {
    Type t = parse_type(in->op[k]);
    if (t != Type::None && nth-- == 0) return t;
  }
  return Type::None;
}

u32 Decoder::reg_ref(int reg, bool def, bool pinned) {
  if (!assigning_) {
    if (def && in->guard >= 0) accesses_.push_back({index, reg, false, pinned});  // a guarded write may keep the old value
    accesses_.push_back({index, reg, def, pinned});
    return 0;
  }
  return slot_[reg];
}

u32 Decoder::dst(const Operand& o) {
  if (o.kind == Operand::Sink) return kNone;
  if (o.kind != Operand::Reg) fail("destination is not a register");
  return reg_ref(o.reg, true);
}

u32 Decoder::dst_keep(const Operand& o) {
  if (o.kind != Operand::Reg) fail("destination is not a register");
  reg_ref(o.reg, false, true);
  return reg_ref(o.reg, true, true);
}

u64 Decoder::imm_bits(const Operand& o, Type t) const {
  u64 v = o.imm;
  if (o.kind == Operand::FImm) {
    bool f64 = t == Type::F64 || type_bytes(t) == 8;
    if (o.fbits == 32 && f64 && t == Type::F64) v = std::bit_cast<u64>(double(std::bit_cast<float>(u32(o.imm))));
    else if (o.fbits == 64 && type_bytes(t) == 4) v = std::bit_cast<u32>(float(std::bit_cast<double>(o.imm)));
  } else if (t == Type::F32 && s64(v) >= -1000000 && s64(v) <= 1000000) {
    v = std::bit_cast<u32>(float(s64(v)));      // an integer literal where a float is due
  } else if (t == Type::F64 && s64(v) >= -1000000 && s64(v) <= 1000000) {
    v = std::bit_cast<u64>(double(s64(v)));
  }
  return v;
}

u32 Decoder::constant(u64 bits, int bytes) {
  int cls = bytes == 2 ? 0 : bytes == 4 ? 1 : bytes == 8 ? 2 : 3;
  if (bytes < 8) bits &= (1ull << (8 * bytes)) - 1;
  auto [it, fresh] = pool_index_[cls].try_emplace(bits, 0);
  if (fresh) {
    it->second = u32(prog.pool.size()) | kConstBit;
    for (int l = 0; l < 32; ++l)
      for (int b = 0; b < bytes; ++b) prog.pool.push_back(b < 8 ? u8(bits >> (8 * b)) : 0);
  }
  return it->second;
}

int Decoder::temp(Type t) {
  types_.push_back(t);
  return int(types_.size()) - 1;
}

int Decoder::reg_bytes(const Operand& o) const {
  if (o.kind != Operand::Reg) return 0;
  return types_[o.reg] == Type::Pred ? 4 : bytes_of_row(types_[o.reg]);
}

u32 Decoder::src(const Operand& o, Type t) {
  switch (o.kind) {
    case Operand::Reg: {
      if (types_[o.reg] == Type::Pred && t != Type::Pred) fail("predicate used as a number");
      return reg_ref(o.reg, false);
    }
    case Operand::Imm: case Operand::FImm: return constant(imm_bits(o, t), bytes_of_row(t));
    case Operand::SReg: {
      Operand tmp = temp_operand(t);
      u32 row = reg_ref(tmp.reg, true);
      materialise_sreg(row, o.sym, bytes_of_row(t));
      return reg_ref(tmp.reg, false);
    }
    case Operand::Sym: {
      bool per_lane = false;
      u64 v = symbol_address(o, nullptr, &per_lane);
      if (per_lane) fail("address of a local variable is only supported in mov");
      return constant(v, bytes_of_row(t));
    }
    default: fail("unsupported operand");
  }
}

namespace {
void h_pred_not(Warp& w, const Instr& in, u32 m) { w.set_pred(in.d, m, ~w.pred(in.a)); }
}  // namespace

u32 Decoder::pred_src(const Operand& o) {
  if (o.kind == Operand::Imm) return constant((o.imm != 0) != o.neg ? 0xffffffffu : 0, 4);
  if (o.kind != Operand::Reg || types_[o.reg] != Type::Pred) fail("expected a predicate");
  if (!o.neg) return reg_ref(o.reg, false);
  Operand t = temp_operand(Type::Pred);
  u32 a = reg_ref(o.reg, false), d = reg_ref(t.reg, true);
  Instr& i = emit(h_pred_not);
  i.a = a;
  i.d = d;
  i.guard = kNone;
  return reg_ref(t.reg, false);
}

u64 Decoder::symbol_address(const Operand& o, Space* space, bool* per_lane) {
  if (per_lane) *per_lane = false;
  if (o.var >= 0) {
    const Variable& v = fn.vars[o.var];
    if (space) *space = v.space;
    if (v.space == Space::Local && per_lane) *per_lane = true;
    if (v.space == Space::Param && fn.entry && per_lane) *per_lane = false;
    return info.var_offset[o.var] + o.imm;
  }
  const Ast& ast = prog.module->ast;
  auto it = ast.var_index.find(o.sym);
  if (it != ast.var_index.end()) {
    const Variable& v = ast.vars[it->second];
    if (space) *space = v.space;
    if (v.space == Space::Shared) {
      auto s = prog.shared_address.find(o.sym);
      if (s == prog.shared_address.end()) fail("shared variable without an address: " + o.sym);
      return s->second + o.imm;
    }
    if (v.space == Space::Global || v.space == Space::Const) {
      if (!prog.module->var_address[it->second]) fail("unresolved external variable " + o.sym);
      return prog.module->var_address[it->second] + o.imm;
    }
    fail("unsupported module variable " + o.sym);
  }
  auto f = ast.function_index.find(o.sym);
  if (f != ast.function_index.end()) {
    if (space) *space = Space::None;
    return kFunctionWindow + u64(f->second) * 16;
  }
  fail("unknown symbol " + o.sym);
}

int Decoder::address(Instr& i, const Operand& o, Space) {
  if (o.kind != Operand::Addr) fail("expected an address");
  if (o.reg >= 0) {
    i.a = reg_ref(o.reg, false);
    i.imm = s64(o.imm);
    return bytes_of_row(types_[o.reg]);
  }
  i.a = kNone;
  i.imm = o.sym.empty() ? s64(o.imm) : s64(symbol_address(o));
  return 0;
}

u32 Decoder::label_target(const std::string& label) {
  int t = fn.label(label, in->scope);
  if (t < 0) fail("unknown label " + label);
  return u32(t);
}

void Decoder::branch_target(Instr& i, const std::string& label) {
  fixes_.push_back({u32(&i - prog.code.data()), -1, int(label_target(label))});
}

std::vector<int> Decoder::successors(int i) const {
  const Inst& x = fn.body[i];
  std::vector<int> s;
  const std::string& r = x.op[0];
  if (r == "bra") {
    int t = fn.label(x.ops.at(0).sym, x.scope);
    if (t >= 0) s.push_back(t);
    if (x.guard >= 0) s.push_back(i + 1);
  } else if (r == "brx") {
    auto it = fn.targets.find(x.ops.at(1).sym);
    if (it != fn.targets.end())
      for (auto& l : it->second) { int t = fn.label(l, x.scope); if (t >= 0) s.push_back(t); }
    if (x.guard >= 0) s.push_back(i + 1);
  } else if (r == "ret" || r == "exit" || r == "trap") {
    if (x.guard >= 0) s.push_back(i + 1);
  } else {
    s.push_back(i + 1);
  }
  return s;
}

// Decodes the whole body. First pass: records which registers each instruction
// reads and writes. Second pass: emits code with the rows allocate() chose.
void Decoder::pass() {
  types_ = fn.regs;
  pc_of_.assign(fn.body.size() + 1, 0);
  fixes_.clear();
  auto& table = op_table();
  for (index = 0; index < int(fn.body.size()); ++index) {
    in = &fn.body[index];
    size_t start = prog.code.size();
    pc_of_[index] = u32(start);
    try {
      auto it = table.find(in->op[0]);
      if (it == table.end()) fail("unknown instruction");
      it->second(*this);
    } catch (const DecodeError& e) {
      prog.code.resize(start);
      prog.source.resize(start);
      std::string text;
      for (auto& p : in->op) text += (text.empty() ? "" : ".") + p;
      Instr& i = emit(h_unknown);
      ext(i).text = "unsupported instruction: " + e.what + " (" + text + ")";
    }
  }
  static const Inst end_inst;
  in = &end_inst;
  pc_of_[fn.body.size()] = u32(prog.code.size());
  emit(h_off_end);
  prog.source.back().inst = fn.body.empty() ? 0 : int(fn.body.size()) - 1;
}

// Linear scan over live intervals, one free list per row size.
void Decoder::allocate() {
  const int n = int(fn.body.size()), nr = int(types_.size());
  std::vector<int> lo(nr, INT32_MAX), hi(nr, -1);
  std::vector<u8> pinned(nr, 0);
  auto touch = [&](int r, int at) { lo[r] = std::min(lo[r], at); hi[r] = std::max(hi[r], at); };
  // Basic blocks.
  std::vector<u8> leader(n + 1, 0);
  leader[0] = 1;
  for (auto& scope : fn.labels)
    for (auto& [name, at] : scope) leader[at] = 1;
  for (int i = 0; i < n; ++i) {
    const std::string& r = fn.body[i].op[0];
    if (r == "bra" || r == "brx" || r == "ret" || r == "exit" || r == "trap") leader[i + 1] = 1;
  }
  std::vector<int> begin, block_of(n + 1, 0);
  for (int i = 0; i < n; ++i) {
    if (leader[i]) begin.push_back(i);
    block_of[i] = int(begin.size()) - 1;
  }
  const int nb = int(begin.size());
  begin.push_back(n);
  const size_t words = (nr + 63) / 64;
  std::vector<u64> use(nb * words), def(nb * words), live_in(nb * words), live_out(nb * words);
  for (auto& a : accesses_) {
    if (a.pinned) pinned[a.reg] = 1;
    if (a.inst >= n) continue;
    touch(a.reg, a.inst);
  }
  // Per instruction: reads first, then writes, whatever order decoding saw them in.
  for (size_t s = 0; s < accesses_.size();) {
    size_t e = s;
    while (e < accesses_.size() && accesses_[e].inst == accesses_[s].inst) ++e;
    if (accesses_[s].inst < n) {
      size_t base = block_of[accesses_[s].inst] * words;
      for (size_t k = s; k < e; ++k) {
        auto& a = accesses_[k];
        u64 bit = 1ull << (a.reg & 63);
        if (!a.def && a.reg < int(fn.regs.size()) && !(def[base + a.reg / 64] & bit)) use[base + a.reg / 64] |= bit;
      }
      for (size_t k = s; k < e; ++k)
        if (accesses_[k].def) def[base + accesses_[k].reg / 64] |= 1ull << (accesses_[k].reg & 63);
    }
    s = e;
  }
  std::vector<std::vector<int>> succ(nb);
  for (int b = 0; b < nb; ++b)
    for (int t : successors(begin[b + 1] - 1))
      if (t < n) succ[b].push_back(block_of[t]);
  for (bool changed = true; changed;) {
    changed = false;
    for (int b = nb; b-- > 0;) {
      for (size_t k = 0; k < words; ++k) {
        u64 out = 0;
        for (int t : succ[b]) out |= live_in[t * words + k];
        live_out[b * words + k] = out;
        u64 inn = use[b * words + k] | (out & ~def[b * words + k]);
        if (inn != live_in[b * words + k]) { live_in[b * words + k] = inn; changed = true; }
      }
    }
  }
  for (int b = 0; b < nb; ++b)
    for (int r = 0; r < nr; ++r) {
      u64 bit = 1ull << (r & 63);
      if (live_in[b * words + r / 64] & bit) touch(r, begin[b]);
      if (live_out[b * words + r / 64] & bit) touch(r, begin[b + 1] - 1);
    }
  std::vector<int> order;
  for (int r = 0; r < nr; ++r) {
    if (pinned[r]) { lo[r] = 0; hi[r] = n; }
    if (hi[r] >= 0) order.push_back(r);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return lo[a] < lo[b]; });
  slot_.assign(nr, 0);
  u32 top = info.frame_bytes;
  std::unordered_map<u32, std::vector<u32>> free_rows;
  std::set<std::pair<int, int>> live;  // (end, reg)
  for (int r : order) {
    while (!live.empty() && live.begin()->first < lo[r]) {
      int x = live.begin()->second;
      free_rows[row_bytes(types_[x])].push_back(slot_[x]);
      live.erase(live.begin());
    }
    u32 bytes = row_bytes(types_[r]);
    auto& f = free_rows[bytes];
    if (!f.empty()) { slot_[r] = f.back(); f.pop_back(); }
    else {
      if (bytes >= 64) top = (top + 63) & ~63u;
      slot_[r] = top;
      top += bytes;
    }
    live.insert({hi[r], r});
  }
  info.frame_bytes = (top + 63) & ~63u;
}

void Decoder::run() {
  const size_t code0 = prog.code.size();
  const size_t ext0 = prog.exts.size();
  assigning_ = false;
  pass();
  prog.code.resize(code0);
  prog.source.resize(code0);
  prog.exts.resize(ext0);
  allocate();
  assigning_ = true;
  info.entry_pc = u32(code0);
  pass();
  info.end_pc = u32(prog.code.size());
  for (auto& f : fixes_) {
    u32 target = pc_of_[f.target];
    if (f.ext_slot < 0) prog.code[f.pc].e = target;
  }
  for (size_t pc = code0; pc < prog.code.size(); ++pc) {
    const Ext* e = prog.code[pc].ext;
    if (e && !e->targets.empty())
      for (auto& t : const_cast<Ext*>(e)->targets) t = pc_of_[t];
  }
}

namespace {

u32 align_up(u64 x, u64 a) { return u32((x + a - 1) / (a ? a : 1) * (a ? a : 1)); }

template <class F> void each_symbol(const Operand& o, F f) {
  if (!o.sym.empty() && o.var < 0) f(o.sym);
  for (auto& s : o.sub) each_symbol(s, f);
}

}  // namespace

std::unique_ptr<Program> build_program(const ModuleData& module, const Function& kernel) {
  register_all();
  auto p = std::make_unique<Program>();
  p->module = &module;
  p->kernel = &kernel;
  const Ast& ast = module.ast;

  // Functions reachable from the kernel.
  std::vector<const Function*> work{&kernel};
  std::set<const Function*> seen{&kernel};
  std::set<std::string> shared_used;
  bool all_added = false;
  auto add = [&](const Function* f) { if (f->defined && seen.insert(f).second) work.push_back(f); };
  for (size_t k = 0; k < work.size(); ++k) {
    const Function* f = work[k];
    p->functions.push_back(std::make_unique<FunctionInfo>());
    FunctionInfo* info = p->functions.back().get();
    info->ast = f;
    p->by_name[f->name] = info;
    for (auto& in : f->body) {
      if (in.op[0] == "call" && in.ops[0].kind == Operand::Reg) info->indirect = true;
      for (auto& o : in.ops)
        each_symbol(o, [&](const std::string& s) {
          auto fi = ast.function_index.find(s);
          if (fi != ast.function_index.end()) { add(ast.functions[fi->second].get()); info->callees.push_back(ast.functions[fi->second].get()); }
          auto vi = ast.var_index.find(s);
          if (vi != ast.var_index.end() && ast.vars[vi->second].space == Space::Shared) shared_used.insert(s);
        });
    }
    if (info->indirect && !all_added) {
      all_added = true;
      for (auto& g : ast.functions) if (!g->entry) add(g.get());
    }
  }

  // Shared memory: static variables first, then the one dynamic array.
  u32 top = kSharedBase, dyn_align = 16;
  for (auto& v : ast.vars) {
    if (v.space != Space::Shared || !shared_used.count(v.name)) continue;
    if (v.size == 0) { dyn_align = std::max(dyn_align, v.align); continue; }
    top = align_up(top, v.align);
    p->shared_address[v.name] = top;
    top += u32(v.size);
  }
  for (auto& info : p->functions) {
    const Function& f = *info->ast;
    info->var_offset.assign(f.vars.size(), 0);
    u32 local = 0, frame = 0, param = 0;
    const size_t formal = f.params.size(), returned = formal + f.returns.size();
    for (size_t i = 0; i < f.vars.size(); ++i) {
      const Variable& v = f.vars[i];
      if (v.space == Space::Shared) {
        if (v.size == 0) { dyn_align = std::max(dyn_align, v.align); info->var_offset[i] = kNone; continue; }
        top = align_up(top, v.align);
        info->var_offset[i] = top;
        top += u32(v.size);
      } else if (v.space == Space::Local) {
        local = align_up(local, v.align);
        info->var_offset[i] = local;
        local += u32(v.size);
      } else if (v.space == Space::Param) {
        if (f.entry && i < formal) {
          param = align_up(param, v.align);
          info->var_offset[i] = param;
          p->param_offset.push_back(param);
          param += u32(v.size);
        } else {
          u32 stride = std::max(8u, align_up(v.size, 8));
          ParamSlot s{frame, stride, u32(v.size)};
          info->var_offset[i] = frame;
          frame += stride * 32;
          if (i < formal) info->params.push_back(s);
          else if (i < returned) info->returns.push_back(s);
        }
      }
    }
    info->local_bytes = align_up(local, 16);
    info->frame_bytes = align_up(frame, 64);
    if (f.entry) p->param_bytes = param;
  }
  p->static_shared_end = top;
  p->dynamic_shared_start = align_up(top, dyn_align);
  for (auto& v : ast.vars)
    if (v.space == Space::Shared && v.size == 0) p->shared_address[v.name] = p->dynamic_shared_start;
  for (auto& info : p->functions)
    for (auto& o : info->var_offset) if (o == kNone) o = p->dynamic_shared_start;

  for (auto& info : p->functions) Decoder(*p, *info).run();

  // Stack needs over the call graph; recursion gets a fixed allowance.
  std::unordered_map<const Function*, std::pair<u32, u32>> need;
  std::set<const Function*> path;
  bool recursive = false;
  std::function<std::pair<u32, u32>(const Function*)> depth = [&](const Function* f) -> std::pair<u32, u32> {
    auto it = need.find(f);
    if (it != need.end()) return it->second;
    auto bi = p->by_name.find(f->name);
    if (bi == p->by_name.end()) return {0, 0};
    if (!path.insert(f).second) { recursive = true; return {0, 0}; }
    FunctionInfo& i = *bi->second;
    u32 l = 0, r = 0;
    for (auto* c : i.callees) { auto [cl, cr] = depth(c); l = std::max(l, cl); r = std::max(r, cr); }
    if (i.indirect) recursive = true;
    path.erase(f);
    return need[f] = {l + i.local_bytes, r + i.frame_bytes};
  };
  auto [l, r] = depth(&kernel);
  p->local_bytes = l + (recursive ? 32768 : 0);
  p->frame_bytes = r;
  return p;
}

}  // namespace gpusim::ptx
