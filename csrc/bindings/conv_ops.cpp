// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The native convolutions as operators: validate, allocate, fill the parameters, run the device's kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../conv_params.h"
#include "allocate.h"
#include "checks.h"
#include "conv_ops.h"

namespace resnet_fused {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// channels_last and aligned to the kernels' 16-byte accesses, copied if need be.
Tensor conform(const Tensor& t) {
  const Tensor dense = t.contiguous(at::MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense
                                                                       : dense.clone(at::MemoryFormat::ChannelsLast);
}

const ConvBackend& backend_of(const Tensor& t) { return conv_backend_of(t.device().type()); }

bool fits(int64_t channels, const ConvLimits& limits) {
  return channels % limits.channel_multiple == 0 && channels > 0 && channels <= limits.channels;
}

void check_conv_activation(const Tensor& t, const char* name) {
  check_activation(t, name);
  const ConvLimits& limits = backend_of(t).limits;
  TORCH_CHECK_TYPE(t.scalar_type() != at::kDouble, name, ": expected float32, bfloat16 or float16, got ",
                   t.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(backend_of(t).multiplies(dtype_of(t, name)), name, ": this processor or PyTorch has no ",
                              "matrix products of ", t.scalar_type(), " for native convolutions");
  TORCH_CHECK_VALUE(fits(t.size(1), limits), name, ": expected a multiple of ", limits.channel_multiple,
                    " channels up to ", limits.channels, ", got ", t.size(1));
  TORCH_CHECK_VALUE(t.size(0) * t.size(2) * t.size(3) <= limits.pixels, name, ": expected at most ", limits.pixels,
                    " pixels, got ", t.sizes());
}

void check_same(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name, ", ",
                   like.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected the device of ", like_name, ", ", like.device(),
                    ", got ", t.device());
}

// Of x's dtype; on the CPU float32 as well, which is rounded to it.
void check_weight(const Tensor& weight, const Tensor& x, const char* x_name) {
  if (x.is_cpu() && weight.is_cpu() && weight.scalar_type() == at::kFloat) return;
  check_same(weight, "weight", x, x_name);
}

int pair_at(IntArrayRef values, int i, const char* name, int64_t least, int64_t most) {
  TORCH_CHECK_VALUE(values.size() == 2 && values[i] >= least && values[i] <= most, name, ": expected two integers in [",
                    least, ", ", most, "], got ", values);
  return static_cast<int>(values[i]);
}

// 0 where the filter does not fit.
int64_t output_size(int64_t size, int pad, int dilation, int64_t filter, int stride) {
  const int64_t left = size + 2 * pad - dilation * (filter - 1) - 1;
  return left < 0 ? 0 : left / stride + 1;
}

// From the input's size [N, C, H, W] and the weight's.
ConvShape conv_shape(const ConvLimits& limits, IntArrayRef x, IntArrayRef weight, IntArrayRef stride,
                     IntArrayRef padding, IntArrayRef dilation) {
  TORCH_CHECK_VALUE(weight.size() == 4 && weight[1] == x[1], "weight: expected shape [K, ", x[1], ", R, S], got ",
                    weight);
  TORCH_CHECK_VALUE(fits(weight[0], limits), "weight: expected a multiple of ", limits.channel_multiple,
                    " output channels up to ", limits.channels, ", got ", weight[0]);
  TORCH_CHECK_VALUE(weight[2] >= 1 && weight[3] >= 1 && weight[2] <= limits.taps && weight[3] <= limits.taps,
                    "weight: expected 1 to ", limits.taps, " taps, got shape ", weight);
  constexpr int64_t kMost = 1 << 15;
  ConvShape s{};
  s.n = static_cast<int>(x[0]), s.c = static_cast<int>(x[1]);
  s.h = static_cast<int>(x[2]), s.w = static_cast<int>(x[3]);
  s.k = static_cast<int>(weight[0]), s.r = static_cast<int>(weight[2]), s.s = static_cast<int>(weight[3]);
  s.stride_h = pair_at(stride, 0, "stride", 1, limits.stride);
  s.stride_w = pair_at(stride, 1, "stride", 1, limits.stride);
  s.pad_h = pair_at(padding, 0, "padding", 0, kMost), s.pad_w = pair_at(padding, 1, "padding", 0, kMost);
  s.dilation_h = pair_at(dilation, 0, "dilation", 1, kMost), s.dilation_w = pair_at(dilation, 1, "dilation", 1, kMost);
  const int64_t p = output_size(s.h, s.pad_h, s.dilation_h, s.r, s.stride_h);
  const int64_t q = output_size(s.w, s.pad_w, s.dilation_w, s.s, s.stride_w);
  TORCH_CHECK_VALUE(p >= 1 && q >= 1, "x: expected a plane of at least the filter's extent, got ", x, " for weight ",
                    weight);
  TORCH_CHECK_VALUE(p * q * s.n <= limits.pixels, "x: expected at most ", limits.pixels, " output pixels, got ", x,
                    " with padding ", padding);
  s.p = static_cast<int>(p), s.q = static_cast<int>(q);
  return s;
}

const void* table_of(const OptionalTensor& t, const char* name, int64_t rows, int64_t channels, const Tensor& like) {
  if (!t.has_value() || !t->defined()) return nullptr;
  check_table(*t, name, rows, channels, at::kFloat, like);
  return t->const_data_ptr();
}

Tensor empty_activation(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return empty_pooled(like, {like.size(0), channels, height, width}, at::MemoryFormat::ChannelsLast);
}

FpropParams fprop_params(const Tensor& x, const OptionalTensor& coefficients, const Tensor& weight, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation) {
  FpropParams p{};
  p.shape = conv_shape(backend_of(x).limits, x.sizes(), weight.sizes(), stride, padding, dilation);
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = dtype_of(weight, "weight");
  p.x = x.const_data_ptr();
  p.coefficients = table_of(coefficients, "coefficients", kCoefficientRows, x.size(1), x);
  p.weight = weight.const_data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> conv_fprop(const Tensor& x, const OptionalTensor& coefficients, const Tensor& weight,
                                      const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                                      IntArrayRef dilation) {
  check_conv_activation(x, "x");
  check_weight(weight, x, "x");
  const Tensor dense_x = conform(x), dense_weight = conform(weight);
  FpropParams p = fprop_params(dense_x, coefficients, dense_weight, stride, padding, dilation);
  const ConvShape& s = p.shape;
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == s.k && bias->is_contiguous(), "bias: expected shape [", s.k,
                      "], got ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat, "bias: expected float32, got ", bias->scalar_type());
    TORCH_CHECK_VALUE(bias->device() == x.device(), "bias: expected device ", x.device(), ", got ", bias->device());
    p.bias = bias->const_data_ptr();
  }
  Tensor y = empty_activation(x, s.k, s.p, s.q);
  if (y.numel() == 0) return {y, at::zeros({1, kStatisticsRows, s.k}, x.options().dtype(at::kFloat))};
  Tensor statistics =
      at::empty({backend_of(x).fprop_tiles(s, p.dtype), kStatisticsRows, s.k}, x.options().dtype(at::kFloat));
  p.y = y.data_ptr();
  p.statistics = statistics.data_ptr();
  const c10::DeviceGuard guard(x.device());
  backend_of(x).fprop(p);
  return {y, statistics};
}

// An input as small as the filter stands for all: packed weights do not depend on it.
ConvShape shape_of_weight(const ConvLimits& limits, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
                          IntArrayRef dilation) {
  TORCH_CHECK_VALUE(weight.size() == 4 && dilation.size() == 2, "weight, dilation: expected [K, C, R, S] and two ",
                    "integers, got ", weight, " and ", dilation);
  const std::array<int64_t, 4> x{1, weight[1], (weight[2] - 1) * dilation[0] + 1, (weight[3] - 1) * dilation[1] + 1};
  return conv_shape(limits, x, weight, stride, padding, dilation);
}

Tensor conv_pack(const Tensor& weight, at::ScalarType dtype, IntArrayRef stride, IntArrayRef padding,
                 IntArrayRef dilation) {
  const ConvBackend& backend = backend_of(weight);
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat || weight.scalar_type() == dtype,
                   "weight: expected float32 or dtype, ", dtype, ", got ", weight.scalar_type());
  FpropParams p{};
  p.shape = shape_of_weight(backend.limits, weight.sizes(), stride, padding, dilation);
  Tensor packed = at::empty({0}, weight.options().dtype(dtype));
  p.dtype = dtype_of(packed, "dtype");
  TORCH_CHECK_NOT_IMPLEMENTED(backend.multiplies(p.dtype),
                              "dtype: this processor or PyTorch has no matrix products of ", dtype,
                              " for native convolutions");
  const Tensor dense_weight = conform(weight);
  p.weight = dense_weight.const_data_ptr();
  p.weight_dtype = dtype_of(weight, "weight");
  packed.resize_({backend.packed_bytes(p.shape, p.dtype) / static_cast<int64_t>(packed.element_size())}).zero_();
  backend.pack(p, packed.data_ptr());
  return packed;
}

void check_packed(const Tensor& packed, const ConvShape& shape, DType dtype, const Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(backend_of(x).pack != nullptr, "packed: no packed weights on device ", x.device());
  check_same(packed, "packed", x, "x");
  const int64_t bytes = backend_of(x).packed_bytes(shape, dtype);
  TORCH_CHECK_VALUE(static_cast<int64_t>(packed.nbytes()) == bytes && packed.is_contiguous(),
                    "packed: expected what conv_pack makes of this weight, ", bytes, " bytes, got ", packed.nbytes());
}

Tensor conv_fprop_inference(const Tensor& x, const OptionalTensor& coefficients, const Tensor& weight,
                            const Tensor& affine, const OptionalTensor& shortcut, bool relu, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, const OptionalTensor& packed) {
  check_conv_activation(x, "x");
  check_weight(weight, x, "x");
  const Tensor dense_x = conform(x), dense_weight = conform(weight);
  FpropParams p = fprop_params(dense_x, coefficients, dense_weight, stride, padding, dilation);
  const ConvShape& s = p.shape;
  p.affine = table_of(affine, "affine", kCoefficientRows, s.k, x);
  p.relu = relu;
  Tensor z = empty_activation(x, s.k, s.p, s.q), dense_shortcut;
  if (shortcut.has_value() && shortcut->defined()) {
    check_like(*shortcut, "shortcut", z, "the output");
    dense_shortcut = conform(*shortcut);
    p.shortcut = dense_shortcut.const_data_ptr();
  }
  if (packed.has_value() && packed->defined()) {
    check_packed(*packed, s, p.dtype, x);
    p.packed = packed->const_data_ptr();
  }
  if (z.numel() == 0) return z;
  p.y = z.data_ptr();
  const c10::DeviceGuard guard(x.device());
  backend_of(x).fprop(p);
  return z;
}

// The gradient of the output as the kernels read it; `y_storage` keeps a copy alive.
OutputGradient output_gradient(const Tensor& grad, const OptionalTensor& y, const OptionalTensor& backward_coefficients,
                               Tensor& y_storage) {
  OutputGradient result{grad.const_data_ptr()};
  const bool given = y.has_value() && y->defined();
  TORCH_CHECK_VALUE(given == (backward_coefficients.has_value() && backward_coefficients->defined()),
                    "y, backward_coefficients: expected both or neither");
  if (!given) return result;
  check_like(*y, "y", grad, "grad");
  y_storage = conform(*y);
  result.y = y_storage.const_data_ptr();
  result.backward_coefficients =
      table_of(backward_coefficients, "backward_coefficients", kBackwardRows, grad.size(1), grad);
  return result;
}

void check_grad(const Tensor& grad, const ConvShape& s) {
  TORCH_CHECK_VALUE(grad.size(0) == s.n && grad.size(1) == s.k && grad.size(2) == s.p && grad.size(3) == s.q,
                    "grad: expected shape [", s.n, ", ", s.k, ", ", s.p, ", ", s.q, "], got ", grad.sizes());
}

std::tuple<Tensor, Tensor> conv_dgrad(const Tensor& grad, const OptionalTensor& y,
                                      const OptionalTensor& backward_coefficients, const Tensor& weight,
                                      IntArrayRef input_plane, IntArrayRef stride, IntArrayRef padding,
                                      IntArrayRef dilation, const OptionalTensor& addend, const OptionalTensor& mask_y,
                                      const OptionalTensor& mask_coefficients) {
  check_conv_activation(grad, "grad");
  check_weight(weight, grad, "grad");
  TORCH_CHECK_VALUE(weight.dim() == 4, "weight: expected [K, C, R, S], got ", weight.sizes());
  TORCH_CHECK_VALUE(input_plane.size() == 2, "input_plane: expected two integers, got ", input_plane);
  Tensor dx = empty_activation(grad, weight.size(1), input_plane[0], input_plane[1]);
  check_conv_activation(dx, "weight");
  const Tensor dense_grad = conform(grad), dense_weight = conform(weight);
  Tensor y_storage, dense_addend, dense_mask_y;
  DgradParams p{};
  p.shape = conv_shape(backend_of(grad).limits, dx.sizes(), weight.sizes(), stride, padding, dilation);
  check_grad(grad, p.shape);
  p.dtype = dtype_of(grad, "grad");
  p.weight_dtype = dtype_of(weight, "weight");
  p.grad = output_gradient(dense_grad, y, backward_coefficients, y_storage);
  p.weight = dense_weight.const_data_ptr();
  p.dx = dx.data_ptr();
  if (addend.has_value() && addend->defined()) {
    check_like(*addend, "addend", dx, "the input");
    dense_addend = conform(*addend);
    p.addend = dense_addend.const_data_ptr();
  }
  const bool masked = mask_y.has_value() && mask_y->defined();
  TORCH_CHECK_VALUE(masked == (mask_coefficients.has_value() && mask_coefficients->defined()),
                    "mask_y, mask_coefficients: expected both or neither");
  Tensor sums = at::empty({masked ? backend_of(grad).dgrad_tiles(p.shape, p.dtype) : 0, 2, p.shape.c},
                          grad.options().dtype(at::kFloat).memory_format(std::nullopt));
  if (masked) {
    check_like(*mask_y, "mask_y", dx, "the input");
    dense_mask_y = conform(*mask_y);
    p.mask_y = dense_mask_y.const_data_ptr();
    p.mask_coefficients = table_of(mask_coefficients, "mask_coefficients", kCoefficientRows, p.shape.c, grad);
    p.sums = sums.data_ptr();
  }
  if (dx.numel() == 0) return {dx, sums};
  const c10::DeviceGuard guard(grad.device());
  backend_of(grad).dgrad(p);
  return {dx, sums};
}

// Of a weight's gradient.
void check_gradient_dtype(at::ScalarType dtype, const Tensor& x) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == x.scalar_type(), "dtype: expected float32 or x's ", x.scalar_type(),
                   ", got ", dtype);
}

