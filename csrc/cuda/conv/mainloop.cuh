// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The main loop of fprop, dgrad and wgrad: a ring of kStages stages filled by cp.async, one barrier per stage.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

// What an operand offers: kStageBytes; issue(stage) starts the copies of its next stage, skip() stands for them at the
// end; transform(stage) applies the prologue to the oldest stage, of which only the thread's own copies have arrived;
// enter(address) goes on to the stage that is there for all, and fragment(registers, row or column, step) reads it.
// Where A says kAhead, begin() is called before the first transform, when what the first stage copied is there for all.
template <class A, class B>
inline constexpr int kRingBytes = kStages * (A::kStageBytes + B::kStageBytes);

// The tensor cores drop a float's low bits; rounding them is left to us.
template <class T>
__device__ void prepare(uint32_t (&fragment)[4]) {
  if constexpr (sizeof(typename T::Value) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::to_tf32(fragment[i]);
  }
}

// d += A * B over `iterations` stages of the reduction. `ring`: kRingBytes of shared memory, free again on return.
template <class T, class Tile, class A, class B>
__device__ void accumulate(A& a, B& b, unsigned char* ring, int iterations, Accumulators<Tile>& d) {
  constexpr int kStageBytes = A::kStageBytes + B::kStageBytes;
  static_assert(A::kStageBytes % kTileAlignment == 0 && B::kStageBytes % kTileAlignment == 0);
  const auto issue = [&](int iteration, unsigned char* stage) {
    if (iteration < iterations) {
      a.issue(stage);
      b.issue(stage + A::kStageBytes);
    } else {
      a.skip();
      b.skip();
    }
    ptx::cp_async_commit();  // empty at the end: the number of groups under way stays the same
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) issue(s, ring + s * kStageBytes);

  if constexpr (A::kAhead) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    a.begin();
  }
  unsigned char *stage = ring, *before = ring + (kStages - 1) * kStageBytes;
  for (int k = 0; k < iterations; ++k) {
    ptx::cp_async_wait<kStages - 2>();
    a.transform(stage);
    b.transform(stage + A::kStageBytes);
    // Everyone's copies and transforms have arrived, and everyone has read the stage before, which is filled next.
    __syncthreads();
    issue(k + kStages - 1, before);

    a.enter(ptx::shared_address(stage));
    b.enter(ptx::shared_address(stage) + A::kStageBytes);
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      uint32_t fragments_a[Tile::kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        a.fragment(fragments_a[i], i * 16, step);
        prepare<T>(fragments_a[i]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t fragments_b[4];
        b.fragment(fragments_b, j * 8, step);
        prepare<T>(fragments_b);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
          ptx::mma<T>(d[i][j], fragments_a[i], fragments_b[0], fragments_b[1]);
          ptx::mma<T>(d[i][j + 1], fragments_a[i], fragments_b[2], fragments_b[3]);
        }
      }
    }
    before = stage;
    stage = stage == ring + (kStages - 1) * kStageBytes ? ring : stage + kStageBytes;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace resnet_fused::cuda
