"""One photograph: a file of any common kind to upright sRGB pixels, and back to a file with its metadata.

What a camera writes is not what a network should see: pixels lie sideways (EXIF orientation), colours are Display P3,
Adobe RGB or CMYK (ICC profile), gray has 16 bits, PNGs have alpha and palettes. ``open_photo`` undoes all of that, to
8 bits; ``open_original`` does so without losing what ``save_photo`` needs to give the file back as it was: 16 bits, the
profile, alpha, gray. A picture is saved so that nothing is left half-written and the camera's metadata stays with it. A
file that cannot be used raises PhotoError and nothing else, so that one bad file among thousands is a line in a list.

Files are told apart by their first bytes, never by their names. The functions hold no state but parsed profiles, and
may run in any number of threads and processes at once.

Limits, known and accepted:
* ``open_photo`` takes of 16-bit colour the high byte of each sample: exact for what was 8 bit once, otherwise at most
  one level of 255 off the rounded value. 16-bit gray is rounded.
* Read with 8 bits are AVIF of more, PPM of 16-bit colour, TIFF with planes apart, and pictures of 16 bits in a profile
  that is not made of a matrix and curves (CMYK, Lab, scanners').
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
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cyclegan_fast.data import colour as colours
from cyclegan_fast.data import deep
from cyclegan_fast.data import metadata as meta
from cyclegan_fast.errors import InputError, shown

__all__ = [
    "CHROMA",
    "DEEP",
    "EXTENSIONS",
    "LOSSLESS",
    "MAX_PIXELS",
    "MODES",
    "PROFILES",
    "Header",
    "Original",
    "Photo",
    "PhotoError",
    "Pixels",
    "format_to_write",
    "open_original",
    "open_photo",
    "read_header",
    "save_photo",
]

logger = logging.getLogger("cyclegan_fast.photo")

Pixels = npt.NDArray[Any]  # uint8 or uint16

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PROFILES = ("srgb", "original")
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
# Formats by what they can hold. Lossy ones name what their encoders take for the resolution of colour.
DEEP = ("PNG", "TIFF")
CHROMA = {"JPEG": ("420", "422", "444"), "AVIF": ("420", "422", "444"), "HEIF": ("420", "422", "444"), "WEBP": ("420",)}
LOSSLESS = ("PNG", "TIFF", "BMP", "PPM", "WEBP", "HEIF")
_WITHOUT_ALPHA = ("JPEG", "BMP", "PPM")
_CMYK = ("JPEG", "TIFF")
# Effort of the encoders: 3 times (PNG), 4 (AVIF) and 8 (HEIC) as fast as by default, for 2, 8 and 6 % larger files.
_PNG_LEVEL, _AVIF_SPEED, _HEIF_ENCODER = 4, 8, {"preset": "ultrafast"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_LIMITS = {"EXIF block": 65_533, "XMP packet": 65_504, "IPTC block": 65_500}  # bytes in one segment


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


@dataclass(frozen=True)
class Original:
    """A decoded photograph with all that its file is to be given back with.

    ``pixels``: upright sRGB, uint8 or uint16 [H, W, C]. ``alpha``: of the same dtype, [H, W], when the file has it and
    the channels do not; ``pixels`` are white then where it is 0. ``gray``: the file holds no colour. ``bits``: 8 or 16,
    what the file stores. ``exif``, ``xmp``, ``iptc``: for the upright picture, in sRGB or the file's own profile as
    ``profile`` says, b"" where there is none. ``icc_profile``: the one the file had. ``times``: of last access and
    change of the file, in nanoseconds.
    """

    pixels: Pixels = field(repr=False)
    alpha: Pixels | None = field(repr=False)
    gray: bool
    bits: int
    profile: str
    exif: bytes = field(repr=False)
    xmp: bytes = field(repr=False)
    iptc: bytes = field(repr=False)
    icc_profile: bytes | None = field(repr=False)
    times: tuple[int, int]
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
            orientation, _ = meta.upright_exif(meta.raw_exif(image))
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
    _check_channels(channels)
    path = Path(path)
    with _opened(path) as image:
        _refuse_many_scans(path, image)
        colour, alpha = _decode(image)
        profile = image.info.get("icc_profile") or None
        colour = colours.to_srgb(colour, profile, path)
        picture = _with_channels(colour, alpha, channels)
        orientation, exif = _orientation_and_exif(image, path, srgb=True)
        if orientation != 1:
            picture = picture.transpose(_UPRIGHT[orientation])
        picture.info = {}
        return Photo(picture, exif, profile, image.format or "", path)


def open_original(path: str | Path, channels: int = 3, *, bits: int | None = None, profile: str = "srgb") -> Original:
    """Decode a photograph completely, with what ``save_photo`` needs to give it back as it was.

    As ``open_photo``, but alpha is kept beside 1 or 3 channels, and the pixels have ``bits`` 8 or 16 a channel, by
    default as many as the file stores (16 for 10 and 12). ``profile`` says what colours the result is to be saved in:
    ``srgb``, or the file's ``original`` profile, for which the pixels have 16 bits unless that is sRGB anyway: going
    there and back in 8 would cost a level or two. Colours outside of sRGB are clipped either way.

    Raises what ``open_photo`` raises, and ValueError for wrong ``bits`` or ``profile``.
    """
    _check_channels(channels)
    if bits not in (None, 8, 16):
        raise ValueError(f"bits = {bits!r} is not allowed: 8, 16 or None")
    if profile not in PROFILES:
        raise ValueError(f"profile = {profile!r} is not allowed: one of {', '.join(PROFILES)}")
    path = Path(path)
    with _opened(path) as image:
        _refuse_many_scans(path, image)
        status, stored = path.stat(), deep.stored_bits(image)
        icc = image.info.get("icc_profile") or None
        colour, alpha, gray, exif = _srgb_pixels(image, path, icc, bits or stored, profile)
        pixels, alpha = _arranged(colour, alpha, channels)
        xmp, iptc = meta.xmp_of(image, path, srgb=profile == "srgb"), meta.iptc_of(image)
        times = status.st_atime_ns, status.st_mtime_ns
        return Original(pixels, alpha, gray, stored, profile, exif, xmp, iptc, icc, times, image.format or "", path)


def save_photo(
    image: Image.Image | Pixels,
    path: str | Path,
    *,
    like: Photo | Original | None = None,
    quality: int = 95,
    chroma: str | None = None,
    lossless: bool = False,
    bits: int | None = None,
    keep_times: bool = False,
) -> None:
    """Write an sRGB picture in the format of the path's suffix, completely or not at all.

    ``image`` is a PIL image or an array, uint8 or uint16, [H, W] or [H, W, C] with the channels of ``MODES``.
    ``like`` gives its EXIF; an ``Original`` also XMP and IPTC where the format holds them, alpha when the picture has
    none, its profile if it was opened so, and with ``keep_times`` the file's times. Otherwise an sRGB profile is
    embedded when ``like`` had any (colour pictures only: gray without a profile is understood as sRGB everywhere).

    ``quality`` from 1 to 100 is that of JPEG, WebP, AVIF and HEIC; ``lossless`` replaces it for WebP and HEIC; the
    other formats are lossless. ``chroma`` 420, 422 or 444 is the resolution of colour: 444 by default for JPEG and
    AVIF, 420 for HEIC (which every phone decodes) and WebP (which has no other). ``bits`` 8 or 16 a channel: by default
    16 for uint16 pixels, unless ``like`` stores 8, where the format holds it (PNG, TIFF). Formats without alpha get the
    picture over white. The file appears under its name only when complete; a file of that name is replaced.

    Raises PhotoError when the suffix names no format, the format cannot hold the picture or what is asked for, or the
    folder cannot be written or is full; ValueError for a wrong ``quality`` or ``chroma``.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality = {quality!r} is not allowed: an integer from 1 to 100")
    if chroma not in (None, "420", "422", "444"):
        raise ValueError(f"chroma = {chroma!r} is not allowed: 420, 422 or 444")
    path = Path(path)
    file_format = format_to_write(path, chroma, lossless, bits)
    pixels = _as_pixels(image)
    height, width = pixels.shape[:2]
    try:
        pixels, icc = _in_profile(pixels, path, file_format, like)
        cmyk = icc is not None and icc[16:20] == b"CMYK"
        pixels = _with_bits(pixels, bits or _bits_for(pixels, file_format, like))
        pixels = _with_alpha_for(pixels, file_format, like) if not cmyk else pixels
        encoded = _encode(
            pixels, path, file_format, _metadata_for(path, file_format, like, icc), quality, chroma, lossless
        )
    except PhotoError:
        raise
    except Exception as error:
        reason = f"cannot write {width}x{height} {_mode_of(image)} as {file_format}: {_words(error)}"
        raise PhotoError(path, reason) from error
    _write_atomically(path, encoded, like.times if keep_times and isinstance(like, Original) else None)


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
    rawmode = deep.rawmode(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        levels, cover = deep.scaled_gray(image, 255)
        return Image.fromarray(levels), None if cover is None else Image.fromarray(cover)
    if rawmode.startswith("LA;16"):  # which Pillow expands to colour
        return image.getchannel("R"), image.getchannel("A")
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


def _key_as_decoded(key: Any, rawmode: str) -> Any:
    """A PNG's transparent colour, given in samples of the file, as the 8-bit value Pillow decodes that colour to."""
    if ";16" in rawmode:
        return tuple(sample >> 8 for sample in key)
    return key * {"L;2": 85, "L;4": 17}.get(rawmode, 1)


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


def _check_channels(channels: int) -> None:
    if channels not in MODES:
        raise ValueError(f"channels = {channels!r} is not allowed: one of {', '.join(map(str, MODES))}")


def _orientation_and_exif(image: ImageFile.ImageFile, path: Path, srgb: bool) -> tuple[int, bytes]:
    """How the decoded pixels must still be turned, and the EXIF block of the upright picture."""
    if isinstance(image, TiffImageFile):  # Pillow has turned it already
        return 1, meta.tiff_exif(image, path, srgb)
    raw = meta.raw_exif(image)
    orientation, exif = meta.upright_exif(raw, srgb)
    if raw and not exif:
        logger.warning("%s: its EXIF block is malformed and is left out", path)
    return orientation, exif


def _srgb_pixels(
    image: ImageFile.ImageFile, path: Path, icc: bytes | None, bits: int, profile: str
) -> tuple[Pixels, Pixels | None, bool, bytes]:
    """(sRGB [H, W] or [H, W, 3], alpha [H, W] or None, whether the file is gray, its EXIF block), upright."""
    stored = deep.stored_bits(image)
    curves = colours.curves_of(icc) if icc else None
    wide = curves is not None and not curves.is_srgb
    if profile == "original" and wide:
        bits = 16
    if bits == 16 and stored == 16 and icc and curves is None:
        logger.warning("%s: its colour profile is no matrix and curves: converted with 8 bits a channel", path)
    if bits == 16 and stored == 16 and (icc is None or curves is not None):
        colour, alpha = deep.decode(image, path)
        gray = colour.ndim == 2
        orientation, exif = _orientation_and_exif(image, path, srgb=profile == "srgb")
        colour, alpha = _turned(colour, orientation), None if alpha is None else _turned(alpha, orientation)
    else:
        picture, cover = _decode(image)
        gray = picture.mode == "L"
        orientation, exif = _orientation_and_exif(image, path, srgb=profile == "srgb")
        if bits == 8 or not wide or picture.mode not in ("L", "RGB"):
            picture, wide = colours.to_srgb(picture, icc, path), False
        colour, alpha = _turned_array(picture, orientation), None
        if cover is not None:
            alpha = _turned_array(cover, orientation)
    colour, alpha = _with_bits(colour, bits), None if alpha is None else _with_bits(alpha, bits)
    if wide and curves is not None:
        colour = _through_curves(colour, curves, path)
    return colour, alpha, gray, exif


def _turned_array(picture: Image.Image, orientation: int) -> Pixels:
    """Upright pixels of a picture as stored; Pillow turns by blocks that stay in the cache."""
    return np.asarray(picture if orientation == 1 else picture.transpose(_UPRIGHT[orientation]))


def _through_curves(colour: Pixels, curves: colours.Curves, path: Path) -> Pixels:
    """uint16 in a profile to sRGB; gray in a colour profile is colour of equal channels."""
    if curves.matrix is not None and colour.ndim == 2:
        return curves.to_srgb(np.stack([colour] * 3, axis=-1))
    if curves.matrix is None and colour.ndim == 3:
        logger.warning("%s: its colour profile is ignored: it describes GRAY but the pixels are RGB", path)
        return colour
    return curves.to_srgb(colour)


def _arranged(colour: Pixels, alpha: Pixels | None, channels: int) -> tuple[Pixels, Pixels | None]:
    """[H, W, channels], and the alpha that these have no room for."""
    top = np.iinfo(colour.dtype).max
    colour = colour if colour.ndim == 3 or channels >= 3 else colour[..., None]
    if channels <= 2 and colour.shape[2] == 3:
        colour = colours.luma(colour)[..., None]
    elif channels >= 3 and colour.ndim == 2:
        colour = np.repeat(colour[..., None], 3, axis=2)
    if channels in (2, 4):
        cover = np.full(colour.shape[:2], top, colour.dtype) if alpha is None else alpha
        colour, alpha = np.concatenate((colour, cover[..., None]), axis=2), None
    elif alpha is not None:
        colour = np.where(alpha[..., None] == 0, colour.dtype.type(top), colour)
    return colour, alpha


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels as stored to upright ones (EXIF 2.32, table 6), contiguous."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def format_to_write(path: Path, chroma: str | None = None, lossless: bool = False, bits: int | None = None) -> str:
    """The format that the suffix names. Raises PhotoError when there is none, or it does not hold what is asked."""
    file_format = _SAVED_AS.get(path.suffix.lower())
    if file_format is None:
        known = ", ".join(sorted(_SAVED_AS))
        raise PhotoError(path, f"the suffix {path.suffix!r} names no format that can be written: use one of {known}")
    if chroma is not None and chroma not in CHROMA.get(file_format, (chroma,)):
        raise PhotoError(path, f"{file_format} has no chroma {chroma}, only {', '.join(CHROMA[file_format])}")
    if lossless and file_format not in LOSSLESS:
        raise PhotoError(path, f"{file_format} cannot be written lossless: use one of {', '.join(LOSSLESS)}")
    if bits == 16 and file_format not in DEEP:
        raise PhotoError(path, f"{file_format} is written with 8 bits a channel: 16 go into {' and '.join(DEEP)}")
    return file_format


def _as_pixels(image: Image.Image | Pixels) -> Pixels:
    """An array as it is; a PIL image as an array of one of ``MODES``."""
    if isinstance(image, Image.Image):
        if image.mode not in MODES.values():
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return np.asarray(image)
    kinds = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in MODES)
    if image.dtype not in (np.uint8, np.uint16) or not kinds or image.size == 0:
        raise ValueError(f"pixels are uint8 or uint16, [H, W] or [H, W, 1 to 4], not {image.dtype} {list(image.shape)}")
    return image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _mode_of(image: Image.Image | Pixels) -> str:
    return image.mode if isinstance(image, Image.Image) else MODES[1 if image.ndim == 2 else image.shape[2]]


