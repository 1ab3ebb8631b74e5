// The kernels of conv_kernels.h for one instruction set. Each conv_<isa>.cpp defines CYCLEGAN_CONV and includes this
// once, compiled with the flags of that instruction set. No standard library here: see vector.h.

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "conv_kernels.h"
#include "geometry.h"

namespace cyclegan {
namespace {

#include "vector.h"

// Sums that stay in registers: tile_rows x 2 vectors of them, two vectors of b and one number of a.
#if defined(__AVX512F__)
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif
constexpr int panel = 2 * width;
// Numbers of the inner dimension for which a panel of b stays in the first-level cache.
constexpr int64_t depth_block = 256;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// x - 0 is x, a minus zero too, so that this is a broadcast and no more.
static inline Vec splat(float value) { return value - Vec{}; }

static inline Vec load_part(const float* p, int64_t count) {
  if (count >= width) return load_raw<Vec>(p);
  float buffer[width] = {};
  if (count > 0) __builtin_memcpy(buffer, p, static_cast<size_t>(count) * sizeof(float));
  return load_raw<Vec>(buffer);
}

static inline void store_part(float* p, Vec v, int64_t count) {
  if (count >= width) return store_raw(p, v);
  float buffer[width];
  store_raw(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(count) * sizeof(float));
}

// ---- Products of matrices -------------------------------------------------------------------------------------------

template <int rows>
static void multiply_rows(const float* a, int64_t a_pitch, const float* b, int64_t depth, float* out,
                          int64_t out_pitch, bool add) {
  Vec sum[rows][2];
  const float* from[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    from[i] = a + i * a_pitch;
    sum[i][0] = add ? load_raw<Vec>(out + i * out_pitch) : Vec{};
    sum[i][1] = add ? load_raw<Vec>(out + i * out_pitch + width) : Vec{};
  }
  for (int64_t l = 0; l < depth; ++l) {
    const Vec low = load_raw<Vec>(b + l * panel), high = load_raw<Vec>(b + l * panel + width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec value = splat(from[i][l]);
      sum[i][0] += value * low;
      sum[i][1] += value * high;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    store_raw(out + i * out_pitch, sum[i][0]);
    store_raw(out + i * out_pitch + width, sum[i][1]);
  }
}

// Calls multiply_rows<rows> for a number of rows known at run time.
template <int most = tile_rows>
static inline void multiply_some(int64_t rows, const float* a, int64_t a_pitch, const float* b, int64_t depth,
                                 float* out, int64_t out_pitch, bool add) {
  if constexpr (most > 0) {
    if (rows == most) return multiply_rows<most>(a, a_pitch, b, depth, out, out_pitch, add);
    multiply_some<most - 1>(rows, a, a_pitch, b, depth, out, out_pitch, add);
  }
}

static void multiply(const float* a, int64_t a_pitch, const float* b, int64_t depth, float* out, int64_t out_pitch,
                     int64_t rows, bool add) {
  // Parts of nearly the same size: no last one with few rows, which would leave the multipliers waiting.
  const int64_t parts = ceil_div(rows, tile_rows);
  for (int64_t start = 0; start < depth; start += depth_block) {
    const int64_t some = smaller(depth_block, depth - start);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part_begin(part, parts, rows), last = part_begin(part + 1, parts, rows);
      multiply_some(last - first, a + first * a_pitch + start, a_pitch, b + start * panel, some,
                    out + first * out_pitch, out_pitch, add || start > 0);
    }
  }
}

template <int rows>
static void multiply_packed_rows(const float* a, int64_t a_step, int64_t a_segment, const float* b, int64_t segments,
                                 int64_t depth, float* out, int64_t out_pitch, bool add) {
  Vec sum[rows][2] = {};
  for (int64_t t = 0; t < segments; ++t) {
    const float* from = a + t * a_segment;
    for (int64_t l = 0; l < depth; ++l, from += a_step, b += panel) {
      const Vec low = load_raw<Vec>(b), high = load_raw<Vec>(b + width);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec value = splat(from[i]);
        sum[i][0] += value * low;
        sum[i][1] += value * high;
      }
    }
  }
  // Sums of parts are added up, not single products: fewer roundings meet a large number.
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    float* to = out + i * out_pitch;
    store_raw(to, add ? load_raw<Vec>(to) + sum[i][0] : sum[i][0]);
    store_raw(to + width, add ? load_raw<Vec>(to + width) + sum[i][1] : sum[i][1]);
  }
}

