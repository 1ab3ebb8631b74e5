"""The fixed pictures that a run is looked at and measured by: which they are, how prepared, and their known truths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cyclegan_fast.config import Config
from cyclegan_fast.data.folder import DataError, Entry, Scan, stem, subset
from cyclegan_fast.data.photo import PhotoError, open_photo
from cyclegan_fast.data.store import Preprocess
from cyclegan_fast.ops.crop_flip import crop_flip

__all__ = ["FixedPictures", "load_measured", "load_samples", "load_shown", "used"]

UInt8Array = npt.NDArray[np.uint8]
# The pictures of a domain, or their truths, and how they are prepared.
_Set = tuple[Sequence[Path], Preprocess]

_log = logging.getLogger("cyclegan_fast.loader")


@dataclass(frozen=True)
class FixedPictures:
    """Pictures of both domains, float32 [1, C, h, w] each in [-1, 1], on the CPU.

    true_B: what each of real_A should become, in their order, or None where that is not known; true_A: the same of
    real_B. held_out: whether all are from test folders.
    """

    real_A: list[Tensor]
    real_B: list[Tensor]
    true_B: list[Tensor] | None
    true_A: list[Tensor] | None
    held_out: bool


def load_shown(config: Config, scans: Mapping[str, Scan]) -> tuple[list[Tensor], list[Tensor]]:
    """The `monitor.samples` pictures of A and of B that the grids show, as `load_samples` has them."""
    count, unreadable = config.monitor.samples, config.data.unreadable
    A, B = (_source(domain, scans, config) for domain in "AB")
    if config.data.pairing == "aligned":
        real_A, real_B = _load([A, B], count, unreadable)
        return real_A, real_B
    return _load([A], count, unreadable)[0], _load([B], count, unreadable)[0]


def load_measured(config: Config, scans: Mapping[str, Scan]) -> FixedPictures:
    """The `monitor.metrics_samples` pictures a domain that measures are taken of, chosen as those of the grids are.

    The truth of aligned pictures is the partner. Other sets may have folders truthB, with a picture of the same name
    for each one of testA, and truthA for testB, as rendered ones have. Raises DataError as `load_samples`, also for a
    truth of another size than its picture.
    """
    count, unreadable = config.monitor.metrics_samples, config.data.unreadable
    A, B = (_source(domain, scans, config) for domain in "AB")
    held_out = "testA" in scans and "testB" in scans
    if config.data.pairing == "aligned":
        real_A, real_B = _load([A, B], count, unreadable)
        return FixedPictures(real_A, real_B, real_B, real_A, held_out)
    true_B, true_A = (_truth(domain, scans, config) for domain in "AB")
    real_A, *of_A = _load([A, *([(true_B, B[1])] if true_B else [])], count, unreadable)
    real_B, *of_B = _load([B, *([(true_A, A[1])] if true_A else [])], count, unreadable)
    return FixedPictures(real_A, real_B, of_A[0] if of_A else None, of_B[0] if of_B else None, held_out)


def load_samples(
    entries: Sequence[Entry], preprocess: Preprocess, count: int, unreadable: str = "refuse"
) -> list[Tensor]:
    """Fixed samples, float32 [1, C, h, w] each in [-1, 1] and channels_last on the CPU, evenly spaced over the entries.

    They are preprocessed as for training, but cropped at the centre and never mirrored. Fewer than `count` if there
    are not as many pictures. With unreadable `skip` another picture takes the place of one that cannot be decoded;
    with `refuse` DataError is raised, as it is for a picture smaller than the crop.
    """
    return _load([([entry.path for entry in entries], preprocess)], count, unreadable)[0]


def used(split: str, scans: Mapping[str, Scan], config: Config) -> tuple[Entry, ...]:
    """The pictures of a split that are used; of aligned ones, the partners of those of A."""
    limit = config.data.limit_train if split.startswith("train") else config.data.limit_test
    if config.data.pairing != "aligned":
        return subset(scans[split].entries, limit, config.seed, split[-1])
    of_A = scans[f"{split[:-1]}A"].entries
    chosen = set(subset(of_A, limit, config.seed, "A"))
    return tuple(own for own, A in zip(scans[split].entries, of_A, strict=True) if A in chosen)


def _source(domain: str, scans: Mapping[str, Scan], config: Config) -> _Set:
    """The pictures to choose from: those of the test split, or the training pictures where there is none."""
    split = f"test{domain}" if f"test{domain}" in scans else f"train{domain}"
    channels = config.model.channels_A if domain == "A" else config.model.channels_B
    preprocess = Preprocess.from_config(config.data, channels, domain)
    return [entry.path for entry in used(split, scans, config)], preprocess


def _truth(domain: str, scans: Mapping[str, Scan], config: Config) -> list[Path] | None:
    """The truth of each test picture of a domain, or None unless all of them have one."""
    folder = Path(config.data.root) / f"truth{'B' if domain == 'A' else 'A'}"
    if f"test{domain}" not in scans or not folder.is_dir():
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    known = {stem(path.relative_to(folder).as_posix()): path for path in files}
    pictures = used(f"test{domain}", scans, config)
    missing = [entry.name for entry in pictures if stem(entry.name) not in known]
    if missing:
        _log.warning(
            "%s lacks %d of %d pictures of test%s, %s for instance: it is not used",
            *(folder, len(missing), len(pictures), domain, missing[0]),
        )
    return None if missing else [known[stem(entry.name)] for entry in pictures]


def _load(sets: Sequence[_Set], count: int, unreadable: str) -> list[list[Tensor]]:
    """The samples of several sets, the i-th of each from one place: equally many, as `load_samples` has them."""
    length = len(sets[0][0])
    count = min(count, length)
    chosen = np.linspace(0, length - 1, count).round().astype(int).tolist()
    candidates = [*chosen, *sorted(set(range(length)) - set(chosen))]
    samples: dict[int, list[Tensor]] = {}
    for i in candidates:
        if len(samples) == count:
            break
        try:
            samples[i] = _load_together([(paths[i], preprocess) for paths, preprocess in sets])
        except PhotoError as error:
            if unreadable == "refuse":
                raise DataError(f"a sample picture cannot be used: {error}") from error
            _log.warning("a sample picture is left out: %s", error)
    return [[samples[i][place] for i in sorted(samples)] for place in range(len(sets))]


def _load_together(pictures: Sequence[tuple[Path, Preprocess]]) -> list[Tensor]:
    """Pictures that belong together, each prepared. Raises PhotoError, DataError."""
    prepared = [preprocess.apply(open_photo(path, channels=preprocess.channels).image) for path, preprocess in pictures]
    sizes = [
        f"{path} has {pixels.shape[1]} x {pixels.shape[0]}"
        for (path, _), pixels in zip(pictures, prepared, strict=True)
    ]
    if len({pixels.shape[:2] for pixels in prepared}) > 1:
        raise DataError(
            f"a picture and its truth are of two sizes ({', '.join(sizes)} pixels): choose "
            "data.preprocess=resize_and_crop, or repair them"
        )
    return [_centre(pixels, *each) for pixels, each in zip(prepared, pictures, strict=True)]


def _centre(pixels: UInt8Array, path: Path, preprocess: Preprocess) -> Tensor:
    """The middle of a prepared picture uint8 [H, W, C], as large as a training sample."""
    height, width, _ = pixels.shape
    h, w = (height, width) if preprocess.crop is None else (preprocess.crop, preprocess.crop)
    if min(height - h, width - w) < 0:
        raise DataError(
            f"{path}: {width} x {height} pixels is too small for a crop of {w} x {h}: lower data.crop_size, or choose "
            "data.preprocess=resize_and_crop, which enlarges it"
        )
    index, y, x = (torch.tensor([value]) for value in (0, (height - h) // 2, (width - w) // 2))
    return crop_flip(torch.from_numpy(pixels.copy())[None], index, y, x, torch.tensor([False]), (h, w))
