"""What a run folder holds: settings, records, checkpoints and measures, each checked before it is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cyclegan_fast.config import Config, load_config
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.records import Record, read_records, values_of
from cyclegan_fast.training.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    find_checkpoint,
    read_checkpoint,
    step_checkpoints,
)

__all__ = ["Checkpoint", "Chosen", "Evaluation", "Measure", "Reading", "Run", "columns", "number", "read_evaluation"]
__all__ += ["read_run"]

EVALUATION = "evaluation.json"
_EVALUATION_BYTES = 64 << 20
_FORMAT = 1
_COLUMNS = 5  # checkpoints in a grid, the one that is reported on among them
_WELL_KNOWN = (1, 10, 50)  # the epochs that the paper shows


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, and after which epoch and step it was written, as far as its name and the records tell."""

    path: Path
    step: int | None
    epoch: float | None

    @property
    def label(self) -> str:
        """The epoch if it is known, else the step."""
        return f"epoch {round(self.epoch, 2):g}" if self.epoch is not None else f"step {self.step:,}"


@dataclass(frozen=True)
class Chosen(Checkpoint):
    """The checkpoint that is reported on, with what it says of itself."""

    step: int
    provenance: Mapping[str, Any]
    pairs_per_step: int
    bytes: int


@dataclass(frozen=True)
class Reading:
    """A value with its interval; each None where it is infinite or undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measure:
    """A measure of one direction; ``better``: 1 when more is better, -1 when less is, 0 when neither.

    ``untouched``: the same of the inputs, ``target``: of real pictures of the target, ``difference``: from untouched,
    picture by picture.
    """

    name: str
    title: str
    group: str
    unit: str
    better: int
    reading: Reading
    untouched: Reading | None
    target: Reading | None
    difference: Reading | None
    note: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluation.json` holds: measures by direction, and of each single picture by its name."""

    provenance: Mapping[str, Any]
    data: Mapping[str, Any]
    measures: Mapping[str, tuple[Measure, ...]]
    pictures: Mapping[str, tuple[tuple[str, Mapping[str, float]], ...]]
    missing: tuple[tuple[str, str], ...]

    @property
    def step(self) -> int | None:
        step = self.provenance.get("step")
        return step if isinstance(step, int) else None


@dataclass(frozen=True)
class Run:
    """A run folder as it is now. ``troubles``: what could not be read, in words, for the page to say."""

    folder: Path
    config: Config
    records: Sequence[Record]
    checkpoints: Sequence[Checkpoint]
    chosen: Chosen | None
    evaluation: Evaluation | None
    troubles: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is known of."""
        recorded = self.records[-1]["step"] if self.records else 0
        return max(recorded, self.chosen.step if self.chosen else 0)

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """Optimiser steps in an epoch, as the records have it."""
        return _steps_per_epoch(self.records)

    @property
    def steps_planned(self) -> int | None:
        """Optimiser steps of the whole run, None when that is not known."""
        training = self.config.training
        if training.steps is not None:
            return training.steps
        return round((training.epochs + training.epochs_decay) * self.steps_per_epoch) if self.steps_per_epoch else None

    @property
    def seconds(self) -> float | None:
        """Time spent training, without what lay between an interruption and its resume.

        A reading's pairs a second are those of the whole time since the one before it, so their sum is that time.
        """
        if self.chosen is None:
            return None
        steps = np.array([record["step"] for record in self.records if "pairs_per_s" in record], dtype=np.float64)
        rates = values_of([record for record in self.records if "pairs_per_s" in record], "pairs_per_s")
        spent = np.diff(steps, prepend=0.0) * self.chosen.pairs_per_step / np.where(rates > 0, rates, np.nan)
        return float(np.nansum(spent)) or None


def read_run(folder: str | Path, which: str = "latest") -> Run:
    """Read a run folder; ``which`` names the checkpoint to report on, as in ``find_checkpoint``.

    Raises InputError when there is no such folder, its settings cannot be read, or it has no checkpoint ``which``
    (but for ``latest``: a run may not have come to its first yet).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    troubles: list[str] = []
    records = _records(folder, troubles)
    chosen = _chosen(folder, which, troubles)
    checkpoints = _earlier(folder, chosen, _steps_per_epoch(records)) if chosen else []
    evaluation = None
    if (folder / EVALUATION).exists():
        try:
            evaluation = read_evaluation(folder / EVALUATION)
        except InputError as error:
            troubles.append(str(error))
    return Run(folder, config, records, checkpoints, chosen, evaluation, troubles)


