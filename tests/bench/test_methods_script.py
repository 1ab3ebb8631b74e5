"""bench/methods.py: the grades are read from pictures, and a run of each method is measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cyclegan_fast.config import load_config
from cyclegan_fast.data import synthetic
from cyclegan_fast.training.trainer import train

SMALL = (
    *("data.source=synthetic", "data.synthetic_train=2", "data.synthetic_test=4", "data.synthetic_size=32"),
    *("data.load_size=32", "data.crop_size=24", "data.workers=1", "model.ngf=4", "model.ndf=4", "model.blocks=1"),
    *("model.latent=2", "training.steps=2", "training.device=cpu", "training.threads=1", "training.precision=fp32"),
    *("monitor.tensorboard=false", "monitor.progress=false", "monitor.log_every=1", "monitor.samples=1"),
)


@pytest.fixture
def methods(bench: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(bench))
    return importlib.import_module("methods")


def trained(tmp_path: Path, name: str, *overrides: str) -> Path:
    place = (f"name={name}", f"out={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}")
    return train(load_config(None, [*SMALL, *place, *overrides]))


def test_grades_are_read_from_the_mean_colour(methods: Any) -> None:
    known = methods.shifts(4)
    assert np.allclose(np.linalg.norm(known, axis=1), 28, atol=1)
    for index in range(6):
        _, plain, _ = synthetic.render_pair(1, index, 48)
        for style in range(4):
            moved = methods.chroma(synthetic.graded(plain, style, 4)) - methods.chroma(plain)
            assert int(np.linalg.norm(known - moved, axis=1).argmin()) == style


def test_a_run_of_each_method_is_measured(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ("model.method=pix2pix", "data.pairing=aligned", f"data.root={tmp_path / 'pairs'}")
    graded = ("data.synthetic_styles=3", f"data.root={tmp_path / 'graded'}")
    runs = {
        "pix2pix": [trained(tmp_path, "pix2pix", *pairs)],
        "augmented": [
            *(trained(tmp_path, "augmented", "model.method=augmented", *graded), "--baseline"),
            trained(tmp_path, "cyclegan", *graded),
        ],
    }
    found = {}
    for kind, arguments in runs.items():
        out, image = tmp_path / f"{kind}.json", tmp_path / f"{kind}.jpg"
        monkeypatch.setattr(
            sys, "argv", ["methods.py", kind, *map(str, arguments), "--out", str(out), "--grid", str(image)]
        )
        assert methods.main() == 0
        found[kind] = json.loads(out.read_text())
        with Image.open(image) as picture:
            assert picture.width > 200
        assert "| measure | value |" in capsys.readouterr().out
    assert found["pix2pix"]["untouched"]["psnr"] > found["pix2pix"]["translated"]["psnr"] > 3  # after two steps
    augmented = found["augmented"]
    assert sum(augmented["grades_found"]) == 4 * methods.SEEDS
    assert augmented["diversity_one_seed"] == 0
    assert augmented["diversity"] > 0
    assert augmented["diversity_of_the_grades"] > 15
    assert min(augmented["swd"], augmented["swd_untouched"], augmented["swd_baseline"]) > 0
