"""Triton kernels that pad by reflection, and fold the padded gradient back; and what all convolution kernels share.

Both are copies of channels-last images [H, W, C], bound by memory. `fold` is the transpose of padding written as a
gather: each position sums its up to nine copies in one order, without atomics, so the bits are always the same.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cyclegan_fast.ops._launch import INTERPRETED, on_device
from cyclegan_fast.ops._layout import empty_channels_last

__all__ = ["Case", "border", "device_function", "fold", "gate_case", "gate_cases", "reflected"]

_FOLD_WARPS = 8  # with 4 the nine loads spill registers on sm_86

Case = tuple[Any, ...]  # of the compile gate; see `gate_case`

# A function of kernels. The interpreter takes milliseconds to enter a nested kernel, and needs none.
device_function: Any = (lambda function: function) if INTERPRETED else triton.jit


@device_function
def reflected(i, n):
    """Index i in [-n + 1, 2n - 2], reflected into [0, n)."""
    i = tl.abs(i)
    return n - 1 - tl.abs(n - 1 - i)


@triton.jit(do_not_specialize=["H", "W", "HO", "WO"])
def _border_kernel(
    x,
    out,
    H,
    W,
    HO,
    WO,
    PAD: tl.constexpr,
    C: tl.constexpr,
    REFLECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n, h, w] = x[n, h - PAD, w - PAD], reflected at the border or zero beyond it; grid (positions, C, N)."""
    n = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = q // WO - PAD
    j = q % WO - PAD
    store = (q < HO * WO)[:, None] & (c < C)[None, :]
    load = store
    if REFLECT:
        i = reflected(i, H)
        j = reflected(j, W)
    else:
        load = store & ((i >= 0) & (i < H) & (j >= 0) & (j < W))[:, None]
    v = tl.load(x + (n * H * W + i * W + j)[:, None] * C + c[None, :], mask=load, other=0.0)
    tl.store(out + (n * HO * WO + q)[:, None] * C + c[None, :], v, mask=store)


@device_function
def _source(i, n, PAD: tl.constexpr, COPY: tl.constexpr):
    """Padded index of a copy (0 itself, 1 across the lower edge, 2 across the upper) of index i, and if it exists."""
    at = i + PAD
    exists = i >= 0
    if COPY == 1:
        at = PAD - i
        exists = (i >= 1) & (i <= PAD)
    if COPY == 2:
        at = 2 * (n - 1) - i + PAD
        exists = (i <= n - 2) & (i >= n - 1 - PAD)
    return at, exists


@triton.jit(do_not_specialize=["H", "W"])
def _fold_kernel(
    padded,
    out,
    H,
    W,
    PAD: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n, h, w] = sum over the up to nine copies of (h, w) in the padded image, float32 sums; grid as `border`."""
    n = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    WP = W + 2 * PAD
    padded += n * (H + 2 * PAD) * WP * C
    acc = tl.full((BLOCK_M, BLOCK_C), 0.0, tl.float32)
    for row in tl.static_range(3):
        i, row_exists = _source(q // W, H, PAD, row)
        for col in tl.static_range(3):
            j, col_exists = _source(q % W, W, PAD, col)
            mask = ((q < H * W) & row_exists & col_exists)[:, None] & (c < C)[None, :]
            at = (i * WP + j).to(tl.int64)[:, None] * C + c[None, :]
            acc += tl.load(padded + at, mask=mask, other=0.0).to(tl.float32)
    at = (n * H * W + q)[:, None] * C + c[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(q < H * W)[:, None] & (c < C)[None, :])


def _tile(channels: int) -> tuple[int, int]:
    """Positions and channels of one program."""
    block = min(64, triton.next_power_of_2(channels))
    return 64 if block == 64 else 128, block


def border(x: Tensor, pad: int, height: int, width: int, *, reflect: bool) -> Tensor:
    """x [N, C, H, W] placed at (pad, pad) of [N, C, height, width]; around it its reflection, or zeros."""
    n, c, h, w = x.shape
    out = empty_channels_last(x, (n, c, height, width))
    rows, channels = _tile(c)
    grid = (triton.cdiv(height * width, rows), triton.cdiv(c, channels), n)
    with on_device(x):
        _border_kernel[grid](x, out, h, w, height, width, pad, c, reflect, rows, channels, num_warps=4)
    return out


def fold(padded: Tensor, pad: int) -> Tensor:
    """Transpose of reflection padding: [N, C, H + 2 pad, W + 2 pad] -> [N, C, H, W]."""
    n, c, hp, wp = padded.shape
    h, w = hp - 2 * pad, wp - 2 * pad
    out = empty_channels_last(padded, (n, c, h, w))
    rows, channels = _tile(c)
    grid = (triton.cdiv(h * w, rows), triton.cdiv(c, channels), n)
    with on_device(padded):
        _fold_kernel[grid](padded, out, h, w, pad, c, rows, channels, num_warps=_FOLD_WARPS)
    return out


def gate_cases() -> list[Case]:
    """Borders and folds of the head, the stem and the residual blocks, to be compiled without a GPU."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        cases += [_fold_case(dtype, 64, 3), _fold_case(dtype, 3, 3), _fold_case(dtype, 256, 1)]
        cases += [_border_case(dtype, 256, 1, True), _border_case(dtype, 256, 0, False)]
    return cases


def _blocks(c: int) -> dict[str, int]:
    return dict(zip(("BLOCK_M", "BLOCK_C"), _tile(c), strict=True))


def _fold_case(dtype: str, c: int, pad: int) -> Case:
    pointers = {"padded": f"*{dtype}", "out": f"*{dtype}"}
    name = f"{dtype} fold {c}, {pad} deep"
    return gate_case(name, _fold_kernel, pointers, {"PAD": pad, "C": c, **_blocks(c)}, _FOLD_WARPS, 3, False)


def _border_case(dtype: str, c: int, pad: int, reflect: bool) -> Case:
    pointers = {"x": f"*{dtype}", "out": f"*{dtype}"}
    name = f"{dtype} border {c}, {'reflected' if reflect else 'zeros'}"
    constants = {"PAD": pad, "C": c, "REFLECT": reflect, **_blocks(c)}
    return gate_case(name, _border_kernel, pointers, constants, 4, 3, False)


def gate_case(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    cores: bool,
) -> Case:
    """(name, kernel, signature, constants, num_warps, num_stages, whether tensor-core instructions are expected).

    What is neither pointer nor constant is an int32 size or stride.
    """
    signature = {argument: pointers.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    return name, kernel, signature, constants, num_warps, num_stages, cores
