"""One photograph: a file of any common kind to upright 8-bit sRGB pixels, and back to a file with its metadata.

What a camera writes is not what a network should see: pixels lie sideways (EXIF orientation), colours are Display P3,
Adobe RGB or CMYK (ICC profile), gray has 16 bits, PNGs have alpha and palettes. ``open_photo`` undoes all of that;
``save_photo`` writes a picture so that nothing is left half-written and the camera's EXIF stays with it. A file that
cannot be used raises PhotoError and nothing else, so that one bad file among thousands is a line in a list.

Files are told apart by their first bytes, never by their names. The functions hold no state and may run in any number
of threads and processes at once.

Limits, known and accepted:
* Pillow decodes 16-bit colour (PNG, TIFF) to the high byte of each sample: exact for what was 8 bit once, otherwise
  at most one level of 255 off the rounded value. 16-bit gray is rounded.
* PNG gAMA, cHRM and cICP chunks, HEIF and AVIF nclx colours and HDR gain maps are not applied; ICC profiles are.
* Of a JPEG, HEIF or pyramid TIFF with several pictures the main one is read; animations and multi-page TIFFs are
  refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cyclegan_fast.errors import InputError, shown

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "MODES",
    "Header",
    "Photo",
    "PhotoError",
    "open_photo",
    "read_header",
    "save_photo",
]

logger = logging.getLogger("cyclegan_fast.photo")

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif", ".ppm", ".pgm"}
)
MAX_PIXELS = 300_000_000

# Limits for files made to harm. Decoding a picture of MAX_PIXELS takes up to 20 bytes a pixel.
_MAX_BYTES = 4_000_000_000
_MAX_BYTES_AT_ONCE = 400_000_000  # of formats whose files are read into memory whole
_READ_AT_ONCE = ("JPEG", "WEBP", "AVIF", "HEIF")
_MAX_PAGES = 100
_MAX_SCANS = 100  # libtiff's limit too; progressive encoders write ten
_MAX_EXIF = 16_000_000
_MAX_PROFILE = 16_000_000
_BAND_PIXELS = 4_000_000  # pixels whose gray values are scaled at a time
# A marker of a JPEG file that is not part of entropy-coded data, and not the beginning of a picture.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")

_KNOWN = "JPEG, PNG, WebP, TIFF, BMP, HEIC, AVIF, PPM"
_SAVED_AS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".bmp": "BMP",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_HEADER = b"Exif\x00\x00"
_ORIENTATION, _EXIF_IFD, _GPS_IFD, _COLOR_SPACE, _THUMBNAIL, _THUMBNAIL_BYTES = (
    0x0112, 0x8769, 0x8825, 0xA001, 0x0201, 0x0202,
)  # fmt: skip
# What IFD0 of a TIFF says about the photograph; its other tags say how that one file stores the pixels.
_DESCRIPTIVE_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_JPEG_EXIF_LIMIT = 65_533


class PhotoError(InputError):
    """A file that cannot be read or written as a photograph; ``str()`` is ``path: reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {shown(self.reason)}"


@dataclass(frozen=True)
class Header:
    """What a file's header says: size in pixels once upright, Pillow's mode as stored (`RGB`, `I;16`, ...), format."""

    width: int
    height: int
    mode: str
    format: str


@dataclass(frozen=True)
class Photo:
    """A decoded photograph.

    ``image``: upright, sRGB, 8 bits a channel. ``exif``: the file's EXIF block (``Exif\\0\\0`` and a TIFF structure)
    with orientation 1, colour space sRGB and without its thumbnail, b"" when there is none. ``icc_profile``: the
    profile the file had, which ``image`` no longer needs.
    """

    image: Image.Image
    exif: bytes = field(repr=False)
    icc_profile: bytes | None = field(repr=False)
    format: str
    path: Path


def read_header(path: str | Path) -> Header:
    """Size, mode and format from the header alone, without decoding pixels.

    Raises PhotoError for what can be known unusable so far: no picture, a broken header, an animation, more than
    MAX_PIXELS.
    """
    path = Path(path)
    with _opened(path) as image:
        width, height = image.size
        if image.format != "TIFF":  # Pillow swaps the sides of a TIFF itself
            orientation, _ = _upright_exif(_raw_exif(image))
            if orientation >= 5:
                width, height = height, width
        return Header(width, height, image.mode, image.format or "")


