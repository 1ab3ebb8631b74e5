// Runs the CPU kernels on buffers of exactly their size, for the sanitizers (`make sanitize`), and checks them against
// the plainest computation in double; then the index arithmetic and the plans of the CUDA kernels. No PyTorch.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../crop_flip_cpu.h"
#include "../instance_norm_cpu.h"
#include "../instance_norm_cuda.h"
#include "driver.h"

namespace {

using namespace cyclegan;

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// A tensor of either type on memory of exactly its size, which starts out as NaN.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count) * (single() ? 4 : 2), 0xff) {}
  bool single() const { return dtype_ == DType::float32; }
  void* data() { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  float get(int64_t i) const {
    float wide;
    uint16_t half;
    if (single()) {
      std::memcpy(&wide, bytes_.data() + 4 * i, 4);
      return wide;
    }
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    return from_bfloat16(half);
  }
  void set(int64_t i, float value) {
    const uint16_t half = to_bfloat16(value);
    if (single()) {
      std::memcpy(bytes_.data() + 4 * i, &value, 4);
    } else {
      std::memcpy(bytes_.data() + 2 * i, &half, 2);
    }
  }
  void randomise() {
    const int64_t count = static_cast<int64_t>(bytes_.size() / (single() ? 4 : 2));
    for (int64_t i = 0; i < count; ++i) set(i, random_float());
  }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

struct Case {
  Shape shape;
  DType dtype;
  Activation activation;
  bool residual, affine;
};

double activate(double v, Activation activation) {
  if (activation == Activation::none || v > 0) return v;
  return activation == Activation::relu ? 0.0 : 0.2 * v;
}

double slope_at(double v, Activation activation) {
  if (activation == Activation::none || v > 0) return 1.0;
  return activation == Activation::relu ? 0.0 : 0.2;
}

// All results of both directions, and the same in double.
struct Run {
  Array y, grad_x, grad_residual;
  std::vector<float> mean, rstd, grad_weight, grad_bias;
};

void check_channel(const Case& test, const Array& x, const Array& residual, const Array& grad_y, Run& run,
                   double weight, double bias, int64_t n, int64_t c) {
  const Shape& s = test.shape;
  const double tolerance = test.dtype == DType::float32 ? 2e-5 : 1.0 / 128, positions = static_cast<double>(s.h * s.w);
  const auto pixel = [&](int64_t h, int64_t w) { return ((n * s.h + h) * s.w + w) * s.c + c; };
  const auto padded = [&](int64_t h, int64_t w) { return ((n * s.padded_h() + h) * s.padded_w() + w) * s.c + c; };
  double mean = 0, variance = 0;
  for (int64_t h = 0; h < s.h; ++h)
    for (int64_t w = 0; w < s.w; ++w) mean += static_cast<double>(x.get(pixel(h, w))) / positions;
  for (int64_t h = 0; h < s.h; ++h)
    for (int64_t w = 0; w < s.w; ++w) variance += std::pow(static_cast<double>(x.get(pixel(h, w))) - mean, 2) / positions;
  const double rstd = 1 / std::sqrt(variance + 1e-5);
  std::vector<double> grad(static_cast<size_t>(s.h * s.w), 0.0);
  for (int64_t h = 0; h < s.padded_h(); ++h) {
    for (int64_t w = 0; w < s.padded_w(); ++w) {
      const int64_t from_h = reflect(h - s.pad, s.h), from_w = reflect(w - s.pad, s.w);
      const double z = (static_cast<double>(x.get(pixel(from_h, from_w))) - mean) * rstd * weight + bias;
      const double wanted = activate(z, test.activation) +
                            (test.residual ? static_cast<double>(residual.get(pixel(from_h, from_w))) : 0.0);
      const double got = static_cast<double>(run.y.get(padded(h, w)));
      expect(std::abs(got - wanted) <= tolerance * std::max(1.0, std::abs(wanted)), "y", padded(h, w));
      grad[static_cast<size_t>(from_h * s.w + from_w)] += static_cast<double>(grad_y.get(padded(h, w)));
    }
  }
  double sum = 0, product = 0;
  const auto normal = [&](int64_t i) { return (static_cast<double>(x.get(pixel(i / s.w, i % s.w))) - mean) * rstd; };
  for (int64_t i = 0; i < s.h * s.w; ++i) {
    const double d = grad[static_cast<size_t>(i)] * slope_at(normal(i) * weight + bias, test.activation);
    sum += d;
    product += d * normal(i);
  }
  for (int64_t i = 0; i < s.h * s.w; ++i) {
    const double folded = grad[static_cast<size_t>(i)];
    const double d = folded * slope_at(normal(i) * weight + bias, test.activation);
    const double wanted = weight * rstd * (d - sum / positions - normal(i) * product / positions);
    const double got = static_cast<double>(run.grad_x.get(pixel(i / s.w, i % s.w)));
    const bool kink = test.activation != Activation::none && std::abs(normal(i) * weight + bias) < 1e-5;
    expect(kink || std::abs(got - wanted) <= 4 * tolerance * std::max(1.0, std::abs(rstd) * 4), "grad_x", i);
    if (!test.residual) continue;
    const double residual_got = static_cast<double>(run.grad_residual.get(pixel(i / s.w, i % s.w)));
    expect(std::abs(residual_got - folded) <= tolerance * std::max(1.0, std::abs(folded)), "grad_residual", i);
  }
}

Run run_both(const Case& test, Array& x, Array& residual, Array& grad_y, const std::vector<float>& weight,
             const std::vector<float>& bias) {
  const Shape& s = test.shape;
  const int64_t inside = s.n * s.h * s.w * s.c, outside = s.n * s.padded_h() * s.padded_w() * s.c;
  const size_t channels = static_cast<size_t>(s.c), all = static_cast<size_t>(s.n * s.c);
  Run run{Array(test.dtype, outside), Array(test.dtype, inside), Array(test.dtype, inside), std::vector<float>(all),
          std::vector<float>(all), std::vector<float>(channels), std::vector<float>(channels)};
  const float* w = test.affine ? weight.data() : nullptr;
  const float* b = test.affine ? bias.data() : nullptr;
  ForwardProblem forward{s, test.dtype, test.activation, 0.2f, 1e-5, x.data(), test.residual ? residual.data() : nullptr,
                         {s.h * s.w * s.c, s.w * s.c, s.c}, w, b, run.y.data(), run.mean.data(), run.rstd.data()};
  instance_norm_forward(forward, parallel_for);
  BackwardProblem backward{s, test.dtype, test.activation, 0.2f, grad_y.data(), x.data(), run.mean.data(),
                           run.rstd.data(), w, b, run.grad_x.data(), test.residual ? run.grad_residual.data() : nullptr,
                           test.affine ? run.grad_weight.data() : nullptr, test.affine ? run.grad_bias.data() : nullptr};
  instance_norm_backward(backward, parallel_for);
  return run;
}

void check(const Case& test) {
  const Shape& s = test.shape;
  Array x(test.dtype, s.n * s.h * s.w * s.c), residual(test.dtype, s.n * s.h * s.w * s.c);
  Array grad_y(test.dtype, s.n * s.padded_h() * s.padded_w() * s.c);
  x.randomise();
  residual.randomise();
  grad_y.randomise();
  std::vector<float> weight(static_cast<size_t>(s.c)), bias(static_cast<size_t>(s.c));
  for (float& value : weight) value = 1.0f + 0.5f * random_float();
  for (float& value : bias) value = 0.5f * random_float();
  threads = 1;
  Run run = run_both(test, x, residual, grad_y, weight, bias);
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t c = 0; c < s.c; ++c) {
      const size_t at = static_cast<size_t>(c);
      check_channel(test, x, residual, grad_y, run, test.affine ? static_cast<double>(weight[at]) : 1.0,
                    test.affine ? static_cast<double>(bias[at]) : 0.0, n, c);
    }
  }
  threads = 3;
  const Run again = run_both(test, x, residual, grad_y, weight, bias);
  expect(run.y.bytes() == again.y.bytes() && run.grad_x.bytes() == again.grad_x.bytes() &&
             run.grad_weight == again.grad_weight && run.mean == again.mean && run.rstd == again.rstd,
         "the same bits with three threads", s.c);
}

