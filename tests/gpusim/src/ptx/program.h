// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// A kernel ready to run: flat code with resolved operands.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ast.h"
#include "types.h"

namespace gpusim::ptx {

struct Warp;
struct Instr;
struct ModuleData;

// Executes one instruction for the lanes in `mask` (never 0).
using Handler = void (*)(Warp& w, const Instr& in, u32 mask);

constexpr u32 kNone = 0xffffffffu;   // no operand / no guard
constexpr u32 kConstBit = 0x80000000u;

struct FunctionInfo;

// Operands that do not fit into Instr.
struct Ext {
  std::vector<u32> r;        // further operand references
  std::vector<u8> size;      // their register bytes
  const FunctionInfo* callee = nullptr;
  std::vector<u32> targets;  // brx.idx
  std::string text;
  u64 value = 0;
  std::shared_ptr<const void> data;  // instruction-specific description
};

// Operand references are byte offsets of register rows (32 lanes side by side)
// in the warp's frame, or, with kConstBit, in the program's constant pool. A
// predicate is one 32-bit lane mask.
struct Instr {
  Handler fn = nullptr;
  u32 guard = kNone;
  u8 guard_neg = 0;
  u8 m0 = 0, m1 = 0, m2 = 0;   // modifiers, by instruction
  u32 d = kNone, a = kNone, b = kNone, c = kNone;
  u32 d2 = kNone, e = kNone;
  s64 imm = 0;
  const Ext* ext = nullptr;
};

struct SourceRef { const Function* fn; int inst; };

// Where a function-scope .param variable lives in the frame: lane-major.
struct ParamSlot { u32 offset; u32 stride; u32 size; };

struct FunctionInfo {
  const Function* ast = nullptr;
  u32 entry_pc = 0, end_pc = 0;
  u32 frame_bytes = 0;
  u32 local_bytes = 0;
  std::vector<u32> var_offset;         // by ast->vars: local/param offset, shared address
  std::vector<ParamSlot> params, returns;
  bool indirect = false;               // makes indirect calls
  std::vector<const Function*> callees;
};

struct Program {
  const ModuleData* module = nullptr;
  const Function* kernel = nullptr;
  std::vector<Instr> code;
  std::vector<SourceRef> source;       // by pc
  std::vector<u8> pool;                // constant rows, 64-byte aligned base
  std::vector<std::unique_ptr<Ext>> exts;
  std::vector<std::unique_ptr<FunctionInfo>> functions;
  std::unordered_map<std::string, FunctionInfo*> by_name;
  std::unordered_map<std::string, u32> shared_address;   // module-scope shared variables in use
  u32 static_shared_end = kSharedBase;  // first address past static shared memory
  u32 dynamic_shared_start = kSharedBase;
  u32 local_bytes = 0;                 // per thread, all call depths
  u32 frame_bytes = 0;                 // per warp, likewise (grows on demand)
  std::vector<u32> param_offset;       // kernel parameters in the launch buffer
  u32 param_bytes = 0;
};

// The parsed module and its variables.
struct ModuleData {
  Ast ast;
  std::vector<std::string_view> lines;  // of the text
  std::string text;
  std::vector<u64> var_address;         // by ast.vars
  std::unique_ptr<u8[]> storage;
  u64 storage_begin = 0, storage_end = 0, const_begin = 0, const_end = 0;
};

std::unique_ptr<Program> build_program(const ModuleData& module, const Function& kernel);

}  // namespace gpusim::ptx
