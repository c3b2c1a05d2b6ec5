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
    const Scratch gathered(panels_ * depth_ * kPanel * 4);
    const int64_t taps = int64_t{shape_.r} * shape_.s;
    at::parallel_for(0, panels_ * taps, 1, [&](int64_t begin, int64_t end) {
      const Scratch rows(kPanel * shape_.c * 4);
      for (int64_t task = begin; task < end; ++task) {
        gather(task / taps, task % taps, rows.at<float>(), gathered.at<float>());
      }
    });
    // A thread's tasks share their weights, which are the larger operand.
    at::parallel_for(0, blocks_ * panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        multiply(task / panels_, task % panels_, gathered.at<float>());
      }
    });
  }

 private:
  int64_t pixels_of(int64_t panel) const { return std::min(kPanel, pixels_ - panel * kPanel); }

  // What one filter tap reads for a panel of target pixels, as [C, kPanel] of the panel's [R*S*C, kPanel].
  void gather(int64_t panel, int64_t tap, float* rows, float* out) const {
    const ConvKernels& kernels = conv_kernels();
    out += (panel * depth_ + tap * shape_.c) * kPanel;
    const int64_t first = panel * kPanel, count = pixels_of(panel);
    if (pointwise()) {
      kernels.load_transposed(source_, {first, 1, count}, 0, shape_.c, out, kPanel);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = (first + i) % shape_.q, p = (first + i) / shape_.q % shape_.p,
                    n = (first + i) / shape_.q / shape_.p;
      const int64_t h = p * shape_.stride_h - shape_.pad_h + tap / shape_.s * shape_.dilation_h;
      const int64_t w = q * shape_.stride_w - shape_.pad_w + tap % shape_.s * shape_.dilation_w;
      if (h < 0 || h >= shape_.h || w < 0 || w >= shape_.w) {
        std::memset(rows + i * shape_.c, 0, shape_.c * 4);
      } else {
        kernels.load(source_, {(n * shape_.h + h) * shape_.w + w, 1, 1}, 0, shape_.c, rows + i * shape_.c, shape_.c);
      }
    }
    const Operand copy{DType::Float32, Prologue::kNone, shape_.c, rows, nullptr, nullptr, nullptr, nullptr};
    kernels.load_transposed(copy, {0, 1, count}, 0, shape_.c, out, kPanel);
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
    const ProductRun run{weight_ + channel * depth_, gathered + panel * depth_ * kPanel, depth_};
    conv_kernels().multiply_transposed({&run, 1, depth_, 0}, width, pixels_of(panel), results);
    results_.finish(results, kPanel, {panel * kPanel, 1, pixels_of(panel)}, channel, width, nullptr);
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
