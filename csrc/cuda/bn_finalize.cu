// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The small kernels between two passes: tiles are merged, per-channel vectors come out. Warps read neighbouring
// channels; the kLanes threads of a channel take every kLanes-th tile and are merged in their order. Many tiles are
// merged twice: first by a block per group of them (merge_groups), then the groups.
//
// Reads every tile once, and each channel's parameters; writes each vector once, groups once more.
#include "device/reduce.cuh"
#include "device/types.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace resnet_fused::cuda {
namespace {

constexpr int kLanes = 16;
// Tiles that a thread loads before it merges them.
template <class Part>
constexpr int kHeld = sizeof(Part) > 16 ? 4 : 8;
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

// The union of a channel's tiles begin ... end - 1, `tile(t)` being the t-th; the result as of merge_lanes.
template <class Part, class Tile>
__device__ Part merge_tiles(int64_t begin, int64_t end, Tile tile) {
  constexpr int kParts = kHeld<Part>;
  Part total{};
  for (int64_t t = begin + threadIdx.y; t < end; t += kLanes * kParts) {
    Part held[kParts];
#pragma unroll
    for (int u = 0; u < kParts; ++u) held[u] = t + u * kLanes < end ? tile(t + u * kLanes) : Part{};
#pragma unroll
    for (int u = 0; u < kParts; ++u) total.merge(held[u]);
  }
  merge_lanes(total);
  return total;
}

template <class Acc>
__device__ Moments<Acc> merge_moments(const void* statistics, int64_t channels, int64_t c, int64_t begin, int64_t end) {
  return merge_tiles<Moments<Acc>>(begin, end, [=](int64_t t) -> Moments<Acc> {
    const Acc* tile = static_cast<const Acc*>(statistics) + t * kStatisticsRows * channels + c;
    return {tile[kCount * channels], tile[kTileMean * channels], tile[kM2 * channels]};
  });
}

struct BackwardSums {
  double grad, product;

  __device__ void merge(const BackwardSums& other) {
    grad += other.grad;
    product += other.product;
  }
};

// `rows` of a tile, of which the first and `product_row` are summed.
template <class Acc>
__device__ BackwardSums merge_sums(const void* sums, int64_t rows, int64_t product_row, int64_t channels, int64_t c,
                                   int64_t begin, int64_t end) {
  return merge_tiles<BackwardSums>(begin, end, [=](int64_t t) -> BackwardSums {
    const Acc* tile = static_cast<const Acc*>(sums) + t * rows * channels + c;
    return {tile[0], tile[product_row * channels]};
  });
}

// The tiles of group blockIdx.y.
__device__ int64_t group_begin(int64_t tiles, int64_t group) { return tiles * group / gridDim.y; }

template <class Acc>
__global__ void __launch_bounds__(kLanes* kWarpThreads, kBlocks)
    group_statistics(const void* statistics, int64_t tiles, int64_t channels, void* groups) {
  const int64_t c = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  const int64_t end = c < channels ? group_begin(tiles, blockIdx.y + 1) : 0;
  const auto total = merge_moments<Acc>(statistics, channels, c, group_begin(tiles, blockIdx.y), end);
  if (threadIdx.y != 0 || c >= channels) return;
  Acc* out = static_cast<Acc*>(groups) + blockIdx.y * kStatisticsRows * channels + c;
  out[kCount * channels] = total.count;
  out[kTileMean * channels] = total.mean;
  out[kM2 * channels] = total.m2;
}

template <class Acc>
__global__ void __launch_bounds__(kLanes* kWarpThreads, kBlocks) group_sums(const BackwardFinalizeParams p) {
  const int64_t c = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  const int64_t end = c < p.channels ? group_begin(p.tiles, blockIdx.y + 1) : 0;
  const auto total =
      merge_sums<Acc>(p.sums, p.sums_rows, 1 + p.branch, p.channels, c, group_begin(p.tiles, blockIdx.y), end);
  if (threadIdx.y != 0 || c >= p.channels) return;
  double* out = p.workspace + blockIdx.y * 2 * p.channels + c;
  out[0] = total.grad;
  out[p.channels] = total.product;
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
  const auto total = merge_moments<Acc>(p.statistics, p.channels, c, 0, c < p.channels ? p.tiles : 0);
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

// dy = a*g + b*y + c with a = scale, b = -scale*invstd*d_gamma/M, c = scale*(mean*invstd*d_gamma - d_beta)/M
// (Ioffe & Szegedy 2015, section 3, solved for dy): b and c of a channel, `per_value` being 1/M.
template <class Acc>
__device__ void write_shares(Acc* out, const Acc* forward, int64_t channels, double grad_weight, double grad_bias,
                             double per_value) {
  const double mean = forward[kMean * channels];
  const double invstd = forward[kInvstd * channels];
  const double factor = forward[kScale * channels] * per_value;
  out[kB * channels] = static_cast<Acc>(-factor * invstd * grad_weight);
  out[kC * channels] = static_cast<Acc>(factor * (mean * invstd * grad_weight - grad_bias));
}

// `Tile`: double where the sums are those of groups.
template <class Acc, class Tile>
__global__ void __launch_bounds__(kLanes* kWarpThreads, kBlocks)
    backward_finalize_channels(const BackwardFinalizeParams p) {
  const int64_t channel = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  const auto total =
      merge_sums<Tile>(p.sums, p.sums_rows, 1 + p.branch, p.channels, channel, 0, channel < p.channels ? p.tiles : 0);
  if (threadIdx.y != 0 || channel >= p.channels) return;

  const auto* forward = static_cast<const Acc*>(p.coefficients) + channel;
  const double grad_weight = total.product * forward[kInvstd * p.channels];
  auto* out = static_cast<Acc*>(p.backward_coefficients) + channel;
  out[kGradWeight * p.channels] = static_cast<Acc>(grad_weight);
  out[kGradBias * p.channels] = static_cast<Acc>(total.grad);
  out[kA * p.channels] = forward[kScale * p.channels];
  const double per_value = p.batch_statistics ? 1.0 / static_cast<double>(p.count) : 0.0;
  write_shares(out, forward, p.channels, grad_weight, total.grad, per_value);
}

// b and c over the values of all processes, in the order of their ranks. Reads what they sent once, writes two rows.
template <class Acc>
__global__ void backward_merge_channels(const BackwardMergeParams p) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= p.channels) return;
  double grad_weight = 0, grad_bias = 0, count = 0;
  for (int64_t i = 0; i < p.processes; ++i) {
    const Acc* of_process = static_cast<const Acc*>(p.gathered) + i * p.rows * p.channels + c;
    grad_weight += of_process[2 * p.branch * p.channels];
    grad_bias += of_process[(2 * p.branch + 1) * p.channels];
    count += of_process[(p.rows - 1) * p.channels];
  }
  const auto* forward = static_cast<const Acc*>(p.coefficients) + c;
  auto* out = static_cast<Acc*>(p.backward_coefficients) + c;
  write_shares(out, forward, p.channels, grad_weight, grad_bias, 1.0 / count);
}

