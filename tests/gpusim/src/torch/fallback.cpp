// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "fallback.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_set>

#include "convert.h"
#include "random.h"
#include "result_memory.h"

extern "C" {
int gpusim_take_fault();
int gpusim_is_capturing(void* stream);
void gpusim_record(void* stream, const char* what, void (*run)(void*), void* data, void (*destroy)(void*));
}

namespace gpusim::torch_plugin {
namespace {

using torch::jit::Stack;

// Operators that take CPU tensors beside CUDA ones.
bool may_mix_devices(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::copy_", "aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::_index_put_impl_",
      "aten::index_put", "aten::_unsafe_index_put", "aten::_pack_padded_sequence", "aten::_pad_packed_sequence",
      "aten::_pack_padded_sequence_backward", "aten::set_", "aten::_copy_from", "aten::_foreach_copy_",
      "aten::_ctc_loss", "aten::_ctc_loss_backward", "aten::_use_cudnn_ctc_loss",
      "aten::_use_miopen_ctc_loss"};
  return names.count(name) != 0;
}

void check_devices(const std::string& name, const Aliases& aliases) {
  const at::Tensor* cuda = nullptr;
  for (const auto& t : aliases.seen())
    if (t.is_cuda()) {
      TORCH_CHECK(!cuda || cuda->device() == t.device() || name.rfind("aten::copy_", 0) == 0 ||
                      name.rfind("aten::_foreach_copy_", 0) == 0,
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  cuda->device(), " and ", t.device(), "! (when calling ", name, ")");
      if (!cuda) cuda = &t;
    }
  if (!cuda) return;
  for (const auto& t : aliases.seen())
    TORCH_CHECK(!t.is_cpu() || t.dim() == 0 || may_mix_devices(name),
                "Expected all tensors to be on the same device, but found at least two devices, ", cuda->device(),
                " and cpu! (when calling ", name, ")");
}

bool is_generator(const c10::Argument& argument) {
  auto type = argument.type();
  if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  return type->kind() == c10::TypeKind::GeneratorType;
}

bool is_written(const c10::Argument& a) { return a.alias_info() && a.alias_info()->isWrite(); }

// Some CPU kernels lack a type that the CUDA ones have: compute in a wider one
// and convert the result back.
struct Substitute {
  c10::ScalarType missing, wide;
};

std::optional<Substitute> substitute_for(const c10::Error& e) {
  static constexpr std::pair<const char*, Substitute> known[] = {
      {"'Half'", {c10::kHalf, c10::kFloat}}, {"'BFloat16'", {c10::kBFloat16, c10::kFloat}},
      {"'Long'", {c10::kLong, c10::kDouble}}, {"'Int'", {c10::kInt, c10::kDouble}},
      {"'Short'", {c10::kShort, c10::kFloat}}, {"'Char'", {c10::kChar, c10::kFloat}},
      {"'Byte'", {c10::kByte, c10::kFloat}}, {"'Bool'", {c10::kBool, c10::kByte}}};
  const std::string what = e.what_without_backtrace();
  for (const auto& [name, substitute] : known)
    if (what.find(std::string("not implemented for ") + name) != std::string::npos) return substitute;
  return std::nullopt;
}

c10::IValue widened(const c10::IValue& v, const Substitute& s) {
  auto widen = [&s](const at::Tensor& t) {
    return t.defined() && t.scalar_type() == s.missing ? t.to(s.wide) : t;
  };
  if (v.isTensor()) return widen(v.toTensor());
  if (v.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const auto& t : v.toTensorVector()) out.push_back(widen(t));
    return out;
  }
  return v;
}

void copy_back(const c10::IValue& to, const c10::IValue& from) {
  if (to.isTensor() && to.toTensor().defined() && !to.toTensor().is_same(from.toTensor())) {
    at::Tensor target = to.toTensor();
    if (target.sizes() != from.toTensor().sizes()) target.resize_(from.toTensor().sizes());
    target.copy_(from.toTensor());
  }
  if (to.isTensorList()) {
    const auto a = to.toTensorVector(), b = from.toTensorVector();
    for (size_t i = 0; i < a.size(); ++i) copy_back(a[i], b[i]);
  }
}

bool any_sparse(const Stack& values) {
  for (const auto& v : values) {
    if (v.isTensor() && v.toTensor().defined() && v.toTensor().is_sparse()) return true;
    if (v.isTensorList())
      for (const auto& t : v.toTensorVector())
        if (t.defined() && t.is_sparse()) return true;
  }
  return false;
}

Stack call_cpu(const c10::OperatorHandle& op, const Stack& arguments) {
  const c10::DispatchKey key = any_sparse(arguments) ? c10::DispatchKey::SparseCPU : c10::DispatchKey::CPU;
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasComputedKernelForDispatchKey(key), "gpusim: ", op.operator_name(), " has no ",
                              key, " kernel to stand in for the CUDA one");
  const c10::DispatchKeySet cpu(key);
  Stack stack = arguments;
  try {
    op.redispatchBoxed(cpu, &stack);
    return stack;
  } catch (const c10::Error& e) {
    const auto substitute = substitute_for(e);
    if (!substitute) throw;
    const auto& schema = op.schema();
    Stack wide;
    for (const auto& v : arguments) wide.push_back(widened(v, *substitute));
    for (size_t i = 0; i < wide.size(); ++i)
      if (schema.arguments()[i].name() == "dtype" && wide[i].isInt() && wide[i].toInt() == int64_t(substitute->missing))
        wide[i] = int64_t(substitute->wide);
    stack = wide;
    op.redispatchBoxed(cpu, &stack);
    for (size_t i = 0; i < arguments.size(); ++i)
      if (is_written(schema.arguments()[i])) copy_back(arguments[i], wide[i]);
    for (size_t r = 0; r < stack.size(); ++r) {
      if (!stack[r].isTensor()) continue;
      bool written = false;
      for (size_t i = 0; i < wide.size() && !written; ++i)
        if (wide[i].isTensor() && wide[i].toTensor().is_same(stack[r].toTensor())) {
          stack[r] = arguments[i];
          written = true;
        }
      const at::Tensor t = stack[r].toTensor();
      if (!written && t.defined() && t.scalar_type() == substitute->wide) stack[r] = t.to(substitute->missing);
    }
    return stack;
  }
}

