// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Which 32-byte sectors of global memory were touched, as one bit each.
#pragma once

#include <array>
#include <bit>
#include <unordered_map>

#include "types.h"

namespace gpusim::ptx {

class SectorSet {
 public:
  void add(u64 address, u64 bytes) {
    if (!bytes) return;
    for (u64 s = address >> 5, end = (address + bytes - 1) >> 5; s <= end; ++s) {
      const u64 page = s >> 7;
      if (page != last_page_) { last_ = &pages_[page]; last_page_ = page; }
      (*last_)[s >> 6 & 1] |= u64(1) << (s & 63);
    }
  }

  void merge(const SectorSet& other) {
    last_page_ = ~u64(0);
    for (const auto& [page, bits] : other.pages_) {
      auto& mine = pages_[page];
      mine[0] |= bits[0];
      mine[1] |= bits[1];
    }
  }

  u64 count() const {
    u64 n = 0;
    for (const auto& [page, bits] : pages_) n += std::popcount(bits[0]) + std::popcount(bits[1]);
    return n;
  }

 private:
  using Bits = std::array<u64, 2>;         // a page: 128 sectors, 4096 bytes
  std::unordered_map<u64, Bits> pages_;    // its elements do not move
  u64 last_page_ = ~u64(0);
  Bits* last_ = nullptr;
};

}  // namespace gpusim::ptx
