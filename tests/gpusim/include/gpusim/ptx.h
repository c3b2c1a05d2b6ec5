// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The boundary between the two halves of gpusim: the PTX interpreter (src/ptx/)
// and the CUDA runtime it stands under (src/runtime/).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpusim {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// What a kernel can read of the device it runs on.
struct Device {
  std::string name = "gpusim sm_80";
  int cc_major = 8, cc_minor = 0;
  int sm_count = 4;
  size_t shared_per_block = 48 * 1024;         // without opting in
  size_t shared_per_block_optin = 163 * 1024;  // cudaFuncSetAttribute's limit
  size_t shared_per_sm = 164 * 1024;
  int max_threads_per_block = 1024;
  int registers_per_sm = 65536;
};

// A fault that real hardware, compute-sanitizer or racecheck would report.
// The text names the kernel, block, thread, PTX line (and .loc source line when
// present), the address and the instruction.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Answers whether [address, address + bytes) lies inside one live allocation.
// Global memory is host memory: a device address is a host pointer.
using MemoryCheck = std::function<bool(uint64_t address, size_t bytes, bool write)>;

struct Options {
  bool check_memory = true;      // every global access goes through MemoryCheck
  bool check_races = false;      // shared-memory hazards between barriers
  bool check_uninitialized = false;  // reads of shared memory nothing wrote
  bool poison_shared = true;     // fill shared memory with NaN patterns at block start
  bool count_distinct = false;   // count the distinct sectors a launch touches (costs some time)
  bool late_async_copies = true; // cp.async data lands only when a wait demands it
  uint64_t max_instructions = 0; // per block; 0: no limit. Past it: a Fault (deadlock, endless loop)
  int host_threads = 2;          // blocks run on this many host threads
};

struct KernelInfo {
  std::string name;                    // mangled
  std::vector<size_t> param_sizes;     // bytes of each parameter, in order
  size_t static_shared_bytes = 0;
  size_t local_bytes_per_thread = 0;
  int max_threads_per_block = 1024;    // .maxntid, else 1024
};

struct LaunchConfig {
  Dim3 grid, block, cluster;
  size_t dynamic_shared_bytes = 0;
  bool cooperative = false;  // grid.sync() works; refused if the blocks cannot all be resident
};

// What one launch did; the counters are exact and the same from run to run.
struct LaunchStats {
  uint64_t warp_instructions = 0, thread_instructions = 0;
  uint64_t mma_instructions = 0;       // warp-level mma/wgmma
  uint64_t mma_flops = 0;              // multiply and add each count one
  uint64_t global_load_bytes = 0, global_store_bytes = 0;      // bytes asked for by active threads
  uint64_t global_load_sectors = 0, global_store_sectors = 0;  // 32-byte sectors touched, per warp instruction
  // Distinct 32-byte sectors over the whole launch: what must cross device memory at least once,
  // were the caches perfect. 0 unless Options::count_distinct.
  uint64_t global_distinct_load_sectors = 0, global_distinct_store_sectors = 0;
  uint64_t shared_wavefronts = 0, shared_ideal_wavefronts = 0; // bank conflicts show as the difference
  uint64_t barriers = 0, async_copy_bytes = 0, atomics = 0;
  uint64_t divergent_branches = 0;
};

class Module {
 public:
  // Parses PTX text (ISA 7.0 to 9.0). Throws Fault naming line and token for
  // what it does not know; an unknown instruction inside a kernel faults only
  // when that kernel is launched.
  static std::shared_ptr<Module> parse(const std::string& ptx);
  virtual ~Module() = default;

  virtual std::vector<std::string> kernel_names() const = 0;
  virtual KernelInfo kernel_info(const std::string& name) const = 0;

  // Address and size of a .global/.const variable of the module; {0, 0} if none.
  virtual std::pair<uint64_t, size_t> variable(const std::string& name) const = 0;

  // Runs the grid to completion. args[i] points to the i-th parameter's value.
  virtual LaunchStats launch(const std::string& kernel, const LaunchConfig& config,
                             void* const* args, const Device& device,
                             const Options& options, const MemoryCheck& check) = 0;
};

}  // namespace gpusim
