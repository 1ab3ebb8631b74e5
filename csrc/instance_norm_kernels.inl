// The kernels of instance_norm_cpu.h for one instruction set. Each instance_norm_<isa>.cpp defines CYCLEGAN_KERNELS and
// includes this once, compiled with the flags of that instruction set. No standard library here: see vector.h.

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "geometry.h"
#include "instance_norm_kernels.h"

namespace cyclegan {
namespace {

#include "vector.h"

// Bytes of one tensor that a kernel goes over more than once while they are in the first-level cache.
constexpr int64_t block_bytes = 4 * 1024;

template <class T>
static inline int64_t block_pixels(int64_t c) {
  const int64_t pixels = block_bytes / (c * static_cast<int64_t>(sizeof(T)));
  return pixels < 16 ? 16 : pixels;
}

// The passes that stream ask for what they will need in a while; the hardware's own guesses stop at every page.
constexpr uintptr_t ahead_bytes = 4096;

static inline void prefetch_read(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead_bytes));
}

static inline void prefetch_write(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead_bytes), 1);
}

// Asks for the memory of a group of channels of each of `pixels` pixels, as if they were adjacent.
template <int pixels, int write = 0, class T>
static inline void prefetch_lines(const T* p, uintptr_t ahead = 0) {
  constexpr uintptr_t bytes = static_cast<uintptr_t>(pixels * group) * sizeof(T);
  // Past the end of an array, where nothing happens, pointers are no longer defined: numbers are.
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + ahead;
  for (uintptr_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + i), write);
}

// Calls step(i) for i in [0, count), and prepare(i) before every second one. Not unrolled further: pointers into every
// pixel would take all registers.
template <class Prepare, class Step>
static inline void two_by_two(int64_t count, Prepare prepare, Step step) {
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + 2 <= count; i += 2) {
    prepare(i);
    step(i);
    step(i + 1);
  }
  if (i < count) step(i);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls run(channel, whole, count) for each group of channels of a pixel; `whole` is a constant type.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class Run>
static inline void for_each_group(int64_t c, Run run) {
  int64_t channel = 0;
  for (; channel + group <= c; channel += group) run(channel, Yes{}, static_cast<int64_t>(group));
  if (channel < c) run(channel, No{}, c - channel);
}

// Sums of the deviations from `centre` and of their squares, of one group of channels over a block of pixels. Two
// pixels at a time into sums of their own: one chain of additions would wait for itself.
//
// `next` is this group's share of the block that follows: it comes, in order, while this one is worked on.
template <bool Whole, class T>
static inline void deviations(const T* x, const T* next, int64_t c, int64_t count, int64_t pixels, Pair centre,
                              Pair& first, Pair& second) {
  Pair sum[2] = {zeros(), zeros()}, squares[2] = {zeros(), zeros()};
  const auto add = [&](int64_t pixel, int k) {
    const Pair v = load_group<Whole>(x + pixel * c, count);
    const Vec a = v.a - centre.a, b = v.b - centre.b;
    sum[k].a += a;
    sum[k].b += b;
    squares[k].a += a * a;
    squares[k].b += b * b;
  };
  two_by_two(
      pixels, [&](int64_t i) { prefetch_lines<2>(next + i * group); }, [&](int64_t i) { add(i, i & 1); });
  first = {sum[0].a + sum[1].a, sum[0].b + sum[1].b};
  second = {squares[0].a + squares[1].a, squares[0].b + squares[1].b};
}

// Mean and squared deviations of a block from its sums: mean = centre + delta.
static inline void block_statistics(Pair first, Pair second, int64_t pixels, Pair& delta, Pair& m2) {
  const float inverse = 1.0f / static_cast<float>(pixels);
  delta = {first.a * inverse, first.b * inverse};
  const Vec a = second.a - first.a * delta.a, b = second.b - first.b * delta.b;
  m2 = {a < 0 ? Vec{} : a, b < 0 ? Vec{} : b};
}

