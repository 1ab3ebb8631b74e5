// Drives the kernels of one instruction set: cuts the work into fixed parts, runs them in parallel, merges the partial
// sums in a fixed order. The parts depend on the shape alone, so the bits do not depend on the number of threads.

#include "instance_norm_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "geometry.h"
#include "instance_norm_kernels.h"

#if defined(__x86_64__)
#define CYCLEGAN_X86 1
#endif

namespace cyclegan {
namespace {

// Rows are cut into chunks of about this many bytes of x: small enough to share among many threads, large enough that
// merging their statistics costs nothing beside computing them.
constexpr int64_t chunk_bytes = 128 * 1024;
// Pictures whose x together is below this are handled at once, so that the second pass finds x in the cache.
constexpr int64_t together_bytes = 8 * 1024 * 1024;
// Elements below which another thread does not pay.
constexpr int64_t least_elements = 16 * 1024;

bool supports(Isa isa) {
#if defined(CYCLEGAN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(best_isa())};
  return isa;
}

const Kernels& kernels_for(DType dtype) {
  const Kernels* table = kernels_portable;
#if defined(CYCLEGAN_X86)
  switch (current_isa()) {
    case Isa::portable:
      break;
    case Isa::avx2:
      table = kernels_avx2;
      break;
    case Isa::avx512:
      table = kernels_avx512;
      break;
    case Isa::avx512_bf16:
      table = kernels_avx512_bf16;
      break;
  }
#endif
  return table[static_cast<int>(dtype)];
}

// Calls body(begin, end) in parallel.
template <class Body>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How the rows of a problem are cut.
struct Plan {
  const Kernels& kernels;
  Shape shape;
  int64_t lanes, rows, chunks, together, grain;

  Plan(const Shape& s, DType dtype) : kernels(kernels_for(dtype)), shape(s) {
    const int64_t row_bytes = s.w * s.c * (dtype == DType::float32 ? 4 : 2);
    lanes = ceil_div(s.c, kernels.group) * kernels.group;
    rows = std::clamp<int64_t>(chunk_bytes / row_bytes, 1, s.h);
    chunks = ceil_div(s.h, rows);
    together = std::clamp<int64_t>(together_bytes / (row_bytes * s.h), 1, std::max<int64_t>(1, s.n));
    grain = std::max<int64_t>(1, least_elements / (rows * s.w * s.c));
  }

  // Where channel c stands in lane order.
  int64_t lane(int64_t c) const {
    if (!kernels.interleaved) return c;
    const int64_t within = c % kernels.group;
    return c - within + (within % 2) * (kernels.group / 2) + within / 2;
  }

  int64_t first_row(int64_t chunk) const { return chunk * rows; }
  int64_t last_row(int64_t chunk) const { return std::min(shape.h, (chunk + 1) * rows); }
};

// The bits of a NaN parameter may be anything; those of this one survive rounding to bfloat16 (vector.h).
float plain_nan(double value) {
  const float result = static_cast<float>(value);
  return result == result ? result : std::numeric_limits<float>::quiet_NaN();
}

// Parameters of a group of pictures, [picture][kind][lanes].
class Parameters {
 public:
  Parameters(int64_t pictures, int64_t lanes)
      : lanes_(lanes), values_(static_cast<size_t>(pictures * 5 * lanes), 0.0f) {}

  float* at(int64_t picture, int64_t kind) { return values_.data() + (picture * 5 + kind) * lanes_; }

  ChannelParameters of(int64_t picture) {
    return {at(picture, 0), at(picture, 1), at(picture, 2), at(picture, 3), at(picture, 4)};
  }

