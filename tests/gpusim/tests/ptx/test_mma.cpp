// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Tensor-core instructions against the fragment layouts of the PTX ISA manual,
// written out here element by element, and GEMMs built from them.
#include <chrono>

#include "harness.h"

// Row/column of element i of lane l, by the manual's formulas.
struct RC { int r, c; };
using Layout = RC (*)(int lane, int i);
#define GID (lane >> 2)
#define TIG (lane % 4)
static RC c_m16n8(int lane, int i) { return {i < 2 ? GID : GID + 8, TIG * 2 + (i & 1)}; }
static RC a16_k16(int lane, int i) { return {(i < 2 || (i >= 4 && i < 6)) ? GID : GID + 8, i < 4 ? TIG * 2 + (i & 1) : TIG * 2 + (i & 1) + 8}; }
static RC b16_k16(int lane, int i) { return {i < 2 ? TIG * 2 + (i & 1) : TIG * 2 + (i & 1) + 8, GID}; }
static RC a16_k8(int lane, int i) { return {i < 2 ? GID : GID + 8, TIG * 2 + (i & 1)}; }
static RC b16_k8(int lane, int i) { return {TIG * 2 + i, GID}; }
static RC a32_k8(int lane, int i) { return {(i == 0 || i == 2) ? GID : GID + 8, (i == 0 || i == 1) ? TIG : TIG + 4}; }
static RC b32_k8(int lane, int i) { return {i == 0 ? TIG : TIG + 4, GID}; }
static RC a32_k4(int lane, int i) { return {i == 0 ? GID : GID + 8, TIG}; }
static RC b32_k4(int lane, int) { return {TIG, GID}; }
static RC a8_k32(int lane, int i) { return {(i < 4 || (i >= 8 && i < 12)) ? GID : GID + 8, i < 8 ? TIG * 4 + (i & 3) : TIG * 4 + (i & 3) + 16}; }
static RC b8_k32(int lane, int i) { return {i < 4 ? TIG * 4 + (i & 3) : TIG * 4 + (i & 3) + 16, GID}; }
static RC a8_k16(int lane, int i) { return {i < 4 ? GID : GID + 8, TIG * 4 + (i & 3)}; }
static RC b8_k16(int lane, int i) { return {TIG * 4 + i, GID}; }

// One operand: encodes element values into registers [reg][lane].
struct Operand {
  int elems, bytes;
  Layout at;
  std::vector<uint32_t> regs(const std::vector<uint32_t>& bits, int cols) const {
    int per = 4 / bytes;
    std::vector<uint32_t> out(elems / per * 32);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < elems; ++i) {
        RC p = at(l, i);
        uint32_t v = bits[p.r * cols + p.c];
        out[i / per * 32 + l] |= v << (8 * bytes * (i % per));
      }
    return out;
  }
};

enum Kind { F16, BF16, TF32, S8, U8, E4M3 };
static uint32_t encode(double v, Kind k) {
  switch (k) {
    case F16: return to_half(v);
    case BF16: return to_bf16(v);
    case TF32: { float f = float(v); uint32_t b; memcpy(&b, &f, 4); return b; }
    default: return uint32_t(int(v)) & 0xff;
  }
}
static double decode(uint32_t b, Kind k) {
  switch (k) {
    case F16: return half_value(uint16_t(b));
    case BF16: return bf16_value(uint16_t(b));
    case TF32: { b &= ~0x1fffu; float f; memcpy(&f, &b, 4); return f; }
    case S8: return int8_t(b);
    default: return uint8_t(b);
  }
}

