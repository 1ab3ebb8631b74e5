"""Pictures of more than 8 bits a channel: their samples out of PNG, TIFF, HEIF and PGM, and PNG and TIFF of them.

Pillow decodes 16-bit colour to the high byte of each sample. Told that the samples lie in the other byte order, it
gives the low byte: two passes are the whole sample, for every filter, interlace and compression that Pillow knows, and
without another decoder for hostile files to reach. It cannot write 16-bit colour, so that is done here.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

__all__ = ["decode", "png", "rawmode", "scaled_gray", "stored_bits", "tiff"]

Deep = npt.NDArray[np.uint16]

_BAND_PIXELS = 4_000_000  # pixels whose gray values are scaled at a time
_STRIP_BYTES = 1 << 20
_MAX_TIFF = 4_000_000_000
_LEVEL = 4  # of zlib


def rawmode(image: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, in Pillow's words (`RGB;16B`, `L;2`), "" where the reader does not say."""
    args = image.tile[0][3] if image.tile else ""
    if isinstance(args, tuple):
        args = args[0] if args else ""
    return args if isinstance(args, str) else ""


def stored_bits(image: ImageFile.ImageFile) -> int:
    """16 when the file holds more than 8 bits a channel that can be had, else 8. To be asked before pixels are read."""
    if image.mode.startswith("I") or image.mode == "F":
        return 16
    if image.format == "HEIF":
        return 16 if image.info.get("bit_depth", 8) > 8 else 8
    return 16 if _colour_layout(image) else 8


def _colour_layout(image: ImageFile.ImageFile) -> str:
    """`RGB`, `RGBA` (or `RGBa`, premultiplied) or `LA` when the file holds 16 bits of it, else ""."""
    layout, _, depth = rawmode(image).partition(";")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(284) == 2:  # planes apart
        return ""
    known = {"RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBa", "LA": "LA"}
    return known.get(layout, "") if depth in ("16B", "16L", "16N") else ""


