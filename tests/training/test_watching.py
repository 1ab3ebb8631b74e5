"""What is measured of fixed pictures in training, the best by it, and when it ends a run."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from test_trainer import assert_same_state, losses, records
from tiny_runs import write_pictures
from torch import Tensor

from cyclegan_fast.config import Config, ConfigError, load_config
from cyclegan_fast.data.fixed import FixedPictures
from cyclegan_fast.evaluation.metrics import psnr, sliced_wasserstein, ssim
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import measures as measures_module
from cyclegan_fast.training import trainer
from cyclegan_fast.training.best import Best
from cyclegan_fast.training.measures import Measures
from cyclegan_fast.training.trainer import Interrupted, train

Tiny = Callable[..., Config]
METRICS = ("swd", "swd_colour", "psnr", "ssim")


@pytest.fixture
def dataset(dataset: Path) -> Path:
    """Every test picture has its negative as truth."""
    for split, truth in (("testA", "truthB"), ("testB", "truthA")):
        (dataset / truth).mkdir()
        for path in (dataset / split).iterdir():
            ImageOps.invert(Image.open(path)).save(dataset / truth / path.name)
    return dataset


def images(count: int, size: tuple[int, int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((1, 3, *size), generator=generator) * 2 - 1 for _ in range(count)]


class Darkening:
    """Stands in for `BaseSamples`: pictures are halved, in batches of two, and measured by a constant."""

    best = {"cycle": "test_cycle"}  # noqa: RUF012

    def __init__(self, *directions: str, factor: float = 0.5) -> None:
        self.directions, self.factor, self.batches = directions, factor, 0

    def measure(self) -> dict[str, float]:
        return {"test_cycle": 0.25}

    def generated(self, direction: str, pictures: Sequence[Tensor]) -> Iterator[Tensor]:
        assert direction in self.directions
        for start in range(0, len(pictures), 2):
            self.batches += 1
            yield torch.cat(list(pictures[start : start + 2])) * self.factor


def test_measures_are_the_metrics_of_the_translations() -> None:
    A, B, truth = images(5, (24, 20), 0), images(3, (24, 20), 1), images(5, (24, 20), 2)
    samples = Darkening("AtoB", "BtoA")
    measures = Measures(samples, FixedPictures(A, B, truth, None, True), "psnr")  # type: ignore[arg-type]
    found = measures.measure()
    half, real = torch.cat(A) / 2, torch.cat(truth)
    expected = {
        "test_cycle": 0.25,
        "test_psnr_AtoB": float(psnr(half, real, value_range=(-1, 1)).mean()),
        "test_ssim_AtoB": float(ssim(half, real, value_range=(-1, 1)).mean()),
    }
    for name, statistics in (("swd", "own"), ("swd_colour", "reference")):
        for way, source, target in (("AtoB", A, B), ("BtoA", B, A)):
            made, options = torch.cat(source) / 2, {"statistics": statistics, "patches": 64, "directions": 128}
            distance = sliced_wasserstein(torch.cat(target), made, value_range=(-1, 1), **options)  # type: ignore[arg-type]
            expected[f"test_{name}_{way}"] = distance.mean
    assert found == pytest.approx(expected, rel=1e-12)
    assert measures.best(found) == found["test_psnr_AtoB"]
    assert samples.batches == 3 + 2
    assert measures.measure() == found
    swd = Measures(samples, FixedPictures(A, B, truth, None, True), "swd")  # type: ignore[arg-type]
    assert swd.best(found) == pytest.approx((found["test_swd_AtoB"] + found["test_swd_BtoA"]) / 2)


def test_one_direction_and_no_pictures() -> None:
    A, B = images(2, (16, 16), 0), images(2, (16, 16), 1)
    one = Measures(Darkening("BtoA"), FixedPictures(A, B, B, A, True), "none")  # type: ignore[arg-type]
    assert list(one.measure()) == [f"test_{what}_BtoA" for what in METRICS]
    assert math.isnan(one.best(one.measure()))
    none = Measures(Darkening("AtoB"), None, "cycle")  # type: ignore[arg-type]
    assert none.measure() == {"test_cycle": 0.25}
    assert none.best(none.measure()) == 0.25


def test_translations_that_are_no_numbers_are_nan() -> None:
    A, B = images(2, (16, 16), 0), images(2, (16, 16), 1)
    broken = Measures(Darkening("AtoB", factor=math.nan), FixedPictures(A, B, B, A, True), "ssim")  # type: ignore[arg-type]
    found = broken.measure()
    assert all(math.isnan(found[f"test_{what}_AtoB"]) for what in METRICS)
    assert math.isnan(broken.best(found))


@pytest.mark.parametrize(
    ("best", "sizes", "message"),
    [
        ("psnr", [(24, 24)] * 2, "there is no truth of their translations.* folder truthB with the pictures of testA"),
        ("swd", [(24, 15), (24, 15)], "15 x 24 pixels are too small, both sides must have 16"),
        ("swd", [(24, 20), (20, 24)], "they are of several sizes, 24 x 20 and 20 x 24 pixels"),
    ],
)
def test_a_best_that_cannot_be_measured_is_refused(
    best: str, sizes: list[tuple[int, int]], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    A = [image for i, size in enumerate(sizes) for image in images(1, size, i)]
    pictures = FixedPictures(A, A, None, None, True)
    with pytest.raises(ConfigError, match=rf"checkpoint\.best = '{best}' cannot be measured .*: {message}"):
        Measures(Darkening("AtoB"), pictures, best)  # type: ignore[arg-type]
    other = Measures(Darkening("AtoB"), pictures, "cycle").measure()  # type: ignore[arg-type]
    assert set(other) == {"test_cycle"} | ({"test_swd_AtoB", "test_swd_colour_AtoB"} if best == "psnr" else set())
    assert ("test_swd_AtoB is not measured" in caplog.text) == (best == "swd")


def best_of(*overrides: str) -> Best:
    return Best(load_config(None, list(overrides)))


def test_the_best_is_the_lowest_or_the_highest() -> None:
    lowest, highest = best_of("training.patience=2"), best_of("checkpoint.best=ssim")
    lowest.update(math.nan, 0, counts=False)
    for step, value in enumerate([math.nan, 0.5, 0.4, math.nan, 0.4, 0.6], 1):
        lowest.update(value, step)
        highest.update(value, step)
    assert (lowest.value, lowest.step, lowest.since, lowest.enough) == (0.4, 3, 3, True)
    lowest.update(0.5, 7, counts=False)
    assert lowest.since == 3
    lowest.update(0.3, 8, counts=False)
    assert (lowest.value, lowest.step, lowest.since, lowest.enough) == (0.3, 8, 0, False)
    assert (highest.value, highest.step, highest.since, highest.enough) == (0.6, 6, 0, False)
    highest.update(math.inf, 7)  # and then nothing could be better
    assert (highest.value, highest.step, highest.since) == (0.6, 6, 1)
    assert [best_of(f"checkpoint.best={name}").value for name in ("swd", "psnr")] == [math.inf, -math.inf]


def test_the_best_goes_on_where_it_is_the_same_measure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    config = load_config(None, ["checkpoint.best=psnr", "training.patience=4"])
    first = Best(config)
    first.update(20.0, 5)
    first.update(19.0, 6)
    content = {"config": {"checkpoint": {"best": "psnr"}}, **first.state_dict()}

    def resumed(*overrides: str, content: dict[str, Any] = content) -> tuple[float, int, int]:
        best = best_of(*overrides)
        best.load_state_dict(content)
        return best.value, best.step, best.since

    assert resumed("checkpoint.best=psnr") == (20.0, 5, 1)
    assert caplog.text == ""
    assert resumed("checkpoint.best=cycle") == (math.inf, 0, 0)
    assert resumed("checkpoint.best=psnr", "monitor.metrics_samples=7") == (-math.inf, 0, 0)
    assert "kept by psnr of 16 pictures a domain, and is now by psnr of 7 pictures a domain" in caplog.text
    # A stretch without a measure keeps it for the next.
    none = best_of("checkpoint.best=none")
    none.load_state_dict(content)
    assert resumed("checkpoint.best=psnr", content={**content, **none.state_dict()}) == (20.0, 5, 1)
    # Checkpoints of earlier versions say by their settings which measure it was.
    for settings, expected in (
        ({"checkpoint": {"best": "cycle"}, "monitor": {"samples": 4}}, (0.3, 9, 0)),
        ({"checkpoint": {"best": "generator"}, "monitor": {"samples": 4}}, (math.inf, 0, 0)),
        ({}, (0.3, 9, 0)),
    ):
        earlier = {"config": settings, "best": 0.3, "best_step": 9}
        assert resumed("checkpoint.best=cycle", content=earlier) == expected


MEASURED = ("training.steps=8", "monitor.metrics_samples=2", "monitor.metrics_every=3", "checkpoint.best=psnr")


def test_measuring_changes_nothing_in_training(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """The same state and losses to the bit; records by their names, at their steps; a new best is saved at once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level(logging.INFO, "cyclegan_fast")
    plain = train(tiny("plain", "training.steps=8"))
    run = train(tiny("run", *MEASURED, "monitor.tensorboard=true"))
    assert_same_state(plain, run, but=("best",))
    assert losses(run) == losses(plain)
    measured = [line for line in records(run) if "test_psnr_AtoB" in line]
    assert [line["step"] for line in measured] == [3, 6, 8]
    names = {f"test_{what}_{way}" for what in METRICS for way in ("AtoB", "BtoA")}
    assert set(measured[0]) == names | {"step", "epoch", "test_cycle", "test_generator"}
    assert (run / "training_curves.png").exists()  # from records of which some hold measures only
    value = {line["step"]: (line["test_psnr_AtoB"] + line["test_psnr_BtoA"]) / 2 for line in measured}
    best = ckpt.read_checkpoint(ckpt.find_checkpoint(run, "best"))
    assert best["best"] == pytest.approx(max(value.values()))
    assert best["position"]["step"] == max(value, key=lambda step: value[step])
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {f"test/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert "training pictures" not in caplog.text


def test_a_stop_between_measurements_costs_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """State with the best and the patience, and records, are those of the straight run."""
    options = (*MEASURED, "training.patience=9")
    straight = train(tiny("straight", *options))
    step, calls = trainer.train_step, iter(range(100))

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **more)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(Interrupted, match="after step 5"):
        train(tiny("run", *options))
    monkeypatch.undo()
    run = train(tiny("run", *options), resume=True)
    assert_same_state(straight, run)
    assert records(run) == records(straight)


