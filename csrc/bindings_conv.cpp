// Registers the convolutions with torch. cyclegan_fast/ops calls them as torch.ops.cyclegan_fast_native.*.

#include "checks.h"
#include "conv_cpu.h"

namespace cyclegan {
namespace {

void torch_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}

void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4, name, " must be float32 with 4 dimensions");
}

Filter filter_of(const Tensor& weight) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3, "weight must be [K, C, 3, 3]");
  return {static_cast<const float*>(weight.const_data_ptr()), weight.size(0), weight.size(1), weight.stride(0),
          weight.stride(1), weight.stride(2), weight.stride(3)};
}

Pictures pictures_of(const Tensor& x, int64_t border, bool reflect) {
  check_x(x);
  check_float(x, "x");
  return {static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(2), x.size(3), x.size(1), border, reflect,
          nullptr};
}

Tensor conv3x3_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                       int64_t activation) {
  Conv3x3 problem{};
  problem.x = pictures_of(x, padding, true);
  problem.filter = filter_of(weight);
  STD_TORCH_CHECK(problem.filter.c == problem.x.c, "weight must have the channels of x");
  STD_TORCH_CHECK(padding >= 0 && padding < std::min(problem.x.h, problem.x.w) &&
                      std::min(problem.x.h, problem.x.w) + 2 * padding >= 3,
                  "padding = ", padding, " does not fit x");
  problem.bias = floats(bias, x, problem.filter.k, "bias");
  problem.finish = static_cast<Finish>(activation);
  Tensor y = empty_channels_last(x, x.size(0), problem.filter.k, x.size(2) + 2 * padding - 2,
                                 x.size(3) + 2 * padding - 2);
  problem.y = static_cast<float*>(y.mutable_data_ptr());
  conv3x3(problem, torch_parallel);
  return y;
}

}  // namespace
}  // namespace cyclegan

STABLE_TORCH_LIBRARY_FRAGMENT(cyclegan_fast_native, m) {
  m.def("conv3x3_forward(Tensor x, Tensor weight, Tensor? bias, int padding, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&cyclegan::conv3x3_forward));
}
