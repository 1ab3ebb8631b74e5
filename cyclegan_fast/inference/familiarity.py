"""How like the training pictures a picture is: a model only translates well what it was trained on.

Of each domain, `Reference` keeps how its training pictures are distributed in numbers that need no network and no
weights: colours (means, spread, quantiles, hues) and structure (the power spectrum by scale, direction and channel),
both of the picture shrunk to 64 x 64. A picture's distance in each is Mahalanobis's, with the covariance shrunk as
Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices") have it, so that a
hundred pictures suffice. Pictures that took no part in this say how far is unusual: those of the test set, and training
pictures left out in turn. docs/familiarity.md has what it finds, and what it does not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ASPECTS", "LEAST_PICTURES", "UNUSUAL", "Familiarity", "Reference"]
__all__ += ["distances_from", "features", "thinned", "whitened"]

Float64Array = npt.NDArray[np.float64]
Features = dict[str, Float64Array]

ASPECTS = ("colours", "structure")
# Share of held-out pictures that may lie beyond the bound: as many are warned of for nothing.
UNUSUAL = 0.01
# Fewer training pictures say nothing of the others; fewer test pictures are not counted on alone.
LEAST_PICTURES = 20

_VERSION = 1  # of the features: a reference of others is of no use
_SIDE = 64
_RINGS = (1, 2, 3, 5, 8, 13, 20, 33)  # cycles a picture
_QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)
_HUES = 8
_DIRECTIONS = 4
_BROAD = (2, 6, 33)  # the two bands, cycles a picture, whose power is told by direction
# What noise, JPEG and eight bits make of nothing: variance below it is not told apart. In values of [0, 1].
_NOISE_POWER, _NOISE = 1e-5, 1e-2
_LEAST_SPREAD = 1e-2  # of a feature over the training pictures: one that never varies is known no better
_LEAST_DISTANCE = 0.1
_RIDGE = 1e-3
_FOLDS = 5
_MOST_SCORES = 4096
_LARGE, _ENOUGH = 4 * _SIDE, 16 * _SIDE


@dataclass(frozen=True)
class Familiarity:
    """How like the training pictures of its domain a picture is.

    distance: of the aspect (one of ASPECTS) in which it is further from them, in units of that which 1 of 100 pictures
    of their kind exceeds; nearer: how many of `among` pictures that took no part in training, those of the test set
    or (held_out `training`) training pictures left out in turn, are nearer.
    """

    distance: float
    aspect: str
    nearer: int
    among: int
    held_out: str

    @property
    def unfamiliar(self) -> bool:
        """Whether a warning is due."""
        return not self.distance <= 1

    def __str__(self) -> str:
        kind = "test pictures" if self.held_out == "test" else "training pictures left out"
        others = f"all {self.among}" if self.nearer == self.among else f"{self.nearer} of {self.among}"
        like = "unlike" if self.unfamiliar else "like"
        times = f"{self.distance:.1f}" if self.distance < 10 else f"{self.distance:.0f}"
        times = times if self.distance < 1000 else "more than 999"
        return (
            f"{like} the training pictures: in {self.aspect} {times} times the usual limit, "
            f"further from them than {others} {kind}"
        )


class Reference:
    """How the training pictures of one domain are distributed, and how far from them is unusual.

    channels: of its pictures; whitening: by aspect (centre [d], matrix [d, d]), which map features to where the
    training pictures have unit covariance; bounds: by aspect, the distance that is unusual; scores: of the held-out
    pictures, float64 ascending, the larger of their distances in units of these; held_out: `test` or `training`.
    """

    def __init__(
        self,
        channels: int,
        whitening: Mapping[str, tuple[Float64Array, Float64Array]],
        bounds: Mapping[str, float],
        scores: Float64Array,
        held_out: str,
    ) -> None:
        self.channels, self.whitening, self.bounds = channels, dict(whitening), dict(bounds)
        self.scores, self.held_out = scores, held_out

    @classmethod
    def fit(cls, training: Features, test: Features | None = None) -> Reference:
        """From the `features` of training pictures and of test pictures, as many as there are.

        Raises ValueError for fewer than LEAST_PICTURES training pictures. Fewer test pictures count as none.
        """
        count = len(training[ASPECTS[0]])
        if count < LEAST_PICTURES:
            raise ValueError(f"{count} training pictures are too few to tell others from: {LEAST_PICTURES} at least")
        channels = next(n for n in range(1, 5) if _sizes(n) == tuple(training[name].shape[1] for name in ASPECTS))
        if test is not None and len(test[ASPECTS[0]]) < LEAST_PICTURES:
            test = None
        whitening, bounds, ratios = {}, {}, {}
        for name in ASPECTS:
            whitening[name] = whitened(training[name])
            held_out = left_out = _left_out_distances(training[name])
            if test is not None:
                held_out = distances_from(test[name], *whitening[name])
            # Either may be easy by chance; of the two, the larger keeps false warnings as rare as they should be.
            bounds[name] = max(_upper_bound(held_out), _upper_bound(left_out))
            ratios[name] = held_out / bounds[name]
        scores = np.sort(np.maximum.reduce(list(ratios.values())))
        chosen = np.linspace(0, len(scores) - 1, min(len(scores), _MOST_SCORES)).round().astype(int)
        return cls(channels, whitening, bounds, scores[chosen], "training" if test is None else "test")

    def compare(self, found: Features) -> Familiarity:
        """The familiarity of pictures by their `features`: of the least familiar one."""
        ratios = np.stack([distances_from(found[name], *self.whitening[name]) / self.bounds[name] for name in ASPECTS])
        aspect, _ = np.unravel_index(int(ratios.argmax()), ratios.shape)
        distance = float(ratios.max())
        nearer = int(np.searchsorted(self.scores, distance))
        return Familiarity(distance, ASPECTS[int(aspect)], nearer, len(self.scores), self.held_out)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: plain values and float32 tensors, some ten kilobytes."""
        state: dict[str, Any] = {"version": _VERSION, "channels": self.channels, "held_out": self.held_out}
        for name in ASPECTS:
            centre, matrix = (torch.from_numpy(part).float() for part in self.whitening[name])
            state[name] = {"centre": centre, "matrix": matrix, "bound": self.bounds[name]}
        return state | {"scores": torch.from_numpy(self.scores).float()}

    @classmethod
    def from_state(cls, state: Any) -> Reference:
        """What `state_dict` gave. Raises ValueError for anything else, a NaN among the numbers included."""
        if not isinstance(state, dict) or type(state.get("version")) is not int:
            raise ValueError("it is not what was measured of training pictures")
        if state["version"] != _VERSION:
            raise ValueError(f"its features are of version {state['version']}, not {_VERSION}")
        channels, held_out = state.get("channels"), state.get("held_out")
        if type(channels) is not int or not 1 <= channels <= 4 or held_out not in ("test", "training"):
            raise ValueError("channels must be 1 to 4, and held_out test or training")
        whitening, bounds = {}, {}
        for name, size in zip(ASPECTS, _sizes(channels), strict=True):
            found = state.get(name)
            part: dict[str, Any] = found if isinstance(found, dict) else {}
            whitening[name] = _array(part.get("centre"), (size,)), _array(part.get("matrix"), (size, size))
            bound = part.get("bound")
            if not isinstance(bound, float) or not 0 < bound < math.inf:
                raise ValueError(f"the bound of {name} is {bound!r:.40}, not a positive number")
            bounds[name] = bound
        scores = state.get("scores")
        if not isinstance(scores, Tensor) or scores.dim() != 1 or not 1 <= len(scores) <= _MOST_SCORES:
            raise ValueError(f"scores must be 1 to {_MOST_SCORES} numbers")
        return cls(channels, whitening, bounds, np.sort(_array(scores, (len(scores),))), held_out)


