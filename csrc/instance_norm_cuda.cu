// Instance normalisation, activation, residual and reflection padding on CUDA, in two ways.
//
// Cluster (compute capability 9.0 and later): the blocks of a thread-block cluster hold one picture's slice of 8 to 32
// channels in their shared memory, and exchange sums through distributed shared memory. x (and in the backward pass
// the gradient) is read once and the result written once.
//
// Plain (8.0 and later): partial statistics, a merge, and a second pass over x.
//
// Both are deterministic: sums are taken in a fixed order, mirrored gradients are gathered, and nothing is atomic.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "instance_norm_cuda.h"

namespace cyclegan {
namespace {

namespace cg = cooperative_groups;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// V neighbouring channels, moved by one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Packet {
  T value[V];
};

template <class T, int V>
__device__ __forceinline__ void load(const T* p, float (&out)[V]) {
  const Packet<T, V> packet = *reinterpret_cast<const Packet<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = widen(packet.value[i]);
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const float (&in)[V]) {
  Packet<T, V> packet;
#pragma unroll
  for (int i = 0; i < V; ++i) packet.value[i] = narrow<T>(in[i]);
  *reinterpret_cast<Packet<T, V>*>(p) = packet;
}

// The residual's pitches are the caller's, so that its pixels need not be aligned to 16 bytes.
template <class T, int V>
__device__ __forceinline__ void add(const T* p, float (&v)[V]) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Packet<T, V>) == 0) {
    float more[V];
    load<T, V>(p, more);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += more[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] += widen(p[i]);
}

__device__ __forceinline__ float activate(float v, Activation activation, float slope) {
  if (activation == Activation::relu) return v < 0.0f ? 0.0f : v;
  if (activation == Activation::leaky_relu) return v > 0.0f ? v : v * slope;
  return v;
}

__device__ __forceinline__ float activation_gradient(float grad, float z, Activation activation, float slope) {
  if (activation == Activation::relu) return z <= 0.0f ? 0.0f : grad;
  if (activation == Activation::leaky_relu) return z > 0.0f ? grad : grad * slope;
  return grad;
}

// Chan's formula: (mean, m2) of `count` numbers takes in those of `more` numbers.
__device__ __forceinline__ void merge(float count, float& mean, float& m2, float more, float other_mean,
                                      float other_m2) {
  const float total = count + more;
  if (total <= 0.0f) return;
  const float share = more / total;
  const float difference = other_mean - mean;
  mean += difference * share;
  m2 += other_m2 + difference * difference * (count * share);
}

// What every kernel is given; one of the two problems is filled.
struct Arguments {
  ForwardProblem forward;
  BackwardProblem backward;
  Shape shape;
  Activation activation;
  float slope;
  int lanes, ranks;  // cluster
  int across;        // plain
  int64_t chunks;
  float* partial;  // [N][chunks][2][C]
  float* totals;   // [N][2][C]
};

// Pixels before picture n.
__device__ __forceinline__ int64_t pixels_before(const Shape& s, int64_t n) { return n * s.h * s.w; }

// One picture's parameters of the channels that a thread works on.
template <int V>
struct Channels {
  float mean[V], scale[V], shift[V];
};

template <int V>
__device__ __forceinline__ Channels<V> channels_of(const Shape& s, const float* mean, const float* rstd,
                                                   const float* weight, const float* bias, int64_t n, int64_t c) {
  Channels<V> p;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    p.mean[i] = mean[n * s.c + c + i];
    p.scale[i] = rstd[n * s.c + c + i] * (weight ? weight[c + i] : 1.0f);
    p.shift[i] = bias ? bias[c + i] : 0.0f;
  }
  return p;
}

// act(norm(v)) + residual at pixel (h, w).
template <class T, int V>
__device__ __forceinline__ void normalise(const Arguments& a, const Channels<V>& p, int64_t n, int64_t h, int64_t w,
                                          int64_t c, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = activate((v[i] - p.mean[i]) * p.scale[i] + p.shift[i], a.activation, a.slope);
  if (a.forward.residual) {
    const Pitch& pitch = a.forward.residual_pitch;
    add<T, V>(static_cast<const T*>(a.forward.residual) + n * pitch.image + h * pitch.row + w * pitch.pixel + c, v);
  }
}

