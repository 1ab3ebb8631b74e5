"""Convolution and transposed convolution with zero padding: the library's, with a faster weight gradient on the CPU.

    conv2d:            y[n, k, i, j] = bias[k] + sum over c, r, s of weight[k, c, r, s] x[n, c, stride i + r - p, ...]
    conv_transpose2d:  its transpose: x and y change places, weight is [C, K, size, size]

The library computes results and input gradients in channels-last well, but on CPUs the weight gradient, the sum over
all positions of outer products of channels, at a fraction of what it computes a product of matrices. The compiled
kernel (csrc/conv_cpu.cpp) sorts a few rows into panels and multiplies those, tap by tap, sums in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.ops._launch import refuse_transforms, resolve_impl
from cyclegan_fast.ops._layout import empty_channels_last, exact_channels_last
from cyclegan_fast.ops._register import cpu_capability, refuse_derivative, refuse_vmap, register_autocast
from cyclegan_fast.ops.reflect_conv import check_kinds

__all__ = ["MEASURED_ON_CPU", "conv2d", "conv_transpose2d"]

# torch's name for the CPU's instruction set -> the least channels of the layer's narrower side from which the compiled
# weight gradient is faster than the library's, in float32 and channels-last; csrc/README.md has the times.
MEASURED_ON_CPU: dict[str, int] = {"AVX2": 64}


def _library(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: int, transposed: bool
) -> Tensor:
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    return F.conv2d(x, weight, bias, stride, padding)


def _runs_natively(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
    impl: str,
) -> Tensor:
    resolve_impl("conv2d", impl, x, {"native": _runs_natively(x)})
    return exact_channels_last(_library(x, weight, bias, stride, padding, output_padding, transposed))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each empty where `need` is False."""
    native = resolve_impl("conv2d", impl, x, {"native": _runs_natively(x)}) == "native"
    grad = grad_y.contiguous(memory_format=torch.channels_last)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    mask = [need[0], need[1] and not native, False]
    if any(mask):
        options = ([stride] * 2, [padding] * 2, [1, 1], transposed, [output_padding] * 2, 1)
        first, second, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *options, mask)
        grad_x = exact_channels_last(first) if need[0] else grad_x
        grad_weight = second if mask[1] else grad_weight
    if need[1] and native:
        grad_weight = _weight_grad(grad, x, weight, stride, padding, transposed)
    if need[1] and grad_weight.stride() != weight.stride():
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    if need[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    size, outputs, inputs = weight.shape[2], weight.shape[0], weight.shape[1]
    if transposed:  # the transposed convolution's gradient is its input
        grad, x = x, grad
    # Few outputs would leave vectors of them mostly empty; the kernel can take the inputs instead.
    swap = stride == 1 and outputs < min(inputs, 8)
    result: Tensor = torch.ops.cyclegan_fast_native.conv_weight_grad(
        grad, x, size, stride, padding, False, swap, channels_last
    )
    return result


_NAME = "cyclegan_fast::conv2d"
_BACKWARD_NAME = f"{_NAME}_backward"
_DEVICES = ("cpu", "cuda")
_OPTIONS = "int stride, int padding, int output_padding, bool transposed, str impl"

torch.library.define(_NAME, f"(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor")
torch.library.define(
    _BACKWARD_NAME, f"(Tensor grad_y, Tensor x, Tensor weight, {_OPTIONS}, bool[] need) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl(_NAME, _DEVICES, _forward)
torch.library.impl(_BACKWARD_NAME, _DEVICES, _backward)


@torch.library.register_fake(_NAME)
def _forward_fake(*arguments: Any) -> Tensor:
    x, weight, _, stride, padding, output_padding, transposed, _ = arguments
    n, _, *sides = x.shape
    grow = weight.shape[2] - 2 * padding
    if transposed:
        channels, sides = weight.shape[1], [(side - 1) * stride + grow + output_padding for side in sides]
    else:
        channels, sides = weight.shape[0], [(side - grow) // stride + 1 for side in sides]
    shape = (n, channels, *sides)
    return empty_channels_last(x, shape)


@torch.library.register_fake(_BACKWARD_NAME)
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, weight, *_, need = arguments
    grad_x = empty_channels_last(x, x.shape)
    grad_weight = torch.empty_like(weight) if need[1] else x.new_empty(0)
    return grad_x if need[0] else x.new_empty(0), grad_weight, x.new_empty(grad_y.shape[1] if need[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    grads = torch.ops.cyclegan_fast.conv2d_backward(grad_y, x, weight, *ctx.options, need)
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *(None,) * 5)


torch.library.register_autograd(_NAME, _gradients, setup_context=_setup_context)
refuse_derivative("conv2d_backward", 'conv2d: the kernels have no second derivative; impl="reference" has')
refuse_vmap(
    "conv2d",
    "conv2d_backward",
    message='conv2d cannot be used inside torch.func transforms: impl="reference" can',
)
register_autocast("conv2d")  # the library runs it then, as its own convolutions


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, *, impl: str = "auto"
) -> Tensor:
    """F.conv2d with square kernels, and a faster weight gradient on the CPU.

    x: [N, C, H, W]; weight: [K, C, size, size], any strides; bias: [K] or None; all of one dtype: float32, bfloat16,
    float16 or float64. stride >= 1, padding >= 0: zeros on all sides. Result: [N, K, (H + 2 padding - size) // stride
    + 1, ...] in x's dtype, channels-last where x is.

    impl: "native" (float32 on the CPU, x dense channels-last: the compiled weight gradient, the same bits for any
    number of threads; first derivatives only, no torch.func transforms), "reference" (the library alone), or "auto":
    "native" where `MEASURED_ON_CPU` says that it is faster, else "reference".

    Raises ValueError for a shape, dtype, device, layout, stride, padding or impl that is not as above.
    """
    return _run(x, weight, bias, stride, padding, 0, False, impl)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    *,
    impl: str = "auto",
) -> Tensor:
    """F.conv_transpose2d with square kernels, and a faster weight gradient on the CPU; see `conv2d`.

    weight: [C, K, size, size]; 0 <= output_padding < stride. Result: [N, K, (H - 1) stride - 2 padding + size +
    output_padding, ...].
    """
    return _run(x, weight, bias, stride, padding, output_padding, True, impl)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
    impl: str,
) -> Tensor:
    if impl not in ("auto", "native", "reference"):
        raise ValueError(f"conv2d: impl = {impl!r} is not known: one of 'auto', 'native', 'reference'")
    _check(x, weight, bias, stride, padding, output_padding, transposed)
    if impl == "auto":
        impl = "native" if _faster_natively(x, weight) else "reference"
    if impl == "reference":
        return _library(x, weight, bias, stride, padding, output_padding, transposed)
    refuse_transforms("conv2d")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"conv2d: x {tuple(x.shape)} with strides {x.stride()} is not dense channels-last; "
            "use x.contiguous(memory_format=torch.channels_last)"
        )
    y: Tensor = torch.ops.cyclegan_fast.conv2d(x, weight, bias, stride, padding, output_padding, transposed, impl)
    return y


