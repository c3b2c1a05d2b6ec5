// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// From accumulators to memory: tiles pass through shared memory, so that global accesses are 16 bytes of neighbouring
// channels, and columns are summed over the rows of a tile.
#pragma once

#include "../device/reduce.cuh"
#include "tile.cuh"

namespace resnet_fused::cuda {

// A tile of the output in shared memory. Rows are padded by eight values: the pairs that are accessed at a time, of a
// warp (16 bits) or half a warp (32 bits), then fall into different banks.
template <class T, class Tile>
class Staging {
 public:
  using Value = typename T::Value;
  static constexpr int kStride = Tile::kN + 8;
  static constexpr int kValues = kChunkValues<T>;
  static constexpr int kBytes = Tile::kM * kStride * static_cast<int>(sizeof(Value));

  __device__ explicit Staging(unsigned char* shared) : values_(reinterpret_cast<Value*>(shared)) {}

  // Accesses to two 32-bit values are said outright: the compiler would make two of them, which meet in banks.
  __device__ Vector<Value, 2> read(int row, int column) const {
    const Value* from = values_ + row * kStride + column;
    if constexpr (sizeof(Value) == 2) return load_vector<2>(from);
    const uint2 word = ptx::load_shared_64(ptx::shared_address(from));
    Vector<Value, 2> pair;
    memcpy(&pair, &word, sizeof(pair));
    return pair;
  }
  __device__ void write(int row, int column, const Vector<Value, 2>& pair) {
    Value* to = values_ + row * kStride + column;
    typename WordOf<sizeof(pair)>::Type word;
    memcpy(&word, &pair, sizeof(pair));
    if constexpr (sizeof(pair) == 8) {
      ptx::store_shared_64(ptx::shared_address(to), word);
    } else {
      *reinterpret_cast<decltype(word)*>(to) = word;
    }
  }

  // Asks the second cache for what load() will read where a tile's `rows` pixels follow each other from `first_row` on,
  // so that memory's latency passes during the product.
  static __device__ void prefetch(const void* tensor, int64_t first_row, int rows, int channels, int first) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(Value)), kLines = Tile::kN / kLine;
    const auto* from = static_cast<const Value*>(tensor) + first_row * channels + first;
    for (int i = threadIdx.x; i < rows * kLines; i += Tile::kBlockThreads) {
      const int column = i % kLines * kLine;
      if (first + column < channels) ptx::prefetch_l2(from + int64_t{i / kLines} * channels + column);
    }
  }

  // Between global memory and the tile; row r of the tile is pixel_of(r) of `channels` channels, from `first` on.
  // Rows with a negative pixel and columns beyond the channels are not stored, and zero when loaded. Both end with a
  // barrier.
  template <class PixelOf>
  __device__ void load(const void* tensor, PixelOf pixel_of, int channels, int first) {
    walk(pixel_of, channels, first, [&](int64_t offset, Value* staged, bool exists) {
      ptx::cp_async_16(ptx::shared_address(staged), static_cast<const Value*>(tensor) + offset, exists);
    });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  template <class PixelOf>
  __device__ void store(void* tensor, PixelOf pixel_of, int channels, int first) {
    __syncthreads();
    walk(pixel_of, channels, first, [&](int64_t offset, Value* staged, bool exists) {
      if (!exists) return;
      store_vector(static_cast<Value*>(tensor) + offset, *reinterpret_cast<const Vector<Value, kValues>*>(staged));
    });
    __syncthreads();
  }

 private:
  template <class PixelOf, class Move>
  __device__ void walk(PixelOf pixel_of, int channels, int first, Move move) {
    constexpr int kRowChunks = Tile::kN / kValues;
#pragma unroll 4
    for (int i = threadIdx.x; i < Tile::kM * kRowChunks; i += Tile::kBlockThreads) {
      const int row = i / kRowChunks, column = i % kRowChunks * kValues;
      const int64_t pixel = pixel_of(row);
      const bool exists = pixel >= 0 && first + column < channels;
      move(pixel * channels + first + column, values_ + row * kStride + column, exists);
    }
  }

  Value* values_;
};

