// What the CPU and the CUDA bindings of instance_norm share: results made, arguments checked, pointers filled in.
#pragma once

#include "checks.h"

namespace cyclegan {

struct Forward {
  ForwardProblem problem{};
  Tensor y, mean, rstd;

  Forward(const Tensor& x, DType dtype, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
          const std::optional<Tensor>& residual, double eps, int64_t activation, double slope, int64_t pad) {
    problem.shape = shape_of(x, pad);
    problem.dtype = dtype;
    problem.activation = activation_of(activation);
    problem.slope = static_cast<float>(slope);
    problem.eps = eps;
    const Shape& s = problem.shape;
    y = empty_channels_last(x, s.n, s.c, s.padded_h(), s.padded_w());
    mean = empty_floats(x, {s.n, s.c});
    rstd = empty_floats(x, {s.n, s.c});
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
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {y, mean, rstd}; }
};

struct Backward {
  BackwardProblem problem{};
  Tensor grad_x, grad_residual, grad_weight, grad_bias;

  Backward(const Tensor& grad_y, const Tensor& x, DType dtype, const Tensor& mean, const Tensor& rstd,
           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t activation, double slope,
           int64_t pad, bool need_residual)
      : grad_(check_grad_y(grad_y, x, shape_of(x, pad))) {
    problem.shape = shape_of(x, pad);
    problem.dtype = dtype;
    problem.activation = activation_of(activation);
    problem.slope = static_cast<float>(slope);
    const Shape& s = problem.shape;
    grad_x = empty_channels_last(x, s.n, s.c, s.h, s.w);
    grad_residual = need_residual ? empty_channels_last(x, s.n, s.c, s.h, s.w) : empty_floats(x, {0});
    const int64_t affine = weight.has_value() ? s.c : 0;
    grad_weight = empty_floats(x, {affine});
    grad_bias = empty_floats(x, {affine});
    problem.grad_y = grad_.const_data_ptr();
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
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {grad_x, grad_residual, grad_weight, grad_bias}; }

 private:
  Tensor grad_;  // keeps alive what problem.grad_y points to
};

}  // namespace cyclegan
