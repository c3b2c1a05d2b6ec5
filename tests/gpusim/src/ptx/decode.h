// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Turning parsed instructions into Instr: operand resolution and the table of
// per-opcode decoders that the exec_*.cpp files fill.
#pragma once
#include <functional>
#include <string>
#include <unordered_map>

#include "program.h"

namespace gpusim::ptx {

struct DecodeError { std::string what; };

class Decoder {
 public:
  Decoder(Program& p, FunctionInfo& f) : prog(p), info(f), fn(*f.ast) {}
  void run();

  Program& prog;
  FunctionInfo& info;
  const Function& fn;
  const Inst* in = nullptr;
  int index = 0;

  // -- for the opcode decoders --
  Instr& emit(Handler h);
  Ext& ext(Instr& i);
  [[noreturn]] void fail(const std::string& what) const { throw DecodeError{what}; }
  bool has(std::string_view m) const { return in->has(m); }
  const Operand& op(size_t i) const { if (i >= in->ops.size()) fail("missing operand"); return in->ops[i]; }
  size_t nops() const { return in->ops.size(); }
  Type type(int nth_from_last = 0) const;   // the opcode's type suffixes, last first
  // Register row written; kNone for `_`.
  u32 dst(const Operand& o);
  u32 dst_keep(const Operand& o);            // written later than this instruction (wgmma): never shares its row
  // Row read as type t: register, immediate, or symbol address.
  u32 src(const Operand& o, Type t);
  u32 pred_src(const Operand& o);           // handles !p and immediates
  int reg_bytes(const Operand& o) const;    // bytes per lane; 0 if not a register
  Type reg_type(const Operand& o) const { return o.kind == Operand::Reg ? types_[o.reg] : Type::None; }
  u32 constant(u64 bits, int bytes);        // a row of one value in every lane
  u64 imm_bits(const Operand& o, Type t) const;
  bool is_const(const Operand& o) const { return o.kind == Operand::Imm || o.kind == Operand::FImm; }
  int temp(Type t);                          // a fresh register
  Operand temp_operand(Type t) { Operand o; o.kind = Operand::Reg; o.reg = temp(t); return o; }
  // Address operand: sets i.a (row or kNone), i.imm (offset); returns bytes of the
  // base row (0: none, i.imm alone is the address).
  int address(Instr& i, const Operand& o, Space space);
  u64 symbol_address(const Operand& o, Space* space = nullptr, bool* per_lane = nullptr);
  void branch_target(Instr& i, const std::string& label);
  u32 label_target(const std::string& label);
  void emit_local_address(u32 row, u64 offset);   // row = address of a local variable, 64 bits
  void materialise_sreg(u32 row, const std::string& name, int bytes);

 private:
  friend struct Allocator;
  struct Access { int inst, reg; bool def; bool pinned; };
  std::vector<Type> types_;
  std::vector<Access> accesses_;
  std::vector<u32> slot_;         // by register, second pass
  bool assigning_ = false;
  std::vector<u32> pc_of_;        // by ast instruction
  struct Fix { u32 pc; int ext_slot; int target; };
  std::vector<Fix> fixes_;
  std::unordered_map<u64, u32> pool_index_[4];
  void pass();
  void allocate();
  void layout();
  u32 reg_ref(int reg, bool def, bool pinned = false);
  std::vector<int> successors(int i) const;
};

using OpDecoder = void (*)(Decoder&);
std::unordered_map<std::string, OpDecoder>& op_table();

// Each exec file adds its opcodes.
void register_int(); void register_logic(); void register_mov(); void register_float();
void register_cvt(); void register_control(); void register_memory(); void register_atomic();
void register_warp(); void register_mma(); void register_wmma(); void register_async(); void register_wgmma();

// Opcodes shared by integer and floating-point types end up here for the latter.
void decode_float_arith(Decoder& d);
void decode_bulk(Decoder& d);         // cp.async.bulk.*
void decode_tensormap(Decoder& d);
void decode_half_arith(Decoder& d);   // f16/bf16 scalar and packed
void decode_half_setp(Decoder& d, bool to_pred);

inline int bytes_of_row(Type t) { int b = type_bytes(t); return b < 2 ? 2 : b; }

}  // namespace gpusim::ptx
