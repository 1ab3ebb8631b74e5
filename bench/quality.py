"""Trained runs side by side: what `cyclegan-fast evaluate` finds of each, as levels and as paired differences.

For bench/ablation.py and bench/paper.py. A run is evaluated once; the finding stays beside its checkpoints.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from same_learning import Difference, difference, table

from cyclegan_fast.evaluation.evaluate import evaluate
from cyclegan_fast.evaluation.metrics import bootstrap
from cyclegan_fast.training.checkpoint import step_checkpoints

DIRECTIONS = {"AtoB": "Phone to DSLR", "BtoA": "DSLR to phone"}


@dataclass(frozen=True)
class Column:
    """A measure in the tables: its heading, its unit as a factor, its digits."""

    title: str
    digits: int
    factor: float = 1.0

    def shown(self, value: float | None, *, sign: bool = False) -> str:
        """In the column's unit; empty for None."""
        if value is None:
            return ""
        rounded = round(value * self.factor, self.digits) + 0.0  # no minus before a zero
        return f"{rounded:{'+' if sign else ''}.{self.digits}f}"

    def interval(self, found: Mapping[str, float | None] | Difference | None, *, sign: bool = False) -> str:
        """Value (low to high); the value alone where it has no interval."""
        if found is None:
            return ""
        ends = vars(found) if isinstance(found, Difference) else found
        value = ends["mean"] if isinstance(found, Difference) else ends["value"]
        low, high = (self.shown(ends.get(name), sign=sign) for name in ("low", "high"))
        return f"{self.shown(value, sign=sign)} ({low} to {high})" if low else self.shown(value, sign=sign)


COLUMNS = {
    "psnr": Column("PSNR, dB", 2),
    "ssim": Column("SSIM", 3),
    "ms_ssim": Column("MS-SSIM", 3),
    "swd": Column("SWD × 1000", 1, 1000),
    "swd_colour": Column("SWD with colour × 1000", 1, 1000),
    "checkerboard_2": Column("checkerboard of 2 pixels, contrast", 2),
    "checkerboard_4": Column("checkerboard of 4 pixels, contrast", 2),
    "separation": Column("subject over background, octaves", 2),
    "hallucination": Column("hallucination, %", 1),
    "noise": Column("noise, levels", 2),
}


def evaluated(run: Path, *, weights: str = "auto", again: bool = False) -> dict[str, Any]:
    """The content of evaluation.json of a run's last step, measured now unless it has been since it was trained."""
    kept = run / ("evaluation.json" if weights == "auto" else f"evaluation-{weights}.json")
    last = step_checkpoints(run)[-1]
    if again or not kept.exists() or kept.stat().st_mtime < last.stat().st_mtime:
        evaluate(run, weights=weights).save(kept)
    content: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return content


