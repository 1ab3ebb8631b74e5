"""The sections of a report as HTML. All text from outside goes through `text`."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cyclegan_fast.comparison import Side, comparison
from cyclegan_fast.config import Config, to_dict, to_yaml
from cyclegan_fast.errors import shown
from cyclegan_fast.evaluation.records import CURVES, Record, curve_values, generator_terms, values_of
from cyclegan_fast.evaluation.report.chart import Chart, Line, chart_html
from cyclegan_fast.evaluation.report.pictures import Case, Gallery, Shot
from cyclegan_fast.evaluation.report.run import Evaluation, Measure, Reading, Run, number

__all__ = ["arrow", "sections", "summary", "text"]

_GROUPS = {
    "truth": "Against the truth",
    "set": "As a set, against real pictures of the target",
    "cycle": "There and back",
    "photograph": "As photographs",
    "artefact": "Artefacts",
}
_LABELS = ("G_A (G: A → B)", "G_B (F: B → A)", "D_A (D_Y: judges B)", "D_B (D_X: judges A)")
_TESTS = {
    "cycle": "Cycle error of the samples, L1",
    "generator": "Generators' whole loss on the samples",
    "l1": "Distance from the truth, L1",
    "swd": "Sliced Wasserstein distance",
    "psnr": "PSNR against the truth, dB",
    "ssim": "SSIM against the truth",
    "diversity": "Distance between translations by different codes, L1",
}
_TELLING = {
    "psnr": "PSNR to the truth",
    "ssim": "SSIM to the truth",
    "swd": "Sliced Wasserstein",
    "hallucination": "Invented, of all change",
}
_LEAST = 560  # CSS pixels to which small pictures are enlarged between their sliders


def text(value: object) -> str:
    """Text from outside as HTML: escaped, control characters too."""
    return html.escape(shown(value))


def arrow(direction: str) -> str:
    """A → B of AtoB."""
    return f"{direction[0]} → {direction[-1]}"


def summary(run: Run, gallery: Gallery) -> str:
    """The head of the page: what this is, how far it came, and its most telling figures."""
    config, planned = run.config, run.steps_planned
    done = planned is not None and run.step >= planned
    state = f"{run.step:,} steps" if done or planned is None else f"{run.step:,} of {planned:,} steps"
    tag = '<span class="tag">finished</span>' if done else '<span class="tag warn">not finished</span>'
    tiles = "".join(f'<div class="tile"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in _tiles(run) if value)
    tiles = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    notes = "".join(f"<li>{text(note)}</li>" for note in (*run.troubles, *gallery.notes))
    notes = f'<ul class="notes" aria-label="What is missing">{notes}</ul>' if notes else ""
    what = f"{_METHODS.get(config.model.method, config.model.method)}, {_data_words(config)}, {state}"
    return f'<h1>{text(config.name)}</h1><p class="what">{text(what)} {tag}</p>{tiles}{notes}'


_METHODS = {"cyclegan": "CycleGAN", "pix2pix": "pix2pix", "augmented": "Augmented CycleGAN"}


def sections(run: Run, gallery: Gallery, command: str) -> Iterator[tuple[str, str, str]]:
    """Identifier, title and content of each section that has something to show, in order."""
    parts = (
        ("sliders", "Before and after", _sliders(gallery)),
        ("progress", "Over the epochs", _grids(gallery) + _samples(gallery)),
        ("cycle", "There and back", _cycles(gallery)),
        ("styles", "By different codes", _styles(gallery)),
        ("measures", "Measures", _measures(run)),
        ("cases", "Worst and best", _cases(gallery)),
        ("curves", "Training", _curves(run.records)),
        ("timing", "Time and memory", _timing(run)),
        ("settings", "Settings", _settings(run.config)),
        ("provenance", "Provenance", _provenance(run, command)),
    )
    return ((name, title, content) for name, title, content in parts if content)


def _data_words(config: Config) -> str:
    return "synthetic flowers" if config.data.source == "synthetic" else config.data.root.rstrip("/").rpartition("/")[2]


def _tiles(run: Run) -> Iterator[tuple[str, str]]:
    """Name and value, as HTML, of the most telling figures; of the measures, those of the first direction."""
    directions = run.evaluation.measures.items() if run.evaluation else ()
    for direction, measures in list(directions)[:1]:
        known = {each.name: each for each in measures if each.reading.value is not None}
        for name in [name for name in _TELLING if name in known][:3]:
            found = known[name]
            untouched = f"<small>untouched {_number(found.untouched.value)}</small>" if found.untouched else ""
            unit = f" {text(found.unit)}" if found.unit else ""
            yield f"{_TELLING[name]}, {arrow(direction)}", f"{_number(found.reading.value)}{unit}{untouched}"
    yield "Training time", _duration(run.seconds) if run.seconds else ""
    rates = _finite(values_of(run.records, "pairs_per_s"))
    yield "Pairs a second", f"{np.median(rates):.3g}" if rates.size else ""


def _number(value: float | None) -> str:
    """Four digits, or a dash for what is undefined."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - max(0, math.floor(math.log10(abs(value) or 1))))}f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _finite(values: Any) -> Any:
    return values[np.isfinite(values)]