def open_photo(path: str | Path, channels: int = 3) -> Photo:
    """Decode a photograph completely: upright, sRGB, mode ``MODES[channels]``.

    Transparent pixels are laid over white, unless 2 or 4 channels keep the alpha. Profiles are applied with the
    relative colorimetric intent and black point compensation; CMYK without a profile is converted naively. Integers
    of more than 8 bits scale so that the format's white is 255; floats (and 32-bit integers) take as white the
    smallest of 1, 255, 65535 (and 2**32 - 1) that no value exceeds. Gray is ITU-R 601 luma. A malformed ICC profile
    or EXIF block is left out with a warning (logger ``cyclegan_fast.photo``).

    Raises PhotoError for whatever cannot be decoded to the last row, and ValueError for a wrong ``channels``.
    """
    if channels not in MODES:
        raise ValueError(f"channels = {channels!r} is not allowed: one of {', '.join(map(str, MODES))}")
    path = Path(path)
    with _opened(path) as image:
        _refuse_many_scans(path, image)
        colour, alpha = _decode(image)
        profile = image.info.get("icc_profile") or None
        colour = _to_srgb(colour, profile, path)
        picture = _with_channels(colour, alpha, channels)
        if isinstance(image, TiffImageFile):  # Pillow has turned it already
            exif = _tiff_exif(image, path)
        else:
            raw_exif = _raw_exif(image)
            orientation, exif = _upright_exif(raw_exif)
            if raw_exif and not exif:
                logger.warning("%s: its EXIF block is malformed and is left out", path)
            if orientation != 1:
                picture = picture.transpose(_UPRIGHT[orientation])
        picture.info = {}
        return Photo(picture, exif, profile, image.format or "", path)


def save_photo(image: Image.Image, path: str | Path, *, like: Photo | None = None, quality: int = 95) -> None:
    """Write an sRGB picture in the format of the path's suffix, completely or not at all.

    ``like`` gives its EXIF, and when it had a colour profile an sRGB profile is embedded (colour pictures only: gray
    without a profile is understood as sRGB everywhere). ``quality`` from 1 to 100 is that of JPEG (4:4:4), WebP, AVIF
    (4:4:4) and HEIC (4:2:0, which every phone decodes); the others are lossless. Formats without alpha get the
    picture over white. The file appears under its name only when complete; a file of that name is replaced.

    Raises PhotoError when the suffix names no format, the format cannot hold the picture, or the folder cannot be
    written or is full; ValueError for a wrong ``quality``.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality = {quality!r} is not allowed: an integer from 1 to 100")
    path = Path(path)
    file_format = _SAVED_AS.get(path.suffix.lower())
    if file_format is None:
        known = ", ".join(sorted(_SAVED_AS))
        raise PhotoError(path, f"the suffix {path.suffix!r} names no format that can be written: use one of {known}")
    try:
        encoded = _encode(image, path, file_format, like, quality)
    except PhotoError:
        raise
    except Exception as error:
        width, height = image.size
        raise PhotoError(
            path, f"cannot write {width}x{height} {image.mode} as {file_format}: {_words(error)}"
        ) from error
    _write_atomically(path, encoded)


class _JpegFile(JpegImageFile):
    """Pillow's JPEG reader, which always reads the main picture of a multi-picture file when called directly."""

    def _read_dpi_from_exif(self) -> None:
        """Resolution is not needed, and looking for it warns about malformed EXIF before we can ignore it."""


_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "PPM": PpmImageFile,
    "AVIF": AvifImageFile,
}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The file's picture with its header read; whatever goes wrong, also while it is used, is a PhotoError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PhotoError(path, "not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        with path.open("rb") as file:
            image = _identify(path, file, status.st_size)
            _refuse_unusable(path, image)
            yield image
    except PhotoError:
        raise
    except MemoryError as error:
        raise PhotoError(path, "not enough memory to decode it") from error
    except Exception as error:
        raise PhotoError(path, f"cannot be read: {_words(error)}") from error


