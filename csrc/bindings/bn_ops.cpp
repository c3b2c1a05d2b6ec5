// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The batch norm vocabulary as operators: validate, allocate, fill the parameters, run the device's kernels.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "allocate.h"
#include "backends.h"
#include "checks.h"

namespace resnet_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Statistics and sums come in as many tiles as the backend leaves: bn_finalize and bn_backward_finalize merge them.
int64_t reduction_tiles(const Dense& dense) {
  return backend_of(dense.tensor.device().type()).reduction_tiles(dense.extent());
}

// What the backend needs to merge `tiles` [tiles, ..., C].
Tensor merge_workspace(const Tensor& tiles, int64_t rows, at::ScalarType dtype) {
  const int64_t groups = backend_of(tiles.device().type()).merge_groups(tiles.size(0));
  return at::empty({groups, rows, tiles.size(2)}, tiles.options().dtype(dtype));
}

at::TensorOptions acc_options(const Tensor& like, at::ScalarType acc) {
  return at::TensorOptions().device(like.device()).dtype(acc);
}

// A new tensor of the layout that the kernels walk.
Tensor empty_like(const Dense& dense) { return empty_pooled(dense.tensor, dense.tensor.sizes(), dense.format); }

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Checks and conforms the optional shortcut; `storage` keeps a copy alive while the kernel runs.
ShortcutInput shortcut_input(const OptionalTensor& shortcut, const OptionalTensor& coefficients, const Tensor& y,
                             const Dense& layout, Tensor& storage) {
  ShortcutInput input;
  if (!given(shortcut)) {
    TORCH_CHECK_VALUE(!given(coefficients), "shortcut_coefficients: given without a shortcut");
    return input;
  }
  check_like(*shortcut, "shortcut", y, "y");
  storage = layout.conform(*shortcut);
  input.data = storage.const_data_ptr();
  if (given(coefficients)) {
    check_table(*coefficients, "shortcut_coefficients", kCoefficientRows, y.size(1), acc_type(dtype_of(y, "y")), y);
    input.coefficients = coefficients->const_data_ptr();
  }
  return input;
}

ReluMask relu_mask(bool relu, const OptionalTensor& z, const Tensor& y, const Dense& layout, Tensor& storage) {
  ReluMask mask{relu, nullptr};
  if (relu && given(z)) {
    check_like(*z, "z", y, "y");
    storage = layout.conform(*z);
    mask.z = storage.const_data_ptr();
  }
  return mask;
}

Tensor bn_statistics(const Tensor& y) {
  check_activation(y, "y");
  const Dense dense(y);
  const DType dtype = dtype_of(y, "y");
  Tensor statistics = at::empty({reduction_tiles(dense), kStatisticsRows, y.size(1)}, acc_options(y, acc_type(dtype)));
  if (y.numel() == 0) return statistics.zero_();
  on_device_of(y)->statistics({dense.extent(), dtype, dense.tensor.const_data_ptr(), statistics.data_ptr()});
  return statistics;
}

// [tiles, rows, C] acc
void check_tiles(const Tensor& tiles, const char* name) {
  TORCH_CHECK_TYPE(tiles.scalar_type() == at::kFloat || tiles.scalar_type() == at::kDouble, name,
                   ": expected float32 or float64, got ", tiles.scalar_type());
  TORCH_CHECK_VALUE(tiles.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tiles.strides());
}

void check_statistics(const Tensor& statistics) {
  TORCH_CHECK_VALUE(statistics.dim() == 3 && statistics.size(1) == kStatisticsRows,
                    "statistics: expected shape [tiles, 3, C], got ", statistics.sizes());
  check_tiles(statistics, "statistics");
}

Tensor bn_merge_statistics(const Tensor& statistics) {
  check_statistics(statistics);
  const int64_t channels = statistics.size(2);
  Tensor merged = at::empty({1, kStatisticsRows, channels}, statistics.options());
  const Tensor workspace = merge_workspace(statistics, kStatisticsRows, statistics.scalar_type());
  on_device_of(statistics)
      ->merge_statistics({channels, statistics.size(0), statistics.scalar_type() == at::kDouble,
                          statistics.const_data_ptr(), workspace.data_ptr(), merged.data_ptr()});
  return merged;
}

