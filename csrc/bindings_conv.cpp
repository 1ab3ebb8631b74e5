// Registers the convolutions with torch. cyclegan_fast/ops calls them as torch.ops.cyclegan_fast_native.*.

#include "checks.h"
#include "conv_cpu.h"
#include "parallel.h"

namespace cyclegan {
namespace {

void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4, name, " must be float32 with 4 dimensions");
}

Filter filter_of(const Tensor& weight, int64_t size) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.size(2) == size && weight.size(3) == size, "weight must be [K, C, ", size, ", ", size, "]");
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
  problem.filter = filter_of(weight, 3);
  STD_TORCH_CHECK(activation == 0 || activation == 1, "activation = ", activation, " is not 0 (none) or 1 (relu)");
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

// grad_y as the kernels read it: autograd hands over any layout.
Tensor dense_gradient(const Tensor& grad_y) {
  check_float(grad_y, "grad_y");
  if (is_dense_channels_last(grad_y)) return grad_y;
  return torch::stable::contiguous(grad_y, MemoryFormat::ChannelsLast);
}

Tensor conv3x3_input_grad(const Tensor& grad_y, const Tensor& weight, int64_t padding, bool reflect) {
  const Tensor grad = dense_gradient(grad_y);
  InputGradient problem{};
  problem.filter = filter_of(weight, 3);
  problem.n = grad.size(0);
  problem.h = grad.size(2) + 2 - 2 * padding;
  problem.w = grad.size(3) + 2 - 2 * padding;
  problem.border = padding;
  problem.reflect = reflect;
  STD_TORCH_CHECK(problem.filter.k == grad.size(1), "grad_y must have the outputs of weight");
  STD_TORCH_CHECK(padding >= 0 && (reflect || padding <= 2) && padding < std::min(problem.h, problem.w), "padding = ",
                  padding, " does not fit grad_y");
  Tensor grad_x = empty_channels_last(grad, problem.n, problem.filter.c, problem.h, problem.w);
  problem.grad_y = static_cast<const float*>(grad.const_data_ptr());
  problem.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  conv3x3_input_gradient(problem, torch_parallel);
  return grad_x;
}

Tensor thin_conv_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                         int64_t activation) {
  ThinConv problem{};
  problem.x = pictures_of(x, padding, true);
  problem.size = weight.size(2);
  problem.filter = filter_of(weight, problem.size);
  STD_TORCH_CHECK(activation == 0 || activation == 1, "activation = ", activation, " is not 0 (none) or 1 (relu)");
  STD_TORCH_CHECK(problem.filter.c == problem.x.c, "weight must have the channels of x");
  STD_TORCH_CHECK(problem.filter.k <= thin_outputs, "weight must have at most ", thin_outputs, " outputs");
  const int64_t least = std::min(problem.x.h, problem.x.w);
  STD_TORCH_CHECK(padding >= 0 && padding < least && least + 2 * padding >= problem.size, "padding = ", padding,
                  " does not fit x");
  problem.bias = floats(bias, x, problem.filter.k, "bias");
  problem.finish = static_cast<Finish>(activation);
  Tensor y = empty_channels_last(x, x.size(0), problem.filter.k, x.size(2) + 2 * padding - problem.size + 1,
                                 x.size(3) + 2 * padding - problem.size + 1);
  problem.y = static_cast<float*>(y.mutable_data_ptr());
  thin_conv(problem, torch_parallel);
  return y;
}

Tensor thin_conv_input_grad(const Tensor& grad_y, const Tensor& weight, int64_t padding) {
  const Tensor grad = dense_gradient(grad_y);
  const int64_t size = weight.size(2);
  InputGradient problem{};
  problem.filter = filter_of(weight, size);
  problem.n = grad.size(0);
  problem.h = grad.size(2) + size - 1 - 2 * padding;
  problem.w = grad.size(3) + size - 1 - 2 * padding;
  problem.border = padding;
  problem.reflect = true;
  STD_TORCH_CHECK(problem.filter.k == grad.size(1), "grad_y must have the outputs of weight");
  STD_TORCH_CHECK(problem.filter.c <= thin_outputs, "weight must have at most ", thin_outputs, " inputs");
  STD_TORCH_CHECK(padding >= 0 && padding < std::min(problem.h, problem.w), "padding = ", padding,
                  " does not fit grad_y");
  Tensor grad_x = empty_channels_last(grad, problem.n, problem.filter.c, problem.h, problem.w);
  problem.grad_y = static_cast<const float*>(grad.const_data_ptr());
  problem.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  thin_input_gradient(problem, size, torch_parallel);
  return grad_x;
}

