"""What a photographer sees in pictures, as numbers: where they are sharp, how noisy, how bright, of what colours.

Every function takes batches [N, C, H, W] of sRGB or gray pictures, C = 3 or 1, as `metrics` does: ``uint8``, or
floating point with a ``value_range``. Results are float64, a number a picture, on the device of the pictures; "levels"
are those of 8 bits, 0 to 255. Wrong input raises InputError. Pictures are converted a few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.metrics import Floats, Pictures, Range, as_batch

__all__ = [
    "DepthOfField",
    "Exposure",
    "colour_histogram",
    "colour_set_distance",
    "depth_of_field",
    "exposure",
    "histogram_distance",
    "lab",
    "noise",
    "sharpness_map",
    "shrunk",
]

_PIXELS_AT_ONCE = 1 << 20
_SHORT_SIDE = 256  # of the pictures that sharpness is measured in
_BLOCKS = 16  # of the sharpness map along the short side
_LEAST_SIDE = 32
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601


# Sharpness


@dataclass(frozen=True)
class DepthOfField:
    """Median sharpness of the subject and of what is around it (levels), and log2 of their ratio; [N] each."""

    subject: Tensor
    background: Tensor
    separation: Tensor


def sharpness_map(images: Pictures, *, value_range: Range = None) -> Tensor:
    """Root mean square Laplacian of the luma in blocks, levels; [N, h, w] with 16 blocks along the short side.

    The Laplacian of 4 neighbours, borders repeated, of Y' = 0.299 R' + 0.587 G' + 0.114 B', after shrinking to a short
    side of 256 pixels: a block is then 16 x 16 of them. Smaller pictures are not enlarged, and blur of a given share of
    the frame costs them less: compare pictures of one size. Both sides must have 32 pixels.
    """
    return torch.cat([_sharpness(part) for part in _parts(images, value_range, "images", _LEAST_SIDE)])


def depth_of_field(images: Pictures, subject: Tensor | None = None, *, value_range: Range = None) -> DepthOfField:
    """How much sharper the subject is than the rest of the frame: ``separation`` in octaves, 0 for equally sharp.

    With ``subject``, bool [N, H, W], it is the blocks of `sharpness_map` at least three quarters inside against those
    wholly outside; NaN where there are none. Without, the background is a border of 3/16 of the short side, and the
    subject is taken for the sharpest quarter of the blocks of the middle: a rule that flatters pictures without a
    subject, all alike, so that differences between pictures of the same scenes mean more than values.

    The gain of a translation is its separation less that of its input. Less than 1 level, which rounding to 8 bits
    makes by itself, counts as 1: a flat picture has no separation.
    """
    sharpness = sharpness_map(images, value_range=value_range)
    if subject is None:
        inside, outside = _by_rule(sharpness)
    else:
        inside, outside = _by_mask(sharpness, subject, tuple(images.shape))
    first, second = _median(sharpness, inside), _median(sharpness, outside)
    return DepthOfField(first, second, (first.clamp_min(1) / second.clamp_min(1)).log2())


def shrunk(batch: Tensor, short_side: int) -> Tensor:
    """[N, C, H, W] with a short side of at most so many pixels, by an antialiased bilinear filter."""
    height, width = batch.shape[2:]
    least = min(height, width)
    if least <= short_side:
        return batch
    size = [max(1, round(side * short_side / least)) for side in (height, width)]
    return F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)


def _sharpness(batch: Tensor) -> Tensor:
    luma = 255 * shrunk(_luma(batch), _SHORT_SIDE)
    p = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    laplacian = p[:, :, 2:, 1:-1] + p[:, :, :-2, 1:-1] + p[:, :, 1:-1, 2:] + p[:, :, 1:-1, :-2] - 4 * luma
    return F.adaptive_avg_pool2d(laplacian.square(), _blocks(*luma.shape[2:])).sqrt()[:, 0]


def _blocks(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of blocks, as near to squares as whole numbers of them allow."""
    least = min(height, width)
    return round(height * _BLOCKS / least), round(width * _BLOCKS / least)


