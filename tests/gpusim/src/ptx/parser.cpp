// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Recursive-descent parser for PTX.
#include <bit>

#include "ast.h"
#include "gpusim/ptx.h"
#include "lexer.h"

namespace gpusim::ptx {
namespace {

const char* const kSpecialRegisters[] = {
    "%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid",
    "%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi",
    "%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt",
    "%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size", "%is_explicit_cluster",
    "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid", "%cluster_ctarank", "%cluster_nctarank",
    "%reserved_smem_offset_begin", "%reserved_smem_offset_end", "%reserved_smem_offset_cap",
    "%current_graph_exec", "WARP_SZ"};

bool special_register(std::string_view s) {
  std::string_view root = s.substr(0, s.find('.'));
  for (auto* r : kSpecialRegisters)
    if (root == r) return true;
  return root.starts_with("%pm") || root.starts_with("%envreg") || root.starts_with("%reserved_smem_offset");
}

struct Scope {
  int id;
  std::unordered_map<std::string, int> regs, vars;
};

class Parser {
 public:
  explicit Parser(const std::string& text) : toks_(lex(text)) {}
  Ast run() {
    while (peek().kind != Token::End) top_level();
    return std::move(ast_);
  }

 private:
  std::vector<Token> toks_;
  size_t p_ = 0;
  Ast ast_;
  Function* fn_ = nullptr;
  std::vector<Scope> scopes_;
  int loc_file_ = 0, loc_line_ = 0;

  const Token& peek(int k = 0) const { return toks_[std::min(p_ + k, toks_.size() - 1)]; }
  const Token& next() { return toks_[p_ + 1 < toks_.size() ? p_++ : p_]; }
  [[noreturn]] void fail(const std::string& what) {
    throw Fault("PTX line " + std::to_string(peek().line) + ": " + what + " near '" + std::string(peek().text) + "'");
  }
  bool accept(char c) { if (peek().is(c)) { next(); return true; } return false; }
  bool accept(std::string_view s) { if (peek().kind == Token::Ident && peek().text == s) { next(); return true; } return false; }
  void expect(char c) { if (!accept(c)) fail(std::string("expected '") + c + "'"); }
  std::string ident() {
    if (peek().kind != Token::Ident) fail("expected a name");
    return std::string(next().text);
  }
  u64 integer() {
    bool neg = accept('-');
    if (peek().kind != Token::Int) fail("expected an integer");
    u64 v = next().value;
    return neg ? 0 - v : v;
  }
  void skip_to_semicolon() { while (!peek().is(';') && peek().kind != Token::End) next(); accept(';'); }
  void skip_line() { int l = peek().line; while (peek().line == l && peek().kind != Token::End) next(); }
  void skip_braces() {
    expect('{');
    for (int d = 1; d && peek().kind != Token::End;) { if (peek().is('{')) ++d; if (peek().is('}')) --d; next(); }
  }

  // ---- module scope ----
  void top_level() {
    if (accept(';')) return;
    if (peek().kind != Token::Ident) fail("unexpected token");
    std::string_view t = peek().text;
    if (t == ".version" || t == ".address_size") { next(); next(); return; }
    if (t == ".target") { next(); ast_.target = ident(); while (accept(',')) ident(); return; }
    if (t == ".file") { file(); return; }
    if (t == ".section") { next(); ident(); skip_braces(); return; }
    if (t == ".pragma" || t == ".alias") { skip_to_semicolon(); return; }
    bool external = false;
    while (t == ".visible" || t == ".weak" || t == ".extern" || t == ".common") {
      external |= t == ".extern";
      next();
      t = peek().text;
    }
    if (t == ".entry" || t == ".func") { function(external); return; }
    if (t == ".global" || t == ".const" || t == ".shared" || t == ".local" || t == ".param") {
      next();
      declare(space_of(t), external, [&](Variable v) {
        auto it = ast_.var_index.find(v.name);
        if (it != ast_.var_index.end()) {
          if (!v.external) ast_.vars[it->second] = std::move(v);
          return;
        }
        ast_.var_index[v.name] = int(ast_.vars.size());
        ast_.vars.push_back(std::move(v));
      });
      return;
    }
    if (t.starts_with("@@")) { skip_line(); return; }
    fail("unknown directive");
  }