def test_a_run_that_gets_no_better_ends_as_if_complete(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    ways = ("AtoB", "BtoA")
    values = iter([10.0, 12.0, 11.0, 12.0, 13.0, 12.5, 12.5, 12.5, 12.5])
    monkeypatch.setattr(
        Measures, "measure", lambda _: dict.fromkeys((f"test_psnr_{way}" for way in ways), next(values))
    )
    options = ("training.steps=20", "monitor.metrics_every=2", "monitor.metrics_samples=1", "checkpoint.best=psnr")
    run = train(tiny("run", *options, "training.patience=2", "monitor.log_every=3", "monitor.images_every=100"))
    assert ckpt.find_checkpoint(run).name == "step-00000008.ckpt"
    assert ckpt.read_checkpoint(ckpt.find_checkpoint(run, "best"))["position"]["step"] == 4
    said = "stopped early, after step 8 of 20: 2 measurements have not improved on the best, 12 by psnr of 1 pictures"
    assert caplog.text.count(said) == 1
    assert [line["step"] for line in losses(run)] == [3, 6, 8]
    assert (run / "training_curves.png").exists()
    assert sorted(path.name for path in (run / "samples").iterdir())[0] == "A-to-B-step-00000008.jpg"
    # It does not start again, and says so.
    before = ckpt.find_checkpoint(run).read_bytes()
    train(tiny("run", *options, "training.patience=2"), resume=True)
    assert ckpt.find_checkpoint(run).read_bytes() == before
    assert caplog.text.count(said) == 2
    # Unless it may wait longer: the fifth is better, and three that are not end it.
    train(tiny("run", *options, "training.patience=3"), resume=True)
    assert ckpt.find_checkpoint(run).name == "step-00000016.ckpt"
    assert ckpt.read_checkpoint(ckpt.find_checkpoint(run, "best"))["best"] == 13.0


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.method=pix2pix", "data.pairing=aligned", "data.unreadable=skip", "model.direction=BtoA"),
        ("model.method=augmented", "model.latent=3"),
    ],
    ids=["pix2pix", "augmented"],
)
def test_other_methods_are_measured_in_their_directions(tiny: Tiny, overrides: tuple[str, ...]) -> None:
    run = train(tiny("run", "training.steps=2", "monitor.metrics_samples=2", "checkpoint.best=swd", *overrides))
    (line,) = (line for line in records(run) if "test_generator" in line)
    ways = ("BtoA",) if "pix2pix" in overrides[0] else ("AtoB", "BtoA")
    assert {name for name in line if name[5:9] in ("swd_", "psnr", "ssim")} == {
        f"test_{what}_{way}" for what in METRICS for way in ways
    }
    assert all(math.isfinite(value) for value in line.values())
    state = ckpt.read_checkpoint(ckpt.find_checkpoint(run))
    assert state["best"] == pytest.approx(sum(line[f"test_swd_{way}"] for way in ways) / len(ways))


