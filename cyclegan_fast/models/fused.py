"""The networks of `reference`, with the same parameters and state-dict keys, executed by the fused operations.

Between two convolutions the reference runs norm, activation, residual sum and reflection padding one after another;
here all of that is one operation, `ops.instance_norm`, whose padded result is what the next convolution reads:

    reference    pad -> conv -> norm -> relu -> pad -> conv -> norm -> + x -> pad -> ...
    fused               conv -> [norm, relu, pad]    -> conv -> [norm, + x, pad]  -> ...

In a residual block the padded tensor is also the residual stream: the sum reads its interior. Activations are in
channels-last order throughout. A bias before a norm is subtracted again by it: it is not added, gets no gradient and
so stays what it is. Recomputation (Chen et al. 2016, arXiv:1604.06174) keeps only the input of each residual block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cyclegan_fast.models import reference
from cyclegan_fast.models.reference import InstanceNorm, ResizeConv2d, ResnetBlock, SameConv2d, SameConvTranspose2d
from cyclegan_fast.ops.conv import conv2d, conv_transpose2d
from cyclegan_fast.ops.instance_norm import instance_norm, runs_kernels
from cyclegan_fast.ops.reflect_conv import reflect_conv2d

__all__ = ["IMPLEMENTATIONS", "PatchDiscriminator", "PixelDiscriminator", "ResnetGenerator"]

IMPLEMENTATIONS = ("auto", "fused", "reference")

_STEM_PADDING = 3  # of the 7x7 convolutions at both ends of a generator


class _Executed:
    """What decides how a network runs: `impl`, which may be changed at any time."""

    def __init__(self, *arguments: Any, impl: str = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl = {impl!r} is not known: one of {', '.join(IMPLEMENTATIONS)}")
        self.impl = impl

    def _is_fused(self, x: Tensor) -> bool:
        return self.impl == "fused" or (self.impl == "auto" and _fused_is_faster(x))


class ResnetGenerator(_Executed, reference.ResnetGenerator):
    """`reference.ResnetGenerator` with a choice of execution; arguments, input and result as there.

    impl: "fused", "reference", or "auto": fused where the fused operations run as kernels (on CUDA once they are
    verified there, on the CPU with the compiled library). recompute: in training, keep only the input of each residual
    block and compute the rest again in the backward pass. The fused result is in channels-last order.
    """

    def __init__(self, *arguments: Any, impl: str = "auto", recompute: bool = False, **options: Any) -> None:
        super().__init__(*arguments, impl=impl, **options)
        self.recompute = recompute

    def _layers(self, x: Tensor) -> Tensor:
        if not self._is_fused(x):
            return self._reference_layers(x)
        _, stem, stem_norm, _, *middle, _, head, _ = self.model
        head = _conv2d(head)
        blocks = [layer for layer in middle if isinstance(layer, ResnetBlock)]
        first = middle.index(blocks[0])
        x = reflect_conv2d(_channels_last(x), _conv2d(stem).weight, None, padding=_STEM_PADDING)
        x = _norm(x, stem_norm, "relu")
        # Convolution, norm and ReLU each: the halvings, and after the blocks the doublings.
        x = _stages(x, middle[:first], pad=1)
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            x = self._block(x, block, pad=0 if after is None else 1)
        x = _stages(x, middle[first + len(blocks) :], pad=_STEM_PADDING)
        return reflect_conv2d(x, head.weight, head.bias, padding=0, activation="tanh")

    def _reference_layers(self, x: Tensor) -> Tensor:
        if not self._recomputes():
            return super()._layers(x)
        for layer in self.model:
            x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, ResnetBlock) else layer(x)
        return x

    def _block(self, x: Tensor, block: ResnetBlock, pad: int) -> Tensor:
        """A residual block on the stream padded by 1; the result is padded by `pad`."""
        if not self._recomputes():
            return _residual_block(x, block, pad)
        # Random states are read from the device, which a CUDA graph cannot; only dropout needs them.
        dropout = any(isinstance(layer, nn.Dropout) for layer in block.conv_block)
        y: Tensor = checkpoint(_residual_block, x, block, pad, use_reentrant=False, preserve_rng_state=dropout)
        return y

    def _recomputes(self) -> bool:
        return self.recompute and torch.is_grad_enabled()


class PatchDiscriminator(_Executed, reference.PatchDiscriminator):
    """`reference.PatchDiscriminator` with a choice of execution, `impl` as in `ResnetGenerator`.

    The fused execution has first derivatives only: a gradient penalty needs impl="reference".
    """

    def _layers(self, x: Tensor) -> Tensor:
        if not self._is_fused(x):
            return super()._layers(x)
        return _discriminate(x, self.model)


class PixelDiscriminator(_Executed, reference.PixelDiscriminator):
    """`reference.PixelDiscriminator` with a choice of execution; as `PatchDiscriminator`."""

    def _layers(self, x: Tensor) -> Tensor:
        if not self._is_fused(x):
            return super()._layers(x)
        return _discriminate(x, self.net)


def _discriminate(x: Tensor, layers: nn.Sequential) -> Tensor:
    """Convolution and LeakyReLU, then convolution, norm and LeakyReLU each, then a convolution."""
    first, activation, *stages, last = layers
    x = F.leaky_relu(_conv(_channels_last(x), first, bias=True), _slope(activation), inplace=True)
    return _conv(_stages(x, stages), last, bias=True)


def _stages(x: Tensor, layers: Sequence[nn.Module], pad: int = 0) -> Tensor:
    """Triples of convolution, norm and activation; the last result is padded by reflection."""
    for i in range(0, len(layers), 3):
        conv, norm, activation = layers[i : i + 3]
        leaky = isinstance(activation, nn.LeakyReLU)
        x = _norm(
            _conv(x, conv),
            norm,
            "leaky_relu" if leaky else "relu",
            slope=_slope(activation) if leaky else 0.0,
            pad=pad if i + 3 == len(layers) else 0,
        )
    return x


def _slope(activation: nn.Module) -> float:
    if not isinstance(activation, nn.LeakyReLU):
        raise TypeError(f"{type(activation).__name__} is not a LeakyReLU")
    return activation.negative_slope


def _residual_block(x: Tensor, block: ResnetBlock, pad: int) -> Tensor:
    """x [N, C, H + 2, W + 2], padded by reflection -> the block's result [N, C, H + 2 pad, W + 2 pad]."""
    convs = [layer for layer in block.conv_block if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in block.conv_block if isinstance(layer, InstanceNorm)]
    drops = [layer for layer in block.conv_block if isinstance(layer, nn.Dropout)]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x, interior = _Stream.apply(x)
    else:
        interior = x[:, :, 1:-1, 1:-1]  # a compiler merges the passes by itself, and cannot follow the Function
    y = reflect_conv2d(x, convs[0].weight, None, padding=0)
    if drops and drops[0].training:
        # The mask has to be mirrored with the rest, so here the padding belongs to the convolution.
        y = _channels_last(drops[0](_norm(y, norms[0], "relu")))
        y = reflect_conv2d(y, convs[1].weight, None, padding=1)
    else:
        y = _norm(y, norms[0], "relu", pad=1)
        y = reflect_conv2d(y, convs[1].weight, None, padding=0)
    return _norm(y, norms[1], None, residual=interior, pad=pad)