static void check_mma(const char* kernel, int K, Kind ka, Kind kb, Operand oa, Operand ob, bool integer = false, bool half_acc = false) {
  std::mt19937 g(K * 7 + ka);
  std::uniform_real_distribution<double> u(-2, 2);
  std::vector<uint32_t> a(16 * K), b(K * 8);
  std::vector<double> c(128);
  for (auto& x : a) x = encode(integer ? double(int(g() % 256) - 128) : u(g), ka);
  for (auto& x : b) x = encode(integer ? double(int(g() % 256) - 128) : u(g), kb);
  for (auto& x : c) x = integer ? double(int(g() % 20001) - 10000) : double(float(u(g)));
  if (half_acc) for (auto& x : c) x = half_value(to_half(x));
  Buf<uint32_t> ra(oa.regs(a, K)), rb(ob.regs(b, 8)), rc(128), rd(128);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      RC p = c_m16n8(l, i);
      double v = c[p.r * 8 + p.c];
      if (half_acc) { rc[i / 2 * 32 + l] |= uint32_t(to_half(v)) << (16 * (i & 1)); continue; }
      if (integer) rc[i * 32 + l] = uint32_t(int(v));
      else { float f = float(v); memcpy(&rc[i * 32 + l], &f, 4); }
    }
  auto st = Run("mma")(kernel, {1}, {32}, ra.p, rb.p, rc.p, rd.p);
  CHECK(st.mma_instructions == 1 && st.mma_flops == 2ull * 16 * 8 * K);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      RC p = c_m16n8(l, i);
      double s = c[p.r * 8 + p.c], mag = std::fabs(s);
      for (int k = 0; k < K; ++k) { double t = decode(a[p.r * K + k], ka) * decode(b[k * 8 + p.c], kb); s += t; mag += std::fabs(t); }
      double got;
      if (half_acc) got = half_value(uint16_t(rd[i / 2 * 32 + l] >> (16 * (i & 1))));
      else if (integer) got = int(rd[i * 32 + l]);
      else { float f; memcpy(&f, &rd[i * 32 + l], 4); got = f; }
      if (!(std::fabs(got - s) <= mag * (half_acc ? 6e-4 : 1.2e-7))) throw TestFailure{std::string(kernel) + ": wrong element " + std::to_string(p.r) + "," + std::to_string(p.c)};
    }
}

TEST(mma_fragments) {
  check_mma("mma_f16_k16", 16, F16, F16, {8, 2, a16_k16}, {4, 2, b16_k16});
  check_mma("mma_bf16_k16", 16, BF16, BF16, {8, 2, a16_k16}, {4, 2, b16_k16});
  check_mma("mma_f16_k8", 8, F16, F16, {4, 2, a16_k8}, {2, 2, b16_k8});
  check_mma("mma_bf16_k8", 8, BF16, BF16, {4, 2, a16_k8}, {2, 2, b16_k8});
  check_mma("mma_tf32_k8", 8, TF32, TF32, {4, 4, a32_k8}, {2, 4, b32_k8});
  check_mma("mma_tf32_k4", 4, TF32, TF32, {2, 4, a32_k4}, {1, 4, b32_k4});
  check_mma("mma_s8_k32", 32, S8, S8, {16, 1, a8_k32}, {8, 1, b8_k32}, true);
  check_mma("mma_u8s8_k32", 32, U8, S8, {16, 1, a8_k32}, {8, 1, b8_k32}, true);
  check_mma("mma_s8_k16", 16, S8, S8, {8, 1, a8_k16}, {4, 1, b8_k16}, true);
  check_mma("mma_f16_k16_h", 16, F16, F16, {8, 2, a16_k16}, {4, 2, b16_k16}, false, true);
}
TEST(mma_f64) {
  Buf<double> a(32), b(32), c(64), d(64);
  double A[8][4], B[4][8], C[8][8];
  std::mt19937 g(5);
  std::uniform_real_distribution<double> u(-1, 1);
  for (auto& r : A) for (auto& x : r) x = u(g);
  for (auto& r : B) for (auto& x : r) x = u(g);
  for (auto& r : C) for (auto& x : r) x = u(g);
  for (int lane = 0; lane < 32; ++lane) {
    a[lane] = A[GID][TIG];
    b[lane] = B[TIG][GID];
    for (int i = 0; i < 2; ++i) c[i * 32 + lane] = C[GID][TIG * 2 + i];
  }
  Run("mma")("mma_f64", {1}, {32}, a.p, b.p, c.p, d.p);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      double s = C[GID][TIG * 2 + i];
      for (int k = 0; k < 4; ++k) s += A[GID][k] * B[k][TIG * 2 + i];
      CHECK(close(d[i * 32 + lane], s, 1e-14, 1e-15));
    }
}
TEST(ldmatrix) {
  for (int trans = 0; trans < 2; ++trans)
    for (int stride : {8, 16, 72}) {
      Buf<uint16_t> in(32 * stride);
      Buf<uint32_t> out(128);
      for (int i = 0; i < 32 * stride; ++i) in[i] = uint16_t(i * 3 + 1);
      Run r("mma");
      r.dyn = 32 * stride * 2;
      auto st = r("ldmatrix_x4", {1}, {32}, in.p, out.p, stride, trans);
      for (int k = 0; k < 4; ++k)
        for (int l = 0; l < 32; ++l)
          for (int e = 0; e < 2; ++e) {
            // Matrix k has rows at lanes 8k..8k+7; lane l receives row l/4, elements 2(l%4), +1.
            int row = l / 4, col = 2 * (l % 4) + e;
            uint16_t want = trans ? in[(8 * k + col) * stride + row] : in[(8 * k + row) * stride + col];
            CHECK(uint16_t(out[k * 32 + l] >> (16 * e)) == want);
          }
      (void)st;
    }
}

