// The operation of instance_norm_cpu.h on CUDA, and how its work is cut. Nothing here knows PyTorch; the planning
// functions need no GPU and are tested without one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "geometry.h"
#include "instance_norm_cpu.h"

namespace cyclegan {

enum class CudaPath : int { automatic = 0, plain = 1, cluster = 2 };

struct CudaDevice {
  int multiprocessors;
  int shared_bytes;   // dynamic shared memory a block may have
  bool has_clusters;  // compute capability 9.0 or later
};

constexpr int access_bytes = 16;
constexpr int cluster_threads = 512;
constexpr int most_ranks = 16;

// Whether 16-byte accesses to a tensor are possible.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % access_bytes == 0; }

// A cluster of `ranks` blocks holds one picture's slice of `lanes` * 16 bytes of channels on chip; ranks = 0 if none can.
struct ClusterPlan {
  int lanes, ranks;
  int64_t clusters;      // per picture
  int64_t shared_bytes;  // of a block, slices of all tensors
};

// Bytes of shared memory that the reductions of a cluster kernel need beside the slices.
constexpr int64_t reduction_bytes(int lanes) {
  // Two reductions, of one and of two numbers for each of up to 8 channels a lane: a partial sum per warp, the block's
  // and the cluster's.
  return (cluster_threads / 32 + 2) * 3 * 8 * static_cast<int64_t>(lanes) * 4;
}

inline ClusterPlan plan_cluster(const Shape& s, int element_bytes, int tensors, const CudaDevice& device) {
  ClusterPlan best{0, 0, 0, 0};
  if (!device.has_clusters) return best;
  const int vector = access_bytes / element_bytes;
  const int64_t positions = s.h * s.w;
  int64_t best_score = 0;
  for (const int lanes : {4, 2, 1}) {
    if (s.c % (vector * lanes) != 0) continue;
    const int64_t clusters = s.c / (vector * lanes);
    const auto bytes = [&](int ranks) {
      return ceil_div(positions, ranks) * lanes * access_bytes * tensors + reduction_bytes(lanes);
    };
    int ranks = 1;
    while (ranks < most_ranks && bytes(ranks) > device.shared_bytes) ranks *= 2;
    if (bytes(ranks) > device.shared_bytes) continue;
    while (ranks < most_ranks && s.n * clusters * ranks < device.multiprocessors && positions / ranks >= 128) ranks *= 2;
    // Blocks that run at once; a lone 16-byte access uses half of a 32-byte sector.
    const int64_t blocks = s.n * clusters * ranks;
    const int64_t score = (blocks < device.multiprocessors ? blocks : device.multiprocessors) * (lanes > 1 ? 2 : 1);
    if (score > best_score) {
      best_score = score;
      best = {lanes, ranks, clusters, bytes(ranks)};
    }
  }
  return best;
}

constexpr int plain_threads = 256;

// The plain kernels: a block has `across` threads side by side on the channels and plain_threads / across below one
// another on the pixels; `tiles` blocks cover the channels and `chunks` the pixels of a picture.
struct PlainPlan {
  int vector, across;
  int64_t tiles, chunks;
};

inline PlainPlan plan_plain(const Shape& s, int element_bytes, bool aligned, const CudaDevice& device) {
  PlainPlan plan{};
  plan.vector = aligned && s.c % (access_bytes / element_bytes) == 0 ? access_bytes / element_bytes : 1;
  const int64_t vectors = s.c / plan.vector;
  plan.across = 1;
  while (plan.across < vectors && plan.across < 32) plan.across *= 2;
  plan.tiles = ceil_div(vectors, plan.across);
  const int64_t positions = s.h * s.w, below = plain_threads / plan.across;
  // Four blocks a multiprocessor hide the latency of memory; a thread gets four pixels at the least.
  const int64_t wanted = ceil_div(4 * device.multiprocessors, plan.tiles * (s.n > 0 ? s.n : 1));
  const int64_t most = ceil_div(positions, 4 * below);
  plan.chunks = wanted < most ? wanted : most;
  if (plan.chunks < 1) plan.chunks = 1;
  return plan;
}

// Floats of scratch memory that either direction needs, whatever the alignment of its tensors.
inline int64_t workspace_floats(const Shape& s, int element_bytes, const CudaDevice& device) {
  const int64_t with = plan_plain(s, element_bytes, true, device).chunks;
  const int64_t without = plan_plain(s, element_bytes, false, device).chunks;
  return s.n * ((with > without ? with : without) + 1) * 2 * s.c;
}

// The current device, asked once per device.
const CudaDevice& current_cuda_device();
// Asynchronous on `stream` (a cudaStream_t). Return null, or what went wrong.
const char* instance_norm_forward_cuda(const ForwardProblem& problem, CudaPath path, float* workspace, void* stream);
const char* instance_norm_backward_cuda(const BackwardProblem& problem, CudaPath path, float* workspace, void* stream);

}  // namespace cyclegan
