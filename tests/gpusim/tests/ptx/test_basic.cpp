// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Elementwise, reductions, control flow, calls, atomics, arithmetic.
#include <bit>
#include <chrono>

#include "harness.h"

TEST(saxpy_tail) {
  for (int n : {1, 31, 1000, 4097}) {
    auto x = random_floats(n, 1), y = random_floats(n, 2);
    Buf<float> bx(x), by(y);
    auto st = Run("basic")("saxpy", {unsigned(n + 127) / 128}, {128}, n, 2.5f, bx.p, by.p);
    for (int i = 0; i < n; ++i) CHECK(by[i] == std::fma(2.5f, x[i], y[i]));
    CHECK(st.global_load_bytes == size_t(n) * 8 && st.global_store_bytes == size_t(n) * 4);
    CHECK(st.global_store_sectors == size_t(n + 7) / 8);
  }
}
TEST(parameters_are_no_global_traffic) {
  struct Table { int v[64]; } t;
  for (int i = 0; i < 64; ++i) t.v[i] = i * i;
  Buf<int> out(64);
  auto st = Run("basic")("param_table", {1}, {64}, t, out.p);
  for (int i = 0; i < 64; ++i) CHECK(out[i] == t.v[i ^ 3] + t.v[63 - i]);
  CHECK(st.global_load_bytes == 0 && st.global_load_sectors == 0 && st.global_store_bytes == 256);
}
TEST(vector_access) {
  const int n = 777;
  auto x = random_floats(n * 4, 3);
  Buf<float> bx(x), by(n * 4);
  Run("basic")("vec4", {3}, {96}, n, bx.p, by.p);
  for (int i = 0; i < n; ++i) {
    CHECK(by[4 * i] == x[4 * i + 3] && by[4 * i + 1] == x[4 * i + 2] * 2 && by[4 * i + 2] == x[4 * i + 1] + 1 && by[4 * i + 3] == std::max(x[4 * i], 0.f));
  }
}
TEST(block_reduction) {
  const int n = 10007;
  auto x = random_floats(n, 4);
  Buf<float> bx(x), out(7);
  Run r("basic");
  r.opt.check_races = r.opt.check_uninitialized = true;
  r("block_sum", {7}, {256}, n, bx.p, out.p);
  double s = 0, t = 0;
  for (auto v : x) s += v;
  for (int i = 0; i < 7; ++i) t += out[i];
  CHECK(close(s, t, 1e-4, 1e-3));
}
TEST(last_block_done) {
  const int n = 5000;
  auto x = random_floats(n, 5);
  Buf<float> bx(x), part(23), out(1);
  Buf<unsigned> cnt(1);
  for (int rep = 0; rep < 5; ++rep) {
    Run("basic")("last_block", {23}, {128}, n, bx.p, part.p, cnt.p, out.p);
    double s = 0;
    for (auto v : x) s += v;
    CHECK(close(s, out[0], 1e-4, 1e-3));
    CHECK(cnt[0] == 0);
  }
}
TEST(grid_barrier_spin) {
  for (int threads : {1, 2}) {
    const int nb = 8;
    Buf<unsigned> arrived(1);
    Buf<int> data(nb), out(nb);
    Run r("basic");
    r.opt.host_threads = threads;
    r("grid_barrier", {nb}, {64}, arrived.p, data.p, out.p);
    for (int i = 0; i < nb; ++i) CHECK(out[i] == 3 * nb * (nb - 1) / 2);
  }
}
TEST(grid_barrier_too_big) {
  const int nb = 600;  // more than can be resident
  Buf<unsigned> arrived(1);
  Buf<int> data(nb), out(nb);
  Run r("basic");
  r.opt.max_instructions = 2000000;
  EXPECT_FAULT("endless loop", r.fault("grid_barrier", {nb}, {64}, arrived.p, data.p, out.p));
}
TEST(tiled_gemm) {
  const int m = 37, n = 53, k = 45;
  auto a = random_floats(m * k, 6), b = random_floats(k * n, 7);
  Buf<float> ba(a), bb(b), c(m * n);
  Run r("basic");
  r.opt.check_races = r.opt.check_uninitialized = r.opt.count_distinct = true;
  auto st = r("gemm_tiled", {4, 3}, {16, 16}, m, n, k, ba.p, bb.p, c.p);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double s = 0;
      for (int t = 0; t < k; ++t) s += double(a[i * k + t]) * b[t * n + j];
      CHECK(close(s, c[i * n + j], 1e-4, 1e-4));
    }
  CHECK(st.barriers == 12 * 6);
  // Every operand is read by several blocks, but crosses memory once; buffers start on a 256-byte boundary.
  CHECK(st.global_distinct_load_sectors == size_t(m * k + 7) / 8 + size_t(k * n + 7) / 8);
  CHECK(st.global_distinct_store_sectors == size_t(m * n + 7) / 8);
  CHECK(st.global_load_sectors > 2 * st.global_distinct_load_sectors);
}
static int diverge_ref(int v, int prev) {
  int r = 0;
  for (int k = 0; k < (v & 15); ++k) {
    if (k % 3 == 0) { if (v & 32) r += k; else r -= 2 * k; }
    else if (k == 7) break;
    else r ^= k;
  }
  switch (v % 7) {
    case 0: r += 100; break;
    case 1: r *= 3; break;
    case 2: r = -r; if (v & 64) return prev; break;
    case 3: while (r > 10) r /= 2; break;
    case 4: r += v >> 3; break;
    default: r ^= 0x55;
  }
  return r;
}
TEST(divergence) {
  const int n = 1000;
  std::mt19937 g(8);
  Buf<int> x(n), y(n);
  for (int i = 0; i < n; ++i) { x[i] = int(g() & 0xffff); y[i] = -12345; }
  auto st = Run("basic")("diverge", {8}, {128}, n, x.p, y.p);
  for (int i = 0; i < n; ++i) CHECK(y[i] == diverge_ref(x[i], -12345));
  CHECK(st.divergent_branches > 0);
}
static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
TEST(calls_and_recursion) {
  Buf<int> x(64), y(64);
  Buf<double> z(64);
  for (int i = 0; i < 64; ++i) x[i] = (i * 7) % 31;
  Run("basic")("calls", {1}, {64}, x.p, y.p, z.p);
  for (int i = 0; i < 64; ++i) {
    CHECK(y[i] == fib(x[i] % 12));
    CHECK(z[i] == (i + x[i]) + 3.0 * i + short(short(i * 2) - x[i]));
  }
  Run("basic")("indirect", {1}, {64}, x.p, y.p);
  for (int i = 0; i < 64; ++i) CHECK(y[i] == (x[i] & 1 ? x[i] + 3 : 2 * x[i]));
}
TEST(local_arrays) {
  Buf<int> x(100), y(100);
  for (int i = 0; i < 100; ++i) x[i] = i * 37 + 5;
  Run("basic")("local_array", {1}, {100}, x.p, y.p);
  for (int t = 0; t < 100; ++t) {
    int a[16], v = x[t], s = 0;
    for (int i = 0; i < 16; ++i) a[i] = i * i + t;
    a[v & 15] = -1;
    a[(v >> 4) & 15] += 5;
    for (int i = 0; i < 16; ++i) s = s * 3 + a[(i + v) & 15];
    CHECK(y[t] == s);
  }
}
struct Params { int n; float w[7]; const float* x; long long k; unsigned char t[3]; };
TEST(struct_parameters) {
  auto x = random_floats(50, 9);
  Buf<float> bx(x), y(64);
  Params p{50, {1, 2, 3, 4, 5, 6, 7}, bx.p, -3, {10, 20, 30}};
  Run("basic")("struct_params", {1}, {64}, p, y.p, 3);
  for (int i = 0; i < 50; ++i) CHECK(close(y[i], x[i] * p.w[(i + 3) % 7] - 3 + p.t[i % 3], 1e-6, 1e-5));
  CHECK(y[50] == 0);
}
TEST(module_variables) {
  Buf<float> y(32);
  auto m = module("basic");
  auto [a, n] = m->variable("counter");
  CHECK(a && n == 4);
  *reinterpret_cast<int*>(a) = 7;
  Run("basic")("globals", {1}, {32}, y.p);
  const float c[] = {1.f, -2.f, .5f, 8.f};
  for (int i = 0; i < 32; ++i) CHECK(y[i] == c[i & 3] + 7);
  CHECK(*reinterpret_cast<int*>(a) == 12);
  auto [ca, cn] = m->variable("coeffs");
  CHECK(ca && cn == 16 && reinterpret_cast<float*>(ca)[1] == -2.f);
  CHECK(m->variable("nothing").first == 0);
}
TEST(printf_and_assert) {
  Run("basic")("print_it", {1}, {32}, 5);
  EXPECT_FAULT("assertion failed: threadIdx.x + v < 40", Run("basic").fault("assert_it", {1}, {32}, 20));
  CHECK(Run("basic").fault("assert_it", {1}, {32}, 5).empty());
}
TEST(dynamic_shared) {
  const int n = 3000;
  Buf<int> x(n), y(n);
  for (int i = 0; i < n; ++i) x[i] = i * 5;
  Run r("basic");
  r.dyn = n * 4;
  r("dynamic_shared", {1}, {128}, n, x.p, y.p);
  for (int i = 0; i < n; ++i) CHECK(y[i] == x[n - 1 - i]);
  r.dyn = n * 4 - 4;
  EXPECT_FAULT("out of bounds", r.fault("dynamic_shared", {1}, {128}, n, x.p, y.p));
}
TEST(atomics) {
  const int n = 5000;
  std::mt19937 g(10);
  Buf<int> x(n), i32(3);
  for (int i = 0; i < n; ++i) x[i] = int(g() % 20001) - 10000;
  Buf<unsigned> u(6);
  Buf<float> f(1);
  Buf<double> d(1);
  Buf<unsigned long long> q(3);
  i32[1] = 1 << 30; i32[2] = -(1 << 30); u[1] = ~0u; u[4] = 50;
  auto st = Run("basic")("atomics", {20}, {256}, x.p, n, i32.p, u.p, f.p, d.p, q.p);
  int s = 0, mn = 1 << 30, mx = -(1 << 30);
  unsigned o = 0, an = ~0u, xo = 0, inc = 0, dec = 50;
  unsigned long long sum = 0, qm = 0;
  for (int i = 0; i < n; ++i) {
    int v = x[i];
    s += v; mn = std::min(mn, v); mx = std::max(mx, v); o |= 1u << (v & 31); an &= ~(1u << (v & 15)); xo ^= unsigned(v);
    inc = inc >= 100 ? 0 : inc + 1; dec = dec == 0 || dec > 50 ? 50 : dec - 1;
    sum += (unsigned long long)(v & 0xffff) << 20; qm = std::max(qm, (unsigned long long)v & 0xffffff);
  }
  CHECK(i32[0] == s && i32[1] == mn && i32[2] == mx);
  CHECK(u[0] == o && u[1] == an && u[2] == xo && u[3] == inc && u[4] == dec && u[5] == 3u * n);
  CHECK(f[0] == 0.5f * n && d[0] == 0.25 * n && q[0] == sum && q[1] == qm && q[2] == 42);
  CHECK(st.atomics >= size_t(n) * 14);
  Buf<int> h(16);
  Run("basic")("shared_atomics", {1}, {128}, x.p, n, h.p);
  int ref[16] = {};
  for (int i = 0; i < n; ++i) ++ref[x[i] & 15];
  for (int i = 0; i < 16; ++i) CHECK(h[i] == ref[i]);
}
TEST(integer_arithmetic) {
  const int n = 2000;
  std::mt19937 g(11);
  Buf<int> a(n), b(n);
  for (int i = 0; i < n; ++i) { a[i] = int(g()); b[i] = int(g() >> (g() % 32)) * (g() & 1 ? 1 : -1); if (i % 50 == 0) b[i] = 0; }
  a[3] = INT32_MIN; b[3] = 17;
  Buf<long long> out(n * 24);
  Run("basic")("int_ops", {16}, {128}, a.p, b.p, n, out.p);
  for (int i = 0; i < n; ++i) {
    int x = a[i], y = b[i];
    unsigned ux = x, uy = y;
    const long long* o = &out[i * 24];
    CHECK(o[0] == (long long)x * y && o[1] == (long long)(((long long)x * y) >> 32) && o[2] == (long long)(((unsigned long long)ux * uy) >> 32));
    if (y) CHECK(o[3] == x / (long long)y && o[4] == x % (long long)y && o[5] == ux / uy && o[6] == ux % uy);
    CHECK(o[7] == std::popcount(ux) && o[8] == std::countl_zero(ux));
    unsigned br = 0;
    for (int k = 0; k < 32; ++k) br |= (ux >> k & 1) << (31 - k);
    CHECK(unsigned(o[9]) == br);
    CHECK(o[10] == __builtin_ffs(x));
    unsigned char by[8];
    memcpy(by, &ux, 4); memcpy(by + 4, &uy, 4);
    CHECK(unsigned(o[11]) == (unsigned(by[2]) | by[6] << 8 | by[1] << 16 | unsigned(by[4]) << 24));
    unsigned long long w = (unsigned long long)uy << 32 | ux;
    CHECK(unsigned(o[12]) == unsigned((w << (y & 31)) >> 32) && unsigned(o[13]) == unsigned(w >> (y & 31)));
    CHECK(o[14] == x >> (y & 31) && unsigned(o[15]) == ux >> (uy & 31) && unsigned(o[16]) == ux << (uy & 31));
    CHECK(o[17] == std::min(x, y) && unsigned(o[18]) == std::max(ux, uy) && unsigned(o[19]) == unsigned(x < 0 ? 0u - ux : ux));
    CHECK(unsigned(o[20]) == 3u + unsigned(std::llabs((long long)x - y)));
    CHECK((unsigned long long)o[21] == ((unsigned long long)ux << 32 | uy) / (unsigned long long)(uy | 1));
    CHECK(o[22] == (long long)((__int128((long long)x << 20) * ((long long)y << 15)) >> 64));
    int dp = 11;
    for (int k = 0; k < 4; ++k) dp += int((signed char)(ux >> 8 * k)) * int((signed char)(uy >> 8 * k));
    CHECK(int(o[23]) == dp);
  }
}
TEST(float_arithmetic) {
  const int n = 1000;
  auto a = random_floats(n, 12, 4), b = random_floats(n, 13, 2);
  a[0] = 0; b[1] = 1e-40f; a[2] = 3e38f;
  Buf<float> ba(a), bb(b), out(n * 24);
  Run("basic")("float_ops", {8}, {128}, ba.p, bb.p, n, out.p);
  for (int i = 0; i < n; ++i) {
    float x = a[i], y = b[i];
    const float* o = &out[i * 24];
    CHECK(o[0] == x + y && o[1] == x - y && o[2] == x * y && o[3] == std::fma(x, y, 1.5f) && o[4] == x / y && o[5] == std::sqrt(std::fabs(x)));
    CHECK(o[6] == std::fmin(x, y) && o[7] == std::fmax(x, y));
    if (std::fabs(x) < 80) {
      CHECK(close(o[8], std::exp(double(x)), 1e-6) && close(o[9], std::log(double(std::fabs(x) + 1e-3f)), 1e-5, 1e-6));
      CHECK(close(o[10], std::sin(double(x)), 1e-5, 1e-6) && close(o[12], std::tanh(double(x)), 1e-5));
      CHECK(close(o[22], std::pow(double(std::fabs(x)), double(1.7f)), 1e-5, 1e-6) && close(o[23], std::erf(double(x)), 1e-5, 1e-6));
      CHECK(o[14] == float(int(x * 100)) && o[15] == std::rint(x * 7));
    }
    CHECK(close(o[11], std::cos(double(y * 50)), 1e-5, 1e-5));
    CHECK(close(o[13], 1 / std::sqrt(double(std::fabs(x) + 0.1f)), 1e-6) && o[16] == std::floor(y * 3));
    double e = double(x) + y;
    CHECK(std::fabs(o[17]) <= std::fabs(e) && close(o[17], e, 2e-7, 1e-45));
    CHECK((double(x) * y > 3.4e38 || double(o[18]) >= double(x) * y) && close(o[18], double(x) * y, 2e-7, 2e-45));
    CHECK(o[20] == std::min(1.f, std::max(0.f, x)));
    CHECK(o[21] == float(double(x) * 1.1 + double(y) / 3.0) || close(o[21], double(x) * 1.1 + double(y) / 3.0, 1e-7));
  }
}
TEST(carry_chains) {
  std::mt19937_64 g(14);
  Buf<unsigned long long> a(64), b(64), o(128);
  for (int i = 0; i < 64; ++i) { a[i] = g(); b[i] = g(); }
  a[0] = ~0ull; b[0] = 1;
  Run("basic")("carry", {1}, {32}, a.p, b.p, o.p);
  for (int i = 0; i < 32; ++i) {
    auto x = (unsigned __int128)a[2 * i + 1] << 64 | a[2 * i], y = (unsigned __int128)b[2 * i + 1] << 64 | b[2 * i];
    auto s = x + y, d = x - y;
    CHECK(o[4 * i] == (uint64_t)s && o[4 * i + 1] == (uint64_t)(s >> 64) && o[4 * i + 2] == (uint64_t)d && o[4 * i + 3] == (uint64_t)(d >> 64));
  }
}
TEST(three_dimensions) {
  Buf<int> out(2 * 3 * 2 * 5 * 3 * 4);
  Run("basic")("dims", {2, 3, 2}, {5, 3, 4}, out.p);
  int k = 0;
  for (int z = 0; z < 2; ++z) for (int y = 0; y < 3; ++y) for (int x = 0; x < 2; ++x)
    for (int c = 0; c < 4; ++c) for (int b = 0; b < 3; ++b) for (int a = 0; a < 5; ++a)
      CHECK(out[k++] == z * 100000 + y * 10000 + x * 1000 + c * 100 + b * 10 + a);
}
TEST(speed) {
  Buf<unsigned> out(1 << 14);
  Buf<float> fo(1 << 14);
  Run r("basic");
  r.opt.max_instructions = 0;
  for (int threads : {1, 2}) {
    r.opt.host_threads = threads;
    for (auto* k : {"spin_alu", "spin_fma"}) {
      auto t0 = std::chrono::steady_clock::now();
      LaunchStats st = k[5] == 'a' ? r(k, {8}, {256}, 2000, out.p) : r(k, {8}, {256}, 1000, fo.p);
      double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
      printf("  %s, %d host threads: %.0f M thread-instructions/s (%.0f M warp-instructions/s)\n", k, threads, st.thread_instructions / s / 1e6, st.warp_instructions / s / 1e6);
    }
  }
}
TEST(memory_speed) {
  const int n = 1 << 20;
  Buf<float> x(n), y(n);
  Run r("basic");
  for (int rep = 0; rep < 2; ++rep) {
    auto t0 = std::chrono::steady_clock::now();
    LaunchStats st = rep ? r("saxpy", {n / 256}, {256}, n, 1.5f, x.p, y.p) : r("vec4", {256}, {256}, n / 4, x.p, y.p);
    double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    printf("  %s of %d floats: %.1f ms, %.0f M thread-instructions/s\n", rep ? "saxpy" : "float4 copy", n, s * 1e3, st.thread_instructions / s / 1e6);
  }
}