def _in_profile(
    pixels: Pixels, path: Path, file_format: str, like: Photo | Original | None
) -> tuple[Pixels, bytes | None]:
    """sRGB pixels in the colours they are to be saved in, and the profile to embed."""
    icc = like.icc_profile if like is not None else None
    gray = pixels.ndim == 2 or pixels.shape[2] == 2
    if icc is None or file_format in ("BMP", "PPM"):
        return pixels, None
    in_srgb = pixels, None if gray else colours.srgb_profile()
    if not isinstance(like, Original) or like.profile == "srgb":
        return in_srgb
    space = icc[16:20]
    if gray != (space == b"GRAY"):  # a profile of colour says nothing of gray pixels, nor the other way
        return in_srgb
    curves = colours.curves_of(icc)
    if curves is not None and curves.is_srgb:
        return pixels, icc
    if space == b"CMYK" and file_format not in _CMYK:
        raise PhotoError(
            path, f"{file_format} holds no CMYK, the original profile of {like.path}: use jpg or tif, or sRGB"
        )
    colour, alpha = _split(pixels)
    if curves is not None:
        colour = curves.from_srgb(_with_bits(colour, 16))
    else:
        try:
            picture = colours.from_srgb(Image.fromarray(_with_bits(colour, 8)), icc)
        except Exception as error:
            logger.warning("%s: saved in sRGB, its profile does not serve for that: %s", like.path, _words(error))
            return in_srgb
        colour = np.asarray(picture)
    return colour if alpha is None else _joined(colour, alpha), icc