static inline void merge(Vec& offset, Vec& m2, Vec other_offset, Vec other_m2, float share, float weight) {
  const Vec difference = other_offset - offset;
  offset += difference * share;
  m2 += other_m2 + difference * difference * weight;
}

template <class T>
static void statistics(const RowTask& task, int64_t n, int64_t first, int64_t last, float* origin, float* offset,
                       float* m2) {
  const Shape& s = task.shape;
  const T* x = static_cast<const T*>(task.x) + (n * s.h + first) * s.w * s.c;
  const int64_t total = (last - first) * s.w;
  const int64_t block = block_pixels<T>(s.c);
  for (int64_t done = 0; done < total; done += block) {
    const int64_t pixels = smaller(block, total - done);
    // Chan's formula for `done` pixels and `pixels` more.
    const float share = static_cast<float>(pixels) / static_cast<float>(done + pixels);
    const float weight = static_cast<float>(done) * share;
    for_each_group(s.c, [&](int64_t channel, auto whole, int64_t count) {
      constexpr bool Whole = decltype(whole)::value;
      const T* from = x + done * s.c;
      const T* next = from + pixels * (s.c + channel);
      Pair start, sum, squares, delta, m2_here;
      if (done == 0) {
        // The centre is any pixel at first, then the mean that follows from it.
        start = load_group<Whole>(from + channel, count);
        deviations<Whole>(from + channel, next, s.c, count, pixels, start, sum, squares);
        block_statistics(sum, squares, pixels, delta, m2_here);
        start = {start.a + delta.a, start.b + delta.b};
        deviations<Whole>(from + channel, next, s.c, count, pixels, start, sum, squares);
        block_statistics(sum, squares, pixels, delta, m2_here);
        store_lanes(origin + channel, start);
        store_lanes(offset + channel, delta);
        store_lanes(m2 + channel, m2_here);
        return;
      }
      // Relative to the first block's mean the offsets are small numbers, so that merging rounds little. The centre is
      // the mean so far: what a block loses by lying far from it is a rounding of what its distance adds to m2.
      start = load_lanes(origin + channel);
      Pair mean = load_lanes(offset + channel), m2_before = load_lanes(m2 + channel);
      const Pair centre = {start.a + mean.a, start.b + mean.b};
      deviations<Whole>(from + channel, next, s.c, count, pixels, centre, sum, squares);
      block_statistics(sum, squares, pixels, delta, m2_here);
      merge(mean.a, m2_before.a, (centre.a - start.a) + delta.a, m2_here.a, share, weight);
      merge(mean.b, m2_before.b, (centre.b - start.b) + delta.b, m2_here.b, share, weight);
      store_lanes(offset + channel, mean);
      store_lanes(m2 + channel, m2_before);
    });
  }
}

template <Activation act>
static inline Vec activate(Vec v, float slope) {
  const Vec zero = {};
  if constexpr (act == Activation::relu) return maximum(zero, v);
  if constexpr (act == Activation::leaky_relu) return v > zero ? v : v * slope;
  return v;
}

template <Activation act>
static inline Vec activation_gradient(Vec grad, Vec z, float slope) {
  const Vec zero = {};
  if constexpr (act == Activation::relu) return z <= zero ? zero : grad;
  if constexpr (act == Activation::leaky_relu) return z > zero ? grad : grad * slope;
  return grad;
}

// Pixels that share one reading of the channel parameters.
constexpr int64_t run_pixels = 4;

