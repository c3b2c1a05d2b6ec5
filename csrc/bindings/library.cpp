// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The schemas of all operators. resnet_fused/ops.py documents them one by one; bn_ops.cpp, conv_ops.cpp and
// pool_ops.cpp implement them.
//
// y, grad, shortcut, z: [N, C, H, W] of one floating dtype. acc: float64 for float64, float32 for all others.
// statistics: [tiles, 3, C] acc, coefficients: [4, C] acc, backward coefficients: [5, C] acc (rows in params.h).
#include <torch/library.h>

TORCH_LIBRARY(resnet_fused, m) {
  m.def("bn_statistics(Tensor y) -> Tensor");
  m.def("bn_merge_statistics(Tensor statistics) -> Tensor");
  m.def(
      "bn_finalize(Tensor statistics, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor");
  m.def(
      "bn_coefficients(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, "
      "ScalarType acc_dtype) -> Tensor");
  m.def(
      "bn_apply(Tensor y, Tensor coefficients, Tensor? shortcut, Tensor? shortcut_coefficients, bool relu) "
      "-> Tensor");
  m.def(
      "bn_backward_reduce(Tensor grad, Tensor y, Tensor coefficients, Tensor? shortcut, "
      "Tensor? shortcut_coefficients, Tensor? z, bool relu, bool write_grad, bool write_activation=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "bn_backward_finalize(Tensor sums, Tensor coefficients, int branch, int count, bool batch_statistics) "
      "-> Tensor");
  m.def("bn_backward_merge_(Tensor(a!) backward_coefficients, Tensor gathered, Tensor coefficients, int branch) -> ()");
  m.def(
      "bn_backward_apply(Tensor grad, Tensor y, Tensor coefficients, Tensor backward_coefficients, "
      "Tensor? shortcut, Tensor? z, bool relu, bool batch_statistics) -> Tensor");
  m.def(
      "bn_backward_apply_(Tensor(a!) grad, Tensor y, Tensor coefficients, Tensor backward_coefficients, "
      "Tensor? shortcut, Tensor? z, bool relu, bool batch_statistics) -> ()");
  m.def(
      "bn_backward_apply_pair(Tensor grad, Tensor y, Tensor coefficients, Tensor backward_coefficients, "
      "Tensor shortcut, Tensor shortcut_coefficients, Tensor shortcut_backward_coefficients, bool relu, "
      "bool batch_statistics, bool shortcut_batch_statistics, Tensor? z=None) -> (Tensor, Tensor)");
  m.def(
      "relu_backward_add_(Tensor(a!) out, Tensor grad, Tensor y, Tensor coefficients, Tensor? shortcut, "
      "Tensor? z) -> ()");

  // Native convolutions: channels_last; on CUDA float32 as TF32.
  m.def(
      "conv_fprop(Tensor x, Tensor? coefficients, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation) -> (Tensor, Tensor)");
  m.def(
      "conv_fprop_inference(Tensor x, Tensor? coefficients, Tensor weight, Tensor affine, Tensor? shortcut, "
      "bool relu, int[2] stride, int[2] padding, int[2] dilation, Tensor? packed=None) -> Tensor");
  m.def("conv_pack(Tensor weight, ScalarType dtype, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "conv_dgrad(Tensor grad, Tensor? y, Tensor? backward_coefficients, Tensor weight, int[2] input_plane, "
      "int[2] stride, int[2] padding, int[2] dilation, Tensor? addend, Tensor? mask_y, Tensor? mask_coefficients) "
      "-> (Tensor, Tensor)");
  m.def(
      "conv_wgrad(Tensor grad, Tensor? y, Tensor? backward_coefficients, Tensor x, Tensor? coefficients, "
      "int[2] filter, int[2] stride, int[2] padding, int[2] dilation, ScalarType dtype) -> Tensor");
  m.def(
      "conv_backward(Tensor grad, Tensor? y, Tensor? backward_coefficients, Tensor weight, Tensor x, "
      "Tensor? coefficients, int[2] stride, int[2] padding, int[2] dilation, Tensor? addend, ScalarType dtype) "
      "-> (Tensor, Tensor, Tensor)");

  // Max pooling: on the CPU, results channels_last.
  m.def(
      "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, "
      "bool write_taps) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor taps, int[2] input_plane, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, bool ceil_mode) -> Tensor");
}
