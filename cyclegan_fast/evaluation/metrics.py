"""How near pictures are to the truth (PSNR, SSIM, multi-scale SSIM), how near one set is to another (SWD), and how much
of a checkerboard is in them.

Every function takes batches [N, C, H, W] as tensors, on any device, or as arrays. What their numbers mean is never
guessed: ``uint8`` is 0 to 255, and floating-point pictures come with a ``value_range``, (-1, 1) for what the networks
see and make, (0, 1) for what most libraries hold. Wrong input raises InputError, a ValueError. All are computed in
float64, but for the projections of the Wasserstein distance, which are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.errors import InputError

__all__ = [
    "MS_SSIM_WEIGHTS",
    "Checkerboard",
    "Interval",
    "ReferenceSet",
    "SlicedWasserstein",
    "bootstrap",
    "bounded_psnr",
    "checkerboard",
    "ms_ssim",
    "ms_ssim_scales",
    "psnr",
    "sliced_wasserstein",
    "ssim",
]

Pictures: TypeAlias = Tensor | npt.NDArray[np.generic]
Range: TypeAlias = tuple[float, float] | None
Floats: TypeAlias = npt.NDArray[np.float64]

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003, from a test with observers)."""

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_PIXELS_AT_ONCE = 1 << 20  # of one channel: SSIM holds some ten maps of this size in float64
_FLAT = 1e-6  # a standard deviation below this, where the range of the pictures is 1, is rounding and no detail


# Pictures with a truth


def psnr(result: Pictures, truth: Pictures, *, value_range: Range = None) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB; float64 [N] on the device of the pictures.

    10 log10(range^2 / mean squared error of all pixels and channels), so infinite where a picture equals its truth.
    Take the mean over pictures of these decibels, as is usual.
    """
    pairs = _pairs(result, truth, value_range, smallest=1, what="PSNR")
    return torch.cat([-10 * (x - y).square().mean(dim=(1, 2, 3)).log10() for x, y in pairs])


def bounded_psnr(result: Pictures, truth: Pictures, *, value_range: Range = None) -> Tensor:
    """`psnr`, but at most that of an error of one of 255 levels in a single sample: finite, so that means are.

    48.1 + 10 log10(samples) dB, 92.5 for 96 x 96 pixels of three channels; nothing in 8 bits is nearer but equality.
    """
    found = psnr(result, truth, value_range=value_range)
    return found.clamp_max(20 * math.log10(255) + 10 * math.log10(math.prod(result.shape[1:])))


def ssim(result: Pictures, truth: Pictures, *, value_range: Range = None) -> Tensor:
    """Structural similarity of each picture (Wang, Bovik, Sheikh and Simoncelli 2004), at most 1; float64 [N].

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, population variances, averaged over the
    places where the window fits and over the channels. (The paper took gray pictures; colour is commonly treated so.)
    Both sides must have 11 pixels. scikit-image computes the same; torchmetrics lets the window overlap the border.
    """
    pairs = _pairs(result, truth, value_range, smallest=_WINDOW, what="SSIM")
    return torch.cat([_similarity(x, y)[0] for x, y in pairs])


def ms_ssim(result: Pictures, truth: Pictures, *, value_range: Range = None, scales: int = 5) -> Tensor:
    """Multi-scale structural similarity of each picture (Wang, Simoncelli and Bovik 2003), 0 to 1; float64 [N].

    The contrast-structure term of each scale and SSIM of the coarsest, averaged over places and channels, to the power
    of MS_SSIM_WEIGHTS, multiplied; each scale is the mean of 2 x 2 pixels of the one before. Negative terms count as 0,
    since they have no real power. Both sides must have 11 x 2^(scales - 1) pixels, 176 for the paper's five scales;
    with fewer, the weights left are divided by their sum, and values of different ``scales`` cannot be compared.
    """
    if not 1 <= scales <= len(MS_SSIM_WEIGHTS):
        raise InputError(f"scales = {scales!r} is not allowed: 1 to {len(MS_SSIM_WEIGHTS)}")
    # All five are taken as published, though they add up to 1.0001.
    total = 1.0 if scales == len(MS_SSIM_WEIGHTS) else sum(MS_SSIM_WEIGHTS[:scales])
    weights = [weight / total for weight in MS_SSIM_WEIGHTS[:scales]]
    pairs = _pairs(result, truth, value_range, smallest=_WINDOW << (scales - 1), what=f"MS-SSIM of {scales} scales")
    return torch.cat([_multi_scale(x, y, weights) for x, y in pairs])


def ms_ssim_scales(height: int, width: int) -> int:
    """The most scales, up to five, that ``ms_ssim`` can take of such pictures; 0 if they are too small for one."""
    return sum(min(height, width) >= _WINDOW << scale for scale in range(len(MS_SSIM_WEIGHTS)))


def _multi_scale(x: Tensor, y: Tensor, weights: list[float]) -> Tensor:
    product = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, contrast = _similarity(x, y)
        term = whole if scale == len(weights) - 1 else contrast
        product = product * term.clamp_min(0) ** weight
    return product


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(SSIM, its contrast-structure term) of pictures [N, C, H, W] in [0, 1], averaged to [N]."""
    mean_x, mean_y = _blur(x), _blur(y)
    # Their rounding is some 1e-16, twelve orders of magnitude below the constants.
    var_x, var_y = _blur(x * x) - mean_x * mean_x, _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + _K2**2) / (var_x + var_y + _K2**2)
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x * mean_x + mean_y * mean_y + _K1**2)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Mean under SSIM's Gaussian window at each place where it fits."""
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    return _separable(x, window / window.sum())