Tensor bn_finalize(const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  check_statistics(statistics);
  TORCH_CHECK_VALUE(eps >= 0, "eps: expected a number >= 0, got ", eps);
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var), "running_mean, running_var: expected both or neither");
  if (given(num_batches_tracked)) {
    TORCH_CHECK_TYPE(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1,
                     "num_batches_tracked: expected one int64, got ", num_batches_tracked->scalar_type(), " ",
                     num_batches_tracked->sizes());
    TORCH_CHECK_VALUE(num_batches_tracked->device() == statistics.device(), "num_batches_tracked: expected device ",
                      statistics.device(), ", got ", num_batches_tracked->device());
  } else {
    TORCH_CHECK_VALUE(momentum.has_value() || !given(running_mean),
                      "momentum: None, the cumulative average, needs num_batches_tracked");
  }
  const int64_t channels = statistics.size(2);
  const auto device = statistics.device();
  Tensor coefficients = at::empty({kCoefficientRows, channels}, statistics.options());
  FinalizeParams p{};
  p.channels = channels;
  p.tiles = statistics.size(0);
  p.double_precision = statistics.scalar_type() == at::kDouble;
  p.statistics = statistics.const_data_ptr();
  p.weight = channel_vector(weight, "weight", channels, device);
  p.bias = channel_vector(bias, "bias", channels, device);
  p.running_mean = channel_vector(running_mean, "running_mean", channels, device);
  p.running_var = channel_vector(running_var, "running_var", channels, device);
  p.num_batches_tracked = given(num_batches_tracked) ? num_batches_tracked->data_ptr<int64_t>() : nullptr;
  p.momentum = momentum.value_or(-1.0);
  p.eps = eps;
  const Tensor workspace = merge_workspace(statistics, kStatisticsRows, statistics.scalar_type());
  p.workspace = workspace.data_ptr();
  p.coefficients = coefficients.data_ptr();
  on_device_of(statistics)->finalize(p);
  return coefficients;
}

Tensor bn_coefficients(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, at::ScalarType acc_dtype) {
  TORCH_CHECK_VALUE(running_mean.dim() == 1, "running_mean: expected shape [C], got ", running_mean.sizes());
  TORCH_CHECK_TYPE(acc_dtype == at::kFloat || acc_dtype == at::kDouble, "acc_dtype: expected float32 or float64, got ",
                   acc_dtype);
  TORCH_CHECK_VALUE(eps >= 0, "eps: expected a number >= 0, got ", eps);
  const int64_t channels = running_mean.size(0);
  const auto device = running_mean.device();
  Tensor coefficients = at::empty({kCoefficientRows, channels}, acc_options(running_mean, acc_dtype));
  CoefficientsParams p{};
  p.channels = channels;
  p.double_precision = acc_dtype == at::kDouble;
  p.weight = channel_vector(weight, "weight", channels, device);
  p.bias = channel_vector(bias, "bias", channels, device);
  p.running_mean = channel_vector(running_mean, "running_mean", channels, device);
  p.running_var = channel_vector(running_var, "running_var", channels, device);
  p.eps = eps;
  p.coefficients = coefficients.data_ptr();
  on_device_of(running_mean)->coefficients(p);
  return coefficients;
}

Tensor bn_apply(const Tensor& y, const Tensor& coefficients, const OptionalTensor& shortcut,
                const OptionalTensor& shortcut_coefficients, bool relu) {
  check_activation(y, "y");
  const DType dtype = dtype_of(y, "y");
  check_table(coefficients, "coefficients", kCoefficientRows, y.size(1), acc_type(dtype), y);
  const Dense dense(y);
  Tensor shortcut_storage;
  const ShortcutInput input = shortcut_input(shortcut, shortcut_coefficients, y, dense, shortcut_storage);
  Tensor z = empty_like(dense);
  if (z.numel() == 0) return z;
  on_device_of(y)->apply(
      {dense.extent(), dtype, dense.tensor.const_data_ptr(), coefficients.const_data_ptr(), input, relu, z.data_ptr()});
  return z;
}

