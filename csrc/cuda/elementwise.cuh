// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The frame of all element-wise kernels: reads the operands once, in 16-byte accesses where the layout allows, applies
// an Op with its per-channel coefficients, writes the results once.
//
// An Op is passed to the kernel by value and provides
//   Storage                              a storage type (types.cuh)
//   kInputs, kOutputs, kCoefficients     how many
//   inputs, outputs, coefficients        arrays of pointers; null inputs are not read, null outputs not written
//   operator()(raw, coefficient, result) one vector: raw[input] and result[output] are Vectors of Storage::Value,
//                                        coefficient(k, e) is the k-th coefficient of element e
#pragma once

#include <cstdint>

#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "launch.cuh"
#include "layout.h"

namespace resnet_fused::cuda {

// Rows or vectors per thread whose loads are in flight together.
template <class Op>
inline constexpr int kInFlight = Op::kInputs <= 2 ? 4 : 2;

template <class Op, int kWidth>
using RawInputs = Vector<typename Op::Storage::Value, kWidth>[kInFlight<Op>][Op::kInputs];

template <class Op, int kWidth>
__device__ void load_inputs(const Op& op, int64_t offset,
                            Vector<typename Op::Storage::Value, kWidth> (&raw)[Op::kInputs]) {
#pragma unroll
  for (int i = 0; i < Op::kInputs; ++i) {
    if (op.inputs[i]) raw[i] = load_vector<kWidth>(op.inputs[i] + offset);
  }
}

// Where vector v of one channel's planes begins: v counts through the channel's plane of every image.
template <int kWidth>
__device__ int64_t offset_of_vector(const Extent& extent, int64_t channel, int64_t v) {
  const int64_t per_plane = extent.inner / kWidth;
  // A division in 64 bits costs several times one in 32.
  const int64_t image =
      v >> 32 | per_plane >> 32 ? v / per_plane : static_cast<uint32_t>(v) / static_cast<uint32_t>(per_plane);
  return (image * extent.channels + channel) * extent.inner + (v - image * per_plane) * kWidth;
}

template <class Op, int kWidth, class Coefficient>
__device__ void compute_and_store(const Op& op, int64_t offset,
                                  const Vector<typename Op::Storage::Value, kWidth> (&raw)[Op::kInputs],
                                  Coefficient coefficient) {
  Vector<typename Op::Storage::Value, kWidth> result[Op::kOutputs];
  op(raw, coefficient, result);
#pragma unroll
  for (int o = 0; o < Op::kOutputs; ++o) {
    if (op.outputs[o]) store_vector(op.outputs[o] + offset, result[o]);
  }
}

template <class Acc, int kWidth>
inline constexpr int kStagedSize = Interleaved<Acc, kWidth>::template kSize<kWarpThreads>;

// Copies the coefficients of the block's channels, from `first` on, into shared memory: once instead of once per row of
// threads. Every thread of the block has to call it.
template <class Op, int kWidth, class Acc>
__device__ void stage_coefficients(const Op& op, int64_t first, int64_t channels,
                                   Acc (&staged)[Op::kCoefficients][kStagedSize<Acc, kWidth>]) {
  const int count = blockDim.x * kWidth;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count && first + i < channels; i += kThreads) {
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) {
      staged[k][Interleaved<Acc, kWidth>::template index<kWarpThreads>(i / kWidth, i % kWidth)] =
          op.coefficients[k][first + i];
    }
  }
  __syncthreads();
}

// channels_last: [rows, channels]. Block (x, y): x vectors of channels, y rows at a time; grid.x covers the channels.
template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads) elementwise_rows(const Op op, int64_t rows, int64_t channels) {
  using Acc = typename Op::Storage::Acc;
  using Slots = Interleaved<Acc, kWidth>;
  __shared__ __align__(kVectorBytes) Acc staged[Op::kCoefficients][kStagedSize<Acc, kWidth>];

  const int64_t first = int64_t{blockIdx.x} * blockDim.x * kWidth;
  const int64_t channel = first + threadIdx.x * kWidth;
  stage_coefficients<Op, kWidth>(op, first, channels, staged);
  if (channel >= channels) return;
  Acc c[Op::kCoefficients][kWidth];
#pragma unroll
  for (int k = 0; k < Op::kCoefficients; ++k) Slots::template get<kWarpThreads>(staged[k], threadIdx.x, c[k]);
  const auto coefficient = [&](int k, int e) { return c[k][e]; };

  constexpr int kUnroll = kInFlight<Op>;
  const int64_t step = int64_t{gridDim.y} * blockDim.y * kUnroll;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y * kUnroll + threadIdx.y; row < rows; row += step) {
    RawInputs<Op, kWidth> raw;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * blockDim.y;
      if (r < rows) load_inputs<Op, kWidth>(op, r * channels + channel, raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * blockDim.y;
      if (r < rows) compute_and_store<Op, kWidth>(op, r * channels + channel, raw[u], coefficient);
    }
  }
}

