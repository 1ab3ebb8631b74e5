"""3x3 convolution that normalises its input while loading it and takes the statistics of its result: forward only.

    z = relu?(x scale + shift)                                     prologue, scale and shift per image and channel
    y = conv(reflect_pad(z, padding), weight) + bias               x [N, C, H, W], weight [K, C, 3, 3]
    mean, rstd = mean of y, 1 / sqrt(var of y + eps)               epilogue, per image and channel

Between two convolutions of a residual block, norm, activation and padding then cost no pass over memory. It pays only
where the kernel is nearly as fast as the library's convolution, so "auto" is the library until `MEASURED` in
`reflect_conv` says otherwise; and only without gradients, whose weight part would rebuild z.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cyclegan_fast.ops._launch import HAS_TRITON, refuse_transforms, resolve_impl
from cyclegan_fast.ops._layout import exact_channels_last
from cyclegan_fast.ops._register import refuse_derivative, refuse_vmap, register_autocast
from cyclegan_fast.ops._verify import register_check
from cyclegan_fast.ops.reflect_conv import (
    check_layer,
    empty_result,
    flat_weight,
    kernels_for,
    library_conv,
    measured_choice,
    reflect_pad,
)

if HAS_TRITON or TYPE_CHECKING:
    from cyclegan_fast.ops import _flat_conv_triton as flat

__all__ = ["flat_conv3x3", "flat_conv3x3_ref"]


def flat_conv3x3_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `flat_conv3x3` with statistics, by the library's own operations."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if scale is not None and shift is not None:
        prepared = x.to(dtype) * scale[:, :, None, None] + shift[:, :, None, None]
        x = (prepared.relu() if relu else prepared).to(x.dtype)
    y = library_conv(reflect_pad(x, padding), weight, bias)
    var, mean = torch.var_mean(y.to(dtype), dim=(2, 3), correction=0)
    return y, mean, torch.rsqrt(var + eps)


def _flat_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    statistics: bool,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_layer(x, weight, bias, padding, op="flat_conv3x3")
    available = {"triton": kernels_for(x, weight, padding) is not None}
    if resolve_impl("flat_conv3x3", impl, x, available) == "reference":
        y, mean, rstd = flat_conv3x3_ref(x, weight, bias, padding, scale, shift, relu, eps)
        y = exact_channels_last(y)
    else:
        y, mean, rstd = flat.flat_conv(
            *(x, flat_weight(weight), bias),
            pad=padding,
            scale=scale,
            shift=shift,
            relu=relu,
            statistics=statistics,
            eps=eps,
        )
    return (y, mean, rstd) if statistics else (y, x.new_empty(0), x.new_empty(0))


_NAME = "cyclegan_fast::flat_conv3x3"

torch.library.define(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, int padding, Tensor? scale, Tensor? shift, bool relu, bool statistics, "
    "float eps, str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)
torch.library.impl(_NAME, ("cpu", "cuda"), _flat_forward)


@torch.library.register_fake(_NAME)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, padding, _, _, _, statistics, *_ = arguments
    y = empty_result(x, weight, padding)
    if not statistics:
        return y, x.new_empty(0), x.new_empty(0)
    mean = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return y, mean, torch.empty_like(mean)


refuse_derivative("flat_conv3x3", "flat_conv3x3 has no gradient; reflect_conv2d has")
refuse_vmap("flat_conv3x3", message="flat_conv3x3 cannot be used inside torch.func transforms")
register_autocast("flat_conv3x3")  # scale and shift stay float32


def flat_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """3x3 convolution that can normalise its input while loading it, and take the statistics of its result.

    y = conv(reflect_pad(prologue(x), padding), weight) + bias with prologue(x) = x scale + shift, then ReLU if `relu`:
    scale and shift float32 [N, C], both or neither, for a norm rstd weight and bias - mean rstd weight. x, weight, bias
    as `reflect_conv2d`, padding 0 or 1; padding 0 takes a padded x, to which the prologue applies as well because it
    commutes with reflection.

    Returns (y, mean, rstd); with `statistics`, mean and 1 / sqrt(var + eps) of each image and channel of y as rounded,
    float32 [N, K], without another pass over y: what `instance_norm` would compute of it; else both are empty. Forward
    only: for gradients there is `reflect_conv2d`. Under autocast x, weight and bias are cast to its dtype.
    Raises ValueError as that does, and for another kernel size, an eps that is not positive, or a scale or shift of
    another shape, dtype, device or layout.
    """
    refuse_transforms("flat_conv3x3")
    check_layer(x, weight, bias, padding, op="flat_conv3x3")
    if weight.shape[2] != 3 or padding > 1:
        raise ValueError(f"flat_conv3x3: a kernel of 3x3 and padding 0 or 1, not {tuple(weight.shape)} and {padding}")
    if not eps > 0:
        raise ValueError(f"flat_conv3x3: eps = {eps} is not allowed: a number above 0")
    if (scale is None) != (shift is None) or (relu and scale is None):
        raise ValueError("flat_conv3x3: scale and shift come together, and relu with them")
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and (
            value.shape != x.shape[:2] or value.dtype != torch.promote_types(x.dtype, torch.float32)
        ):
            raise ValueError(f"flat_conv3x3: {name} must be float32 [N, C], not {value.dtype} {tuple(value.shape)}")
        if value is not None and (value.device != x.device or not value.is_contiguous()):
            raise ValueError(f"flat_conv3x3: {name} must be contiguous and on {x.device}")
    if impl == "auto":
        impl = measured_choice(x, weight, padding)
    return torch.ops.cyclegan_fast.flat_conv3x3(  # type: ignore[no-any-return]
        x, weight, bias, padding, scale, shift, relu, statistics, eps, impl
    )


def _matches_reference(device: torch.device) -> None:
    """Raise unless result and statistics are the definition's, with prologue, padded and not."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for padding in (0, 1):
            x = torch.randn(2, 64, 13, 18, generator=generator).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(64, 64, 3, 3, generator=generator) / 24
            x, weight = x.to(device, dtype), weight.to(device, dtype)
            scale, shift = (torch.randn(2, 64, generator=generator).to(device) for _ in range(2))
            options: dict[str, Any] = {"padding": padding, "scale": scale, "shift": shift, "relu": True}
            results = flat_conv3x3(x, weight, statistics=True, impl="triton", **options)
            options |= {"scale": scale.double(), "shift": shift.double()}
            references = flat_conv3x3_ref(x.double(), weight.double(), **options)
            for name, result, reference in zip(("y", "mean", "rstd"), results, references, strict=True):
                error = ((result.double() - reference).norm() / reference.norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{name} in {dtype}: relative error {error:.2g}, allowed {tolerance:g}")


register_check("flat_conv3x3", "triton", _matches_reference)
