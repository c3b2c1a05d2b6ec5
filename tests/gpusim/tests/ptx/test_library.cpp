// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Library-style code: CUB, cooperative groups, cuda::barrier, pipelines, libdevice.
#include <algorithm>

#include "harness.h"

static const char* kModules[] = {"library", "library90"};

TEST(cub_block_algorithms) {
  for (auto* mod : kModules) {
    Buf<int> x(1024), sum(2), scan(1024), sorted(1024);
    std::mt19937 g(1);
    for (int i = 0; i < 1024; ++i) x[i] = int(g() % 20001) - 10000;
    Run r(mod);
    r.opt.check_races = r.opt.check_uninitialized = true;
    r("cub_block", {2}, {128}, x.p, sum.p, scan.p, sorted.p);
    for (int b = 0; b < 2; ++b) {
      int s = 0;
      std::vector<int> v(x.p + b * 512, x.p + b * 512 + 512);
      for (int i = 0; i < 512; ++i) { CHECK(scan[b * 512 + i] == s); s += v[i]; }
      CHECK(sum[b] == s);
      std::sort(v.begin(), v.end());
      for (int i = 0; i < 512; ++i) CHECK(sorted[b * 512 + i] == v[i]);
    }
  }
}
TEST(cooperative_groups) {
  for (auto* mod : kModules) {
    const int n = 1000;
    auto x = random_floats(n, 2);
    Buf<float> bx(x), out(1024 / 8 + 1);
    Run r(mod);
    r("groups", {8}, {128}, bx.p, out.p, n);
    int positive = 0;
    for (int i = 0; i < n; ++i) positive += x[i] > 0;
    for (int t = 0; t < n / 8 - 1; ++t) {
      double s = 0;
      for (int i = 0; i < 8; ++i) s += x[t * 8 + i];
      CHECK(close(out[t], s, 1e-5, 1e-5));
    }
    CHECK(out[128] == positive);
  }
}
TEST(cuda_barrier_and_pipeline) {
  for (auto* mod : kModules) {
    Buf<int> x(384), y(384);
    for (int i = 0; i < 384; ++i) x[i] = i * i;
    Run r(mod);
    r.opt.check_races = true;
    r("std_barrier", {1}, {128}, x.p, y.p);
    for (int k = 0; k < 3; ++k) for (int i = 0; i < 128; ++i) CHECK(y[k * 128 + i] == x[k * 128 + 127 - i] + k);
    const int n = 5;
    Buf<int> p(n * 256), q(n * 256);
    for (int i = 0; i < n * 256; ++i) p[i] = i;
    r.opt.check_uninitialized = true;
    r("pipeline", {1}, {64}, p.p, q.p, n);
    for (int k = 0; k < n; ++k) for (int i = 0; i < 64; ++i) for (int e = 0; e < 4; ++e) CHECK(q[(k * 64 + i) * 4 + e] == p[(k * 64 + 63 - i) * 4 + 3 - e]);
  }
}
TEST(scoped_atomics) {
  for (auto* mod : kModules) {
    Buf<int> a(3);
    Run r(mod);
    r("scoped_atomics", {5}, {64}, a.p, 0);
    CHECK(a[0] == 320 && a[1] == 63 && a[2] % 2 == 0 && a[2] != 0);
  }
}
TEST(libdevice_math) {
  const int n = 300;
  auto x = random_floats(n, 5, 3);
  Buf<float> bx(x);
  Buf<double> o(n * 16);
  Run("library")("math_functions", {3}, {128}, bx.p, o.p, n);
  for (int i = 0; i < n; ++i) {
    const float v = x[i];
    const double d = v, *p = &o[i * 16];
    CHECK(close(p[0], std::exp(d), 1e-14) && close(p[1], std::log(std::fabs(d) + 0.1), 1e-13, 1e-14) && close(p[2], std::sin(d * 30), 1e-12, 1e-13));
    CHECK(close(p[3], std::pow(std::fabs(d), 1.3), 1e-13) && close(p[4], std::tanh(d), 1e-14) && close(p[5], std::erf(d), 1e-14));
    CHECK(close(p[6], std::sin(double(v * 1e5f)), 1e-5, 1e-6) && close(p[7], std::log(double(std::fabs(v))), 1e-6, 1e-7) && close(p[8], std::cbrt(d), 1e-6));
    CHECK(close(p[9], std::atan2(d, double(0.3f)), 1e-6) && p[10] == std::fmod(v * 100, 0.7f) && close(p[11], std::expm1(d), 1e-6));
    CHECK(close(p[12], 0.5 * std::erfc(-d / std::sqrt(2.0)), 1e-5) && close(p[13], std::exp(d) + std::log(std::fabs(d) + 1), 1e-5));
    CHECK(close(p[14], std::lgamma(std::fabs(d) + 1), 1e-4, 1e-6) && p[15] == double(std::llrint(v * 1000)) + double(unsigned(std::floor(std::fabs(v) * 10))));
  }
}
TEST(fp8_conversions) {
  const int n = 400;
  auto x = random_floats(n, 6, 600);
  for (int i = 0; i < n / 2; ++i) x[i] *= 1e-3f * (i + 1) / n;
  Buf<float> bx(x), y(2 * n), z(2 * n);
  Buf<uint8_t> raw(2 * n), raw2(2 * n);
  Run("library")("fp8_roundtrip", {4}, {128}, bx.p, y.p, raw.p, n);        // software conversion below sm_89
  Run("library90")("fp8_roundtrip", {4}, {128}, bx.p, z.p, raw2.p, n);     // cvt instructions
  for (int i = 0; i < 2 * n; ++i) CHECK(raw[i] == raw2[i] && y[i] == z[i]);
  for (int i = 0; i < n; ++i) CHECK(close(y[2 * i], std::min(448.f, std::max(-448.f, x[i])), 0.07, 0.002));
}
TEST(welford) {
  const int n = 333;
  auto x = random_floats(4 * n, 7);
  Buf<float> bx(x), mean(4), var(4);
  Run("library")("welford", {4}, {32}, bx.p, mean.p, var.p, n);
  for (int b = 0; b < 4; ++b) {
    double m = 0, s = 0;
    for (int i = 0; i < n; ++i) m += x[b * n + i] / n;
    for (int i = 0; i < n; ++i) s += (x[b * n + i] - m) * (x[b * n + i] - m) / n;
    CHECK(close(mean[b], m, 1e-4, 1e-5) && close(var[b], s, 1e-4));
  }
}
TEST(cooperative_grid_sync) {
  const int nb = 12, rounds = 4;
  Buf<int> data(nb), out(nb);
  for (int threads : {1, 2}) {
    Run r("library");
    r.cooperative = true;
    r.opt.host_threads = threads;
    r("grid_sync", {nb}, {96}, data.p, out.p, rounds);
    for (int b = 0; b < nb; ++b) CHECK(out[b] == 60 + rounds * ((b + 1) % nb));
    EXPECT_FAULT("cooperative launch", r.fault("grid_sync", {100000}, {96}, data.p, out.p, rounds));
    r.cooperative = false;
    EXPECT_FAULT("trap", r.fault("grid_sync", {nb}, {96}, data.p, out.p, rounds));
  }
}
