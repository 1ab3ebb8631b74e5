"""The scripts in bench/ import one another by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))


@pytest.fixture(scope="session")
def bench() -> Path:
    """Folder of the benchmarks."""
    return BENCH