# Pictures


def _image(shot: Shot) -> str:
    width, height = shot.size
    return f'<img src="{shot.source}" alt="{text(shot.text)}" width="{width}" height="{height}">'


def _row(shots: Sequence[Shot], titles: Sequence[str], name: str) -> str:
    """Pictures side by side, each under its title: on a narrow screen they wrap."""
    cells = "".join(
        f"<figure><figcaption>{text(title)}</figcaption>{_image(shot)}</figure>"
        for shot, title in zip(shots, titles, strict=True)
    )
    return f'<div class="row n{len(shots)}" role="group" aria-label="{text(name)}">{cells}</div>'


def _rows(rows: Iterable[tuple[Sequence[Shot], Sequence[str], str]]) -> str:
    return f'<div class="rows">{"".join(_row(*row) for row in rows)}</div>'


def _name(shot: Shot) -> str:
    return shot.text.rpartition(", ")[0]


def _sliders(gallery: Gallery) -> str:
    """Each picture with its slider; pictures that were shrunk to keep the page small say so."""
    if not gallery.sliders:
        return ""
    parts = []
    for slider in gallery.sliders:
        width, height = slider.before.size
        size = f"{slider.before.original[0]} × {slider.before.original[1]} pixels"
        if (width, height) != slider.before.original:
            size = f"shown at {width} × {height} of {size}"
        caption = f"""<h3 class="cf-caption"><span class="name">{text(slider.name)}</span>
<span class="pale">{arrow(slider.direction)}, {size}, translated in {slider.seconds:.2g} s</span></h3>"""
        before, after = (Side(shot.source, shown(shot.text)) for shot in (slider.before, slider.after))
        parts.append(comparison(before, after, slider.before.size, caption=caption, least=_LEAST))
    lead = "Drag the line, or use the arrow keys on the slider. <b>100 %</b> shows one picture pixel a screen pixel."
    small = " small" if all(max(slider.before.size) <= _LEAST for slider in gallery.sliders) else ""
    return f'<p class="with-script">{lead}</p><div class="sliders{small}">{"".join(parts)}</div>'


def _grids(gallery: Gallery) -> str:
    return "".join(
        f"<h3>{arrow(direction)}</h3>" + _rows((row, gallery.titles[direction], _name(row[0])) for row in rows)
        for direction, rows in gallery.rows.items()
        if rows
    )


def _samples(gallery: Gallery) -> str:
    """The grids that training kept, where there are too few checkpoints to draw others."""
    if not gallery.samples:
        return ""
    figures = "".join(f"<figure><figcaption>{text(s.text)}</figcaption>{_image(s)}</figure>" for s in gallery.samples)
    return f'<h3>Kept by the training</h3><div class="samples">{figures}</div>'


def _cycles(gallery: Gallery) -> str:
    parts = []
    for direction, rows in gallery.cycles.items():
        back = f"{arrow(direction)} → {direction[0]}"
        titles = ("Input", f"Translated, {arrow(direction)}", f"Reconstructed, {back}")
        parts.append(f"<h3>{back}</h3>" + _rows((row, titles, _name(row[0])) for row in rows))
    return "".join(parts)


def _styles(gallery: Gallery) -> str:
    parts = []
    for direction, rows in gallery.styles.items():
        titles = ["Input", *(f"Code {index}" for index in range(len(rows[0]) - 1))]
        parts.append(f"<h3>{arrow(direction)}</h3>" + _rows((row, titles, _name(row[0])) for row in rows))
    return "".join(parts)


def _cases(gallery: Gallery) -> str:
    parts = []
    for direction, measure in gallery.ranked_by.items():
        unit = f" {measure.unit}" if measure.unit else ""
        better = "higher" if measure.better > 0 else "lower"
        parts.append(
            f'<h3>{arrow(direction)} <span class="pale">by {text(measure.title)}, {better} is better</span></h3>'
        )
        for word, cases in (("Worst", gallery.worst), ("Best", gallery.best)):
            found = cases.get(direction, [])
            inner = "".join(_case(case, text(unit)) for case in found)
            parts.append(f'<h4>{word}</h4><div class="cases">{inner}</div>' if found else "")
    mapped = any(shot.text.endswith(", invented") for cases in gallery.worst.values() for shot in cases[0].shots)
    lead = (
        "<p><i>Invented</i>, in orange: what the translation has put in and the way back takes for a part of the scene."
        "</p>"
    )
    return (lead if mapped else "") + "".join(parts)