template <class E> static void check_gemm(const char* kernel, int M, int N, int K, Kind kind, int stages) {
  const int v = 16 / sizeof(E), ld = (K + v - 1) / v * v;
  std::mt19937 g(M * 31 + N * 7 + K);
  std::uniform_real_distribution<double> u(-1, 1);
  std::vector<E> a(size_t(M) * ld), b(size_t(N) * ld);
  auto put = [&](E& e) { uint32_t x = encode(u(g), kind); memcpy(&e, &x, sizeof e); };
  auto val = [&](const E& e) { uint32_t x = 0; memcpy(&x, &e, sizeof e); return decode(x, kind); };
  for (auto& x : a) put(x);
  for (auto& x : b) put(x);
  Buf<E> ba(a), bb(b);
  Buf<float> c(size_t(M) * N);
  Run r("mma");
  r.dyn = stages * 8192;
  r.opt.check_races = true;
  r.opt.check_uninitialized = true;
  auto st = r(kernel, {unsigned(N + 63) / 64, unsigned(M + 63) / 64}, {128}, M, N, K, ba.p, ld, bb.p, ld, c.p);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      double s = 0;
      for (int k = 0; k < K; ++k) s += val(a[size_t(i) * ld + k]) * val(b[size_t(j) * ld + k]);
      if (!close(c[size_t(i) * N + j], s, 1e-5, 1e-5)) throw TestFailure{std::string(kernel) + " " + std::to_string(i) + "," + std::to_string(j) + " got " + std::to_string(c[size_t(i) * N + j]) + " want " + std::to_string(s)};
    }
  CHECK(st.async_copy_bytes > 0 && st.mma_instructions > 0);
}
TEST(gemm_f16) { check_gemm<uint16_t>("gemm_f16", 77, 130, 201, F16, 3); check_gemm<uint16_t>("gemm_f16", 1, 1, 5, F16, 3); }
TEST(gemm_bf16) { check_gemm<uint16_t>("gemm_bf16", 65, 63, 97, BF16, 4); }
TEST(gemm_tf32) { check_gemm<float>("gemm_tf32", 70, 50, 37, TF32, 2); }
TEST(gemm_swizzle_is_conflict_free) {
  Buf<uint16_t> a(128 * 64), b(128 * 64);
  Buf<float> c(64 * 64);
  Run r("mma");
  r.dyn = 3 * 8192;
  auto st = r("gemm_f16", {1}, {128}, 64, 64, 128, a.p, 128, b.p, 128, c.p);
  CHECK(st.shared_wavefronts == st.shared_ideal_wavefronts && st.shared_wavefronts > 0);
  CHECK(st.mma_flops == 2ull * 64 * 64 * 128);
}
TEST(wmma) {
  const int K = 48;
  Buf<uint16_t> a(16 * K), b(16 * K);
  Buf<float> c(256);
  std::mt19937 g(3);
  std::uniform_real_distribution<double> u(-1, 1);
  for (int i = 0; i < 16 * K; ++i) { a[i] = to_half(u(g)); b[i] = to_half(u(g)); }
  Run("mma")("wmma_gemm", {1}, {32}, a.p, b.p, c.p, K);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      double s = 0.5;
      for (int k = 0; k < K; ++k) s += half_value(a[i * K + k]) * half_value(b[j * K + k]);
      CHECK(close(c[i * 16 + j], 2 * s, 1e-5, 1e-5));
    }
}

