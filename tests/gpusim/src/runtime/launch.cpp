// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "launch.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "config.h"
#include "errors.h"
#include "memory.h"
#include "profile.h"
#include "stream.h"

namespace gpusim::runtime {
namespace {

size_t optin_limit() { return size_t(profile().shared_per_block_optin_kb) * 1024; }

cudaError_t refuse(cudaError_t error, const Kernel& k, const char* format, size_t a = 0, size_t b = 0) {
  char reason[256];
  std::snprintf(reason, sizeof reason, format, a, b);
  std::fprintf(stderr, "gpusim: launch of %s refused: %s\n", demangle(k.name).c_str(), reason);
  return note(error);
}

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

// One launch at a time: kernels of two threads could share a module's variables.
std::mutex running;

// Where counters are appended, under `running`; empty: nowhere.
std::string& stats_path() {
  static std::string path = config().stats_path;
  return path;
}

void write_stats(const Kernel& k, const LaunchRequest& r, const LaunchStats& s, double seconds) {
  FILE* file = std::fopen(stats_path().c_str(), "a");
  if (!file) {
    std::fprintf(stderr, "gpusim: cannot write counters to %s: %s\n", stats_path().c_str(), std::strerror(errno));
    return;
  }
  auto number = [](uint64_t v) { return std::to_string(v); };
  auto triple = [&](const dim3& d) {
    return "[" + number(d.x) + "," + number(d.y) + "," + number(d.z) + "]";
  };
  std::string line = "{\"kernel\":" + quoted(demangle(k.name)) + ",\"grid\":" + triple(r.grid) +
                     ",\"block\":" + triple(r.block) + ",\"cluster\":" + triple(r.cluster) +
                     ",\"static_shared_bytes\":" + number(k.info.static_shared_bytes) +
                     ",\"dynamic_shared_bytes\":" + number(r.shared);
#define GPUSIM_FIELD(name) line += ",\"" #name "\":" + number(s.name);
  GPUSIM_FIELD(warp_instructions) GPUSIM_FIELD(thread_instructions)
  GPUSIM_FIELD(mma_instructions) GPUSIM_FIELD(mma_flops)
  GPUSIM_FIELD(global_load_bytes) GPUSIM_FIELD(global_store_bytes)
  GPUSIM_FIELD(global_load_sectors) GPUSIM_FIELD(global_store_sectors)
  GPUSIM_FIELD(global_distinct_load_sectors) GPUSIM_FIELD(global_distinct_store_sectors)
  GPUSIM_FIELD(shared_wavefronts) GPUSIM_FIELD(shared_ideal_wavefronts)
  GPUSIM_FIELD(barriers) GPUSIM_FIELD(async_copy_bytes) GPUSIM_FIELD(atomics)
  GPUSIM_FIELD(divergent_branches)
#undef GPUSIM_FIELD
  char tail[64];
  std::snprintf(tail, sizeof tail, ",\"host_seconds\":%.6f}\n", seconds);
  line += tail;
  std::fwrite(line.data(), 1, line.size(), file);
  std::fclose(file);
}

// The error that a real device would report for the fault, by the interpreter's words.
cudaError_t classify(const std::string& text) {
  const std::string first = text.substr(0, text.find('\n'));
  auto has = [&](const char* word) { return first.find(word) != std::string::npos; };
  if (has("misaligned")) return cudaErrorMisalignedAddress;
  if (has("assertion failed")) return cudaErrorAssert;
  if (has("deadlock") || has("instructions")) return cudaErrorLaunchTimeout;
  if (has("address 0x") && !has("uninitialised")) return cudaErrorIllegalAddress;
  return cudaErrorLaunchFailure;
}

// Where a faulting global address lies, if the report names one.
std::string whereabouts(const std::string& text) {
  if (text.find("global") == std::string::npos) return "";
  const size_t at = text.find("address 0x");
  if (at == std::string::npos) return "";
  const uint64_t address = std::strtoull(text.c_str() + at + 8, nullptr, 16);
  char where[32];
  std::snprintf(where, sizeof where, "\n  0x%llx is ", (unsigned long long)address);
  return where + describe(address);
}

}  // namespace

int assumed_registers(const Kernel& k) {
  const int threads = std::max(1, k.info.max_threads_per_block);
  return std::min(kAssumedRegistersPerThread, kRegistersPerSm / threads);
}

size_t dynamic_shared_limit(const Kernel& k) {
  if (k.max_dynamic_shared >= 0) return size_t(k.max_dynamic_shared);
  return size_t(kSharedPerBlock) - std::min<size_t>(kSharedPerBlock, k.info.static_shared_bytes);
}

int blocks_per_sm(const Kernel& k, int threads, size_t dynamic_shared) {
  const Profile& p = profile();
  if (threads <= 0 || threads > k.info.max_threads_per_block) return 0;
  if (dynamic_shared > dynamic_shared_limit(k)) return 0;
  const int rounded = (threads + 31) / 32 * 32;
  int blocks = std::min(p.threads_per_sm / rounded, p.blocks_per_sm);
  const int registers = std::min(kAssumedRegistersPerThread, kRegistersPerSm / rounded);
  blocks = std::min(blocks, kRegistersPerSm / (registers * rounded));
  const size_t shared = k.info.static_shared_bytes + dynamic_shared + size_t(reserved_shared_per_block());
  if (shared) blocks = std::min(blocks, int(size_t(p.shared_per_sm_kb) * 1024 / shared));
  return blocks;
}

cudaError_t check_launch(const Kernel& k, const LaunchRequest& r) {
  const uint64_t threads = uint64_t(r.block.x) * r.block.y * r.block.z;
  if (threads == 0 || r.block.x > 1024 || r.block.y > 1024 || r.block.z > 64 || threads > kMaxThreadsPerBlock)
    return refuse(cudaErrorInvalidConfiguration, k, "%zu threads per block (or a dimension past its limit)", threads);
  if (r.grid.x == 0 || r.grid.y == 0 || r.grid.z == 0 || r.grid.x > 2147483647u || r.grid.y > 65535 ||
      r.grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, k, "a grid dimension is zero or past its limit");
  if (threads > uint64_t(k.info.max_threads_per_block))
    return refuse(cudaErrorInvalidValue, k, "%zu threads per block, but the kernel was compiled for at most %zu",
                  threads, k.info.max_threads_per_block);
  if (r.shared > dynamic_shared_limit(k) || r.shared + k.info.static_shared_bytes > optin_limit())
    return refuse(cudaErrorInvalidValue, k,
                  k.max_dynamic_shared < 0
                      ? "%zu bytes of dynamic shared memory without opting in; %zu are allowed "
                        "(cudaFuncAttributeMaxDynamicSharedMemorySize)"
                      : "%zu bytes of dynamic shared memory, %zu were asked for with cudaFuncSetAttribute",
                  r.shared, dynamic_shared_limit(k));
  const uint64_t cluster = uint64_t(r.cluster.x) * r.cluster.y * r.cluster.z;
  if (cluster != 1) {
    if (profile().major < 9) return refuse(cudaErrorNotSupported, k, "clusters need compute capability 9.0");
    if (cluster == 0 || cluster > (k.non_portable_cluster ? 16u : 8u) || r.grid.x % r.cluster.x ||
        r.grid.y % r.cluster.y || r.grid.z % r.cluster.z)
      return refuse(cudaErrorInvalidClusterSize, k, "a cluster of %zu blocks does not divide the grid or is too large",
                    cluster);
  }
  if (r.cooperative) {
    const uint64_t blocks = uint64_t(r.grid.x) * r.grid.y * r.grid.z;
    const uint64_t room = uint64_t(blocks_per_sm(k, int(threads), r.shared)) * profile().sm_count;
    if (blocks > room)
      return refuse(cudaErrorCooperativeLaunchTooLarge, k, "%zu blocks, %zu fit at once", blocks, room);
  }
  return cudaSuccess;
}

cudaError_t run_kernel(const Kernel& k, const LaunchRequest& r, void** args) {
  static const Device device = interpreter_device();
  LaunchConfig launch;
  launch.grid = {r.grid.x, r.grid.y, r.grid.z};
  launch.block = {r.block.x, r.block.y, r.block.z};
  launch.cluster = {r.cluster.x, r.cluster.y, r.cluster.z};
  launch.dynamic_shared_bytes = r.shared;
  launch.cooperative = r.cooperative;

  if (config().trace)
    std::fprintf(stderr, "gpusim: %s <<<(%u,%u,%u), (%u,%u,%u), %zu>>>\n", demangle(k.name).c_str(), r.grid.x,
                 r.grid.y, r.grid.z, r.block.x, r.block.y, r.block.z, r.shared);

  std::lock_guard lock(running);
  Options options = config().options;
  options.count_distinct = !stats_path().empty();
  const auto begin = std::chrono::steady_clock::now();
  try {
    const LaunchStats stats = k.binary->module->launch(k.name, launch, args, device, options, accessible);
    if (!stats_path().empty())
      write_stats(k, r, stats, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  } catch (const std::exception& e) {
    const std::string text = e.what();
    return report_fault(classify(text), text + whereabouts(text) + "\n  kernel: " + demangle(k.name) +
                                            "\n  from:   " + k.binary->origin);
  }
  return cudaSuccess;
}

namespace {

cudaError_t launch(const void* function, const LaunchRequest& request, void** args, cudaStream_t stream) {
  Kernel* k = find_kernel(function);
  if (!k) return note(cudaErrorInvalidDeviceFunction);
  if (const auto e = load(k); e != cudaSuccess) return e;
  if (const auto e = check_launch(*k, request); e != cudaSuccess) return e;
  Stream* s = resolve(stream);
  if (!s) return note(cudaErrorInvalidResourceHandle);
  if (!s->capture) return run_kernel(*k, request, args);

  // The arguments' storage is the caller's: keep a copy for the replays.
  struct Kept {
    std::vector<std::vector<unsigned char>> values;
    std::vector<void*> pointers;
  };
  auto kept = std::make_shared<Kept>();
  for (size_t i = 0; i < k->info.param_sizes.size(); ++i) {
    const auto* p = static_cast<const unsigned char*>(args[i]);
    kept->values.emplace_back(p, p + k->info.param_sizes[i]);
  }
  for (auto& v : kept->values) kept->pointers.push_back(v.data());
  return enqueue(stream, "kernel", [k, request, kept] { return run_kernel(*k, request, kept->pointers.data()); });
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t set_attribute(Kernel* k, cudaFuncAttribute which, int value) {
  if (!k) return note(cudaErrorInvalidDeviceFunction);
  if (const auto e = load(k); e != cudaSuccess) return e;
  switch (which) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) + k->info.static_shared_bytes > optin_limit())
        return refuse(cudaErrorInvalidValue, *k, "cudaFuncSetAttribute asks for %zu bytes of shared memory, "
                      "the device has %zu per block", size_t(value) + k->info.static_shared_bytes, optin_limit());
      k->max_dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      k->preferred_carveout = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      k->non_portable_cluster = value != 0;
      return cudaSuccess;
    default:
      return cudaSuccess;
  }
}

}  // namespace
}  // namespace gpusim::runtime

