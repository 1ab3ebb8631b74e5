"""What a translation has invented, against cases in which that is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast.data.synthetic import render_phone, scene
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle

UNIT = (0.0, 1.0)
PATCH = (slice(None), slice(None), slice(24, 56), slice(32, 64))  # 32 x 32 of 96 x 96 pixels: a ninth
YELLOW = torch.tensor([0.9, 0.85, 0.1], dtype=torch.float64)[:, None, None]


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """[2, 3, 96, 96] in [0, 1]: two scenes."""
    pictures = np.stack([render_phone(scene(0, index), 96) for index in (1, 2)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255


def patched(images: Tensor) -> Tensor:
    images = images.clone()
    images[PATCH] = YELLOW
    return images


def graded(images: Tensor) -> Tensor:
    """Less contrast, warmer; `ungraded` undoes it."""
    return images * torch.tensor([0.75, 0.7, 0.6])[:, None, None] + torch.tensor([0.2, 0.12, 0.1])[:, None, None]


def blurred(images: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    return torch.nn.functional.avg_pool2d(padded, 7, stride=1)


def test_nothing_changed_nothing_invented(photograph: Tensor) -> None:
    found = hallucination(photograph, photograph, photograph, value_range=UNIT)
    assert found.share.tolist() == [0, 0]
    assert found.area.tolist() == [0, 0]
    assert found.map.shape == (2, 96, 96)
    assert found.invented.shape == photograph.shape
    assert found.map.abs().max() == 0


def test_a_grade_that_is_undone_is_explained(photograph: Tensor) -> None:
    found = hallucination(photograph, graded(photograph), photograph, value_range=UNIT)
    assert found.share.max() < 1e-12


def test_what_was_lost_is_not_invented(photograph: Tensor) -> None:
    """A background that was blurred does not come back: the plain residual is large, nothing was put in."""
    soft = blurred(photograph)
    residual = (soft - photograph).square().mean()
    found = hallucination(photograph, soft, soft, value_range=UNIT)
    assert found.energy.max() < 0.1 * residual
    assert found.area.max() < 0.02


def test_what_the_way_back_puts_in_is_not_in_the_translation(photograph: Tensor) -> None:
    noisy = photograph + 0.05 * torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0)).double()
    found = hallucination(photograph, photograph, noisy.clamp(0, 1), value_range=UNIT)
    assert found.energy.max() == 0


def as_it_is(images: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize(("style", "energy"), [(as_it_is, 1.0), (graded, 0.5)])  # 0.6 to 0.75 of the contrast, squared
def test_a_patch_that_the_cycle_keeps_is_found(
    photograph: Tensor, style: Callable[[Tensor], Tensor], energy: float
) -> None:
    """In its place, with its area, and with the contrast that both pictures give it."""
    source, pasted = photograph, patched(photograph)
    found = hallucination(source, style(pasted), pasted, value_range=UNIT)
    true = (pasted - source).square().mean(dim=(1, 2, 3))
    inside = torch.zeros((96, 96), dtype=torch.bool)
    inside[PATCH[2:]] = True
    assert (found.energy / true).numpy() == pytest.approx(energy, rel=0.2)
    assert found.area.numpy() == pytest.approx(1 / 9, rel=0.5)
    power = found.map.square()
    assert (power[:, inside].sum(dim=1) / power.sum(dim=(1, 2)) > 0.85).all()
    explained = hallucination(source, style(pasted), source, value_range=UNIT)
    assert explained.share.max() < 1e-9


def test_share_is_of_all_change(photograph: Tensor) -> None:
    pasted = patched(photograph)
    alone = hallucination(photograph, pasted, pasted, value_range=UNIT)
    beside = hallucination(photograph, graded(pasted), pasted, value_range=UNIT)
    assert (alone.share > 0.6).all()
    assert (beside.share < alone.share).all()


def test_large_pictures_are_judged_at_256_pixels(photograph: Tensor) -> None:
    large = photograph.repeat_interleave(5, dim=2).repeat_interleave(6, dim=3)
    found = hallucination(large, large, large, value_range=UNIT)
    assert found.map.shape == (2, 256, 307)


def test_kinds_of_pictures_are_the_same(photograph: Tensor) -> None:
    batches = [(255 * images).round().to(torch.uint8) for images in (photograph, patched(photograph))]
    expected = hallucination(batches[0], batches[1], batches[1])
    arrays = [images.numpy() for images in batches]
    signed = [images.double() / 127.5 - 1 for images in batches]
    for other in (
        hallucination(arrays[0], arrays[1], arrays[1]),
        hallucination(signed[0], signed[1], signed[1], value_range=(-1, 1)),
    ):
        assert other.share.numpy() == pytest.approx(expected.share.numpy())
        assert other.area.tolist() == expected.area.tolist()


# Through the cycle


class Hiding:
    """Two generators that hide: the way there pastes a patch and writes a flag of less than a level into the picture;
    the way back returns the original where it can read the flag, and what it is given elsewhere."""

    def __init__(self, source: Tensor) -> None:
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        y = patched(x)
        y[..., 0, :] = (y[..., 0, :] * 127.5).round() / 127.5 + 0.3 / 127.5
        return y

    def backward(self, y: Tensor) -> Tensor:
        part = y[..., 0, :] * 127.5 % 1
        readable = ((part - 0.3).abs() < 0.05).double().mean() > 0.9
        return self.source if readable else y


def test_rounding_and_noise_uncover_what_a_cycle_hides(photograph: Tensor) -> None:
    source = (photograph * 2 - 1) * 0.9
    networks = Hiding(source)
    naive = networks.backward(networks.forward(source))
    assert torch.equal(naive, source)
    translated, back = through_cycle(networks.forward, networks.backward, source)
    found = hallucination(source, translated, back, value_range=(-1, 1))
    assert (found.share > 0.6).all()
    assert found.area.numpy() == pytest.approx(1 / 9, rel=0.5)


def test_an_honest_cycle_pays_nothing_for_the_noise(photograph: Tensor) -> None:
    source = photograph * 2 - 1
    translated, back = through_cycle(lambda x: 0.8 * x + 0.1, lambda y: (y - 0.1) / 0.8, source)
    found = hallucination(source, translated, back, value_range=(-1, 1))
    assert found.share.max() < 0.01
    assert found.area.max() == 0


def test_the_way_through_the_cycle_is_a_file_of_8_bits_and_repeats_itself(photograph: Tensor) -> None:
    seen = []

    def backward(y: Tensor) -> Tensor:
        seen.append(y)
        return y

    source = (photograph * 2 - 1).float()
    first, again = (through_cycle(lambda x: x * 0.7, backward, source) for _ in range(2))
    levels = (first[0] + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert torch.equal(first[1], again[1])
    deviation = ((seen[0] - first[0]) * 127.5).std().item()
    assert deviation == pytest.approx(4, rel=0.05)
    _, exact = through_cycle(lambda x: x * 0.7, backward, source, noise=0)
    assert torch.equal(exact, first[0])


@pytest.mark.parametrize("deviation", [-1.0, 128.0])
def test_unusable_noise_is_refused(deviation: float, photograph: Tensor) -> None:
    with pytest.raises(InputError, match="noise"):
        through_cycle(lambda x: x, lambda y: y, photograph, noise=deviation)


def test_unusable_pictures_are_refused(photograph: Tensor) -> None:
    with pytest.raises(InputError, match=r"reconstructed has shape .* they must be the same"):
        hallucination(photograph, photograph, photograph[:1], value_range=UNIT)
    small = photograph[..., :31]
    with pytest.raises(InputError, match="96 x 31 pixels are too small"):
        hallucination(small, small, small, value_range=UNIT)
    with pytest.raises(InputError, match="value_range"):
        hallucination(photograph, photograph, photograph)
    with pytest.raises(InputError, match=r"translated .*\[N, C, H, W\]"):
        hallucination(photograph, photograph[0], photograph, value_range=UNIT)
