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

// Memory of a thread, not initialised.
using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

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

namespace {

// The filter turned by half a turn, its inputs for its outputs.
Filter rotated(const Filter& f, int64_t size) {
  return {f.data + (size - 1) * (f.r_step + f.s_step), f.c, f.k, f.c_step, f.k_step, -f.r_step, -f.s_step};
}

// grad_y with the zeros around it that the gradient of the bordered x needs.
Pictures widened(const InputGradient& problem, int64_t size) {
  return {problem.grad_y, problem.n, problem.h + 2 * problem.border - size + 1,
          problem.w + 2 * problem.border - size + 1, problem.filter.k, size - 1, false, nullptr};
}

// Calls run(to) for the gradient of the bordered x, and folds that into the gradient of x.
template <class Run>
void folded(const InputGradient& problem, ParallelFor parallel_for, const Run& run) {
  if (problem.border == 0) return run(problem.grad_x);
  const int64_t c = problem.filter.c, border = problem.border, row_floats = problem.w * c;
  const int64_t plane = (problem.h + 2 * border) * (problem.w + 2 * border) * c;
  const Scratch padded(problem.n * plane);
  run(padded.data());
  parallel(parallel_for, problem.n * problem.h, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().fold_row(padded.data() + i / problem.h * plane, problem.h, problem.w, c, border, i % problem.h,
                         problem.grad_x + i * row_floats);
    }
  });
}

}  // namespace

void conv3x3_input_gradient(const InputGradient& problem, ParallelFor parallel_for) {
  Pictures grad = widened(problem, 3);
  const Filter filter = rotated(problem.filter, 3);
  if (!problem.reflect) {
    grad.border = 2 - problem.border;
    return conv3x3({grad, filter, nullptr, Finish::none, problem.grad_x}, parallel_for);
  }
  folded(problem, parallel_for,
         [&](float* to) { conv3x3({grad, filter, nullptr, Finish::none, to}, parallel_for); });
}

namespace {

// Products of the pixels of row `row` of the bordered picture n with all taps, [w + 2 border, pitch].
void thin_products(const ThinConv& problem, int64_t n, int64_t row, const float* taps, int64_t pitch, float* t) {
  const ConvKernels& run = kernels();
  const Pictures& x = problem.x;
  const int64_t at = row - x.border, columns = x.w + 2 * x.border;
  if (!x.reflect && (at < 0 || at >= x.h)) return std::fill_n(t, columns * pitch, 0.0f), void();
  const float* from = x.data + (n * x.h + reflect(at, x.h)) * x.w * x.c;
  float* const inner = t + x.border * pitch;
  // As many pixels at a time as stay in the first-level cache.
  constexpr int64_t some = 48;
  for (int64_t start = 0; start < x.w; start += some) {
    for (int64_t column = 0; column < pitch; column += run.panel) {
      run.multiply(from + start * x.c, x.c, taps + column * x.c, x.c, inner + start * pitch + column, pitch,
                   std::min(some, x.w - start), false);
    }
  }
  // A pixel of the border has the products of the one that it shows.
  for (int64_t i = 1; i <= x.border; ++i) {
    for (const int64_t place : {-i, x.w - 1 + i}) {
      if (x.reflect) {
        std::copy_n(inner + reflect(place, x.w) * pitch, pitch, inner + place * pitch);
      } else {
        std::fill_n(inner + place * pitch, pitch, 0.0f);
      }
    }
  }
}

// The weights as panels of a matrix [C, (r, s, k)].
std::vector<float> thin_taps(const Filter& f, int64_t size, int64_t pitch, int64_t panel) {
  std::vector<float> taps(static_cast<size_t>(pitch * f.c), 0.0f);
  for (int64_t column = 0; column < size * size * f.k; ++column) {
    const int64_t k = column % f.k, s = column / f.k % size, r = column / f.k / size;
    const float* from = f.data + k * f.k_step + r * f.r_step + s * f.s_step;
    for (int64_t c = 0; c < f.c; ++c) {
      taps[static_cast<size_t>((column / panel * f.c + c) * panel + column % panel)] = from[c * f.c_step];
    }
  }
  return taps;
}

void store_thin(const float* sums, const ThinConv& problem, int64_t length, float* y) {
  const int64_t k = problem.filter.k;
  for (int64_t i = 0; i < length * k; ++i) {
    const float sum = sums[i / k * thin_outputs + i % k] + (problem.bias ? problem.bias[i % k] : 0.0f);
    y[i] = problem.finish == Finish::relu && sum < 0 ? 0.0f : sum;
  }
}

}  // namespace

