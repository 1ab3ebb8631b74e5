"""The store: sizes and pixels against independent arithmetic, and whole or absent whatever happens to its builder."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cyclegan_fast.config import from_dict
from cyclegan_fast.data import store as store_module
from cyclegan_fast.data.folder import DataError, Entry, scan_folder
from cyclegan_fast.data.photo import open_photo
from cyclegan_fast.data.store import Preprocess, Store, default_cache, open_store

SQUARE = Preprocess("resize_and_crop", 24, 16, "bicubic", 3)
WHOLE = Preprocess("none", 24, 16, "bicubic", 3)


def write_pictures(folder: Path, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Path]:
    """Pictures of random noise, width x height, named 00.png, 01.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for i, (width, height) in enumerate(sizes):
        paths.append(folder / f"{i:02d}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def scan(folder: Path) -> tuple[Entry, ...]:
    return scan_folder(folder, split="trainA", workers=1).entries


def expected(path: Path, preprocess: Preprocess) -> np.ndarray[Any, Any]:
    return preprocess.apply(open_photo(path, channels=preprocess.channels).image)


def assert_holds(store: Store, paths: Sequence[Path], preprocess: Preprocess) -> None:
    assert len(store) == len(paths)
    assert store.names == [path.name for path in paths]
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(store[i], expected(path, preprocess))


def cut_short(path: Path) -> None:
    """Leave a file whose header is whole and whose pixels are not."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def finished(cache: Path) -> list[str]:
    """What a cache folder holds besides the empty lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.is_dir() else []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make every further attempt to decode a picture fail."""

    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("a picture was decoded again")

        monkeypatch.setattr(store_module, "open_photo", fail)

    return forbid


class TestPreprocess:
    @pytest.mark.parametrize(
        ("mode", "width", "height", "size"),
        [
            ("resize_and_crop", 4000, 3000, (286, 286)),
            ("resize_and_crop", 10, 20, (286, 286)),
            ("crop", 401, 307, (307, 401)),
            ("none", 401, 307, (307, 401)),
            ("scale_width", 4000, 3000, (214, 286)),  # 214.5 rounded down
            ("scale_width", 1000, 300, (85, 286)),  # 85.8
            ("scale_width", 100, 150, (429, 286)),
            ("scale_width", 10_000, 3, (1, 286)),  # never nothing
            ("scale_width_and_crop", 1000, 1500, (429, 286)),
            ("scale_width_and_crop", 1000, 300, (256, 286)),  # stretched to the crop
            ("scale_shortside", 4000, 3000, (286, 381)),  # 381.33
            ("scale_shortside", 3000, 4000, (381, 286)),
            ("scale_shortside", 100, 151, (432, 286)),  # 431.86 rounded, and enlarged
            ("scale_shortside", 77, 77, (286, 286)),
        ],
    )
    def test_sizes(self, mode: str, width: int, height: int, size: tuple[int, int]) -> None:
        preprocess = Preprocess(mode, 286, 256, "bicubic", 3)
        assert preprocess.size(width, height) == size
        if width * height < 1_000_000:
            assert preprocess.apply(Image.new("RGB", (width, height))).shape == (*size, 3)

    def test_scaled_width_is_the_de_facto_arithmetic(self) -> None:
        preprocess = Preprocess("scale_width_and_crop", 286, 256, "bicubic", 3)
        for width in range(1, 400, 7):
            for height in range(1, 400, 3):
                assert preprocess.size(width, height) == (int(max(286 * height / width, 256)), 286)

    def test_crop_only_where_the_mode_says_so(self) -> None:
        crops = {
            mode: Preprocess(mode, 286, 256, "bicubic", 3).crop
            for mode in ("resize_and_crop", "crop", "scale_width_and_crop", "scale_width", "scale_shortside", "none")
        }
        assert crops == {
            "resize_and_crop": 256,
            "crop": 256,
            "scale_width_and_crop": 256,
            "scale_width": None,
            "scale_shortside": None,
            "none": None,
        }

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match=r"data\.preprocess = 'fit'"):
            Preprocess("fit", 286, 256, "bicubic", 3).size(4, 4)

    def test_from_config(self) -> None:
        config = from_dict({"data": {"preprocess": "crop", "load_size": 50, "crop_size": 40, "resample": "bilinear"}})
        assert Preprocess.from_config(config.data, 4) == Preprocess("crop", 50, 40, "bilinear", 4)

    @pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
    def test_channels(self, mode: str, channels: int) -> None:
        for resample in ("bicubic", "bilinear", "bilinear_tf"):
            array = Preprocess("resize_and_crop", 9, 8, resample, channels).apply(Image.new(mode, (5, 12), 255))
            assert array.shape == (9, 9, channels)
            assert array.dtype == np.uint8

    @pytest.mark.parametrize(("width", "height"), [(31, 17), (9, 40)])
    @pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
    def test_antialiased_filters_are_pillows_and_what_they_are_called(
        self, resample: str, width: int, height: int
    ) -> None:
        random = np.random.default_rng(3)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        result = Preprocess("resize_and_crop", 12, 12, resample, 3).apply(image)
        pillow = image.resize(
            (12, 12), Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.BILINEAR
        )
        np.testing.assert_array_equal(result, np.asarray(pillow))
        # Pillow rounds between its two passes, takes first the one that leaves less to do, and rounds halves up.
        array = np.asarray(image, np.float64)
        columns, rows = _filter_matrix(width, 12, resample), _filter_matrix(height, 12, resample)
        columns_first = _to_bytes(np.einsum("oh,hwc->owc", rows, _to_bytes(np.einsum("ow,hwc->hoc", columns, array))))
        rows_first = _to_bytes(np.einsum("ow,hwc->hoc", columns, _to_bytes(np.einsum("oh,hwc->owc", rows, array))))
        assert min(np.abs(columns_first - result).max(), np.abs(rows_first - result).max()) <= 1

    def test_bilinear_tf_at_hand_computed_half_pixels(self) -> None:
        # Enlarging [0, 100] to 4: centres at -0.25, 0.25, 0.75, 1.25 of the input, clamped at both ends.
        wide = Image.fromarray(np.array([[0, 100]], dtype=np.uint8).repeat(4, axis=0))
        result = Preprocess("resize_and_crop", 4, 4, "bilinear_tf", 1).apply(wide)
        assert result[..., 0].tolist() == [[0, 25, 75, 100]] * 4
        # Reducing 4 to 2 takes centres 0.5 and 2.5, with no regard for what lies between; the same along columns.
        tall = Image.fromarray(np.array([[0], [10], [20], [30]], dtype=np.uint8).repeat(2, axis=1))
        result = Preprocess("resize_and_crop", 2, 2, "bilinear_tf", 1).apply(tall)
        assert result[..., 0].tolist() == [[5, 5], [25, 25]]
        # 6 to 2: centres 1 and 4 exactly, so pixels 0, 2, 3 and 5 have no influence (an antialiased filter differs).
        spiked = Image.fromarray(np.array([[255, 7, 255, 0, 9, 255]] * 2, dtype=np.uint8))
        result = Preprocess("resize_and_crop", 2, 2, "bilinear_tf", 1).apply(spiked)
        assert result[..., 0].tolist() == [[7, 9]] * 2

    @pytest.mark.parametrize(("width", "height"), [(31, 17), (9, 40), (500, 3), (24, 24)])
    def test_bilinear_tf_is_torchs_interpolation_without_antialiasing(self, width: int, height: int) -> None:
        array = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
        result = Preprocess("resize_and_crop", 24, 24, "bilinear_tf", 3).apply(Image.fromarray(array))
        exact = torch.nn.functional.interpolate(
            torch.from_numpy(array).permute(2, 0, 1)[None].double(), size=(24, 24), mode="bilinear", align_corners=False
        )[0].permute(1, 2, 0)
        # Rounding to bytes is all that separates them; float32 may move what lies on the edge between two bytes.
        assert (torch.tensor(result) - exact).abs().max() <= 0.5 + 1e-4


def _to_bytes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.clip(np.floor(values + 0.5), 0, 255)


def _filter_matrix(size: int, new: int, name: str) -> np.ndarray[Any, Any]:
    """Weights [new, size] of an antialiased filter: its kernel stretched by the reduction, cut at the edges."""

    def cubic(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # Keys, a = -0.5
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    scale = max(size / new, 1)
    centres = (np.arange(new)[:, None] + 0.5) * size / new
    distance = (np.arange(size)[None] + 0.5 - centres) / scale
    weights = cubic(distance) if name == "bicubic" else np.maximum(1 - np.abs(distance), 0)
    normalised: np.ndarray[Any, Any] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


class TestContents:
    def test_uniform_store(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20), (16, 50), (24, 24)])
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert_holds(store, paths, SQUARE)
        assert store.uniform
        assert store.sizes.tolist() == [[24, 24]] * 3
        assert store.sizes.dtype == store.offsets.dtype == np.int64
        assert store.offsets.tolist() == [0, 1728, 3456]
        assert store.channels == 3
        assert store.nbytes == 3 * 24 * 24 * 3 == (store.path / "data.bin").stat().st_size

    def test_pictures_of_several_sizes(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20), (16, 50), (24, 24)])
        store = open_store(scan(tmp_path / "in"), WHOLE, cache=cache, split="trainA")
        assert_holds(store, paths, WHOLE)
        assert not store.uniform
        assert store.sizes.tolist() == [[20, 30], [50, 16], [24, 24]]
        assert store.offsets.tolist() == [0, 1800, 4200]
        with pytest.raises(DataError, match="differ in size"):
            store.tensor()
        with pytest.raises(IndexError):
            store[3]

    def test_views_are_not_copies_and_cannot_be_written(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20), (16, 50)])
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        tensor = store.tensor()
        assert tensor.shape == (2, 24, 24, 3)
        assert tensor.dtype == torch.uint8
        assert tensor[1].data_ptr() == store[1].ctypes.data
        np.testing.assert_array_equal(tensor[1].numpy(), expected(paths[1], SQUARE))
        with pytest.raises(ValueError, match="read-only"):
            store[0][0, 0, 0] = 1

    def test_workers_and_this_process_give_the_same_bytes(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30 + i, 60 - i) for i in range(9)])
        one = open_store(scan(tmp_path / "in"), WHOLE, cache=cache / "1", split="trainA", workers=1)
        many = open_store(scan(tmp_path / "in"), WHOLE, cache=cache / "3", split="trainA", workers=3)
        assert_holds(many, paths, WHOLE)
        assert (one.path / "data.bin").read_bytes() == (many.path / "data.bin").read_bytes()

    def test_channels_of_the_model(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)])
        for channels in (1, 2, 3, 4):
            preprocess = Preprocess("resize_and_crop", 24, 16, "bicubic", channels)
            store = open_store(scan(tmp_path / "in"), preprocess, cache=cache, split="trainA")
            assert store[0].shape == (24, 24, channels)
            np.testing.assert_array_equal(store[0], expected(paths[0], preprocess))
        assert len(finished(cache)) == 4

    def test_real_photographs(self, real_photos: Path, cache: Path) -> None:
        entries = scan_folder(real_photos / "awkward", split="trainA", workers=1).entries
        entries += scan_folder(real_photos / "iphone2dslr_flower", split="trainA", workers=1).entries[:6]
        assert len(entries) > 10
        store = open_store(entries, WHOLE, cache=cache, split="trainA", unreadable="skip", workers=2)
        assert len(store) + len(store.left_out) == len(entries)
        by_name = {entry.name: entry for entry in entries}
        for i, name in enumerate(store.names):
            assert tuple(store.sizes[i]) == (by_name[name].height, by_name[name].width)
        for i in range(0, len(store), 5):
            np.testing.assert_array_equal(store[i], expected(by_name[store.names[i]].path, WHOLE))

    def test_progress_is_shown_on_request(self, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_pictures(tmp_path / "in", [(30, 20), (16, 50)])
        open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA", workers=1)
        assert capfd.readouterr() == ("", "")
        open_store(scan(tmp_path / "in"), WHOLE, cache=cache, split="trainA", workers=2, progress=True)
        out, err = capfd.readouterr()
        assert out == ""
        assert "decoding trainA: 100%" in err
        assert "2/2" in err

    def test_warnings_about_single_files_reach_this_process(
        self, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "in").mkdir()
        for name in ("0.png", "1.png"):
            Image.new("RGB", (30, 20)).save(tmp_path / "in" / name, icc_profile=b"not a profile")
        entries = scan(tmp_path / "in")
        caplog.clear()
        open_store(entries, SQUARE, cache=cache, split="trainA", workers=2)
        records = [record for record in caplog.records if record.name == "cyclegan_fast.photo"]
        assert len(records) >= 2
        assert all(record.levelno == logging.WARNING for record in records)
        assert "1.png" in caplog.text


class TestReuse:
    def test_second_time_nothing_is_decoded(self, tmp_path: Path, cache: Path, no_decoding: Callable[[], None]) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20), (16, 50)])
        first = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        contents = [expected(path, SQUARE) for path in paths]
        no_decoding()
        second = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert second.path == first.path
        for i, content in enumerate(contents):
            np.testing.assert_array_equal(second[i], content)

    def test_a_read_only_cache_serves_what_it_holds(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        monkeypatch.setattr(store_module, "_locked", refuse)
        assert len(open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")) == 1

    @pytest.mark.parametrize(
        "change",
        [
            ("load_size", 25),
            ("crop_size", 15),
            ("resample", "bilinear"),
            ("channels", 1),
            ("mode", "scale_shortside"),
        ],
    )
    def test_another_setting_is_another_store(self, tmp_path: Path, cache: Path, change: tuple[str, Any]) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        fields = {"mode": "resize_and_crop", "load_size": 24, "crop_size": 16, "resample": "bicubic", "channels": 3}
        other = Preprocess(**{**fields, change[0]: change[1]})  # type: ignore[arg-type]
        first = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        second = open_store(scan(tmp_path / "in"), other, cache=cache, split="trainA")
        assert second.path != first.path
        np.testing.assert_array_equal(second[0], expected(tmp_path / "in" / "00.png", other))

    def test_changed_files_are_decoded_again(self, tmp_path: Path, cache: Path) -> None:
        folder = tmp_path / "in"
        paths = write_pictures(folder, [(30, 20), (16, 50)])
        seen = [open_store(scan(folder), SQUARE, cache=cache, split="trainA").path]

        # Only the time differs: a file replaced by one of equal length.
        status = paths[0].stat()
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        seen.append(open_store(scan(folder), SQUARE, cache=cache, split="trainA").path)

        # The content, and with it the length, but not the time.
        write_pictures(folder, [(31, 20)], seed=9)
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        store = open_store(scan(folder), SQUARE, cache=cache, split="trainA")
        assert_holds(store, paths, SQUARE)
        seen.append(store.path)

        # One more, one less, and another name.
        extra = folder / "extra.png"
        shutil.copy(paths[0], extra)
        seen.append(open_store(scan(folder), SQUARE, cache=cache, split="trainA").path)
        paths[1].unlink()
        seen.append(open_store(scan(folder), SQUARE, cache=cache, split="trainA").path)
        extra.rename(folder / "other.png")
        seen.append(open_store(scan(folder), SQUARE, cache=cache, split="trainA").path)
        # The same files in another place.
        folder.rename(tmp_path / "moved")
        seen.append(open_store(scan(tmp_path / "moved"), SQUARE, cache=cache, split="trainA").path)
        assert len(set(seen)) == len(seen) == 7

    @pytest.mark.parametrize("damage", ["short", "long", "no data", "no index", "not json", "wrong key", "wrong shape"])
    def test_a_damaged_store_is_built_again(self, tmp_path: Path, cache: Path, damage: str) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20), (16, 50)])
        folder = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA").path
        data, index = folder / "data.bin", folder / "index.json"
        content = json.loads(index.read_text())
        if damage == "short":
            os.truncate(data, 100)
        elif damage == "long":
            os.truncate(data, 10_000)
        elif damage == "no data":
            data.unlink()
        elif damage == "no index":
            index.unlink()
        elif damage == "not json":
            index.write_bytes(index.read_bytes()[:-20])
        elif damage == "wrong key":
            index.write_text(json.dumps({**content, "key": "0" * 64}))
        else:
            index.write_text(json.dumps({**content, "sizes": [[24, 24]]}))
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert store.path == folder
        assert_holds(store, paths, SQUARE)
        assert finished(cache) == [folder.name]


class TestBadPictures:
    def test_too_small_for_the_crop(self, tmp_path: Path, cache: Path) -> None:
        write_pictures(tmp_path / "in", [(30, 20), (40, 15), (16, 16)])
        preprocess = Preprocess("crop", 24, 16, "bicubic", 3)
        with pytest.raises(DataError) as caught:
            open_store(scan(tmp_path / "in"), preprocess, cache=cache, split="trainB")
        message = str(caught.value)
        assert "trainB: 1 of 3 pictures are too small for a crop of 16 x 16" in message
        assert "01.png: 40 x 15" in message
        assert "data.crop_size" in message
        assert "data.preprocess=resize_and_crop" in message
        assert "00.png" not in message

    def test_no_pictures(self, cache: Path) -> None:
        with pytest.raises(DataError, match="trainA: there are no pictures"):
            open_store([], SQUARE, cache=cache, split="trainA")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_refused_by_name(self, tmp_path: Path, cache: Path, workers: int) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 4)
        cut_short(paths[1])
        entries = scan(tmp_path / "in")
        paths[3].unlink()
        with pytest.raises(DataError) as caught:
            open_store(entries, SQUARE, cache=cache, split="trainA", workers=workers)
        message = str(caught.value)
        assert "2 of 4 pictures cannot be used" in message
        assert "01.png: " in message
        assert "03.png: vanished after it was scanned" in message
        assert "data.unreadable=skip" in message
        assert finished(cache) == []

    @pytest.mark.parametrize(("bad", "workers"), [([0], 1), ([2, 3], 1), ([5], 1), ([0, 1, 4, 5], 2)])
    @pytest.mark.parametrize("preprocess", [SQUARE, WHOLE], ids=["uniform", "several sizes"])
    def test_left_out_by_name_and_the_rest_closes_up(
        self,
        tmp_path: Path,
        cache: Path,
        caplog: pytest.LogCaptureFixture,
        workers: int,
        bad: list[int],
        preprocess: Preprocess,
    ) -> None:
        paths = write_pictures(tmp_path / "in", [(20 + 3 * i, 50 - 5 * i) for i in range(6)])
        for i in bad:
            cut_short(paths[i])
        good = [path for i, path in enumerate(paths) if i not in bad]
        store = open_store(
            scan(tmp_path / "in"), preprocess, cache=cache, split="trainA", unreadable="skip", workers=workers
        )
        assert_holds(store, good, preprocess)
        assert store.nbytes == (store.path / "data.bin").stat().st_size
        assert [name for name, _ in store.left_out] == [paths[i].name for i in bad]
        assert f"{len(bad)} of 6 pictures left out" in caplog.text
        assert all(paths[i].name in caplog.text for i in bad)

    def test_what_cannot_be_decoded_is_remembered(
        self,
        tmp_path: Path,
        cache: Path,
        caplog: pytest.LogCaptureFixture,
        no_decoding: Callable[[], None],
    ) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 3)
        cut_short(paths[1])
        entries = scan(tmp_path / "in")
        open_store(entries, SQUARE, cache=cache, split="trainA", unreadable="skip")
        no_decoding()
        caplog.clear()
        store = open_store(entries, SQUARE, cache=cache, split="trainA", unreadable="skip")
        assert store.names == ["00.png", "02.png"]
        assert "01.png" in caplog.text
        with pytest.raises(DataError, match=r"1 of 3 pictures cannot be used(.|\n)*01.png"):
            open_store(entries, SQUARE, cache=cache, split="trainA", unreadable="refuse")

    @pytest.mark.parametrize("change", ["vanished", "changed"])
    def test_a_change_after_the_scan_is_noticed_and_not_remembered(
        self, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, change: str
    ) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 3)
        entries = scan(tmp_path / "in")
        status, content = paths[1].stat(), paths[1].read_bytes()
        if change == "vanished":
            paths[1].unlink()
        else:
            write_pictures(tmp_path / "other", [(30, 20)] * 2, seed=5)
            shutil.copy(tmp_path / "other" / "01.png", paths[1])
        with pytest.raises(DataError, match=f"01.png: {change} after it was scanned"):
            open_store(entries, SQUARE, cache=cache, split="trainA")
        store = open_store(entries, SQUARE, cache=cache, split="trainA", unreadable="skip")
        assert_holds(store, [paths[0], paths[2]], SQUARE)
        assert f"01.png: {change} after it was scanned" in caplog.text
        # The file comes back as the scan saw it: the store without it must not be taken for the whole.
        paths[1].write_bytes(content)
        os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
        assert_holds(open_store(entries, SQUARE, cache=cache, split="trainA", unreadable="skip"), paths, SQUARE)

    def test_nothing_left(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 2)
        for path in paths:
            cut_short(path)
        with pytest.raises(DataError, match="2 of 2 pictures cannot be used:"):
            open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA", unreadable="skip")
        assert finished(cache) == []

    def test_a_header_that_lies(self, tmp_path: Path, cache: Path) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        (entry,) = scan(tmp_path / "in")
        wrong = Entry(**{**entry.__dict__, "width": 31})
        with pytest.raises(DataError, match=r"00.png: is stored as \[20, 30, 3\] but its header promised \[20, 31\]"):
            open_store([wrong], WHOLE, cache=cache, split="trainA")

    def test_long_lists_are_cut(self, tmp_path: Path, cache: Path) -> None:
        write_pictures(tmp_path / "in", [(9, 9)] * 25)
        preprocess = Preprocess("crop", 24, 16, "bicubic", 3)
        with pytest.raises(DataError, match="and 5 more") as caught:
            open_store(scan(tmp_path / "in"), preprocess, cache=cache, split="trainA")
        assert str(caught.value).count(".png") == 20


class TestDisk:
    def test_too_little_room_is_said_before_decoding(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, no_decoding: Callable[[], None]
    ) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        entries = scan(tmp_path / "in")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        no_decoding()
        with pytest.raises(DataError) as caught:
            open_store(entries, SQUARE, cache=cache, split="trainA")
        assert str(cache) in str(caught.value)
        assert "MB are free" in str(caught.value)
        assert "data.cache" in str(caught.value)
        assert finished(cache) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_disk_that_fills_up_while_decoding(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
    ) -> None:
        write_pictures(tmp_path / "in", [(30, 20)] * 3)
        real = store_module._decode

        def onto_a_full_disk(tasks: Any, preprocess: Any, data: Path, *rest: Any) -> Any:
            return real(tasks, preprocess, Path("/dev/full"), *rest)

        monkeypatch.setattr(store_module, "_decode", onto_a_full_disk)
        with pytest.raises(DataError) as caught:
            open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA", workers=workers)
        assert os.strerror(errno.ENOSPC) in str(caught.value)
        assert str(cache) in str(caught.value)
        assert finished(cache) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
    def test_a_limit_on_the_size_of_files(self, tmp_path: Path, cache: Path) -> None:
        write_pictures(tmp_path / "in", [(60, 60)] * 3)
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        run = run_builder(tmp_path / "in", cache, before=limit, mode="none")
        output = run.communicate(timeout=60)[0]
        assert run.returncode == 1
        assert "DataError: the decoded pictures of trainA cannot be kept in" in output
        assert "File too large" in output
        assert finished(cache) == []

    def test_an_unwritable_cache(self, tmp_path: Path) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"cannot be kept in .*file/cache: Not a directory.*data.cache"):
            open_store(scan(tmp_path / "in"), SQUARE, cache=tmp_path / "file" / "cache", split="trainA")

    def test_default_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CYCLEGAN_FAST_CACHE", str(tmp_path / "chosen"))
        assert default_cache() == tmp_path / "chosen"
        monkeypatch.delenv("CYCLEGAN_FAST_CACHE")
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache() == tmp_path / "cyclegan_fast"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_cache() == tmp_path / ".cache" / "cyclegan_fast"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert default_cache() == tmp_path / "Library" / "Caches" / "cyclegan_fast"
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
        assert default_cache() == tmp_path / "local" / "cyclegan_fast"


def run_builder(
    folder: Path, cache: Path, *, before: str = "", workers: int = 1, mode: str = "resize_and_crop"
) -> subprocess.Popen[str]:
    """Another process that opens the store of a folder; `before` is run first and may change the module `s`."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import os, time\n"
        "from pathlib import Path\n"
        "from cyclegan_fast.data import folder, store as s\n"
        f"{before}\n"
        f"entries = folder.scan_folder({str(folder)!r}, split='trainA', workers=1).entries\n"
        f"preprocess = s.Preprocess({mode!r}, 24, 16, 'bicubic', 3)\n"
        f"store = s.open_store(entries, preprocess, cache=Path({str(cache)!r}), split='trainA', workers={workers})\n"
        "print('opened', len(store), flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for_line(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line:
            return lines
    raise AssertionError(f"the builder ended without {word!r}:\n" + "\n".join(lines))


DIE_AFTER_TWO = """
real, count = s._store_picture, 0
def store_picture(*arguments):
    global count
    count += 1
    if count > 2:
        print("half done", flush=True)
        time.sleep(60)
    return real(*arguments)
s._store_picture = store_picture
"""
DIE_BEFORE_INDEX = """
def publish(*arguments):
    print("half done", flush=True)
    time.sleep(60)
s._Builder._publish = publish
"""
DIE_BEFORE_RENAME = """
def rename(*arguments):
    print("half done", flush=True)
    time.sleep(60)
s._rename = rename
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and file locks")
class TestSeveralProcesses:
    @pytest.mark.parametrize(
        "before", [DIE_AFTER_TWO, DIE_BEFORE_INDEX, DIE_BEFORE_RENAME], ids=["decoding", "index", "rename"]
    )
    def test_a_killed_builder_leaves_nothing_that_is_used(self, tmp_path: Path, cache: Path, before: str) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 4)
        builder = run_builder(tmp_path / "in", cache, before=before)
        wait_for_line(builder, "half done")
        assert [Path(name).suffix for name in finished(cache)] == [".tmp"]
        kill(builder)
        assert [Path(name).suffix for name in finished(cache)] == [".tmp"]
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert_holds(store, paths, SQUARE)
        assert finished(cache) == [store.path.name]

    def test_leftovers_of_other_settings_go_too_but_not_what_is_being_built(self, tmp_path: Path, cache: Path) -> None:
        write_pictures(tmp_path / "in", [(30, 20)] * 4)
        dead = run_builder(tmp_path / "in", cache, before=DIE_AFTER_TWO)
        wait_for_line(dead, "half done")
        kill(dead)
        alive = run_builder(tmp_path / "in", cache, before=DIE_AFTER_TWO, mode="none")
        try:
            wait_for_line(alive, "half done")
            (being_built,) = finished(cache)  # it has cleared away the dead one's
            other = Preprocess("resize_and_crop", 30, 16, "bicubic", 3)
            store = open_store(scan(tmp_path / "in"), other, cache=cache, split="trainA")
            assert finished(cache) == sorted([being_built, store.path.name])
        finally:
            kill(alive)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
    def test_worker_processes_end_with_a_killed_builder(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 4)
        before = (
            "real = s._Worker._start\n"
            "def start(self):\n"
            "    process = real(self)\n"
            "    print('worker', process.pid, flush=True)\n"
            "    if threads.wait(60): time.sleep(60)\n"
            "    return process\n"
            "import threading; threads = threading.Barrier(2)\n"
            "s._Worker._start = start\n"
        )
        before = before.replace(
            "if threads.wait(60): time.sleep(60)", "threads.wait(60); print('both'); time.sleep(60)"
        )
        builder = run_builder(tmp_path / "in", cache, before=before, workers=2)
        lines = wait_for_line(builder, "worker") + wait_for_line(builder, "worker")
        workers = [int(line.split()[1]) for line in lines if line.startswith("worker")]
        assert len(workers) == 2
        assert all(runs(pid) for pid in workers)
        kill(builder)
        deadline = time.monotonic() + 20
        while any(runs(pid) for pid in workers):
            assert time.monotonic() < deadline, "workers outlive their builder"
            time.sleep(0.02)
        assert_holds(open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA"), paths, SQUARE)

    def test_of_two_builders_one_waits_for_the_other(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 4)
        log = "import logging; logging.basicConfig(level=logging.INFO)\n"
        tell = "real = s._store_picture\ns._store_picture = lambda *a: (print('decoding', flush=True), real(*a))[1]\n"
        hold = "fill = s._Builder._fill\ns._Builder._fill = lambda *a: (fill(*a), input())[0]\n"
        first = run_builder(tmp_path / "in", cache, before=tell + hold)
        wait_for_line(first, "decoding")
        second = run_builder(tmp_path / "in", cache, before=log + tell)
        seen = wait_for_line(second, "waiting for another process")
        outputs = [first.communicate("go on\n", timeout=60)[0], second.communicate(timeout=60)[0]]
        assert first.returncode == second.returncode == 0, outputs
        assert "opened 4" in outputs[0]
        assert "opened 4" in outputs[1]
        assert "decoding" not in seen
        assert "decoding" not in outputs[1].splitlines()
        assert_holds(open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA"), paths, SQUARE)

    def test_two_builders_at_once_without_file_locks(self, tmp_path: Path, cache: Path) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 4)
        # Neither publishes before both have filled their temporary folders.
        before = (
            "s._flock = None\n"
            "real = s._Builder._publish\n"
            "def publish(self, temporary, *rest):\n"
            "    (temporary / 'filled').touch()\n"
            "    while len(list(self.cache.glob('*.tmp/filled'))) < 2: time.sleep(0.01)\n"
            "    time.sleep(0.3)\n"
            "    (temporary / 'filled').unlink()\n"
            "    return real(self, temporary, *rest)\n"
            "s._Builder._publish = publish\n"
        )
        builders = [run_builder(tmp_path / "in", cache, before=before) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in builders]
        assert [process.returncode for process in builders] == [0, 0], outputs
        assert ["opened 4" in output for output in outputs] == [True, True]
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert_holds(store, paths, SQUARE)
        assert finished(cache) == [store.path.name]

    def test_without_file_locks_only_old_leftovers_go(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_pictures(tmp_path / "in", [(30, 20)])
        monkeypatch.setattr(store_module, "_flock", None)
        young, old = (f"trainA-{digit * 32}-{digit * 8}.tmp" for digit in "ab")
        for name, hours in ((young, 1), (old, 48)):
            (cache / name).mkdir(parents=True)
            os.utime(cache / name, (time.time() - hours * 3600,) * 2)
        store = open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA")
        assert finished(cache) == sorted([young, store.path.name])


def runs(pid: int) -> bool:
    """Whether a process is there and not merely unburied."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class TestWorkers:
    def test_start_without_torch(self) -> None:
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\nimport cyclegan_fast.data.store\nprint('torch' in sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "False"

    def test_a_picture_that_kills_its_worker_is_named_and_the_rest_goes_on(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = write_pictures(tmp_path / "in", [(30, 20)] * 5)
        deadly = (
            "import os, cyclegan_fast.data.store as s\n"
            "real = s.open_photo\n"
            "s.open_photo = lambda path, **k: os._exit(9) if path.name == '02.png' else real(path, **k)\n"
            "_serve(preprocess, data)"
        )
        program = store_module._WORKER_PROGRAM.replace("_serve(preprocess, data)", deadly)
        assert program != store_module._WORKER_PROGRAM
        monkeypatch.setattr(store_module, "_WORKER_PROGRAM", program)
        entries = scan(tmp_path / "in")
        with pytest.raises(DataError, match=r"02\.png: the process that decoded it died with status 9"):
            open_store(entries, SQUARE, cache=cache, split="trainA", workers=2)
        store = open_store(entries, SQUARE, cache=cache, split="trainA", workers=2, unreadable="skip")
        assert_holds(store, [path for path in paths if path.name != "02.png"], SQUARE)

    def test_a_worker_that_does_not_start(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_pictures(tmp_path / "in", [(30, 20)] * 2)
        monkeypatch.setattr(store_module, "_WORKER_PROGRAM", "raise SystemExit(7)")
        with pytest.raises(DataError, match=r"ended with status 7 at its start.*data.workers=1"):
            open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA", workers=2)
        assert finished(cache) == []

    def test_an_interrupted_build_ends_its_workers(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_pictures(tmp_path / "in", [(30, 20)] * 6)
        started: list[subprocess.Popen[str]] = []
        real = store_module._Worker._start

        def start(self: Any) -> subprocess.Popen[str]:
            started.append(real(self))
            return started[-1]

        monkeypatch.setattr(store_module._Worker, "_start", start)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(store_module.Bar, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(scan(tmp_path / "in"), SQUARE, cache=cache, split="trainA", workers=2)
        assert started
        assert all(process.poll() is not None for process in started)
        assert finished(cache) == []

    def test_as_many_as_pay(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        monkeypatch.setattr(store_module, "usable_cores", lambda: 8)

        def count(pictures: int, side: int, workers: int) -> int:
            entries = [Entry(Path("a"), "a", side, side, "RGB", "PNG", 1, 1)] * pictures
            return store_module._Builder(entries, SQUARE, cache, "trainA", "refuse", workers, False)._worker_count()

        assert count(20, 256, 0) == 1  # little to do
        assert count(1000, 4000, 0) == 8  # much to do: every core
        assert count(3, 4000, 0) == 3  # never more than pictures
        assert count(1000, 256, 5) == 5  # as told
