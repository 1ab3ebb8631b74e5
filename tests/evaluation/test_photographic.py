"""Photographic measures against pictures of known sharpness, noise, brightness and colour, and against scikit-image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cyclegan_fast.data.synthetic import in_focus, render_pair
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.photographic import (
    colour_histogram,
    colour_set_distance,
    depth_of_field,
    exposure,
    lab,
    noise,
    sharpness_map,
)

UNIT = {"value_range": (0.0, 1.0)}
CHECKS = (-1.0) ** (torch.arange(256).view(-1, 1) + torch.arange(256)).double()


def random_pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(*colour: float, side: int = 32) -> Tensor:
    return torch.tensor(colour, dtype=torch.float64).view(1, -1, 1, 1).expand(-1, -1, side, side)


def test_sharpness_of_checks() -> None:
    """Single pixels of +-a have a Laplacian of 8 a; at the border the repeated pixels take 2 a of it."""
    image = (0.5 + 10 / 255 * CHECKS)[None, None].expand(1, 3, -1, -1)
    found = sharpness_map(image, **UNIT)
    assert found.shape == (1, 16, 16)
    assert found[0, 1:-1, 1:-1].flatten().tolist() == pytest.approx([80.0] * 196)
    red = torch.full((1, 3, 256, 256), 0.5, dtype=torch.float64)
    red[:, 0] = image[0, 0]  # 0.299 of the luma of ITU-R BT.601
    assert float(sharpness_map(red, **UNIT)[0, 7, 7]) == pytest.approx(0.299 * 80)
    assert sharpness_map(flat(0.3, 0.5, 0.7), **UNIT).abs().max() < 1e-9
    assert sharpness_map(random_pictures(1, 1, 300, 451), **UNIT).shape == (1, 16, 24)


def test_separation_of_a_known_subject() -> None:
    subject = torch.zeros(1, 256, 256, dtype=torch.bool)
    subject[:, 48:208, 48:208] = True
    amplitude = torch.where(subject[0], 16.0, 4.0).double()
    image = (0.5 + amplitude / 255 * CHECKS)[None, None]
    found = depth_of_field(image, subject, **UNIT)
    assert [float(v) for v in (found.subject, found.background)] == pytest.approx([128, 32])
    assert float(found.separation) == pytest.approx(2)
    assert float(depth_of_field(image, **UNIT).separation) == pytest.approx(2, abs=0.15)  # borders lose a little
    nothing = depth_of_field(image, torch.zeros_like(subject), **UNIT)
    assert nothing.separation.isnan().all()
    assert float(depth_of_field(flat(0.5), **UNIT).separation) == 0.0


def test_real_photographs_are_told_apart(real_photos: Path) -> None:
    """The scores that came with them: 28 for phones, 3.9 for DSLRs, of the whole set, of which these are a sample."""
    for folder, expected in (("iphone2dslr_flower", (28, 3.9)), ("flowers", None)):
        background, separation = [], []
        for domain in "AB":
            files = sorted((real_photos / folder / f"test{domain}").iterdir())[:: 1 if expected else 4]
            assert files
            pictures = (np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)[None] for file in files)
            found = [depth_of_field(picture) for picture in pictures]
            background.append(np.median([float(f.background) for f in found]))
            separation.append(np.median([float(f.separation) for f in found]))
        assert separation[1] > separation[0] + 1
        assert background[0] > 4 * background[1]
        if expected:
            assert background == pytest.approx(expected, rel=0.12)


def test_true_subjects_of_rendered_flowers() -> None:
    gains = []
    for index in range(6):
        phone, reflex, _ = render_pair(3, index, 128)
        mask = torch.from_numpy(in_focus(3, index, 128))[None]
        assert 0.02 < float(mask.double().mean()) < 0.8
        both = [depth_of_field(p.transpose(2, 0, 1)[None], mask).separation for p in (phone, reflex)]
        gains.append(float(both[1] - both[0]))
    assert np.median(gains) > 1.5


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_noise_of_known_deviation(sigma: float) -> None:
    draws = torch.randn((2, 3, 256, 256), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = torch.linspace(0.3, 0.7, 256, dtype=torch.float64)
    image = slope + sigma / 255 * draws
    assert noise(image, **UNIT).tolist() == pytest.approx([sigma] * 2, rel=0.03)
    textured = image.clone()
    cells = random_pictures(1, 1, 86, 43).repeat_interleave(3, 2).repeat_interleave(3, 3)[..., :256, :128]
    textured[..., :128] += 0.25 * (cells - 0.5)
    assert noise(textured, **UNIT).tolist() == pytest.approx([sigma] * 2, rel=0.05)
    assert noise(textured, smoothest=1, **UNIT).min() > 1.1 * sigma  # texture counts there


def test_noise_without_evidence() -> None:
    assert noise(flat(0.0), **UNIT).isnan().all()
    assert float(noise(flat(0.5), **UNIT)) < 1e-9


def test_scikit_image_measures_the_same() -> None:
    restoration, color = pytest.importorskip("skimage.restoration"), pytest.importorskip("skimage.color")
    pytest.importorskip("pywt")
    image = random_pictures(2, 3, 61, 82)
    theirs = [255 * restoration.estimate_sigma(p.numpy(), channel_axis=0, average_sigmas=True) for p in image]
    assert noise(image, smoothest=1, **UNIT).tolist() == pytest.approx(theirs, rel=1e-9)
    expected = color.rgb2lab(image[0].numpy(), channel_axis=0)
    assert np.abs(lab(image, **UNIT)[0].numpy() - expected).max() < 1e-4  # their white has six digits


def test_exposure_of_known_pictures() -> None:
    gray = (0.18 ** (1 / 2.4)) * 1.055 - 0.055
    found = exposure(flat(gray, gray, gray), **UNIT)
    assert float(found.mean) == pytest.approx(49.496, abs=0.01)  # 116 * 0.18^(1/3) - 16
    image = flat(0.5, 0.5, 0.5).clone()
    image[..., :8, :] = 1.0
    image[..., 8:12, :] = 0.0
    image[:, 0, 12:16] = 1.0
    image[:, 1:, 12:16] = 0.0  # a saturated red is not clipped
    found = exposure(image, **UNIT)
    assert (float(found.shadows), float(found.highlights)) == (0.125, 0.25)


@pytest.mark.parametrize(("level", "counted"), [(5, "shadows"), (6, ""), (249, ""), (250, "highlights")])
def test_what_counts_as_clipped(level: int, counted: str) -> None:
    found = exposure(torch.full((1, 3, 32, 32), level, dtype=torch.uint8))
    assert {"shadows": float(found.shadows), "highlights": float(found.highlights)} == {
        "shadows": float(counted == "shadows"),
        "highlights": float(counted == "highlights"),
    }


def test_colour_distance_of_a_shift() -> None:
    """Gray to gray is a shift of lightness alone: the distance is its Delta E."""
    dark, light = flat(0.3, 0.3, 0.3), flat(0.6, 0.6, 0.6)
    expected = float((lab(light, **UNIT) - lab(dark, **UNIT))[0, 0, 0, 0])
    assert colours_apart(dark, light)[0] == pytest.approx(expected, rel=0.02)
    image = random_pictures(3, 3, 40, 33)
    assert colours_apart(image[:1], image[:1].flip(2))[0] == pytest.approx(0, abs=1e-9)
    assert colours_apart(image, image.flip(0))[0] == pytest.approx(0, abs=1e-9)
    both = torch.cat([dark, light])
    assert colours_apart(both, dark)[0] == pytest.approx(expected / 2, rel=0.02)


def test_influences_on_the_colour_distance_are_its_derivatives() -> None:
    """By the weights of a set's pictures, whose sum stays 1."""
    first, second = (random_pictures(4, 3, 40, 33, seed=seed) * scale for seed, scale in ((0, 1.0), (1, 0.7)))
    value, *influences = colours_apart(first, second)
    small = 1e-4
    histograms = [colour_histogram(pictures, **UNIT).numpy() for pictures in (first, second)]
    for which, influence in enumerate(influences):
        assert influence.mean() == pytest.approx(0, abs=1e-9)
        for picture in range(4):
            heavier = [h.copy() for h in histograms]
            mean = heavier[which].mean(axis=0)
            heavier[which] += small * (histograms[which][picture] - mean)  # of each: so much more of that picture
            changed = colour_set_distance(heavier[0], heavier[1])[0]
            assert (changed - value) / small == pytest.approx(influence[picture], abs=1e-3 * np.abs(influence).max())


