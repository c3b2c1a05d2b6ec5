// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The CPU backend: picks the instruction set, spreads the kernels over threads, and merges what they leave.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "conv/kernels.h"
#include "kernels.h"

namespace resnet_fused::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  const ConvKernels* conv_kernels;
  const char* name;
};

bool converts_to_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// ATen's own choice, so that ATEN_CPU_CAPABILITY (default, avx2, avx512) rules both.
const Choice& choice() {
  static const Choice chosen = []() -> Choice {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512" && kernels_avx512.apply) {
      return {&kernels_avx512, converts_to_bfloat16() ? &conv_kernels_avx512_bf16 : &conv_kernels_avx512, "avx512"};
    }
    if ((capability == "AVX512" || capability == "AVX2") && kernels_avx2.apply) {
      return {&kernels_avx2, &conv_kernels_avx2, "avx2"};
    }
    return {&kernels_baseline, &conv_kernels_baseline, "baseline"};
  }();
  return chosen;
}

// About 32K values per thread and task: below, waking a thread costs more than the work.
int64_t grain(const Extent& extent, int64_t pieces) {
  constexpr int64_t kValuesPerTask = 32768;
  const int64_t values_per_piece = std::max<int64_t>(1, extent.numel() / std::max<int64_t>(1, pieces));
  return std::max<int64_t>(1, kValuesPerTask / values_per_piece);
}

template <class Params>
void for_slices(const Params& p, void (*kernel)(const Params&, int64_t, int64_t)) {
  const int64_t slices = slice_count(p.extent);
  at::parallel_for(0, slices, grain(p.extent, slices), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class Params>
void for_reduction(const Params& p, void* partials,
                   void (*kernel)(const Params&, void*, int64_t tile, int64_t channel_block)) {
  const ReductionGrid grid = reduction_grid(p.extent);
  const int64_t pieces = grid.tiles * grid.channel_blocks;
  at::parallel_for(0, pieces, grain(p.extent, pieces), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      kernel(p, partials, piece / grid.channel_blocks, piece % grid.channel_blocks);
    }
  });
}

double load(const ChannelVector& v, int64_t i) {
  switch (v.dtype) {
    case DType::Float64: return static_cast<const double*>(v.data)[i];
    case DType::Float32: return static_cast<const float*>(v.data)[i];
    case DType::BFloat16: return static_cast<const c10::BFloat16*>(v.data)[i];
    case DType::Float16: return static_cast<const c10::Half*>(v.data)[i];
  }
  return 0;
}

void store(const ChannelVector& v, int64_t i, double value) {
  switch (v.dtype) {
    case DType::Float64: static_cast<double*>(v.data)[i] = value; break;
    case DType::Float32: static_cast<float*>(v.data)[i] = static_cast<float>(value); break;
    case DType::BFloat16: static_cast<c10::BFloat16*>(v.data)[i] = static_cast<float>(value); break;
    case DType::Float16: static_cast<c10::Half*>(v.data)[i] = static_cast<float>(value); break;
  }
}

template <class Call>
void with_acc(bool double_precision, Call call) {
  double_precision ? call(double{}) : call(float{});
}

struct Moments {
  double count = 0, mean = 0, m2 = 0;
};

// Merges the tiles of channel c in their order (Chan, Golub & LeVeque 1979).
template <class Acc>
Moments merge_tiles(const void* statistics, int64_t tiles, int64_t channels, int64_t c) {
  Moments total;
  for (int64_t t = 0; t < tiles; ++t) {
    const Acc* tile = static_cast<const Acc*>(statistics) + t * kStatisticsRows * channels + c;
    const double count = tile[kCount * channels];
    if (count == 0) continue;
    const double delta = tile[kTileMean * channels] - total.mean;
    const double sum = total.count + count;
    total.mean += delta * (count / sum);
    total.m2 += tile[kM2 * channels] + delta * delta * (total.count * (count / sum));
    total.count = sum;
  }
  return total;
}

