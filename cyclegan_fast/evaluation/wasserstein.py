"""Sliced Wasserstein distances of sets of any number of pictures, with confidence intervals.

The distance is that of `metrics.sliced_wasserstein`, to rounding, but pictures pass by some at a time and only patches
are kept. It is an estimate of two sorts of error: of the limited number of pictures, which raises it, always, and of
their choice, which the interval is for. So the interval says where the distance would lie for another choice of *as
many* pictures, and not how near the domains are in the limit of infinitely many.

A plain bootstrap, which draws pictures with replacement, says neither: a set in which pictures are repeated is a worse
sample, its distance is too large, and its 95 % interval held the expectation in 67 to 93 % of simulated cases. Here the
bootstrap is of the distance's linear part. With F and G the distribution functions of the projections on a direction,
the distance is the integral of |F - G|, and a picture of weight 1/n with the share 1[x <= t] of its patches changes it
by the integral of sign(F - G) (1[x <= t] - F) / n to first order: its influence (Hampel 1974). The mean influence of
pictures drawn with replacement is added to the distance, again and again. In the same simulations this held the
expectation in 92 to 100 %: where both sets have one distribution, the interval is wider than it need be.

Where both sets are normalised by the reference's statistics, its pictures also change the deviation, and so the
distance's scale; that is in their influence. (The mean moves both sets alike.) Where each is normalised by its own,
that is left out: there the intervals are on the wide side already. Intervals of the difference of two distances, of
sets of only 12 simulated pictures, held the expectation in 98 to 100 % by their own statistics, in 84 to 92 % by the
reference's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cyclegan_fast.evaluation.metrics import Interval, as_batch, channel_mean_std, cut_patches, laplacian_pyramid

__all__ = ["PatchSet", "influences", "linear_bootstrap", "set_distance"]

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

_DIRECTIONS = 512
_DIRECTIONS_OF_INFLUENCE = 64  # enough for a standard error
_SMALLEST = 16
_SMALL = 0.01  # a change of a scale, for a derivative


class PatchSet:
    """Patches of the Laplacian pyramids of ``count`` pictures, ``patches`` in all, at random places by ``seed``.

    ``batches`` gives the pictures, uint8 [n, C, H, W] each, in their order. Sets that are to be compared have equally
    many patches. Kept are 4 x 49 x C bytes a patch and level.
    """

    def __init__(self, batches: Iterable[Tensor], count: int, patches: int, seed: int = 0) -> None:
        self.count = count
        self.picture = torch.arange(patches) * count // patches
        parts: list[list[Tensor]] = []
        places: list[Floats] = []
        begin = 0
        for batch in batches:
            low, high = torch.searchsorted(self.picture, torch.tensor([begin, begin + len(batch)])).tolist()
            for number, level in enumerate(laplacian_pyramid(as_batch(batch, None, "pictures"), _SMALLEST)):
                if number == len(parts):
                    parts.append([])
                    places.append(np.random.default_rng((seed, number)).random((2, patches)))
                own = self.picture[low:high] - begin
                parts[number].append(cut_patches(level, places[number][:, low:high], own).float())
            begin += len(batch)
        self.levels = [torch.cat(part) for part in parts]
        self.seed = seed


def set_distance(reference: PatchSet, other: PatchSet, *, statistics: str = "own") -> tuple[float, Floats, Floats]:
    """The distance of two sets, and the influence on it of each picture of either, [N] and [M], of mean 0.

    ``statistics`` as in `metrics.sliced_wasserstein`.
    """
    values, found = [], []
    for number, (first, second) in enumerate(zip(reference.levels, other.levels, strict=True)):
        known = channel_mean_std(first)
        rows = [
            _rows(first, *known),
            _rows(second, *(known if statistics == "reference" else channel_mean_std(second))),
        ]
        vectors = _vectors(first[0].numel(), reference.seed, number, len(first))
        projections = [vectors @ row for row in rows]
        values.append(_mean_difference(*(np.sort(p, axis=1) for p in projections)))
        few = [p[:_DIRECTIONS_OF_INFLUENCE] for p in projections]
        pair = influences(few[0], few[1], reference.picture.numpy(), other.picture.numpy())
        if statistics == "reference":
            sensitivity = _of_scales(vectors[:_DIRECTIONS_OF_INFLUENCE], rows, first.shape[1])
            pair = (pair[0] + _of_contrast(rows[0], reference.picture.numpy(), first.shape[1]) @ sensitivity, pair[1])
        found.append(pair)
    first_influence, second_influence = (np.mean(each, axis=0) for each in zip(*found, strict=True))
    return float(np.mean(values)), first_influence, second_influence


def _of_scales(vectors: Float32s, rows: list[Float32s], channels: int) -> Floats:
    """The distance's derivatives by the logarithms of the deviations that both sets' channels are divided by, [C]."""
    before = _mean_difference(*(np.sort(vectors @ row, axis=1) for row in rows))
    each = len(rows[0]) // channels
    changes = []
    for channel in range(channels):
        part = slice(channel * each, (channel + 1) * each)
        # Adds to the projections what the channel's part grows by.
        grown = [vectors @ row + _SMALL * (vectors[:, part] @ row[part]) for row in rows]
        changes.append(_mean_difference(*(np.sort(projections, axis=1) for projections in grown)) - before)
    return -np.array(changes) / _SMALL


def _of_contrast(rows: Float32s, picture: npt.NDArray[np.int64], channels: int) -> Floats:
    """Influence of each picture on the logarithm of the channels' deviations, by which `rows` were divided, [N, C]."""
    power = rows.reshape(channels, -1, rows.shape[1]).astype(np.float64)
    excess = (np.square(power).mean(axis=1) - 1) / 2  # [C, P]
    found = np.stack([np.bincount(picture, one) / np.bincount(picture) for one in excess], axis=1)
    centred: Floats = found - found.mean(axis=0)
    return centred


