// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Device memory, which is host memory with guards around each allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gpusim::runtime {

enum class Kind { device, managed, host, registered, module };

struct Allocation {
  uint64_t begin = 0, end = 0;
  Kind kind = Kind::device;
  int device = 0;
  uint64_t serial = 0;
};

// nullptr: out of memory. fill: write the pattern of GPUSIM_FILL into it.
void* allocate(size_t bytes, Kind kind, int device, bool fill = true);
// False when the pointer is not the start of a live allocation of that sort.
bool release(void* pointer, bool host);
bool add_range(const void* begin, size_t bytes, Kind kind, int device);
bool remove_range(const void* begin);

bool find(uint64_t address, Allocation* out);
// Inside one live allocation? The interpreter's MemoryCheck.
bool accessible(uint64_t address, size_t bytes, bool write);
// Words for a fault report: the allocation an address lies in or next to.
std::string describe(uint64_t address);

// Counts over cudaMalloc'ed memory, for the allocator's statistics.
struct MemoryUse {
  size_t current = 0, peak = 0, total_allocated = 0, total_freed = 0;
  size_t count = 0, count_peak = 0, count_allocated = 0, count_freed = 0;
};
MemoryUse memory_use(int device);
void reset_peak(int device);
size_t device_capacity();

}  // namespace gpusim::runtime
