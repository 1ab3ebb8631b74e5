"""Triton kernels of `reflect_conv2d` for layers with at most four channels on one side.

The 7x7 stem (3 -> 64) and head (64 -> 3) are where the library is at its worst: a matrix unit wants 16 channels at
least. Here the thin side is never a dimension of its own. All tensors are channels-last, one image [H, W, C] dense.

* `thin_in`: few channels in, many out (stem forward; head's gradient of the input). Taps and thin channels together
  are the contraction, 49 x 3 = 147 padded to 160; the operand is gathered, with the reflection in the indices.
* `thin_out`: many channels in, few out (head forward; stem's gradient of the input). The taps of one *row* and the
  thin channels together are the columns, 7 x 4 = 28 padded to 32, so the wide tensor is read 7 times, not 49, and a
  program sums its columns along the row at the end, each shifted by its tap.
* `thin_weight_grad`: taps and thin channels are rows of the result, wide channels its columns, positions the
  contraction, split over programs that each write their partial sum; no atomics.

The gradient of a valid convolution is a convolution over the zero-bordered gradient with the taps turned around: the
same kernels with FULL set.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cyclegan_fast.ops._border_triton import Case, device_function, gate_case, reflected
from cyclegan_fast.ops._launch import INTERPRETED, multiprocessors, on_device
from cyclegan_fast.ops._layout import empty_channels_last

__all__ = ["activated", "gate_cases", "product", "thin_in", "thin_out", "thin_weight_grad"]

_INTERPRETED = tl.constexpr(INTERPRETED)
_THIN = 4  # columns kept for each tap in `thin_out`
_TAP_COLUMNS = 8  # taps of a row in `thin_out`, a power of two: kernels up to 7x7 leave one empty
# Positions of one program of `thin_in` and of `thin_out` (58 results, 6 shared with the neighbour); rows of the
# weight gradient and positions of one of its steps.
_IN_ROWS = 128
_OUT_ROWS = 64
_GRAD_ROWS = 64
_GRAD_POSITIONS = 64


@device_function
def activated(v, ACTIVATION: tl.constexpr):
    """0: v; 1: ReLU, which keeps NaN; 3: tanh to about 4 units in the last place of float32."""
    if ACTIVATION == 1:
        v = tl.where(v < 0, 0.0, v)
    if ACTIVATION == 3:
        # (1 - e) / (1 + e) loses digits near zero, where the odd series does not.
        e = tl.exp(-2.0 * tl.abs(v))
        ratio = (1.0 - e) / (1.0 + e)
        square = v * v
        series = v * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        v = tl.where(tl.abs(v) < 0.125, series, tl.where(v < 0, -ratio, ratio))
    return v


@device_function
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 sums."""
    if _INTERPRETED:  # the interpreter holds bfloat16 as integers and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@device_function
