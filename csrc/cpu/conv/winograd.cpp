// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "winograd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "chunks.h"
#include "operand.h"
#include "scratch.h"

namespace resnet_fused::cpu {
namespace {

// Tiles of a block, the rows of its products: as many as the transformed source may take of the cache, within bounds.
// Of 4x4 results fewer: their 36 products by a panel take as much again.
constexpr int64_t kTransformedBytes2 = 768 << 10, kTransformedBytes4 = 384 << 10;
constexpr int kFewestTiles2 = 64, kFewestTiles4 = 48, kMostTiles = 112;
// Channels whose products are summed in registers before they are added to the others' where tiles are 4x4: that
// halves the error of long sums, which is then the direct sum's.
constexpr int64_t kSummedTogether = 32;
// What the filter's transformation costs, in tiles. Measured with 256 channels on 14x14 and 512 on 7x7: 2x2 gain from 4
// and 16 images on, 4x4 are behind 2x2 at 16 and 32 images; in wgrad they are ahead at 16.
constexpr int64_t kTransformationTiles2 = 181, kTransformationTiles4 = 300, kTransformationTilesWgrad = 64;
constexpr int64_t kBFloat16Speed = 2;     // of direct sums, in products of float32 per time
constexpr int64_t kMostKept = 128 * 128;  // pairs of channels that 4x4's 36 values are kept of
constexpr int kMostChunks = 64;
constexpr int kFewBlocks = 8;  // below, panels are spread over threads as well

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Operands of the products lie 16 values more than a product apart: at a power of two they would share cache sets.
int64_t source_pitch(const WinogradPlan& p) { return p.tiles() * p.padded_channels + 16; }
int64_t result_pitch(const WinogradPlan& p) { return p.tiles() * kPanel + 16; }

class Winograd {
 public:
  Winograd(const WinogradPlan& plan, const Operand& source, const Microkernel& kernel, const float* packed,
           const Results& results)
      : plan_(plan),
        kernels_(conv_kernels().winograd(plan.tile)),
        source_(source),
        kernel_(kernel),
        packed_(packed),
        results_(results),
        depth_(plan.tile == 2 ? plan.padded_channels : kSummedTogether) {
    copy_columns_ = plan.tile * plan.tile_columns + 2;
    copy_rows_ = plan.tile * plan.rows_per_block + 2;
  }

  int64_t scratch_bytes() const {
    return copy_bytes() + source_bytes() + align(plan_.products() * result_pitch(plan_) * 4) + finished_bytes();
  }

  void run(int64_t chunk, int64_t first_panel, int64_t last_panel, const Scratch& scratch) const {
    ChunkSums sums(results_);
    for (int64_t b = int64_t{plan_.blocks} * chunk / plan_.chunks;
         b < int64_t{plan_.blocks} * (chunk + 1) / plan_.chunks; ++b) {
      run_block(b, first_panel, last_panel, sums, scratch);
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      sums.store(chunk, panel * kPanel, width_of(panel));
    }
  }

 private:
  int64_t copy_bytes() const { return align(copy_rows_ * copy_columns_ * plan_.padded_channels * 4); }
  int64_t source_bytes() const { return align(plan_.products() * source_pitch(plan_) * 4); }
  int64_t finished_bytes() const { return align(plan_.tile * plan_.tile * plan_.tile_columns * kPanel * 4); }
  int64_t width_of(int64_t panel) const { return std::min<int64_t>(kPanel, plan_.target_channels - panel * kPanel); }

  // Rows of tiles [first, last) of images [image, image + images).
  struct Block {
    int64_t image, images, first, last;
  };

  Block block_at(int64_t index) const {
    const int64_t per_image = ceil_div(plan_.tile_rows, plan_.rows_per_block);
    const int64_t image = index / per_image * plan_.images_per_block;
    const int64_t first = index % per_image * plan_.rows_per_block;
    return {image, std::min<int64_t>(plan_.images_per_block, plan_.images - image), first,
            std::min<int64_t>(first + plan_.rows_per_block, plan_.tile_rows)};
  }

