// What the kernels compiled for one instruction set offer to the driver in conv_cpu.cpp.
#pragma once

#include <cstdint>

namespace cyclegan {

// Winograd's F(4x4, 3x3): 6x6 numbers of a tile stand for 4x4 results.
constexpr int64_t tile_in = 6, tile_out = 4, frequencies = tile_in * tile_in;

// Pictures [N, H, W, C] dense, with a border of `border` pixels around each that is never stored.
struct Pictures {
  const float* data;
  int64_t n, h, w, c, border;
  bool reflect;        // what the border shows: the reflected picture, or zeros
  const float* zeros;  // [c]
};

// Tiles of the results [N, rows, columns, K].
struct Tiles {
  int64_t rows, columns;  // of results
  int64_t down, across;   // of tiles
};

// A filter; weight[k, c, r, s] stands at data[k * k_step + c * c_step + r * r_step + s * s_step].
struct Filter {
  const float* data;
  int64_t k, c, k_step, c_step, r_step, s_step;
};

enum class Finish : int { none = 0, relu = 1 };

struct ConvKernels {
  int64_t panel;  // columns of the product of two matrices that are computed at once
  int64_t rows;   // its rows
  int64_t width;  // numbers in a vector

  // Tiles [first, last) of x into v[frequency * plane + (tile - first) * pitch + channel].
  void (*transform_input)(const Pictures& x, const Tiles& tiles, int64_t first, int64_t last, float* v, int64_t plane,
                          int64_t pitch);
  // Outputs [panel * `at`, panel * (at + 1)) of the filter into u[frequency * plane + (at * c + channel) * panel + lane].
  void (*transform_filter)(const Filter& filter, int64_t at, float* u, int64_t plane);
  // Tiles [first, last): results from m[frequency * plane + (tile - first) * pitch + k], with bias [k] or null.
  void (*transform_output)(const float* m, int64_t plane, int64_t pitch, const Tiles& tiles, int64_t first,
                           int64_t last, const float* bias, Finish finish, float* y, int64_t k);
  // Tiles [first, last) of a gradient [N, rows, columns, K], transposed to transform_output, into
  // z[frequency * plane + (k / panel) * panel_plane + (tile - first) * panel + k % panel], zeros behind K.
  void (*transform_gradient)(const float* grad, int64_t k, const Tiles& tiles, int64_t first, int64_t last, float* z,
                             int64_t plane, int64_t panel_plane);
  // Transposed to transform_filter: sums [frequency * plane + channel * pitch + k] into the gradient of outputs
  // [panel * `at`, panel * (at + 1)) of the filter.
  void (*filter_gradient)(const float* sums, int64_t plane, int64_t pitch, const Filter& filter, int64_t at,
                          float* grad);
  // out[i * out_pitch + j] (+)= sum over l < depth of a[i * a_pitch + l] * b[l * panel + j], i < rows, j < panel.
  void (*multiply)(const float* a, int64_t a_pitch, const float* b, int64_t depth, float* out, int64_t out_pitch,
                   int64_t rows, bool add);
  // The same with both matrices in panels, and a depth of `segments` pieces: out[i * out_pitch + j] (+)= sum over
  // t < segments, l < depth of a[t * a_segment + l * a_step + i] * b[(t * depth + l) * panel + j].
  void (*multiply_packed)(const float* a, int64_t a_step, int64_t a_segment, const float* b, int64_t segments,
                          int64_t depth, float* out, int64_t out_pitch, int64_t rows, bool add);
  // Panels of `rows` of the `count` numbers at from + i * step, i < length: to[(j / rows * length + i) * rows + j % rows].
  // Behind the last one stands what was there.
  void (*pack_rows)(const float* from, int64_t step, int64_t length, int64_t count, float* to);
  // Panels of `panel` numbers, zeros behind the last: to[j / panel * panel_plane + i * panel + j % panel].
  void (*pack_panels)(const float* from, int64_t step, int64_t length, int64_t count, float* to, int64_t panel_plane);
  // Sums of products with taps of one row: sums[i * 4 + k] (+)= sum over s < size of t[(i + s) * pitch + s * k_count + k],
  // i < length; k runs to 4, and what stands behind k_count means nothing.
  void (*shift_add)(const float* t, int64_t pitch, int64_t size, int64_t k_count, int64_t length, float* sums,
                    bool add);
  // Row h of the picture whose padded gradient is `padded`: each pixel sums the places where it stands in that.
  void (*fold_row)(const float* padded, int64_t h, int64_t w, int64_t c, int64_t border, int64_t row, float* to);
};

extern const ConvKernels* const conv_portable;
extern const ConvKernels* const conv_avx2;
extern const ConvKernels* const conv_avx512;

}  // namespace cyclegan