using namespace gpusim::runtime;

extern "C" {

// For python/gpusim.py: appends the counters of further launches to a file; nullptr: back to GPUSIM_STATS.
void gpusim_count_into(const char* path) {
  std::lock_guard lock(running);
  stats_path() = path ? path : config().stats_path;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return note(cudaErrorMissingConfiguration);
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  return launch(f, {grid, block, {1, 1, 1}, shared, false}, args, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return launch(f, {grid, block, {1, 1, 1}, shared, false}, args, stream);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t f, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t stream) {
  return launch(f, {grid, block, {1, 1, 1}, shared, false}, args, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  return launch(f, {grid, block, {1, 1, 1}, shared, true}, args, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  if (!c) return note(cudaErrorInvalidValue);
  LaunchRequest r{c->gridDim, c->blockDim, {1, 1, 1}, c->dynamicSmemBytes, false};
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const cudaLaunchAttribute& a = c->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      r.cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    else if (a.id == cudaLaunchAttributeCooperative)
      r.cooperative = a.val.cooperative != 0;
    // The others (priorities, programmatic dependent launch, ...) only change timing.
  }
  return launch(f, r, args, c->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* f) {
  Kernel* k = find_kernel(f);
  if (!k) return note(cudaErrorInvalidDeviceFunction);
  if (const auto e = load(k); e != cudaSuccess) return e;
  std::memset(out, 0, sizeof *out);
  out->sharedSizeBytes = k->info.static_shared_bytes;
  out->localSizeBytes = k->info.local_bytes_per_thread;
  out->maxThreadsPerBlock = k->info.max_threads_per_block;
  out->numRegs = assumed_registers(*k);
  out->ptxVersion = k->binary->ptx_arch;  // CUB chooses its tuning by this
  out->binaryVersion = profile().major * 10 + profile().minor;
  out->maxDynamicSharedSizeBytes = int(dynamic_shared_limit(*k));
  out->preferredShmemCarveout = k->preferred_carveout;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute which, int value) {
  return set_attribute(find_kernel(f), which, value);
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t f, cudaFuncAttribute which, int value, int) {
  return set_attribute(find_kernel(f), which, value);
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetName(const char** name, const void* f) {
  Kernel* k = find_kernel(f);
  if (!k) return note(cudaErrorInvalidDeviceFunction);
  *name = k->name.c_str();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads,
                                                                   size_t shared, unsigned) {
  Kernel* k = find_kernel(f);
  if (!k || !blocks) return note(cudaErrorInvalidDeviceFunction);
  if (const auto e = load(k); e != cudaSuccess) return e;
  *blocks = blocks_per_sm(*k, threads, shared);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* f, int blocks, int) {
  Kernel* k = find_kernel(f);
  if (!k || !bytes || blocks <= 0) return note(cudaErrorInvalidValue);
  if (const auto e = load(k); e != cudaSuccess) return e;
  const size_t used = k->info.static_shared_bytes + size_t(reserved_shared_per_block());
  const size_t each = size_t(profile().shared_per_sm_kb) * 1024 / size_t(blocks);
  *bytes = each > used ? std::min(each - used, dynamic_shared_limit(*k)) : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* f, const cudaLaunchConfig_t* c) {
  Kernel* k = find_kernel(f);
  if (!k || !clusters || !c) return note(cudaErrorInvalidValue);
  if (const auto e = load(k); e != cudaSuccess) return e;
  unsigned size = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension)
      size = c->attrs[i].val.clusterDim.x * c->attrs[i].val.clusterDim.y * c->attrs[i].val.clusterDim.z;
  const int threads = int(c->blockDim.x * c->blockDim.y * c->blockDim.z);
  *clusters = blocks_per_sm(*k, threads, c->dynamicSmemBytes) * profile().sm_count / int(std::max(1u, size));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*, const cudaLaunchConfig_t*) {
  *size = profile().major >= 9 ? 8 : 1;
  return cudaSuccess;
}
}
