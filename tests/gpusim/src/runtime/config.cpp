// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "config.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <thread>

namespace gpusim::runtime {
namespace {

std::string text(const char* name, const char* fallback = "") {
  const char* value = std::getenv(name);
  return value && *value ? value : fallback;
}

long long number(const char* name, long long fallback) {
  const std::string value = text(name);
  if (value.empty()) return fallback;
  char* end = nullptr;
  const long long parsed = std::strtoll(value.c_str(), &end, 0);
  if (end && *end == '\0') return parsed;
  std::fprintf(stderr, "gpusim: %s=%s is not a number; using %lld\n", name, value.c_str(), fallback);
  return fallback;
}

Config read() {
  Config c;
  c.device = text("GPUSIM_DEVICE", "a100");
  c.device_count = int(number("GPUSIM_DEVICES", 1));
  if (c.device_count < 0) c.device_count = 0;
  if (c.device_count > 16) c.device_count = 16;

  c.options.check_memory = false;
  std::stringstream checks(text("GPUSIM_CHECK", "memory"));
  for (std::string word; std::getline(checks, word, ',');) {
    if (word == "memory") c.options.check_memory = true;
    else if (word == "races") c.options.check_races = true;
    else if (word == "uninitialized") c.options.check_uninitialized = true;
    else if (word == "all")
      c.options.check_memory = c.options.check_races = c.options.check_uninitialized = true;
    else if (word != "none" && !word.empty())
      std::fprintf(stderr, "gpusim: GPUSIM_CHECK does not know '%s' (memory, races, uninitialized, all, none)\n",
                   word.c_str());
  }
  c.options.max_instructions = uint64_t(number("GPUSIM_MAX_INSTRUCTIONS", 1'000'000'000LL));
  const int cores = int(std::thread::hardware_concurrency());
  c.options.host_threads = int(number("GPUSIM_THREADS", cores > 0 ? cores : 1));
  if (c.options.host_threads < 1) c.options.host_threads = 1;

  c.stats_path = text("GPUSIM_STATS");
  c.abort_on_fault = number("GPUSIM_ABORT", 0) != 0;
  c.trace = number("GPUSIM_TRACE", 0) != 0;
  const std::string fill = text("GPUSIM_FILL", "0xff");
  c.fill_byte = fill == "none" ? -1 : int(std::strtol(fill.c_str(), nullptr, 0) & 0xFF);
  c.memory_bytes = size_t(number("GPUSIM_MEMORY_GB", 0)) << 30;
  return c;
}

}  // namespace

const Config& config() {
  static const Config c = read();
  return c;
}

}  // namespace gpusim::runtime
