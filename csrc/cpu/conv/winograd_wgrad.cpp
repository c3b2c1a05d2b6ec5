// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "winograd_wgrad.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "operand.h"
#include "scratch.h"
#include "tasks.h"
#include "winograd.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kSplitSums = 1280 << 10;   // bytes of partial sums that stay in cache while pixels pass
constexpr int64_t kGroupBytes = 1536 << 10;  // of a group's transformed operands, where a thread works on them alone
constexpr int64_t kSharedBytes = 24 << 20;   // where all threads do
constexpr int kMostSplits = 8;
constexpr int64_t kSummedTogether = 64;  // tiles, in registers before they are added to the others'
constexpr int64_t kBatchTiles = 64;      // transformed together before they are transposed

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// By shape alone. A unit is a row of tiles; groups of units are laid out and multiplied together.
struct Plan {
  int tile, products;  // rows and columns of a tile's pixels; (tile + 2)^2
  int64_t tile_rows, tile_columns, units;
  int64_t padded_columns;  // output channels, to 16
  int64_t units_per_group, groups, splits;
  bool by_tiles;                                          // channel tiles are spread over threads instead of groups
  int64_t row_pitch;                                      // of an input channel in the transposed operand
  int64_t transposed_pitch, straight_pitch, panel_pitch;  // floats of one of the products' operands
};

Plan make_plan(const ConvShape& s, DType dtype) {
  Plan p{};
  p.tile = winograd_wgrad_tile(s, dtype), p.products = (p.tile + 2) * (p.tile + 2);
  p.tile_rows = ceil_div(s.p, p.tile), p.tile_columns = ceil_div(s.q, p.tile);
  p.units = s.n * p.tile_rows;
  p.padded_columns = ceil_div(s.k, 16) * 16;
  p.by_tiles = p.products * s.c * p.padded_columns * 4 > kSplitSums;
  const int64_t unit_bytes = p.products * 4 * (s.c + p.padded_columns) * p.tile_columns;
  p.units_per_group = std::clamp<int64_t>((p.by_tiles ? kSharedBytes : kGroupBytes) / unit_bytes, 1, p.units);
  p.groups = ceil_div(p.units, p.units_per_group);
  p.splits = p.by_tiles ? 1 : std::min<int64_t>(p.groups, kMostSplits);
  const int64_t tiles = p.units_per_group * p.tile_columns;
  p.row_pitch = ((tiles + 15 + 15) / 16 | 1) * 16;  // room for a whole vector; no power of two
  p.transposed_pitch = s.c * p.row_pitch;
  p.panel_pitch = tiles * kPanel + 16;
  p.straight_pitch = ceil_div(s.k, kPanel) * p.panel_pitch;
  return p;
}

class WinogradWgrad {
 public:
  WinogradWgrad(const WgradParams& p, const Microkernel& kernel)
      : shape_(p.shape),
        plan_(make_plan(p.shape, p.dtype)),
        kernel_(kernel),
        x_(activation_operand(p.dtype, p.shape.c, p.x, p.coefficients)),
        grad_(gradient_operand(p.dtype, p.shape.k, p.grad)),
        sums_(p.workspace),
        batch_units_(std::max<int64_t>(1, kBatchTiles / plan_.tile_columns)) {}

  void run() const {
    const int64_t row_tiles = ceil_div(shape_.c, kPanel), column_tiles = ceil_div(shape_.k, kPanel);
    if (!plan_.by_tiles) {
      at::parallel_for(0, plan_.splits, 1, [&](int64_t begin, int64_t end) {
        const MicrokernelScope scope(kernel_);
        const Scratch operands(operand_bytes()), temporary(temporary_bytes());
        for (int64_t split = begin; split < end; ++split) {
          const int64_t first = plan_.groups * split / plan_.splits, last = plan_.groups * (split + 1) / plan_.splits;
          for (int64_t group = first; group < last; ++group) {
            for (int64_t i = 0; i < row_tiles + column_tiles; ++i) lay(group, i, operands, temporary);
            for (int64_t i = 0; i < plan_.products * row_tiles * column_tiles; ++i) {
              multiply(group, i, operands, group > first, sums_ + split * split_pitch());
            }
          }
        }
      });
      return;
    }
    const Scratch operands(operand_bytes());
    for (int64_t group = 0; group < plan_.groups; ++group) {
      at::parallel_for(0, row_tiles + column_tiles, 1, [&](int64_t begin, int64_t end) {
        const Scratch temporary(temporary_bytes());
        for (int64_t i = begin; i < end; ++i) lay(group, i, operands, temporary);
      });
      at::parallel_for(0, plan_.products * row_tiles * column_tiles, 1, [&](int64_t begin, int64_t end) {
        const MicrokernelScope scope(kernel_);
        for (int64_t i = begin; i < end; ++i) multiply(group, i, operands, group > 0, sums_);
      });
    }
  }

