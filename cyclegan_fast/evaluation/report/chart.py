"""Curves as SVG inside a page: colours from its style sheet, text at its size on every screen, values to read out.

Coordinates are percentages, so that the drawing stretches to its place and its labels do not. The lines lie in an inner
drawing of 1000 x 1000 units, whose strokes keep their width.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cyclegan_fast.errors import shown
from cyclegan_fast.evaluation.records import running_mean

__all__ = ["Chart", "Line", "chart_html", "ticks"]

Floats = npt.NDArray[np.float64]

_RAW, _READ, _ROWS = 400, 160, 12  # points of a faint line, of one to read values from, and rows of its table
_FEW = 20  # values up to which each is marked, and none is smoothed


@dataclass(frozen=True)
class Line:
    """One curve: values [n] at the chart's places, NaN or infinite where there is none to draw."""

    label: str
    values: Floats


@dataclass(frozen=True)
class Chart:
    """Some curves over the epochs ``x`` [n], which ascend. ``from_zero``: the vertical axis holds 0."""

    title: str
    x: Floats
    lines: Sequence[Line]
    note: str = ""
    smooth: bool = True
    from_zero: bool = True


def chart_html(chart: Chart) -> str:
    """A figure: title, legend with the values that are read out, the drawing, and the same as a table."""
    window = max(1, len(chart.x) // 15) if chart.smooth and len(chart.x) > _FEW else 1
    means = [running_mean(line.values, window) for line in chart.lines]
    low, high = _range(chart)
    end = max(float(chart.x[-1]), 1e-9)
    at = _spread(len(chart.x), _READ)
    data = {
        "x": _words(chart.x[at], 5),
        "y": [_words(mean[at], 4) for mean in means],
        "span": [end, low, high],
    }
    keys = "".join(
        f'<span class="key c{index}">{_text(line.label)} <output>{_last(mean)}</output></span>'
        for index, (line, mean) in enumerate(zip(chart.lines, means, strict=True))
    )
    drawn = "".join(
        _curve(index, chart.x / end, (line.values, mean), (low, high), window > 1)
        for index, (line, mean) in enumerate(zip(chart.lines, means, strict=True))
    )
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    label = _text(f"{chart.title}: {', '.join(line.label for line in chart.lines)}, over the epochs")
    return f"""
<figure class="chart">
<figcaption><h3>{_text(chart.title)}</h3>{note}<p class="keys"><span class="at"></span>{keys}</p></figcaption>
<div class="plot" data-chart="{html.escape(json.dumps(data, allow_nan=False))}">
<svg role="img" aria-label="{label}">{_axes(end, low, high)}
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{drawn}</svg>
{_lost(chart, end)}{_dots(chart, end, (low, high))}<line class="cursor" y1="0" y2="100%"/></svg></div>
{_table(chart, means)}</figure>"""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count``, in steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(chart: Chart) -> tuple[float, float]:
    """The vertical range: what a few outliers cannot stretch."""
    values = np.concatenate([line.values for line in chart.lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = (float(limit) for limit in np.quantile(values, (0.005, 0.995)))
    if chart.from_zero:
        low, high = min(0.0, low), max(0.0, high)
    flat = high - low <= 1e-9 * max(abs(low), abs(high))
    room = (0.1 * abs(high) if flat else 0.06 * (high - low)) or 1.0
    return low - room * (low != 0.0 or not chart.from_zero), high + room * (high != 0.0 or flat)


def _spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of ``count`` places, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _curve(index: int, share: Floats, values: tuple[Floats, Floats], span: tuple[float, float], smoothed: bool) -> str:
    """The raw values, faint, and their mean, bold."""
    raw, mean = values
    bold = _path(share, mean, span, _READ)
    faint = f'<path class="raw c{index}" d="{_path(share, raw, span, _RAW)}"/>' if smoothed else ""
    return f'{faint}<path class="mean c{index}" d="{bold}"/>'


def _path(share: Floats, values: Floats, span: tuple[float, float], most: int) -> str:
    """SVG commands of a curve with gaps. Of more points than ``most``, each stretch keeps its lowest and highest."""
    keep = np.arange(len(values))
    if len(values) > most:
        stretches = np.array_split(keep, most // 2)
        keep = np.unique([pick for part in stretches for pick in _extremes(part, values)])
    x = 1000 * share[keep]
    y = 1000 * (1 - (values[keep] - span[0]) / (span[1] - span[0]))
    commands, pen = [], False
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(py):
            commands.append(f"{'L' if pen else 'M'}{px:.1f} {min(max(py, -999.0), 1999.0):.1f}")
        pen = math.isfinite(py)
    return "".join(commands)


def _extremes(part: npt.NDArray[np.int64], values: Floats) -> Iterator[int]:
    """Places of the lowest and of the highest value of a stretch, and of one that is not finite: the gap remains."""
    finite = np.isfinite(values[part])
    if not finite.all():
        yield int(part[np.argmin(finite)])
    if finite.any():
        known = part[finite]
        yield int(known[np.argmin(values[known])])
        yield int(known[np.argmax(values[known])])


def _axes(end: float, low: float, high: float) -> str:
    rows = []
    for value in ticks(low, high, 4):
        y = f"{100 * (1 - (value - low) / (high - low)):.2f}%"
        rows.append(f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>')
        rows.append(f'<text class="tick left" x="-8" y="{y}" dy=".32em">{value:.6g}</text>')
    for value in ticks(0.0, end, 6):
        x = f"{100 * value / end:.2f}%"
        rows.append(f'<text class="tick" x="{x}" y="100%" dy="1.5em">{value:.6g}</text>')
    return "".join(rows)


def _lost(chart: Chart, end: float) -> str:
    """A cross at the foot for each place where a curve has a value that is not finite between its first and last."""
    lost = np.zeros(len(chart.x), dtype=bool)
    for line in chart.lines:
        known = np.flatnonzero(np.isfinite(line.values))
        lost |= ~np.isfinite(line.values) & (len(known) > 0)
    places: list[float] = chart.x[lost][_spread(int(lost.sum()), 40)].tolist() if lost.any() else []
    crosses = "".join(f'<text class="lost" x="{100 * x / end:.2f}%" y="100%" dy="-.15em">×</text>' for x in places)
    return f"<g><title>not finite</title>{crosses}</g>" if crosses else ""


def _dots(chart: Chart, end: float, span: tuple[float, float]) -> str:
    """A dot a value where there are few."""
    if len(chart.x) > _FEW:
        return ""
    low, high = span
    return "".join(
        f'<circle class="c{index}" cx="{100 * x / end:.2f}%" cy="{100 * (high - y) / (high - low):.2f}%" r="3"/>'
        for index, line in enumerate(chart.lines)
        for x, y in zip(chart.x.tolist(), line.values.tolist(), strict=True)
        if math.isfinite(y)
    )


def _table(chart: Chart, means: Sequence[Floats]) -> str:
    heads = "".join(f'<th scope="col">{_text(line.label)}</th>' for line in chart.lines)
    rows = "".join(
        f'<tr><th scope="row">{chart.x[place]:.4g}</th>'
        + "".join(f"<td>{_value(mean[place])}</td>" for mean in means)
        + "</tr>"
        for place in _spread(len(chart.x), _ROWS).tolist()
    )
    return f"""<details><summary>As a table</summary><div class="scroll"><table>
<thead><tr><th scope="col">Epoch</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"""


def _last(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    return _value(float(finite[-1])) if len(finite) else "–"


def _value(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _words(values: Floats, digits: int) -> list[float | None]:
    """Values with few digits, null where they are not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _text(text: str) -> str:
    return html.escape(shown(text))
