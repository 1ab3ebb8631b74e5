"""Convolution of stride 1 over a reflected border, with its activation.

    y[n, k, h, w] = act(bias[k] + sum over c, r, s of weight[k, c, r, s] x[n, c, |h + r - p|, |w + s - p|])

where |.| reflects at both edges, p is the padding. x [N, C, H, W], weight [K, C, size, size], y [N, K, H', W'] with
H' = H + 2p - size + 1; x and y channels-last. Sums are float32, y is rounded once.

Which implementation is the fastest is a matter of measurement: `MEASURED` holds what measurements on GPUs have decided,
`MEASURED_ON_CPU` those on CPUs, and whatever is not in them is left to the library. The Triton kernels cover up to 4
channels on one side with kernels up to 7x7 (`_reflect_conv_triton.py`: stem and head of the generator), and 3x3
otherwise (`_flat_conv_triton.py`). The compiled ones of csrc, in float32 on the CPU, compute 3x3 by Winograd's
F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308), a quarter of the products for a few more roundings; of other
kernels the weight gradient, and what has at most 4 channels as its result: the head, the stem's input gradient. The
library computes the rest.

Backward: the gradient of the padded input is a convolution over the zero-bordered gradient, and is folded back as a
gather; weight and bias gradients are partial sums, added in a fixed order. The same input gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.ops._launch import HAS_TRITON, activation_code, refuse_transforms, resolve_impl
from cyclegan_fast.ops._layout import empty_channels_last, exact_channels_last
from cyclegan_fast.ops._register import cpu_capability, refuse_derivative, refuse_vmap, register_autocast
from cyclegan_fast.ops._verify import register_check

if HAS_TRITON or TYPE_CHECKING:
    from cyclegan_fast.ops import _border_triton as borders
    from cyclegan_fast.ops import _flat_conv_triton as flat
    from cyclegan_fast.ops import _reflect_conv_triton as thin

__all__ = ["MEASURED", "MEASURED_ON_CPU", "layer_kind", "reflect_conv2d", "reflect_conv2d_ref"]

# (compute capability, kind of layer, channels of its wider side) -> "triton" or "reference", by the benchmarks of
# bench/ on that architecture. Empty: nothing has been measured on a GPU yet, and "auto" is the library everywhere.
MEASURED: dict[tuple[tuple[int, int], str, int], str] = {}
# (torch's name for the CPU's instruction set, kind of layer) -> the least channels of its narrower and its wider side
# from which "native" is faster in float32 than the library in channels-last; csrc/README.md has the times.
MEASURED_ON_CPU: dict[tuple[str, str], tuple[int, int]] = {
    ("AVX2", "flat"): (32, 32),
    ("AVX2", "thin_in"): (3, 64),
    ("AVX2", "thin_out"): (3, 64),
}
# Pixels below which the transform of a 3x3 filter costs what it saves.
_FEWEST_PIXELS = 1024

_RELU, _TANH = 1, 3
_ACTIVATIONS = (None, "relu", "tanh")
_THIN_CHANNELS = 4
_LARGEST_THIN_KERNEL = 7
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_POSITIONS = 2**31 - 2**16  # positions of one padded image are 32-bit in the kernels; what they address is not


def reflect_conv2d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 3, activation: str | None = None
) -> Tensor:
    """The definition by the library's own operations; arguments as `reflect_conv2d`, and float64 too."""
    return _activate(library_conv(reflect_pad(x, padding), weight, bias), activation_code(activation, _ACTIVATIONS))


