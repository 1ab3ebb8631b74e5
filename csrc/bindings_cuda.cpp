// The CUDA kernels of the operations that bindings_cpu.cpp defines. Compiles against a torch without CUDA, and loads
// into one.

#include "instance_norm_bindings.h"
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
  Forward call(x, dtype_of(x), weight, bias, residual, eps, activation, slope, pad);
  if (call.problem.shape.n == 0) return call.results();
  Tensor workspace = workspace_for(x, call.problem.shape);
  const char* error = instance_norm_forward_cuda(
      call.problem, chosen_path, static_cast<float*>(workspace.mutable_data_ptr()), current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "instance_norm on CUDA: ", error);
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                    const Tensor& rstd, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t activation, double slope,
                                                    int64_t pad, bool need_residual) {
  check_x(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Backward call(grad_y, x, dtype_of(x), mean, rstd, weight, bias, activation, slope, pad, need_residual);
  if (call.problem.shape.n == 0) {
    torch::stable::zero_(call.grad_weight);
    torch::stable::zero_(call.grad_bias);
    return call.results();
  }
  Tensor workspace = workspace_for(x, call.problem.shape);
  const char* error = instance_norm_backward_cuda(
      call.problem, chosen_path, static_cast<float*>(workspace.mutable_data_ptr()), current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "instance_norm on CUDA: ", error);
  return call.results();
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
