"""crop_flip and pool_exchange at training's sizes, against the same law in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import BATCHES, ours
from measure import DEVICE, Call, Row, forward
from torch import Tensor

from cyclegan_fast.ops.crop_flip import crop_flip, crop_flip_ref
from cyclegan_fast.ops.image_pool import pool_exchange, pool_exchange_ref


@pytest.mark.parametrize("contestant", [*ours(native=("cpu",)), "eager PyTorch", "torch.compile"])
@pytest.mark.parametrize("batch", BATCHES)
def test_crop_flip(run: Callable[..., Row], small: bool, contestant: str, batch: int) -> None:
    pictures, side, size = (2, 12, (8, 8)) if small else (256, 286, (256, 256))

    def make() -> Call:
        store = torch.randint(0, 256, (pictures, side, side, 3), dtype=torch.uint8, device=DEVICE)
        index = torch.randint(0, pictures, (batch,), device=DEVICE)
        y, x = torch.randint(0, side - size[0] + 1, (2, batch), device=DEVICE).unbind()
        flip = torch.rand(batch, device=DEVICE) < 0.5
        function: Callable[..., Any] = crop_flip_ref
        if contestant.startswith("ours"):
            impl = contestant.split(", ")[1]
            function = lambda *arguments: crop_flip(*arguments, impl=impl)  # noqa: E731
        elif contestant == "torch.compile":
            function = torch.compile(crop_flip_ref, fullgraph=True, dynamic=False)
        return forward(function, store, index, y, x, flip, size)  # type: ignore[arg-type]

    row = Row("crop_flip", f"{size[0]} x {size[1]} of {side} x {side}", batch, "uint8", "forward", contestant)
    run(row, make, must_move=5.0 * batch * size[0] * size[1] * 3)


@pytest.mark.parametrize("contestant", [*ours(), "eager PyTorch", "torch.compile"])
@pytest.mark.parametrize("batch", BATCHES)
def test_pool_exchange(run: Callable[..., Row], small: bool, contestant: str, batch: int) -> None:
    """A full pool; every second picture is exchanged, so a picture costs 3 passes and every second one 1 more."""
    side = 8 if small else 256

    def make() -> Call:
        images = torch.randn(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
        buffer = torch.randn(50, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
        accept = torch.arange(batch, device=DEVICE) % 2 * 0.9
        slot = torch.randint(0, 50, (batch,), device=DEVICE)
        count = torch.tensor([50], device=DEVICE)
        function: Callable[..., Tensor] = pool_exchange_ref
        if contestant.startswith("ours"):
            impl = contestant.split(", ")[1]
            function = lambda *arguments: pool_exchange(*arguments, impl=impl)  # noqa: E731
        elif contestant == "torch.compile":
            function = torch.compile(pool_exchange_ref, fullgraph=True, dynamic=False)
        return forward(function, images, buffer, count, accept, slot)

    row = Row("pool_exchange", f"3 x {side} x {side}, 50 slots", batch, "float32", "forward", contestant)
    exchanged = (batch + 1) // 2
    run(row, make, must_move=4.0 * 3 * side**2 * (2 * batch + 2 * exchanged))