void check_kernels() {
  const Shape shapes[] = {{1, 9, 8, 64, 3},  {2, 4, 4, 33, 3}, {1, 7, 6, 5, 1},   {1, 5, 9, 17, 2},
                          {3, 1, 7, 3, 0},   {2, 2, 2, 8, 1},  {1, 60, 50, 48, 3}, {2, 3, 3, 513, 2},
                          {1, 130, 96, 16, 1}};
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    expect(set_isa(static_cast<Isa>(isa)), "set_isa", isa);
    int turn = 0;
    for (const Shape& shape : shapes) {
      for (const DType dtype : {DType::float32, DType::bfloat16}) {
        for (const Activation activation : {Activation::none, Activation::relu, Activation::leaky_relu}) {
          check({shape, dtype, activation, turn % 2 == 0, turn % 3 == 0});
          ++turn;
        }
      }
    }
  }
}

void check_geometry() {
  for (int64_t size = 1; size <= 9; ++size) {
    for (int64_t pad = 0; pad < size; ++pad) {
      std::vector<int> seen(static_cast<size_t>(size + 2 * pad), 0);
      for (int64_t i = 0; i < size; ++i) {
        int64_t at[3];
        const int count = padded_positions(i, size, pad, at);
        expect(mirrored(i, size, pad) == (count > 1), "mirrored", i);
        for (int k = 0; k < count; ++k) {
          expect(reflect(at[k] - pad, size) == i, "a mirror image's source", i);
          ++seen[static_cast<size_t>(at[k])];
        }
      }
      for (const int times : seen) expect(times == 1, "every padded position has one source", size);
    }
  }
  for (int64_t count = 0; count <= 20; ++count) {
    for (int64_t parts = 1; parts <= 7; ++parts) {
      expect(part_begin(0, parts, count) == 0 && part_begin(parts, parts, count) == count, "parts cover", count);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t length = part_begin(i + 1, parts, count) - part_begin(i, parts, count);
        expect(length >= 0 && length <= ceil_div(count, parts), "a part's length", count);
      }
    }
  }
}

