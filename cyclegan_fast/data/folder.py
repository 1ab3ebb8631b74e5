"""The folders of a data set: which pictures there are, which of them can be used, and which subset is.

A data set is a folder with ``trainA`` and ``trainB`` and, optionally, ``testA`` and ``testB`` inside. Everything is
looked at before training starts, so that a broken file is a line in a report and not a crash hours later.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cyclegan_fast.data.photo import EXTENSIONS, PhotoError, open_photo, read_header
from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.machine import usable_cores
from cyclegan_fast.progress import Bar

__all__ = ["SPLITS", "DataError", "Entry", "Scan", "align", "list_images", "report", "scan_dataset", "scan_folder"]
__all__ += ["scan_side_by_side", "stem", "subset"]

logger = logging.getLogger("cyclegan_fast.data")

SPLITS = ("trainA", "trainB", "testA", "testB")
_LISTED = 20


class DataError(InputError):
    """A data set that cannot be used; the message names the folder or file and what would be right."""


@dataclass(frozen=True)
class Entry:
    """A usable picture: where it is, its name (posix path within the split's folder), and what its header says.

    ``width`` and ``height`` are pixels of the upright picture, ``mode`` and ``format`` Pillow's names; ``bytes`` and
    ``mtime_ns`` tell whether the file has changed since.
    """

    path: Path
    name: str
    width: int
    height: int
    mode: str
    format: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Scan:
    """One split: its usable pictures, sorted by name, and its unusable files with the reasons."""

    split: str
    folder: Path
    entries: tuple[Entry, ...]
    bad: tuple[tuple[Path, str], ...]


def list_images(folder: str | Path) -> list[Path]:
    """Files below ``folder`` whose suffix is a picture's, sorted by their path within it.

    Hidden files and folders are left out; links to folders are followed, each folder once. Raises DataError when the
    folder or one below it cannot be listed.
    """
    folder = Path(folder)
    return sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path) -> Iterator[Path]:
    """The pictures below a folder. A list instead of recursion: folders may lie deeper than Python recurses."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            children = [child for child in sorted(current.iterdir()) if not child.name.startswith(".")]
            folders = [child for child in children if child.is_dir()]
        except OSError as error:
            raise DataError(f"{current}: the folder cannot be listed: {error.strerror}") from error
        waiting += folders[::-1]
        inside = set(folders)
        # Also broken links: the scan reports them.
        yield from (child for child in children if child not in inside and child.suffix.lower() in EXTENSIONS)


def scan_folder(
    folder: str | Path, *, split: str, full: bool = False, progress: bool = False, workers: int = 0
) -> Scan:
    """Read the header of every picture below ``folder``; with ``full``, decode every one completely.

    ``workers`` threads do it, 0 for one a core (decoding runs outside Python's lock). Raises DataError when the folder
    cannot be listed; what is wrong with single files is in ``Scan.bad``.
    """
    folder = Path(folder)
    paths = list_images(folder)
    executor = ThreadPoolExecutor(max_workers=workers or usable_cores())
    try:
        looks = executor.map(lambda path: _look_at(path, folder, full), paths)
        results = list(Bar(looks, total=len(paths), desc=f"scan {split}", unit="picture", disable=not progress))
    finally:
        executor.shutdown(cancel_futures=True)
    entries = tuple(result for result in results if isinstance(result, Entry))
    bad = tuple((error.path, error.reason) for error in results if isinstance(error, PhotoError))
    return Scan(split, folder, entries, bad)


def _look_at(path: Path, folder: Path, full: bool) -> Entry | PhotoError:
    try:
        header = read_header(path)
        status = path.stat()
        if full:
            size = open_photo(path).image.size
            if size != (header.width, header.height):
                reason = f"its header says {header.width}x{header.height}, but it decodes to {size[0]}x{size[1]}"
                return PhotoError(path, reason)
    except PhotoError as error:
        return error
    except OSError as error:
        return PhotoError(path, f"cannot be read: {error.strerror}")
    name = path.relative_to(folder).as_posix()
    size_on_disk, mtime_ns = status.st_size, status.st_mtime_ns
    return Entry(path, name, header.width, header.height, header.mode, header.format, size_on_disk, mtime_ns)


def scan_dataset(
    root: str | Path,
    *,
    unreadable: str = "refuse",
    need_test: bool = False,
    full: bool = False,
    progress: bool = False,
    workers: int = 0,
) -> dict[str, Scan]:
    """Scan trainA, trainB and, where they exist or ``need_test``, testA and testB below ``root``.

    ``unreadable`` says what to do about files that cannot be used: ``skip`` leaves them out with a warning; with
    ``refuse`` they are an error that names them. A test folder without pictures counts as absent.

    Raises DataError for a missing root or split (naming what was found instead), for a split without a usable
    picture, and for unusable files as above; ValueError for another value of ``unreadable``.
    """
    if unreadable not in ("refuse", "skip"):
        raise ValueError(f"unreadable = {unreadable!r} is not allowed: one of refuse, skip")
    root = Path(root)
    scans: dict[str, Scan] = {}
    for split in _present_splits(root, need_test):
        scans[split] = scan_folder(root / split, split=split, full=full, progress=progress, workers=workers)
    _settle_bad(scans, unreadable)
    for split, scan in list(scans.items()):
        if not scan.entries:
            if split.startswith("train") or need_test:
                raise DataError(f"{scan.folder}: no picture that can be used; {_found_in(scan.folder)}")
            logger.warning("%s: no picture that can be used: this test folder is left out", scan.folder)
            del scans[split]
    return scans


def scan_side_by_side(root: str | Path, *, unreadable: str = "refuse", progress: bool = False) -> dict[str, Scan]:
    """Scan train, and test or else val, below ``root``, whose pictures hold A in the left and B in the right half.

    The result is as `scan_dataset` gives it, trainA and trainB being the same pictures. Raises as there.
    """
    root = Path(root)
    if not (root / "train").is_dir():
        what = "has no folder train" if root.is_dir() else "does not exist"
        found = f"; {_found_in(root)}" if root.is_dir() else ""
        raise DataError(
            f"{root} {what}{found}. With data.source=side_by_side a data set has a folder train, and optionally test "
            "or val; for folders trainA and trainB choose data.source=folder"
        )
    folders = {"train": root / "train"}
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    folders |= {"test": tests[0]} if tests else {}
    scans = {name: scan_folder(folder, split=name, progress=progress) for name, folder in folders.items()}
    _settle_bad(scans, unreadable)
    if not scans["train"].entries:
        raise DataError(f"{folders['train']}: no picture that can be used; {_found_in(folders['train'])}")
    splits = [(f"{name}{domain}", scan) for name, scan in scans.items() if scan.entries for domain in "AB"]
    return {split: replace(scan, split=split) for split, scan in splits}


def stem(name: str) -> str:
    """The name of a picture without its suffix, by which partners are found."""
    return name.rpartition(".")[0]


def align(scans: Mapping[str, Scan], unreadable: str = "refuse") -> dict[str, Scan]:
    """The scans with each split's pictures of A and of B in the order of their pairs: those of one name, suffix apart.

    ``unreadable`` says what to do about pictures without a partner: ``refuse`` raises DataError naming them, ``skip``
    leaves them out with a warning. Raises DataError too for two pictures of one name, for a split with no pair, and
    for testA without testB.
    """
    aligned: dict[str, Scan] = {}
    for split in ("train", "test"):
        pair = [scans[name] for name in (f"{split}A", f"{split}B") if name in scans]
        if len(pair) == 1:
            raise DataError(f"{pair[0].folder}: aligned pairs need both testA and testB, or neither of them")
        if pair:
            aligned |= _aligned(pair[0], pair[1], unreadable)
    return aligned


def _aligned(A: Scan, B: Scan, unreadable: str) -> dict[str, Scan]:
    found_A, found_B = _by_stem(A), _by_stem(B)
    alone = [(A, B, found_A[key]) for key in found_A.keys() - found_B.keys()]
    alone += [(B, A, found_B[key]) for key in found_B.keys() - found_A.keys()]
    lines = sorted(f"{own.folder / one.name}: no {stem(one.name)}.* in {other.folder}" for own, other, one in alone)
    if lines and unreadable == "refuse":
        more = f"\n  ... and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise DataError(
            f"data.pairing=aligned: {len(lines)} of {len(found_A) + len(found_B)} pictures have no partner of the same "
            "name:\n" + "\n".join(f"  {shown(line)}" for line in lines[:_LISTED]) + f"{more}\nAdd the partners or "
            "remove these; `data.unreadable=skip` leaves them out"
        )
    for line in lines:
        logger.warning("left out: %s", shown(line))
    common = sorted(found_A.keys() & found_B.keys())
    if not common:
        raise DataError(f"{A.folder} and {B.folder} have no picture of the same name, so there are no aligned pairs")
    return {
        scan.split: Scan(scan.split, scan.folder, tuple(found[key] for key in common), scan.bad)
        for scan, found in ((A, found_A), (B, found_B))
    }