// Writes the result of pixel (h, w) to all places where it stands in the padded picture.
template <class T, int V>
__device__ __forceinline__ void store_reflected(T* y, const Shape& s, int64_t n, int64_t h, int64_t w, int64_t c,
                                                const float (&v)[V]) {
  T* picture = y + n * s.padded_h() * s.padded_w() * s.c + c;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int64_t row = padded_position(h, s.h, s.pad, i);
    if (row < 0) continue;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int64_t column = padded_position(w, s.w, s.pad, k);
      if (column >= 0) store<T, V>(picture + (row * s.padded_w() + column) * s.c, v);
    }
  }
}

// Adds the gradient at the mirror images of pixel (h, w) to that at the pixel itself.
template <class T, int V>
__device__ __forceinline__ void add_mirrored(const T* grad, const Shape& s, int64_t n, int64_t h, int64_t w, int64_t c,
                                             float (&v)[V]) {
  if (s.pad == 0 || !(mirrored(h, s.h, s.pad) || mirrored(w, s.w, s.pad))) return;
  const T* picture = grad + n * s.padded_h() * s.padded_w() * s.c + c;
#pragma unroll
  for (int k = 1; k < 9; ++k) {
    const int64_t row = padded_position(h, s.h, s.pad, k / 3), column = padded_position(w, s.w, s.pad, k % 3);
    if (row >= 0 && column >= 0) add<T, V>(picture + (row * s.padded_w() + column) * s.c, v);
  }
}

// d = act'(z) * gradient, in place, and v = x - mean in place.
template <int V>
__device__ __forceinline__ void pull_back(const Arguments& a, const Channels<V>& p, float (&v)[V], float (&grad)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    v[i] -= p.mean[i];
    grad[i] = activation_gradient(grad[i], v[i] * p.scale[i] + p.shift[i], a.activation, a.slope);
  }
}

// grad_x from d, x - mean and the picture's sums of d and d * (x - mean), in place of d.
template <int V>
__device__ __forceinline__ void gradient_of_x(const Channels<V>& p, const float (&rstd)[V], const float (&sum)[V],
                                              const float (&product)[V], float inverse, const float (&v)[V],
                                              float (&d)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    d[i] = p.scale[i] * (d[i] - sum[i] * inverse - v[i] * (rstd[i] * rstd[i] * product[i] * inverse));
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Sums of R numbers for each of V channels over all threads of the cluster with the same lane, in a fixed order. Each
// call of a kernel has its own `scratch`, [warps + 2][lanes][R * V] floats, so that no block overwrites what another
// one still reads.
template <int R>
__device__ __forceinline__ void cluster_sum(float (&v)[R], int lanes, float* scratch) {
  cg::cluster_group cluster = cg::this_cluster();
  constexpr int warps = cluster_threads / 32;
  const int lane = static_cast<int>(threadIdx.x) % lanes, warp = static_cast<int>(threadIdx.x) / 32;
  const int numbers = lanes * R;
  float* block = scratch + warps * numbers;
  float* result = block + numbers;
  for (int offset = 16; offset >= lanes; offset /= 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
  }
  if (static_cast<int>(threadIdx.x) % 32 < lanes) {
#pragma unroll
    for (int i = 0; i < R; ++i) scratch[warp * numbers + lane * R + i] = v[i];
  }
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < numbers) {
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += scratch[i * numbers + mine];
    block[mine] = sum;
  }
  cluster.sync();
  if (mine < numbers) {
    float sum = 0.0f;
    const int ranks = static_cast<int>(cluster.num_blocks());
    for (int rank = 0; rank < ranks; ++rank) sum += *cluster.map_shared_rank(block + mine, rank);
    result[mine] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < R; ++i) v[i] = result[lane * R + i];
}

// The part of the work that one thread of a cluster kernel does.
template <class T>
struct ClusterThread {
  static constexpr int V = access_bytes / static_cast<int>(sizeof(T));
  int64_t n, channel, begin;
  int count, first, step;

