// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Warp-level operations, independent thread scheduling, barriers.
#include <bit>

#include "harness.h"

static std::vector<int> ints(int n, int seed) {
  std::mt19937 g(seed);
  std::vector<int> v(n);
  for (auto& x : v) x = int(g() % 2001) - 1000;
  return v;
}

TEST(shuffle) {
  auto x = ints(32, 1);
  Buf<int> bx(x), o(256);
  Run("warp")("shuffles", {1}, {32}, bx.p, o.p);
  for (int l = 0; l < 32; ++l) {
    const int* r = &o[l * 8];
    CHECK(r[0] == x[(l * 7 + 3) & 31] && r[1] == x[l >= 3 ? l - 3 : l] && r[2] == x[l + 5 < 32 ? l + 5 : l] && r[3] == x[l ^ 13]);
    CHECK(r[4] == x[(l & ~7) | ((l + 2) & 7)]);
    CHECK(r[5] == x[(l & 15) >= 3 ? l - 3 : l]);
    CHECK(r[6] == x[(l & 7) + 5 < 8 ? l + 5 : l]);
    CHECK(r[7] == x[l ^ 20] || (l ^ 20) / 16 > l / 16);       // out of the segment above: own value
    if ((l ^ 20) / 16 > l / 16) CHECK(r[7] == x[l]);
  }
}
TEST(warp_reduction) {
  const int n = 1000;
  auto x = random_floats(n, 2);
  Buf<float> bx(x), o(4);
  Run r("warp");
  r.opt.check_races = r.opt.check_uninitialized = true;
  r("warp_reduce", {4}, {256}, bx.p, n, o.p);
  for (int b = 0; b < 4; ++b) {
    double s = 0;
    for (int i = b * 256; i < std::min(n, b * 256 + 256); ++i) s += x[i];
    CHECK(close(o[b], s, 1e-4, 1e-4));
  }
}
TEST(vote_match_redux) {
  auto x = ints(32, 3);
  x[5] = 17;
  Buf<int> bx(x);
  Buf<unsigned> o(320);
  Run("warp")("votes", {1}, {32}, bx.p, o.p);
  unsigned odd = 0, four = 0, sum = 0, xo = 0;
  int mx = INT32_MIN;
  for (int l = 0; l < 32; ++l) {
    odd |= unsigned(x[l] & 1) << l; four |= unsigned((x[l] & 4) != 0) << l; sum += unsigned(x[l]); xo ^= unsigned(x[l]); mx = std::max(mx, x[l]);
  }
  for (int l = 0; l < 32; ++l) {
    unsigned same = 0;
    for (int j = 0; j < 32; ++j) same |= unsigned((x[j] & 3) == (x[l] & 3)) << j;
    const unsigned* r = &o[l * 10];
    CHECK(r[0] == odd && r[1] == 1 && r[2] == 1 && r[3] == same && r[4] == 0 && r[5] == 0);
    CHECK(r[6] == sum && int(r[7]) == mx && r[8] == xo);
    CHECK(r[9] == four);  // ~(not four) == four
  }
}
TEST(warp_sync_in_divergent_code) {
  auto x = ints(64, 4);
  Buf<int> bx(x), o(64);
  Run("warp")("divergent_sync", {1}, {64}, bx.p, o.p);
  for (int w = 0; w < 2; ++w) {
    int r[32];
    for (int l = 0; l < 16; ++l) { r[l] = x[w * 32 + (l ^ 3)]; for (int k = 0; k < (l & 3); ++k) r[l] += k; }
    int five = r[5];
    for (int l = 0; l < 16; ++l) r[l] += five;
    int sum = 0;
    for (int l = 16; l < 32; ++l) { r[l] = -x[w * 32 + (l ^ 5)]; if (l & 1) r[l] *= 2; else r[l] += 7; sum += r[l]; }
    for (int l = 16; l < 32; ++l) r[l] += sum;
    int pos = 0;
    for (int l = 1; l < 32; l += 2) pos += r[l] > 0;
    for (int l = 1; l < 32; l += 2) r[l] += pos * 1000;
    for (int l = 0; l < 32; ++l) CHECK(o[w * 32 + l] == r[l]);
  }
}
TEST(independent_thread_scheduling) {
  Buf<int> o(32);
  Run("warp")("lane_spin", {1}, {32}, o.p);
  CHECK(o[3] == 77 && o[20] == 1 && o[9] == 78);
}
TEST(barrier_reductions) {
  auto x = ints(160, 5);
  Buf<int> bx(x), o(160);
  Run("warp")("block_votes", {1}, {160}, bx.p, o.p);
  int c = 0, a = 1;
  for (int v : x) { c += v & 1; a &= v > -5; }
  for (int i = 0; i < 160; ++i) CHECK(o[i] == c * 100 + a * 10);
}
TEST(named_barriers) {
  Buf<int> o(64);
  Run r("warp");
  r.opt.check_races = r.opt.check_uninitialized = true;
  r("named_barriers", {1}, {128}, o.p);
  for (int t = 0; t < 64; ++t) CHECK(o[t] == 600 + 4 * ((t + 13) & 63));
}
TEST(barrier_after_early_return) {
  for (int n : {1, 33, 70, 128}) {
    Buf<int> o(128);
    Run("warp")("early_return_barrier", {1}, {128}, n, o.p);
    for (int i = 0; i < n; ++i) CHECK(o[i] == n - 1 - i);
  }
}
TEST(exited_lanes_are_not_waited_for) {
  Buf<int> o(64);
  Run("warp")("exited_member", {1}, {32}, o.p);
  for (int i = 0; i < 32; ++i)
    if (i != 4 && i != 5) CHECK(o[i] == (i ^ 1) && unsigned(o[32 + i]) == ~(1u << 5));
}
TEST(spin_between_warps) {
  Buf<int> o(8);
  Run("warp")("spin_between_warps", {1}, {256}, o.p);
  for (int i = 0; i < 8; ++i) CHECK(o[i] == i * i);
}
TEST(lanes_meet_at_warp_wide_instructions) {
  for (int shuffle = 0; shuffle < 2; ++shuffle) {
    Buf<unsigned> in(32), out(32);
    for (unsigned l = 0; l < 32; ++l) in[l] = l * 0x01230045u + 7;
    Run("warp")("spin_between_rounds", {1}, {64}, 200000, shuffle, in.p, out.p);
    std::vector<unsigned> v(in.p, in.p + 32), next(32);
    for (int r = 0; r < 3; ++r) {
      for (int l = 0; l < 32; ++l) {
        // Element (row, column) of the 8x8 matrix: lane 4 * row + column / 2, half column % 2.
        auto half = [&](int row, int col) { return v[4 * row + col / 2] >> (16 * (col & 1)) & 0xffff; };
        next[l] = shuffle ? v[l] + v[l ^ 5] : half(l % 4 * 2, l / 4) | half(l % 4 * 2 + 1, l / 4) << 16;
      }
      for (int l = 0; l < 32; ++l) v[l] = next[l] + l;
    }
    for (int l = 0; l < 32; ++l) CHECK(out[l] == v[l]);
  }
}
TEST(part_of_a_warp_at_a_warp_wide_instruction) {
  Buf<unsigned> out(32);
  Run r("warp");
  r.opt.max_instructions = 300000;
  EXPECT_FAULT("partial warp", r.fault("partial_movmatrix", {1}, {20}, out.p));
  CHECK(!r.fault("partial_movmatrix", {1}, {32}, out.p).empty());
}