// A gradient for a weight [K, C, size, size], channels-last where that is how the weight is kept.
Tensor empty_weight(const Tensor& like, int64_t k, int64_t c, int64_t size, bool channels_last) {
  if (channels_last) return empty_channels_last(like, k, c, size, size);
  return empty_floats(like, {k, c, size, size});
}

Filter filter_into(const Tensor& grad) {
  return {nullptr, grad.size(0), grad.size(1), grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
}

Tensor conv3x3_weight_grad(const Tensor& grad_y, const Tensor& x, int64_t padding, bool reflect, bool channels_last) {
  const Tensor grad = dense_gradient(grad_y);
  const Pictures pictures = pictures_of(x, padding, reflect);
  STD_TORCH_CHECK(grad.size(0) == pictures.n && grad.size(2) == pictures.h + 2 * padding - 2 &&
                      grad.size(3) == pictures.w + 2 * padding - 2,
                  "grad_y must be [N, K, H + 2 padding - 2, W + 2 padding - 2]");
  Tensor result = empty_weight(x, grad.size(1), pictures.c, 3, channels_last);
  conv3x3_weight_gradient(pictures, static_cast<const float*>(grad.const_data_ptr()), filter_into(result),
                          static_cast<float*>(result.mutable_data_ptr()), torch_parallel);
  return result;
}

// With `swap`, x and grad_y change places, so that the one with few channels is x: stride 1 only.
Tensor conv_weight_grad(const Tensor& grad_y, const Tensor& x, int64_t size, int64_t stride, int64_t padding,
                        bool reflect, bool swap, bool channels_last) {
  const Tensor grad = dense_gradient(grad_y);
  const Pictures pictures = pictures_of(x, padding, reflect);
  const int64_t h = pictures.h + 2 * padding - size, w = pictures.w + 2 * padding - size;
  STD_TORCH_CHECK(size >= 1 && stride >= 1 && (stride == 1 || !swap) && h >= 0 && w >= 0 && padding >= 0 &&
                      (!reflect || padding < std::min(pictures.h, pictures.w)),
                  "size, stride or padding do not fit x");
  STD_TORCH_CHECK(grad.size(0) == pictures.n && grad.size(2) == h / stride + 1 && grad.size(3) == w / stride + 1,
                  "grad_y must be [N, K, (H + 2 padding - size) / stride + 1, ...]");
  Tensor result = empty_weight(x, grad.size(1), pictures.c, size, channels_last);
  Pictures outer = pictures_of(grad, swap ? size - 1 : 0, false);
  WeightGradient problem{pictures, outer, size, stride, filter_into(result),
                         static_cast<float*>(result.mutable_data_ptr())};
  if (swap) {
    const Filter to = problem.filter;
    std::swap(problem.x, problem.grad_y);
    problem.grad += (size - 1) * (to.r_step + to.s_step);
    problem.filter = {nullptr, to.c, to.k, to.c_step, to.k_step, -to.r_step, -to.s_step};
  }
  conv_weight_gradient(problem, torch_parallel);
  return result;
}

}  // namespace
}  // namespace cyclegan

STABLE_TORCH_LIBRARY_FRAGMENT(cyclegan_fast_native, m) {
  m.def("conv3x3_forward(Tensor x, Tensor weight, Tensor? bias, int padding, int activation) -> Tensor");
  m.def("conv3x3_input_grad(Tensor grad_y, Tensor weight, int padding, bool reflect) -> Tensor");
  m.def("thin_conv_forward(Tensor x, Tensor weight, Tensor? bias, int padding, int activation) -> Tensor");
  m.def("thin_conv_input_grad(Tensor grad_y, Tensor weight, int padding) -> Tensor");
  m.def(
      "conv3x3_weight_grad(Tensor grad_y, Tensor x, int padding, bool reflect, bool channels_last) -> Tensor");
  m.def(
      "conv_weight_grad(Tensor grad_y, Tensor x, int size, int stride, int padding, bool reflect, bool swap, "
      "bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&cyclegan::conv3x3_forward));
  m.impl("conv3x3_input_grad", TORCH_BOX(&cyclegan::conv3x3_input_grad));
  m.impl("thin_conv_forward", TORCH_BOX(&cyclegan::thin_conv_forward));
  m.impl("thin_conv_input_grad", TORCH_BOX(&cyclegan::thin_conv_input_grad));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&cyclegan::conv3x3_weight_grad));
  m.impl("conv_weight_grad", TORCH_BOX(&cyclegan::conv_weight_grad));
}