void check_plans() {
  const CudaDevice h200{132, 232448, true}, a100{108, 166912, false};
  const Shape shapes[] = {{1, 256, 256, 64, 3}, {1, 128, 128, 128, 1}, {1, 64, 64, 256, 1}, {16, 64, 64, 256, 1},
                          {1, 31, 31, 512, 0},  {2, 7, 5, 8, 1}};
  for (const Shape& s : shapes) {
    for (const int bytes : {2, 4}) {
      for (const int tensors : {1, 2}) {
        expect(plan_cluster(s, bytes, tensors, a100).ranks == 0, "no clusters before 9.0", s.c);
        const ClusterPlan plan = plan_cluster(s, bytes, tensors, h200);
        if (plan.ranks == 0) {
          // Only the largest slices do not fit on chip.
          expect(s.h * s.w * access_bytes * tensors > int64_t{most_ranks} * (h200.shared_bytes - 4096), "fits", s.h);
          continue;
        }
        expect(plan.shared_bytes <= h200.shared_bytes, "shared memory", plan.shared_bytes);
        expect(plan.ranks <= most_ranks && (plan.ranks & (plan.ranks - 1)) == 0, "ranks", plan.ranks);
        expect(plan.clusters * plan.lanes * (access_bytes / bytes) == s.c, "slices cover the channels", s.c);
      }
      for (const bool aligned : {true, false}) {
        const PlainPlan plan = plan_plain(s, bytes, aligned, h200);
        expect(plan.chunks >= 1 && plan.chunks <= s.h * s.w, "chunks", plan.chunks);
        expect(plan.tiles * plan.across * plan.vector >= s.c, "tiles cover the channels", s.c);
        expect(workspace_floats(s, bytes, h200) >= s.n * (plan.chunks + 1) * 2 * s.c, "workspace", s.c);
      }
    }
  }
}

void check_crop_flip() {
  const int64_t height = 9, width = 11;
  for (const int64_t channels : {int64_t{1}, int64_t{3}, int64_t{5}}) {
    std::vector<uint8_t> store(static_cast<size_t>(2 * height * width * channels));
    for (uint8_t& value : store) value = static_cast<uint8_t>(127.5f + 127.5f * random_float());
    const int64_t index[] = {1, 0, 1}, y[] = {0, 2, 3}, x[] = {4, 0, 1};
    const bool flip[] = {true, false, true};
    std::vector<float> out(static_cast<size_t>(3 * 6 * 7 * channels), std::numeric_limits<float>::quiet_NaN());
    threads = 2;
    crop_flip({store.data(), height, width, channels, 3, 6, 7, index, y, x, flip, out.data()}, parallel_for);
    for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
      const int64_t c = i % channels, w = i / channels % 7, h = i / channels / 7 % 6, n = i / channels / 42;
      const int64_t from = x[n] + (flip[n] ? 6 - w : w);
      const uint8_t v = store[static_cast<size_t>(((index[n] * height + y[n] + h) * width + from) * channels + c)];
      expect(out[static_cast<size_t>(i)] == static_cast<float>(2 * v - 255) / 255.0f, "crop_flip", i);
    }
  }
}

}  // namespace

int main() {
  check_geometry();
  check_plans();
  check_crop_flip();
  check_kernels();
  if (failures) return EXIT_FAILURE;
  std::printf("all checks passed; instruction sets up to %d\n", static_cast<int>(cyclegan::best_isa()));
  return EXIT_SUCCESS;
}