def linear_bootstrap(
    value: float, parts: Iterable[Floats], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap interval of an estimate from the influence of each picture of each independent set on it.

    The estimate itself is in the middle of what is drawn. Pictures of one set are drawn together, those of several
    independently. Small samples vary too little, for which sqrt(n / (n - 1)) makes up.
    """
    random = np.random.default_rng(seed)
    shift = np.zeros(resamples)
    for influence in parts:
        n = len(influence)
        drawn = influence[random.integers(0, n, (resamples, n))].mean(axis=1)
        shift += (drawn - influence.mean()) * np.sqrt(n / (n - 1))
    low, high = np.quantile(shift, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, value + float(low), value + float(high))


def _rows(patches: Tensor, mean: Tensor, std: Tensor) -> Float32s:
    """Normalised patches as columns [K, P]."""
    rows: Float32s = ((patches - mean) / std).flatten(1).T.contiguous().numpy()
    return rows


def _vectors(size: int, seed: int, number: int, patches: int) -> Float32s:
    """Unit vectors [D, size], those that `metrics.sliced_wasserstein` draws after the places."""
    random = np.random.default_rng((seed, number))
    random.random((2, patches))
    vectors = random.standard_normal((size, _DIRECTIONS))
    return np.ascontiguousarray((vectors / np.linalg.norm(vectors, axis=0)).T.astype(np.float32))


def _mean_difference(first: Float32s, second: Float32s) -> float:
    return float(np.abs(first - second).mean(dtype=np.float64))


def influences(
    first: Float32s, second: Float32s, of_first: npt.NDArray[np.int64], of_second: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Influence of each picture of both sets on the distance of projections [D, P], of mean 0."""
    count = first.shape[1]
    total = np.zeros(2 * count)
    for row in np.concatenate([first, second], axis=1):  # one direction
        order = np.argsort(row)
        steps = np.where(order < count, 1.0, -1.0)
        signs = np.sign(np.cumsum(steps)[:-1]) * np.diff(row[order].astype(np.float64))
        above = np.zeros(2 * count)  # the integral of sign(F - G) from each value upwards
        above[:-1] = np.cumsum(signs[::-1])[::-1]
        total[order] += above
    total /= len(first)
    pictures = []
    for part, picture, sign in ((total[:count], of_first, 1.0), (total[count:], of_second, -1.0)):
        means = np.bincount(picture, part) / np.bincount(picture)
        pictures.append(sign * (means - means.mean()))
    return pictures[0], pictures[1]
