// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The small kernels between two passes: tiles are merged, per-channel vectors come out. Warps read neighbouring
// channels; the kLanes threads of a channel take every kLanes-th tile and are merged in their order.
#include "device/reduce.cuh"
#include "device/types.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr int kLanes = 16;
// At least, per multiprocessor: without the bound ptxas spills to reach more.
constexpr int kBlocks = 1;

__device__ double load(const ChannelVector& v, int64_t i) {
  switch (v.dtype) {
    case DType::Float64: return static_cast<const double*>(v.data)[i];
    case DType::Float32: return static_cast<const float*>(v.data)[i];
    case DType::BFloat16: return BFloat16::load(static_cast<const BFloat16::Value*>(v.data)[i]);
    case DType::Float16: return Float16::load(static_cast<const Float16::Value*>(v.data)[i]);
  }
  return 0;
}

__device__ void store(const ChannelVector& v, int64_t i, double value) {
  switch (v.dtype) {
    case DType::Float64: static_cast<double*>(v.data)[i] = value; break;
    case DType::Float32: static_cast<float*>(v.data)[i] = static_cast<float>(value); break;
    case DType::BFloat16: static_cast<BFloat16::Value*>(v.data)[i] = BFloat16::store(static_cast<float>(value)); break;
    case DType::Float16: static_cast<Float16::Value*>(v.data)[i] = Float16::store(static_cast<float>(value)); break;
  }
}

// Merges the kLanes Parts of every channel of a block; the result is that of threads with threadIdx.y == 0.
template <class Part>
__device__ void merge_lanes(Part& part) {
  __shared__ Part parts[kLanes][kWarpThreads];
  parts[threadIdx.y][threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int lane = 1; lane < kLanes; ++lane) part.merge(parts[lane][threadIdx.x]);
  }
}

template <class Acc>
__device__ void write_coefficients(Acc* coefficients, int64_t channels, int64_t c, double mean, double invstd,
                                   const ChannelVector& weight, const ChannelVector& bias) {
  const double scale = (weight ? load(weight, c) : 1.0) * invstd;
  coefficients[kMean * channels + c] = static_cast<Acc>(mean);
  coefficients[kInvstd * channels + c] = static_cast<Acc>(invstd);
  coefficients[kScale * channels + c] = static_cast<Acc>(scale);
  coefficients[kShift * channels + c] = static_cast<Acc>((bias ? load(bias, c) : 0.0) - mean * scale);
}

__global__ void increment(int64_t* counter) { ++*counter; }

template <class Acc>
__global__ void __launch_bounds__(kLanes* kWarpThreads, kBlocks) finalize_channels(const FinalizeParams p) {
  const int64_t c = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  Moments<Acc> total{0, 0, 0};
  if (c < p.channels) {
    const auto* tiles = static_cast<const Acc*>(p.statistics) + c;
#pragma unroll 4
    for (int64_t t = threadIdx.y; t < p.tiles; t += kLanes) {
      const Acc* tile = tiles + t * kStatisticsRows * p.channels;
      total.merge({tile[kCount * p.channels], tile[kTileMean * p.channels], tile[kM2 * p.channels]});
    }
  }
  merge_lanes(total);
  if (threadIdx.y != 0 || c >= p.channels) return;

  const double mean = total.mean, m2 = total.m2, count = total.count;
  write_coefficients(static_cast<Acc*>(p.coefficients), p.channels, c, mean, 1.0 / sqrt(m2 / count + p.eps), p.weight,
                     p.bias);
  double momentum = p.momentum;
  if (p.num_batches_tracked) {
    if (momentum < 0) {
      momentum = 1.0 / static_cast<double>(*p.num_batches_tracked);  // already incremented
    } else if (c == 0) {
      ++*p.num_batches_tracked;
    }
  }
  if (p.running_mean) store(p.running_mean, c, (1 - momentum) * load(p.running_mean, c) + momentum * mean);
  if (p.running_var) {
    store(p.running_var, c, (1 - momentum) * load(p.running_var, c) + momentum * (m2 / (count - 1)));
  }
}

template <class Acc>
__global__ void frozen_coefficients(const CoefficientsParams p) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= p.channels) return;
  write_coefficients(static_cast<Acc*>(p.coefficients), p.channels, c, load(p.running_mean, c),
                     1.0 / sqrt(load(p.running_var, c) + p.eps), p.weight, p.bias);
}

// a = scale, b = -scale*invstd*d_gamma/M, c = scale*(mean*invstd*d_gamma - d_beta)/M (Ioffe & Szegedy 2015, section 3,
// solved for dy).
template <class Acc>
__global__ void __launch_bounds__(kLanes* kWarpThreads, kBlocks)
    backward_finalize_channels(const BackwardFinalizeParams p) {
  const int64_t channel = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  Sum<double> grad{0}, product{0};
  if (channel < p.channels) {
    const auto* tiles = static_cast<const Acc*>(p.sums) + channel;
#pragma unroll 4
    for (int64_t t = threadIdx.y; t < p.tiles; t += kLanes) {
      const Acc* tile = tiles + t * p.sums_rows * p.channels;
      grad.value += tile[0];
      product.value += tile[(1 + p.branch) * p.channels];
    }
  }
  merge_lanes(grad);
  __syncthreads();  // both merges use the same shared memory
  merge_lanes(product);
  if (threadIdx.y != 0 || channel >= p.channels) return;

  const auto* forward = static_cast<const Acc*>(p.coefficients) + channel;
  const double mean = forward[kMean * p.channels];
  const double invstd = forward[kInvstd * p.channels];
  const double scale = forward[kScale * p.channels];
  const double grad_weight = product.value * invstd;
  const double per_value = p.batch_statistics ? scale / static_cast<double>(p.count) : 0.0;
  auto* out = static_cast<Acc*>(p.backward_coefficients) + channel;
  out[kGradWeight * p.channels] = static_cast<Acc>(grad_weight);
  out[kGradBias * p.channels] = static_cast<Acc>(grad.value);
  out[kA * p.channels] = static_cast<Acc>(scale);
  out[kB * p.channels] = static_cast<Acc>(-per_value * invstd * grad_weight);
  out[kC * p.channels] = static_cast<Acc>(per_value * (mean * invstd * grad_weight - grad.value));
}

dim3 blocks_of(int64_t channels) { return dim3(static_cast<unsigned>(ceil_div(channels, kWarpThreads))); }

}  // namespace

cudaError_t finalize(const FinalizeParams& p, cudaStream_t stream) {
  // The cumulative average needs the new count in every block.
  if (p.num_batches_tracked && p.momentum < 0) increment<<<1, 1, 0, stream>>>(p.num_batches_tracked);
  const auto kernel = p.double_precision ? finalize_channels<double> : finalize_channels<float>;
  kernel<<<blocks_of(p.channels), dim3(kWarpThreads, kLanes), 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t coefficients(const CoefficientsParams& p, cudaStream_t stream) {
  const auto kernel = p.double_precision ? frozen_coefficients<double> : frozen_coefficients<float>;
  kernel<<<blocks_of(p.channels), kWarpThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream) {
  const auto kernel = p.double_precision ? backward_finalize_channels<double> : backward_finalize_channels<float>;
  kernel<<<blocks_of(p.channels), dim3(kWarpThreads, kLanes), 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