def decode(image: ImageFile.ImageFile, path: Path) -> tuple[Deep, Deep | None]:
    """(colour [H, W] or [H, W, 3], alpha [H, W] or None), white at 65535, of a file with ``stored_bits`` 16.

    A TIFF is turned upright, as Pillow does; the others lie as they are stored.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image.load()
        return scaled_gray(image, 65535)
    if image.format == "HEIF":
        return _heif(path)
    layout = _colour_layout(image)
    key = image.info.get("transparency")
    if layout == "LA":  # four bytes a pixel: as RGBA they are the two bytes of gray and those of alpha
        pixels: Any = _pass(image, path, "RGBA").view(">u2").astype(np.uint16)
        return pixels[..., 0], pixels[..., 1]
    name, order = rawmode(image).replace("RGBa", "RGBA").split(";16")
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    pixels = _pass(image, path, f"{name};16{order}").astype(np.uint16) << 8
    pixels |= _pass(image, path, f"{name};16{'B' if order == 'L' else 'L'}")
    if layout == "RGB":
        alpha = np.where((pixels == key).all(axis=-1), np.uint16(0), np.uint16(65535)) if key else None
        return pixels[..., :3], alpha
    colour, alpha = pixels[..., :3], pixels[..., 3]
    return (_unpremultiplied(colour, alpha) if layout == "RGBa" else colour), alpha


def _pass(image: ImageFile.ImageFile, path: Path, mode: str) -> npt.NDArray[np.uint8]:
    """The file decoded once more, its samples said to lie as ``mode`` has it: uint8 [H, W, C]."""
    with path.open("rb") as file:
        twin = type(image)(file, "")
        if twin.size != image.size or twin.mode != image.mode or len(twin.tile) != len(image.tile):
            raise ValueError("the file changed while it was read")
        tiles = []
        for tile in twin.tile:
            rest = tile.args[1:] if isinstance(tile.args, tuple) else None
            tiles.append(tile._replace(args=mode if rest is None else (mode, *rest)))
        twin.tile = tiles
        twin.load()
        return np.asarray(twin)


def _unpremultiplied(colour: Deep, alpha: Deep) -> Deep:
    result = np.zeros_like(colour)
    for row, (samples, cover) in enumerate(zip(colour, alpha, strict=True)):
        part = np.maximum(cover, 1)[:, None].astype(np.float32)
        result[row] = np.minimum(np.rint(samples * (65535 / part)), 65535)
    return result


def _heif(path: Path) -> tuple[Deep, Deep | None]:
    """The primary picture of a HEIF file; its 10 or 12 bits come in the high bits of 16."""
    import pillow_heif

    with path.open("rb") as file:
        image = pillow_heif.open_heif(file, convert_hdr_to_8bit=False)
        primary = image[image.primary_index]
        pixels: Any = np.asarray(primary)
        bits: Any = primary.info["bit_depth"]
    if pixels.dtype != np.uint16 or pixels.ndim not in (2, 3) or not 8 < bits <= 16:
        raise ValueError(f"{bits} bits a channel came as {pixels.dtype} of shape {list(pixels.shape)}")
    pixels = _filled(pixels, bits)
    if pixels.ndim == 2:
        return pixels, None
    return pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None


def _filled(pixels: Deep, bits: int) -> Deep:
    """Samples of ``bits`` high bits, scaled so that all ones are 65535 (to the nearest: the bits are repeated)."""
    low: Deep = pixels >> np.uint16(bits)
    return pixels | low


def scaled_gray(image: ImageFile.ImageFile, top: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """16-bit, 32-bit and float gray, scaled so that white is ``top`` (255 or 65535) and rounded, with its alpha.

    uint8 or uint16 [H, W]. Integers of more than 16 bits and floats take as white the smallest usual one that no value
    exceeds.
    """
    stored: npt.NDArray[Any] = np.asarray(image)
    dtype: Any = np.uint8 if top == 255 else np.uint16
    key = image.info.get("transparency")
    alpha = None if key is None else np.where(stored == key, dtype(0), dtype(top))
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, sample_format = (int(tags[tag][0]) if tag in tags else default for tag, default in ((258, 16), (339, 1)))
    rows = max(1, _BAND_PIXELS // max(1, image.width))  # the numbers take four to eight times the room of the pixels
    bands = [stored[first : first + rows] for first in range(0, image.height, rows)]

    def numbers(band: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if image.mode == "F":
            finite: npt.NDArray[Any] = np.nan_to_num(band.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
            return finite
        if bits > 16:
            return band.astype(np.int64) if sample_format == 2 else band.astype(np.int64) & 0xFFFFFFFF
        return band

    if image.mode == "F" or bits > 16:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, 2.0**32 - 1)
        white = _white_of(max(float(numbers(band).max()) for band in bands), scales)
    else:
        white = 2.0 ** (bits - (sample_format == 2)) - 1
    levels = np.empty(stored.shape, dtype)
    for index, band in enumerate(bands):
        scaled = np.clip(numbers(band) * (top / white), 0.0, top)
        if tags.get(262) == 0:  # photometric interpretation WhiteIsZero
            scaled = top - scaled
        levels[index * rows : index * rows + len(band)] = np.rint(scaled)
    return levels, alpha


def _white_of(largest: float, scales: tuple[float, ...]) -> float:
    for white in scales:
        if largest <= white:
            return white
    raise ValueError(f"float samples up to {largest:g}, for which no white level is known: scale them to 0 ... 1")


def png(pixels: Deep, *, exif: bytes = b"", xmp: bytes = b"", icc: bytes = b"") -> bytes:
    """A PNG file of 16 bits a channel: gray [H, W], or [H, W, 2], [H, W, 3], [H, W, 4] (PNG, third edition)."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if exif:
        chunks.append((b"eXIf", exif))
    if xmp:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    compressor = zlib.compressobj(_LEVEL)
    data = b"".join([*(compressor.compress(band) for band in _filtered(pixels)), compressor.flush()])
    chunks += [(b"IDAT", data[at : at + (1 << 30)]) for at in range(0, len(data), 1 << 30)]
    chunks.append((b"IEND", b""))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts += struct.pack(">I4s", len(body), kind), body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
    return b"".join(parts)


