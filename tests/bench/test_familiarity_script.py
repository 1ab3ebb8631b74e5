"""bench/familiarity.py runs on any two folders: what it writes has what the document needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def write(folder: Path, count: int, seed: int, high: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, high, (5, 5, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


def test_it_tells_dark_pictures_from_others(bench: Path, tmp_path: Path) -> None:
    folders = [write(tmp_path / name, 24, seed, 256) for seed, name in enumerate(("train", "test"))]
    dark = write(tmp_path / "others" / "dark", 5, 2, 20)
    out, page = tmp_path / "a.json", tmp_path / "a.md"
    command = [sys.executable, bench / "familiarity.py", dark, "--case", "blotches", *folders]
    subprocess.run([*command, "--out", out, "--markdown", page], check=True, capture_output=True, timeout=280)
    content = json.loads(out.read_text())
    assert content["provenance"]["torch"]
    (section,) = content["sections"]
    assert (section["training"], section["test"], section["held_out"]) == (24, 24, "test")
    assert 5_000 < section["state_bytes"] < 25_000
    rows = {row["pictures"]: row for row in section["rows"]}
    assert rows["others/dark"] == {"pictures": "others/dark", "n": 5, "auc": 1.0, "flagged": 1.0}
    assert rows["test, calibrated with the other half"]["flagged"] < 0.2
    assert "| others/dark | 5 | 100.0 % | 1.00 |" in page.read_text()