def columns(run: Run) -> list[Checkpoint]:
    """The checkpoints for a grid, oldest first: the paper's epochs, others spread over the run, the reported one."""
    if run.chosen is None:
        return []
    kept = [checkpoint for checkpoint in run.checkpoints if checkpoint.epoch in _WELL_KNOWN]
    rest = [checkpoint for checkpoint in run.checkpoints if checkpoint not in kept]
    room = min(_COLUMNS - 1 - len(kept), len(rest))
    kept += [rest[index] for index in np.linspace(0, len(rest) - 1, room).round().astype(int).tolist()]
    return [*(checkpoint for checkpoint in run.checkpoints if checkpoint in kept), run.chosen]


def _records(folder: Path, troubles: list[str]) -> list[Record]:
    try:
        return read_records(folder / "scalars.jsonl")
    except InputError as error:
        troubles.append(str(error))
        return []


def _steps_per_epoch(records: Sequence[Record]) -> float | None:
    return records[-1]["step"] / records[-1]["epoch"] if records and records[-1]["epoch"] > 0 else None


def _chosen(folder: Path, which: str, troubles: list[str]) -> Chosen | None:
    """The checkpoint meant; of the latest ones the newest that is whole, or None where there is none yet."""
    candidates = step_checkpoints(folder)[::-1] if which == "latest" else [find_checkpoint(folder, which)]
    for path in candidates:
        try:
            content, size = read_checkpoint(path), path.stat().st_size
        except CheckpointError as error:
            if which != "latest":
                raise
            troubles.append(str(error))
            continue
        position = content["position"]
        step, per_epoch = position["step"], position.get("steps_per_epoch")
        epoch = step / per_epoch if per_epoch else None
        return Chosen(path, step, epoch, content.get("provenance", {}), position.get("pairs_per_step", 1), size)
    return None


def _earlier(folder: Path, chosen: Chosen, steps_per_epoch: float | None) -> list[Checkpoint]:
    """The checkpoints before the chosen one, by the steps of their names, oldest first; milestones come first."""
    found: dict[float, Checkpoint] = {}
    for path in sorted(checkpoint_dir(folder).glob("epoch-*.ckpt")):
        if match := re.fullmatch(r"epoch-(\d{4,9})\.ckpt", path.name):
            epoch = float(match[1])
            step = round(epoch * steps_per_epoch) if steps_per_epoch else None
            found.setdefault(epoch, Checkpoint(path, step, epoch))
    for path in step_checkpoints(folder):
        step = int(path.stem.removeprefix("step-"))
        if steps_per_epoch and step:
            found.setdefault(round(step / steps_per_epoch, 3), Checkpoint(path, step, step / steps_per_epoch))
    before = chosen.epoch if chosen.epoch is not None else float("inf")
    return [found[epoch] for epoch in sorted(found) if epoch < before - 1e-3 and found[epoch].path != chosen.path]


def read_evaluation(path: Path) -> Evaluation:
    """Read an `evaluation.json`. Raises InputError saying what of it is not as it should be."""
    try:
        if path.stat().st_size > _EVALUATION_BYTES:
            raise InputError(f"{path} is larger than {_EVALUATION_BYTES >> 20} MiB: no evaluation is")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not the JSON of an evaluation: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise InputError(f"{path} is not an evaluation of format {_FORMAT}, which `cyclegan-fast evaluate` writes")
    try:
        directions = {key: value for key, value in tree["directions"].items() if key in ("AtoB", "BtoA")}
        return Evaluation(
            provenance=dict(tree["provenance"]),
            data=dict(tree["data"]),
            measures={key: _measures(value["metrics"]) for key, value in directions.items()},
            pictures={key: _pictures(value["pictures"]) for key, value in directions.items()},
            missing=tuple((str(item["title"]), str(item["why"])) for item in tree.get("missing", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a whole evaluation: {type(error).__name__}: {error}") from None


def _measures(tree: Mapping[str, Any]) -> tuple[Measure, ...]:
    return tuple(
        Measure(
            name=str(name),
            title=str(item["title"]),
            group=str(item["group"]),
            unit=str(item.get("unit") or ""),
            better=int(item["better"]),
            reading=_reading(item) or Reading(None, None, None),
            untouched=_reading(item.get("untouched")),
            target=_reading(item.get("target")),
            difference=_reading(item.get("difference")),
            note=str(item.get("note") or ""),
        )
        for name, item in tree.items()
    )


def _reading(tree: Mapping[str, Any] | None) -> Reading | None:
    return None if tree is None else Reading(*(number(tree.get(key)) for key in ("value", "low", "high")))


def _pictures(items: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Mapping[str, float]], ...]:
    """Name and finite measures of each picture."""
    return tuple(
        (
            str(item["name"]),
            {str(key): known for key, value in item.items() if (known := number(value)) is not None},
        )
        for item in items
    )


def number(value: Any) -> float | None:
    """A value as a finite number, or None if it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if known else None