// A vector of the output's channels in registers: the entries of the columns that a thread holds, read once for all its
// rows. Zero beyond the channels.
template <class Tile>
class ColumnVector {
 public:
  __device__ ColumnVector(const float* source, int channels, int first) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const int channel = first + fragment_column<Tile>(j);
      const bool exists = channel < channels;  // and then so does its neighbour
#pragma unroll
      for (int e = 0; e < 2; ++e) values_[j][e] = exists ? source[channel + e] : 0.0f;
    }
  }

  // Of column e of the pair in the warp's j-th fragment.
  __device__ float operator()(int j, int e) const { return values_[j][e]; }

 private:
  float values_[Tile::kFragmentsN][2];
};

// Rows from `rows` on become value(j, e), of column e of the pair in the warp's j-th fragment. Whole tiles have none.
template <class Tile, class Value>
__device__ void replace_rows(Accumulators<Tile>& d, int rows, Value value) {
  if (rows >= Tile::kM) return;
  for_each_pair<Tile>(d, [&](int row, int, int j, float& v0, float& v1) {
    if (row >= rows) v0 = value(j, 0), v1 = value(j, 1);
  });
}

// Per-column sums over the rows of a tile: first of a thread's own rows, then of its warp's, then of all warps'.
template <class Tile>
class ColumnSums {
 public:
  static constexpr int kBytes = Tile::kWarpsM * Tile::kN * static_cast<int>(sizeof(float));

  __device__ explicit ColumnSums(unsigned char* shared) : shared_(reinterpret_cast<float*>(shared)) {}

  // The sums of value(row, column, accumulator, j, e) become readable with total(); the column is the warp's j-th
  // fragment's, and e of the two that a thread holds. Ends with a barrier.
  template <class Value>
  __device__ void sum(Accumulators<Tile>& d, Value value) {
    constexpr int kColumns = 2 * Tile::kFragmentsN, kLeft = kColumns / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % Tile::kWarpsM;
    float sums[kColumns] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row<Tile>() + i * 16 + lane / 4 + half * 8, j = c / 2, e = c % 2;
          sums[c] += value(row, fragment_column<Tile>(j) + e, d[i][j][2 * half + e], j, e);
        }
      }
    }
    // Eight lanes hold the same columns. They share them out: each sends the half of its sums that it does not keep.
#pragma unroll
    for (int lanes = 16; lanes >= 4; lanes /= 2) {
      const int kept = kColumns * lanes / 32;
      const bool upper = lane & lanes;
      // Unrolled by a number: `kept` is none to the compiler yet, which would index the sums in local memory.
#pragma unroll kColumns / 2
      for (int c = 0; c < kept; ++c) {
        const float sent = upper ? sums[c] : sums[c + kept], own = upper ? sums[c + kept] : sums[c];
        sums[c] = own + __shfl_xor_sync(kWholeWarp, sent, lanes);
      }
    }
    const int first = lane / 4 * kLeft;
    float* out = shared_ + warp * Tile::kN + fragment_column<Tile>(first / 2) + first % 2;
    if constexpr (kLeft == 2) {
      ptx::store_shared_64(ptx::shared_address(out), {__float_as_uint(sums[0]), __float_as_uint(sums[1])});
    } else {
      static_assert(kLeft == 1);
      *out = sums[0];
    }
    __syncthreads();
  }

  __device__ float total(int column) const {
    float sum = shared_[column];
#pragma unroll
    for (int warp = 1; warp < Tile::kWarpsM; ++warp) sum += shared_[warp * Tile::kN + column];
    return sum;
  }

 private:
  float* shared_;
};

}  // namespace resnet_fused::cuda
