"""The pictures that measures are taken of, and their truths: by name, and prepared alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cyclegan_fast.config import Config, load_config
from cyclegan_fast.data import synthetic
from cyclegan_fast.data.fixed import FixedPictures, load_measured
from cyclegan_fast.data.folder import DataError, align, scan_dataset

TEST = ("a", "b/c", "d", "e")


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four test pictures of A with their negatives as truth, three of B without any."""
    for i, name in enumerate(TEST):
        save(picture(i), tmp_path / "testA" / f"{name}.png")
        save(ImageOps.invert(picture(i)), tmp_path / "truthB" / f"{name}.png")
    for split, count in {"trainA": 2, "trainB": 2, "testB": 3}.items():
        for i in range(count):
            save(picture(100 + i), tmp_path / split / f"{i}.png")
    return tmp_path


def config_of(root: Path, *overrides: str) -> Config:
    sizes = ("data.load_size=32", "data.crop_size=24", "monitor.metrics_samples=3")
    return load_config(None, [f"data.root={root}", *sizes, *overrides])


def measured(root: Path, *overrides: str) -> FixedPictures:
    config, scans = config_of(root, *overrides), scan_dataset(root)
    return load_measured(config, align(scans) if config.data.pairing == "aligned" else scans)


def assert_negatives(pictures: list[torch.Tensor], truths: list[torch.Tensor] | None) -> None:
    assert truths is not None
    for one, other in zip(pictures, truths, strict=True):
        # Negatives may be resized to values that are rounded the other way.
        torch.testing.assert_close(one, -other, rtol=0, atol=0.01)


@pytest.mark.parametrize("preprocess", ["resize_and_crop", "crop", "none"])
def test_the_truth_has_the_name_and_the_preparation_of_its_picture(root: Path, preprocess: str) -> None:
    fixed = measured(root, f"data.preprocess={preprocess}")
    assert (len(fixed.real_A), len(fixed.real_B)) == (3, 3)
    assert {tuple(image.shape) for image in fixed.real_A} == {(1, 3, *((40, 40) if preprocess == "none" else (24, 24)))}
    assert_negatives(fixed.real_A, fixed.true_B)
    assert fixed.true_A is None
    assert fixed.held_out


def test_the_truth_of_a_limited_set_and_in_other_channels(root: Path) -> None:
    fixed = measured(root, "data.limit_test=2", "model.channels_B=1", "loss.identity=0")
    assert len(fixed.real_A) == 2
    assert fixed.true_B is not None
    assert [image.shape[1] for image in fixed.true_B] == [1, 1]


def test_a_truth_with_gaps_is_not_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "truthB" / "d.png").unlink()
    assert measured(root).true_B is None
    assert "truthB lacks 1 of 4 pictures of testA, d.png for instance: it is not used" in caplog.text


def test_the_truth_may_be_of_another_format(root: Path) -> None:
    """As `evaluate` takes it: the name counts, suffix apart."""
    for path in [path for path in (root / "truthB").rglob("*") if path.is_file()]:
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    pictures = measured(root)
    assert_negatives(pictures.real_A, pictures.true_B)


def test_a_truth_of_another_size_is_refused(root: Path) -> None:
    save(picture(0, (80, 80)), root / "truthB" / "a.png")
    with pytest.raises(
        DataError, match=r"two sizes \(.*testA/a\.png has 40 x 40, .*truthB/a\.png has 80 x 80 pixels\)"
    ):
        measured(root, "data.preprocess=crop")
    assert measured(root).true_B is not None  # resized, they are alike


def test_an_unreadable_truth_costs_its_picture(root: Path) -> None:
    (root / "truthB" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"truthB/a\.png"):
        measured(root)
    fixed = measured(root, "data.unreadable=skip")
    assert len(fixed.real_A) == 3
    assert_negatives(fixed.real_A, fixed.true_B)


def test_the_truth_of_aligned_pictures_is_the_partner(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i in range(2):
            save(picture(i), tmp_path / f"{split}A" / f"{i}.png")
            save(ImageOps.invert(picture(i)), tmp_path / f"{split}B" / f"{i}.png")
    fixed = measured(tmp_path, "data.pairing=aligned")
    assert_negatives(fixed.real_A, fixed.true_B)
    assert_negatives(fixed.real_B, fixed.true_A)


def test_without_test_folders_training_pictures_are_measured(root: Path) -> None:
    for name in ("testA", "testB"):
        (root / name).rename(root / f"no-{name}")
    fixed = measured(root)
    assert (len(fixed.real_A), len(fixed.real_B), fixed.held_out) == (2, 2, False)
    assert fixed.true_B is None  # truthB is the truth of testA alone


def test_rendered_flowers_have_their_truth(tmp_path: Path) -> None:
    root = synthetic.ensure_dataset(tmp_path / "flowers", train=1, test=2, size=32, seed=3, workers=1)
    fixed = measured(root, "data.load_size=32", "data.crop_size=32")
    for domain, truths in enumerate((fixed.true_A, fixed.true_B)):
        assert truths is not None
        split = ("testB", "testA")[domain]
        for path, truth in zip(sorted((root / split).iterdir()), truths, strict=True):
            rendered = torch.from_numpy(synthetic.render_pair(3, int(path.stem), 32)[domain].copy())
            rendered = rendered.permute(2, 0, 1) / 127.5 - 1
            assert float((truth[0] - rendered).abs().mean()) < 0.05  # JPEG
