// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What gpusim keeps in the 128 opaque bytes of a CUtensorMap. The runtime's
// cuTensorMapEncodeTiled/Im2col fill it; cp.async.bulk.tensor reads it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpusim {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x4d54554f;
  // Numbering of CUtensorMapDataType, -Interleave, -Swizzle, -FloatOOBfill.
  enum DataType : uint8_t {
    kUint8, kUint16, kUint32, kInt32, kUint64, kInt64, kFloat16, kFloat32, kFloat64, kBfloat16,
    kFloat32Ftz, kTfloat32, kTfloat32Ftz,
  };
  enum Swizzle : uint8_t { kSwizzleNone, kSwizzle32B, kSwizzle64B, kSwizzle128B };
  enum Mode : uint8_t { kTiled, kIm2col };

  uint32_t magic = kMagic;
  uint8_t dtype = 0;             // DataType
  uint8_t rank = 0;              // 1..5; dimension 0 is the innermost
  uint8_t swizzle = 0;           // Swizzle
  uint8_t interleave = 0;        // 0: none (the only one supported)
  uint8_t mode = kTiled;
  uint8_t oob_fill = 0;          // 0: zeros, 1: NaN
  // CUTLASS clears bit 21 of the second 64-bit word of an encoded map, a work-around for
  // some drivers: nothing may lie there.
  uint8_t unused = 0;
  uint8_t element_strides[5] = {};
  uint64_t address = 0;          // global address
  uint64_t dims[5] = {};         // elements
  uint64_t strides[4] = {};      // bytes, of dimensions 1..rank-1
  uint16_t box[5] = {};          // tiled: elements per dimension
  // im2col, spatial dimensions innermost first (W, H, D):
  int16_t lower_corner[3] = {}, upper_corner[3] = {};
  uint16_t channels_per_pixel = 0, pixels_per_column = 0;

  int element_bytes() const {
    switch (dtype) {
      case kUint8: return 1;
      case kUint16: case kFloat16: case kBfloat16: return 2;
      case kUint64: case kInt64: case kFloat64: return 8;
      default: return 4;
    }
  }
};

static_assert(sizeof(TensorMap) <= 128 && offsetof(TensorMap, unused) == 10);

}  // namespace gpusim
