"""What a photograph's file says beside its pixels: EXIF, XMP and IPTC blocks, made true for the picture to be saved.

Blocks are changed in place and otherwise kept to the byte. They come from outside: nothing in them is trusted.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

__all__ = [
    "EXIF_HEADER",
    "EXIF_IFD",
    "GPS_IFD",
    "descriptive_tags",
    "iptc_of",
    "iptc_segment",
    "raw_exif",
    "tiff_exif",
    "upright_exif",
    "xmp_of",
]

logger = logging.getLogger("cyclegan_fast.photo")

EXIF_HEADER = b"Exif\x00\x00"
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
_ORIENTATION, _COLOR_SPACE, _INTEROP_IFD, _THUMBNAIL, _THUMBNAIL_BYTES = 0x0112, 0xA001, 0xA005, 0x0201, 0x0202
_SIDES = (0xA002, 0xA003)  # PixelXDimension, PixelYDimension
# What IFD0 of a TIFF says about the photograph; its other tags say how that one file stores the pixels.
_DESCRIPTIVE_TAGS = (
    *(0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x013C, 0x4746, 0x4749, 0x8298),
    *(0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F),
)
_MAX_EXIF = 16_000_000
_MAX_XMP = 1_000_000
_XMP_TAG, _IPTC_TAG, _IPTC_RESOURCE = 700, 33723, 0x0404


def raw_exif(image: ImageFile.ImageFile) -> bytes:
    """The EXIF block as it lies in the file, from its byte order on, b"" when there is none."""
    exif = image.info.get("exif")
    if exif is None and image.format == "PNG":
        if "Raw profile type exif" in image.info:  # ImageMagick, before PNG had a chunk for it
            return _exif_from_text(str(image.info["Raw profile type exif"]))
        return _late_png_exif(image)
    return exif.removeprefix(EXIF_HEADER) if isinstance(exif, bytes) else b""


def _exif_from_text(text: str) -> bytes:
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])).removeprefix(EXIF_HEADER)
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


def upright_exif(raw: bytes, srgb: bool = True) -> tuple[int, bytes]:
    """(orientation 1 to 8, the block for the upright picture, b"" when it is malformed).

    ``srgb``: the picture is in sRGB now, and not in the profile that the file had. The block is changed in place, never
    written anew: maker notes hold offsets that moving would break.
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
        _amend_exif_directory(block, tags, order, srgb, 5 <= orientation <= 8)
        _drop_thumbnail(block, first, order)
    except (KeyError, struct.error):
        block.clear()
    return (orientation if 1 <= orientation <= 8 else 1), (EXIF_HEADER + bytes(block) if block else b"")


def _entries(block: bytearray, offset: int, order: str) -> Iterator[tuple[int, str, int]]:
    """(tag, struct layout of one value, its position) for every entry of the directory at ``offset``.

    Only integer values that lie within their entry are wanted here; of all others the layout is that of an offset.
    """
    (count,) = struct.unpack_from(order + "H", block, offset)
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, _, _ = struct.unpack_from(order + "HHII", block, position)
        yield tag, order + {1: "B", 3: "H"}.get(kind, "I"), position + 8


def _amend_exif_directory(
    block: bytearray, tags: dict[int, tuple[str, int]], order: str, srgb: bool, turned: bool
) -> None:
    """In the EXIF directory, if there is one: the colour space becomes sRGB, the sides change places."""
    if EXIF_IFD not in tags:
        return
    (offset,) = struct.unpack_from(order + "I", block, tags[EXIF_IFD][1])
    entries = {tag: (layout, position) for tag, layout, position in _entries(block, offset, order)}
    if srgb and _COLOR_SPACE in entries:
        layout, position = entries[_COLOR_SPACE]
        struct.pack_into(layout, block, position, 1)
    if srgb and _INTEROP_IFD in entries:  # DCF's mark of Adobe RGB
        (offset,) = struct.unpack_from(order + "I", block, entries[_INTEROP_IFD][1])
        for tag, _, position in _entries(block, offset, order):
            if tag == 1 and block[position : position + 4] == b"R03\0":
                block[position : position + 4] = b"R98\0"
    if turned and all(tag in entries for tag in _SIDES):
        (width_layout, width_at), (height_layout, height_at) = (entries[tag] for tag in _SIDES)
        (width,) = struct.unpack_from(width_layout, block, width_at)
        (height,) = struct.unpack_from(height_layout, block, height_at)
        struct.pack_into(width_layout, block, width_at, height)
        struct.pack_into(height_layout, block, height_at, width)


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