std::tuple<Tensor, Tensor, Tensor> bn_backward_reduce(const Tensor& grad, const Tensor& y, const Tensor& coefficients,
                                                      const OptionalTensor& shortcut,
                                                      const OptionalTensor& shortcut_coefficients,
                                                      const OptionalTensor& z, bool relu, bool write_grad,
                                                      bool write_activation) {
  check_activation(y, "y");
  check_like(grad, "grad", y, "y");
  const DType dtype = dtype_of(y, "y");
  const auto acc = acc_type(dtype);
  check_table(coefficients, "coefficients", kCoefficientRows, y.size(1), acc, y);
  const Dense dense(y);
  const Tensor dense_grad = dense.conform(grad);
  Tensor shortcut_storage, z_storage;
  BackwardReduceParams p{};
  p.extent = dense.extent();
  p.dtype = dtype;
  p.grad = dense_grad.const_data_ptr();
  p.y = dense.tensor.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.shortcut = shortcut_input(shortcut, shortcut_coefficients, y, dense, shortcut_storage);
  p.mask = relu_mask(relu, z, y, dense, z_storage);
  TORCH_CHECK_VALUE(!write_activation || !p.shortcut.data, "write_activation: expected no shortcut");
  Tensor masked = write_grad ? empty_like(dense) : at::empty({0}, y.options());
  Tensor activation = write_activation ? empty_like(dense) : at::empty({0}, y.options());
  Tensor sums = at::empty({reduction_tiles(dense), p.shortcut.coefficients ? 3 : 2, y.size(1)}, acc_options(y, acc));
  if (y.numel() == 0) return {masked, sums.zero_(), activation};
  p.masked_grad = write_grad ? masked.data_ptr() : nullptr;
  p.activation = write_activation ? activation.data_ptr() : nullptr;
  p.sums = sums.data_ptr();
  on_device_of(y)->backward_reduce(p);
  return {masked, sums, activation};
}

Tensor bn_backward_finalize(const Tensor& sums, const Tensor& coefficients, int64_t branch, int64_t count,
                            bool batch_statistics) {
  TORCH_CHECK_VALUE(sums.dim() == 3 && (sums.size(1) == 2 || sums.size(1) == 3),
                    "sums: expected shape [tiles, 2 or 3, C], got ", sums.sizes());
  check_tiles(sums, "sums");
  TORCH_CHECK_VALUE(branch >= 0 && branch + 2 <= sums.size(1), "branch: expected 0 to ", sums.size(1) - 2, ", got ",
                    branch);
  TORCH_CHECK_VALUE(count > 0 || !batch_statistics, "count: expected a positive number of values per channel, got ",
                    count);
  const int64_t channels = sums.size(2);
  check_table(coefficients, "coefficients", kCoefficientRows, channels, sums.scalar_type(), sums);
  Tensor out = at::empty({kBackwardRows, channels}, sums.options());
  const Tensor workspace = merge_workspace(sums, 2, at::kDouble);
  on_device_of(sums)->backward_finalize({channels, sums.size(0), sums.size(1), branch, count, batch_statistics,
                                         sums.scalar_type() == at::kDouble, sums.const_data_ptr(),
                                         coefficients.const_data_ptr(), workspace.data_ptr<double>(), out.data_ptr()});
  return out;
}

