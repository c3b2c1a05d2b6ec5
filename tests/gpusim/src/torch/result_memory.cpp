// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "result_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime_api.h>

#include <cstdlib>

extern "C" {
void* gpusim_allocate(size_t bytes, int device);
int gpusim_is_device_memory(const void* p);
}

namespace gpusim::torch_plugin {
namespace {

thread_local int active_device = -1;

void free_device(void* p) { (void)cudaFree(p); }

class ResultAllocator final : public c10::Allocator {
 public:
  explicit ResultAllocator(c10::Allocator* base) : base_(base) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (active_device < 0 || bytes == 0) return base_->allocate(bytes);
    void* p = gpusim_allocate(bytes, active_device);
    if (!p) return base_->allocate(bytes);
    return {p, p, &free_device, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_either; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static ResultAllocator*& instance() {
    static ResultAllocator* one = nullptr;
    return one;
  }

 private:
  static void free_either(void* p) {
    if (gpusim_is_device_memory(p)) free_device(p);
    else if (auto* deleter = instance()->base_->raw_deleter()) deleter(p);
  }

  c10::Allocator* base_;
};

// With PyTorch's caching allocator on, results must come from it.
const bool installed = [] {
  if (!std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING")) return false;
  ResultAllocator::instance() = new ResultAllocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(ResultAllocator::instance(), 100);
  return true;
}();

}  // namespace

ResultMemoryScope::ResultMemoryScope(c10::Device device) : previous_(active_device) {
  if (installed) active_device = device.index();
}
ResultMemoryScope::~ResultMemoryScope() { active_device = previous_; }

std::optional<c10::Storage> adopt(const c10::Storage& cpu, c10::Device device) {
  auto* impl = cpu.unsafeGetStorageImpl();
  if (!installed || impl->data_ptr().get_deleter() != &free_device) return std::nullopt;
  void* p = impl->mutable_data();
  c10::DataPtr owner = impl->set_data_ptr(c10::DataPtr(p, c10::Device(c10::kCPU)));
  owner.release_context();
  return c10::Storage(c10::Storage::use_byte_size_t(), impl->nbytes(), c10::DataPtr(p, p, &free_device, device),
                      c10::GetAllocator(c10::kCUDA), true);
}

}  // namespace gpusim::torch_plugin
