"""Where the page's translations happen: one at a time, within limits, in a temporary folder of their own."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cyclegan_fast.data.photo import PhotoError, open_photo, read_header, save_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.demo.limits import Limits
from cyclegan_fast.inference.files import translate_files
from cyclegan_fast.inference.translate import DIRECTIONS, Translator

__all__ = ["PICTURES", "Translated", "Workbench", "directions"]

PICTURES = ("before", "after", "result")

# Results that can still be looked at and downloaded: those of a few tabs, so that a long evening fills no disk.
_KEPT = 6
# What every browser of the last years shows; other results get a copy for looking at.
_SHOWN_BY_BROWSERS = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".avif"))
_VIEW_QUALITY = 95

Report = Callable[[float, str], object]


def _silent(share: float, words: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Translated:
    """One translation: names, size in pixels, and the three files of PICTURES, in a folder that is theirs alone.

    unfamiliar: in what the photograph is unlike the training pictures, empty where it is not.
    """

    token: str
    name: str
    direction: str
    width: int
    height: int
    seconds: float
    files: dict[str, Path]
    unfamiliar: str = ""


class Workbench:
    """Translates uploads below ``folder`` and keeps the last few results there until ``close``.

    A file can be had by its token only, which cannot be guessed; no path comes from outside.
    """

    def __init__(self, translator: Translator, folder: Path, limits: Limits) -> None:
        self.limits = limits
        self.uploads = folder / "uploads"
        self._results = folder / "results"
        self._translator, self._folder = translator, folder
        self._kept: OrderedDict[str, Translated] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self.uploads.mkdir()
        self._results.mkdir()

    def translate(self, upload: str | Path, direction: str, report: Report = _silent) -> Translated:
        """Translate one upload; ``report`` hears how far it is (0 to 1) and what is being done.

        The result is the file that ``translate_files`` writes. Raises InputError, with words for the page: a picture
        that is none, too large, too much for the memory, or whose result is not finite; nothing is left of it then.
        """
        upload = Path(upload)
        if not upload.resolve().is_relative_to(self.uploads.resolve()):
            raise InputError("this file was not uploaded to this page")
        if not upload.is_file():
            raise InputError(f"{upload.name} is no longer here: drop it again")
        with self._lock:
            if self._closed:
                raise InputError("the page is being closed")
            token = secrets.token_urlsafe(16)
            folder = self._results / token
            try:
                translated = self._translate(upload, direction, token, folder, report)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, (InputError, MemoryError, OSError)):
                    raise InputError(self._public(upload, error)) from error
                raise
            self._keep(translated)
            return translated

    def file(self, token: str, picture: str) -> tuple[Path, str] | None:
        """A picture of PICTURES and the name it is downloaded by; None for what there is not, or no longer."""
        translated = self._kept.get(token)
        path = translated.files.get(picture) if translated else None
        return (path, path.name) if path is not None and path.is_file() else None

    def close(self) -> None:
        """Wait for the translation under way and refuse later ones, so that the folder can be removed."""
        with self._lock:
            self._closed = True

    def _translate(self, upload: Path, direction: str, token: str, folder: Path, report: Report) -> Translated:
        width, height = self._checked_size(upload)
        report(0.1, f"Translating {width} × {height} pixels")
        started = time.perf_counter()
        outcome = translate_files(
            self._translator, [upload], folder / "result", direction=direction, suffix=f"_{direction}", progress=False
        )
        for _, reason in outcome.failed:
            raise InputError(reason if reason != "MemoryError" else "not enough memory for this picture")
        seconds = time.perf_counter() - started
        report(0.9, "Preparing the view")
        (result,) = outcome.done
        before, after = folder / "before.jpg", result
        save_photo(open_photo(upload).image, before, quality=_VIEW_QUALITY)
        if result.suffix.lower() not in _SHOWN_BY_BROWSERS:
            after = folder / "after.jpg"
            save_photo(open_photo(result).image, after, quality=_VIEW_QUALITY)
        files = {"before": before, "after": after, "result": result}
        unfamiliar = "".join(how for _, how in outcome.unfamiliar)
        return Translated(token, upload.name, direction, width, height, seconds, files, unfamiliar)

    def _checked_size(self, upload: Path) -> tuple[int, int]:
        """Width and height by the header, before memory is taken for pixels."""
        size, limit = upload.stat().st_size, self.limits.upload
        if size > limit:
            raise InputError(f"the file has {size / 1e6:.1f} MB; this page takes up to {limit / 1e6:g} (--max-upload)")
        header = read_header(upload)
        megapixels = header.width * header.height / 1e6
        if megapixels > self.limits.megapixels:
            raise InputError(
                f"{header.width} × {header.height} pixels are {megapixels:.3g} megapixels; this page takes up to "
                f"{self.limits.megapixels:g} (--max-megapixels)"
            )
        return header.width, header.height

    def _public(self, upload: Path, error: BaseException) -> str:
        """An error in words for the page, which name the upload and no folder of this machine."""
        reason = error.reason if isinstance(error, PhotoError) else str(error)
        if isinstance(error, MemoryError):
            reason = "not enough memory for this picture"
        elif isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
        reason = re.sub(re.escape(str(self._folder)) + r"[^\s'\"]*", upload.name, reason)
        return f"{upload.name}: {reason}"

    def _keep(self, translated: Translated) -> None:
        self._kept[translated.token] = translated
        while len(self._kept) > _KEPT:
            token, _ = self._kept.popitem(last=False)
            shutil.rmtree(self._results / token, ignore_errors=True)


def directions(translator: Translator) -> list[str]:
    """The directions that a model has: both, or the one of a model that was trained or imported for one."""

    def has(direction: str) -> bool:
        try:
            translator.channels(direction)
        except InputError:
            return False
        return True

    return [direction for direction in DIRECTIONS if has(direction)]
