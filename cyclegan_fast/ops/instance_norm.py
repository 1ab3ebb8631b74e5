"""Instance norm with all that follows it up to the next convolution, in one op.

    y = reflect_pad(act(weight * xhat + bias) + residual, pad)        xhat = (x - mean) * rstd

mean and variance are taken over the pixels of each sample and channel (Ulyanov et al. 2016), the variance is the biased
one, rstd = 1 / sqrt(variance + eps). x [N, C, H, W] and y [N, C, H + 2 pad, W + 2 pad] lie in channels_last order;
statistics are float32 whatever x is. Backward, with g the gradient of y folded back by the reflection and HW = H W:

    dresidual = g        dz = g * act'(weight * xhat + bias)        dbias = sum dz        dweight = sum dz * xhat
    dx = rstd * weight * (dz - sum(dz) / HW - xhat * sum(dz * xhat) / HW)

x, mean and rstd are saved, everything else is computed again. What must be moved: forward 2 reads and 1 write of a map
(1 and 1 where a GPU's cache holds it between the passes), and 1 more read for a residual; backward 4 reads and 1 write.

What bfloat16 costs without instructions for it: on one EPYC core with AVX2 and 2 MiB in the caches a memcpy moves 77
GB/s, a loop that only widens and rounds again 55, one that only sums x and its square 36 (reading). Forward takes both,
so that 47 GB/s, 61 % of the copy, is the most for such loops; out of memory (64 MiB) they reach 25 and 21 of 20 GB/s.

Under autocast the op runs in the dtype of x, with weight and bias in float32; nothing is cast.

An eager call goes around the dispatcher (`_Eager`), which costs half as much again; `bench/overhead.py` measures it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.ops._launch import (
    HAS_TRITON,
    activation_code,
    default_impl,
    is_plain,
    refuse_transforms,
    resolve_impl,
)
from cyclegan_fast.ops._layout import empty_channels_last, exact_channels_last
from cyclegan_fast.ops._register import refuse_derivative, refuse_vmap
from cyclegan_fast.ops._verify import register_check

__all__ = ["instance_norm", "instance_norm_ref", "runs_kernels"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALLOWED_ACTIVATIONS = (None, "relu", "leaky_relu")
# Kernels count the pixels of one picture in 32 bits; a tile may begin just below the limit.
_MAX_PIXELS = 2**31 - 2**16


def instance_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.2,
    pad: int = 0,
) -> Tensor:
    """The definition in plain PyTorch, differentiable any number of times; arguments as `instance_norm`.

    float32 inside (float64 for float64), rounded once at the end. Takes any memory format, returns channels_last.
    """
    code = activation_code(activation, _ALLOWED_ACTIVATIONS)
    y, _, _ = _forward_ref(x, weight, bias, residual, eps, code, negative_slope, pad)
    return y.contiguous(memory_format=torch.channels_last)


def _forward_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # Autocast casts the parts of some operations, concatenation among them; here every dtype is meant.
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(_wide(x.dtype))
        var, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        rstd = torch.rsqrt(var + eps)
        y = _affine_ref((wide - mean) * rstd, weight, bias)
        if activation == 1:
            y = F.relu(y)
        elif activation == 2:
            y = F.leaky_relu(y, negative_slope)
        if residual is not None:
            y = y + residual
        return _reflect_ref(y.to(x.dtype), pad), mean.flatten(1), rstd.flatten(1)


def _backward_ref(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual in x's dtype; dweight and dbias [C], whether there is a weight or not."""
    wide = _wide(x.dtype)
    g = _fold_ref(grad_y.to(wide), pad)
    xhat = (x.to(wide) - mean[:, :, None, None]) * rstd[:, :, None, None]
    dz = g
    if activation:
        slope = negative_slope if activation == 2 else 0.0
        dz = torch.where(_affine_ref(xhat, weight, bias) > 0, g, g * slope)
    sum_dz, sum_dz_xhat = dz.sum((2, 3)), (dz * xhat).sum((2, 3))
    pixels = x.shape[2] * x.shape[3]
    dx = dz - (sum_dz / pixels)[:, :, None, None] - xhat * (sum_dz_xhat / pixels)[:, :, None, None]
    scale = rstd if weight is None else rstd * weight
    return (dx * scale[:, :, None, None]).to(x.dtype), g.to(x.dtype), sum_dz_xhat.sum(0), sum_dz.sum(0)


