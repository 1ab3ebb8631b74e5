"""The experiment on same learning: its statistics against known answers, and runs that are cut short and continued."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import same_learning
from same_learning import ARMS, Findings, Task, difference, main, pooled_spread, shown

from cyclegan_fast.training import trainer


def test_differences_have_students_interval() -> None:
    found = difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found is not None
    half = 4.303 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert not found.clear
    clear = difference([1.0, 1.01], [0.0, 0.0])
    assert clear is not None
    assert clear.clear
    assert difference([1.0], [0.0]) is None


def test_the_spread_is_that_within_arms() -> None:
    assert pooled_spread([[0.0, 2.0], [10.0, 14.0]]) == pytest.approx(math.sqrt((2 + 8) / 2))
    assert pooled_spread([[1.0], [2.0]]) is None


def findings(values: dict[str, list[float]]) -> Findings:
    """Records in which all measures of a run have one value."""
    experiment = object.__new__(same_learning.Experiment)
    experiment.records = {
        (arm, seed): {d: {"measures": {"psnr": value, "swd": value}, "each": {}} for d in same_learning.DIRECTIONS}
        for arm, seeds in values.items()
        for seed, value in enumerate(seeds)
    }
    return Findings(experiment)


def test_only_clear_losses_are_losses() -> None:
    """More PSNR is better and more SWD is worse: a change by 3 with a spread of 1 is a loss in one of them."""
    reference = [20.0, 21.0, 22.0]
    assert findings({ARMS[0].name: reference, ARMS[2].name: [19.5, 21.5, 22.1]}).losses() == []
    assert findings({ARMS[0].name: reference, ARMS[2].name: [26.0, 21.0, 24.0]}).losses() == []  # wide interval
    worse = findings({ARMS[0].name: reference, ARMS[2].name: [17.0, 18.1, 19.0]}).losses()
    assert worse == [f"fused fp32, {words}, PSNR, dB" for words in same_learning.DIRECTIONS.values()]
    more = findings({ARMS[0].name: reference, ARMS[2].name: [23.0, 24.1, 25.0]}).losses()
    assert more == [f"fused fp32, {words}, SWD × 1000" for words in same_learning.DIRECTIONS.values()]


def test_numbers_are_shown_in_their_unit() -> None:
    assert shown(0.03567, "swd") == "35.7"
    assert shown(-0.001, "psnr", sign=True) == "+0.00"
    assert shown(None, "psnr") == ""


def test_arms_differ_in_what_they_say(tmp_path: Path) -> None:
    configs = [Task().config(arm, 1, tmp_path) for arm in ARMS]
    assert len({config.name for config in configs}) == len(ARMS)
    assert [config.training.impl for config in configs[:4]] == ["reference", "reference", "fused", "fused"]
    assert [config.training.precision for config in configs[:4]] == ["fp32", "fp32", "fp32", "bf16"]
    assert not ARMS[0].batched
    assert not ARMS[1].batched
    assert len({(c.seed, c.data, c.model, c.loss, c.training.steps, c.training.lr) for c in configs}) == 1


def small(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    out, markdown = folder / "out.json", folder / "out.md"
    arms = "reference;fused fp32"
    status = main(
        ["--small", "--work", str(folder), "--out", str(out), "--markdown", str(markdown), "--arms", arms, *more]
    )
    return status, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.slow
def test_a_run_cut_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small(tmp_path / "cut", "--seeds", "1", "--seconds", "0") == (3, {})

    step, calls = trainer.train_step, 0

    def interrupted_step(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second of the second arm's four steps
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", interrupted_step)
    status, content = small(tmp_path / "cut", "--seeds", "1")
    assert status == 3
    assert [run["arm"] for run in content["runs"]] == ["reference"]
    status, content = small(tmp_path / "cut", "--seeds", "1")
    assert status == 0
    assert calls == 8
    again = small(tmp_path / "cut", "--seeds", "1")[1]
    assert calls == 8
    assert again["runs"] == content["runs"]
    straight = small(tmp_path / "straight", "--seeds", "2", "--figure", str(tmp_path / "figure.png"))[1]
    for mine, theirs in zip(content["runs"], straight["runs"], strict=False):
        assert (mine["arm"], mine["seed"], mine["AtoB"]) == (theirs["arm"], theirs["seed"], theirs["AtoB"])
    assert {(run["arm"], run["seed"]) for run in straight["runs"]} == {
        (arm, seed) for arm in ("reference", "fused fp32") for seed in (0, 1)
    }
    assert all(row["over_seeds"] for row in straight["differences"])
    assert straight["baselines"]["AtoB"]["input, untouched"]["psnr"] > 5
    page = (tmp_path / "straight" / "out.md").read_text()
    assert "| fused fp32 | 2 |" in page
    assert "## DSLR to phone" in page
    assert (tmp_path / "figure.png").stat().st_size > 1000
    monkeypatch.setattr(same_learning, "ARMS", [ARMS[0], replace(ARMS[2], settings=("training.lr=1e-3",))])
    with pytest.raises(ValueError, match="is of a run with other settings"):
        small(tmp_path / "straight", "--seeds", "1")
