// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// gpusim::Module: parsing, module variables, launches.
#include "gpusim/ptx.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "warp.h"

namespace gpusim {
using namespace ptx;

namespace {

class ModuleImpl : public Module {
 public:
  explicit ModuleImpl(const std::string& text) {
    data_.text = text;
    data_.ast = parse_ptx(data_.text);
    for (size_t b = 0; b <= data_.text.size();) {
      size_t e = data_.text.find('\n', b);
      if (e == std::string::npos) e = data_.text.size();
      data_.lines.emplace_back(data_.text.data() + b, e - b);
      b = e + 1;
    }
    hoist_function_variables();
    place_variables();
  }

  std::vector<std::string> kernel_names() const override {
    std::vector<std::string> v;
    for (auto& f : data_.ast.functions) if (f->entry && f->defined) v.push_back(f->name);
    return v;
  }

  KernelInfo kernel_info(const std::string& name) const override {
    const Program& p = program(name);
    KernelInfo k;
    k.name = name;
    for (auto& v : p.kernel->params) k.param_sizes.push_back(v.size);
    k.static_shared_bytes = p.static_shared_end - kSharedBase;
    k.local_bytes_per_thread = p.local_bytes;
    for (auto* d : {p.kernel->reqntid, p.kernel->maxntid})
      if (d[0]) { k.max_threads_per_block = int(d[0] * d[1] * d[2]); break; }
    return k;
  }

  std::pair<uint64_t, size_t> variable(const std::string& name) const override {
    auto it = data_.ast.var_index.find(name);
    if (it == data_.ast.var_index.end()) return {0, 0};
    const Variable& v = data_.ast.vars[it->second];
    if (v.space != Space::Global && v.space != Space::Const) return {0, 0};
    return {data_.var_address[it->second], v.size};
  }

  LaunchStats launch(const std::string& kernel, const LaunchConfig& config, void* const* args, const Device& device,
                     const Options& options, const MemoryCheck& check) override {
    const Program& p = program(kernel);
    const Function& f = *p.kernel;
    Launch l;
    l.program = &p;
    l.config = config;
    l.device = &device;
    l.options = &options;
    l.check = &check;
    static std::atomic<u64> next_grid{1};
    l.grid_id = next_grid++;
    auto refuse = [&](const std::string& what) { throw Fault(what + "\n  launching kernel " + kernel); };
    Dim3& cl = l.config.cluster;
    if (f.cluster[0]) {
      if (cl.count() > 1 && (cl.x != f.cluster[0] || cl.y != f.cluster[1] || cl.z != f.cluster[2])) refuse("cluster size differs from .reqnctapercluster");
      cl = {f.cluster[0], f.cluster[1], f.cluster[2]};
    }
    const Dim3 g = config.grid, b = config.block;
    if (!g.count() || !b.count()) refuse("empty grid or block");
    if (b.count() > u64(device.max_threads_per_block) || b.x > 1024 || b.y > 1024 || b.z > 64) refuse("block of " + std::to_string(b.count()) + " threads");
    for (auto* d : {f.reqntid, f.maxntid})
      if (d[0] && b.count() > u64(d[0]) * d[1] * d[2]) refuse("block of " + std::to_string(b.count()) + " threads exceeds .maxntid/.reqntid");
    if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) refuse("grid is too large");
    if (!cl.count() || g.x % cl.x || g.y % cl.y || g.z % cl.z) refuse("grid is not a multiple of the cluster");
    const size_t shared = (p.dynamic_shared_start - kSharedBase) + config.dynamic_shared_bytes;
    if (shared > device.shared_per_block_optin) refuse("shared memory: " + std::to_string(shared) + " bytes needed, " + std::to_string(device.shared_per_block_optin) + " available");
    l.shared_bytes = u32(p.dynamic_shared_start + config.dynamic_shared_bytes);
    l.params.resize(p.param_bytes + 64);
    for (size_t i = 0; i < f.params.size(); ++i) std::memcpy(l.params.data() + p.param_offset[i], args[i], f.params[i].size);
    l.clusters = g.count() / cl.count();
    const u64 by_threads = std::max<u64>(1, 2048 / std::max<u64>(1, (b.count() + 31) / 32 * 32));
    const u64 by_shared = shared ? std::max<u64>(1, device.shared_per_sm / (shared + 1024)) : 32;
    const u64 blocks = std::min<u64>({by_threads, by_shared, 32}) * std::max(1, device.sm_count);
    l.resident_limit = std::max<u64>(1, blocks / cl.count());
    l.grid_workspace[0] = sizeof l.grid_workspace;
    if (config.cooperative && l.clusters > l.resident_limit)
      refuse("cooperative launch of " + std::to_string(g.count()) + " blocks, " + std::to_string(l.resident_limit * cl.count()) + " fit at once");
    run_launch(l);
    l.stats.global_distinct_load_sectors = l.loads.count();
    l.stats.global_distinct_store_sectors = l.stores.count();
    return l.stats;
  }

