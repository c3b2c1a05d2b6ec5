// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The Python module _C: what is not an operator.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../conv_params.h"
#include "../cpu/kernels.h"
#include "../cpu/memory_pool.h"
#include "backends.h"
#include "conv_ops.h"

#ifndef RESNET_FUSED_VERSION
#define RESNET_FUSED_VERSION "unknown"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = RESNET_FUSED_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = resnet_fused::cuda_backend() != nullptr;
  py::list instruction_sets;
  instruction_sets.append("baseline");
  if (resnet_fused::cpu::kernels_avx2.apply) instruction_sets.append("avx2");
  if (resnet_fused::cpu::kernels_avx512.apply) instruction_sets.append("avx512");
  info["cpu_instruction_sets"] = instruction_sets;
  info["cpu_instruction_set"] = resnet_fused::cpu::instruction_set();
  return info;
}

// In how many tiles bn_statistics and bn_backward_reduce leave their results for a dense tensor of this extent.
int64_t reduction_tiles(const std::string& device, int64_t outer, int64_t channels, int64_t inner) {
  return resnet_fused::backend_of(c10::Device(device).type()).reduction_tiles({outer, channels, inner});
}

// What a device's native convolutions take: a multiple of channels, at most so many, taps, stride, pixels.
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> native_limits(const std::string& device) {
  const resnet_fused::ConvLimits& l = resnet_fused::conv_backend_of(c10::Device(device).type()).limits;
  return {l.channel_multiple, l.channels, l.taps, l.stride, l.pixels};
}

resnet_fused::DType dtype_named(const std::string& name) {
  using resnet_fused::DType;
  if (name == "float32") return DType::Float32;
  if (name == "bfloat16") return DType::BFloat16;
  if (name == "float16") return DType::Float16;
  throw py::value_error("dtype: expected 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

bool native_multiplies(const std::string& device, const std::string& dtype) {
  return resnet_fused::conv_backend_of(c10::Device(device).type()).multiplies(dtype_named(dtype));
}

// Why no convolution runs on a device, by what this build was compiled for; empty if they do.
std::string native_build_reason(const std::string& device) {
  const c10::Device of(device);
  const auto reason = resnet_fused::conv_backend_of(of.type()).reason;
  return reason == nullptr ? "" : reason(of.has_index() ? of.index() : 0);
}

using Sizes = std::vector<int64_t>;

int64_t conv_tiles(const std::string& device, const std::string& dtype, const std::string& pass, const Sizes& x,
                   const Sizes& weight, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  return resnet_fused::conv_tiles(c10::Device(device).type(), dtype_named(dtype), pass, x, weight, stride, padding,
                                  dilation);
}

const char* conv_algorithm(const std::string& dtype, const Sizes& x, const Sizes& weight, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, bool packed) {
  return resnet_fused::conv_algorithm(dtype_named(dtype), x, weight, stride, padding, dilation, packed);
}

py::dict memory_pool_state() {
  const resnet_fused::cpu::PoolState state = resnet_fused::cpu::memory_pool_state();
  py::dict result;
  result["in_use"] = state.in_use;
  result["waiting"] = state.waiting;
  return result;
}

// cpu::Pooling as Python's `with`.
struct PoolingContext {
  std::unique_ptr<resnet_fused::cpu::Pooling> pooling;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("reduction_tiles", &reduction_tiles);
  m.def("native_build_reason", &native_build_reason);
  m.def("native_limits", &native_limits);
  m.def("native_multiplies", &native_multiplies);
  m.def("conv_tiles", &conv_tiles);
  m.def("conv_algorithm", &conv_algorithm);
  m.def("memory_pool_state", &memory_pool_state);
  m.def("empty_memory_pool", &resnet_fused::cpu::empty_memory_pool);
  py::class_<PoolingContext>(m, "Pooling")
      .def(py::init<>())
      .def("__enter__", [](PoolingContext& self) { self.pooling = std::make_unique<resnet_fused::cpu::Pooling>(); })
      .def("__exit__", [](PoolingContext& self, const py::args&) { self.pooling.reset(); });
}