def library_conv(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The library's valid convolution, channels-last."""
    y = F.conv2d(padded.contiguous(memory_format=torch.channels_last), weight, bias)
    return y.contiguous(memory_format=torch.channels_last)


def _activate(y: Tensor, activation: int) -> Tensor:
    return y.relu() if activation == _RELU else y.tanh() if activation == _TANH else y


def reflect_pad(x: Tensor, padding: int) -> Tensor:
    """x padded on all sides by reflection; deterministic, and so is its gradient."""
    if padding == 0:
        return x
    if not x.is_cuda:
        return F.pad(x, (padding,) * 4, mode="reflect")
    # On CUDA the library's padding loses channels-last, and its gradient adds atomically. These slices do neither.
    for dim in (3, 2):
        size = x.shape[dim]
        before, after = x.narrow(dim, 1, padding), x.narrow(dim, size - 1 - padding, padding)
        x = torch.cat([before.flip(dim), x, after.flip(dim)], dim)
    return x


def _fold_ref(padded: Tensor, padding: int) -> Tensor:
    """Transpose of `reflect_pad`."""
    if padding == 0:
        return padded
    for dim in (3, 2):
        size = padded.shape[dim] - 2 * padding
        folded = padded.narrow(dim, padding, size).clone(memory_format=torch.channels_last)
        folded.narrow(dim, 1, padding).add_(padded.narrow(dim, 0, padding).flip(dim))
        after = padded.narrow(dim, padding + size, padding)
        folded.narrow(dim, size - 1 - padding, padding).add_(after.flip(dim))
        padded = folded
    return padded


def layer_kind(weight_shape: torch.Size | tuple[int, ...], padding: int) -> str | None:
    """The kernels for a layer: "thin_in", "thin_out", "flat"; None where there are none."""
    outputs, inputs, size = weight_shape[0], weight_shape[1], weight_shape[2]
    if min(inputs, outputs) <= _THIN_CHANNELS and size <= _LARGEST_THIN_KERNEL:
        return "thin_in" if inputs <= _THIN_CHANNELS else "thin_out"
    return "flat" if size == 3 and padding <= 1 else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: int, impl: str) -> Tensor:
    check_layer(x, weight, bias, padding)
    kind = kernels_for(x, weight, padding)
    chosen = resolve_impl("reflect_conv2d", impl, x, {"triton": kind is not None, "native": runs_natively(x)})
    if chosen == "native" and (weight.shape[2] == 3 or weight.shape[0] <= _THIN_CHANNELS):
        return _forward_native(x, weight, bias, padding, activation)
    if chosen != "triton":
        return exact_channels_last(_activate(library_conv(reflect_pad(x, padding), weight, bias), activation))
    if kind == "flat":
        y, _, _ = flat.flat_conv(x, flat_weight(weight), bias, pad=padding, activation=activation)
        return y
    run = thin.thin_in if kind == "thin_in" else thin.thin_out
    return run(x, weight, bias, padding, activation, full=False)


def _forward_native(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: int) -> Tensor:
    native = torch.ops.cyclegan_fast_native
    run = native.thin_conv_forward if weight.shape[0] <= _THIN_CHANNELS else native.conv3x3_forward
    bias = bias if bias is None else bias.contiguous()
    y: Tensor = run(x, weight, bias, padding, int(activation == _RELU))
    return y.tanh_() if activation == _TANH else y


def runs_natively(x: Tensor) -> bool:
    """Whether the compiled kernels take tensors like x."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    padding: int,
    activation: int,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each empty where `need` is False; y is there if there is an activation."""
    check_layer(x, weight, None, padding)
    kind = kernels_for(x, weight, padding)
    chosen = resolve_impl("reflect_conv2d", impl, x, {"triton": kind is not None, "native": runs_natively(x)})
    grad = grad_y.contiguous(memory_format=torch.channels_last)
    if y is not None and activation == _RELU:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if y is not None and activation == _TANH:
        grad = torch.ops.aten.tanh_backward(grad, y)
    if chosen == "reference":
        grads = _backward_ref(grad, x, weight, padding, need)
    elif chosen == "native":
        grads = _backward_native(grad, x, weight, padding, need)
    elif kind == "flat":
        grads = _backward_flat(grad, x, weight, padding, need)
    else:
        grads = _backward_thin(grad, x, weight, padding, need, kind == "thin_out")
    nothing = x.new_empty(0)
    grad_x, grad_weight, grad_bias = (nothing if g is None else g for g in grads)
    if need[0]:
        grad_x = exact_channels_last(grad_x)
    if need[1] and (chosen != "native" or grad_weight.stride() != weight.stride()):
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    # A library may hand out one tensor twice, an op may not.
    return grad_x, grad_weight, grad_bias.to(weight.dtype) if need[2] else x.new_empty(0)