def _separable(x: Tensor, window: Tensor) -> Tensor:
    """Correlate the rows and the columns of every channel of [N, C, H, W] with a window [K]; no padding.

    Sums of shifted pictures: ten times as fast on a CPU as a convolution, which is not made for one channel in float64.
    """
    for axis in (3, 2):
        length = x.shape[axis] - len(window) + 1
        shifted = [x.narrow(axis, i, length) for i in range(len(window))]
        weights = window.tolist()
        x = shifted[0] * weights[0]
        for part, weight in zip(shifted[1:], weights[1:], strict=True):
            x.add_(part, alpha=weight)
    return x


# Sets of pictures


@dataclass(frozen=True)
class SlicedWasserstein:
    """Distances between two sets of pictures: of each level of the pyramid, named by the shorter side, and their mean.

    Not multiplied by 1000, as tables of the paper are.
    """

    levels: dict[int, float]
    mean: float


def sliced_wasserstein(
    reference: Pictures,
    other: Pictures,
    *,
    value_range: Range = None,
    statistics: str = "own",
    patches: int = 128,
    directions: int = 512,
    smallest: int = 16,
    seed: int = 0,
) -> SlicedWasserstein:
    """Sliced Wasserstein distance of the patches of Laplacian pyramids (Karras et al. 2018, section 5, appendix).

    At each level of the pyramid, halved as long as the shorter side has ``smallest`` pixels, ``patches`` patches of
    7 x 7 pixels are drawn from each picture of the smaller set, and as many in all from the other; their channels are
    normalised; both sets are projected on ``directions`` random unit vectors; and the distance is the mean over these
    of the mean |difference| of the sorted projections. Patches are drawn at the same places in both sets, so that a set
    has the distance 0 from itself. The same ``seed`` draws the same places and directions on any device.

    ``statistics="own"`` normalises each set by its own mean and deviation of each channel, as the paper does; this
    cannot see a colour cast or a contrast that all pictures share. ``"reference"`` takes those of the first set for
    both, and sees them.

    The distance of two samples of one distribution is not 0, and falls with the number of patches: compare only what
    was measured with equal numbers. Intervals, for sets of any size: `wasserstein`.

    Raises InputError for sets that are not alike in channels and size, too small, or not pictures, and for settings
    out of range.
    """
    batches = [as_batch(images, value_range, name) for images, name in ((reference, "reference"), (other, "other"))]
    batches[1] = batches[1].to(batches[0].device)
    _check_sets(batches, statistics, patches, directions, smallest)
    draws = _Draws(min(batch.shape[0] for batch in batches) * patches, directions, seed)
    levels: dict[int, float] = {}
    for number, (level, other_level) in enumerate(
        zip(*(laplacian_pyramid(batch, smallest) for batch in batches), strict=True)
    ):
        first = _slices(level, number, draws)
        second = _slices(other_level, number, draws, first.mean_std if statistics == "reference" else None)
        levels[first.side] = _mean_difference(first.sorted, second.sorted)
    return SlicedWasserstein(levels, sum(levels.values()) / len(levels))


