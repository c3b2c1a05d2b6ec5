// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "profile.h"

#include <cstdio>
#include <cstring>

#include "config.h"

namespace gpusim::runtime {
namespace {

constexpr Profile kProfiles[] = {
    {"a100", "NVIDIA A100-SXM4-80GB (gpusim)", 8, 0, 108, 164, 163, 2048, 32, 1410000, 1593000, 5120, 40, 80, true},
    {"h100", "NVIDIA H100 80GB HBM3 (gpusim)", 9, 0, 132, 228, 227, 2048, 32, 1980000, 2619000, 5120, 50, 80, true},
    {"rtx4090", "NVIDIA GeForce RTX 4090 (gpusim)", 8, 9, 128, 100, 99, 1536, 24, 2520000, 10501000, 384, 72, 24, false},
    {"t4", "Tesla T4 (gpusim)", 7, 5, 40, 64, 64, 1024, 16, 1590000, 5001000, 256, 4, 16, false},
};

}  // namespace

const Profile& profile() {
  static const Profile& chosen = []() -> const Profile& {
    for (const Profile& p : kProfiles)
      if (config().device == p.key) return p;
    std::fprintf(stderr, "gpusim: GPUSIM_DEVICE=%s is unknown (a100, h100, rtx4090, t4); using a100\n",
                 config().device.c_str());
    return kProfiles[0];
  }();
  return chosen;
}

Device interpreter_device() {
  const Profile& p = profile();
  Device d;
  d.name = p.name;
  d.cc_major = p.major;
  d.cc_minor = p.minor;
  d.sm_count = p.sm_count;
  d.shared_per_block = kSharedPerBlock;
  d.shared_per_block_optin = size_t(p.shared_per_block_optin_kb) * 1024;
  d.shared_per_sm = size_t(p.shared_per_sm_kb) * 1024;
  d.max_threads_per_block = kMaxThreadsPerBlock;
  d.registers_per_sm = kRegistersPerSm;
  return d;
}

bool attribute(int which, int* value) {
  const Profile& p = profile();
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreadsPerBlock; return true;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; return true;
    case cudaDevAttrMaxBlockDimZ: *value = 64; return true;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; return true;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; return true;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedPerBlock; return true;
    case cudaDevAttrTotalConstantMemory: *value = 65536; return true;
    case cudaDevAttrWarpSize: *value = 32; return true;
    case cudaDevAttrMaxPitch: *value = 2147483647; return true;
    case cudaDevAttrMaxRegistersPerBlock: *value = kRegistersPerSm; return true;
    case cudaDevAttrClockRate: *value = p.clock_khz; return true;
    case cudaDevAttrTextureAlignment: *value = 512; return true;
    case cudaDevAttrTexturePitchAlignment: *value = 32; return true;
    case cudaDevAttrSurfaceAlignment: *value = 512; return true;
    case cudaDevAttrGpuOverlap: *value = 1; return true;
    case cudaDevAttrMultiProcessorCount: *value = p.sm_count; return true;
    case cudaDevAttrConcurrentKernels: *value = 1; return true;
    case cudaDevAttrMemoryClockRate: *value = p.memory_clock_khz; return true;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.bus_width; return true;
    case cudaDevAttrL2CacheSize: *value = p.l2_mb << 20; return true;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.threads_per_sm; return true;
    case cudaDevAttrAsyncEngineCount: *value = 3; return true;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCanMapHostMemory: *value = 1; return true;
    case cudaDevAttrPciBusId: *value = 1; return true;
    case cudaDevAttrStreamPrioritiesSupported: *value = 1; return true;
    case cudaDevAttrGlobalL1CacheSupported: case cudaDevAttrLocalL1CacheSupported: *value = 1; return true;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.shared_per_sm_kb * 1024; return true;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = kRegistersPerSm; return true;
    case cudaDevAttrManagedMemory: case cudaDevAttrConcurrentManagedAccess: *value = 1; return true;
    case cudaDevAttrHostNativeAtomicSupported: case cudaDevAttrPageableMemoryAccess: *value = 0; return true;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return true;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return true;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio: *value = p.half_rate_double ? 2 : 32; return true;
    case cudaDevAttrComputePreemptionSupported: *value = 1; return true;
    case cudaDevAttrCanUseHostPointerForRegisteredMem: *value = 1; return true;
    case cudaDevAttrCooperativeLaunch: *value = 1; return true;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.shared_per_block_optin_kb * 1024; return true;
    case cudaDevAttrHostRegisterSupported: *value = 1; return true;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.blocks_per_sm; return true;
    case cudaDevAttrMaxPersistingL2CacheSize: *value = p.major >= 8 ? (p.l2_mb << 20) * 3 / 4 : 0; return true;
    case cudaDevAttrMaxAccessPolicyWindowSize: *value = p.major >= 8 ? 128 << 20 : 0; return true;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = reserved_shared_per_block(); return true;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; return true;
    case cudaDevAttrClusterLaunch: *value = p.major >= 9; return true;
    default:
      if (which <= 0 || which >= 160) return false;
      *value = 0;
      return true;
  }
}