_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _backward_ref(grad: Tensor, x: Tensor, weight: Tensor, padding: int, need: list[bool]) -> _Grads:
    padded = reflect_pad(x, padding).contiguous(memory_format=torch.channels_last)
    stride, none = [1, 1], [0, 0]
    sizes = [weight.shape[0]]
    grads = torch.ops.aten.convolution_backward(grad, padded, weight, sizes, stride, none, stride, False, none, 1, need)
    return (_fold_ref(grads[0], padding) if need[0] else None), grads[1], grads[2]


def _backward_native(grad: Tensor, x: Tensor, weight: Tensor, padding: int, need: list[bool]) -> _Grads:
    native = torch.ops.cyclegan_fast_native
    outputs, inputs, size = weight.shape[:3]
    grad_x = grad_weight = None
    if need[0]:
        if inputs <= _THIN_CHANNELS:
            grad_x = native.thin_conv_input_grad(grad, weight, padding)
        elif size == 3:
            grad_x = native.conv3x3_input_grad(grad, weight, padding, True)
        else:
            grad_x, _, _ = _backward_ref(grad, x, weight, padding, [True, False, False])
    if need[1]:
        channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        if size == 3 and min(inputs, outputs) > _THIN_CHANNELS:
            grad_weight = native.conv3x3_weight_grad(grad, x, padding, True, channels_last)
        else:
            few_outputs = outputs < min(inputs, 8)
            grad_weight = native.conv_weight_grad(grad, x, size, 1, padding, True, few_outputs, channels_last)
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if need[2] else None


def _backward_thin(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, need: list[bool], few_outputs: bool
) -> _Grads:
    grad_x = grad_weight = grad_bias = None
    if need[0]:
        run = thin.thin_in if few_outputs else thin.thin_out
        padded = run(grad, weight, None, padding, 0, full=True)
        grad_x = borders.fold(padded, padding) if padding else padded
    if few_outputs:
        if need[1]:
            sums, _ = thin.thin_weight_grad(grad, x, weight.shape[2], padding, full=True)
            grad_weight = sums.permute(2, 3, 0, 1)
        grad_bias = _sum_positions(grad) if need[2] else None
    elif need[1] or need[2]:
        sums, grad_bias = thin.thin_weight_grad(x, grad, weight.shape[2], padding, full=False)
        grad_weight = sums.permute(3, 2, 0, 1)
    return grad_x, grad_weight, grad_bias


def _backward_flat(grad: Tensor, x: Tensor, weight: Tensor, padding: int, need: list[bool]) -> _Grads:
    grad_x = grad_weight = None
    pitch = (x.shape[2] + 2 * padding, x.shape[3] + 2 * padding)
    if need[0] or need[1]:
        zeroed = flat.zeroed(grad, pitch)
    if need[0]:
        padded = flat.flat_input_grad(zeroed, flat_weight(weight))
        grad_x = borders.fold(padded, padding) if padding else padded
    if need[1]:
        padded = borders.border(x, padding, *pitch, reflect=True) if padding else x
        grad_weight = flat.flat_weight_grad(padded, zeroed)
    return grad_x, grad_weight, _sum_positions(grad) if need[2] else None


def _sum_positions(grad: Tensor) -> Tensor:
    return grad.sum((0, 2, 3), dtype=torch.float32)


def flat_weight(weight: Tensor) -> Tensor:
    """The weight as the matrix [K, 9 C]: a copy unless the model keeps its weights channels-last."""
    return weight.contiguous(memory_format=torch.channels_last)


def kernels_for(x: Tensor, weight: Tensor, padding: int) -> str | None:
    """`layer_kind`, None also where the kernels cannot take x."""
    positions = (x.shape[2] + 2 * padding + weight.shape[2]) * (x.shape[3] + 2 * padding + weight.shape[2])
    if x.dtype not in _DTYPES or positions > _MOST_POSITIONS:
        return None
    return layer_kind(weight.shape, padding)


