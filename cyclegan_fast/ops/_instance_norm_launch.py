"""How the Triton kernels of `instance_norm` are launched: tiles, splits, memory, and the cases of the compile gate."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cyclegan_fast.ops import _instance_norm_triton as kernels
from cyclegan_fast.ops._launch import multiprocessors, on_device
from cyclegan_fast.ops._layout import empty_channels_last

__all__ = ["backward", "forward", "gate_cases"]

_TILE_BYTES = 8192  # of one map: four 16-byte loads a thread, with 4 warps
_WARPS = 4
_STAGES = 1  # nothing is pipelined: there is no product of matrices
_SUMS_WARPS = 8  # two maps, their reflections and two sums at once: half as many values a thread, or registers run out
_BLOCK_C = 64
_WAVES = 4  # programs of a reduction for each multiprocessor, to have enough loads in flight
_MERGED_SPLITS = 32  # at most so many are merged by every program of the last pass
_SMALL = 1 << 22  # values up to which a saved launch is worth more than the last of the parallelism
_FINISH_SPLITS, _FINISH_C, _FINISH_WARPS = 256, 16, 8


@dataclass(frozen=True)
class _Plan:
    """How the pixels of a sample are cut up."""

    block_p: int
    block_c: int
    channel_blocks: int
    per_split: int  # pixels, a multiple of block_p
    splits: int
    merged: bool


@functools.lru_cache(maxsize=1024)
def _plan(n: int, c: int, pixels: int, itemsize: int, device: torch.device) -> _Plan:
    processors = multiprocessors(device)
    block_c = min(_BLOCK_C, triton.next_power_of_2(c))
    block_p = min(_TILE_BYTES // (itemsize * block_c), triton.next_power_of_2(pixels))
    channel_blocks = triton.cdiv(c, block_c)
    slices = n * channel_blocks
    wanted = triton.cdiv(_WAVES * processors, slices)
    if n * c * pixels <= _SMALL and 4 * _MERGED_SPLITS * slices >= 3 * processors:
        wanted = min(wanted, _MERGED_SPLITS)
    per_split = triton.cdiv(triton.cdiv(pixels, wanted), block_p) * block_p
    splits = triton.cdiv(pixels, per_split)
    return _Plan(block_p, block_c, channel_blocks, per_split, splits, splits <= _MERGED_SPLITS)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd of `instance_norm`; arguments checked by the caller."""
    n, c, h, w = x.shape
    plan = _plan(n, c, h * w, x.element_size(), x.device)
    partial = torch.empty((n, plan.splits, 2, c), dtype=torch.float32, device=x.device)
    mean = torch.empty((n, c), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    height, width = h + 2 * pad, w + 2 * pad
    y = empty_channels_last(x, (n, c, height, width))
    tiles = triton.cdiv(height * width, plan.block_p)
    with on_device(x):
        kernels._instance_norm_stats_kernel[(n * plan.splits * plan.channel_blocks,)](
            x,
            partial,
            h * w,
            plan.per_split,
            plan.splits,
            c,
            plan.block_p,
            plan.block_c,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        if not plan.merged:
            kernels._instance_norm_finish_stats_kernel[(n * triton.cdiv(c, _FINISH_C),)](
                x, partial, mean, rstd, h * w, plan.per_split, plan.splits, eps, c, _FINISH_SPLITS, _FINISH_C,
                num_warps=_FINISH_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        kernels._instance_norm_apply_kernel[(n * tiles * plan.channel_blocks,)](
            x, weight, bias, residual, partial, mean, rstd, y, h, w,
            0 if residual is None else residual.stride(0), 0 if residual is None else residual.stride(2),
            plan.per_split, plan.splits, eps, negative_slope,
            c, pad, activation, weight is not None, residual is not None,
            plan.merged, triton.next_power_of_2(plan.splits), plan.block_p, plan.block_c,
            num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    negative_slope: float,
    pad: int,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (or empty), dweight and dbias (or empty) from the dense channels-last gradient of y."""
    n, c, h, w = x.shape
    plan = _plan(n, c, h * w, x.element_size(), x.device)
    partial = torch.empty((n, plan.splits, 2, c), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, n, c), dtype=torch.float32, device=x.device)
    dx = empty_channels_last(x, (n, c, h, w))
    folded = torch.empty_like(dx) if need_residual else dx.new_empty(0)
    narrow = min(h, w) <= 2 * pad + 1
    tiles = triton.cdiv(h * w, plan.block_p)
    affine = weight is not None
    with on_device(x):
        kernels._instance_norm_grad_sums_kernel[(n * plan.splits * plan.channel_blocks,)](
            grad_y, x, mean, rstd, weight, bias, folded, partial, h, w, plan.per_split, plan.splits, negative_slope,
            c, pad, narrow, activation, affine, need_residual, plan.block_p, plan.block_c,
            num_warps=_SUMS_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        if not plan.merged:
            kernels._instance_norm_finish_sums_kernel[(n * triton.cdiv(c, _FINISH_C),)](
                partial, sums, n, plan.splits, c, _FINISH_SPLITS, _FINISH_C,
                num_warps=_FINISH_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        kernels._instance_norm_grad_apply_kernel[(n * tiles * plan.channel_blocks,)](
            folded if need_residual else grad_y, x, mean, rstd, weight, bias, partial, sums, dx, h, w, n, plan.splits,
            negative_slope, c, 0 if need_residual else pad, narrow and not need_residual, activation, affine,
            plan.merged, triton.next_power_of_2(plan.splits), plan.block_p, plan.block_c,
            num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    if not affine:
        return dx, folded, sums.new_empty(0), sums.new_empty(0)
    return dx, folded, sums[1].sum(0), sums[0].sum(0)


# What the networks normalise at 256 x 256: (channels, side, pad, activation, affine, residual, dtype).
_LAYERS = (
    (64, 256, 0, 1, False, False, "bf16"),
    (64, 256, 3, 1, False, False, "bf16"),
    (128, 128, 0, 1, False, False, "bf16"),
    (256, 64, 1, 1, False, False, "bf16"),
    (256, 64, 1, 0, False, True, "bf16"),
    (256, 64, 1, 0, True, True, "fp16"),
    (512, 31, 0, 2, False, False, "bf16"),
    (64, 256, 3, 1, True, False, "fp32"),
)
_Case = tuple[str, Any, dict[str, str], dict[str, Any], int, int, bool]


def gate_cases() -> list[_Case]:
    """Every kernel as training at 256 x 256, batch 1, launches it on a GPU of 132 multiprocessors."""
    cases: dict[str, _Case] = {}
    for layer in _LAYERS:
        cases.update((case[0], case) for case in _layer_cases(*layer))
    return list(cases.values())


def _layer_cases(c: int, side: int, pad: int, activation: int, affine: bool, residual: bool, dtype: str) -> list[_Case]:
    plan = _plan(1, c, side * side, 4 if dtype == "fp32" else 2, torch.device("cpu"))
    types = dict.fromkeys(("x", "residual", "y", "grad", "folded", "dx"), f"*{dtype}")
    types |= dict.fromkeys(("weight", "bias", "partial", "mean", "rstd", "sums"), "*fp32")
    types |= dict.fromkeys(("eps", "slope"), "fp32") | dict.fromkeys(("residual_n", "residual_h"), "i32:16")
    absent = {} if affine else {"weight": None, "bias": None}
    tile = {"C": c, "BLOCK_P": plan.block_p, "BLOCK_C": plan.block_c}
    options = {"PAD": pad, "ACTIVATION": activation, "HAS_AFFINE": affine, **absent}
    merged = {"MERGED": plan.merged, "BLOCK_S": triton.next_power_of_2(plan.splits)}
    finish = {"C": c, "BLOCK_S": _FINISH_SPLITS, "BLOCK_C": _FINISH_C}
    back = {"PAD": 0 if residual else pad, "NARROW": False}
    no_residual = {} if residual else {"residual": None}
    chosen: list[tuple[str, Any, dict[str, Any], int]] = [
        ("stats", kernels._instance_norm_stats_kernel, tile, _WARPS),
        ("apply", kernels._instance_norm_apply_kernel,
         {**tile, **options, **merged, "HAS_RESIDUAL": residual, **no_residual}, _WARPS),
        ("grad_sums", kernels._instance_norm_grad_sums_kernel,
         {**tile, **options, "NARROW": False, "STORE_FOLDED": residual}, _SUMS_WARPS),
        ("grad_apply", kernels._instance_norm_grad_apply_kernel, {**tile, **options, **back, **merged}, _WARPS),
    ]  # fmt: skip
    if not plan.merged:
        chosen += [
            ("finish_stats", kernels._instance_norm_finish_stats_kernel, finish, _FINISH_WARPS),
            ("finish_sums", kernels._instance_norm_finish_sums_kernel, finish, _FINISH_WARPS),
        ]
    cases: list[_Case] = []
    for what, kernel, constants, warps in chosen:
        name = f"instance_norm {what} {dtype} C={c}"
        if "PAD" in constants:
            name += f" pad={constants['PAD']} act={activation}" + " affine" * affine + " residual" * residual
        names = [name for name in kernel.arg_names if name not in constants]
        cases.append((name, kernel, {key: types.get(key, "i32") for key in names}, constants, warps, _STAGES, False))
    return cases