template <class Value, class To> static void check_half_math(const char* kernel, Value value, To to, bool bf) {
  const int n = 500;
  std::mt19937 g(9);
  std::vector<uint32_t> v[3];
  for (auto& x : v) {
    x.resize(n);
    for (auto& e : x) {
      uint16_t h[2];
      for (auto& q : h) q = to(std::ldexp(double(int(g() % 4001) - 2000) / 1000, int(g() % 6) - 3));
      e = h[0] | uint32_t(h[1]) << 16;
    }
  }
  Buf<uint32_t> a(v[0]), b(v[1]), c(v[2]), o(n * 10);
  Run("mma")(kernel, {4}, {128}, a.p, b.p, c.p, o.p, n);
  for (int i = 0; i < n; ++i)
    for (int h = 0; h < 2; ++h) {
      double x = value(uint16_t(a[i] >> 16 * h)), y = value(uint16_t(b[i] >> 16 * h)), z = value(uint16_t(c[i] >> 16 * h));
      auto got = [&](int k) { return value(uint16_t(o[i * 10 + k] >> 16 * h)); };
      auto r = [&](double t) { return value(to(t)); };
      CHECK(got(0) == r(x + y) && got(1) == r(x - y) && got(2) == r(x * y) && got(3) == r(x * y + z));
      CHECK(got(4) == std::max(x, y) && got(5) == std::min(x, y) && got(6) == -x && got(7) == std::max(0.0, r(x * y + z)));
      CHECK(got(8) == (x > y ? 1 : 0));
    }
  for (int i = 0; i < n; ++i) {
    double x = value(uint16_t(a[i])), y1 = value(uint16_t(b[i] >> 16));
    if (bf) {
      CHECK(value(uint16_t(o[i * 10 + 9])) == value(to(float(x) * 1.2345f)) && value(uint16_t(o[i * 10 + 9] >> 16)) == value(to(float(y1) * 3.3f)));
    } else {
      CHECK(value(uint16_t(o[i * 10 + 9])) == value(to(x + y1)));
      double t = float(x) * 1.2345f, rz = value(uint16_t(o[i * 10 + 9] >> 16));
      CHECK(std::fabs(rz) <= std::fabs(t) && close(rz, t, 1e-3));
    }
  }
}
TEST(half_arithmetic) { check_half_math("half_math", half_value, to_half, false); }
TEST(bf16_arithmetic) { check_half_math("bf16_math", bf16_value, to_bf16, true); }
TEST(half_atomics) {
  Buf<uint32_t> h(1), b(1);
  Run("mma")("half_atomics", {2}, {64}, h.p, b.p);
  CHECK(half_value(uint16_t(h[0])) == 128 && half_value(uint16_t(h[0] >> 16)) == 64);
  CHECK(bf16_value(uint16_t(b[0])) == 128 && bf16_value(uint16_t(b[0] >> 16)) == 32);
}
TEST(conversions) {
  const int n = 400;
  auto x = random_floats(n, 20, 3);
  Buf<float> bx(x);
  Buf<uint32_t> o(n * 12);
  Run("mma")("conversions", {4}, {128}, bx.p, n, o.p);
  for (int i = 0; i < n; ++i) {
    const float v = x[i];
    const uint32_t* r = &o[i * 12];
    auto f = [](uint32_t b) { float q; memcpy(&q, &b, 4); return q; };
    uint32_t bits;
    memcpy(&bits, &v, 4);
    CHECK((r[0] & 0x1fff) == 0 && r[0] == ((bits + 0x1000) & ~0x1fffu));                 // nearest, ties away
    CHECK(uint16_t(r[1] >> 16) == to_bf16(v) && uint16_t(r[1]) == to_bf16(v * 3));       // first operand in the high half
    CHECK(half_value(uint16_t(r[2] >> 16)) == std::max(0.0, half_value(to_half(v))) && half_value(uint16_t(r[2])) == std::max(0.0, half_value(to_half(-v))));
    CHECK(int(r[3]) == int(v * 1e5f));
    CHECK(int(r[4]) == int(std::min(255.0f, std::max(0.0f, std::nearbyint(v * 100)))));
    CHECK(f(r[5]) == std::ceil(v));
    double rz = half_value(uint16_t(r[6]));
    CHECK(std::fabs(rz) <= std::fabs(v) && std::fabs(v) - std::fabs(rz) < std::fabs(v) * 1e-3);
    CHECK(double(f(r[7])) <= double(int(bits)) && close(f(r[7]), int(bits), 2e-7));
    CHECK(int(r[8]) == int(int8_t(bits)));
    CHECK(r[9] == uint32_t(std::max(0.0f, std::floor(v * 50))));
    double e = double(v) * 1.1;
    CHECK(std::fabs(f(r[10])) <= std::fabs(e) && close(f(r[10]), e, 2e-7));
    CHECK(f(r[11]) == std::min(1.f, std::max(0.f, v)));
  }
}
TEST(gemm_speed) {
  const int n = 512;
  Buf<uint16_t> a(n * n), b(n * n);
  Buf<float> c(n * n);
  for (int i = 0; i < n * n; ++i) a[i] = b[i] = 0x3c00;
  Run r("mma");
  r.dyn = 3 * 8192;
  for (int checks = 0; checks < 2; ++checks) {
    r.opt.check_races = r.opt.check_uninitialized = checks;
    auto t0 = std::chrono::steady_clock::now();
    auto st = r("gemm_f16", {n / 64, n / 64}, {128}, n, n, n, a.p, n, b.p, n, c.p);
    double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    printf("  f16 gemm %d^3%s: %.2f s, %.1f Gflop/s, %.0f M thread-instructions/s\n", n, checks ? " with race checks" : "", s, st.mma_flops / s / 1e9, st.thread_instructions / s / 1e6);
    CHECK(c[5] == 512.f);
  }
}
