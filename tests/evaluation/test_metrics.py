"""Metrics against answers known by hand, and against scikit-image and torchmetrics where they are installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation import metrics
from cyclegan_fast.evaluation.metrics import (
    MS_SSIM_WEIGHTS,
    ReferenceSet,
    bootstrap,
    checkerboard,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    sliced_wasserstein,
    ssim,
)

C1, C2 = 0.01**2, 0.03**2
UNIT = {"value_range": (0.0, 1.0)}
METRICS = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def pictures(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth in places, rough in others, float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand((count, channels, height, width), generator=generator, dtype=torch.float64)
    coarse = torch.rand((count, channels, 4, 4), generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return 0.6 * smooth + 0.4 * rough * torch.linspace(0, 1, width, dtype=torch.float64)


def flat(levels: Tensor, size: int = 16, channels: int = 1) -> Tensor:
    """One picture of a single colour for each level."""
    return levels.double().view(-1, 1, 1, 1).expand(-1, channels, size, size)


# PSNR


def test_psnr_of_known_errors() -> None:
    black = np.zeros((4, 3, 8, 8), np.uint8)
    off = black.copy()
    off[1] = 255
    off[2] = 1
    off[3, :, :, :4] = 51  # a fifth of the range in half of the pixels
    found = psnr(off, black)
    assert found.dtype == torch.float64
    assert found[0] == math.inf
    expected = [0.0, 20 * math.log10(255), 10 * math.log10(2 * 25)]
    assert found[1:].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_ranges_and_kinds_mean_the_same(metric: str) -> None:
    """The same picture as uint8, in [0, 1] and in [-1, 1], as tensor and as array, mirrored and read-only."""
    measure = METRICS[metric]
    first, second = pictures(2, 3, 180, 176, 0), pictures(2, 3, 180, 176, 1)
    x, y = ((picture * 255).round().to(torch.uint8) for picture in (first, 0.7 * first + 0.3 * second))
    expected = measure(x, y).tolist()
    assert 0.1 < expected[0] < 50
    assert measure(x.numpy(), y.numpy()).tolist() == expected
    unit = [picture.double() / 255 for picture in (x, y)]
    assert measure(*unit, value_range=(0, 1)).tolist() == pytest.approx(expected, rel=1e-12)
    signed = [(picture * 2 - 1).float() for picture in unit]
    assert measure(*signed, value_range=(-1, 1)).tolist() == pytest.approx(expected, rel=1e-6)
    mirrored = [np.ascontiguousarray(picture.numpy()[..., ::-1])[..., ::-1] for picture in (x, y)]
    mirrored[0].setflags(write=False)
    assert measure(*mirrored).tolist() == expected


# SSIM


def window() -> np.ndarray:
    """The 121 weights, written out from the formula."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    return np.array(weights) / np.sum(weights)