def _gather_thin(
    thin, h, w, valid, kk, H, W, THIN: tl.constexpr, SIZE: tl.constexpr, OFF: tl.constexpr, FULL: tl.constexpr
):
    """Values of tap and thin channel kk = (r SIZE + s) THIN + c at output positions (h, w), the two broadcast."""
    tap = kk // THIN
    i = h + (tap // SIZE - OFF)
    j = w + (tap % SIZE - OFF)
    valid = valid & (kk < SIZE * SIZE * THIN)
    if FULL:
        valid = valid & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    else:
        i = reflected(i, H)
        j = reflected(j, W)
    return tl.load(thin + (i * W + j).to(tl.int64) * THIN + kk % THIN, mask=valid, other=0.0)


# Sizes vary from picture to picture and decide no access's width: no kernel of their own for multiples of 16.
@triton.jit(do_not_specialize=["H", "W", "HO", "WO"])
def _thin_in_kernel(
    thin,
    weight,
    bias,
    y,
    H,
    W,
    HO,
    WO,
    w_thin,
    w_wide,
    w_row,
    w_col,
    THIN: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    OFF: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[n, q, k] = act(bias[k] + sum over kk of gathered[q, kk] weight[k, kk]); grid (positions, wide channels, N)."""
    n = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    thin += n * H * W * THIN
    h = (q // WO)[:, None]
    w = (q % WO)[:, None]
    valid = (q < HO * WO)[:, None]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k0 in range(0, SIZE * SIZE * THIN, BLOCK_K):
        kk = k0 + tl.arange(0, BLOCK_K)
        a = _gather_thin(thin, h, w, valid, kk[None, :], H, W, THIN, SIZE, OFF, FULL)
        tap = kk // THIN
        if FULL:
            tap = SIZE * SIZE - 1 - tap
        column = (kk % THIN) * w_thin + (tap // SIZE) * w_row + (tap % SIZE) * w_col
        mask = (kk < SIZE * SIZE * THIN)[:, None] & (k < WIDE)[None, :]
        b = tl.load(weight + column[:, None] + k[None, :] * w_wide, mask=mask, other=0.0)
        acc = product(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k < WIDE, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    at = (n * HO * WO + q)[:, None] * WIDE + k[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=valid & (k < WIDE)[None, :])


@triton.jit(do_not_specialize=["H", "W", "HO", "WO"])
def _thin_out_kernel(
    x,
    weight,
    bias,
    y,
    H,
    W,
    HO,
    WO,
    w_thin,
    w_wide,
    w_row,
    w_col,
    THIN: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    OFF: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """y[n, h, w, t] = act(bias[t] + sum over r, s, c of x[.., h + r, w + s, c] weight[t, c, r, s]); grid (tiles, N).

    Positions q run over rows of WO + SIZE - 1 columns. Column (s, t) of the accumulator at q is what tap s of output
    q - s needs; neighbouring programs overlap by SIZE - 1 positions.
    """
    n = tl.program_id(1).to(tl.int64)
    WQ = WO + SIZE - 1
    m = tl.arange(0, BLOCK_M)
    q = tl.program_id(0) * (BLOCK_M - SIZE + 1) + m
    h = q // WQ
    wq = q % WQ
    j = wq - OFF
    valid = q < HO * WQ
    if FULL:
        valid = valid & (j >= 0) & (j < W)
    else:
        j = reflected(j, W)
    x += n * H * W * WIDE
    column = tl.arange(0, TAPS * SLOTS)
    s = column // SLOTS
    t = column % SLOTS
    used = (s < SIZE) & (t < THIN)
    acc = tl.full((BLOCK_M, TAPS * SLOTS), 0.0, tl.float32)
    blocks: tl.constexpr = (WIDE + BLOCK_K - 1) // BLOCK_K
    for step in range(SIZE * blocks):
        r = step // blocks
        c = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        i = h + r - OFF
        rows = valid
        tap_row = r
        tap_col = s
        if FULL:
            rows = rows & (i >= 0) & (i < H)
            tap_row = SIZE - 1 - r
            tap_col = SIZE - 1 - s
        else:
            i = reflected(i, H)
        at = (i * W + j).to(tl.int64)[:, None] * WIDE + c[None, :]
        a = tl.load(x + at, mask=rows[:, None] & (c < WIDE)[None, :], other=0.0)
        at = c[:, None] * w_wide + (t * w_thin + tap_row * w_row + tap_col * w_col)[None, :]
        b = tl.load(weight + at, mask=(c < WIDE)[:, None] & used[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    source = tl.minimum(m[:, None] + s[None, :], BLOCK_M - 1)
    # Columns without a tap hold 0 times a neighbour's value, which is NaN when that is.
    shifted = tl.where(used[None, :], tl.gather(acc, source, 0), 0.0)
    out = tl.sum(tl.reshape(shifted, (BLOCK_M, TAPS, SLOTS)), 1)
    t = tl.arange(0, SLOTS)
    if HAS_BIAS:
        out += tl.load(bias + t, mask=t < THIN, other=0.0).to(tl.float32)[None, :]
    out = activated(out, ACTIVATION)
    mask = (m < BLOCK_M - SIZE + 1) & (h < HO) & (wq < WO)
    at = (n * HO * WO + h * WO + wq)[:, None] * THIN + t[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask[:, None] & (t < THIN)[None, :])


@triton.jit(do_not_specialize=["HT", "WT", "HV", "WV", "HO", "WO", "tiles", "all_tiles", "steps"])
def _thin_weight_grad_kernel(
    thin,
    wide,
    partial,
    HT,
    WT,
    HV,
    WV,
    HO,
    WO,
    tiles,
    all_tiles,
    steps,
    THIN: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    OFF: tl.constexpr,
    PAD: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, kk, c] = sum over the split's positions of gathered[kk, q] wide[q, c]; grid (kk, c, splits).

    FULL (head): q over the padded input, `wide` is the input at its reflected place. Otherwise (stem): q over the
    output, `wide` is its gradient, and row SIZE SIZE THIN sums ones: the gradient of the bias.
    """
    kk = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = tl.full((BLOCK_R, BLOCK_N), 0.0, tl.float32)
    for tile in range(split * steps, tl.minimum((split + 1) * steps, all_tiles)):
        n = (tile // tiles).to(tl.int64)
        q = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = q < HO * WO
        h = q // WO
        w = q % WO
        a = _gather_thin(
            thin + n * HT * WT * THIN,
            h[None, :],
            w[None, :],
            valid[None, :],
            kk[:, None],
            HT,
            WT,
            THIN,
            SIZE,
            OFF,
            FULL,
        )
        if FULL:
            q = reflected(h - PAD, HV) * WV + reflected(w - PAD, WV)
        else:
            ones = (kk == SIZE * SIZE * THIN)[:, None] & valid[None, :]
            a = tl.where(ones, 1.0, a.to(tl.float32)).to(a.dtype)
        at = (n * HV * WV + q)[:, None] * WIDE + c[None, :]
        b = tl.load(wide + at, mask=valid[:, None] & (c < WIDE)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    at = (split.to(tl.int64) * ROWS + kk)[:, None] * WIDE + c[None, :]
    tl.store(partial + at, acc, mask=(kk < ROWS)[:, None] & (c < WIDE)[None, :])


def _weight_strides(weight: Tensor, *, thin_first: bool) -> tuple[int, int, int, int]:
    first, second, row, col = weight.stride()
    return (first, second, row, col) if thin_first else (second, first, row, col)


def thin_in(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: int, *, full: bool) -> Tensor:
    """act(conv(reflect_pad(x, padding), weight) + bias) for x of at most 4 channels; weight [K, C, size, size].

    full: x is the gradient of an output of at most 4 channels instead, weight [x's channels, K, size, size], and the
    result the gradient of the *padded* input, [N, K, H + size - 1, W + size - 1].
    """
    n, c, h, w = x.shape
    size = weight.shape[2]
    wide = weight.shape[1 if full else 0]
    grow = size - 1 if full else 2 * padding - size + 1
    y = empty_channels_last(x, (n, wide, h + grow, w + grow))
    block_n = min(64, max(16, triton.next_power_of_2(wide)))
    grid = (triton.cdiv(y.shape[2] * y.shape[3], _IN_ROWS), triton.cdiv(wide, block_n), n)
    with on_device(x):
        _thin_in_kernel[grid](
            *(x, weight, bias, y, h, w, y.shape[2], y.shape[3]),
            *_weight_strides(weight, thin_first=full),
            *(c, wide, size, size - 1 if full else padding, full, bias is not None, activation, "ieee"),
            *(_IN_ROWS, block_n, 32),
            num_warps=8,
            num_stages=2,
        )
    return y


def thin_out(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: int, *, full: bool) -> Tensor:
    """act(conv(reflect_pad(x, padding), weight) + bias) to at most 4 channels; weight [K, C, size, size].

    full: x is the gradient of the output of a convolution with at most 4 input channels instead, weight
    [x's channels, K, size, size], and the result the gradient of its *padded* input.
    """
    n, c, h, w = x.shape
    size = weight.shape[2]
    thin = weight.shape[1 if full else 0]
    grow = size - 1 if full else 2 * padding - size + 1
    y = empty_channels_last(x, (n, thin, h + grow, w + grow))
    height, width = y.shape[2], y.shape[3]
    grid = (triton.cdiv(height * (width + size - 1), _OUT_ROWS - size + 1), n)
    with on_device(x):
        _thin_out_kernel[grid](
            *(x, weight, bias, y, h, w, height, width),
            *_weight_strides(weight, thin_first=not full),
            *(thin, c, size, size - 1 if full else padding, full, bias is not None, activation, "ieee"),
            *(_OUT_ROWS, _contraction(c, x.dtype), _THIN, _TAP_COLUMNS),
            num_warps=_out_warps(x.dtype == torch.float32),
            num_stages=3,
        )
    return y


def _out_warps(float32: bool) -> int:
    """Warps of the thin output kernel: without tensor cores, 4 spill registers on sm_120."""
    return 8 if float32 else 4


def thin_weight_grad(thin: Tensor, wide: Tensor, size: int, padding: int, *, full: bool) -> tuple[Tensor, Tensor]:
    """Gradient of a thin layer's weight as float32 [size, size, thin channels, wide channels], and of its bias.

    full = False: thin is the input, wide the gradient of the output; the bias gradient is [wide channels].
    full = True: thin is the gradient of the output, wide the input; the second result is empty.
    """
    n, t, ht, wt = thin.shape
    _, c, hv, wv = wide.shape
    height, width = (hv + 2 * padding, wv + 2 * padding) if full else (hv, wv)
    taps = size * size * t
    block_n = min(64, max(16, triton.next_power_of_2(c)))
    columns = triton.cdiv(taps + 1, _GRAD_ROWS) * triton.cdiv(c, block_n)
    tiles = triton.cdiv(height * width, _GRAD_POSITIONS)
    steps = triton.cdiv(n * tiles, max(1, multiprocessors(thin.device) // columns))
    splits = triton.cdiv(n * tiles, steps)
    partial = torch.empty((splits, taps + 1, c), dtype=torch.float32, device=thin.device)
    grid = (triton.cdiv(taps + 1, _GRAD_ROWS), triton.cdiv(c, block_n), splits)
    with on_device(thin):
        _thin_weight_grad_kernel[grid](
            *(thin, wide, partial, ht, wt, hv, wv, height, width, tiles, n * tiles, steps),
            *(t, c, size, size - 1 if full else padding, padding, full, "ieee"),
            *(taps + 1, _GRAD_ROWS, block_n, _GRAD_POSITIONS),
            num_warps=4,
            num_stages=3,
        )
    total = partial.sum(0)
    weight = total[:taps].view(size, size, t, c)
    # The gathered taps of FULL run backwards.
    return (weight.flip(0, 1), total.new_empty(0)) if full else (weight, total[taps])


def _contraction(channels: int, dtype: torch.dtype) -> int:
    """Channels of one step of the contraction; float32 is multiplied outside the matrix unit, from registers."""
    return min(64 if dtype.itemsize == 2 else 32, max(16, int(triton.next_power_of_2(channels))))


def gate_cases() -> list[Case]:
    """The kernels at the generator's real shapes and strides of weights, to be compiled without a GPU."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for full in (False, True):
            for channels_last in (True, False) if dtype == "bf16" else (True,):
                cases += _thin_cases(dtype, 3, full, channels_last)
            cases.append(_weight_grad_case(dtype, 3, full))
    return cases


def _thin_cases(dtype: str, channels: int, full: bool, channels_last: bool) -> list[Case]:
    """Stem and head forward, or, with `full`, their gradients of the input."""
    cores, order = dtype != "fp32", ", channels-last weight" if channels_last else ""
    flags: dict[str, Any] = {"WIDE": 64, "THIN": channels, "SIZE": 7, "OFF": 6 if full else 3, "FULL": full}
    flags |= {"PRECISION": "ieee", "HAS_BIAS": not full} | ({"bias": None} if full else {})
    bias = {} if full else {"bias": f"*{dtype}"}
    memory = torch.channels_last if channels_last else torch.contiguous_format
    stem, head = (
        torch.empty((*sides, 7, 7), device="meta", memory_format=memory) for sides in ((64, channels), (channels, 64))
    )
    tile = {"ACTIVATION": 0, "BLOCK_M": _IN_ROWS, "BLOCK_N": 64, "BLOCK_K": 32}
    pointers = dict.fromkeys(("thin", "weight", "y"), f"*{dtype}") | bias
    name = f"{dtype} 7x7 {channels}->64 {'head input grad' if full else 'stem'}{order}"
    sizes, ones = _stride_hints(_weight_strides(head if full else stem, thin_first=full))
    cases = [gate_case(name, _thin_in_kernel, pointers | sizes, flags | tile | ones, 8, 2, cores)]
    tile = {"ACTIVATION": 0 if full else 3, "BLOCK_M": _OUT_ROWS, "BLOCK_K": 64 if cores else 32}
    tile |= {"SLOTS": _THIN, "TAPS": _TAP_COLUMNS}
    pointers = dict.fromkeys(("x", "weight", "y"), f"*{dtype}") | bias
    name = f"{dtype} 7x7 64->{channels} {'stem input grad' if full else 'head'}{order}"
    sizes, ones = _stride_hints(_weight_strides(stem if full else head, thin_first=not full))
    warps = _out_warps(not cores)
    cases.append(gate_case(name, _thin_out_kernel, pointers | sizes, flags | tile | ones, warps, 3, cores))
    return cases


def _weight_grad_case(dtype: str, channels: int, full: bool) -> Case:
    constants = {"WIDE": 64, "THIN": channels, "SIZE": 7, "OFF": 6 if full else 3, "FULL": full, "PRECISION": "ieee"}
    constants |= {"PAD": 3, "ROWS": 49 * channels + 1, "BLOCK_R": _GRAD_ROWS, "BLOCK_N": 64}
    constants |= {"BLOCK_K": _GRAD_POSITIONS}
    pointers = {"thin": f"*{dtype}", "wide": f"*{dtype}", "partial": "*fp32"}
    name = f"{dtype} 7x7 {channels}, 64 {'head' if full else 'stem'} weight grad"
    return gate_case(name, _thin_weight_grad_kernel, pointers, constants, 4, 3, dtype != "fp32")


def _stride_hints(strides: tuple[int, int, int, int]) -> tuple[dict[str, str], dict[str, int]]:
    """What a launch would find out of the weight's strides: which are multiples of 16, and which are 1."""
    named = dict(zip(("w_thin", "w_wide", "w_row", "w_col"), strides, strict=True))
    multiples = {name: "i32:16" for name, stride in named.items() if stride % 16 == 0}
    return multiples, {name: stride for name, stride in named.items() if stride == 1}
