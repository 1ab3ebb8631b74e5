// Instance normalisation, activation, residual and reflection padding in one operation on the CPU.
//
//   y = reflect_pad(act((x - mean) * rstd * weight + bias) + residual, pad)
//
// x [N, H, W, C] dense, float or bfloat16; y [N, H + 2 pad, W + 2 pad, C] dense; statistics over H x W, in float32.
// Nothing in this header or behind it knows PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cyclegan {

// float16 on CUDA only.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Activation : int { none = 0, relu = 1, leaky_relu = 2 };

// Instruction sets in rising order: each one includes those before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

struct Shape {
  int64_t n, h, w, c, pad;
  constexpr int64_t padded_h() const { return h + 2 * pad; }
  constexpr int64_t padded_w() const { return w + 2 * pad; }
};

// Strides of the residual in elements; its channels are adjacent.
struct Pitch {
  int64_t image, row, pixel;
};

struct ForwardProblem {
  Shape shape;
  DType dtype;
  Activation activation;
  float slope;
  double eps;
  const void* x;
  const void* residual;  // or null
  Pitch residual_pitch;
  const float* weight;  // [C] or null
  const float* bias;    // [C] or null
  void* y;
  float* mean;  // [N, C]
  float* rstd;  // [N, C]
};

struct BackwardProblem {
  Shape shape;
  DType dtype;
  Activation activation;
  float slope;
  const void* grad_y;  // like y
  const void* x;
  const float* mean;    // [N, C]
  const float* rstd;    // [N, C]
  const float* weight;  // [C] or null
  const float* bias;    // [C] or null
  void* grad_x;         // like x
  void* grad_residual;  // like x, or null
  float* grad_weight;   // [C] or null
  float* grad_bias;     // [C] or null
};

// Runs body(begin, end, context) over parts of [begin, end), in parallel where `grain` allows it. The results do not
// depend on how it cuts.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);

void instance_norm_forward(const ForwardProblem& problem, ParallelFor parallel_for);
void instance_norm_backward(const BackwardProblem& problem, ParallelFor parallel_for);

// The best instruction set of this machine among those compiled in, and the one in use.
Isa best_isa();
Isa current_isa();
// Chooses the instruction set in use; returns false, and changes nothing, if this machine does not have it.
bool set_isa(Isa isa);

}  // namespace cyclegan
