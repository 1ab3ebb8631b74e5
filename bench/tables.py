"""The tables of the benchmarks whose contestants take turns: ratios, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from provenance import as_text
from rounds import Result

Cell = Callable[[Result], str]
Column = tuple[str, Cell]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, empty for None; never in powers of ten."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share in per cent; empty for None."""
    return "" if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def per_second(flop: float | None, result: Result) -> float | None:
    """FLOP/s of a call of so much arithmetic."""
    return None if flop is None or result.ms is None else 1e3 * flop / result.ms


@dataclass(frozen=True)
class Baseline:
    """What others are compared with: the fastest of the results that `counts` picks."""

    title: str
    counts: Callable[[Result], bool]

    def ms(self, results: Sequence[Result]) -> float | None:
        """Its time, None if none of them was measured."""
        times = [result.ms for result in results if result.ms is not None and self.counts(result)]
        return min(times, default=None)

    def column(self, results: Sequence[Result]) -> Column:
        """How many times faster than it each result is."""
        base = self.ms(results)
        return f"× {self.title}", lambda result: f"{base / result.ms:.2f}" if base and result.ms else ""


def common_columns() -> list[Column]:
    """Name, time, spread and rounds."""
    return [
        ("contestant", lambda result: result.name),
        ("ms", lambda result: number(result.ms, 4)),
        ("± %", lambda result: "" if result.spread is None else f"{100 * result.spread:.1f}"),
        ("rounds", lambda result: str(len(result.seconds))),
    ]


def rate_columns(flop: float | None, rates: dict[str, float]) -> list[Column]:
    """Arithmetic a second, and what share that is of a large matrix product's, measured in the same run."""

    def share(result: Result) -> str:
        speed, rate = per_second(flop, result), rates.get(result.precision)
        return percent(speed / rate) if speed and rate else ""

    def speed(result: Result) -> str:
        achieved = per_second(flop, result)
        return number(achieved / 1e12) if achieved else ""

    return [("TFLOP/s", speed), ("of matrix rate", share)]


def profile_columns(on_gpu: bool) -> list[Column]:
    """Memory, kernels or operators, and on the CPU the share of time in copies."""
    columns: list[Column] = [
        ("GiB", lambda result: number(result.peak_gib)),
        ("kernels" if on_gpu else "operators", lambda result: str(result.profile.kernels) if result.profile else ""),
    ]
    if not on_gpu:
        columns.append(("aten::copy_", lambda result: percent(result.profile.copy_share) if result.profile else ""))
    return columns


def markdown_table(columns: Sequence[Column], results: Sequence[Result]) -> list[str]:
    """Measured results in a table, fastest first, and the others with their reason below."""
    lines = [f"| {' | '.join(title for title, _ in columns)} |", "|---" * len(columns) + "|"]
    measured = sorted((result for result in results if result.ms is not None), key=lambda result: result.ms or 0.0)
    lines += [f"| {' | '.join(cell(result) for _, cell in columns)} |" for result in measured]
    failed = [f"* {result.name}: {result.error}" for result in results if result.ms is None]
    return [*lines, *(["", *failed] if failed else [])]


def profile_table(result: Result) -> list[str]:
    """Where the time of one call goes."""
    if result.profile is None:
        return []
    lines = ["| operation | calls | ms | share |", "|---|---|---|---|"]
    # Templates of C++ carry bars and run to hundreds of characters.
    for name, calls, ms, share in result.profile.top:
        lines.append(f"| `{name[:100].replace('|', '/')}` | {calls} | {number(ms)} | {percent(share)} |")
    return lines


@dataclass(frozen=True)
class Section:
    """The results of one task: what stands above its table, what its JSON says beside the rows, and the columns."""

    title: str
    facts: dict[str, Any]
    columns: Sequence[Column]
    results: Sequence[Result]
    call: str  # above the profile of the first of ours that has one: "A step of", "A translation by"

    def as_json(self) -> dict[str, Any]:
        return {**self.facts, "rows": [as_json(result) for result in self.results]}

    def table(self) -> list[str]:
        """Markdown, with its heading."""
        return [f"## {self.title}", "", *markdown_table(self.columns, self.results), ""]

    def profile(self) -> list[str]:
        """Where the time of ours goes, in Markdown; empty where there is no profile."""
        for result in self.results:
            if result.role == "ours" and result.profile is not None:
                return [f"## {self.call} {result.name}, {self.title.lower()}", "", *profile_table(result), ""]
        return []


def as_json(result: Result) -> dict[str, Any]:
    """Everything that was measured, and what follows from it."""
    return {**asdict(result), "ms": result.ms, "spread": result.spread}


def write(path: Path | None, text: str) -> None:
    """Write a file whole, if there is one to write, with the folders it needs."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def report(
    explanation: str,
    rates: str,
    sections: Sequence[Section],
    content: dict[str, Any],
    out: Path | None,
    markdown: Path | None,
) -> str:
    """Write `content` and the tables; `rates` says what the machine reached in this run. Returns the tables' text."""
    lines = [explanation, ""]
    if rates:
        lines += [f"Measured in this run: {rates}.", ""]
    lines += [line for section in sections for line in section.table()]
    lines += [line for section in sections for line in section.profile()]
    write_both(out, markdown, content, lines)
    return "\n".join(lines)


def write_both(out: Path | None, markdown: Path | None, content: dict[str, Any], lines: Sequence[str]) -> None:
    """The JSON and, below title and provenance, the Markdown."""
    write(out, json.dumps(content, indent=1))
    title = content["title"]
    write(markdown, "\n".join([f"# {title}", "", as_text(content["provenance"]), "", *lines]) + "\n")