def _identify(path: Path, file: IO[bytes], size: int) -> ImageFile.ImageFile:
    """The reader for the file's format, by its first bytes, restricted to the formats a photograph may have.

    Readers are called directly: ``Image.open`` warns of or refuses pictures above a limit that is global state.
    They get no file name, because with one Pillow maps uncompressed pixels instead of reading them.
    """
    head = file.read(64)
    file.seek(0)
    if not head:
        raise PhotoError(path, "the file is empty (0 bytes)")
    file_format = _format_of(head)
    if file_format is None:
        raise PhotoError(path, f"not a picture in a known format ({_KNOWN}); it begins with {bytes(head[:12])!r}")
    limit = _MAX_BYTES_AT_ONCE if file_format in _READ_AT_ONCE else _MAX_BYTES
    if size > limit:
        raise PhotoError(path, f"a {file_format} file of {size / 1e6:.0f} MB, above the limit of {limit / 1e6:.0f}")
    reader = _heif_package(path).HeifImageFile if file_format == "HEIF" else _READERS[file_format]
    try:
        image: ImageFile.ImageFile = reader(file, "")
        return image
    except SyntaxError as error:
        raise PhotoError(path, f"it begins like a {file_format} file, but is damaged: {_words(error)}") from error


def _format_of(head: bytes) -> str | None:
    """The format that the first 64 bytes announce."""
    if head[4:8] == b"ftyp":
        end = min(struct.unpack(">I", head[:4])[0], len(head))
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        heif = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
        return "HEIF" if brands & heif else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    signatures = {
        b"\xff\xd8\xff": "JPEG",
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
        b"BM": "BMP",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
        b"P2": "PPM",
        b"P3": "PPM",
        b"P5": "PPM",
        b"P6": "PPM",
        b"Pf": "PPM",
    }
    return next((name for signature, name in signatures.items() if head.startswith(signature)), None)


def _heif_package(path: Path) -> Any:
    try:
        import pillow_heif
    except ImportError:
        raise PhotoError(path, "HEIC pictures need the package pillow-heif: pip install pillow-heif") from None
    return pillow_heif


def _refuse_unusable(path: Path, image: ImageFile.ImageFile) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PhotoError(
            path,
            f"{width}x{height} is {width * height / 1e6:.0f} megapixels, above the limit of "
            f"{MAX_PIXELS / 1e6:.0f} that guards against decompression bombs",
        )
    if isinstance(image, TiffImageFile):
        _refuse_pages(path, image)
        return
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != "HEIF":  # a HEIF file names its primary picture
        raise PhotoError(path, f"an animation of {frames} frames, not a photograph: take out its frames first")


def _refuse_pages(path: Path, image: TiffImageFile) -> None:
    """Refuse a TIFF of several pages, but for smaller versions and masks of the first.

    Its pages are not counted by Pillow, which takes a time that grows with the square of their number.
    """
    pages, whole = 1, True
    while pages <= _MAX_PAGES:
        try:
            image.seek(pages)
        except EOFError:
            break
        reduced_or_mask = int(image.tag_v2.get(0x00FE, 0)) & 0b101
        whole = whole and bool(reduced_or_mask)
        pages += 1
    if not whole or pages > _MAX_PAGES:
        count = f"more than {_MAX_PAGES}" if pages > _MAX_PAGES else pages
        raise PhotoError(path, f"a document of {count} pages, not a photograph: take out its pages first")
    if pages > 1:
        image.seek(0)


def _refuse_many_scans(path: Path, image: ImageFile.ImageFile) -> None:
    """Refuse a JPEG of very many scans: each takes ten bytes of the file, and a pass over all of the picture."""
    if not isinstance(image, JpegImageFile) or image.fp is None:
        return
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    if content.count(b"\xff\xda") > _MAX_SCANS and _scans(content) > _MAX_SCANS:  # the first number is a quick bound
        raise PhotoError(path, f"it has more than {_MAX_SCANS} scans, which no camera or program writes")


