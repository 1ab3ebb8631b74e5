"""Contestants take turns in processes of their own, and what happens to one does not matter to the others."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import pytest
import tables
from rounds import Contestant, Field, NotHereError, Profile, Result, profile, turn, warm_up


def sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def absent() -> Callable[[], None]:
    raise NotHereError("something is not installed")


def broken() -> Callable[[], None]:
    raise ValueError("broken\nat length")


def dying() -> Callable[[], None]:
    os._exit(7)


def failing_later() -> Callable[[], None]:
    calls = iter(range(6))

    def call() -> None:
        time.sleep(0.01)
        if next(calls) == 5:
            raise RuntimeError("enough")

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_good_are_measured_and_the_others_noted() -> None:
    contestants = [
        Contestant("quick", functools.partial(sleeper, 0.02), "ours"),
        Contestant("absent", absent),
        Contestant("broken", broken),
        Contestant("dying", dying),
        Contestant("failing later", failing_later),
        Contestant("slow", functools.partial(sleeper, 0.06), "a"),
        Contestant("late", functools.partial(sleeper, 0.02), needs=1e6),
    ]
    with Field(time.monotonic() + 240) as field:
        field.enter(contestants)
        field.run(30, rounds=3, least=0.0)
        results = {result.name: result for result in field.results}
    assert list(results) == [contestant.name for contestant in contestants]
    for name, ms in (("quick", 20), ("slow", 60)):
        result = results[name]
        assert result.error == ""
        assert len(result.seconds) == 3
        assert result.ms is not None
        assert ms <= result.ms < 2 * ms
        assert result.peak_gib is not None
        assert result.profile is not None
    assert results["absent"].error == "something is not installed"
    assert results["broken"].error == "ValueError: broken"
    assert results["dying"].error == "its process ended with status 7"
    assert results["failing later"].error == "RuntimeError: enough"
    assert results["late"].error == "not run: out of time"
    table = "\n".join(tables.markdown_table(tables.common_columns(), field.results))
    assert table.index("| quick |") < table.index("| slow |")
    assert "* broken: ValueError: broken" in table
    slow = tables.Baseline("slow", lambda result: result.role == "a").column(field.results)
    assert 2 < float(slow[1](results["quick"])) < 4


@pytest.mark.slow
def test_who_builds_for_ever_is_stopped() -> None:
    start = time.monotonic()
    with Field(start + 100) as field:
        field.enter([Contestant("endless", functools.partial(time.sleep, 1000))], patience=1.0)
        field.run(1.0)
    assert [result.error for result in field.results] == ["stopped: out of time"]
    assert time.monotonic() - start < 30


def test_median_and_spread() -> None:
    assert Result("none").ms is None
    assert Result("none").spread is None
    assert Result("one", seconds=[0.5]).spread is None
    three = Result("three", seconds=[0.9, 1.0, 1.2])
    assert three.ms == 1000
    assert three.spread == pytest.approx(0.15)
    many = Result("many", seconds=[1.0, 1.0, 1.0, 1.1, 0.9, 1.0, 1.0, 9.0])
    assert many.spread == pytest.approx(0.0375)  # one outlier does not count


def test_a_long_call_is_made_no_oftener_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rounds._LONG", 0.01)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.02)

    seconds, _ = warm_up(call, None)
    assert seconds >= 0.02
    assert len(calls) == 2
    assert turn(call, 3) >= 0.02
    assert len(calls) == 5


def test_profile_counts_operators_that_call_no_other() -> None:
    import torch

    x = torch.rand(64, 64)
    found: Profile = profile(lambda: x.t().contiguous().add_(1))
    names = {name for name, *_ in found.top}
    assert {"aten::copy_", "aten::add_"} <= names
    assert "aten::contiguous" not in {name for name, calls, *_ in found.top if calls > 1}
    assert 3 <= found.kernels <= 8  # as_strided, empty, copy_, add_ at least; t, transpose and clone call others
    assert 0 < found.copy_share < 1
    assert sum(share for *_, share in found.top) <= 1.001
