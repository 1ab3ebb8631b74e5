"""What an evaluation found: measures with intervals, as evaluation.json and as tables."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cyclegan_fast.atomic import replacing
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.metrics import Interval

__all__ = ["MEASURES", "UNDEFINED", "Direction", "Evaluation", "Kind", "Metric"]

FORMAT = 1
Floats = npt.NDArray[np.float64]

UNDEFINED = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Kind:
    """What a measure is called and counted in, and whether more is better (1), less (-1), or nearer the target (0)."""

    title: str
    group: str
    unit: str
    better: int


MEASURES = {
    "psnr": Kind("PSNR to the truth", "truth", "dB", 1),
    "ssim": Kind("SSIM to the truth", "truth", "", 1),
    "ms_ssim": Kind("Multi-scale SSIM to the truth", "truth", "", 1),
    "swd": Kind("Sliced Wasserstein distance, colour cast not seen", "set", "", -1),
    "swd_colour": Kind("Sliced Wasserstein distance, colour cast seen", "set", "", -1),
    "fid": Kind("FID", "set", "", -1),
    "kid": Kind("KID", "set", "", -1),
    "frechet_random": Kind("Fréchet distance, random features (no FID)", "set", "", -1),
    "kernel_random": Kind("Kernel distance, random features (no KID)", "set", "", -1),
    "frechet_embedding": Kind("Fréchet distance, given features (no FID)", "set", "", -1),
    "kernel_embedding": Kind("Kernel distance, given features (no KID)", "set", "", -1),
    "cycle_l1": Kind("Cycle error", "cycle", "levels", -1),
    "cycle_psnr": Kind("Cycle, PSNR to the input", "cycle", "dB", 1),
    "cycle_ssim": Kind("Cycle, SSIM to the input", "cycle", "", 1),
    "identity_l1": Kind("Identity error", "cycle", "levels", -1),
    "subject_sharpness": Kind("Sharpness of the subject", "photograph", "levels", 0),
    "background_sharpness": Kind("Sharpness of the background", "photograph", "levels", 0),
    "separation": Kind("Subject sharper than background", "photograph", "octaves", 0),
    "depth_of_field_gain": Kind("Depth-of-field gain", "photograph", "octaves", 0),
    "noise": Kind("Noise", "photograph", "levels", 0),
    "lightness": Kind("Mean lightness", "photograph", "L*", 0),
    "shadows": Kind("Clipped shadows", "photograph", "%", 0),
    "highlights": Kind("Clipped highlights", "photograph", "%", 0),
    "colour_distance": Kind("Colours, distance from the target's", "photograph", "Delta E", -1),
    "checkerboard_2": Kind("Checkerboard of 2 pixels", "artefact", "times", -1),
    "checkerboard_4": Kind("Checkerboard of 4 pixels", "artefact", "times", -1),
    "hallucination": Kind("Invented, of all change", "artefact", "%", -1),
    "hallucination_area": Kind("Invented, of the area", "artefact", "%", -1),
}
"""Every measure by its name in evaluation.json, in the order of the tables."""

_GROUPS = {
    "truth": "against the truth",
    "set": "against the set of real pictures",
    "cycle": "there and back",
    "photograph": "as a photograph",
    "artefact": "artefacts",
}
_BETTER = {1: "more", -1: "less", 0: "as target"}


@dataclass(frozen=True)
class Metric:
    """One measure of one direction, each figure with its interval.

    ``value`` of the translations, ``untouched`` of the input pictures themselves, ``target`` of real pictures of the
    target domain, ``difference`` of the translations from the untouched, picture by picture; None where that means
    nothing or is not known. What is undefined is NaN here and null in JSON.
    """

    name: str
    value: Interval
    untouched: Interval | None = None
    target: Interval | None = None
    difference: Interval | None = None
    note: str = ""

    @property
    def kind(self) -> Kind:
        """What this is a measure of."""
        return MEASURES[self.name]

    @property
    def verdict(self) -> str:
        """Of the difference from the untouched: better, worse, or not clear, where its interval holds 0.

        Empty where there is none, and where the target decides, not more or less.
        """
        if self.difference is None or not math.isfinite(self.difference.low) or self.kind.better == 0:
            return ""
        if self.difference.low <= 0 <= self.difference.high:
            return "not clear"
        return "better" if (self.difference.low > 0) == (self.kind.better > 0) else "worse"

    def to_dict(self) -> dict[str, Any]:
        """As in evaluation.json."""
        kind = {field.name: getattr(self.kind, field.name) for field in fields(Kind)}
        beside = {name: getattr(self, name) for name in ("untouched", "target", "difference")}
        found = {name: None if interval is None else _to_dict(interval) for name, interval in beside.items()}
        return {**kind, **_to_dict(self.value), **found, "note": self.note}


@dataclass(frozen=True)
class Direction:
    """The measures of one direction, and those of each picture by name, in the order of ``names``."""

    metrics: dict[str, Metric]
    names: list[str]
    values: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        """As in evaluation.json."""
        pictures = [
            {"name": name, **{key: _number(values[i]) for key, values in self.values.items()}}
            for i, name in enumerate(self.names)
        ]
        return {"metrics": {name: metric.to_dict() for name, metric in self.metrics.items()}, "pictures": pictures}


@dataclass(frozen=True)
class Evaluation:
    """All measures of a model on a set of pictures: docs/evaluation.md says what each is, and what `to_dict` holds.

    ``directions``: by name, AtoB and BtoA; ``missing``: what could not be measured, with ``metric``, ``title`` and
    ``why``.
    """

    provenance: dict[str, Any]
    data: dict[str, Any]
    directions: dict[str, Direction]
    missing: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        directions = {name: direction.to_dict() for name, direction in self.directions.items()}
        parts = {"provenance": self.provenance, "data": self.data, "directions": directions, "missing": self.missing}
        return {"format": FORMAT, **parts}

    def json(self) -> str:
        """evaluation.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)

    def save(self, path: str | Path) -> Path:
        """Write evaluation.json, whole or not at all. Raises InputError."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                # Names of files may hold bytes that are not UTF-8.
                temporary.write_text(self.json() + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def table(self) -> str:
        """Tables for a terminal, one a direction."""
        parts = [_heading(self, name) + "\n" + _text(direction.metrics) for name, direction in self.directions.items()]
        return "\n\n".join([*parts, "\n".join([_EXPLAINED, *self._not_measured()])])

    def _not_measured(self) -> list[str]:
        """A line for each reason."""
        reasons: dict[str, list[str]] = {}
        for item in self.missing:
            reasons.setdefault(item["why"], []).append(item["title"])
        return [f"not measured: {'; '.join(titles)}: {why}" for why, titles in reasons.items()]

    def markdown(self) -> str:
        """The same as Markdown."""
        parts = [
            f"**{_heading(self, name)}**\n\n{_markdown(direction.metrics)}"
            for name, direction in self.directions.items()
        ]
        missing = [f"* {line}" for line in self._not_measured()]
        return "\n\n".join([*parts, _EXPLAINED, *(["\n".join(missing)] if missing else [])])


_HEADINGS = ("", "input", "translated", "95 % interval", "target", "wanted", "against the input")
_EXPLAINED = (
    "input: the same measure of the untouched pictures. target: of real pictures of the other domain. The intervals, "
    "that of the difference from the input too, are for another choice of as many pictures, not for another training; "
    "where it holds 0, the difference is not clear."
)


def _heading(evaluation: Evaluation, direction: str) -> str:
    source, target = direction[0], direction[-1]
    data = evaluation.data
    height, width = data["size"]
    return (
        f"{source} to {target}: {data[f'count_{source}']} pictures of {source}, {data[f'count_{target}']} of {target}, "
        f"{width} x {height} pixels"
    )


def _rows(metrics: dict[str, Metric]) -> list[tuple[str, ...]]:
    """A row a measure, and one for each group's name, which has no figures."""
    rows: list[tuple[str, ...]] = []
    for group, words in _GROUPS.items():
        own = [metric for metric in metrics.values() if metric.kind.group == group]
        rows += [(words,)] * bool(own)
        for metric in own:
            unit = f", {metric.kind.unit}" if metric.kind.unit else ""
            interval = f"{_figure(metric.value.low)} to {_figure(metric.value.high)}"
            figures = [_cell(each) for each in (metric.untouched, metric.value, metric.target)]
            cells = (*figures[:2], interval if math.isfinite(metric.value.low) else "-", figures[2])
            rows.append((metric.kind.title + unit, *cells, _BETTER[metric.kind.better], _difference(metric)))
    return rows


