// Checks and conversions of tensors, shared by the CPU and the CUDA bindings. Only torch's stable ABI is used here, so
// that one build serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "instance_norm_cpu.h"

namespace cyclegan {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a [N, C, H, W] tensor lies in memory as dense [N, H, W, C]. Strides of sides of length 1 mean nothing.
inline bool is_dense_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const std::array<int64_t, 4> expected{h * w * c, 1, w * c, c};
  for (int64_t i = 0; i < 4; ++i) {
    if (t.size(i) != 1 && t.stride(i) != expected[static_cast<size_t>(i)]) return false;
  }
  return true;
}

inline void check_x(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], but has ", x.dim(), " dimensions");
  for (int64_t i = 1; i < 4; ++i) STD_TORCH_CHECK(x.size(i) > 0, "x must not be empty");
  STD_TORCH_CHECK(is_dense_channels_last(x), "x must be dense in channels_last memory format");
}

inline Shape shape_of(const Tensor& x, int64_t pad) {
  const Shape shape{x.size(0), x.size(2), x.size(3), x.size(1), pad};
  STD_TORCH_CHECK(pad >= 0 && pad < shape.h && pad < shape.w, "pad = ", pad, " is not in 0 .. min(H, W) - 1 for ",
                  shape.h, " x ", shape.w);
  return shape;
}

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "activation = ", code, " is not 0 (none), 1 (relu) or 2 (leaky_relu)");
  return static_cast<Activation>(code);
}

// Data of a dense float32 tensor of `count` numbers on x's device.
inline const float* floats(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == count && t.is_contiguous(), name,
                  " must be contiguous float32 with ", count, " numbers");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& t, const Tensor& x, int64_t count, const char* name) {
  return t.has_value() ? floats(*t, x, count, name) : nullptr;
}

inline Pitch check_residual(const Tensor& residual, const Tensor& x) {
  STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type() && residual.device() == x.device() && residual.dim() == 4,
                  "residual must have the dtype and device of x");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(residual.size(i) == x.size(i), "residual must have the shape of x");
  STD_TORCH_CHECK(x.size(1) == 1 || residual.stride(1) == 1, "residual must have adjacent channels");
  return {residual.stride(0), residual.stride(2), residual.stride(3)};
}

inline Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const std::array<int64_t, 4> size{n, c, h, w};
  return torch::stable::empty({size.data(), size.size()}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

inline Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::empty({size.begin(), size.size()}, ScalarType::Float, std::nullopt, like.device());
}

// grad_y as the kernels read it. Autograd may hand over any layout, for example of an expanded scalar.
inline Tensor check_grad_y(const Tensor& grad_y, const Tensor& x, const Shape& s) {
  STD_TORCH_CHECK(grad_y.dim() == 4 && grad_y.size(0) == s.n && grad_y.size(1) == s.c &&
                      grad_y.size(2) == s.padded_h() && grad_y.size(3) == s.padded_w(),
                  "grad_y must be [N, C, H + 2 pad, W + 2 pad]");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.device() == x.device(),
                  "grad_y must have the dtype and device of x");
  if (is_dense_channels_last(grad_y)) return grad_y;
  return torch::stable::contiguous(grad_y, MemoryFormat::ChannelsLast);
}

}  // namespace cyclegan
