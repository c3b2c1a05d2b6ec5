// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// Two kinds of tasks, evenly mixed: threads get ranges of tasks, and each shall have its share of both kinds.
struct MixedTask {
  bool first_kind;
  int64_t index;  // among its kind

  MixedTask(int64_t task, int64_t first_kinds, int64_t tasks)
      : first_kind(task * first_kinds % tasks < first_kinds),
        index(first_kind ? task * first_kinds / tasks : task - (task * first_kinds + tasks - 1) / tasks) {}
};

}  // namespace resnet_fused::cpu
