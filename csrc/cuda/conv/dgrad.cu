// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// dx as an implicit GEMM: rows are input pixels, columns input channels, the reduction runs over taps and output
// channels. With stride 2 the pixels of one parity are a sub-problem with its own taps, so that no tap is multiplied
// in vain; all sub-problems run in one launch. The epilogue adds a second gradient, stops dx at the previous ReLU and
// sums it for the previous batch norm.
//
// Reads what forms dy (one or two tensors) once per tap and tile of columns, where the nine taps share a halo once, and
// that too, per tile of columns (memory sees it once, the rest is for the caches), the weights once per tile of rows,
// the addend and the mask's tensor once; writes dx once, and two floats per tile and channel.
#include "../kernels.h"
#include "epilogue.cuh"
#include "halo.cuh"
#include "launch_conv.cuh"
#include "mainloop.cuh"
#include "tap_operands.cuh"

namespace resnet_fused::cuda {
namespace {

// Where the tile's would spill, fewer.
template <class T, class Tile, class Prologue>
inline constexpr int kBlocks = sizeof(typename T::Value) == 2 && Prologue::kSources == 2 ? Tile::kBlocks : 2;

template <class T, class Tile, class Prologue, bool kHalo>
struct Dgrad {
  using A = std::conditional_t<kHalo, HaloPixels<T, Tile, Prologue>, GatheredPixels<T, Tile, Prologue>>;
  using B = WeightColumns<T, Tile, A::kTapsInner>;
  using Staged = Staging<T, Tile>;
  using Sums = ColumnSums<Tile>;
  static constexpr int kRing = kRingBytes<A, B>;

