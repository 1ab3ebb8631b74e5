#include "crop_flip_cpu.h"

#include <algorithm>

namespace cyclegan {
namespace {

// v / 127.5 - 1 rounded once: 2 v - 255 is exact.
struct Table {
  float value[256];
  Table() {
    for (int v = 0; v < 256; ++v) value[v] = static_cast<float>(2 * v - 255) / 255.0f;
  }
};

// `Channels` 0: any number of them.
template <int Channels>
void rows(const CropProblem& p, const float* table, int64_t begin, int64_t end) {
  const int64_t channels = Channels ? Channels : p.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / p.h;
    const uint8_t* from = p.store + (((p.index[n] * p.height) + p.y[n] + i % p.h) * p.width + p.x[n]) * channels;
    float* to = p.out + i * p.w * channels;
    if (!p.flip[n]) {
      for (int64_t k = 0; k < p.w * channels; ++k) to[k] = table[from[k]];
      continue;
    }
    for (from += (p.w - 1) * channels; to < p.out + (i + 1) * p.w * channels; from -= channels, to += channels) {
      for (int64_t c = 0; c < channels; ++c) to[c] = table[from[c]];
    }
  }
}

}  // namespace

void crop_flip(const CropProblem& problem, ParallelFor parallel_for) {
  static const Table table;
  const auto body = [&](int64_t begin, int64_t end) {
    if (problem.channels == 3) return rows<3>(problem, table.value, begin, end);
    if (problem.channels == 1) return rows<1>(problem, table.value, begin, end);
    rows<0>(problem, table.value, begin, end);
  };
  using Body = decltype(body);
  const int64_t grain = std::max<int64_t>(1, 16 * 1024 / (problem.w * problem.channels));
  parallel_for(
      0, problem.n * problem.h, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace cyclegan