def _scans(content: bytes) -> int:
    """Scans of the first picture in a JPEG file; no more than _MAX_SCANS + 1 are counted."""
    scans, marker = 0, _JPEG_MARKER.search(content, 2)
    while marker and marker[0] != b"\xff\xd9" and scans <= _MAX_SCANS:
        scans += marker[0] == b"\xff\xda"
        length = int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = _JPEG_MARKER.search(content, marker.end() + length)
    return scans


def _words(error: BaseException) -> str:
    """An exception in words: the operating system's, the library's, or at least its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _decode(image: ImageFile.ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """All pixels as (colour, alpha): colour L, RGB, CMYK or LAB with 8 bits a channel, alpha L or None."""
    rawmode = _rawmode(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _gray_to_8_bits(image)
    picture: Image.Image = image
    key = picture.info.get("transparency")
    if key is not None and not isinstance(key, bytes):
        picture.info["transparency"] = _key_as_decoded(key, rawmode)
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    elif picture.mode in ("P", "PA") or (key is not None and picture.mode in ("1", "L", "RGB")):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode == "LA":
        return picture.getchannel("L"), picture.getchannel("A")
    if picture.mode == "RGBA":
        return picture.convert("RGB"), picture.getchannel("A")
    if picture.mode in ("L", "RGB", "CMYK", "LAB"):
        return picture.copy(), None
    return picture.convert("L" if picture.mode == "1" else "RGB"), None


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, in Pillow's words (`RGB;16B`, `L;2`), "" where the reader does not say."""
    args = image.tile[0][3] if image.tile else ""
    if isinstance(args, tuple):
        args = args[0] if args else ""
    return args if isinstance(args, str) else ""


def _key_as_decoded(key: Any, rawmode: str) -> Any:
    """A PNG's transparent colour, given in samples of the file, as the 8-bit value Pillow decodes that colour to."""
    if ";16" in rawmode:
        return tuple(sample >> 8 for sample in key)
    return key * {"L;2": 85, "L;4": 17}.get(rawmode, 1)


