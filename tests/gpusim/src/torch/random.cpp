// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <atomic>
#include <mutex>

namespace gpusim::torch_plugin {
namespace {

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a + 0x9E3779B97F4A7C15ull * (b + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t next_seed(std::optional<at::Generator> cuda, c10::Device device) {
  at::Generator generator = cuda && cuda->defined() ? *cuda : at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  try {
    const uint64_t offset = generator.get_offset();
    const uint64_t seed = generator.current_seed();
    generator.set_offset(offset + 4);
    return mix(seed, offset);
  } catch (const c10::Error&) {  // not to be asked while a graph is captured
    static std::atomic<uint64_t> counter{0};
    return mix(0x5EED, counter++);
  }
}

}  // namespace

at::Generator cpu_generator(std::optional<at::Generator> cuda, c10::Device device) {
  return at::make_generator<at::CPUGeneratorImpl>(next_seed(std::move(cuda), device));
}

DefaultGeneratorScope::DefaultGeneratorScope(c10::Device device) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const uint64_t seed = next_seed(std::nullopt, device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  saved_ = generator.get_state();
  generator.set_current_seed(seed);
}

DefaultGeneratorScope::~DefaultGeneratorScope() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(saved_);
}

}  // namespace gpusim::torch_plugin
