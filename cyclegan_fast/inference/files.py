"""Translating photographs from files to files: decoders and encoders run beside the network."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cyclegan_fast.data.colour import luma
from cyclegan_fast.data.photo import (
    DEEP,
    PROFILES,
    Original,
    PhotoError,
    Pixels,
    format_to_write,
    open_original,
    read_header,
    save_photo,
)
from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.inference.memory import available_memory
from cyclegan_fast.inference.paths import FORMATS, Job, collect, output_name, plan_jobs
from cyclegan_fast.inference.pipeline import pipelined
from cyclegan_fast.inference.tiles import band_bar
from cyclegan_fast.inference.translate import Execution, Translator
from cyclegan_fast.machine import usable_cores

__all__ = ["UNFAMILIAR", "Result", "translate_files"]

logger = logging.getLogger("cyclegan_fast.translate")

# Bytes for a pixel of a picture between its file and its file, at most: decoded, converted, translated, encoded.
_BYTES_A_PIXEL = {8: 20, 16: 48}
_MOST_AHEAD = 4_000_000_000
_LEAST_AHEAD = 300_000_000

# What may be done with pictures unlike the training pictures.
UNFAMILIAR = ("warn", "skip", "ignore")


@dataclass(frozen=True)
class Output:
    """How translated pictures are written, as ``translate_files`` explains it; InputError for what is not allowed."""

    quality: int
    chroma: str | None
    lossless: bool
    depth: int | str
    profile: str
    gray: str
    keep_times: bool

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality = {self.quality!r} is not allowed: an integer from 1 to 100")
        choices: dict[str, tuple[object, ...]] = {
            "chroma": (None, "420", "422", "444"),
            "depth": (8, 16, "same"),
            "profile": PROFILES,
            "gray": ("keep", "model"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} = {getattr(self, name)!r} is not allowed: one of {', '.join(map(str, allowed))}"
                )

    def bits_for(self, target: Path) -> int | None:
        """Bits a channel to read and write for a file; None for as many as the input has.

        Raises PhotoError when the format that its suffix names does not hold what is asked for.
        """
        asked = self.depth if isinstance(self.depth, int) else None
        file_format = format_to_write(target, self.chroma, self.lossless, asked)
        return asked if asked or file_format in DEEP else 8


@dataclass(frozen=True)
class Result:
    """What became of a batch of files: those written, inputs that failed with the reason, and those of either, or of
    neither where they are skipped, that are unlike the training pictures, with how much.
    """  # fmt: skip

    done: list[Path]
    failed: list[tuple[Path, str]]
    unfamiliar: list[tuple[Path, str]] = field(default_factory=list)


def translate_files(
    translator: Translator,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    direction: str = "AtoB",
    suffix: str = "",
    format: str | None = None,  # noqa: A002 - the word users know
    quality: int = 95,
    chroma: str | None = None,
    lossless: bool = False,
    depth: int | str = "same",
    profile: str = "srgb",
    gray: str = "keep",
    keep_times: bool = False,
    overwrite: bool = False,
    truncate: bool = False,
    scale: int | str | None = None,
    tile: int | None = None,
    max_memory: int | None = None,
    unfamiliar: str = "warn",
    progress: bool = True,
) -> Result:
    """Translate photographs from files to files of the same size, with their metadata.

    ``inputs`` are files, folders (all pictures inside, hidden ones left out) and glob patterns; below folders and the
    fixed part of a pattern, sub-folders are kept. What lies in ``out_dir`` is not taken up when that is inside one of
    the folders. An output is named after its input, with ``suffix`` added to the stem, in the input's format or the
    one named by ``format`` (one of FORMATS); HEIC becomes JPEG, and pictures that get alpha from the network become PNG
    where the input's format has none. ``truncate``, ``scale``, ``tile`` and ``max_memory`` are as in
    ``Translator.translate``.

    ``quality`` 1 to 100, ``chroma`` (420, 422, 444) and ``lossless`` are as in ``save_photo``. ``depth``: bits a
    channel, 8, 16 or the input's (``same``), then 8 where the format holds no more. ``profile``: colours in ``srgb``,
    or converted back into the input's ``original`` profile. ``gray``: ``keep`` makes the translation of a gray picture
    by a network for colour gray again (its luma), ``model`` leaves what colours the network gave it. ``keep_times``:
    the file gets the input's times of access and change.

    ``unfamiliar``: of a picture unlike the training pictures (``Translator.familiarity``) ``warn`` logs a line,
    ``skip`` does so and leaves it out, which counts as no failure, and ``ignore`` does not look.

    A file that fails does not stop the others. Refused for their file alone are also an output that exists (without
    ``overwrite``), one that another input writes already, one that is itself among the inputs, and one that a link
    would lead out of ``out_dir``. Links to folders are not followed below folders and by ``**``. Once the disk is
    full, no more are begun. Pictures are decoded and encoded while the network runs, in order, in bounded memory; an
    interruption leaves no file half-written.

    Raises InputError for a wrong direction, format, suffix, size or way to write, for no inputs at all, when
    ``out_dir`` cannot be created, and for ``skip`` with a model that does not know its training pictures.
    """
    translator.channels(direction)
    execution = Execution(scale, tile, max_memory)
    translator.short_side(scale)
    _check_options(inputs, suffix, format)
    _check_unfamiliar(unfamiliar, translator, direction)
    output = Output(quality, chroma, lossless, depth, profile, gray, keep_times)
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
        batch = _Batch(translator, direction, truncate, execution, progress, output, unfamiliar)
        readers, writers = _threads(translator.device)
        settled = pipelined(
            jobs, batch.read, batch.translate, batch.save,
            cost=batch.cost, limit=_bytes_ahead(), readers=readers, writers=writers,
        )  # fmt: skip
        for job, failure in settled:
            if failure is None:
                result.done.append(job.target)
            elif not isinstance(failure, _SkippedError):
                result.failed.append((job.source, _reason(failure)))
            bar.update()
    result.unfamiliar.extend(batch.unfamiliar)
    batch.report()
    return result


class _SkippedError(PhotoError):
    """A picture that is left out for being unlike the training pictures."""


class _Batch:
    """What is done with each file of a batch, and what is told of it once."""

    def __init__(
        self,
        translator: Translator,
        direction: str,
        truncate: bool,
        execution: Execution,
        progress: bool,
        output: Output,
        unfamiliar: str,
    ) -> None:
        self.translator, self.direction, self.truncate, self.output = translator, direction, truncate, output
        self.execution, self.progress, self.handling = execution, progress, unfamiliar
        self.looked_at = 0
        self.unfamiliar: list[tuple[Path, str]] = []
        self.channels = translator.channels(direction)[0]
        self.disk_is_full = False
        self.kept_gray, self.coarse = 0, 0

    def cost(self, job: Job) -> int:
        """Bytes that a picture takes at most, by its header."""
        header = read_header(job.source)
        deep = self.output.bits_for(job.target) != 8 or self.output.profile == "original"
        return header.width * header.height * _BYTES_A_PIXEL[16 if deep else 8]

    def read(self, job: Job) -> Original:
        self._refuse_when_full(job)
        bits = self.output.bits_for(job.target)
        return open_original(job.source, self.channels, bits=bits, profile=self.output.profile)

    def translate(self, job: Job, original: Original) -> Pixels:
        self._refuse_when_full(job)
        self._look_at(job, original)
        how = self.execution
        with band_bar(job.source.name, shown=self.progress) as step:
            pixels = self.translator.translate(
                original.pixels,
                self.direction,
                truncate=self.truncate,
                scale=how.scale,
                tile=how.tile,
                max_memory=how.max_memory,
                progress=step,
            )
        deep = pixels.dtype == np.uint16 and self._bits(job, original) == 16
        self.coarse += deep and self.translator.precision in ("bf16", "fp16")
        if original.gray and self.output.gray == "keep" and self.channels >= 3 and pixels.shape[2:] in ((3,), (4,)):
            self.kept_gray += 1
            gray = luma(pixels[..., :3])[..., None]
            pixels = np.concatenate((gray, pixels[..., 3:]), axis=2)
        return pixels

    def save(self, job: Job, original: Original, pixels: Pixels) -> None:
        output = self.output
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            save_photo(
                pixels,
                job.target,
                like=original,
                quality=output.quality,
                chroma=output.chroma,
                lossless=output.lossless,
                bits=self._bits(job, original),
                keep_times=output.keep_times,
            )
        except OSError as error:
            self._note(error)
            raise
        except PhotoError as error:
            self._note(error.__cause__)
            raise

    def report(self) -> None:
        """What may surprise, in a line each."""
        if self.unfamiliar:
            logger.warning(
                "%d of %d pictures are unlike the training pictures: %s",
                len(self.unfamiliar),
                self.looked_at,
                "they were left out (unfamiliar=skip)"
                if self.handling == "skip"
                else "look at them before you use them (unfamiliar=skip leaves such out, ignore says nothing)",
            )
        if self.kept_gray:
            logger.info("%d gray pictures were kept gray; gray=model keeps the network's colours", self.kept_gray)
        if self.coarse:
            logger.warning(
                "%d pictures were written with 16 bits a channel, but computed in %s, which resolves fewer: use fp32",
                self.coarse,
                self.translator.precision,
            )

    def _look_at(self, job: Job, original: Original) -> None:
        """Note a picture unlike the training pictures. Raises _SkippedError where such are left out."""
        if self.handling == "ignore":
            return
        try:
            found = self.translator.familiarity(original.pixels, self.direction)
        except (MemoryError, RuntimeError) as error:  # no translation fails of it
            logger.debug("%s: its familiarity is not known: %s", job.source, error)
            return
        self.looked_at += found is not None
        if found is None or not found.unfamiliar:
            return
        self.unfamiliar.append((job.source, str(found)))
        skip = self.handling == "skip"
        with tqdm.external_write_mode(file=sys.stderr):  # not into the bar
            logger.warning("%s is %s%s", shown(job.source), found, ": left out" if skip else "")
        if skip:
            raise _SkippedError(job.source, str(found))

    def _bits(self, job: Job, original: Original) -> int:
        """Bits a channel of the output."""
        return self.output.bits_for(job.target) or original.bits

    def _note(self, error: BaseException | None) -> None:
        self.disk_is_full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)

    def _refuse_when_full(self, job: Job) -> None:
        if self.disk_is_full:
            raise PhotoError(job.source, "not begun: the disk is full")


def _threads(device: torch.device) -> tuple[int, int]:
    """(decoders, encoders). A network on the CPU has use for every core; one on a GPU is as fast as many of them."""
    if device.type == "cpu":
        return 1, 1
    cores = usable_cores()
    return max(1, min(6, cores // 3)), max(1, min(8, cores // 2))


def _bytes_ahead() -> int:
    """Bytes that all pictures may take which are between their files: an eighth of the free memory."""
    available = available_memory()
    return _MOST_AHEAD if available is None else max(_LEAST_AHEAD, min(_MOST_AHEAD, available // 8))


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PhotoError) else str(error) or type(error).__name__


def _check_unfamiliar(unfamiliar: str, translator: Translator, direction: str) -> None:
    if unfamiliar not in UNFAMILIAR:
        raise InputError(f"unfamiliar = {unfamiliar!r} is not allowed: one of {', '.join(UNFAMILIAR)}")
    if unfamiliar == "skip" and direction[0] not in translator.references:
        raise InputError(
            f"unfamiliar = 'skip' is not possible: the checkpoint does not say what its training pictures "
            f"{direction[0]} are like (weights of others, an older checkpoint, or too few pictures); use warn or ignore"
        )


def _check_options(inputs: Sequence[str | Path], suffix: str, file_format: str | None) -> None:
    if isinstance(inputs, (str, Path)):
        raise InputError(f"inputs must be a list of files, folders and patterns, not the single {str(inputs)!r}")
    if not inputs:
        raise InputError("inputs is empty: name at least one file, folder or pattern")
    if file_format is not None and file_format not in FORMATS:
        raise InputError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    if "/" in suffix or os.sep in suffix or "\0" in suffix:
        raise InputError(f"suffix {suffix!r} is not allowed: it is added to a file's name and cannot hold a path")
