// Runs the convolutions on buffers of exactly their size, for the sanitizers (`make sanitize`), and checks them against
// the plainest computation in double. No PyTorch.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../conv_cpu.h"
#include "driver.h"

namespace {

using namespace cyclegan;
using Floats = std::vector<float>;

Floats random_floats(int64_t count) {
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = random_float();
  return values;
}

Floats unwritten(int64_t count) {
  return Floats(static_cast<size_t>(count), std::numeric_limits<float>::quiet_NaN());
}

struct Case {
  int64_t n, c, k, h, w, size, stride, border;
  bool reflect;
  int64_t rows() const { return (h + 2 * border - size) / stride + 1; }
  int64_t columns() const { return (w + 2 * border - size) / stride + 1; }
  int64_t x_count() const { return n * h * w * c; }
  int64_t y_count() const { return n * rows() * columns() * k; }
  int64_t weight_count() const { return k * c * size * size; }
  Pictures pictures(const Floats& x) const { return {x.data(), n, h, w, c, border, reflect, nullptr}; }
  // [K, C, size, size] as it comes, or channels-last.
  Filter filter(const float* data, bool channels_last) const {
    if (channels_last) return {data, k, c, size * size * c, 1, size * c, c};
    return {data, k, c, size * size * c, size * size, size, 1};
  }
};

// Calls run(pixel of x, pixel of y, tap) for every pair that meets in the convolution.
template <class Run>
void for_each_pair(const Case& t, Run run) {
  for (int64_t n = 0; n < t.n; ++n) {
    for (int64_t i = 0; i < t.rows() * t.columns(); ++i) {
      for (int64_t tap = 0; tap < t.size * t.size; ++tap) {
        int64_t row = i / t.columns() * t.stride + tap / t.size - t.border;
        int64_t column = i % t.columns() * t.stride + tap % t.size - t.border;
        if (t.reflect) {
          row = reflect(row, t.h);
          column = reflect(column, t.w);
        }
        if (row < 0 || row >= t.h || column < 0 || column >= t.w) continue;
        run((n * t.h + row) * t.w + column, n * t.rows() * t.columns() + i, tap);
      }
    }
  }
}

// Everything that the convolution has, in double.
struct Truth {
  std::vector<double> y, grad_x, grad_weight;
  Truth(const Case& t, const Floats& x, const Floats& weight, const Floats& bias, const Floats& grad_y)
      : y(static_cast<size_t>(t.y_count())),
        grad_x(static_cast<size_t>(t.x_count())),
        grad_weight(static_cast<size_t>(t.weight_count())) {
    for (size_t i = 0; i < y.size(); ++i) y[i] = static_cast<double>(bias[i % static_cast<size_t>(t.k)]);
    for_each_pair(t, [&](int64_t from, int64_t to, int64_t tap) {
      for (int64_t k = 0; k < t.k; ++k) {
        for (int64_t c = 0; c < t.c; ++c) {
          const size_t at = static_cast<size_t>((k * t.c + c) * t.size * t.size + tap);
          const size_t in = static_cast<size_t>(from * t.c + c), out = static_cast<size_t>(to * t.k + k);
          y[out] += static_cast<double>(weight[at]) * static_cast<double>(x[in]);
          grad_x[in] += static_cast<double>(weight[at]) * static_cast<double>(grad_y[out]);
          grad_weight[at] += static_cast<double>(grad_y[out]) * static_cast<double>(x[in]);
        }
      }
    });
  }
};

void expect_near(const Floats& result, const std::vector<double>& wanted, const char* what) {
  double largest = 0;
  for (const double value : wanted) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < wanted.size(); ++i) {
    expect(std::abs(static_cast<double>(result[i]) - wanted[i]) <= 2e-5 * largest, what, static_cast<int64_t>(i));
  }
}

Floats weight_gradient(const Case& t, const Floats& x, const Floats& grad_y, bool swap) {
  Floats grad = unwritten(t.weight_count());
  Filter to = t.filter(nullptr, false);
  const Pictures g{grad_y.data(), t.n, t.rows(), t.columns(), t.k, swap ? t.size - 1 : 0, false, nullptr};
  if (!swap) {
    conv_weight_gradient({t.pictures(x), g, t.size, t.stride, to, grad.data()}, parallel_for);
  } else {
    const Filter turned{nullptr, to.c, to.k, to.c_step, to.k_step, -to.r_step, -to.s_step};
    float* const corner = grad.data() + (t.size - 1) * (to.r_step + to.s_step);
    conv_weight_gradient({g, t.pictures(x), t.size, t.stride, turned, corner}, parallel_for);
  }
  return grad;
}

