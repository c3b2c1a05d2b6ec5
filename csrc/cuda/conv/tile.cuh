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
// Stages in the ring: two are under way while one is multiplied.
inline constexpr int kStages = 3;
template <class T>
inline constexpr int kTileK = kStageChunks * kChunkValues<T>;

// Fragments are addressed in two parts: where a lane reads the warp's first one (lane_a, lane_b: bytes into the tile,
// the same in all stages), and constants from there on, which end up in instructions. Both parts of a swizzled chunk's
// number are XORed, so tiles begin at whole rows: at multiples of kTileAlignment.
inline constexpr int kTileAlignment = 512;

// A row of all banks: zeros of so many bytes are read, for padding, in the banks where a value would have been.
inline constexpr int kBanksBytes = 128;

// kExtent rows of kTileK values: the reduction runs along memory. A row is half of the 128 bytes of all banks.
template <class T, int kExtent>
struct KMajorTile {
  static constexpr int kRows = kExtent, kRowChunks = kStageChunks;
  static constexpr int kPeriod = 8;  // rows after which the swizzle repeats
  static constexpr int kRowBytes = kRowChunks * kChunkBytes, kBytes = kRows * kRowBytes;

  static __device__ int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row >> 1) & 3)) * kChunkBytes;
  }
  static __device__ int lane_a(int row) {
    const int lane = threadIdx.x % 32;
    return offset(lane % 16, lane / 16) + row * kRowBytes;
  }
  static __device__ int lane_b(int column) {
    const int lane = threadIdx.x % 32;
    return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) + column * kRowBytes;
  }
  // The fragment of a row-major A, m rows on: 16 rows, one step. `at`: the tile's address and lane_a.
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t at, int m, int step) {
    ptx::ldmatrix_x4<false>(r, (at ^ (2 * step * kChunkBytes)) + m * kRowBytes);
  }
  // Two fragments of a column-major B, n and n + 8 columns on: r[0], r[1] and r[2], r[3].
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t at, int n, int step) { fragment_a(r, at, n, step); }
};

// kTileK rows of kExtent 16-bit values: the reduction runs across memory, and fragments are transposed on the way.
template <class T, int kExtent>
struct MnMajorTile {
  static constexpr int kRows = kTileK<T>, kRowChunks = kExtent / kChunkValues<T>;
  static constexpr int kPeriod = 8;
  static constexpr int kRowBytes = kRowChunks * kChunkBytes, kBytes = kRows * kRowBytes;
  static_assert(kRowChunks % 8 == 0, "the swizzle is for rows of whole 128 bytes");

  static __device__ int offset(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * kChunkBytes; }
  static __device__ int lane_a(int row) {
    const int lane = threadIdx.x % 32;
    return offset(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
  }
  static __device__ int lane_b(int column) {
    const int lane = threadIdx.x % 32;
    return offset(lane % 16, column / 8 + lane / 16);
  }
  // Warps' extents are powers of two: a warp's first chunk and the constants from there on have no bits in common.
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t at, int m, int step) {
    ptx::ldmatrix_x4<true>(r, (at ^ (m / 8 * kChunkBytes)) + 16 * step * kRowBytes);
  }
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t at, int n, int step) { fragment_a(r, at, n, step); }
};

// The same of 32-bit values, which ldmatrix does not transpose: a lane reads its own. Four rows of eight values, what
// a warp reads at a time, lie in different banks.
template <int kExtent>
struct MnMajorTile<Float32, kExtent> {
  static constexpr int kRows = kTileK<Float32>, kRowChunks = kExtent / kChunkValues<Float32>;
  static constexpr int kPeriod = 4;
  static constexpr int kRowBytes = kRowChunks * kChunkBytes, kBytes = kRows * kRowBytes;
  static_assert(kRowChunks % 8 == 0, "the swizzle is for rows of whole 128 bytes");

  static __device__ int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row & 3) << 1)) * kChunkBytes;
  }
  // A lane's value lies in row lane % 4 and column lane / 4.
  static __device__ int lane_a(int row) {
    const int lane = threadIdx.x % 32;
    return offset(lane % 4, row / 4 + lane / 16) + lane / 4 % 4 * 4;
  }
  static __device__ int lane_b(int column) { return lane_a(column); }
  // The value k rows of the reduction and m columns on, multiples of 4 and 8.
  static __device__ uint32_t value(uint32_t at, int k, int m) {
    return ptx::load_shared_32((at ^ (m / 4 * kChunkBytes)) + k * kRowBytes);
  }
  static __device__ void fragment_a(uint32_t (&r)[4], uint32_t at, int m, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = value(at, 8 * step + i / 2 * 4, m + i % 2 * 8);
  }
  static __device__ void fragment_b(uint32_t (&r)[4], uint32_t at, int n, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = value(at, 8 * step + i % 2 * 4, n + i / 2 * 8);
  }
};

// Block tile kM x kN of kWarpsM x kWarpsN warps; a multiprocessor shall hold kBlocks such blocks, so that one
// multiplies while another waits.
template <int kTileM, int kTileN, int kRowsOfWarps, int kColumnsOfWarps, int kBlocksTogether>
struct BlockTile {
  static constexpr int kM = kTileM, kN = kTileN, kBlocks = kBlocksTogether;
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

// The first of the two columns that a thread holds of the warp's j-th fragment.
template <class Tile>
__device__ int fragment_column(int j) {
  return warp_column<Tile>() + j * 8 + threadIdx.x % 4 * 2;
}

// body(row, column, j, v0, v1): the two neighbouring columns that a thread holds at a time, of the warp's fragment j.
template <class Tile, class Body>
__device__ void for_each_pair(Accumulators<Tile>& d, Body body) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        body(warp_row<Tile>() + i * 16 + lane / 4 + e * 8, fragment_column<Tile>(j), j, d[i][j][2 * e],
             d[i][j][2 * e + 1]);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
