// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What the environment asks for, read once per process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "gpusim/ptx.h"

namespace gpusim::runtime {

struct Config {
  std::string device = "a100";   // GPUSIM_DEVICE
  int device_count = 1;          // GPUSIM_DEVICES
  Options options;               // GPUSIM_CHECK, GPUSIM_THREADS, GPUSIM_MAX_INSTRUCTIONS
  std::string stats_path;        // GPUSIM_STATS
  bool abort_on_fault = false;   // GPUSIM_ABORT
  int fill_byte = 0xFF;          // GPUSIM_FILL; -1: leave fresh memory as it comes
  size_t memory_bytes = 0;       // GPUSIM_MEMORY_GB; 0: what the profile says
  size_t quarantine_bytes = size_t(64) << 20;  // freed blocks kept from reuse
  bool trace = false;            // GPUSIM_TRACE: one line per launch on stderr
};

const Config& config();

}  // namespace gpusim::runtime
