// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Puts the fallback in the place of PyTorch's own CUDA kernels.
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>
#include <vector>

#include "fallback.h"

namespace gpusim::torch_plugin {
namespace {

// These work as they are: they allocate, describe or re-shape, and never compute.
bool stays_native(const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> names = {
      "aten::empty", "aten::empty_strided", "aten::resize_", "aten::set_", "aten::record_stream",
      "aten::is_pinned", "aten::_pin_memory", "aten::_efficientzerotensor", "aten::is_set_to",
      "aten::_resize_output_", "aten::_lazy_clone", "aten::_copy_from_and_resize", "aten::_has_same_storage_numel",
      "aten::_sparse_coo_tensor_with_dims", "aten::_sparse_coo_tensor_with_dims_and_tensors",
      "aten::sparse_resize_", "aten::sparse_resize_and_clear_", "aten::_nnz", "aten::is_coalesced",
      "aten::_coalesced_", "aten::sparse_dim", "aten::_dimI", "aten::dense_dim", "aten::_dimV",
      "aten::_cudnn_rnn_flatten_weight", "aten::_use_cudnn_rnn_flatten_weight", "aten::_cudnn_init_dropout_state"};
  if (names.count(op.schema().name())) return true;
  for (const auto& r : op.schema().returns())
    if (r.alias_info() && !r.alias_info()->isWrite()) return true;  // a view
  return false;
}

// Composite operators that call a CUDA library or kernel before they reach the dispatcher again.
const std::unordered_set<std::string>& also() {
  static const std::unordered_set<std::string> names = {
      "aten::copy_",       "aten::convolution", "aten::convolution_backward", "aten::_convolution",
      "aten::ldexp.Tensor", "aten::ldexp.out",  "aten::ldexp_",              "aten::mode.values"};
  return names;
}

class Quiet : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

constexpr c10::DispatchKey kKeys[] = {c10::DispatchKey::CUDA, c10::DispatchKey::SparseCUDA};

// Returns how many operators of the namespace were covered.
int64_t cover(std::string wanted) {
  static auto* handles = new std::vector<c10::RegistrationHandleRAII>;
  static auto* done = new std::unordered_set<std::string>;
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  auto& dispatcher = c10::Dispatcher::singleton();
  int64_t count = 0;
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != std::optional<std::string_view>(wanted)) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op) continue;
    if (stays_native(*op) || !done->insert(c10::toString(name)).second) continue;
    for (const c10::DispatchKey key : kKeys) {
      const bool composite = key == c10::DispatchKey::CUDA && also().count(c10::toString(name));
      if (!op->hasKernelForDispatchKey(key) && !composite) continue;
      handles->push_back(dispatcher.registerImpl(name, key,
                                                 c10::KernelFunction::makeFromBoxedFunction<&cpu_fallback>(),
                                                 std::nullopt, nullptr, "gpusim CPU fallback"));
      ++count;
    }
  }
  return count;
}

// Covered operators without any CPU kernel, for whoever wants to know the limits.
std::vector<std::string> unserved() {
  std::vector<std::string> out;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (op && name.getNamespace() == std::optional<std::string_view>("aten") &&
        op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) && !stays_native(*op) &&
        !op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU))
      out.push_back(c10::toString(name));
  }
  return out;
}

// Composite code then takes the paths that lead back to plain operators.
void prefer_plain_paths() {
  auto& context = at::globalContext();
  context.setUserEnabledCuDNN(false);
  context.setSDPUseFlash(false);
  context.setSDPUseMemEfficient(false);
  context.setSDPUseCuDNN(false);
}

const int64_t covered_at_load = [] {
  prefer_plain_paths();
  return cover("aten");
}();

}  // namespace
}  // namespace gpusim::torch_plugin

TORCH_LIBRARY(gpusim, m) {
  m.def("cover(str namespace) -> int", &gpusim::torch_plugin::cover);
  m.def("unserved() -> str[]", &gpusim::torch_plugin::unserved);
}