void bn_backward_merge_(const Tensor& backward_coefficients, const Tensor& gathered, const Tensor& coefficients,
                        int64_t branch) {
  TORCH_CHECK_VALUE(gathered.dim() == 3 && (gathered.size(1) == 3 || gathered.size(1) == 5),
                    "gathered: expected shape [processes, 3 or 5, C], got ", gathered.sizes());
  check_tiles(gathered, "gathered");
  TORCH_CHECK_VALUE(branch >= 0 && 2 * branch + 3 <= gathered.size(1), "branch: expected 0 to ",
                    (gathered.size(1) - 3) / 2, ", got ", branch);
  const int64_t channels = gathered.size(2);
  const auto acc = gathered.scalar_type();
  check_table(coefficients, "coefficients", kCoefficientRows, channels, acc, gathered);
  check_table(backward_coefficients, "backward_coefficients", kBackwardRows, channels, acc, gathered);
  on_device_of(gathered)->backward_merge({channels, gathered.size(0), gathered.size(1), branch, acc == at::kDouble,
                                          gathered.const_data_ptr(), coefficients.const_data_ptr(),
                                          backward_coefficients.data_ptr()});
}

// grad: already in dense's layout; grad_y may be the same tensor.
void backward_apply_into(const Tensor& grad_y, const Tensor& grad, const Tensor& y, const Dense& dense,
                         const Tensor& coefficients, const Tensor& backward_coefficients,
                         const OptionalTensor& shortcut, const OptionalTensor& z, bool relu, bool batch_statistics) {
  const DType dtype = dtype_of(y, "y");
  const auto acc = acc_type(dtype);
  check_table(coefficients, "coefficients", kCoefficientRows, y.size(1), acc, y);
  check_table(backward_coefficients, "backward_coefficients", kBackwardRows, y.size(1), acc, y);
  Tensor shortcut_storage, z_storage;
  const Tensor dense_y = dense.conform(y);
  BackwardApplyParams p{};
  p.extent = dense.extent();
  p.dtype = dtype;
  p.grad = grad.const_data_ptr();
  p.y = dense_y.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.backward_coefficients = backward_coefficients.const_data_ptr();
  p.batch_statistics = batch_statistics;
  p.shortcut = shortcut_input(shortcut, std::nullopt, y, dense, shortcut_storage);
  p.mask = relu_mask(relu, z, y, dense, z_storage);
  p.grad_y = grad_y.data_ptr();
  if (y.numel() != 0) on_device_of(y)->backward_apply(p);
}

Tensor bn_backward_apply(const Tensor& grad, const Tensor& y, const Tensor& coefficients,
                         const Tensor& backward_coefficients, const OptionalTensor& shortcut, const OptionalTensor& z,
                         bool relu, bool batch_statistics) {
  check_activation(y, "y");
  check_like(grad, "grad", y, "y");
  const Dense dense(y);
  Tensor grad_y = empty_like(dense);
  backward_apply_into(grad_y, dense.conform(grad), dense.tensor, dense, coefficients, backward_coefficients, shortcut,
                      z, relu, batch_statistics);
  return grad_y;
}

void bn_backward_apply_(const Tensor& grad, const Tensor& y, const Tensor& coefficients,
                        const Tensor& backward_coefficients, const OptionalTensor& shortcut, const OptionalTensor& z,
                        bool relu, bool batch_statistics) {
  check_activation(y, "y");
  check_like(grad, "grad", y, "y");
  const Dense dense(grad);
  TORCH_CHECK_VALUE(dense.tensor.is_same(grad), "grad: expected a dense tensor to write in place, got strides ",
                    grad.strides());
  backward_apply_into(grad, grad, y, dense, coefficients, backward_coefficients, shortcut, z, relu, batch_statistics);
}

