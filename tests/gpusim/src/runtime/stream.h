// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Streams, events, capture and graphs. Work runs at once, in the order it is
// given, unless the stream is being captured: then it is kept for replay.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace gpusim::runtime {

using Work = std::function<cudaError_t()>;

struct Node {
  std::string what;
  Work run;
};

struct GraphBody {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<void*> frees;       // device memory let go of while capturing
  std::vector<std::shared_ptr<void>> kept;
  ~GraphBody();
};

struct Graph {
  std::shared_ptr<GraphBody> body = std::make_shared<GraphBody>();
};

struct GraphExec {
  std::shared_ptr<GraphBody> body;
};

struct Stream {
  unsigned flags = 0;
  int priority = 0;
  int device = 0;
  unsigned long long id = 0;
  Graph* capture = nullptr;
  unsigned long long capture_id = 0;
  bool capture_owner = false;    // the stream the capture began on
  bool graph_was_given = false;  // cudaStreamBeginCaptureToGraph
};

struct Event {
  unsigned flags = 0;
  int device = 0;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  Graph* capture = nullptr;  // recorded on a capturing stream
  unsigned long long capture_id = 0;
};

Stream* resolve(cudaStream_t stream);  // nullptr: not a stream
int current_device();

cudaError_t enqueue(cudaStream_t stream, const char* what, Work work);

// While a capture is under way a free must wait for the graph's end.
bool defer_free(void* pointer);

}  // namespace gpusim::runtime
