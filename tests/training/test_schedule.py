"""The learning-rate rule against the published numbers."""

from __future__ import annotations

import pytest

from cyclegan_fast.config import Config
from cyclegan_fast.training.schedule import lr_factor, lr_scale


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(1, 2e-4), (100, 2e-4), (101, 1.9801980e-4), (150, 1.0099010e-4), (199, 3.9603960e-6), (200, 1.9801980e-6)],
)
def test_table_of_100_plus_100_epochs(epoch: int, lr: float) -> None:
    assert 2e-4 * lr_factor(epoch, 100, 100) == pytest.approx(lr, rel=1e-7)


def test_decay_is_linear_and_its_last_epoch_still_learns() -> None:
    factors = [lr_factor(epoch, 2, 4) for epoch in range(1, 8)]
    assert factors == pytest.approx([1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0])


def test_never_negative_after_the_end() -> None:
    assert lr_factor(500, 2, 4) == 0.0


def test_without_decay_it_is_constant() -> None:
    assert [lr_factor(epoch, 50, 0) for epoch in (1, 50, 51, 1000)] == [1.0] * 4


def test_decay_from_the_first_epoch() -> None:
    assert lr_factor(1, 0, 3) == pytest.approx(3 / 4)


@pytest.mark.parametrize("arguments", [(0, 100, 100), (-3, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_impossible_arguments_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="= "):
        lr_factor(*arguments)


def test_scaling_is_by_pairs_and_off_by_default() -> None:
    assert Config().training.lr_scaling == "none"
    assert [lr_scale("none", pairs) for pairs in (1, 8, 64)] == [1, 1, 1]
    assert [lr_scale("linear", pairs) for pairs in (1, 8, 64)] == [1, 8, 64]
    assert [lr_scale("sqrt", pairs) for pairs in (1, 4, 64)] == [1, 2, 8]
    with pytest.raises(ValueError, match="'cubic' is not known: one of none, linear, sqrt"):
        lr_scale("cubic", 2)
    with pytest.raises(ValueError, match="pairs = 0"):
        lr_scale("linear", 0)
