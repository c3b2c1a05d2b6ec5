// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "direct.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "chunks.h"
#include "operand.h"
#include "scratch.h"

namespace resnet_fused::cpu {
namespace {

// The target pixels of one product: rows [first, last) of every parity of an image, or pixels where pointwise.
struct Unit {
  int64_t image, first, last;
};

Unit unit_at(const DirectPlan& p, int64_t index) {
  if (p.pointwise) {
    const int64_t pixels = int64_t{p.images} * p.target_height * p.target_width;
    const int64_t first = index * p.rows_per_unit;
    return {0, first, std::min<int64_t>(first + p.rows_per_unit, pixels)};
  }
  const int64_t per_image = p.units / p.images, first = index % per_image * p.rows_per_unit;
  int64_t rows = 0;
  for (const Parity& parity : p.parities) rows = std::max<int64_t>(rows, parity.rows);
  return {index / per_image, first, std::min<int64_t>(first + p.rows_per_unit, rows)};
}

class Direct {
 public:
  Direct(const DirectPlan& plan, const Operand& source, const Microkernel& kernel, const void* packed,
         const Results& results)
      : plan_(plan),
        source_(source),
        kernel_(kernel),
        packed_(static_cast<const char*>(packed)),
        results_(results),
        value_bytes_(bytes_of(source.dtype)),
        in_place_(plan.in_place && source.prologue == Prologue::kNone),
        rows_per_phase_(plan.pointwise ? 0 : plan.scratch_rows / plan.source_step_h) {}

  int64_t scratch_bytes() const {
    const int64_t units = in_place_ ? 0 : plan_.units_per_block * align(plan_.scratch_values * value_bytes_);
    return units + plan_.product_rows * kPanel * sizeof(float);
  }

  // Chunk `chunk` of the blocks for panels [first, last).
  void run(int64_t chunk, int64_t first_panel, int64_t last_panel, const Scratch& scratch) const {
    ChunkSums sums(results_);
    const int64_t blocks = plan_.blocks();
    for (int64_t b = blocks * chunk / plan_.chunks; b < blocks * (chunk + 1) / plan_.chunks; ++b) {
      const int64_t begin = b * plan_.units_per_block;
      const int64_t end = std::min<int64_t>(begin + plan_.units_per_block, plan_.units);
      run_block(begin, end, first_panel, last_panel, sums, scratch);
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      sums.store(chunk, panel * kPanel, width_of(panel));
    }
  }

 private:
  int64_t width_of(int64_t panel) const { return std::min<int64_t>(kPanel, plan_.target_channels - panel * kPanel); }

  void run_block(int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, ChunkSums& sums,
                 const Scratch& scratch) const {
    const int64_t unit_bytes = in_place_ ? 0 : align(plan_.scratch_values * value_bytes_);
    if (!in_place_) {
      for (int64_t u = begin; u < end; ++u) fill(unit_at(plan_, u), scratch.at<char>((u - begin) * unit_bytes));
    }
    float* acc = scratch.at<float>(plan_.units_per_block * unit_bytes);
    std::vector<ProductRun> runs;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t u = begin; u < end; ++u) {
        const Unit unit = unit_at(plan_, u);
        for (const Parity& parity : plan_.parities) {
          locate(unit, parity, panel, scratch.at<char>((u - begin) * unit_bytes), runs);
          run_product(unit, parity, panel, runs, acc, sums);
        }
      }
    }
  }

