"""A kernel that must spill: `kernel_gate.py --module planted_spill` has to fail, and a test sees to it that it does."""

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


def gate_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, bool]]:
    """One warp of 32 threads with 512 values each, twice what a thread has registers for."""
    return [("planted spill", _planted_spill_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 16384}, 1, 1, False)]
