// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Which backend serves a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include "../params.h"

namespace resnet_fused {

inline const Backend& backend_of(c10::DeviceType device) {
  if (device == c10::DeviceType::CPU) return cpu_backend();
  if (device == c10::DeviceType::CUDA && cuda_backend() != nullptr) return *cuda_backend();
  TORCH_CHECK_NOT_IMPLEMENTED(false, "resnet_fused was built without kernels for device ", device);
}

// A tensor's backend with its device made the current one: on_device_of(y)->apply(...).
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& t) : guard_(t.device()), backend_(backend_of(t.device().type())) {}
  const Backend* operator->() const { return &backend_; }

 private:
  c10::DeviceGuard guard_;
  const Backend& backend_;
};

inline OnDevice on_device_of(const at::Tensor& t) { return OnDevice(t); }

}  // namespace resnet_fused
