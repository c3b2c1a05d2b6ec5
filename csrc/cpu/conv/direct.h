// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// fprop and dgrad as direct sums: one matrix product per filter row. A block's source pixels are read once, transformed
// by the prologue into a scratch in cache, and its results leave the cache once, through the epilogue.
#pragma once

#include "direct_plan.h"
#include "kernels.h"
#include "microkernel.h"
#include "results.h"

namespace resnet_fused::cpu {

// Bytes that pack_weights writes.
int64_t packed_bytes(const DirectPlan& plan, DType dtype);

// `weight` KRSC of dtype `from`; `forward`: for fprop, else for dgrad.
void pack_weights(const DirectPlan& plan, const ConvShape& shape, bool forward, const void* weight, DType from,
                  DType to, bool pairs, void* packed);

void run_direct(const DirectPlan& plan, const Operand& source, const Microkernel& kernel, const void* packed,
                const Results& results);

}  // namespace resnet_fused::cpu
