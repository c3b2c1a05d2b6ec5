// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "transposed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "operand.h"
#include "results.h"
#include "scratch.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kFewPixels = 4 * kPanel;
constexpr int64_t kFewPixelsPacked = kPanel;
// Pixels behind a panel's last full vector up to which each is multiplied by itself: 49 are 3 vectors and one.
constexpr int64_t kMostSingle = 4;
constexpr int64_t kGatheredChannels = 256;  // of a task that gathers

class Transposed {
 public:
  explicit Transposed(const FpropParams& p)
      : shape_(p.shape),
        source_(activation_operand(p.dtype, p.shape.c, p.x, p.coefficients)),
        results_(p),
        weight_(static_cast<const float*>(p.weight)),
        depth_(int64_t{p.shape.r} * p.shape.s * p.shape.c),
        pixels_(int64_t{p.shape.n} * p.shape.p * p.shape.q),
        panels_((pixels_ + kPanel - 1) / kPanel),
        blocks_((p.shape.k + kPanel - 1) / kPanel) {}

  void run() const {
    const Scratch gathered(panels_ * panel_values() * 4);
    const int64_t taps = int64_t{shape_.r} * shape_.s;
    const int64_t parts = (shape_.c + kGatheredChannels - 1) / kGatheredChannels;
    at::parallel_for(0, panels_ * taps * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch rows(kPanel * kGatheredChannels * 4);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t channel = task % parts * kGatheredChannels, panel = task / parts / taps;
        gather(panel, task / parts % taps, channel, rows.at<float>(), gathered.at<float>() + panel * panel_values());
      }
    });
    // A thread's tasks share their weights, which are the larger operand.
    at::parallel_for(0, blocks_ * panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task % panels_;
        multiply(task / panels_, panel, gathered.at<float>() + panel * panel_values());
      }
    });
  }

 private:
  int64_t pixels_of(int64_t panel) const { return std::min(kPanel, pixels_ - panel * kPanel); }

  // Of a panel's pixels, how many are multiplied one by one.
  int64_t single_of(int64_t panel) const {
    const int64_t behind = pixels_of(panel) % 16;
    return behind <= kMostSingle ? behind : 0;
  }

  // What a panel of pixels reads, as [R*S*C, kPanel], and behind it that of its single pixels, as [kMostSingle, R*S*C].
  int64_t panel_values() const { return depth_ * (kPanel + kMostSingle); }

  // The part of that which a filter tap reads of kGatheredChannels channels from `channel` on.
  void gather(int64_t panel, int64_t tap, int64_t channel, float* rows, float* out) const {
    const ConvKernels& kernels = conv_kernels();
    const int64_t width = std::min<int64_t>(kGatheredChannels, shape_.c - channel), offset = tap * shape_.c + channel;
    const int64_t first = panel * kPanel, single = single_of(panel), together = pixels_of(panel) - single;
    float* singles = out + depth_ * kPanel + offset;
    if (pointwise()) {
      if (together) {
        kernels.load_transposed(source_, {first, 1, together}, channel, width, out + offset * kPanel, kPanel);
      }
      for (int64_t i = 0; i < single; ++i) {  // one by one: a row's pitch behind its width would become zero
        kernels.load(source_, {first + together + i, 1, 1}, channel, width, singles + i * depth_, width);
      }
      return;
    }
    for (int64_t i = 0; i < together + single; ++i) {
      const int64_t q = (first + i) % shape_.q, p = (first + i) / shape_.q % shape_.p,
                    n = (first + i) / shape_.q / shape_.p;
      const int64_t h = p * shape_.stride_h - shape_.pad_h + tap / shape_.s * shape_.dilation_h;
      const int64_t w = q * shape_.stride_w - shape_.pad_w + tap % shape_.s * shape_.dilation_w;
      float* row = i < together ? rows + i * width : singles + (i - together) * depth_;
      if (h < 0 || h >= shape_.h || w < 0 || w >= shape_.w) {
        std::memset(row, 0, width * 4);
      } else {
        kernels.load(source_, {(n * shape_.h + h) * shape_.w + w, 1, 1}, channel, width, row, width);
      }
    }
    const Operand copy{DType::Float32, Prologue::kNone, width, rows, nullptr, nullptr, nullptr, nullptr};
    if (together) kernels.load_transposed(copy, {0, 1, together}, 0, width, out + offset * kPanel, kPanel);
  }

  // Whether target pixels read their own source pixels.
  bool pointwise() const {
    const bool unit_filter = shape_.r == 1 && shape_.s == 1, unit_steps = shape_.stride_h == 1 && shape_.stride_w == 1;
    return unit_filter && unit_steps && shape_.pad_h == 0 && shape_.pad_w == 0;
  }

  // 64 output channels of a panel of pixels.
  void multiply(int64_t block, int64_t panel, const float* gathered) const {
    float results[kPanel * kPanel];
    const int64_t channel = block * kPanel, width = std::min<int64_t>(kPanel, shape_.k - channel);
    const int64_t single = single_of(panel), together = pixels_of(panel) - single;
    const float* weight = weight_ + channel * depth_;
    if (together) {
      const ProductRun run{weight, gathered, depth_};
      conv_kernels().multiply_transposed({&run, 1, depth_, 0}, width, together, results);
    }
    if (single) {
      const ProductRun run{weight, gathered + depth_ * kPanel, depth_};
      conv_kernels().dot_rows({&run, 1, depth_, 0}, width, single, results + together * kPanel);
    }
    results_.finish(results, kPanel, {panel * kPanel, 1, together + single}, channel, width, nullptr);
  }

  const ConvShape& shape_;
  Operand source_;
  Results results_;
  const float* weight_;
  int64_t depth_, pixels_, panels_, blocks_;
};

}  // namespace

bool transposed_applies(const FpropParams& p) {
  const ConvShape& s = p.shape;
  return p.affine && p.dtype == DType::Float32 && p.weight_dtype == DType::Float32 &&
         conv_kernels().multiply_transposed && s.k >= 2 * kPanel &&
         int64_t{s.n} * s.p * s.q <= (p.packed ? kFewPixelsPacked : kFewPixels);
}

void run_transposed(const FpropParams& p) { Transposed(p).run(); }

}  // namespace resnet_fused::cpu
