"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two cores are shared by the test processes; one thread each is faster than two that wait for one another, and
# makes reductions repeatable whatever the machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_PHOTOS = Path(os.environ.get("CYCLEGAN_FAST_PHOTOS", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """Folder of real photographs for the tests that read some; without it they are skipped."""
    if not REAL_PHOTOS.is_dir():
        pytest.skip("no real photographs here; set CYCLEGAN_FAST_PHOTOS to a folder of them")
    return REAL_PHOTOS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("CYCLEGAN_FAST_CACHE", str(tmp_path / "cache"))