  void store(void* dw, DType dtype) const {
    const int64_t blocks = ceil_div(shape_.c, 16);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        WeightGradient g{};
        g.dtype = dtype;
        g.sums = sums_ + block * 16 * plan_.padded_columns;
        g.splits = plan_.splits, g.split_pitch = split_pitch();
        g.rows = std::min<int64_t>(16, shape_.c - block * 16), g.columns = shape_.k, g.pitch = plan_.padded_columns;
        g.row_step = 1, g.column_step = int64_t{9} * shape_.c;
        g.dw = static_cast<char*>(dw) + block * 16 * bytes_of(dtype);
        conv_kernels().winograd(plan_.tile).finish_weights(g, shape_.c * plan_.padded_columns, shape_.c);
      }
    });
  }

 private:
  int64_t split_pitch() const { return plan_.products * shape_.c * plan_.padded_columns; }
  int64_t operand_bytes() const { return plan_.products * 4 * (plan_.transposed_pitch + plan_.straight_pitch); }
  int64_t copy_columns() const { return plan_.tile * plan_.tile_columns + 2; }
  int64_t batch_pitch() const { return batch_units_ * plan_.tile_columns * kPanel + 16; }
  int64_t copy_bytes() const { return align((plan_.tile + 2) * copy_columns() * kPanel * 4); }
  int64_t temporary_bytes() const { return copy_bytes() + plan_.products * batch_pitch() * 4; }
  float* transposed(const Scratch& operands) const { return operands.at<float>(); }
  float* straight(const Scratch& operands) const {
    return operands.at<float>(plan_.products * plan_.transposed_pitch * 4);
  }

  int64_t units_of(int64_t group) const {
    return std::min<int64_t>(plan_.units_per_group, plan_.units - group * plan_.units_per_group);
  }

  // Task `index` of a group's layout: a tile of input channels or one of output channels.
  void lay(int64_t group, int64_t index, const Scratch& operands, const Scratch& temporary) const {
    const int64_t row_tiles = ceil_div(shape_.c, kPanel);
    const MixedTask task(index, row_tiles, row_tiles + ceil_div(shape_.k, kPanel));
    if (task.first_kind) {
      lay_transposed(group, task.index * kPanel, transposed(operands), temporary);
    } else {
      lay_straight(group, task.index, straight(operands), temporary);
    }
  }

  // Rows [row, row + rows) of an operand's image as [rows, copy columns, kPanel], from `column` on; zero outside.
  void copy_rows(const Operand& operand, int64_t height, int64_t width, int64_t image, int64_t row, int64_t rows,
                 int64_t column, int64_t columns, int64_t channel, int64_t channels, float* out) const {
    const int64_t low = std::clamp<int64_t>(-column, 0, columns),
                  high = std::clamp<int64_t>(width - column, low, columns);
    for (int64_t i = row; i < row + rows; ++i, out += columns * kPanel) {
      if (i < 0 || i >= height) {
        std::memset(out, 0, columns * kPanel * 4);
        continue;
      }
      std::memset(out, 0, low * kPanel * 4);
      conv_kernels().load_floats(operand, {(image * height + i) * width + column + low, 1, high - low}, channel,
                                 channels, out + low * kPanel, kPanel);
      std::memset(out + high * kPanel, 0, (columns - high) * kPanel * 4);
    }
  }

  void lay_transposed(int64_t group, int64_t channel, float* out, const Scratch& temporary) const {
    const ConvKernels& kernels = conv_kernels();
    const int64_t columns = copy_columns(), width = std::min<int64_t>(kPanel, shape_.c - channel);
    float* copy = temporary.at<float>();
    float* batch = temporary.at<float>(copy_bytes());
    const int64_t units = units_of(group);
    for (int64_t first = 0; first < units; first += batch_units_) {
      const int64_t count = std::min(batch_units_, units - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t unit = group * plan_.units_per_group + first + i;
        const int64_t image = unit / plan_.tile_rows, row = unit % plan_.tile_rows * plan_.tile;
        copy_rows(x_, shape_.h, shape_.w, image, row - shape_.pad_h, plan_.tile + 2, -shape_.pad_w, columns, channel,
                  width, copy);
        kernels.winograd(plan_.tile)
            .source(copy, columns * kPanel, kPanel, plan_.tile_columns, batch + i * plan_.tile_columns * kPanel,
                    batch_pitch());
      }
      for (int64_t i = 0; i < plan_.products; ++i) {
        const Operand tiles{DType::Float32, Prologue::kNone, kPanel,  batch + i * batch_pitch(),
                            nullptr,        nullptr,         nullptr, nullptr};
        kernels.load_transposed(
            tiles, {0, 1, count * plan_.tile_columns}, 0, width,
            out + i * plan_.transposed_pitch + channel * plan_.row_pitch + first * plan_.tile_columns, plan_.row_pitch);
      }
    }
  }

  void lay_straight(int64_t group, int64_t panel, float* out, const Scratch& temporary) const {
    const int64_t columns = plan_.tile * plan_.tile_columns, channel = panel * kPanel;
    float* copy = temporary.at<float>();
    out += panel * plan_.panel_pitch;
    for (int64_t i = 0; i < units_of(group); ++i, out += plan_.tile_columns * kPanel) {
      const int64_t unit = group * plan_.units_per_group + i;
      const int64_t image = unit / plan_.tile_rows, row = unit % plan_.tile_rows * plan_.tile;
      copy_rows(grad_, shape_.p, shape_.q, image, row, plan_.tile, 0, columns, channel,
                std::min<int64_t>(kPanel, shape_.k - channel), copy);
      conv_kernels()
          .winograd(plan_.tile)
          .gradient(copy, columns * kPanel, plan_.tile_columns, out, plan_.straight_pitch);
    }
  }

  // Product `index` of those of a tile times the tiles of channels.
  void multiply(int64_t group, int64_t index, const Scratch& operands, bool add, float* sums) const {
    const int64_t row_tiles = ceil_div(shape_.c, kPanel), column_tiles = ceil_div(shape_.k, kPanel);
    const int64_t column_tile = index % column_tiles, row = index / column_tiles % row_tiles * kPanel;
    const int64_t i = index / column_tiles / row_tiles;
    const int64_t m = std::min<int64_t>(kPanel, shape_.c - row);
    const int64_t n = std::min<int64_t>(kPanel, plan_.padded_columns - column_tile * kPanel);
    const float* a = transposed(operands) + i * plan_.transposed_pitch + row * plan_.row_pitch;
    const float* b = straight(operands) + i * plan_.straight_pitch + column_tile * plan_.panel_pitch;
    float* c = sums + (i * shape_.c + row) * plan_.padded_columns + column_tile * kPanel;
    const int64_t tiles = units_of(group) * plan_.tile_columns;
    for (int64_t t = 0; t < tiles; t += kSummedTogether) {
      kernel_.multiply(m, n, std::min(kSummedTogether, tiles - t), plan_.row_pitch, kPanel, plan_.padded_columns,
                       add || t > 0, a + t, b + t * kPanel, c);
    }
  }

  ConvShape shape_;
  Plan plan_;
  const Microkernel& kernel_;
  Operand x_, grad_;
  float* sums_;
  int64_t batch_units_;
};

}  // namespace

int64_t winograd_wgrad_workspace(const ConvShape& shape, DType dtype) {
  const Plan plan = make_plan(shape, dtype);
  return plan.splits * plan.products * shape.c * plan.padded_columns;
}

void run_winograd_wgrad(const WgradParams& p, const Microkernel& kernel) {
  const WinogradWgrad wgrad(p, kernel);
  wgrad.run();
  wgrad.store(p.dw, p.dw_dtype);
}

}  // namespace resnet_fused::cpu