template <int most = tile_rows>
static void multiply_packed(const float* a, int64_t a_step, int64_t a_segment, const float* b, int64_t segments,
                            int64_t depth, float* out, int64_t out_pitch, int64_t rows, bool add) {
  if constexpr (most > 0) {
    if (rows == most) {
      return multiply_packed_rows<most>(a, a_step, a_segment, b, segments, depth, out, out_pitch, add);
    }
    multiply_packed<most - 1>(a, a_step, a_segment, b, segments, depth, out, out_pitch, rows, add);
  }
}

// Pixels whose numbers stay in the first-level cache while they are sorted into panels.
constexpr int64_t pack_block = 16;

static void pack_rows(const float* from, int64_t step, int64_t length, int64_t count, float* to) {
  for (int64_t start = 0; start < length; start += pack_block) {
    const int64_t stop = smaller(start + pack_block, length);
    int64_t j = 0;
    for (; j + tile_rows <= count; j += tile_rows) {
      float* panel_to = to + j * length;
      for (int64_t i = start; i < stop; ++i) {
        __builtin_memcpy(panel_to + i * tile_rows, from + i * step + j, tile_rows * sizeof(float));
      }
    }
    if (j == count) continue;
    for (int64_t i = start; i < stop; ++i) {
      for (int64_t rest = 0; rest < count - j; ++rest) to[j * length + i * tile_rows + rest] = from[i * step + j + rest];
    }
  }
}

static void pack_panels(const float* from, int64_t step, int64_t length, int64_t count, float* to,
                        int64_t panel_plane) {
  for (int64_t i = 0; i < length; ++i, from += step, to += panel) {
    float* at = to;
    for (int64_t j = 0; j < count; j += panel, at += panel_plane) {
      for (int64_t part = 0; part < panel; part += width) {
        store_raw(at + part, load_part(from + j + part, count - j - part));
      }
    }
  }
}

typedef float Quad __attribute__((vector_size(16)));

static void shift_add(const float* t, int64_t pitch, int64_t size, int64_t k_count, int64_t length, float* sums,
                      bool add) {
  const int64_t diagonal = pitch + k_count;
  for (int64_t i = 0; i < length; ++i, t += pitch) {
    Quad even = add ? load_raw<Quad>(sums + 4 * i) : Quad{}, odd = {};
    int64_t s = 0;
    for (; s + 2 <= size; s += 2) {
      even += load_raw<Quad>(t + s * diagonal);
      odd += load_raw<Quad>(t + (s + 1) * diagonal);
    }
    if (s < size) even += load_raw<Quad>(t + s * diagonal);
    store_raw(sums + 4 * i, even + odd);
  }
}

static void fold_row(const float* padded, int64_t h, int64_t w, int64_t c, int64_t border, int64_t row, float* to) {
  int64_t rows[3], columns[3];
  const int row_count = padded_positions(row, h, border, rows);
  const int64_t pitch = (w + 2 * border) * c;
  for (int64_t i = 0; i < w; ++i, to += c) {
    const int column_count = padded_positions(i, w, border, columns);
    for (int64_t channel = 0; channel < c; channel += width) {
      Vec sum = {};
      for (int r = 0; r < row_count; ++r) {
        for (int k = 0; k < column_count; ++k) {
          sum += load_part(padded + rows[r] * pitch + columns[k] * c + channel, c - channel);
        }
      }
      store_part(to + channel, sum, c - channel);
    }
  }
}

