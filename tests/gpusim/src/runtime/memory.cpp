// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "config.h"
#include "profile.h"

namespace gpusim::runtime {
namespace {

constexpr size_t kGuard = 512;       // bytes on either side
constexpr size_t kAlignment = 512;   // cudaMalloc gives at least 256
constexpr unsigned char kCanary = 0xC5;

struct Block {
  void* base;
  size_t bytes;  // the whole block, guards included
};

constexpr size_t kPooled = 64 * 1024;              // smaller blocks are left to malloc
constexpr size_t kPoolLimit = size_t(512) << 20;

struct Table {
  std::mutex mutex;
  std::map<uint64_t, Allocation> live;       // by begin
  std::map<uint64_t, Allocation> dead;       // freed, still in quarantine
  std::unordered_map<uint64_t, Block> blocks;
  std::deque<Block> quarantine;
  size_t quarantined = 0;
  // Large blocks past their quarantine: fresh pages from the system cost far more.
  std::unordered_map<size_t, std::vector<void*>> pool;
  size_t pooled = 0;
  uint64_t next_serial = 1;
  MemoryUse use[16];
};

Table& table() {
  static Table* t = new Table;  // never destroyed: frees may come after main
  return *t;
}

std::atomic<uint64_t> generation{1};  // moves whenever the live ranges change

Allocation* lookup(std::map<uint64_t, Allocation>& ranges, uint64_t address) {
  auto it = ranges.upper_bound(address);
  if (it == ranges.begin()) return nullptr;
  --it;
  // A zero-byte allocation still owns its first address.
  if (address < it->second.end || address == it->second.begin) return &it->second;
  return nullptr;
}

// Block sizes come in steps of an eighth, so that blocks find new users.
size_t block_bytes(size_t bytes) {
  size_t step = kAlignment;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* take_block(Table& t, size_t bytes) {
  if (bytes >= kPooled) {
    std::lock_guard lock(t.mutex);
    auto it = t.pool.find(bytes);
    if (it != t.pool.end() && !it->second.empty()) {
      void* p = it->second.back();
      it->second.pop_back();
      t.pooled -= bytes;
      return p;
    }
  }
  return std::aligned_alloc(kAlignment, bytes);
}

void give_block(Table& t, const Block& block) {
  if (block.bytes < kPooled || t.pooled + block.bytes > kPoolLimit) return std::free(block.base);
  t.pool[block.bytes].push_back(block.base);
  t.pooled += block.bytes;
}

void check_canary(const Allocation& a) {
  auto bad = [](const unsigned char* p, size_t n) {
    return std::any_of(p, p + n, [](unsigned char c) { return c != kCanary; });
  };
  const auto* front = reinterpret_cast<const unsigned char*>(a.begin - kGuard);
  const auto* back = reinterpret_cast<const unsigned char*>(a.end);
  const bool before = bad(front, kGuard), after = bad(back, kGuard);
  if (before || after)
    std::fprintf(stderr,
                 "gpusim: memory %s allocation #%llu (%llu bytes at 0x%llx) was overwritten, "
                 "found when it was freed\n",
                 before ? "before" : "after", (unsigned long long)a.serial,
                 (unsigned long long)(a.end - a.begin), (unsigned long long)a.begin);
}

}  // namespace

size_t device_capacity() {
  return config().memory_bytes ? config().memory_bytes : size_t(profile().memory_gb) << 30;
}

void* allocate(size_t bytes, Kind kind, int device, bool fill) {
  Table& t = table();
  const bool counted = kind == Kind::device || kind == Kind::managed;
  {
    std::lock_guard lock(t.mutex);
    if (counted && t.use[device].current + bytes > device_capacity()) return nullptr;
  }
  const size_t whole = block_bytes(kGuard + bytes + kGuard);
  void* base = take_block(t, whole);
  if (!base) return nullptr;
  auto* data = static_cast<unsigned char*>(base) + kGuard;
  std::memset(base, kCanary, kGuard);
  std::memset(data + bytes, kCanary, kGuard);
  if (fill && config().fill_byte >= 0 && kind != Kind::managed) std::memset(data, config().fill_byte, bytes);
  if (kind == Kind::managed) std::memset(data, 0, bytes);

  std::lock_guard lock(t.mutex);
  Allocation a{uint64_t(data), uint64_t(data) + bytes, kind, device, t.next_serial++};
  t.live[a.begin] = a;
  t.blocks[a.begin] = {base, whole};
  if (counted) {
    MemoryUse& u = t.use[device];
    u.current += bytes;
    u.total_allocated += bytes;
    u.peak = std::max(u.peak, u.current);
    u.count_peak = std::max(u.count_peak, ++u.count);
    ++u.count_allocated;
  }
  generation.fetch_add(1, std::memory_order_release);
  return data;
}

bool release(void* pointer, bool host) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  auto it = t.live.find(uint64_t(pointer));
  if (it == t.live.end()) return false;
  const Allocation a = it->second;
  if (a.kind == Kind::registered || a.kind == Kind::module) return false;
  if (host != (a.kind == Kind::host)) return false;
  const Block block = t.blocks[a.begin];
  check_canary(a);
  t.blocks.erase(a.begin);
  t.live.erase(it);
  t.dead[a.begin] = a;
  t.quarantine.push_back(block);
  t.quarantined += block.bytes;
  while (t.quarantined > config().quarantine_bytes && !t.quarantine.empty()) {
    const Block old = t.quarantine.front();
    t.quarantine.pop_front();
    t.quarantined -= old.bytes;
    t.dead.erase(uint64_t(old.base) + kGuard);
    give_block(t, old);
  }
  if (a.kind == Kind::device || a.kind == Kind::managed) {
    MemoryUse& u = t.use[a.device];
    u.current -= a.end - a.begin;
    u.total_freed += a.end - a.begin;
    --u.count;
    ++u.count_freed;
  }
  generation.fetch_add(1, std::memory_order_release);
  return true;
}

bool add_range(const void* begin, size_t bytes, Kind kind, int device) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  if (t.live.count(uint64_t(begin))) return false;
  t.live[uint64_t(begin)] = {uint64_t(begin), uint64_t(begin) + bytes, kind, device, t.next_serial++};
  generation.fetch_add(1, std::memory_order_release);
  return true;
}