def _affine_ref(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or bias is None:
        return xhat
    return xhat * weight[:, None, None] + bias[:, None, None]


def _reflect_ref(x: Tensor, pad: int) -> Tensor:
    """Reflection padding from slices: unlike PyTorch's own its gradient needs no atomics, and keeps the layout."""
    for dim in (2, 3) if pad else ():
        size = x.shape[dim]
        x = torch.cat([x.narrow(dim, 1, pad).flip(dim), x, x.narrow(dim, size - 1 - pad, pad).flip(dim)], dim)
    return x


def _fold_ref(grad: Tensor, pad: int) -> Tensor:
    """The transpose of `_reflect_ref`: every pixel gets the gradients of all places that show it."""
    for dim in (2, 3) if pad else ():
        size = grad.shape[dim] - 2 * pad
        folded = grad.narrow(dim, pad, size).clone()
        folded.narrow(dim, 1, pad).add_(grad.narrow(dim, 0, pad).flip(dim))
        folded.narrow(dim, size - 1 - pad, pad).add_(grad.narrow(dim, size + pad, pad).flip(dim))
        grad = folded
    return grad


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# The op, as PyTorch's dispatcher knows it. `impl` is resolved where tensors are real, so that a trace does not depend
# on what is installed or verified; activations are the numbers of `activation_code`.
torch.library.define(
    "cyclegan_fast::instance_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, float negative_slope, "
    "int pad, str impl) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.needs_exact_strides,),
)
torch.library.define(
    "cyclegan_fast::instance_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int activation, "
    "float negative_slope, int pad, bool need_residual, str impl) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.needs_exact_strides,),
)


def _resolve(x: Tensor, impl: str) -> str:
    return resolve_impl("instance_norm", impl, x, _available(x.device, x.dtype))


def _available(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    native = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
    return {"triton": HAS_TRITON and dtype != torch.float64, "native": dtype in native}


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "auto" is a kernel there, and not the reference; the first time on a GPU this verifies the kernels."""
    return default_impl("instance_norm", device, _available(device, dtype)) != "reference"


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    pad: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _resolve(x, impl)
    arguments = (x, weight, bias, residual, eps, activation, negative_slope, pad)
    if chosen == "triton":
        from cyclegan_fast.ops import _instance_norm_launch

        return _instance_norm_launch.forward(*arguments)
    if chosen == "native":
        y, mean, rstd = torch.ops.cyclegan_fast_native.instance_norm_forward(*arguments)
        return y, mean, rstd
    y, mean, rstd = _forward_ref(*arguments)
    return exact_channels_last(y), mean, rstd


def _backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    pad: int,
    need_residual: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _resolve(x, impl)
    # A gradient comes in any layout: dense from a convolution, expanded from a sum. Only a dense one is not copied.
    arguments = (exact_channels_last(grad_y), x, mean, rstd, weight, bias, activation, negative_slope, pad)
    if chosen == "triton":
        from cyclegan_fast.ops import _instance_norm_launch

        return _instance_norm_launch.backward(*arguments, need_residual)
    if chosen == "native":
        dx, dresidual, dweight, dbias = torch.ops.cyclegan_fast_native.instance_norm_backward(*arguments, need_residual)
        return dx, dresidual, dweight, dbias
    dx, dresidual, dweight, dbias = _backward_ref(*arguments)
    # In float64 the reference hands out grad_y itself, which an op may not.
    dresidual = empty_channels_last(x, x.shape).copy_(dresidual) if need_residual else x.new_empty(0)
    if weight is None:
        dweight, dbias = mean.new_empty(0), mean.new_empty(0)
    return exact_channels_last(dx), dresidual, dweight, dbias


@torch.library.register_fake("cyclegan_fast::instance_norm")
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, *_, pad, _ = arguments
    n, c, h, w = x.shape
    shape = (n, c, h + 2 * pad, w + 2 * pad)
    y = empty_channels_last(x, shape)
    mean = torch.empty((n, c), dtype=_wide(x.dtype), device=x.device)
    return y, mean, torch.empty_like(mean)


@torch.library.register_fake("cyclegan_fast::instance_norm_backward")
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, x, mean, _, weight, *_, need_residual, _ = arguments
    dx = empty_channels_last(x, x.shape)
    dresidual = torch.empty_like(dx) if need_residual else x.new_empty(0)
    dweight = mean.new_empty(0 if weight is None else x.shape[1])
    return dx, dresidual, dweight, torch.empty_like(dweight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    _save(ctx, inputs, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _save(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    x, weight, bias, _, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _autograd(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 9
    x, weight, bias, mean, rstd = ctx.saved_tensors
    activation, negative_slope, pad, impl = ctx.options
    need_residual = ctx.needs_input_grad[3]
    # Without padding the gradient of the residual is that of y, and is handed on without a copy.
    fold = need_residual and pad > 0
    # Where nobody traces it and nobody differentiates it again, the kernel is called without the dispatcher.
    direct = is_plain(grad_y) and not torch.is_grad_enabled()
    backward = _backward if direct else torch.ops.cyclegan_fast.instance_norm_backward
    dx, dresidual, dweight, dbias = backward(
        grad_y, x, mean, rstd, weight, bias, activation, negative_slope, pad, fold, impl
    )
    if not fold:
        dresidual = grad_y if need_residual else None
    if weight is None:
        dweight = dbias = None
    return dx, dweight, dbias, dresidual, None, None, None, None, None


torch.library.impl("cyclegan_fast::instance_norm", "default", _forward)
torch.library.impl("cyclegan_fast::instance_norm_backward", "default", _backward)
torch.library.register_autograd("cyclegan_fast::instance_norm", _autograd, setup_context=_setup_context)
refuse_derivative(
    "instance_norm_backward",
    "instance_norm: the gradient of the fused op cannot be differentiated again (create_graph=True): "
    'impl="reference" can',
)
refuse_vmap(
    "instance_norm",
    "instance_norm_backward",
    message='instance_norm cannot be used inside torch.func transforms: impl="reference" can',
)


class _Eager(torch.autograd.Function):
    """The registered op, with the same functions, for eager calls that need nothing of the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = _forward(*inputs)
        _save(ctx, inputs, mean, rstd)
        return y

    backward = staticmethod(_autograd)


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.2,
    pad: int = 0,
    impl: str = "auto",
) -> Tensor:
    """reflect_pad(act(instance_norm(x)) + residual, pad), fused.

    x: [N, C, H, W] with the strides of channels_last, H * W >= 2; float32, bfloat16 or float16 (float64: reference
    only). weight, bias: float32 [C] (float64 with float64 x), both or neither. residual: shape, dtype and device of x,
    channels contiguous and pixels of a row next to each other, while rows and samples may lie at any pitch: the
    interior of a padded channels_last tensor will do. activation: None, "relu" or "leaky_relu" with `negative_slope`.
    pad: pixels on each side, 0 <= pad < min(H, W).

    Returns y [N, C, H + 2 pad, W + 2 pad] in x's dtype, dense channels_last. Statistics and all that is between
    reading x and writing y are float32 (float64 for float64). Gradients for x, weight, bias and residual, once; a
    gradient of y in another layout is copied to channels_last first. Results do not depend on the run: no atomics.

    impl: "auto" (on CUDA the Triton kernels once they are verified there, on the CPU the compiled ones, else the
    reference), "triton", "native", or "reference": plain PyTorch, which torch.func can transform and autograd can
    differentiate twice.

    Raises ValueError for a wrong shape, dtype, device, layout or option, and for an implementation that cannot be used
    here; RuntimeError inside torch.func transforms and in a second derivative, the reference excepted.
    Source: Ulyanov, Vedaldi, Lempitsky 2016 (arXiv:1607.08022), equation 4.
    """
    code = activation_code(activation, _ALLOWED_ACTIVATIONS)
    if impl == "reference":
        _check(x, weight, bias, residual, eps, pad, layout=False)
        return instance_norm_ref(
            x, weight, bias, residual, eps=eps, activation=activation, negative_slope=negative_slope, pad=pad
        )
    refuse_transforms("instance_norm")
    _check(x, weight, bias, residual, eps, pad, layout=True)
    arguments = (x, weight, bias, residual, eps, code, negative_slope, pad, impl)
    y: Tensor
    if not is_plain(x):
        y, _, _ = torch.ops.cyclegan_fast.instance_norm(*arguments)
    elif torch.is_grad_enabled():
        y = _Eager.apply(*arguments)
    else:
        y, _, _ = _forward(*arguments)
    return y


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    pad: int,
    *,
    layout: bool,
) -> None:
    """ValueError for what no implementation takes; `layout` for what the kernels do not."""
    if x.dim() != 4 or x.dtype not in _DTYPES:
        raise ValueError(f"instance_norm: x must be floating [N, C, H, W], but is {x.dtype} {list(x.shape)}")
    n, c, h, w = x.shape
    if n < 1 or c < 1 or h * w < 2 or (h + 2 * pad) * (w + 2 * pad) > _MAX_PIXELS:
        raise ValueError(
            f"instance_norm: x of shape {list(x.shape)} has no variance: at least one sample, one channel and two "
            f"pixels, and at most {_MAX_PIXELS} pixels with padding, are needed"
        )
    if not isinstance(pad, int) or not 0 <= pad < min(h, w):
        raise ValueError(f"instance_norm: pad = {pad} does not fit {h} x {w} pixels: 0 to {min(h, w) - 1} is possible")
    if not 0 < eps < math.inf:
        raise ValueError(f"instance_norm: eps = {eps} is not allowed: a finite number above 0")
    if layout and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"instance_norm: x must be dense channels_last, but has shape {list(x.shape)} and strides "
            f"{list(x.stride())}: x.contiguous(memory_format=torch.channels_last)"
        )
    _check_affine(x, weight, bias)
    if residual is not None:
        _check_residual(x, residual, layout)