 private:
  int64_t lanes_;
  std::vector<float> values_;
};

// Chan's formula over the chunks of one picture, in order. `partial` is [chunks][3][lanes].
void merge_statistics(const Plan& plan, const float* partial, double* mean, double* m2) {
  const int64_t lanes = plan.lanes;
  double count = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk, partial += 3 * lanes) {
    const double more =
        static_cast<double>(plan.last_row(chunk) - plan.first_row(chunk)) * static_cast<double>(plan.shape.w);
    const double share = more / (count + more), weight = count * share;
    for (int64_t i = 0; i < lanes; ++i) {
      const double other = static_cast<double>(partial[i]) + static_cast<double>(partial[lanes + i]);
      const double difference = other - mean[i];
      mean[i] += difference * share;
      m2[i] += static_cast<double>(partial[2 * lanes + i]) + difference * difference * weight;
    }
    count += more;
  }
}

void finish_statistics(const ForwardProblem& problem, const Plan& plan, int64_t n, const float* partial, int64_t slot,
                       Parameters& parameters) {
  const int64_t lanes = plan.lanes;
  std::vector<double> sums(static_cast<size_t>(2 * lanes), 0.0);
  merge_statistics(plan, partial, sums.data(), sums.data() + lanes);
  const double positions = static_cast<double>(plan.shape.h) * static_cast<double>(plan.shape.w);
  for (int64_t c = 0; c < plan.shape.c; ++c) {
    const int64_t lane = plan.lane(c);
    const double mean = sums[static_cast<size_t>(lane)];
    const double rstd = 1.0 / std::sqrt(sums[static_cast<size_t>(lanes + lane)] / positions + problem.eps);
    const float rounded = static_cast<float>(mean);
    problem.mean[n * plan.shape.c + c] = rounded;
    problem.rstd[n * plan.shape.c + c] = static_cast<float>(rstd);
    const double scale = rstd * (problem.weight ? static_cast<double>(problem.weight[c]) : 1.0);
    const double bias = problem.bias ? static_cast<double>(problem.bias[c]) : 0.0;
    parameters.at(slot, 0)[lane] = plain_nan(rounded);
    parameters.at(slot, 1)[lane] = plain_nan(scale);
    // What rounding the mean to float32 lost comes back through the shift.
    parameters.at(slot, 2)[lane] = plain_nan(bias + (static_cast<double>(rounded) - mean) * scale);
  }
}

void prepare_gradient(const BackwardProblem& problem, const Plan& plan, int64_t n, int64_t slot,
                      Parameters& parameters) {
  for (int64_t c = 0; c < plan.shape.c; ++c) {
    const int64_t lane = plan.lane(c);
    const double rstd = static_cast<double>(problem.rstd[n * plan.shape.c + c]);
    parameters.at(slot, 0)[lane] = plain_nan(problem.mean[n * plan.shape.c + c]);
    parameters.at(slot, 1)[lane] = plain_nan(rstd * (problem.weight ? static_cast<double>(problem.weight[c]) : 1.0));
    parameters.at(slot, 2)[lane] = problem.bias ? plain_nan(problem.bias[c]) : 0.0f;
  }
}

// Sums the chunks of picture n, derives the last parameters of its gradient, and leaves its sums of d and of
// d * normalised x in totals[0 .. c) and totals[c .. 2 c).
void finish_gradient(const BackwardProblem& problem, const Plan& plan, int64_t n, const float* partial, int64_t slot,
                     Parameters& parameters, double* totals) {
  const int64_t lanes = plan.lanes, channels = plan.shape.c;
  std::vector<double> sums(static_cast<size_t>(2 * lanes), 0.0);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk, partial += 2 * lanes) {
    for (int64_t i = 0; i < 2 * lanes; ++i) sums[static_cast<size_t>(i)] += static_cast<double>(partial[i]);
  }
  const double positions = static_cast<double>(plan.shape.h) * static_cast<double>(plan.shape.w);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t lane = plan.lane(c);
    const double rstd = static_cast<double>(problem.rstd[n * channels + c]);
    const double scale = rstd * (problem.weight ? static_cast<double>(problem.weight[c]) : 1.0);
    const double sum = sums[static_cast<size_t>(lane)], product = rstd * sums[static_cast<size_t>(lanes + lane)];
    parameters.at(slot, 3)[lane] = plain_nan(-scale * sum / positions);
    parameters.at(slot, 4)[lane] = plain_nan(-scale * rstd * product / positions);
    totals[c] = sum;
    totals[channels + c] = product;
  }
}

}  // namespace

Isa best_isa() {
  for (const Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
    if (supports(isa)) return isa;
  }
  return Isa::portable;
}

Isa current_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

