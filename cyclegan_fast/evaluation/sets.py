"""The pictures that a model is measured on: both domains of a split, prepared as in training, and the truth to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cyclegan_fast.config import Config
from cyclegan_fast.data import synthetic
from cyclegan_fast.data.folder import DataError, Entry, Scan, align, scan_folder, stem, subset
from cyclegan_fast.data.store import Preprocess, Store, default_cache, open_store

__all__ = ["FEWEST", "EvaluationSet", "Side", "Truth", "open_set"]

UInt8Array = npt.NDArray[np.uint8]
Folders = dict[str, Scan]

FEWEST = 5
"""Pictures of a domain below which nothing is measured: an interval of fewer says nothing."""

_SMALLEST = 32  # pixels: pictures with a shorter side have no spectrum and no pyramid
_OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True, eq=False)
class Side:
    """Pictures of one domain and of one size: the centres, `window` high and wide, of those in a store.

    ``side[i:j]`` and ``side[[i, j]]`` are uint8 [n, C, h, w].
    """

    store: Store
    window: tuple[int, int]

    def __len__(self) -> int:
        return len(self.store)

    @property
    def names(self) -> list[str]:
        """File names within the domain's folder."""
        return self.store.names

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return self.store.channels

    def __getitem__(self, chosen: slice | Sequence[int]) -> UInt8Array:
        places = range(len(self))[chosen] if isinstance(chosen, slice) else chosen
        pictures: UInt8Array = np.stack([self._centre(self.store[place]) for place in places])
        channels_first: UInt8Array = pictures.transpose(0, 3, 1, 2)
        return channels_first

    def _centre(self, picture: UInt8Array) -> UInt8Array:
        top, left = ((side - part) // 2 for side, part in zip(picture.shape[:2], self.window, strict=True))
        return picture[top : top + self.window[0], left : left + self.window[1]]


@dataclass(frozen=True, eq=False)
class Truth:
    """What the pictures of a domain are in the other one: those of `side`, and at which place each of them is."""

    side: Side
    places: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """The pictures of both domains, A and B, and the truth to those of each, if it is known.

    ``paired``: the truth is the other domain itself. ``left_out``: files that could not be used, and why.
    ``preparation``: how the pictures were prepared, in words.
    """

    root: Path
    split: str
    sides: Mapping[str, Side]
    truth: Mapping[str, Truth]
    paired: bool
    left_out: tuple[tuple[str, str], ...]
    preparation: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every picture."""
        return self.sides["A"].window


def open_set(
    root: str | Path | None,
    config: Config,
    *,
    split: str = "test",
    pairs: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> EvaluationSet:
    """The test or training pictures below ``root``; None: the configuration's own, rendered if they are synthetic.

    Below it are testA and testB; or, where these are not, test (or val), with A in the left and B in the right half of
    each picture. The truth to testA is in truthB under the same names, as `data synth` writes it, and to testB in
    truthA; in side-by-side pictures, with ``data.pairing=aligned`` and with ``pairs`` it is the partner.

    Pictures are prepared as the fixed test samples of a training: resized by ``data.preprocess`` and
    ``data.load_size``, then the centre of ``data.crop_size``, or without a crop the centre that all pictures have.
    ``limit``: a random subset of each domain by the configuration's seed; None: ``data.limit_test``, if it is its set.

    Files that cannot be used are left out, by name. Raises DataError for folders that are missing, for fewer than
    FEWEST pictures in a domain, for pictures that are too small, and for a truth of another size than its picture.
    """
    if split not in ("test", "train"):
        raise DataError(f"split = {split!r} is not one of test, train")
    if root is None:
        limit = _own_limit(config, split) if limit is None else limit
        _render(config, progress)
    folder = Path(config.data.root if root is None else root)
    scans, halves = _scan(folder, split, progress)
    truths = {} if pairs or halves or split != "test" else _scan_truth(folder, progress)
    paired = pairs or halves or (config.data.pairing == "aligned" and not truths)
    bad = [(str(path), reason) for scan in [*scans.values(), *truths.values()] for path, reason in scan.bad]
    entries = _chosen(scans, limit, config.seed, paired)
    _check_counts(scans, entries)
    entries |= {name: _named_like(scan.entries, entries[_OTHER[name[-1]]]) for name, scan in truths.items()}
    stores = {
        name: _open(name if name in truths else f"{split}{name}", found, config, name[-1], halves, progress)
        for name, found in entries.items()
        if found
    }
    window = _window(folder, config, list(stores.values()))
    sides = {name: Side(store, window) for name, store in stores.items()}
    known = {domain: sides[_OTHER[domain]] if paired else sides.get(f"truth{_OTHER[domain]}") for domain in "AB"}
    left_out = bad + [item for store in stores.values() for item in store.left_out]
    _check_counts(scans, {domain: sides[domain].names for domain in "AB"})
    return EvaluationSet(
        folder,
        split,
        {domain: sides[domain] for domain in "AB"},
        {domain: _matched(sides[domain], side) for domain, side in known.items() if side is not None},
        paired,
        tuple(left_out),
        _preparation(config, window),
    )


def _own_limit(config: Config, split: str) -> int | None:
    return config.data.limit_test if split == "test" else config.data.limit_train


def _render(config: Config, progress: bool) -> None:
    """Render the configuration's synthetic flowers, if they are not there."""
    data = config.data
    if data.source == "synthetic" and not Path(data.root).exists():
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


def _scan(folder: Path, split: str, progress: bool) -> tuple[Folders, bool]:
    """What is in the folders of A and of B, and whether they are the halves of one. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    there = [f"{split}{domain}" for domain in "AB" if (folder / f"{split}{domain}").is_dir()]
    if len(there) == 2:
        return {name[-1]: scan_folder(folder / name, split=name, progress=progress) for name in there}, False
    together = ("test", "val") if split == "test" else ("train",)
    for name in together:
        if not there and (folder / name).is_dir():
            scan = scan_folder(folder / name, split=name, progress=progress)
            return {"A": scan, "B": scan}, True
    missing = [f"{split}{domain}" for domain in "AB" if f"{split}{domain}" not in there]
    hint = "; --split train takes the training pictures" if split == "test" and (folder / "trainA").is_dir() else ""
    raise DataError(
        f"{folder} has no folder {' and no folder '.join(missing)}, and no folder {' or '.join(together)} of pictures "
        f"side by side{hint}"
    )


def _scan_truth(folder: Path, progress: bool) -> Folders:
    """The folders of truth: truthB to the pictures of A, truthA to those of B."""
    names = [f"truth{domain}" for domain in "AB" if (folder / f"truth{domain}").is_dir()]
    return {name: scan_folder(folder / name, split=name, progress=progress) for name in names}


def _chosen(scans: Folders, limit: int | None, seed: int, paired: bool) -> dict[str, tuple[Entry, ...]]:
    """The pictures of A and B; of pairs, whole ones."""
    if not paired:
        return {domain: subset(scan.entries, limit, seed, domain) for domain, scan in scans.items()}
    # `align` knows splits by their names alone.
    aligned = align({f"test{domain}": replace(scan, split=f"test{domain}") for domain, scan in scans.items()}, "skip")
    of_A = subset(aligned["testA"].entries, limit, seed, "A")
    return {"A": of_A, "B": _named_like(aligned["testB"].entries, of_A)}


def _named_like(entries: Sequence[Entry], others: Sequence[Entry]) -> tuple[Entry, ...]:
    """The pictures whose name, suffix apart, one of the others has."""
    stems = {stem(other.name) for other in others}
    return tuple(entry for entry in entries if stem(entry.name) in stems)


def _check_counts(scans: Folders, found: Mapping[str, Sequence[object]]) -> None:
    for domain, scan in scans.items():
        if len(found[domain]) < FEWEST:
            bad = f"; {len(scan.bad)} files cannot be used" if scan.bad else ""
            count = len(found[domain])
            raise DataError(
                f"{scan.folder}: {count} pictures of {domain} are too few to measure: at least {FEWEST}{bad}"
            )


def _open(name: str, entries: Sequence[Entry], config: Config, domain: str, halves: bool, progress: bool) -> Store:
    """The store of some pictures, prepared as in training."""
    data = replace(config.data, source="side_by_side" if halves else "folder")
    channels = config.model.channels_A if domain == "A" else config.model.channels_B
    return open_store(
        entries,
        Preprocess.from_config(data, channels, domain),
        cache=Path(data.cache) if data.cache else default_cache(),
        split=name,
        unreadable="skip",
        workers=data.workers,
        progress=progress,
    )


def _window(folder: Path, config: Config, stores: Sequence[Store]) -> tuple[int, int]:
    """Height and width of what is measured of each picture. Raises DataError."""
    crop = Preprocess.from_config(config.data, 3).crop
    sizes = np.concatenate([store.sizes for store in stores])
    window = (crop, crop) if crop else (int(sizes[:, 0].min()), int(sizes[:, 1].min()))
    if min(window) < _SMALLEST:
        raise DataError(
            f"{folder}: prepared as in training, pictures of {window[1]} x {window[0]} pixels are too small to "
            f"measure: both sides must have {_SMALLEST}"
        )
    return window


def _matched(side: Side, truth: Side) -> Truth:
    """The places of the pictures' truth, by their names, suffix apart.

    Raises DataError for a truth of another size, whose middle shows something else, and where names do not tell.
    """
    for names in (side.names, truth.names):
        twice = next((name for name, count in Counter(map(stem, names)).items() if count > 1), None)
        if twice is not None:
            alike = " and ".join(name for name in names if stem(name) == twice)
            raise DataError(f"{alike} have one name, suffix apart: which has which truth cannot be told; rename one")
    places = {stem(name): place for place, name in enumerate(truth.names)}
    known = {i: places[stem(name)] for i, name in enumerate(side.names) if stem(name) in places}
    for i, place in known.items():
        own, other = (tuple(map(int, store.sizes[at])) for store, at in ((side.store, i), (truth.store, place)))
        if own != other:
            raise DataError(
                f"{side.names[i]} has {own[1]} x {own[0]} pixels and its truth {other[1]} x {other[0]}: they must show "
                "the same, pixel by pixel; repair them, or train with data.preprocess=resize_and_crop"
            )
    return Truth(truth, known)


def _preparation(config: Config, window: tuple[int, int]) -> str:
    data = config.data
    sizes = {
        "resize_and_crop": f"resized to {data.load_size} x {data.load_size} pixels",
        "crop": "at their own size",
        "none": "at their own size",
        "scale_width": f"resized to a width of {data.load_size} pixels",
        "scale_width_and_crop": f"resized to a width of {data.load_size} pixels",
        "scale_shortside": f"resized to a short side of {data.load_size} pixels",
    }
    return f"{sizes[data.preprocess]}, {data.resample}, then the centre of {window[1]} x {window[0]}"