Tensor conv_wgrad(const Tensor& grad, const OptionalTensor& y, const OptionalTensor& backward_coefficients,
                  const Tensor& x, const OptionalTensor& coefficients, IntArrayRef filter, IntArrayRef stride,
                  IntArrayRef padding, IntArrayRef dilation, at::ScalarType dtype) {
  check_conv_activation(grad, "grad");
  check_conv_activation(x, "x");
  check_same(grad, "grad", x, "x");
  TORCH_CHECK_VALUE(filter.size() == 2, "filter: expected two integers, got ", filter);
  check_gradient_dtype(dtype, x);
  Tensor dw = at::empty({grad.size(1), x.size(1), filter[0], filter[1]},
                        x.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
  const Tensor dense_grad = conform(grad), dense_x = conform(x);
  Tensor y_storage;
  WgradParams p{};
  p.shape = conv_shape(backend_of(x).limits, x.sizes(), dw.sizes(), stride, padding, dilation);
  check_grad(grad, p.shape);
  if (grad.numel() == 0) return dw.zero_();
  p.dtype = dtype_of(x, "x");
  p.grad = output_gradient(dense_grad, y, backward_coefficients, y_storage);
  p.x = dense_x.const_data_ptr();
  p.coefficients = table_of(coefficients, "coefficients", kCoefficientRows, x.size(1), x);
  p.dw = dw.data_ptr();
  p.dw_dtype = dtype_of(dw, "dtype");
  const int64_t floats = backend_of(x).wgrad_workspace(p.shape, p.dtype, p.dw_dtype);
  const Tensor workspace = empty_pooled(x.options().dtype(at::kFloat), {floats}, at::MemoryFormat::Contiguous);
  p.workspace = workspace.data_ptr<float>();
  const c10::DeviceGuard guard(x.device());
  backend_of(x).wgrad(p);
  return dw;
}

// 0 where dgrad and wgrad are two passes.
int64_t one_read_tiles(const ConvBackend& backend, const ConvShape& shape, DType dtype) {
  return backend.one_read_tiles == nullptr ? 0 : backend.one_read_tiles(shape, dtype);
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad, const OptionalTensor& y,
                                                 const OptionalTensor& backward_coefficients, const Tensor& weight,
                                                 const Tensor& x, const OptionalTensor& coefficients,
                                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                 const OptionalTensor& addend, at::ScalarType dtype) {
  check_conv_activation(grad, "grad");
  check_conv_activation(x, "x");
  check_same(grad, "grad", x, "x");
  check_weight(weight, x, "x");
  BackwardParams p{};
  p.shape = conv_shape(backend_of(x).limits, x.sizes(), weight.sizes(), stride, padding, dilation);
  p.dtype = dtype_of(x, "x");
  check_grad(grad, p.shape);
  const bool masked = coefficients.has_value() && coefficients->defined();
  const int64_t tiles = one_read_tiles(backend_of(x), p.shape, p.dtype);
  if (tiles == 0 || !y.has_value() || !y->defined()) {
    Tensor dw = conv_wgrad(grad, y, backward_coefficients, x, coefficients, weight.sizes().slice(2), stride, padding,
                           dilation, dtype);
    auto [dx, sums] = conv_dgrad(grad, y, backward_coefficients, weight, x.sizes().slice(2), stride, padding, dilation,
                                 addend, masked ? OptionalTensor(x) : OptionalTensor(), coefficients);
    return {dx, sums, dw};
  }
  check_gradient_dtype(dtype, x);
  const Tensor dense_grad = conform(grad), dense_weight = conform(weight), dense_x = conform(x);
  Tensor y_storage, dense_addend;
  p.grad = output_gradient(dense_grad, y, backward_coefficients, y_storage);
  p.weight = dense_weight.const_data_ptr();
  p.x = dense_x.const_data_ptr();
  p.coefficients = table_of(coefficients, "coefficients", kCoefficientRows, x.size(1), x);
  Tensor dx = empty_activation(x, x.size(1), x.size(2), x.size(3));
  if (addend.has_value() && addend->defined()) {
    check_like(*addend, "addend", dx, "the input");
    dense_addend = conform(*addend);
    p.addend = dense_addend.const_data_ptr();
  }
  const auto floats = x.options().dtype(at::kFloat).memory_format(std::nullopt);
  Tensor sums = at::empty({masked ? tiles : 0, 2, p.shape.c}, floats);
  Tensor dw = at::empty(weight.sizes(), x.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
  const Tensor workspace = empty_pooled(floats, {tiles * p.shape.k * p.shape.c}, at::MemoryFormat::Contiguous);
  p.dx = dx.data_ptr();
  p.sums = sums.data_ptr();
  p.workspace = workspace.data_ptr<float>();
  p.dw = dw.data_ptr();
  p.dw_dtype = dtype_of(dw, "dtype");
  const c10::DeviceGuard guard(x.device());
  backend_of(x).backward(p);
  return {dx, sums, dw};
}

}  // namespace

const ConvBackend& conv_backend_of(c10::DeviceType device) {
  if (device == c10::DeviceType::CPU) return cpu_conv_backend();
  if (device == c10::DeviceType::CUDA && cuda_conv_backend() != nullptr) return *cuda_conv_backend();
  TORCH_CHECK_NOT_IMPLEMENTED(false, "resnet_fused was built without native convolutions for device ", device);
}

int64_t conv_tiles(c10::DeviceType device, DType dtype, const std::string& pass, IntArrayRef x, IntArrayRef weight,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  TORCH_CHECK_VALUE(pass == "fprop" || pass == "dgrad" || pass == "one_read",
                    "pass: expected 'fprop', 'dgrad' or 'one_read', got '", pass, "'");
  const ConvBackend& backend = conv_backend_of(device);
  const ConvShape shape = conv_shape(backend.limits, x, weight, stride, padding, dilation);
  if (pass == "one_read") return one_read_tiles(backend, shape, dtype);
  return pass == "fprop" ? backend.fprop_tiles(shape, dtype) : backend.dgrad_tiles(shape, dtype);
}

const char* conv_algorithm(DType dtype, IntArrayRef x, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, bool packed) {
  const ConvBackend& backend = cpu_conv_backend();
  return backend.algorithm(conv_shape(backend.limits, x, weight, stride, padding, dilation), dtype, packed);
}

namespace {
void register_for_device(torch::Library& m) {
  m.impl("conv_fprop", conv_fprop);
  m.impl("conv_fprop_inference", conv_fprop_inference);
  m.impl("conv_dgrad", conv_dgrad);
  m.impl("conv_wgrad", conv_wgrad);
  m.impl("conv_backward", conv_backward);
}
}  // namespace

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  register_for_device(m);
  m.impl("conv_pack", conv_pack);
}
TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { register_for_device(m); }

// As the rest of the vocabulary, without a derivative of their own.
TORCH_LIBRARY_IMPL(resnet_fused, Autograd, m) {
  for (const char* name :
       {"conv_fprop", "conv_fprop_inference", "conv_dgrad", "conv_wgrad", "conv_backward", "conv_pack"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace resnet_fused