class ReferenceSet:
    """A set that others are compared with again and again: its part of `sliced_wasserstein` is computed once and kept.

    ``count`` is the number of pictures of each of the others; the rest as in `sliced_wasserstein`, which gives the same
    distances to the bit. Kept are ``4 patches directions`` bytes for each level and each picture of the smaller set, on
    the device of the pictures. Raises InputError as there.
    """

    def __init__(
        self,
        reference: Pictures,
        count: int,
        *,
        value_range: Range = None,
        statistics: str = "own",
        patches: int = 128,
        directions: int = 512,
        smallest: int = 16,
        seed: int = 0,
    ) -> None:
        batch = as_batch(reference, value_range, "reference")
        if count < 1:
            raise InputError(f"count = {count!r} is not allowed: an integer >= 1")
        others = batch[:1].expand(count, *batch.shape[1:])
        _check_sets([batch, others], statistics, patches, directions, smallest)
        self._shape, self._device, self._smallest = tuple(others.shape), batch.device, smallest
        self._draws = _Draws(min(len(batch), count) * patches, directions, seed)
        self._own = statistics == "own"
        self._levels = [_slices(level, i, self._draws) for i, level in enumerate(laplacian_pyramid(batch, smallest))]

    def distance(self, other: Pictures, *, value_range: Range = None) -> SlicedWasserstein:
        """The distance of a set of ``count`` pictures of the reference's shape."""
        batch = as_batch(other, value_range, "other").to(self._device)
        if batch.shape != self._shape:
            raise InputError(f"other has shape {list(batch.shape)}, but {list(self._shape)} was announced")
        levels: dict[int, float] = {}
        for number, (known, level) in enumerate(
            zip(self._levels, laplacian_pyramid(batch, self._smallest), strict=True)
        ):
            found = _slices(level, number, self._draws, None if self._own else known.mean_std)
            levels[known.side] = _mean_difference(known.sorted, found.sorted)
        return SlicedWasserstein(levels, sum(levels.values()) / len(levels))


def _check_sets(batches: list[Tensor], statistics: str, patches: int, directions: int, smallest: int) -> None:
    shape, other = (tuple(batch.shape[1:]) for batch in batches)
    if shape != other:
        raise InputError(f"the sets hold pictures of different shapes [C, H, W]: {list(shape)} and {list(other)}")
    if statistics not in ("own", "reference"):
        raise InputError(f"statistics = {statistics!r} is not one of own, reference")
    for name, value, low in (("patches", patches, 1), ("directions", directions, 1), ("smallest", smallest, 7)):
        if value < low:
            raise InputError(f"{name} = {value!r} is not allowed: an integer >= {low}")
    if min(shape[1:]) < smallest:
        raise InputError(f"pictures of {shape[1]} x {shape[2]} pixels are too small: both sides must have {smallest}")


def laplacian_pyramid(images: Tensor, smallest: int) -> Iterator[Tensor]:
    """Laplacian pyramid of [N, C, H, W], finest level first; the last one is what is left and no difference."""
    window = torch.tensor(_BINOMIAL, dtype=images.dtype, device=images.device)
    while (min(images.shape[2:]) + 1) // 2 >= smallest:
        coarse = _separable(_mirrored(images), window)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = coarse
        # Three of four pixels are zeros: twice the window in either direction keeps the mean.
        yield images - _separable(_mirrored(spread), 2 * window)
        images = coarse
    yield images


def _mirrored(x: Tensor) -> Tensor:
    return F.pad(x, (2, 2, 2, 2), mode="reflect")


def cut_patches(images: Tensor, places: Floats, picture: Tensor | None = None) -> Tensor:
    """Patches [P, C, 7, 7] of [N, C, H, W] at places [2, P]: y and x, each in [0, 1).

    ``picture``, int64 [P], says of which pictures; None: as many of each.
    """
    count, device = places.shape[1], images.device
    picture = torch.arange(count, device=device) * images.shape[0] // count if picture is None else picture
    corners = [
        torch.from_numpy((place * (side - 6)).astype(np.int64)).to(device)
        for place, side in zip(places, images.shape[2:], strict=True)
    ]
    offset = torch.arange(7, device=device)
    channel = torch.arange(images.shape[1], device=device)
    return images[
        picture.view(-1, 1, 1, 1),
        channel.view(1, -1, 1, 1),
        (corners[0].view(-1, 1) + offset).view(count, 1, 7, 1),
        (corners[1].view(-1, 1) + offset).view(count, 1, 1, 7),
    ]


def channel_mean_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of the channels; 1 for the deviation of what is flat."""
    std, mean = torch.std_mean(patches, dim=(0, 2, 3), correction=0, keepdim=True)
    return mean, torch.where(std < _FLAT, torch.ones_like(std), std)


class _Draws(NamedTuple):
    """What decides the random places and directions of all levels."""

    patches: int  # of a set in all
    directions: int
    seed: int


@dataclass(frozen=True)
class _Slices:
    """A level of one set: its shorter side, its channels' statistics, and its projections [D, P], sorted."""

    side: int
    mean_std: tuple[Tensor, Tensor]
    sorted: Tensor


