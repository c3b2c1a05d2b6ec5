// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The runtime's error state.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace gpusim::runtime {

// Remembers an error for cudaGetLastError and returns it.
cudaError_t note(cudaError_t error);

// A kernel went wrong. The error is held until somebody is told of it: by the
// launch's own cudaGetLastError, or by the next call that synchronizes. After
// that the device is usable again (a real one would need a new process).
cudaError_t report_fault(cudaError_t error, const std::string& text);
cudaError_t take_fault();

const char* error_name(cudaError_t error);
const char* error_text(cudaError_t error);

}  // namespace gpusim::runtime
