// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The fat binaries nvcc embeds: containers of PTX text and machine code.
#pragma once

#include <string>
#include <vector>

namespace gpusim::runtime {

struct PtxImage {
  std::string text;
  int arch = 0;              // 80 for sm_80
  bool arch_specific = false;  // sm_90a: only for exactly that device
};

struct FatbinContents {
  std::vector<PtxImage> ptx;
  std::vector<std::string> machine_code;  // "sm_80"
  std::vector<std::string> problems;      // entries that could not be read
};

// data points at the container (magic 0xBA55ED50).
FatbinContents read_fatbin(const void* data);

// The image to run on a device of this compute capability; nullptr: none fits.
const PtxImage* choose(const FatbinContents& contents, int major, int minor);

// True on success; the sizes are exact.
bool lz4_decompress(const unsigned char* in, size_t in_bytes, unsigned char* out, size_t out_bytes);

}  // namespace gpusim::runtime