template <class T, Activation act, bool residual, bool exact = false>
static inline void forward_pixels(const T* x, const T* r, T* y, int64_t c, int64_t r_pixel, int64_t pixels, float slope,
                                  const ChannelParameters& p) {
  Halves<T, exact> halves;
  for_each_group(c, [&](int64_t channel, auto whole, int64_t count) {
    constexpr bool Whole = decltype(whole)::value;
    const Pair mean = load_lanes(p.mean + channel), scale = load_lanes(p.scale + channel);
    const Pair shift = load_lanes(p.shift + channel);
    const auto prefetch = [&](int64_t i) {
      prefetch_lines<2>(x + channel * pixels + i * group, ahead_bytes / 2);
      prefetch_lines<2, 1>(y + channel * pixels + i * group, ahead_bytes / 2);
      if constexpr (residual) prefetch_lines<2>(r + channel * pixels + i * group, ahead_bytes / 2);
    };
    two_by_two(pixels, prefetch, [&](int64_t i) {
      Pair v = load_group<Whole>(x + i * c + channel, count);
      v.a = activate<act>((v.a - mean.a) * scale.a + shift.a, slope);
      v.b = activate<act>((v.b - mean.b) * scale.b + shift.b, slope);
      if constexpr (residual) {
        const Pair more = load_group<Whole>(r + i * r_pixel + channel, count);
        v.a += more.a;
        v.b += more.b;
      }
      store_group<Whole>(y + i * c + channel, v, count, halves);
    });
  });
  if (halves.met()) again([&] { forward_pixels<T, act, residual, true>(x, r, y, c, r_pixel, pixels, slope, p); });
}

// The mirrored columns of a padded row whose interior is written, then the rows that mirror it.
template <class T>
static inline void reflect_row(T* picture, int64_t h, const Shape& s) {
  const int64_t wp = s.padded_w();
  const size_t pixel_bytes = static_cast<size_t>(s.c) * sizeof(T), row_bytes = pixel_bytes * static_cast<size_t>(wp);
  int64_t rows[3];
  const int count = padded_positions(h, s.h, s.pad, rows);
  T* row = picture + rows[0] * wp * s.c;
  for (int64_t k = 1; k <= s.pad; ++k) {
    const int64_t left = s.pad - k, right = s.pad + s.w - 1 + k;
    __builtin_memcpy(row + left * s.c, row + (s.pad + reflect(-k, s.w)) * s.c, pixel_bytes);
    __builtin_memcpy(row + right * s.c, row + (s.pad + reflect(s.w - 1 + k, s.w)) * s.c, pixel_bytes);
  }
  for (int i = 1; i < count; ++i) __builtin_memcpy(picture + rows[i] * wp * s.c, row, row_bytes);
}

template <class T, Activation act, bool residual>
static void forward_rows_as(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last) {
  const Shape& s = task.shape;
  T* picture = static_cast<T*>(task.y) + n * s.padded_h() * s.padded_w() * s.c;
  // Backwards: the rows that the statistics read last are still in the cache.
  for (int64_t h = last - 1; h >= first; --h) {
    const T* x = static_cast<const T*>(task.x) + (n * s.h + h) * s.w * s.c;
    const T* r = nullptr;
    if constexpr (residual) {
      r = static_cast<const T*>(task.residual) + n * task.residual_pitch.image + h * task.residual_pitch.row;
    }
    T* y = picture + ((h + s.pad) * s.padded_w() + s.pad) * s.c;
    const int64_t r_pixel = task.residual_pitch.pixel;
    for (int64_t w = 0; w < s.w; w += run_pixels) {
      forward_pixels<T, act, residual>(x + w * s.c, residual ? r + w * r_pixel : r, y + w * s.c, s.c, r_pixel,
                                       smaller(run_pixels, s.w - w), task.slope, p);
    }
    reflect_row(picture, h, s);
  }
}

template <class T>
static void forward_rows(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last) {
  const bool residual = task.residual != nullptr;
  switch (task.activation) {
    case Activation::none:
      return residual ? forward_rows_as<T, Activation::none, true>(task, p, n, first, last)
                      : forward_rows_as<T, Activation::none, false>(task, p, n, first, last);
    case Activation::relu:
      return residual ? forward_rows_as<T, Activation::relu, true>(task, p, n, first, last)
                      : forward_rows_as<T, Activation::relu, false>(task, p, n, first, last);
    case Activation::leaky_relu:
      return residual ? forward_rows_as<T, Activation::leaky_relu, true>(task, p, n, first, last)
                      : forward_rows_as<T, Activation::leaky_relu, false>(task, p, n, first, last);
  }
}

