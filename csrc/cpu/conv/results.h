// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// What fprop and dgrad do with a panel of results, however it was computed, and how sums over pixels are gathered: in
// float over a block of pixels, in double over the blocks of a chunk, one tile of statistics or sums per chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "../../conv_params.h"
#include "kernels.h"

namespace resnet_fused::cpu {

class Results {
 public:
  explicit Results(const FpropParams& p);
  explicit Results(const DgradParams& p);

  // Stores results for `pixels` of the target; null `sums` gathers nothing.
  void finish(const float* acc, int64_t acc_pitch, const Pixels& pixels, int64_t channel, int64_t width,
              PanelSums* sums) const;

  // Whether multiply() computes any products of inference.
  static bool multiplies_in_inference(DType dtype);
  // Whether multiply() computes products of so many channels.
  bool multiplies(int64_t width) const;
  // The same for results that have yet to be multiplied: in registers, never stored in between.
  void multiply(const Products& products, const Pixels& pixels, int64_t channel, PanelSums* sums) const;

  int64_t channels() const { return channels_; }
  bool gathers() const { return statistics_ || sums_; }

 private:
  friend class ChunkSums;
  const ConvKernels& kernels_;
  PanelProducts products_;
  int64_t channels_;
  bool forward_;
  ForwardEpilogue forward_epilogue_{};
  BackwardEpilogue backward_epilogue_{};
  float* statistics_ = nullptr;  // [chunks, 3, K]
  float* sums_ = nullptr;        // [chunks, 2, C]
};

// The sums of one chunk's target pixels, of some of the channels.
class ChunkSums {
 public:
  explicit ChunkSums(const Results& results);

  static constexpr int64_t kFirstPixels = 16;

  // Around a product's results: begin() before they are finished, `first` being those of its first kFirstPixels pixels,
  // which are read if want_first() says so; add() behind.
  bool want_first(int64_t channel) const { return results_.statistics_ && count_[channel / kPanel] == 0; }
  PanelSums* begin(const float* first, int64_t acc_pitch, const Pixels& pixels, int64_t channel, int64_t width);
  void add(int64_t pixels, int64_t channel, int64_t width);
  // Stores channels [channel, channel + width) as tile `chunk`.
  void store(int64_t chunk, int64_t channel, int64_t width) const;

 private:
  const Results& results_;
  PanelSums panel_;
  std::vector<double> count_, mean_, second_;  // by channel; of sums: sum in mean_
};

}  // namespace resnet_fused::cpu
