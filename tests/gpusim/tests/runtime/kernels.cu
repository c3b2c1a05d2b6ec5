// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Kernels for the tests: right ones, and wrong ones that must be caught.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>

namespace {

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

__constant__ float table[4];
__device__ int counter;

template <typename T>
__global__ void saxpy(const T* x, const T* y, T* out, float a, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = T(a * float(x[i]) + float(y[i]));
}

__global__ void block_sum(const float* x, float* out, int n) {
  __shared__ float part[256];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  part[threadIdx.x] = s;
  __syncthreads();
  for (int step = 128; step > 0; step /= 2) {
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(out, part[0]);
}

// Reverses blocks of n floats through dynamic shared memory.
__global__ void reverse(const float* x, float* out, int n) {
  extern __shared__ float buffer[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) buffer[i] = x[blockIdx.x * n + i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[blockIdx.x * n + i] = buffer[n - 1 - i];
}

// out (16x8) = a (16x16) * b (16x8), row major, one warp.
__global__ void mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
  const int group = threadIdx.x / 4, lane = threadIdx.x % 4;
  auto pack = [](__nv_bfloat16 lo, __nv_bfloat16 hi) {
    return uint32_t(__bfloat16_as_ushort(lo)) | uint32_t(__bfloat16_as_ushort(hi)) << 16;
  };
  uint32_t A[4], B[2];
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat16* p = a + (group + i % 2 * 8) * 16 + lane * 2 + i / 2 * 8;
    A[i] = pack(p[0], p[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __nv_bfloat16* p = b + (lane * 2 + i * 8) * 8 + group;
    B[i] = pack(p[0], p[8]);
  }
  float C[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + lane * 2 + i % 2] = C[i];
}

__global__ void look_up(float* out) {
  out[threadIdx.x] = table[threadIdx.x % 4];
  if (threadIdx.x == 0) atomicAdd(&counter, 1);
}

__global__ void write_at(float* out, int64_t index) { out[index + threadIdx.x] = 1; }
__global__ void read_at(const float* x, float* out, int64_t index) { out[threadIdx.x] = x[index + threadIdx.x]; }
__global__ void load_vector(const float* x, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  out[0] = v.x + v.y + v.z + v.w;
}
__global__ void racy(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[63 - threadIdx.x];  // no barrier
}
__global__ void endless(volatile float* x) {
  while (x[0] == 0) {
  }
}

at::Tensor run_saxpy(const at::Tensor& x, const at::Tensor& y, double a) {
  at::Tensor out = at::empty_like(x);
  const int n = int(x.numel());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "saxpy", [&] {
    saxpy<scalar_t><<<(n + 127) / 128, 128, 0, stream()>>>(x.data_ptr<scalar_t>(), y.data_ptr<scalar_t>(),
                                                           out.data_ptr<scalar_t>(), float(a), n);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor run_sum(const at::Tensor& x) {
  at::Tensor out = at::zeros({1}, x.options());
  block_sum<<<7, 256, 0, stream()>>>(x.data_ptr<float>(), out.data_ptr<float>(), int(x.numel()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor run_reverse(const at::Tensor& x, bool opt_in, bool extended) {
  at::Tensor out = at::empty_like(x);
  const int n = int(x.size(1));
  const size_t shared = size_t(n) * sizeof(float);
  if (opt_in)
    C10_CUDA_CHECK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  if (extended) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(x.size(0)));
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = shared;
    config.stream = stream();
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, reverse, static_cast<const float*>(x.data_ptr<float>()),
                                      out.data_ptr<float>(), n));
  } else {
    reverse<<<unsigned(x.size(0)), 256, shared, stream()>>>(x.data_ptr<float>(), out.data_ptr<float>(), n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

at::Tensor run_mma(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({16, 8}, a.options().dtype(at::kFloat));
  mma<<<1, 32, 0, stream()>>>(static_cast<const __nv_bfloat16*>(a.data_ptr()),
                              static_cast<const __nv_bfloat16*>(b.data_ptr()), out.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, int64_t> run_look_up() {
  const float values[4] = {1, 2, 3, 4};
  int count = 0;
  C10_CUDA_CHECK(cudaMemcpyToSymbol(table, values, sizeof values));
  C10_CUDA_CHECK(cudaMemcpyToSymbol(counter, &count, sizeof count));
  at::Tensor out = at::empty({8}, at::device(at::kCUDA).dtype(at::kFloat));
  look_up<<<1, 8, 0, stream()>>>(out.data_ptr<float>());
  look_up<<<1, 8, 0, stream()>>>(out.data_ptr<float>());
  C10_CUDA_CHECK(cudaMemcpyFromSymbol(&count, counter, sizeof count));
  return {out, count};
}

void run_write_at(const at::Tensor& out, int64_t index, bool checked) {
  write_at<<<1, 1, 0, stream()>>>(out.data_ptr<float>(), index);
  if (checked) C10_CUDA_KERNEL_LAUNCH_CHECK();
}
at::Tensor run_read_at(const at::Tensor& x, int64_t index, int64_t count) {
  at::Tensor out = at::empty({count}, x.options());
  read_at<<<1, unsigned(count), 0, stream()>>>(x.data_ptr<float>(), out.data_ptr<float>(), index);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
void read_stale(int64_t pointer, const at::Tensor& out) {
  read_at<<<1, 1, 0, stream()>>>(reinterpret_cast<const float*>(pointer), out.data_ptr<float>(), 0);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
at::Tensor run_load_vector(const at::Tensor& x) {
  at::Tensor out = at::empty({1}, x.options());
  load_vector<<<1, 1, 0, stream()>>>(x.data_ptr<float>(), out.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
at::Tensor run_racy() {
  at::Tensor out = at::empty({64}, at::device(at::kCUDA).dtype(at::kFloat));
  racy<<<1, 64, 0, stream()>>>(out.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
void run_endless(const at::Tensor& x) {
  endless<<<1, 1, 0, stream()>>>(x.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
void launch_shape(const at::Tensor& out, int64_t grid, int64_t block, bool checked) {
  write_at<<<unsigned(grid), unsigned(block), 0, stream()>>>(out.data_ptr<float>(), 0);
  if (checked) C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<int64_t, int64_t, int64_t> describe_reverse(int64_t threads, int64_t shared) {
  int blocks = 0;
  C10_CUDA_CHECK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reverse, int(threads), size_t(shared)));
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, block_sum));
  return {blocks, int64_t(attributes.sharedSizeBytes), attributes.maxThreadsPerBlock};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("saxpy", &run_saxpy);
  m.def("sum", &run_sum);
  m.def("reverse", &run_reverse);
  m.def("mma", &run_mma);
  m.def("look_up", &run_look_up);
  m.def("write_at", &run_write_at);
  m.def("read_at", &run_read_at);
  m.def("read_stale", &read_stale);
  m.def("load_vector", &run_load_vector);
  m.def("racy", &run_racy);
  m.def("endless", &run_endless);
  m.def("launch_shape", &launch_shape);
  m.def("describe_reverse", &describe_reverse);
}