void fill_properties(cudaDeviceProp* prop, int device) {
  const Profile& p = profile();
  std::memset(prop, 0, sizeof *prop);
  std::snprintf(prop->name, sizeof prop->name, "%s", p.name);
  std::memset(&prop->uuid, 0x51 + device, sizeof prop->uuid);
  const size_t bytes = config().memory_bytes ? config().memory_bytes : size_t(p.memory_gb) << 30;
  prop->totalGlobalMem = bytes;
  prop->sharedMemPerBlock = kSharedPerBlock;
  prop->regsPerBlock = kRegistersPerSm;
  prop->warpSize = 32;
  prop->memPitch = 2147483647;
  prop->maxThreadsPerBlock = kMaxThreadsPerBlock;
  prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
  prop->maxThreadsDim[2] = 64;
  prop->maxGridSize[0] = 2147483647;
  prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
  prop->totalConstMem = 65536;
  prop->major = p.major;
  prop->minor = p.minor;
  prop->textureAlignment = 512;
  prop->texturePitchAlignment = 32;
  prop->multiProcessorCount = p.sm_count;
  prop->canMapHostMemory = 1;
  prop->concurrentKernels = 1;
  prop->pciBusID = 1 + device;
  prop->asyncEngineCount = 3;
  prop->unifiedAddressing = 1;
  prop->memoryBusWidth = p.bus_width;
  prop->l2CacheSize = p.l2_mb << 20;
  prop->maxThreadsPerMultiProcessor = p.threads_per_sm;
  prop->streamPrioritiesSupported = 1;
  prop->globalL1CacheSupported = prop->localL1CacheSupported = 1;
  prop->sharedMemPerMultiprocessor = size_t(p.shared_per_sm_kb) * 1024;
  prop->regsPerMultiprocessor = kRegistersPerSm;
  prop->managedMemory = prop->concurrentManagedAccess = 1;
  prop->computePreemptionSupported = 1;
  prop->canUseHostPointerForRegisteredMem = 1;
  prop->cooperativeLaunch = 1;
  prop->sharedMemPerBlockOptin = size_t(p.shared_per_block_optin_kb) * 1024;
  prop->maxBlocksPerMultiProcessor = p.blocks_per_sm;
  prop->reservedSharedMemPerBlock = reserved_shared_per_block();
  prop->hostRegisterSupported = 1;
  prop->memoryPoolsSupported = 1;
  prop->clusterLaunch = p.major >= 9;
#if CUDART_VERSION < 13000
  prop->clockRate = p.clock_khz;
  prop->memoryClockRate = p.memory_clock_khz;
  prop->singleToDoublePrecisionPerfRatio = p.half_rate_double ? 2 : 32;
#endif
}

}  // namespace gpusim::runtime