void thin_conv(const ThinConv& problem, ParallelFor parallel_for) {
  const ConvKernels& run = kernels();
  const Pictures& x = problem.x;
  const int64_t size = problem.size, k = problem.filter.k, columns = x.w + 2 * x.border;
  const int64_t rows = x.h + 2 * x.border - size + 1, length = columns - size + 1;
  // shift_add reads four numbers at a time.
  const int64_t pitch = round_up(size * size * k + thin_outputs - 1, run.panel);
  const std::vector<float> taps = thin_taps(problem.filter, size, pitch, run.panel);
  const int64_t sums_floats = length * thin_outputs;
  parallel(parallel_for, x.n * rows, [&](int64_t begin, int64_t end) {
    const Floats t = floats(columns * pitch), sums = floats(size * sums_floats);
    while (begin < end) {
      const int64_t n = begin / rows, first = begin % rows, last = std::min(rows, first + end - begin);
      // Row h of the bordered x belongs to result rows h - size + 1 .. h, whose sums are under way.
      for (int64_t h = first; h < last + size - 1; ++h) {
        thin_products(problem, n, h, taps.data(), pitch, t.get());
        for (int64_t r = 0; r < size; ++r) {
          const int64_t row = h - r;
          if (row < first || row >= last) continue;
          run.shift_add(t.get() + r * size * k, pitch, size, k, length, sums.get() + row % size * sums_floats, r > 0);
        }
        const int64_t done = h - size + 1;
        if (done < first) continue;
        store_thin(sums.get() + done % size * sums_floats, problem, length,
                   problem.y + (n * rows + done) * length * k);
      }
      begin += last - first;
    }
  });
}

