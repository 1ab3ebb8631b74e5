// The CUDA kernels of the operations that bindings_cpu.cpp defines. Compiles against a torch without CUDA, and loads
// into one.

#include "checks.h"
#include "instance_norm_cuda.h"

// Found at load time where torch has CUDA, null elsewhere.
#pragma weak aoti_torch_get_current_cuda_stream

namespace cyclegan {
namespace {

CudaPath chosen_path = CudaPath::automatic;

DType dtype_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return DType::float32;
  if (type == ScalarType::BFloat16) return DType::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "x must be float32, bfloat16 or float16 on CUDA");
  return DType::float16;
}

void* current_stream(const Tensor& x) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor workspace_for(const Tensor& x, const Shape& s) {
  return empty_floats(x, {workspace_floats(s, static_cast<int>(x.element_size()), current_cuda_device())});
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                           double eps, int64_t activation, double slope, int64_t pad) {
  check_x(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  ForwardProblem problem{};
  problem.shape = shape_of(x, pad);
  problem.dtype = dtype_of(x);
  problem.activation = activation_of(activation);
  problem.slope = static_cast<float>(slope);
  problem.eps = eps;
  const Shape& s = problem.shape;
  Tensor y = empty_channels_last(x, s.n, s.c, s.padded_h(), s.padded_w());
  Tensor mean = empty_floats(x, {s.n, s.c}), rstd = empty_floats(x, {s.n, s.c});
  problem.x = x.const_data_ptr();
  if (residual.has_value()) {
    problem.residual_pitch = check_residual(*residual, x);
    problem.residual = residual->const_data_ptr();
  }
  problem.weight = floats(weight, x, s.c, "weight");
  problem.bias = floats(bias, x, s.c, "bias");
  problem.y = y.mutable_data_ptr();
  problem.mean = static_cast<float*>(mean.mutable_data_ptr());
  problem.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (s.n == 0) return {y, mean, rstd};
  Tensor workspace = workspace_for(x, s);
  const char* error = instance_norm_forward_cuda(
      problem, chosen_path, static_cast<float*>(workspace.mutable_data_ptr()), current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "instance_norm on CUDA: ", error);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                    const Tensor& rstd, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t activation, double slope,
                                                    int64_t pad, bool need_residual) {
  check_x(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BackwardProblem problem{};
  problem.shape = shape_of(x, pad);
  problem.dtype = dtype_of(x);
  problem.activation = activation_of(activation);
  problem.slope = static_cast<float>(slope);
  const Shape& s = problem.shape;
  const Tensor grad = check_grad_y(grad_y, x, s);
  Tensor grad_x = empty_channels_last(x, s.n, s.c, s.h, s.w);
  Tensor grad_residual = need_residual ? empty_channels_last(x, s.n, s.c, s.h, s.w) : empty_floats(x, {0});
  const int64_t affine = weight.has_value() ? s.c : 0;
  Tensor grad_weight = empty_floats(x, {affine}), grad_bias = empty_floats(x, {affine});
  problem.grad_y = grad.const_data_ptr();
  problem.x = x.const_data_ptr();
  problem.mean = floats(mean, x, s.n * s.c, "mean");
  problem.rstd = floats(rstd, x, s.n * s.c, "rstd");
  problem.weight = floats(weight, x, s.c, "weight");
  problem.bias = floats(bias, x, s.c, "bias");
  problem.grad_x = grad_x.mutable_data_ptr();
  if (need_residual) problem.grad_residual = grad_residual.mutable_data_ptr();
  if (affine > 0) {
    problem.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    problem.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  }
  if (s.n == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_residual, grad_weight, grad_bias};
  }
  Tensor workspace = workspace_for(x, s);
  const char* error = instance_norm_backward_cuda(
      problem, chosen_path, static_cast<float*>(workspace.mutable_data_ptr()), current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "instance_norm on CUDA: ", error);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

int64_t set_cuda_path(int64_t path) {
  STD_TORCH_CHECK(path >= 0 && path <= 2, "path = ", path, " is not 0 (automatic), 1 (plain) or 2 (cluster)");
  chosen_path = static_cast<CudaPath>(path);
  return path;
}

}  // namespace
}  // namespace cyclegan

STABLE_TORCH_LIBRARY_FRAGMENT(cyclegan_fast_native, m) {
  // 0 automatic, 1 plain, 2 cluster or an error; for tests and measurements.
  m.def("set_cuda_path(int path) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CUDA, m) {
  m.impl("instance_norm_forward", TORCH_BOX(&cyclegan::forward));
  m.impl("instance_norm_backward", TORCH_BOX(&cyclegan::backward));
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CompositeExplicitAutograd, m) {
  m.impl("set_cuda_path", TORCH_BOX(&cyclegan::set_cuda_path));
}