// The gradient of unpadded pixels: where it lies in grad_y with one source each, or folded in float32.
template <class T>
struct Direct {
  const T* grad;
  int64_t c;
  template <bool Whole>
  inline Pair get(int64_t pixel, int64_t channel, int64_t count) const {
    return load_group<Whole>(grad + pixel * c + channel, count);
  }
  inline void prefetch(int64_t element) const { __builtin_prefetch(grad + element); }
  // The gradient of a pixel as T.
  template <bool Whole>
  inline void put(T* to, int64_t pixel, int64_t channel, int64_t count, Pair) const {
    const int64_t channels = Whole ? group : count;
    __builtin_memcpy(to, grad + pixel * c + channel, static_cast<size_t>(channels) * sizeof(T));
  }
  inline void prefetch_ahead(int64_t pixel, int64_t channel) const { prefetch_read(grad + pixel * c + channel); }
};

struct Folded {
  const float* grad;
  int64_t lanes;
  template <bool Whole>
  inline Pair get(int64_t pixel, int64_t channel, int64_t) const {
    return load_lanes(grad + pixel * lanes + channel);
  }
  inline void prefetch(int64_t) const {}
  template <bool Whole, class T>
  inline void put(T* to, int64_t, int64_t, int64_t count, Pair v) const {
    store_group<Whole>(to, v, count);
  }
  inline void prefetch_ahead(int64_t, int64_t) const {}
};

// The sum over all places where pixels [first, first + pixels) of a row stand in the padded gradient, or over all but
// the pixels themselves.
template <class T>
static void fold(const T* grad, const Shape& s, int64_t lanes, const int64_t* rows, int row_count, int64_t first,
                 int64_t pixels, bool mirrored_only, float* scratch) {
  for (int64_t i = 0; i < pixels; ++i) {
    int64_t columns[3];
    const int column_count = padded_positions(first + i, s.w, s.pad, columns);
    for_each_group(s.c, [&](int64_t channel, auto whole, int64_t count) {
      Pair sum = zeros();
      for (int r = 0; r < row_count; ++r) {
        for (int k = mirrored_only && r == 0 ? 1 : 0; k < column_count; ++k) {
          const T* at = grad + (rows[r] * s.padded_w() + columns[k]) * s.c + channel;
          const Pair v = load_group<decltype(whole)::value>(at, count);
          sum.a += v.a;
          sum.b += v.b;
        }
      }
      store_lanes(scratch + i * lanes + channel, sum);
    });
  }
}

// Calls run(first, pixels, gradient) for row h. A row that mirrors no other goes as one long run on grad_y itself; its
// few columns with mirror images follow, either again with their whole gradient (`add` false: what a run writes is
// overwritten), or with what their images add to it (`add` true: runs are summed).
template <bool add, class T, class Run>
static inline void for_each_run(const RowTask& task, int64_t n, int64_t h, float* scratch, Run run) {
  const Shape& s = task.shape;
  const T* grad = static_cast<const T*>(task.grad_y) + n * s.padded_h() * s.padded_w() * s.c;
  int64_t rows[3];
  const int row_count = padded_positions(h, s.h, s.pad, rows);
  const auto folded = [&](int64_t first, int64_t last, bool mirrored_only) {
    for (; first < last; first += fold_pixels) {
      const int64_t pixels = smaller(fold_pixels, last - first);
      fold(grad, s, task.lanes, rows, row_count, first, pixels, mirrored_only, scratch);
      run(first, pixels, Folded{scratch, task.lanes});
    }
  };
  // In a row shorter than this a pixel may have images on both sides.
  if (s.pad > 0 && (row_count > 1 || s.w < 2 * s.pad + 2)) return folded(0, s.w, false);
  run(0, s.w, Direct<T>{grad + (rows[0] * s.padded_w() + s.pad) * s.c, s.c});
  folded(1, s.pad + 1, add);
  folded(s.w - 1 - s.pad, s.w - 1, add);
}

