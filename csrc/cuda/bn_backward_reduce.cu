// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The sums of one or two batch norms' backward over every tile of the gradient behind the ReLU: g, g*(y - mean) and,
// for a second batch norm, g*(shortcut - its mean). Centred sums do not cancel when the mean is large against the
// standard deviation. Reads each operand once; writes two or three sums per tile and channel, and where they are wanted
// the masked gradient and, without a shortcut, the activation relu(scale*y + shift).
#include "elementwise.cuh"
#include "join.cuh"
#include "kernels.h"

namespace resnet_fused::cuda {
namespace {

// An element-wise Op whose results are summed; its outputs, the masked gradient and the activation, are written if
// wanted.
template <class T, Shortcut kShortcut>
struct BackwardReduce {
  using Storage = T;
  using Value = typename T::Value;
  using Acc = typename T::Acc;
  static constexpr bool kPair = kShortcut == Shortcut::kAffine;
  static constexpr int kJoin = kJoinCoefficients<kShortcut>;
  static constexpr int kInputs = kBackwardInputs<kShortcut>;
  static constexpr int kOutputs = kShortcut == Shortcut::kNone ? 2 : 1;
  static constexpr int kSums = kPair ? 3 : 2;
  static constexpr int kCoefficients = kJoin + kSums - 1;

  const Value* inputs[kInputs];
  Value* outputs[kOutputs];
  const Acc* coefficients[kCoefficients];
  Acc* sums;
  bool relu, from_output;

  explicit BackwardReduce(const BackwardReduceParams& p)
      : sums(static_cast<Acc*>(p.sums)), relu(p.mask.relu), from_output(p.mask.z != nullptr) {
    fill_backward_inputs<kShortcut>(inputs, p.grad, p.y, p.mask, p.shortcut);
    if constexpr (kShortcut == Shortcut::kPlain) {
      if (!relu || from_output) inputs[kShortcutInput] = nullptr;
    }
    outputs[0] = static_cast<Value*>(p.masked_grad);
    if constexpr (kOutputs == 2) outputs[1] = static_cast<Value*>(p.activation);
    fill_join_coefficients<kShortcut>(coefficients, p.extent.channels, p.coefficients, p.shortcut);
    coefficients[kJoin] = static_cast<const Acc*>(p.coefficients) + kMean * p.extent.channels;
    if constexpr (kPair) {
      coefficients[kJoin + 1] = static_cast<const Acc*>(p.shortcut.coefficients) + kMean * p.extent.channels;
    }
  }

  // `total(s, e)`: where element e's share of sum s belongs. `masked` receives the gradient behind the ReLU.
  template <int kWidth, class Coefficient, class Total>
  __device__ void add(const Vector<Value, kWidth> (&raw)[kInputs], Coefficient coefficient, Total total,
                      Vector<Value, kWidth>& masked) const {
    Acc g[kWidth];
    masked_grad<T, kShortcut, kWidth>(relu, from_output, raw, coefficient, g);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      masked[e] = T::store(g[e]);
      total(0, e) += g[e];
      total(1, e) = fma(g[e], T::load(raw[kY][e]) - coefficient(kJoin, e), total(1, e));
      if constexpr (kPair) {
        total(2, e) = fma(g[e], T::load(raw[kShortcutInput][e]) - coefficient(kJoin + 1, e), total(2, e));
      }
    }
  }

  template <int kWidth, class Coefficient>
  __device__ Vector<Value, kWidth> activation(const Vector<Value, kWidth>& y, Coefficient coefficient) const {
    Vector<Value, kWidth> result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      result[e] = T::store(relu_of(join<Shortcut::kNone>(coefficient, e, T::load(y[e]), Acc(0))));
    }
    return result;
  }
};

template <class Op, int kWidth, class Coefficient, class Total>
__device__ void add_vector(const Op& op, int64_t offset, const Vector<typename Op::Value, kWidth> (&raw)[Op::kInputs],
                           Coefficient coefficient, Total total) {
  Vector<typename Op::Value, kWidth> masked;
  op.add(raw, coefficient, total, masked);
  if (op.outputs[0]) store_vector(op.outputs[0] + offset, masked);
  if constexpr (Op::kOutputs == 2) {
    if (op.outputs[1]) store_vector(op.outputs[1] + offset, op.activation(raw[kY], coefficient));
  }
}

