"""Hallucination in cycles whose inventions are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyclegan_fast.data.synthetic import render_pair
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle

UNIT = {"value_range": (0.0, 1.0)}
SIDE = 128
PLACE = slice(40, 64), slice(64, 96)  # 24 x 32 pixels
AREA = 24 * 32 / SIDE**2
TINT = torch.tensor([1.1, 0.9, 0.8], dtype=torch.float64).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def flowers() -> tuple[Tensor, Tensor]:
    pairs = [render_pair(3, index, SIDE)[:2] for index in range(3)]
    return tuple(torch.stack([torch.tensor(p[k]) for p in pairs]).permute(0, 3, 1, 2).double() / 255 for k in (0, 1))


def patched(picture: Tensor) -> Tensor:
    picture = picture.clone()
    picture[:, :, PLACE[0], PLACE[1]] = torch.tensor([0.9, 0.8, 0.1], dtype=picture.dtype).view(1, 3, 1, 1)
    return picture


def graded(picture: Tensor) -> Tensor:
    return (picture * TINT).clamp(0, 1) ** 1.3


def test_what_the_cycle_explains_is_none(flowers: tuple[Tensor, Tensor]) -> None:
    x, truth = flowers
    for y, r in ((x, x), (graded(x), x), (truth, x), (patched(truth), x), (truth, patched(x))):
        found = hallucination(x, y, r, **UNIT)
        assert found.share.max() < 0.002
        assert found.area.max() < 0.002


def test_a_kept_patch_is_found(flowers: tuple[Tensor, Tensor]) -> None:
    x, truth = flowers
    # Its energy is that of the change less that of the leaves under it, which are lost; a grade may hide some more.
    energy = (patched(x) - x).square().mean(dim=(1, 2, 3))
    for y, least in ((patched(x), 0.7), (graded(patched(x)), 0.33), (patched(truth), 0.33)):
        found = hallucination(x, y, patched(x), **UNIT)
        assert found.area.tolist() == pytest.approx([AREA] * 3, rel=0.4)
        assert (found.energy / energy).min() > least
        assert (found.energy / energy).max() < 1.05
        inside = found.map[:, PLACE[0], PLACE[1]].square().sum(dim=(1, 2))
        assert (inside / found.map.square().sum(dim=(1, 2))).min() > 0.85


def test_what_is_lost_is_not_invented(flowers: tuple[Tensor, Tensor]) -> None:
    x = flowers[0]
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2,) * 4, mode="reflect"), 5, 1)
    assert hallucination(x, soft, soft, **UNIT).share.max() < 0.05


def test_a_flat_patch_on_gray_is_found_whole() -> None:
    x = torch.full((1, 3, SIDE, SIDE), 0.5, dtype=torch.float64)
    found = hallucination(x, patched(x), patched(x), **UNIT)
    energy = float((patched(x) - x).square().mean())
    assert float(found.energy) == pytest.approx(energy, rel=0.1)
    assert float(found.area) == pytest.approx(AREA, rel=0.2)
    assert float(found.share) > 0.9


@pytest.mark.parametrize("hidden", [0.3, 1.0])
def test_a_hidden_message_does_not_hide_it(flowers: tuple[Tensor, Tensor], hidden: float) -> None:
    """G pastes a patch and writes checks of `hidden` levels; F takes the patch out where it can read them."""
    x = (flowers[0] * 255).round() / 127.5 - 1
    checks = (-1.0) ** (torch.arange(SIDE).view(-1, 1) + torch.arange(SIDE)).double()

    def forward(picture: Tensor) -> Tensor:
        return ((patched(picture).clamp(-0.9, 0.9) * 127.5).round() + hidden * checks) / 127.5

    def backward(picture: Tensor) -> Tensor:
        patch = picture[:, :, PLACE[0], PLACE[1]] * 127.5 - hidden * checks[PLACE[0], PLACE[1]]
        return x if float(patch.flatten(2).std(dim=2).max()) < 0.05 else picture

    whole = {"value_range": (-1.0, 1.0)}
    naive = hallucination(x, forward(x), backward(forward(x)), **whole)
    assert naive.area.max() == 0
    found = hallucination(x, *through_cycle(forward, backward, x), **whole)
    assert found.area.tolist() == pytest.approx([AREA] * 3, rel=0.4)


def test_the_cycle_is_repeatable_and_rounded() -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    y, r = through_cycle(lambda p: p / 2, lambda p: p, x)
    levels = (y + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert 127.5 * float((r - y).std()) == pytest.approx(4, rel=0.05)
    assert torch.equal(r, through_cycle(lambda p: p / 2, lambda p: p, x)[1])
    assert torch.equal(*through_cycle(lambda p: p, lambda p: p, x, noise=0))


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(InputError, match=r"translated has shape \[1, 1, 32, 32\] and source"):
        hallucination(x, x[:, :1], x, **UNIT)
    with pytest.raises(InputError, match="31 x 32 pixels are too small"):
        hallucination(*[x[:, :, 1:]] * 3, **UNIT)
    with pytest.raises(InputError, match="floating point"):
        hallucination(x, x, x)
    with pytest.raises(InputError, match="noise = -1"):
        through_cycle(lambda p: p, lambda p: p, x, noise=-1)