template <class T, Activation act, bool Whole, class Gradient>
static inline void sum_group(const T* x, const Gradient& gradient, int64_t c, int64_t first, int64_t pixels,
                             int64_t channel, int64_t count, float slope, const ChannelParameters& p, float* sum,
                             float* sum_x) {
  const Pair mean = load_lanes(p.mean + channel), scale = load_lanes(p.scale + channel);
  const Pair shift = load_lanes(p.shift + channel);
  Pair plain = load_lanes(sum + channel), product = load_lanes(sum_x + channel);
  for (int64_t i = first; i < first + pixels; ++i) {
    // This group's share of the next block comes, in order, while this one is summed.
    const int64_t next = (first + pixels) * c + channel * pixels + (i - first) * group;
    __builtin_prefetch(x + next);
    gradient.prefetch(next);
    const Pair v = load_group<Whole>(x + i * c + channel, count);
    Pair d = gradient.template get<Whole>(i, channel, count);
    const Vec a = v.a - mean.a, b = v.b - mean.b;
    d.a = activation_gradient<act>(d.a, a * scale.a + shift.a, slope);
    d.b = activation_gradient<act>(d.b, b * scale.b + shift.b, slope);
    plain.a += d.a;
    plain.b += d.b;
    product.a += d.a * a;
    product.b += d.b * b;
  }
  store_lanes(sum + channel, plain);
  store_lanes(sum_x + channel, product);
}

template <class T, Activation act>
static void gradient_sums_as(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last,
                             float* scratch, float* sum, float* sum_x) {
  const Shape& s = task.shape;
  for (int64_t i = 0; i < task.lanes; ++i) sum[i] = sum_x[i] = 0.0f;
  const int64_t block = block_pixels<T>(s.c);
  for (int64_t h = first; h < last; ++h) {
    const T* row = static_cast<const T*>(task.x) + (n * s.h + h) * s.w * s.c;
    for_each_run<true, T>(task, n, h, scratch, [&](int64_t start, int64_t pixels, const auto& gradient) {
      const T* x = row + start * s.c;
      for (int64_t at = 0; at < pixels; at += block) {
        const int64_t some = smaller(block, pixels - at);
        for_each_group(s.c, [&](int64_t channel, auto whole, int64_t count) {
          sum_group<T, act, decltype(whole)::value>(x, gradient, s.c, at, some, channel, count, task.slope, p, sum,
                                                    sum_x);
        });
      }
    });
  }
}

template <class T>
static void gradient_sums(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last,
                          float* scratch, float* sum, float* sum_x) {
  switch (task.activation) {
    case Activation::none:
      return gradient_sums_as<T, Activation::none>(task, p, n, first, last, scratch, sum, sum_x);
    case Activation::relu:
      return gradient_sums_as<T, Activation::relu>(task, p, n, first, last, scratch, sum, sum_x);
    case Activation::leaky_relu:
      return gradient_sums_as<T, Activation::leaky_relu>(task, p, n, first, last, scratch, sum, sum_x);
  }
}

