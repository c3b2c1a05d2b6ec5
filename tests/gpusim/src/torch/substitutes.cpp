// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// CPU versions of operators that PyTorch has only for CUDA, written with plain
// operators. The fallback finds them on the CPU key like any other kernel.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::vector<int64_t> all_but_channels(const Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != 1) dims.push_back(d);
  return dims;
}

// The type that CUDA's norms compute in.
at::ScalarType accumulation(const Tensor& t) { return at::promote_types(t.scalar_type(), at::kFloat); }

Tensor per_channel(const Tensor& v, const Tensor& x) {
  std::vector<int64_t> shape(size_t(x.dim()), 1);
  shape[1] = v.numel();
  return v.to(accumulation(v)).reshape(shape);
}

// --- batch normalization ---------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> cudnn_batch_norm(const Tensor& input, const Tensor& weight,
                                                            const OptionalTensor& bias, const OptionalTensor& mean,
                                                            const OptionalTensor& var, bool training, double momentum,
                                                            double eps) {
  auto [out, save_mean, save_invstd] = at::native_batch_norm(input, weight, bias, mean, var, training, momentum, eps);
  return {out, save_mean, save_invstd, at::empty({0}, input.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_batch_norm_backward(const Tensor& input, const Tensor& grad,
                                                             const Tensor& weight, const OptionalTensor& mean,
                                                             const OptionalTensor& var, const OptionalTensor& save_mean,
                                                             const OptionalTensor& save_var, double eps,
                                                             const Tensor&) {
  return at::native_batch_norm_backward(grad, input, weight, mean, var, save_mean, save_var, true, eps,
                                        {true, true, true});
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input, double eps) {
  const auto dims = all_but_channels(input);
  const Tensor x = input.to(accumulation(input));
  return {x.mean(dims), (x.var(dims, /*unbiased=*/false) + eps).rsqrt()};
}

Tensor batch_norm_elemt(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& mean, const Tensor& invstd, double) {
  Tensor y = (input.to(accumulation(input)) - per_channel(mean, input)) * per_channel(invstd, input);
  if (weight && weight->defined()) y = y * per_channel(*weight, input);
  if (bias && bias->defined()) y = y + per_channel(*bias, input);
  return y.to(input.scalar_type());
}

std::tuple<Tensor, Tensor> gather_stats_with_counts(const Tensor&, const Tensor& mean, const Tensor& invstd,
                                                    const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var, double momentum, double eps,
                                                    const Tensor& counts) {
  const Tensor n = counts.to(at::kDouble).reshape({-1, 1});
  const Tensor m = mean.to(at::kDouble);
  const Tensor v = invstd.to(at::kDouble).pow(-2) - eps;
  const Tensor total = n.sum();
  const Tensor all_mean = (m * n).sum(0) / total;
  const Tensor all_var = ((v + (m - all_mean).pow(2)) * n).sum(0) / total;
  if (running_mean && running_mean->defined()) running_mean->mul_(1 - momentum).add_(all_mean, momentum);
  if (running_var && running_var->defined())
    running_var->mul_(1 - momentum).add_(all_var * total / (total - 1), momentum);
  return {all_mean.to(mean.scalar_type()), (all_var + eps).rsqrt().to(invstd.scalar_type())};
}

std::tuple<Tensor, Tensor> gather_stats(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                        double momentum, double eps, int64_t count) {
  return gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps,
                                  at::full({mean.size(0)}, double(count), at::kDouble));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                           const Tensor& invstd, const OptionalTensor& weight,
                                                           bool input_g, bool weight_g, bool bias_g) {
  const auto dims = all_but_channels(input);
  const Tensor dy = grad.to(accumulation(input));
  const Tensor xmu = input.to(accumulation(input)) - per_channel(mean, input);
  const Tensor sum_dy = dy.sum(dims), sum_dy_xmu = (dy * xmu).sum(dims);
  const auto type = weight && weight->defined() ? weight->scalar_type() : accumulation(input);
  return {input_g ? sum_dy : Tensor(), input_g ? sum_dy_xmu : Tensor(),
          weight_g ? (sum_dy_xmu * invstd).to(type) : Tensor(), bias_g ? sum_dy.to(type) : Tensor()};
}

Tensor backward_elemt(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                      const OptionalTensor& weight, const Tensor& sum_dy, const Tensor& sum_dy_xmu,
                      const Tensor& count) {
  const Tensor n = count.sum().to(accumulation(input));
  const Tensor xmu = input.to(accumulation(input)) - per_channel(mean, input);
  const Tensor is = per_channel(invstd, input);
  Tensor dx = grad.to(accumulation(input)) - per_channel(sum_dy, input) / n -
              xmu * is * is * per_channel(sum_dy_xmu, input) / n;
  dx = dx * is;
  if (weight && weight->defined()) dx = dx * per_channel(*weight, input);
  return dx.to(input.scalar_type());
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, at::IntArrayRef shape,
                                             const Tensor& rstd, const OptionalTensor& weight,
                                             std::array<bool, 2> wanted) {
  const auto wide = accumulation(input);
  std::vector<int64_t> inner, outer;
  for (int64_t d = 0; d < input.dim(); ++d)
    (d < input.dim() - int64_t(shape.size()) ? outer : inner).push_back(d);
  const bool weighted = weight && weight->defined();
  const Tensor dy = grad.to(wide), normal = input.to(wide) * rstd;
  const Tensor g = weighted ? dy * weight->to(wide) : dy;
  Tensor dx, dw;
  if (wanted[0]) dx = ((g - normal * (g * normal).mean(inner, /*keepdim=*/true)) * rstd).to(input.scalar_type());
  if (wanted[1] && weighted) {
    dw = dy * normal;
    dw = (outer.empty() ? dw : dw.sum(outer)).to(weight->scalar_type());
  }
  return {dx, dw};
}

// --- recurrent cells -------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
                                             const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  Tensor gates = input_gates + hidden_gates;
  if (input_bias && input_bias->defined()) gates = gates + *input_bias;
  if (hidden_bias && hidden_bias->defined()) gates = gates + *hidden_bias;
  const auto g = gates.chunk(4, 1);
  const Tensor i = g[0].sigmoid(), f = g[1].sigmoid(), c = g[2].tanh(), o = g[3].sigmoid();
  const Tensor cy = f * cx + i * c;
  return {o * cy.tanh(), cy, at::cat({i, f, c, o}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hy, const OptionalTensor& grad_cy,
                                                      const Tensor& cx, const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  const auto w = workspace.chunk(4, 1);
  const Tensor &i = w[0], &f = w[1], &c = w[2], &o = w[3];
  const Tensor t = cy.tanh();
  const Tensor ghy = grad_hy && grad_hy->defined() ? *grad_hy : at::zeros_like(cy);
  const Tensor gcy = grad_cy && grad_cy->defined() ? *grad_cy : at::zeros_like(cy);
  const Tensor gc = ghy * o * (1 - t * t) + gcy;
  const Tensor gates = at::cat({gc * c * i * (1 - i), gc * cx * f * (1 - f), gc * i * (1 - c * c),
                                ghy * t * o * (1 - o)}, 1);
  return {gates, gc * f, has_bias ? gates.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  Tensor gi = input_gates, gh = hidden_gates;
  if (input_bias && input_bias->defined()) gi = gi + *input_bias;
  if (hidden_bias && hidden_bias->defined()) gh = gh + *hidden_bias;
  const auto a = gi.chunk(3, 1), b = gh.chunk(3, 1);
  const Tensor r = (a[0] + b[0]).sigmoid(), z = (a[1] + b[1]).sigmoid(), n = (a[2] + r * b[2]).tanh();
  return {n + z * (hx - n), at::cat({r, z, n, hx, b[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad, const Tensor& workspace,
                                                                     bool has_bias) {
  const auto w = workspace.chunk(5, 1);
  const Tensor &r = w[0], &z = w[1], &n = w[2], &hx = w[3], &hn = w[4];
  const Tensor gz = grad * (hx - n) * z * (1 - z);
  const Tensor gn = grad * (1 - z) * (1 - n * n);
  const Tensor gr = gn * hn * r * (1 - r);
  const Tensor gi = at::cat({gr, gz, gn}, 1), gh = at::cat({gr, gz, gn * r}, 1);
  return {gi, gh, grad * z, has_bias ? gi.sum(0) : Tensor(), has_bias ? gh.sum(0) : Tensor()};
}

// --- convolution, dropout, attention ---------------------------------------

Tensor cudnn_convolution(const Tensor& x, const Tensor& w, at::IntArrayRef padding, at::IntArrayRef stride,
                         at::IntArrayRef dilation, int64_t groups, bool, bool, bool) {
  return at::convolution(x, w, {}, stride, padding, dilation, false, std::vector<int64_t>(padding.size(), 0), groups);
}

Tensor cudnn_convolution_transpose(const Tensor& x, const Tensor& w, at::IntArrayRef padding,
                                   at::IntArrayRef output_padding, at::IntArrayRef stride, at::IntArrayRef dilation,
                                   int64_t groups, bool, bool, bool) {
  return at::convolution(x, w, {}, stride, padding, dilation, true, output_padding, groups);
}

Tensor cudnn_convolution_relu(const Tensor& x, const Tensor& w, const OptionalTensor& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return at::convolution(x, w, bias, stride, padding, dilation, false, std::vector<int64_t>(padding.size(), 0), groups)
      .relu_();
}

Tensor cudnn_convolution_add_relu(const Tensor& x, const Tensor& w, const Tensor& z,
                                  const std::optional<at::Scalar>& alpha, const OptionalTensor& bias,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups) {
  return at::convolution(x, w, bias, stride, padding, dilation, false, std::vector<int64_t>(padding.size(), 0), groups)
      .add_(z, alpha.value_or(1))
      .relu_();
}

std::tuple<Tensor, Tensor> fused_dropout(const Tensor& x, double keep, std::optional<at::Generator> generator) {
  const Tensor mask = at::empty_like(x, x.options().dtype(at::kByte)).bernoulli_(keep, std::move(generator));
  return {x * mask / keep, mask};
}

Tensor masked_scale(const Tensor& x, const Tensor& mask, double scale) { return x * mask * scale; }

Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType type) { return at::mm(a.to(type), b.to(type)); }
Tensor bmm_dtype(const Tensor& a, const Tensor& b, at::ScalarType type) { return at::bmm(a.to(type), b.to(type)); }
Tensor addmm_dtype(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType type, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  return at::addmm(c.to(type), a.to(type), b.to(type), beta, alpha);
}
Tensor baddbmm_dtype(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType type, const at::Scalar& beta,
                     const at::Scalar& alpha) {
  return at::baddbmm(c.to(type), a.to(type), b.to(type), beta, alpha);
}

Tensor& fill_out(Tensor& out, const Tensor& result) {
  if (out.sizes() != result.sizes()) out.resize_(result.sizes());
  return out.copy_(result);
}
Tensor& mm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  return fill_out(out, mm_dtype(a, b, type));
}
Tensor& bmm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  return fill_out(out, bmm_dtype(a, b, type));
}
Tensor& addmm_dtype_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType type, const at::Scalar& beta,
                        const at::Scalar& alpha, Tensor& out) {
  return fill_out(out, addmm_dtype(c, a, b, type, beta, alpha));
}
Tensor& baddbmm_dtype_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType type,
                          const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return fill_out(out, baddbmm_dtype(c, a, b, type, beta, alpha));
}

bool no_cudnn_ctc(const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef, int64_t) { return false; }
bool no_cudnn_ctc_tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t) { return false; }

Tensor no_seed(const Tensor& x) { return at::zeros({}, x.options().dtype(at::kLong)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool, std::optional<double> scale) {
  TORCH_CHECK(dropout == 0, "gpusim: flash attention with dropout is not served; use the math backend");
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0., causal, {}, scale);
  return {out, lse, Tensor(), Tensor(), q.size(2), k.size(2), no_seed(q), no_seed(q), at::empty({0}, q.options())};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, dropout, causal, {}, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                               const OptionalTensor& bias, bool, double dropout,
                                                               bool causal, std::optional<double> scale) {
  TORCH_CHECK(dropout == 0, "gpusim: memory-efficient attention with dropout is not served; use the math backend");
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0., causal, bias, scale);
  return {out, lse, no_seed(q), no_seed(q)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out,
    const Tensor& lse, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>, bool causal,
    std::optional<double> scale) {
  if (!grad.defined()) return {};
  const OptionalTensor mask = bias.defined() ? OptionalTensor(bias) : std::nullopt;
  auto [gq, gk, gv] =
      at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, dropout, causal, mask, scale);
  return {gq, gk, gv, Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("cudnn_batch_norm", &cudnn_batch_norm);
  m.impl("cudnn_batch_norm_backward", &cudnn_batch_norm_backward);
  m.impl("batch_norm_stats", &batch_norm_stats);
  m.impl("batch_norm_elemt", &batch_norm_elemt);
  m.impl("batch_norm_gather_stats", &gather_stats);
  m.impl("batch_norm_gather_stats_with_counts", &gather_stats_with_counts);
  m.impl("batch_norm_backward_reduce", &backward_reduce);
  m.impl("batch_norm_backward_elemt", &backward_elemt);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  m.impl("cudnn_convolution", &cudnn_convolution);
  m.impl("cudnn_convolution_relu", &cudnn_convolution_relu);
  m.impl("cudnn_convolution_add_relu", &cudnn_convolution_add_relu);
  m.impl("cudnn_convolution_transpose", &cudnn_convolution_transpose);
  m.impl("_fused_rms_norm_backward", &rms_norm_backward);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("bmm.dtype", &bmm_dtype);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("baddbmm.dtype", &baddbmm_dtype);
  m.impl("mm.dtype_out", &mm_dtype_out);
  m.impl("bmm.dtype_out", &bmm_dtype_out);
  m.impl("addmm.dtype_out", &addmm_dtype_out);
  m.impl("baddbmm.dtype_out", &baddbmm_dtype_out);
  m.impl("_fused_dropout", &fused_dropout);
  m.impl("_masked_scale", &masked_scale);
  m.impl("_use_cudnn_ctc_loss", &no_cudnn_ctc);
  m.impl("_use_cudnn_ctc_loss.Tensor", &no_cudnn_ctc_tensor);
  m.impl("_use_miopen_ctc_loss", &no_cudnn_ctc);
  m.impl("_use_miopen_ctc_loss.Tensor", &no_cudnn_ctc_tensor);
  m.impl("_scaled_dot_product_flash_attention", &flash_attention);
  m.impl("_scaled_dot_product_flash_attention_backward", &flash_attention_backward);
  m.impl("_scaled_dot_product_efficient_attention", &efficient_attention);
  m.impl("_scaled_dot_product_efficient_attention_backward", &efficient_attention_backward);
}