def tiff_exif(image: TiffImageFile, path: Path, srgb: bool = True) -> bytes:
    """EXIF of a TIFF, whose directories are those of the file: only what describes the photograph is taken."""
    try:
        exif = Image.Exif()
        for tag, value in descriptive_tags(image.getexif()).items():
            if isinstance(value, dict):
                exif.get_ifd(tag).update(value)
                if srgb and _COLOR_SPACE in value:
                    exif.get_ifd(tag)[_COLOR_SPACE] = 1
            else:
                exif[tag] = value
        return exif.tobytes() if len(exif) or exif.get_ifd(EXIF_IFD) or exif.get_ifd(GPS_IFD) else b""
    except Exception as error:
        logger.warning("%s: its EXIF block is malformed and is left out: %s", path, str(error) or type(error).__name__)
        return b""


def descriptive_tags(source: Image.Exif) -> dict[int, Any]:
    """What describes the photograph, by tag; the EXIF and GPS directories are dictionaries themselves."""
    tags: dict[int, Any] = {tag: source[tag] for tag in _DESCRIPTIVE_TAGS if tag in source}
    for directory in (EXIF_IFD, GPS_IFD):
        # An interoperability directory that Pillow did not read is an offset into the file it came from.
        values = {
            tag: value
            for tag, value in source.get_ifd(directory).items()
            if tag != _INTEROP_IFD or isinstance(value, dict)
        }
        if values:
            tags[directory] = values
    return tags


def xmp_of(image: ImageFile.ImageFile, path: Path, srgb: bool = True) -> bytes:
    """The XMP packet for the upright picture, b"" when there is none."""
    xmp = image.info.get("xmp")
    if xmp is None and isinstance(image, TiffImageFile):
        xmp = image.tag_v2.get(_XMP_TAG)
    if isinstance(xmp, str):
        xmp = xmp.encode("utf-8", "surrogateescape")
    if not isinstance(xmp, bytes) or not xmp:
        return b""
    if len(xmp) > _MAX_XMP:
        logger.warning("%s: its XMP packet of %d bytes is left out: above %d", path, len(xmp), _MAX_XMP)
        return b""
    return _amended_xmp(xmp.rstrip(b"\0"), srgb)


def _amended_xmp(xmp: bytes, srgb: bool) -> bytes:
    """Orientation 1, colour space sRGB, no thumbnail; no word of what is not saved: gain maps, videos behind a JPEG."""
    for begin, end in ((b"<xmp:Thumbnails>", b"</xmp:Thumbnails>"), (b"<xap:Thumbnails>", b"</xap:Thumbnails>")):
        start = xmp.find(begin)
        stop = xmp.rfind(end)
        if 0 <= start < stop:
            xmp = xmp[:start] + xmp[stop + len(end) :]
    fixes = [
        (rb"(tiff:Orientation\s*=\s*[\"'])\d+", rb"\g<1>1"),
        (rb"(<tiff:Orientation>\s*)\d+", rb"\g<1>1"),
        (rb"((?:GCamera|Camera):(?:MotionPhoto|MicroVideo)\s*=\s*[\"'])1", rb"\g<1>0"),
        (rb"\shdrgm:Version\s*=\s*(?:\"[^\"]*\"|'[^']*')", rb""),
    ]
    if srgb:
        fixes += [(rb"(exif:ColorSpace\s*=\s*[\"'])\d+", rb"\g<1>1"), (rb"(<exif:ColorSpace>\s*)\d+", rb"\g<1>1")]
    for pattern, replacement in fixes:
        xmp = re.sub(pattern, replacement, xmp)
    return xmp


def iptc_of(image: ImageFile.ImageFile) -> bytes:
    """The IPTC records (captions, keywords, by-lines) as they lie in the file, b"" when there are none."""
    resources = image.info.get("photoshop")
    found = resources.get(_IPTC_RESOURCE) if isinstance(resources, dict) else None
    if found is None and isinstance(image, TiffImageFile):
        found = image.tag_v2.get(_IPTC_TAG)
    return found if isinstance(found, bytes) else b""


def iptc_segment(iptc: bytes) -> bytes:
    """IPTC records, up to 65,500 bytes, as a JPEG's APP13 segment: a Photoshop resource 0x0404."""
    resource = b"8BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
    content = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