template <class T, Activation act, bool residual, bool exact = false, class Gradient>
static inline void gradient_pixels(const T* x, const Gradient& gradient, T* grad_x, T* grad_residual, int64_t c,
                                   int64_t first, int64_t pixels, float slope, const ChannelParameters& p) {
  Halves<T, exact> halves;
  for_each_group(c, [&](int64_t channel, auto whole, int64_t count) {
    constexpr bool Whole = decltype(whole)::value;
    const Pair mean = load_lanes(p.mean + channel), scale = load_lanes(p.scale + channel);
    const Pair shift = load_lanes(p.shift + channel), constant = load_lanes(p.constant + channel);
    const Pair tilt = load_lanes(p.slope + channel);
    for (int64_t i = first; i < first + pixels; ++i) {
      prefetch_read(x + i * c + channel);
      gradient.prefetch_ahead(i, channel);
      prefetch_write(grad_x + i * c + channel);
      const Pair v = load_group<Whole>(x + i * c + channel, count);
      Pair d = gradient.template get<Whole>(i, channel, count);
      if constexpr (residual) {
        prefetch_write(grad_residual + i * c + channel);
        gradient.template put<Whole>(grad_residual + i * c + channel, i, channel, count, d);
      }
      const Vec a = v.a - mean.a, b = v.b - mean.b;
      d.a = activation_gradient<act>(d.a, a * scale.a + shift.a, slope);
      d.b = activation_gradient<act>(d.b, b * scale.b + shift.b, slope);
      d.a = scale.a * d.a + (tilt.a * a + constant.a);
      d.b = scale.b * d.b + (tilt.b * b + constant.b);
      store_group<Whole>(grad_x + i * c + channel, d, count, halves);
    }
  });
  if (halves.met()) {
    again([&] {
      gradient_pixels<T, act, residual, true>(x, gradient, grad_x, grad_residual, c, first, pixels, slope, p);
    });
  }
}

template <class T, Activation act, bool residual>
static void gradient_rows_as(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last,
                             float* scratch) {
  const Shape& s = task.shape;
  // Backwards, as in forward_rows_as.
  for (int64_t h = last - 1; h >= first; --h) {
    const int64_t row = (n * s.h + h) * s.w;
    for_each_run<false, T>(task, n, h, scratch, [&](int64_t start, int64_t pixels, const auto& gradient) {
      const int64_t offset = (row + start) * s.c;
      const T* x = static_cast<const T*>(task.x) + offset;
      T* grad_x = static_cast<T*>(task.grad_x) + offset;
      T* grad_residual = residual ? static_cast<T*>(task.grad_residual) + offset : nullptr;
      int64_t i = 0;
      for (; i + 4 <= pixels; i += 4) {
        gradient_pixels<T, act, residual>(x, gradient, grad_x, grad_residual, s.c, i, 4, task.slope, p);
      }
      if (i < pixels) {
        gradient_pixels<T, act, residual>(x, gradient, grad_x, grad_residual, s.c, i, pixels - i, task.slope, p);
      }
    });
  }
}

template <class T>
static void gradient_rows(const RowTask& task, const ChannelParameters& p, int64_t n, int64_t first, int64_t last,
                          float* scratch) {
  const bool residual = task.grad_residual != nullptr;
  switch (task.activation) {
    case Activation::none:
      return residual ? gradient_rows_as<T, Activation::none, true>(task, p, n, first, last, scratch)
                      : gradient_rows_as<T, Activation::none, false>(task, p, n, first, last, scratch);
    case Activation::relu:
      return residual ? gradient_rows_as<T, Activation::relu, true>(task, p, n, first, last, scratch)
                      : gradient_rows_as<T, Activation::relu, false>(task, p, n, first, last, scratch);
    case Activation::leaky_relu:
      return residual ? gradient_rows_as<T, Activation::leaky_relu, true>(task, p, n, first, last, scratch)
                      : gradient_rows_as<T, Activation::leaky_relu, false>(task, p, n, first, last, scratch);
  }
}

template <class T>
constexpr Kernels kernels_for(bool interleaved) {
  return {group, interleaved, statistics<T>, forward_rows<T>, gradient_sums<T>, gradient_rows<T>};
}

constexpr Kernels table[2] = {kernels_for<float>(false), kernels_for<BFloat16>(interleaved_bfloat16)};

}  // namespace

const Kernels* const CYCLEGAN_KERNELS = table;

}  // namespace cyclegan
