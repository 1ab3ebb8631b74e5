"""bench/quality.py: levels and paired differences of evaluations with known values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from quality import COLUMNS, Evaluations

KINDS = {"untouched": {"value": 15.0}, "target": None}


def evaluation(psnr: float, pictures: list[float]) -> dict[str, Any]:
    """Of both directions, with PSNR and, undefined, SSIM."""
    each = {
        "metrics": {
            "psnr": {"value": psnr, "low": psnr - 1, "high": psnr + 2, **KINDS},
            "ssim": {"value": None, "low": None, "high": None, **KINDS},
        },
        "pictures": [{"name": f"{i}.png", "psnr": value} for i, value in enumerate(pictures)],
    }
    return {"provenance": {"step": 2}, "directions": {"AtoB": each, "BtoA": each}}


def test_differences_are_those_of_runs_of_one_seed() -> None:
    values = {("a", 0): 10.0, ("a", 1): 20.0, ("b", 0): 11.0, ("b", 1): 23.0, ("b", 2): 99.0}
    evaluations = Evaluations({key: evaluation(value, []) for key, value in values.items()})
    change = evaluations.against("b", "a", "AtoB", "psnr")
    assert change is not None
    assert change.mean == 2
    assert change.high - change.mean == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert evaluations.names("AtoB") == ["psnr"]
    table = evaluations.differences_table("AtoB", {"b": "a", "absent": "a"})
    assert table[2:] == ["| b, less a | +2.00 (-10.71 to +14.71) |"]
    levels = evaluations.levels_table("AtoB", {"memory": {"a": "1 GB"}})
    assert "| input, untouched |  | 15.00 |  |" in levels
    assert "| a | 2 | 15.00 ± 7.07 | 1 GB |" in levels


def test_with_one_seed_the_pictures_are_the_sample() -> None:
    evaluations = Evaluations({("a", 0): evaluation(10.0, [1, 2, 3, 4]), ("b", 0): evaluation(12.0, [2, 3, 4, 5.0])})
    change = evaluations.against("b", "a", "AtoB", "psnr")
    assert change is not None
    assert (change.mean, change.low, change.high) == (1, 1, 1)
    assert evaluations.differences_table("AtoB", {"b": "a"})[2] == "| b, less a | **+1.00 (+1.00 to +1.00)** |"
    assert "| a | 1 | 10.00 (9.00 to 12.00) |" in evaluations.levels_table("AtoB")
    assert evaluations.as_json({"b": "a"})["differences"][0]["mean"] == 1


def test_numbers_are_shown_in_their_unit() -> None:
    assert COLUMNS["swd"].shown(0.03567) == "35.7"
    assert COLUMNS["psnr"].shown(-0.001, sign=True) == "+0.00"
    assert COLUMNS["psnr"].shown(None) == ""
    assert COLUMNS["psnr"].interval({"value": None, "low": None, "high": None}) == ""


def test_arms_of_other_inputs_are_not_compared() -> None:
    other = evaluation(12.0, [2.0, 3.0])
    other["directions"]["AtoB"]["metrics"]["psnr"]["untouched"] = {"value": 14.0}
    evaluations = Evaluations({("a", 0): evaluation(10.0, [1.0, 2.0]), ("b", 0): other})
    levels = evaluations.levels_table("AtoB")
    assert "| input, untouched, as prepared for a |  | 15.00 |" in levels
    assert "| input, untouched, as prepared for b |  | 14.00 |" in levels
    assert len(evaluations.differences_table("AtoB", {"b": "a"})) == 2  # the heading alone
    assert evaluations.as_json({"b": "a"})["differences"] == []
