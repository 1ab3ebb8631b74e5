"""Everything that is measured of a trained model on a set of pictures: the work of `cyclegan-fast evaluate`.

Both directions are measured, each figure with a 95 % confidence interval for the choice of the pictures; one training
run is measured, and another one differs by more than that. docs/evaluation.md explains every measure.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cyclegan_fast.atomic import replacing
from cyclegan_fast.config import Config, ConfigError, DataConfig, LossConfig, from_dict, upgraded
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.metrics import (
    Interval,
    bootstrap,
    checkerboard,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    sliced_wasserstein,
    ssim,
)
from cyclegan_fast.evaluation.sets import EvaluationSet, open_set
from cyclegan_fast.inference.translate import DIRECTIONS, Translator, load
from cyclegan_fast.inference.weights import is_weights, read_weights
from cyclegan_fast.progress import Bar
from cyclegan_fast.training.checkpoint import find_checkpoint, read_checkpoint
from cyclegan_fast.version import __version__

__all__ = ["Evaluation", "Metric", "evaluate", "measure"]

FORMAT = 1
Floats = npt.NDArray[np.float64]
UInt8Array = npt.NDArray[np.uint8]

_PIXELS_AT_ONCE = 1 << 19
_GROUPS = 20


@dataclass(frozen=True)
class _Spec:
    """What a measure is called, and whether more of it is better (1), worse (-1), or depends on the domain (0)."""

    title: str
    group: str
    unit: str
    better: int


_SPECS = {
    "psnr": _Spec("PSNR from the truth", "truth", "dB", 1),
    "ssim": _Spec("SSIM with the truth", "truth", "", 1),
    "ms_ssim": _Spec("Multi-scale SSIM with the truth", "truth", "", 1),
    "swd": _Spec("Sliced Wasserstein distance", "set", "", -1),
    "swd_colour": _Spec("Sliced Wasserstein distance, colour seen", "set", "", -1),
    "cycle_l1": _Spec("Cycle error, mean absolute", "cycle", "levels of 255", -1),
    "cycle_psnr": _Spec("Cycle, PSNR from the input", "cycle", "dB", 1),
    "cycle_ssim": _Spec("Cycle, SSIM with the input", "cycle", "", 1),
    "identity_l1": _Spec("Identity error, mean absolute", "cycle", "levels of 255", -1),
    "checkerboard_2": _Spec("Checkerboard of 2 pixels", "artefact", "times", -1),
    "checkerboard_4": _Spec("Checkerboard of 4 pixels", "artefact", "times", -1),
}


@dataclass(frozen=True)
class Metric:
    """One measure of one direction.

    ``untouched``: the same of the input pictures themselves; ``target``: of the target domain's real pictures;
    ``difference``: from untouched, picture by picture. Each an interval, or None where it means nothing. What is
    infinite or undefined is NaN here, null in JSON.
    """

    name: str
    title: str
    group: str
    unit: str
    better: int
    value: Interval
    untouched: Interval | None = None
    target: Interval | None = None
    difference: Interval | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As in evaluation.json."""
        return {
            "title": self.title,
            "group": self.group,
            "unit": self.unit,
            "better": self.better,
            **_interval_dict(self.value),
            "untouched": None if self.untouched is None else _interval_dict(self.untouched),
            "target": None if self.target is None else _interval_dict(self.target),
            "difference": None if self.difference is None else _interval_dict(self.difference),
            "note": self.note,
        }


@dataclass(frozen=True)
class Direction:
    """The measures of one direction, and those of each picture by name, in the order of ``names``."""

    metrics: list[Metric]
    names: list[str]
    values: dict[str, Floats]


