"""Fixtures of whole runs that take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, write_pictures

from cyclegan_fast.config import Config, load_config


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """trainA (6 pictures), trainB (5), testA and testB (2 each)."""
    root = tmp_path / "data"
    for seed, (split, count) in enumerate({"trainA": 6, "trainB": 5, "testA": 2, "testB": 2}.items()):
        write_pictures(root / split, count, seed)
    return root


@pytest.fixture
def tiny(dataset: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make a configuration of a tiny run: ``tiny("name", "training.lr=1", ...)``."""

    def make(name: str = "run", *overrides: str, **more: Any) -> Config:
        place = (f"name={name}", f"out={tmp_path / 'runs'}", f"data.root={dataset}")
        return load_config(None, [*place, *TINY, *overrides, *(f"{k}={v}" for k, v in more.items())])

    return make
