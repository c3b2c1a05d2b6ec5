// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// cudaMalloc and friends, memory pools, pointer attributes, memcpy and memset.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "config.h"
#include "errors.h"
#include "memory.h"
#include "profile.h"
#include "registry.h"
#include "stream.h"

using namespace gpusim::runtime;

namespace {

cudaError_t allocate_into(void** out, size_t bytes, Kind kind) {
  if (!out) return note(cudaErrorInvalidValue);
  *out = nullptr;
  if (bytes == 0) return cudaSuccess;
  *out = allocate(bytes, kind, current_device());
  return *out ? cudaSuccess : note(cudaErrorMemoryAllocation);
}

cudaError_t free_device(void* p) {
  if (!p) return cudaSuccess;
  Allocation a;
  if (!find(uint64_t(p), &a) || a.begin != uint64_t(p)) return note(cudaErrorInvalidValue);
  if (defer_free(p)) return cudaSuccess;
  return release(p, false) ? cudaSuccess : note(cudaErrorInvalidValue);
}

cudaError_t refuse(const char* what, const void* p, size_t bytes, const char* why) {
  std::fprintf(stderr, "gpusim: %s of %zu bytes refused: 0x%llx %s; it lies %s\n", what, bytes,
               (unsigned long long)p, why, describe(uint64_t(p)).c_str());
  return note(cudaErrorInvalidValue);
}

// One side of a copy. Leaving a known allocation is a bug on the host's side
// too; where device memory is meant, ordinary host memory is one as well.
cudaError_t check_side(const char* what, const void* p, size_t bytes, bool device) {
  Allocation a;
  if (!p) return note(cudaErrorInvalidValue);
  if (!find(uint64_t(p), &a))
    return device ? refuse(what, p, bytes, "is no device memory") : cudaSuccess;
  return uint64_t(p) + bytes > a.end ? refuse(what, p, bytes, "is too near its allocation's end") : cudaSuccess;
}

cudaError_t copy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (const auto e = check_side("copy to", dst, bytes, to_device); e != cudaSuccess) return e;
  if (const auto e = check_side("copy from", src, bytes, from_device); e != cudaSuccess) return e;
  std::memmove(dst, src, bytes);
  return cudaSuccess;
}

cudaError_t copy_2d(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width, size_t height,
                    cudaMemcpyKind kind) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > dst_pitch || width > src_pitch) return note(cudaErrorInvalidPitchValue);
  for (size_t y = 0; y < height; ++y)
    if (const auto e = copy(static_cast<char*>(dst) + y * dst_pitch, static_cast<const char*>(src) + y * src_pitch,
                            width, kind);
        e != cudaSuccess)
      return e;
  return cudaSuccess;
}

