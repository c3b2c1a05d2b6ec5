// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "wgrad.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "operand.h"
#include "scratch.h"
#include "tasks.h"
#include "wgrad_plan.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kPieces = 16;         // of a group's rows, spread over threads
constexpr int64_t kDepthMultiple = 32;  // of products
static_assert(kDepthMultiple <= kWgradSlack);
constexpr int64_t kDepth = 512;  // positions of one product: its operands stay in the second-level cache

class Wgrad {
 public:
  Wgrad(const WgradParams& p, const Microkernel& kernel)
      : shape_(wgrad_shape(p.shape)),
        plan_(plan_wgrad(shape_, static_cast<int>(bytes_of(p.dtype)), kernel.pairs)),
        kernel_(kernel),
        x_(activation_operand(p.dtype, p.shape.c, p.x, p.coefficients)),
        grad_(gradient_operand(p.dtype, p.shape.k, p.grad)),
        value_bytes_(bytes_of(p.dtype)),
        sums_(p.workspace) {}

  void run() const { plan_.by_tiles ? run_by_tiles() : run_by_splits(); }

  void store(void* dw, DType dtype) const {
    const int64_t rows = plan_.rows_channels, taps = plan_.taps;
    const int64_t blocks = (rows + 15) / 16;
    at::parallel_for(0, taps * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tap = i / blocks, first = i % blocks * 16;
        WeightGradient g{};
        g.dtype = dtype;
        g.sums = sums_ + (tap * rows + first) * plan_.padded_columns;
        g.splits = plan_.splits, g.split_pitch = plan_.sums();
        g.rows = std::min<int64_t>(16, rows - first), g.columns = plan_.columns_channels;
        g.pitch = plan_.padded_columns;
        g.row_step = plan_.swapped ? shape_.c : 1, g.column_step = plan_.swapped ? 1 : taps * shape_.c;
        g.dw = static_cast<char*>(dw) + (plan_.swapped ? first * shape_.c : tap * shape_.c + first) * bytes_of(dtype);
        conv_kernels().finish_weights(g);
      }
    });
  }

 private:
  int64_t transposed_bytes() const { return align(plan_.rows_channels * plan_.row_length * value_bytes_ + 64); }
  // One panel of the straight operand: [positions, kPanel], so that a product's rows are neighbours.
  int64_t panel_bytes() const { return (plan_.positions + kDepthMultiple) * kPanel * value_bytes_; }
  int64_t straight_bytes() const { return (plan_.padded_columns + kPanel - 1) / kPanel * panel_bytes(); }

  // Groups in turn; their operands are laid out by all threads, then multiplied by all.
  void run_by_tiles() const {
    const Scratch scratch(transposed_bytes() + straight_bytes());
    char* transposed = scratch.at<char>();
    char* straight = scratch.at<char>(transposed_bytes());
    const int64_t row_tiles = (plan_.rows_channels + kPanel - 1) / kPanel;
    const int64_t column_tiles = (plan_.columns_channels + kPanel - 1) / kPanel;
    const int64_t rows = int64_t{plan_.images_per_group} * plan_.rows_per_group;
    const int64_t pieces = std::min<int64_t>(rows, kPieces);
    clear(straight, straight_bytes());
    clear(transposed, transposed_bytes());  // what stands beside pixels is multiplied by zero: it must be finite
    for (int64_t group = 0; group < plan_.groups; ++group) {
      // Tiles of channels of the one operand, and pieces of the other's rows.
      const int64_t tasks = row_tiles + pieces;
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const MixedTask task(i, row_tiles, tasks);
          if (task.first_kind) {
            const int64_t first = task.index * kPanel;
            lay_transposed(group, first, std::min<int64_t>(kPanel, plan_.rows_channels - first), transposed);
          } else {
            lay_straight(group, rows * task.index / pieces, rows * (task.index + 1) / pieces, straight);
          }
        }
      });
      at::parallel_for(0, row_tiles * column_tiles, 1, [&](int64_t begin, int64_t end) {
        const MicrokernelScope scope(kernel_);
        for (int64_t i = begin; i < end; ++i) {
          multiply(group, i / column_tiles, i % column_tiles, transposed, straight, group > 0, sums_);
        }
      });
    }
  }

  // Each split lays out and multiplies its groups by itself.
  void run_by_splits() const {
    const int64_t row_tiles = (plan_.rows_channels + kPanel - 1) / kPanel;
    const int64_t column_tiles = (plan_.columns_channels + kPanel - 1) / kPanel;
    at::parallel_for(0, plan_.splits, 1, [&](int64_t begin, int64_t end) {
      const MicrokernelScope scope(kernel_);
      const Scratch scratch(transposed_bytes() + straight_bytes());
      char* transposed = scratch.at<char>();
      char* straight = scratch.at<char>(transposed_bytes());
      std::memset(transposed, 0, transposed_bytes());
      std::memset(straight, 0, straight_bytes());
      for (int64_t split = begin; split < end; ++split) {
        float* sums = sums_ + split * plan_.sums();
        const int64_t first = plan_.groups * split / plan_.splits, last = plan_.groups * (split + 1) / plan_.splits;
        for (int64_t group = first; group < last; ++group) {
          lay_transposed(group, 0, plan_.rows_channels, transposed);
          lay_straight(group, 0, int64_t{plan_.images_per_group} * plan_.rows_per_group, straight);
          for (int64_t i = 0; i < row_tiles * column_tiles; ++i) {
            multiply(group, i / column_tiles, i % column_tiles, transposed, straight, group > first, sums);
          }
        }
      }
    });
  }

  // The output rows of a group's segment; none behind the last image.
  struct Segment {
    int64_t image, first, rows;
  };

  Segment segment_at(int64_t group, int64_t segment) const {
    if (plan_.rows_per_group == shape_.p) {
      const int64_t image = group * plan_.images_per_group + segment;
      return {image, 0, image < shape_.n ? shape_.p : 0};
    }
    const int64_t per_image = (shape_.p + plan_.rows_per_group - 1) / plan_.rows_per_group;
    const int64_t first = group % per_image * plan_.rows_per_group;
    return {group / per_image, first, std::min<int64_t>(plan_.rows_per_group, shape_.p - first)};
  }

  // Positions of a group in use, those of whole images behind the last one are not; up to kDepthMultiple, since the
  // microkernel is several times slower on what is left of a depth. The straight operand is zero there.
  int64_t depth_of(int64_t group) const {
    int64_t rows = 0;
    for (int64_t i = 0; i < plan_.images_per_group; ++i) {
      const Segment segment = segment_at(group, i);
      if (segment.rows > 0) rows = i * plan_.image_rows + segment.rows;
    }
    const int64_t used = (rows - 1) * plan_.pitch + (plan_.swapped ? shape_.w : shape_.q);
    return (used + kDepthMultiple - 1) / kDepthMultiple * kDepthMultiple;
  }

  static void clear(char* data, int64_t bytes) {
    at::parallel_for(0, bytes, 1 << 18, [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
  }

  // Rows that lie outside the image stay zero where whole images follow each other, since no other row comes to lie
  // there; where images are cut they have to be cleared.
  void lay_transposed(int64_t group, int64_t channel, int64_t width, char* out) const {
    const ConvKernels& kernels = conv_kernels();
    const int64_t length = plan_.row_length;
    const auto at = [&](int64_t phase, int64_t row, int64_t column) {
      return out +
             (channel * length + phase * plan_.phase_length + plan_.lead + row * plan_.pitch + column) * value_bytes_;
    };
    for (int64_t i = 0; i < plan_.images_per_group; ++i) {
      const Segment segment = segment_at(group, i);
      const int64_t base = i * plan_.image_rows;
      if (plan_.swapped) {
        for (int64_t p = 0; p < segment.rows; ++p) {
          const int64_t first = (segment.image * shape_.p + segment.first + p) * shape_.q;
          kernels.load_transposed(grad_, {first, 1, shape_.q}, channel, width, at(0, base + p, 0), length);
        }
        continue;
      }
      if (segment.rows == 0) continue;
      // Padded input rows that the segment's outputs read.
      const int64_t extent = (shape_.r - 1) * shape_.dilation_h;
      const int64_t begin = segment.first * shape_.stride_h;
      const int64_t end = (segment.first + segment.rows - 1) * shape_.stride_h + extent + 1;
      for (int64_t padded = begin; padded < end; ++padded) {
        const int64_t phase_h = padded % shape_.stride_h;
        if (phase_h >= plan_.phases_h) continue;
        const int64_t row = base + padded / shape_.stride_h - segment.first - plan_.lead_row;
        const int64_t h = padded - shape_.pad_h;
        const bool inside = h >= 0 && h < shape_.h;
        if (!inside && plan_.rows_per_group == shape_.p) continue;
        for (int64_t phase_w = 0; phase_w < plan_.phases_w; ++phase_w) {
          const int64_t phase = phase_h * plan_.phases_w + phase_w;
          if (!inside) {
            for (int64_t c = 0; c < width; ++c) {
              std::memset(at(phase, row, 0) + c * length * value_bytes_, 0, plan_.pitch * value_bytes_);
            }
            continue;
          }
          // Padded columns phase_w + j*stride inside the image.
          const int64_t stride = shape_.stride_w;
          const int64_t low = phase_w >= shape_.pad_w ? 0 : (shape_.pad_w - phase_w + stride - 1) / stride;
          const int64_t w = low * stride + phase_w - shape_.pad_w;
          int64_t count = w >= shape_.w ? 0 : (shape_.w - w + stride - 1) / stride;
          count = std::min(count, plan_.pitch - (low - plan_.lead_column));
          if (count <= 0) continue;
          const int64_t first = (segment.image * shape_.h + h) * shape_.w + w;
          kernels.load_transposed(x_, {first, stride, count}, channel, width, at(phase, row, low - plan_.lead_column),
                                  length);
        }
      }
    }
  }

  // Rows [begin, end) of the group's output rows.
  void lay_straight(int64_t group, int64_t begin, int64_t end, char* out) const {
    const ConvKernels& kernels = conv_kernels();
    const auto lay = kernel_.pairs ? kernels.load_pairs : kernels.load;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / plan_.rows_per_group, p = i % plan_.rows_per_group;
      const Segment segment = segment_at(group, image);
      const int64_t first = (segment.image * shape_.p + segment.first + p) * shape_.q;
      char* line = out + (image * plan_.image_rows + p) * plan_.pitch * kPanel * value_bytes_;
      for (int64_t column = 0; column < plan_.columns_channels; column += kPanel, line += panel_bytes()) {
        if (p < segment.rows) {
          const int64_t width = std::min<int64_t>(kPanel, plan_.columns_channels - column);
          lay(plan_.swapped ? x_ : grad_, {first, 1, shape_.q}, column, width, line, kPanel);
        } else {  // behind the last image or row: left from an earlier group
          std::memset(line, 0, plan_.pitch * kPanel * value_bytes_);
        }
      }
    }
  }

  void multiply(int64_t group, int64_t row_tile, int64_t column_tile, const char* transposed, const char* straight,
                bool add, float* sums) const {
    const int64_t first_row = row_tile * kPanel, first_column = column_tile * kPanel;
    const int64_t m = std::min<int64_t>(kPanel, plan_.rows_channels - first_row);
    const int64_t n = std::min<int64_t>(kPanel, plan_.padded_columns - first_column);
    const int64_t depth = depth_of(group);
    for (int64_t d = 0; d < depth; d += kDepth) {
      const int64_t k = std::min(kDepth, depth - d);
      const char* b = straight + column_tile * panel_bytes() + d * kPanel * value_bytes_;
      for (int64_t r = 0; r < shape_.r; ++r) {
        for (int64_t s = 0; s < shape_.s; ++s) {
          const int64_t row = r * shape_.dilation_h, column = s * shape_.dilation_w;
          const int64_t phase = row % shape_.stride_h * plan_.phases_w + column % shape_.stride_w;
          const int64_t shift =
              (row / shape_.stride_h - plan_.lead_row) * plan_.pitch + column / shape_.stride_w - plan_.lead_column;
          const char* a =
              transposed +
              (first_row * plan_.row_length + phase * plan_.phase_length + plan_.lead + d + shift) * value_bytes_;
          float* c =
              sums + ((r * shape_.s + s) * plan_.rows_channels + first_row) * plan_.padded_columns + first_column;
          kernel_.multiply(m, n, k, plan_.row_length, kPanel, plan_.padded_columns, add || d > 0, a, b, c);
        }
      }
    }
  }

  ConvShape shape_;
  WgradPlan plan_;
  const Microkernel& kernel_;
  Operand x_, grad_;
  int64_t value_bytes_;
  float* sums_;
};

}  // namespace

int64_t wgrad_workspace(const ConvShape& shape, DType dtype) {
  const WgradPlan plan = plan_wgrad(wgrad_shape(shape), static_cast<int>(bytes_of(dtype)), microkernel(dtype).pairs);
  return plan.sums() * plan.splits;
}

void run_wgrad(const WgradParams& p, const Microkernel& kernel) {
  const Wgrad wgrad(p, kernel);
  wgrad.run();
  wgrad.store(p.dw, p.dw_dtype);
}

}  // namespace resnet_fused::cpu