def _case(case: Case, unit: str) -> str:
    titles = [shot.text.rpartition(", ")[2].capitalize() for shot in case.shots]
    label = f'<p class="case-name"><span class="name">{text(case.name)}</span> <b>{_number(case.value)}{unit}</b></p>'
    return f'<div class="case">{label}{_row(case.shots, titles, case.name)}</div>'


# Measures


def _measures(run: Run) -> str:
    """A table a direction, in groups, with the interval of each value and what it is to be compared with."""
    evaluation = run.evaluation
    if evaluation is None:
        return (
            '<p class="notice">This run has not been measured: <code>cyclegan-fast report --evaluate</code> does that '
            "before it writes the page.</p>"
        )
    stale = ""
    if run.chosen is not None and evaluation.step is not None and evaluation.step != run.chosen.step:
        stale = (
            f'<p class="notice">These measures are of step {evaluation.step:,}; the pictures on this page are of step '
            f"{run.chosen.step:,}. <code>cyclegan-fast report --evaluate</code> measures that one.</p>"
        )
    tables = "".join(
        f"<h3>{arrow(direction)}</h3>{_measure_table(measures)}"
        for direction, measures in evaluation.measures.items()
        if measures
    )
    missing = "".join(f"<li>{text(title)}: {text(why)}</li>" for title, why in evaluation.missing)
    missing = f"<details><summary>Not measured</summary><ul>{missing}</ul></details>" if missing else ""
    return f"{stale}<p>{_measured_on(evaluation)}</p>{tables}{missing}"


def _measured_on(evaluation: Evaluation) -> str:
    data = evaluation.data
    known = [domain for domain in "AB" if isinstance(data.get(f"count_{domain}"), int)]
    counts = " and ".join(f"{data[f'count_{domain}']} of {domain}" for domain in known)
    pairs = ", with the truth to them" if data.get("pairs") is True else ""
    split = "training" if data.get("split") == "train" else "test"
    how = f" ({text(data['preparation'])})" if data.get("preparation") else ""
    return (
        f"Measured on {split} pictures, {counts or 'of both domains'}{pairs}{how}. Each value stands with its 95 % "
        "interval for the choice of the pictures; another training differs by more. <i>Untouched</i>: the same measure "
        "of the inputs themselves. <i>Target</i>: of real pictures of the other domain."
    )


def _measure_table(measures: Sequence[Measure]) -> str:
    body = []
    for group in dict.fromkeys([*_GROUPS, *(measure.group for measure in measures)]):
        found = [measure for measure in measures if measure.group == group]
        if found:
            title = text(_GROUPS.get(group, group))
            body.append(f'<tbody><tr class="group"><th scope="rowgroup" colspan="5">{title}</th></tr>')
            body += [_measure_row(measure) for measure in found]
            body.append("</tbody>")
    return f"""<table class="measures"><thead><tr><th scope="col">Measure</th><th scope="col">Translated</th>
<th scope="col">Untouched</th><th scope="col">Target</th><th scope="col" class="range">
<span class="key-now">translated</span> <span class="key-was">untouched</span> <span class="key-aim">target</span></th>
</tr></thead>{"".join(body)}</table>"""


def _measure_row(measure: Measure) -> str:
    better = {1: "higher is better", -1: "lower is better"}.get(
        measure.better, "to be as the target" * bool(measure.target)
    )
    unit = f" {text(measure.unit)}" if measure.unit else ""
    words = ", ".join(part for part in (text(better), text(measure.note)) if part)
    words = f"<small>{words}</small>" if words else ""
    return (
        f'<tr><th scope="row">{text(measure.title)}{words}</th>'
        f'<td data-label="Translated">{_reading(measure.reading, unit)}{_verdict(measure)}</td>'
        f'<td data-label="Untouched">{_reading(measure.untouched, unit)}</td>'
        f'<td data-label="Target">{_reading(measure.target, unit)}</td>'
        f'<td class="range">{_range(measure)}</td></tr>'
    )


def _reading(reading: Reading | None, unit: str) -> str:
    if reading is None:
        return '<span class="pale">–</span>'
    interval = ""
    if reading.low is not None and reading.high is not None:
        interval = f"<small>{_number(reading.low)} to {_number(reading.high)}</small>"
    return f"<b>{_number(reading.value)}</b>{unit if reading.value is not None else ''}{interval}"