  static Space space_of(std::string_view t) {
    return t == ".global" ? Space::Global : t == ".const" ? Space::Const : t == ".shared" ? Space::Shared
           : t == ".local" ? Space::Local : Space::Param;
  }

  void file() {
    next();
    int id = int(integer());
    std::string name = peek().kind == Token::String ? std::string(next().text) : "";
    ast_.files[id] = name;
    while (accept(',')) next();
  }

  // After the state space: attributes, type, then one or more declarators.
  template <class Add>
  void declare(Space space, bool external, Add add) {
    u32 align = 0;
    int vec = 1;
    Type type = Type::None;
    while (peek().kind == Token::Ident && peek().text[0] == '.') {
      std::string_view t = peek().text;
      if (t == ".align") { next(); align = u32(integer()); continue; }
      next();
      if (t == ".v2") vec = 2;
      else if (t == ".v4") vec = 4;
      else if (t == ".attribute") { expect('('); while (!accept(')')) next(); }
      else if (t == ".ptr") {
        while (peek().kind == Token::Ident && peek().text[0] == '.') {
          if (peek().text == ".align") { next(); integer(); } else next();
        }
      } else if (t == ".texref" || t == ".samplerref" || t == ".surfref") type = Type::B64;
      else if (parse_type(t.substr(1)) != Type::None) type = parse_type(t.substr(1));
      else if (t != ".managed" && t != ".cluster" && t != ".cta") fail("unknown variable attribute " + std::string(t));
    }
    if (type == Type::None) fail("declaration without a type");
    do {
      Variable v;
      v.name = ident();
      v.space = space;
      v.type = type;
      v.external = external;
      u32 elem = type_bytes(type) * vec;
      v.align = align ? align : elem;
      u64 count = 1;
      bool unsized = false;
      while (accept('[')) {
        if (peek().is(']')) unsized = true; else count *= integer();
        expect(']');
      }
      v.size = unsized ? 0 : count * elem;
      if (accept('=')) {
        initialiser(v, type_bytes(type));
        if (unsized) v.size = v.init.size();
        v.init.resize(v.size);
      }
      add(std::move(v));
    } while (accept(','));
    if (space != Space::Param || peek().is(';')) accept(';');
  }

  void initialiser(Variable& v, int bytes) {
    if (accept('{')) {
      if (accept('}')) return;
      do initialiser(v, bytes); while (accept(','));
      expect('}');
      return;
    }
    auto put = [&](u64 x, int n) { for (int i = 0; i < n; ++i) v.init.push_back(u8(x >> (8 * i))); };
    bool neg = accept('-');
    const Token t = next();
    if (t.kind == Token::Int && peek().is('(')) {  // mask(symbol)
      next();
      Reloc r = reloc(v, bytes);
      r.mask = t.value;
      v.relocs.push_back(r);
      expect(')');
      put(0, bytes);
    } else if (t.kind == Token::Int) {
      put(neg ? 0 - t.value : t.value, bytes);
    } else if (t.kind == Token::Float32) {
      put(t.value ^ (neg ? 0x80000000u : 0), bytes);
    } else if (t.kind == Token::Float64) {
      double d = std::bit_cast<double>(t.value);
      if (neg) d = -d;
      if (bytes == 4) put(std::bit_cast<u32>(float(d)), 4); else put(std::bit_cast<u64>(d), bytes);
    } else if (t.kind == Token::String) {
      for (char c : t.text) v.init.push_back(u8(c));
      v.init.push_back(0);
    } else if (t.kind == Token::Ident) {
      --p_;
      v.relocs.push_back(reloc(v, bytes));
      put(0, bytes);
    } else {
      fail("bad initialiser");
    }
  }
  Reloc reloc(const Variable& v, int bytes) {
    Reloc r{u32(v.init.size()), bytes, "", 0};
    bool generic = accept("generic");
    if (generic) expect('(');
    r.symbol = ident();
    if (generic) expect(')');
    if (accept('+')) r.addend = s64(integer());
    else if (peek().is('-')) r.addend = s64(integer());
    return r;
  }

