// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// TMA, mbarrier, clusters and wgmma.
#include "gpusim/tensor_map.h"
#include "harness.h"

struct alignas(64) Map { char opaque[128]; };
static Map pack(const TensorMap& m) { Map p; memset(&p, 0, sizeof p); memcpy(&p, &m, sizeof m); return p; }

static TensorMap map2d(const void* base, int bytes, uint8_t type, uint64_t w, uint64_t h, uint64_t pitch, int bw, int bh, int swizzle) {
  TensorMap m;
  m.dtype = type;
  m.rank = 2;
  m.swizzle = uint8_t(swizzle);
  m.address = reinterpret_cast<uint64_t>(base);
  m.dims[0] = w; m.dims[1] = h;
  m.strides[0] = pitch;
  m.box[0] = uint16_t(bw); m.box[1] = uint16_t(bh);
  m.element_strides[0] = m.element_strides[1] = 1;
  (void)bytes;
  return m;
}
// 16-byte chunk `c` of row `r` of a tile whose rows are as wide as the swizzle:
// 128B: chunk ^ r%8; 64B: chunk ^ (r/2)%4; 32B: chunk ^ (r/4)%2.
static int swizzled_chunk(int swizzle, int r, int c) { return swizzle == 3 ? c ^ (r % 8) : swizzle == 2 ? c ^ (r / 2 % 4) : swizzle == 1 ? c ^ (r / 4 % 2) : c; }