// ---- Winograd's transforms ------------------------------------------------------------------------------------------
//
// The points 0, +-1, +-3/2 and infinity: with 3/2 rounding errors are about half of those with 2 (Lavin and Gray's).

constexpr float point = 1.5f, point2 = point * point, point3 = point * point2;

// B^T: from six samples to six values at the points.
static inline void samples_to_points(const Vec d[6], Vec t[6]) {
  const Vec even1 = d[4] - point2 * d[2], odd1 = d[3] - point2 * d[1];
  const Vec even2 = d[4] - d[2], odd2 = point * (d[3] - d[1]);
  t[0] = point2 * d[0] - (1 + point2) * d[2] + d[4];
  t[1] = even1 + odd1;
  t[2] = even1 - odd1;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = point2 * d[1] - (1 + point2) * d[3] + d[5];
}

// A^T: from six products to four results.
static inline void points_to_results(const Vec m[6], Vec y[4]) {
  const Vec even1 = m[1] + m[2], odd1 = m[1] - m[2], even2 = m[3] + m[4], odd2 = m[3] - m[4];
  y[0] = m[0] + even1 + even2;
  y[1] = odd1 + point * odd2;
  y[2] = even1 + point2 * even2;
  y[3] = odd1 + point3 * odd2 + m[5];
}

constexpr float scale0 = 1 / point2, scale1 = 1 / (2 * (1 - point2)), scale2 = 1 / (2 * point2 * (point2 - 1));

// G: from three weights to six values at the points.
static inline void weights_to_points(const Vec g[3], Vec u[6]) {
  const Vec even1 = scale1 * (g[0] + g[2]), odd1 = scale1 * g[1];
  const Vec even2 = scale2 * (g[0] + point2 * g[2]), odd2 = (scale2 * point) * g[1];
  u[0] = scale0 * g[0];
  u[1] = even1 + odd1;
  u[2] = even1 - odd1;
  u[3] = even2 + odd2;
  u[4] = even2 - odd2;
  u[5] = g[2];
}

// A, the transpose of A^T: from four results to six values at the points.
static inline void results_to_points(const Vec y[4], Vec z[6]) {
  const Vec even1 = y[0] + y[2], odd1 = y[1] + y[3];
  const Vec even2 = y[0] + point2 * y[2], odd2 = point * y[1] + point3 * y[3];
  z[0] = y[0];
  z[1] = even1 + odd1;
  z[2] = even1 - odd1;
  z[3] = even2 + odd2;
  z[4] = even2 - odd2;
  z[5] = y[3];
}

// G^T: from six sums to three weights.
static inline void points_to_weights(const Vec s[6], Vec g[3]) {
  const Vec even1 = scale1 * (s[1] + s[2]), even2 = scale2 * (s[3] + s[4]);
  g[0] = scale0 * s[0] + even1 + even2;
  g[1] = scale1 * (s[1] - s[2]) + (scale2 * point) * (s[3] - s[4]);
  g[2] = even1 + point2 * even2 + s[5];
}

struct TilePlace {
  int64_t n, row, column;
};

static inline TilePlace place_of(int64_t tile, const Tiles& tiles) {
  const int64_t line = tile / tiles.across;
  return {line / tiles.down, line % tiles.down * tile_out, tile % tiles.across * tile_out};
}

// Where pixel `i` of the bordered side comes from: a position of the picture, or -1 for a zero.
static inline int64_t source(int64_t i, int64_t size, const Pictures& x) {
  const int64_t at = i - x.border;
  if (at >= 0 && at < size) return at;
  return x.reflect && at < size + x.border ? reflect(at, size) : -1;
}