  __device__ explicit ClusterThread(const Arguments& a) {
    const Shape& s = a.shape;
    const int64_t slice = blockIdx.x / a.ranks, slices = s.c / (V * a.lanes), positions = s.h * s.w;
    const int rank = static_cast<int>(blockIdx.x % a.ranks);
    n = slice / slices;
    channel = (slice % slices * a.lanes + threadIdx.x % a.lanes) * V;
    begin = part_begin(rank, a.ranks, positions);
    count = static_cast<int>(part_begin(rank + 1, a.ranks, positions) - begin);
    first = static_cast<int>(threadIdx.x) / a.lanes;
    step = cluster_threads / a.lanes;
  }
};
#endif

template <class T>
__global__ void __launch_bounds__(cluster_threads) forward_cluster(const __grid_constant__ Arguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int V = ClusterThread<T>::V;
  extern __shared__ __align__(16) unsigned char shared[];
  const Shape& s = a.shape;
  const ClusterThread<T> t(a);
  // A thread reads what it has copied itself: no barrier is needed.
  T* held = reinterpret_cast<T*>(shared) + threadIdx.x % a.lanes * V;
  const int64_t most = ceil_div(s.h * s.w, a.ranks);
  float* scratch = reinterpret_cast<float*>(shared + most * a.lanes * access_bytes);
  const T* x = static_cast<const T*>(a.forward.x) + (pixels_before(s, t.n) + t.begin) * s.c + t.channel;
  for (int i = t.first; i < t.count; i += t.step) copy_async(held + int64_t{i} * a.lanes * V, x + i * s.c);
  wait_for_copies();

  const float inverse = 1.0f / static_cast<float>(s.h * s.w);
  float mean[V] = {};
  for (int i = t.first; i < t.count; i += t.step) {
    float v[V];
    load<T, V>(held + int64_t{i} * a.lanes * V, v);
#pragma unroll
    for (int k = 0; k < V; ++k) mean[k] += v[k];
  }
  cluster_sum<V>(mean, a.lanes, scratch);
  float sums[2 * V] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) mean[k] *= inverse;
  for (int i = t.first; i < t.count; i += t.step) {
    float v[V];
    load<T, V>(held + int64_t{i} * a.lanes * V, v);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float d = v[k] - mean[k];
      sums[k] += d;
      sums[V + k] += d * d;
    }
  }
  cluster_sum<2 * V>(sums, a.lanes, scratch + (cluster_threads / 32 + 2) * a.lanes * V);
  Channels<V> p;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const float delta = sums[k] * inverse;
    const float variance = fmaxf(sums[V + k] * inverse - delta * delta, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + static_cast<float>(a.forward.eps));
    p.mean[k] = mean[k] + delta;
    p.scale[k] = rstd * (a.forward.weight ? a.forward.weight[t.channel + k] : 1.0f);
    // What rounding the mean lost comes back through the shift.
    const float lost = (mean[k] - p.mean[k]) + delta;
    p.shift[k] = (a.forward.bias ? a.forward.bias[t.channel + k] : 0.0f) - lost * p.scale[k];
    if (blockIdx.x % a.ranks == 0 && t.first == 0) {
      a.forward.mean[t.n * s.c + t.channel + k] = p.mean[k];
      a.forward.rstd[t.n * s.c + t.channel + k] = rstd;
    }
  }
  for (int i = t.first; i < t.count; i += t.step) {
    float v[V];
    load<T, V>(held + int64_t{i} * a.lanes * V, v);
    const int position = static_cast<int>(t.begin) + i, width = static_cast<int>(s.w);
    const int h = position / width, w = position % width;
    normalise<T, V>(a, p, t.n, h, w, t.channel, v);
    store_reflected<T, V>(static_cast<T*>(a.forward.y), s, t.n, h, w, t.channel, v);
  }
  // Another block may still read this one's sums.
  cg::this_cluster().sync();
#endif
}

