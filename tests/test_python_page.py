"""docs/python.md: its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cyclegan_fast
from cyclegan_fast.config import from_dict, to_dict
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import step_path, write_checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"load_size": 36, "crop_size": 36, "workers": 1}
    config = from_dict({"data": data, "model": {"ngf": 4, "blocks": 1}, "loss": {"identity": 0}})
    G_A, G_B = (network.state_dict() for network in build_generators(config.model))
    content = {"config": to_dict(config), "G_A": G_A, "G_B": G_B, "position": {"step": 1, "epoch": 1}}
    write_checkpoint(step_path(tmp_path / "runs" / "flowers", 1), content)
    Image.fromarray(np.zeros((30, 41, 3), dtype=np.uint8)).save(tmp_path / "IMG_1.jpg")
    for number in range(15):
        file = tmp_path / "datasets" / "flowers" / ("testA", "testB", "truthB")[number % 3] / f"{number // 3}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(file)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(examples) >= 8
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), names)  # noqa: S102 - our own page
    with Image.open("out.jpg") as image:
        assert image.size == (41, 30)
    assert Path("translated", "IMG_1.jpg").is_file()


def test_the_package_says_that_it_is_typed() -> None:
    """Without the marker a type checker takes nothing from the package; tests/typed_user.py is checked by mypy."""
    assert (Path(cyclegan_fast.__file__).parent / "py.typed").is_file()
    project = (PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"py.typed"' in project
    assert '"tests/typed_user.py"' in project