  // All of it serves the epilogue afterwards: the staged tile, two sums, and where the rows lie in dx.
  static constexpr int kPixels = Staged::kBytes + 2 * Sums::kBytes;
  static constexpr int shared_bytes(int halo) {
    return larger(kRing + A::shared_bytes(halo), kPixels + Tile::kM * static_cast<int>(sizeof(int)));
  }
};

template <class T, class Tile, class Prologue, bool kHalo>
__global__ void __launch_bounds__(Tile::kBlockThreads, kBlocks<T, Tile, Prologue>) dgrad_kernel(const DgradParams p) {
#if RESNET_FUSED_TENSOR_CORES
  using Parts = Dgrad<T, Tile, Prologue, kHalo>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const ConvShape& s = p.shape;
  // Blocks that read the same rows are neighbours in time, so that the second finds them in the cache.
  const unsigned column_tiles = ceil_div(s.c, Tile::kN), row_tile = blockIdx.x / column_tiles;
  const SubProblem part = dgrad_sub_problem(s, row_tile, Tile::kM);
  const Gather gh = dgrad_gather(s.p, s.stride_h, s.pad_h, s.dilation_h, s.r, part.parity_h);
  const Gather gw = dgrad_gather(s.q, s.stride_w, s.pad_w, s.dilation_w, s.s, part.parity_w);
  const PixelGrid grid{s.n, with_parity(s.h, s.stride_h, part.parity_h), with_parity(s.w, s.stride_w, part.parity_w)};
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Tile::kN;
  typename Parts::A a(p.grad.g, p.grad.y, p.grad.backward_coefficients, shared + Parts::kRing, gh, gw, s.k, grid,
                      part.first_row);
  typename Parts::B b(p.weight, s, gh, gw, first_column);
  const int64_t left = grid.pixels() - part.first_row;
  const int rows = left < Tile::kM ? static_cast<int>(left) : Tile::kM;
  const bool strided = s.stride_h != 1 || s.stride_w != 1;
  if (!strided) {
    if (p.addend) Parts::Staged::prefetch(p.addend, part.first_row, rows, s.c, first_column);
    if (p.mask_y) Parts::Staged::prefetch(p.mask_y, part.first_row, rows, s.c, first_column);
  }
  Accumulators<Tile> d = {};
  accumulate<T, Tile>(a, b, shared, a.iterations(), d);

  // Where a sub-problem's pixels lie in dx takes divisions, which are done once per row.
  int* pixels = reinterpret_cast<int*>(shared + Parts::kPixels);
  if (strided) {
    for (int row = threadIdx.x; row < rows; row += Tile::kBlockThreads) {
      const int pixel = static_cast<int>(part.first_row) + row, nh = pixel / grid.width;
      const int h = nh % grid.height * s.stride_h + part.parity_h, w = pixel % grid.width * s.stride_w + part.parity_w;
      pixels[row] = (nh / grid.height * s.h + h) * s.w + w;
    }
    __syncthreads();
  }
  const auto pixel_of = [&](int row) {
    if (row >= rows) return int64_t{-1};
    return strided ? int64_t{pixels[row]} : part.first_row + row;
  };
  typename Parts::Staged staged(shared);
  if (p.addend) {
    staged.load(p.addend, pixel_of, s.c, first_column);
    for_each_pair<Tile>(d, [&](int row, int column, int, float& v0, float& v1) {
      const auto pair = staged.read(row, column);
      v0 += T::load(pair[0]);
      v1 += T::load(pair[1]);
    });
    __syncthreads();
  }
  if (!p.mask_y) {
    for_each_pair<Tile>(d, [&](int row, int column, int, float v0, float v1) {
      staged.write(row, column, {T::store(v0), T::store(v1)});
    });
    staged.store(p.dx, pixel_of, s.c, first_column);
    return;
  }

  staged.load(p.mask_y, pixel_of, s.c, first_column);
  const auto* table = static_cast<const float*>(p.mask_coefficients);
  ColumnSums<Tile> sums(shared + Parts::Staged::kBytes), products(shared + Parts::Staged::kBytes + Parts::Sums::kBytes);
  {
    const ColumnVector<Tile> scale(table + kScale * s.c, s.c, first_column);
    const ColumnVector<Tile> shift(table + kShift * s.c, s.c, first_column);
    for_each_pair<Tile>(d, [&](int row, int column, int j, float& v0, float& v1) {
      const auto y = staged.read(row, column);
      float* v[2] = {&v0, &v1};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float z = fmaf(scale(j, e), T::load(y[e]), shift(j, e));
        *v[e] = z <= T::kLargestZero ? 0.0f : T::load(T::store(*v[e]));  // sums are of what is stored
      }
    });
  }
  replace_rows<Tile>(d, rows, [](int, int) { return 0.0f; });
  sums.sum(d, [](int, int, float v, int, int) { return v; });
  {
    const ColumnVector<Tile> mean(table + kMean * s.c, s.c, first_column);
    products.sum(d, [&](int row, int column, float v, int j, int e) {
      return v * (T::load(staged.read(row, column - e)[e]) - mean(j, e));
    });
  }
  for_each_pair<Tile>(d, [&](int row, int column, int, float v0, float v1) {
    staged.write(row, column, {T::store(v0), T::store(v1)});
  });
  auto* out = static_cast<float*>(p.sums) + row_tile * int64_t{2} * s.c + first_column;
  for (int column = threadIdx.x; column < Tile::kN && first_column + column < s.c; column += Tile::kBlockThreads) {
    out[column] = sums.total(column);
    out[s.c + column] = products.total(column);
  }
  staged.store(p.dx, pixel_of, s.c, first_column);
#endif
}

}  // namespace

cudaError_t dgrad(const DgradParams& p, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  return dispatch_conv_dtype(p.dtype, [&](auto t) {
    return dispatch_tile(dgrad_tile(s), [&](auto tile) {
      using T = decltype(t);
      using Tile = decltype(tile);
      const dim3 grid(static_cast<unsigned>(dgrad_tiles(s) * ceil_div(s.c, Tile::kN)));
      const auto launch = [&](auto prologue) {
        return dispatch_halo(s, [&](auto halo) {
          using Prologue = decltype(prologue);
          using Parts = Dgrad<T, Tile, Prologue, halo.value>;
          return launch_conv<DgradParams>(dgrad_kernel<T, Tile, Prologue, halo.value>, p, grid, Tile::kBlockThreads,
                                          Parts::shared_bytes(halo_pixels(s)), Parts::shared_bytes(kMostHaloPixels),
                                          stream);
        });
      };
      return p.grad.y ? launch(BackwardAffine{}) : launch(Raw{});
    });
  });
}

}  // namespace resnet_fused::cuda
