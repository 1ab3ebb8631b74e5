"""bench/options.py runs at toy size, and its tables hold what docs/options.md reads from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_options(script: Callable[..., None], tmp_path: Path) -> None:
    out, markdown, figure = (tmp_path / f"options.{suffix}" for suffix in ("json", "md", "jpg"))
    files = ("--out", out, "--markdown", markdown, "--figure", figure, "--work", tmp_path / "work")
    script("options.py", "--small", *files)
    runs = json.loads(out.read_text())["runs"]
    assert set(runs) == {"transposed", "resize", "critic", "critic spectral"}
    untrained = {name: runs[name][0]["before"]["contrast"] for name in ("transposed", "resize")}
    assert min(untrained["transposed"]) > max(untrained["resize"])
    assert [row["step"] for row in runs["resize"][0]["checkpoints"]] == [1, 2]
    text = markdown.read_text()
    for row in ("| transposed | untrained |", "| resize | averaged |", "| averaged |", "| under spectral norms |"):
        assert row in text
    assert figure.stat().st_size > 1000
