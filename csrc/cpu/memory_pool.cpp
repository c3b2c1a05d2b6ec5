// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "memory_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace resnet_fused::cpu {
namespace {

struct Block {
  void* data;
  size_t bytes;
  int64_t freed_at;  // the number of allocations until then
};

class MemoryPool final : public c10::Allocator {
 public:
  // A child of fork() has no thread that would unlock what another thread had locked: forks wait for the lock.
  MemoryPool() {
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kPooledBytes) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* data = take(bytes);
    return {data, data, [](void* pointer) { instance().give_back(pointer); }, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // False if `data` is not the pool's.
  bool give_back(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    if (found == used_.end()) return false;
    const size_t bytes = found->second;
    used_.erase(found);
    in_use_ -= bytes;
    waiting_bytes_ += bytes;
    waiting_.push_back({data, bytes, allocations_});
    report(data, -static_cast<int64_t>(bytes));
    return true;
  }

  PoolState state() {
    const std::lock_guard lock(mutex_);
    return {in_use_, waiting_bytes_};
  }

  void empty() {
    const std::lock_guard lock(mutex_);
    release(0, allocations_);
    peak_ = in_use_;
  }

  static MemoryPool& instance() {
    static auto* pool = new MemoryPool;  // never destroyed: tensors may outlive static destructors
    return *pool;
  }

 private:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    ++allocations_;
    // The smallest that fits if it wastes at most an eighth; of equals the one freed last, parts of which may still
    // be in a cache.
    auto best = waiting_.end();
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 8;
      if (fits && (best == waiting_.end() || block->bytes <= best->bytes)) best = block;
    }
    void* data = nullptr;
    if (best != waiting_.end()) {
      data = best->data;
      bytes = best->bytes;
      waiting_bytes_ -= bytes;
      waiting_.erase(best);
    }
    in_use_ += bytes;
    peak_ = std::max(peak_, in_use_);
    release(peak_ - in_use_, allocations_ - kMaxAge);
    if (data == nullptr) {
      try {
        data = c10::alloc_cpu(bytes);
      } catch (...) {
        in_use_ -= bytes;
        throw;
      }
    }
    used_.emplace(data, bytes);
    report(data, static_cast<int64_t>(bytes));
    return data;
  }

  // Returns waiting blocks to the system, those that were freed first first, until at most `keep` bytes wait and none
  // was freed before `oldest`.
  void release(size_t keep, int64_t oldest) {
    auto end = waiting_.begin();
    for (; end != waiting_.end() && (waiting_bytes_ > keep || end->freed_at < oldest); ++end) {
      c10::free_cpu(end->data);
      waiting_bytes_ -= end->bytes;
    }
    waiting_.erase(waiting_.begin(), end);
  }

  void report(void* data, int64_t bytes) const {
    if (c10::memoryProfilingEnabled()) {
      c10::reportMemoryUsageToProfiler(data, bytes, in_use_, in_use_ + waiting_bytes_, c10::Device(c10::kCPU));
    }
  }

  std::mutex mutex_;
  std::vector<Block> waiting_;  // in the order they were freed
  std::unordered_map<void*, size_t> used_;
  size_t in_use_ = 0, waiting_bytes_ = 0, peak_ = 0;
  int64_t allocations_ = 0;
};

thread_local int pooling_depth = 0;

// Stands before the allocator that PyTorch used until then, and only decides between the two.
class PoolingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    return pooling_depth > 0 ? MemoryPool::instance().allocate(bytes) : base()->allocate(bytes);
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* data) {
      if (!MemoryPool::instance().give_back(data)) base()->raw_deleter()(data);
    };
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { base()->copy_data(to, from, bytes); }

  // For good: a tensor may remember its allocator, for resize_.
  static void install() {
    base();
    c10::SetCPUAllocator(new PoolingAllocator);
  }

 private:
  static c10::Allocator* base() {
    static c10::Allocator* allocator = c10::GetCPUAllocator();
    return allocator;
  }
};

}  // namespace

c10::Allocator& memory_pool() { return MemoryPool::instance(); }

PoolState memory_pool_state() { return MemoryPool::instance().state(); }

void empty_memory_pool() { MemoryPool::instance().empty(); }

Pooling::Pooling() {
  static std::once_flag installed;
  std::call_once(installed, PoolingAllocator::install);
  ++pooling_depth;
}

Pooling::~Pooling() { --pooling_depth; }

}  // namespace resnet_fused::cpu