def _filtered(pixels: Deep) -> Iterator[bytes]:
    """Rows in the file's byte order, filtered by Sub or Up, whichever leaves smaller numbers; bands of them."""
    height, width, channels = pixels.shape
    step, rows = 2 * channels, max(1, _STRIP_BYTES // (2 * channels * width))
    before = np.zeros((1, width * step), np.uint8)
    for top in range(0, height, rows):
        band = pixels[top : top + rows].astype(">u2").reshape(-1, width * channels).view(np.uint8)
        sub, up = band.copy(), band - np.concatenate((before, band[:-1]))
        sub[:, step:] -= band[:, :-step]
        # Bytes are differences modulo 256: their size is that of the signed number.
        cost_sub, cost_up = (np.abs(x.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64) for x in (sub, up))
        choose_up = (cost_up < cost_sub)[:, None]
        kinds = np.where(choose_up, np.uint8(2), np.uint8(1))
        yield np.concatenate((kinds, np.where(choose_up, up, sub)), axis=1).tobytes()
        before = band[-1:]


def tiff(
    pixels: npt.NDArray[Any],
    *,
    tags: Mapping[int, Any],
    xmp: bytes = b"",
    iptc: bytes = b"",
    icc: bytes = b"",
    cmyk: bool = False,
) -> bytes:
    """A TIFF file (6.0) of uint8 or uint16 [H, W], or [H, W, C] for C of 2 to 4: deflate with predictor 2.

    ``tags`` describe the photograph; EXIF and GPS directories are dictionaries among them. ValueError above 4 GB.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape
    rows = max(1, _STRIP_BYTES // (width * channels * pixels.itemsize))
    strips = [zlib.compress(_differences(pixels[top : top + rows]), _LEVEL) for top in range(0, height, rows)]
    offsets = np.concatenate(([0], np.cumsum([len(strip) for strip in strips])))
    if offsets[-1] > _MAX_TIFF:
        raise ValueError(f"{offsets[-1] / 1e9:.1f} GB do not fit into a TIFF file")
    ifd = ImageFileDirectory_v2(prefix=b"II")
    for tag, value in tags.items():
        ifd[tag] = value
    for tag, value in ((700, xmp), (33723, iptc), (34675, icc)):
        if value:
            ifd.tagtype[tag] = 7 if tag != 700 else 1
            ifd[tag] = value
    storage = {
        256: width,
        257: height,
        258: (8 * pixels.itemsize,) * channels,
        259: 8,  # deflate
        262: 5 if cmyk else 2 if channels >= 3 else 1,
        273: tuple(int(offset) for offset in offsets[:-1]),
        277: channels,
        278: rows,
        279: tuple(len(strip) for strip in strips),
        284: 1,
        317: 2,
    }
    if channels in (2, 4) and not cmyk:
        storage[338] = (2,)  # alpha that is not multiplied in
    for tag, value in storage.items():
        ifd.tagtype[tag] = 4 if tag in (256, 257, 273, 278, 279) else 3
        ifd[tag] = value
    # Pillow adds where the directory ends to the offsets of strips.
    return b"".join([b"II*\0" + struct.pack("<I", 8), ifd.tobytes(8), *strips])


def _differences(band: npt.NDArray[Any]) -> bytes:
    """Each sample as the difference from the one on its left, little-endian (TIFF 6.0, section 14)."""
    result = band.astype(band.dtype.newbyteorder("<"))
    result[:, 1:] -= band[:, :-1]
    return result.tobytes()
