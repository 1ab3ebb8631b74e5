"""The best state of a run by one measure of its fixed test pictures, and whether it still gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from cyclegan_fast.config import Config

__all__ = ["HIGHER", "METRICS", "Best"]

logger = logging.getLogger("cyclegan_fast.train")

# Of `monitor.metrics_samples` pictures; the others are of `monitor.samples`.
METRICS = ("swd", "swd_colour", "psnr", "ssim")
HIGHER = ("psnr", "ssim")  # the better, the higher


class Best:
    """The best value of `checkpoint.best` so far, the same on all ranks if each is given rank 0's values.

    value, step: of the best, the worst number there is and 0 before the first; since: measurements after it.
    """

    def __init__(self, config: Config) -> None:
        self.wanted = config.checkpoint.best
        self._patience = config.training.patience
        self._measure = _measure(self.wanted, config.monitor.samples, config.monitor.metrics_samples)
        self.value = -math.inf if self.wanted in HIGHER else math.inf
        self.step, self.since = 0, 0

    @property
    def enough(self) -> bool:
        """Whether `training.patience` ends the run."""
        return 0 < self._patience <= self.since

    @property
    def why(self) -> str:
        """What to say of a run that ended so."""
        return (
            f"{self.since} measurements have not improved on the best, {self.value:.4g} by {self._measure}, of step "
            f"{self.step}; --resume with a larger training.patience goes on"
        )

    def update(self, value: float, step: int, *, counts: bool = True) -> None:
        """Take in what was measured after a step. What is not finite, as a test picture may make it, is never the best.

        counts: whether it is one for the patience; that at the end of a run, which may yet go on, is not.
        """
        better = value > self.value if self.wanted in HIGHER else value < self.value
        if better and math.isfinite(value):
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += counts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "best": self.value,
            "best_step": self.step,
            "best_measure": self._measure,
            "since_best": self.since,
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, also from one of a version without `best_measure`; anew if by another measure.

        A run that goes on without a measure keeps what it has for the next one that has.
        """
        settings = content["config"]
        then = content.get("best_measure") or _measure(
            settings.get("checkpoint", {}).get("best", "cycle"), settings.get("monitor", {}).get("samples", 4), 0
        )
        if self.wanted != "none" and self._measure != then:
            logger.info("the best was kept by %s, and is now by %s: it starts anew", then, self._measure)
            return
        self._measure, self.value = then, content["best"]
        self.step, self.since = content.get("best_step", 0), content.get("since_best", 0)


def _measure(wanted: str, samples: int, metrics_samples: int) -> str:
    """A measure and its number of pictures: only what was measured alike can be compared."""
    return f"{wanted} of {metrics_samples if wanted in METRICS else samples} pictures a domain"
