// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the parser produces: one Function per .entry/.func, one Inst per statement.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace gpusim::ptx {

struct Operand {
  enum Kind : u8 {
    Reg,    // reg
    Imm,    // imm (two's complement)
    FImm,   // imm holds f32 bits (fbits 32) or f64 bits (fbits 64)
    Sym,    // variable, label or function `sym`; `var` >= 0 for a function-local variable; imm: addend
    SReg,   // special register `sym`
    Addr,   // [base + imm]: reg >= 0, or sym, or neither; further bracket members in sub
    Vec,    // {sub...}
    Pair,   // sub[0] | sub[1]
    Sink,   // _
  } kind = Sink;
  bool neg = false;  // !p, or -x before a register
  int reg = -1;
  int var = -1;
  int fbits = 0;
  u64 imm = 0;
  std::string sym;
  std::vector<Operand> sub;
};

struct Inst {
  int guard = -1;
  bool guard_neg = false;
  std::vector<std::string> op;  // opcode split at dots: op[0] is the root
  std::vector<Operand> ops;
  int line = 0;                  // in the PTX text
  int loc_file = 0, loc_line = 0;
  int scope = 0;
  bool has(std::string_view m) const {
    for (size_t i = 1; i < op.size(); ++i)
      if (op[i] == m) return true;
    return false;
  }
};

struct Reloc {
  u32 offset;         // in the variable's bytes
  int bytes;
  std::string symbol;
  s64 addend;
  u64 mask = ~0ull;   // 0xff00(symbol) initialisers
};

struct Variable {
  std::string name;
  Space space = Space::None;
  Type type = Type::None;
  u32 align = 1;
  u64 size = 0;
  bool external = false;
  std::vector<u8> init;
  std::vector<Reloc> relocs;
};

struct Function {
  std::string name;
  bool entry = false, defined = false;
  std::vector<Variable> params, returns;
  std::vector<Type> regs;             // types by register number
  std::vector<std::string> reg_names;
  std::vector<Variable> vars;         // function-scope shared/local/param variables (params first, then returns)
  std::vector<Inst> body;
  // Labels by scope; scope 0 is the function body.
  std::vector<int> scope_parent{-1};
  std::vector<std::unordered_map<std::string, int>> labels{1};
  std::map<std::string, std::vector<std::string>> targets;  // .branchtargets / .calltargets
  u32 maxntid[3] = {0, 0, 0};
  u32 reqntid[3] = {0, 0, 0};
  u32 cluster[3] = {0, 0, 0};
  // Index of the instruction a label names, seen from `scope`; -1 if unknown.
  int label(const std::string& name, int scope) const {
    for (int s = scope; s >= 0; s = scope_parent[s]) {
      auto it = labels[s].find(name);
      if (it != labels[s].end()) return it->second;
    }
    return -1;
  }
};

struct Ast {
  std::string target;
  std::vector<Variable> vars;
  std::unordered_map<std::string, int> var_index;
  std::vector<std::unique_ptr<Function>> functions;
  std::unordered_map<std::string, int> function_index;
  std::map<int, std::string> files;  // .file table
};

Ast parse_ptx(const std::string& text);

}  // namespace gpusim::ptx
