"""Batches against a plain recomputation, whichever way and by however many processes they are made."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cyclegan_fast.config import Config, from_dict
from cyclegan_fast.data import loader as loader_module
from cyclegan_fast.data.fixed import load_samples
from cyclegan_fast.data.folder import DataError, Entry, scan_folder
from cyclegan_fast.data.loader import Batch, PairLoader, open_training_data
from cyclegan_fast.data.sampler import batch_positions, crop_draws, epoch_order
from cyclegan_fast.data.store import Preprocess, Store, open_store

MakeLoader = Callable[..., PairLoader]

CPU = torch.device("cpu")


def write_pictures(folder: Path, sizes: list[tuple[int, int]], seed: int) -> list[Entry]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return list(scan_folder(folder, split="trainA", workers=1).entries)


def make_store(folder: Path, sizes: list[tuple[int, int]], seed: int, preprocess: Preprocess) -> Store:
    entries = write_pictures(folder, sizes, seed)
    return open_store(entries, preprocess, cache=folder.parent / "cache", split=folder.name, workers=1)


@pytest.fixture
def square(tmp_path: Path) -> tuple[Store, Store]:
    """Five pictures of A and seven of B, stored as 24 x 24."""
    preprocess = Preprocess("resize_and_crop", 24, 16, "bicubic", 3)
    return (
        make_store(tmp_path / "A", [(30, 20)] * 5, 1, preprocess),
        make_store(tmp_path / "B", [(26, 40)] * 7, 2, preprocess),
    )


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Store, Store]:
    """Pictures stored as they are, no two of one size."""
    preprocess = Preprocess("none", 24, 16, "bicubic", 3)
    return (
        make_store(tmp_path / "A", [(30 + i, 20 + 2 * i) for i in range(4)], 1, preprocess),
        make_store(tmp_path / "B", [(26 + 3 * i, 40 - i) for i in range(6)], 2, preprocess),
    )


def make_loader(stores: tuple[Store, Store], **changes: Any) -> PairLoader:
    arguments: dict[str, Any] = {
        "crop": 16,
        "flip": True,
        "pairing": "unpaired",
        "frozen": False,
        "seed": 3,
        "batch": 2,
        "accumulate": 1,
        "rank": 0,
        "world_size": 1,
        "device": CPU,
        "resident": "auto",
    }
    return PairLoader(*stores, **{**arguments, **changes})


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.real_A, other.real_A)
    assert torch.equal(one.real_B, other.real_B)
    np.testing.assert_array_equal(one.index_A, other.index_A)
    np.testing.assert_array_equal(one.index_B, other.index_B)
    assert one.epoch == other.epoch


def naive_window(picture: np.ndarray[Any, Any], y: float, x: float, flip: bool, crop: int) -> Tensor:
    top, left = int(y * (picture.shape[0] - crop + 1)), int(x * (picture.shape[1] - crop + 1))
    window = picture[top : top + crop, left : left + crop]
    return normalise(window[:, ::-1] if flip else window)


def normalise(window: np.ndarray[Any, Any]) -> Tensor:
    return torch.tensor((window / 127.5 - 1).astype(np.float32).transpose(2, 0, 1).copy())


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cyclegan_fast-loader"]


class TestBatches:
    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_values_are_those_of_a_naive_loop(self, square: tuple[Store, Store], resident: str) -> None:
        loader = make_loader(square, batch=2, accumulate=3, resident=resident)
        for step in range(5):  # two steps an epoch: the last one of each wraps around
            batch = loader.batch(step)
            epoch, positions = batch_positions(step, batch=2, accumulate=3, world_size=1, rank=0, length=7)
            order = epoch_order(5, 7, pairing="unpaired", seed=3, epoch=epoch)
            assert batch.epoch == epoch == step // 2 + 1
            for domain, (real, index) in enumerate(((batch.real_A, batch.index_A), (batch.real_B, batch.index_B))):
                assert real.shape == (3, 2, 3, 16, 16)
                assert real.dtype == torch.float32
                np.testing.assert_array_equal(index, order[domain][positions])
                for a in range(3):
                    draws = crop_draws(3, epoch, positions[a], domain)
                    for n in range(2):
                        picture = square[domain][int(index[a, n])]
                        expected = naive_window(picture, draws.y[n], draws.x[n], bool(draws.flip[n]), 16)
                        assert torch.equal(real[a, n], expected)

    def test_crop_from_pictures_of_several_sizes(self, uneven: tuple[Store, Store]) -> None:
        loader = make_loader(uneven, batch=4)
        assert not loader.resident
        batch = loader.batch(0)
        draws = crop_draws(3, 1, np.arange(4), 1)
        for n in range(4):
            picture = uneven[1][int(batch.index_B[0, n])]
            expected = naive_window(picture, draws.y[n], draws.x[n], bool(draws.flip[n]), 16)
            assert torch.equal(batch.real_B[0, n], expected)

    @pytest.mark.parametrize("changes", [{}, {"flip": False}, {"frozen": True}, {"pairing": "zip"}, {"crop": None}])
    def test_resident_and_streamed_are_equal_to_the_bit(
        self, square: tuple[Store, Store], changes: dict[str, Any]
    ) -> None:
        resident = make_loader(square, batch=3, accumulate=2, resident="always", **changes)
        streamed = make_loader(square, batch=3, accumulate=2, resident="never", **changes)
        assert resident.resident
        assert not streamed.resident
        for step in range(2 * resident.steps_per_epoch + 1):
            assert_equal(resident.batch(step), streamed.batch(step))

    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_micro_batches_are_channels_last(self, square: tuple[Store, Store], resident: str) -> None:
        batch = make_loader(square, batch=2, accumulate=3, resident=resident).batch(0)
        for real in (*batch.real_A, *batch.real_B):
            assert real.stride() == (16 * 16 * 3, 1, 16 * 3, 3)
            assert real.is_contiguous(memory_format=torch.channels_last)
            assert real.isfinite().all()

    def test_a_batch_depends_on_its_step_alone(self, square: tuple[Store, Store]) -> None:
        loader = make_loader(square)
        there = [loader.batch(step) for step in range(12)]
        back = [loader.batch(step) for step in reversed(range(12))]
        for one, other in zip(there, reversed(back), strict=True):
            assert_equal(one, other)
        fresh = make_loader(square).batch(9)
        assert_equal(there[9], fresh)
        assert not torch.equal(there[0].real_A, make_loader(square, seed=4).batch(0).real_A)

    def test_ranks_together_make_the_batch_of_one_process(self, square: tuple[Store, Store]) -> None:
        alone = make_loader(square, batch=4, accumulate=1)
        for world_size, accumulate in ((2, 1), (2, 2), (4, 1), (1, 4)):
            ranks = [
                make_loader(
                    square, batch=4 // world_size // accumulate, accumulate=accumulate, rank=r, world_size=world_size
                )
                for r in range(world_size)
            ]
            assert {loader.steps_per_epoch for loader in ranks} == {alone.steps_per_epoch}
            for step in range(5):
                parts = [loader.batch(step) for loader in ranks]
                whole = alone.batch(step)
                for name in ("real_A", "real_B"):
                    joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 2)
                    assert torch.equal(joined, getattr(whole, name)[0])

    def test_frozen_augmentation_gives_a_picture_one_window_for_good(self, square: tuple[Store, Store]) -> None:
        def windows(frozen: bool) -> dict[int, set[bytes]]:
            found: dict[int, set[bytes]] = {}
            loader = make_loader(square, frozen=frozen, batch=1)
            for step in range(3 * loader.steps_per_epoch):
                batch = loader.batch(step)
                found.setdefault(int(batch.index_A[0, 0]), set()).add(batch.real_A.numpy().tobytes())
            return found

        frozen = windows(True)
        assert set(frozen) == set(range(5))
        assert all(len(seen) == 1 for seen in frozen.values())
        assert all(len(seen) > 1 for seen in windows(False).values())

    def test_no_flip_when_not_wanted(self, square: tuple[Store, Store]) -> None:
        loader = make_loader(square, flip=False, crop=None, batch=1)
        for step in range(10):
            batch = loader.batch(step)
            picture = square[0][int(batch.index_A[0, 0])]
            assert torch.equal(batch.real_A[0, 0], naive_window(picture, 0, 0, False, 24))

    def test_lengths_and_names(self, square: tuple[Store, Store]) -> None:
        loader = make_loader(square, batch=2, accumulate=2)
        assert loader.length == 7
        assert loader.steps_per_epoch == 2
        assert make_loader(square, pairing="zip").length == 5
        names = loader.names_of(np.array([[0, 4], [1, 1]]), np.array([[6, 0], [2, 3]]))
        assert names == (["00.png", "04.png", "01.png", "01.png"], ["06.png", "00.png", "02.png", "03.png"])

    def test_one_picture_each(self, tmp_path: Path) -> None:
        preprocess = Preprocess("resize_and_crop", 24, 16, "bicubic", 3)
        stores = tuple(make_store(tmp_path / name, [(30, 20)], 1, preprocess) for name in "AB")
        loader = make_loader((stores[0], stores[1]), batch=3)
        assert loader.steps_per_epoch == 1
        assert loader.batch(5).index_A.tolist() == [[0, 0, 0]]

    def test_domains_of_different_channels(self, tmp_path: Path) -> None:
        gray = Preprocess("resize_and_crop", 24, 16, "bicubic", 1)
        colour = Preprocess("resize_and_crop", 24, 16, "bicubic", 3)
        stores = make_store(tmp_path / "A", [(30, 20)], 1, gray), make_store(tmp_path / "B", [(30, 20)], 1, colour)
        batch = make_loader(stores).batch(0)
        assert batch.real_A.shape == (1, 2, 1, 16, 16)
        assert batch.real_B.shape == (1, 2, 3, 16, 16)


class TestPlans:
    """What a recorded step reads instead of batches."""

    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_the_windows_named_are_those_of_the_batch(self, square: tuple[Store, Store], resident: str) -> None:
        loader = make_loader(square, batch=2, accumulate=3, resident=resident)
        for step, plan in enumerate(loader.plans(2, 9), 2):
            batch = loader.batch(step)
            assert plan.epoch == batch.epoch
            for domain, (windows, real) in enumerate(((plan.A, batch.real_A), (plan.B, batch.real_B))):
                assert windows.size == (16, 16)
                assert windows.places.shape == (4, 6)
                for n, (i, y, x, flip) in enumerate(windows.places.T.tolist()):
                    if resident == "always":
                        assert windows.cut is None
                        assert loader.images is not None
                        window = loader.images[domain][i, y : y + 16, x : x + 16].numpy()
                    else:
                        assert windows.cut is not None
                        assert (i, y, x) == (n, 0, 0)
                        window = windows.cut[n].numpy()
                    assert torch.equal(real.flatten(0, 1)[n], normalise(window[:, ::-1] if flip else window))
        assert not loader_threads()

    def test_the_shape_of_all_windows(self, square: tuple[Store, Store], uneven: tuple[Store, Store]) -> None:
        assert make_loader(square).windows == ((16, 16, 3), (16, 16, 3))
        assert make_loader(square, crop=None).windows == ((24, 24, 3), (24, 24, 3))
        assert make_loader(uneven).windows == ((16, 16, 3), (16, 16, 3))
        assert make_loader(uneven, crop=None, batch=1).windows is None


class TestWholePictures:
    def test_one_at_a_time_keeps_its_size(self, uneven: tuple[Store, Store]) -> None:
        loader = make_loader(uneven, crop=None, batch=1, flip=False)
        for batch in loader.iterate(0, 8):
            picture = uneven[1][int(batch.index_B[0, 0])]
            assert batch.real_B.shape == (1, 1, 3, *picture.shape[:2])
            assert torch.equal(batch.real_B[0, 0], normalise(picture))

    @pytest.mark.parametrize("changes", [{"batch": 2}, {"batch": 1, "accumulate": 2}])
    def test_more_than_one_is_refused_with_two_names_and_sizes(
        self, uneven: tuple[Store, Store], changes: dict[str, int]
    ) -> None:
        with pytest.raises(DataError) as caught:
            make_loader(uneven, crop=None, **changes)
        message = str(caught.value)
        assert "00.png has 30 x 20, 01.png has 31 x 22" in message
        assert "training.batch=1" in message

    def test_a_crop_larger_than_a_picture_is_refused(self, uneven: tuple[Store, Store]) -> None:
        with pytest.raises(DataError, match=r"00.png is stored with 30 x 20 pixels, too small for a crop of 21"):
            make_loader(uneven, crop=21)


class TestResidence:
    def test_always_needs_one_size(self, uneven: tuple[Store, Store]) -> None:
        with pytest.raises(DataError, match=r"data\.resident=always needs pictures of one size"):
            make_loader(uneven, resident="always")

    def test_unknown_value(self, square: tuple[Store, Store]) -> None:
        with pytest.raises(ValueError, match=r"data\.resident = 'sometimes' is not allowed: one of auto, always"):
            make_loader(square, resident="sometimes")

    def test_on_the_cpu_the_mapped_file_itself_is_read(self, square: tuple[Store, Store]) -> None:
        loader = make_loader(square, resident="auto")
        assert loader.resident
        assert loader._images is not None
        assert loader._images[0].data_ptr() == square[0][0].ctypes.data

    def test_auto_takes_less_than_a_quarter_of_the_free_memory(
        self, square: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cuda = torch.device("cuda", 0)
        needed = square[0].nbytes + square[1].nbytes
        for free, resident in ((4 * needed, False), (4 * needed + 4, True)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
            assert loader_module._keep_resident(square, cuda, "auto") is resident
            assert loader_module._keep_resident(square, cuda, "always")
            assert not loader_module._keep_resident(square, cuda, "never")

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_cuda_gives_the_same_bits(self, square: tuple[Store, Store], resident: str) -> None:
        here = make_loader(square, accumulate=2)
        there = make_loader(square, accumulate=2, device="cuda", resident=resident)
        for step, batch in enumerate(there.iterate(0, 9)):
            assert batch.real_A.is_cuda
            assert batch.real_A[0].is_contiguous(memory_format=torch.channels_last)
            assert_equal(batch._replace(real_A=batch.real_A.cpu(), real_B=batch.real_B.cpu()), here.batch(step))


class TestIterate:
    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_gives_the_batch_of_every_step(self, square: tuple[Store, Store], resident: str) -> None:
        loader = make_loader(square, accumulate=2, resident=resident)
        for start, stop in ((0, 9), (5, 8), (4, 4)):
            batches = list(loader.iterate(start, stop))
            assert len(batches) == stop - start
            for step, batch in enumerate(batches, start):
                assert_equal(batch, loader.batch(step))
        assert not loader_threads()

    def test_two_iterators_at_once(self, square: tuple[Store, Store]) -> None:
        loader = make_loader(square)
        for one, other in zip(loader.iterate(0, 6), loader.iterate(2, 8), strict=True):
            assert other.epoch >= one.epoch
        for step, (one, other) in enumerate(zip(loader.iterate(0, 6), loader.iterate(2, 8), strict=True)):
            assert_equal(one, loader.batch(step))
            assert_equal(other, loader.batch(step + 2))

    def test_the_thread_ends_when_the_iterator_is_closed(self, square: tuple[Store, Store]) -> None:
        batches = make_loader(square).iterate(0, 1000)
        next(batches)
        assert len(loader_threads()) == 1
        batches.close()
        assert not loader_threads()

    def test_the_thread_ends_when_the_iterator_is_forgotten(self, square: tuple[Store, Store]) -> None:
        batches = make_loader(square).iterate(0, 1000)
        next(batches)
        del batches
        gc.collect()
        assert not loader_threads()

    def test_the_thread_ends_when_its_reader_fails(self, square: tuple[Store, Store]) -> None:
        def read() -> None:
            for _ in make_loader(square).iterate(0, 1000):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            read()
        gc.collect()
        assert not loader_threads()

    def test_an_error_in_the_thread_is_raised_here_in_its_turn(
        self, square: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader = make_loader(square)
        real = loader._prepare

        def prepare(step: int) -> Any:
            if step == 3:
                raise OSError("the disk is gone")
            return real(step)

        monkeypatch.setattr(loader, "_prepare", prepare)
        batches = loader.iterate(0, 10)
        for step in range(3):
            assert_equal(next(batches), loader.batch(step))
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
        assert not loader_threads()

    def test_the_next_batch_is_prepared_while_this_one_is_used(
        self, square: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader = make_loader(square)
        prepared: list[int] = []
        real = loader._prepare
        monkeypatch.setattr(loader, "_prepare", lambda step: (prepared.append(step), real(step))[1])
        batches = loader.iterate(0, 100)
        next(batches)
        deadline = time.monotonic() + 10
        while len(prepared) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(prepared) <= 2 + loader_module._QUEUED  # and not the whole epoch
        batches.close()


class TestSamples:
    PREPROCESS = Preprocess("crop", 24, 16, "bicubic", 3)

    def test_evenly_spaced_and_cut_at_the_centre(self, tmp_path: Path) -> None:
        entries = write_pictures(tmp_path / "in", [(30 + i, 20 + i) for i in range(9)], 1)
        samples = load_samples(entries, self.PREPROCESS, 3)
        assert len(samples) == 3
        for sample, i in zip(samples, (0, 4, 8), strict=True):
            assert sample.shape == (1, 3, 16, 16)
            assert sample.dtype == torch.float32
            assert sample.is_contiguous(memory_format=torch.channels_last)
            picture = np.asarray(Image.open(entries[i].path))
            top, left = (20 + i - 16) // 2, (30 + i - 16) // 2
            assert torch.equal(sample[0], naive_window(picture[top : top + 16, left : left + 16], 0, 0, False, 16))

    def test_no_more_than_there_are(self, tmp_path: Path) -> None:
        entries = write_pictures(tmp_path / "in", [(30, 20)] * 2, 1)
        assert len(load_samples(entries, self.PREPROCESS, 5)) == 2
        assert len(load_samples(entries, self.PREPROCESS, 1)) == 1

    def test_whole_pictures_keep_their_sizes(self, tmp_path: Path) -> None:
        entries = write_pictures(tmp_path / "in", [(30, 20), (17, 41)], 1)
        samples = load_samples(entries, Preprocess("none", 24, 16, "bicubic", 3), 2)
        assert [tuple(sample.shape) for sample in samples] == [(1, 3, 20, 30), (1, 3, 41, 17)]

    def test_an_unreadable_one_is_refused_or_replaced(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        entries = write_pictures(tmp_path / "in", [(30, 20)] * 4, 1)
        os.truncate(entries[0].path, entries[0].bytes // 2)
        with pytest.raises(DataError, match=r"a sample picture cannot be used: .*00\.png"):
            load_samples(entries, self.PREPROCESS, 2)
        samples = load_samples(entries, self.PREPROCESS, 2, "skip")
        assert "00.png" in caplog.text
        expected = [load_samples([entries[i]], self.PREPROCESS, 1)[0] for i in (1, 3)]
        for sample, other in zip(samples, expected, strict=True):
            assert torch.equal(sample, other)

    def test_smaller_than_the_crop(self, tmp_path: Path) -> None:
        entries = write_pictures(tmp_path / "in", [(30, 15)], 1)
        with pytest.raises(DataError, match=r"00\.png: 30 x 15 pixels is too small for a crop of 16 x 16"):
            load_samples(entries, self.PREPROCESS, 1)


class TestOpenTrainingData:
    def config(self, root: Path, **data: Any) -> Config:
        fields = {"root": str(root), "load_size": 24, "crop_size": 16, "workers": 1, **data}
        return from_dict(
            {"data": fields, "training": {"batch": 2, "accumulate": 2}, "monitor": {"samples": 2}, "seed": 7}
        )

    def test_from_folders_with_a_test_split(self, tmp_path: Path) -> None:
        for i, (split, count) in enumerate((("trainA", 5), ("trainB", 7), ("testA", 4), ("testB", 1))):
            write_pictures(tmp_path / "set" / split, [(30, 20)] * count, i)
        config = self.config(tmp_path / "set", cache=str(tmp_path / "chosen"))
        data = open_training_data(config, rank=0, world_size=1, device=CPU, progress=False)
        assert set(data.scans) == {"trainA", "trainB", "testA", "testB"}
        assert data.loader.length == 7
        assert data.loader.steps_per_epoch == 2
        assert data.loader.batch(0).real_A.shape == (2, 2, 3, 16, 16)
        assert len(data.samples_A) == 2
        assert len(data.samples_B) == 1
        preprocess = Preprocess.from_config(config.data, 3)
        assert torch.equal(data.samples_A[1], load_samples(data.scans["testA"].entries, preprocess, 2)[1])
        names = sorted(path.name.split("-")[0] for path in (tmp_path / "chosen").iterdir() if path.is_dir())
        assert names == ["trainA", "trainB"]

    def test_samples_come_from_the_training_set_when_there_is_no_other(self, tmp_path: Path) -> None:
        for i, split in enumerate(("trainA", "trainB")):
            write_pictures(tmp_path / "set" / split, [(30, 20)] * 3, i)
        data = open_training_data(self.config(tmp_path / "set"), rank=0, world_size=1, device=CPU, progress=False)
        preprocess = Preprocess("resize_and_crop", 24, 16, "bicubic", 3)
        assert torch.equal(data.samples_B[0], load_samples(data.scans["trainB"].entries, preprocess, 2)[0])
        assert (tmp_path / "cache").is_dir()  # the default one, from the environment

    def test_a_subset_and_two_ranks(self, tmp_path: Path) -> None:
        for i, split in enumerate(("trainA", "trainB", "testA", "testB")):
            write_pictures(tmp_path / "set" / split, [(30, 20)] * 6, i)
        config = self.config(tmp_path / "set", limit_train=4, limit_test=1)
        ranks = [open_training_data(config, rank=r, world_size=2, device=CPU, progress=False) for r in (0, 1)]
        assert [data.loader.length for data in ranks] == [4, 4]
        assert [data.loader.steps_per_epoch for data in ranks] == [1, 1]
        assert len(ranks[0].samples_A) == 1
        shown = [set(data.loader.names_of(*data.loader.batch(0)[2:4])[0]) for data in ranks]
        assert len(shown[0] | shown[1]) == 4  # each of the four once over both ranks, and no other

    def test_progress_is_that_of_rank_0(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        for i, split in enumerate(("trainA", "trainB")):
            write_pictures(tmp_path / "set" / split, [(30, 20)] * 2, i)
        open_training_data(self.config(tmp_path / "set"), rank=1, world_size=2, device=CPU, progress=True)
        assert capfd.readouterr().err == ""
        config = self.config(tmp_path / "set", resample="bilinear")
        open_training_data(config, rank=0, world_size=2, device=CPU, progress=True)
        err = capfd.readouterr().err
        assert "decoding trainA" in err
        assert "decoding trainB" in err

    def test_synthetic_pictures_are_rendered_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[Any, dict[str, Any]]] = []

        def ensure_dataset(root: Path, **settings: Any) -> Path:
            calls.append((root, settings))
            for i, split in enumerate(("trainA", "trainB")):
                write_pictures(root / split, [(settings["size"],) * 2] * settings["train"], i)
            return root

        monkeypatch.setattr(loader_module.synthetic, "ensure_dataset", ensure_dataset)
        config = self.config(
            tmp_path / "new",
            source="synthetic",
            synthetic_train=3,
            synthetic_test=2,
            synthetic_size=32,
            synthetic_seed=5,
            synthetic_styles=2,
            pairing="aligned",
        )
        data = open_training_data(config, rank=0, world_size=1, device=CPU, progress=False)
        settings = {"train": 3, "test": 2, "size": 32, "seed": 5, "aligned": True, "styles": 2}
        settings |= {"workers": 1, "progress": False}
        assert calls == [(tmp_path / "new", settings)]
        assert data.loader.length == 3

    def test_folders_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            open_training_data(self.config(tmp_path / "none"), rank=0, world_size=1, device=CPU, progress=False)
