"""Picture files put together from the definitions (ICC, PNG, TIFF, EXIF), and read by them, for tests."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

D65 = (0.3127, 0.3290)
D50_XYZ = np.array([0.9642, 1.0, 0.8249])
PRIMARIES = {
    "srgb": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "adobe": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
ADOBE_GAMMA = 563 / 256


def xyz_of(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def rgb_to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """3x3 from linear RGB with a D65 white to XYZ, from the chromaticities (SMPTE RP 177)."""
    columns = np.stack([xyz_of(*xy) for xy in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz_of(*D65))


def adapted_to_d50(matrix: np.ndarray) -> np.ndarray:
    """Bradford adaptation, which ICC profiles store their colorants in."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = (bradford @ D50_XYZ) / (bradford @ xyz_of(*D65))
    return np.linalg.inv(bradford) @ np.diag(scale) @ bradford @ matrix


def srgb_decode(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_encode(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def icc(space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 4.2, put together from its tags (ICC.1:2010)."""
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04200000, kind, space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(v * 65536) for v in D50_XYZ)) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def xyz_tag(value: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in value))


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def srgb_curve_tag() -> bytes:
    parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH5i", 3, 0, *(round(p * 65536) for p in parameters))


def text_tag(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def rgb_profile(name: str) -> bytes:
    curve = gamma_tag(ADOBE_GAMMA) if name == "adobe" else srgb_curve_tag()
    red, green, blue = adapted_to_d50(rgb_to_xyz(PRIMARIES[name])).T
    tags = {b"desc": text_tag(name), b"cprt": text_tag("none"), b"wtpt": xyz_tag(D50_XYZ)}
    tags |= {b"rXYZ": xyz_tag(red), b"gXYZ": xyz_tag(green), b"bXYZ": xyz_tag(blue)}
    return icc(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gray_profile(gamma: float) -> bytes:
    tags = {b"desc": text_tag("gray"), b"cprt": text_tag("none"), b"wtpt": xyz_tag(D50_XYZ), b"kTRC": gamma_tag(gamma)}
    return icc(b"GRAY", tags)


def png(
    samples: np.ndarray, colour_type: int, *, depth: int = 16, chunks: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A PNG file of unfiltered rows; ``samples`` is [H, W] or [H, W, C] with 8 or 16 bits, or packed bytes a row."""
    height = samples.shape[0]
    width = samples.shape[1] * (8 // depth if depth < 8 else 1)
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_gray(
    values: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1, data: bytes | None = None
) -> bytes:
    """An uncompressed little-endian TIFF of one sample a pixel."""
    data = values.tobytes() if data is None else data
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    offset = 8 + 2 + 12 * len(tags) + 4
    tags = [(tag, kind, offset if tag == 273 else value) for tag, kind, value in tags]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def camera_exif(orientation: int, *, order: str = ">", thumbnail: bytes = b"") -> bytes:
    """An EXIF block: make, orientation, an EXIF directory with colour space 65535, and a thumbnail behind all that."""
    mark = {">": b"MM", "<": b"II"}[order]
    make = b"Optics\0"

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        return struct.pack(order + "HHI", tag, kind, count) + packed

    first, exif_at, second_at = 8, 8 + 2 + 36 + 4, 8 + 2 + 36 + 4 + 2 + 12 + 4
    make_at = second_at + 2 + 24 + 4
    thumbnail_at = make_at + 8
    block = mark + struct.pack(order + "HI", 42, first)
    block += struct.pack(order + "H", 3) + entry(0x010F, 2, 7, make_at) + entry(0x0112, 3, 1, orientation)
    block += entry(0x8769, 4, 1, exif_at) + struct.pack(order + "I", second_at if thumbnail else 0)
    block += struct.pack(order + "H", 1) + entry(0xA001, 3, 1, 65535) + bytes(4)
    block += (
        struct.pack(order + "H", 2) + entry(0x0201, 4, 1, thumbnail_at) + entry(0x0202, 4, 1, len(thumbnail)) + bytes(4)
    )
    return b"Exif\0\0" + block + make + b"\0" + thumbnail


def tiff_colour(samples: np.ndarray) -> bytes:
    """An uncompressed little-endian TIFF of uint16 [H, W, 3]."""
    content = tiff_gray(samples[..., 0], bits=16, photometric=2, data=samples.astype("<u2").tobytes())
    content = content.replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 3))
    end = len(content)
    for tag, value, at in ((258, 16, end), (339, 1, end + 6)):
        content = content.replace(struct.pack("<HHII", tag, 3, 1, value), struct.pack("<HHII", tag, 3, 3, at))
    return content + struct.pack("<6H", 16, 16, 16, 1, 1, 1)


def png_samples(content: bytes) -> np.ndarray:
    """The samples of a PNG file of 8 or 16 bits that is not interlaced, [H, W, C], unfiltered row by row."""
    width, height, depth, kind = struct.unpack_from(">IIBB", content, 16)
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    data, position = b"", 8
    while position < len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", content, position + 8 + length)[0] == zlib.crc32(name + body)
        data += body if name == b"IDAT" else b""
        position += 12 + length
    step = channels * depth // 8
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * step).astype(int)
    above = np.zeros(width * step + step, int)
    for row in rows:
        line = np.concatenate((np.zeros(step, int), row[1:]))
        for i in range(step, len(line)):
            left, up, corner = line[i - step], above[i], above[i - step]
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(guess - value))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[row[0]]) % 256
        row[1:] = above[step:] = line[step:]
        above[:step] = 0
    return rows[:, 1:].astype(np.uint8).copy().view(">u2" if depth == 16 else "u1").reshape(height, width, channels)


def tiff_samples(content: bytes) -> np.ndarray:
    """The samples of a TIFF file as the package writes it (deflate, predictor 2, strips), [H, W, C]."""
    with Image.open(io.BytesIO(content)) as image:
        tags: Any = dict(image.tag_v2)  # type: ignore[attr-defined]
    assert (tags[259], tags[317], tags[284]) == (8, 2, 1)
    data = b"".join(
        zlib.decompress(content[offset : offset + count]) for offset, count in zip(tags[273], tags[279], strict=True)
    )
    dtype = {8: "u1", 16: "<u2"}[tags[258][0]]
    differences = np.frombuffer(data, dtype).reshape(tags[257], tags[256], tags[277])
    return np.cumsum(differences, axis=1, dtype=differences.dtype)


def in_profile(name: str, srgb: np.ndarray) -> np.ndarray:
    """Colours in sRGB, 0 to 1, as values of the profile ``p3`` or ``adobe``, by the formulas."""
    linear = srgb_decode(srgb) @ (np.linalg.inv(rgb_to_xyz(PRIMARIES[name])) @ rgb_to_xyz(PRIMARIES["srgb"])).T
    return np.clip(linear, 0, 1) ** (1 / ADOBE_GAMMA) if name == "adobe" else srgb_encode(linear)


def in_srgb(name: str, values: np.ndarray) -> np.ndarray:
    """Values of the profile ``p3`` or ``adobe``, 0 to 1, in sRGB, clipped."""
    linear = values**ADOBE_GAMMA if name == "adobe" else srgb_decode(values)
    return srgb_encode(linear @ (np.linalg.inv(rgb_to_xyz(PRIMARIES["srgb"])) @ rgb_to_xyz(PRIMARIES[name])).T)