template <class T>
__global__ void __launch_bounds__(cluster_threads) backward_cluster(const __grid_constant__ Arguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int V = ClusterThread<T>::V;
  extern __shared__ __align__(16) unsigned char shared[];
  const Shape& s = a.shape;
  const ClusterThread<T> t(a);
  const int64_t most = ceil_div(s.h * s.w, a.ranks);
  T* held_x = reinterpret_cast<T*>(shared) + threadIdx.x % a.lanes * V;
  T* held_grad = held_x + most * a.lanes * V;
  float* scratch = reinterpret_cast<float*>(shared + 2 * most * a.lanes * access_bytes);
  const int width = static_cast<int>(s.w);
  const T* grad = static_cast<const T*>(a.backward.grad_y);
  const T* x = static_cast<const T*>(a.backward.x) + (pixels_before(s, t.n) + t.begin) * s.c + t.channel;
  for (int i = t.first; i < t.count; i += t.step) {
    const int position = static_cast<int>(t.begin) + i, h = position / width, w = position % width;
    copy_async(held_x + int64_t{i} * a.lanes * V, x + i * s.c);
    const T* at = grad + ((t.n * s.padded_h() + h + s.pad) * s.padded_w() + w + s.pad) * s.c + t.channel;
    copy_async(held_grad + int64_t{i} * a.lanes * V, at);
  }
  wait_for_copies();

  const Channels<V> p =
      channels_of<V>(s, a.backward.mean, a.backward.rstd, a.backward.weight, a.backward.bias, t.n, t.channel);
  float sums[2 * V] = {};
  for (int i = t.first; i < t.count; i += t.step) {
    const int position = static_cast<int>(t.begin) + i, h = position / width, w = position % width;
    float v[V], d[V];
    load<T, V>(held_x + int64_t{i} * a.lanes * V, v);
    load<T, V>(held_grad + int64_t{i} * a.lanes * V, d);
    add_mirrored<T, V>(grad, s, t.n, h, w, t.channel, d);
    pull_back(a, p, v, d);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sums[k] += d[k];
      sums[V + k] += d[k] * v[k];
    }
  }
  cluster_sum<2 * V>(sums, a.lanes, scratch);
  float rstd[V], sum[V], product[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    rstd[k] = a.backward.rstd[t.n * s.c + t.channel + k];
    sum[k] = sums[k];
    product[k] = sums[V + k];
    if (blockIdx.x % a.ranks == 0 && t.first == 0) {
      a.totals[t.n * 2 * s.c + t.channel + k] = sum[k];
      a.totals[(t.n * 2 + 1) * s.c + t.channel + k] = rstd[k] * product[k];
    }
  }
  const float inverse = 1.0f / static_cast<float>(s.h * s.w);
  for (int i = t.first; i < t.count; i += t.step) {
    const int position = static_cast<int>(t.begin) + i, h = position / width, w = position % width;
    float v[V], d[V];
    load<T, V>(held_x + int64_t{i} * a.lanes * V, v);
    load<T, V>(held_grad + int64_t{i} * a.lanes * V, d);
    add_mirrored<T, V>(grad, s, t.n, h, w, t.channel, d);
    const int64_t offset = (pixels_before(s, t.n) + position) * s.c + t.channel;
    if (a.backward.grad_residual) store<T, V>(static_cast<T*>(a.backward.grad_residual) + offset, d);
    pull_back(a, p, v, d);
    gradient_of_x(p, rstd, sum, product, inverse, v, d);
    store<T, V>(static_cast<T*>(a.backward.grad_x) + offset, d);
  }
  cg::this_cluster().sync();
#endif
}

// The part of the work that one thread of a plain kernel does.
template <int V>
struct PlainThread {
  int64_t n, channel, begin, end, step;
  bool idle;
  int row, rows;

