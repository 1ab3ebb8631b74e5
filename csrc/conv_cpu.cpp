// Drives the kernels of conv_kernels.h: cuts the work into parts, runs them in parallel. Every number is computed in
// one part, in an order that depends on the shape alone, so the bits do not depend on the number of threads.

#include "conv_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "geometry.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cyclegan {
namespace {

const ConvKernels& kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::portable:
      break;
    case Isa::avx2:
      return *conv_avx2;
    case Isa::avx512:
    case Isa::avx512_bf16:
      return *conv_avx512;
  }
#endif
  return *conv_portable;
}

template <class Body>
void parallel(ParallelFor parallel_for, int64_t count, const Body& body) {
  parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Memory for intermediate results, kept for the next call: fresh pages cost more than what is computed in them. On
// large pages, where the system has them: the transforms write to 36 places at once.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : block_(take(static_cast<size_t>(floats) * sizeof(float))) {}
  ~Scratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (kept().first != nullptr && kept().second >= block_.second) std::swap(kept(), block_);
    std::free(std::exchange(kept(), block_).first);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return static_cast<float*>(block_.first); }

 private:
  using Block = std::pair<void*, size_t>;

  static std::mutex& mutex() {
    static std::mutex guard;
    return guard;
  }
  static Block& kept() {
    static Block block{nullptr, 0};
    return block;
  }
  static Block take(size_t bytes) {
    constexpr size_t page = size_t{1} << 21;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (kept().second >= bytes && kept().first != nullptr) return std::exchange(kept(), Block{nullptr, 0});
    }
    const size_t whole = (bytes + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, whole);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, whole, MADV_HUGEPAGE);
#endif
    return {memory, whole};
  }

  Block block_;
};

// Bytes of the transformed tiles and products that are at hand at a time: they should stay in the last-level cache.
constexpr int64_t together_bytes = 20 * 1024 * 1024;
// Floats between planes beyond what they hold, so that the 36 of them do not fall into the same places of a cache.
constexpr int64_t skew = 16;

int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace

void conv3x3(const Conv3x3& problem, ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  Pictures x = problem.x;
  const int64_t k = problem.filter.k;
  const std::vector<float> zeros(static_cast<size_t>(x.c), 0.0f);
  x.zeros = zeros.data();
  Tiles tiles{x.h + 2 * x.border - 2, x.w + 2 * x.border - 2, 0, 0};
  tiles.down = ceil_div(tiles.rows, tile_out);
  tiles.across = ceil_div(tiles.columns, tile_out);
  const int64_t count = x.n * tiles.down * tiles.across, panels = ceil_div(k, run.panel);
  const int64_t v_pitch = round_up(x.c, run.width), m_pitch = panels * run.panel;
  const int64_t tile_bytes = frequencies * (v_pitch + m_pitch) * static_cast<int64_t>(sizeof(float));
  const int64_t together = std::min(count, std::max<int64_t>(8 * run.rows, together_bytes / tile_bytes));
  const int64_t u_plane = panels * x.c * run.panel + skew;
  const int64_t v_plane = together * v_pitch + skew, m_plane = together * m_pitch + skew;
  const Scratch scratch(frequencies * (u_plane + v_plane + m_plane));
  float* const u = scratch.data();
  float* const v = u + frequencies * u_plane;
  float* const m = v + frequencies * v_plane;
  parallel(parallel_for, panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run.transform_filter(problem.filter, i, u, u_plane);
  });
  const int64_t rounds = ceil_div(count, together);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t start = part_begin(round, rounds, count), stop = part_begin(round + 1, rounds, count);
    parallel(parallel_for, stop - start, [&](int64_t begin, int64_t end) {
      run.transform_input(x, tiles, start + begin, start + end, v + begin * v_pitch, v_plane, v_pitch);
    });
    parallel(parallel_for, frequencies * panels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t f = i / panels, at = i % panels;
        run.multiply(v + f * v_plane, v_pitch, u + f * u_plane + at * x.c * run.panel, x.c,
                     m + f * m_plane + at * run.panel, m_pitch, stop - start, false);
      }
    });
    parallel(parallel_for, stop - start, [&](int64_t begin, int64_t end) {
      run.transform_output(m + begin * m_pitch, m_plane, m_pitch, tiles, start + begin, start + end, problem.bias,
                           problem.finish, problem.y, k);
    });
  }
}

}  // namespace cyclegan