  void run_block(int64_t index, int64_t first_panel, int64_t last_panel, ChunkSums& sums,
                 const Scratch& scratch) const {
    const Block block = block_at(index);
    float* copy = scratch.at<float>();
    float* transformed = scratch.at<float>(copy_bytes());
    float* products = scratch.at<float>(copy_bytes() + source_bytes());
    float* finished = scratch.at<float>(scratch_bytes() - finished_bytes());
    const int64_t channels = plan_.padded_channels, columns = plan_.tile_columns;
    const int64_t row_pitch = copy_columns_ * channels;

    float* to = transformed;
    for (int64_t image = block.image; image < block.image + block.images; ++image) {
      fill(image, block, copy);
      for (int64_t row = 0; row < block.last - block.first; ++row, to += columns * channels) {
        kernels_.source(copy + plan_.tile * row * row_pitch, row_pitch, channels, columns, to, source_pitch(plan_));
      }
    }

    const int64_t tiles = block.images * (block.last - block.first) * columns;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t width = width_of(panel), n = (width + 15) / 16 * 16;
      for (int64_t i = 0; i < plan_.products(); ++i) {
        const float* a = transformed + i * source_pitch(plan_);
        const float* b = packed_ + (panel * plan_.products() + i) * channels * kPanel;
        for (int64_t c = 0; c < channels; c += depth_) {
          kernel_.multiply(tiles, n, std::min(depth_, channels - c), channels, kPanel, kPanel, c > 0, a + c,
                           b + c * kPanel, products + i * result_pitch(plan_));
        }
      }
      finish(block, panel * kPanel, width, products, finished, sums);
    }
  }

  void finish(const Block& block, int64_t channel, int64_t width, const float* products, float* finished,
              ChunkSums& sums) const {
    const int64_t columns = plan_.tile_columns, row_floats = plan_.tile * columns * kPanel;
    for (int64_t image = block.image; image < block.image + block.images; ++image) {
      for (int64_t row = block.first; row < block.last; ++row, products += columns * kPanel) {
        kernels_.results(products, result_pitch(plan_), (width + 15) / 16 * 16, columns, finished, row_floats);
        const int64_t rows = std::min<int64_t>(plan_.tile, plan_.target_height - plan_.tile * row);
        PanelSums* gathered = nullptr;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t first = (image * plan_.target_height + plan_.tile * row + i) * plan_.target_width;
          const Pixels pixels{first, 1, plan_.target_width};
          if (i == 0) gathered = sums.begin(finished, kPanel, pixels, channel, width);
          results_.finish(finished + i * row_floats, kPanel, pixels, channel, width, gathered);
        }
        sums.add(rows * plan_.target_width, channel, width);
      }
    }
  }

  // The block's source pixels of one image, zero outside of it.
  void fill(int64_t image, const Block& block, float* out) const {
    const int64_t channels = plan_.padded_channels, row_floats = copy_columns_ * channels;
    const int64_t rows = plan_.tile * (block.last - block.first) + 2;
    const int64_t low = std::min<int64_t>(plan_.pad_w, copy_columns_);
    const int64_t high = std::clamp<int64_t>(plan_.pad_w + plan_.source_width, low, copy_columns_);
    for (int64_t i = 0; i < rows; ++i, out += row_floats) {
      const int64_t row = plan_.tile * block.first + i - plan_.pad_h;
      if (row < 0 || row >= plan_.source_height) {
        std::memset(out, 0, row_floats * 4);
        continue;
      }
      std::memset(out, 0, low * channels * 4);
      const int64_t first = (image * plan_.source_height + row) * plan_.source_width + low - plan_.pad_w;
      conv_kernels().load_floats(source_, {first, 1, high - low}, 0, source_.channels, out + low * channels, channels);
      std::memset(out + high * channels, 0, (copy_columns_ - high) * channels * 4);
    }
  }

  const WinogradPlan& plan_;
  const WinogradKernels& kernels_;
  const Operand& source_;
  const Microkernel& kernel_;
  const float* packed_;
  const Results& results_;
  int64_t depth_;  // of a product
  int64_t copy_columns_, copy_rows_;
};

// Multiplications per pair of channels, with the filter's transformation.
int64_t winograd_cost(const ConvShape& s, int tile, int64_t transformation) {
  const int64_t tiles = s.n * ceil_div(s.p, tile) * ceil_div(s.q, tile);
  return (tile + 2) * (tile + 2) * (tiles + transformation);
}

// bfloat16 is transformed and multiplied as float32, unless the processor's tiles multiply it many times as fast.
bool winograd_fits(const ConvShape& s, DType dtype) {
  const bool fits = dtype == DType::Float32 || (dtype == DType::BFloat16 && !microkernel(dtype).tiles);
  return fits && microkernel(DType::Float32).available && s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.pad_h <= 2 && s.pad_w <= 2;
}

// 0: direct sums are faster.
int fastest_tile(const ConvShape& s, DType dtype, int64_t transformation2, int64_t transformation4) {
  if (!winograd_fits(s, dtype)) return 0;
  const int64_t two = winograd_cost(s, 2, transformation2), four = winograd_cost(s, 4, transformation4);
  const int64_t direct = int64_t{9} * s.n * s.p * s.q / (dtype == DType::Float32 ? 1 : kBFloat16Speed);
  return std::min(two, four) > direct ? 0 : four < two ? 4 : 2;
}

}  // namespace