  __device__ explicit PlainThread(const Arguments& a) {
    const int column = static_cast<int>(threadIdx.x) % a.across;
    row = static_cast<int>(threadIdx.x) / a.across;
    rows = plain_threads / a.across;
    n = blockIdx.z;
    channel = (static_cast<int64_t>(blockIdx.y) * a.across + column) * V;
    idle = channel >= a.shape.c;
    begin = part_begin(blockIdx.x, a.chunks, a.shape.h * a.shape.w) + row;
    end = part_begin(blockIdx.x + 1, a.chunks, a.shape.h * a.shape.w);
    step = rows;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(plain_threads) partial_statistics(const __grid_constant__ Arguments a) {
  __shared__ float shared_mean[plain_threads * V], shared_m2[plain_threads * V], shared_count[plain_threads];
  const Shape& s = a.shape;
  const PlainThread<V> t(a);
  float mean[V] = {}, m2[V] = {}, count = 0.0f;
  if (!t.idle) {
    const T* x = static_cast<const T*>(a.forward.x) + pixels_before(s, t.n) * s.c + t.channel;
    int64_t i = t.begin;
    // Four pixels at a time: their own mean and deviations first, then one merge.
    for (; i + 3 * t.step < t.end; i += 4 * t.step) {
      float v[4][V];
#pragma unroll
      for (int k = 0; k < 4; ++k) load<T, V>(x + (i + k * t.step) * s.c, v[k]);
#pragma unroll
      for (int c = 0; c < V; ++c) {
        const float centre = 0.25f * ((v[0][c] + v[1][c]) + (v[2][c] + v[3][c]));
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) squares += (v[k][c] - centre) * (v[k][c] - centre);
        merge(count, mean[c], m2[c], 4.0f, centre, squares);
      }
      count += 4.0f;
    }
    for (; i < t.end; i += t.step) {
      float v[V];
      load<T, V>(x + i * s.c, v);
#pragma unroll
      for (int c = 0; c < V; ++c) merge(count, mean[c], m2[c], 1.0f, v[c], 0.0f);
      count += 1.0f;
    }
  }
  const int me = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int c = 0; c < V; ++c) {
    shared_mean[c * plain_threads + me] = mean[c];
    shared_m2[c * plain_threads + me] = m2[c];
  }
  shared_count[me] = count;
  for (int half = t.rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t.row < half) {
      const int other = me + half * a.across;
      const float more = shared_count[other];
#pragma unroll
      for (int c = 0; c < V; ++c) {
        merge(count, mean[c], m2[c], more, shared_mean[c * plain_threads + other], shared_m2[c * plain_threads + other]);
        shared_mean[c * plain_threads + me] = mean[c];
        shared_m2[c * plain_threads + me] = m2[c];
      }
      count += more;
      shared_count[me] = count;
    }
  }
  if (t.row == 0 && !t.idle) {
    float* out = a.partial + (t.n * a.chunks + blockIdx.x) * 2 * s.c + t.channel;
#pragma unroll
    for (int c = 0; c < V; ++c) {
      out[c] = mean[c];
      out[s.c + c] = m2[c];
    }
  }
}

__global__ void __launch_bounds__(plain_threads) finish_statistics(const __grid_constant__ Arguments a) {
  const Shape& s = a.shape;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * plain_threads + threadIdx.x;
  if (i >= s.n * s.c) return;
  const int64_t n = i / s.c, c = i % s.c, positions = s.h * s.w;
  double mean = 0, m2 = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const double before = static_cast<double>(part_begin(chunk, a.chunks, positions));
    const double total = static_cast<double>(part_begin(chunk + 1, a.chunks, positions));
    const float* in = a.partial + (n * a.chunks + chunk) * 2 * s.c + c;
    const double share = (total - before) / total, difference = static_cast<double>(in[0]) - mean;
    mean += difference * share;
    m2 += static_cast<double>(in[s.c]) + difference * difference * (before * share);
  }
  a.forward.mean[i] = static_cast<float>(mean);
  a.forward.rstd[i] = static_cast<float>(1.0 / sqrt(m2 / static_cast<double>(positions) + a.forward.eps));
}

template <class T, int V>
__global__ void __launch_bounds__(plain_threads) normalise_all(const __grid_constant__ Arguments a) {
  const Shape& s = a.shape;
  const PlainThread<V> t(a);
  if (t.idle) return;
  const ForwardProblem& f = a.forward;
  const Channels<V> p = channels_of<V>(s, f.mean, f.rstd, f.weight, f.bias, t.n, t.channel);
  const T* x = static_cast<const T*>(f.x) + pixels_before(s, t.n) * s.c + t.channel;
  const unsigned width = static_cast<unsigned>(s.w);
  for (int64_t i = t.begin; i < t.end; i += t.step) {
    const unsigned h = static_cast<unsigned>(i) / width, w = static_cast<unsigned>(i) % width;
    float v[V];
    load<T, V>(x + i * s.c, v);
    normalise<T, V>(a, p, t.n, h, w, t.channel, v);
    store_reflected<T, V>(static_cast<T*>(f.y), s, t.n, h, w, t.channel, v);
  }
}