def colours_apart(reference: Tensor, other: Tensor) -> tuple[float, Any, Any]:
    return colour_set_distance(*(colour_histogram(pictures, **UNIT).numpy() for pictures in (reference, other)))


@pytest.mark.parametrize("measure", [sharpness_map, noise, lab, lambda p, **r: exposure(p, **r).mean])
def test_kinds_and_layouts_mean_the_same(measure: Any) -> None:
    image = (random_pictures(2, 3, 48, 40) * 255).round().to(torch.uint8)
    expected = measure(image)
    assert expected.dtype == torch.float64
    for other, more in (
        (image.numpy(), {}),
        (image.contiguous(memory_format=torch.channels_last), {}),
        (image.double() / 255, UNIT),
        (image.float() / 127.5 - 1, {"value_range": (-1, 1)}),
    ):
        torch.testing.assert_close(measure(other, **more), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure", [sharpness_map, noise, lab, exposure, depth_of_field])
def test_wrong_pictures_are_refused(measure: Any) -> None:
    for pictures, words in (
        (torch.zeros(1, 2, 32, 32), "must have 1 channel or 3"),
        (torch.zeros(3, 32, 32), r"shape \[3, 32, 32\]"),
        ([1], "not a list"),
        (torch.full((1, 3, 32, 32), math.nan), "nan"),
    ):
        with pytest.raises(InputError, match=words):
            measure(pictures, **UNIT)


def test_wrong_settings_are_refused() -> None:
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(InputError, match="31 x 32 pixels are too small"):
        sharpness_map(image[:, :, 1:], **UNIT)
    with pytest.raises(InputError, match="smoothest = 0"):
        noise(image, smoothest=0, **UNIT)
    with pytest.raises(InputError, match="subject must be a bool tensor"):
        depth_of_field(image, torch.zeros(1, 32, 32), **UNIT)
    with pytest.raises(InputError, match=r"subject has shape \[1, 32, 31\]"):
        depth_of_field(image, torch.zeros(1, 32, 31, dtype=torch.bool), **UNIT)