def _verdict(measure: Measure) -> str:
    """Whether the translation is better or worse than the untouched input, as far as the interval tells.

    That of the difference picture by picture where there is one; else the two intervals must not overlap.
    """
    now, was, difference = measure.reading, measure.untouched, measure.difference
    if was is None or not measure.better:
        return ""
    low, high = (difference.low, difference.high) if difference else _apart(now, was)
    if low is None or high is None:
        return ""
    if low <= 0 <= high:
        return '<span class="verdict">no clear difference</span>'
    good = (low > 0) == (measure.better > 0)
    word, kind = ("better", "good") if good else ("worse", "bad")
    return f'<span class="verdict {kind}">{word} than untouched</span>'


def _apart(now: Reading, was: Reading) -> tuple[float | None, float | None]:
    """The least and the greatest difference of what lies within two intervals."""
    if now.low is None or now.high is None or was.low is None or was.high is None:
        return None, None
    return now.low - was.high, now.high - was.low


def _range(measure: Measure) -> str:
    """The values with their intervals on one line, which the table says in words."""
    readings = [("now", measure.reading), ("was", measure.untouched), ("aim", measure.target)]
    known = [(name, reading) for name, reading in readings if reading is not None and reading.value is not None]
    ends = [end for _, each in known for end in (each.value, each.low, each.high) if end is not None]
    if not ends or len(known) < 2:
        return ""
    low, high = min(ends), max(ends)
    span = high - low or 1.0

    def place(value: float) -> str:
        return f"{4 + 92 * (value - low) / span:.1f}%"

    marks = []
    for index, (name, reading) in reversed(list(enumerate(known))):
        y = f"{(index + 1) * 100 / (len(known) + 1):.0f}%"
        if reading.low is not None and reading.high is not None:
            marks.append(
                f'<line class="{name}" x1="{place(reading.low)}" x2="{place(reading.high)}" y1="{y}" y2="{y}"/>'
            )
        if reading.value is not None:
            marks.append(f'<circle class="{name}" cx="{place(reading.value)}" cy="{y}" r="4"/>')
    return f'<svg aria-hidden="true" class="whiskers">{"".join(marks)}</svg>'


# Training


def _curves(records: Sequence[Record]) -> str:
    """Losses as the paper shows them, their terms, the measures taken on the way, learning rate and speed."""
    charts = "".join(chart_html(chart) for chart in _charts(records))
    return f'<div class="charts">{charts}</div>' if charts else ""


def _charts(records: Sequence[Record]) -> Iterator[Chart]:
    losses = [record for record in records if any(curve.terms[0] in record for curve in CURVES)]
    if losses:
        whole = [
            Line(label, curve_values(losses, curve))
            for label, curve in zip(_LABELS, CURVES, strict=True)
            if any(curve.terms[0] in record for record in losses)
        ]
        note = " + ".join(generator_terms(losses))
        yield from _chart(losses, "Generators' losses", [line for line in whole if line.label[0] == "G"], note=note)
        yield from _chart(losses, "Discriminators' losses", [line for line in whole if line.label[0] == "D"])
    terms = {"Cycle terms": ("cycle_A", "cycle_B"), "Identity terms": ("idt_A", "idt_B")}
    for title, names in terms.items():
        yield from _chart(records, title, _lines(records, names), note="weighted, as in the generators' losses")
    for base, found in _test_names(records).items():
        lines = [
            Line(arrow(name[-4:]) if name[-4:] in ("AtoB", "BtoA") else "mean", line.values)
            for name, line in zip(found, _lines(records, found), strict=True)
        ]
        yield from _chart(records, _TESTS.get(base, f"test_{base}"), lines, smooth=False, from_zero=False)
    yield from _chart(records, "Learning rate", _lines(records, ("lr",)), smooth=False)
    yield from _chart(records, "Pairs a second", _lines(records, ("pairs_per_s",)))
    yield from _chart(records, "Gradient norms", _lines(records, ("grad_G", "grad_D")))


def _lines(records: Sequence[Record], names: Iterable[str]) -> list[Line]:
    present = [name for name in names if any(name in record for record in records)]
    return [Line(name, values_of(records, name)) for name in present]


def _test_names(records: Sequence[Record]) -> dict[str, list[str]]:
    """Scalars measured on test pictures by their base: test_psnr_AtoB and test_psnr_BtoA belong to psnr."""
    names = sorted({name for record in records for name in record if name.startswith("test_")})
    bases: dict[str, list[str]] = {}
    for name in names:
        base = name.removeprefix("test_").removesuffix("_AtoB").removesuffix("_BtoA")
        bases.setdefault(base, []).append(name)
    return bases


