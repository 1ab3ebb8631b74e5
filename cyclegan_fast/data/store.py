"""Every picture decoded once into one memory-mapped file of raw bytes.

A store is a folder with ``data.bin`` (the pictures one after the other, uint8 [H, W, C] each) and ``index.json``
(their names and sizes). Its name carries a hash of everything its bytes depend on, and it gets that name by one
rename when it is complete and on disk: what has the name is whole.

Decoding runs in worker processes. They are started as plain interpreters that import this module, not by
``multiprocessing``: that would run the user's main script, and so import torch, in each of them, and its workers
outlive a killed parent. A worker here takes JSON lines from its standard input and ends when that closes. For the same
reason this module imports torch only where a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from cyclegan_fast.data.folder import DataError, Entry
from cyclegan_fast.data.photo import MAX_PIXELS, PhotoError, open_photo
from cyclegan_fast.errors import shown
from cyclegan_fast.machine import usable_cores
from cyclegan_fast.progress import Bar

if TYPE_CHECKING:
    import torch

    from cyclegan_fast.config import DataConfig

_flock: ModuleType | None
try:
    import fcntl as _flock
except ImportError:  # Windows: builders are told apart by their temporary names alone
    _flock = None

__all__ = ["Preprocess", "Store", "default_cache", "open_store"]

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]

_log = logging.getLogger("cyclegan_fast.store")

_FORMAT = 2  # part of the key: raise it when the bytes of a store change their meaning
_LISTED = 20  # files named in one message
_PIXELS_A_WORKER = 20_000_000  # below this, starting another process takes longer than it saves
_INDEX_BYTES_A_PICTURE = 32_768  # a name of 4096 bytes, escaped, and its size
_UNFINISHED = re.compile(r"(.+-[0-9a-f]{32})-[0-9a-f]{8}\.tmp")  # names of folders that builders work in
_STALE_SECONDS = 24 * 3600.0  # without file locks, an unfinished store of this age belongs to a killed builder

_CROPPING = ("resize_and_crop", "crop", "scale_width_and_crop")
_PILLOW_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """The deterministic part of how a picture becomes a training sample; fields as in DataConfig, sizes in pixels.

    half: the half of each picture that is this domain's, `left` or `right`; empty for all of it.
    """

    mode: str
    load_size: int
    crop_size: int
    resample: str
    channels: int
    half: str = ""

    @classmethod
    def from_config(cls, data: DataConfig, channels: int, domain: str = "A") -> Preprocess:
        """The preprocessing of a domain, `A` or `B`, whose pictures have this many channels."""
        half = {"A": "left", "B": "right"}[domain] if data.source == "side_by_side" else ""
        return cls(data.preprocess, data.load_size, data.crop_size, data.resample, channels, half)

    @property
    def crop(self) -> int | None:
        """Side of the square window that training samples are cut with, pixels; None for modes without a crop."""
        return self.crop_size if self.mode in _CROPPING else None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the stored picture for an original of width x height pixels.

        resize_and_crop: load_size squared, aspect ignored. scale_width_and_crop: the width becomes load_size, the
        height follows, rounded down, but is at least crop_size. These two, `crop` and `none` are the de-facto rules,
        except that `none` does not round to multiples of 4. scale_width follows scale_width_and_crop without the
        lower limit, which would distort pictures that are never cropped; scale_shortside brings the short side to
        load_size, the other one rounded. Of a half, the width is that of the half. Raises ValueError for an unknown
        mode.
        """
        return self._resized(max(width // 2, 1) if self.half else width, height)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.mode == "resize_and_crop":
            return self.load_size, self.load_size
        if self.mode in ("crop", "none"):
            return height, width
        if self.mode in ("scale_width", "scale_width_and_crop"):
            least = self.crop_size if self.mode == "scale_width_and_crop" else 1
            return max(self.load_size * height // width, least), self.load_size
        if self.mode == "scale_shortside":
            if width <= height:
                return round(height * self.load_size / width), self.load_size
            return self.load_size, round(width * self.load_size / height)
        raise ValueError(f"data.preprocess = {self.mode!r} is not a known mode")

    def part(self, image: Image.Image) -> Image.Image:
        """What of the picture is this domain's: all of it, or the half."""
        if not self.half:
            return image
        width = max(image.width // 2, 1)  # of an odd width, the middle column belongs to neither
        left = 0 if self.half == "left" else image.width - width
        return image.crop((left, 0, left + width, image.height))

    def apply(self, image: Image.Image) -> UInt8Array:
        """The picture as stored: uint8 [H, W, C], resized as `size` says. Raises ValueError for an unknown mode."""
        image = self.part(image)
        height, width = self._resized(*image.size)
        if (width, height) != image.size:
            if self.resample == "bilinear_tf":
                return _resize_bilinear_tf(_pixels(image), height, width)
            image = image.resize((width, height), _PILLOW_FILTERS[self.resample])
        return _pixels(image)


@dataclass(frozen=True, eq=False)
class Store:
    """Decoded pictures in a memory-mapped file.

    names: within the domain's folder; sizes: int64 [N, 2], height and width; offsets: int64 [N], bytes; uniform:
    whether all sizes are equal; digests: int64 [N], 64 bits of the SHA-256 of each file that was decoded, which stay
    when a file is moved or its time changes; left_out: (name, reason) of the pictures that could not be decoded.
    """

    path: Path
    names: list[str]
    sizes: Int64Array
    channels: int
    left_out: tuple[tuple[str, str], ...] = ()
    digests: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    offsets: Int64Array = field(init=False)
    uniform: bool = field(init=False)
    nbytes: int = field(init=False)
    _data: np.memmap[Any, np.dtype[np.uint8]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = self.sizes.prod(axis=1) * self.channels
        set_field = functools.partial(object.__setattr__, self)
        set_field("offsets", np.cumsum(lengths) - lengths)
        set_field("uniform", bool((self.sizes == self.sizes[0]).all()))
        set_field("nbytes", int(lengths.sum()))
        set_field("_data", np.memmap(self.path / "data.bin", dtype=np.uint8, mode="r", shape=(self.nbytes,)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> UInt8Array:
        """Picture `index` as a read-only view uint8 [H, W, C] of the file. Raises IndexError."""
        height, width = (int(side) for side in self.sizes[index])
        start = int(self.offsets[index])
        view: UInt8Array = self._data[start : start + height * width * self.channels]
        return view.reshape(height, width, self.channels)

    def tensor(self) -> torch.Tensor:
        """All pictures as one uint8 tensor [N, H, W, C] without a copy: a view of the file, never to be written to.

        Raises DataError when the pictures differ in size.
        """
        import torch

        if not self.uniform:
            raise DataError(f"the pictures in {self.path} differ in size and cannot be one tensor")
        height, width = (int(side) for side in self.sizes[0])
        with warnings.catch_warnings():
            # torch warns that the memory is read-only; a writable private mapping would be refused by the system for
            # a store larger than its memory.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(self._data)
        return flat.view(len(self), height, width, self.channels)


def default_cache() -> Path:
    """Folder for stores: $CYCLEGAN_FAST_CACHE, else `cyclegan_fast` in the user's cache folder of the platform."""
    chosen = os.environ.get("CYCLEGAN_FAST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cyclegan_fast"


def open_store(
    entries: Sequence[Entry],
    preprocess: Preprocess,
    *,
    cache: Path,
    split: str,
    unreadable: str = "refuse",
    workers: int = 0,
    progress: bool = False,
) -> Store:
    """The store of these pictures: mapped when it exists in the folder `cache`, otherwise decoded into it first.

    split names the store's folder and its progress bar. unreadable says what becomes of a picture that cannot be
    decoded, or that changed since it was scanned: `refuse` raises, `skip` leaves it out with a warning. workers is the
    number of decoding processes, 1 for none beside this one, 0 for as many as pay. With progress a bar is shown on
    standard error.

    Raises DataError for no pictures, pictures smaller than the crop, unreadable pictures, and a cache folder that
    cannot be written or is full; nothing half-built is left behind then.
    """
    if not entries:
        raise DataError(f"{split}: there are no pictures")
    _check_sizes(entries, preprocess, split)
    cache = Path(cache).expanduser()
    key = _key(entries, preprocess)
    store = _read(_folder(cache, split, key), key, entries, preprocess)
    if store is None:
        builder = _Builder(entries, preprocess, cache, split, unreadable, workers, progress)
        try:
            store = builder.run(key)
        except OSError as error:
            raise DataError(
                f"the decoded pictures of {split} cannot be kept in {cache}: {error.strerror or error}. Make room "
                "there, or choose another folder with data.cache"
            ) from error
    _report_left_out(store.left_out, len(entries), split, unreadable)
    return store


def _pixels(image: Image.Image) -> UInt8Array:
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def _resize_bilinear_tf(array: UInt8Array, height: int, width: int) -> UInt8Array:
    """Bilinear interpolation at half-pixel centres without antialiasing, as ``tf.image.resize`` does by default.

    An output pixel i reads the input at (i + 0.5) * in / out - 0.5, clamped to the picture. TensorFlow keeps the
    fractions; a store holds bytes, so they are rounded.
    """
    values = array.astype(np.float32)
    for axis, (size, new) in enumerate(zip(array.shape, (height, width), strict=False)):
        source = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
        low = np.floor(source).astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        weight = (source - low).astype(np.float32).reshape(shape)
        first = values.take(low, axis=axis)
        values = first + (values.take(high, axis=axis) - first) * weight
    return np.rint(values).astype(np.uint8)


def _check_sizes(entries: Sequence[Entry], preprocess: Preprocess, split: str) -> None:
    large = [
        f"{entry.path}: {entry.width} x {entry.height} becomes {width} x {height}"
        for entry in entries
        for height, width in [preprocess.size(entry.width, entry.height)]
        if height * width > MAX_PIXELS
    ]
    if large:
        raise DataError(
            f"{split}: {len(large)} of {len(entries)} pictures would have more than {MAX_PIXELS / 1e6:.0f} megapixels "
            f"with preprocess {preprocess.mode} and load_size {preprocess.load_size}. Take out these narrow pictures, "
            f"or choose data.preprocess=resize_and_crop:\n{_listing(large)}"
        )
    crop = preprocess.crop
    if crop is None:
        return
    small = [entry for entry in entries if min(preprocess.size(entry.width, entry.height)) < crop]
    if small:
        lines = _listing([f"{entry.path}: {entry.width} x {entry.height}" for entry in small])
        raise DataError(
            f"{split}: {len(small)} of {len(entries)} pictures are too small for a crop of {crop} x {crop} pixels "
            f"with preprocess {preprocess.mode}. Lower data.crop_size, or choose data.preprocess=resize_and_crop, "
            f"which enlarges them:\n{lines}"
        )


def _listing(lines: Sequence[str]) -> str:
    listed = [f"  {shown(line)}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        listed.append(f"  and {len(lines) - _LISTED} more")
    return "\n".join(listed)


def _report_left_out(left_out: Sequence[tuple[str, str]], total: int, split: str, unreadable: str) -> None:
    if not left_out:
        return
    lines = _listing([f"{name}: {reason}" for name, reason in left_out])
    if unreadable == "skip" and len(left_out) < total:
        _log.warning("%s: %d of %d pictures left out:\n%s", split, len(left_out), total, lines)
        return
    hint = "" if unreadable == "skip" else " (data.unreadable=skip leaves them out)"
    raise DataError(f"{split}: {len(left_out)} of {total} pictures cannot be used{hint}:\n{lines}")


def _key(entries: Sequence[Entry], preprocess: Preprocess) -> str:
    """Hash of all that a store's bytes depend on."""
    files = [(entry.name, str(entry.path.absolute()), entry.bytes, entry.mtime_ns) for entry in entries]
    text = json.dumps([_FORMAT, asdict(preprocess), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(cache: Path, split: str, key: str) -> Path:
    return cache / f"{split}-{key[:32]}"


def _read(folder: Path, key: str, entries: Sequence[Entry], preprocess: Preprocess) -> Store | None:
    """The complete store of these pictures in a folder, or None when there is none or it is damaged.

    What the index says is believed only where it is what building the store would say: an index made up by another
    could have pictures lie anywhere in memory.
    """
    try:
        for name in ("index.json", "data.bin"):
            if not stat.S_ISREG((folder / name).stat().st_mode):
                raise ValueError(f"{name} is not a file")
        if (folder / "index.json").stat().st_size > (1 << 20) + _INDEX_BYTES_A_PICTURE * len(entries):
            raise ValueError("index.json is longer than its pictures explain")
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        left_out = tuple((str(name), str(reason)) for name, reason in index["left_out"])
        without = {name for name, _ in left_out}
        sizes = {e.name: preprocess.size(e.width, e.height) for e in entries if e.name not in without}
        if (
            index["key"] != key
            or index["names"] != list(sizes)
            or index["sizes"] != [list(size) for size in sizes.values()]
            or index["channels"] != preprocess.channels
            or len(index["digests"]) != len(sizes)
        ):
            raise ValueError("its index is not that of these pictures")
        array = np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2)
        digests = np.array([int(digest, 16) for digest in index["digests"]], dtype=np.uint64).view(np.int64)
        store = Store(folder, list(sizes), array, preprocess.channels, left_out, digests)
        if not (folder / "data.bin").stat().st_size == index["bytes"] == store.nbytes:
            raise ValueError("its length is wrong")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError, KeyError, TypeError, IndexError, RecursionError) as error:
        _log.warning("the store %s is damaged and will be built again: %s", folder, error)
        return None
    return store


@dataclass(frozen=True)
class _Task:
    """One picture to decode, the size and time its file had, and where its bytes go.

    height, width: of the stored picture, pixels; offset, length: of its place in data.bin, bytes.
    """

    index: int
    path: str
    bytes: int
    mtime_ns: int
    offset: int
    height: int
    width: int
    length: int


@dataclass(frozen=True)
class _Failure:
    """Why a picture cannot be used; a passing reason lies in a change of the file, not in what the file holds."""

    reason: str
    passing: bool = False


_Outcome: TypeAlias = "_Failure | str"  # of one picture: why it cannot be used, or the digest of its file


@dataclass(frozen=True)
class _Builder:
    """Decodes pictures into a new store."""

    entries: Sequence[Entry]
    preprocess: Preprocess
    cache: Path
    split: str
    unreadable: str
    workers: int
    progress: bool

    def run(self, key: str) -> Store:
        """Build the store of this key, unless another process does so meanwhile. Raises OSError, DataError."""
        self.cache.mkdir(parents=True, exist_ok=True)
        folder = _folder(self.cache, self.split, key)
        with _locked(folder.with_suffix(".lock")):
            _remove_leftovers(self.cache, mine=folder.name)
            store = _read(folder, key, self.entries, self.preprocess)
            if store is not None:
                return store
            temporary = self.cache / f"{folder.name}-{uuid.uuid4().hex[:8]}.tmp"
            temporary.mkdir()
            try:
                return self._publish(temporary, *self._fill(temporary), key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _fill(self, temporary: Path) -> tuple[dict[int, _Failure], dict[int, str]]:
        """Decode everything into the temporary folder; the pictures that failed and the others' digests, by index."""
        tasks = self._tasks()
        total = sum(task.length for task in tasks)
        free = shutil.disk_usage(temporary).free
        if free < total:
            raise OSError(f"{total / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        data = temporary / "data.bin"
        with data.open("wb") as file:
            file.truncate(total)
        label = self.split if self.progress else None
        outcomes = _decode(tasks, self.preprocess, data, self._worker_count(), label)
        failures = {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, _Failure)}
        reasons = [(self.entries[index].name, failure.reason) for index, failure in sorted(failures.items())]
        if self.unreadable == "refuse" or len(failures) == len(tasks):
            _report_left_out(reasons, len(tasks), self.split, self.unreadable)
        _close_gaps(data, [task for task in tasks if task.index not in failures])
        return failures, {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, str)}

    def _tasks(self) -> list[_Task]:
        tasks: list[_Task] = []
        offset = 0
        for index, entry in enumerate(self.entries):
            height, width = self.preprocess.size(entry.width, entry.height)
            length = height * width * self.preprocess.channels
            tasks.append(_Task(index, str(entry.path), entry.bytes, entry.mtime_ns, offset, height, width, length))
            offset += length
        return tasks

    def _worker_count(self) -> int:
        pixels = sum(entry.width * entry.height for entry in self.entries)
        wanted = self.workers or min(usable_cores(), 1 + pixels // _PIXELS_A_WORKER)
        return min(wanted, len(self.entries))

    def _publish(self, temporary: Path, failures: dict[int, _Failure], digests: dict[int, str], key: str) -> Store:
        """Write the index, make everything durable and give the store its name."""
        passing = {index for index, failure in failures.items() if failure.passing}
        entries = [entry for index, entry in enumerate(self.entries) if index not in passing]
        if passing:
            # The file may be as the scan saw it again: the store without it must not stand for the store with it.
            key = _key(entries, self.preprocess)
        kept = [entry for index, entry in enumerate(self.entries) if index not in failures]
        lasting = [[self.entries[i].name, failures[i].reason] for i in sorted(failures.keys() - passing)]
        index = {
            "key": key,
            "channels": self.preprocess.channels,
            "bytes": (temporary / "data.bin").stat().st_size,
            "left_out": lasting,
            "names": [entry.name for entry in kept],
            "sizes": [self.preprocess.size(entry.width, entry.height) for entry in kept],
            "digests": [digests[index] for index in sorted(digests)],
        }
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        for name in ("data.bin", "index.json", "."):
            _sync(temporary / name)
        folder = _folder(self.cache, self.split, key)
        look = functools.partial(_read, folder, key, entries, self.preprocess)
        _rename(temporary, folder, look)
        store = look()
        if store is None:
            raise OSError(f"{folder} vanished while it was being opened")
        if passing:
            _report_left_out(
                [(self.entries[i].name, failures[i].reason) for i in sorted(passing)],
                len(self.entries),
                self.split,
                self.unreadable,
            )
        return store


def _sync(path: Path) -> None:
    """Make a file or a folder durable; Windows cannot sync a folder."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, folder: Path, look: Callable[[], Store | None]) -> None:
    """Give a finished store its name. What has it already stays if it is complete, and makes room if it is not."""
    if os.path.lexists(folder) and look() is None:
        damaged = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}.tmp")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if look() is None:
            raise
    _sync(folder.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one store, so that of two builders the second waits and then finds the store.

    Where the file system has no locks both build, and the first to finish wins; the outcome is the same.
    """
    with path.open("a") as file:
        if not _lock(file, wait=False):
            _log.info("waiting for another process that is decoding the same pictures")
            _lock(file, wait=True)
        yield


def _lock(file: IO[str], *, wait: bool) -> bool:
    """Lock an open file until it is closed, or its process ends. False when another process holds the lock."""
    if _flock is None:
        return True
    try:
        _flock.flock(file, _flock.LOCK_EX | (0 if wait else _flock.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _log.debug("no file locks in %s: %s", file.name, error)
    return True


def _remove_leftovers(cache: Path, mine: str) -> None:
    """Remove what killed builders left: unfinished stores whose lock nobody holds. The caller holds that of `mine`."""
    for folder in cache.glob("*.tmp"):
        match = _UNFINISHED.fullmatch(folder.name)
        if match is None:  # the user may have chosen a folder that holds more than stores
            continue
        name = match[1]
        with contextlib.suppress(OSError):
            if _flock is None:
                if time.time() - folder.stat().st_mtime < _STALE_SECONDS:
                    continue
            elif name != mine:
                with (cache / f"{name}.lock").open("a") as file:
                    if not _lock(file, wait=False):
                        continue
            _log.info("removing %s, which a killed process left unfinished", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _close_gaps(data: Path, kept: Sequence[_Task]) -> None:
    """Move the pictures that were decoded together, in place and in order, and cut the file behind them."""
    with data.open("r+b") as file:
        end = 0
        for task in kept:
            if task.offset != end:
                file.seek(task.offset)
                picture = file.read(task.length)
                file.seek(end)
                file.write(picture)
            end += task.length
        file.truncate(end)


def _decode(
    tasks: Sequence[_Task], preprocess: Preprocess, data: Path, workers: int, label: str | None
) -> dict[int, _Outcome]:
    """Decode every task's picture into the file; outcomes by index. label: of the progress bar, None for none.

    Raises OSError when the file cannot be written.
    """
    decode = _decode_here if workers == 1 else functools.partial(_decode_in_workers, workers=workers)
    outcomes: dict[int, _Outcome] = {}
    with (
        contextlib.closing(decode(tasks, preprocess, data)) as results,
        Bar(total=len(tasks), desc=f"decoding {label}", unit="picture", disable=label is None) as bar,
    ):
        for index, outcome in results:
            bar.update()
            outcomes[index] = outcome
    return outcomes


_Results = Generator[tuple[int, _Outcome], None, None]


def _decode_here(tasks: Sequence[_Task], preprocess: Preprocess, data: Path) -> _Results:
    with data.open("r+b") as file:
        for task in tasks:
            yield task.index, _store_picture(task, preprocess, file)


def _decode_in_workers(tasks: Sequence[_Task], preprocess: Preprocess, data: Path, workers: int) -> _Results:
    """One thread feeds each worker process; each task comes back once, or an exception does."""
    todo: queue.SimpleQueue[_Task] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)
    done: queue.SimpleQueue[tuple[int, _Outcome] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    pool = [_Worker(preprocess, data) for _ in range(workers)]
    threads = [threading.Thread(target=_feed, args=(worker, todo, done, stop), daemon=True) for worker in pool]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            answer = done.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        stop.set()
        for worker in pool:
            worker.interrupt()
        for thread in threads:
            thread.join()


def _feed(
    worker: _Worker,
    todo: queue.SimpleQueue[_Task],
    done: queue.SimpleQueue[tuple[int, _Outcome] | BaseException],
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            task = todo.get_nowait()
            done.put((task.index, worker.ask(task)))
    except queue.Empty:
        pass
    except Exception as error:  # raised again by the thread that waits for the results
        done.put(error)
    finally:
        worker.close()


class _Worker:
    """The near side of a decoding process: started at the first question, and again when it died over one."""

    def __init__(self, preprocess: Preprocess, data: Path) -> None:
        self._settings = json.dumps([sys.path, asdict(preprocess), str(data)])
        self._process: subprocess.Popen[str] | None = None

    def ask(self, task: _Task) -> _Outcome:
        """Have one picture decoded. Raises OSError when its bytes cannot be written, DataError without a process."""
        process = self._process or self._start()
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            answer = self._exchange(process, json.dumps(asdict(task)) + "\n")
        if not answer:
            status = self.close()
            return _Failure(f"the process that decoded it died with status {status}, perhaps of memory", passing=True)
        message = json.loads(answer)
        for name, level, text in message["log"]:
            logging.getLogger(name).log(level, "%s", text)
        if message["error"] is not None:
            raise OSError(*message["error"])
        outcome = message["outcome"]
        return outcome if isinstance(outcome, str) else _Failure(**outcome)

    def interrupt(self) -> None:
        """End the process, whatever it is doing; may be called by another thread than the one that asks."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> int:
        """End the process and let go of its pipes; its exit status, 0 if there is no process."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.stdin is not None and process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # an idle process ends by itself at the end of its input
            process.stdout.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        # One thread each: the parallelism is over processes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_PROGRAM, self._settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env=environment,
        )
        if not self._exchange(process, ""):
            raise DataError(
                f"a decoding process ended with status {self.close()} at its start (see its message above); "
                "data.workers=1 decodes without further processes"
            )
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str) -> str:
        """Send a line, if any, and receive one; an empty one from a process that has ended."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a decoding process was started without its pipes")
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()


_WORKER_PROGRAM = """\
import json, sys
search_path, preprocess, data = json.loads(sys.argv[1])
sys.path[:] = search_path
from cyclegan_fast.data.store import _serve
_serve(preprocess, data)
"""


class _Collect(logging.Handler):
    """Keeps log records as plain values, for the process that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelno, record.getMessage()))


def _serve(preprocess: dict[str, Any], data: str) -> None:
    """The far side of a decoding process: one JSON line in, one out, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what follows
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    collect = _Collect()
    logger = logging.getLogger("cyclegan_fast")
    logger.addHandler(collect)
    logger.propagate = False
    settings = Preprocess(**preprocess)
    answers.write(b"ready\n")
    with Path(data).open("r+b") as file, contextlib.suppress(BrokenPipeError):  # the parent may be gone
        for line in sys.stdin:
            answer: dict[str, Any] = {"outcome": None, "error": None}
            try:
                outcome = _store_picture(_Task(**json.loads(line)), settings, file)
                answer["outcome"] = outcome if isinstance(outcome, str) else asdict(outcome)
            except OSError as error:
                answer["error"] = [error.errno, error.strerror]
            answers.write(json.dumps({**answer, "log": collect.records}).encode() + b"\n")
            collect.records.clear()


def _store_picture(task: _Task, preprocess: Preprocess, file: IO[bytes]) -> _Outcome:
    """Decode one picture and write its bytes to its place. Raises OSError when they cannot be written."""
    path = Path(task.path)
    reason = None
    pixels = None
    try:
        pixels = preprocess.apply(open_photo(path, channels=preprocess.channels).image)
    except PhotoError as error:
        reason = error.reason
    # Looked at after decoding, so that a file written meanwhile is noticed too.
    try:
        digest = _file_digest(path) if pixels is not None else ""
        status = path.stat()
    except OSError as error:
        return _Failure(f"vanished after it was scanned: {error.strerror}", passing=True)
    if (status.st_size, status.st_mtime_ns) != (task.bytes, task.mtime_ns):
        return _Failure("changed after it was scanned", passing=True)
    if pixels is None:
        return _Failure(reason or "cannot be decoded")
    if pixels.shape != (task.height, task.width, preprocess.channels):
        return _Failure(f"is stored as {list(pixels.shape)} but its header promised {[task.height, task.width]}")
    file.seek(task.offset)
    file.write(pixels.tobytes())
    file.flush()
    return digest


def _file_digest(path: Path) -> str:
    """64 bits of the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