def _difference(metric: Metric) -> str:
    """+1.125 (0.791 to 1.470), better."""
    found = metric.difference
    if found is None or not math.isfinite(found.low):
        return ""
    sign = "+" if found.value > 0 else ""
    text = f"{sign}{_figure(found.value)} ({_figure(found.low)} to {_figure(found.high)})"
    return f"{text}, {metric.verdict}" if metric.verdict else text


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None or not math.isfinite(interval.value) else _figure(interval.value)


def _figure(value: float) -> str:
    """Four digits, or four behind the point: 0.0123, 1.234, 23.46, 1235; in powers of ten below that, 2.1e-05."""
    if not math.isfinite(value):
        return "-"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    rounded = float(f"{value:.3e}")  # 9.9996 has two digits before the point
    digits = 3 if value == 0 else max(0, min(4, 3 - math.floor(math.log10(abs(rounded)))))
    return f"{rounded:.{digits}f}"


def _text(metrics: dict[str, Metric]) -> str:
    rows = [row if len(row) == 1 else ("  " + row[0], *row[1:]) for row in _rows(metrics)]
    table = [row for row in [_HEADINGS, *rows] if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in [_HEADINGS, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(rest[:-2], widths[1:-2], strict=True)] if rest else []
        words = [cell.ljust(width) for cell, width in zip(rest[-2:], widths[-2:], strict=True)] if rest else []
        lines.append("  ".join([first.ljust(widths[0]), *cells, *words]).rstrip())
    return "\n".join(lines)


def _markdown(metrics: dict[str, Metric]) -> str:
    rows = [row if len(row) > 1 else (f"*{row[0]}*", *[""] * 6) for row in _rows(metrics)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [_HEADINGS, ("---", *["--:"] * 4, "---", "---"), *rows])


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _to_dict(interval: Interval) -> dict[str, float | None]:
    return {"value": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}