def _by_rule(sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """(the sharpest quarter of the middle, the border), bool [N, h, w]."""
    down, right = (round(side / 6) for side in sharpness.shape[1:])
    outside = torch.ones_like(sharpness, dtype=torch.bool)
    outside[:, down:-down, right:-right] = False
    middle = sharpness.masked_fill(outside, -math.inf).flatten(1)
    count = int((~outside[0]).sum())
    least = middle.topk(max(1, count // 4), dim=1).values[:, -1]
    return (middle >= least[:, None]).view_as(outside), outside


def _by_mask(sharpness: Tensor, subject: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if not isinstance(subject, Tensor) or subject.dtype != torch.bool:
        kind = subject.dtype if isinstance(subject, Tensor) else type(subject).__name__
        raise InputError(f"subject must be a bool tensor [N, H, W], not {kind}")
    expected = (shape[0], *shape[2:])
    if tuple(subject.shape) != expected:
        raise InputError(f"subject has shape {list(subject.shape)}: for these pictures it must be {list(expected)}")
    size = (sharpness.shape[1], sharpness.shape[2])
    covered = [F.adaptive_avg_pool2d(part[None].float(), size) for part in subject.to(sharpness.device)]
    share = torch.cat(covered)
    return share >= 0.75, share == 0


def _median(values: Tensor, where: Tensor) -> Tensor:
    """[N]: the median over the places of [N, h, w] that are chosen, the mean of the middle two; NaN without any."""
    return values.masked_fill(~where, math.nan).flatten(1).nanquantile(0.5, dim=1)


# Noise

_ROOT = math.sqrt(3)
_DETAIL = tuple(tap / math.sqrt(32) for tap in (-1 - _ROOT, 3 + _ROOT, _ROOT - 3, 1 - _ROOT))
_QUARTILE = 0.6744897501960817  # of a normal distribution: half of it is nearer to its mean
_NOISE_BLOCK = 16  # pixels


def noise(images: Pictures, *, smoothest: float = 0.25, value_range: Range = None) -> Tensor:
    """Standard deviation of the noise, levels, averaged over channels; [N].

    The median magnitude of the finest diagonal coefficients of the Daubechies wavelet of 4 taps, over 0.6745 (Donoho
    and Johnstone 1994). Leaves and petals have such detail, too; so only the ``smoothest`` share of the blocks of 16 x
    16 pixels counts, judged by their means of 4 x 4 pixels, in which fine noise has no part. Blocks with clipped values
    are left out, as clipping hides noise; NaN where there are no others. ``smoothest=1`` takes the whole picture, as
    scikit-image's ``estimate_sigma`` does (which leaves out coefficients that are 0, too).

    Fine regular texture, such as a weave or a checkerboard, counts as noise. A JPEG has lost much of the noise of its
    camera: where more than half of the coefficients of smooth parts are 0, so
    is this. Both sides must have 32 pixels.
    """
    if not 0 < smoothest <= 1:
        raise InputError(f"smoothest = {smoothest!r} is not allowed: a share above 0, at most 1")
    found = [
        torch.stack([_channel_noise(plane, smoothest) for plane in picture]).mean()
        for part in _parts(images, value_range, "images", _LEAST_SIDE)
        for picture in part
    ]
    return 255 * torch.stack(found)


def _channel_noise(plane: Tensor, smoothest: float) -> Tensor:
    """Deviation of the noise of one channel [H, W] in [0, 1]."""
    coefficients = _detail(_detail(plane).T).T.abs()
    if smoothest < 1:
        rows, columns = (side // _NOISE_BLOCK for side in plane.shape)
        pixels = plane[: rows * _NOISE_BLOCK, : columns * _NOISE_BLOCK]
        clipped = _cells((pixels <= 0) | (pixels >= 1), _NOISE_BLOCK).any(dim=2)
        means = F.avg_pool2d(pixels[None], 4)[0]
        roughness = _cells(means, _NOISE_BLOCK // 4).var(dim=2, correction=0).masked_fill(clipped, math.inf)
        usable = int((~clipped).sum())
        if not usable:
            return plane.new_full((), math.nan)
        # The coefficient k of a row or column is made of the pixels 2k - 2 to 2k + 1.
        half = _NOISE_BLOCK // 2
        blocks = _cells(coefficients[1 : 1 + rows * half, 1 : 1 + columns * half], half).flatten(0, 1)
        chosen = roughness.flatten().argsort(stable=True)[: max(1, round(smoothest * usable))]
        coefficients = blocks[chosen]
    return _middle(coefficients.flatten()) / _QUARTILE


def _middle(values: Tensor) -> Tensor:
    """The median of [n], the mean of the middle two where n is even; `quantile` takes 16 million at most."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _detail(rows: Tensor) -> Tensor:
    """The detail coefficients of every row of [R, n], mirrored at its ends: [R, (n + 3) // 2]."""
    padded = torch.cat([rows[:, :2].flip(1), rows, rows[:, -3:].flip(1)], dim=1)
    count = (rows.shape[1] + 3) // 2
    return torch.stack([tap * padded[:, 3 - j :: 2][:, :count] for j, tap in enumerate(_DETAIL)]).sum(dim=0)


def _cells(plane: Tensor, side: int) -> Tensor:
    """[h, w, side * side]: the values of each square cell of a plane whose sides are multiples of it."""
    rows, columns = (length // side for length in plane.shape)
    return plane.reshape(rows, side, columns, side).transpose(1, 2).reshape(rows, columns, side * side)


# Exposure

_CLIPPED = 5 / 255  # a JPEG and a tanh rarely reach the ends of the range themselves


@dataclass(frozen=True)
class Exposure:
    """Mean lightness L* (0 black, 18 % gray is 50, 100 white), and the shares of the pixels without detail; [N] each.

    ``shadows``: no channel is above 5 levels; ``highlights``: none below 250. So a saturated red, with one channel at
    either end, is neither.
    """

    mean: Tensor
    shadows: Tensor
    highlights: Tensor


def exposure(images: Pictures, *, value_range: Range = None) -> Exposure:
    """How bright pictures are: mean L* of CIELAB, and the shares of clipped shadows and highlights."""
    rows = []
    for part in _parts(images, value_range, "images"):
        shadows = (part <= _CLIPPED + 1e-9).all(dim=1).double().mean(dim=(1, 2))
        highlights = (part >= 1 - _CLIPPED - 1e-9).all(dim=1).double().mean(dim=(1, 2))
        rows.append(torch.stack([_lightness(part).mean(dim=(1, 2)), shadows, highlights]))
    return Exposure(*torch.cat(rows, dim=1))


# Colour

_TO_XYZ = (  # linear sRGB, IEC 61966-2-1, over the white of D65: each row adds up to 1
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
_DIRECTIONS = 48
_REACH = 150  # no colour of sRGB is as far from black, in any direction
_SAMPLES = 128  # along a side, of the pixels of a colour histogram


def lab(images: Pictures, *, value_range: Range = None) -> Tensor:
    """CIELAB of sRGB or gray pictures (D65, 2 degrees), float64 [N, 3, H, W]: L* 0 to 100, a* and b*."""
    return torch.cat([_lab(part) for part in _parts(images, value_range, "images")])


def colour_histogram(images: Pictures, *, value_range: Range = None) -> Tensor:
    """Cumulative histograms of the colours of each picture in 48 directions of CIELAB, [N, 48, 301].

    Bins of 1 unit; a value counts for the two bins beside it in proportion, so that its place is kept exactly. Large
    pictures give every k-th pixel of every k-th row, 128 to 255 a side. Histograms of pictures of any sizes can be
    averaged and compared (`histogram_distance`).
    """
    return torch.cat([_histogram(part) for part in _parts(images, value_range, "images")])


def histogram_distance(first: Tensor, second: Tensor) -> Tensor:
    """Distance of colour histograms [..., 48, 301], which are broadcast, in units of CIELAB (Delta E 1976).

    Twice the sliced Wasserstein distance (Rabin et al. 2011) of the pixels' colours, that is the mean work of moving
    one set of colours to the other, seen along 48 directions: places do not count, nor how colours are binned. It is
    0 for equal histograms and d (within 2 %) where all colours are shifted by d. About 2 is just seen side by side.

    A picture of few colours is far from a set of many: compare with the same value of the set's own pictures.
    """
    return 2 * (first - second).abs().sum(dim=-1).mean(dim=-1)


def colour_set_distance(reference: Floats, other: Floats) -> tuple[float, Floats, Floats]:
    """How far the colours of a set are from those of a reference set, and the influence of each picture on that.

    Of colour histograms [N, 48, 301] and [M, 48, 301]: `histogram_distance` of the sets' means, so that pictures count
    alike; and for `wasserstein.linear_bootstrap` its derivatives by their weights, [N] and [M], of mean 0.
    """
    means = [histograms.mean(axis=0) for histograms in (reference, other)]
    value = float(histogram_distance(*(torch.from_numpy(mean) for mean in means)))
    signs = np.sign(means[1] - means[0])
    own, theirs = (
        2 * np.tensordot(histograms - mean, signs, axes=2) / len(signs)
        for histograms, mean in zip((reference, other), means, strict=True)
    )
    return value, -own, theirs


def _histogram(batch: Tensor) -> Tensor:
    step = max(1, min(batch.shape[2:]) // _SAMPLES)
    colours = _lab(batch[:, :, ::step, ::step]).flatten(2)
    vectors = _directions(_DIRECTIONS).to(colours)
    bins = 2 * _REACH + 1
    return torch.stack([_cumulative(vectors @ colour + _REACH, bins) for colour in colours])


def _cumulative(places: Tensor, bins: int) -> Tensor:
    """[D, B] cumulative shares of values [D, P] in [0, B - 1), each divided between the bins beside it."""
    below = places.floor()
    upper = (places - below).flatten()
    row = torch.arange(len(places), device=places.device)[:, None] * bins
    at = (below.long() + row).flatten()
    size = len(places) * bins
    counts = torch.bincount(at, 1 - upper, minlength=size) + torch.bincount(at + 1, upper, minlength=size + 1)[:size]
    return (counts.view(-1, bins) / places.shape[1]).cumsum(dim=1)


def _directions(count: int) -> Tensor:
    """Unit vectors [count, 3], spread evenly over a half-sphere (Fibonacci's lattice)."""
    height = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    angle = math.pi * (1 + math.sqrt(5)) * (torch.arange(count, dtype=torch.float64) + 0.5)
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)


def _lab(batch: Tensor) -> Tensor:
    linear = _linear(batch.expand(-1, 3, -1, -1))
    xyz = torch.einsum("ij,njhw->nihw", torch.tensor(_TO_XYZ).to(linear), linear)
    x, y, z = _cube_root(xyz).unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _lightness(batch: Tensor) -> Tensor:
    """L* [N, H, W]."""
    weights = torch.tensor(_TO_XYZ[1]).to(batch)
    return 116 * _cube_root(torch.einsum("j,njhw->nhw", weights, _linear(batch.expand(-1, 3, -1, -1)))) - 16


def _linear(encoded: Tensor) -> Tensor:
    """Linear light of sRGB values in [0, 1] (IEC 61966-2-1)."""
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055).clamp_min(0) ** 2.4)


def _cube_root(ratio: Tensor) -> Tensor:
    """The function f of CIELAB."""
    return torch.where(ratio > 0.008856, ratio.clamp_min(1e-9) ** (1 / 3), 7.787 * ratio + 16 / 116)


# Input


def _luma(batch: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    if batch.shape[1] == 1:
        return batch
    return torch.einsum("c,nchw->nhw", torch.tensor(_LUMA).to(batch), batch)[:, None]


def _parts(images: Pictures, value_range: Range, name: str, smallest: int = 1) -> Iterator[Tensor]:
    """The pictures in [0, 1], some at a time. Raises InputError."""
    if getattr(images, "ndim", 0) != 4 or 0 in images.shape:
        as_batch(images, value_range, name)  # says what is wrong
    if images.shape[1] not in (1, 3):
        raise InputError(f"{name} has shape {list(images.shape)}: pictures must have 1 channel or 3 (sRGB)")
    height, width = images.shape[2:]
    if min(height, width) < smallest:
        raise InputError(f"pictures of {height} x {width} pixels are too small: both sides must have {smallest}")
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    return (as_batch(images[i : i + at_once], value_range, name) for i in range(0, images.shape[0], at_once))
