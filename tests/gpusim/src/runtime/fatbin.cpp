// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "fatbin.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace gpusim::runtime {
namespace {

constexpr uint32_t kContainerMagic = 0xBA55ED50;
constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;

struct ContainerHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};

struct EntryHeader {
  uint16_t kind;  // 1: PTX, 2: ELF
  uint16_t version;
  uint32_t header_bytes;
  uint64_t payload_bytes;  // padded
  uint32_t compressed_bytes;
  uint32_t options_offset;
  uint16_t minor, major;
  uint32_t arch;
  uint32_t name_offset, name_bytes;
  uint64_t flags;
  uint64_t reserved;
  uint64_t plain_bytes;  // only when compressed
};
static_assert(sizeof(EntryHeader) == 64);

// libzstd's two-line interface has been stable since 1.0, so no header is needed.
bool zstd_decompress(const void* in, size_t in_bytes, void* out, size_t out_bytes, std::string* problem) {
  using Decompress = size_t (*)(void*, size_t, const void*, size_t);
  static const auto decompress = []() -> Decompress {
    void* lib = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    return lib ? reinterpret_cast<Decompress>(dlsym(lib, "ZSTD_decompress")) : nullptr;
  }();
  if (!decompress) {
    *problem = "is zstd-compressed and libzstd.so.1 is not installed "
               "(or build with NVCC_APPEND_FLAGS=--compress-mode=none)";
    return false;
  }
  if (decompress(out, out_bytes, in, in_bytes) == out_bytes) return true;
  *problem = "did not decompress (zstd)";
  return false;
}

void read_target(PtxImage* image) {
  const size_t at = image->text.find(".target sm_");
  if (at == std::string::npos) return;
  const char* p = image->text.c_str() + at + 11;
  char* end;
  image->arch = int(std::strtol(p, &end, 10));
  image->arch_specific = *end == 'a' || *end == 'f';
}

}  // namespace

bool lz4_decompress(const unsigned char* in, size_t in_bytes, unsigned char* out, size_t out_bytes) {
  const unsigned char *ip = in, *const iend = in + in_bytes;
  unsigned char *op = out, *const oend = out + out_bytes;
  auto length = [&](size_t first) -> size_t {
    if (first != 15) return first;
    unsigned char c;
    do {
      if (ip >= iend) return SIZE_MAX / 2;
      c = *ip++;
      first += c;
    } while (c == 255);
    return first;
  };
  while (ip < iend) {
    const unsigned token = *ip++;
    const size_t literals = length(token >> 4);
    if (literals > size_t(iend - ip) || literals > size_t(oend - op)) return false;
    std::memcpy(op, ip, literals);
    op += literals;
    ip += literals;
    if (op == oend || iend - ip < 2) break;
    const size_t offset = ip[0] | ip[1] << 8;
    ip += 2;
    const size_t match = length(token & 15) + 4;
    if (offset == 0 || offset > size_t(op - out) || match > size_t(oend - op)) return false;
    for (size_t i = 0; i < match; ++i, ++op) *op = op[-std::ptrdiff_t(offset)];  // may overlap itself
  }
  return op == oend;
}

FatbinContents read_fatbin(const void* data) {
  FatbinContents out;
  ContainerHeader container;
  std::memcpy(&container, data, sizeof container);
  if (container.magic != kContainerMagic) {
    out.problems.push_back("the fat binary has an unknown magic number");
    return out;
  }
  const auto* p = static_cast<const unsigned char*>(data) + container.header_bytes;
  const auto* end = p + container.bytes;
  while (p + sizeof(EntryHeader) <= end) {
    EntryHeader e;
    std::memcpy(&e, p, sizeof e);
    if (e.header_bytes < sizeof e) break;
    const unsigned char* payload = p + e.header_bytes;
    p = payload + e.payload_bytes;
    if (e.kind != 1) {
      if (e.kind == 2) out.machine_code.push_back("sm_" + std::to_string(e.arch));
      continue;
    }
    PtxImage image;
    image.arch = int(e.arch);
    std::string problem;
    if (e.flags & (kFlagLz4 | kFlagZstd)) {
      image.text.resize(e.plain_bytes);
      auto* plain = reinterpret_cast<unsigned char*>(image.text.data());
      const bool good = e.flags & kFlagZstd
                            ? zstd_decompress(payload, e.compressed_bytes, plain, e.plain_bytes, &problem)
                            : lz4_decompress(payload, e.compressed_bytes, plain, e.plain_bytes);
      if (!good) {
        out.problems.push_back("the PTX for sm_" + std::to_string(e.arch) + " " +
                               (problem.empty() ? "did not decompress (LZ4)" : problem));
        continue;
      }
    } else {
      image.text.assign(reinterpret_cast<const char*>(payload), e.payload_bytes);
    }
    image.text.resize(std::strlen(image.text.c_str()));  // drop the padding
    read_target(&image);
    out.ptx.push_back(std::move(image));
  }
  return out;
}

const PtxImage* choose(const FatbinContents& contents, int major, int minor) {
  const int device = major * 10 + minor;
  const PtxImage* best = nullptr;
  for (const PtxImage& image : contents.ptx) {
    if (image.arch > device || (image.arch_specific && image.arch != device)) continue;
    if (!best || image.arch > best->arch || (image.arch == best->arch && image.arch_specific)) best = &image;
  }
  return best;
}

}  // namespace gpusim::runtime