bool remove_range(const void* begin) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  auto it = t.live.find(uint64_t(begin));
  if (it == t.live.end() || t.blocks.count(uint64_t(begin))) return false;
  t.live.erase(it);
  generation.fetch_add(1, std::memory_order_release);
  return true;
}

bool find(uint64_t address, Allocation* out) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  const Allocation* a = lookup(t.live, address);
  if (!a) return false;
  if (out) *out = *a;
  return true;
}

bool accessible(uint64_t address, size_t bytes, bool) {
  // The last few ranges this thread met, good while nothing was allocated or freed.
  struct Cache {
    uint64_t generation = 0;
    unsigned next = 0;
    uint64_t begin[8] = {}, end[8] = {};
  };
  static thread_local Cache cache;
  const uint64_t now = generation.load(std::memory_order_acquire);
  if (cache.generation != now) {
    cache = Cache{};
    cache.generation = now;
  }
  for (int i = 0; i < 8; ++i)
    if (address >= cache.begin[i] && address + bytes <= cache.end[i]) return true;

  Table& t = table();
  std::lock_guard lock(t.mutex);
  const Allocation* a = lookup(t.live, address);
  if (!a || address + bytes > a->end) return false;
  cache.begin[cache.next] = a->begin;
  cache.end[cache.next] = a->end;
  cache.next = (cache.next + 1) % 8;
  return true;
}

std::string describe(uint64_t address) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  auto words = [&](const Allocation& a, const char* state) {
    char text[200];
    if (address >= a.end)
      std::snprintf(text, sizeof text, "%llu bytes past the end of %s allocation #%llu of %llu bytes at 0x%llx",
                    (unsigned long long)(address - a.end), state, (unsigned long long)a.serial,
                    (unsigned long long)(a.end - a.begin), (unsigned long long)a.begin);
    else if (address < a.begin)
      std::snprintf(text, sizeof text, "%llu bytes before %s allocation #%llu of %llu bytes at 0x%llx",
                    (unsigned long long)(a.begin - address), state, (unsigned long long)a.serial,
                    (unsigned long long)(a.end - a.begin), (unsigned long long)a.begin);
    else
      std::snprintf(text, sizeof text, "%llu bytes into %s allocation #%llu of %llu bytes at 0x%llx",
                    (unsigned long long)(address - a.begin), state, (unsigned long long)a.serial,
                    (unsigned long long)(a.end - a.begin), (unsigned long long)a.begin);
    return std::string(text);
  };
  if (const Allocation* a = lookup(t.live, address)) return words(*a, "live");
  if (const Allocation* a = lookup(t.dead, address)) return words(*a, "freed");
  auto it = t.live.upper_bound(address);
  const Allocation* above = it == t.live.end() ? nullptr : &it->second;
  const Allocation* below = it == t.live.begin() ? nullptr : &std::prev(it)->second;
  if (below && address - below->end > (1u << 20)) below = nullptr;
  if (above && above->begin - address > (1u << 20)) above = nullptr;
  if (below && above) (address - below->end <= above->begin - address ? above : below) = nullptr;
  if (below) return words(*below, "live");
  if (above) return words(*above, "live");
  return "in no allocation";
}

MemoryUse memory_use(int device) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  return t.use[device];
}

void reset_peak(int device) {
  Table& t = table();
  std::lock_guard lock(t.mutex);
  t.use[device].peak = t.use[device].current;
  t.use[device].count_peak = t.use[device].count;
}

}  // namespace gpusim::runtime
