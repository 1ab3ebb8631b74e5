"""Run folders for the report's tests: tiny networks that were never trained, records and measures made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cyclegan_fast.config import Config, from_dict, to_dict, to_yaml
from cyclegan_fast.models import build_augmented, build_generators
from cyclegan_fast.training.checkpoint import milestone_path, step_path, write_checkpoint

STEPS_PER_EPOCH = 10
NAMES = ("one.jpg", "two.jpg", "three.jpg", "four.jpg", "five.jpg", "six.jpg")


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    """A smooth random picture, ``size`` as (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def data_set(root: Path, splits: tuple[str, ...] = ("testA", "testB", "truthA", "truthB")) -> Path:
    for split in splits:
        for seed, name in enumerate(NAMES):
            picture(root / split / name, seed=seed + 100 * ("B" in split))
    return root


def settings(folder: Path, **sections: Any) -> Config:
    model = {"ngf": 4, "ndf": 4, "blocks": 1, "init_gain": 0.3, **sections.pop("model", {})}
    data = {"root": str(folder / "data"), "load_size": 40, "crop_size": 32, "workers": 1, **sections.pop("data", {})}
    training = {"epochs": 3, "epochs_decay": 0}
    return from_dict(
        {"name": "run", "out": str(folder), "model": model, "data": data, "training": training, **sections}
    )


def save(run: Path, config: Config, path: Path, step: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    if config.model.method == "augmented":
        networks = build_augmented(config.model)
        weights = {name: networks[name].state_dict() for name in ("G_A", "G_B", "E_A", "E_B")}
    else:
        weights = {
            f"G_{domain}": G.state_dict() for domain, G in zip("AB", build_generators(config.model), strict=True)
        }
    if config.model.method == "pix2pix":
        del weights["G_B" if config.model.direction == "AtoB" else "G_A"]
    position = {"step": step, "epoch": step / STEPS_PER_EPOCH, "steps_per_epoch": STEPS_PER_EPOCH, "pairs_per_step": 1}
    provenance = {"version": "0.1.0", "torch": "2.13.0", "python": "3.11", "device": "cpu", "precision": "fp32"}
    content = {"config": to_dict(config), **weights, "position": position, "provenance": {**provenance, "time": 1.7e9}}
    write_checkpoint(path, content)


def records(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / STEPS_PER_EPOCH,
            "time": 1e9 + step,
            "lr": 2e-4,
            "pairs_per_s": 5.0,
            "G_A": 0.5,
            "G_B": 0.4,
            "cycle_A": 2.0 / step,
            "cycle_B": 2.0,
            "idt_A": 1.0,
            "idt_B": 1.0,
            "D_A": 0.25,
            "D_B": 0.3,
            "grad_G": 1.0,
            "grad_D": 2.0,
            "data_wait": 0.01,
            "memory_gb": 0.5,
        }
        for step in range(1, steps + 1)
    ] + [{"step": steps, "epoch": steps / STEPS_PER_EPOCH, "test_psnr_AtoB": 20.0, "test_psnr_BtoA": 19.0}]


def make_run(folder: Path, *, steps: int = 30, milestones: tuple[int, ...] = (1, 2), **sections: Any) -> Path:
    """A run of 3 epochs of 10 steps, with its latest checkpoint at ``steps``; settings by section."""
    config = settings(folder, **sections)
    run = config.run_dir
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "scalars.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(steps)))
    for epoch in milestones:
        save(run, config, milestone_path(run, epoch), epoch * STEPS_PER_EPOCH, seed=epoch)
    if steps:
        save(run, config, step_path(run, steps), steps, seed=9)
    return run


def measure(value: float | None, *, group: str = "truth", better: int = 1, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.5, value + 0.5)
    reading = {"value": value, "low": low, "high": high}
    return {"title": "PSNR", "group": group, "unit": "dB", "better": better, "note": "", **reading, **more}


def evaluation(step: int = 30, **changes: Any) -> dict[str, Any]:
    """As `cyclegan-fast evaluate` writes it, of both directions."""
    untouched = {"value": 17.0, "low": 16.5, "high": 17.5}
    metrics = {
        "psnr": measure(20.0, untouched=untouched, target=None),
        "swd": measure(
            30.0, group="set", better=-1, title="Sliced Wasserstein distance", untouched=untouched, target=untouched
        ),
        "hallucination": measure(None, group="artefact", better=-1, title="Hallucination", untouched=None, target=None),
    }
    pictures = [{"name": name, "psnr": 10.0 + index, "hallucination": None} for index, name in enumerate(NAMES)]
    direction = {"metrics": metrics, "pictures": pictures}
    return {
        "format": 1,
        "provenance": {
            "version": "0.1.0",
            "torch": "2.13.0",
            "device": "cpu",
            "precision": "fp32",
            "seconds": 12.5,
            "checkpoint": f"step-{step:08d}.ckpt",
            "step": step,
            "epoch": step / STEPS_PER_EPOCH,
            "time": 1.7e9,
        },
        "data": {"root": "data", "split": "test", "count_A": 6, "count_B": 6, "pairs": True, "size": [30, 40]},
        "directions": {"AtoB": direction, "BtoA": direction},
        "missing": [{"metric": "fid", "title": "FID", "why": "no weights"}],
        **changes,
    }


def measured(run: Path, **changes: Any) -> Path:
    (run / "evaluation.json").write_text(json.dumps(evaluation(**changes)), encoding="utf-8")
    return run