def _gray_to_8_bits(image: ImageFile.ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """16-bit, 32-bit and float gray, scaled so that white is 255 and rounded, with its alpha if it has any."""
    stored: np.ndarray[Any, Any] = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(stored == key, np.uint8(0), np.uint8(255)))
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, sample_format = (int(tags[tag][0]) if tag in tags else default for tag, default in ((258, 16), (339, 1)))
    rows = max(1, _BAND_PIXELS // max(1, image.width))  # the numbers take four to eight times the room of the pixels
    bands = [stored[top : top + rows] for top in range(0, image.height, rows)]

    def numbers(band: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if image.mode == "F":
            finite: np.ndarray[Any, Any] = np.nan_to_num(band.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
            return finite
        if bits > 16:
            return band.astype(np.int64) if sample_format == 2 else band.astype(np.int64) & 0xFFFFFFFF
        return band

    if image.mode == "F" or bits > 16:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, 2.0**32 - 1)
        white = _white_of(max(float(numbers(band).max()) for band in bands), scales)
    else:
        white = 2.0 ** (bits - (sample_format == 2)) - 1
    levels = np.empty(stored.shape, np.uint8)
    for index, band in enumerate(bands):
        scaled = np.clip(numbers(band) * (255.0 / white), 0.0, 255.0)
        if tags.get(262) == 0:  # photometric interpretation WhiteIsZero
            scaled = 255.0 - scaled
        levels[index * rows : index * rows + len(band)] = np.rint(scaled)
    return Image.fromarray(levels), alpha


def _white_of(largest: float, scales: tuple[float, ...]) -> float:
    for white in scales:
        if largest <= white:
            return white
    raise ValueError(f"float samples up to {largest:g}, for which no white level is known: scale them to 0 ... 1")


def _with_channels(colour: Image.Image, alpha: Image.Image | None, channels: int) -> Image.Image:
    """L or RGB colour and its alpha as ``MODES[channels]``; without room for alpha, over white."""
    mode = MODES[channels]
    if not mode.endswith("A"):
        if alpha is not None:
            colour = Image.composite(colour, Image.new(colour.mode, colour.size, "white"), alpha)
        return colour if colour.mode == mode else colour.convert(mode)
    if colour.mode != mode[:-1]:
        colour = colour.convert(mode[:-1])
    if alpha is None:
        alpha = Image.new("L", colour.size, 255)
    return Image.merge(mode, (*colour.split(), alpha))


def _to_srgb(colour: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    """L, RGB, CMYK or LAB pixels as sRGB: L or RGB. A profile that cannot be used is left out with a warning."""
    if profile is not None:
        try:
            if len(profile) > _MAX_PROFILE:
                raise ValueError(f"it has {len(profile) / 1e6:.0f} MB, above the limit of {_MAX_PROFILE / 1e6:.0f}")
            return _apply_profile(colour, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except Exception as error:
            logger.warning("%s: its colour profile is ignored: %s", path, _words(error))
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


def _srgb_profile() -> bytes:
    """An sRGB profile, without the time of its making, so that equal pictures are equal files."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)


def _raw_exif(image: ImageFile.ImageFile) -> bytes:
    """The EXIF block as it lies in the file, from its byte order on, b"" when there is none."""
    exif = image.info.get("exif")
    if exif is None and image.format == "PNG":
        if "Raw profile type exif" in image.info:  # ImageMagick, before PNG had a chunk for it
            return _exif_from_text(str(image.info["Raw profile type exif"]))
        return _late_png_exif(image)
    return exif.removeprefix(_EXIF_HEADER) if isinstance(exif, bytes) else b""


def _exif_from_text(text: str) -> bytes:
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])).removeprefix(_EXIF_HEADER)
    except ValueError:
        return b"not hexadecimal"


def _late_png_exif(image: ImageFile.ImageFile) -> bytes:
    """EXIF that follows the pixels, where the reader has not been yet; only chunk headers are read on the way."""
    file = image.fp
    if file is None:  # everything has been read
        return b""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length) if length <= _MAX_EXIF else b"too long"
            file.seek(length + 4, os.SEEK_CUR)
        return b""
    finally:
        file.seek(position)


def _upright_exif(raw: bytes) -> tuple[int, bytes]:
    """(orientation 1 to 8, the block for the upright sRGB picture, b"" when it is malformed).

    The block is changed in place, never written anew: maker notes hold offsets that moving would break.
    """
    if not raw:
        return 1, b""
    block = bytearray(raw)
    orientation = 1
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(block[:4])]
        (first,) = struct.unpack_from(order + "I", block, 4)
        tags: dict[int, tuple[str, int]] = {}
        for tag, layout, position in _entries(block, first, order):
            tags[tag] = layout, position
            if tag == _ORIENTATION:
                (orientation,) = struct.unpack_from(layout, block, position)
                struct.pack_into(layout, block, position, 1)
        _declare_srgb(block, tags, order)
        _drop_thumbnail(block, first, order)
    except (KeyError, struct.error):
        block.clear()
    return (orientation if orientation in _UPRIGHT else 1), (_EXIF_HEADER + bytes(block) if block else b"")


def _entries(block: bytearray, offset: int, order: str) -> Iterator[tuple[int, str, int]]:
    """(tag, struct layout of one value, its position) for every entry of the directory at ``offset``.

    Only integer values that lie within their entry are wanted here; of all others the layout is that of an offset.
    """
    (count,) = struct.unpack_from(order + "H", block, offset)
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, _, _ = struct.unpack_from(order + "HHII", block, position)
        yield tag, order + {1: "B", 3: "H"}.get(kind, "I"), position + 8


def _declare_srgb(block: bytearray, tags: dict[int, tuple[str, int]], order: str) -> None:
    """Set the colour space of the EXIF directory, if there is one, to 1, which is sRGB."""
    if _EXIF_IFD in tags:
        (offset,) = struct.unpack_from(order + "I", block, tags[_EXIF_IFD][1])
        for tag, layout, position in _entries(block, offset, order):
            if tag == _COLOR_SPACE:
                struct.pack_into(layout, block, position, 1)


def _drop_thumbnail(block: bytearray, first: int, order: str) -> None:
    """Unlink the second directory and blank its thumbnail, which shows another picture than the one to be saved."""
    (count,) = struct.unpack_from(order + "H", block, first)
    link = first + 2 + 12 * count
    if link + 4 > len(block):  # some writers leave out the link when there is no second directory
        return
    (second,) = struct.unpack_from(order + "I", block, link)
    struct.pack_into(order + "I", block, link, 0)
    if not 8 <= second < len(block):
        return
    values = {
        tag: struct.unpack_from(order + "I", block, position)[0] for tag, _, position in _entries(block, second, order)
    }
    start, length = values.get(_THUMBNAIL, 0), values.get(_THUMBNAIL_BYTES, 0)
    if 8 <= start < start + length <= len(block):
        at_the_end = not any(block[start + length :])
        block[start : start + length] = bytes(length)
        if at_the_end and second < start:
            del block[start:]


def _tiff_exif(image: TiffImageFile, path: Path) -> bytes:
    """EXIF of a TIFF, whose directories are those of the file: only what describes the photograph is taken."""
    try:
        return _descriptive_exif(image.getexif())
    except Exception as error:
        logger.warning("%s: its EXIF block is malformed and is left out: %s", path, _words(error))
        return b""


def _descriptive_exif(source: Image.Exif) -> bytes:
    exif = Image.Exif()
    for tag in _DESCRIPTIVE_TAGS:
        if tag in source:
            exif[tag] = source[tag]
    for directory in (_EXIF_IFD, _GPS_IFD):
        if values := source.get_ifd(directory):
            exif.get_ifd(directory).update(values)
    return exif.tobytes() if len(exif) or exif.get_ifd(_EXIF_IFD) or exif.get_ifd(_GPS_IFD) else b""


def _encode(image: Image.Image, path: Path, file_format: str, like: Photo | None, quality: int) -> bytes:
    """The whole file in memory: encoders then cannot fail half way through a file."""
    picture = _for_format(image, file_format)
    if path.suffix.lower() == ".pgm" and picture.mode != "L":
        raise ValueError("a .pgm file holds gray pictures only: name it .ppm")
    options = _metadata(picture, path, file_format, like)
    buffer = io.BytesIO()
    if file_format == "HEIF":
        _heif_package(path).from_pillow(picture).save(buffer, quality=quality, **options)
        return buffer.getvalue()
    if file_format in ("JPEG", "AVIF"):
        options.update(quality=quality, subsampling="4:4:4")
    elif file_format == "WEBP":
        options["quality"] = quality
    elif file_format == "TIFF" and "exif" not in options:
        options["compression"] = "tiff_adobe_deflate"  # with EXIF directories Pillow can only write raw pixels
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def _metadata(picture: Image.Image, path: Path, file_format: str, like: Photo | None) -> dict[str, Any]:
    """The EXIF block and the profile to write, as options for the encoder; {} for formats that hold neither."""
    options: dict[str, Any] = {}
    if like is None or file_format in ("BMP", "PPM"):
        return options
    if file_format == "JPEG" and len(like.exif) > _JPEG_EXIF_LIMIT:
        logger.warning("%s: the EXIF block of %s (%d bytes) is too long for JPEG", path, like.path, len(like.exif))
    elif like.exif and file_format == "TIFF":
        parsed = Image.Exif()
        parsed.load(like.exif)
        options["exif"] = _descriptive_exif(parsed)
    elif like.exif:
        options["exif"] = like.exif
    if like.icc_profile and picture.mode in ("RGB", "RGBA"):
        options["icc_profile"] = _srgb_profile()
    return options


def _for_format(image: Image.Image, file_format: str) -> Image.Image:
    """The picture in a mode that the format holds, free of the metadata it was opened with."""
    picture = (
        image.copy()
        if image.mode in MODES.values()
        else image.convert("RGBA" if image.has_transparency_data else "RGB")
    )
    picture.info = {}
    if picture.mode.endswith("A"):
        if file_format in ("JPEG", "BMP", "PPM"):
            colour = picture.convert(picture.mode[:-1])
            return _with_channels(colour, picture.getchannel("A"), len(colour.mode))
        if picture.mode == "LA" and file_format in ("WEBP", "AVIF", "HEIF"):
            return picture.convert("RGBA")
    return picture


def _write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder and rename, so that no one ever sees part of a file."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise PhotoError(path, f"cannot be written: {_words(error)}") from error
        raise
