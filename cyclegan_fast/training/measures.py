"""What is measured of the fixed test pictures while a run goes on.

    test_cycle, test_generator, ...  of the pictures in the grids, see `training.samples`
    test_swd_AtoB         sliced Wasserstein distance of the translations from the real pictures of B, each set
                          normalised by its own statistics, the mean of the pyramid's levels
    test_swd_colour_AtoB  both normalised by those of the real pictures, so that a colour cast and contrast count
    test_psnr_AtoB        dB, mean over the pictures, each bounded (`bounded_psnr`); where the truth is known
    test_ssim_AtoB        likewise

and so for BtoA, as `evaluation.metrics` defines them, of the generators' output as it is, not rounded to 8 bits. A
number of SWD means something beside others of as many pictures alone, those of this run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cyclegan_fast.config import Config, ConfigError
from cyclegan_fast.data.fixed import FixedPictures, load_measured
from cyclegan_fast.data.folder import Scan
from cyclegan_fast.evaluation.metrics import ReferenceSet, bounded_psnr, ssim
from cyclegan_fast.training.best import METRICS
from cyclegan_fast.training.samples import BaseSamples

__all__ = ["Measures", "open_measures"]

logger = logging.getLogger("cyclegan_fast.train")

_RANGE = (-1.0, 1.0)
_SMALLEST = {"swd": 16, "swd_colour": 16, "psnr": 1, "ssim": 11}  # sides, pixels
# Half and a quarter of the usual: the same places and directions at every look, so that less of them adds no noise.
_SAMPLING: dict[str, Any] = {"patches": 64, "directions": 128}
_STATISTICS = {"swd": "own", "swd_colour": "reference"}
_AGAINST_TRUTH = {"psnr": bounded_psnr, "ssim": ssim}


def open_measures(config: Config, scans: Mapping[str, Scan], samples: BaseSamples[Any]) -> Measures:
    """The measures of a run, with their pictures read. Raises ConfigError where `checkpoint.best` is none of them."""
    best = config.checkpoint.best
    pictures = load_measured(config, scans) if config.monitor.metrics_samples else None
    if pictures is not None and not pictures.held_out:
        logger.info("without folders testA and testB, measures are taken of training pictures")
    return Measures(samples, pictures, best)


class Measures:
    """The measures of one run.

    samples: translates, and measures the pictures of the grids; pictures: those of the metrics, None for no metrics;
    best: as `checkpoint.best`. Raises ConfigError where that cannot be measured of these pictures.
    """

    def __init__(self, samples: BaseSamples[Any], pictures: FixedPictures | None, best: str) -> None:
        self._samples, self._best = samples, best
        self._directions = [] if pictures is None else [_Direction(name, pictures) for name in samples.directions]
        obstacles = {one.name: one.obstacles for one in self._directions}
        if best in METRICS and all(best in each for each in obstacles.values()):
            what = next((each[best] for each in obstacles.values()), "monitor.metrics_samples is 0")
            raise ConfigError(
                f"checkpoint.best = {best!r} cannot be measured of the fixed test pictures: {what}. Choose "
                "checkpoint.best=cycle or generator"
            )
        for name, each in obstacles.items():
            if "swd" in each:
                logger.info("test_swd_%s is not measured: %s", name, each["swd"])

    def measure(self) -> dict[str, float]:
        """All measures by name; they begin with ``test_``."""
        measures = self._samples.measure() if self._best != "none" else {}
        for direction in self._directions:
            measures |= direction.measure(self._samples)
        return measures

    def best(self, measures: Mapping[str, float]) -> float:
        """Of these the one meant by `checkpoint.best`, the mean of the directions that have it; NaN for `none`."""
        if self._best == "none":
            return math.nan
        if self._best not in METRICS:
            return measures[self._samples.best[self._best]]
        names = [f"test_{self._best}_{direction}" for direction in self._samples.directions]
        values = [measures[name] for name in names if name in measures]
        return math.fsum(values) / len(values)


class _Direction:
    """The metrics of one direction. What they need of the real pictures alone is computed once, at the first look."""

    def __init__(self, name: str, pictures: FixedPictures) -> None:
        self.name = name
        forth = name == "AtoB"
        self._real = pictures.real_A if forth else pictures.real_B
        self._target = pictures.real_B if forth else pictures.real_A
        self._truth = pictures.true_B if forth else pictures.true_A
        self._references: dict[str, ReferenceSet] = {}
        self.obstacles = {what: why for what in METRICS if (why := self._obstacle(what)) is not None}

    def measure(self, samples: BaseSamples[Any]) -> dict[str, float]:
        """The metrics of the generators as they are now; NaN where a translation is no number."""
        wanted = [what for what in METRICS if what not in self.obstacles]
        made = list(samples.generated(self.name, self._real)) if wanted else []
        if not all(bool(batch.isfinite().all()) for batch in made):
            values = dict.fromkeys(wanted, math.nan)
        else:
            values = {what: self._value(what, made) for what in wanted}
        return {f"test_{what}_{self.name}": value for what, value in values.items()}

    def _value(self, what: str, made: list[Tensor]) -> float:
        """The distance of the translations from the real pictures, or the mean of how near each is to its truth."""
        if what in _AGAINST_TRUTH:
            truths = iter(self._truth or ())
            values = [_AGAINST_TRUTH[what](batch, _next(truths, len(batch)), value_range=_RANGE) for batch in made]
            return float(torch.cat(values).mean())
        if what not in self._references:
            target = torch.cat(self._target).to(made[0].device)
            options = {"value_range": _RANGE, "statistics": _STATISTICS[what], **_SAMPLING}
            self._references[what] = ReferenceSet(target, len(self._real), **options)
        return self._references[what].distance(torch.cat(made), value_range=_RANGE).mean

    def _obstacle(self, what: str) -> str | None:
        """Why a metric cannot be taken of these pictures, if so."""
        against_truth = what in _AGAINST_TRUTH
        sizes = {tuple(picture.shape[2:]) for picture in (*self._real, *(() if against_truth else self._target))}
        small = min(sizes, key=min)
        if against_truth and self._truth is None:
            target = self.name[-1]
            return (
                f"there is no truth of their translations, which data.pairing=aligned has, or a folder truth{target} "
                f"with the pictures of test{self.name[0]} by name"
            )
        if min(small) < _SMALLEST[what]:
            return f"{small[1]} x {small[0]} pixels are too small, both sides must have {_SMALLEST[what]}"
        if not against_truth and len(sizes) > 1:
            words = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
            return f"they are of several sizes, {words} pixels for instance"
        return None


def _next(pictures: Iterator[Tensor], count: int) -> Tensor:
    return torch.cat([next(pictures) for _ in range(count)])