// channels_last. Block (x, y): x vectors of channels, y rows at a time; grid: channels, tiles.
template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads) reduce_rows(const Op op, int64_t rows, int64_t channels) {
  using Acc = typename Op::Acc;
  using Slots = Interleaved<Acc, kWidth>;
  __shared__ __align__(kVectorBytes) Acc staged[Op::kCoefficients][kStagedSize<Acc, kWidth>];
  __shared__ __align__(kVectorBytes) Acc parts[Op::kSums][Slots::template kSize<kThreads>];

  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x * kWidth;
  const int64_t channel = first + threadIdx.x * kWidth;
  stage_coefficients<Op, kWidth>(op, first, channels, staged);
  Acc sums[Op::kSums][kWidth] = {};
  if (channel < channels) {
    Acc c[Op::kCoefficients][kWidth];
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) Slots::template get<kWarpThreads>(staged[k], threadIdx.x, c[k]);
    const auto coefficient = [&](int k, int e) { return c[k][e]; };
    const auto total = [&](int s, int e) -> Acc& { return sums[s][e]; };
    constexpr int kUnroll = kInFlight<Op>;
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y * kUnroll) {
      RawInputs<Op, kWidth> raw;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t r = row + u * blockDim.y;
        if (r < end) load_inputs<Op, kWidth>(op, r * channels + channel, raw[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t r = row + u * blockDim.y;
        if (r < end) add_vector<Op, kWidth>(op, r * channels + channel, raw[u], coefficient, total);
      }
    }
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) Slots::template put<kThreads>(parts[s], thread, sums[s]);
  __syncthreads();

  const int slot = thread;  // a channel of the block's x * kWidth <= kThreads
  if (slot >= blockDim.x * kWidth || first + slot >= channels) return;
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) {
    Acc total = 0;
    for (int part = 0; part < blockDim.y; ++part) {
      total += parts[s][Slots::template index<kThreads>(part * blockDim.x + slot / kWidth, slot % kWidth)];
    }
    op.sums[(int64_t{blockIdx.y} * Op::kSums + s) * channels + first + slot] = total;
  }
}

// Contiguous: a block takes the range of vectors that is its tile of one channel, plane after plane.
template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads) reduce_planes(const Op op, const Extent extent) {
  using Acc = typename Op::Acc;
  const int64_t vectors = extent.outer * (extent.inner / kWidth);
  const int64_t begin = vectors * blockIdx.y / gridDim.y, end = vectors * (blockIdx.y + 1) / gridDim.y;
  for (int64_t channel = blockIdx.x; channel < extent.channels; channel += gridDim.x) {
    Acc c[Op::kCoefficients], sums[Op::kSums] = {};
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) c[k] = op.coefficients[k][channel];
    const auto coefficient = [&](int k, int) { return c[k]; };
    const auto total = [&](int s, int) -> Acc& { return sums[s]; };
    constexpr int kUnroll = kInFlight<Op>;
    for (int64_t v = begin + threadIdx.x; v < end; v += kThreads * kUnroll) {
      RawInputs<Op, kWidth> raw;
      int64_t offset[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        offset[u] = offset_of_vector<kWidth>(extent, channel, v + u * kThreads);
        if (v + u * kThreads < end) load_inputs<Op, kWidth>(op, offset[u], raw[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (v + u * kThreads < end) add_vector<Op, kWidth>(op, offset[u], raw[u], coefficient, total);
      }
    }
#pragma unroll
    for (int s = 0; s < Op::kSums; ++s) {
      Sum<Acc> part{sums[s]};
      merge_over_block<kThreads>(part);
      if (threadIdx.x == 0) op.sums[(int64_t{blockIdx.y} * Op::kSums + s) * extent.channels + channel] = part.value;
    }
  }
}

template <class Op, int kWidth>
cudaError_t launch_reduce(const Op& op, const Extent& extent, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(reduction_tiles(extent));
  if (extent.inner == 1) {
    const int x = threads_along_channels(extent.channels, kWidth);
    const dim3 grid(static_cast<unsigned>(ceil_div(extent.channels, int64_t{x} * kWidth)), tiles);
    reduce_rows<Op, kWidth><<<grid, dim3(x, kThreads / x), 0, stream>>>(op, extent.outer, extent.channels);
  } else {
    reduce_planes<Op, kWidth><<<dim3(grid_size(extent.channels), tiles), kThreads, 0, stream>>>(op, extent);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t backward_reduce(const BackwardReduceParams& p, cudaStream_t stream) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return dispatch_shortcut(p.shortcut, [&](auto shortcut) {
      using Op = BackwardReduce<decltype(t), shortcut.value>;
      constexpr int kWidth = kVectorWidth<decltype(t)>;
      const Op op(p);
      const int64_t run = p.extent.inner == 1 ? p.extent.channels : p.extent.inner;
      return run % kWidth == 0 && all_aligned(op.inputs) && all_aligned(op.outputs)
                 ? launch_reduce<Op, kWidth>(op, p.extent, stream)
                 : launch_reduce<Op, 1>(op, p.extent, stream);
    });
  });
}

}  // namespace resnet_fused::cuda
