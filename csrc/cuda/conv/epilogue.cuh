// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// From accumulators to memory: tiles pass through shared memory, so that global accesses are 16 bytes of neighbouring
// channels, and columns are summed over the rows of a tile.
#pragma once

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

  // Between global memory and the tile; row r of the tile is pixel_of(r) of `channels` channels, from `first` on.
  // Rows with a negative pixel and columns beyond the channels are left out. Both end with a barrier.
  template <class PixelOf>
  __device__ void load(const void* tensor, PixelOf pixel_of, int channels, int first) {
    walk(pixel_of, channels, first, [&](int64_t offset, Value* staged) {
      const auto* from = reinterpret_cast<const uint4*>(static_cast<const Value*>(tensor) + offset);
      ptx::store_shared_128(ptx::shared_address(staged), *from);
    });
    __syncthreads();
  }
  template <class PixelOf>
  __device__ void store(void* tensor, PixelOf pixel_of, int channels, int first) {
    __syncthreads();
    walk(pixel_of, channels, first, [&](int64_t offset, Value* staged) {
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
      if (pixel >= 0 && first + column < channels) {
        move(pixel * channels + first + column, values_ + row * kStride + column);
      }
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
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % Tile::kWarpsM;
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const int column = fragment_column<Tile>(j);
      float sum[2] = {};
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row<Tile>() + i * 16 + lane / 4 + half * 8;
#pragma unroll
          for (int e = 0; e < 2; ++e) sum[e] += value(row, column + e, d[i][j][2 * half + e], j, e);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lanes = 16; lanes >= 4; lanes /= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], lanes);
        if (lane < 4) shared_[warp * Tile::kN + column + e] = sum[e];
      }
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