  // ---- functions ----
  void parameter_list(std::vector<Variable>& out) {
    expect('(');
    if (accept(')')) return;
    do {
      if (accept(".reg")) {
        declare(Space::Reg, false, [&](Variable v) { out.push_back(std::move(v)); });
      } else {
        if (!accept(".param")) fail("expected .param");
        one_param(out);
      }
    } while (accept(','));
    expect(')');
  }
  void one_param(std::vector<Variable>& out) {
    u32 align = 0;
    Type type = Type::None;
    int vec = 1;
    while (peek().kind == Token::Ident && peek().text[0] == '.') {
      std::string_view t = next().text;
      if (t == ".align") align = u32(integer());
      else if (t == ".v2") vec = 2;
      else if (t == ".v4") vec = 4;
      else if (t == ".texref" || t == ".samplerref" || t == ".surfref") type = Type::B64;
      else if (parse_type(t.substr(1)) != Type::None) type = parse_type(t.substr(1));
      else if (t != ".ptr" && t != ".global" && t != ".shared" && t != ".const" && t != ".local") fail("unknown parameter attribute");
      // .ptr's own .align must not change the parameter's alignment
      if (t == ".ptr") {
        while (peek().kind == Token::Ident && peek().text[0] == '.') {
          if (peek().text == ".align") { next(); integer(); } else next();
        }
      }
    }
    Variable v;
    v.space = Space::Param;
    v.type = type;
    v.name = peek().kind == Token::Ident ? ident() : "_";
    u64 count = 1;
    while (accept('[')) { if (!peek().is(']')) count *= integer(); expect(']'); }
    v.size = count * type_bytes(type) * vec;
    v.align = align ? align : u32(type_bytes(type) * vec);
    out.push_back(std::move(v));
  }

  int add_var(Variable v) {
    scopes_.back().vars[v.name] = int(fn_->vars.size());
    fn_->vars.push_back(std::move(v));
    return int(fn_->vars.size()) - 1;
  }
  int add_reg(const std::string& name, Type t) {
    scopes_.back().regs[name] = int(fn_->regs.size());
    fn_->regs.push_back(t);
    fn_->reg_names.push_back(name);
    return int(fn_->regs.size()) - 1;
  }

  void function(bool) {
    auto f = std::make_unique<Function>();
    f->entry = next().text == ".entry";
    if (accept(".attribute")) { expect('('); while (!accept(')')) next(); }
    if (peek().is('(')) parameter_list(f->returns);
    f->name = ident();
    if (peek().is('(')) parameter_list(f->params);
    for (;;) {  // performance directives
      if (peek().kind != Token::Ident || peek().text[0] != '.') break;
      std::string_view t = next().text;
      auto dims = [&](u32* d) { d[0] = d[1] = d[2] = 1; int k = 0; do d[k++] = u32(integer()); while (k < 3 && accept(',')); };
      if (t == ".maxntid") dims(f->maxntid);
      else if (t == ".reqntid") dims(f->reqntid);
      else if (t == ".reqnctapercluster") dims(f->cluster);
      else if (t == ".minnctapersm" || t == ".maxnctapersm" || t == ".maxnreg" || t == ".maxclusterrank") integer();
      else if (t == ".noreturn" || t == ".explicitcluster" || t == ".blocksareclusters" || t == ".unique") {}
      else if (t == ".pragma") skip_to_semicolon();
      else if (t == ".abi_preserve" || t == ".abi_preserve_control") integer();
      else fail("unknown function directive " + std::string(t));
    }
    Function* raw = f.get();
    auto it = ast_.function_index.find(f->name);
    if (accept(';')) {  // declaration
      if (it == ast_.function_index.end()) {
        ast_.function_index[f->name] = int(ast_.functions.size());
        ast_.functions.push_back(std::move(f));
      }
      return;
    }
    if (it == ast_.function_index.end()) {
      ast_.function_index[f->name] = int(ast_.functions.size());
      ast_.functions.push_back(std::move(f));
    } else {
      ast_.functions[it->second] = std::move(f);
    }
    fn_ = raw;
    fn_->defined = true;
    loc_file_ = loc_line_ = 0;
    scopes_.assign(1, Scope{0, {}, {}});
    for (auto* list : {&fn_->params, &fn_->returns})
      for (auto& v : *list) {
        if (v.space == Space::Reg) fail("register parameters are not supported");
        add_var(v);
      }
    expect('{');
    block();
    fn_ = nullptr;
  }

