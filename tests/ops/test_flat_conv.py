"""`flat_conv3x3` as a registered op: compiled, under autocast, refusals. Its arithmetic: test_reflect_conv.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cyclegan_fast.ops import _launch
from cyclegan_fast.ops.flat_conv import flat_conv3x3
from cyclegan_fast.ops.reflect_conv import reflect_conv2d

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
IMPLS = ["auto", *(["triton"] if _launch.INTERPRETED or (_launch.HAS_TRITON and CUDA) else [])]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, 16, 4, 5), draw(16, 16, 3, 3) / 12, draw(16)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl: str) -> None:
    scale = draw(1, 16).abs()

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"padding": 1, "scale": scale, "shift": scale, "relu": True, "statistics": True}
        return tuple(2 * part for part in flat_conv3x3(2 * x, weight, bias, impl=impl, **options))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, wanted in zip(compiled(*arguments()), step(*arguments()), strict=True):
        assert torch.equal(result, wanted)
        assert result.stride() == wanted.stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_reflect_conv2d_of_3x3_compiles_with_its_gradients(impl: str) -> None:
    def step(*leaves: Tensor) -> Tensor:
        return reflect_conv2d(2 * leaves[0], *leaves[1:], padding=1, activation="relu", impl=impl).sin()

    leaves = [leaf.requires_grad_() for leaf in arguments()]
    torch._dynamo.reset()
    result, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), step(*leaves)
    assert torch.equal(result, wanted)
    grads, others = (torch.autograd.grad(y.sum(), leaves) for y in (result, wanted))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_convolves_in_its_dtype(impl: str) -> None:
    """Whatever of the three has another dtype; the scale and the statistics stay float32."""
    x, weight, bias = arguments()
    scale = draw(1, 16).abs()
    options: dict[str, Any] = {"padding": 1, "scale": scale, "shift": scale, "statistics": True, "impl": impl}
    narrow = [tensor.bfloat16() for tensor in (x, weight, bias)]
    wanted = flat_conv3x3(*narrow, **options)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for mixed in ((x, weight, bias), (narrow[0], weight, bias), (x, narrow[1], narrow[2])):
            results = flat_conv3x3(*mixed, **options)
            assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert wanted[0].dtype == torch.bfloat16
    assert wanted[1].dtype == torch.float32


def test_without_autocast_dtypes_must_agree() -> None:
    x, weight, bias = arguments()
    with pytest.raises(ValueError, match="must be the same"):
        flat_conv3x3(x.bfloat16(), weight, bias)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_eps_is_above_zero(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps = .* is not allowed"):
        flat_conv3x3(*arguments(), padding=1, statistics=True, eps=eps)
