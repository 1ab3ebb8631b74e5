"""Translating photographs from files to files: reading ahead and writing behind the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cyclegan_fast.data.photo import Photo, PhotoError, open_photo, save_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.paths import FORMATS, Job, collect, output_name, plan_jobs
from cyclegan_fast.inference.tiles import band_bar
from cyclegan_fast.inference.translate import Execution, Translator

__all__ = ["Result", "translate_files"]


@dataclass(frozen=True)
class Result:
    """What became of a batch of files: those written, and inputs that failed with the reason."""

    done: list[Path]
    failed: list[tuple[Path, str]]


def translate_files(
    translator: Translator,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    direction: str = "AtoB",
    suffix: str = "",
    format: str | None = None,  # noqa: A002 - the word users know
    quality: int = 95,
    overwrite: bool = False,
    truncate: bool = False,
    scale: int | str | None = None,
    tile: int | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> Result:
    """Translate photographs from files to files of the same size, with their EXIF.

    ``inputs`` are files, folders (all pictures inside, hidden ones left out) and glob patterns; below folders and the
    fixed part of a pattern, sub-folders are kept. What lies in ``out_dir`` is not taken up when that is inside one of
    the folders. An output is named after its input, with ``suffix`` added to the stem, in the input's format or the
    one named by ``format`` (one of FORMATS); HEIC becomes JPEG, and pictures with alpha become PNG where the input's
    format has none. ``quality`` (1 to 100) is that of lossy formats; ``truncate``, ``scale``, ``tile`` and
    ``max_memory`` are as in ``Translator.translate``.

    A file that fails does not stop the others. Refused for their file alone are also an output that exists (without
    ``overwrite``), one that another input writes already, one that is itself among the inputs, and one that a link
    would lead out of ``out_dir``. Links to folders are not followed below folders and by ``**``. The next picture is
    decoded and the last one encoded while the network runs; three pictures at most are held.

    Raises InputError for a wrong direction, format, quality, suffix or size, for no inputs at all, and when ``out_dir``
    cannot be created.
    """
    translator.channels(direction)
    translator.short_side(scale)
    _check_options(inputs, suffix, format, quality)
    Execution(scale, tile, max_memory)  # raises for what is not allowed
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot create the output folder {out}: {getattr(error, 'strerror', error)}") from error
    found, failed = collect(inputs, out)
    alpha = translator.channels(direction)[1] in (2, 4)
    jobs, refused = plan_jobs(found, out, lambda name: output_name(name, suffix, format, alpha), overwrite)
    result = Result([], failed + refused)
    with tqdm(total=len(jobs), unit="picture", file=sys.stderr, disable=not progress, dynamic_ncols=True) as bar:
        options = {"truncate": truncate, "scale": scale, "tile": tile, "max_memory": max_memory}
        for job, reason in _translate_jobs(translator, jobs, direction, options, quality, progress):
            if reason is None:
                result.done.append(job.target)
            else:
                result.failed.append((job.source, reason))
            bar.update()
    return result


def _translate_jobs(
    translator: Translator,
    jobs: Sequence[Job],
    direction: str,
    options: dict[str, Any],
    quality: int,
    progress: bool,
) -> Iterator[tuple[Job, str | None]]:
    """Each job with None, or why it failed, in order. One thread reads ahead by one picture, another writes behind."""
    channels = translator.channels(direction)[0]
    saving: tuple[Job, Future[None]] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for job, reading in _read_ahead(reader, jobs, channels):
            reason = ""
            try:
                photo = reading.result()
                with band_bar(job.source.name, shown=progress) as step:
                    image = translator.translate(photo.image, direction, progress=step, **options)
            except (ValueError, OSError, MemoryError) as error:
                reason = _reason(error)
            if saving is not None:
                yield saving[0], _outcome(saving[1])
                saving = None
            if reason:
                yield job, reason
            else:
                saving = job, writer.submit(_save, image, job.target, photo, quality)
        if saving is not None:
            yield saving[0], _outcome(saving[1])


def _read_ahead(reader: ThreadPoolExecutor, jobs: Sequence[Job], channels: int) -> Iterator[tuple[Job, Future[Photo]]]:
    """Each job with its photograph to come; that of the next job is under way by then, and no more."""
    ahead = [reader.submit(open_photo, job.source, channels) for job in jobs[:1]]
    for index, job in enumerate(jobs):
        reading = ahead.pop()
        ahead += [reader.submit(open_photo, after.source, channels) for after in jobs[index + 1 : index + 2]]
        yield job, reading


def _save(image: Image.Image, target: Path, photo: Photo, quality: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    save_photo(image, target, like=photo, quality=quality)


def _outcome(saving: Future[None]) -> str | None:
    try:
        saving.result()
    except (ValueError, OSError, MemoryError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PhotoError) else str(error) or type(error).__name__


def _check_options(inputs: Sequence[str | Path], suffix: str, file_format: str | None, quality: int) -> None:
    if isinstance(inputs, (str, Path)):
        raise InputError(f"inputs must be a list of files, folders and patterns, not the single {str(inputs)!r}")
    if not inputs:
        raise InputError("inputs is empty: name at least one file, folder or pattern")
    if file_format is not None and file_format not in FORMATS:
        raise InputError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise InputError(f"quality = {quality!r} is not allowed: an integer from 1 to 100")
    if "/" in suffix or os.sep in suffix or "\0" in suffix:
        raise InputError(f"suffix {suffix!r} is not allowed: it is added to a file's name and cannot hold a path")
