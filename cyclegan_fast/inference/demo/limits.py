"""What the page takes: the limits of an upload, and how they are written on the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cyclegan_fast.data.photo import MAX_PIXELS
from cyclegan_fast.errors import InputError

__all__ = ["Limits", "checked_limits"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limits:
    """The largest upload, in bytes, and the most megapixels (millions of pixels) that the page takes."""

    upload: int
    megapixels: float


def checked_limits(upload: str, megapixels: float) -> Limits:
    """The limits that ``--max-upload`` and ``--max-megapixels`` mean. Raises InputError for what is not allowed."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMG]B)", upload.strip().upper())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise InputError(f"--max-upload {upload!r} is not a size such as 500KB, 50MB or 1GB")
    if not (math.isfinite(megapixels) and 0 < megapixels <= MAX_PIXELS / 1e6):
        raise InputError(f"--max-megapixels {megapixels:g} is not allowed: above 0, up to {MAX_PIXELS / 1e6:g}")
    return Limits(size, megapixels)