def _split(pixels: Pixels) -> tuple[Pixels, Pixels | None]:
    """(colour [H, W] or [H, W, 3], alpha [H, W] or None) of pixels in one of ``MODES``."""
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels, None
    return pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3], pixels[..., -1]


def _joined(colour: Pixels, alpha: Pixels) -> Pixels:
    """Colour and alpha as one array of the colour's dtype."""
    alpha = _with_bits(alpha, 8 * colour.itemsize)[..., None]
    return np.concatenate((colour[..., None] if colour.ndim == 2 else colour, alpha), axis=2)


def _with_bits(pixels: Pixels, bits: int) -> Pixels:
    if pixels.dtype == (np.uint8 if bits == 8 else np.uint16):
        return pixels
    return colours.to_8_bits(pixels) if bits == 8 else colours.to_16_bits(pixels)


def _bits_for(pixels: Pixels, file_format: str, like: Photo | Original | None) -> int:
    """Bits a channel of the file when none are asked for."""
    stored = like.bits if isinstance(like, Original) else 16
    return 16 if pixels.dtype == np.uint16 and file_format in DEEP and stored == 16 else 8


def _with_alpha_for(pixels: Pixels, file_format: str, like: Photo | Original | None) -> Pixels:
    """The picture with its alpha, or else that of the original; over white in a format that has none."""
    colour, alpha = _split(pixels)
    if alpha is None and isinstance(like, Original):
        alpha = like.alpha
    if alpha is None:
        return pixels
    if alpha.shape != colour.shape[:2]:
        raise ValueError(f"the alpha of {shown(like.path if like else '')} is {alpha.shape[1]}x{alpha.shape[0]}")
    if file_format not in _WITHOUT_ALPHA:
        return _joined(colour, alpha)
    picture, cover = Image.fromarray(_with_bits(colour, 8)), Image.fromarray(_with_bits(alpha, 8))
    return np.asarray(_with_channels(picture, cover, 1 if colour.ndim == 2 else 3))