def _slices(level: Tensor, number: int, draws: _Draws, mean_std: tuple[Tensor, Tensor] | None = None) -> _Slices:
    """The patches of level `number`, [N, C, H, W], normalised by their own statistics or by those given."""
    random = np.random.default_rng((draws.seed, number))
    patches = cut_patches(level, random.random((2, draws.patches)))
    vectors = random.standard_normal((patches[0].numel(), draws.directions))
    mean_std = mean_std or channel_mean_std(patches)
    return _Slices(min(level.shape[2:]), mean_std, _projections(patches, *mean_std, vectors))


def _projections(patches: Tensor, mean: Tensor, std: Tensor, vectors: Floats) -> Tensor:
    """Sorted projections [D, P], float32, of normalised patches on vectors [K, D]."""
    unit = torch.from_numpy((vectors / np.linalg.norm(vectors, axis=0)).astype(np.float32))
    rows = ((patches - mean) / std).flatten(1).float()
    return torch.sort((rows @ unit.to(rows.device)).T.contiguous(), dim=1).values


def _mean_difference(first: Tensor, second: Tensor) -> float:
    """Mean over directions of the Wasserstein distance of two samples of one size, each sorted along its row."""
    return float((first - second).abs().mean(dtype=torch.float64))


# Checkerboards

_PERIODS = (2, 4)
_LEAST_SIDE = 32  # with fewer pixels a frequency's neighbours are those of the next one
_NEAR = range(-4, 5)


@dataclass(frozen=True)
class Checkerboard:
    """Patterns of period 2 and of period 4, float64 [N, 2] each.

    ``energy``: their mean square, in shares of the pictures' range, above what the neighbouring frequencies let expect;
    below 0 where there is less, by chance. ``contrast``: their power relative to that of the neighbours; 1 for none.
    """

    energy: Tensor
    contrast: Tensor


