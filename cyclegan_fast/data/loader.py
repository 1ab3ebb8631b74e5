"""Batches of pictures of two domains on the device, each one a pure function of the step."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cyclegan_fast import distributed
from cyclegan_fast.config import Config
from cyclegan_fast.data import sampler, synthetic
from cyclegan_fast.data.fixed import load_shown, used
from cyclegan_fast.data.folder import DataError, Entry, Scan, align, scan_dataset, scan_side_by_side, stem
from cyclegan_fast.data.store import Preprocess, Store, default_cache, open_store
from cyclegan_fast.ops.crop_flip import crop_flip

__all__ = ["Batch", "PairLoader", "Plan", "TrainingData", "Windows", "open_training_data"]

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

_log = logging.getLogger("cyclegan_fast.loader")

_QUEUED = 2  # batches prepared ahead
_POLL_SECONDS = 0.1  # how often a full queue's writer looks whether anyone still reads


class Batch(NamedTuple):
    """The pictures of one optimiser step.

    real_A, real_B: float32 [accumulate, batch, C, h, w] in [-1, 1] on the device, each micro-batch channels_last;
    index_A, index_B: int64 [accumulate, batch], the pictures' places in their stores; epoch: from 1.
    """

    real_A: Tensor
    real_B: Tensor
    index_A: Int64Array
    index_B: Int64Array
    epoch: int


@dataclass(frozen=True)
class Windows:
    """What one domain contributes to a step, as the host prepares it, for n = accumulate * batch pictures.

    index: int64 [accumulate, batch], the pictures' places in the store; places: int64 [4, n], rows picture, y, x, flip,
    of the windows in the store or in `cut`, pinned for CUDA; size: (h, w); cut: uint8 [n, h, w, C], the windows
    themselves where they are cut on the host, pinned for CUDA, else None.
    """

    index: Int64Array
    places: Tensor
    size: tuple[int, int]
    cut: Tensor | None


class Plan(NamedTuple):
    """The host's part of one optimiser step: which windows of which pictures; epoch: from 1."""

    A: Windows
    B: Windows
    epoch: int


@dataclass(frozen=True)
class TrainingData:
    """Everything a training run reads: the loader, fixed samples [1, C, h, w] of each domain, and the scans.

    stores: the training pictures of A and of B; held_out: the pictures of testA and testB that are used, none where
    there is no such split, and how they are read.
    """

    loader: PairLoader
    samples_A: list[Tensor]
    samples_B: list[Tensor]
    scans: dict[str, Scan]
    stores: tuple[Store, Store]
    held_out: tuple[tuple[tuple[Entry, ...], Preprocess], tuple[tuple[Entry, ...], Preprocess]]


