// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "results.h"

#include <algorithm>

#include "microkernel.h"

namespace resnet_fused::cpu {
namespace {

// Of bfloat16 in inference alone: sums that stay in registers between products are saved and restored for each, which
// such short products do not make up for; and not where the processor's tiles are faster than its vectors.
PanelProducts products_of(DType dtype, bool inference) {
  if (dtype == DType::Float32) return conv_kernels().products_float32;
  if (dtype == DType::BFloat16 && inference && !microkernel(dtype).tiles) return conv_kernels().products_bfloat16;
  return {};
}

const float* row(const void* table, int64_t index, int64_t channels) {
  return table == nullptr ? nullptr : static_cast<const float*>(table) + index * channels;
}

}  // namespace

Results::Results(const FpropParams& p)
    : kernels_(conv_kernels()),
      products_(products_of(p.dtype, p.statistics == nullptr)),
      channels_(p.shape.k),
      forward_(true),
      statistics_(static_cast<float*>(p.statistics)) {
  forward_epilogue_ = {p.dtype,
                       channels_,
                       static_cast<const float*>(p.bias),
                       row(p.affine, kScale, channels_),
                       row(p.affine, kShift, channels_),
                       p.shortcut,
                       p.relu,
                       p.y};
}

Results::Results(const DgradParams& p)
    : kernels_(conv_kernels()),
      products_(products_of(p.dtype, false)),
      channels_(p.shape.c),
      forward_(false),
      sums_(static_cast<float*>(p.sums)) {
  backward_epilogue_ = {p.dtype,
                        channels_,
                        p.addend,
                        p.mask_y,
                        row(p.mask_coefficients, kMean, channels_),
                        row(p.mask_coefficients, kScale, channels_),
                        row(p.mask_coefficients, kShift, channels_),
                        p.dx};
}

void Results::finish(const float* acc, int64_t acc_pitch, const Pixels& pixels, int64_t channel, int64_t width,
                     PanelSums* sums) const {
  if (forward_) {
    kernels_.finish_forward(forward_epilogue_, acc, acc_pitch, pixels, channel, width, sums);
  } else {
    kernels_.finish_backward(backward_epilogue_, acc, acc_pitch, pixels, channel, width, sums);
  }
}

bool Results::multiplies_in_inference(DType dtype) { return products_of(dtype, true).forward != nullptr; }

bool Results::multiplies(int64_t width) const {
  return width == kPanel && (forward_ ? products_.forward != nullptr : products_.backward != nullptr);
}

void Results::multiply(const Products& products, const Pixels& pixels, int64_t channel, PanelSums* sums) const {
  if (forward_) {
    products_.forward(products, forward_epilogue_, pixels, channel, sums);
  } else {
    products_.backward(products, backward_epilogue_, pixels, channel, sums);
  }
}

ChunkSums::ChunkSums(const Results& results) : results_(results) {
  if (!results.gathers()) return;
  count_.resize((results.channels() + kPanel - 1) / kPanel);
  mean_.resize(results.channels());
  second_.resize(results.channels());
}

// Squares are taken about an origin near the mean, so that they do not cancel: the mean of the chunk so far, or
// of its first pixels. A square's rounding is relative to (origin - mean)^2, which the chunk's M2 holds at least a
// fraction of, since the origin is a mean of some of its pixels.
PanelSums* ChunkSums::begin(const float* first, int64_t acc_pitch, const Pixels& pixels, int64_t channel,
                            int64_t width) {
  if (!results_.gathers()) return nullptr;
  panel_ = {};
  if (results_.statistics_) {
    if (!want_first(channel)) {
      for (int64_t i = 0; i < width; ++i) panel_.origin[i] = static_cast<float>(mean_[channel + i]);
    } else {
      // Of the first pixel, then of some about it: sums that begin near the mean do not grow, nor does their rounding.
      for (const int64_t count : {int64_t{1}, std::min<int64_t>(pixels.count, kFirstPixels)}) {
        results_.finish(first, acc_pitch, {pixels.first, pixels.step, count}, channel, width, &panel_);
        for (int64_t i = 0; i < width; ++i) panel_.origin[i] += panel_.sum[i] / static_cast<float>(count);
        std::fill_n(panel_.sum, kPanel, 0.0f);
        std::fill_n(panel_.second, kPanel, 0.0f);
      }
    }
  }
  return &panel_;
}

void ChunkSums::add(int64_t pixels, int64_t channel, int64_t width) {
  if (!results_.gathers()) return;
  double& total = count_[channel / kPanel];
  double* mean = mean_.data() + channel;
  double* second = second_.data() + channel;
  if (results_.statistics_) {  // Chan, Golub & LeVeque (1979)
    const double count = static_cast<double>(pixels), weight = count / (total + count), inverse = 1 / count;
    for (int64_t i = 0; i < width; ++i) {
      const double shift = static_cast<double>(panel_.sum[i]) * inverse;
      const double delta = static_cast<double>(panel_.origin[i]) + shift - mean[i];
      const double squares = static_cast<double>(panel_.second[i]) - static_cast<double>(panel_.sum[i]) * shift;
      mean[i] += delta * weight;
      second[i] += (squares > 0 || squares != squares ? squares : 0.0) + delta * delta * (total * weight);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) mean[i] += static_cast<double>(panel_.sum[i]);
    for (int64_t i = 0; i < width; ++i) second[i] += static_cast<double>(panel_.second[i]);
  }
  total += static_cast<double>(pixels);
}

void ChunkSums::store(int64_t chunk, int64_t channel, int64_t width) const {
  if (!results_.gathers()) return;
  const int64_t channels = results_.channels();
  if (results_.statistics_) {
    float* out = results_.statistics_ + chunk * kStatisticsRows * channels + channel;
    std::fill_n(out + kCount * channels, width, static_cast<float>(count_[channel / kPanel]));
    std::copy_n(mean_.data() + channel, width, out + kTileMean * channels);
    std::copy_n(second_.data() + channel, width, out + kM2 * channels);
  } else {
    float* out = results_.sums_ + chunk * 2 * channels + channel;
    std::copy_n(mean_.data() + channel, width, out);
    std::copy_n(second_.data() + channel, width, out + channels);
  }
}

}  // namespace resnet_fused::cpu
