"""A tiny data set and a tiny configuration: whole runs in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cyclegan_fast.config import Config, load_config

TINY = (
    "data.load_size=36",
    "data.crop_size=32",
    "data.workers=1",
    "model.ngf=4",
    "model.ndf=4",
    "model.blocks=1",
    "model.discriminator_layers=1",
    "training.epochs=50",
    "training.epochs_decay=0",
    "training.pool_size=3",
    "training.precision=fp32",
    "training.device=cpu",
    "training.threads=1",
    "checkpoint.every_epochs=0",
    "monitor.log_every=2",
    "monitor.images_every=0",
    "monitor.samples=1",
    "monitor.progress=false",
    "monitor.tensorboard=false",
)


def write_pictures(folder: Path, count: int, seed: int, size: tuple[int, int] = (40, 40)) -> None:
    """Smooth random colour pictures, ``size`` as (width, height)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")


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
