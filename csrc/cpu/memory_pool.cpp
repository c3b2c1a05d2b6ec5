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

constexpr size_t kGranule = 4096;  // segments begin on pages where their block does

// A part of a block that the system gave; neighbours lie next to each other.
struct Segment {
  char* data;
  size_t bytes;
  Segment* before;  // of the same block; null at its ends
  Segment* behind;
  bool used;
  int64_t freed_at;  // the number of allocations until then

  bool whole() const { return !before && !behind; }
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
    void* data = take((bytes + kGranule - 1) / kGranule * kGranule);
    return {data, data, [](void* pointer) { instance().give_back(pointer); }, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // False if `data` is not the pool's.
  bool give_back(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    if (found == used_.end()) return false;
    Segment* segment = found->second;
    used_.erase(found);
    in_use_ -= segment->bytes;
    waiting_bytes_ += segment->bytes;
    report(data, -static_cast<int64_t>(segment->bytes));
    segment->used = false;
    segment->freed_at = allocations_;
    if (segment->before && !segment->before->used) segment = join(segment->before);
    if (segment->behind && !segment->behind->used) segment = join(segment);
    std::erase(waiting_, segment);
    waiting_.push_back(segment);
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
    // The smallest that fits; of equals the one freed last, parts of which may still be in a cache.
    Segment* best = nullptr;
    for (Segment* segment : waiting_) {
      if (segment->bytes >= bytes && (!best || segment->bytes <= best->bytes)) best = segment;
    }
    in_use_ += bytes;
    if (best) {
      std::erase(waiting_, best);
      waiting_bytes_ -= bytes;
      if (best->bytes > bytes) split(best, bytes);
    }
    size_t occupied = in_use_;  // with what waits in blocks of which something is used
    for (const Segment* segment : waiting_) occupied += segment->whole() ? 0 : segment->bytes;
    peak_ = std::max(peak_, occupied);
    release(peak_ - in_use_, allocations_ - kMaxAge);
    if (!best) {
      try {
        best = new Segment{static_cast<char*>(c10::alloc_cpu(bytes)), bytes, nullptr, nullptr, true, 0};
      } catch (...) {
        in_use_ -= bytes;
        throw;
      }
    }
    best->used = true;
    used_.emplace(best->data, best);
    report(best->data, static_cast<int64_t>(bytes));
    return best->data;
  }

  // Leaves `bytes` of a segment; the rest waits.
  void split(Segment* segment, size_t bytes) {
    auto* rest =
        new Segment{segment->data + bytes, segment->bytes - bytes, segment, segment->behind, false, segment->freed_at};
    if (rest->behind) rest->behind->before = rest;
    segment->behind = rest;
    segment->bytes = bytes;
    waiting_.push_back(rest);
  }

  // Makes one of a segment and the one behind it, neither of them used.
  Segment* join(Segment* segment) {
    Segment* rest = segment->behind;
    segment->bytes += rest->bytes;
    segment->freed_at = std::max(segment->freed_at, rest->freed_at);
    segment->behind = rest->behind;
    if (rest->behind) rest->behind->before = segment;
    std::erase(waiting_, rest);
    delete rest;
    return segment;
  }

  // Returns blocks of which nothing is used to the system, those that were freed first first, until at most `keep`
  // bytes wait and none was freed before `oldest`.
  void release(size_t keep, int64_t oldest) {
    std::erase_if(waiting_, [&](Segment* segment) {
      if (!segment->whole() || (waiting_bytes_ <= keep && segment->freed_at >= oldest)) return false;
      c10::free_cpu(segment->data);
      waiting_bytes_ -= segment->bytes;
      delete segment;
      return true;
    });
  }

  void report(void* data, int64_t bytes) const {
    if (c10::memoryProfilingEnabled()) {
      c10::reportMemoryUsageToProfiler(data, bytes, in_use_, in_use_ + waiting_bytes_, c10::Device(c10::kCPU));
    }
  }

  std::mutex mutex_;
  std::vector<Segment*> waiting_;  // about in the order they were freed
  std::unordered_map<void*, Segment*> used_;
  size_t in_use_ = 0, waiting_bytes_ = 0, peak_ = 0;  // peak_: of all blocks of which something was used
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