def _faster_natively(x: Tensor, weight: Tensor) -> bool:
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    # Under autocast the op runs in a reduced dtype, which the compiled kernel does not take.
    if not _runs_natively(x) or torch.is_autocast_enabled("cpu"):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    least = MEASURED_ON_CPU.get(cpu_capability())
    return least is not None and min(weight.shape[0], weight.shape[1]) >= least


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: int, transposed: bool
) -> None:
    """ValueError for arguments that do not fit together."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"conv2d: x and weight have 4 dimensions, not {x.dim()} and {weight.dim()}")
    size = weight.shape[2]
    inputs, outputs = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0])
    if weight.shape[3] != size or x.shape[1] != inputs:
        form = "[C, K, size, size]" if transposed else "[K, C, size, size]"
        raise ValueError(f"conv2d: weight {tuple(weight.shape)} is not {form} with the C of x {tuple(x.shape)}")
    if min(*x.shape, *weight.shape) < 1:
        raise ValueError(f"conv2d: x {tuple(x.shape)} or weight {tuple(weight.shape)} is empty")
    if stride < 1 or padding < 0 or not 0 <= output_padding < stride:
        raise ValueError(
            f"conv2d: stride = {stride}, padding = {padding}, output_padding = {output_padding} are not allowed: at "
            "least 1, at least 0, and below the stride"
        )
    shortest = min(x.shape[2], x.shape[3])
    if (shortest - 1) * stride + size + output_padding <= 2 * padding if transposed else shortest + 2 * padding < size:
        raise ValueError(f"conv2d: nothing is left of x {tuple(x.shape)} with kernels of {size}, padding {padding}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"conv2d: bias {tuple(bias.shape)} is not [{outputs}]")
    check_kinds("conv2d", x, weight, bias)
