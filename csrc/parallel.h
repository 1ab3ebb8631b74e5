// torch's threads, as the CPU kernels, which know nothing of torch, ask for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace cyclegan {

inline void torch_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                           void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}

}  // namespace cyclegan
