// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The one main loop of all convolutions: a ring of kStages stages filled by cp.async, one barrier per stage.
#pragma once

#include "operands.cuh"

namespace resnet_fused::cuda {

template <class A, class B, int kStages>
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
template <class T, class Tile, int kStages, class A, class B>
__device__ void accumulate(A& a, B& b, unsigned char* ring, int iterations, Accumulators<Tile>& d) {
  constexpr int kStageBytes = A::kStageBytes + B::kStageBytes;
  const auto stage_of = [&](int slot) { return ring + slot * kStageBytes; };
  const auto issue = [&](int iteration, int slot) {
    if (iteration < iterations) {
      a.issue(stage_of(slot), slot);
      b.issue(stage_of(slot) + A::kStageBytes, slot);
    }
    ptx::cp_async_commit();  // empty at the end: the number of groups under way stays the same
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) issue(s, s);

  int slot = 0, free_slot = kStages - 1;
  for (int k = 0; k < iterations; ++k) {
    ptx::cp_async_wait<kStages - 2>();
    unsigned char* stage = stage_of(slot);
    a.transform(stage, slot);
    b.transform(stage + A::kStageBytes, slot);
    // Everyone's copies and transforms have arrived, and everyone has read the stage before, which is filled next.
    __syncthreads();
    issue(k + kStages - 1, free_slot);

    const uint32_t tile_a = ptx::shared_address(stage), tile_b = tile_a + A::kStageBytes;
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      uint32_t fragments_a[Tile::kFragmentsM][4];
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        A::Layout::fragment_a(fragments_a[i], tile_a, warp_row<Tile>() + i * 16, step);
        prepare<T>(fragments_a[i]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t fragments_b[4];
        B::Layout::fragment_b(fragments_b, tile_b, warp_column<Tile>() + j * 8, step);
        prepare<T>(fragments_b);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
          ptx::mma<T>(d[i][j], fragments_a[i], fragments_b[0], fragments_b[1]);
          ptx::mma<T>(d[i][j + 1], fragments_a[i], fragments_b[2], fragments_b[3]);
        }
      }
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace resnet_fused::cuda
