"""Photographic measures against answers known by hand, synthetic scenes with their depth, and scikit-image."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cyclegan_fast.data.synthetic import render_pair, scene
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.photographic import (
    colour_distance,
    colour_histogram,
    colour_set_distance,
    depth_of_field,
    exposure,
    histogram_distance,
    lab,
    noise,
    sharpness_map,
)

UNIT = (0.0, 1.0)


def chequered(amplitude: Tensor, size: int = 96) -> Tensor:
    """[1, 1, S, S] around 1/2, alternating from pixel to pixel by an amplitude [S, S]: a Laplacian of 8 of them."""
    sign = 1 - 2 * ((torch.arange(size)[:, None] + torch.arange(size)) % 2).double()
    return (0.5 + sign * amplitude)[None, None]


def middle(inside: float, outside: float) -> Tensor:
    """An amplitude for 6 x 6 blocks of the middle, another around them."""
    amplitude = torch.full((96, 96), outside, dtype=torch.float64)
    amplitude[30:66, 30:66] = inside
    return amplitude


def coloured(*colours: tuple[int, int, int], size: int = 8) -> np.ndarray:
    """A flat uint8 picture of each colour."""
    return np.tile(np.array(colours, np.uint8)[:, :, None, None], (1, 1, size, size))


# Sharpness


def test_sharpness_of_a_pattern_is_its_laplacian() -> None:
    found = sharpness_map(chequered(torch.tensor(0.01, dtype=torch.float64)), value_range=UNIT)
    assert found.shape == (1, 16, 16)
    assert found[0, 1:-1, 1:-1].numpy() == pytest.approx(8 * 0.01 * 255, rel=1e-9)


def test_stripes_have_half_of_it_and_a_ramp_has_none() -> None:
    stripes = (0.5 + 0.01 * (1 - 2 * (torch.arange(64) % 2).double())).expand(1, 1, 64, 64)
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    assert sharpness_map(stripes, value_range=UNIT)[0, :, 1:-1].numpy() == pytest.approx(4 * 0.01 * 255)
    assert sharpness_map(ramp, value_range=UNIT)[0, :, 1:-1].abs().max() < 1e-9


def test_sharpness_is_that_of_the_luma() -> None:
    gray = chequered(torch.full((64, 64), 0.02), 64)
    green = torch.cat([torch.full_like(gray, 0.5), gray, torch.full_like(gray, 0.5)], dim=1)
    whole, part = (sharpness_map(x, value_range=UNIT)[0, 1:-1, 1:-1] for x in (gray, green))
    assert (part / whole).numpy() == pytest.approx(0.587)


@pytest.mark.parametrize(("size", "blocks"), [((64, 96), (16, 24)), ((300, 201), (24, 16)), ((512, 512), (16, 16))])
def test_sharpness_has_16_blocks_along_the_short_side(size: tuple[int, int], blocks: tuple[int, int]) -> None:
    assert sharpness_map(np.zeros((2, 3, *size), np.uint8)).shape == (2, *blocks)


def test_large_pictures_are_judged_at_a_short_side_of_256() -> None:
    """A pattern of single pixels is lost on the way to a quarter of the size."""
    fine = chequered(torch.full((1024, 1024), 0.1), 1024)
    assert sharpness_map(fine, value_range=UNIT)[0, 1:-1, 1:-1].max() < 0.1


def test_separation_is_the_ratio_in_octaves() -> None:
    images = chequered(middle(0.04, 0.01))
    mask = torch.zeros((1, 96, 96), dtype=torch.bool)
    mask[:, 30:66, 30:66] = True
    by_mask, by_rule = depth_of_field(images, mask, value_range=UNIT), depth_of_field(images, value_range=UNIT)
    for found in (by_mask, by_rule):
        assert found.subject.item() == pytest.approx(8 * 0.04 * 255, rel=0.02)  # less along its edge
        assert found.background.item() == pytest.approx(8 * 0.01 * 255, rel=0.01)
        assert found.separation.item() == pytest.approx(2, abs=0.03)


def test_flat_pictures_have_no_separation_and_absent_subjects_none_that_is_a_number() -> None:
    flat = np.full((1, 1, 64, 64), 77, np.uint8)
    assert depth_of_field(flat).separation.item() == 0
    assert math.isnan(depth_of_field(flat, torch.zeros((1, 64, 64), dtype=torch.bool)).separation.item())


def test_a_dslr_separates_the_flower_that_is_in_focus() -> None:
    gains, by_rule = [], []
    for index in range(6):
        phone, dslr, depth = render_pair(0, index, 96)
        focus = scene(0, index).focus
        mask = torch.from_numpy(np.abs(depth - focus) < 0.15 * focus)[None].expand(2, -1, -1)
        images = np.stack([phone, dslr]).transpose(0, 3, 1, 2)
        found = depth_of_field(images, mask).separation
        gains.append(float(found[1] - found[0]))
        found = depth_of_field(images).separation
        by_rule.append(float(found[1] - found[0]))
    assert min(gains) > 0
    assert np.mean(gains) > 0.5
    assert np.mean(by_rule) > 0.5


@pytest.mark.parametrize(("domain", "score"), [("A", 28), ("B", 3.9)])
def test_background_of_real_photographs(real_photos: Path, domain: str, score: float) -> None:
    """The median over the set is the score of depth of field that the data set was described by."""
    files = sorted((real_photos / "iphone2dslr_flower" / f"train{domain}").iterdir())
    found = [
        depth_of_field(np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)[None].copy()) for file in files
    ]
    assert np.median([float(one.background) for one in found]) == pytest.approx(score, rel=0.1)


# Noise


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_noise_of_known_deviation(sigma: float) -> None:
    random = np.random.default_rng(0)
    ramp = np.linspace(80, 170, 256)[None, None, None, :]
    images = (ramp + sigma * random.standard_normal((2, 3, 256, 256))).clip(0, 255) / 255
    assert noise(images, value_range=UNIT).numpy() == pytest.approx(sigma, rel=0.06)


def test_noise_is_looked_for_where_nothing_else_is() -> None:
    random = np.random.default_rng(0)
    images = 128 + 3 * random.standard_normal((1, 1, 256, 256))
    images[..., :128] += 40 * random.choice([-1, 1], (1, 1, 64, 32)).repeat(4, axis=2).repeat(4, axis=3)
    images[..., 200:] = 255  # clipped
    images = images.clip(0, 255) / 255
    assert noise(images, value_range=UNIT).item() == pytest.approx(3, rel=0.1)


def test_noise_of_flat_and_of_clipped_pictures() -> None:
    assert noise(np.full((1, 3, 64, 64), 100, np.uint8)).item() < 1e-12
    assert noise(np.zeros((1, 3, 64, 64), np.uint8)).isnan().all()


def test_noise_of_the_whole_is_that_of_scikit_image() -> None:
    restoration = pytest.importorskip("skimage.restoration")
    pytest.importorskip("pywt")
    images = np.random.default_rng(1).random((2, 3, 65, 90))
    expected = [255 * restoration.estimate_sigma(image, channel_axis=0, average_sigmas=True) for image in images]
    assert noise(images, smoothest=1, value_range=UNIT).tolist() == pytest.approx(expected, rel=1e-9)


# Exposure


def test_exposure_of_known_grays() -> None:
    found = exposure(coloured((0, 0, 0), (255, 255, 255), (119, 119, 119)))
    assert found.mean.tolist() == pytest.approx([0, 100, 50.03], abs=0.01)  # level 119 is 18.4 % of the light
    assert found.shadows.tolist() == [1, 0, 0]
    assert found.highlights.tolist() == [0, 1, 0]


def test_a_saturated_colour_is_not_clipped_and_the_limits_belong_to_it() -> None:
    found = exposure(coloured((255, 0, 0), (5, 5, 5), (6, 5, 5), (250, 250, 250), (250, 249, 250)))
    assert found.shadows.tolist() == [0, 1, 0, 0, 0]
    assert found.highlights.tolist() == [0, 0, 0, 1, 0]


# Colour


def test_lab_is_that_of_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    images = np.random.default_rng(0).random((2, 3, 9, 11))
    images[0, :, 0, 0], images[0, :, 0, 1] = 0, 1
    expected = color.rgb2lab(images, channel_axis=1)
    assert lab(images, value_range=UNIT).numpy() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("other", [(140, 110, 100), (100, 112, 130), (128, 128, 128), (90, 100, 80)])
def test_colour_distance_of_flat_pictures_is_that_of_their_colours(other: tuple[int, int, int]) -> None:
    first, second = coloured((110, 110, 110)), coloured(other)
    apart = float((lab(first)[0, :, 0, 0] - lab(second)[0, :, 0, 0]).norm())
    assert colour_distance(first, second).item() == pytest.approx(apart, rel=0.02)
    assert colour_set_distance(first, second) == pytest.approx(apart, rel=0.02)


def test_colour_distance_sees_colours_and_not_places() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 24, 24), dtype=np.uint8)
    moved = images[:, :, ::-1, :].transpose(0, 1, 3, 2)
    one = images[:1]
    assert colour_distance(one, one).item() == 0
    assert colour_distance(one, moved[:1]).item() == pytest.approx(0, abs=1e-9)
    assert colour_set_distance(images, moved) == pytest.approx(0, abs=1e-9)
    assert colour_distance(one, 255 - one).item() > 0.1


def test_a_reference_is_the_mean_of_its_pictures() -> None:
    pair = coloured((50, 50, 50), (200, 200, 200))
    histograms = colour_histogram(pair)
    assert histograms.shape == (2, 48, 301)
    assert histograms[..., -1].numpy() == pytest.approx(1)
    half = histogram_distance(histograms, histograms.mean(dim=0))
    whole = histogram_distance(histograms[0], histograms[1])
    assert half.tolist() == pytest.approx([float(whole) / 2] * 2)
    assert colour_distance(pair, pair).tolist() == pytest.approx(half.tolist())
    assert colour_set_distance(pair, pair) == 0


# All of them

MEASURES = {
    "sharpness": lambda images, **options: sharpness_map(images, **options).flatten(1).mean(dim=1),
    "separation": lambda images, **options: depth_of_field(images, **options).separation,
    "noise": noise,
    "exposure": lambda images, **options: exposure(images, **options).mean,
    "colour": lambda images, **options: colour_distance(images, images, **options),
}


@pytest.mark.parametrize("name", MEASURES)
def test_kinds_and_layouts_of_pictures_are_the_same(name: str) -> None:
    images = np.random.default_rng(0).integers(20, 230, (3, 3, 40, 52), dtype=np.uint8)
    expected = MEASURES[name](images)
    tensor = torch.from_numpy(images)
    unit, signed = tensor.double() / 255, tensor.double() / 127.5 - 1
    assert expected.dtype == torch.float64
    assert expected.shape == (3,)
    for other in (
        MEASURES[name](tensor.to(memory_format=torch.channels_last)),
        MEASURES[name](unit, value_range=UNIT),
        MEASURES[name](signed, value_range=(-1, 1)),
    ):
        assert other.numpy() == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_unusable_pictures_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="1 channel or 3"):
        MEASURES[name](np.zeros((1, 4, 64, 64), np.uint8))
    with pytest.raises(InputError, match=r"\[N, C, H, W\]"):
        MEASURES[name](np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(InputError, match="value_range"):
        MEASURES[name](np.zeros((1, 3, 64, 64)))


@pytest.mark.parametrize("name", ["sharpness", "separation", "noise"])
def test_small_pictures_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="31 x 64 pixels are too small"):
        MEASURES[name](np.zeros((1, 3, 31, 64), np.uint8))


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (torch.zeros((1, 64, 64)), "bool tensor"),
        (np.zeros((1, 64, 64), bool), "bool tensor"),
        (torch.zeros((1, 64, 65), dtype=torch.bool), r"must be \[1, 64, 64\]"),
    ],
)
def test_unusable_subjects_are_refused(subject: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        depth_of_field(np.zeros((1, 3, 64, 64), np.uint8), subject)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_unusable_shares_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="smoothest"):
        noise(np.zeros((1, 3, 64, 64), np.uint8), smoothest=share)
