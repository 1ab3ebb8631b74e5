// What the kernels compiled for one instruction set offer to the driver in instance_norm_cpu.cpp.
#pragma once

#include "instance_norm_cpu.h"

namespace cyclegan {

// Per-channel numbers of one picture are kept in *lane order*, padded to a multiple of `group` channels: the order in
// which a vector of the instruction set holds them. See `lane_of`.
struct RowTask {
  Shape shape;
  Activation activation;
  float slope;
  int64_t lanes;  // C rounded up to a multiple of `group`
  const void* x;
  const void* residual;
  Pitch residual_pitch;
  void* y;
  const void* grad_y;
  void* grad_x;
  void* grad_residual;
};

// y = act((x - mean) * scale + shift). The gradient is grad_x = scale * d + constant + slope * (x - mean).
struct ChannelParameters {
  const float* mean;
  const float* scale;
  const float* shift;
  const float* constant;
  const float* slope;
};

struct Kernels {
  int64_t group;     // channels handled at once
  bool interleaved;  // a group's even channels come first, then its odd ones

  // Statistics of rows [first, last) of picture n: mean = origin + offset, m2 = sum of squared deviations. [lanes] each.
  void (*statistics)(const RowTask&, int64_t n, int64_t first, int64_t last, float* origin, float* offset, float* m2);
  // Writes y for rows [first, last) of x, padding included.
  void (*forward_rows)(const RowTask&, const ChannelParameters&, int64_t n, int64_t first, int64_t last);
  // Sums of d and of d * (x - mean) over rows [first, last). `scratch` holds fold_pixels * lanes floats.
  void (*gradient_sums)(const RowTask&, const ChannelParameters&, int64_t n, int64_t first, int64_t last,
                        float* scratch, float* sum, float* sum_x);
  // Writes grad_x, and grad_residual if there is one, for rows [first, last).
  void (*gradient_rows)(const RowTask&, const ChannelParameters&, int64_t n, int64_t first, int64_t last,
                        float* scratch);
};

// Pixels whose folded gradient is kept in float32 at a time.
constexpr int64_t fold_pixels = 32;

// Kernels of one instruction set, by DType.
extern const Kernels* const kernels_portable;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx512_bf16;

}  // namespace cyclegan