std::tuple<Tensor, Tensor> bn_backward_apply_pair(const Tensor& grad, const Tensor& y, const Tensor& coefficients,
                                                  const Tensor& backward_coefficients, const Tensor& shortcut,
                                                  const Tensor& shortcut_coefficients,
                                                  const Tensor& shortcut_backward_coefficients, bool relu,
                                                  bool batch_statistics, bool shortcut_batch_statistics,
                                                  const OptionalTensor& z) {
  check_activation(y, "y");
  check_like(grad, "grad", y, "y");
  const DType dtype = dtype_of(y, "y");
  const auto acc = acc_type(dtype);
  check_table(coefficients, "coefficients", kCoefficientRows, y.size(1), acc, y);
  check_table(backward_coefficients, "backward_coefficients", kBackwardRows, y.size(1), acc, y);
  check_table(shortcut_backward_coefficients, "shortcut_backward_coefficients", kBackwardRows, y.size(1), acc, y);
  const Dense dense(y);
  const Tensor dense_grad = dense.conform(grad);
  Tensor shortcut_storage, z_storage;
  BackwardApplyParams p{};
  p.extent = dense.extent();
  p.dtype = dtype;
  p.grad = dense_grad.const_data_ptr();
  p.y = dense.tensor.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.backward_coefficients = backward_coefficients.const_data_ptr();
  p.batch_statistics = batch_statistics;
  p.shortcut = shortcut_input(shortcut, shortcut_coefficients, y, dense, shortcut_storage);
  p.mask = relu_mask(relu, z, y, dense, z_storage);
  Tensor grad_y = empty_like(dense);
  Tensor grad_shortcut = empty_like(dense);
  p.grad_y = grad_y.data_ptr();
  p.shortcut_backward_coefficients = shortcut_backward_coefficients.const_data_ptr();
  p.shortcut_batch_statistics = shortcut_batch_statistics;
  p.grad_shortcut = grad_shortcut.data_ptr();
  if (y.numel() != 0) on_device_of(y)->backward_apply(p);
  return {grad_y, grad_shortcut};
}

void relu_backward_add_(const Tensor& out, const Tensor& grad, const Tensor& y, const Tensor& coefficients,
                        const OptionalTensor& shortcut, const OptionalTensor& z) {
  check_activation(y, "y");
  check_like(out, "out", y, "y");
  check_like(grad, "grad", y, "y");
  const DType dtype = dtype_of(y, "y");
  check_table(coefficients, "coefficients", kCoefficientRows, y.size(1), acc_type(dtype), y);
  const Dense dense(out);
  TORCH_CHECK_VALUE(dense.tensor.is_same(out), "out: expected a dense tensor to add to in place, got strides ",
                    out.strides());
  if (out.numel() == 0) return;
  const Tensor dense_grad = dense.conform(grad), dense_y = dense.conform(y);
  Tensor shortcut_storage, z_storage;
  ReluBackwardAddParams p{};
  p.extent = dense.extent();
  p.dtype = dtype;
  p.grad = dense_grad.const_data_ptr();
  p.y = dense_y.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.shortcut = shortcut_input(shortcut, std::nullopt, y, dense, shortcut_storage);
  p.mask = relu_mask(true, z, y, dense, z_storage);
  p.out = out.data_ptr();
  on_device_of(y)->relu_backward_add(p);
}

void register_kernels(torch::Library& m) {
  m.impl("bn_statistics", bn_statistics);
  m.impl("bn_merge_statistics", bn_merge_statistics);
  m.impl("bn_finalize", bn_finalize);
  m.impl("bn_coefficients", bn_coefficients);
  m.impl("bn_apply", bn_apply);
  m.impl("bn_backward_reduce", bn_backward_reduce);
  m.impl("bn_backward_finalize", bn_backward_finalize);
  m.impl("bn_backward_merge_", bn_backward_merge_);
  m.impl("bn_backward_apply", bn_backward_apply);
  m.impl("bn_backward_apply_", bn_backward_apply_);
  m.impl("bn_backward_apply_pair", bn_backward_apply_pair);
  m.impl("relu_backward_add_", relu_backward_add_);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { register_kernels(m); }

// The vocabulary has no derivative of its own (resnet_fused/autograd.py differentiates whole blocks); asking for
// one is an error rather than a silent None.
TORCH_LIBRARY_IMPL(resnet_fused, Autograd, m) {
  for (const char* name : {"bn_statistics", "bn_merge_statistics", "bn_finalize", "bn_coefficients", "bn_apply",
                           "bn_backward_reduce", "bn_backward_finalize", "bn_backward_merge_", "bn_backward_apply",
                           "bn_backward_apply_", "bn_backward_apply_pair", "relu_backward_add_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace resnet_fused