void narrow_generators(const c10::FunctionSchema& schema, const Stack& originals, Stack* arguments,
                       c10::Device device, bool* named) {
  for (size_t i = 0; i < arguments->size(); ++i) {
    if (!is_generator(schema.arguments()[i])) continue;
    *named = true;
    std::optional<at::Generator> given;
    if (originals[i].isGenerator()) given = originals[i].toGenerator();
    TORCH_CHECK(!given || given->device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
                given->device().type(), "'");
    (*arguments)[i] = cpu_generator(given, device);
  }
}

Stack call_with_random(const c10::OperatorHandle& op, const Stack& originals, Stack arguments, c10::Device device) {
  bool named = false;
  narrow_generators(op.schema(), originals, &arguments, device, &named);
  std::optional<DefaultGeneratorScope> scope;
  if (!named && op.hasTag(at::Tag::nondeterministic_seeded)) scope.emplace(device);
  return call_cpu(op, arguments);
}

// An operator inside a captured graph: run again on each replay, into the
// tensors that the capture returned.
struct Recorded {
  c10::OperatorHandle op;
  Stack originals, arguments;
  c10::Device device;
  std::vector<at::Tensor> results;  // in order; undefined: nothing to copy
};

void flatten(const Stack& values, std::vector<at::Tensor>* out) {
  for (const auto& v : values) {
    if (v.isTensor()) out->push_back(v.toTensor());
    if (v.isTensorList())
      for (const auto& t : v.toTensorVector()) out->push_back(t);
  }
}

void replay(void* data) {
  auto& r = *static_cast<Recorded*>(data);
  at::AutoDispatchBelowADInplaceOrView below;
  const Stack out = call_with_random(r.op, r.originals, r.arguments, r.device);
  std::vector<at::Tensor> tensors;
  flatten(out, &tensors);
  for (size_t i = 0; i < tensors.size() && i < r.results.size(); ++i)
    if (r.results[i].defined() && tensors[i].defined()) copy_memory(r.results[i], tensors[i]);
}

void record(const c10::OperatorHandle& op, const Stack& originals, const Stack& arguments, const Stack& cpu_results,
            const Aliases& aliases, cudaStream_t stream) {
  auto r = std::make_unique<Recorded>(Recorded{op, originals, arguments, aliases.device(), {}});
  std::vector<at::Tensor> tensors;
  flatten(cpu_results, &tensors);
  for (const auto& t : tensors) {
    at::Tensor target;
    for (const auto& [cpu, cuda] : aliases.fresh())
      if (cpu.is_same(t)) target = cuda;
    r->results.push_back(target);
  }
  gpusim_record(stream, op.schema().name().c_str(), &replay, r.release(),
                [](void* p) { delete static_cast<Recorded*>(p); });
}

struct Snapshot {
  at::Tensor tensor;
  std::vector<char> bytes;
};

std::vector<Snapshot> snapshot(const c10::FunctionSchema& schema, const Stack& arguments) {
  std::vector<Snapshot> out;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!is_written(schema.arguments()[i])) continue;
    std::vector<at::Tensor> tensors;
    flatten({arguments[i]}, &tensors);
    for (const auto& t : tensors) {
      if (!t.defined() || t.numel() == 0) continue;
      const size_t n = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize());
      const char* p = static_cast<const char*>(t.const_data_ptr());
      out.push_back({t, std::vector<char>(p, p + n)});
    }
  }
  return out;
}

}  // namespace

void cpu_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  // PyTorch's own kernels would tell of an earlier fault, or of a launch that failed unnoticed.
  if (const int fault = gpusim_take_fault()) C10_CUDA_CHECK(static_cast<cudaError_t>(fault));
  C10_CUDA_CHECK(cudaGetLastError());
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const Stack originals(stack->end() - ptrdiff_t(count), stack->end());
  torch::jit::drop(*stack, count);

  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::AutoDispatchBelowADInplaceOrView below;
  Aliases aliases;
  Stack arguments;
  arguments.reserve(count);
  for (const auto& v : originals) arguments.push_back(aliases.to_cpu(v));
  check_devices(schema.name(), aliases);

  cudaStream_t stream = c10::cuda::getCurrentCUDAStream(aliases.device().index()).stream();
  const bool capturing = gpusim_is_capturing(stream) != 0;
  std::vector<Snapshot> before;
  if (capturing) {
    TORCH_CHECK(schema.name() != "aten::_local_scalar_dense",
                "CUDA error: operation not permitted when stream is capturing");
    before = snapshot(schema, arguments);
  }

  Stack results;
  {
    ResultMemoryScope results_in_device_memory(aliases.device());
    results = call_with_random(op, originals, arguments, aliases.device());
  }
  for (size_t i = 0; i < count; ++i)
    if (is_written(schema.arguments()[i])) aliases.follow_resize(originals[i]);
  for (const auto& r : results) stack->push_back(aliases.to_cuda(r));

  if (capturing) {
    record(op, originals, arguments, results, aliases, stream);
    for (auto& s : before) std::memcpy(s.tensor.mutable_data_ptr(), s.bytes.data(), s.bytes.size());
  }
}

}  // namespace gpusim::torch_plugin