@dataclass(frozen=True)
class Evaluation:
    """All measures of a model on a set of pictures; see docs/evaluation.md for the form of ``to_dict``."""

    provenance: dict[str, Any]
    data: dict[str, Any]
    directions: dict[str, Direction]
    missing: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        return {
            "format": FORMAT,
            "provenance": self.provenance,
            "data": self.data,
            "directions": {
                name: {
                    "metrics": {metric.name: metric.to_dict() for metric in direction.metrics},
                    "pictures": [
                        {"name": picture, **{key: _number(values[i]) for key, values in direction.values.items()}}
                        for i, picture in enumerate(direction.names)
                    ],
                }
                for name, direction in self.directions.items()
            },
            "missing": self.missing,
        }

    def table(self) -> str:
        """A table for a terminal."""
        return "\n\n".join(text_table(name, direction.metrics) for name, direction in self.directions.items())

    def text(self, form: str) -> str:
        """The table as ``text`` or ``markdown``, or all of it as ``json``."""
        if form == "json":
            return json.dumps(self.to_dict(), indent=1, allow_nan=False)
        return self.markdown() if form == "markdown" else self.table()

    def markdown(self) -> str:
        """A Markdown table."""
        return "\n\n".join(markdown_table(name, direction.metrics) for name, direction in self.directions.items())

    def save(self, path: str | Path) -> Path:
        """Write evaluation.json, whole or not at all. Raises InputError."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        return path


_COLUMNS = ("measure", "input", "translated", "95 % interval", "target", "")
_ARROWS = {1: "more is better", -1: "less is better", 0: ""}


def _cell(value: Interval | None) -> str:
    return "-" if value is None or not math.isfinite(value.value) else f"{value.value:.4g}"


def _rows(metrics: Sequence[Metric]) -> list[tuple[str, ...]]:
    return [
        (
            metric.title + (f", {metric.unit}" if metric.unit else ""),
            _cell(metric.untouched),
            _cell(metric.value),
            f"{metric.value.low:.4g} to {metric.value.high:.4g}" if math.isfinite(metric.value.low) else "-",
            _cell(metric.target),
            _ARROWS[metric.better],
        )
        for metric in metrics
    ]


def text_table(direction: str, metrics: Sequence[Metric]) -> str:
    """The measures of a direction as aligned columns."""
    rows = [(direction, *_COLUMNS[1:]), *_rows(metrics)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest[:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, rest[-1]]).rstrip())
    return "\n".join(lines)


def markdown_table(direction: str, metrics: Sequence[Metric]) -> str:
    """The measures of a direction as a Markdown table."""
    rows = [(direction, *_COLUMNS[1:]), ("---", *["--:"] * 4, "---"), *_rows(metrics)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval_dict(interval: Interval) -> dict[str, float | None]:
    return {"value": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    which: str = "latest",
    directions: Sequence[str] | None = None,
    split: str = "test",
    pairs: bool = False,
    limit: int | None = None,
    weights: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Measure a model on the pictures below ``data``, or on its own run's test pictures."""
    begin = time.monotonic()
    translator = load(checkpoint, which=which, device=device, precision=precision, weights=weights)
    config, provenance = _origin(checkpoint, which, translator)
    pictures = open_set(data, config, split=split, pairs=pairs, limit=limit, progress=progress)
    found = measure(translator, pictures, config, directions=directions, progress=progress)
    provenance = {"version": __version__, "torch": torch.__version__, "device": str(translator.device)} | {
        "precision": translator.precision,
        **provenance,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 2),
    }
    return replace(found, provenance=provenance)


def _origin(checkpoint: str | Path, which: str, translator: Translator) -> tuple[Config, dict[str, Any]]:
    """The configuration of a model, and where its weights are from."""
    if is_weights(checkpoint):
        model = read_weights(checkpoint, which, networks=("G_A", "G_B")).model
        # As the de-facto test does: resized, nothing cut off.
        data = DataConfig(load_size=DataConfig.crop_size)
        identity = LossConfig().identity if model.channels_A == model.channels_B else 0.0
        config = Config(data=data, model=model, loss=LossConfig(identity=identity))
        return config, {"checkpoint": Path(checkpoint).name, "step": None, "epoch": None}
    file = find_checkpoint(Path(checkpoint), which)
    content = read_checkpoint(file)
    try:
        config = from_dict(upgraded(content["config"]))
    except ConfigError as error:  # which the translator has read before
        raise InputError(f"{file} holds a configuration that this version cannot use: {error}") from error
    position = content.get("position", {})
    return config, {"checkpoint": file.name, "step": position.get("step"), "epoch": position.get("epoch")}


