"""Colour profiles: pixels to sRGB and back.

8-bit pixels go through Little CMS, as Pillow has it, which knows every kind of profile. Pixels of 16 bits do not fit
through Pillow; for them, profiles made of a matrix and curves (Display P3, Adobe RGB, ProPhoto, Rec. 2020, sRGB; gray
with a curve) are evaluated here, by the formulas of ICC.1:2022, annex F. Both mean the relative colorimetric intent
with black point compensation (for a matrix and curves black is black already).
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

__all__ = ["Curves", "curves_of", "from_srgb", "luma", "srgb_profile", "to_8_bits", "to_16_bits", "to_srgb"]

logger = logging.getLogger("cyclegan_fast.photo")

MAX_PROFILE = 16_000_000
_BAND_PIXELS = 1_000_000  # converted at a time: the numbers take ten times the room of the pixels
_STEPS = 1 << 18  # of the tables that encode light; over its square root, which keeps them exact in the dark

# Linear sRGB to XYZ under D50: the primaries and the white of IEC 61966-2-1, by Bradford's adaptation (ICC.1:2022,
# annex E), as Little CMS has it.
_SRGB_TO_XYZ = np.array(
    [
        [0.436041252, 0.385112911, 0.143045838],
        [0.222484540, 0.716905079, 0.060610381],
        [0.013920187, 0.097067239, 0.713912574],
    ]
)


@dataclass(frozen=True, eq=False)
class Curves:
    """A profile of a matrix and curves, or of one gray curve.

    ``light`` [C, 65536] float32: linear light from 0 to 1 for every 16-bit sample. ``matrix`` [3, 3]: from that light
    to XYZ under D50; None for gray.
    """

    light: npt.NDArray[np.float32]
    matrix: npt.NDArray[np.float64] | None

    def to_srgb(self, pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        """uint16 [H, W, 3], or [H, W] for gray, in this profile to the same in sRGB; colours outside are clipped."""
        matrix = None if self.matrix is None else np.linalg.inv(_SRGB_TO_XYZ) @ self.matrix
        return _converted(pixels, self.light, matrix, [_srgb_encoder()] * len(self.light))

    def from_srgb(self, pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        """The way back from sRGB, of the same shapes."""
        matrix = None if self.matrix is None else np.linalg.inv(self.matrix) @ _SRGB_TO_XYZ
        return _converted(pixels, [_srgb_light()] * len(self.light), matrix, self._encoders)

    @cached_property
    def _encoders(self) -> list[npt.NDArray[np.uint16]]:
        return [_encoder(curve) for curve in self.light]

    @cached_property
    def is_srgb(self) -> bool:
        """Whether it is sRGB to within one level of 8 bits, as `to_srgb` of 8-bit pixels has it."""
        steps = np.arange(0, 65536, 17 * 257, dtype=np.uint16)
        if self.matrix is None:
            grid: Any = np.arange(0, 65536, 257, dtype=np.uint16)[None]
        else:
            grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        return bool(np.abs(self.to_srgb(grid).astype(np.int32) - grid).max() <= 257)


@lru_cache(maxsize=8)  # a folder's pictures have one profile, or two
def curves_of(profile: bytes) -> Curves | None:
    """A profile's matrix and curves; None for one with tables of colours, of another space, or that is malformed."""
    try:
        tags = _tags(profile)
        space, connection = profile[16:20], profile[20:24]
        if connection != b"XYZ " or any(name in tags for name in (b"A2B0", b"A2B1", b"D2B0", b"D2B1")):
            return None
        if space == b"GRAY":
            return Curves(_curve(tags[b"kTRC"])[None], None)
        if space != b"RGB ":
            return None
        columns = [struct.unpack_from(">3i", tags[name], 8) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        matrix = np.array(columns, dtype=np.float64).T / 65536
        if np.linalg.cond(matrix) > 1e4:
            return None
        return Curves(np.stack([_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]), matrix)
    except (KeyError, ValueError, struct.error, np.linalg.LinAlgError):
        return None


def _tags(profile: bytes) -> dict[bytes, bytes]:
    """The tagged elements by their signature (ICC.1:2022, 7.3)."""
    if profile[36:40] != b"acsp" or len(profile) > MAX_PROFILE:
        raise ValueError("not a profile")
    (count,) = struct.unpack_from(">I", profile, 128)
    if count > 100:
        raise ValueError("more than 100 tags")
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * index) for index in range(count))
    return {name: profile[offset : offset + length] for name, offset, length in entries}