// Reductions merge their tiles before they return.
int64_t merged_tiles(const Extent&) { return 1; }
int64_t no_groups(int64_t) { return 0; }

void merge_statistics(const MergeStatisticsParams& p) {
  with_acc(p.double_precision, [&](auto zero) {
    using Acc = decltype(zero);
    Acc* out = static_cast<Acc*>(p.merged);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Moments m = merge_tiles<Acc>(p.statistics, p.tiles, p.channels, c);
      out[kCount * p.channels + c] = static_cast<Acc>(m.count);
      out[kTileMean * p.channels + c] = static_cast<Acc>(m.mean);
      out[kM2 * p.channels + c] = static_cast<Acc>(m.m2);
    }
  });
}

void statistics(const StatisticsParams& p) {
  with_acc(p.dtype == DType::Float64, [&](auto zero) {
    using Acc = decltype(zero);
    const int64_t channels = p.extent.channels;
    const int64_t tiles = reduction_grid(p.extent).tiles;
    std::vector<Acc> partials(tiles * kStatisticsRows * channels);
    for_reduction(p, partials.data(), kernels().statistics);
    merge_statistics({channels, tiles, p.dtype == DType::Float64, partials.data(), nullptr, p.statistics});
  });
}

template <class Acc>
void write_coefficients(void* coefficients, int64_t channels, int64_t c, double mean, double invstd,
                        const ChannelVector& weight, const ChannelVector& bias) {
  const double scale = (weight ? load(weight, c) : 1.0) * invstd;
  Acc* out = static_cast<Acc*>(coefficients) + c;
  out[kMean * channels] = static_cast<Acc>(mean);
  out[kInvstd * channels] = static_cast<Acc>(invstd);
  out[kScale * channels] = static_cast<Acc>(scale);
  out[kShift * channels] = static_cast<Acc>((bias ? load(bias, c) : 0.0) - mean * scale);
}

void finalize(const FinalizeParams& p) {
  double momentum = p.momentum;
  if (p.num_batches_tracked) {
    ++*p.num_batches_tracked;
    if (momentum < 0) momentum = 1.0 / static_cast<double>(*p.num_batches_tracked);
  }
  with_acc(p.double_precision, [&](auto zero) {
    using Acc = decltype(zero);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Moments m = merge_tiles<Acc>(p.statistics, p.tiles, p.channels, c);
      const double invstd = 1.0 / std::sqrt(m.m2 / m.count + p.eps);
      write_coefficients<Acc>(p.coefficients, p.channels, c, m.mean, invstd, p.weight, p.bias);
      if (p.running_mean) {
        store(p.running_mean, c, (1 - momentum) * load(p.running_mean, c) + momentum * m.mean);
      }
      if (p.running_var) {
        const double unbiased = m.m2 / (m.count - 1);
        store(p.running_var, c, (1 - momentum) * load(p.running_var, c) + momentum * unbiased);
      }
    }
  });
}

void coefficients(const CoefficientsParams& p) {
  with_acc(p.double_precision, [&](auto zero) {
    using Acc = decltype(zero);
    for (int64_t c = 0; c < p.channels; ++c) {
      const double invstd = 1.0 / std::sqrt(load(p.running_var, c) + p.eps);
      write_coefficients<Acc>(p.coefficients, p.channels, c, load(p.running_mean, c), invstd, p.weight, p.bias);
    }
  });
}

void apply(const ApplyParams& p) { for_slices(p, kernels().apply); }

void backward_reduce(const BackwardReduceParams& p) {
  with_acc(p.dtype == DType::Float64, [&](auto zero) {
    using Acc = decltype(zero);
    const int64_t row = (p.shortcut.coefficients ? 3 : 2) * p.extent.channels;
    const int64_t tiles = reduction_grid(p.extent).tiles;
    std::vector<Acc> partials(tiles * row);
    for_reduction(p, partials.data(), kernels().backward_reduce);
    Acc* out = static_cast<Acc*>(p.sums);
    for (int64_t i = 0; i < row; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tiles; ++t) sum += partials[t * row + i];
      out[i] = static_cast<Acc>(sum);
    }
  });
}