  void run_product(const Unit& unit, const Parity& parity, int64_t panel, const std::vector<ProductRun>& runs,
                   float* acc, ChunkSums& sums) const {
    const int64_t rows = plan_.pointwise ? 1 : std::min<int64_t>(unit.last, parity.rows) - unit.first;
    if (rows <= 0) return;
    const int64_t columns = plan_.pointwise ? unit.last - unit.first : parity.columns;
    const int64_t positions = plan_.pointwise ? columns : plan_.pitch / plan_.column_stride;
    const int64_t channel = panel * kPanel, width = width_of(panel);
    Products products{runs.data(), static_cast<int>(runs.size()), pixel_pitch(), 0};
    const bool in_registers = results_.multiplies(width);
    if (!in_registers) {
      multiply(products, (rows - 1) * positions + columns, width, acc);
    } else if (sums.want_first(channel)) {
      multiply(products, std::min(columns, ChunkSums::kFirstPixels), width, acc);
    }
    PanelSums* gathered = nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const Pixels target = target_pixels(unit, parity, unit.first + i, columns);
      if (i == 0) gathered = sums.begin(acc, kPanel, target, channel, width);
      products.first = i * positions;
      if (in_registers) {
        results_.multiply(products, target, channel, gathered);
      } else {
        results_.finish(acc + products.first * kPanel, kPanel, target, channel, width, gathered);
      }
    }
    sums.add(rows * columns, channel, width);
  }

  Pixels target_pixels(const Unit& unit, const Parity& parity, int64_t row, int64_t columns) const {
    if (plan_.pointwise) return {unit.first, 1, columns};
    const int64_t target_row = row * plan_.target_step_h + parity.first_row;
    const int64_t first = (unit.image * plan_.target_height + target_row) * plan_.target_width + parity.first_column;
    return {first, plan_.target_step_w, columns};
  }

  // The unit's source pixels as the products read them.
  void fill(const Unit& unit, char* out) const {
    const ConvKernels& kernels = conv_kernels();
    const int64_t channels = plan_.padded_channels, pixel_bytes = channels * value_bytes_;
    if (plan_.pointwise) {
      kernels.load(source_, {unit.first, 1, unit.last - unit.first}, 0, source_.channels, out, channels);
      return;
    }
    const int64_t step = plan_.source_step_h, columns = plan_.pitch;
    const int64_t first_row = unit.first * step + plan_.first_row;
    const int64_t rows = (unit.last - unit.first - 1) * step + plan_.last_row - plan_.first_row + 1;
    // Columns [low, high) of the copy lie in the image.
    const int64_t low = std::clamp<int64_t>(ceil_div(-plan_.first_column, plan_.column_step), 0, columns);
    const int64_t high =
        std::clamp<int64_t>(ceil_div(plan_.source_width - plan_.first_column, plan_.column_step), low, columns);
    for (int64_t i = 0; i < rows; ++i) {
      if (!phase_is_read(i % step)) continue;
      char* line = out + (i % step * rows_per_phase_ + i / step) * columns * pixel_bytes;
      const int64_t row = first_row + i;
      if (row < 0 || row >= plan_.source_height) {
        std::memset(line, 0, columns * pixel_bytes);
        continue;
      }
      std::memset(line, 0, low * pixel_bytes);
      const int64_t first = (unit.image * plan_.source_height + row) * plan_.source_width + plan_.first_column;
      kernels.load(source_, {first + low * plan_.column_step, plan_.column_step, high - low}, 0, source_.channels,
                   line + low * pixel_bytes, channels);
      std::memset(line + high * pixel_bytes, 0, (columns - high) * pixel_bytes);
    }
    for (int64_t i = std::max<int64_t>(0, rows - step); i < rows; ++i) {  // behind the last row of each phase
      char* line = out + (i % step * rows_per_phase_ + i / step + 1) * columns * pixel_bytes;
      std::memset(line, 0, plan_.shared_columns * pixel_bytes);
    }
  }

  static int64_t ceil_div(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

  bool phase_is_read(int64_t phase) const {
    for (const Parity& parity : plan_.parities) {
      for (const TapRun& run : parity.runs) {
        if ((run.row - plan_.first_row) % plan_.source_step_h == phase) return true;
      }
    }
    return false;
  }

  // Values between the rows of a product's first operand.
  int64_t pixel_pitch() const { return plan_.padded_channels * (plan_.pointwise ? 1 : plan_.column_stride); }

  // Where a unit's operands lie.
  void locate(const Unit& unit, const Parity& parity, int64_t panel, const char* scratch,
              std::vector<ProductRun>& runs) const {
    const int64_t pixel_bytes = plan_.padded_channels * value_bytes_;
    const char* weights = packed_ + (panel * plan_.weight_rows + parity.first_weight_row) * kPanel * value_bytes_;
    runs.clear();
    for (const TapRun& run : parity.runs) {
      const char* a = scratch;
      if (in_place_) {
        a = static_cast<const char*>(source_.x) + unit.first * pixel_bytes;
      } else if (!plan_.pointwise) {
        const int64_t row = run.row - plan_.first_row;
        const int64_t line = row % plan_.source_step_h * rows_per_phase_ + row / plan_.source_step_h;
        const int64_t column = (run.column - plan_.first_column) / plan_.column_step;
        a += (line * plan_.pitch + column) * pixel_bytes;
      }
      runs.push_back({a, weights + run.weight_row * kPanel * value_bytes_, run.depth});
    }
  }

  // The first `m` rows of the products.
  void multiply(const Products& products, int64_t m, int64_t width, float* acc) const {
    if (products.count == 0) std::memset(acc, 0, m * kPanel * sizeof(float));
    for (int i = 0; i < products.count; ++i) {
      const ProductRun& run = products.runs[i];
      kernel_.multiply(m, (width + 15) / 16 * 16, run.depth, products.pixel_pitch, kPanel, kPanel, i > 0, run.a, run.b,
                       acc);
    }
  }

  const DirectPlan& plan_;
  const Operand& source_;
  const Microkernel& kernel_;
  const char* packed_;
  const Results& results_;
  int64_t value_bytes_;
  bool in_place_;
  int64_t rows_per_phase_;
};

}  // namespace

