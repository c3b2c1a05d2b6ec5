// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Broken kernels must be caught, and said where; correct ones must pass.
#include "harness.h"

TEST(out_of_bounds_global) {
  Buf<float> x(32), y(32);
  std::string f = Run("checks").fault("oob_read", {1}, {32}, x.p, y.p);
  EXPECT_FAULT("invalid global access", f);
  for (auto* t : {"read of 4 bytes", "kernel oob_read", "thread (31,0,0)", "block (0,0,0)", "ld.global", "checks.cu:4"}) EXPECT_FAULT(t, f);
  EXPECT_FAULT("write of 4 bytes", Run("checks").fault("oob_write", {1}, {32}, y.p, 1));
  CHECK(Run("checks").fault("oob_write", {1}, {32}, y.p, 0).empty());
  EXPECT_FAULT("invalid global access", Run("checks").fault("null_read", {1}, {1}, (int*)nullptr, y.p));
}
TEST(misaligned_access) {
  Buf<float> x(32), y(32);
  EXPECT_FAULT("misaligned access", Run("checks").fault("misaligned", {1}, {1}, x.p, y.p));
}
TEST(out_of_bounds_shared) {
  Buf<int> y(64);
  EXPECT_FAULT("out of bounds: write of 4 bytes at shared offset 256", Run("checks").fault("shared_oob", {1}, {64}, y.p, 1));
  CHECK(Run("checks").fault("shared_oob", {1}, {64}, y.p, 0).empty());
}
TEST(shared_races) {
  Buf<int> x(128), y(128);
  Run r("checks");
  r.opt.check_races = true;
  EXPECT_FAULT("shared memory race", r.fault("missing_sync", {1}, {128}, x.p, y.p));
  EXPECT_FAULT("shared memory race", r.fault("missing_second_sync", {1}, {128}, x.p, y.p, 3));
  CHECK(r.fault("missing_second_sync", {1}, {128}, x.p, y.p, 1).empty());
  EXPECT_FAULT("within the warp", r.fault("missing_warp_sync", {1}, {32}, y.p));
  CHECK(r.fault("good_tile", {1}, {128}, x.p, y.p, 5).empty());
}
TEST(uninitialised_shared) {
  Buf<int> y(64);
  Run r("checks");
  r.opt.check_uninitialized = true;
  EXPECT_FAULT("uninitialised", r.fault("uninitialised", {1}, {64}, y.p));
  r.opt.check_uninitialized = false;
  CHECK(r.fault("uninitialised", {1}, {64}, y.p).empty());
  CHECK(y[63] == -1);  // poisoned
}
TEST(missing_cp_async_wait) {
  Buf<int> x(128), y(128);
  for (int i = 0; i < 128; ++i) x[i] = i + 1;
  Run r("checks");
  r("missing_cp_wait", {1}, {128}, x.p, y.p, 1);
  for (int i = 0; i < 128; ++i) CHECK(y[i] == i + 1);
  r("missing_cp_wait", {1}, {128}, x.p, y.p, 0);
  for (int i = 0; i < 128; ++i) CHECK(y[i] == -1);   // stale data
  r.opt.late_async_copies = false;
  r("missing_cp_wait", {1}, {128}, x.p, y.p, 0);
  for (int i = 0; i < 128; ++i) CHECK(y[i] == i + 1);
  r.opt.check_races = true;
  EXPECT_FAULT("asynchronous copy", r.fault("missing_cp_wait", {1}, {128}, x.p, y.p, 0));
  r.opt.late_async_copies = true;
  EXPECT_FAULT("asynchronous copy", r.fault("missing_cp_wait", {1}, {128}, x.p, y.p, 0));
  CHECK(r.fault("missing_cp_wait", {1}, {128}, x.p, y.p, 1).empty());
}
TEST(deadlocks_and_endless_loops) {
  Buf<int> y(64);
  Run r("checks");
  r.opt.max_instructions = 300000;
  EXPECT_FAULT("deadlock", r.fault("barrier_deadlock", {1}, {64}, y.p));
  EXPECT_FAULT("endless loop", r.fault("endless", {1}, {64}, y.p));
  EXPECT_FAULT("endless loop", r.fault("divergent_barrier", {1}, {64}, y.p));
}
TEST(launch_refusals) {
  Buf<int> y(64);
  Run r("checks");
  EXPECT_FAULT("threads", r.fault("endless", {1}, {2048}, y.p));
  EXPECT_FAULT("no kernel", r.fault("not_there", {1}, {1}, y.p));
  r.dyn = 1 << 20;
  EXPECT_FAULT("shared memory", r.fault("uninitialised", {1}, {64}, y.p));
}
TEST(bank_conflict_counts) {
  Buf<float> y(32);
  auto extra = [&](int stride) { auto s = Run("checks")("bank_conflicts", {1}, {32}, y.p, stride); return s.shared_wavefronts - s.shared_ideal_wavefronts; };
  CHECK(extra(1) == 0 && extra(0) == 0 && extra(33) == 0 && extra(2) == 1 && extra(4) == 3 && extra(32) == 31);
}
TEST(sector_counts) {
  Buf<float> y(32 * 64);
  CHECK(Run("checks")("strided_store", {1}, {32}, y.p, 1).global_store_sectors == 4);
  CHECK(Run("checks")("strided_store", {1}, {32}, y.p, 2).global_store_sectors == 8);
  CHECK(Run("checks")("strided_store", {1}, {32}, y.p, 8).global_store_sectors == 32);
}
TEST(unknown_instruction_only_faults_when_launched) {
  auto m = Module::parse(".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry good() { ret; }\n.visible .entry bad() {\n.reg .b32 %r<3>;\nfrobnicate.b32 %r1, %r2;\nret;\n}\n");
  LaunchConfig c;
  Device d;
  Options o;
  m->launch("good", c, nullptr, d, o, memory_check);
  std::string f;
  try { m->launch("bad", c, nullptr, d, o, memory_check); } catch (const Fault& e) { f = e.what(); }
  EXPECT_FAULT("unsupported instruction", f);
  EXPECT_FAULT("PTX line 7", f);
  try { Module::parse(".version 9.0\n.target sm_80\n.bogus x;\n"); f = ""; } catch (const Fault& e) { f = e.what(); }
  EXPECT_FAULT("line 3", f);
}
