// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Spreads max pooling over threads, by rows: each value is one thread's, in an order that the shape alone fixes.
#include "max_pool.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"

namespace resnet_fused::cpu {
namespace {

// About 32K values of the input per thread and task: below, waking a thread costs more than the work.
int64_t grain(int64_t values, int64_t rows) {
  constexpr int64_t kValuesPerTask = 32768;
  return std::max<int64_t>(1, kValuesPerTask * rows / std::max<int64_t>(1, values));
}

template <class Params>
void for_rows(const Params& p, int64_t height, void (*kernel)(const Params&, int64_t, int64_t)) {
  const int64_t rows = p.images * height, values = p.images * p.channels * p.input.height * p.input.width;
  at::parallel_for(0, rows, grain(values, rows), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void run_max_pool(const MaxPoolParams& p) { for_rows(p, p.output.height, kernels().max_pool); }

void run_max_pool_backward(const MaxPoolBackwardParams& p) { for_rows(p, p.input.height, kernels().max_pool_backward); }

}  // namespace resnet_fused::cpu