def empty_result(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Uninitialised result of the convolution."""
    grow = 2 * padding - weight.shape[2] + 1
    shape = (x.shape[0], weight.shape[0], x.shape[2] + grow, x.shape[3] + grow)
    return empty_channels_last(x, shape)


_NAME = "cyclegan_fast::reflect_conv2d"
_BACKWARD_NAME = f"{_NAME}_backward"
_DEVICES = ("cpu", "cuda")

torch.library.define(_NAME, "(Tensor x, Tensor weight, Tensor? bias, int padding, int activation, str impl) -> Tensor")
torch.library.define(
    _BACKWARD_NAME,
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor? y, int padding, int activation, str impl, bool[] need) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.impl(_NAME, _DEVICES, _forward)
torch.library.impl(_BACKWARD_NAME, _DEVICES, _backward)


@torch.library.register_fake(_NAME)
def _forward_fake(*arguments: Any) -> Tensor:
    x, weight, _, padding, *_ = arguments
    return empty_result(x, weight, padding)


@torch.library.register_fake(_BACKWARD_NAME)
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, weight, *_, need = arguments
    grad_x = empty_channels_last(x, x.shape)
    grad_weight = torch.empty_like(weight) if need[1] else x.new_empty(0)
    return grad_x if need[0] else x.new_empty(0), grad_weight, weight.new_empty(weight.shape[0] if need[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, ctx.activation, ctx.impl = inputs
    ctx.save_for_backward(x, weight, output if ctx.activation else None)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight, y = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    grads = torch.ops.cyclegan_fast.reflect_conv2d_backward(
        grad_y, x, weight, y, ctx.padding, ctx.activation, ctx.impl, need
    )
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None)


torch.library.register_autograd(_NAME, _gradients, setup_context=_setup_context)
refuse_derivative(
    "reflect_conv2d_backward", 'reflect_conv2d: the kernels have no second derivative; impl="reference" has'
)
refuse_vmap(
    "reflect_conv2d",
    "reflect_conv2d_backward",
    message='reflect_conv2d cannot be used inside torch.func transforms: impl="reference" can',
)
register_autocast("reflect_conv2d")


def reflect_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 3,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """act(conv(reflect_pad(x, padding), weight) + bias), stride 1.

    x: [N, C, H, W], dense channels-last; float32, bfloat16 or float16 (the reference: any strides, and float64 too).
    weight: [K, C, size, size], any strides; bias: [K] or None; both of x's dtype. padding: 0 to min(H, W) - 1; 0 takes
    an x that is padded already. activation: None, "relu" or "tanh". Result: [N, K, H + 2 padding - size + 1, W + ...],
    x's dtype, dense channels-last. Under autocast everything is cast to its dtype, as by the library's convolution.

    impl: "auto" is "reference", the library's padding and convolution, except for the layers in `MEASURED` and
    `MEASURED_ON_CPU`; "triton" covers kernels up to 7x7 with at most 4 channels on one side, and 3x3 with padding 0 or
    1; "native" covers float32 on the CPU. float32 products are exact in "triton" (no TF32); "native" is off by up to
    2e-5 of the largest result for 3x3. Both have gradients of the first order, no torch.func transforms, and the same
    bits for the same input ("native": for any number of threads, where it does not leave the work to the library);
    the copy "triton" makes of a weight that is not channels-last is for 3x3 only.

    Raises ValueError for a shape, dtype, device, layout, padding, activation or impl that is not as above.
    """
    code = activation_code(activation, _ACTIVATIONS)
    if impl != "reference":
        refuse_transforms("reflect_conv2d")
    check_layer(x, weight, bias, padding, layout=impl != "reference")
    if impl == "auto":
        impl = measured_choice(x, weight, padding)
    if impl == "reference":
        return _activate(library_conv(reflect_pad(x, padding), weight, bias), code)
    y: Tensor = torch.ops.cyclegan_fast.reflect_conv2d(x, weight, bias, padding, code, impl)
    return y


def measured_choice(x: Tensor, weight: Tensor, padding: int) -> str:
    """ "auto" where a measurement has found the kernels faster, to be verified when it runs; else "reference"."""
    if x.device.type == "cpu":
        return "native" if _faster_natively(x, weight) else "reference"
    kind = layer_kind(weight.shape, padding)
    if not MEASURED or not x.is_cuda or kind is None:
        return "reference"
    key = (_capability(x.device.index), kind, max(weight.shape[0], weight.shape[1]))
    return "auto" if MEASURED.get(key) == "triton" else "reference"


def _faster_natively(x: Tensor, weight: Tensor) -> bool:
    # Under autocast the op runs in a reduced dtype, which the compiled kernels do not take.
    if not runs_natively(x) or torch.is_autocast_enabled("cpu"):
        return False
    least = MEASURED_ON_CPU.get((cpu_capability(), cpu_kind(weight.shape)))
    if least is None or x.shape[0] * x.shape[2] * x.shape[3] < _FEWEST_PIXELS:
        return False
    channels = sorted(weight.shape[:2])
    return channels[0] >= least[0] and channels[1] >= least[1]


def cpu_kind(weight_shape: torch.Size | tuple[int, ...]) -> str:
    """The compiled kernels for a layer: "thin_in", "thin_out", "flat", or "other"."""
    return layer_kind(weight_shape, 0) or "other"


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    *,
    layout: bool = True,
    op: str = "reflect_conv2d",
) -> None:
    """ValueError, in the name of `op`, for arguments that do not fit together; `layout` for x that only the definition
    can take."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"{op}: x and weight have 4 dimensions, not {x.dim()} and {weight.dim()}")
    size, channels = weight.shape[2], weight.shape[1]
    if weight.shape[3] != size or x.shape[1] != channels:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} is not [K, {x.shape[1]}, size, size] as x {tuple(x.shape)} needs"
        )
    if min(*x.shape, *weight.shape) < 1:
        raise ValueError(f"{op}: x {tuple(x.shape)} or weight {tuple(weight.shape)} is empty")
    smallest = min(x.shape[2], x.shape[3])
    if not 0 <= padding < smallest or smallest + 2 * padding < size:
        raise ValueError(
            f"{op}: padding = {padding} is not allowed for x {tuple(x.shape)} and a kernel of {size}: it "
            f"must be below {smallest}, and the padded x must hold the kernel"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{op}: bias {tuple(bias.shape)} is not [{weight.shape[0]}]")
    if layout and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{op}: x {tuple(x.shape)} with strides {x.stride()} is not dense channels-last; "
            "use x.contiguous(memory_format=torch.channels_last)"
        )
    check_kinds(op, x, weight, bias)