static void transform_input(const Pictures& x, const Tiles& tiles, int64_t first, int64_t last, float* v,
                            int64_t plane, int64_t pitch) {
  for (int64_t tile = first; tile < last; ++tile, v += pitch) {
    const TilePlace place = place_of(tile, tiles);
    const float* pixels[frequencies];
    for (int64_t i = 0; i < tile_in; ++i) {
      const int64_t row = source(place.row + i, x.h, x);
      for (int64_t j = 0; j < tile_in; ++j) {
        const int64_t column = source(place.column + j, x.w, x);
        const bool inside = row >= 0 && column >= 0;
        pixels[i * tile_in + j] = inside ? x.data + ((place.n * x.h + row) * x.w + column) * x.c : x.zeros;
      }
    }
    for (int64_t c = 0; c < x.c; c += width) {
      Vec half[tile_in][tile_in];
      for (int64_t j = 0; j < tile_in; ++j) {
        Vec d[6], t[6];
        for (int64_t i = 0; i < tile_in; ++i) d[i] = load_part(pixels[i * tile_in + j] + c, x.c - c);
        samples_to_points(d, t);
        for (int64_t i = 0; i < tile_in; ++i) half[i][j] = t[i];
      }
      for (int64_t i = 0; i < tile_in; ++i) {
        Vec t[6];
        samples_to_points(half[i], t);
        for (int64_t j = 0; j < tile_in; ++j) store_raw(v + (i * tile_in + j) * plane + c, t[j]);
      }
    }
  }
}

// Channels of the filter that are brought into lane order at a time.
constexpr int64_t filter_channels = 8;

static void transform_filter(const Filter& filter, int64_t at, float* u, int64_t plane) {
  const int64_t first = at * panel, outputs = smaller(panel, filter.k - first);
  float lanes[filter_channels][9][panel] = {};
  for (int64_t start = 0; start < filter.c; start += filter_channels) {
    const int64_t channels = smaller(filter_channels, filter.c - start);
    for (int64_t lane = 0; lane < outputs; ++lane) {
      const float* from = filter.data + (first + lane) * filter.k_step + start * filter.c_step;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* weight = from + tap / 3 * filter.r_step + tap % 3 * filter.s_step;
        for (int64_t c = 0; c < channels; ++c) lanes[c][tap][lane] = weight[c * filter.c_step];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      float* to = u + (at * filter.c + start + c) * panel;
      for (int64_t part = 0; part < panel; part += width) {
        Vec half[tile_in][3];
        for (int64_t s = 0; s < 3; ++s) {
          Vec g[3], t[6];
          for (int64_t r = 0; r < 3; ++r) g[r] = load_raw<Vec>(lanes[c][3 * r + s] + part);
          weights_to_points(g, t);
          for (int64_t i = 0; i < tile_in; ++i) half[i][s] = t[i];
        }
        for (int64_t i = 0; i < tile_in; ++i) {
          Vec t[6];
          weights_to_points(half[i], t);
          for (int64_t j = 0; j < tile_in; ++j) store_raw(to + (i * tile_in + j) * plane + part, t[j]);
        }
      }
    }
  }
}

static inline Vec finished(Vec v, Finish finish) {
  if (finish == Finish::relu) return maximum(Vec{}, v);
  return v;
}

static void transform_output(const float* m, int64_t plane, int64_t pitch, const Tiles& tiles, int64_t first,
                             int64_t last, const float* bias, Finish finish, float* y, int64_t outputs) {
  for (int64_t tile = first; tile < last; ++tile, m += pitch) {
    const TilePlace place = place_of(tile, tiles);
    const int64_t rows = smaller(tile_out, tiles.rows - place.row);
    const int64_t columns = smaller(tile_out, tiles.columns - place.column);
    float* corner = y + ((place.n * tiles.rows + place.row) * tiles.columns + place.column) * outputs;
    for (int64_t k = 0; k < outputs; k += width) {
      const int64_t count = outputs - k;
      const Vec shift = bias ? load_part(bias + k, count) : Vec{};
      Vec half[tile_out][tile_in];
      for (int64_t j = 0; j < tile_in; ++j) {
        Vec d[6], t[4];
        for (int64_t i = 0; i < tile_in; ++i) d[i] = load_raw<Vec>(m + (i * tile_in + j) * plane + k);
        points_to_results(d, t);
        for (int64_t i = 0; i < tile_out; ++i) half[i][j] = t[i];
      }
      for (int64_t i = 0; i < rows; ++i) {
        Vec t[4];
        points_to_results(half[i], t);
        for (int64_t j = 0; j < columns; ++j) {
          store_part(corner + (i * tiles.columns + j) * outputs + k, finished(t[j] + shift, finish), count);
        }
      }
    }
  }
}

