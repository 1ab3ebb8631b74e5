// What the drivers of the sanitizers share: failures counted, threads of their own, random numbers. No PyTorch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "../geometry.h"

namespace cyclegan {

inline int threads = 1;
inline int failures = 0;

inline void expect(bool condition, const char* what, int64_t detail) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%lld)\n", what, static_cast<long long>(detail));
  ++failures;
}

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, (end - begin) / std::max<int64_t>(1, grain)));
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < parts; ++i) {
    workers.emplace_back(body, begin + part_begin(i, parts, end - begin), begin + part_begin(i + 1, parts, end - begin),
                         context);
  }
  for (std::thread& worker : workers) worker.join();
}

inline uint32_t random_state = 1;

// Uniform in [-1, 1).
inline float random_float() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / 8388608.0f - 1.0f;
}

}  // namespace cyclegan