TEST(tma_tiled_load) {
  const int W = 200, H = 50;
  Buf<uint16_t> src(W * H);
  for (int i = 0; i < W * H; ++i) src[i] = uint16_t(i * 7 + 1);
  for (int swizzle = 0; swizzle <= 3; ++swizzle) {
    const int bw = swizzle == 3 ? 64 : swizzle == 2 ? 32 : swizzle == 1 ? 16 : 64, bh = 24;
    for (auto [x, y] : {std::pair{8, 3}, {-5, -2}, {180, 40}, {300, 0}}) {
      Map m = pack(map2d(src.p, 2, TensorMap::kUint16, W, H, W * 2, bw, bh, swizzle));
      const int bytes = bw * bh * 2;
      Buf<uint8_t> out(bytes);
      Run r("hopper90");
      r.dyn = bytes + 1024;
      r("tma_load2d", {1}, {64}, m, x, y, bytes, out.p, 1);
      for (int i = 0; i < bh; ++i)
        for (int j = 0; j < bw; ++j) {
          int at = i * bw * 2 + swizzled_chunk(swizzle, i, j / 8) * 16 + j % 8 * 2;
          uint16_t got = uint16_t(out[at] | out[at + 1] << 8);
          bool in = x + j >= 0 && x + j < W && y + i >= 0 && y + i < H;
          CHECK(got == (in ? src[(y + i) * W + x + j] : 0));
        }
      // Without the wait the data must not be there yet.
      r("tma_load2d", {1}, {64}, m, x, y, bytes, out.p, 0);
      CHECK(out[0] == 0xff && out[bytes - 1] == 0xff);
    }
  }
}
TEST(tma_4d_with_element_strides) {
  const int C = 16, W = 9, H = 7, N = 3;
  Buf<float> src(C * W * H * N);
  for (size_t i = 0; i < src.n; ++i) src[i] = float(i);
  TensorMap t;
  t.dtype = TensorMap::kFloat32; t.rank = 4; t.address = reinterpret_cast<uint64_t>(src.p);
  const uint64_t dims[] = {C, W, H, N}, strides[] = {C * 4, C * W * 4, C * W * H * 4};
  const uint16_t box[] = {8, 6, 3, 2};
  const uint8_t es[] = {1, 2, 1, 1};
  memcpy(t.dims, dims, sizeof dims); memcpy(t.strides, strides, sizeof strides); memcpy(t.box, box, sizeof box); memcpy(t.element_strides, es, sizeof es);
  const int n = 8 * 3 * 3 * 2;
  Buf<uint8_t> out(n * 4);
  Run r("hopper90");
  r.dyn = n * 4 + 1024;
  r("tma_load4d", {1}, {64}, pack(t), 4, -1, 5, 2, n * 4, out.p);
  int k = 0;
  for (int b = 0; b < 2; ++b) for (int h = 0; h < 3; ++h) for (int w = 0; w < 3; ++w) for (int c = 0; c < 8; ++c, ++k) {
    int x = -1 + 2 * w, y = 5 + h, z = 2 + b, ch = 4 + c;
    bool in = x >= 0 && x < W && y < H && z < N && ch < C;
    float got;
    memcpy(&got, &out[k * 4], 4);
    CHECK(got == (in ? src[((z * H + y) * W + x) * C + ch] : 0.f));
  }
}
TEST(tma_im2col) {
  // 3x3 convolution, padding 1, strides 1 and 2: pixels are output positions.
  const int C = 32, W = 7, H = 6, N = 3;
  Buf<uint16_t> src(C * W * H * N);
  for (size_t i = 0; i < src.n; ++i) src[i] = uint16_t(i + 1);
  for (int stride : {1, 2})
    for (int swizzle : {0, 2}) {
      TensorMap t;
      t.dtype = TensorMap::kBfloat16; t.rank = 4; t.mode = TensorMap::kIm2col; t.swizzle = uint8_t(swizzle);
      t.address = reinterpret_cast<uint64_t>(src.p);
      const uint64_t dims[] = {C, W, H, N}, strides[] = {C * 2, C * W * 2, C * W * H * 2};
      memcpy(t.dims, dims, sizeof dims); memcpy(t.strides, strides, sizeof strides);
      for (int i = 0; i < 4; ++i) t.element_strides[i] = uint8_t(i == 1 || i == 2 ? stride : 1);
      for (int i = 0; i < 2; ++i) { t.lower_corner[i] = -1; t.upper_corner[i] = -1; }
      t.channels_per_pixel = 32; t.pixels_per_column = 40;
      const int P = (W + 2 - 3) / stride + 1, Q = (H + 2 - 3) / stride + 1, bytes = 40 * 64;
      for (int kh = 0; kh < 3; ++kh)
        for (int kw = 0; kw < 3; ++kw) {
          const int first = 5;  // linear output position of the first pixel
          int n0 = first / (P * Q), h0 = first / P % Q, w0 = first % P;
          Buf<uint8_t> out(bytes);
          Run r("hopper90");
          r.dyn = bytes + 1024;
          r("tma_im2col", {1}, {64}, pack(t), 0, w0 * stride - 1, h0 * stride - 1, n0, kw, kh, bytes, out.p);
          for (int p = 0; p < 40; ++p) {
            int lin = first + p, n = lin / (P * Q), h = lin / P % Q, w = lin % P;
            int x = w * stride - 1 + kw, y = h * stride - 1 + kh;
            bool in = n < N && x >= 0 && x < W && y >= 0 && y < H;
            for (int c = 0; c < C; ++c) {
              int at = p * 64 + swizzled_chunk(swizzle, p, c / 8) * 16 + c % 8 * 2;
              CHECK(uint16_t(out[at] | out[at + 1] << 8) == (in ? src[((n * H + y) * W + x) * C + c] : 0));
            }
          }
        }
    }
}
TEST(tma_store_and_reduce) {
  const int W = 40, H = 20, bw = 16, bh = 8;
  auto in = random_floats(bw * bh, 3);
  Buf<float> src(in), dst(W * H);
  for (int reduce = 0; reduce < 2; ++reduce) {
    for (int i = 0; i < W * H; ++i) dst[i] = float(i);
    Run r("hopper90");
    r.dyn = bw * bh * 4 + 1024;
    r("tma_store2d", {1}, {64}, pack(map2d(dst.p, 4, TensorMap::kFloat32, W, H, W * 4, bw, bh, 0)), 30, 15, bw * bh, src.p, reduce);
    for (int y = 0; y < H; ++y)
      for (int x = 0; x < W; ++x) {
        bool hit = x >= 30 && y >= 15;
        float v = hit ? in[(y - 15) * bw + x - 30] : 0, old = float(y * W + x);
        CHECK(dst[y * W + x] == (hit ? (reduce ? old + v : v) : old));
      }
  }
}
TEST(tensor_map_replace) {
  const int W = 40, H = 3, bw = 32, bh = 4, bytes = bw * bh * 2;
  Buf<uint16_t> a(64 * H), b(64 * H);
  for (int i = 0; i < 64 * H; ++i) { a[i] = uint16_t(i + 1); b[i] = uint16_t(3 * i + 2); }
  TensorMap t = map2d(a.p + 8, 4, TensorMap::kFloat32, 17, 5, 1024, bw, 8, 3);
  t.oob_fill = 1;
  t.element_strides[1] = 2;
  t.rank = 3;
  Buf<Map> global(4);
  Map* g = reinterpret_cast<Map*>((reinterpret_cast<uintptr_t>(global.p) + 127) / 128 * 128);
  Buf<uint8_t> out(2 * bytes);
  for (int checks = 0; checks < 2; ++checks) {
    Run r("hopper90");
    r.dyn = bytes + 1024;
    r.opt.check_races = r.opt.check_uninitialized = checks;
    r("tma_replace", {1}, {64}, pack(t), g, a.p, b.p, W, H, uint64_t(128), bytes, out.p);
    for (int round = 0; round < 2; ++round)
      for (int y = 0; y < bh; ++y)
        for (int x = 0; x < bw; ++x) {
          const uint8_t* p = &out[round * bytes + (y * bw + x) * 2];
          CHECK((p[0] | p[1] << 8) == (y < H ? (round ? b : a)[y * 64 + x] : 0));
        }
  }
}
TEST(tma_store_by_warp) {
  // The machine issues equal stores of a warp's lanes once, but each lane's reduction.
  const int W = 64, H = 8, bw = 16, n = bw * H;
  std::vector<float> in(n);
  for (int i = 0; i < n; ++i) in[i] = float(i + 1);
  Buf<float> src(in), dst(W * H);
  for (int reduce = 0; reduce < 2; ++reduce)
    for (int split : {32, 20}) {
      for (int i = 0; i < W * H; ++i) dst[i] = 0;
      Run r("hopper90");
      r.dyn = n * 4 + 1024;
      auto st = r("tma_store_by_warp", {1}, {64}, pack(map2d(dst.p, 4, TensorMap::kFloat32, W, H, W * 4, bw, H, 0)), 4, split, n, src.p, reduce);
      for (int y = 0; y < H; ++y)
        for (int x = 0; x < W; ++x) {
          const int times = x >= 4 && x < 20 ? split : x >= 36 && x < 52 ? 32 - split : 0;
          CHECK(dst[y * W + x] == (reduce ? float(times) : float(times > 0)) * in[y * bw + (x - 4) % 32 % bw]);
        }
      CHECK(st.global_store_bytes == size_t(n) * 4 * (reduce ? 32 : split == 32 ? 1 : 2));
    }
}
TEST(tma_im2col_store) {
  // Output pixels 11 to 34 of a tensor with gaps, channels 24 to 39 of 32: the last
  // channels, and what lies past the last image, are not written.
  const int C = 32, W = 5, H = 3, N = 2, pixels = 24, channels = 16, row = C + 4;
  for (int swizzle : {0, 2})
    for (int reduce = 0; reduce < 2; ++reduce) {
      Buf<float> dst(row * W * H * N);
      for (size_t i = 0; i < dst.n; ++i) dst[i] = float(i);
      std::vector<float> in = random_floats(pixels * channels, 5), image(in.size());
      for (int p = 0; p < pixels; ++p)
        for (int c = 0; c < channels; ++c) image[p * channels + swizzled_chunk(swizzle, p, c / 4) * 4 + c % 4] = in[p * channels + c];
      TensorMap t;
      t.dtype = TensorMap::kFloat32; t.rank = 4; t.mode = TensorMap::kIm2col; t.swizzle = uint8_t(swizzle);
      t.address = reinterpret_cast<uint64_t>(dst.p);
      const uint64_t dims[] = {C, W, H, N}, strides[] = {row * 4, row * W * 4, row * W * H * 4};
      memcpy(t.dims, dims, sizeof dims); memcpy(t.strides, strides, sizeof strides);
      for (int i = 0; i < 4; ++i) t.element_strides[i] = 1;
      t.channels_per_pixel = channels; t.pixels_per_column = pixels;
      Buf<float> src(image);
      Run r("hopper90");
      r.dyn = pixels * channels * 4 + 1024;
      auto st = r("tma_im2col_store", {1}, {64}, pack(t), 24, 1, 2, 0, pixels * channels, src.p, reduce);
      CHECK(st.global_store_bytes == 19 * 8 * 4);
      for (int i = 0; i < int(dst.n); ++i) {
        const int p = i / row - 11, c = i % row - 24;
        const bool hit = p >= 0 && p < pixels && c >= 0 && c < C - 24;
        CHECK(dst[i] == (hit ? in[p * channels + c] + (reduce ? float(i) : 0.f) : float(i)));
      }
    }
}
TEST(tensor_map_spare_bit) {
  // Programs that clear bit 21 of the second word of an encoded map still work.
  Buf<uint16_t> src(1 << 21);
  for (size_t i = 0; i < src.n; ++i) src[i] = uint16_t(i * 3);
  uint16_t* base = src.p;
  while (!(reinterpret_cast<uint64_t>(base) >> 21 & 1)) base += 64;
  TensorMap t = map2d(base, 2, TensorMap::kUint16, 64, 8, 128, 64, 8, 3);
  Map m = pack(t);
  uint64_t word;
  memcpy(&word, m.opaque + 8, 8);
  word &= ~(1ull << 21);
  memcpy(m.opaque + 8, &word, 8);
  Buf<uint8_t> out(1024);
  Run r("hopper90");
  r.dyn = 2048;
  r("tma_load2d", {1}, {64}, m, 0, 0, 1024, out.p, 1);
  CHECK((out[0] | out[1] << 8) == base[0]);
}
TEST(bulk_copy) {
  Buf<int> in(500), out(500);
  for (int i = 0; i < 500; ++i) in[i] = i - 7;
  Run r("hopper90");
  r.dyn = 2048;
  r.opt.check_races = r.opt.check_uninitialized = true;
  r("bulk_copy", {1}, {96}, in.p, out.p, 500);
  for (int i = 0; i < 500; ++i) CHECK(out[i] == 3 * (i - 7));
}
TEST(mbarrier_ring) {
  Buf<int> out(32);
  Run r("hopper90");
  r.opt.check_races = r.opt.check_uninitialized = true;
  r("mbar_ring", {1}, {64}, 9, out.p);
  for (int l = 0; l < 32; ++l) CHECK(out[l] == 36000 + 9 * (31 - l));
}
TEST(clusters) {
  Buf<int> out(6 * 32);
  Run("hopper90")("cluster_exchange", {6}, {32}, out.p);
  for (int b = 0; b < 6; ++b) for (int l = 0; l < 32; ++l) CHECK(out[b * 32 + l] == (b ^ 1) * 100 + l + 20000);
}

