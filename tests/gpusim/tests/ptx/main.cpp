// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include <chrono>

#include "harness.h"

int main(int argc, char** argv) {
  int ran = 0, failed = 0;
  for (auto& t : tests()) {
    if (argc > 1 && std::string(t.name).find(argv[1]) == std::string::npos) continue;
    ++ran;
    auto t0 = std::chrono::steady_clock::now();
    std::string error;
    try { t.fn(); }
    catch (const TestFailure& f) { error = f.what; }
    catch (const Fault& f) { error = std::string("unexpected fault: ") + f.what(); }
    catch (const std::exception& e) { error = e.what(); }
    double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    printf("%-40s %s %.2fs\n", t.name, error.empty() ? "ok" : "FAILED", s);
    if (!error.empty()) { ++failed; printf("    %s\n", error.c_str()); }
    fflush(stdout);
  }
  printf("%d tests, %d failed\n", ran, failed);
  return failed != 0;
}
