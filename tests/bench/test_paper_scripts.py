"""bench/ablation.py and bench/paper.py: arms and reduced recipes are what they say, and toy runs come to a table."""

from __future__ import annotations

import json
from pathlib import Path

import ablation
import paper
import pytest
from same_learning import Task

from cyclegan_fast.config import load_config
from cyclegan_fast.models import cost


def test_arms_differ_from_the_original_in_what_they_say(tmp_path: Path) -> None:
    task = Task(48, 300, train=75)
    configs = {arm.name: ablation.config_of(task, arm, 1, tmp_path) for arm in ablation.ARMS}
    original, keras = configs["original"], configs["keras"]
    assert (original.training.epochs, original.training.epochs_decay, original.training.steps) == (2, 2, 300)
    whole = load_config(paper.RECIPES["keras"])
    for section, name in (
        *(("data", "pairing"), ("data", "frozen_augmentation"), ("model", "preset"), ("training", "adam_eps")),
        *(("training", "pool_size"), ("training", "epochs_decay"), ("loss", "generator_gradient")),
    ):
        assert getattr(getattr(keras, section), name) == getattr(getattr(whole, section), name), name
    assert configs["batch 4"].training.epochs * 75 / 4 == pytest.approx(original.training.epochs * 75, rel=0.01)
    for name in ("resize", "no identity"):
        work = [
            config.training.steps
            * cost.training_step(cost.configured(config, 48, 48, precision="fp32", fused=True)).flop
            for config in (configs[name], original)
        ]
        assert work[0] / work[1] == pytest.approx(1, abs=0.01)
    assert set(ablation.REFERENCE.values()) <= {arm.name for arm in ablation.ARMS}
    grouped = [arm for group in ablation.GROUPS for arm in group]
    assert sorted(grouped, key=ablation.ARMS.index) == ablation.ARMS


def test_reduced_recipes_keep_what_tells_them_apart(tmp_path: Path) -> None:
    small = paper.Reduction(64, 72, ngf=16, blocks=3, epochs=10, pictures=50, tests=5)
    pictures = paper.Pictures("photos", "Photographs", tmp_path, small)
    for domain, count in (("A", 60), ("B", 40)):
        (tmp_path / f"train{domain}").mkdir()
        for number in range(count):
            (tmp_path / f"train{domain}" / f"{number}.jpg").touch()
    bench = paper.Bench(tmp_path / "work", {"photos": 1})
    keras, original, ours = (bench.config(pictures, recipe, 0)[0] for recipe in ("keras", "original", "ours"))
    assert (keras.training.epochs, keras.training.epochs_decay, keras.model.preset) == (10, 0, "keras")
    assert (original.training.epochs, original.training.epochs_decay, original.model.ngf) == (5, 5, 16)
    assert {config.data.limit_train for config in (keras, original, ours)} == {40}
    whole = load_config(paper.RECIPES["ours"])
    steps, whole_steps = (config.data.limit_train * paper.whole_epochs(config) for config in (ours, whole))
    # As large a share of the run is averaged over.
    assert (1 - ours.training.ema) / (1 - whole.training.ema) == pytest.approx(whole_steps / steps, rel=0.01)
    # And the work of the runs is the original's, to half an epoch.
    for path, config in ((paper.RECIPES["ours"], ours), (paper.RECIPES["keras"], keras)):
        work = paper.whole_epochs(config) * small.work(path) / (10 * small.work(paper.RECIPES["original"]))
        assert work == pytest.approx(1, abs=0.06)
    assert ours.model.upsample == whole.model.upsample == "resize"
    assert keras.checkpoint.milestones == (1, 2, 10)


def test_a_part_that_fails_is_named(tmp_path: Path) -> None:
    bench = paper.Bench(tmp_path, {})
    assert not bench.part("report of nothing", ["report"], tmp_path, "report")
    assert bench.failures == ["report of nothing: status 2"]
    assert paper.parts(tmp_path) == {}


def test_an_ablation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"out.{suffix}" for suffix in ("json", "md", "jpg")]
    arguments = ["--small", "--arms", "resize", "--seeds", "2", "--work", str(tmp_path / "work")]
    arguments += ["--out", str(files[0]), "--markdown", str(files[1]), "--figure", str(files[2])]
    assert ablation.main(arguments) == 0
    content = json.loads(files[0].read_text())
    runs = [("resize", 0), ("resize, averaged", 0), ("resize", 1), ("resize, averaged", 1)]
    assert [(run["arm"], run["seed"]) for run in content["runs"]] == runs
    assert {"psnr", "swd", "checkerboard_2", "separation", "hallucination"} <= content["runs"][0]["AtoB"].keys()
    assert "| resize, averaged, less resize |" in files[1].read_text()
    assert files[2].stat().st_size > 1000
    capsys.readouterr()
    assert ablation.main([*arguments, "--train-only"]) == 0
    assert capsys.readouterr().err.count("trained") == 2
    scalars = (tmp_path / "work" / "runs" / "resize-1" / "scalars.jsonl").read_text().splitlines()
    assert len(scalars) == content["arms"][8]["steps"] == 2  # trained once