@dataclass(frozen=True)
class _Metadata:
    """Blocks to write with a picture, b"" for none."""

    exif: bytes = b""
    xmp: bytes = b""
    iptc: bytes = b""
    icc: bytes = b""


def _metadata_for(path: Path, file_format: str, like: Photo | Original | None, icc: bytes | None) -> _Metadata:
    """What of the original's metadata the format holds; with a warning where it is only too long."""
    if like is None or file_format in ("BMP", "PPM"):
        return _Metadata()
    exif, xmp, iptc = like.exif, b"", b""
    if isinstance(like, Original):
        xmp, iptc = like.xmp, like.iptc if file_format in ("JPEG", "TIFF") else b""
    blocks = {"EXIF block": exif, "XMP packet": xmp, "IPTC block": iptc}
    if file_format == "JPEG":
        for name, block in blocks.items():
            if len(block) > _JPEG_LIMITS[name]:
                logger.warning("%s: the %s of %s (%d bytes) is too long for JPEG", path, name, like.path, len(block))
                blocks[name] = b""
    return _Metadata(blocks["EXIF block"], blocks["XMP packet"], blocks["IPTC block"], icc or b"")


def _encode(
    pixels: Pixels,
    path: Path,
    file_format: str,
    metadata: _Metadata,
    quality: int,
    chroma: str | None,
    lossless: bool,
) -> bytes:
    """The whole file in memory: encoders then cannot fail half way through a file."""
    if path.suffix.lower() == ".pgm" and pixels.ndim != 2:
        raise ValueError("a .pgm file holds gray pictures only: name it .ppm")
    icc, cmyk = metadata.icc, metadata.icc[16:20] == b"CMYK"
    if file_format == "TIFF":
        tags = _exif_tags(metadata.exif, path)
        if pixels.dtype == np.uint16 and pixels.shape[2:] == (2,):  # which Pillow, and so we, cannot read again
            pixels = pixels[..., [0, 0, 0, 1]]
        return deep.tiff(pixels, tags=tags, xmp=metadata.xmp, iptc=metadata.iptc, icc=icc, cmyk=cmyk)
    if pixels.dtype == np.uint16:
        return deep.png(pixels, exif=metadata.exif.removeprefix(meta.EXIF_HEADER), xmp=metadata.xmp, icc=icc)
    height, width = pixels.shape[:2]
    picture = Image.frombytes("CMYK", (width, height), pixels.tobytes()) if cmyk else Image.fromarray(pixels)
    if picture.mode == "LA" and file_format in ("WEBP", "AVIF", "HEIF"):
        picture = picture.convert("RGBA")
    blocks = {"exif": metadata.exif, "xmp": metadata.xmp, "icc_profile": icc}
    options: dict[str, Any] = {name: block for name, block in blocks.items() if block}
    options |= _encoder_options(file_format, quality, chroma, lossless)
    buffer = io.BytesIO()
    if file_format == "HEIF":
        _heif_package(path).from_pillow(picture).save(buffer, **options)
    else:
        if file_format == "PNG" and "xmp" in options:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode("utf-8", "replace"))
        picture.save(buffer, format=file_format, **options)
    content = buffer.getvalue()
    return _with_segment(content, meta.iptc_segment(metadata.iptc)) if metadata.iptc else content


