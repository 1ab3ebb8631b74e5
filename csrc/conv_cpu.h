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

}  // namespace cyclegan
