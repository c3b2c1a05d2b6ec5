// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// How fprop and dgrad are spread over threads: chunks of blocks of pixels, and where there are few blocks, groups of
// panels of channels as well. By shape alone.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "microkernel.h"
#include "scratch.h"

namespace resnet_fused::cpu {

// work.run(chunk, first panel, last panel, scratch) for all of them; `plan` and `work` are an algorithm's.
template <class Plan, class Work>
void run_chunks(const Plan& plan, const Work& work, const Microkernel& kernel) {
  const int64_t groups = plan.panel_groups;
  at::parallel_for(0, plan.chunks * groups, 1, [&](int64_t begin, int64_t end) {
    const MicrokernelScope scope(kernel);
    const Scratch scratch(work.scratch_bytes());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / plan.chunks;  // a thread's tasks share their weights, of which few pixels need all
      work.run(task % plan.chunks, plan.panels * group / groups, plan.panels * (group + 1) / groups, scratch);
    }
  });
}

}  // namespace resnet_fused::cpu
