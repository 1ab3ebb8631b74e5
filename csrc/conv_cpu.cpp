// Drives the kernels of conv_kernels.h: cuts the work into parts, runs them in parallel. Every number is computed in
// one part, in an order that depends on the shape alone, so the bits do not depend on the number of threads.

#include "conv_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
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
    Block* place = std::min_element(kept(), kept() + most_kept, smaller_block);
    if (place->second < block_.second) std::swap(*place, block_);
    std::free(block_.first);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return static_cast<float*>(block_.first); }

 private:
  using Block = std::pair<void*, size_t>;
  static constexpr int most_kept = 3;

  static bool smaller_block(const Block& a, const Block& b) { return a.second < b.second; }
  static std::mutex& mutex() {
    static std::mutex guard;
    return guard;
  }
  static Block* kept() {
    static Block blocks[most_kept] = {};
    return blocks;
  }
  static Block take(size_t bytes) {
    constexpr size_t page = size_t{1} << 21;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      Block* best = nullptr;
      for (Block* block = kept(); block < kept() + most_kept; ++block) {
        if (block->second >= bytes && (best == nullptr || smaller_block(*block, *best))) best = block;
      }
      if (best != nullptr) return std::exchange(*best, Block{nullptr, 0});
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

Tiles tiles_of(const Pictures& x) {
  const int64_t rows = x.h + 2 * x.border - 2, columns = x.w + 2 * x.border - 2;
  return {rows, columns, ceil_div(rows, tile_out), ceil_div(columns, tile_out)};
}

// How many of `count` tiles are worked on at a time.
int64_t tiles_together(const ConvKernels& run, int64_t count, int64_t channels) {
  const int64_t tile_bytes = frequencies * channels * static_cast<int64_t>(sizeof(float));
  return std::min(count, std::max<int64_t>(8 * run.rows, together_bytes / tile_bytes));
}

}  // namespace

void conv3x3(const Conv3x3& problem, ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  Pictures x = problem.x;
  const int64_t k = problem.filter.k;
  const std::vector<float> zeros(static_cast<size_t>(x.c), 0.0f);
  x.zeros = zeros.data();
  const Tiles tiles = tiles_of(x);
  const int64_t count = x.n * tiles.down * tiles.across, panels = ceil_div(k, run.panel);
  const int64_t v_pitch = round_up(x.c, run.width), m_pitch = panels * run.panel;
  const int64_t together = tiles_together(run, count, v_pitch + m_pitch);
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

void conv3x3_input_gradient(const Conv3x3InputGradient& problem, ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  const Filter& given = problem.filter;
  const int64_t c = given.c, border = problem.border;
  // The rotated filter, its inputs for its outputs, over the gradient with two pixels of zeros around it.
  const Filter rotated{given.data + 2 * (given.r_step + given.s_step), c, given.k, given.c_step, given.k_step,
                       -given.r_step, -given.s_step};
  const Pictures grad{problem.grad_y, problem.n, problem.h + 2 * border - 2, problem.w + 2 * border - 2, given.k, 2,
                      false, nullptr};
  if (border == 0) return conv3x3({grad, rotated, nullptr, Finish::none, problem.grad_x}, parallel_for);
  if (!problem.reflect) {
    Pictures narrow = grad;
    narrow.border = 2 - border;
    return conv3x3({narrow, rotated, nullptr, Finish::none, problem.grad_x}, parallel_for);
  }
  const int64_t plane = (problem.h + 2 * border) * (problem.w + 2 * border) * c, row_floats = problem.w * c;
  const Scratch padded(problem.n * plane);
  conv3x3({grad, rotated, nullptr, Finish::none, padded.data()}, parallel_for);
  parallel(parallel_for, problem.n * problem.h, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run.fold_row(padded.data() + i / problem.h * plane, problem.h, problem.w, c, border, i % problem.h,
                   problem.grad_x + i * row_floats);
    }
  });
}

