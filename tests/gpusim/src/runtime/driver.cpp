// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// A stand-in for libcuda.so.1: as much of the driver as PyTorch asks about
// itself. Kernels are launched through the runtime, so most of the driver's
// functions exist only to say that they are not supported.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "gpusim/tensor_map.h"

// From the runtime stand-in, which is always loaded too.
extern "C" {
int gpusim_device_attribute(int which, int* value);
int gpusim_device_count();
const char* gpusim_device_name();
int gpusim_pointer_type(const void* p, int* device);
void gpusim_memory_use(int device, uint64_t out[8]);
int cudaGetDevice(int* device);
int cudaSetDevice(int device);
int cudaMemGetInfo(size_t* free_bytes, size_t* total);
int gpusim_fill(void* p, uint32_t value, size_t element, size_t count, void* stream);
}

namespace {

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(uintptr_t(device) + 1); }

// The parts tiled and im2col descriptors share, checked as the driver documents them.
bool encode(gpusim::TensorMap* m, CUtensorMapDataType type, unsigned rank, void* address, const cuuint64_t* size,
            const cuuint64_t* strides, const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
            CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  *m = {};
  if (unsigned(type) > gpusim::TensorMap::kTfloat32Ftz || unsigned(swizzle) > gpusim::TensorMap::kSwizzle128B ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
    std::fprintf(stderr, "gpusim: a tensor map with a packed type, an interleave or an atomic swizzle is not supported\n");
    return false;
  }
  m->dtype = uint8_t(type);
  m->rank = uint8_t(rank);
  m->address = reinterpret_cast<uint64_t>(address);
  m->interleave = uint8_t(interleave);
  m->swizzle = uint8_t(swizzle);
  m->oob_fill = fill != 0;
  if (rank == 0 || rank > 5 || m->address % 16) return false;
  for (unsigned i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > (uint64_t(1) << 32) || element_strides[i] == 0 || element_strides[i] > 8)
      return false;
    m->dims[i] = size[i];
    m->element_strides[i] = uint8_t(element_strides[i]);
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= (uint64_t(1) << 40)) return false;
    m->strides[i - 1] = strides[i - 1];
  }
  return true;
}

unsigned swizzle_bytes(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
}

CUresult fill(CUdeviceptr p, uint32_t value, size_t element, size_t count, CUstream stream) {
  if (p % element) return CUDA_ERROR_INVALID_VALUE;
  return gpusim_fill(reinterpret_cast<void*>(p), value, element, count, stream) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult store(CUtensorMap* map, const gpusim::TensorMap& m) {
  std::memset(map, 0, sizeof *map);
  std::memcpy(static_cast<void*>(map), &m, sizeof m);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = gpusim_device_count();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= gpusim_device_count()) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
  std::snprintf(name, size_t(bytes), "%s", gpusim_device_name());
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return gpusim_device_attribute(int(which), value) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) {
  int device = 0;
  cudaGetDevice(&device);
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) cudaSetDevice(int(reinterpret_cast<uintptr_t>(context) - 1));
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  cudaGetDevice(device);
  return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  cudaMemGetInfo(free_bytes, total);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS               ? "no error"
          : error == CUDA_ERROR_NOT_SUPPORTED ? "operation not supported by gpusim"
          : error == CUDA_ERROR_INVALID_VALUE ? "invalid argument"
                                              : "driver error";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS               ? "CUDA_SUCCESS"
          : error == CUDA_ERROR_NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED"
          : error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                              : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr p) {
  int device = 0;
  const int type = gpusim_pointer_type(reinterpret_cast<void*>(p), &device);
  if (type < 0) return CUDA_ERROR_INVALID_VALUE;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *static_cast<unsigned*>(out) = unsigned(type); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(out) = p; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(out) = device; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}

CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t count, CUstream stream) {
  return fill(p, value, 1, count, stream);
}
CUresult cuMemsetD16Async(CUdeviceptr p, unsigned short value, size_t count, CUstream stream) {
  return fill(p, value, 2, count, stream);
}
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t count, CUstream stream) {
  return fill(p, value, 4, count, stream);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill fill) {
  gpusim::TensorMap m;
  if (!map || !encode(&m, type, rank, address, size, strides, element_strides, interleave, swizzle, fill))
    return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; ++i) {
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    m.box[i] = uint16_t(box[i]);
  }
  const unsigned row = box[0] * unsigned(m.element_bytes());
  if (row % 16 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row > swizzle_bytes(swizzle)))
    return CUDA_ERROR_INVALID_VALUE;
  return store(map, m);
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* size, const cuuint64_t* strides, const int* low, const int* high,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  gpusim::TensorMap m;
  if (!map || rank < 3 || channels > 256 || pixels > 1024 ||
      !encode(&m, type, rank, address, size, strides, element_strides, interleave, swizzle, fill))
    return CUDA_ERROR_INVALID_VALUE;
  m.mode = gpusim::TensorMap::kIm2col;
  for (unsigned i = 0; i + 2 < rank; ++i) {
    m.lower_corner[i] = int16_t(low[i]);
    m.upper_corner[i] = int16_t(high[i]);
  }
  m.channels_per_pixel = uint16_t(channels);
  m.pixels_per_column = uint16_t(pixels);
  return store(map, m);
}

CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  if (!map || reinterpret_cast<uint64_t>(address) % 16) return CUDA_ERROR_INVALID_VALUE;
  gpusim::TensorMap m;
  std::memcpy(static_cast<void*>(&m), map, sizeof m);
  if (m.magic != gpusim::TensorMap::kMagic) return CUDA_ERROR_INVALID_VALUE;
  m.address = reinterpret_cast<uint64_t>(address);
  return store(map, m);
}
}

// Functions whose parameters do not matter, since they only refuse. They are
// defined under other C++ names so as not to clash with the header.
extern "C" {
static CUresult refuse() { return CUDA_ERROR_NOT_SUPPORTED; }
#define GPUSIM_REFUSE(name) \
  __attribute__((visibility("default"))) CUresult gpusim_refuse_##name() __asm__(#name); \
  CUresult gpusim_refuse_##name() { return refuse(); }
GPUSIM_REFUSE(cuFuncGetAttribute)
GPUSIM_REFUSE(cuFuncSetAttribute)
GPUSIM_REFUSE(cuFuncSetCacheConfig)
GPUSIM_REFUSE(cuLaunchKernel)
GPUSIM_REFUSE(cuLaunchKernelEx)
GPUSIM_REFUSE(cuLaunchCooperativeKernel)
GPUSIM_REFUSE(cuLinkAddData_v2)
GPUSIM_REFUSE(cuLinkComplete)
GPUSIM_REFUSE(cuLinkCreate_v2)
GPUSIM_REFUSE(cuModuleGetFunction)
GPUSIM_REFUSE(cuModuleLoad)
GPUSIM_REFUSE(cuModuleLoadData)
GPUSIM_REFUSE(cuModuleLoadDataEx)
GPUSIM_REFUSE(cuModuleUnload)
GPUSIM_REFUSE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
GPUSIM_REFUSE(cuMemAddressReserve)
GPUSIM_REFUSE(cuMemCreate)
GPUSIM_REFUSE(cuGetProcAddress)
GPUSIM_REFUSE(cuGetProcAddress_v2)
GPUSIM_REFUSE(cuGetExportTable)

void* gpusim_driver_entry(const char* name);
}

// Known functions by name; any other name gets one that refuses, since a null
// pointer would fail even where the function is never called.
void* gpusim_driver_entry(const char* name) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (self)
    if (void* p = dlsym(self, name)) return p;
  return std::strncmp(name, "cu", 2) == 0 ? reinterpret_cast<void*>(&refuse) : nullptr;
}