  void block() {
    while (!accept('}')) {
      if (peek().kind == Token::End) fail("unterminated function body");
      statement();
    }
  }

  void statement() {
    if (accept(';')) return;
    if (accept('{')) {
      fn_->scope_parent.push_back(scopes_.back().id);
      fn_->labels.emplace_back();
      scopes_.push_back(Scope{int(fn_->scope_parent.size()) - 1, {}, {}});
      block();
      scopes_.pop_back();
      return;
    }
    if (peek().kind == Token::Ident && peek().text[0] == '.') { directive(); return; }
    if (peek().kind == Token::Ident && peek(1).is(':')) {
      std::string name = ident();
      expect(':');
      if (peek().is(".branchtargets") || peek().is(".calltargets")) {
        next();
        auto& t = fn_->targets[name];
        do t.push_back(ident()); while (accept(','));
        accept(';');
      } else if (peek().is(".callprototype")) {
        skip_to_semicolon();
      } else {
        fn_->labels[scopes_.back().id][name] = int(fn_->body.size());
      }
      return;
    }
    instruction();
  }

  void directive() {
    std::string_view t = peek().text;
    if (t == ".reg") {
      next();
      int vec = 1;
      if (accept(".v2")) vec = 2;
      if (accept(".v4")) vec = 4;
      if (vec != 1) fail("vector registers are not supported");
      std::string ty = ident();
      Type type = parse_type(std::string_view(ty).substr(1));
      if (type == Type::None) fail("unknown register type " + ty);
      do {
        std::string name = ident();
        if (accept('<')) {
          u64 n = integer();
          expect('>');
          for (u64 i = 0; i < n; ++i) add_reg(name + std::to_string(i), type);
        } else {
          add_reg(name, type);
        }
      } while (accept(','));
      accept(';');
    } else if (t == ".local" || t == ".shared" || t == ".param" || t == ".global" || t == ".const") {
      next();
      declare(space_of(t), false, [&](Variable v) { add_var(std::move(v)); });
    } else if (t == ".loc") {
      next();
      loc_file_ = int(integer());
      loc_line_ = int(integer());
      integer();
      while (accept(',')) {  // function_name ..., inlined_at file line col
        if (accept("function_name")) { ident(); if (accept('+')) integer(); }
        else if (accept("inlined_at")) { integer(); integer(); integer(); }
        else next();
      }
    } else if (t == ".file") {
      file();
    } else if (t == ".pragma" || t == ".callprototype" || t == ".branchtargets") {
      skip_to_semicolon();
    } else if (t == ".section") {
      next(); ident(); skip_braces();
    } else {
      fail("unknown directive in a function body");
    }
  }

  int find_reg(const std::string& name) {
    for (size_t s = scopes_.size(); s-- > 0;) {
      auto it = scopes_[s].regs.find(name);
      if (it != scopes_[s].regs.end()) return it->second;
    }
    return -1;
  }
  int find_var(const std::string& name) {
    for (size_t s = scopes_.size(); s-- > 0;) {
      auto it = scopes_[s].vars.find(name);
      if (it != scopes_[s].vars.end()) return it->second;
    }
    return -1;
  }