void conv3x3_weight_gradient(const Pictures& given, const float* grad_y, const Filter& filter, float* grad,
                             ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  Pictures x = given;
  const std::vector<float> zeros(static_cast<size_t>(x.c), 0.0f);
  x.zeros = zeros.data();
  const Tiles tiles = tiles_of(x);
  const int64_t count = x.n * tiles.down * tiles.across, panels = ceil_div(filter.k, run.panel);
  const int64_t v_pitch = round_up(x.c, run.width), pitch = panels * run.panel, parts = ceil_div(x.c, run.rows);
  const int64_t together = tiles_together(run, count, v_pitch + pitch);
  const int64_t v_plane = together * v_pitch + skew, z_plane = together * pitch + skew, plane = x.c * pitch + skew;
  const Scratch scratch(frequencies * (v_plane + z_plane + plane));
  float* const v = scratch.data();
  float* const z = v + frequencies * v_plane;
  float* const sums = z + frequencies * z_plane;
  const int64_t rounds = ceil_div(count, together);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t start = part_begin(round, rounds, count), stop = part_begin(round + 1, rounds, count);
    const int64_t some = stop - start;
    parallel(parallel_for, some, [&](int64_t begin, int64_t end) {
      run.transform_input(x, tiles, start + begin, start + end, v + begin * v_pitch, v_plane, v_pitch);
      run.transform_gradient(grad_y, filter.k, tiles, start + begin, start + end, z + begin * run.panel, z_plane,
                             some * run.panel);
    });
    parallel(parallel_for, frequencies * panels, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> packed(new float[static_cast<size_t>(parts * run.rows * some)]);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t f = i / panels, at = i % panels;
        if (i == begin || at == 0) run.pack_rows(v + f * v_plane, v_pitch, some, x.c, packed.get());
        for (int64_t c = 0; c < x.c; c += run.rows) {
          run.multiply_packed(packed.get() + c * some, run.rows, 0, z + f * z_plane + at * some * run.panel, 1, some,
                              sums + f * plane + c * pitch + at * run.panel, pitch, std::min(run.rows, x.c - c),
                              round > 0);
        }
      }
    });
  }
  parallel(parallel_for, panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run.filter_gradient(sums, plane, pitch, filter, i, grad);
  });
}

namespace {

// Bytes of packed rows that are at hand at a time, and pixels whose panel stays in the first-level cache.
constexpr int64_t packed_bytes = 1536 * 1024;
constexpr int64_t block_pixels = 256;
// Kernels so narrow in channels are multiplied with all taps of a row as their channels.
constexpr int64_t few_channels = 32;

// Row `row` of the bordered picture n, [w + 2 border, c].
void copy_line(const Pictures& x, int64_t n, int64_t row, float* to) {
  const int64_t at = row - x.border, c = x.c;
  const bool inside = at >= 0 && at < x.h;
  if (!inside && !x.reflect) return std::fill(to, to + (x.w + 2 * x.border) * c, 0.0f), void();
  const float* from = x.data + (n * x.h + reflect(at, x.h)) * x.w * c;
  std::copy(from, from + x.w * c, to + x.border * c);
  for (int64_t i = 1; i <= x.border; ++i) {
    for (const int64_t place : {-i, x.w - 1 + i}) {
      float* pixel = to + (x.border + place) * c;
      if (x.reflect) {
        std::copy_n(from + reflect(place, x.w) * c, c, pixel);
      } else {
        std::fill_n(pixel, c, 0.0f);
      }
    }
  }
}

// How a weight gradient is cut.
struct GradientPlan {
  int64_t rows, columns;       // of the bordered grad_y
  int64_t x_columns;           // of the bordered x
  bool folded;                 // a row of taps is one tap with size * C channels
  int64_t channels, taps;      // channels, and taps in a row, that follow from it
  int64_t length, step, a_step;  // pixels of a packed row of x, their distance in x, and in the panels by pixel of grad_y
  int64_t parts, panels;       // panels of x and of grad_y
  int64_t x_floats;            // of a packed row of x
  int64_t lines, block;        // rows of grad_y packed at a time, and multiplied at a time

  GradientPlan(const WeightGradient& problem, const ConvKernels& run) {
    const Pictures &x = problem.x, &g = problem.grad_y;
    rows = g.h + 2 * g.border;
    columns = g.w + 2 * g.border;
    x_columns = x.w + 2 * x.border;
    folded = x.c * problem.size <= few_channels;
    channels = folded ? x.c * problem.size : x.c;
    taps = folded ? 1 : problem.size;
    length = folded ? columns : x_columns;
    step = folded ? problem.stride * x.c : x.c;
    a_step = folded ? run.rows : problem.stride * run.rows;
    parts = ceil_div(channels, run.rows);
    panels = ceil_div(g.c, run.panel);
    x_floats = parts * run.rows * length;
    const int64_t line_bytes = (problem.stride * x_floats + panels * run.panel * columns) * 4;
    lines = std::clamp<int64_t>(packed_bytes / line_bytes, 1, rows);
    block = std::clamp<int64_t>(block_pixels / columns, 1, lines);
  }

