"""A tiny data set and the settings of runs that take a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

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
    "monitor.metrics_samples=0",
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
