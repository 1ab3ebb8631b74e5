"""How far results may be from the truth, in one table, with the reason beside each number.

The truth is the reference in float64 on the same (already rounded) inputs. A result passes where

    |result - truth| <= relative * |truth| + absolute * max |truth|

holds for every element: `relative` is for the rounding of the result itself, `absolute` for what is lost before, in
sums over terms that are larger than the result. No machine, and no CI, gets larger numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Tolerance", "assert_close"]


@dataclass(frozen=True)
class Tolerance:
    relative: float
    absolute: float
    why: str


_FP32 = 2.0**-24  # unit roundoff: half the distance between neighbours, relatively
_FP16 = 2.0**-11
_BF16 = 2.0**-8

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("instance_norm.y", torch.float32): Tolerance(
        8 * _FP32, 8 * _FP32, "mean, rstd, product, scale, bias, residual: about one rounding each, largest element 1"
    ),
    ("instance_norm.y", torch.float16): Tolerance(
        _FP16 * 1.01,
        16 * _FP32,
        "one rounding to the nearest; 1 % and float32 noise for results at a rounding boundary",
    ),
    ("instance_norm.y", torch.bfloat16): Tolerance(_BF16 * 1.01, 16 * _FP32, "as float16, with bfloat16's roundoff"),
    ("instance_norm.grad", torch.float32): Tolerance(
        32 * _FP32, 32 * _FP32, "two sums over the map and a difference of three terms, each larger than the result"
    ),
    ("instance_norm.grad", torch.float16): Tolerance(
        _FP16 * 1.01, _FP16, "one rounding of the result, and one of a folded gradient before (with a residual)"
    ),
    ("instance_norm.grad", torch.bfloat16): Tolerance(_BF16 * 1.01, _BF16, "as float16, with bfloat16's roundoff"),
    ("instance_norm.sums", torch.float32): Tolerance(
        0.0, 64 * _FP32, "sums of up to 2,100 terms of both signs: the square root of their number, and a little"
    ),
    ("instance_norm.sums", torch.float16): Tolerance(
        0.0, _FP16, "as float32; the gradients on the border may have been rounded when they were folded"
    ),
    ("instance_norm.sums", torch.bfloat16): Tolerance(0.0, _BF16, "as float16, with bfloat16's roundoff"),
    ("instance_norm.mean_1e4", torch.float32): Tolerance(
        0.0, 1.5e-4, "mean 1e4, std 1, |y| up to 4: the mean is a float32 near 1e4, whose half spacing is 4.9e-4"
    ),
}


def assert_close(result: Tensor, truth: Tensor, tolerance: Tolerance, what: str = "result") -> None:
    """AssertionError, with the worst element, unless `result` is within `tolerance` of `truth` (float64)."""
    assert result.shape == truth.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    if truth.numel() == 0:
        return
    error = (result - truth).abs()
    allowed = tolerance.relative * truth.abs() + tolerance.absolute * truth.abs().max()
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        ratio = torch.where(error.isfinite(), error / allowed.clamp_min(1e-300), torch.inf)
        place = int(ratio.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), truth.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {truth.numel()} elements are off; the worst, {index}, is "
            f"{float(result[index])!r} instead of {float(truth[index])!r}: {float(ratio.flatten()[place]):.3g} times "
            f"what is allowed ({tolerance.why})"
        )