// The folded gradient of pixel (h, w) and x there.
template <class T, int V>
__device__ __forceinline__ void load_both(const BackwardProblem& b, const Shape& s, int64_t n, int64_t h, int64_t w,
                                          int64_t c, float (&v)[V], float (&d)[V]) {
  const T* grad = static_cast<const T*>(b.grad_y);
  load<T, V>(static_cast<const T*>(b.x) + ((n * s.h + h) * s.w + w) * s.c + c, v);
  load<T, V>(grad + ((n * s.padded_h() + h + s.pad) * s.padded_w() + w + s.pad) * s.c + c, d);
  add_mirrored<T, V>(grad, s, n, h, w, c, d);
}

template <class T, int V>
__global__ void __launch_bounds__(plain_threads) partial_gradient_sums(const __grid_constant__ Arguments a) {
  __shared__ float shared[2 * V * plain_threads];
  const Shape& s = a.shape;
  const PlainThread<V> t(a);
  const BackwardProblem& b = a.backward;
  float sum[V] = {}, product[V] = {};
  if (!t.idle) {
    const Channels<V> p = channels_of<V>(s, b.mean, b.rstd, b.weight, b.bias, t.n, t.channel);
    const unsigned width = static_cast<unsigned>(s.w);
    for (int64_t i = t.begin; i < t.end; i += t.step) {
      float v[V], d[V];
      load_both<T, V>(b, s, t.n, static_cast<unsigned>(i) / width, static_cast<unsigned>(i) % width, t.channel, v, d);
      pull_back(a, p, v, d);
#pragma unroll
      for (int c = 0; c < V; ++c) {
        sum[c] += d[c];
        product[c] += d[c] * v[c];
      }
    }
  }
  const int me = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int c = 0; c < V; ++c) {
    shared[c * plain_threads + me] = sum[c];
    shared[(V + c) * plain_threads + me] = product[c];
  }
  for (int half = t.rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t.row < half) {
#pragma unroll
      for (int c = 0; c < 2 * V; ++c) {
        shared[c * plain_threads + me] += shared[c * plain_threads + me + half * a.across];
      }
    }
  }
  if (t.row == 0 && !t.idle) {
    float* out = a.partial + (t.n * a.chunks + blockIdx.x) * 2 * s.c + t.channel;
#pragma unroll
    for (int c = 0; c < V; ++c) {
      out[c] = shared[c * plain_threads + me];
      out[s.c + c] = shared[(V + c) * plain_threads + me];
    }
  }
}

// Sums of d and of d * normalised x for each picture.
__global__ void __launch_bounds__(plain_threads) finish_gradient_sums(const __grid_constant__ Arguments a) {
  const Shape& s = a.shape;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * plain_threads + threadIdx.x;
  if (i >= s.n * s.c) return;
  const int64_t n = i / s.c, c = i % s.c;
  double sum = 0, product = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const float* in = a.partial + (n * a.chunks + chunk) * 2 * s.c + c;
    sum += static_cast<double>(in[0]);
    product += static_cast<double>(in[s.c]);
  }
  a.totals[n * 2 * s.c + c] = static_cast<float>(sum);
  a.totals[(n * 2 + 1) * s.c + c] = static_cast<float>(product * static_cast<double>(a.backward.rstd[i]));
}

