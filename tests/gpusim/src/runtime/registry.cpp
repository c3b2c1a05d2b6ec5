// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "registry.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

#include "errors.h"
#include "fatbin.h"
#include "memory.h"
#include "profile.h"

namespace gpusim::runtime {
namespace {

constexpr unsigned kWrapperMagic = 0x466243b1;

struct FatbinWrapper {
  unsigned magic, version;
  const void* data;
  void* extra;
};

struct Variable {
  Binary* binary;
  std::string name;
  size_t bytes;
  void** managed_pointer;  // for __managed__ variables
};

struct Registry {
  std::recursive_mutex mutex;
  std::unordered_map<const void*, Kernel*> by_host;
  std::unordered_set<const void*> handles;
  std::unordered_map<const void*, Variable> variables;
};

Registry& registry() {
  static Registry* r = new Registry;
  return *r;
}

std::string base_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

// What to do about a fat binary without usable PTX.
std::string advice(const Binary& b, const FatbinContents& contents) {
  const Profile& p = profile();
  const std::string cc = std::to_string(p.major) + "." + std::to_string(p.minor);
  std::string s = "gpusim: " + b.origin + " holds no PTX that a device of compute capability " + cc + " can run";
  s += "\n  it holds:";
  for (const auto& m : contents.machine_code) s += " machine code for " + m + ";";
  for (const auto& i : contents.ptx)
    s += " PTX for sm_" + std::to_string(i.arch) + (i.arch_specific ? "a;" : ";");
  if (contents.machine_code.empty() && contents.ptx.empty()) s += " nothing;";
  s.back() = '\n';
  for (const auto& problem : contents.problems) s += "  " + problem + "\n";
  if (base_name(b.origin).rfind("libtorch", 0) == 0)
    s += "  this is PyTorch's own kernel: an operator that the CPU fallback does not serve";
  else
    s += "  build the extension with PTX: TORCH_CUDA_ARCH_LIST=\"" + cc +
         "+PTX\", or -gencode arch=compute_" + std::to_string(p.major * 10 + p.minor) + ",code=compute_" +
         std::to_string(p.major * 10 + p.minor);
  return s;
}

cudaError_t load_binary(Binary* b) {
  if (b->loaded) return b->error;
  b->loaded = true;
  if (b->relocatable) {
    std::fprintf(stderr, "gpusim: %s was built with relocatable device code (-rdc=true, -dc), "
                 "which would need a device linker; build it without\n", b->origin.c_str());
    return b->error = cudaErrorNoKernelImageForDevice;
  }
  const FatbinContents contents = read_fatbin(b->data);
  const PtxImage* image = choose(contents, profile().major, profile().minor);
  if (!image) {
    std::fprintf(stderr, "%s\n", advice(*b, contents).c_str());
    return b->error = cudaErrorNoKernelImageForDevice;
  }
  try {
    b->module = Module::parse(image->text);
    b->ptx_arch = image->arch;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gpusim: the PTX (sm_%d) in %s was not understood: %s\n", image->arch, b->origin.c_str(),
                 e.what());
    return b->error = cudaErrorInvalidPtx;
  }
  return cudaSuccess;
}

Kernel* add_kernel(Binary* b, const char* name, const void* host) {
  auto* k = new Kernel;
  k->binary = b;
  k->name = name;
  k->host = host;
  registry().handles.insert(k);
  if (host) registry().by_host[host] = k;
  return k;
}

Binary* make_binary(const void* fat, const void* near) {
  auto* b = new Binary;
  b->data = fat;
  const auto* wrapper = static_cast<const FatbinWrapper*>(fat);
  if (wrapper->magic == kWrapperMagic) {
    b->data = wrapper->data;
    b->relocatable = wrapper->version == 2;
  }
  Dl_info info;
  b->origin = near && dladdr(near, &info) && info.dli_fname ? info.dli_fname : "a loaded library";
  return b;
}

}  // namespace

std::string demangle(const std::string& name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string out = status == 0 && plain ? plain : name;
  std::free(plain);
  return out;
}

