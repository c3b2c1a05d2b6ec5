// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// dW as an implicit GEMM: rows are output channels, columns a tap's input channels, the reduction runs over output
// pixels and is split, so that the grid fills a card. Splits leave float partials, which are added in their order.
//
// Reads what forms dy (one or two tensors) and x once per tile of the other side; writes the partials, reads them again
// and writes dW, or dW at once where there is one split.
#include "../kernels.h"
#include "add_splits.cuh"
#include "launch_conv.cuh"
#include "mainloop.cuh"
#include "pixel_operands.cuh"

namespace resnet_fused::cuda {
namespace {

template <class T, class Tile, class PrologueA, class PrologueB>
struct Wgrad {
  using A = GradientRows<T, Tile, PrologueA>;
  using B = std::conditional_t<std::is_same_v<Tile, TileOfTaps>, RowOfTaps<T, Tile, PrologueB>,
                               TapColumns<T, Tile, PrologueB>>;
  static constexpr int kRing = kRingBytes<A, B>;
  static constexpr int kSharedBytes = kRing + B::kZeroBytes;
};

// Where the tile's would spill, fewer.
template <class Tile, class PrologueA, class PrologueB>
inline constexpr int kBlocks =
    PrologueA::kSources == 2 && (PrologueB::kTables == 0 || Tile::kM == Tile::kN) ? Tile::kBlocks : 2;

// Grid: rows of tiles, columns of tiles, splits.
template <class T, class Tile, class PrologueA, class PrologueB>
__global__ void __launch_bounds__(Tile::kBlockThreads, kBlocks<Tile, PrologueA, PrologueB>)
    wgrad_kernel(const WgradParams p) {
#if RESNET_FUSED_TENSOR_CORES
  using Parts = Wgrad<T, Tile, PrologueA, PrologueB>;
  using B = typename Parts::B;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const ConvShape& s = p.shape;
  const int channel_tiles = (s.c + B::kChannels - 1) / B::kChannels;
  const int tap = blockIdx.y / channel_tiles * B::kTaps, first_channel = blockIdx.y % channel_tiles * B::kChannels;
  const int first_row = blockIdx.x * Tile::kM;

  const PixelGrid grid{s.n, s.p, s.q};
  // Splits are cut at whole stages; the first ones get one more where they don't share them evenly.
  const int pixels = static_cast<int>(grid.pixels()), split = blockIdx.z, splits = gridDim.z;
  const int stages = (pixels + kTileK<T> - 1) / kTileK<T>, least = stages / splits, more = stages % splits;
  const int first = split * least + (split < more ? split : more);
  const int begin = first * kTileK<T>, stop = (first + least + (split < more)) * kTileK<T>;
  const int end = stop < pixels ? stop : pixels;

  Gather gh = fprop_gather(s.h, s.stride_h, s.pad_h, s.dilation_h, s.r);
  Gather gw = fprop_gather(s.w, s.stride_w, s.pad_w, s.dilation_w, s.s);
  gh.add += tap / s.s * gh.step;
  gw.add += (tap % s.s + B::kTaps / 2) * gw.step;
  typename Parts::A a(p.grad.g, p.grad.y, p.grad.backward_coefficients, begin, end, s.k, first_row);
  B b(p.x, p.coefficients, shared + Parts::kRing, gh, gw, grid, begin, end, s.c, first_channel);
  Accumulators<Tile> d = {};
  accumulate<T, Tile>(a, b, shared, (end - begin + kTileK<T> - 1) / kTileK<T>, d);

  auto* out = wgrad_is_direct(s, p.dtype, p.dw_dtype) ? static_cast<float*>(p.dw)
                                                      : p.workspace + blockIdx.z * (int64_t{s.k} * s.r * s.s * s.c);
  for_each_pair<Tile>(d, [&](int row, int, int j, float v0, float v1) {
    const int k = first_row + row, c = first_channel + B::channel_of(j);
    if (k < s.k && c < s.c) store_vector<2>(out + (int64_t{k} * s.r * s.s + tap + B::tap_of(j)) * s.c + c, {v0, v1});
  });
#endif
}

}  // namespace

cudaError_t wgrad(const WgradParams& p, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  const auto splits = static_cast<unsigned>(wgrad_splits(s, p.dtype));
  const dim3 grid(static_cast<unsigned>(wgrad_row_tiles(s, p.dtype)),
                  static_cast<unsigned>(wgrad_column_tiles(s, p.dtype)), splits);
  const cudaError_t error = dispatch_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto launch = [&](auto tile) {
      using Tile = decltype(tile);
      const auto with = [&](auto a, auto b) {
        using PrologueA = decltype(a);
        using PrologueB = decltype(b);
        using Parts = Wgrad<T, Tile, PrologueA, PrologueB>;
        return launch_conv<WgradParams>(wgrad_kernel<T, Tile, PrologueA, PrologueB>, p, grid, Tile::kBlockThreads,
                                        Parts::kSharedBytes, Parts::kSharedBytes, stream);
      };
      if (p.grad.y) return p.coefficients ? with(BackwardAffine{}, AffineRelu{}) : with(BackwardAffine{}, Raw{});
      return p.coefficients ? with(Raw{}, AffineRelu{}) : with(Raw{}, Raw{});
    };
    if constexpr (sizeof(typename T::Value) == 2) {
      if (wgrad_of_rows(s, p.dtype)) return launch(TileOfTaps{});
    }
    return dispatch_tile(wgrad_tile(s), launch);
  });
  if (error != cudaSuccess || wgrad_is_direct(s, p.dtype, p.dw_dtype)) return error;
  return launch_add_splits(p.workspace, static_cast<int>(splits), int64_t{s.k} * s.r * s.s * s.c, p.dw, p.dw_dtype,
                           stream);
}

}  // namespace resnet_fused::cuda