template <class T, int V>
__global__ void __launch_bounds__(plain_threads) gradient_all(const __grid_constant__ Arguments a) {
  const Shape& s = a.shape;
  const PlainThread<V> t(a);
  if (t.idle) return;
  const BackwardProblem& b = a.backward;
  const Channels<V> p = channels_of<V>(s, b.mean, b.rstd, b.weight, b.bias, t.n, t.channel);
  float rstd[V], sum[V], product[V];
#pragma unroll
  for (int c = 0; c < V; ++c) {
    rstd[c] = b.rstd[t.n * s.c + t.channel + c];
    sum[c] = a.totals[t.n * 2 * s.c + t.channel + c];
    product[c] = a.totals[(t.n * 2 + 1) * s.c + t.channel + c] / rstd[c];
  }
  const float inverse = 1.0f / static_cast<float>(s.h * s.w);
  const unsigned width = static_cast<unsigned>(s.w);
  for (int64_t i = t.begin; i < t.end; i += t.step) {
    float v[V], d[V];
    load_both<T, V>(b, s, t.n, static_cast<unsigned>(i) / width, static_cast<unsigned>(i) % width, t.channel, v, d);
    const int64_t offset = (pixels_before(s, t.n) + i) * s.c + t.channel;
    if (b.grad_residual) store<T, V>(static_cast<T*>(b.grad_residual) + offset, d);
    pull_back(a, p, v, d);
    gradient_of_x(p, rstd, sum, product, inverse, v, d);
    store<T, V>(static_cast<T*>(b.grad_x) + offset, d);
  }
}

// Sums over the pictures, in order.
__global__ void __launch_bounds__(plain_threads) sum_pictures(const __grid_constant__ Arguments a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * plain_threads + threadIdx.x, channels = a.shape.c;
  if (c >= channels) return;
  double sum = 0, product = 0;
  for (int64_t n = 0; n < a.shape.n; ++n) {
    sum += static_cast<double>(a.totals[n * 2 * channels + c]);
    product += static_cast<double>(a.totals[(n * 2 + 1) * channels + c]);
  }
  if (a.backward.grad_bias) a.backward.grad_bias[c] = static_cast<float>(sum);
  if (a.backward.grad_weight) a.backward.grad_weight[c] = static_cast<float>(product);
}

int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Whether clusters of `plan` can run on this device, asked once per kernel and size.
bool can_launch(const void* kernel, const cudaLaunchConfig_t& config, int ranks, int64_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, std::pair<int, int64_t>>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0;
  cudaGetDevice(&device);
  const auto key = std::make_pair(kernel, std::make_pair(device * 64 + ranks, bytes));
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  bool possible = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       current_cuda_device().shared_bytes) == cudaSuccess;
  possible = possible &&
             cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  int clusters = 0;
  possible = possible && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
  cudaGetLastError();
  known[key] = possible;
  return possible;
}

// Launches a cluster kernel; false if it cannot run here.
bool launch_cluster(void (*kernel)(Arguments), Arguments a, int tensors, DType dtype, cudaStream_t stream) {
  const ClusterPlan plan = plan_cluster(a.shape, element_bytes(dtype), tensors, current_cuda_device());
  const int64_t blocks = a.shape.n * plan.clusters * plan.ranks;
  if (plan.ranks == 0 || a.shape.h * a.shape.w > INT32_MAX || blocks > INT32_MAX) return false;
  a.lanes = plan.lanes;
  a.ranks = plan.ranks;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.ranks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(cluster_threads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (!can_launch(reinterpret_cast<const void*>(kernel), config, plan.ranks, plan.shared_bytes)) return false;
  if (cudaLaunchKernelEx(&config, kernel, a) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>(ceil_div(count, plain_threads)); }

dim3 plain_grid(const PlainPlan& plan, const Shape& s) {
  return dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.tiles), static_cast<unsigned>(s.n));
}

template <class T, int V>
void forward_plain(const Arguments& a, dim3 grid, cudaStream_t stream) {
  partial_statistics<T, V><<<grid, plain_threads, 0, stream>>>(a);
  finish_statistics<<<blocks_for(a.shape.n * a.shape.c), plain_threads, 0, stream>>>(a);
  normalise_all<T, V><<<grid, plain_threads, 0, stream>>>(a);
}

template <class T, int V>
void backward_plain(const Arguments& a, dim3 grid, cudaStream_t stream) {
  partial_gradient_sums<T, V><<<grid, plain_threads, 0, stream>>>(a);
  finish_gradient_sums<<<blocks_for(a.shape.n * a.shape.c), plain_threads, 0, stream>>>(a);
  gradient_all<T, V><<<grid, plain_threads, 0, stream>>>(a);
}