  int64_t x_lines(const WeightGradient& problem) const { return (lines - 1) * problem.stride + problem.size; }
};

void store_gradient(const WeightGradient& problem, const float* sums, int64_t pitch, int64_t first, int64_t last) {
  const Filter& filter = problem.filter;
  constexpr int64_t some = 16;
  for (int64_t start = 0; start < filter.c; start += some) {
    const int64_t stop = std::min(start + some, filter.c);
    for (int64_t tap = 0; tap < problem.size * problem.size; ++tap) {
      float* to = problem.grad + tap / problem.size * filter.r_step + tap % problem.size * filter.s_step;
      for (int64_t k = first; k < last; ++k) {
        const float* from = sums + tap * filter.c * pitch + k;
        for (int64_t c = start; c < stop; ++c) to[k * filter.k_step + c * filter.c_step] = from[c * pitch];
      }
    }
  }
}

}  // namespace

void conv_weight_gradient(const WeightGradient& problem, ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  const GradientPlan plan(problem, run);
  const Pictures &x = problem.x, &g = problem.grad_y;
  const int64_t x_lines = plan.x_lines(problem), pitch = plan.panels * run.panel;
  const int64_t g_plane = plan.lines * plan.columns * run.panel;
  // [r][s][c][k]; with folded taps [r][s c][k], which is the same.
  const int64_t sums_floats = problem.size * problem.size * x.c * pitch;
  const Scratch scratch(x_lines * plan.x_floats + plan.panels * g_plane + sums_floats);
  float* const x_packed = scratch.data();
  float* const g_packed = x_packed + x_lines * plan.x_floats;
  float* const sums = g_packed + plan.panels * g_plane;
  const int64_t chunks = ceil_div(plan.rows, plan.lines);
  for (int64_t i = 0; i < x.n * chunks; ++i) {
    const int64_t n = i / chunks, start = i % chunks * plan.lines, lines = std::min(plan.lines, plan.rows - start);
    const int64_t x_some = (lines - 1) * problem.stride + problem.size;
    parallel(parallel_for, x_some + lines, [&](int64_t begin, int64_t end) {
      std::vector<float> line(static_cast<size_t>(std::max(plan.x_columns * x.c, plan.columns * g.c)));
      for (int64_t row = begin; row < end; ++row) {
        if (row < x_some) {
          copy_line(x, n, start * problem.stride + row, line.data());
          run.pack_rows(line.data(), plan.step, plan.length, plan.channels, x_packed + row * plan.x_floats);
        } else {
          copy_line(g, n, start + row - x_some, line.data());
          run.pack_panels(line.data(), plan.columns, g.c, g_packed + (row - x_some) * plan.columns * run.panel, g_plane);
        }
      }
    });
    // Neighbours in this order share a panel of grad_y.
    const int64_t products = problem.size * plan.taps * plan.panels;
    parallel(parallel_for, products * plan.parts, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t product = begin / plan.parts, stop = std::min(end, (product + 1) * plan.parts);
        const int64_t tap = product / plan.panels, at = product % plan.panels;
        const int64_t r = tap / plan.taps, s = tap % plan.taps;
        for (int64_t line = 0; line < lines; line += plan.block) {
          for (int64_t part = begin % plan.parts; part < stop - product * plan.parts; ++part) {
            const int64_t c = part * run.rows;
            run.multiply_packed(
                x_packed + (line * problem.stride + r) * plan.x_floats + c * plan.length + s * run.rows, plan.a_step,
                problem.stride * plan.x_floats, g_packed + at * g_plane + line * plan.columns * run.panel,
                std::min(plan.block, lines - line), plan.columns,
                sums + (tap * plan.channels + c) * pitch + at * run.panel, pitch,
                std::min(run.rows, plan.channels - c), i > 0 || line > 0);
          }
        }
        begin = stop;
      }
    });
  }
  parallel(parallel_for, plan.panels, [&](int64_t begin, int64_t end) {
    store_gradient(problem, sums, pitch, begin * run.panel, std::min(end * run.panel, g.c));
  });
}

}  // namespace cyclegan
