// Index arithmetic of reflection padding and of cutting work into slices, shared by the CPU and the CUDA kernels, so
// that the CPU tests exercise what the GPU runs.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define CYCLEGAN_INDEX static __host__ __device__ __forceinline__
#else
// `static`: a weak copy compiled for a newer instruction set must not be the one that an older machine runs.
#define CYCLEGAN_INDEX static inline
#endif

namespace cyclegan {

// The source of padded position `i` (counted from the first unpadded one, so i >= -pad) of a side of `size` positions.
// |pad| < size, as reflection without repetition of the border demands.
CYCLEGAN_INDEX int64_t reflect(int64_t i, int64_t size) {
  if (i < 0) return -i;
  if (i >= size) return 2 * (size - 1) - i;
  return i;
}

// Where position `i` stands in the padded side: for k = 0 itself, for k = 1 and 2 its mirror images before and behind
// it, or -1 where it has none. The gradient of position i is the sum over the same positions.
CYCLEGAN_INDEX int64_t padded_position(int64_t i, int64_t size, int64_t pad, int k) {
  if (k == 0) return i + pad;
  if (k == 1) return i >= 1 && i <= pad ? pad - i : -1;
  return i >= size - 1 - pad && i <= size - 2 ? 2 * (size - 1) - i + pad : -1;
}

// All of them, the position itself first, written to `at`. Returns how many there are, 1 to 3.
CYCLEGAN_INDEX int padded_positions(int64_t i, int64_t size, int64_t pad, int64_t at[3]) {
  int count = 0;
  for (int k = 0; k < 3; ++k) {
    const int64_t position = padded_position(i, size, pad, k);
    if (position >= 0) at[count++] = position;
  }
  return count;
}

// Whether position `i` has mirror images in the padded side.
CYCLEGAN_INDEX bool mirrored(int64_t i, int64_t size, int64_t pad) {
  return (i >= 1 && i <= pad) || (i >= size - 1 - pad && i <= size - 2);
}

// First element of part `part` when `count` elements are cut into `parts` parts that differ by one at the most.
CYCLEGAN_INDEX int64_t part_begin(int64_t part, int64_t parts, int64_t count) {
  const int64_t base = count / parts;
  const int64_t rest = count % parts;
  return part * base + (part < rest ? part : rest);
}

CYCLEGAN_INDEX int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cyclegan