 private:
  ModuleData data_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<std::string, std::unique_ptr<Program>> programs_;
  std::vector<u8> const_storage_;

  const Program& program(const std::string& name) const {
    std::lock_guard g(mutex_);
    auto& p = programs_[name];
    if (!p) {
      auto it = data_.ast.function_index.find(name);
      if (it == data_.ast.function_index.end() || !data_.ast.functions[it->second]->entry || !data_.ast.functions[it->second]->defined)
        throw Fault("no kernel named " + name);
      p = build_program(data_, *data_.ast.functions[it->second]);
    }
    return *p;
  }

  // .global/.const variables declared inside functions become module variables
  // under a private name.
  void hoist_function_variables() {
    for (auto& f : data_.ast.functions) {
      std::unordered_map<int, std::string> moved;
      for (size_t i = 0; i < f->vars.size(); ++i) {
        Variable& v = f->vars[i];
        if (v.space != Space::Global && v.space != Space::Const) continue;
        std::string name = f->name + "$" + std::to_string(i) + "$" + v.name;
        moved[int(i)] = name;
        Variable copy = v;
        copy.name = name;
        data_.ast.var_index[name] = int(data_.ast.vars.size());
        data_.ast.vars.push_back(std::move(copy));
      }
      if (moved.empty()) continue;
      std::function<void(Operand&)> fix = [&](Operand& o) {
        auto it = moved.find(o.var);
        if (o.var >= 0 && it != moved.end()) { o.sym = it->second; o.var = -1; }
        for (auto& s : o.sub) fix(s);
      };
      for (auto& in : f->body) for (auto& o : in.ops) fix(o);
    }
  }

  void place_variables() {
    auto& vars = data_.ast.vars;
    data_.var_address.assign(vars.size(), 0);
    // Globals and constants in separate ranges of one buffer, 256-byte aligned.
    auto layout = [&](Space s, size_t top) {
      for (size_t i = 0; i < vars.size(); ++i) {
        Variable& v = vars[i];
        if (v.space != s || (v.external && !v.size)) continue;
        size_t a = std::max<size_t>(v.align, 16);
        top = (top + a - 1) / a * a;
        data_.var_address[i] = top + 1;  // offset + 1; made absolute below
        top += v.size;
      }
      return top;
    };
    size_t globals = layout(Space::Global, 0), consts0 = (globals + 511) / 256 * 256, end = layout(Space::Const, consts0);
    data_.storage.reset(new u8[end + 512]());
    u64 base = (reinterpret_cast<u64>(data_.storage.get()) + 255) & ~255ull;
    for (auto& a : data_.var_address) if (a) a = a - 1 + base;
    data_.storage_begin = base;
    data_.storage_end = base + globals;
    data_.const_begin = base + consts0;
    data_.const_end = base + end;
    for (size_t i = 0; i < vars.size(); ++i) {
      const Variable& v = vars[i];
      if (!data_.var_address[i] || v.init.empty()) continue;
      u8* at = reinterpret_cast<u8*>(data_.var_address[i]);
      std::memcpy(at, v.init.data(), std::min<size_t>(v.init.size(), v.size));
      for (auto& r : v.relocs) {
        u64 value = 0;
        auto it = data_.ast.var_index.find(r.symbol);
        if (it != data_.ast.var_index.end()) value = data_.var_address[it->second];
        else {
          auto fi = data_.ast.function_index.find(r.symbol);
          if (fi == data_.ast.function_index.end()) throw Fault("initialiser of " + v.name + " names unknown symbol " + r.symbol);
          value = kFunctionWindow + u64(fi->second) * 16;
        }
        value += u64(r.addend);
        if (r.mask != ~0ull && r.mask) value = (value & r.mask) >> __builtin_ctzll(r.mask);
        std::memcpy(at + r.offset, &value, r.bytes);
      }
    }
  }
};

}  // namespace

std::shared_ptr<Module> Module::parse(const std::string& ptx) { return std::make_shared<ModuleImpl>(ptx); }

}  // namespace gpusim
