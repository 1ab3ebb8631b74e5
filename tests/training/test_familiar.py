"""What a run measures of its pictures at its start, and keeps in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import write_pictures

from cyclegan_fast.config import Config
from cyclegan_fast.data.loader import TrainingData, open_training_data
from cyclegan_fast.inference.familiarity import Reference
from cyclegan_fast.inference.translate import load
from cyclegan_fast.training import familiar, trainer
from cyclegan_fast.training.checkpoint import find_checkpoint, read_checkpoint
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """24 training pictures of each domain, 20 test pictures of A."""
    for folder, count, seed in (("trainA", 24, 0), ("trainB", 24, 1), ("testA", 20, 2)):
        write_pictures(tmp_path / "more" / folder, count, seed)
    return tmp_path / "more"


def opened(config: Config) -> TrainingData:
    return open_training_data(config, rank=0, world_size=1, device="cpu", progress=False)


def state(run: Path) -> dict[str, Any]:
    return read_checkpoint(find_checkpoint(run))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_run_keeps_it_and_a_resumed_one_the_same(tiny: Tiny, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tiny("run", f"data.root={root}", "training.steps=1"))
    first = state(run)
    kept = first["familiarity"]
    assert [Reference.from_state(kept[domain]).held_out for domain in "AB"] == ["test", "training"]
    model = load(run, device="cpu", precision="fp32")
    usual = model.familiarity(root / "testA" / "003.png")
    assert usual is not None
    assert (usual.unfamiliar, usual.among) == (False, 20)
    for direction in ("AtoB", "BtoA"):
        black = model.familiarity(Image.new("RGB", (30, 50)), direction)
        assert black is not None
        assert black.unfamiliar

    # Taken over when resumed, whatever the test pictures are by then.
    for path in (root / "testA").iterdir():
        Image.new("RGB", (40, 40)).save(path)
    train(tiny("run", f"data.root={root}", "training.steps=2"), resume=True)
    assert same(state(run)["familiarity"], kept)

    # And training does not feel it.
    monkeypatch.setattr(trainer, "references", lambda *_: {})
    without = state(train(tiny("without", f"data.root={root}", "training.steps=1")))
    assert without["familiarity"] == {}
    for network in ("G_A", "G_B", "D_A", "D_B"):
        assert same(without[network], first[network])


def test_few_pictures_say_nothing(tiny: Tiny) -> None:
    assert familiar.references(opened(tiny("run"))) == {}


def test_what_a_checkpoint_holds_is_measured_again_where_it_cannot_be_used(
    tiny: Tiny, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(tiny("run", f"data.root={root}"))
    measured = familiar.references(data)
    assert same(familiar.references(data, {"A": {"version": 1}, "B": measured["B"]}), measured)
    (record,) = caplog.records
    assert "of the pictures of A is measured again: channels must be" in record.message


def test_unreadable_test_pictures_are_passed_over(tiny: Tiny, root: Path) -> None:
    broken = root / "testA" / "003.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    found = familiar.references(opened(tiny("run", f"data.root={root}")))
    assert found["A"]["held_out"] == "training"  # 19 are too few


def test_of_side_by_side_pictures_each_domain_sees_its_half(tiny: Tiny, tmp_path: Path) -> None:
    for split, count in (("train", 24), ("test", 20)):
        for domain, seed in (("A", 0), ("B", 1)):
            write_pictures(tmp_path / f"{split}{domain}", count, seed + (split == "test") * 2)
        (tmp_path / "pairs" / split).mkdir(parents=True)
        for path in (tmp_path / f"{split}A").iterdir():
            halves = [np.asarray(Image.open(tmp_path / f"{split}{domain}" / path.name)) for domain in "AB"]
            halves[1] = halves[1] // 4  # a dark domain
            Image.fromarray(np.concatenate(halves, axis=1)).save(tmp_path / "pairs" / split / path.name)
    settings = ("data.source=side_by_side", "data.pairing=aligned", f"data.root={tmp_path / 'pairs'}")
    found = familiar.references(opened(tiny("run", *settings)))
    assert [found[domain]["held_out"] for domain in "AB"] == ["test", "test"]
    assert float(found["B"]["colours"]["centre"][0]) < 0.4 * float(found["A"]["colours"]["centre"][0])