void use(Arguments& a, const PlainPlan& plan, float* workspace) {
  a.across = plan.across;
  a.chunks = plan.chunks;
  a.partial = workspace;
  a.totals = workspace + a.shape.n * plan.chunks * 2 * a.shape.c;
}

template <class Problem>
Arguments arguments_for(const Problem& problem) {
  Arguments a{};
  a.shape = problem.shape;
  a.activation = problem.activation;
  a.slope = problem.slope;
  return a;
}

const char* refusal(const Shape& s, CudaPath path, bool clustered) {
  if (path == CudaPath::cluster && !clustered) return "this shape has no cluster kernel on this device";
  if (s.n > 65535) return "more than 65535 pictures";
  if (s.h * s.w > INT32_MAX) return "more than 2**31 - 1 positions";
  return nullptr;
}

template <class T>
const char* forward_as(Arguments a, CudaPath path, float* workspace, cudaStream_t stream) {
  constexpr int V = access_bytes / static_cast<int>(sizeof(T));
  // Tensors made here are aligned; those of the caller may be views.
  const bool aligned = is_aligned(a.forward.x);
  const PlainPlan plan = plan_plain(a.shape, sizeof(T), aligned, current_cuda_device());
  use(a, plan, workspace);
  const bool clustered =
      path != CudaPath::plain && aligned && launch_cluster(forward_cluster<T>, a, 1, a.forward.dtype, stream);
  if (const char* why = refusal(a.shape, path, clustered)) return why;
  if (!clustered) {
    const dim3 grid = plain_grid(plan, a.shape);
    plan.vector == 1 ? forward_plain<T, 1>(a, grid, stream) : forward_plain<T, V>(a, grid, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
const char* backward_as(Arguments a, CudaPath path, float* workspace, cudaStream_t stream) {
  constexpr int V = access_bytes / static_cast<int>(sizeof(T));
  // Tensors made here are aligned; those of the caller may be views.
  const bool aligned = is_aligned(a.backward.x) && is_aligned(a.backward.grad_y);
  const PlainPlan plan = plan_plain(a.shape, sizeof(T), aligned, current_cuda_device());
  use(a, plan, workspace);
  const bool clustered =
      path != CudaPath::plain && aligned && launch_cluster(backward_cluster<T>, a, 2, a.backward.dtype, stream);
  if (const char* why = refusal(a.shape, path, clustered)) return why;
  if (!clustered) {
    const dim3 grid = plain_grid(plan, a.shape);
    plan.vector == 1 ? backward_plain<T, 1>(a, grid, stream) : backward_plain<T, V>(a, grid, stream);
  }
  if (a.backward.grad_weight || a.backward.grad_bias) {
    sum_pictures<<<blocks_for(a.shape.c), plain_threads, 0, stream>>>(a);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const CudaDevice& current_cuda_device() {
  static std::mutex mutex;
  static std::map<int, CudaDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0;
  cudaGetDevice(&device);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int multiprocessors = 0, shared = 0, major = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return known[device] = {multiprocessors, shared, major >= 9};
}

const char* instance_norm_forward_cuda(const ForwardProblem& problem, CudaPath path, float* workspace, void* stream) {
  Arguments a = arguments_for(problem);
  a.forward = problem;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (problem.dtype == DType::float32) return forward_as<float>(a, path, workspace, on);
  if (problem.dtype == DType::bfloat16) return forward_as<__nv_bfloat16>(a, path, workspace, on);
  return forward_as<__half>(a, path, workspace, on);
}

const char* instance_norm_backward_cuda(const BackwardProblem& problem, CudaPath path, float* workspace, void* stream) {
  Arguments a = arguments_for(problem);
  a.backward = problem;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (problem.dtype == DType::float32) return backward_as<float>(a, path, workspace, on);
  if (problem.dtype == DType::bfloat16) return backward_as<__nv_bfloat16>(a, path, workspace, on);
  return backward_as<__half>(a, path, workspace, on);
}

}  // namespace cyclegan