int64_t packed_bytes(const DirectPlan& plan, DType dtype) {
  return plan.panels * plan.weight_rows * kPanel * bytes_of(dtype);
}

void pack_weights(const DirectPlan& plan, const ConvShape& s, bool forward, const void* weight, DType from, DType to,
                  bool pairs, void* packed) {
  struct Tap {
    int index;
    int64_t row;
  };
  std::vector<Tap> taps;
  for (const Parity& parity : plan.parities) {
    for (const TapRun& run : parity.runs) {
      for (size_t i = 0; i < run.taps.size(); ++i) {
        const auto behind = static_cast<int64_t>(i) * plan.padded_channels;
        taps.push_back({run.taps[i], parity.first_weight_row + run.weight_row + behind});
      }
    }
  }
  const int64_t filter = int64_t{s.r} * s.s * s.c;
  const auto count = static_cast<int64_t>(taps.size());
  const int64_t values = int64_t{kPanel} * plan.padded_channels;
  at::parallel_for(0, plan.panels * count, std::max<int64_t>(1, 32768 / values), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / count;
      const Tap& tap = taps[i % count];
      WeightPanel w{};
      w.from = from, w.to = to, w.pairs = pairs;
      w.stride_n = forward ? filter : 1, w.stride_d = forward ? 1 : filter;
      w.weight =
          static_cast<const char*>(weight) + (int64_t{tap.index} * s.c + panel * kPanel * w.stride_n) * bytes_of(from);
      w.width = std::min<int64_t>(kPanel, plan.target_channels - panel * kPanel);
      w.depth = plan.source_channels, w.padded_depth = plan.padded_channels;
      w.out = static_cast<char*>(packed) + (panel * plan.weight_rows + tap.row) * kPanel * bytes_of(to);
      conv_kernels().pack(w);
    }
  });
}

void run_direct(const DirectPlan& plan, const Operand& source, const Microkernel& kernel, const void* packed,
                const Results& results) {
  run_chunks(plan, Direct(plan, source, kernel, packed, results), kernel);
}

}  // namespace resnet_fused::cpu