void check_3x3(const Case& t, const Floats& x, const Floats& weight, const Floats& bias, const Floats& grad_y,
               const Truth& truth) {
  Floats y = unwritten(t.y_count()), grad_x = unwritten(t.x_count()), grad = unwritten(t.weight_count());
  const Filter filter = t.filter(weight.data(), false);
  conv3x3({t.pictures(x), filter, bias.data(), Finish::none, y.data()}, parallel_for);
  expect_near(y, truth.y, "y of 3x3");
  conv3x3_input_gradient({t.n, t.h, t.w, t.border, t.reflect, filter, grad_y.data(), grad_x.data()}, parallel_for);
  expect_near(grad_x, truth.grad_x, "grad_x of 3x3");
  conv3x3_weight_gradient(t.pictures(x), grad_y.data(), filter, grad.data(), parallel_for);
  expect_near(grad, truth.grad_weight, "grad_weight of 3x3");
}

void check_thin(const Case& t, const Floats& x, const Floats& weight, const Floats& bias, const Floats& grad_y,
                const Truth& truth) {
  const Filter filter = t.filter(weight.data(), false);
  if (t.k <= thin_outputs) {
    Floats y = unwritten(t.y_count());
    thin_conv({t.pictures(x), filter, t.size, bias.data(), Finish::none, y.data()}, parallel_for);
    expect_near(y, truth.y, "y of a thin convolution");
  }
  if (t.c <= thin_outputs && t.reflect) {
    Floats grad_x = unwritten(t.x_count());
    thin_input_gradient({t.n, t.h, t.w, t.border, t.reflect, filter, grad_y.data(), grad_x.data()}, t.size,
                        parallel_for);
    expect_near(grad_x, truth.grad_x, "grad_x of a thin convolution");
  }
}

void check(const Case& t) {
  const Floats x = random_floats(t.x_count()), weight = random_floats(t.weight_count());
  const Floats bias = random_floats(t.k), grad_y = random_floats(t.y_count());
  const Truth truth(t, x, weight, bias, grad_y);
  Floats first;
  for (const int count : {1, 3}) {
    threads = count;
    const Floats grad = weight_gradient(t, x, grad_y, false);
    expect_near(grad, truth.grad_weight, "grad_weight");
    if (count == 1) first = grad;
    expect(first == grad, "the same bits with three threads", t.c);
    if (t.stride > 1) continue;
    expect_near(weight_gradient(t, x, grad_y, true), truth.grad_weight, "grad_weight, swapped");
    if (t.size == 3 && (t.reflect || t.border <= 2)) check_3x3(t, x, weight, bias, grad_y, truth);
    check_thin(t, x, weight, bias, grad_y, truth);
  }
}

}  // namespace

int main() {
  const Case cases[] = {{1, 16, 16, 9, 8, 3, 1, 1, true},  {2, 5, 7, 3, 2, 3, 1, 1, true},  {1, 3, 33, 3, 3, 3, 1, 0, true},
                        {1, 17, 3, 4, 5, 3, 1, 2, true},   {2, 9, 4, 6, 5, 3, 1, 1, false}, {1, 3, 20, 7, 6, 7, 1, 3, true},
                        {1, 20, 2, 5, 7, 7, 1, 3, true},   {1, 7, 9, 9, 8, 3, 2, 1, false}, {2, 6, 1, 5, 6, 4, 1, 1, false},
                        {1, 13, 5, 11, 7, 5, 3, 2, false}, {1, 4, 6, 5, 5, 1, 1, 0, true},  {1, 8, 8, 130, 6, 3, 1, 1, true},
                        {1, 270, 8, 4, 4, 3, 1, 0, true}};
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    expect(set_isa(static_cast<Isa>(isa)), "set_isa", isa);
    for (const Case& test : cases) check(test);
  }
  if (failures) return EXIT_FAILURE;
  std::printf("all checks of the convolutions passed; instruction sets up to %d\n", static_cast<int>(best_isa()));
  return EXIT_SUCCESS;
}
