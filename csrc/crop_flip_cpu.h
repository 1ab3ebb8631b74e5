// A window of each picture, mirrored left-right where asked, brought from bytes to [-1, 1].
#pragma once

#include <cstdint>

#include "instance_norm_cpu.h"

namespace cyclegan {

struct CropProblem {
  const uint8_t* store;  // [count, height, width, channels] dense
  int64_t height, width, channels;
  int64_t n, h, w;       // windows, and their size
  const int64_t* index;  // [n]: picture, and top left corner
  const int64_t* y;
  const int64_t* x;
  const bool* flip;
  float* out;  // [n, h, w, channels] dense
};

void crop_flip(const CropProblem& problem, ParallelFor parallel_for);

}  // namespace cyclegan