def _encoder_options(file_format: str, quality: int, chroma: str | None, lossless: bool) -> dict[str, Any]:
    """Quality and resolution of colour in the words of each encoder."""
    if file_format in ("JPEG", "AVIF"):
        speed = {"speed": _AVIF_SPEED} if file_format == "AVIF" else {}
        return {"quality": quality, "subsampling": ":".join(chroma or "444"), **speed}
    if file_format == "WEBP":
        return {"lossless": True, "exact": True} if lossless else {"quality": quality}
    if file_format == "HEIF":
        if lossless:  # RGB as it is: going through YCbCr rounds
            return {"quality": -1, "chroma": 444, "matrix_coefficients": 0, "enc_params": _HEIF_ENCODER}
        return {"quality": quality, "chroma": int(chroma or 420), "enc_params": _HEIF_ENCODER}
    return {"compress_level": _PNG_LEVEL} if file_format == "PNG" else {}


def _exif_tags(exif: bytes, path: Path) -> dict[int, Any]:
    """An EXIF block as tags for a TIFF's directory; {} when it is malformed."""
    if not exif:
        return {}
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        return meta.descriptive_tags(parsed)
    except Exception as error:
        logger.warning("%s: the EXIF block is malformed and is left out: %s", path, _words(error))
        return {}


def _with_segment(jpeg: bytes, segment: bytes) -> bytes:
    """A JPEG file with one more application segment, behind those it has."""
    position = 2
    while jpeg[position] == 0xFF and 0xE0 <= jpeg[position + 1] <= 0xEF:
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    return jpeg[:position] + segment + jpeg[position:]


def _write_atomically(path: Path, content: bytes, times: tuple[int, int] | None) -> None:
    """Write to a temporary name in the same folder and rename, so that no one ever sees part of a file."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        if times is not None:
            os.utime(temporary, ns=times)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise PhotoError(path, f"cannot be written: {_words(error)}") from error
        raise