@dataclass
class Evaluations:
    """Contents of evaluation.json by (arm, seed)."""

    found: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _ in self.found))

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for name, seed in self.found if name == arm)

    def metrics(self, arm: str, seed: int, direction: str) -> dict[str, Any]:
        metrics: dict[str, Any] = self.found[arm, seed]["directions"][direction]["metrics"]
        return metrics

    def names(self, direction: str) -> list[str]:
        """The columns that every run has a value for."""
        runs = [self.metrics(*key, direction) for key in self.found]
        return [name for name in COLUMNS if all(run.get(name, {}).get("value") is not None for run in runs)]

    def values(self, arm: str, direction: str, name: str, seeds: Sequence[int] | None = None) -> list[float]:
        chosen = self.seeds(arm) if seeds is None else seeds
        return [self.metrics(arm, seed, direction)[name]["value"] for seed in chosen]

    def against(self, arm: str, reference: str, direction: str, name: str) -> Difference | None:
        """Over pairs of runs of one seed, with Student's interval; with one pair, over the test pictures."""
        shared = [seed for seed in self.seeds(arm) if seed in self.seeds(reference)]
        if len(shared) == 1:
            return self._over_pictures(arm, reference, direction, name, shared[0])
        ours, theirs = (self.values(which, direction, name, shared) for which in (arm, reference))
        return difference(ours, theirs)

    def _over_pictures(self, arm: str, reference: str, direction: str, name: str, seed: int) -> Difference | None:
        """Of two runs, with the bootstrap interval for the choice of the pictures; None for measures of whole sets."""
        ours, theirs = (
            {row["name"]: row.get(name) for row in self.found[which, seed]["directions"][direction]["pictures"]}
            for which in (arm, reference)
        )
        pairs = [(value, theirs.get(picture)) for picture, value in ours.items()]
        both = [a - b for a, b in pairs if a is not None and b is not None]
        if len(both) < 2:
            return None
        interval = bootstrap(np.array(both))
        return Difference(interval.value, interval.low, interval.high)

    def levels_table(self, direction: str, aside: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
        """What each arm reaches, below the untouched pictures and the target domain's real ones.

        Mean ± standard deviation over seeds; with one seed, its value and the interval over pictures. ``aside``:
        further columns, by title and arm. Arms that prepare pictures otherwise than the others, and so are measured on
        other inputs, have rows of their own for these.
        """
        names, aside = self.names(direction), aside or {}
        rows = [["", "runs", *(COLUMNS[name].title for name in names), *aside]]
        inputs = self._inputs()
        for label, kind in (("input, untouched", "untouched"), ("real pictures of the target", "target")):
            for arms in inputs.values():
                measured = self.metrics(arms[0], self.seeds(arms[0])[0], direction)
                cells = [COLUMNS[name].shown((measured[name].get(kind) or {}).get("value")) for name in names]
                of = f", as prepared for {' and '.join(arms)}" if len(inputs) > 1 else ""
                rows.append([label + of, "", *cells, *("" for _ in aside)])
        for arm in self.arms:
            cells = [self._level(arm, direction, name) for name in names]
            rows.append([arm, str(len(self.seeds(arm))), *cells, *(each.get(arm, "") for each in aside.values())])
        return table(rows)

    def _inputs(self) -> dict[str, list[str]]:
        """The arms by what is measured of their untouched pictures: equal where these were prepared alike."""
        inputs: dict[str, list[str]] = {}
        for arm in self.arms:
            metrics = self.metrics(arm, self.seeds(arm)[0], next(iter(DIRECTIONS)))
            untouched = {name: (metric.get("untouched") or {}).get("value") for name, metric in metrics.items()}
            inputs.setdefault(json.dumps(untouched, sort_keys=True), []).append(arm)
        return inputs

    def _level(self, arm: str, direction: str, name: str) -> str:
        column, seeds = COLUMNS[name], self.seeds(arm)
        if len(seeds) == 1:
            return column.interval(self.metrics(arm, seeds[0], direction)[name])
        values = self.values(arm, direction, name)
        return f"{column.shown(statistics.mean(values))} ± {column.shown(statistics.stdev(values))}"

    def differences_table(self, direction: str, reference: Mapping[str, str]) -> list[str]:
        """Each arm less what `reference` names for it; bold where the interval leaves out 0."""
        names = self.names(direction)
        rows = [["difference", *(COLUMNS[name].title for name in names)]]
        for arm, other in reference.items():
            if not self._comparable(arm, other):
                continue
            found = {name: self.against(arm, other, direction, name) for name in names}
            cells = [COLUMNS[name].interval(change, sign=True) for name, change in found.items()]
            bold = [change is not None and change.clear for change in found.values()]
            cells = [f"**{cell}**" if clear else cell for cell, clear in zip(cells, bold, strict=True)]
            rows.append([f"{arm}, less {other}", *cells])
        return table(rows)

    def _comparable(self, arm: str, other: str) -> bool:
        """Whether both have runs, of pictures that were prepared alike: others are another task, and no pairs."""
        return any(arm in arms and other in arms for arms in self._inputs().values())

    def as_json(self, reference: Mapping[str, str]) -> dict[str, Any]:
        """All values and intervals, and the differences; without those of single pictures."""
        runs = [
            {"arm": arm, "seed": seed, "provenance": content["provenance"]}
            | {name: each["metrics"] for name, each in content["directions"].items()}
            for (arm, seed), content in self.found.items()
        ]
        differences = [
            {"arm": arm, "less": other, "direction": direction, "measure": name} | vars(change)
            for arm, other in reference.items()
            if self._comparable(arm, other)
            for direction in DIRECTIONS
            for name in self.names(direction)
            if (change := self.against(arm, other, direction, name)) is not None
        ]
        return {"runs": runs, "differences": differences}
