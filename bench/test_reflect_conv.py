"""reflect_conv2d at the generator's first, last and residual convolutions, against padding and cuDNN or oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contestants import BATCHES, DIRECTIONS, DTYPES, PYTORCH, dtype_of, ours
from measure import Call, Row, forward, forward_backward, random
from torch import Tensor

from cyclegan_fast.ops.reflect_conv import reflect_conv2d


@dataclass(frozen=True)
class Layer:
    """One convolution of stride 1 with reflection padding, for pictures of 256 x 256."""

    inputs: int
    outputs: int
    kernel: int
    side: int
    activation: str | None
    where: str

    def __str__(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.inputs}->{self.outputs} @ {self.side} ({self.where})"

    def bytes_moved(self, batch: int, size: int, direction: str) -> float:
        """x, weight and y; backward both maps again, their gradients, and the weight with its gradient."""
        maps = batch * self.side**2 * (self.inputs + self.outputs) * size
        weight = self.inputs * self.outputs * self.kernel**2 * size
        return maps + weight if direction == "forward" else 3 * maps + 3 * weight

    def flop(self, batch: int, direction: str) -> float:
        """2 x multiply-adds; backward as many again for each of the two gradients."""
        forward = 2.0 * batch * self.side**2 * self.inputs * self.outputs * self.kernel**2
        return forward if direction == "forward" else 3 * forward


LAYERS = (
    Layer(3, 64, 7, 256, None, "stem"),
    Layer(64, 3, 7, 256, "tanh", "head"),
    Layer(256, 256, 3, 64, None, "residual block"),
)


@pytest.mark.parametrize("contestant", [*ours(), *PYTORCH])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_reflect_conv(
    run: Callable[..., Row], small: bool, contestant: str, batch: int, layer: Layer, dtype: str, direction: str
) -> None:
    if small:
        batch, layer = 1, Layer(min(layer.inputs, 8), min(layer.outputs, 8), layer.kernel, 12, layer.activation, "")
    kind, pad = dtype_of(dtype), layer.kernel // 2

    def in_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), weight, bias)
        return torch.tanh(y) if layer.activation else y

    def in_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        impl = contestant.split(", ")[1]
        return reflect_conv2d(x, weight, bias, padding=pad, activation=layer.activation, impl=impl)

    def make() -> Call:
        nhwc = contestant != "eager NCHW"
        x = random(batch, layer.inputs, layer.side, layer.side, dtype=kind, nhwc=nhwc)
        weight = random(layer.outputs, layer.inputs, layer.kernel, layer.kernel, dtype=kind, nhwc=nhwc)
        bias = torch.randn(layer.outputs, dtype=kind, device=x.device)
        function: Callable[..., Any] = in_ours if contestant.startswith("ours") else in_pytorch
        if contestant == "torch.compile":
            function = torch.compile(function, fullgraph=True, dynamic=False)
        if direction == "forward":
            return forward(function, x, weight, bias)
        gradient = random(batch, layer.outputs, layer.side, layer.side, dtype=kind, nhwc=nhwc)
        return forward_backward(function, gradient, x, weight, bias)

    torch.backends.cudnn.benchmark = True
    row = Row("reflect_conv2d", str(layer), batch, dtype, direction, contestant)
    moved = layer.bytes_moved(batch, kind.itemsize, direction)
    run(row, make, must_move=moved, flop=layer.flop(batch, direction))
