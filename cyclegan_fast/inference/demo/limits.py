"""What the page takes: the limits of an upload, and how they are written on the command line."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

from cyclegan_fast.data.photo import MAX_PIXELS
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.memory import parse_size

__all__ = ["Limits", "checked_limits"]


@dataclass(frozen=True)
class Limits:
    """The largest upload, in bytes, and the most megapixels (millions of pixels) that the page takes."""

    upload: int
    megapixels: float


def checked_limits(upload: str, megapixels: float) -> Limits:
    """The limits that ``--max-upload`` and ``--max-megapixels`` mean. Raises InputError for what is not allowed."""
    size = 0
    with contextlib.suppress(InputError):
        size = parse_size(upload)
    if size < 1000:  # `50` means megabytes to whoever writes it
        raise InputError(f"--max-upload {upload!r} is not a size such as 500KB, 50MB or 1GB")
    if not (math.isfinite(megapixels) and 0 < megapixels <= MAX_PIXELS / 1e6):
        raise InputError(f"--max-megapixels {megapixels:g} is not allowed: above 0, up to {MAX_PIXELS / 1e6:g}")
    return Limits(size, megapixels)
