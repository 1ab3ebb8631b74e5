"""Returning to full size with the picture's own detail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.data.synthetic import render_pair
from cyclegan_fast.inference import upsample
from cyclegan_fast.inference.upsample import enlarge, shrink, small_size


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]


def in_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize(
    ("size", "short_side", "wanted"),
    [
        ((3024, 4032), 256, (256, 341)), ((4032, 3024), 256, (341, 256)), ((100, 80), 80, (100, 80)),
        ((100, 80), 300, (100, 80)), ((8, 4000), 8, (8, 4000)), ((1000, 1001), 10, (10, 10)),
    ],
)  # fmt: skip
def test_sizes(size: tuple[int, int], short_side: int, wanted: tuple[int, int]) -> None:
    assert small_size(*size, short_side) == wanted


def test_shrinking_in_bands_is_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.randint(0, 256, (2, 3, 61, 47), dtype=torch.uint8)
    whole = F.interpolate(in_range(picture), (20, 15), mode="bicubic", antialias=True).clamp(-1, 1)
    for at_once in (1, 3000, 10**9):
        monkeypatch.setattr(upsample, "_AT_ONCE", at_once)
        torch.testing.assert_close(shrink(picture, (20, 15)), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 3), (1, 3), (3, 1), (4, 2)])
def test_a_change_of_colour_comes_back_at_full_size(inputs: int, outputs: int) -> None:
    """A linear map of the colours is what the fit is made of: nothing but the ridge stands in its way."""
    torch.manual_seed(0)
    picture = torch.rand(1, inputs, 64, 80) * 2 - 1
    mix = torch.randn(outputs, inputs) * 0.3

    def recoloured(x: Tensor) -> Tensor:
        return torch.einsum("kc,nchw->nkhw", mix, x) * 0.5 + 0.1

    small = shrink(picture, (16, 20))
    result = enlarge(recoloured(small), small, picture, eps=1e-6)
    inside = (..., slice(12, -12), slice(12, -12))  # windows at the border hold fewer pixels than the fit needs
    torch.testing.assert_close(result[inside], recoloured(picture)[inside], rtol=0, atol=1e-3)


def test_detail_comes_from_the_picture_only_where_the_translation_has_it() -> None:
    """An edge that the translation keeps is sharp again; texture that it smooths away stays away."""
    torch.manual_seed(0)
    picture = torch.full((1, 3, 96, 96), -0.5)
    picture[:, :, :, 49:] = 0.5
    texture = (torch.rand(1, 1, 24, 40) - 0.5).repeat_interleave(4, 2)
    picture[:, :, :, 55:95] += texture
    wanted = torch.full_like(picture, -0.5)
    wanted[:, :, :, 49:] = 0.5
    small, translated = shrink(picture, (24, 24)), shrink(wanted, (24, 24))
    result = enlarge(translated, small, picture)
    bicubic = F.interpolate(translated, (96, 96), mode="bicubic")
    edge = slice(44, 54)
    assert (result - wanted)[..., edge].abs().mean() < 0.5 * (bicubic - wanted)[..., edge].abs().mean()
    inside = slice(62, 90)
    assert (result - wanted)[..., inside].abs().mean() < 0.3 * (picture - wanted)[..., inside].abs().mean()


def test_better_than_enlarging_the_translation_by_the_truth_of_synthetic_flowers() -> None:
    gains = []
    for index in range(3):
        phone, dslr, _ = render_pair(5, index, 256)
        picture, truth = as_tensor(phone), in_range(as_tensor(dslr))
        size = (48, 48)
        small, ideal = shrink(picture, size), shrink(truth, size)  # what a perfect network would make
        bicubic = F.interpolate(ideal, truth.shape[2:], mode="bicubic").clamp(-1, 1)
        gains.append(psnr(enlarge(ideal, small, picture), truth) - psnr(bicubic, truth))
    assert sum(gains) / 3 > 1, gains  # dB


def test_bands_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (1, 3, 50, 37), dtype=torch.uint8)
    small = shrink(picture, (12, 9))
    translated = small.flip(1) * 0.7
    whole = enlarge(translated, small, picture)
    monkeypatch.setattr(upsample, "_AT_ONCE", 1)
    torch.testing.assert_close(enlarge(translated, small, picture), whole, rtol=0, atol=1e-6)
    assert whole.abs().max() <= 1


def test_what_does_not_belong_together_is_refused() -> None:
    small, picture = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="do not belong together"):
        enlarge(torch.zeros(1, 3, 8, 9), small, picture)
    with pytest.raises(ValueError, match="do not belong together"):
        enlarge(small, small, picture[:, :1])
