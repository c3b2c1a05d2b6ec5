// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// dgrad and wgrad of a narrow 1x1 filter, whose two passes would wait for memory, from one read of what forms dy and of
// x. Persistent blocks take tiles of 32 pixels, the weights and all of dW in registers. Per tile dy is formed once, in
// shared memory; dx = dy * W leaves as dgrad's does, but with sums that stay in registers over all tiles, and
// dW += dy^T * relu(scale*x + shift).
//
// Reads g, y, x and the addend once, the weights once per block; writes dx once, and two floats per channel and a dW of
// floats per block, which add_splits reads again.
#include "../kernels.h"
#include "add_splits.cuh"
#include "epilogue.cuh"
#include "launch_conv.cuh"
#include "operands.cuh"

namespace resnet_fused::cuda {
namespace {

// For up to kK output and kC input channels.
template <class T, int kK, int kC>
struct Backward {
  static_assert(kTileK<T> == kOneReadPixels);
  // Registers for dW and W leave place for one block of a wide side.
  static constexpr int kBlocks = kK == kNarrow && kC == kNarrow ? 2 : 1;
  using Dw = BlockTile<kK, kC, kK == kWide ? 4 : kC == kWide ? 1 : 2, kK == kWide ? 2 : kC == kWide ? 8 : 4, kBlocks>;
  using Dx = BlockTile<kOneReadPixels, kC, kC == kWide ? 1 : 2, kC == kWide ? 8 : 4, kBlocks>;
  static constexpr int kBlockThreads = Dw::kBlockThreads;
  static_assert(Dx::kBlockThreads == kBlockThreads);

  // Tiles of pixels by channels: dy is the transposed A of dW and the A of dx.
  using Gradient = MnMajorTile<T, kK>;
  using Input = MnMajorTile<T, kC>;
  using GradientCopies = Copier<T, Gradient, 2, kBlockThreads>;
  using InputCopies = Copier<T, Input, 1, kBlockThreads>;

  // g and y are read by the thread that copied them, so that two tiles' places suffice for two under way; x by all, and
  // until the end of a tile.
  static constexpr int kGradientStages = 2, kInputStages = 3;
  static constexpr int kInput = kGradientStages * GradientCopies::kStageBytes;
  static constexpr int kDy = kInput + kInputStages * Input::kBytes, kDx = kDy + Gradient::kBytes;
  static constexpr int kSharedBytes = kDx + Input::kBytes;
  static_assert(kSharedBytes * kBlocks <= 99 << 10);
};

// W as the fragments of B in dx = dy * W, of the warp's columns.
template <class Parts>
class Weights {
 public:
  template <class Shape>
  __device__ Weights(const void* weight, const Shape& s, unsigned char* shared) {
    using Copies = typename Parts::InputCopies;
    using Input = typename Parts::Input;
    const Copies copies(weight, nullptr);
    const int channel = Copies::Dealt::column() * kValues;
#pragma unroll
    for (int tile = 0; tile < kSteps / kStageSteps; ++tile) {
#pragma unroll
      for (int i = 0; i < Copies::Dealt::kChunks; ++i) {
        const int k = tile * Input::kRows + Copies::Dealt::row(i);
        copies.copy(shared + tile * Input::kBytes, i, k * s.c + channel, k < s.k && channel < s.c);
      }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const uint32_t at = ptx::shared_address(shared) + Input::lane_b(warp_column<Tile>());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t r[4];
        Input::fragment_b(r, at + step / kStageSteps * Input::kBytes, j * 8, step % kStageSteps);
        values_[step][j][0] = r[0], values_[step][j][1] = r[1];
        values_[step][j + 1][0] = r[2], values_[step][j + 1][1] = r[3];
      }
    }
    __syncthreads();
  }

  // d = dy * W; `dy`: the tile's address.
  template <class T>
  __device__ void multiply(uint32_t dy, Accumulators<typename Parts::Dx>& d) const {
    using Gradient = typename Parts::Gradient;
    const int lane = threadIdx.x % 32;
    const uint32_t at = dy + Gradient::offset(lane % 16, lane / 16) + warp_row<Tile>() * Gradient::kRowBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4<false>(a, (at ^ (2 * step * kChunkBytes)) + i * 16 * Gradient::kRowBytes);
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) ptx::mma<T>(d[i][j], a, values_[step][j][0], values_[step][j][1]);
      }
    }
  }

 private:
  using Tile = typename Parts::Dx;
  static constexpr int kValues = 8, kSteps = Parts::Dw::kM / 16;

  uint32_t values_[kSteps][Tile::kFragmentsN][2];
};

