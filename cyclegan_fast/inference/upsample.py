"""Translating at a smaller size, and returning to the full one with the picture's own detail.

The fast guided filter (He and Sun 2015, arXiv:1505.00996): around each position of the small pictures, the translation
is fitted as a linear function of the picture's colours,

    translated = A picture + b        over a window of (2 radius + 1)^2, with A held small by `eps`,

and A and b, which are smooth, are enlarged instead of the translation and applied to the picture at full size. Where
the translation keeps an edge the full-size edge comes back; where it blurs a background, A is near zero there and
nothing does. What the fit leaves over at the small size is enlarged and added: nothing the network drew is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.inference.tiles import as_input

__all__ = ["enlarge", "shrink", "small_size"]

_RADIUS, _EPS = 1, 1e-2
# Values of the full-size picture that are in work at once.
_AT_ONCE = 2**22


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(H, W) with the proportions of a picture and a short side of so many pixels; never larger than the picture."""
    shrunk = min(short_side / min(height, width), 1.0)
    return max(round(height * shrunk), 1), max(round(width * shrunk), 1)


@torch.inference_mode()
def shrink(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [N, C, H, W], uint8 or in [-1, 1], at a smaller size: float32, on its device, antialiased bicubic.

    Columns first, band by band, so that the picture is never held in float32.
    """
    narrow = [
        F.interpolate(as_input(rows, rows.device), (rows.shape[2], size[1]), mode="bicubic", antialias=True)
        for rows in (picture[:, :, top:bottom] for top, bottom in _bands(picture))
    ]
    small: Tensor = F.interpolate(torch.cat(narrow, 2), size, mode="bicubic", antialias=True)
    return small.clamp_(-1, 1)


@torch.inference_mode()
def enlarge(translated: Tensor, small: Tensor, picture: Tensor, *, radius: int = _RADIUS, eps: float = _EPS) -> Tensor:
    """The translation [N, K, h, w] of `small` at the size of the picture, whose detail it takes.

    small [N, C, h, w] is `shrink` of picture [N, C, H, W], uint8 or in [-1, 1]. radius: of the windows, in small
    pixels; eps: variance, of values in [-1, 1], below which a window counts as flat. Returns float32 [N, K, H, W] in
    [-1, 1] on the device of `translated`, in memory of the result and a few rows. Raises ValueError for sizes that do
    not belong together.
    """
    if translated.shape[2:] != small.shape[2:] or picture.shape[:2] != small.shape[:2]:
        raise ValueError(
            f"translation {list(translated.shape)}, small picture {list(small.shape)} and picture "
            f"{list(picture.shape)} do not belong together"
        )
    device = translated.device
    gain, offset = _linear_fit(small.to(device, torch.float64), translated.double(), radius, eps)
    rest = translated.double() - _applied(gain, offset, small.to(device, torch.float64))
    inputs, outputs = small.shape[1], translated.shape[1]
    fields = torch.cat([gain.flatten(1, 2), offset + rest], 1).float()
    height, width = picture.shape[2:]
    result = torch.empty((picture.shape[0], outputs, height, width), device=device)
    for top, bottom in _bands(picture):
        large = _enlarged_rows(fields, top, bottom, height, width)
        gain_rows, offset_rows = large.split([inputs * outputs, outputs], 1)
        guide = as_input(picture[:, :, top:bottom], device)
        rows = _applied(gain_rows.unflatten(1, (inputs, outputs)), offset_rows, guide)
        result[:, :, top:bottom] = rows.clamp_(-1, 1)
    return result


def _linear_fit(guide: Tensor, target: Tensor, radius: int, eps: float) -> tuple[Tensor, Tensor]:
    """A [N, C, K, h, w] and b [N, K, h, w]: equations 5 and 6 of the paper for a guide of C channels, then averaged."""

    def mean(x: Tensor) -> Tensor:
        means: Tensor = F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)
        return means

    def products(a: Tensor, b: Tensor) -> Tensor:
        """Covariances [N, h, w, C, K] over each window."""
        ab: Tensor = mean((a[:, :, None] * b[:, None]).flatten(1, 2)).unflatten(1, (a.shape[1], b.shape[1]))
        return (ab - mean(a)[:, :, None] * mean(b)[:, None]).permute(0, 3, 4, 1, 2)

    ridge = eps * torch.eye(guide.shape[1], dtype=guide.dtype, device=guide.device)
    gain = torch.linalg.solve(products(guide, guide) + ridge, products(guide, target)).permute(0, 3, 4, 1, 2)
    offset = mean(target) - (gain * mean(guide)[:, :, None]).sum(1)
    smooth: Tensor = mean(gain.flatten(1, 2)).unflatten(1, gain.shape[1:3])
    return smooth, mean(offset)


def _applied(gain: Tensor, offset: Tensor, guide: Tensor) -> Tensor:
    """A guide + b, [N, K, h, w]."""
    total = offset.clone()
    for channel in range(guide.shape[1]):
        total.addcmul_(gain[:, channel], guide[:, channel, None])
    return total


def _enlarged_rows(fields: Tensor, top: int, bottom: int, height: int, width: int) -> Tensor:
    """Rows of the fields [N, F, h, w] enlarged bilinearly to height x width, with half-pixel centres."""
    small = fields.shape[2]
    position = (torch.arange(top, bottom, device=fields.device, dtype=torch.float64) + 0.5) * (small / height) - 0.5
    position = position.clamp_(0, small - 1)
    above = position.floor().long()
    below = (above + 1).clamp_(max=small - 1)
    share = (position - above)[:, None].float()
    rows = torch.lerp(fields[:, :, above], fields[:, :, below], share)
    wide: Tensor = F.interpolate(rows, (bottom - top, width), mode="bilinear", align_corners=False)
    return wide


def _bands(picture: Tensor) -> Iterator[tuple[int, int]]:
    count, channels, height, width = picture.shape
    step = max(1, _AT_ONCE // (count * channels * width))
    for top in range(0, height, step):
        yield top, min(top + step, height)
