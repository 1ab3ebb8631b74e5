"""The speed figures of a run: their arithmetic, where they are written, and what is said when one is missing."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from cyclegan_fast.models.cost import Work
from cyclegan_fast.roofline import Roofline
from cyclegan_fast.training import monitor as monitor_module
from cyclegan_fast.training.monitor import SCALARS, Monitor

CEILINGS = Roofline("a device", {"bf16": 100e12, "fp32": 20e12}, 2e12, {}, 0)
WORK = Work(flop=4e12, bytes=30e9, kernels=1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [100.0]
    monkeypatch.setattr(monitor_module.time, "perf_counter", lambda: now[0])
    return now


def open_monitor(folder: Path, **options: Any) -> Monitor:
    common = {"tensorboard": False, "progress": False, **options}
    return Monitor(folder, step=0, total_steps=100, steps_per_epoch=10, pairs_per_step=2, **common)


def written(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / SCALARS).read_text().splitlines()]


def test_speed_by_hand(tmp_path: Path, clock: list[float]) -> None:
    """10 steps of 2 pairs in 4 seconds, of which 1 was spent waiting; then 5 steps in 1 second."""
    monitor = open_monitor(tmp_path, work=WORK, roofline=CEILINGS, precision="bf16")
    monitor.waited(0.25)
    monitor.waited(0.75)
    clock[0] += 4
    monitor.write(10, {"G_A": 0.5}, lr=1e-4)
    clock[0] += 1
    monitor.write(15, {"G_A": 0.5}, lr=1e-4)
    monitor.close()
    first, second = written(tmp_path)
    assert (first["pairs_per_s"], first["data_wait"], first["tflops"]) == pytest.approx((5, 0.25, 10))
    assert (first["mfu"], first["bandwidth"]) == pytest.approx((0.1, 0.0375))
    assert (second["pairs_per_s"], second["data_wait"], second["tflops"]) == pytest.approx((10, 0, 20))
    assert (second["mfu"], second["bandwidth"]) == pytest.approx((0.2, 0.075))


def test_the_share_is_of_the_runs_precision(tmp_path: Path, clock: list[float]) -> None:
    monitor = open_monitor(tmp_path, work=WORK, roofline=CEILINGS, precision="fp32")
    clock[0] += 4
    monitor.write(10, {}, lr=1e-4)
    monitor.close()
    assert written(tmp_path)[0]["mfu"] == pytest.approx(0.5)


def test_a_precision_that_was_not_measured_has_no_share(tmp_path: Path, clock: list[float]) -> None:
    monitor = open_monitor(tmp_path, work=WORK, roofline=CEILINGS, precision="fp16")
    clock[0] += 4
    monitor.write(10, {}, lr=1e-4)
    monitor.close()
    record = written(tmp_path)[0]
    assert "mfu" not in record
    assert record["bandwidth"] == pytest.approx(0.0375)


def test_a_device_that_was_never_measured(tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    monitor = open_monitor(tmp_path, work=WORK, precision="bf16")
    for step in (10, 20):
        clock[0] += 4
        monitor.write(step, {}, lr=1e-4)
    monitor.close()
    record = written(tmp_path)[0]
    assert record["tflops"] == pytest.approx(10)
    assert not {"mfu", "bandwidth"} & record.keys()
    assert [message.count("cyclegan-fast doctor --measure") for message in caplog.messages] == [1]


def test_without_work_nothing_is_claimed_or_asked_for(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    monitor = open_monitor(tmp_path)
    clock[0] += 4
    monitor.write(10, {}, lr=1e-4)
    monitor.close()
    record = written(tmp_path)[0]
    assert record["pairs_per_s"] == pytest.approx(5)
    assert not {"tflops", "mfu", "bandwidth"} & record.keys()
    assert caplog.messages == []


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON knows neither NaN nor infinity, and other readers than Python's refuse them."""
    monitor = open_monitor(tmp_path)
    monitor.measured(1, {"test_psnr_AtoB": math.nan, "test_swd_AtoB": math.inf, "test_ssim_AtoB": 0.5})
    monitor.close()

    def refuse(token: str) -> None:
        raise AssertionError(token)

    (line,) = (tmp_path / SCALARS).read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert [record[f"test_{name}_AtoB"] for name in ("psnr", "swd", "ssim")] == [None, None, 0.5]


def test_other_ranks_write_and_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    monitor = open_monitor(tmp_path, work=WORK, active=False)
    monitor.write(10, {"G_A": 0.5}, lr=1e-4)
    monitor.close()
    assert caplog.messages == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_and_the_bar_show_them(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "progress": True}
    monitor = open_monitor(tmp_path, work=WORK, roofline=CEILINGS, precision="bf16", **options)
    monitor.waited(0.04)
    clock[0] += 4
    monitor.write(10, {"G_A": 0.5}, lr=1e-4)
    monitor.close()
    shown = capsys.readouterr().err
    assert "G_A 0.500, 5.0 pairs/s, 10 TFLOP/s, MFU 10 %, bandwidth 4 %, data wait 1 %" in shown
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, value in {"tflops": 10, "mfu": 0.1, "bandwidth": 0.0375, "data_wait": 0.01, "pairs_per_s": 5}.items():
        assert events.Scalars(f"speed/{name}")[-1].value == pytest.approx(value)
