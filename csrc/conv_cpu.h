// Convolutions in float32 on the CPU, channels-last in and out.
#pragma once

#include "conv_kernels.h"
#include "instance_norm_cpu.h"

namespace cyclegan {

// y[n, i, j, k] = finish(bias[k] + sum over c, r, s of filter[k, c, r, s] * x[n, i + r, j + s, c]) on the bordered x, by
// Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308). y [N, H + 2 border - 2, W + 2 border - 2, K].
struct Conv3x3 {
  Pictures x;  // `zeros` is filled in
  Filter filter;
  const float* bias;  // [K] or null
  Finish finish;
  float* y;
};

void conv3x3(const Conv3x3& problem, ParallelFor parallel_for);

// The gradient of x of the same convolution, [N, H, W, C], from grad_y [N, H + 2 border - 2, W + 2 border - 2, K].
// For other sizes than 3 read size - 1 for 2.
struct InputGradient {
  int64_t n, h, w, border;
  bool reflect;
  Filter filter;
  const float* grad_y;
  float* grad_x;
};

void conv3x3_input_gradient(const InputGradient& problem, ParallelFor parallel_for);

// The same convolution with any square kernel and at most `thin_outputs` outputs: products with all taps, then sums of
// those that belong together.
constexpr int64_t thin_outputs = 4;

struct ThinConv {
  Pictures x;
  Filter filter;
  int64_t size;
  const float* bias;  // [K] or null
  Finish finish;
  float* y;  // [N, H + 2 border - size + 1, W + 2 border - size + 1, K]
};

void thin_conv(const ThinConv& problem, ParallelFor parallel_for);

// The gradient of x of a convolution of a reflected x with at most `thin_outputs` channels.
void thin_input_gradient(const InputGradient& problem, int64_t size, ParallelFor parallel_for);

// The gradient of the filter of a 3x3, stored as `filter` says, whose data is not read.
void conv3x3_weight_gradient(const Pictures& x, const float* grad_y, const Filter& filter, float* grad,
                             ParallelFor parallel_for);

// The gradient of the weight of any convolution with square kernels:
//   grad[k, c, r, s] = sum over n, i, j of grad_y[n, i, j, k] * x[n, stride * i + r, stride * j + s, c]
// over all pixels of the bordered grad_y, and the bordered x.
struct WeightGradient {
  Pictures x, grad_y;
  int64_t size, stride;
  Filter filter;  // where the result goes
  float* grad;
};

void conv_weight_gradient(const WeightGradient& problem, ParallelFor parallel_for);

}  // namespace cyclegan
