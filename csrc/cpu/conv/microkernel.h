// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The matrix product that the native convolutions stand on: oneDNN's JIT microkernel as PyTorch exports it.
#pragma once

#include "../../params.h"

namespace resnet_fused::cpu {

// C [m, n] float = A [m, k] B [k, n], or added to. Rows of A may overlap (lda < k). 16-bit B is laid out in pairs of its
// rows where `pairs` says so.
struct Microkernel {
  bool available;
  bool pairs;
  bool tiles;  // the processor has a unit of its own for it (AMX)
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a,
                   const void* b, float* c);
};

// For Float32, BFloat16 or Float16, as found by trying it on this machine, once: PyTorch and oneDNN differ by version,
// processor and environment (ONEDNN_MAX_CPU_ISA) in what they have.
const Microkernel& microkernel(DType dtype);

// Gives back what the microkernel holds of the processor (AMX tiles); after a thread's last product.
class MicrokernelScope {
 public:
  explicit MicrokernelScope(const Microkernel& kernel) : pairs_(kernel.pairs) {}
  ~MicrokernelScope();
  MicrokernelScope(const MicrokernelScope&) = delete;
  MicrokernelScope& operator=(const MicrokernelScope&) = delete;

 private:
  bool pairs_;
};

}  // namespace resnet_fused::cpu
