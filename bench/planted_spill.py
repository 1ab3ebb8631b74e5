"""Kernels with faults: `kernel_gate.py --module planted_spill` has to fail, and a test sees to it that it does."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _planted_spill_kernel(x, y, BLOCK: tl.constexpr):
    """Subtract the mean of BLOCK values from each: all of them are live while the sum is taken."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values - tl.sum(values, axis=0) / BLOCK)


@triton.jit
def _planted_product_kernel(x, y, steps, BLOCK: tl.constexpr):
    """Sum of x[i] x[i] over `steps` square tiles."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        tile = tl.load(x + step * BLOCK * BLOCK + at)
        acc = tl.dot(tile, tile, acc, input_precision="ieee")
    tl.store(y + at, acc)


def gate_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, bool]]:
    """One kernel for each fault.

    One warp of 32 threads with 512 values each, twice what a thread has registers for; nine stages of tiles of 32 KB,
    more than any architecture's shared memory; and an exact product of float32 values, which no matrix unit takes.
    """
    block = {"BLOCK": 128}
    half, exact = ({"x": f"*{dtype}", "y": "*fp32", "steps": "i32"} for dtype in ("bf16", "fp32"))
    small = {"BLOCK": 32}
    return [
        ("planted spill", _planted_spill_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 16384}, 1, 1, False),
        ("planted shared memory", _planted_product_kernel, half, block, 8, 9, False),
        ("planted plain product", _planted_product_kernel, exact, small, 4, 2, True),
    ]
