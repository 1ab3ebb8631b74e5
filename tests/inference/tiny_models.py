"""Small generators, runs that hold them, and pictures, shared by the tests of translation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cyclegan_fast.config import from_dict, to_dict
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import milestone_path, step_path, write_checkpoint


def make_generators(
    channels_A: int = 3, channels_B: int = 3, seed: int = 0
) -> tuple[dict, torch.nn.Module, torch.nn.Module]:
    # A gain well above the usual one: with a network this small, outputs would all be nearly gray otherwise.
    model = {"ngf": 4, "blocks": 1, "init_gain": 0.3, "channels_A": channels_A, "channels_B": channels_B}
    config = from_dict({"model": model, "loss": {"identity": 0}})
    torch.manual_seed(seed)
    G_A, G_B = build_generators(config.model)
    return to_dict(config), G_A.eval(), G_B.eval()


def save_run(run: Path, channels_A: int = 3, channels_B: int = 3) -> Path:
    for path, seed in ((step_path(run, 7), 0), (milestone_path(run, 3), 1)):
        config, G_A, G_B = make_generators(channels_A, channels_B, seed)
        position = {"step": 7, "epoch": 3}
        content = {"config": config, "G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "position": position}
        write_checkpoint(path, content)
    return run


def translator(channels_A: int = 3, channels_B: int = 3, precision: str = "fp32") -> Translator:
    _, G_A, G_B = make_generators(channels_A, channels_B)
    channels = {"channels_A": channels_A, "channels_B": channels_B}
    return Translator(G_A, G_B, **channels, device="cpu", precision=precision)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(path: Path, width: int = 20, height: int = 12, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed=seed)).save(path)
    return path