def check_kinds(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError for tensors of different devices or dtypes; under autocast dtypes are made equal later."""
    casts = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (*_DTYPES, torch.float64):
            raise ValueError(f"{op}: {name} is {tensor.dtype}, not float32, bfloat16, float16 or float64")
        if tensor.device != x.device or (tensor.dtype != x.dtype and not casts):
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}; "
                "they must be the same"
            )


def _matches_reference(device: torch.device) -> None:
    """Raise unless the kernels agree with the library in float64: forward and gradients, one layer of each kind."""
    generator = torch.Generator().manual_seed(0)
    layers = ((3, 64, 7, 3, None), (64, 3, 7, 3, "tanh"), (64, 64, 3, 1, "relu"), (64, 64, 3, 0, None))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for inputs, outputs, size, padding, activation in layers:
            x = torch.randn(2, inputs, 13, 18, generator=generator).contiguous(memory_format=torch.channels_last)
            shape = (outputs, inputs, size, size)
            weight = torch.randn(shape, generator=generator) / (inputs * size * size) ** 0.5
            leaves = [x, weight, torch.randn(outputs, generator=generator)]
            leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            y = reflect_conv2d(leaves[0], leaves[1], leaves[2], padding=padding, activation=activation, impl="triton")
            grad = torch.randn(y.shape, generator=generator).to(y)
            wanted = reflect_conv2d_ref(exact[0], exact[1], exact[2], padding, activation)
            results = [y, *torch.autograd.grad(y, leaves, grad)]
            references = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
            for name, result, reference in zip(("y", "dx", "dweight", "dbias"), results, references, strict=True):
                error = ((result.double() - reference).norm() / reference.norm()).item()
                if not error <= tolerance:
                    layer = f"{inputs} -> {outputs} channels, {size}x{size}, {dtype}"
                    raise RuntimeError(f"{name} of {layer}: relative error {error:.2g}, allowed {tolerance:g}")


register_check("reflect_conv2d", "triton", _matches_reference)