void thin_input_gradient(const InputGradient& problem, int64_t size, ParallelFor parallel_for) {
  const Pictures grad = widened(problem, size);
  const Filter filter = rotated(problem.filter, size);
  folded(problem, parallel_for,
         [&](float* to) { thin_conv({grad, filter, size, nullptr, Finish::none, to}, parallel_for); });
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
      const Floats packed = floats(parts * run.rows * some);
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

// Bytes of packed rows that are at hand at a time, for the second-level cache, and pixels whose panel stays in the
// first-level one.
constexpr int64_t packed_bytes = 640 * 1024;
constexpr int64_t block_pixels = 256;
// Kernels so narrow in channels are multiplied with all taps of a row as their channels.
constexpr int64_t few_channels = 32;
// The positions are cut into so many bands at most, each with sums of its own of so many floats together.
constexpr int64_t most_bands = 32, band_floats = 4 * 1024 * 1024;

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

// How a weight gradient is cut: into bands of rows, and each of those into groups of panels of grad_y. A band's group is
// computed by one thread that packs what it reads itself, because what another core has just written comes slowly.
struct GradientPlan {
  int64_t rows, columns;   // of the bordered grad_y
  int64_t x_columns;       // of the bordered x
  bool folded;             // a row of taps is one tap with size * C channels
  int64_t channels, taps;  // channels, and taps in a row, that follow from it
  int64_t phases;          // columns of x that differ by a multiple of the stride are packed together
  int64_t length, step;    // columns of a phase, and their distance in x
  int64_t parts, panels;   // panels of x and of grad_y
  int64_t pitch;           // of the sums [r][s][c][k]; with folded taps [r][s c][k], which is the same
  int64_t sums_floats;     // of a band
  int64_t bands, groups;
  int64_t x_floats, g_plane;  // of a packed row of x, and of a packed panel of grad_y
  int64_t lines, block;       // rows of grad_y packed at a time, and multiplied at a time

  GradientPlan(const WeightGradient& problem, const ConvKernels& run) {
    const Pictures &x = problem.x, &g = problem.grad_y;
    rows = g.h + 2 * g.border;
    columns = g.w + 2 * g.border;
    x_columns = x.w + 2 * x.border;
    folded = x.c * problem.size <= few_channels;
    channels = folded ? x.c * problem.size : x.c;
    taps = folded ? 1 : problem.size;
    phases = folded ? 1 : problem.stride;
    length = folded ? columns : ceil_div(x_columns, phases);
    step = problem.stride * x.c;
    parts = ceil_div(channels, run.rows);
    panels = ceil_div(g.c, run.panel);
    pitch = panels * run.panel;
    sums_floats = round_up(problem.size * problem.size * x.c * pitch, skew);
    bands = std::clamp<int64_t>(std::min(band_floats / sums_floats, x.n * rows / 4), 1, most_bands);
    groups = std::min(panels, ceil_div(most_bands, bands));
    x_floats = phases * round_up(parts * run.rows * length, skew);
    const int64_t line_floats = problem.stride * x_floats + ceil_div(panels, groups) * run.panel * columns;
    lines = std::clamp<int64_t>(packed_bytes / static_cast<int64_t>(sizeof(float)) / line_floats, 1, rows);
    block = std::clamp<int64_t>(block_pixels / columns, 1, lines);
    g_plane = lines * columns * run.panel + skew;
  }

  int64_t phase_floats() const { return x_floats / phases; }
  int64_t x_lines(const WeightGradient& problem, int64_t some) const {
    return (some - 1) * problem.stride + problem.size;
  }
};

// A thread's packed rows, and a row of a bordered picture.
struct Packed {
  Floats x, g, line;
  Packed(const WeightGradient& problem, const GradientPlan& plan, const ConvKernels& run)
      : x(floats(plan.x_lines(problem, plan.lines) * plan.x_floats)),
        g(floats(ceil_div(plan.panels, plan.groups) * plan.g_plane)),
        // The last column of a phase may lie behind the row.
        line(floats(std::max((plan.x_columns + plan.phases) * problem.x.c, plan.columns * run.panel * plan.panels))) {}
};

// Packs rows [start, start + lines) of grad_y of picture n, panels [first, last), and the rows of x that they meet.
void pack(const WeightGradient& problem, const GradientPlan& plan, const ConvKernels& run, int64_t n, int64_t start,
          int64_t lines, int64_t first, int64_t last, const Packed& packed) {
  const Pictures &x = problem.x, &g = problem.grad_y;
  for (int64_t row = 0; row < plan.x_lines(problem, lines); ++row) {
    copy_line(x, n, start * problem.stride + row, packed.line.get());
    for (int64_t phase = 0; phase < plan.phases; ++phase) {
      run.pack_rows(packed.line.get() + phase * x.c, plan.step, plan.length, plan.channels,
                    packed.x.get() + row * plan.x_floats + phase * plan.phase_floats());
    }
  }
  for (int64_t row = 0; row < lines; ++row) {
    const float* from = g.data + (n * g.h + start + row) * g.w * g.c;
    if (g.border > 0) {
      copy_line(g, n, start + row, packed.line.get());
      from = packed.line.get();
    }
    const int64_t column = first * run.panel;
    run.pack_panels(from + column, g.c, plan.columns, std::min(last * run.panel, g.c) - column,
                    packed.g.get() + row * plan.columns * run.panel, plan.g_plane);
  }
}

// Adds what the packed rows give to the sums of panels [first, last).
void multiply_taps(const WeightGradient& problem, const GradientPlan& plan, const ConvKernels& run, int64_t lines,
                   int64_t first, int64_t last, const Packed& packed, float* sums, bool add) {
  for (int64_t tap = 0; tap < problem.size * plan.taps; ++tap) {
    const int64_t r = tap / plan.taps, s = tap % plan.taps;
    const float* const from = packed.x.get() + r * plan.x_floats + s % plan.phases * plan.phase_floats() +
                              s / plan.phases * run.rows;
    for (int64_t at = first; at < last; ++at) {
      for (int64_t line = 0; line < lines; line += plan.block) {
        const float* const g = packed.g.get() + (at - first) * plan.g_plane + line * plan.columns * run.panel;
        for (int64_t c = 0; c < plan.channels; c += run.rows) {
          run.multiply_packed(from + line * problem.stride * plan.x_floats + c * plan.length, run.rows,
                              problem.stride * plan.x_floats, g, std::min(plan.block, lines - line), plan.columns,
                              sums + (tap * plan.channels + c) * plan.pitch + at * run.panel, plan.pitch,
                              std::min(run.rows, plan.channels - c), add || line > 0);
        }
      }
    }
  }
}

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
  const Scratch scratch(plan.bands * plan.sums_floats);
  const int64_t rows = problem.x.n * plan.rows;
  parallel(parallel_for, plan.bands * plan.groups, [&](int64_t begin, int64_t end) {
    const Packed packed(problem, plan, run);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t band = i / plan.groups, group = i % plan.groups;
      const int64_t first = part_begin(group, plan.groups, plan.panels);
      const int64_t last = part_begin(group + 1, plan.groups, plan.panels);
      const int64_t stop = part_begin(band + 1, plan.bands, rows);
      bool add = false;
      for (int64_t row = part_begin(band, plan.bands, rows), lines; row < stop; row += lines) {
        const int64_t n = row / plan.rows, start = row % plan.rows;
        lines = std::min({plan.lines, plan.rows - start, stop - row});
        pack(problem, plan, run, n, start, lines, first, last, packed);
        multiply_taps(problem, plan, run, lines, first, last, packed, scratch.data() + band * plan.sums_floats, add);
        add = true;
      }
    }
  });
  parallel(parallel_for, plan.panels, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * run.panel, last = std::min(end * run.panel, problem.grad_y.c);
    // Bands are added up in order.
    for (int64_t line = 0; line < problem.size * problem.size * problem.x.c; ++line) {
      float* const sums = scratch.data() + line * plan.pitch;
      for (int64_t band = 1; band < plan.bands; ++band) {
        const float* const more = sums + band * plan.sums_floats;
        for (int64_t k = first; k < last; ++k) sums[k] += more[k];
      }
    }
    store_gradient(problem, scratch.data(), plan.pitch, first, last);
  });
}

}  // namespace cyclegan
