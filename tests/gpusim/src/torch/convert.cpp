// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "convert.h"

#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>

#include "result_memory.h"

namespace gpusim::torch_plugin {
namespace {

bool is_dense_cuda(const at::Tensor& t) { return t.defined() && t.is_cuda() && t.layout() == c10::kStrided; }

size_t bytes_of(const at::Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize());
}

}  // namespace

void copy_memory(const at::Tensor& cuda, const at::Tensor& cpu) {
  if (cpu.numel() == 0) return;
  std::memcpy(cuda.mutable_data_ptr(), cpu.const_data_ptr(), bytes_of(cpu));
}

at::Tensor Aliases::to_cpu(const at::Tensor& t) {
  if (!t.defined()) return t;
  seen_.push_back(t);
  if (t.is_cuda() && t.layout() == c10::kSparse) return sparse_to_cpu(t);
  if (!is_dense_cuda(t)) return t;
  if (!device_) device_ = t.device();
  auto* impl = t.unsafeGetTensorImpl();
  if (auto it = alias_of_.find(impl); it != alias_of_.end()) return it->second;

  auto* cuda_storage = t.storage().unsafeGetStorageImpl();
  auto [it, added] = storages_.try_emplace(cuda_storage);
  if (added) {
    // Resizable, with the CPU's allocator: an out= argument may have to grow.
    void* data = cuda_storage->mutable_data();
    it->second = c10::Storage(c10::Storage::use_byte_size_t(), cuda_storage->nbytes(),
                              c10::DataPtr(data, c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
    back_[it->second.unsafeGetStorageImpl()] = t.storage();
  }
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(it->second), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* alias_impl = alias.unsafeGetTensorImpl();
  alias_impl->set_storage_offset(t.storage_offset());
  alias_impl->set_sizes_and_strides(t.sizes(), t.strides());
  if (impl->is_wrapped_number()) alias_impl->set_wrapped_number(true);
  if (t.is_conj()) alias._set_conj(true);
  if (t.is_neg()) alias._set_neg(true);
  alias_of_[impl] = alias;
  original_of_[alias_impl] = t;
  return alias;
}

// A sparse (COO) tensor is two dense ones.
at::Tensor Aliases::sparse_to_cpu(const at::Tensor& t) {
  if (!device_) device_ = t.device();
  auto [it, added] = alias_of_.try_emplace(t.unsafeGetTensorImpl());
  if (!added) return it->second;
  const at::Tensor indices = to_cpu(t._indices()), values = to_cpu(t._values());
  const at::Tensor alias = at::_sparse_coo_tensor_unsafe(indices, values, t.sizes(), t.options().device(c10::kCPU),
                                                         t.is_coalesced());
  original_of_[alias.unsafeGetTensorImpl()] = t;
  return alias_of_[t.unsafeGetTensorImpl()] = alias;
}

at::Tensor Aliases::sparse_to_cuda(const at::Tensor& t) {
  return at::_sparse_coo_tensor_unsafe(to_cuda(t._indices()), to_cuda(t._values()), t.sizes(),
                                       t.options().device(device()), t.is_coalesced());
}

c10::IValue Aliases::to_cpu(const c10::IValue& v) {
  if (v.isTensor()) return to_cpu(v.toTensor());
  if (v.isTensorList()) {
    c10::List<at::Tensor> out;
    const auto list = v.toTensorVector();
    out.reserve(list.size());
    for (const auto& t : list) out.push_back(to_cpu(t));
    return out;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const auto& t : v.toOptionalTensorVector())
      out.push_back(t ? std::optional<at::Tensor>(to_cpu(*t)) : std::nullopt);
    return out;
  }
  if (v.isDevice() && v.toDevice().is_cuda()) {
    c10::Device d = v.toDevice();
    if (!d.has_index()) d = c10::impl::VirtualGuardImpl(c10::kCUDA).getDevice();
    if (!device_) device_ = d;
    return c10::Device(c10::kCPU);
  }
  return v;
}

at::Tensor Aliases::original_of(const at::Tensor& alias) const {
  auto it = original_of_.find(alias.unsafeGetTensorImpl());
  return it == original_of_.end() ? at::Tensor() : it->second;
}

at::Tensor Aliases::to_cuda(const at::Tensor& t) {
  if (!t.defined() || !t.is_cpu()) return t;
  if (at::Tensor original = original_of(t); original.defined()) return original;
  if (t.layout() == c10::kSparse) return sparse_to_cuda(t);
  if (t.layout() != c10::kStrided) return t;
  for (const auto& [cpu, cuda] : fresh_)
    if (cpu.is_same(t)) return cuda;
  for (const auto& s : seen_)
    if (s.is_same(t)) return t;  // a CPU argument handed back

  // Results that already lie in device memory are taken over without a copy.
  if (!back_.count(t.storage().unsafeGetStorageImpl()))
    if (auto storage = adopt(t.storage(), device())) back_[t.storage().unsafeGetStorageImpl()] = *storage;

  at::Tensor out;
  if (auto it = back_.find(t.storage().unsafeGetStorageImpl()); it != back_.end()) {
    // A view of an argument (or of a result taken over) becomes the same view of the original.
    out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(it->second),
                                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
    out.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
    fresh_.emplace_back(t, out);
  } else {
    out = at::empty_strided(t.sizes(), t.strides(), t.options().device(device()));
    copy_memory(out, t);
    fresh_.emplace_back(t, out);
  }
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

c10::IValue Aliases::to_cuda(const c10::IValue& v) {
  if (v.isTensor()) return to_cuda(v.toTensor());
  if (v.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const auto& t : v.toTensorVector()) out.push_back(to_cuda(t));
    return out;
  }
  return v;
}

void Aliases::follow_resize(const at::Tensor& original) {
  if (!original.defined()) return;
  auto it = alias_of_.find(original.unsafeGetTensorImpl());
  if (it == alias_of_.end()) return;
  const at::Tensor& alias = it->second;
  if (alias.layout() == c10::kSparse) {
    auto* sparse = static_cast<at::SparseTensorImpl*>(original.unsafeGetTensorImpl());
    sparse->resize_(alias.sparse_dim(), alias.dense_dim(), alias.sizes());
    sparse->set_indices_and_values_unsafe(to_cuda(alias._indices()), to_cuda(alias._values()));
    sparse->set_coalesced(alias.is_coalesced());
    return;
  }
  auto* impl = original.unsafeGetTensorImpl();
  auto* cuda_storage = original.storage().unsafeGetStorageImpl();
  auto* cpu_storage = alias.storage().unsafeGetStorageImpl();
  if (cpu_storage->data() != cuda_storage->data()) {  // grew: the data is elsewhere now
    original.resize_(alias.sizes());
    if (size_t(cuda_storage->nbytes()) < bytes_of(alias) + size_t(alias.storage_offset()) * alias.itemsize())
      original.resize_({int64_t((cpu_storage->nbytes() + alias.itemsize() - 1) / alias.itemsize())});
    std::memcpy(cuda_storage->mutable_data(), cpu_storage->data(),
                std::min(cuda_storage->nbytes(), cpu_storage->nbytes()));
  }
  if (original.sizes() != alias.sizes() || original.strides() != alias.strides() ||
      original.storage_offset() != alias.storage_offset()) {
    impl->set_storage_offset(alias.storage_offset());
    impl->set_sizes_and_strides(alias.sizes(), alias.strides());
  }
}

void Aliases::follow_resize(const c10::IValue& v) {
  if (v.isTensor()) follow_resize(v.toTensor());
  if (v.isTensorList())
    for (const auto& t : v.toTensorVector()) follow_resize(t);
}

}  // namespace gpusim::torch_plugin