cudaError_t set(void* p, int value, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  if (const auto e = check_side("memset", p, bytes, true); e != cudaSuccess) return e;
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// A call that synchronizes also tells of an earlier fault.
cudaError_t after_sync(cudaError_t error) { return error != cudaSuccess ? error : take_fault(); }

int the_pool;

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate_into(p, bytes, Kind::device); }
cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate_into(p, bytes, Kind::managed); }
cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate_into(p, *pitch * height, Kind::device);
}
cudaError_t cudaFree(void* p) { return free_device(p); }
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return allocate_into(p, bytes, Kind::device); }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return allocate_into(p, bytes, Kind::device);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return free_device(p); }

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate_into(p, bytes, Kind::host); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return allocate_into(p, bytes, Kind::host); }
cudaError_t cudaFreeHost(void* p) {
  return !p || release(p, true) ? cudaSuccess : note(cudaErrorInvalidValue);
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  if (!p || !bytes) return note(cudaErrorInvalidValue);
  return add_range(p, bytes, Kind::registered, current_device()) ? cudaSuccess
                                                                 : note(cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* p) {
  return remove_range(p) ? cudaSuccess : note(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaHostGetFlags(unsigned* flags, void*) {
  *flags = cudaHostAllocMapped;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  const size_t capacity = device_capacity();
  if (free_bytes) *free_bytes = capacity - memory_use(current_device()).current;
  if (total) *total = capacity;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
  if (!out) return note(cudaErrorInvalidValue);
  std::memset(out, 0, sizeof *out);
  Allocation a;
  if (!find(uint64_t(p), &a)) {
    out->type = cudaMemoryTypeUnregistered;
    out->device = -1;
    out->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
  }
  out->device = a.device;
  out->devicePointer = const_cast<void*>(p);
  const bool host = a.kind == Kind::host || a.kind == Kind::registered;
  out->type = host ? cudaMemoryTypeHost : a.kind == Kind::managed ? cudaMemoryTypeManaged : cudaMemoryTypeDevice;
  if (host || a.kind == Kind::managed) out->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(&the_pool);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }
cudaError_t cudaDeviceSetMemPool(int, cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return cudaDeviceGetDefaultMemPool(pool, 0);
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr attr, void* value) {
  const MemoryUse use = memory_use(current_device());
  switch (attr) {
    case cudaMemPoolAttrReservedMemCurrent: case cudaMemPoolAttrUsedMemCurrent:
      *static_cast<uint64_t*>(value) = use.current; break;
    case cudaMemPoolAttrReservedMemHigh: case cudaMemPoolAttrUsedMemHigh:
      *static_cast<uint64_t*>(value) = use.peak; break;
    case cudaMemPoolAttrReleaseThreshold: *static_cast<uint64_t*>(value) = 0; break;
    default: *static_cast<int*>(value) = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }

cudaError_t cudaMemcpy(void* dst, const void* src, size_t n, cudaMemcpyKind kind) {
  return after_sync(copy(dst, src, n, kind));
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
  return enqueue(stream, "memcpy", [=] { return copy(dst, src, n, kind); });
}
cudaError_t cudaMemcpyPeer(void* dst, int, const void* src, int, size_t n) {
  return after_sync(copy(dst, src, n, cudaMemcpyDeviceToDevice));
}
cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t n, cudaStream_t stream) {
  return enqueue(stream, "memcpy", [=] { return copy(dst, src, n, cudaMemcpyDeviceToDevice); });
}
cudaError_t cudaMemcpy2D(void* dst, size_t dp, const void* src, size_t sp, size_t w, size_t h, cudaMemcpyKind kind) {
  return after_sync(copy_2d(dst, dp, src, sp, w, h, kind));
}
cudaError_t cudaMemcpy2DAsync(void* dst, size_t dp, const void* src, size_t sp, size_t w, size_t h,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  return enqueue(stream, "memcpy2D", [=] { return copy_2d(dst, dp, src, sp, w, h, kind); });
}
cudaError_t cudaMemset(void* p, int value, size_t n) { return after_sync(set(p, value, n)); }
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream) {
  return enqueue(stream, "memset", [=] { return set(p, value, n); });
}
cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t w, size_t h, cudaStream_t stream) {
  return enqueue(stream, "memset2D", [=] {
    for (size_t y = 0; y < h; ++y)
      if (const auto e = set(static_cast<char*>(p) + y * pitch, value, w); e != cudaSuccess) return e;
    return cudaSuccess;
  });
}
cudaError_t cudaMemset2D(void* p, size_t pitch, int value, size_t w, size_t h) {
  return after_sync(cudaMemset2DAsync(p, pitch, value, w, h, nullptr));
}

cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  size_t bytes;
  return symbol_address(symbol, p, &bytes) ? cudaSuccess : note(cudaErrorInvalidSymbol);
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  void* p;
  return symbol_address(symbol, &p, bytes) ? cudaSuccess : note(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* src, size_t n, size_t offset, cudaMemcpyKind,
                                    cudaStream_t stream) {
  void* p;
  size_t bytes;
  if (!symbol_address(symbol, &p, &bytes)) return note(cudaErrorInvalidSymbol);
  if (offset + n > bytes) return note(cudaErrorInvalidValue);
  return enqueue(stream, "memcpy", [=] { return copy(static_cast<char*>(p) + offset, src, n, cudaMemcpyDefault); });
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* src, size_t n, size_t offset, cudaMemcpyKind kind) {
  return after_sync(cudaMemcpyToSymbolAsync(symbol, src, n, offset, kind, nullptr));
}
cudaError_t cudaMemcpyFromSymbolAsync(void* dst, const void* symbol, size_t n, size_t offset, cudaMemcpyKind,
                                      cudaStream_t stream) {
  void* p;
  size_t bytes;
  if (!symbol_address(symbol, &p, &bytes)) return note(cudaErrorInvalidSymbol);
  if (offset + n > bytes) return note(cudaErrorInvalidValue);
  return enqueue(stream, "memcpy", [=] { return copy(dst, static_cast<char*>(p) + offset, n, cudaMemcpyDefault); });
}
cudaError_t cudaMemcpyFromSymbol(void* dst, const void* symbol, size_t n, size_t offset, cudaMemcpyKind kind) {
  return after_sync(cudaMemcpyFromSymbolAsync(dst, symbol, n, offset, kind, nullptr));
}

#if CUDART_VERSION >= 13000
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }
#else
cudaError_t cudaMemPrefetchAsync(const void*, size_t, int, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, int) { return cudaSuccess; }
#endif

// For the driver stand-in: `count` elements of 1, 2 or 4 bytes.
int gpusim_fill(void* p, uint32_t value, size_t element, size_t count, void* stream) {
  return enqueue(static_cast<cudaStream_t>(stream), "memset", [=] {
    if (count == 0) return cudaSuccess;
    if (const auto e = check_side("memset", p, element * count, true); e != cudaSuccess) return e;
    auto* to = static_cast<char*>(p);
    for (size_t i = 0; i < count; ++i) std::memcpy(to + i * element, &value, element);
    return cudaSuccess;
  });
}

// For the torch plugin: {current, peak, allocated, freed} in bytes, then in blocks.
void gpusim_memory_use(int device, uint64_t out[8]) {
  const MemoryUse u = memory_use(device);
  const uint64_t values[8] = {u.current, u.peak, u.total_allocated, u.total_freed,
                              u.count,   u.count_peak, u.count_allocated, u.count_freed};
  std::memcpy(out, values, sizeof values);
}
// Device memory that is about to be written whole, so it is not filled first.
void* gpusim_allocate(size_t bytes, int device) { return allocate(bytes, Kind::device, device, false); }
int gpusim_is_device_memory(const void* p) {
  Allocation a;
  return find(uint64_t(p), &a) && a.kind == Kind::device;
}
void gpusim_reset_peak(int device) { reset_peak(device); }
}