def _chart(
    records: Sequence[Record],
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    smooth: bool = True,
    from_zero: bool = True,
) -> Iterator[Chart]:
    """A chart of the places where any of the lines was recorded, if there is one with a value."""
    if not lines or not any(np.isfinite(line.values).any() for line in lines):
        return
    names = [np.isfinite(line.values) for line in lines]
    recorded = np.any(names, axis=0) | np.array(
        [
            any(
                value is None or (isinstance(value, float) and not math.isfinite(value))
                for key, value in record.items()
                if key in _LOSSES
            )
            for record in records
        ]
    )
    if not smooth:
        recorded = np.any(names, axis=0)
    x = np.array([record["epoch"] for record in records], dtype=np.float64)[recorded]
    kept = [Line(line.label, line.values[recorded]) for line in lines]
    yield Chart(title, x, kept, note=note, smooth=smooth, from_zero=from_zero)


_LOSSES = {term for curve in CURVES for term in curve.terms}


# Facts


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts if value)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _timing(run: Run) -> str:
    def middle(name: str) -> float | None:
        values = _finite(values_of(run.records, name))
        return float(np.median(values)) if values.size else None

    rate, wait, work, mfu = (middle(name) for name in ("pairs_per_s", "data_wait", "tflops", "mfu"))
    memory = _finite(values_of(run.records, "memory_gb"))
    facts = [
        ("Training", _duration(run.seconds) if run.seconds else ""),
        ("Pairs a second, median", f"{rate:.3g}" if rate else ""),
        ("Waiting for data", f"{100 * wait:.1f} % of the time" if wait is not None else ""),
        ("Arithmetic", f"{work:.3g} TFLOP/s" if work else ""),
        ("Share of the measured matrix rate", f"{100 * mfu:.0f} %" if mfu else ""),
        ("Peak memory", f"{memory.max():.2f} GB" if memory.size else ""),
    ]
    seconds = number(run.evaluation.provenance.get("seconds")) if run.evaluation else None
    facts.append(("Measuring", _duration(seconds) if seconds else ""))
    return _facts(facts)


def _settings(config: Config) -> str:
    """What differs from the defaults, and all settings folded away."""
    own, defaults = _flat(to_dict(config)), _flat(to_dict(Config()))
    changed = [(name, value) for name, value in own.items() if value != defaults.get(name)]
    rows = "".join(
        f'<tr><th scope="row"><code>{text(name).replace(".", ".<wbr>").replace("_", "_<wbr>")}</code></th>'
        f"<td>{text(value)}</td>"
        f'<td class="pale">{text(defaults.get(name))}</td></tr>'
        for name, value in changed
    )
    lines = "\n".join(text(line) for line in to_yaml(config).split("\n"))
    return f"""<table class="settings"><thead><tr><th scope="col">Setting</th><th scope="col">Here</th>
<th scope="col">Default</th></tr></thead><tbody>{rows}</tbody></table>
<details><summary>All settings</summary><pre tabindex="0">{lines}</pre></details>"""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _provenance(run: Run, command: str) -> str:
    """Which files and programs this page comes from."""
    chosen = run.chosen
    trained: Mapping[str, Any] = chosen.provenance if chosen else {}
    facts = [
        (
            "Checkpoint",
            f"{chosen.path.name}, step {chosen.step:,}, {chosen.bytes / 1e6:.1f} MB" if chosen else "none yet",
        ),
        ("Written", _moment(trained.get("time"))),
        ("Trained by", _programs(trained)),
        ("Trained on", ", ".join(str(trained[key]) for key in ("device", "precision") if key in trained)),
        ("Processes", str(trained.get("world_size", ""))),
    ]
    if run.evaluation is not None:
        measured = run.evaluation.provenance
        where = ", ".join(str(measured[key]) for key in ("checkpoint", "device", "precision") if key in measured)
        facts += [("Measured", f"{where}, {_moment(measured.get('time'))}"), ("Measured by", _programs(measured))]
    facts.append(("This page", command))
    return _facts(facts)


def _programs(provenance: Mapping[str, Any]) -> str:
    names = {"version": "cyclegan_fast", "torch": "PyTorch", "python": "Python"}
    return ", ".join(f"{name} {provenance[key]}" for key, name in names.items() if key in provenance)


def _moment(stamp: Any) -> str:
    """A time in seconds, or as it was written."""
    seconds = number(stamp)
    if seconds is not None and 0 < seconds < 1e11:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    return str(stamp) if stamp else ""
