"""The rendered flowers: two cameras that agree about the scene and differ in depth of field, and the folder of them."""

from __future__ import annotations

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cyclegan_fast.data import synthetic
from cyclegan_fast.data._camera import PHONE, Exposure, Lens, disc_blur, dslr
from cyclegan_fast.data.folder import DataError
from cyclegan_fast.data.synthetic import ensure_dataset, render_dslr, render_pair, render_phone, scene, scene_of

SEED = 3
PAIRS = 12
SMALL = {"train": 2, "test": 1, "size": 32, "seed": 5, "workers": 1}


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [render_pair(SEED, index, 256) for index in range(PAIRS)]


def luminance(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def laplacian(picture: np.ndarray) -> np.ndarray:
    grey = luminance(picture)
    p = np.pad(grey, 1, mode="edge")
    return p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * grey


def border_sharpness(picture: np.ndarray) -> float:
    """Laplacian RMS of 16 x 16 blocks, median over the outer sixth of a 256 px frame (photographs: 28 and 3.9)."""
    blocks = np.sqrt((laplacian(picture) ** 2).reshape(16, 16, 16, 16).mean(axis=(1, 3)))
    outer = np.ones((16, 16), bool)
    outer[3:13, 3:13] = False
    return float(np.median(blocks[outer]))


def flower_mask(depth: np.ndarray, focus: float) -> np.ndarray:
    """Pixels of the main flower, away from its outline."""
    mask = np.abs(depth - focus) < 0.1 * focus
    for _ in range(4):
        mask = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    return mask


def test_render_is_a_function_of_seed_and_index() -> None:
    first, again = render_pair(1, 2, 48), render_pair(1, 2, 48)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    for other in (render_pair(1, 3, 48), render_pair(2, 2, 48)):
        assert np.abs(first[0].astype(int) - other[0]).mean() > 10


def test_one_domain_alone_is_the_same_picture() -> None:
    phone, reflex, _ = render_pair(SEED, 1, 64)
    assert np.array_equal(render_phone(scene(SEED, 1), 64), phone)
    assert np.array_equal(render_dslr(scene(SEED, 1), 64), reflex)


@pytest.mark.parametrize("size", [16, 17, 100, 257])  # the smallest, odd, not a power of two
def test_sizes(size: int) -> None:
    phone, reflex, depth = render_pair(SEED, 0, size)
    assert phone.shape == reflex.shape == (size, size, 3)
    assert phone.dtype == reflex.dtype == np.uint8
    assert depth.shape == (size, size)
    assert depth.dtype == np.float32
    assert phone.std() > 20
    assert reflex.std() > 20


@pytest.mark.parametrize("size", [15, 4097])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size = {size}.*16 to 4096"):
        render_pair(SEED, 0, size)


@pytest.mark.parametrize("index", range(4))
def test_larger_picture_shows_the_same_scene(index: int) -> None:
    """Layout scales with the size: a large picture made small is the small picture, but for fine texture."""
    small, large = render_pair(SEED, index, 64)[1], render_pair(SEED, index, 256)[1]
    reduced = np.asarray(Image.fromarray(large).resize((16, 16), Image.Resampling.BOX)).ravel()
    coarse = np.asarray(Image.fromarray(small).resize((16, 16), Image.Resampling.BOX)).ravel()
    assert np.corrcoef(reduced, coarse)[0, 1] > 0.95


def test_depth_of_field_like_photographs(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Median sharpness of the border near that of real photographs: 28 by phones, 3.9 by DSLRs."""
    phone = [border_sharpness(a) for a, _, _ in pairs]
    reflex = [border_sharpness(b) for _, b, _ in pairs]
    assert 18 < np.median(phone) < 42
    assert 1.5 < np.median(reflex) < 8
    assert all(a > 3 * b for a, b in zip(phone, reflex, strict=True))


def test_flower_is_in_focus_for_both(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    ratios = []
    for index, (phone, reflex, depth) in enumerate(pairs):
        mask = flower_mask(depth, scene(SEED, index).focus)
        ratios.append(np.sqrt((laplacian(reflex)[mask] ** 2).mean() / (laplacian(phone)[mask] ** 2).mean()))
    assert 0.3 < np.median(ratios) < 1.2


def test_depth_map(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    for index, (_, _, depth) in enumerate(pairs):
        focus = scene(SEED, index).focus
        assert np.isfinite(depth).all()
        assert depth.min() > 0.2 * focus
        assert depth.max() <= 200
        flower = np.abs(depth - focus) < 0.1 * focus
        assert 0.04 < flower.mean() < 0.8
        assert (depth > 1.5 * focus).mean() > 0.1


def test_pair_is_aligned(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """The edges of the flower correlate best without any shift between the two pictures."""
    for index, (phone, reflex, depth) in enumerate(pairs):
        mask = np.abs(depth - scene(SEED, index).focus) < 0.1 * scene(SEED, index).focus
        a, b = laplacian(phone) * mask, laplacian(reflex) * mask
        shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
        best = max(shifts, key=lambda s: float((a * np.roll(b, s, axis=(0, 1))).sum()))
        assert best == (0, 0)


def test_circle_of_confusion() -> None:
    lens = dslr(2.8)
    assert lens.circle_of_confusion(0.6, focus=0.6) == 0
    # At infinity c = f^2 / (N (s - f)) = 0.085^2 / (2.8 * 0.515) = 5.010 mm, of a frame of 36 mm.
    assert lens.circle_of_confusion(1e9, focus=0.6) == pytest.approx(0.13918, rel=1e-3)
    # At twice the distance, half of that.
    assert lens.circle_of_confusion(1.2, focus=0.6) == pytest.approx(0.06959, rel=1e-3)
    assert PHONE.circle_of_confusion(1e9, focus=0.6) * 256 < 1.2  # pixels: sharp all the way


@pytest.mark.parametrize("radius", [1.0, 3.3, 9.5, 47.0])  # the last is convolved on a coarser grid
def test_disc_is_round_even_and_keeps_energy(radius: float) -> None:
    side = 2 * int(radius) + 13
    point = np.zeros((1, side, side), np.float32)
    middle = side // 2
    point[0, middle, middle] = 100.0
    disc = disc_blur(point, radius)[0].astype(np.float64)
    assert disc.sum() == pytest.approx(100, rel=0.02)
    y, x = np.mgrid[:side, :side] - np.array([middle, middle])[:, None, None]
    # The mean squared distance from the centre of a disc along an axis is r^2 / 4; pixels add up to 1 / 6 to it.
    for axis in (x, y):
        assert (disc * axis**2).sum() / disc.sum() == pytest.approx(radius**2 / 4, rel=0.12, abs=0.15)
    inside = np.hypot(x, y) < radius - 3 * np.ceil(radius / 20)  # the outline is as wide as a cell of the grid
    if radius > 4:
        assert disc[inside].max() < 1.06 * disc[inside].min()


def test_sharp_flower_does_not_bleed_into_the_blur() -> None:
    far, near = np.zeros((4, 64, 64), np.float32), np.zeros((4, 64, 64), np.float32)
    far[2:] = 1.0  # blue, opaque
    near[0, 20:44, 20:44] = near[3, 20:44, 20:44] = 1.0  # red
    exposure = Exposure(dslr(2.0), 0.5, 64)
    exposure.add(5.0, far)
    exposure.add(0.5, near)
    light = exposure.light()
    assert np.array_equal(light[0], near[0])
    assert np.allclose(light[2], 1 - near[3], atol=1e-5)


def test_blurred_edge_in_front_lets_the_background_through() -> None:
    far, near = np.zeros((4, 64, 64), np.float32), np.zeros((4, 64, 64), np.float32)
    far[2:] = 1.0
    near[0, :, :32] = near[3, :, :32] = 1.0
    exposure = Exposure(Lens(focal=0.085, aperture=2.0, sensor=0.036), 0.5, 64)
    exposure.add(0.5, far)
    exposure.add(0.4, near)
    light = exposure.light()
    assert np.allclose(light[0] + light[2], 1, atol=1e-4)
    assert 0.2 < light[0, 32, 32] < 0.8


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_dataset_holds_what_it_says(tmp_path: Path) -> None:
    root = ensure_dataset(tmp_path / "deep" / "flowers", **SMALL)
    folders = {"trainA": 2, "trainB": 2, "testA": 1, "testB": 1, "truthA": 1, "truthB": 1}
    assert names(root) == sorted([*folders, "synthetic.json"])
    assert {folder: len(names(root / folder)) for folder in folders} == folders
    splits = [set(names(root / split)) for split in ("trainA", "trainB", "testA", "testB")]
    assert len(set.union(*splits)) == sum(len(split) for split in splits)  # no scene twice
    assert names(root / "truthB") == names(root / "testA")
    assert names(root / "truthA") == names(root / "testB")
    assert names(root.parent) == ["flowers"]
    assert json.loads((root / "synthetic.json").read_text())["size"] == 32


def test_truth_is_the_other_rendering_of_the_test_scene(tmp_path: Path) -> None:
    root = ensure_dataset(tmp_path / "flowers", **(SMALL | {"size": 128}))
    for split, truth in (("testA", "truthB"), ("testB", "truthA")):
        (name,) = names(root / split)
        phone, reflex, _ = render_pair(5, int(Path(name).stem), 128)
        for folder in (split, truth):
            with Image.open(root / folder / name) as stored:
                assert stored.size == (128, 128)
                drawn = phone if folder.endswith("A") else reflex
                # JPEG at quality 95 is a few levels off.
                assert np.abs(np.asarray(stored).astype(int) - drawn).mean() < 4


def test_the_scene_of_a_picture(tmp_path: Path) -> None:
    """Known of a rendered set's pictures alone: by these a true subject is found."""
    root = ensure_dataset(tmp_path / "set", train=2, test=2, size=16, seed=5)
    for split in ("testA", "truthB"):
        for number, file in enumerate(sorted((root / split).iterdir())):
            seed, index = scene_of(file) or (-1, -1)
            assert (seed, f"{index:06d}.jpg") == (5, file.name), number
    assert scene_of(root / "testA" / "flower.jpg") is None
    assert scene_of(root / "testA" / "2.jpg") is None  # no name that it gives
    assert scene_of(tmp_path / "other" / "testA" / "000002.jpg") is None
    index = json.loads((root / "synthetic.json").read_text())
    some = sorted((root / "testA").iterdir())[0]
    for other in (index | {"format": 1}, index | {"made_by": "another"}, index | {"seed": -1}, index | {"seed": None}):
        (root / "synthetic.json").write_text(json.dumps(other))
        assert scene_of(some) is None, other
    (root / "synthetic.json").write_text("{")
    assert scene_of(some) is None


def test_processes_do_not_change_a_byte(tmp_path: Path) -> None:
    one = ensure_dataset(tmp_path / "one", **SMALL)
    two = ensure_dataset(tmp_path / "two", **(SMALL | {"workers": 2}))
    files = sorted(path.relative_to(one) for path in one.rglob("*.jpg"))
    assert len(files) == 8
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    small = ensure_dataset(tmp_path / "small", **SMALL)
    large = ensure_dataset(tmp_path / "large", **(SMALL | {"train": 3, "test": 2}))
    for path in small.rglob("*.jpg"):
        assert (large / path.relative_to(small)).read_bytes() == path.read_bytes()


def test_complete_set_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ensure_dataset(tmp_path / "flowers", **SMALL)

    def never(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(synthetic, "_render_job", never)
    assert ensure_dataset(root, **SMALL) == root


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    assert len(names(ensure_dataset(tmp_path / "flowers", **SMALL) / "trainA")) == 2


@pytest.mark.parametrize("content", ["holiday.jpg", "synthetic.json"])
def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / content).write_text("{}")
    with pytest.raises(DataError, match=r"photos holds something else.*data.root"):
        ensure_dataset(root, **SMALL)
    assert names(root) == [content]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flowers").write_text("notes")
    with pytest.raises(DataError, match="holds something else"):
        ensure_dataset(tmp_path / "flowers", **SMALL)
    with pytest.raises(DataError, match=r"could not be written|something else"):
        ensure_dataset(tmp_path / "flowers" / "below", **SMALL)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    root = ensure_dataset(tmp_path / "flowers", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    with pytest.raises(DataError, match=r"seed=5.*but.*seed=6.*are asked for"):
        ensure_dataset(root, **(SMALL | {"seed": 6}))
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}


@pytest.mark.parametrize("damage", ["delete", "empty"])
def test_damaged_set_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    root = ensure_dataset(tmp_path / "flowers", **SMALL)
    victim = root / "trainB" / names(root / "trainB")[0]
    victim.unlink() if damage == "delete" else victim.write_bytes(b"")
    with pytest.raises(DataError, match=rf"lacks 1 of its pictures.*trainB.*{victim.name}"):
        ensure_dataset(root, **SMALL)


@pytest.mark.parametrize(("field", "value"), [("train", 0), ("test", 0), ("size", 8), ("size", 5000), ("seed", -1)])
def test_impossible_parameters(tmp_path: Path, field: str, value: int) -> None:
    with pytest.raises(DataError, match=rf"{field} = {value} is not allowed"):
        ensure_dataset(tmp_path / "flowers", **(SMALL | {field: value}))
    assert not (tmp_path / "flowers").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    render, calls = synthetic._render_job, []

    def fail_at_third(folder: str, parameters: object, job: tuple[str, int]) -> None:
        calls.append(job)
        if len(calls) == 3:
            raise error
        render(folder, parameters, job)

    monkeypatch.setattr(synthetic, "_render_job", fail_at_third)
    expected = DataError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        ensure_dataset(tmp_path / "flowers", **SMALL)
    if expected is DataError:
        assert "flowers" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert names(tmp_path) == []


def test_leftover_of_a_killed_build_is_removed_but_not_a_build_that_goes_on(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in (".flowers.a.partial", ".flowers.b.partial", ".other.c.partial"))
    for folder in (old, young, foreign):
        (folder / "trainA").mkdir(parents=True)
    past = time.time() - 7200
    for path in (old / "trainA", old, young, foreign / "trainA", foreign):
        os.utime(path, (past, past))
    ensure_dataset(tmp_path / "flowers", **SMALL)
    assert names(tmp_path) == [".flowers.b.partial", ".other.c.partial", "flowers"]


def test_two_builders_at_once(tmp_path: Path) -> None:
    root = tmp_path / "flowers"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: ensure_dataset(root, **SMALL), range(2)))
    assert done == [root, root]
    assert names(tmp_path) == ["flowers"]


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure_dataset(tmp_path / "flowers", progress=True, **SMALL)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rendering flowers" in captured.err
    assert "6/6" in captured.err