def test_codes_of_measured_pictures_are_those_of_the_grids(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever batches they are translated."""
    from cyclegan_fast.training import samples

    kept: list[samples.AugmentedSamples] = []

    def opened(*given: Any) -> Measures:
        kept.append(given[2])
        return measures_module.open_measures(*given)

    monkeypatch.setattr(trainer, "open_measures", opened)
    train(tiny("run", "training.steps=1", "monitor.samples=2", "model.method=augmented", "model.latent=3"))
    shown = list(kept[0].translate())
    for size in (1, 8):
        monkeypatch.setattr(samples, "_AT_ONCE", size)
        made = torch.cat(list(kept[0].generated("AtoB", kept[0].real_A)))
        back = torch.cat(list(kept[0].generated("BtoA", kept[0].real_B)))
        torch.testing.assert_close(made, torch.cat([sample["fake_B 1"] for sample in shown]), rtol=0, atol=1e-6)
        torch.testing.assert_close(back, torch.cat([sample["fake_A 1"] for sample in shown]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("checkpoint.best=swd", "monitor.metrics_samples=0"), r"checkpoint\.best = 'swd' needs pictures to measure"),
        (("training.patience=3", "checkpoint.best=none"), r"training\.patience = 3 needs a measure"),
        (("training.patience=3", "checkpoint.every_epochs=0"), r"none before the end: set monitor\.metrics_every"),
    ],
)
def test_settings_that_could_do_nothing_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, list(overrides))


def test_a_best_without_a_truth_is_refused_before_the_first_step(tiny: Tiny, dataset: Path) -> None:
    for name in ("truthA", "truthB"):
        (dataset / name).rename(dataset / f"no-{name}")
    config = tiny("run", *MEASURED)
    with pytest.raises(ConfigError, match=r"checkpoint\.best = 'psnr' cannot be measured .* there is no truth"):
        train(config)
    assert not (config.run_dir / "scalars.jsonl").exists()


def test_training_pictures_stand_in_and_it_is_said(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cyclegan_fast")
    for seed, split in enumerate(("trainA", "trainB")):
        write_pictures(tmp_path / "only" / split, 2, seed)
    run = train(tiny("run", "training.steps=1", "monitor.metrics_samples=9", f"data.root={tmp_path / 'only'}"))
    assert "without folders testA and testB, measures are taken of training pictures" in caplog.text
    assert {"test_swd_AtoB", "test_swd_BtoA"} <= records(run)[-2].keys() | records(run)[-1].keys()