// dy = a*g + b*y + c with a = scale, b = -scale*invstd*d_gamma/M, c = scale*(mean*invstd*d_gamma - d_beta)/M
// (Ioffe & Szegedy 2015, section 3, solved for dy): b and c of channel c, `per_value` being 1/M.
template <class Acc>
void write_shares(Acc* out, const Acc* forward, int64_t channels, double grad_weight, double grad_bias,
                  double per_value) {
  const double mean = forward[kMean * channels];
  const double invstd = forward[kInvstd * channels];
  const double factor = forward[kScale * channels] * per_value;
  out[kB * channels] = static_cast<Acc>(-factor * invstd * grad_weight);
  out[kC * channels] = static_cast<Acc>(factor * (mean * invstd * grad_weight - grad_bias));
}

void backward_finalize(const BackwardFinalizeParams& p) {
  with_acc(p.double_precision, [&](auto zero) {
    using Acc = decltype(zero);
    const int64_t channels = p.channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Acc* forward = static_cast<const Acc*>(p.coefficients) + c;
      const double invstd = forward[kInvstd * channels];
      double grad_bias = 0, grad_weight = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        const Acc* sums = static_cast<const Acc*>(p.sums) + t * p.sums_rows * channels + c;
        grad_bias += sums[0];
        grad_weight += sums[(1 + p.branch) * channels] * invstd;
      }
      Acc* out = static_cast<Acc*>(p.backward_coefficients) + c;
      out[kGradWeight * channels] = static_cast<Acc>(grad_weight);
      out[kGradBias * channels] = static_cast<Acc>(grad_bias);
      out[kA * channels] = forward[kScale * channels];
      const double per_value = p.batch_statistics ? 1.0 / static_cast<double>(p.count) : 0.0;
      write_shares(out, forward, channels, grad_weight, grad_bias, per_value);
    }
  });
}

// b and c over the values of all processes.
void backward_merge(const BackwardMergeParams& p) {
  with_acc(p.double_precision, [&](auto zero) {
    using Acc = decltype(zero);
    const int64_t channels = p.channels;
    for (int64_t c = 0; c < channels; ++c) {
      double grad_weight = 0, grad_bias = 0, count = 0;
      for (int64_t i = 0; i < p.processes; ++i) {
        const Acc* of_process = static_cast<const Acc*>(p.gathered) + i * p.rows * channels + c;
        grad_weight += of_process[2 * p.branch * channels];
        grad_bias += of_process[(2 * p.branch + 1) * channels];
        count += of_process[(p.rows - 1) * channels];
      }
      const Acc* forward = static_cast<const Acc*>(p.coefficients) + c;
      Acc* out = static_cast<Acc*>(p.backward_coefficients) + c;
      write_shares(out, forward, channels, grad_weight, grad_bias, 1.0 / count);
    }
  });
}

void backward_apply(const BackwardApplyParams& p) { for_slices(p, kernels().backward_apply); }

void relu_backward_add(const ReluBackwardAddParams& p) { for_slices(p, kernels().relu_backward_add); }

}  // namespace

const Kernels& kernels() { return *choice().kernels; }

const char* instruction_set() { return choice().name; }

const ConvKernels& conv_kernels() { return *choice().conv_kernels; }

}  // namespace resnet_fused::cpu

namespace resnet_fused {

const Backend& cpu_backend() {
  static const Backend backend = {
      cpu::merged_tiles,      cpu::no_groups,      cpu::statistics,     cpu::merge_statistics,
      cpu::finalize,          cpu::coefficients,   cpu::apply,          cpu::backward_reduce,
      cpu::backward_finalize, cpu::backward_merge, cpu::backward_apply, cpu::relu_backward_add,
  };
  return backend;
}

}  // namespace resnet_fused