def _curve(tag: bytes) -> npt.NDArray[np.float32]:
    """Linear light for every 16-bit sample, float32 [65536]: a gamma, a table, or a parametric curve (10.6, 10.18)."""
    x = np.linspace(0, 1, 65536)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            y = x
        elif count == 1:
            y = x ** (struct.unpack_from(">H", tag, 12)[0] / 256)
        else:
            table = np.frombuffer(tag, ">u2", count, 12) / 65535
            y = np.interp(x, np.linspace(0, 1, count), table)
    elif tag[:4] == b"para":
        y = _parametric(tag, x)
    else:
        raise ValueError(f"a curve of type {tag[:4]!r}")
    if not np.isfinite(y).all():
        raise ValueError("a curve that is not finite")
    rising = np.maximum.accumulate(np.clip(y, 0, 1))
    if rising[-1] <= rising[0]:
        raise ValueError("a curve that does not rise")
    return rising.astype(np.float32)


def _parametric(tag: bytes, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The function types 0 to 4 of ``para``: (ax + b)^g + e above d, cx + f below."""
    (kind,) = struct.unpack_from(">H", tag, 8)
    names = {0: "g", 1: "gab", 2: "gabc", 3: "gabcd", 4: "gabcdef"}.get(kind)
    if names is None:
        raise ValueError(f"a parametric curve of type {kind}")
    values = struct.unpack_from(f">{len(names)}i", tag, 12)
    p = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0}
    p |= {name: value / 65536 for name, value in zip(names, values, strict=True)}
    if kind == 2:
        p["e"], p["f"], p["c"] = p["c"], p["c"], 0.0
    if kind in (1, 2):
        if p["a"] == 0:
            raise ValueError("a parametric curve of slope 0")
        p["d"] = -p["b"] / p["a"]
    above = np.maximum(p["a"] * x + p["b"], 0) ** p["g"] + p["e"]
    return np.where(x >= p["d"], above, p["c"] * x + p["f"])


@lru_cache(maxsize=1)
def _srgb_light() -> npt.NDArray[np.float32]:
    """IEC 61966-2-1 for every 16-bit sample, float32 [65536]."""
    x = np.linspace(0, 1, 65536)
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_encoder() -> npt.NDArray[np.uint16]:
    return _encoder(_srgb_light())


def _encoder(light: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The inverse of a curve: the 16-bit sample at every step of the square root of light, uint16 [_STEPS]."""
    root = np.linspace(0, 1, _STEPS)
    samples = np.interp(root * root, light, np.arange(65536))
    encoded: npt.NDArray[np.uint16] = np.rint(samples).astype(np.uint16)
    return encoded


def _converted(
    pixels: npt.NDArray[np.uint16],
    light: Iterable[npt.NDArray[np.float32]],
    matrix: npt.NDArray[np.float64] | None,
    encoders: Iterable[npt.NDArray[np.uint16]],
) -> npt.NDArray[np.uint16]:
    """Samples to light, through the matrix, and to samples again, a band of rows at a time."""
    result = np.empty_like(pixels)
    rows = max(1, _BAND_PIXELS // max(1, pixels.shape[1]))
    flat = matrix is None
    for top in range(0, len(pixels), rows):
        band = pixels[top : top + rows]
        planes = [band] if flat else [band[..., c] for c in range(3)]
        linear: Any = np.stack([curve[plane] for curve, plane in zip(light, planes, strict=True)], axis=-1)
        if matrix is not None:
            linear = linear @ matrix.T.astype(np.float32)
        index = np.sqrt(np.clip(linear, 0, 1, out=linear), out=linear)
        index = (index * (_STEPS - 1) + 0.5).astype(np.int32)
        for c, encoder in enumerate(encoders):
            (result if flat else result[..., c])[top : top + rows] = encoder[index[..., c]]
    return result


def to_16_bits(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """255 becomes 65535: exact, and undone by `to_8_bits`."""
    result: npt.NDArray[np.uint16] = pixels.astype(np.uint16)
    result *= 257
    return result


def to_8_bits(pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """65535 becomes 255, rounded to the nearest."""
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // max(1, pixels[:1].size))
    for top in range(0, len(pixels), rows):
        result[top : top + rows] = (pixels[top : top + rows].astype(np.uint32) * 255 + 32895) >> 16
    return result


def luma(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[H, W, 3] to gray [H, W] of the same dtype: ITU-R 601, as Pillow weighs colours."""
    result = np.empty(pixels.shape[:2], pixels.dtype)
    rows = max(1, _BAND_PIXELS // max(1, pixels.shape[1]))
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    for top in range(0, len(pixels), rows):
        result[top : top + rows] = np.rint(pixels[top : top + rows].astype(np.float32) @ weights)
    return result


def to_srgb(colour: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    """L, RGB, CMYK or LAB pixels as sRGB: L or RGB. A profile that cannot be used is left out with a warning."""
    if profile is not None:
        try:
            if len(profile) > MAX_PROFILE:
                raise ValueError(f"it has {len(profile) / 1e6:.0f} MB, above the limit of {MAX_PROFILE / 1e6:.0f}")
            return _apply_profile(colour, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except Exception as error:
            logger.warning("%s: its colour profile is ignored: %s", path, str(error) or type(error).__name__)
    if colour.mode == "LAB":
        return _apply_profile(colour, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    return colour if colour.mode == "L" else colour.convert("RGB")


def _apply_profile(colour: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    space = profile.profile.xcolor_space.strip()
    if space == "GRAY" and colour.mode == "RGB":  # Pillow expands gray with 16-bit alpha to colour
        red, green, blue = colour.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            colour = red
    elif space == "RGB" and colour.mode == "L":
        colour = colour.convert("RGB")
    if {"L": "GRAY", "LAB": "Lab"}.get(colour.mode, colour.mode) != space:
        raise ValueError(f"it describes {space} but the pixels are {colour.mode}")
    transform = _transform_to_srgb(profile, colour.mode)
    if colour.mode == "L":
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        table = np.asarray(_transformed(ramp, transform))[0, :, 0]
        return colour if _equal_up_to_rounding(table, np.arange(256)) else colour.point(table.tolist())
    if colour.mode == "RGB":
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        if _equal_up_to_rounding(np.asarray(_transformed(Image.fromarray(grid), transform)), grid):
            return colour
    return _transformed(colour, transform)


def _transform_to_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """The transform; lcms precalculates it on a grid where evaluating each pixel would take long.

    The grid is a level off for RGB and up to three for CMYK, but up to nine for gray, of which there are only 256
    values to evaluate, and seven for LAB, which is rare.
    """
    precision = ImageCms.Flags.NOOPTIMIZE if mode in ("L", "LAB") else ImageCms.Flags.HIGHRESPRECALC
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | precision,
    )


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    if result is None:
        raise ValueError("the conversion gave no picture")
    return result


def _equal_up_to_rounding(converted: np.ndarray[Any, Any], original: np.ndarray[Any, Any]) -> bool:
    """Whether a profile is sRGB in effect: pixels are then kept to the bit instead of being rounded once more."""
    return bool(np.abs(converted.astype(np.int16) - original.astype(np.int16)).max() <= 1)


def srgb_profile() -> bytes:
    """An sRGB profile, without the time of its making, so that equal pictures are equal files."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)


def from_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """8-bit sRGB, L or RGB, as pixels of a profile of any kind: L, RGB or CMYK. ValueError for other spaces."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = target.profile.xcolor_space.strip()
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
    if mode is None:
        raise ValueError(f"pixels cannot be converted back into a profile of {space}")
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"),
        target,
        "RGB",
        mode,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
    )
    return _transformed(picture.convert("RGB"), transform)