class PairLoader:
    """Pairs of windows from two stores, in an order that depends on the seed alone.

    crop: side of the square windows, pixels, or None for whole pictures. flip: mirror with probability 1/2. pairing
    and frozen as data.pairing and data.frozen_augmentation; aligned pictures are those of one name, suffix apart, and
    what the other store lacks is left out. rank and world_size: this process's share of each step.

    resident: `always` keeps both stores on the device as they are, `never` cuts the windows on the host; `auto` is
    `always` if the pictures of each store have one size and both stores take less than a quarter of the device's free
    memory. On the CPU the resident store is the mapped file itself. The batches are the same to the bit.

    Raises DataError for a crop that does not fit, for whole pictures of several sizes with more than one a step, and
    for aligned pictures of different sizes.
    """

    length: int
    steps_per_epoch: int

    def __init__(
        self,
        store_A: Store,
        store_B: Store,
        *,
        crop: int | None,
        flip: bool,
        pairing: str,
        frozen: bool,
        seed: int,
        batch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        resident: str,
    ) -> None:
        self._stores = (store_A, store_B)
        self._crop = crop
        self._flip = flip
        self._frozen = frozen
        self._seed = seed
        self._device = _with_index(torch.device(device))
        for store in self._stores:
            _check_store(store, crop, batch * accumulate)
        self._pairs = _aligned_places(store_A, store_B) if pairing == "aligned" else None
        counts = (len(store_A), len(store_B)) if self._pairs is None else (len(self._pairs[0]),) * 2
        self.length = sampler.epoch_length(*counts, pairing)
        self.steps_per_epoch = sampler.steps_per_epoch(self.length, batch * accumulate * world_size)
        self._positions = functools.partial(
            sampler.batch_positions,
            batch=batch,
            accumulate=accumulate,
            world_size=world_size,
            rank=rank,
            length=self.length,
        )
        order = functools.partial(sampler.epoch_order, *counts, pairing=pairing, seed=seed)
        # A step needs one epoch's order, and the thread that prepares ahead may already be in the next epoch.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: order(epoch=epoch))
        self._images: tuple[Tensor, Tensor] | None = None
        if _keep_resident(self._stores, self._device, resident):
            self._images = (store_A.tensor().to(self._device), store_B.tensor().to(self._device))

    @property
    def resident(self) -> bool:
        """Whether the stores are on the device."""
        return self._images is not None

    @property
    def images(self) -> tuple[Tensor, Tensor] | None:
        """The stores of A and of B, uint8 [M, H, W, C], on the device, if they are kept there."""
        return self._images

    @property
    def windows(self) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
        """(h, w, C) of every window of A and of B, or None where whole pictures have several sizes."""
        if self._crop is None and not all(store.uniform for store in self._stores):
            return None
        sizes = [(int(store.sizes[0, 0]), int(store.sizes[0, 1])) for store in self._stores]
        height_width = sizes if self._crop is None else [(self._crop, self._crop)] * 2
        (A, B) = ((*size, store.channels) for size, store in zip(height_width, self._stores, strict=True))
        return A, B

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """File names of all pictures of A and of B, in the order of their indices."""
        return self._stores[0].names, self._stores[1].names

    @property
    def digests(self) -> tuple[Int64Array, Int64Array]:
        """64 bits of hash of each picture's file, int64 [M], of A and of B."""
        return self._stores[0].digests, self._stores[1].digests

    def names_of(self, index_A: Int64Array, index_B: Int64Array) -> tuple[list[str], list[str]]:
        """File names of the pictures of a batch, flattened."""
        store_A, store_B = self._stores
        return [store_A.names[i] for i in index_A.flat], [store_B.names[i] for i in index_B.flat]

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from 0 over the whole run. Raises ValueError for a negative step."""
        return self._finish(self._prepare(step))

    def iterate(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of the steps [start, stop), the host's part of each prepared ahead by a thread: see `plans`.

        All work on the device is queued by the caller's thread, in its current stream.
        """
        with contextlib.closing(self.plans(start, stop)) as plans:
            for plan in plans:
                yield self._finish(plan)

    def plans(self, start: int, stop: int) -> Generator[Plan, None, None]:
        """The host's part of the steps [start, stop), prepared ahead by a thread.

        What goes wrong there is raised here. The thread ends with the iterator: when it is exhausted, closed or
        collected.
        """
        ahead: queue.Queue[Plan | BaseException] = queue.Queue(_QUEUED)
        closed = threading.Event()
        thread = threading.Thread(
            target=self._prepare_ahead, args=(start, stop, ahead, closed), name="cyclegan_fast-loader", daemon=True
        )
        thread.start()
        try:
            for _ in range(start, stop):
                plan = ahead.get()
                if isinstance(plan, BaseException):
                    raise plan
                yield plan
        finally:
            closed.set()
            thread.join()

    def _prepare_ahead(
        self, start: int, stop: int, ahead: queue.Queue[Plan | BaseException], closed: threading.Event
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: pinned memory belongs to a device
        for step in range(start, stop):
            item: Plan | BaseException
            try:
                item = self._prepare(step)
            except BaseException as error:  # raised again by the thread that asks for the batch
                item = error
            while not closed.is_set():
                try:
                    ahead.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if closed.is_set() or isinstance(item, BaseException):
                return

    def _prepare(self, step: int) -> Plan:
        """The host's part of a step: which windows, and their bytes unless the stores are on the device."""
        epoch, positions = self._positions(step)
        order = self._order(epoch)
        A, B = (self._choose(domain, order[domain][positions], epoch, positions) for domain in (0, 1))
        return Plan(A, B, epoch)

    def _choose(self, domain: int, index: Int64Array, epoch: int, positions: Int64Array) -> Windows:
        """The windows of the pictures, or, where they are aligned, of the pairs `index`."""
        store = self._stores[domain]
        stream = domain if self._pairs is None else 0  # a pair has the crop and the flip of its picture of A
        if self._frozen:
            draws = sampler.crop_draws(self._seed, 0, index.reshape(-1), stream)
        else:
            draws = sampler.crop_draws(self._seed, epoch, positions.reshape(-1), stream)
        if self._pairs is not None:
            index = self._pairs[domain][index]
        flat = index.reshape(-1)
        sizes = store.sizes[flat]
        size = (int(sizes[0, 0]), int(sizes[0, 1])) if self._crop is None else (self._crop, self._crop)
        room = sizes - size + 1
        places = np.zeros((4, len(flat)), dtype=np.int64)
        places[0] = flat
        places[1] = draws.y * room[:, 0]
        places[2] = draws.x * room[:, 1]
        places[3] = draws.flip & self._flip
        cut = None
        if self._images is None:
            cut = self._cut(store, places, size)
            places[:3] = 0
            places[0] = np.arange(len(flat))
        return Windows(index, self._pinned(torch.from_numpy(places)), size, cut)

    def _cut(self, store: Store, places: Int64Array, size: tuple[int, int]) -> Tensor:
        """Copy the windows out of the mapped file: uint8 [n, h, w, C], pinned for CUDA."""
        h, w = size
        # A new buffer each time: torch reuses pinned memory only after the copies from it are done.
        cut = torch.empty((places.shape[1], h, w, store.channels), dtype=torch.uint8, pin_memory=self._pin)
        target: UInt8Array = cut.numpy()
        for window, (i, y, x, _) in zip(target, places.T.tolist(), strict=True):
            window[:] = store[i][y : y + h, x : x + w]
        return cut

    @property
    def _pin(self) -> bool:
        return self._device.type == "cuda"

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor

    def _finish(self, plan: Plan) -> Batch:
        """The device's part of a step, queued without waiting for it."""
        reals = []
        for domain, windows in enumerate((plan.A, plan.B)):
            if windows.cut is not None:
                images = windows.cut.to(self._device, non_blocking=True)
            elif self._images is not None:
                images = self._images[domain]
            else:
                raise RuntimeError("windows were neither cut nor is the store on the device")
            index, y, x, flip = windows.places.to(self._device, non_blocking=True).unbind()
            real = crop_flip(images, index, y, x, flip.bool(), windows.size)
            reals.append(real.unflatten(0, windows.index.shape))
        return Batch(reals[0], reals[1], plan.A.index, plan.B.index, plan.epoch)


def open_training_data(
    config: Config, *, rank: int, world_size: int, device: torch.device | str, progress: bool
) -> TrainingData:
    """Scan the folders, decode them into stores, and return the loader, the fixed samples and the scans.

    With several processes rank 0 does the work first and the others find it done. The samples come from testA and
    testB, or from the training pictures where there is no test split. Raises DataError for data that cannot be used.
    """
    with distributed.main_first():
        return _open_training_data(config, rank, world_size, torch.device(device), progress=progress and rank == 0)


def _open_training_data(
    config: Config, rank: int, world_size: int, device: torch.device, progress: bool
) -> TrainingData:
    data, training = config.data, config.training
    scans = _scan(config, progress)
    preprocess_A = Preprocess.from_config(data, config.model.channels_A, "A")
    preprocess_B = Preprocess.from_config(data, config.model.channels_B, "B")
    store_A = _open_domain("A", preprocess_A, scans, config, progress)
    store_B = _open_domain("B", preprocess_B, scans, config, progress)
    samples_A, samples_B = load_shown(config, scans)
    loader = PairLoader(
        store_A,
        store_B,
        crop=preprocess_A.crop,
        flip=data.flip,
        pairing=data.pairing,
        frozen=data.frozen_augmentation,
        seed=config.seed,
        batch=training.batch,
        accumulate=training.accumulate,
        rank=rank,
        world_size=world_size,
        device=device,
        resident=data.resident,
    )
    held_out_A, held_out_B = (
        (used(f"test{domain}", scans, config) if f"test{domain}" in scans else (), preprocess)
        for domain, preprocess in (("A", preprocess_A), ("B", preprocess_B))
    )
    return TrainingData(loader, samples_A, samples_B, scans, (store_A, store_B), (held_out_A, held_out_B))


def _open_domain(domain: str, preprocess: Preprocess, scans: dict[str, Scan], config: Config, progress: bool) -> Store:
    """The training store of one domain."""
    data = config.data
    return open_store(
        used(f"train{domain}", scans, config),
        preprocess,
        cache=Path(data.cache) if data.cache else default_cache(),
        split=f"train{domain}",
        unreadable=data.unreadable,
        workers=data.workers,
        progress=progress,
    )


def _scan(config: Config, progress: bool) -> dict[str, Scan]:
    data = config.data
    if data.source == "synthetic":
        synthetic.ensure_dataset(
            Path(data.root),
            train=data.synthetic_train,
            test=data.synthetic_test,
            size=data.synthetic_size,
            seed=data.synthetic_seed,
            aligned=data.pairing == "aligned",
            styles=data.synthetic_styles,
            workers=data.workers,
            progress=progress,
        )
    if data.source == "side_by_side":
        return scan_side_by_side(Path(data.root), unreadable=data.unreadable, progress=progress)
    scans = scan_dataset(Path(data.root), unreadable=data.unreadable, progress=progress)
    return align(scans, data.unreadable) if data.pairing == "aligned" else scans


def _with_index(device: torch.device) -> torch.device:
    """The device with its number, which a new thread would otherwise take to be 0."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_store(store: Store, crop: int | None, together: int) -> None:
    """Refuse at the start what would otherwise fail in the middle of an epoch."""
    if crop is not None:
        smallest = int(store.sizes.min(axis=1).argmin())
        height, width = store.sizes[smallest]
        if min(height, width) < crop:
            raise DataError(
                f"{store.names[smallest]} is stored with {width} x {height} pixels, too small for a crop of {crop}: "
                "lower data.crop_size"
            )
    elif not store.uniform and together > 1:
        other = int((store.sizes != store.sizes[0]).any(axis=1).argmax())
        lines = ", ".join(f"{store.names[i]} has {store.sizes[i, 1]} x {store.sizes[i, 0]}" for i in (0, other))
        raise DataError(
            f"whole pictures of several sizes cannot be one batch ({lines}): set training.batch=1 and "
            "training.accumulate=1, or choose a data.preprocess with a crop"
        )


def _aligned_places(store_A: Store, store_B: Store) -> tuple[Int64Array, Int64Array]:
    """Places of the pictures of each pair in their stores, int64 [n] each."""
    place_B = {stem(name): i for i, name in enumerate(store_B.names)}
    pairs = [(i, place_B[stem(name)]) for i, name in enumerate(store_A.names) if stem(name) in place_B]
    if not pairs:
        raise DataError("data.pairing=aligned: no picture of A has a partner of the same name in B")
    A, B = np.array(pairs, dtype=np.int64).T
    different = (store_A.sizes[A] != store_B.sizes[B]).any(axis=1)
    if different.any():
        first = int(different.argmax())
        sides = [
            f"{store.names[i]} of {name} has {store.sizes[i, 1]} x {store.sizes[i, 0]}"
            for name, store, i in (("A", store_A, A[first]), ("B", store_B, B[first]))
        ]
        raise DataError(
            f"data.pairing=aligned: {int(different.sum())} of {len(A)} pairs are of pictures of two sizes "
            f"({', '.join(sides)} pixels): choose data.preprocess=resize_and_crop, or repair them"
        )
    return A, B


def _keep_resident(stores: tuple[Store, Store], device: torch.device, resident: str) -> bool:
    uniform = all(store.uniform for store in stores)
    if resident == "never":
        return False
    if resident == "always":
        if not uniform:
            raise DataError(
                "data.resident=always needs pictures of one size in each domain: choose data.resident=auto, or "
                "data.preprocess=resize_and_crop"
            )
        return True
    if resident != "auto":
        raise ValueError(f"data.resident = {resident!r} is not allowed: one of auto, always, never")
    if not uniform or device.type != "cuda":
        return uniform
    free, _ = torch.cuda.mem_get_info(device)
    return sum(store.nbytes for store in stores) < free // 4