// ---- wgmma ----
static uint64_t desc(int start, int lbo, int sbo, int mode) {
  return uint64_t(start >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 | uint64_t(mode) << 62;
}
static const int kMode[] = {0, 3, 2, 1};  // by swizzle none, 32B, 64B, 128B

// Byte offset of element (row, k) of a K-major operand of `rows` rows, 32 bytes of k used.
static int k_major(int swizzle, int rows, int row, int kbyte) {
  if (swizzle == 0) return kbyte / 16 * rows * 16 + row * 16 + kbyte % 16;     // LBO = rows * 16, SBO = 128
  int width = 16 << swizzle;
  return row * width + swizzled_chunk(swizzle, row, kbyte / 16) * 16 + kbyte % 16;  // SBO = 8 * width
}
// f16 MN-major: blocks of 8 k by one swizzle width along mn.
static int mn_major(int swizzle, int mn, int k, int lbo, int sbo) {
  if (swizzle == 0) return mn / 8 * sbo + k / 8 * lbo + k % 8 * 16 + mn % 8 * 2;
  int width = 16 << swizzle, per = width / 2;
  return mn / per * lbo + k / 8 * sbo + k % 8 * width + swizzled_chunk(swizzle, k % 8, mn % per / 8) * 16 + mn % 8 * 2;
}

template <class V> static void compare_d(Buf<float>& out, int N, V want, const char* what) {
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) {
      // Manual: row = 16*warp + lane/4 + 8*(i/2 % 2), column = 8*(i/4) + 2*(lane%4) + i%2
      int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      double w = want(row, col, i);
      if (!close(out[i * 128 + t], w, 2e-6, 2e-6)) throw TestFailure{std::string(what) + " row " + std::to_string(row) + " col " + std::to_string(col) + " got " + std::to_string(out[i * 128 + t]) + " want " + std::to_string(w)};
    }
}