def _by_stem(scan: Scan) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in scan.entries:
        other = found.setdefault(stem(entry.name), entry)
        if other is not entry:
            raise DataError(
                f"{scan.folder}: {other.name} and {entry.name} have one name but for the suffix: aligned pairs "
                "cannot tell which of them is the partner, so remove one"
            )
    return found


def _present_splits(root: Path, need_test: bool) -> list[str]:
    """The splits to scan, or DataError for one that is missing."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}: data.root must be a folder with trainA and trainB inside")
    present = [split for split in SPLITS if (root / split).is_dir()]
    needed = SPLITS if need_test else SPLITS[:2]
    missing = [split for split in needed if split not in present]
    if missing:
        raise DataError(
            f"{root} has no folder {' and no folder '.join(missing)}; {_found_in(root)}. A data set has the folders "
            "trainA and trainB, and optionally testA and testB"
        )
    return present


def _found_in(folder: Path) -> str:
    """What a folder holds, in words, for the message that what was looked for is not there."""
    try:
        children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    except OSError as error:
        return f"it cannot be listed: {error.strerror}"
    folders = [f"{child.name}/" for child in children if child.is_dir()]
    suffixes = Counter(child.suffix.lower() or "without suffix" for child in children if not child.is_dir())
    parts = [*folders[:_LISTED], *(["..."] if len(folders) > _LISTED else [])]
    parts += [
        f"{count} files {suffix}" if count > 1 else f"1 file {suffix}" for suffix, count in suffixes.most_common(5)
    ]
    return "it holds " + ", ".join(parts) if parts else "it is empty"


def _settle_bad(scans: Mapping[str, Scan], unreadable: str) -> None:
    """Refuse unusable files, or say by name which ones are left out."""
    bad = [item for scan in scans.values() for item in scan.bad]
    if not bad:
        return
    if unreadable == "skip":
        for path, reason in bad:
            logger.warning("left out: %s: %s", shown(path), shown(reason))
        return
    files = "1 file" if len(bad) == 1 else f"{len(bad)} files"
    lines = "\n".join(f"  {shown(path)}: {shown(reason)}" for path, reason in bad[:_LISTED])
    more = f"\n  ... and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    raise DataError(
        f"{files} cannot be used:\n{lines}{more}\nRepair or remove them; `data.unreadable=skip` leaves them out"
    )


def report(scans: Mapping[str, Scan]) -> str:
    """A table of the splits (sizes are width x height in pixels, ordered by area), then the unusable files by name."""
    rows = [["split", "pictures", "bad", "smallest", "median", "largest", "formats"]]
    rows += [_row(scan) for scan in scans.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for split, *numbers, formats in rows:
        aligned = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([split.ljust(widths[0]), *aligned, formats]))
    lines += [f"bad: {shown(path)}: {shown(reason)}" for scan in scans.values() for path, reason in scan.bad]
    return "\n".join(lines)


def _row(scan: Scan) -> list[str]:
    sizes = sorted((entry.width * entry.height, entry.width, entry.height) for entry in scan.entries)
    middle = (len(sizes) - 1) // 2
    marks = [f"{w}x{h}" for _, w, h in (sizes[0], sizes[middle], sizes[-1])] if sizes else ["-"] * 3
    formats = Counter(f"{entry.format} {entry.mode}" for entry in scan.entries).most_common()
    counts = ", ".join(f"{count} {name}" for name, count in formats) or "-"
    return [scan.split, str(len(scan.entries)), str(len(scan.bad)), *marks, counts]


def subset(entries: Sequence[Entry], limit: int | None, seed: int, domain: str) -> tuple[Entry, ...]:
    """A random ``limit`` of the pictures, sorted by name; all of them for None or a limit not below their number.

    Chosen by a hash of (seed, domain, name): the choice depends on neither order nor place of the files, and a
    picture more or less in the folder exchanges at most one. Raises DataError for a limit below 1.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    if limit is None or limit >= len(ordered):
        return tuple(ordered)
    if limit < 1:
        raise DataError(f"a subset of {limit} pictures of {domain} is not possible: at least 1")

    def lot(entry: Entry) -> bytes:
        return hashlib.sha256(os.fsencode(f"{seed}/{domain}/{entry.name}")).digest()

    drawn = sorted(ordered, key=lot)
    return tuple(sorted(drawn[:limit], key=lambda entry: entry.name))