// B of dW: x behind its prologue, which is applied to fragments, where a lane's columns are channels.
template <class T, class Parts, class Prologue>
class Activations {
 public:
  __device__ Activations(const void* table, int channels) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
      for (int t = 0; t < Prologue::kTables; ++t) {
        const int channel = warp_column<Tile>() + j * 8 + threadIdx.x % 32 / 4;
        coefficients_[j][t] = coefficient<Prologue>(table, t, channel, channels);
      }
    }
  }

  // d += dy^T * x of the tiles at these addresses.
  __device__ void multiply(uint32_t dy, uint32_t x, Accumulators<typename Parts::Dw>& d) const {
    const uint32_t at_a = dy + Parts::Gradient::lane_a(warp_row<Tile>());
    const uint32_t at_b = x + Parts::Input::lane_b(warp_column<Tile>());
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      uint32_t a[Tile::kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) Parts::Gradient::fragment_a(a[i], at_a, i * 16, step);
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t b[4];
        Parts::Input::fragment_b(b, at_b, j * 8, step);
        transform(b, j);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
          ptx::mma<T>(d[i][j], a[i], b[0], b[1]);
          ptx::mma<T>(d[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

 private:
  using Tile = typename Parts::Dw;

  // A register holds neighbouring pixels of one channel; the third and the fourth are of the channel eight on.
  __device__ void transform(uint32_t (&b)[4], int j) const {
    if constexpr (Prologue::kTables > 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Coefficients<Prologue, 2> c;
#pragma unroll
        for (int t = 0; t < Prologue::kTables; ++t) c.row[t][0] = c.row[t][1] = coefficients_[j + e / 2][t];
        Vector<typename T::Value, 2> v;
        memcpy(&v, &b[e], sizeof(v));
        Prologue::template apply<T>(v, v, c);
        memcpy(&b[e], &v, sizeof(v));
      }
    }
  }

  float coefficients_[Tile::kFragmentsN][Prologue::kTables > 0 ? Prologue::kTables : 1];
};

template <class T, int kK, int kC, class Prologue>
__global__ void __launch_bounds__(Backward<T, kK, kC>::kBlockThreads, Backward<T, kK, kC>::kBlocks)
    backward_kernel(const BackwardParams p) {
#if RESNET_FUSED_TENSOR_CORES
  using Parts = Backward<T, kK, kC>;
  using Value = typename T::Value;
  using Dx = typename Parts::Dx;
  using Gradient = typename Parts::Gradient;
  using Input = typename Parts::Input;
  using OfGradient = typename Parts::GradientCopies::Dealt;
  using OfInput = typename Parts::InputCopies::Dealt;
  constexpr bool kMasked = Prologue::kTables > 0;
  constexpr int kValues = kChunkValues<T>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const ConvShape& s = p.shape;
  const int pixels = static_cast<int>(output_pixels(s)), tiles = (pixels + kOneReadPixels - 1) / kOneReadPixels;
  const int lane = threadIdx.x % 32;

  const Weights<Parts> weights(p.weight, s, shared);
  const Activations<T, Parts, Prologue> activations(p.coefficients, s.c);
  const typename Parts::GradientCopies gradient(p.grad.g, p.grad.y);
  const typename Parts::InputCopies input(p.x, nullptr), addend(p.addend, nullptr);
  const int k = OfGradient::column() * kValues, c = OfInput::column() * kValues;
  Coefficients<BackwardAffine, kValues> backward;
  read_coefficients(backward, p.grad.backward_coefficients, k, s.k);
  // Of the columns that this thread sums, zero where there is nothing to sum.
  const auto* table = static_cast<const float*>(p.coefficients);
  const int masked = kMasked ? s.c : 0;
  const ColumnVector<Dx> mean(table + kMean * masked, masked, 0), scale(table + kScale * masked, masked, 0),
      shift(table + kShift * masked, masked, 0);
  float sums[Dx::kFragmentsN][2] = {}, products[Dx::kFragmentsN][2] = {};

  int write = 0, write_x = 0, read = 0, read_x = 0;  // bytes into the places of g and y, and of x
  const auto next = [](int place, int bytes, int stages) { return place + bytes < bytes * stages ? place + bytes : 0; };
  const auto issue = [&](int64_t tile) {
    if (tile < tiles) {
      const int first = static_cast<int>(tile) * kOneReadPixels;
#pragma unroll
      for (int i = 0; i < OfGradient::kChunks; ++i) {
        const int pixel = first + OfGradient::row(i);
        gradient.copy(shared + write, i, int64_t{pixel} * s.k + k, pixel < pixels && k < s.k);
      }
#pragma unroll
      for (int i = 0; i < OfInput::kChunks; ++i) {
        const int pixel = first + OfInput::row(i);
        input.copy(shared + Parts::kInput + write_x, i, int64_t{pixel} * s.c + c, pixel < pixels && c < s.c);
      }
    }
    write = next(write, Parts::GradientCopies::kStageBytes, Parts::kGradientStages);
    write_x = next(write_x, Input::kBytes, Parts::kInputStages);
    ptx::cp_async_commit();
  };
  // dx of a tile, from the chunks that this thread also fills with the addend.
  const auto store = [&](int first) {
#pragma unroll
    for (int i = 0; i < OfInput::kChunks; ++i) {
      const int pixel = first + OfInput::row(i);
      if (pixel >= pixels || c >= s.c) continue;
      const auto* from = shared + Parts::kDx + OfInput::first_offset() + i * OfInput::kStepBytes;
      store_vector(static_cast<Value*>(p.dx) + int64_t{pixel} * s.c + c,
                   load_vector<kValues>(reinterpret_cast<const Value*>(from)));
    }
  };
  issue(blockIdx.x);
  issue(int64_t{blockIdx.x} + gridDim.x);

  const uint32_t dy = ptx::shared_address(shared) + Parts::kDy, x = ptx::shared_address(shared) + Parts::kInput;
  // Where this thread's pairs of dx lie in a tile of Input.
  const int pairs = Input::offset(warp_row<Dx>() + lane / 4, warp_column<Dx>() / 8) + lane % 4 * 4;
  const auto pair_at = [&](int i, int j, int e) {
    return (pairs ^ (j * kChunkBytes)) + (i * 16 + e * 8) * Input::kRowBytes;
  };
  const auto pair_of = [&](int tile, int at) {
    return load_vector<2>(reinterpret_cast<const Value*>(shared + tile + at));
  };
  Accumulators<typename Parts::Dw> dw = {};
  int before = -1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int first = static_cast<int>(tile) * kOneReadPixels;
    ptx::cp_async_wait<1>();
    // x is there for all, and everyone has multiplied dy, and written dx, of the tile before.
    __syncthreads();
    if (before >= 0) store(before);
    before = first;
    if (p.addend) {
#pragma unroll
      for (int i = 0; i < OfInput::kChunks; ++i) {
        const int pixel = first + OfInput::row(i);
        addend.copy(shared + Parts::kDx, i, int64_t{pixel} * s.c + c, pixel < pixels && c < s.c);
      }
    }
    ptx::cp_async_commit();
#pragma unroll
    for (int i = 0; i < OfGradient::kChunks; ++i) {
      using Chunk = Vector<Value, kValues>;
      const int at = OfGradient::first_offset() + i * OfGradient::kStepBytes;
      Chunk g = *reinterpret_cast<const Chunk*>(shared + read + at);
      const Chunk y = *reinterpret_cast<const Chunk*>(shared + read + at + Gradient::kBytes);
      BackwardAffine::apply<T>(g, y, backward);
      if (first + OfGradient::row(i) >= pixels) g = {};  // else c of the coefficients
      *reinterpret_cast<Chunk*>(shared + Parts::kDy + at) = g;
    }
    read = next(read, Parts::GradientCopies::kStageBytes, Parts::kGradientStages);
    issue(tile + 2 * int64_t{gridDim.x});
    __syncthreads();

    activations.multiply(dy, x + read_x, dw);
    Accumulators<Dx> d = {};
    weights.template multiply<T>(dy, d);
    replace_rows<Dx>(d, pixels - first, [](int, int) { return 0.0f; });
    if (p.addend) {
      ptx::cp_async_wait<1>();
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < Dx::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Dx::kFragmentsN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = pair_at(i, j, e);
          float v[2] = {d[i][j][2 * e], d[i][j][2 * e + 1]};
          if (p.addend) {
            const auto pair = pair_of(Parts::kDx, at);
            v[0] += T::load(pair[0]), v[1] += T::load(pair[1]);
          }
          Vector<Value, 2> stored = {T::store(v[0]), T::store(v[1])};
          if constexpr (kMasked) {
            const auto pair = pair_of(Parts::kInput + read_x, at);
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              const float before_relu = T::load(pair[q]), z = fmaf(scale(j, q), before_relu, shift(j, q));
              if (z <= T::kLargestZero) stored[q] = T::store(0.0f);
              const float u = T::load(stored[q]);  // sums are of what is stored
              sums[j][q] += u;
              products[j][q] = fmaf(u, before_relu - mean(j, q), products[j][q]);
            }
          }
          memcpy(shared + Parts::kDx + at, &stored, sizeof(stored));
        }
      }
    }
    read_x = next(read_x, Input::kBytes, Parts::kInputStages);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  store(before);  // a block has a tile at least

  if constexpr (kMasked) {
    // Eight lanes and the warps of other rows hold the same columns.
    auto* all = reinterpret_cast<float*>(shared);
    const int warp = threadIdx.x / 32 % Dx::kWarpsM;
#pragma unroll
    for (int j = 0; j < Dx::kFragmentsN; ++j) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          sums[j][q] += __shfl_xor_sync(kWholeWarp, sums[j][q], lanes);
          products[j][q] += __shfl_xor_sync(kWholeWarp, products[j][q], lanes);
        }
        if (lane < 4) {
          all[2 * warp * kC + fragment_column<Dx>(j) + q] = sums[j][q];
          all[(2 * warp + 1) * kC + fragment_column<Dx>(j) + q] = products[j][q];
        }
      }
    }
    __syncthreads();
    auto* out = static_cast<float*>(p.sums) + blockIdx.x * int64_t{2} * s.c;
    for (int i = threadIdx.x; i < 2 * kC; i += Parts::kBlockThreads) {
      float sum = all[i];
#pragma unroll
      for (int w = 1; w < Dx::kWarpsM; ++w) sum += all[2 * w * kC + i];
      if (i % kC < s.c) out[i / kC * s.c + i % kC] = sum;
    }
  }
  float* partial = p.workspace + blockIdx.x * (int64_t{s.k} * s.c);
  for_each_pair<typename Parts::Dw>(dw, [&](int row, int column, int, float v0, float v1) {
    if (row < s.k && column < s.c) store_vector<2>(partial + int64_t{row} * s.c + column, {v0, v1});
  });