class _Stream(torch.autograd.Function):
    """A padded tensor as what a convolution reads and, its interior, as what a residual sum reads.

    Autograd by itself would put the sum's gradient into a padded tensor of zeros and add that: three passes over
    memory and a tensor. Here it is added in place to the gradient that the convolution has just made, which nobody
    else holds, because the first result goes to that convolution alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - the signature of a Function
        return x.view_as(x), x[:, :, 1:-1, 1:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_interior: Tensor) -> Tensor:  # noqa: ARG004
        grad[:, :, 1:-1, 1:-1].add_(grad_interior)
        return grad


def _norm(
    x: Tensor, norm: nn.Module, activation: str | None, *, slope: float = 0.0, residual: Tensor | None = None,
    pad: int = 0,
) -> Tensor:  # fmt: skip
    if not isinstance(norm, InstanceNorm):
        raise TypeError(f"{type(norm).__name__} is not an instance norm")
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = None if norm.weight is None else norm.weight.to(dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return instance_norm(
        _channels_last(x), weight, bias, residual, eps=norm.eps, activation=activation, negative_slope=slope, pad=pad
    )


def _conv(x: Tensor, conv: nn.Module, *, bias: bool = False) -> Tensor:
    """A zero-padded, transposed or resizing convolution of the reference, by default without its bias."""
    if not isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
        raise TypeError(f"{type(conv).__name__} is not a convolution of these networks")
    b = conv.bias if bias else None
    if isinstance(conv, SameConv2d):
        return conv.same(x, b)
    if isinstance(conv, ResizeConv2d):
        # The same as one transposed 4x4 convolution of the small map, with 16 products for 36. On AVX2 Winograd's
        # convolution of the resized map is faster all the same: 156 against 187 ms there and back, 256 -> 128 channels.
        return reflect_conv2d(_channels_last(conv.resize(x)), conv.weight, b, padding=1)
    stride, padding = conv.stride[0], int(conv.padding[0])  # the same in both directions
    if isinstance(conv, nn.Conv2d):
        return conv2d(x, conv.weight, b, stride, padding)
    y = conv_transpose2d(x, conv.weight, b, stride, padding, conv.output_padding[0])
    return y[:, :, :-1, :-1] if isinstance(conv, SameConvTranspose2d) else y


def _conv2d(layer: nn.Module) -> nn.Conv2d:
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"{type(layer).__name__} is not a convolution")
    return layer


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _fused_is_faster(x: Tensor) -> bool:
    """Whether the fused operations would run as kernels on x, rather than as their references."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return bool(runs_kernels(x.device, dtype))