// Contiguous: `planes` planes of `inner` values, plane p of channel p % channels. Block (x, y): y planes at a time, x
// vectors of each; grid.y cuts the planes.
template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads)
    elementwise_planes(const Op op, int64_t planes, int64_t inner, int64_t channels) {
  using Acc = typename Op::Storage::Acc;
  constexpr int kUnroll = kInFlight<Op>;
  const int64_t vectors = inner / kWidth;
  const int64_t step = int64_t{gridDim.y} * blockDim.x * kUnroll;
  for (int64_t plane = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; plane < planes;
       plane += int64_t{gridDim.x} * blockDim.y) {
    Acc c[Op::kCoefficients];
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) c[k] = op.coefficients[k][plane % channels];
    const auto coefficient = [&](int k, int) { return c[k]; };
    for (int64_t v = int64_t{blockIdx.y} * blockDim.x * kUnroll + threadIdx.x; v < vectors; v += step) {
      RawInputs<Op, kWidth> raw;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t w = v + u * blockDim.x;
        if (w < vectors) load_inputs<Op, kWidth>(op, plane * inner + w * kWidth, raw[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t w = v + u * blockDim.x;
        if (w < vectors) compute_and_store<Op, kWidth>(op, plane * inner + w * kWidth, raw[u], coefficient);
      }
    }
  }
}

template <class Op, int kWidth>
cudaError_t launch_elementwise(const Op& op, const Extent& extent, cudaStream_t stream) {
  constexpr int kUnroll = kInFlight<Op>;
  if (extent.inner == 1) {
    const auto kernel = elementwise_rows<Op, kWidth>;
    const int x = threads_along_channels(extent.channels, kWidth), y = kThreads / x;
    const int64_t channel_blocks = ceil_div(extent.channels, int64_t{x} * kWidth);
    const int64_t row_blocks = ceil_div(extent.outer, int64_t{y} * kUnroll);
    const int64_t resident = ceil_div(resident_blocks(reinterpret_cast<const void*>(kernel)), channel_blocks);
    const dim3 grid(static_cast<unsigned>(channel_blocks), grid_size(row_blocks < resident ? row_blocks : resident));
    kernel<<<grid, dim3(x, y), 0, stream>>>(op, extent.outer, extent.channels);
  } else {
    const auto kernel = elementwise_planes<Op, kWidth>;
    const int64_t planes = extent.outer * extent.channels;
    const int64_t vectors = extent.inner / kWidth;
    const int x = power_of_two(ceil_div(vectors, kUnroll), kThreads), y = kThreads / x;
    const int64_t plane_blocks = ceil_div(planes, y);
    const int64_t resident = resident_blocks(reinterpret_cast<const void*>(kernel));
    const int64_t cuts = ceil_div(vectors, int64_t{x} * kUnroll);
    const int64_t wanted = ceil_div(resident, plane_blocks);
    const dim3 grid(grid_size(plane_blocks < resident ? plane_blocks : resident),
                    grid_size(cuts < wanted ? cuts : wanted));
    kernel<<<grid, dim3(x, y), 0, stream>>>(op, planes, extent.inner, extent.channels);
  }
  return cudaGetLastError();
}

// In vectors where every row or plane starts at a multiple of 16 bytes, else value by value.
template <class Op>
cudaError_t run_elementwise(const Op& op, const Extent& extent, cudaStream_t stream) {
  constexpr int kWidth = kVectorWidth<typename Op::Storage>;
  const int64_t run = extent.inner == 1 ? extent.channels : extent.inner;
  if (run % kWidth == 0 && all_aligned(op.inputs) && all_aligned(op.outputs)) {
    return launch_elementwise<Op, kWidth>(op, extent, stream);
  }
  return launch_elementwise<Op, 1>(op, extent, stream);
}

}  // namespace resnet_fused::cuda