int winograd_tile(const ConvShape& s, DType dtype) {
  return fastest_tile(s, dtype, kTransformationTiles2, kTransformationTiles4);
}

int winograd_wgrad_tile(const ConvShape& s, DType dtype) {
  return fastest_tile(s, dtype, kTransformationTilesWgrad, kTransformationTilesWgrad);
}

int kept_winograd_tile(const ConvShape& s, DType dtype) {
  if (!winograd_fits(s, dtype)) return 0;
  if (int64_t{s.c} * s.k <= kMostKept) return 4;
  return dtype == DType::Float32 ? 2 : 0;
}

WinogradPlan plan_winograd(const ConvShape& s, bool forward, int tile) {
  WinogradPlan p{};
  p.tile = tile;
  p.images = s.n;
  p.source_height = forward ? s.h : s.p, p.source_width = forward ? s.w : s.q;
  p.target_height = forward ? s.p : s.h, p.target_width = forward ? s.q : s.w;
  p.source_channels = forward ? s.c : s.k, p.target_channels = forward ? s.k : s.c;
  p.padded_channels = static_cast<int>(ceil_div(p.source_channels, 16) * 16);
  p.pad_h = forward ? s.pad_h : 2 - s.pad_h, p.pad_w = forward ? s.pad_w : 2 - s.pad_w;
  p.tile_rows = static_cast<int>(ceil_div(p.target_height, tile));
  p.tile_columns = static_cast<int>(ceil_div(p.target_width, tile));
  const auto wanted = static_cast<int>(std::clamp<int64_t>(
      (tile == 2 ? kTransformedBytes2 : kTransformedBytes4) / (p.products() * 4 * int64_t{p.padded_channels}),
      tile == 2 ? kFewestTiles2 : kFewestTiles4, kMostTiles));
  const int per_image = p.tile_rows * p.tile_columns;
  if (per_image <= wanted) {
    p.rows_per_block = p.tile_rows;
    p.images_per_block = std::min(p.images, wanted / per_image);
  } else {
    p.rows_per_block = std::clamp((wanted + p.tile_columns / 2) / p.tile_columns, 1, p.tile_rows);
    // Of equal size, where that makes no more of them.
    p.rows_per_block = static_cast<int>(ceil_div(p.tile_rows, ceil_div(p.tile_rows, p.rows_per_block)));
    p.images_per_block = 1;
  }
  p.blocks = static_cast<int>(ceil_div(p.images, p.images_per_block) * ceil_div(p.tile_rows, p.rows_per_block));
  p.chunks = std::max(1, std::min(p.blocks, kMostChunks));
  p.panels = static_cast<int>(ceil_div(p.target_channels, kPanel));
  p.panel_groups =
      p.blocks >= kFewBlocks ? 1 : std::min(p.panels, static_cast<int>(ceil_div(kFewBlocks, std::max(1, p.blocks))));
  return p;
}

void transform_weights(const WinogradPlan& plan, const ConvShape& s, bool forward, const void* weight, DType from,
                       DType to, float* packed) {
  const int64_t filter = int64_t{9} * s.c, depths = plan.padded_channels / 16;
  at::parallel_for(0, plan.panels * depths, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / depths, depth = i % depths * 16;
      WinogradWeights w{};
      w.panel.from = from, w.panel.to = to;
      w.panel.stride_n = forward ? filter : 1, w.panel.stride_d = forward ? 1 : filter;
      w.panel.weight = static_cast<const char*>(weight) +
                       (panel * kPanel * w.panel.stride_n + depth * w.panel.stride_d) * bytes_of(from);
      w.panel.width = std::min<int64_t>(kPanel, plan.target_channels - panel * kPanel);
      w.panel.depth = std::min<int64_t>(16, plan.source_channels - depth), w.panel.padded_depth = 16;
      w.panel.out = packed + (panel * plan.products() * plan.padded_channels + depth) * kPanel;
      w.tap_pitch = s.c, w.flipped = !forward, w.out_pitch = plan.padded_channels * kPanel;
      conv_kernels().winograd(plan.tile).weights(w);
    }
  });
}

void run_winograd(const WinogradPlan& plan, const Operand& source, const Microkernel& kernel, const float* packed,
                  const Results& results) {
  run_chunks(plan, Winograd(plan, source, kernel, packed, results), kernel);
}

}  // namespace resnet_fused::cpu