def measure(
    translator: Translator,
    pictures: EvaluationSet,
    config: Config,
    *,
    directions: Sequence[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a translator on a set of pictures; ``directions``: None for those that it has."""
    directions = _directions(translator, directions)
    work = _Work(translator, pictures, progress)
    made = {direction: work.direction(direction) for direction in directions}
    height, width = pictures.size
    data = {
        "root": str(pictures.root),
        "split": pictures.split,
        "count_A": len(pictures.sides["A"]),
        "count_B": len(pictures.sides["B"]),
        "pairs": bool(pictures.truth),
        "size": [height, width],
        "preparation": pictures.preparation,
        "left_out": [list(item) for item in pictures.left_out],
    }
    missing = [dict(zip(("metric", "title", "why"), item, strict=True)) for item in dict.fromkeys(work.missing)]
    return Evaluation({}, data, made, missing)


def _directions(translator: Translator, wanted: Sequence[str] | None) -> list[str]:
    """The directions to measure. Raises InputError for one that the model does not have."""
    if wanted is not None:
        for direction in wanted:
            translator.channels(direction)
        return list(dict.fromkeys(wanted))
    found = []
    for direction in DIRECTIONS:
        try:
            translator.channels(direction)
        except InputError:
            continue
        found.append(direction)
    return found


class _Work:
    """Measuring one model on one set."""

    def __init__(self, translator: Translator, pictures: EvaluationSet, progress: bool) -> None:
        self.translator, self.pictures, self.progress = translator, pictures, progress
        self.missing: list[tuple[str, str, str]] = []
        self._real: dict[str, dict[str, Floats]] = {}
        height, width = pictures.size
        self.at_once = max(1, _PIXELS_AT_ONCE // (height * width))

    def direction(self, direction: str) -> Direction:
        """All measures of a direction."""
        source, target = direction[0], direction[-1]
        side = self.pictures.sides[source]
        alike = side.channels == self.pictures.sides[target].channels
        made, values = self._translate(direction)
        reference = self._singles_of(source) if alike else {}
        goal = self._singles_of(target)
        untouched = self._truth_values(side, source) if alike else {}
        metrics = []
        for name, found in values.items():
            before = untouched.get(name) if _SPECS[name].group == "truth" else reference.get(name)
            metrics.append(_metric(name, found, before, goal.get(name)))
        metrics += self._set_metrics(direction, made, alike)
        metrics.sort(key=lambda metric: list(_SPECS).index(metric.name))
        return Direction(metrics, side.names, values)

    def _translate(self, direction: str) -> tuple[UInt8Array, dict[str, Floats]]:
        """The translations of all pictures, uint8 [N, C, h, w] in a temporary file, and what is measured of each."""
        source, target = direction[0], direction[-1]
        side = self.pictures.sides[source]
        back = self._can_return(direction)
        made = _scratch((len(side), self.pictures.sides[target].channels, *self.pictures.size))
        parts: list[dict[str, Floats]] = []
        for start in self._steps(len(side), f"{direction}"):
            images = side[start : start + self.at_once]
            batch = torch.from_numpy(images)
            signed = _signed(batch).to(self.translator.device)
            if back:
                there, again = (_bytes(picture) for picture in self.translator.cycle(signed, direction))
            else:
                there, again = _bytes(self.translator.translate(signed, direction)), None
            made[start : start + len(images)] = there.numpy()
            values = self._singles(there)
            if again is not None:
                values |= _cycle_values(batch, again)
            values |= self._compared(there, source, range(start, start + len(images)))
            parts.append(values)
        return made, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _can_return(self, direction: str) -> bool:
        """Whether there is a way back; if not, that is said."""
        why = ""
        if self.translator._with_codes is not None:
            why = "Augmented CycleGAN's way back needs its encoders; translations are those of the codes of seed 0"
        else:
            try:
                self.translator.channels(direction[::-1].replace("ot", "to"))
            except InputError as error:
                why = str(error)
        if why:
            for name in ("cycle_l1", "cycle_psnr", "cycle_ssim"):
                self.missing.append((name, _SPECS[name].title, why))
        return not why

    def _compared(self, made: Tensor, source: str, places: Sequence[int]) -> dict[str, Floats]:
        """PSNR, SSIM and multi-scale SSIM with the truth, NaN where there is none; {} where there is none at all."""
        if source not in self.pictures.truth:
            return {}
        truth = self.pictures.truth[source]
        scales = ms_ssim_scales(*self.pictures.size)
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
        measures["ms_ssim"] = lambda x, y: ms_ssim(x, y, scales=scales)
        here = [i for i, place in enumerate(places) if place in truth.places]
        values = {name: np.full(len(places), np.nan) for name in measures}
        if here:
            theirs = torch.from_numpy(truth.side[[truth.places[places[i]] for i in here]])
            for name, compare in measures.items():
                values[name][here] = compare(made[here], theirs).numpy()
        return values

    def _truth_values(self, side: Any, source: str) -> dict[str, Floats]:
        """What `_compared` gives for the input pictures themselves."""
        parts = [
            self._compared(torch.from_numpy(side[start : start + self.at_once]), source, places)
            for start in range(0, len(side), self.at_once)
            for places in [range(start, min(start + self.at_once, len(side)))]
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _singles_of(self, domain: str) -> dict[str, Floats]:
        """What is measured of single pictures, of the real ones of a domain."""
        if domain not in self._real:
            side = self.pictures.sides[domain]
            parts = [
                self._singles(torch.from_numpy(side[start : start + self.at_once]))
                for start in range(0, len(side), self.at_once)
            ]
            self._real[domain] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._real[domain]

    def _singles(self, images: Tensor) -> dict[str, Floats]:
        """What is measured of pictures alone."""
        contrast = checkerboard(images).contrast.numpy()
        return {"checkerboard_2": contrast[:, 0], "checkerboard_4": contrast[:, 1]}

    def _set_metrics(self, direction: str, made: UInt8Array, alike: bool) -> list[Metric]:
        source, target = direction[0], direction[-1]
        goal = self.pictures.sides[target][:]
        groups = min(_GROUPS, len(goal), len(made))
        metrics = []
        for name, statistics in (("swd", "own"), ("swd_colour", "reference")):
            found = _swd_interval(goal, made, statistics, groups)
            before = _swd_interval(goal, self.pictures.sides[source][:], statistics, groups) if alike else None
            spec = _SPECS[name]
            metrics.append(Metric(name, spec.title, spec.group, spec.unit, spec.better, found, before))
        metrics += self._identity(direction, alike)
        return metrics

    def _identity(self, direction: str, alike: bool) -> list[Metric]:
        spec = _SPECS["identity_l1"]
        if not alike:
            self.missing.append(("identity_l1", spec.title, "the domains have different channels"))
            return []
        side = self.pictures.sides[direction[-1]]
        errors = []
        for start in self._steps(len(side), f"{direction} identity"):
            batch = torch.from_numpy(side[start : start + self.at_once])
            same = _bytes(self.translator.translate(_signed(batch).to(self.translator.device), direction))
            errors.append(_mean_absolute(same, batch))
        return [_metric("identity_l1", np.concatenate(errors), None, None)]

    def _steps(self, count: int, label: str) -> Iterator[int]:
        """Starts of the batches, under a progress bar."""
        with Bar(total=count, desc=label, unit="picture", disable=not self.progress) as bar:
            for start in range(0, count, self.at_once):
                yield start
                bar.update(min(self.at_once, count - start))


def _metric(name: str, found: Floats, before: Floats | None, goal: Floats | None) -> Metric:
    """A measure of single pictures: means over them, with bootstrap intervals."""
    spec = _SPECS[name]
    difference = _mean(found - before) if before is not None else None
    untouched = None if before is None else _mean(before)
    target = None if goal is None else _mean(goal)
    return Metric(name, spec.title, spec.group, spec.unit, spec.better, _mean(found), untouched, target, difference)


def _mean(values: Floats) -> Interval:
    known = values[~np.isnan(values)]
    if not np.isfinite(known).all() or len(known) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap(known)


def _swd_interval(goal: UInt8Array, made: UInt8Array, statistics: str, groups: int) -> Interval:
    found = sliced_wasserstein(goal, made, statistics=statistics)
    error = 1.96 * (
        sliced_wasserstein(goal, made, statistics=statistics, groups=groups, directions=64).mean_error or 0.0
    )
    return Interval(found.mean, max(found.mean - error, 0.0), found.mean + error)


def _cycle_values(images: Tensor, again: Tensor) -> dict[str, Floats]:
    return {
        "cycle_l1": _mean_absolute(again, images),
        "cycle_psnr": psnr(again, images).numpy(),
        "cycle_ssim": ssim(again, images).numpy(),
    }


def _mean_absolute(first: Tensor, second: Tensor) -> Floats:
    """Mean absolute difference of uint8 pictures, levels, float64 [N]."""
    error: Floats = (first.double() - second.double()).abs().mean(dim=(1, 2, 3)).numpy()
    return error


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as they are written: uint8, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()


def _scratch(shape: tuple[int, ...]) -> UInt8Array:
    """uint8 in a temporary file, which ends with the array."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
