"""Which pictures the inputs of a batch mean, and which file each result goes to."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cyclegan_fast.data.photo import EXTENSIONS

__all__ = ["FORMATS", "Job", "collect", "output_name", "plan_jobs"]

# File formats by name, as `format` takes them.
FORMATS = ("jpg", "jpeg", "png", "tif", "tiff", "webp", "avif", "heic", "heif", "bmp")

# The suffix an output gets for an input's, where it is not the same. Phones' HEIC becomes what everything can show.
_SUFFIXES = {
    **dict.fromkeys((".heic", ".heif", ".jfif", ".mpo"), ".jpg"),
    **dict.fromkeys((".ppm", ".pgm", ".gif"), ".png"),
}
# Pictures taken up from folders: an animation is better listed as one than left out in silence.
_TAKEN = EXTENSIONS | {".gif", ".jfif", ".mpo"}
_WITH_ALPHA = frozenset((".png", ".tif", ".tiff", ".webp", ".avif"))


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def collect(inputs: Sequence[str | Path], out: Path) -> tuple[list[tuple[Path, Path]], list[tuple[Path, str]]]:
    """(picture, its path relative to the folder it was found in) for all inputs; and the inputs that give none."""
    found: list[tuple[Path, Path]] = []
    failed: list[tuple[Path, str]] = []
    for item in inputs:
        try:
            here, reason = _found_by(Path(item).expanduser(), out, failed)
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, of an unknown user
            here, reason = [], f"no such file or folder: {getattr(error, 'strerror', None) or error}"
        found += here
        if not here:
            failed.append((Path(item), reason))
    return list(dict.fromkeys(found)), failed


def _found_by(path: Path, out: Path, failed: list[tuple[Path, str]]) -> tuple[list[tuple[Path, Path]], str]:
    """The pictures meant by one input, and what to say if there are none."""
    if path.is_dir():
        return _below(path, path, out, failed), "no pictures in this folder"
    if path.exists():  # a name may hold [brackets] and still be that of a file
        return [(path, Path(path.name))], ""
    if not glob.has_magic(str(path)):
        return [], "no such file or folder"
    first = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
    if ".." in path.parts[first:]:
        return [], "`..` cannot follow a wildcard: outputs would leave the output folder"
    return _matching(path, first, out, failed), "no picture matches this pattern"


def _below(folder: Path, base: Path, out: Path, failed: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The pictures below a folder with their paths relative to ``base``, sorted; what it cannot read is a failure."""

    def unreadable(error: OSError) -> None:
        failed.append((Path(error.filename or folder), f"cannot read this folder: {error.strerror}"))

    skipped = _output_inside(out, base)
    pictures: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        folders[:] = [name for name in folders if name[0] != "." and _real(here / name) != skipped]
        pictures += [here / name for name in files if name[0] != "." and Path(name).suffix.lower() in _TAKEN]
    return sorted((path, path.relative_to(base)) for path in pictures)


def _matching(pattern: Path, first: int, out: Path, failed: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The pictures that match a pattern, and those below the folders that do. ``first``: its first part with magic."""
    base = Path(*pattern.parts[:first])
    skipped = _output_inside(out, base)
    found: list[tuple[Path, Path]] = []
    for match in sorted(set(_expanded(base, pattern.parts[first:]))):
        resolved = _real(match)
        if skipped is not None and (resolved == skipped or skipped in resolved.parents):
            continue
        if match.is_dir():
            found += _below(match, base, out, failed)
        elif match.suffix.lower() in _TAKEN:
            found.append((match, match.relative_to(base)))
    return found


def _expanded(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What matches the parts of a pattern below a folder; hidden names only by parts that begin with a dot.

    Unlike that of ``glob``, the `**` here follows no links: two links to their own folder are enough for 2**40 paths.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        rest = rest[next((i for i, later in enumerate(rest) if later != "**"), len(rest)) :]
        if not rest:
            yield folder  # and with it all that is below
            return
        for parent, folders, _ in os.walk(folder):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            yield from _expanded(Path(parent), rest)
    elif glob.has_magic(part):
        names = fnmatch.filter((item.name for item in folder.iterdir()), part) if folder.is_dir() else []
        for name in names:
            if name[0] != "." or part[0] == ".":
                yield from _expanded(folder / name, rest)
    elif os.path.lexists(folder / part):
        yield from _expanded(folder / part, rest)


def _real(path: Path) -> Path:
    """The path without links, as far as they lead somewhere: ``Path.resolve`` raises for a link to itself."""
    return Path(os.path.realpath(path))


def _output_inside(out: Path, folder: Path) -> Path | None:
    """The output folder, resolved, if it lies inside a folder (and is not that folder itself)."""
    resolved = _real(out)
    return resolved if _real(folder) in resolved.parents else None


def output_name(name: Path, suffix: str, file_format: str | None, alpha: bool) -> Path:
    """Relative path of the output for the relative path of an input."""
    if file_format is not None:
        ending = f".{file_format}"
    else:
        known = name.suffix.lower() in _TAKEN
        ending = _SUFFIXES.get(name.suffix.lower(), name.suffix) if known else ".jpg"
        if alpha and ending.lower() not in _WITH_ALPHA:
            ending = ".png"
    return name.with_name(f"{name.stem}{suffix}{ending}")


def plan_jobs(
    found: Sequence[tuple[Path, Path]], out: Path, output_name: Callable[[Path], Path], overwrite: bool
) -> tuple[list[Job], list[tuple[Path, str]]]:
    """Which input writes which output, and the inputs whose output must not be written."""
    sources = {_real(source) for source, _ in found}
    inside = _real(out)
    writers: dict[Path, Path] = {}
    jobs: list[Job] = []
    refused: list[tuple[Path, str]] = []
    for source, name in found:
        target = out / output_name(name)
        writer = writers.setdefault(_real(target), source)
        if writer is not source and _real(writer) == _real(source):
            continue  # named twice in different words
        reason = f"its output {target} is that of {writer} already" if writer is not source else None
        if reason is None and not _real(target.parent).is_relative_to(inside):
            reason = f"its output {target} lies outside of {out}: a link leads to {_real(target.parent)}"
        reason = reason or _obstacle(source, target, sources, overwrite)
        if reason is None:
            jobs.append(Job(source, target))
        else:
            refused.append((source, reason))
    return jobs, refused


def _obstacle(source: Path, target: Path, sources: set[Path], overwrite: bool) -> str | None:
    """Why what stands, or does not stand, under the output's name forbids to write it."""
    try:
        exists = target.exists()
        if exists and target.samefile(source):
            return f"its output {target} would replace the input itself: use another folder or a suffix"
        if _real(target) in sources:
            return f"its output {target} would replace another input: use another folder or a suffix"
    except OSError as error:
        return f"its output {target} cannot be written: {error.strerror}"
    if exists and not overwrite:
        return f"its output {target} exists already; overwriting was not asked for"
    return None
