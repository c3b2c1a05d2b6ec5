// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The device that is being stood in for: its limits and its properties.
#pragma once

#include <cuda_runtime_api.h>

#include "gpusim/ptx.h"

namespace gpusim::runtime {

struct Profile {
  const char* key;
  const char* name;
  int major, minor;
  int sm_count;
  int shared_per_sm_kb;        // usable by blocks
  int shared_per_block_optin_kb;
  int threads_per_sm;
  int blocks_per_sm;
  int clock_khz, memory_clock_khz, bus_width, l2_mb;
  int memory_gb;
  bool half_rate_double;       // singleToDoublePrecisionPerfRatio is 2, else 32 or 64
};

// The profile GPUSIM_DEVICE names.
const Profile& profile();
Device interpreter_device();

constexpr int kSharedPerBlock = 48 * 1024;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kRegistersPerSm = 65536;
constexpr int kAssumedRegistersPerThread = 128;  // PTX does not say how many ptxas would use

inline int reserved_shared_per_block() { return profile().major >= 8 ? 1024 : 0; }

// cudaDeviceGetAttribute's answer; false if the attribute is unknown.
bool attribute(int which, int* value);
void fill_properties(cudaDeviceProp* prop, int device);

}  // namespace gpusim::runtime
