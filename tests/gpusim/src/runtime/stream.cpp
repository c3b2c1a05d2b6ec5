// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "stream.h"

#include <mutex>
#include <set>

#include "config.h"
#include "errors.h"

namespace gpusim::runtime {
namespace {

std::mutex streams_mutex;
std::set<Stream*>& streams() {
  static auto* s = new std::set<Stream*>;
  return *s;
}
std::atomic<unsigned long long> next_id{10};

thread_local int device_of_thread = 0;

cudaError_t make_stream(cudaStream_t* out, unsigned flags, int priority) {
  if (!out) return note(cudaErrorInvalidValue);
  auto* s = new Stream;
  s->flags = flags;
  s->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
  s->device = device_of_thread;
  s->id = next_id++;
  std::lock_guard lock(streams_mutex);
  streams().insert(s);
  *out = reinterpret_cast<cudaStream_t>(s);
  return cudaSuccess;
}

Event* as_event(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

}  // namespace

int current_device() { return device_of_thread; }

Stream* resolve(cudaStream_t stream) {
  static Stream defaults[16];
  const auto value = reinterpret_cast<uintptr_t>(stream);
  if (value <= 2) {
    Stream* s = &defaults[device_of_thread];
    s->device = device_of_thread;
    return s;
  }
  std::lock_guard lock(streams_mutex);
  auto* s = reinterpret_cast<Stream*>(stream);
  return streams().count(s) ? s : nullptr;
}

cudaError_t enqueue(cudaStream_t stream, const char* what, Work work) {
  Stream* s = resolve(stream);
  if (!s) return note(cudaErrorInvalidResourceHandle);
  if (!s->capture) return work();
  auto node = std::make_unique<Node>();
  node->what = what;
  node->run = std::move(work);
  s->capture->body->nodes.push_back(std::move(node));
  return cudaSuccess;
}

}  // namespace gpusim::runtime

using namespace gpusim::runtime;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  if (!count) return note(cudaErrorInvalidValue);
  *count = config().device_count;
  return *count ? cudaSuccess : note(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= config().device_count) return note(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (!device) return note(cudaErrorInvalidValue);
  *device = device_of_thread;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* s) { return make_stream(s, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return make_stream(s, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  return make_stream(s, flags, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard lock(streams_mutex);
  auto* s = reinterpret_cast<Stream*>(stream);
  if (!streams().erase(s)) return note(cudaErrorInvalidResourceHandle);
  delete s;
  return cudaSuccess;
}

#define GPUSIM_STREAM(name)     \
  Stream* name = resolve(stream); \
  if (!name) return note(cudaErrorInvalidResourceHandle)

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  GPUSIM_STREAM(s);
  *priority = s->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  GPUSIM_STREAM(s);
  *flags = s->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  GPUSIM_STREAM(s);
  *id = s->id;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  GPUSIM_STREAM(s);
  *device = s->device;
  return cudaSuccess;
}
cudaError_t cudaStreamCopyAttributes(cudaStream_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetAttribute(cudaStream_t, cudaStreamAttrID, cudaStreamAttrValue* value) {
  *value = {};
  return cudaSuccess;
}
cudaError_t cudaStreamSetAttribute(cudaStream_t, cudaStreamAttrID, const cudaStreamAttrValue*) {
  return cudaSuccess;
}
cudaError_t cudaStreamAttachMemAsync(cudaStream_t, void*, size_t, unsigned) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  GPUSIM_STREAM(s);
  if (s->capture) return note(cudaErrorStreamCaptureUnsupported);
  return take_fault();
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  GPUSIM_STREAM(s);
  if (s->capture) return note(cudaErrorStreamCaptureUnsupported);
  return take_fault();
}
cudaError_t cudaDeviceSynchronize() { return take_fault(); }
cudaError_t cudaThreadSynchronize() { return take_fault(); }

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void* data) {
  return enqueue(stream, "host", [=] {
    fn(data);
    return cudaSuccess;
  });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (!event) return note(cudaErrorInvalidValue);
  auto* e = new Event;
  e->flags = flags;
  e->device = current_device();
  *event = reinterpret_cast<cudaEvent_t>(e);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  GPUSIM_STREAM(s);
  if (!event) return note(cudaErrorInvalidResourceHandle);
  Event* e = as_event(event);
  e->capture = s->capture;
  e->capture_id = s->capture_id;
  e->recorded = true;
  e->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (flags & cudaEventRecordExternal)
    return enqueue(stream, "event", [event] {
      as_event(event)->recorded = true;
      as_event(event)->time = std::chrono::steady_clock::now();
      return cudaSuccess;
    });
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event ? take_fault() : note(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return event ? take_fault() : note(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!event) return note(cudaErrorInvalidResourceHandle);
  delete as_event(event);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  if (!ms || !start || !end) return note(cudaErrorInvalidResourceHandle);
  const Event *a = as_event(start), *b = as_event(end);
  if (!a->recorded || !b->recorded || ((a->flags | b->flags) & cudaEventDisableTiming))
    return note(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(b->time - a->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  GPUSIM_STREAM(s);
  if (!event) return note(cudaErrorInvalidResourceHandle);
  const Event* e = as_event(event);
  if (e->capture && !s->capture) {  // the waiting stream joins the capture
    s->capture = e->capture;
    s->capture_id = e->capture_id;
    s->capture_owner = false;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
}  // extern "C"

namespace gpusim::runtime {

// Every stream that took part leaves the capture when it ends.
void leave_capture(Graph* graph) {
  std::lock_guard lock(streams_mutex);
  for (Stream* s : streams())
    if (s->capture == graph) {
      s->capture = nullptr;
      s->capture_id = 0;
      s->capture_owner = s->graph_was_given = false;
    }
}

}  // namespace gpusim::runtime
