// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The Python module _C: what is not an operator.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "../cpu/kernels.h"

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
#ifdef RESNET_FUSED_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  py::list instruction_sets;
  instruction_sets.append("baseline");
  if (resnet_fused::cpu::kernels_avx2.apply) instruction_sets.append("avx2");
  if (resnet_fused::cpu::kernels_avx512.apply) instruction_sets.append("avx512");
  info["cpu_instruction_sets"] = instruction_sets;
  info["cpu_instruction_set"] = resnet_fused::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