def checkerboard(images: Pictures, *, value_range: Range = None) -> Checkerboard:
    """How much of the patterns is in each picture that two doublings of the sides can draw (Odena et al. 2016).

    A pattern that repeats every 2 pixels has frequencies of 0 and 1/2 a pixel only, one of 4 pixels those and 1/4, so
    it stands out of a smooth spectrum as single lines: 3 of period 2, 12 more of period 4. Each line (of the spectrum
    under a Hann window, means subtracted) is compared with the lines 2 to 4 places from it. Along a direction in which
    a line is constant, so are these, because pictures, full of upright and level edges, have more power there. Energies
    are averaged over channels. For `contrast`, both powers are taken with that of rounding to 8 bits, below which
    nothing counts.

    Both sides must have 32 pixels; the last ones are left out where a side is no multiple of 4.
    """
    batch = as_batch(images, value_range, "images")
    height, width = (side // 4 * 4 for side in batch.shape[2:])
    if min(height, width) < _LEAST_SIDE:
        raise InputError(
            f"pictures of {batch.shape[2]} x {batch.shape[3]} pixels are too small for a spectrum: both sides must "
            f"have {_LEAST_SIDE}"
        )
    window = _hann(height, batch)[:, None] * _hann(width, batch)
    at_once = max(1, _PIXELS_AT_ONCE // batch[0].numel())
    power = torch.cat([_power(part[:, :, :height, :width], window) for part in batch.split(at_once)])
    rounding = window.square().sum() / window.sum().square() / (12 * 255**2)
    energies, contrasts = [], []
    for period in _PERIODS:
        lines = [_line(power, row, column) for row, column in _frequencies(height, width, period)]
        peaks = torch.stack([peak for peak, _ in lines], dim=1)
        floors = torch.stack([floor for _, floor in lines], dim=1)
        energies.append((peaks - floors).sum(dim=1))
        contrasts.append((peaks + rounding).sum(dim=1) / (floors + rounding).sum(dim=1))
    return Checkerboard(torch.stack(energies, dim=1), torch.stack(contrasts, dim=1))


def _hann(size: int, like: Tensor) -> Tensor:
    return torch.hann_window(size, periodic=True, dtype=like.dtype, device=like.device)


def _power(images: Tensor, window: Tensor) -> Tensor:
    """Power [N, H, W] of each frequency, averaged over channels: that of a pattern is its mean square."""
    spectrum = torch.fft.fft2((images - images.mean(dim=(2, 3), keepdim=True)) * window) / window.sum()
    power: Tensor = spectrum.abs().square().mean(dim=1)
    return power


def _frequencies(height: int, width: int, period: int) -> list[tuple[int, int]]:
    """Row and column, in a spectrum of this size, of each line of a period that half the period has not."""

    def lines(period: int) -> set[tuple[int, int]]:
        return {(row * height // period, column * width // period) for row in range(period) for column in range(period)}

    return sorted(lines(period) - lines(period // 2))


def _line(power: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Power of a line and the mean of its neighbours, [N] each."""
    around = [
        power[:, (row + down) % power.shape[1], (column + right) % power.shape[2]]
        for down in (_NEAR if row else (0,))
        for right in (_NEAR if column else (0,))
        if max(abs(down), abs(right)) > 1  # a Hann window spreads a line to the places beside it
    ]
    return power[:, row, column], torch.stack(around).mean(dim=0)


# Intervals


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def bootstrap(
    values: Tensor | npt.ArrayLike,
    *,
    statistic: Callable[..., npt.ArrayLike] = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of one number a picture, [N] with N >= 2.

    ``statistic(values, axis=1)`` maps [R, N] to [R], as np.mean and np.median do. For two methods on the same pictures
    give the differences, picture by picture. It answers for the choice of the pictures alone: another training run is
    another question. Percentile intervals are a little narrow for few pictures (for 10, some 90 % where 95 % is said).
    """
    data = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if data.ndim != 1 or data.size < 2:
        raise InputError(f"values has shape {list(data.shape)}: a bootstrap needs at least two numbers in a row")
    if not np.isfinite(data).all():
        raise InputError("values holds NaN or infinite numbers: a bootstrap of them says nothing")
    if not 0 < level < 1:
        raise InputError(f"level = {level!r} is not allowed: a probability between 0 and 1, 0.95 for instance")
    if resamples < 1:
        raise InputError(f"resamples = {resamples!r} is not allowed: an integer >= 1")
    random = np.random.default_rng(seed)
    at_once = max(1, min(resamples, 10_000_000 // data.size))
    found = [
        np.asarray(statistic(data[random.integers(0, data.size, (min(at_once, resamples - done), data.size))], axis=1))
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.asarray(statistic(data[None], axis=1))[0]), float(low), float(high))


# Input


def _pairs(
    result: Pictures, truth: Pictures, value_range: Range, *, smallest: int, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both batches in [0, 1], some pictures at a time. Raises InputError."""
    x, y = as_batch(result, value_range, "result"), as_batch(truth, value_range, "truth")
    if x.shape != y.shape:
        raise InputError(f"result has shape {list(x.shape)} and truth {list(y.shape)}: they must be the same")
    if min(x.shape[2:]) < smallest:
        raise InputError(
            f"pictures of {x.shape[2]} x {x.shape[3]} pixels are too small for {what}: both sides must have {smallest}"
        )
    at_once = max(1, _PIXELS_AT_ONCE // x[0].numel())
    return zip(x.split(at_once), y.to(x.device).split(at_once), strict=True)


def as_batch(images: Pictures, value_range: Range, name: str) -> Tensor:
    """Float64 [N, C, H, W] in [0, 1], on the device of the pictures. Raises InputError."""
    if not isinstance(images, (Tensor, np.ndarray)):
        raise InputError(f"{name} must be a tensor or an array [N, C, H, W], not a {type(images).__name__}")
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{name} has shape {list(images.shape)}: pictures must be [N, C, H, W], without empty sides")
    if str(images.dtype).removeprefix("torch.") not in ("uint8", "bfloat16", "float16", "float32", "float64"):
        raise InputError(f"{name} has dtype {images.dtype}: it must be uint8 or floating point")
    # A copy of an array, which may be read-only or mirrored: torch does not take these.
    batch = images.detach() if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))
    if batch.dtype == torch.uint8:
        if value_range is not None:
            raise InputError(f"{name} is uint8, which is 0 to 255: leave out value_range = {value_range!r}")
        return batch.double() / 255
    if value_range is None:
        raise InputError(f"{name} is floating point: say what its numbers mean, value_range=(-1, 1) or (0, 1)")
    try:
        low, high = (float(end) for end in value_range)
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError("not a range")
    except (TypeError, ValueError):
        raise InputError(f"value_range = {value_range!r} is not allowed: two numbers, the lower first") from None
    scaled = (batch.double() - low) / (high - low)
    if not bool(((scaled >= -1e-6) & (scaled <= 1 + 1e-6)).all()):  # NaN is outside, too
        least, most = float(batch.min()), float(batch.max())
        raise InputError(f"{name} has values from {least:.4g} to {most:.4g}, outside value_range = ({low:g}, {high:g})")
    return scaled
