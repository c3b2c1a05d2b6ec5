// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// y = conv(x) or conv(relu(scale*x + shift)) as an implicit GEMM: rows are output pixels, columns output channels, the
// reduction runs over taps and input channels. In training the epilogue leaves y's statistics per tile; in inference
// it applies the batch norm, the shortcut and the ReLU.
//
// Reads x once per tap and tile of columns, where the nine taps share a halo once, and that too, per tile of columns
// (memory sees it once, the rest is for the caches), the weights once per tile of rows, the shortcut once; writes y
// once, and three floats per tile and channel.
#include "../kernels.h"
#include "epilogue.cuh"
#include "halo.cuh"
#include "launch_conv.cuh"
#include "mainloop.cuh"
#include "tap_operands.cuh"

namespace resnet_fused::cuda {
namespace {

template <class T, class Tile, class Prologue, bool kHalo>
struct Fprop {
  using A = std::conditional_t<kHalo, HaloPixels<T, Tile, Prologue>, GatheredPixels<T, Tile, Prologue>>;
  using B = WeightRows<T, Tile, A::kTapsInner>;
  using Staged = Staging<T, Tile>;
  using Sums = ColumnSums<Tile>;
  static constexpr int kRing = kRingBytes<A, B>;

  // All of it serves the epilogue afterwards.
  static constexpr int shared_bytes(int halo) {
    return larger(kRing + A::shared_bytes(halo), Staged::kBytes + 2 * Sums::kBytes);
  }
};

// Count, mean and M2 of every column of the tile, from the values as they are stored.
template <class Tile>
__device__ void tile_statistics(Accumulators<Tile>& d, unsigned char* shared, int rows, float* statistics, int channels,
                                int first) {
  ColumnSums<Tile> sums(shared), squares(shared + ColumnSums<Tile>::kBytes);
  const float inverse = 1.0f / static_cast<float>(rows);
  replace_rows<Tile>(d, rows, [](int, int) { return 0.0f; });
  sums.sum(d, [](int, int, float v, int, int) { return v; });
  float mean[Tile::kFragmentsN][2];
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      mean[j][e] = sums.total(fragment_column<Tile>(j) + e) * inverse;
    }
  }
  replace_rows<Tile>(d, rows, [&](int j, int e) { return mean[j][e]; });
  squares.sum(d, [&](int, int, float v, int j, int e) {
    const float deviation = v - mean[j][e];
    return deviation * deviation;
  });
  for (int column = threadIdx.x; column < Tile::kN && first + column < channels; column += Tile::kBlockThreads) {
    float* out = statistics + first + column;
    out[kCount * channels] = static_cast<float>(rows);
    out[kTileMean * channels] = sums.total(column) * inverse;
    out[kM2 * channels] = squares.total(column);
  }
}

template <class T, class Tile, class Prologue, bool kHalo, bool kInference>
__global__ void __launch_bounds__(Tile::kBlockThreads, Tile::kBlocks) fprop_kernel(const FpropParams p) {
#if RESNET_FUSED_TENSOR_CORES
  using Parts = Fprop<T, Tile, Prologue, kHalo>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const ConvShape& s = p.shape;
  const PixelGrid grid{s.n, s.p, s.q};
  // Blocks that read the same rows are neighbours in time, so that the second finds them in the cache.
  const unsigned column_tiles = ceil_div(s.k, Tile::kN), row_tile = blockIdx.x / column_tiles;
  const int64_t first_row = int64_t{row_tile} * Tile::kM;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Tile::kN;
  typename Parts::A a(p.x, nullptr, p.coefficients, shared + Parts::kRing,
                      fprop_gather(s.h, s.stride_h, s.pad_h, s.dilation_h, s.r),
                      fprop_gather(s.w, s.stride_w, s.pad_w, s.dilation_w, s.s), s.c, grid, first_row);
  typename Parts::B b(p.weight, s, first_column);
  const int64_t left = grid.pixels() - first_row;
  const int rows = left < Tile::kM ? static_cast<int>(left) : Tile::kM;
  if (kInference && p.shortcut) Parts::Staged::prefetch(p.shortcut, first_row, rows, s.k, first_column);
  Accumulators<Tile> d = {};
  accumulate<T, Tile>(a, b, shared, a.iterations(), d);

  const auto pixel_of = [&](int row) { return row < rows ? first_row + row : int64_t{-1}; };
  typename Parts::Staged staged(shared);
  if constexpr (kInference) {
    if (p.shortcut) staged.load(p.shortcut, pixel_of, s.k, first_column);
    const auto* affine = static_cast<const float*>(p.affine);
    const ColumnVector<Tile> scale(affine + kScale * s.k, s.k, first_column);
    const ColumnVector<Tile> shift(affine + kShift * s.k, s.k, first_column);
    for_each_pair<Tile>(d, [&](int row, int column, int j, float v0, float v1) {
      Vector<typename T::Value, 2> pair;
      if (p.shortcut) pair = staged.read(row, column);
      float v[2] = {v0, v1};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[e] = fmaf(v[e], scale(j, e), shift(j, e));
        if (p.shortcut) v[e] += T::load(pair[e]);
        pair[e] = T::store(p.relu && v[e] < 0.0f ? 0.0f : v[e]);
      }
      staged.write(row, column, pair);
    });
  } else {
    if (p.bias) {
      const ColumnVector<Tile> bias(static_cast<const float*>(p.bias), s.k, first_column);
      for_each_pair<Tile>(d, [&](int, int, int j, float& v0, float& v1) {
        v0 += bias(j, 0);
        v1 += bias(j, 1);
      });
    }
    for_each_pair<Tile>(d, [&](int row, int column, int, float& v0, float& v1) {
      const Vector<typename T::Value, 2> pair = {T::store(v0), T::store(v1)};
      v0 = T::load(pair[0]);  // statistics are of what is stored, as eager's
      v1 = T::load(pair[1]);
      staged.write(row, column, pair);
    });
  }
  staged.store(p.y, pixel_of, s.k, first_column);
  if constexpr (!kInference) {
    tile_statistics<Tile>(d, shared + Parts::Staged::kBytes, rows,
                          static_cast<float*>(p.statistics) + row_tile * int64_t{kStatisticsRows} * s.k, s.k,
                          first_column);
  }
#endif
}

}  // namespace

cudaError_t fprop(const FpropParams& p, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  return dispatch_conv_dtype(p.dtype, [&](auto t) {
    return dispatch_tile(fprop_tile(s), [&](auto tile) {
      using T = decltype(t);
      using Tile = decltype(tile);
      const dim3 grid(static_cast<unsigned>(fprop_tiles(s) * ceil_div(s.k, Tile::kN)));
      const auto launch = [&](auto prologue, auto inference) {
        return dispatch_halo(s, [&](auto halo) {
          using Prologue = decltype(prologue);
          using Parts = Fprop<T, Tile, Prologue, halo.value>;
          return launch_conv<FpropParams>(fprop_kernel<T, Tile, Prologue, halo.value, inference.value>, p, grid,
                                          Tile::kBlockThreads, Parts::shared_bytes(halo_pixels(s)),
                                          Parts::shared_bytes(kMostHaloPixels), stream);
        });
      };
      if (p.affine) {
        return p.coefficients ? launch(AffineRelu{}, std::true_type{}) : launch(Raw{}, std::true_type{});
      }
      return p.coefficients ? launch(AffineRelu{}, std::false_type{}) : launch(Raw{}, std::false_type{});
    });
  });
}

}  // namespace resnet_fused::cuda