#endif
}

}  // namespace

cudaError_t backward(const BackwardParams& p, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  const auto blocks = static_cast<unsigned>(one_read_tiles(s, p.dtype));
  const cudaError_t error = dispatch_conv_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(typename T::Value) == 2) {
      const auto launch = [&](auto k, auto c) {
        const auto with = [&](auto prologue) {
          using Parts = Backward<T, k.value, c.value>;
          return launch_conv<BackwardParams>(backward_kernel<T, k.value, c.value, decltype(prologue)>, p, dim3(blocks),
                                             Parts::kBlockThreads, Parts::kSharedBytes, Parts::kSharedBytes, stream);
        };
        return p.coefficients ? with(AffineRelu{}) : with(Raw{});
      };
      using Narrow = std::integral_constant<int, kNarrow>;
      using Wide = std::integral_constant<int, kWide>;
      if (s.k > kNarrow) return launch(Wide{}, Narrow{});
      return s.c > kNarrow ? launch(Narrow{}, Wide{}) : launch(Narrow{}, Narrow{});
    }
    return cudaErrorInvalidValue;
  });
  if (error != cudaSuccess) return error;
  return launch_add_splits(p.workspace, static_cast<int>(blocks), int64_t{s.k} * s.c, p.dw, p.dw_dtype, stream);
}

}  // namespace resnet_fused::cuda