TEST(wgmma_f16_layouts) {
  std::mt19937 g(4);
  std::uniform_real_distribution<double> u(-1, 1);
  std::vector<uint16_t> A(64 * 16), B(64 * 16);  // [m][k], [n][k]
  for (auto& x : A) x = to_half(u(g));
  for (auto& x : B) x = to_half(u(g));
  for (int kind = 0; kind < 4; ++kind)
    for (int swizzle = 0; swizzle <= 3; ++swizzle) {
      std::vector<uint8_t> image(32768);
      auto place = [&](int base, const std::vector<uint16_t>& src, bool mn) -> uint64_t {
        const int width = 16 << swizzle;
        const int lbo = swizzle == 0 ? 1024 : 16 * width, sbo = swizzle == 0 ? 128 : 8 * width;
        for (int r = 0; r < 64; ++r)
          for (int k = 0; k < 16; ++k) {
            int at = mn ? mn_major(swizzle, r, k, lbo, sbo) : k_major(swizzle, 64, r, k * 2);
            memcpy(&image[base + at], &src[r * 16 + k], 2);
          }
        if (mn) return desc(base, lbo, sbo, kMode[swizzle]);
        return swizzle == 0 ? desc(base, 64 * 16, 128, 0) : desc(base, 16, 8 * width, kMode[swizzle]);
      };
      uint64_t da = place(0, A, kind & 1), db = place(16384, B, kind & 2);
      Buf<uint8_t> img(image);
      Buf<float> out(32 * 128);
      Run r("hopper90");
      r.dyn = 32768;
      auto st = r("wgmma_f16", {1}, {128}, img.p, 32768, da, db, kind, out.p, 1);
      CHECK(st.mma_flops == 2ull * 64 * 64 * 16);
      auto want = [&](int row, int col, int i) {
        double s = i;
        for (int k = 0; k < 16; ++k) s += half_value(A[row * 16 + k]) * half_value(B[col * 16 + k]);
        return s;
      };
      compare_d(out, 64, want, ("kind " + std::to_string(kind) + " swizzle " + std::to_string(swizzle)).c_str());
      r("wgmma_f16", {1}, {128}, img.p, 32768, da, db, kind, out.p, 0);  // no wait: old accumulators
      CHECK(out[5 * 128] == 5.f);
    }
}
TEST(wgmma_after_spin) {
  std::mt19937 g(9);
  std::uniform_real_distribution<double> u(-1, 1);
  std::vector<uint16_t> A(64 * 16), B(64 * 16);
  for (auto& x : A) x = to_half(u(g));
  for (auto& x : B) x = to_half(u(g));
  std::vector<uint8_t> image(16384);
  for (int r = 0; r < 64; ++r)
    for (int k = 0; k < 16; ++k) {
      memcpy(&image[k_major(3, 64, r, k * 2)], &A[r * 16 + k], 2);
      memcpy(&image[8192 + k_major(3, 64, r, k * 2)], &B[r * 16 + k], 2);
    }
  Buf<uint8_t> img(image);
  Buf<float> out(32 * 128);
  Run r("hopper90");
  r.dyn = 16384;
  r("wgmma_after_spin", {1}, {160}, img.p, 16384, desc(0, 16, 1024, 1), desc(8192, 16, 1024, 1), 200000, out.p);
  compare_d(out, 64, [&](int row, int col, int i) {
    double s = i;
    for (int k = 0; k < 16; ++k) s += 2 * half_value(A[row * 16 + k]) * half_value(B[col * 16 + k]);
    return s;
  }, "after a spin");
}
TEST(wgmma_a_in_registers) {
  std::mt19937 g(5);
  std::uniform_real_distribution<double> u(-1, 1);
  std::vector<uint16_t> A(64 * 16), B(64 * 16);
  for (auto& x : A) x = to_half(u(g));
  for (auto& x : B) x = to_half(u(g));
  std::vector<uint8_t> image(8192);
  for (int r = 0; r < 64; ++r) for (int k = 0; k < 16; ++k) memcpy(&image[k_major(3, 64, r, k * 2)], &B[r * 16 + k], 2);
  Buf<uint32_t> ra(512);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 8; ++i) {
      int row = 16 * (t / 32) + t % 32 / 4 + (i / 2 % 2) * 8, col = t % 4 * 2 + i % 2 + (i / 4) * 8;
      ra[i / 2 * 128 + t] |= uint32_t(A[row * 16 + col]) << (16 * (i & 1));
    }
  Buf<uint8_t> img(image);
  Buf<float> out(32 * 128);
  Run r("hopper90");
  r.dyn = 8192;
  r("wgmma_f16_reg", {1}, {128}, img.p, 8192, ra.p, desc(0, 16, 1024, 1), out.p);
  compare_d(out, 64, [&](int row, int col, int) {
    double s = 0;  // scale-d false, A negated
    for (int k = 0; k < 16; ++k) s -= half_value(A[row * 16 + k]) * half_value(B[col * 16 + k]);
    return s;
  }, "A in registers");
}
TEST(wgmma_tf32_fp8) {
  std::mt19937 g(6);
  std::uniform_real_distribution<float> u(-1, 1);
  for (int swizzle : {0, 1, 2, 3}) {
    std::vector<float> A(64 * 8), B(16 * 8);
    for (auto& x : A) x = std::ldexp(std::nearbyint(u(g) * 512), -9);
    for (auto& x : B) x = std::ldexp(std::nearbyint(u(g) * 512), -9);
    std::vector<uint8_t> image(16384 + 4096);
    const int width = 16 << swizzle;
    for (int r = 0; r < 64; ++r) for (int k = 0; k < 8; ++k) memcpy(&image[k_major(swizzle, 64, r, k * 4)], &A[r * 8 + k], 4);
    for (int r = 0; r < 16; ++r) for (int k = 0; k < 8; ++k) memcpy(&image[16384 + k_major(swizzle, 16, r, k * 4)], &B[r * 8 + k], 4);
    auto d = [&](int base, int rows) { return swizzle == 0 ? desc(base, rows * 16, 128, 0) : desc(base, 16, 8 * width, kMode[swizzle]); };
    Buf<uint8_t> img(image);
    Buf<float> out(8 * 128);
    Run r("hopper90");
    r.dyn = int(image.size());
    r("wgmma_tf32", {1}, {128}, img.p, int(image.size()), d(0, 64), d(16384, 16), out.p);
    compare_d(out, 16, [&](int row, int col, int) { double s = 0; for (int k = 0; k < 8; ++k) s += double(A[row * 8 + k]) * B[col * 8 + k]; return s; }, "tf32");
    // e4m3: small integers
    std::vector<int> a8(64 * 32), b8(16 * 32);
    auto enc = [](int v) { uint8_t s = v < 0 ? 0x80 : 0; int a = std::abs(v); if (!a) return s; int e = 31 - __builtin_clz(unsigned(a)); return uint8_t(s | (e + 7) << 3 | ((a << 3 >> e) & 7)); };
    for (auto& x : a8) x = int(g() % 17) - 8;
    for (auto& x : b8) x = int(g() % 17) - 8;
    for (int q = 0; q < 64; ++q) for (int k = 0; k < 32; ++k) img[k_major(swizzle, 64, q, k)] = enc(a8[q * 32 + k]);
    for (int q = 0; q < 16; ++q) for (int k = 0; k < 32; ++k) img[16384 + k_major(swizzle, 16, q, k)] = enc(b8[q * 32 + k]);
    r("wgmma_e4m3", {1}, {128}, img.p, int(image.size()), d(0, 64), d(16384, 16), out.p);
    compare_d(out, 16, [&](int row, int col, int) { double s = 0; for (int k = 0; k < 32; ++k) s += a8[row * 32 + k] * b8[col * 32 + k]; return s; }, "e4m3");
  }
}
TEST(tma_wgmma_gemm) {
  const int M = 150, N = 100, K = 328;
  std::mt19937 g(8);
  std::uniform_real_distribution<double> u(-1, 1);
  Buf<uint16_t> a(M * K), b(N * K);
  Buf<float> c(M * N);
  for (int i = 0; i < M * K; ++i) a[i] = to_bf16(u(g));
  for (int i = 0; i < N * K; ++i) b[i] = to_bf16(u(g));
  Map ma = pack(map2d(a.p, 2, TensorMap::kBfloat16, K, M, K * 2, 64, 64, 3)), mb = pack(map2d(b.p, 2, TensorMap::kBfloat16, K, N, K * 2, 64, 64, 3));
  for (int checks = 0; checks < 2; ++checks) {
    Run r("hopper90");
    r.dyn = 32768;
    r.opt.check_races = r.opt.check_uninitialized = checks;
    auto st = r("tma_gemm", {2, 3}, {160}, ma, mb, M, N, K, c.p);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) {
        double s = 0;
        for (int k = 0; k < K; ++k) s += bf16_value(a[i * K + k]) * bf16_value(b[j * K + k]);
        CHECK(close(c[i * N + j], s, 1e-5, 1e-5));
      }
    CHECK(st.mma_flops == 6ull * 2 * 64 * 64 * 64 * 6);
  }
}
TEST(multicast_and_remote_arrive) {
  Buf<int> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = i * i;
  Run r("hopper90");
  r.opt.check_uninitialized = r.opt.check_races = true;
  r("multicast", {4}, {32}, in.p, out.p);
  for (int b = 0; b < 4; ++b)
    for (int t = 0; t < 32; ++t) {
      const int* x = &in[b / 2 * 64];
      CHECK(out[b * 32 + t] == x[t] + x[63 - t]);
    }
}