def features(pictures: Tensor) -> Features:
    """Colours and structure, float64 [N, d] each, of pictures [N, C, H, W] of any size, uint8 or in [-1, 1].

    C as in ``MODES`` of data.photo: gray, gray and alpha, RGB, RGB and alpha. The size counts for nothing, the
    proportions neither: training may have changed both.
    """
    small = _shrunk(pictures)
    planes = _planes(small)
    values = planes.reshape(*planes.shape[:2], -1)
    quantiles = np.moveaxis(np.quantile(values, _QUANTILES, axis=2), 0, 2)
    spread = np.log(values.std(axis=2) + _NOISE)
    colours = [values.mean(axis=2), spread, quantiles.reshape(len(values), -1)]
    if small.shape[1] >= 3:
        colours += _hues(values[:, :3])
    power = _power(planes)
    structure = [_rings(power, _cells(_RINGS, 1)), _rings(power[:, :1], _cells(_BROAD, _DIRECTIONS))]
    return {"colours": np.concatenate(colours, axis=1), "structure": np.concatenate(structure, axis=1)}


def thinned(pixels: Tensor | npt.NDArray[Any], axis: int = 0) -> Any:
    """Every so many rows and columns (of axes axis and axis + 1) of a picture that has more than are looked at."""
    rows, columns = (max(side // _ENOUGH, 1) for side in pixels.shape[axis : axis + 2])
    return pixels[(slice(None),) * axis + (slice(None, None, rows), slice(None, None, columns))]


def _sizes(channels: int) -> tuple[int, int]:
    """Features of the aspects."""
    colour = channels >= 3
    planes = (3 if colour else 1) + (channels in (2, 4))
    return planes * (2 + len(_QUANTILES)) + colour * (_HUES + 3), planes * (len(_RINGS) - 1) + 2 * _DIRECTIONS


def _shrunk(pictures: Tensor) -> Float64Array:
    """[N, C, 64, 64] in [0, 1], antialiased, of large pictures by some of their pixels; bytes are rounded to bytes."""
    small: Tensor = thinned(pictures.detach(), axis=2)
    if small.dtype != torch.uint8:
        # Torch resizes bytes fast, and numbers slowly.
        small = F.avg_pool2d(small.float(), [max(side // _LARGE, 1) for side in small.shape[2:]])
    small = F.interpolate(small, (_SIDE, _SIDE), mode="bilinear", antialias=True)
    values = small.cpu().numpy().astype(np.float64)
    values = values / 255 if small.dtype == torch.uint8 else (values + 1) / 2
    return np.clip(np.nan_to_num(values), 0, 1)


def _planes(values: Float64Array) -> Float64Array:
    """Luma, blue and red differences, alpha, as far as there are such, of [N, C, S, S]: [N, P, S, S]."""
    channels = values.shape[1]
    planes = [values[:, 0]]
    if channels >= 3:
        red, green, blue = (values[:, channel] for channel in range(3))
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        planes = [luma, blue - luma, red - luma]
    if channels in (2, 4):
        planes.append(values[:, -1])
    return np.stack(planes, axis=1)


def _hues(values: Float64Array) -> list[Float64Array]:
    """Chroma by hue [N, 8], and how the three planes [N, 3, n] vary together [N, 3]."""
    chroma, angle = np.hypot(values[:, 1], values[:, 2]), np.arctan2(values[:, 1], values[:, 2])
    sector = ((angle + np.pi) / (2 * np.pi) * _HUES).astype(np.int64) % _HUES
    by_hue = np.stack([(chroma * (sector == hue)).mean(axis=1) for hue in range(_HUES)], axis=1)
    apart = values - values.mean(axis=2, keepdims=True)
    together = np.stack([(apart[:, i] * apart[:, j]).mean(axis=1) for i, j in ((1, 2), (0, 2), (0, 1))], axis=1)
    return [np.sqrt(by_hue + 1e-4), 10 * together]


def _power(planes: Float64Array) -> Float64Array:
    """Power spectra [N, P, S, S / 2 + 1] under a Hann window, so that borders are no edges."""
    window = np.hanning(_SIDE + 2)[1:-1]
    apart = planes - planes.mean(axis=(2, 3), keepdims=True)
    spectrum = np.fft.rfft2(apart * window[:, None] * window)
    power: Float64Array = (spectrum.real**2 + spectrum.imag**2) / _SIDE**2
    return power


def _rings(power: Float64Array, cells: Float64Array) -> Float64Array:
    """Log mean power of each plane in each of the cells [K, S (S / 2 + 1)]: [N, P K]."""
    logs: Float64Array = np.log(power.reshape(*power.shape[:2], -1) @ cells.T + _NOISE_POWER)
    return logs.reshape(len(power), -1)


@functools.cache
def _cells(edges: tuple[int, ...], directions: int) -> Float64Array:
    """Rings of frequencies, each divided into directions, as rows of weights that add up to 1."""
    y, x = np.fft.fftfreq(_SIDE)[:, None] * _SIDE, np.fft.rfftfreq(_SIDE)[None] * _SIDE
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    sector = np.floor(angle * directions / np.pi + 0.5) % directions
    cells = [
        (radius >= low) & (radius < high) & (sector == direction)
        for low, high in itertools.pairwise(edges)
        for direction in range(directions)
    ]
    rows = np.stack(cells).reshape(len(cells), -1).astype(np.float64)
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


def whitened(samples: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Centre [d] and matrix [d, d] of samples [n, d]: |(f - centre) matrix| is the distance of f."""
    count, size = samples.shape
    centre, scale = samples.mean(axis=0), np.maximum(samples.std(axis=0), _LEAST_SPREAD)
    x = (samples - centre) / scale
    covariance = x.T @ x / count
    level = np.trace(covariance) / size
    away = ((covariance - level * np.eye(size)) ** 2).sum()
    error = ((x**2).T @ x**2 / count - covariance**2).sum() / count
    share = min(error / away, 1.0) if away > 0 else 1.0
    shrunk = (1 - share) * covariance + (share * level + _RIDGE) * np.eye(size)
    return centre, np.linalg.cholesky(np.linalg.inv(shrunk)) / scale[:, None]


def distances_from(samples: Float64Array, centre: Float64Array, matrix: Float64Array) -> Float64Array:
    distances: Float64Array = np.linalg.norm((samples - centre) @ matrix, axis=1)
    return distances


def _left_out_distances(samples: Float64Array) -> Float64Array:
    """Of each sample, its distance from the others of four fifths that it is not in."""
    fold = np.arange(len(samples)) % _FOLDS
    distances = np.empty(len(samples))
    for k in range(_FOLDS):
        distances[fold == k] = distances_from(samples[fold == k], *whitened(samples[fold != k]))
    return distances


def _upper_bound(distances: Float64Array) -> float:
    """What one more distance exceeds with half the probability UNUSUAL (there are two aspects).

    The upper end of a prediction interval for log-normal distances: it grows as the pictures become fewer, which a
    quantile of them does not. Student's t by the expansion of Cornish and Fisher.
    """
    logs = np.log(np.maximum(distances, _LEAST_DISTANCE))
    count, freedom = len(logs), len(logs) - 1
    z = NormalDist().inv_cdf(1 - UNUSUAL / len(ASPECTS))
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return float(np.exp(logs.mean() + t * logs.std(ddof=1) * math.sqrt(1 + 1 / count)))


def _array(value: Any, shape: tuple[int, ...]) -> Float64Array:
    """A float64 copy of a finite tensor of this shape. Raises ValueError for anything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        raise ValueError(f"it lacks a tensor of size {list(shape)}")
    array: Float64Array = value.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinite numbers")
    return array