static void transform_gradient(const float* grad, int64_t outputs, const Tiles& tiles, int64_t first, int64_t last,
                               float* z, int64_t plane, int64_t panel_plane) {
  for (int64_t tile = first; tile < last; ++tile, z += panel) {
    const TilePlace place = place_of(tile, tiles);
    const int64_t rows = smaller(tile_out, tiles.rows - place.row);
    const int64_t columns = smaller(tile_out, tiles.columns - place.column);
    const float* corner = grad + ((place.n * tiles.rows + place.row) * tiles.columns + place.column) * outputs;
    for (int64_t k = 0; k < ceil_div(outputs, panel) * panel; k += width) {
      float* to = z + k / panel * panel_plane + k % panel;
      Vec half[tile_in][tile_out] = {};
      for (int64_t j = 0; j < columns; ++j) {
        Vec y[4] = {}, t[6];
        for (int64_t i = 0; i < rows; ++i) y[i] = load_part(corner + (i * tiles.columns + j) * outputs + k, outputs - k);
        results_to_points(y, t);
        for (int64_t i = 0; i < tile_in; ++i) half[i][j] = t[i];
      }
      for (int64_t i = 0; i < tile_in; ++i) {
        Vec t[6];
        results_to_points(half[i], t);
        for (int64_t j = 0; j < tile_in; ++j) store_raw(to + (i * tile_in + j) * plane, t[j]);
      }
    }
  }
}

static void filter_gradient(const float* sums, int64_t plane, int64_t pitch, const Filter& filter, int64_t at,
                            float* grad) {
  const int64_t first = at * panel, outputs = smaller(panel, filter.k - first);
  float lanes[filter_channels][9][panel];
  for (int64_t start = 0; start < filter.c; start += filter_channels) {
    const int64_t channels = smaller(filter_channels, filter.c - start);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = sums + (start + c) * pitch + first;
      for (int64_t part = 0; part < panel; part += width) {
        Vec half[3][tile_in];
        for (int64_t j = 0; j < tile_in; ++j) {
          Vec s[6], t[3];
          for (int64_t i = 0; i < tile_in; ++i) s[i] = load_raw<Vec>(from + (i * tile_in + j) * plane + part);
          points_to_weights(s, t);
          for (int64_t r = 0; r < 3; ++r) half[r][j] = t[r];
        }
        for (int64_t r = 0; r < 3; ++r) {
          Vec t[3];
          points_to_weights(half[r], t);
          for (int64_t s = 0; s < 3; ++s) store_raw(lanes[c][3 * r + s] + part, t[s]);
        }
      }
    }
    for (int64_t lane = 0; lane < outputs; ++lane) {
      float* to = grad + (first + lane) * filter.k_step + start * filter.c_step;
      for (int64_t tap = 0; tap < 9; ++tap) {
        float* weight = to + tap / 3 * filter.r_step + tap % 3 * filter.s_step;
        for (int64_t c = 0; c < channels; ++c) weight[c * filter.c_step] = lanes[c][tap][lane];
      }
    }
  }
}

constexpr ConvKernels table = {
    panel,    tile_rows,         width,     transform_input, transform_filter, transform_output, transform_gradient,
    filter_gradient, multiply, multiply_packed<tile_rows>, pack_rows, pack_panels, shift_add, fold_row};

}  // namespace

const ConvKernels* const CYCLEGAN_CONV = &table;

}  // namespace cyclegan