  void instruction() {
    Inst in;
    in.line = peek().line;
    if (accept('@')) {
      in.guard_neg = accept('!');
      std::string r = ident();
      in.guard = find_reg(r);
      if (in.guard < 0) fail("unknown predicate " + r);
    }
    std::string_view op = peek().text;
    if (peek().kind != Token::Ident) fail("expected an instruction");
    in.line = peek().line;
    next();
    for (size_t b = 0; b <= op.size();) {
      size_t e = op.find('.', b);
      if (e == std::string_view::npos) e = op.size();
      in.op.emplace_back(op.substr(b, e - b));
      b = e + 1;
    }
    in.loc_file = loc_file_;
    in.loc_line = loc_line_;
    in.scope = scopes_.back().id;
    if (in.op[0] == "call") call_operands(in);
    else if (!peek().is(';')) {
      do in.ops.push_back(operand()); while (accept(','));
    }
    if (!accept(';')) fail("expected ';'");
    fn_->body.push_back(std::move(in));
  }

  // call (ret), name, (args), targets-or-prototype;
  void call_operands(Inst& in) {
    auto list = [&] {
      Operand v;
      v.kind = Operand::Vec;
      expect('(');
      if (!accept(')')) {
        do v.sub.push_back(operand()); while (accept(','));
        expect(')');
      }
      return v;
    };
    Operand ret, args;
    ret.kind = args.kind = Operand::Vec;
    if (peek().is('(')) { ret = list(); expect(','); }
    Operand target = operand();
    Operand table;
    if (accept(',')) {
      if (peek().is('(')) { args = list(); if (accept(',')) table = operand(); }
      else table = operand();
    }
    in.ops = {target, ret, args, table};
  }

  Operand operand() {
    Operand o = primary();
    if (accept('|')) {
      Operand pair;
      pair.kind = Operand::Pair;
      pair.sub.push_back(std::move(o));
      pair.sub.push_back(primary());
      return pair;
    }
    return o;
  }

  Operand primary() {
    Operand o;
    if (accept('!')) { o = primary(); o.neg = true; return o; }
    if (accept('{')) {
      o.kind = Operand::Vec;
      if (!accept('}')) {
        do o.sub.push_back(operand()); while (accept(','));
        expect('}');
      }
      return o;
    }
    if (accept('[')) { o = address(); expect(']'); return o; }
    if (accept('(')) { o = primary(); expect(')'); return o; }
    if (accept('-')) {
      o = primary();
      if (o.kind == Operand::Imm) o.imm = 0 - o.imm;
      else if (o.kind == Operand::FImm) o.imm ^= o.fbits == 32 ? 0x80000000ull : 0x8000000000000000ull;
      else o.neg = true;
      return o;
    }
    if (accept('~')) { o = primary(); o.imm = ~o.imm; return o; }
    const Token t = next();
    switch (t.kind) {
      case Token::Int: o.kind = Operand::Imm; o.imm = t.value; return o;
      case Token::Float32: o.kind = Operand::FImm; o.fbits = 32; o.imm = t.value; return o;
      case Token::Float64: o.kind = Operand::FImm; o.fbits = 64; o.imm = t.value; return o;
      case Token::Ident: break;
      default: --p_; fail("bad operand");
    }
    std::string name(t.text);
    if (name == "_") return o;
    o.reg = find_reg(name);
    if (o.reg >= 0) { o.kind = Operand::Reg; return o; }
    if (special_register(name)) { o.kind = Operand::SReg; o.sym = name; return o; }
    o.kind = Operand::Sym;
    o.sym = name;
    o.var = find_var(name);
    if (accept('+')) o.imm = integer();
    else if (peek().is('-')) o.imm = integer();
    return o;
  }

  Operand address() {
    Operand o;
    o = primary();  // a symbol takes its own addend
    if (o.kind == Operand::Vec || o.kind == Operand::SReg) fail("bad address");
    o.kind = Operand::Addr;
    if (accept('+')) o.imm += integer();
    else if (peek().is('-')) o.imm += integer();
    while (accept(',')) o.sub.push_back(operand());
    return o;
  }
};

}  // namespace

Ast parse_ptx(const std::string& text) { return Parser(text).run(); }

}  // namespace gpusim::ptx
