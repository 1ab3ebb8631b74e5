"""Aligned pairs: folders of equal names, side-by-side pictures, synthetic scenes seen by both cameras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cyclegan_fast.config import Config, load_config
from cyclegan_fast.data import synthetic
from cyclegan_fast.data.folder import DataError
from cyclegan_fast.data.loader import TrainingData, open_training_data


def picture(name: str, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A picture of random pixels, another for each name."""
    rng = np.random.default_rng(list(name.encode()))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def negative(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(image))


def folders(root: Path, names: tuple[str, ...] = ("a", "a-b", "c", "d/e")) -> Path:
    """A data set whose pictures of B are the negatives of those of A."""
    for split in ("train", "test"):
        for name in names:
            for domain, suffix in (("A", ".png"), ("B", ".PNG" if name == "a" else ".png")):
                path = root / f"{split}{domain}" / f"{name}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = picture(split + name)
                (image if domain == "A" else negative(image)).save(path, "PNG")
    return root


def config_of(root: Path, tmp_path: Path, *overrides: str) -> Config:
    small = ("data.load_size=40", "data.crop_size=24", "data.workers=1", "model.method=pix2pix", "data.pairing=aligned")
    return load_config(None, [f"data.root={root}", f"data.cache={tmp_path / 'cache'}", *small, *overrides])


def opened(root: Path, tmp_path: Path, *overrides: str, **more: Any) -> TrainingData:
    config = config_of(root, tmp_path, *overrides)
    return open_training_data(config, rank=0, world_size=1, device="cpu", progress=False, **more)


def assert_negatives(data: TrainingData, steps: int = 6) -> None:
    """Every pair of a batch, and of the samples, is a picture and its negative: same picture, same crop, same flip."""
    windows = set()
    for step in range(steps):
        batch = data.loader.batch(step)
        torch.testing.assert_close(batch.real_A, -batch.real_B, rtol=0, atol=1e-6)
        windows.add(batch.real_A.numpy().tobytes())
    assert len(windows) == steps
    for A, B in zip(data.samples_A, data.samples_B, strict=True):
        torch.testing.assert_close(A, -B, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.batch=2", "training.accumulate=2"),
        ("data.resident=never",),
        ("data.frozen_augmentation=true",),
        ("data.limit_train=3", "data.limit_test=2"),
        ("data.preprocess=crop",),
    ],
    ids=["plain", "batch", "streamed", "frozen", "limited", "crop"],
)
def test_pairs_are_of_one_name_crop_and_flip(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    data = opened(folders(tmp_path / "data"), tmp_path, *overrides)
    frozen = "data.frozen_augmentation=true" in overrides
    assert_negatives(data, steps=4 if frozen else 6)
    assert data.loader.length == (3 if "data.limit_train=3" in overrides else 4)
    names_A, names_B = data.loader.names
    assert [name.lower() for name in names_A] == [name.lower() for name in names_B]


def test_side_by_side_pictures_are_cut_in_two(tmp_path: Path) -> None:
    """Of an odd width, the middle column belongs to neither half."""
    for split, width in (("train", 40), ("val", 41)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in "abc":
            whole, image = Image.new("RGB", (2 * 40 + width % 2, 40)), picture(split + name)
            whole.paste(image, (0, 0))
            whole.paste(negative(image), (40 + width % 2, 0))
            whole.save(tmp_path / "data" / split / f"{name}.png")
    for preprocess in ("resize_and_crop", "crop"):
        data = opened(tmp_path / "data", tmp_path, "data.source=side_by_side", f"data.preprocess={preprocess}")
        assert_negatives(data, steps=3)
        assert len(data.samples_A) == 3
    centre = np.asarray(picture("vala"))[8:32, 8:32]
    expected = torch.from_numpy(centre.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(data.samples_A[0], expected, rtol=0, atol=1e-6)


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path / "data")
    (root / "trainB" / "c.png").unlink()
    picture("x").save(root / "testB" / "alone.png")
    with pytest.raises(DataError, match=r"1 of 7 pictures have no partner.*\n.*trainA/c\.png: no c\.\* in .*trainB"):
        opened(root, tmp_path)
    data = opened(root, tmp_path, "data.unreadable=skip")
    assert data.loader.length == 3
    assert_negatives(data, steps=3)


def test_pairs_that_are_none_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", ("a",))
    picture("other", (50, 40)).save(root / "trainB" / "a.PNG", "PNG")
    with pytest.raises(DataError, match=r"1 of 1 pairs are of pictures of two sizes \(a\.png of A has 40 x 40, a\.PNG"):
        opened(root, tmp_path, "data.preprocess=none")
    picture("more").save(root / "trainA" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png have one name but for the suffix"):
        opened(root, tmp_path)
    (root / "trainA" / "a.jpg").rename(root / "trainA" / "b.jpg")
    (root / "trainA" / "a.png").unlink()
    with pytest.raises(DataError, match="no picture of the same name"):
        opened(root, tmp_path, "data.unreadable=skip")
    with pytest.raises(DataError, match=r"has no folder train; it holds .*trainA/.*data\.source=folder"):
        opened(root, tmp_path, "data.source=side_by_side")


def test_a_picture_that_breaks_later_leaves_its_partner_out(tmp_path: Path) -> None:
    """Its header is whole, so that only decoding finds it."""
    root = folders(tmp_path / "data")
    path = root / "trainB" / "c.png"
    path.write_bytes(path.read_bytes()[:200])
    data = opened(root, tmp_path, "data.unreadable=skip")
    assert data.loader.length == 3
    assert_negatives(data, steps=3)


def test_synthetic_pairs_are_one_scene(tmp_path: Path) -> None:
    small = ("data.source=synthetic", "data.synthetic_train=3", "data.synthetic_test=2", "data.synthetic_size=40")
    data = opened(tmp_path / "flowers", tmp_path, *small)
    assert sorted(path.name for path in (tmp_path / "flowers").iterdir()) == [
        *("synthetic.json", "testA", "testB", "trainA", "trainB"),
    ]
    phone, reflex, _ = synthetic.render_pair(0, 4, 40)
    for domain, expected in (("A", phone), ("B", reflex)):
        found = np.asarray(Image.open(tmp_path / "flowers" / f"train{domain}" / "000004.jpg"), dtype=float)
        assert np.abs(found - expected).mean() < 4  # JPEG
    assert data.loader.length == 3
    with pytest.raises(DataError, match="aligned"):
        opened(tmp_path / "flowers", tmp_path, *small, "model.method=cyclegan", "data.pairing=unpaired")


def test_styles_grade_the_pictures_of_b_alone(tmp_path: Path) -> None:
    """The mean colour of a picture tells its grade, and all grades come up."""
    root = tmp_path / "flowers"
    synthetic.ensure_dataset(root, train=24, test=1, size=16, seed=5, styles=3, workers=1)
    styles = []
    for path in sorted((root / "trainB").iterdir()):
        index = int(path.stem)
        _, plain, _ = synthetic.render_pair(5, index, 16)
        style = synthetic.style_of(5, index, 3)
        found = np.asarray(Image.open(path), dtype=float)
        near = [np.abs(found - synthetic.graded(plain, i, 3)).mean() for i in range(3)]
        assert int(np.argmin(near)) == style
        assert near[style] < 6  # JPEG of 16 x 16
        styles.append(style)
    assert set(styles) == {0, 1, 2}
    phone = np.asarray(Image.open(root / "trainA" / "000000.jpg"), dtype=float)
    assert np.abs(phone - synthetic.render_pair(5, 0, 16)[0]).mean() < 6
    assert synthetic.graded(plain, 0, 1) is plain
