// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Operand tiles in shared memory: where a 16-byte chunk lies, and how a warp reads its mma fragments. Chunks are XOR-
// swizzled so that neither the copies in (a quarter warp writes 128 contiguous bytes) nor a fragment's reads (ldmatrix:
// eight rows of one column of chunks; float32 that is transposed: four rows of eight values) meet in a bank.
#pragma once

#include "../device/ptx.cuh"
#include "../device/vector.cuh"
#include "shapes.h"

namespace resnet_fused::cuda {

inline constexpr int kChunkBytes = 16;
template <class T>
inline constexpr int kChunkValues = kChunkBytes / static_cast<int>(sizeof(typename T::Value));

// The reduction's depth per stage is four chunks: two steps of an mma, whose depth is two chunks for every type.
inline constexpr int kStageChunks = 4, kStageSteps = 2;
template <class T>
inline constexpr int kTileK = kStageChunks * kChunkValues<T>;

// kExtent rows of kTileK values: the reduction runs along memory. A row is half of the 128 bytes of all banks.
template <class T, int kExtent>
struct KMajorTile {
  static constexpr int kRows = kExtent, kRowChunks = kStageChunks;
  static constexpr int kBytes = kRows * kRowChunks * kChunkBytes;

  static __device__ int offset(int row, int chunk) {
    return (row * kRowChunks + (chunk ^ ((row >> 1) & 3))) * kChunkBytes;
  }
  // The fragment of a row-major A at row m: 16 rows, one step.
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t tile, int m, int step) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4<false>(r, tile + offset(m + lane % 16, 2 * step + lane / 16));
  }
  // Two fragments of a column-major B, at columns n and n + 8: r[0], r[1] and r[2], r[3].
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t tile, int n, int step) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4<false>(r, tile + offset(n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  }
};

// kTileK rows of kExtent 16-bit values: the reduction runs across memory, and fragments are transposed on the way.
template <class T, int kExtent>
struct MnMajorTile {
  static constexpr int kRows = kTileK<T>, kRowChunks = kExtent / kChunkValues<T>;
  static constexpr int kBytes = kRows * kRowChunks * kChunkBytes;
  static_assert(kRowChunks % 8 == 0, "the swizzle is for rows of whole 128 bytes");

  static __device__ int offset(int row, int chunk) { return (row * kRowChunks + (chunk ^ (row & 7))) * kChunkBytes; }
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t tile, int m, int step) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4<true>(r, tile + offset(16 * step + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
  }
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t tile, int n, int step) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4<true>(r, tile + offset(16 * step + lane % 16, n / 8 + lane / 16));
  }
};

// The same of 32-bit values, which ldmatrix does not transpose: a lane reads its own. Four rows of eight values, what
// a warp reads at a time, lie in different banks.
template <int kExtent>
struct MnMajorTile<Float32, kExtent> {
  static constexpr int kRows = kTileK<Float32>, kRowChunks = kExtent / kChunkValues<Float32>;
  static constexpr int kBytes = kRows * kRowChunks * kChunkBytes;
  static_assert(kRowChunks % 8 == 0, "the swizzle is for rows of whole 128 bytes");

  static __device__ int offset(int row, int chunk) {
    return (row * kRowChunks + (chunk ^ ((row & 3) << 1))) * kChunkBytes;
  }
  // The value at (row, column) for a lane's column % 8 = lane / 4 and row % 4 = lane % 4.
  static __device__ uint32_t value(uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    const int r = row + lane % 4, c = column + lane / 4;
    return ptx::load_shared_32(tile + offset(r, c / 4) + c % 4 * 4);
  }
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t tile, int m, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = value(tile, 8 * step + i / 2 * 4, m + i % 2 * 8);
  }
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t tile, int n, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = value(tile, 8 * step + i % 2 * 4, n + i / 2 * 8);
  }
};

// Block tile kM x kN of kWarpsM x kWarpsN warps.
template <int kTileM, int kTileN, int kRowsOfWarps, int kColumnsOfWarps>
struct BlockTile {
  static constexpr int kM = kTileM, kN = kTileN;
  static constexpr int kWarpsM = kRowsOfWarps, kWarpsN = kColumnsOfWarps;
  static constexpr int kBlockThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// d[i][j] is the m16n8 accumulator of fragment row i and column j of the warp: element e lies in row
// lane / 4 + e / 2 * 8 and column lane % 4 * 2 + e % 2.
template <class Tile>
using Accumulators = float[Tile::kFragmentsM][Tile::kFragmentsN][4];

template <class Tile>
__device__ int warp_row() {
  return threadIdx.x / 32 % Tile::kWarpsM * Tile::kWarpM;
}
template <class Tile>
__device__ int warp_column() {
  return threadIdx.x / 32 / Tile::kWarpsM * Tile::kWarpN;
}

// body(row, column, v0, v1): the two neighbouring columns that a thread holds at a time.
template <class Tile, class Body>
__device__ void for_each_pair(Accumulators<Tile>& d, Body body) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        body(warp_row<Tile>() + i * 16 + lane / 4 + e * 8, warp_column<Tile>() + j * 8 + lane % 4 * 2, d[i][j][2 * e],
             d[i][j][2 * e + 1]);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