def by_hand(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(SSIM, contrast-structure term) of two gray pictures, place by place, from the definitions."""
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b, w = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11], window()
            mean_a, mean_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
            cov = (w * (a - mean_a) * (b - mean_b)).sum()
            contrast = (2 * cov + C2) / (var_a + var_b + C2)
            values.append(((2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1) * contrast, contrast))
    return tuple(np.mean(values, axis=0))


def test_ssim_of_known_pictures() -> None:
    x = pictures(3, 3, 16, 20)
    assert ssim(x, x, **UNIT).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    low, high = flat(torch.tensor([0.2], dtype=torch.float64)), flat(torch.tensor([0.7], dtype=torch.float64))
    luminance = (2 * 0.2 * 0.7 + C1) / (0.2**2 + 0.7**2 + C1)
    assert float(ssim(low, high, **UNIT)) == pytest.approx(luminance, abs=1e-12)


def test_ssim_is_its_definition() -> None:
    x, y = pictures(2, 2, 13, 15, 0), pictures(2, 2, 13, 15, 1)
    expected = [np.mean([by_hand(x[n, c].numpy(), y[n, c].numpy())[0] for c in (0, 1)]) for n in (0, 1)]
    assert ssim(x, y, **UNIT).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_orders_distortions_of_equal_psnr() -> None:
    """What SSIM is for: at one squared error, a shift of brightness is seen less than noise."""
    x = pictures(1, 1, 64, 64) * 0.8
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noisy = x + 0.1 * noise / noise.square().mean().sqrt()
    both = {"value_range": (-1, 2)}
    assert float(psnr(noisy, x, **both)) == pytest.approx(float(psnr(x + 0.1, x, **both)), abs=1e-9)
    assert float(ssim(x + 0.1, x, **both)) > float(ssim(noisy, x, **both)) + 0.02


# Multi-scale SSIM


def test_ms_ssim_of_known_pictures() -> None:
    x = pictures(2, 3, 176, 180)
    assert ms_ssim(x, x, **UNIT).tolist() == pytest.approx([1.0] * 2, abs=1e-12)
    # Flat pictures have contrast terms of 1, so that the luminance of the coarsest scale is left.
    luminance = (2 * 0.2 * 0.7 + C1) / (0.2**2 + 0.7**2 + C1)
    low, high = flat(torch.tensor([0.2], dtype=torch.float64), 176), flat(torch.tensor([0.7], dtype=torch.float64), 176)
    assert float(ms_ssim(low, high, **UNIT)) == pytest.approx(luminance**0.1333, abs=1e-10)
    weight = 0.3001 / (0.0448 + 0.2856 + 0.3001)
    assert float(ms_ssim(low, high, **UNIT, scales=3)) == pytest.approx(luminance**weight, abs=1e-10)


def test_ms_ssim_is_its_definition() -> None:
    x = pictures(1, 1, 23, 25, 0)
    y = 0.7 * x + 0.3 * pictures(1, 1, 23, 25, 1)
    halves = [p[0, 0, :22, :24].reshape(11, 2, 12, 2).mean((1, 3)).numpy() for p in (x, y)]
    weights = np.array(MS_SSIM_WEIGHTS[:2]) / sum(MS_SSIM_WEIGHTS[:2])
    fine, coarse = by_hand(x[0, 0].numpy(), y[0, 0].numpy())[1], by_hand(*halves)[0]
    assert float(ms_ssim(x, y, **UNIT, scales=2)) == pytest.approx(fine ** weights[0] * coarse ** weights[1], abs=1e-12)
    assert float(ms_ssim(x, y, **UNIT, scales=1)) == pytest.approx(float(ssim(x, y, **UNIT)), abs=1e-12)


def test_ms_ssim_of_a_negative_is_zero() -> None:
    x = torch.rand((1, 1, 24, 24), generator=torch.Generator().manual_seed(0))
    assert float(ms_ssim(x, 1 - x, **UNIT, scales=1)) == 0.0
    assert float(ssim(x, 1 - x, **UNIT)) < -0.5


def test_scales_that_fit() -> None:
    assert [ms_ssim_scales(side, 500) for side in (10, 11, 64, 128, 175, 176, 4000)] == [0, 1, 3, 4, 4, 5, 5]
    with pytest.raises(InputError, match=r"175 x 500 .* MS-SSIM of 5 scales: both sides must have 176"):
        ms_ssim(torch.zeros(1, 1, 175, 500), torch.zeros(1, 1, 175, 500), **UNIT)


# Against other libraries


def test_scikit_image_agrees() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pictures(2, 3, 40, 50, 0), pictures(2, 3, 40, 50, 1)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for n in (0, 1):
        pair = x[n].numpy(), y[n].numpy()
        theirs = metrics.structural_similarity(*pair, channel_axis=0, **wang)
        assert float(ssim(x, y, **UNIT)[n]) == pytest.approx(theirs, abs=1e-12)
        assert float(psnr(x, y, **UNIT)[n]) == pytest.approx(
            metrics.peak_signal_noise_ratio(*pair, data_range=1.0), abs=1e-10
        )


def test_torchmetrics_agrees() -> None:
    """Theirs lets the window overlap the reflected border, except in the contrast terms of its MS-SSIM."""
    theirs = pytest.importorskip("torchmetrics.functional.image")
    x = pictures(2, 3, 90, 100, 0)
    y = 0.5 * (x + pictures(2, 3, 90, 100, 1))
    found = theirs.peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert psnr(x, y, **UNIT).tolist() == pytest.approx(found.tolist(), abs=1e-5)  # float32 inside
    product = torch.ones(2, dtype=torch.float64)
    kind: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    for scale, weight in enumerate(MS_SSIM_WEIGHTS[:3]):
        _, places = theirs.structural_similarity_index_measure(x, y, **kind, return_full_image=True)
        whole = places[..., 5:-5, 5:-5].mean((1, 2, 3))
        _, contrast = theirs.structural_similarity_index_measure(x, y, **kind, return_contrast_sensitivity=True)
        if scale == 0:
            assert ssim(x, y, **UNIT).tolist() == pytest.approx(whole.tolist(), abs=1e-7)
            first = x, y
        product *= (whole if scale == 2 else contrast) ** (weight / sum(MS_SSIM_WEIGHTS[:3]))
        x, y = (torch.nn.functional.avg_pool2d(image, 2) for image in (x, y))
    assert ms_ssim(*first, **UNIT, scales=3).tolist() == pytest.approx(product.tolist(), abs=1e-7)


# Sliced Wasserstein distance


def mean_of_unit(dimensions: int) -> float:
    """E |u_1| of a random unit vector."""
    return math.exp(math.lgamma(dimensions / 2) - math.lgamma((dimensions + 1) / 2)) / math.sqrt(math.pi)


@pytest.mark.parametrize("statistics", ["own", "reference"])
def test_a_set_has_no_distance_from_itself(statistics: str) -> None:
    x = pictures(4, 3, 40, 33)
    found = sliced_wasserstein(x, x.clone(), **UNIT, statistics=statistics, directions=32)
    assert found.levels == {33: 0.0, 17: 0.0}
    assert found.mean == 0.0


def test_distance_of_flat_pictures_is_that_of_their_levels() -> None:
    """Uniform levels against two: W1 = 2 / sqrt(3) - 1 + sqrt(3) / 6 once both have deviation 1.

    A patch of one level projects on sum(u) times it, and |sum(u)| is 7 E |u_1| in 49 dimensions.
    """
    uniform = (torch.arange(400) + 0.5) / 400
    two = torch.tensor([0.3, 0.6]).repeat_interleave(200)
    expected = (2 / math.sqrt(3) - 1 + math.sqrt(3) / 6) * 7 * mean_of_unit(49)
    found = sliced_wasserstein(flat(uniform), flat(two), **UNIT, patches=1, directions=10_000)
    assert found.levels == {16: found.mean}
    assert found.mean == pytest.approx(expected, rel=0.025)  # |u_1| scatters by 75 %, over sqrt(10000): 0.75 %
    # At 32 pixels, the finer level of the pyramid is empty, and two empty sets are alike.
    found = sliced_wasserstein(flat(uniform, 32), flat(two, 32), **UNIT, patches=1, directions=10_000)
    assert found.levels[32] == 0.0
    assert found.levels[16] == pytest.approx(expected, rel=0.025)
    assert found.mean == pytest.approx(found.levels[16] / 2)


def test_a_shift_and_a_contrast_show_only_against_the_reference() -> None:
    """Noise of deviation 0.1: a shift of 0.05 moves the projections by 0.5 |sum(u)|, half the contrast halves them."""
    noise = 0.1 * torch.randn((100, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings: dict[str, Any] = {"value_range": (-2, 2), "patches": 8, "directions": 2000}
    for other, expected in ((noise + 0.05, 0.5 * math.sqrt(147) * mean_of_unit(147)), (noise / 2, 0.5 * 0.7979)):
        assert sliced_wasserstein(noise, other, **settings).mean == pytest.approx(0, abs=1e-5)
        found = sliced_wasserstein(noise, other, **settings, statistics="reference").mean
        assert found == pytest.approx(expected, rel=0.05)


def test_each_level_sees_its_own_detail() -> None:
    """A checkerboard of single pixels is in the finest level alone: the binomial filter removes it to rounding."""
    x = pictures(6, 1, 64, 64) * 0.8 + 0.1
    checkerboard = 0.1 * (-1.0) ** (torch.arange(64).view(-1, 1) + torch.arange(64))
    found = sliced_wasserstein(x, x + checkerboard, **UNIT, statistics="reference", directions=64)
    assert found.levels[64] > 0.1
    assert found.levels[32] == pytest.approx(0, abs=1e-5)
    assert found.levels[16] == pytest.approx(0, abs=1e-5)
    # And a slow change of brightness in the coarsest: what all levels add up to is the picture.
    slope = torch.linspace(-0.1, 0.1, 64, dtype=torch.float64).expand(64, 64)
    found = sliced_wasserstein(x, x + slope, **UNIT, statistics="reference", directions=64)
    assert found.levels[16] > 10 * found.levels[32] > 100 * found.levels[64]


def test_sets_of_different_size() -> None:
    levels = torch.rand(20, generator=torch.Generator().manual_seed(0))
    twice = flat(levels.repeat_interleave(2))
    assert sliced_wasserstein(flat(levels), twice, **UNIT, patches=2).mean == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(twice, flat(levels), **UNIT, patches=2).mean == pytest.approx(0, abs=1e-6)


def test_seeds_repeat_and_matter() -> None:
    x, y = pictures(4, 3, 32, 32, 0), pictures(4, 3, 32, 32, 1)
    first, again, other = (sliced_wasserstein(x, y, **UNIT, directions=16, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean
    assert first.mean == pytest.approx(other.mean, rel=0.3)


@pytest.mark.parametrize("statistics", ["own", "reference"])
@pytest.mark.parametrize("count", [3, 6])
def test_a_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch, statistics: str, count: int) -> None:
    """The same distances to the bit, from larger and from smaller sets, and of the reference nothing again."""
    x, y = pictures(4, 3, 40, 33, 0), pictures(count, 3, 40, 33, 1)
    settings: dict[str, Any] = {"statistics": statistics, "patches": 5, "directions": 16, "seed": 3}
    reference = ReferenceSet(x, count, **UNIT, **settings)
    seen: list[int] = []
    real = metrics.laplacian_pyramid
    monkeypatch.setattr(
        metrics, "laplacian_pyramid", lambda images, smallest: (seen.append(len(images)), real(images, smallest))[1]
    )
    found = [reference.distance(other, **UNIT) for other in (y, 1 - y)]
    assert seen == [count, count]
    assert found == [sliced_wasserstein(x, other, **UNIT, **settings) for other in (y, 1 - y)]
    assert found[0] != found[1]
    with pytest.raises(
        InputError, match=rf"other has shape \[2, 3, 40, 33\], but \[{count}, 3, 40, 33\] was announced"
    ):
        reference.distance(y[:2], **UNIT)
    with pytest.raises(InputError, match="count = 0"):
        ReferenceSet(x, 0, **UNIT)


# Bootstrap


def test_bootstrap_of_known_cases() -> None:
    values = torch.tensor([0.0, 1.0]).repeat(200)
    found = bootstrap(values)
    assert found.value == 0.5
    half = 1.96 * math.sqrt(0.25 / 400)  # the normal interval of a mean of 400 coins
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.1 * half)
    assert bootstrap(values) == found
    assert bootstrap(values, seed=1, resamples=50) != bootstrap(values, seed=0, resamples=50)
    assert bootstrap([3.0, 3.0, 3.0]).high == 3.0
    wide, narrow = bootstrap(values, level=0.99), bootstrap(values, level=0.5)
    assert wide.high - wide.low > found.high - found.low > narrow.high - narrow.low
    odd = np.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert bootstrap(odd, statistic=np.median).value == 3.0
    assert str(bootstrap([1.0, 1.0])) == "1 (1 to 1)"


def test_bootstrap_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [bootstrap(random.exponential(size=50), resamples=400, seed=seed) for seed in range(300)]
    covered = sum(interval.low <= 1.0 <= interval.high for interval in intervals) / 300
    assert 0.88 <= covered <= 0.98  # 95 %, less what percentiles lose on 50 skewed values; 3 deviations are 4 %


# Wrong input


GOOD = torch.zeros(2, 3, 32, 32)


@pytest.mark.parametrize("metric", [psnr, ssim, sliced_wasserstein])
@pytest.mark.parametrize(
    ("first", "second", "value_range", "words"),
    [
        (GOOD, GOOD, None, r"floating point: say what its numbers mean, value_range=\(-1, 1\) or \(0, 1\)"),
        (GOOD.to(torch.uint8), GOOD.to(torch.uint8), (0, 255), "is uint8, which is 0 to 255: leave out"),
        (GOOD + 3, GOOD, (0, 1), r"has values from 3 to 3, outside value_range = \(0, 1\)"),
        (GOOD * math.nan, GOOD, (0, 1), "nan"),
        (GOOD, GOOD, (1, 0), r"value_range = \(1, 0\) is not allowed"),
        (GOOD, GOOD, 1.0, r"value_range = 1.0 is not allowed: two numbers, the lower first"),
        (GOOD.int(), GOOD, (0, 1), "has dtype torch.int32: it must be uint8 or floating point"),
        (GOOD[0], GOOD, (0, 1), r"has shape \[3, 32, 32\]: pictures must be \[N, C, H, W\]"),
        (GOOD[:0], GOOD, (0, 1), r"has shape \[0, 3, 32, 32\]"),
        (GOOD[:, :1], GOOD, (0, 1), r"\[.*1, 32, 32\].*\[.*3, 32, 32\]"),
        ([GOOD], GOOD, (0, 1), "not a list"),
        (GOOD.numpy().astype(object), GOOD, (0, 1), "has dtype object"),
    ],
)
def test_wrong_pictures_are_refused(metric: Any, first: Any, second: Any, value_range: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        metric(first, second, value_range=value_range)


def test_wrong_settings_are_refused() -> None:
    for settings, words in (
        ({"statistics": "both"}, "statistics = 'both' is not one of own, reference"),
        ({"patches": 0}, "patches = 0"),
        ({"directions": 0}, "directions = 0"),
        ({"smallest": 6}, "smallest = 6 is not allowed: an integer >= 7"),
        ({"smallest": 33}, "32 x 32 pixels are too small: both sides must have 33"),
    ):
        with pytest.raises(InputError, match=words):
            sliced_wasserstein(GOOD, GOOD, value_range=(0, 1), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="10 x 32 pixels are too small for SSIM: both sides must have 11"):
        ssim(GOOD[:, :, :10], GOOD[:, :, :10], value_range=(0, 1))
    with pytest.raises(InputError, match="scales = 6"):
        ms_ssim(GOOD, GOOD, value_range=(0, 1), scales=6)
    for values, more, words in (
        ([1.0], {}, r"shape \[1\]: a bootstrap needs at least two"),
        ([[1.0, 2.0]], {}, r"shape \[1, 2\]"),
        ([1.0, math.inf], {}, "NaN or infinite"),
        ([1.0, 2.0], {"level": 95}, "level = 95"),
        ([1.0, 2.0], {"resamples": 0}, "resamples = 0"),
    ):
        with pytest.raises(InputError, match=words):
            bootstrap(values, **more)  # type: ignore[arg-type]


# Checkerboards


def tiled(tile: Tensor, height: int = 64, width: int = 48) -> Tensor:
    """The tile [h, w] repeated over a picture [1, 1, height, width] of mean 1/2."""
    h, w = tile.shape
    return 0.5 + tile.double().repeat(height // h, width // w)[None, None]


CHECKS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (0.1 * CHECKS, (0.01, 0)),
        (0.1 * torch.tensor([[1.0, -1.0]]).double(), (0.01, 0)),  # upright stripes
        (0.1 * torch.tensor([[1.0], [-1.0]]).double(), (0.01, 0)),
        (
            0.2 * torch.tensor([[1.0, 0.0, -1.0, 0.0]]).double(),
            (0, 0.02),
        ),  # a cosine of period 4: half the squared amplitude
        (0.1 * CHECKS.repeat_interleave(2, 0).repeat_interleave(2, 1), (0, 0.01)),
        (0.1 * torch.tensor([[3.0, -1.0, -1.0, -1.0]]).double(), (0.01, 0.02)),  # 1, -1, 1, -1 and 2, 0, -2, 0
    ],
)
def test_patterns_of_known_energy(tile: Tensor, expected: tuple[float, float]) -> None:
    found = checkerboard(tiled(tile), **UNIT)
    assert found.energy[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_any_pattern_is_parted_into_its_two_periods() -> None:
    """What 2 x 2 blocks have in common is of period 2, the rest of period 4, and nothing is lost."""
    tile = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 20
    tile -= tile.mean()
    common = tile.view(2, 2, 2, 2).mean(dim=(0, 2))
    whole, short = float(tile.square().mean()), float(common.square().mean())
    found = checkerboard(tiled(tile), **UNIT).energy[0]
    assert found.tolist() == pytest.approx([short, whole - short], abs=1e-12)


def test_a_checkerboard_in_a_picture() -> None:
    """5 levels of 255 in a rough picture are found to 5 %, and none is where none was added."""
    images = pictures(64, 3, 64, 64, seed=1)
    images = images * 0.8 + 0.1
    before = checkerboard(images, **UNIT)
    after = checkerboard(images + tiled(5 / 255 * CHECKS, 64, 64) - 0.5, **UNIT)
    assert before.energy.mean(dim=0).abs().max() < 0.02 * (5 / 255) ** 2
    assert float(after.energy[:, 0].mean().sqrt()) * 255 == pytest.approx(5, rel=0.05)
    torch.testing.assert_close(after.energy[:, 1], before.energy[:, 1])
    assert before.contrast.mean(dim=0).tolist() == pytest.approx([1, 1], abs=0.25)
    assert after.contrast[:, 0].min() > 20


def test_white_noise_has_none() -> None:
    noise = 0.5 + 0.1 * torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(2)).clamp(-4, 4)
    found = checkerboard(noise, **UNIT)
    level = 0.01 * (1.5 / 32) ** 2  # of each line: the variance and the window's noise bandwidth
    assert (found.energy.mean(dim=0) / (level * torch.tensor([3, 12]))).abs().max() < 0.15
    assert found.contrast.mean(dim=0).tolist() == pytest.approx([1, 1], abs=0.15)


def test_a_smooth_picture_has_none() -> None:
    y, x = torch.meshgrid(
        torch.linspace(0, 1, 66, dtype=torch.float64), torch.linspace(0, 2, 97).double(), indexing="ij"
    )
    smooth = (torch.exp(-3 * ((x - 0.7) ** 2 + (y - 0.4) ** 2)) * 0.8 + 0.1 * x)[None, None]
    found = checkerboard(smooth, **UNIT)
    assert found.energy.abs().max() < (0.02 / 255) ** 2
    assert found.contrast[0].tolist() == pytest.approx([1, 1], abs=0.1)


def test_transposed_convolutions_draw_them_and_resizing_ones_do_not() -> None:
    """Two doublings with random weights, of smooth maps, as a generator begins with."""
    maps = torch.nn.functional.interpolate(pictures(4, 8, 4, 4, seed=3), (16, 16), mode="bicubic")
    kernels = [torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(k)).double() / 6 for k in (4, 5)]
    contrast = {}
    for kind in ("transposed", "resize"):
        x = maps
        for kernel in kernels:
            if kind == "resize":
                x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1,) * 4, mode="reflect"), kernel)
            else:
                x = torch.nn.functional.conv_transpose2d(x, kernel, None, 2, 1, 1)
        x = (x - x.min()) / (x.max() - x.min())
        contrast[kind] = checkerboard(x, **UNIT).contrast.mean(dim=0)
    assert (contrast["transposed"] > 100).all()
    assert (contrast["transposed"] > 10 * contrast["resize"]).all()


def test_pictures_too_small_for_a_spectrum_are_refused() -> None:
    with pytest.raises(InputError, match="31 x 64 pixels are too small for a spectrum: both sides must have 32"):
        checkerboard(torch.zeros(1, 3, 31, 64), **UNIT)
