// Registers the operations with torch, and their CPU kernels. cyclegan_fast/ops calls them as
// torch.ops.cyclegan_fast_native.*.

#include "crop_flip_cpu.h"
#include "instance_norm_bindings.h"
#include "parallel.h"

namespace cyclegan {
namespace {

DType dtype_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "x must be float32 or bfloat16 on the CPU");
  return type == ScalarType::Float ? DType::float32 : DType::bfloat16;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                           double eps, int64_t activation, double slope, int64_t pad) {
  check_x(x);
  Forward call(x, dtype_of(x), weight, bias, residual, eps, activation, slope, pad);
  if (call.problem.shape.n > 0) instance_norm_forward(call.problem, torch_parallel);
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                    const Tensor& rstd, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, int64_t activation, double slope,
                                                    int64_t pad, bool need_residual) {
  check_x(x);
  Backward call(grad_y, x, dtype_of(x), mean, rstd, weight, bias, activation, slope, pad, need_residual);
  instance_norm_backward(call.problem, torch_parallel);
  return call.results();
}

Tensor crop_flip_cpu(const Tensor& store, const Tensor& index, const Tensor& y, const Tensor& x, const Tensor& flip,
                     int64_t height, int64_t width) {
  STD_TORCH_CHECK(store.dim() == 4 && store.scalar_type() == ScalarType::Byte && store.is_contiguous(),
                  "store must be contiguous uint8 [M, H, W, C]");
  const int64_t n = index.numel();
  for (const Tensor* t : {&index, &y, &x}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->numel() == n && t->is_contiguous(),
                    "index, y and x must be contiguous int64 of one length");
  }
  STD_TORCH_CHECK(flip.scalar_type() == ScalarType::Bool && flip.numel() == n && flip.is_contiguous(),
                  "flip must be contiguous bool of the length of index");
  CropProblem problem{};
  problem.store = static_cast<const uint8_t*>(store.const_data_ptr());
  problem.height = store.size(1);
  problem.width = store.size(2);
  problem.channels = store.size(3);
  STD_TORCH_CHECK(height >= 1 && height <= problem.height && width >= 1 && width <= problem.width &&
                      problem.channels >= 1,
                  "a window of ", height, " x ", width, " does not fit into pictures of ", problem.height, " x ",
                  problem.width);
  problem.n = n;
  problem.h = height;
  problem.w = width;
  problem.index = static_cast<const int64_t*>(index.const_data_ptr());
  problem.y = static_cast<const int64_t*>(y.const_data_ptr());
  problem.x = static_cast<const int64_t*>(x.const_data_ptr());
  problem.flip = static_cast<const bool*>(flip.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(problem.index[i] >= 0 && problem.index[i] < store.size(0) && problem.y[i] >= 0 &&
                        problem.y[i] <= problem.height - height && problem.x[i] >= 0 &&
                        problem.x[i] <= problem.width - width,
                    "window ", i, " lies outside its picture or the store");
  }
  const std::array<int64_t, 4> size{n, problem.channels, height, width};
  Tensor out = torch::stable::empty({size.data(), size.size()}, ScalarType::Float, std::nullopt, store.device(),
                                    std::nullopt, MemoryFormat::ChannelsLast);
  problem.out = static_cast<float*>(out.mutable_data_ptr());
  if (n > 0) crop_flip(problem, torch_parallel);
  return out;
}

int64_t set_isa_op(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 3 && set_isa(static_cast<Isa>(isa)), "instruction set ", isa,
                  " is not available on this machine; the best one is ", static_cast<int>(best_isa()));
  return isa;
}

int64_t current_isa_op() { return static_cast<int64_t>(current_isa()); }

int64_t best_isa_op() { return static_cast<int64_t>(best_isa()); }

}  // namespace
}  // namespace cyclegan

STABLE_TORCH_LIBRARY(cyclegan_fast_native, m) {
  m.def(
      "instance_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, "
      "float negative_slope, int pad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_norm_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "int activation, float negative_slope, int pad, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("crop_flip(Tensor store, Tensor index, Tensor y, Tensor x, Tensor flip, int height, int width) -> Tensor");
  // 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 conversions; for tests.
  m.def("set_isa(int isa) -> int");
  m.def("current_isa() -> int");
  m.def("best_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CPU, m) {
  m.impl("instance_norm_forward", TORCH_BOX(&cyclegan::forward));
  m.impl("instance_norm_backward", TORCH_BOX(&cyclegan::backward));
  m.impl("crop_flip", TORCH_BOX(&cyclegan::crop_flip_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(cyclegan_fast_native, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&cyclegan::set_isa_op));
  m.impl("current_isa", TORCH_BOX(&cyclegan::current_isa_op));
  m.impl("best_isa", TORCH_BOX(&cyclegan::best_isa_op));
}