dim3 blocks_of(int64_t channels, int64_t groups = 1) {
  return dim3(static_cast<unsigned>(ceil_div(channels, kWarpThreads)), static_cast<unsigned>(groups));
}

constexpr dim3 kBlock(kWarpThreads, kLanes);

// Many tiles become those of groups, in the workspace.
template <class Acc, class Params>
void group_first(Params& p, cudaStream_t stream) {
  if (const int64_t groups = merge_groups(p.tiles)) {
    group_statistics<Acc>
        <<<blocks_of(p.channels, groups), kBlock, 0, stream>>>(p.statistics, p.tiles, p.channels, p.workspace);
    p.statistics = p.workspace;
    p.tiles = groups;
  }
}

template <class Acc>
cudaError_t launch_merge_statistics(MergeStatisticsParams p, cudaStream_t stream) {
  group_first<Acc>(p, stream);
  group_statistics<Acc><<<blocks_of(p.channels), kBlock, 0, stream>>>(p.statistics, p.tiles, p.channels, p.merged);
  return cudaGetLastError();
}

template <class Acc>
cudaError_t launch_finalize(FinalizeParams p, cudaStream_t stream) {
  group_first<Acc>(p, stream);
  finalize_channels<Acc><<<blocks_of(p.channels), kBlock, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class Acc>
cudaError_t launch_backward_finalize(BackwardFinalizeParams p, cudaStream_t stream) {
  if (const int64_t groups = merge_groups(p.tiles)) {
    group_sums<Acc><<<blocks_of(p.channels, groups), kBlock, 0, stream>>>(p);
    p.sums = p.workspace;
    p.tiles = groups;
    p.sums_rows = 2;
    p.branch = 0;
    backward_finalize_channels<Acc, double><<<blocks_of(p.channels), kBlock, 0, stream>>>(p);
  } else {
    backward_finalize_channels<Acc, Acc><<<blocks_of(p.channels), kBlock, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t merge_statistics(const MergeStatisticsParams& p, cudaStream_t stream) {
  return p.double_precision ? launch_merge_statistics<double>(p, stream) : launch_merge_statistics<float>(p, stream);
}

cudaError_t finalize(const FinalizeParams& p, cudaStream_t stream) {
  // The cumulative average needs the new count in every block.
  if (p.num_batches_tracked && p.momentum < 0) increment<<<1, 1, 0, stream>>>(p.num_batches_tracked);
  return p.double_precision ? launch_finalize<double>(p, stream) : launch_finalize<float>(p, stream);
}

cudaError_t coefficients(const CoefficientsParams& p, cudaStream_t stream) {
  const auto kernel = p.double_precision ? frozen_coefficients<double> : frozen_coefficients<float>;
  kernel<<<blocks_of(p.channels), kWarpThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream) {
  return p.double_precision ? launch_backward_finalize<double>(p, stream) : launch_backward_finalize<float>(p, stream);
}

cudaError_t backward_merge(const BackwardMergeParams& p, cudaStream_t stream) {
  const auto kernel = p.double_precision ? backward_merge_channels<double> : backward_merge_channels<float>;
  kernel<<<blocks_of(p.channels), kWarpThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
