"""Triton kernels of 3x3 convolutions as products of plain matrices ("padded-flat").

A padded channels-last image [HP, WP, C] read as a matrix [HP WP, C] turns tap (r, s) of a valid 3x3 convolution into
the same matrix shifted down by r WP + s rows: the convolution is nine accumulated matrix products, with no gather and
no im2col. The two rows' ends per line compute values that nobody reads, 3 % of the work at 64x64. With

    zeroed  the gradient of the output [HP - 2, WP - 2, K] in the upper left of zeros [HP, WP, K]

the gradient of the padded input is the same product with the shifts upwards, because a shift past a line's beginning
arrives at the zeros at the end of the line above; and the weight gradient is, for each tap, the product of the
transposed `zeroed` with the shifted input, positions being the contraction.

Tiles are loaded by the tensor memory accelerator where the GPU has one and rows are whole 16-byte units; by pointers
otherwise. The weight is [K, C, 3, 3] in channels-last order, that is the matrix [K, 9 C], in both directions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cyclegan_fast.ops._border_triton import Case, border, device_function, gate_case, reflected
from cyclegan_fast.ops._launch import INTERPRETED, multiprocessors, on_device
from cyclegan_fast.ops._layout import empty_channels_last
from cyclegan_fast.ops._reflect_conv_triton import activated, product

__all__ = ["flat_conv", "flat_input_grad", "flat_weight_grad", "gate_cases", "zeroed"]


# Sizes vary from picture to picture and decide no access's width: no kernel of their own for multiples of 16.
@triton.jit(do_not_specialize=["H", "W", "WP", "HO", "WO"])
def _flat_conv_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    y,
    mean,
    squares,
    H,
    W,
    WP,
    HO,
    WO,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PAD: tl.constexpr,
    GATHER: tl.constexpr,
    FULL: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[n, q, k] = act(bias[k] + sum over taps t, channels c of x[n, q +- t's shift, c] weight[k, t, c]).

    Grid (tiles of one image's positions q, output channels, N). x is the matrix of images [N H W, CI]: padded already,
    or, with GATHER, to be reflected by PAD in the indices. FULL: shifts upwards and the weight the other way round.
    PROLOGUE 1: x scale + shift first, per image and channel; 2: and ReLU. STATISTICS: mean and sum of squared
    deviations of the rounded results of this tile, per channel.
    """
    n = tl.program_id(2)
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = q // WP
    w = q % WP
    valid = (h < HO) & (w < WO)
    steps: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(9 * steps):
        tap = step // steps
        r = tap // 3
        s = tap % 3
        c0 = (step % steps) * BLOCK_K
        c = c0 + tl.arange(0, BLOCK_K)
        move = r * WP + s
        if FULL:
            move = -move
        if TMA:
            a = x.load([n * H * W + tl.program_id(0) * BLOCK_M + move, c0])
        else:
            if GATHER:
                source = reflected(h + r - PAD, H) * W + reflected(w + s - PAD, W)
                rows = valid
            else:
                source = q + move
                rows = (source >= 0) & (source < H * W)
            at = (n.to(tl.int64) * H * W + source)[:, None] * CI + c[None, :]
            a = tl.load(x + at, mask=rows[:, None] & (c < CI)[None, :], other=0.0)
        if PROLOGUE > 0:
            at = n.to(tl.int64) * CI + c
            factor = tl.load(scale + at, mask=c < CI, other=0.0)
            offset = tl.load(shift + at, mask=c < CI, other=0.0)
            prepared = a.to(tl.float32) * factor[None, :] + offset[None, :]
            if PROLOGUE == 2:
                prepared = activated(prepared, 1)
            a = prepared.to(y.dtype.element_ty)
        if FULL:  # rows of the weight are the contraction
            if TMA:
                b = weight.load([c0, tap * CO + tl.program_id(1) * BLOCK_N])
            else:
                at = c[:, None] * (9 * CO) + (tap * CO + k)[None, :]
                b = tl.load(weight + at, mask=(c < CI)[:, None] & (k < CO)[None, :], other=0.0)
        else:
            if TMA:
                b = weight.load([tl.program_id(1) * BLOCK_N, tap * CI + c0]).T
            else:
                at = (tap * CI + c)[:, None] + k[None, :] * (9 * CI)
                b = tl.load(weight + at, mask=(c < CI)[:, None] & (k < CO)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k < CO, other=0.0).to(tl.float32)[None, :]
    result = activated(acc, ACTIVATION).to(y.dtype.element_ty)
    at = (n.to(tl.int64) * HO * WO + h * WO + w)[:, None] * CO + k[None, :]
    tl.store(y + at, result, mask=valid[:, None] & (k < CO)[None, :])
    if STATISTICS:
        values = result.to(tl.float32)
        count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
        average = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / count
        deviation = tl.where(valid[:, None], values - average[None, :], 0.0)
        # What rounding left of the deviations' sum belongs to the mean.
        rest = tl.sum(deviation, 0) / count
        at = (n.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * CO + k
        tl.store(mean + at, average + rest, mask=k < CO)
        tl.store(squares + at, tl.sum(deviation * deviation, 0) - count * rest * rest, mask=k < CO)


@device_function
def _results_before(q, WP, HO, WO):
    """How many of the padded positions [0, q) are results."""
    q = tl.minimum(q, HO * WP)
    return (q // WP) * WO + tl.minimum(q % WP, WO)


@triton.jit(do_not_specialize=["tiles", "WP", "HO", "WO"])
def _merge_kernel(
    mean,
    squares,
    merged_mean,
    rstd,
    tiles,
    WP,
    HO,
    WO,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's merge of tiles of ROWS positions [N, tiles, C] into mean and 1 / sqrt(var + eps); grid (C, N)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1).to(tl.int64)
    mean += n * tiles * C
    squares += n * tiles * C
    # Distances from the first tile's mean are small where means are large.
    first = tl.load(mean + c, mask=c < C, other=0.0)
    total = (HO * WO).to(tl.float32)
    moved = tl.full((BLOCK_C,), 0.0, tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        count = _results_before((t + 1) * ROWS, WP, HO, WO) - _results_before(t * ROWS, WP, HO, WO)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        m = tl.load(mean + t[:, None] * C + c[None, :], mask=mask, other=0.0)
        moved += tl.sum(tl.where(mask, count.to(tl.float32)[:, None] * (m - first[None, :]), 0.0), 0)
    moved /= total
    sums = tl.full((BLOCK_C,), 0.0, tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        count = _results_before((t + 1) * ROWS, WP, HO, WO) - _results_before(t * ROWS, WP, HO, WO)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        m = tl.load(mean + t[:, None] * C + c[None, :], mask=mask, other=0.0) - first[None, :] - moved[None, :]
        m2 = tl.load(squares + t[:, None] * C + c[None, :], mask=mask, other=0.0)
        sums += tl.sum(tl.where(mask, m2 + count.to(tl.float32)[:, None] * m * m, 0.0), 0)
    tl.store(merged_mean + n * C + c, first + moved, mask=c < C)
    tl.store(rstd + n * C + c, 1.0 / tl.sqrt(sums / total + eps), mask=c < C)


@triton.jit(do_not_specialize=["R", "WP", "steps"])
def _flat_weight_grad_kernel(
    x,
    zeroed,
    partial,
    R,
    WP,
    steps,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, k, t, c] = sum over the split's rows m of zeroed[m, k] x[m + t's shift, c], in float32.

    Grid (tiles of k, taps x tiles of c, splits); x [R, CI] and zeroed [R, CO] are the rows of all images together.
    """
    split = tl.program_id(2)
    columns: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    tap = tl.program_id(1) // columns
    k0 = tl.program_id(0) * BLOCK_M
    c0 = (tl.program_id(1) % columns) * BLOCK_N
    k = k0 + tl.arange(0, BLOCK_M)
    c = c0 + tl.arange(0, BLOCK_N)
    move = (tap // 3) * WP + tap % 3
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, (R + BLOCK_K - 1) // BLOCK_K)):
        m0 = step * BLOCK_K
        if TMA:
            a = zeroed.load([m0, k0]).T
            b = x.load([m0 + move, c0])
        else:
            m = tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            at = m[None, :] * CO + k[:, None]
            a = tl.load(zeroed + at, mask=(m < R)[None, :] & (k < CO)[:, None], other=0.0)
            at = (m + move)[:, None] * CI + c[None, :]
            b = tl.load(x + at, mask=(m + move < R)[:, None] & (c < CI)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    at = ((split.to(tl.int64) * CO + k) * 9 + tap)[:, None] * CI + c[None, :]
    tl.store(partial + at, acc, mask=(k < CO)[:, None] & (c < CI)[None, :])


_MERGED_TILES = 32  # tiles of statistics merged at once
_MOST_ROWS = 2**31 - 2**20  # rows of all images together: a descriptor's coordinates are 32-bit, and tiles overhang


@dataclass(frozen=True)
class _Tiles:
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def _tiles(dtype: torch.dtype, contraction: int, columns: int, positions: int, images: int, processors: int) -> _Tiles:
    """128 positions at a time, or 64 where the larger tiles would leave multiprocessors idle."""
    n = min(128, max(16, triton.next_power_of_2(columns)))
    if dtype == torch.float32:  # exact products run outside the matrix units, from registers: 4 warps or 3 stages spill
        return _Tiles(64, min(64, n), min(16, triton.next_power_of_2(contraction)), 8, 2)
    k = min(64, max(16, triton.next_power_of_2(contraction)))
    programs = images * triton.cdiv(positions, 128) * triton.cdiv(columns, n)
    return _Tiles(64, n, k, 4, 4) if programs < processors else _Tiles(128, n, k, 8, 3)


def _with_prologue(tiles: _Tiles) -> _Tiles:
    """Tiles for a prologue on what pointers load: values and addresses together need the registers of shorter steps."""
    return replace(tiles, k=min(32, tiles.k))


def _has_tma(x: Tensor, *channels: tuple[int, int]) -> bool:
    """Whether tiles can be loaded by descriptors: (channels, tile) pairs of every tensor that would be."""
    if not INTERPRETED and torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    unit = 16 // x.dtype.itemsize
    aligned = all(count % unit == 0 and count % tile == 0 for count, tile in channels) and x.data_ptr() % 16 == 0
    return aligned and x.shape[0] * x.shape[2] * x.shape[3] <= _MOST_ROWS


def _matrix(x: Tensor, rows: int, columns: int, tile: tuple[int, int]) -> TensorDescriptor:
    """The dense memory of x as a matrix [rows, columns] read in tiles."""
    return TensorDescriptor(x, [rows, columns], [columns, 1], list(tile))


def flat_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pad: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    activation: int = 0,
    statistics: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(valid 3x3 convolution of reflect_pad(prologue(x), pad) + bias), [N, K, H + 2 pad - 2, W + 2 pad - 2].

    x [N, C, H, W] dense channels-last, weight [K, C, 3, 3] channels-last, of one dtype. Prologue: x scale + shift with
    float32 [N, C] each, then ReLU if `relu`. `statistics`: mean and 1 / sqrt(var + eps) [N, K] of
    the result beside it, else both are empty.
    """
    n, c, h, w = x.shape
    k = weight.shape[0]
    wp, ho, wo = w + 2 * pad, h + 2 * pad - 2, w + 2 * pad - 2
    y = empty_channels_last(x, (n, k, ho, wo))
    positions = (ho - 1) * wp + wo
    tiles = _tiles(x.dtype, c, k, positions, n, multiprocessors(x.device))
    if scale is not None and (pad > 0 or not _has_tma(x, (c, tiles.k))):
        tiles = _with_prologue(tiles)
    count = triton.cdiv(positions, tiles.m)
    nothing = torch.empty(0, dtype=torch.float32, device=x.device)
    partial = (nothing.new_empty(n, count, k), nothing.new_empty(n, count, k)) if statistics else None
    prologue = (scale, shift, relu)
    _launch_conv(x, weight, bias, y, partial, tiles, wp, pad=pad, full=False, prologue=prologue, act=activation)
    if partial is None:
        return y, nothing, nothing
    mean, rstd = nothing.new_empty(n, k), nothing.new_empty(n, k)
    with on_device(x):
        _merge_kernel[(triton.cdiv(k, 32), n)](
            *(*partial, mean, rstd, count, wp, ho, wo, eps, k, tiles.m, _MERGED_TILES, 32), num_warps=4
        )
    return y, mean, rstd


def flat_input_grad(zeroed_grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the padded input [N, C, HP, WP] from the `zeroed` gradient of the output [N, K, HP, WP]."""
    n, k, hp, wp = zeroed_grad.shape
    c = weight.shape[1]
    out = empty_channels_last(zeroed_grad, (n, c, hp, wp))
    tiles = _tiles(zeroed_grad.dtype, k, c, hp * wp, n, multiprocessors(zeroed_grad.device))
    _launch_conv(zeroed_grad, weight, None, out, None, tiles, wp, pad=0, full=True, prologue=(None, None, False), act=0)
    return out


def _launch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    partial: tuple[Tensor, Tensor] | None,
    tiles: _Tiles,
    wp: int,
    *,
    pad: int,
    full: bool,
    prologue: tuple[Tensor | None, Tensor | None, bool],
    act: int,
) -> None:
    n, ci, h, w = x.shape
    _, co, ho, wo = y.shape
    scale, shift, relu = prologue
    # The weight's tile is [columns, contraction], or the other way round for the gradient.
    weight_tile = (tiles.k, tiles.n) if full else (tiles.n, tiles.k)
    channels = ((ci, tiles.k), (co, tiles.n)) if full else ((ci, tiles.k),)
    tma = pad == 0 and _has_tma(x, *channels) and weight.data_ptr() % 16 == 0
    source: Any = _matrix(x, n * h * w, ci, (tiles.m, tiles.k)) if tma else x
    matrix: Any = _matrix(weight, weight.shape[0], 9 * weight.shape[1], weight_tile) if tma else weight
    grid = (triton.cdiv((ho - 1) * wp + wo, tiles.m), triton.cdiv(co, tiles.n), n)
    with on_device(x):
        _flat_conv_kernel[grid](
            *(source, matrix, bias, scale, shift, y),
            *((None, None) if partial is None else partial),
            *(h, w, wp, ho, wo, ci, co, pad, pad > 0, full, tma, bias is not None),
            *(0 if scale is None else 2 if relu else 1, act, partial is not None, "ieee"),
            *(tiles.m, tiles.n, tiles.k),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def zeroed(grad: Tensor, pitch: tuple[int, int]) -> Tensor:
    """The gradient of the output [N, K, HO, WO] in the upper left of zeros [N, K, *pitch]."""
    return border(grad, 0, *pitch, reflect=False)


def flat_weight_grad(padded: Tensor, zeroed_grad: Tensor) -> Tensor:
    """Gradient of the weight, float32 [K, C, 3, 3], from the padded input and the `zeroed` gradient of the output."""
    n, c, hp, wp = padded.shape
    k = zeroed_grad.shape[1]
    rows = n * hp * wp
    exact = padded.dtype == torch.float32
    block_m, block_n = (min(64 if exact else 128, max(16, triton.next_power_of_2(size))) for size in (k, c))
    block_k = 16 if exact else 64
    tma = _has_tma(padded, (c, block_n), (k, block_m)) and zeroed_grad.data_ptr() % 16 == 0
    products = triton.cdiv(k, block_m) * 9 * triton.cdiv(c, block_n)
    all_steps = triton.cdiv(rows, block_k)
    steps = triton.cdiv(all_steps, triton.cdiv(multiprocessors(padded.device), products))
    splits = triton.cdiv(all_steps, steps)
    partial = torch.empty((splits, k, 3, 3, c), dtype=torch.float32, device=padded.device)
    source: Any = _matrix(padded, rows, c, (block_k, block_n)) if tma else padded
    grad: Any = _matrix(zeroed_grad, rows, k, (block_k, block_m)) if tma else zeroed_grad
    grid = (triton.cdiv(k, block_m), 9 * triton.cdiv(c, block_n), splits)
    with on_device(padded):
        _flat_weight_grad_kernel[grid](
            *(source, grad, partial, rows, wp, steps, c, k, tma, "ieee", block_m, block_n, block_k),
            num_warps=4 if exact else 8,
            num_stages=3,
        )
    return partial.sum(0).permute(0, 3, 1, 2)


def gate_cases() -> list[Case]:
    """The residual blocks' convolutions, 256 channels at 64x64, in every form; as in `_reflect_conv_triton`."""
    cases = []
    for batch in (1, 16):
        tiles = _tiles(torch.bfloat16, 256, 256, 64 * 66, batch, 132)
        cases += [_conv_case("bf16", form, tiles) for form in _FORMS]
    cases.append(_conv_case("fp16", "reflected", tiles))
    tiles = _tiles(torch.float32, 256, 256, 64 * 66, 1, 132)
    forms = ("reflected", "padded", "padded TMA", "input grad", "input grad TMA")
    cases += [_conv_case("fp32", form, tiles) for form in forms]
    for dtype, tma in (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True)):
        block, block_k, warps = (64, 16, 4) if dtype == "fp32" else (128, 64, 8)
        constants = {"CI": 256, "CO": 256, "TMA": tma, "PRECISION": "ieee"}
        constants |= {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": block_k}
        tile = f"tensordesc<{dtype}[{block_k},{block}]>" if tma else f"*{dtype}"
        pointers = {"x": tile, "zeroed": tile, "partial": "*fp32"}
        name = f"{dtype} flat 3x3 weight grad{' TMA' if tma else ''}"
        case = gate_case(name, _flat_weight_grad_kernel, pointers, constants, warps, 3, dtype != "fp32")
        cases.append((*case, _TMA_ARCHS) if tma else case)
    pointers = dict.fromkeys(("mean", "squares", "merged_mean", "rstd"), "*fp32") | {"eps": "fp32"}
    constants = {"C": 256, "ROWS": 64, "BLOCK_T": _MERGED_TILES, "BLOCK_C": 32}
    cases.append(gate_case("flat 3x3 statistics", _merge_kernel, pointers, constants, 4, 3, False))
    return cases


_TMA_ARCHS = (90, 100, 120)
_FORMS = (
    *("padded", "padded TMA", "reflected", "prologue", "prologue TMA", "prologue reflected", "statistics"),
    *("statistics TMA", "input grad", "input grad TMA"),
)


def _conv_case(dtype: str, form: str, tiles: _Tiles) -> Case:
    full, tma, prologue, gather = (word in form for word in ("input grad", "TMA", "prologue", "reflected"))
    if prologue and not tma:
        tiles = _with_prologue(tiles)
    constants: dict[str, Any] = {"CI": 256, "CO": 256, "PAD": int(gather), "GATHER": gather, "FULL": full, "TMA": tma}
    constants |= {"HAS_BIAS": not full, "PROLOGUE": 2 * prologue, "ACTIVATION": 0, "STATISTICS": "statistics" in form}
    constants |= {"PRECISION": "ieee", "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    weight_tile = (tiles.k, tiles.n) if full else (tiles.n, tiles.k)
    pointers = {
        "x": f"tensordesc<{dtype}[{tiles.m},{tiles.k}]>" if tma else f"*{dtype}",
        "weight": f"tensordesc<{dtype}[{weight_tile[0]},{weight_tile[1]}]>" if tma else f"*{dtype}",
        "y": f"*{dtype}",
    }
    optional = {"bias": (not full, dtype), "scale": (prologue, "fp32"), "shift": (prologue, "fp32")}
    optional |= dict.fromkeys(("mean", "squares"), ("statistics" in form, "fp32"))
    for argument, (present, element) in optional.items():
        if present:
            pointers[argument] = f"*{element}"
        else:
            constants[argument] = None
    name = f"{dtype} flat 3x3 {form}, {tiles.m}x{tiles.n}"
    warps, stages = tiles.num_warps, tiles.num_stages
    case = gate_case(name, _flat_conv_kernel, pointers, constants, warps, stages, dtype != "fp32")
    return (*case, _TMA_ARCHS) if tma else case