def _check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None and bias is None:
        return
    if weight is None or bias is None:
        raise ValueError("instance_norm: weight and bias go together: give both or neither")
    wide = _wide(x.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (x.shape[1],) or tensor.dtype != wide or tensor.device != x.device:
            raise ValueError(
                f"instance_norm: {name} must be {wide} [{x.shape[1]}] on {x.device}, but is {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"instance_norm: {name} must be contiguous, but has stride {tensor.stride(0)}")


def _check_residual(x: Tensor, residual: Tensor, layout: bool) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"instance_norm: residual must be {x.dtype} {list(x.shape)} on {x.device} as x is, but is "
            f"{residual.dtype} {list(residual.shape)} on {residual.device}"
        )
    channels, width = x.shape[1], x.shape[3]
    # A dimension of size 1 has a stride that means nothing.
    packed = (channels == 1 or residual.stride(1) == 1) and (width == 1 or residual.stride(3) == channels)
    if layout and not packed:
        raise ValueError(
            f"instance_norm: residual must be channels_last within its rows (strides (any, 1, any, {channels})), but "
            f"has strides {list(residual.stride())}"
        )


def _matches_reference(device: torch.device, impl: str) -> None:
    """Forward and backward of every kind of kernel against the reference in float64 on the CPU."""
    generator = torch.Generator().manual_seed(3)
    cases = [
        (2, 64, 16, 24, 1, "relu", torch.float32),
        (1, 67, 9, 7, 3, "leaky_relu", torch.float32),
        (1, 64, 96, 97, 0, None, torch.bfloat16),
        (2, 256, 8, 8, 1, None, torch.bfloat16),
    ]
    for n, c, h, w, pad, activation, dtype in cases:
        shapes = ((n, c, h, w), (c,), (c,), (n, c, h, w), (n, c, h + 2 * pad, w + 2 * pad))
        x, weight, bias, residual, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        results = []
        for where, wide, kind in ((device, None, impl), (torch.device("cpu"), torch.float64, "reference")):
            leaves = []
            for tensor in (x, weight, bias, residual):
                kept = wide or (torch.float32 if tensor.dim() == 1 else dtype)
                layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                leaves.append(tensor.to(where, kept).contiguous(memory_format=layout).requires_grad_())
            y = instance_norm(*leaves, activation=activation, pad=pad, impl=kind)
            gradients = torch.autograd.grad(y, leaves, grad.to(where, y.dtype))
            results.append([y, *gradients])
        for name, result, expected in zip(("y", "dx", "dweight", "dbias", "dresidual"), *results, strict=True):
            _compare(name, result.detach().cpu().double(), expected.detach(), 2e-2 if dtype == torch.bfloat16 else 2e-5)


def _compare(name: str, result: Tensor, expected: Tensor, allowed: float) -> None:
    error = float((result - expected).norm() / expected.norm())
    if not error <= allowed:
        raise AssertionError(f"{name} differs from the reference by {error:.1e} of its norm, allowed is {allowed:.0e}")


register_check("instance_norm", "triton", lambda device: _matches_reference(device, "triton"))
register_check("instance_norm", "native", lambda device: _matches_reference(device, "native"), devices=("cpu",))
