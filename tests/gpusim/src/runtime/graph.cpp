// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Stream capture, graphs and the objects that hang on them.
#include <atomic>
#include <mutex>

#include "errors.h"
#include "memory.h"
#include "stream.h"

namespace gpusim::runtime {

void leave_capture(Graph* graph);

namespace {

std::mutex capture_mutex;
std::vector<Graph*> captures;  // under way, oldest first
std::atomic<unsigned long long> next_capture{1};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

struct UserObject {
  void* data;
  cudaHostFn_t destroy;
  std::atomic<unsigned> count;
};

void drop(UserObject* object, unsigned count) {
  if (object->count.fetch_sub(count) == count) {
    object->destroy(object->data);
    delete object;
  }
}

cudaError_t begin(cudaStream_t stream, Graph* graph) {
  Stream* s = resolve(stream);
  if (!s) return note(cudaErrorInvalidResourceHandle);
  if (reinterpret_cast<uintptr_t>(stream) <= 1 || s->capture) return note(cudaErrorStreamCaptureUnsupported);
  s->graph_was_given = graph != nullptr;
  s->capture = graph ? graph : new Graph;
  s->capture_id = next_capture++;
  s->capture_owner = true;
  std::lock_guard lock(capture_mutex);
  captures.push_back(s->capture);
  return cudaSuccess;
}

}  // namespace

GraphBody::~GraphBody() {
  for (void* p : frees) release(p, false);
}

bool defer_free(void* pointer) {
  std::lock_guard lock(capture_mutex);
  if (captures.empty()) return false;
  captures.back()->body->frees.push_back(pointer);
  return true;
}

}  // namespace gpusim::runtime

using namespace gpusim::runtime;

static Graph* as_graph(cudaGraph_t g) { return reinterpret_cast<Graph*>(g); }

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) { return begin(stream, nullptr); }
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  return graph ? begin(stream, as_graph(graph)) : note(cudaErrorInvalidValue);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  Stream* s = resolve(stream);
  if (!s || !s->capture || !s->capture_owner) return note(cudaErrorStreamCaptureUnsupported);
  Graph* graph = s->capture;
  {
    std::lock_guard lock(capture_mutex);
    std::erase(captures, graph);
  }
  leave_capture(graph);
  if (out) *out = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Stream* s = resolve(stream);
  if (!s || !status) return note(cudaErrorInvalidValue);
  *status = s->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  if (edges) *edges = nullptr;
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long* id, cudaGraph_t* graph,
                                        const cudaGraphNode_t** dependencies, size_t* count) {
#endif
  Stream* s = resolve(stream);
  if (!s || !status) return note(cudaErrorInvalidValue);
  *status = s->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (!s->capture) return cudaSuccess;
  if (id) *id = s->capture_id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(s->capture);
  static thread_local cudaGraphNode_t last;
  const auto& nodes = s->capture->body->nodes;
  last = nodes.empty() ? nullptr : reinterpret_cast<cudaGraphNode_t>(nodes.back().get());
  if (dependencies) *dependencies = &last;
  if (count) *count = nodes.empty() ? 0 : 1;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                unsigned) {
  return cudaSuccess;  // nodes replay in the order they were recorded
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (!mode) return note(cudaErrorInvalidValue);
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = reinterpret_cast<cudaGraph_t>(new Graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete as_graph(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (!exec || !graph) return note(cudaErrorInvalidValue);
  *exec = reinterpret_cast<cudaGraphExec_t>(new GraphExec{as_graph(graph)->body});
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<GraphExec*>(exec);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return note(cudaErrorInvalidValue);
  auto body = reinterpret_cast<GraphExec*>(exec)->body;
  return enqueue(stream, "graph", [body] {
    for (const auto& node : body->nodes)
      if (const cudaError_t error = node->run(); error != cudaSuccess) return error;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!graph || !count) return note(cudaErrorInvalidValue);
  const auto& have = as_graph(graph)->body->nodes;
  if (nodes)
    for (size_t i = 0; i < *count; ++i)
      nodes[i] = i < have.size() ? reinterpret_cast<cudaGraphNode_t>(have[i].get()) : nullptr;
  *count = have.size();
  return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                             cudaGraphNodeParams*) {
  return note(cudaErrorNotSupported);
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle*, cudaGraph_t, unsigned, unsigned) {
  return note(cudaErrorNotSupported);
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* out, void* data, cudaHostFn_t destroy, unsigned count, unsigned) {
  *out = reinterpret_cast<cudaUserObject_t>(new UserObject{data, destroy, count});
  return cudaSuccess;
}
cudaError_t cudaUserObjectRetain(cudaUserObject_t object, unsigned count) {
  reinterpret_cast<UserObject*>(object)->count += count;
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  drop(reinterpret_cast<UserObject*>(object), count);
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
  auto* user = reinterpret_cast<UserObject*>(object);
  if (!(flags & cudaGraphUserObjectMove)) user->count += count;
  as_graph(graph)->body->kept.emplace_back(user, [count](void* p) { drop(static_cast<UserObject*>(p), count); });
  return cudaSuccess;
}

// For the torch plugin: is this stream being captured, and put this into its graph.
int gpusim_is_capturing(void* stream) {
  Stream* s = resolve(static_cast<cudaStream_t>(stream));
  return s && s->capture;
}
void gpusim_record(void* stream, const char* what, void (*run)(void*), void* data, void (*destroy)(void*)) {
  std::shared_ptr<void> owner(data, destroy);
  enqueue(static_cast<cudaStream_t>(stream), what, [run, owner] {
    run(owner.get());
    return cudaSuccess;
  });
}
}  // extern "C"