Kernel* find_kernel(const void* function) {
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  if (auto it = r.by_host.find(function); it != r.by_host.end()) return it->second;
  if (r.handles.count(function)) return static_cast<Kernel*>(const_cast<void*>(function));
  return nullptr;
}

cudaError_t load(Kernel* k) {
  std::lock_guard lock(registry().mutex);
  if (k->have_info) return cudaSuccess;
  if (const auto error = load_binary(k->binary); error != cudaSuccess) {
    if (error == cudaErrorNoKernelImageForDevice)
      std::fprintf(stderr, "gpusim: kernel wanted: %s\n", demangle(k->name).c_str());
    return note(error);
  }
  try {
    k->info = k->binary->module->kernel_info(k->name);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gpusim: %s: %s\n", demangle(k->name).c_str(), e.what());
    return note(cudaErrorInvalidDeviceFunction);
  }
  k->have_info = true;
  return cudaSuccess;
}

bool symbol_address(const void* symbol, void** address, size_t* bytes) {
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  auto it = r.variables.find(symbol);
  if (it == r.variables.end() || load_binary(it->second.binary) != cudaSuccess) return false;
  const auto [where, size] = it->second.binary->module->variable(it->second.name);
  if (!where) return false;
  *address = reinterpret_cast<void*>(where);
  *bytes = size;
  add_range(*address, size, Kind::module, 0);  // kernels may reach it through a pointer
  return true;
}

}  // namespace gpusim::runtime

using namespace gpusim::runtime;

extern "C" {

void** __cudaRegisterFatBinary(void* fat) {
  return reinterpret_cast<void**>(make_binary(fat, fat));
}
void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  // Kernels of an unloaded library must not be found by a later one's address.
  auto* b = reinterpret_cast<Binary*>(handle);
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  std::erase_if(r.by_host, [b](const auto& item) { return item.second->binary == b; });
  std::erase_if(r.variables, [b](const auto& item) { return item.second.binary == b; });
}

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  std::lock_guard lock(registry().mutex);
  add_kernel(reinterpret_cast<Binary*>(handle), name, host);
}

void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  std::lock_guard lock(registry().mutex);
  registry().variables[host] = {reinterpret_cast<Binary*>(handle), name, bytes, nullptr};
}
void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int, size_t bytes, int, int) {
  std::lock_guard lock(registry().mutex);
  registry().variables[host] = {reinterpret_cast<Binary*>(handle), name, bytes, host};
}
char __cudaInitModule(void** handle) {
  auto* b = reinterpret_cast<Binary*>(handle);
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  for (auto& [symbol, v] : r.variables) {
    size_t bytes;
    if (v.binary != b || !v.managed_pointer) continue;
    // Without a usable image the host's side of the variable must still exist.
    if (!symbol_address(symbol, v.managed_pointer, &bytes))
      *v.managed_pointer = allocate(v.bytes, Kind::managed, 0);
  }
  return 1;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* host) {
  Kernel* k = find_kernel(host);
  if (!k) return note(cudaErrorInvalidDeviceFunction);
  *out = reinterpret_cast<cudaKernel_t>(k);
  return cudaSuccess;
}
cudaError_t cudaGetKernel(cudaKernel_t* out, const void* host) { return __cudaGetKernel(out, host); }
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* out, const void* host) {
  return __cudaGetKernel(reinterpret_cast<cudaKernel_t*>(out), host);
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t* out, const void* code, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  if (!out || !code) return note(cudaErrorInvalidValue);
  *out = reinterpret_cast<cudaLibrary_t>(make_binary(code, code));
  return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* out, cudaLibrary_t library, const char* name) {
  if (!out || !library || !name) return note(cudaErrorInvalidValue);
  std::lock_guard lock(registry().mutex);
  *out = reinterpret_cast<cudaKernel_t>(add_kernel(reinterpret_cast<Binary*>(library), name, nullptr));
  return cudaSuccess;
}
}
