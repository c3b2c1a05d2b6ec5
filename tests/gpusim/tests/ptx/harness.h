// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// A small test harness: modules compiled from .cu files by run.sh, buffers that
// the memory check knows, launches, comparisons.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "gpusim/ptx.h"

using namespace gpusim;

struct TestCase { const char* name; std::function<void()> fn; };
inline std::vector<TestCase>& tests() { static std::vector<TestCase> t; return t; }
inline int& failures() { static int f = 0; return f; }
struct Register { Register(const char* n, std::function<void()> f) { tests().push_back({n, f}); } };
#define TEST(name) static void test_##name(); static Register reg_##name(#name, test_##name); static void test_##name()

struct TestFailure { std::string what; };
#define CHECK(cond) do { if (!(cond)) throw TestFailure{std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " #cond}; } while (0)

// Live allocations: address -> bytes.
inline std::map<uint64_t, size_t>& allocations() { static std::map<uint64_t, size_t> a; return a; }
inline bool memory_check(uint64_t a, size_t n, bool) {
  auto& m = allocations();
  auto it = m.upper_bound(a);
  if (it == m.begin()) return false;
  --it;
  return a >= it->first && a + n <= it->first + it->second;
}

// Device buffer: host memory with a guard gap around it.
template <class T> struct Buf {
  std::vector<uint8_t> store;
  T* p;
  size_t n;
  explicit Buf(size_t n_) : store(n_ * sizeof(T) + 8192), n(n_) {
    p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(store.data()) + 4096 + 255) / 256 * 256);
    allocations()[reinterpret_cast<uint64_t>(p)] = n * sizeof(T);
  }
  Buf(const std::vector<T>& v) : Buf(v.size()) { std::memcpy(p, v.data(), n * sizeof(T)); }
  Buf(const Buf&) = delete;
  ~Buf() { allocations().erase(reinterpret_cast<uint64_t>(p)); }
  T& operator[](size_t i) { return p[i]; }
};

inline std::shared_ptr<Module> module(const std::string& name) {
  static std::map<std::string, std::shared_ptr<Module>> cache;
  auto& m = cache[name];
  if (!m) {
    const char* dir = getenv("GPUSIM_TEST_PTX");
    std::ifstream f(std::string(dir ? dir : ".") + "/" + name + ".ptx");
    if (!f) throw TestFailure{"no such PTX file: " + name};
    std::stringstream s;
    s << f.rdbuf();
    m = Module::parse(s.str());
  }
  return m;
}

struct Run {
  std::string mod;
  Options opt;
  Device dev;
  size_t dyn = 0;
  bool cooperative = false;
  Dim3 cluster;
  explicit Run(std::string m) : mod(std::move(m)) {
    opt.max_instructions = 200000000;
    if (mod.find("90") != std::string::npos) { dev.cc_major = 9; dev.shared_per_block_optin = 227 * 1024; dev.shared_per_sm = 228 * 1024; }
  }
  template <class... A> LaunchStats operator()(const std::string& kernel, Dim3 grid, Dim3 block, A... a) {
    void* args[] = {static_cast<void*>(&a)..., nullptr};
    LaunchConfig c;
    c.grid = grid;
    c.block = block;
    c.cluster = cluster;
    c.dynamic_shared_bytes = dyn;
    c.cooperative = cooperative;
    return module(mod)->launch(kernel, c, args, dev, opt, memory_check);
  }
  template <class... A> std::string fault(const std::string& kernel, Dim3 grid, Dim3 block, A... a) {
    try { (*this)(kernel, grid, block, a...); } catch (const Fault& f) { return f.what(); }
    return "";
  }
};

inline void expect_fault(const std::string& got, const std::string& text, const char* file, int line) {
  if (getenv("GPUSIM_SHOW_FAULTS")) printf("%s\n\n", got.c_str());
  if (got.find(text) == std::string::npos)
    throw TestFailure{std::string(file) + ":" + std::to_string(line) + ": expected a fault with '" + text + "', got: " + (got.empty() ? "no fault" : got)};
}
#define EXPECT_FAULT(text, ...) expect_fault((__VA_ARGS__), text, __FILE__, __LINE__)

inline std::vector<float> random_floats(size_t n, uint32_t seed, float scale = 1) {
  std::mt19937 g(seed);
  std::uniform_real_distribution<float> d(-scale, scale);
  std::vector<float> v(n);
  for (auto& x : v) x = d(g);
  return v;
}

inline bool close(double a, double b, double rtol, double atol = 0) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::fabs(a - b) <= atol + rtol * std::max(std::fabs(a), std::fabs(b));
}

// f16/bf16 encodings written independently of the simulator's.
inline double decode_float(uint32_t bits, int e, int m) {
  int sign = bits >> (e + m) & 1, ex = bits >> m & ((1 << e) - 1), ma = bits & ((1 << m) - 1), bias = (1 << (e - 1)) - 1;
  double v = ex == (1 << e) - 1 ? (ma ? NAN : INFINITY) : ex ? std::ldexp(1.0 + ma / double(1 << m), ex - bias) : std::ldexp(ma / double(1 << m), 1 - bias);
  return sign ? -v : v;
}
inline double half_value(uint16_t h) { return decode_float(h, 5, 10); }
inline double bf16_value(uint16_t h) { return decode_float(h, 8, 7); }
// Nearest even, by trying the neighbours of a truncation.
inline uint16_t encode_float(double x, int e, int m) {
  uint16_t best = 0;
  double err = INFINITY;
  int bias = (1 << (e - 1)) - 1;
  if (x == 0) return std::signbit(x) ? 1 << (e + m) : 0;
  int ex = std::ilogb(std::fabs(x));
  int field = std::max(ex + bias, 0);
  for (int f = std::max(field - 1, 0); f <= std::min(field + 1, (1 << e) - 2); ++f)
    for (int k = 0; k < (1 << m); ++k) {
      uint16_t c = uint16_t(f << m | k);
      double d = std::fabs(decode_float(c, e, m) - std::fabs(x));
      if (d < err || (d == err && !(c & 1))) { err = d; best = c; }
    }
  return uint16_t(best | (std::signbit(x) ? 1 << (e + m) : 0));
}
inline uint16_t to_half(double x) { return encode_float(x, 5, 10); }
inline uint16_t to_bf16(double x) { return encode_float(x, 8, 7); }
