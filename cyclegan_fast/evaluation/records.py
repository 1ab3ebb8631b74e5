"""What a run recorded of its steps, `scalars.jsonl`, and the losses of the four networks that it adds up to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cyclegan_fast.errors import InputError

__all__ = ["CURVES", "Curve", "curve_values", "generator_terms", "loss_records", "read_records", "running_mean"]
__all__ += ["values_of"]

Floats = npt.NDArray[np.float64]
Record = dict[str, Any]

_MOST = 1e30  # beyond which a number is none: no loss, no step


@dataclass(frozen=True)
class Curve:
    """The loss of a network: its name for matplotlib, its colour, and the recorded terms that it is the sum of."""

    label: str
    color: str
    terms: tuple[str, ...]


# The colours are told apart by the colour-blind too (Okabe and Ito).
CURVES = (
    Curve(r"$G_A$  ($G$: A → B)", "#0072B2", ("G_A", "cycle_B", "idt_A", "L1_A")),
    Curve(r"$G_B$  ($F$: B → A)", "#D55E00", ("G_B", "cycle_A", "idt_B", "L1_B")),
    Curve(r"$D_A$  ($D_Y$: judges B)", "#0072B2", ("D_A",)),
    Curve(r"$D_B$  ($D_X$: judges A)", "#D55E00", ("D_B",)),
)


def read_records(path: Path) -> list[Record]:
    """All records, one a step, by step.

    Where a resumed run wrote steps again, the later lines count; lines that are cut off are passed over. Raises
    InputError when the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the scalars {path}: {error.strerror}") from None
    by_step: dict[int, Record] = {}
    last = -1
    for line in lines:
        record = _parse(line)
        if record is None:
            continue
        step = record["step"]
        if step < last:  # resumed from an earlier step: what came after it is not part of the run any more
            by_step = {known: value for known, value in by_step.items() if known <= step}
        by_step[step] = {**by_step.get(step, {}), **record}
        last = step
    return [by_step[step] for step in sorted(by_step)]


def loss_records(path: Path) -> list[Record]:
    """The records with losses of a network. Raises InputError, also when there are none."""
    names = {curve.terms[0] for curve in CURVES}
    records = [record for record in read_records(path) if names & record.keys()]
    if not records:
        raise InputError(
            f"{path} holds no losses: it needs lines of JSON with step, epoch and {', '.join(sorted(names))}"
        )
    return records


def _parse(line: str) -> Record | None:
    """One line as a record, or None for a line that is cut off or something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or not 0 <= record["step"] < _MOST:
        return None
    epoch = record.get("epoch")
    return record if isinstance(epoch, (int, float)) and 0 <= epoch < _MOST else None


def values_of(records: Sequence[Record], name: str) -> Floats:
    """One scalar [records]; NaN where it is missing, null, infinite or no number."""
    found = [record.get(name) for record in records]
    known = [isinstance(value, (int, float)) and abs(value) < _MOST for value in found]
    return np.array([value if is_known else np.nan for value, is_known in zip(found, known, strict=True)], np.float64)


def curve_values(records: Sequence[Record], curve: Curve) -> Floats:
    """Sum of a curve's terms [records]; NaN where the first is missing or any is null."""
    total = values_of(records, curve.terms[0])
    for name in curve.terms[1:]:
        total = total + np.where([name in record for record in records], values_of(records, name), 0.0)
    return total


def running_mean(values: Floats, window: int) -> Floats:
    """Mean of each value and ``window // 2`` on either side, fewer at the ends; what is not finite stays a gap."""
    half = window // 2
    inside = slice(half, half + len(values))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), np.ones(2 * half + 1))[inside]
    count = np.convolve(finite.astype(np.float64), np.ones(2 * half + 1))[inside]
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def generator_terms(records: Sequence[Record]) -> list[str]:
    """Which terms the generators' losses have in this run, in words."""
    names = {"cycle_A": "cycle", "idt_A": "identity", "L1_A": "L1", "L1_B": "L1"}
    return ["adversarial", *(word for key, word in names.items() if any(key in record for record in records))]