bool set_isa(Isa isa) {
  if (!supports(isa)) return false;
  chosen().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

void instance_norm_forward(const ForwardProblem& problem, ParallelFor parallel_for) {
  const Plan plan(problem.shape, problem.dtype);
  const Kernels& kernels = plan.kernels;
  RowTask task{};
  task.shape = problem.shape;
  task.activation = problem.activation;
  task.slope = problem.slope;
  task.lanes = plan.lanes;
  task.x = problem.x;
  task.residual = problem.residual;
  task.residual_pitch = problem.residual_pitch;
  task.y = problem.y;
  const int64_t chunks = plan.chunks, lanes = plan.lanes;
  Parameters parameters(plan.together, lanes);
  std::vector<float> partial(static_cast<size_t>(plan.together * chunks * 3 * lanes));
  for (int64_t start = 0; start < problem.shape.n; start += plan.together) {
    const int64_t pictures = std::min(plan.together, problem.shape.n - start);
    parallel(parallel_for, pictures * chunks, plan.grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* out = partial.data() + i * 3 * lanes;
        kernels.statistics(task, start + i / chunks, plan.first_row(i % chunks), plan.last_row(i % chunks), out,
                           out + lanes, out + 2 * lanes);
      }
    });
    parallel(parallel_for, pictures, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        finish_statistics(problem, plan, start + i, partial.data() + i * chunks * 3 * lanes, i, parameters);
      }
    });
    parallel(parallel_for, pictures * chunks, plan.grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        kernels.forward_rows(task, parameters.of(i / chunks), start + i / chunks, plan.first_row(i % chunks),
                             plan.last_row(i % chunks));
      }
    });
  }
}

void instance_norm_backward(const BackwardProblem& problem, ParallelFor parallel_for) {
  const Plan plan(problem.shape, problem.dtype);
  const Kernels& kernels = plan.kernels;
  RowTask task{};
  task.shape = problem.shape;
  task.activation = problem.activation;
  task.slope = problem.slope;
  task.lanes = plan.lanes;
  task.x = problem.x;
  task.grad_y = problem.grad_y;
  task.grad_x = problem.grad_x;
  task.grad_residual = problem.grad_residual;
  const int64_t chunks = plan.chunks, lanes = plan.lanes, channels = problem.shape.c;
  Parameters parameters(plan.together, lanes);
  std::vector<float> partial(static_cast<size_t>(plan.together * chunks * 2 * lanes));
  std::vector<double> totals(static_cast<size_t>(problem.shape.n * 2 * channels));
  for (int64_t start = 0; start < problem.shape.n; start += plan.together) {
    const int64_t pictures = std::min(plan.together, problem.shape.n - start);
    for (int64_t i = 0; i < pictures; ++i) prepare_gradient(problem, plan, start + i, i, parameters);
    parallel(parallel_for, pictures * chunks, plan.grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(fold_pixels * lanes));
      for (int64_t i = begin; i < end; ++i) {
        float* out = partial.data() + i * 2 * lanes;
        kernels.gradient_sums(task, parameters.of(i / chunks), start + i / chunks, plan.first_row(i % chunks),
                              plan.last_row(i % chunks), scratch.data(), out, out + lanes);
      }
    });
    parallel(parallel_for, pictures, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        finish_gradient(problem, plan, start + i, partial.data() + i * chunks * 2 * lanes, i, parameters,
                        totals.data() + (start + i) * 2 * channels);
      }
    });
    parallel(parallel_for, pictures * chunks, plan.grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(fold_pixels * lanes));
      for (int64_t i = end - 1; i >= begin; --i) {
        kernels.gradient_rows(task, parameters.of(i / chunks), start + i / chunks, plan.first_row(i % chunks),
                              plan.last_row(i % chunks), scratch.data());
      }
    });
  }
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t n = 0; n < problem.shape.n; ++n) {
      sum += totals[static_cast<size_t>(n * 2 * channels + c)];
      product += totals[static_cast<size_t>(n * 2 * channels + channels + c)];
    }
    if (problem.grad_bias) problem.grad_bias[c] = static_cast<float>(sum);
    if (problem.grad_weight) problem.grad_weight[c] = static_cast<float>(product);
  }
}

}  // namespace cyclegan
