"""Distances of sets that pass by some pictures at a time, and what their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast.evaluation import wasserstein
from cyclegan_fast.evaluation.metrics import channel_mean_std, sliced_wasserstein
from cyclegan_fast.evaluation.wasserstein import PatchSet, influences, linear_bootstrap, set_distance


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (40, 36), mode="bilinear")
    return (255 * (0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator))).round().to(torch.uint8)


@pytest.mark.parametrize("statistics", ["own", "reference"])
def test_pictures_in_parts_have_the_distance_of_the_whole(statistics: str) -> None:
    first, second = pictures(7, 0), pictures(9, 1)
    sets = [PatchSet(x.split(part), len(x), 7 * 128) for x, part in ((first, 3), (second, 4))]
    value, *influence = set_distance(*sets, statistics=statistics)
    assert value == pytest.approx(sliced_wasserstein(first, second, statistics=statistics).mean, rel=1e-5)
    assert [len(each) for each in influence] == [7, 9]
    assert all(abs(each.mean()) < 1e-12 for each in influence)
    assert set_distance(sets[0], sets[0], statistics=statistics)[0] == 0


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(np.sort(first, axis=1) - np.sort(second, axis=1)).mean())


def test_influence_is_the_derivative_by_a_pictures_weight() -> None:
    """One of four pictures counts a little more, or less: by the distribution functions on a fine grid."""
    random = np.random.default_rng(0)
    rows = [random.standard_normal((1, 12)).astype(np.float32) + shift for shift in (0, 0.4)]
    of = np.arange(12) // 3
    found = influences(rows[0], rows[1], of, of)
    grid = np.linspace(-6, 6, 120_001)
    below = [np.array([(row[0, of == p][:, None] <= grid).mean(axis=0) for p in range(4)]) for row in rows]
    for which, picture in [(which, picture) for which in (0, 1) for picture in range(4)]:
        values = []
        for more in (1e-3, -1e-3):
            weights = [np.full(4, 0.25), np.full(4, 0.25)]
            weights[which] = (1 - more) * weights[which] + more * np.eye(4)[picture]
            first, second = (weight @ functions for weight, functions in zip(weights, below, strict=True))
            values.append(np.abs(first - second).sum() * (grid[1] - grid[0]))
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(found[which][picture], abs=2e-3)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.6, 1.0), (0.3, 1.4)])
def test_intervals_hold_the_expectation(shift: float, scale: float) -> None:
    """In at least 90 % of 150 draws; the percentile bootstrap, which repeats pictures, holds it in fewer of each."""
    random = np.random.default_rng(1)
    count, patches = 12, 8
    of = np.arange(count * patches) // patches

    def draw() -> tuple[np.ndarray, np.ndarray]:
        sets = []
        for s in (0, 1):
            centre = 0.7 * np.repeat(random.standard_normal((4, count)), patches, axis=1)
            sets.append((centre + random.standard_normal((4, count * patches))) * (scale if s else 1) + shift * s)
        return sets[0].astype(np.float32), sets[1].astype(np.float32)

    expected = np.mean([distance(*draw()) for _ in range(600)])
    sound, plain = [], []
    for _ in range(150):
        first, second = draw()
        interval = linear_bootstrap(distance(first, second), influences(first, second, of, of), resamples=300)
        sound.append(interval.low <= expected <= interval.high)
        again = []
        for _ in range(40):
            pair = []
            for rows in (first, second):
                chosen = random.integers(0, count, count)
                pair.append(rows.reshape(4, count, patches)[:, chosen].reshape(4, -1))
            again.append(distance(*pair))
        low, high = np.quantile(again, [0.025, 0.975])
        plain.append(low <= expected <= high)
    assert np.mean(sound) >= 0.9
    assert np.mean(plain) < np.mean(sound)


def test_the_references_contrast_is_in_its_influence() -> None:
    """A picture's weight changes the deviation, and so the scale of both sets: by a numerical derivative."""
    random = np.random.default_rng(4)
    count, each, channels = 5, 12, 3
    picture = np.arange(count * each) // each
    contrast = 1 + random.random((count, channels))[picture]
    patches = torch.from_numpy(random.standard_normal((count * each, channels, 7, 7)) * contrast[:, :, None, None])
    other = torch.from_numpy(1.5 * random.standard_normal(patches.shape) + 0.4)
    mean, std = channel_mean_std(patches)
    vectors = random.standard_normal((16, channels * 49)).astype(np.float32)

    def columns(x: Tensor, by: Tensor) -> np.ndarray:
        return ((x - mean) / by).flatten(1).T.contiguous().numpy().astype(np.float32)

    def value(by: Tensor) -> float:
        return distance(*(vectors @ columns(x, by) for x in (patches, other)))

    rows = [columns(x, std) for x in (patches, other)]
    found = wasserstein._of_contrast(rows[0], picture, channels) @ wasserstein._of_scales(vectors, rows, channels)
    assert found.mean() == pytest.approx(0, abs=1e-3 * np.abs(found).max())
    small = 1e-2
    for one in range(count):
        own = patches[picture == one]
        more = ((own - mean).square().mean(dim=(0, 2, 3), keepdim=True) - std.square()) * small
        changed = (value((std.square() + more).sqrt()) - value((std.square() - more).sqrt())) / (2 * small)
        assert found[one] == pytest.approx(changed, abs=0.03 * np.abs(found).max())
