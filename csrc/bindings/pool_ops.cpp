// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Max pooling as operators of the CPU: validate, allocate, fill the parameters, run the kernels.
#include <ATen/native/Pool.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "../cpu/max_pool.h"
#include "allocate.h"
#include "checks.h"

namespace resnet_fused {
namespace {

using at::IntArrayRef;
using at::Tensor;
using cpu::Plane;

Plane plane_of(IntArrayRef values, const char* name, int64_t least) {
  TORCH_CHECK_VALUE(values.size() == 2 && values[0] >= least && values[1] >= least, name,
                    ": expected two numbers >= ", least, ", got ", values);
  return {values[0], values[1]};
}

cpu::Window window_of(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  const cpu::Window window{plane_of(kernel_size, "kernel_size", 1), plane_of(stride, "stride", 1),
                           plane_of(padding, "padding", 0), plane_of(dilation, "dilation", 1)};
  const auto [kernel, _, pad, step] = window;
  TORCH_CHECK_VALUE(kernel.height <= cpu::kMaxPoolTaps / kernel.width, "kernel_size: expected at most ",
                    cpu::kMaxPoolTaps, " positions, got ", kernel_size);
  // As PyTorch has it: no window lies in the padding alone, unless dilation leaps over the input.
  TORCH_CHECK_VALUE(
      2 * pad.height <= (kernel.height - 1) * step.height + 1 && 2 * pad.width <= (kernel.width - 1) * step.width + 1,
      "padding: expected at most half of the window, kernel_size ", kernel_size, ", dilation ", dilation, ", got ",
      padding);
  return window;
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  return at::native::pooling_output_shape<int64_t>(size, kernel, padding, stride, dilation, ceil_mode);
}

Plane output_plane(const Plane& input, const cpu::Window& w, bool ceil_mode) {
  const Plane output{
      output_size(input.height, w.kernel.height, w.stride.height, w.padding.height, w.dilation.height, ceil_mode),
      output_size(input.width, w.kernel.width, w.stride.width, w.padding.width, w.dilation.width, ceil_mode)};
  TORCH_CHECK_VALUE(output.height >= 1 && output.width >= 1, "kernel_size: expected a window within the input of ",
                    input.height, " x ", input.width, ", got an output of ", output.height, " x ", output.width);
  return output;
}

DType pooled_dtype(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  TORCH_CHECK_TYPE(dtype != DType::Float64, name, ": expected float32, bfloat16 or float16, got float64");
  return dtype;
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                      IntArrayRef dilation, bool ceil_mode, bool write_taps) {
  check_activation(x, "x");
  cpu::MaxPoolParams p{};
  p.dtype = pooled_dtype(x, "x");
  p.window = window_of(kernel_size, stride, padding, dilation);
  p.images = x.size(0);
  p.channels = x.size(1);
  p.input = {x.size(2), x.size(3)};
  p.output = output_plane(p.input, p.window, ceil_mode);
  const Tensor dense = x.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t sizes[] = {p.images, p.channels, p.output.height, p.output.width};
  Tensor z = empty_pooled(x, sizes, at::MemoryFormat::ChannelsLast);
  const auto bytes = x.options().dtype(at::kByte);
  Tensor taps = write_taps ? empty_pooled(bytes, sizes, at::MemoryFormat::ChannelsLast) : at::empty({0}, bytes);
  p.x = dense.const_data_ptr();
  p.z = z.data_ptr();
  p.taps = write_taps ? taps.data_ptr<uint8_t>() : nullptr;
  if (z.numel() != 0) cpu::run_max_pool(p);
  return {z, taps};
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& taps, IntArrayRef input_plane, IntArrayRef kernel_size,
                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  check_activation(grad, "grad");
  cpu::MaxPoolBackwardParams p{};
  p.dtype = pooled_dtype(grad, "grad");
  p.window = window_of(kernel_size, stride, padding, dilation);
  p.images = grad.size(0);
  p.channels = grad.size(1);
  p.input = plane_of(input_plane, "input_plane", 1);
  p.output = output_plane(p.input, p.window, ceil_mode);
  TORCH_CHECK_VALUE(grad.size(2) == p.output.height && grad.size(3) == p.output.width, "grad: expected a plane of ",
                    p.output.height, " x ", p.output.width, ", got ", grad.sizes());
  TORCH_CHECK_VALUE(taps.sizes() == grad.sizes(), "taps: expected the shape of grad, ", grad.sizes(), ", got ",
                    taps.sizes());
  TORCH_CHECK_TYPE(taps.scalar_type() == at::kByte, "taps: expected uint8, got ", taps.scalar_type());
  const Tensor dense_grad = grad.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dense_taps = taps.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor grad_x =
      empty_pooled(grad, {p.images, p.channels, p.input.height, p.input.width}, at::MemoryFormat::ChannelsLast);
  p.grad = dense_grad.const_data_ptr();
  p.taps = dense_taps.const_data_ptr<uint8_t>();
  p.grad_x = grad_x.data_ptr();
  if (grad_x.numel() != 0) cpu::run_max_pool_backward(p);
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_backward", max_pool2d_backward);
}

// resnet_fused/pooling.py differentiates; asking the operators themselves is an error rather than a silent None.
TORCH_LIBRARY_IMPL(resnet_fused, Autograd, m) {
  for (const char* name : {"max_pool2d", "max_pool2d_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace resnet_fused
