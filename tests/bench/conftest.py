"""The scripts in bench/ import one another by their bare names."""

from __future__ import annotations

import multiprocessing
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))


@pytest.fixture(scope="session")
def bench() -> Path:
    """Folder of the benchmarks."""
    return BENCH


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants' processes come from one that has imported PyTorch, and so start at once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch.profiler", "cyclegan_fast.inference.translate"]
    )
    monkeypatch.setattr("rounds.START_METHOD", "forkserver")


@pytest.fixture
def script(forked: None, monkeypatch: pytest.MonkeyPatch, bench: Path) -> Callable[..., None]:
    """Run a script as its command does, in this process: `script("step.py", "--small")`."""

    def run(name: str, *options: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        terminated = signal.getsignal(signal.SIGTERM)
        ended: object = None
        try:
            runpy.run_path(str(bench / name), run_name="__main__")
        except SystemExit as end:
            ended = end.code
        finally:
            signal.signal(signal.SIGTERM, terminated)
        assert not ended, f"{name} ended with {ended}"

    return run
