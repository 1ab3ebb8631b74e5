"""photo.py against values computed here from the definitions (ICC, PNG, TIFF, EXIF), and against real files."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from photo_files import (
    ADOBE_GAMMA,
    D50_XYZ,
    PRIMARIES,
    adapted_to_d50,
    camera_exif,
    gray_profile,
    icc,
    png,
    rgb_profile,
    rgb_to_xyz,
    srgb_decode,
    srgb_encode,
    text_tag,
    tiff_gray,
    xyz_tag,
)
from PIL import Image, ImageCms

from cyclegan_fast.data.photo import EXTENSIONS, MAX_PIXELS, Photo, PhotoError, open_photo, read_header, save_photo


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def saved(tmp_path: Path, name: str, image: Image.Image, **options: Any) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def opened(path: Path, channels: int = 3) -> np.ndarray:
    """The pixels of ``open_photo``, after a look that header, size and mode agree."""
    header, result = read_header(path), open_photo(path, channels)
    assert result.image.size == (header.width, header.height)
    assert result.image.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    assert result.image.info == {}
    assert result.format == header.format
    return np.asarray(result.image)


COLOURS = np.array(
    [[[0, 0, 0], [255, 255, 255], [128, 128, 128], [200, 100, 50], [30, 60, 90]],
     [[180, 160, 140], [90, 120, 60], [60, 60, 120], [17, 17, 17], [220, 180, 200]]],
    dtype=np.uint8,
)  # fmt: skip


@pytest.fixture
def gradient() -> Image.Image:
    """A smooth colour picture, 48x32, that lossy formats keep within a few levels."""
    y, x = np.mgrid[0:32, 0:48]
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 2 - y * 3], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", ["p3", "adobe"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_wide_gamut_profiles_become_srgb(tmp_path: Path, name: str, suffix: str) -> None:
    lossless = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path, "a" + suffix, Image.fromarray(COLOURS), icc_profile=rgb_profile(name), **lossless)
    value = COLOURS / 255.0
    linear = value**ADOBE_GAMMA if name == "adobe" else srgb_decode(value)
    to_srgb = np.linalg.inv(rgb_to_xyz(PRIMARIES["srgb"])) @ rgb_to_xyz(PRIMARIES[name])
    expected = srgb_encode(linear @ to_srgb.T) * 255
    assert np.abs(expected - COLOURS).max() > 10  # else the comparison below would show nothing
    # One level for the rounding; lcms evaluates matrix profiles of 8 bits in 14-bit fixed point, dark ones worse.
    assert np.abs(opened(path) - expected).max() <= 1.6
    assert open_photo(path).icc_profile == rgb_profile(name)


def test_srgb_profile_leaves_every_bit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    own = rgb_profile("srgb")
    lcms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, lcms):
        path = saved(tmp_path, "a.png", Image.fromarray(noise), icc_profile=profile)
        assert np.array_equal(opened(path), noise)


def test_gray_profile(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8)[None]
    path = saved(tmp_path, "a.png", Image.fromarray(ramp), icc_profile=gray_profile(1.0))
    expected = srgb_encode(ramp / 255.0) * 255
    assert np.abs(opened(path, 1) - expected).max() <= 1.0
    rgb = opened(path, 3)
    assert np.array_equal(rgb[..., 0], rgb[..., 2])
    assert np.array_equal(rgb[..., 0], opened(path, 1))


def test_gray_profile_on_16_bit_gray_with_alpha(tmp_path: Path) -> None:
    """Pillow expands 16-bit LA to RGBA, to which a gray profile does not apply as it stands."""
    values = np.array([[[0x4000, 0xFFFF], [0x8000, 0xFFFF], [0xC000, 0x8000]]], dtype=np.uint16)
    chunks = ((b"iCCP", b"gray\0\0" + zlib.compress(gray_profile(1.0))),)
    result = opened(written(tmp_path, "a.png", png(values, 4, chunks=chunks)), 2)
    expected = srgb_encode(np.array([0x40, 0x80, 0xC0]) / 255.0) * 255
    assert np.abs(result[0, :, 0] - expected).max() <= 1.0
    assert result[0, :, 1].tolist() == [255, 255, 128]


def test_rgb_profile_on_a_gray_picture(tmp_path: Path) -> None:
    """Gray pixels with a colour profile are colours with equal channels: Adobe RGB's curve applies."""
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    path = saved(tmp_path, "a.png", Image.fromarray(ramp), icc_profile=rgb_profile("adobe"))
    assert np.abs(opened(path, 1) - srgb_encode((ramp / 255.0) ** ADOBE_GAMMA) * 255).max() <= 1.6


def cmyk_profile(lab: np.ndarray) -> bytes:
    """An output profile whose table (lut8) has the 16 corners of CMYK only; ``lab`` [16, 3] holds L*, a*, b*."""
    identity = bytes(range(256))
    coded = np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], axis=-1).round().astype(np.uint8)
    matrix = struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + coded.tobytes() + identity * 3
    tags = {b"desc": text_tag("press"), b"cprt": text_tag("none"), b"wtpt": xyz_tag(D50_XYZ)}
    return icc(b"CMYK", tags | dict.fromkeys((b"A2B0", b"A2B1"), lut), kind=b"prtr", pcs=b"Lab ")


def lab_to_srgb(lab: np.ndarray, black: float = 0.0) -> np.ndarray:
    """CIELAB of white D50 [..., 3] to sRGB 0 ... 255, clipped; the neutral of luminance ``black`` becomes black."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    xyz = (xyz - black) / (1 - black) * D50_XYZ
    return srgb_encode(xyz @ np.linalg.inv(adapted_to_d50(rgb_to_xyz(PRIMARIES["srgb"]))).T) * 255


def test_cmyk_by_its_profile(tmp_path: Path) -> None:
    """At the corners of a 2^4 table every way to interpolate gives the table's own colour."""
    inks = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    rng = np.random.default_rng(1)
    lab = np.stack([np.linspace(100, 0, 16), rng.integers(-9, 10, 16), rng.integers(-9, 10, 16)], axis=-1).round()
    lab[0], lab[15] = (100, 0, 0), (0, 0, 0)  # paper is white and all inks are black: compensation has nothing to do
    pixels = (inks * 255).astype(np.uint8)[None]
    path = saved(tmp_path, "a.tif", Image.frombytes("CMYK", (16, 1), pixels.tobytes()), icc_profile=cmyk_profile(lab))
    exact = lab.copy()
    exact[:, 0] = (lab[:, 0] * 2.55).round() / 2.55
    assert np.abs(opened(path)[0] - lab_to_srgb(exact)).max() <= 2.0


def test_cmyk_without_profile(tmp_path: Path) -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 128, 0, 64]]], dtype=np.uint8)
    path = saved(tmp_path, "a.tif", Image.frombytes("CMYK", (4, 1), pixels.tobytes()))
    ink = pixels / 255.0
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(opened(path) - expected).max() <= 1


def test_swop_cmyk_by_its_own_table(real_photos: Path) -> None:
    """A real press profile, its A2B1 table read and interpolated here."""
    path = real_photos / "awkward" / "cmyk_multi_segment_icc_swop.jpg"
    with Image.open(path) as image:
        inks, profile = np.asarray(image).reshape(-1, 4), image.info["icc_profile"]
    position = profile.index(b"A2B1")
    _, offset, length = struct.unpack_from(">4sII", profile, position)
    table = profile[offset : offset + length]
    kind, channels, outputs, grid = struct.unpack_from(">4s4xBBB", table)
    assert (kind, channels, outputs) == (b"mft2", 4, 3)
    before, behind = struct.unpack_from(">HH", table, 48)
    words = np.frombuffer(table, ">u2", offset=52)
    curves, words = words[: 4 * before].reshape(4, before), words[4 * before :]
    clut, words = words[: grid**4 * 3].reshape(grid, grid, grid, grid, 3), words[grid**4 * 3 :]
    after = words[: 3 * behind].reshape(3, behind)
    pick = np.random.default_rng(0).choice(len(inks), 300, replace=False)
    ramp = np.linspace(0, 255, before)
    place = np.stack([np.interp(inks[pick, c], ramp, curves[c]) for c in range(4)], axis=-1) / 65535 * (grid - 1)
    low = np.minimum(place.astype(int), grid - 2)
    part = place - low
    value = np.zeros((300, 3))
    for corner in np.ndindex(2, 2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1, keepdims=True)
        value += weight * clut[tuple((low + corner).T)]
    ramp = np.linspace(0, 65535, behind)
    coded = np.stack([np.interp(value[:, c], ramp, after[c]) for c in range(3)], axis=-1)
    lab = np.stack([coded[:, 0] / 652.8, coded[:, 1] / 256 - 128, coded[:, 2] / 256 - 128], axis=-1)
    result = opened(path).reshape(-1, 3)[pick]
    # The press's black point is lcms's own estimate: the one free number here, and it must explain all 900 values.
    errors = {black: np.abs(result - lab_to_srgb(lab, black)) for black in np.linspace(0, 0.04, 81)}
    black = min(errors, key=lambda black: float(errors[black].mean()))
    assert 0.001 < black < 0.03
    assert errors[black].mean() < 0.6
    assert errors[black].max() < 5
    assert (result[(inks[pick] == 0).all(axis=1)] == 255).all()  # paper is white


def test_lab(tmp_path: Path) -> None:
    lab = np.array([[100, 0, 0], [0, 0, 0], [54, 81, 70], [50, 0, 0], [60, -30, 20], [70, 10, -40]], dtype=float)
    coded = (lab * (2.55, 1, 1)).round().astype(int).astype(np.uint8)  # a* and b* as signed bytes
    path = saved(tmp_path, "a.tif", Image.frombytes("LAB", (6, 1), coded.tobytes()))
    assert np.abs(opened(path)[0] - lab_to_srgb(lab)).max() <= 3


def test_ycbcr(tmp_path: Path, gradient: Image.Image) -> None:
    path = saved(tmp_path, "a.tif", gradient.convert("YCbCr"))
    assert np.abs(opened(path).astype(int) - np.asarray(gradient)).max() <= 3


def test_malformed_profiles_are_ignored_with_a_warning(
    tmp_path: Path, gradient: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    good = rgb_profile("p3")
    wrong = {"garbage": b"garbage", "cut": good[:200], "empty tags": good[:128] + bytes(4), "gray": gray_profile(1.0)}
    wrong["no curves"] = good.replace(b"TRC", b"XXX")
    for name, profile in wrong.items():
        caplog.clear()
        path = saved(tmp_path, f"{name}.png", gradient, icc_profile=profile)
        assert np.array_equal(opened(path), np.asarray(gradient)), name
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("cyclegan_fast.photo", logging.WARNING)
        assert path.name in record.getMessage()
        assert "profile" in record.getMessage()


# What the stored picture (row 0, column 0 at top left) must be turned by so that it stands upright, EXIF 2.32 table 6.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation(tmp_path: Path, gradient: Image.Image, orientation: int, suffix: str, order: str) -> None:
    exif: Any = camera_exif(orientation, order=order)
    if suffix == ".tif":
        exif = Image.Exif()
        exif.update({0x0112: orientation, 0x010F: "Optics"})
    path = saved(tmp_path, "a" + suffix, gradient, exif=exif, **({"quality": 95} if suffix == ".avif" else {}))
    expected = UPRIGHT[orientation](np.asarray(gradient)).astype(int)
    result = opened(path)
    assert result.shape == expected.shape
    assert np.abs(result - expected).mean() < 3
    kept = Image.Exif()
    kept.load(open_photo(path).exif)
    assert kept[0x010F] == "Optics"
    assert kept.get(0x0112, 1) == 1


def test_orientation_of_heic_is_that_of_its_container(tmp_path: Path, gradient: Image.Image) -> None:
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(gradient).save(path, quality=95, exif=camera_exif(6))
    result = opened(path)
    assert np.abs(result - UPRIGHT[6](np.asarray(gradient)).astype(int)).mean() < 4
    kept = Image.Exif()
    kept.load(open_photo(path).exif)
    assert (kept[0x010F], kept.get(0x0112, 1)) == ("Optics", 1)


@pytest.mark.parametrize("place", ["before", "after", "text"])
def test_exif_of_a_png_is_found_wherever_it_is(tmp_path: Path, place: str) -> None:
    block = camera_exif(6)
    chunk = (b"eXIf", block[6:])
    if place == "text":
        text = f"\nexif\n{len(block):8}\n{block.hex()}\n"
        chunk = (b"tEXt", b"Raw profile type exif\0" + text.encode())
    content = png(COLOURS, 2, depth=8, chunks=(chunk,) if place != "after" else ())
    if place == "after":
        late = (
            struct.pack(">I", len(chunk[1])) + chunk[0] + chunk[1] + struct.pack(">I", zlib.crc32(chunk[0] + chunk[1]))
        )
        content = content[:-12] + late + content[-12:]
    assert np.array_equal(opened(written(tmp_path, "a.png", content)), UPRIGHT[6](COLOURS))


def test_exif_is_kept_but_for_orientation_colour_space_and_thumbnail(tmp_path: Path, gradient: Image.Image) -> None:
    block = camera_exif(8, thumbnail=b"\xff\xd8 another picture")
    kept = open_photo(saved(tmp_path, "a.jpg", gradient, exif=block)).exif
    parsed = Image.Exif()
    parsed.load(kept)
    assert dict(parsed) == {0x010F: "Optics", 0x0112: 1, 0x8769: parsed[0x8769]}
    assert parsed.get_ifd(0x8769) == {0xA001: 1}
    assert not parsed.get_ifd(1)
    assert b"another picture" not in kept
    assert len(kept) < len(block)
    plain = open_photo(saved(tmp_path, "b.jpg", gradient, exif=camera_exif(1))).exif
    assert len(plain) == len(camera_exif(1))  # nothing moved: maker notes hold offsets


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_without_meaning_are_upright(tmp_path: Path, gradient: Image.Image, value: int) -> None:
    path = saved(tmp_path, "a.png", gradient, exif=camera_exif(value))
    assert np.array_equal(opened(path), np.asarray(gradient))


def test_malformed_exif_is_left_out_with_a_warning(
    tmp_path: Path, gradient: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    good = camera_exif(1)
    far = good[:10] + struct.pack(">I", 10_000) + good[14:]
    for name, block in {"cut": good[:25], "no tiff": b"Exif\0\0nonsense", "far": far, "empty": b"Exif\0\0"}.items():
        caplog.clear()
        path = saved(tmp_path, f"{name}.png", gradient, exif=block)
        assert np.array_equal(opened(path), np.asarray(gradient)), name
        assert open_photo(path).exif == b""
        assert all(record.name == "cyclegan_fast.photo" for record in caplog.records)
        assert all(path.name in record.getMessage() for record in caplog.records)
        assert len(caplog.records) == (2 if name != "empty" else 0), name  # opened twice; an empty block is no block


def test_a_malformed_block_still_gives_its_orientation(tmp_path: Path, gradient: Image.Image) -> None:
    block = camera_exif(6)
    cut = block[: 6 + 8 + 2 + 24 + 5]  # the third of three entries is incomplete
    path = saved(tmp_path, "a.jpg", gradient, exif=cut, quality=98)
    assert np.abs(opened(path) - UPRIGHT[6](np.asarray(gradient)).astype(int)).mean() < 3


VALUES_16 = np.array([[0, 1, 128, 129, 255, 257, 32767, 32896, 65278, 65407, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("container", ["png", "tiff little", "tiff big", "pgm"])
def test_16_bit_gray_is_scaled_and_rounded(tmp_path: Path, container: str) -> None:
    if container == "png":
        path = written(tmp_path, "a.png", png(VALUES_16, 0))
    elif container == "pgm":
        path = written(tmp_path, "a.pgm", b"P5 11 1 65535\n" + VALUES_16.astype(">u2").tobytes())
    else:
        mode, dtype = ("I;16", "<u2") if container == "tiff little" else ("I;16B", ">u2")
        path = saved(tmp_path, "a.tif", Image.frombytes(mode, (11, 1), VALUES_16.astype(dtype).tobytes()))
    expected = np.rint(VALUES_16 / 257).astype(np.uint8)
    assert np.array_equal(opened(path, 1), expected)
    assert np.array_equal(opened(path, 3), np.repeat(expected[..., None], 3, axis=-1))


def test_16_bit_gray_with_a_transparent_value(tmp_path: Path) -> None:
    """Only the exact 16-bit value is transparent, not its neighbours of the same high byte."""
    values = np.array([[0x1234, 0x1235, 0xFFFF]], dtype=np.uint16)
    path = written(tmp_path, "a.png", png(values, 0, chunks=((b"tRNS", b"\x12\x34"),)))
    assert opened(path, 2)[0].tolist() == [[18, 0], [18, 255], [255, 255]]
    assert opened(path, 1)[0].tolist() == [255, 18, 255]


def test_other_gray_depths_of_tiff(tmp_path: Path) -> None:
    def result(values: list[float], dtype: str, bits: int, **options: Any) -> list[int]:
        array = np.array([values], dtype=dtype)
        return opened(written(tmp_path, "a.tif", tiff_gray(array, bits=bits, **options)), 1)[0].tolist()

    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 12-bit samples 0, 2048, 4095, 0
    assert result([0, 2048, 4095, 0], "<u2", 12, data=packed) == [0, 128, 255, 0]
    assert result([0, 65535, 257], "<u2", 16, photometric=0) == [255, 0, 254]  # white is zero
    assert result([-5, 0, 32767], "<i2", 16, sample_format=2) == [0, 0, 255]
    assert result([0, 4294967295, 2147483648], "<u4", 32) == [0, 255, 128]
    assert result([0, 65535, 32896], "<u4", 32) == [0, 255, 128]
    assert result([0, 200, 255], "<u4", 32) == [0, 200, 255]
    assert result([0, 0.5, 1.0], "<f4", 32, sample_format=3) == [0, 128, 255]
    assert result([0, 100.4, 255], "<f4", 32, sample_format=3) == [0, 100, 255]
    assert result([np.nan, -1, 0.2], "<f4", 32, sample_format=3) == [0, 0, 51]
    with pytest.raises(PhotoError, match="scale them to 0"):
        result([0, 1e6], "<f4", 32, sample_format=3)


@pytest.mark.parametrize("colour_type", [2, 6])
def test_16_bit_colour_is_within_a_level(tmp_path: Path, colour_type: int) -> None:
    rng = np.random.default_rng(2)
    channels = 3 if colour_type == 2 else 4
    values = rng.integers(0, 65536, (40, 40, channels)).astype(np.uint16)
    result = opened(written(tmp_path, "a.png", png(values, colour_type)), channels)
    assert np.abs(result - values / 257).max() <= 1.0
    assert abs(float((result - values / 257).mean())) < 0.05  # no shift of the whole picture
    levels = rng.integers(0, 256, (8, 8, channels)).astype(np.uint16)
    path = written(tmp_path, "b.png", png(levels * 257, colour_type))
    assert np.array_equal(opened(path, channels), levels)


def test_16_bit_tiff_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 65536, (4, 6, 3)).astype("<u2")
    content = tiff_gray(values[..., 0], bits=16, photometric=2, data=values.tobytes())
    tag = struct.pack("<HHII", 277, 3, 1, 1)
    content = content.replace(tag, struct.pack("<HHII", 277, 3, 1, 3))
    bits, formats = (struct.pack("<HHII", t, 3, 1, v) for t, v in ((258, 16), (339, 1)))
    end = len(content)
    content = content.replace(bits, struct.pack("<HHII", 258, 3, 3, end)).replace(
        formats, struct.pack("<HHII", 339, 3, 3, end + 6)
    )
    content += struct.pack("<6H", 16, 16, 16, 1, 1, 1)
    assert np.abs(opened(written(tmp_path, "a.tif", content)) - values / 257).max() <= 1.0


def test_16_bit_colour_with_a_transparent_colour(tmp_path: Path) -> None:
    values = np.array([[[0x1234, 0x5678, 0x9ABC], [0, 0x8080, 0xFFFF]]], dtype=np.uint16)
    path = written(tmp_path, "a.png", png(values, 2, chunks=((b"tRNS", b"\x12\x34\x56\x78\x9a\xbc"),)))
    assert opened(path, 4)[0].tolist() == [[0x12, 0x56, 0x9A, 0], [0, 128, 255, 255]]


def test_small_depths_with_a_transparent_value(tmp_path: Path) -> None:
    """PNG gives the transparent gray in samples of the file, here of 4, 2 and 1 bits, not as they are decoded."""
    two = written(tmp_path, "2.png", png(np.array([[0b00011011]]), 0, depth=2, chunks=((b"tRNS", b"\0\2"),)))
    assert opened(two, 2)[0].tolist() == [[0, 255], [85, 255], [170, 0], [255, 255]]
    four = written(tmp_path, "4.png", png(np.array([[0x3F]]), 0, depth=4, chunks=((b"tRNS", b"\0\3"),)))
    assert opened(four, 2)[0].tolist() == [[51, 0], [255, 255]]
    one = written(tmp_path, "1.png", png(np.array([[0b10101010]]), 0, depth=1, chunks=((b"tRNS", b"\0\1"),)))
    assert opened(one, 2)[0, :2].tolist() == [[255, 0], [0, 255]]


def test_palettes(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    plain = written(tmp_path, "a.png", png(indices, 3, depth=8, chunks=((b"PLTE", palette),)))
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]
    assert opened(plain)[0].tolist() == colours
    assert opened(plain, 4)[0].tolist() == [[*colour, 255] for colour in colours]
    for name, transparency, alpha in (("b", b"\xff\0", [255, 0, 255, 255]), ("c", b"\x80\0\xff", [128, 0, 255, 255])):
        chunks = ((b"PLTE", palette), (b"tRNS", transparency))
        path = written(tmp_path, f"{name}.png", png(indices, 3, depth=8, chunks=chunks))
        assert opened(path, 4)[0].tolist() == [[*c, a] for c, a in zip(colours, alpha, strict=True)]
        assert opened(path)[0, 1].tolist() == [255, 255, 255]
    assert opened(path)[0, 0].tolist() == [255, 127, 127]  # half red over white


def test_alpha_and_channels(tmp_path: Path) -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], dtype=np.uint8)
    path = saved(tmp_path, "a.png", Image.fromarray(rgba))
    over_white = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0) + 255 * (1 - rgba[..., 3:] / 255.0))
    assert np.abs(opened(path, 3) - over_white).max() <= 1
    assert np.array_equal(opened(path, 4), rgba)
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(opened(path, 1) - over_white @ luma).max() <= 1
    assert np.abs(opened(path, 2)[..., 0] - rgba[..., :3] @ luma).max() <= 1
    assert np.array_equal(opened(path, 2)[..., 1], rgba[..., 3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_mode_to_every_number_of_channels(
    tmp_path: Path, gradient: Image.Image, mode: str, channels: int
) -> None:
    source = gradient.convert(mode)
    path = saved(tmp_path, "a.png", source)
    expected = source.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    if mode == "P" and channels <= 2:
        expected = source.convert("RGB").convert(expected.mode)
    assert np.array_equal(opened(path, channels), np.asarray(expected))


def test_wrong_channels(tmp_path: Path, gradient: Image.Image) -> None:
    path = saved(tmp_path, "a.png", gradient)
    with pytest.raises(ValueError, match=r"channels = 5 .*1, 2, 3, 4"):
        open_photo(path, 5)


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    cases = {
        written(tmp_path, "empty.jpg", b""): "empty",
        written(tmp_path, "text.jpg", b"Dear Sir or Madam,\n" * 40): "not a picture in a known format.*Dear Sir",
        written(tmp_path, "header.png", b"\x89PNG\r\n\x1a\n"): "PNG file, but is damaged",
        written(tmp_path, "soi.jpg", b"\xff\xd8\xff"): "JPEG file, but is damaged",
        written(tmp_path, "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"): "not a picture",
        written(tmp_path, "box.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)): "HEIF file, but is damaged",
        tmp_path / "folder.jpg": "not a file",
        tmp_path / "pipe.jpg": "not a regular file",
        tmp_path / "link.jpg": "No such file",
        tmp_path / "missing.jpg": "No such file",
    }
    for path, reason in cases.items():
        for function in (read_header, open_photo):
            with pytest.raises(PhotoError, match=reason) as caught:
                function(path)
            assert caught.value.path == path
            assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    def forged(width: int, height: int) -> Path:
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        content = png(COLOURS, 2, depth=8)
        content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        return written(tmp_path, f"{width}.png", content)

    for function in (read_header, open_photo):
        with pytest.raises(PhotoError, match="60000x60000 is 3600 megapixels, above the limit of 300"):
            function(forged(60_000, 60_000))
    # Larger than what Pillow warns of and refuses by default, within our limit: told by the header, without warning.
    large = read_header(forged(17_000, 17_000))
    assert (large.width, large.height) == (17_000, 17_000)
    assert large.width * large.height < MAX_PIXELS


def frames(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (16, 12), (40 * i, 255 - 40 * i, 9)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".avif"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    first, *rest = frames()
    path = saved(tmp_path, "a" + suffix, first, save_all=True, append_images=rest, duration=50)
    for function in (read_header, open_photo):
        with pytest.raises(PhotoError, match="animation of 3 frames"):
            function(path)
    still = saved(tmp_path, "still" + suffix, first)
    assert opened(still).shape == (12, 16, 3)


def test_documents_are_refused_and_pyramids_are_not(tmp_path: Path) -> None:
    first, *rest = frames()
    with pytest.raises(PhotoError, match="document of 3 pages"):
        read_header(saved(tmp_path, "a.tif", first, save_all=True, append_images=rest))
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=[rest[0].resize((8, 6))])
    content = bytearray(buffer.getvalue())
    with Image.open(io.BytesIO(content)) as image:
        image.seek(1)
        entry = image._frame_pos[1] + 2  # type: ignore[attr-defined]
    assert struct.unpack_from("<H", content, entry)[0] == 256
    # Say of the second page, in place of one of its tags, that it is a reduced version of the first.
    count = struct.unpack_from("<H", content, entry - 2)[0]
    del content[entry + 12 * (count - 1) : entry + 12 * count]
    content[entry:entry] = struct.pack("<HHII", 254, 4, 1, 1)
    result = opened(written(tmp_path, "pyramid.tif", bytes(content)))
    assert (result == np.asarray(first)).all()


def test_the_main_picture_of_a_multi_picture_jpeg(tmp_path: Path, gradient: Image.Image) -> None:
    path = saved(
        tmp_path, "a.jpg", gradient, format="MPO", save_all=True, append_images=[gradient.rotate(180)], quality=97
    )
    assert np.abs(opened(path) - np.asarray(gradient).astype(int)).mean() < 2
    assert read_header(path).format == "JPEG"


def test_the_primary_picture_of_a_heif_of_several(tmp_path: Path, gradient: Image.Image) -> None:
    heif = pillow_heif.from_pillow(gradient)
    heif.add_from_pillow(gradient.rotate(180))
    path = tmp_path / "a.heic"
    heif.save(path, quality=95, primary_index=1)
    assert np.abs(opened(path) - np.asarray(gradient.rotate(180)).astype(int)).mean() < 4


def encoded(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, exif=camera_exif(6), icc_profile=rgb_profile("p3"))
    else:
        meta = {} if name in ("PPM", "BMP") else {"icc_profile": rgb_profile("p3")}
        if name not in ("PPM", "BMP", "TIFF"):
            meta["exif"] = camera_exif(6)
        compression = {"compression": "tiff_lzw"} if name == "TIFF" else {}
        image.save(buffer, name, **meta, **compression)
    return buffer.getvalue()


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "HEIF"]


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files(tmp_path: Path, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, name)
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(PhotoError):
            open_photo(written(tmp_path, "a", content[: int(len(content) * part)]))
    for end in range(0, min(len(content), 1200), 37):  # through all of the metadata
        with pytest.raises(PhotoError):
            open_photo(written(tmp_path, "a", content[:end]))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_never_raise_anything_else(
    tmp_path: Path, gradient: Image.Image, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(5)
    content = encoded(gradient, name)
    usable = 0
    for trial in range(60):
        damaged = bytearray(content)
        reach = len(content) if trial % 2 else min(len(content), 600)
        for position in rng.integers(0, reach, 1 + trial % 7):
            damaged[position] = rng.integers(0, 256)
        path = written(tmp_path, "a", bytes(damaged))
        for function in (read_header, open_photo):
            try:
                usable += isinstance(function(path), Photo)
            except PhotoError:
                continue
    assert usable < 60


def test_heic_without_its_package(tmp_path: Path, gradient: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.heic", encoded(gradient, "HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for function in (read_header, open_photo):
        with pytest.raises(PhotoError, match="pip install pillow-heif"):
            function(path)
    with pytest.raises(PhotoError, match="pip install pillow-heif"):
        save_photo(gradient, tmp_path / "b.heic")
    assert not (tmp_path / "b.heic").exists()


def test_threads_share_nothing(tmp_path: Path, gradient: Image.Image) -> None:
    paths = [written(tmp_path, f"{name}.bin", encoded(gradient, name)) for name in FORMATS]
    expected = [np.asarray(open_photo(path).image) for path in paths]
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda path: np.asarray(open_photo(path).image), paths * 5))
    assert all(np.array_equal(a, b) for a, b in zip(results, expected * 5, strict=True))
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (filters, limit)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PhotoError("a/b.jpg", "torn")))  # noqa: S301
    assert (error.path, error.reason, str(error)) == (Path("a/b.jpg"), "torn", "a/b.jpg: torn")


SUFFIXES = [
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
    ".heic",
    ".heif",
    ".bmp",
    ".ppm",
    ".PNG",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_and_open_again(tmp_path: Path, gradient: Image.Image, suffix: str) -> None:
    source = open_photo(saved(tmp_path, "source.png", gradient, exif=camera_exif(1), icc_profile=rgb_profile("p3")))
    path = tmp_path / ("b" + suffix)
    save_photo(gradient, path, like=source)
    result = open_photo(path)
    lossy = suffix.lower() not in (".png", ".tif", ".tiff", ".bmp", ".ppm")
    assert np.abs(np.asarray(result.image) - np.asarray(gradient).astype(int)).mean() <= (3 if lossy else 0)
    if suffix not in (".bmp", ".ppm"):
        kept = Image.Exif()
        kept.load(result.exif)
        assert (kept[0x010F], kept.get(0x0112, 1), kept.get_ifd(0x8769)[0xA001]) == ("Optics", 1, 1)
        assert result.icc_profile is not None
        assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(result.icc_profile)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["source.png", path.name])
    assert suffix.lower() in EXTENSIONS


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif", ".heic", ".bmp", ".ppm"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_every_mode_can_be_saved(tmp_path: Path, gradient: Image.Image, suffix: str, mode: str) -> None:
    like = open_photo(saved(tmp_path, "s.png", gradient, exif=camera_exif(1), icc_profile=rgb_profile("p3")))
    image = gradient.convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / ("a" + suffix)
    save_photo(image, path, like=like)
    channels = 4 if mode.endswith("A") and suffix not in (".jpg", ".bmp", ".ppm") else 3
    reference = image if channels == 4 else open_photo(saved(tmp_path, "r.png", image)).image
    difference = opened(path, channels) - np.asarray(reference.convert("RGBA" if channels == 4 else "RGB")).astype(int)
    assert np.abs(difference).mean() < (16 if mode in ("1", "P") else 5)  # lossy coding of dither


def test_every_suffix_that_is_read_is_written(tmp_path: Path, gradient: Image.Image) -> None:
    assert {suffix.lower() for suffix in SUFFIXES} | {".pgm"} == EXTENSIONS
    save_photo(gradient.convert("L"), tmp_path / "a.pgm")
    assert np.array_equal(opened(tmp_path / "a.pgm", 1), np.asarray(gradient.convert("L")))
    with pytest.raises(PhotoError, match=r"a \.pgm file holds gray pictures only: name it \.ppm"):
        save_photo(gradient, tmp_path / "b.pgm")


def test_jpeg_keeps_full_colour_resolution(tmp_path: Path, gradient: Image.Image) -> None:
    save_photo(gradient, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
    sizes = []
    for quality in (20, 95):
        save_photo(gradient, tmp_path / "a.jpg", quality=quality)
        sizes.append((tmp_path / "a.jpg").stat().st_size)
    assert sizes[0] < sizes[1]


def test_no_profile_when_there_was_none_and_equal_files_for_equal_pictures(
    tmp_path: Path, gradient: Image.Image
) -> None:
    plain = open_photo(saved(tmp_path, "s.png", gradient))
    save_photo(gradient, tmp_path / "a.png", like=plain)
    assert open_photo(tmp_path / "a.png").icc_profile is None
    gradient.info["icc_profile"] = b"left over from elsewhere"
    save_photo(gradient, tmp_path / "b.png")
    assert open_photo(tmp_path / "b.png").icc_profile is None
    wide = open_photo(saved(tmp_path, "w.png", gradient, icc_profile=rgb_profile("p3")))
    for name in ("c.png", "d.png"):
        save_photo(wide.image, tmp_path / name, like=wide)
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


def test_exif_too_long_for_jpeg(tmp_path: Path, gradient: Image.Image, caplog: pytest.LogCaptureFixture) -> None:
    like = Photo(gradient, camera_exif(1) + bytes(70_000), None, "PNG", Path("long.png"))
    save_photo(gradient, tmp_path / "a.jpg", like=like)
    assert open_photo(tmp_path / "a.jpg").exif == b""
    assert "long.png (70112 bytes) is too long for JPEG" in caplog.text
    save_photo(gradient, tmp_path / "a.png", like=like)
    assert len(open_photo(tmp_path / "a.png").exif) == len(like.exif)


def test_what_cannot_be_saved(tmp_path: Path, gradient: Image.Image) -> None:
    file = written(tmp_path, "file", b"x")
    cases = {
        tmp_path / "a.gif": "suffix '.gif' names no format",
        tmp_path / "a": "suffix '' names no format",
        tmp_path / "missing" / "a.png": "No such file or directory",
        file / "a.png": "Not a directory",
    }
    for path, reason in cases.items():
        with pytest.raises(PhotoError, match=reason) as caught:
            save_photo(gradient, path)
        assert caught.value.path == path
    with pytest.raises(PhotoError, match="70000x1 RGB as JPEG"):
        save_photo(Image.new("RGB", (70_000, 1)), tmp_path / "wide.jpg")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(PhotoError, match="cannot be written: Is a directory"):
        save_photo(gradient, tmp_path / "taken.png")
    for quality in (0, 101):
        with pytest.raises(ValueError, match="quality"):
            save_photo(gradient, tmp_path / "a.jpg", quality=quality)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.png"]


def test_unwritable_folder(tmp_path: Path, gradient: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PhotoError, match=r"a\.png: cannot be written: Permission denied"):
        save_photo(gradient, tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_full_disk_leaves_no_half_file_and_the_old_one(
    tmp_path: Path, gradient: Image.Image, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a" + suffix, b"the old one")
    really_open = Path.open

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Full(self, "x") if "x" in mode or "w" in mode else really_open(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(PhotoError, match=f"a\\{suffix}: cannot be written: No space left on device"):
        save_photo(gradient, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"the old one"


def test_an_interruption_leaves_nothing(tmp_path: Path, gradient: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_photo(gradient, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# File -> (width, height, format) once upright, or the reason why it is refused.
AWKWARD: dict[str, tuple[int, int, str] | str] = {
    "adobe_rgb_canon7d_600x900.jpg": (600, 900, "JPEG"),
    "animated.gif": "animation of 30 frames",
    "big_height.webp": "animation of 97 frames",
    "broken_data_stream.png": "unrecognized data stream",
    "centered_image.jpeg": (75, 105, "JPEG"),
    "cmyk_multi_segment_icc_swop.jpg": (140, 140, "JPEG"),
    "cmyk_no_profile.jpg": (500, 333, "JPEG"),
    "flickr_photo_unavailable_placeholder.png": (256, 256, "PNG"),
    "flowers_ok.jpeg": (1920, 1080, "JPEG"),
    "gray.jpg": (128, 128, "JPEG"),
    "gray_bad_exif.jpg": (500, 500, "JPEG"),
    "invalid_exif_image01137.jpg": (88, 64, "JPEG"),
    "not_an_image_beach.jpg": "damaged",
    "official_testA_truncated_gray.png": (256, 256, "PNG"),
    "orient_landscape_1.jpg": (600, 450, "JPEG"),
    "orient_landscape_2.jpg": (600, 450, "JPEG"),
    "orient_landscape_3.jpg": (600, 450, "JPEG"),
    "orient_landscape_7.jpg": (600, 450, "JPEG"),
    "orient_landscape_8.jpg": (600, 450, "JPEG"),
    "orient_portrait_3.jpg": (450, 600, "JPEG"),
    "orient_portrait_6.jpg": (450, 600, "JPEG"),
    "png16_gray_alpha.png": (109, 96, "PNG"),
    "png16_gray_alpha_small.png": (32, 32, "PNG"),
    "png16_rgb.png": (900, 600, "PNG"),
    "png16_rgb_trns.png": (32, 32, "PNG"),
    "png_display_p3.png": (8, 8, "PNG"),
    "png_palette_alpha.png": (68, 68, "PNG"),
    "png_xyz.png": (128, 128, "PNG"),
    "tiff16_gray.tif": (64, 64, "TIFF"),
    "tiny_2x2.png": (2, 2, "PNG"),
    "truncated_2725x2225.jpg": "truncated",
    "truncated_small.png": "truncated",
    "ultrahdr_truncated_1512x2688.jpg": "truncated",
}


def test_awkward_files(real_photos: Path) -> None:
    """Every one gives the right size in every number of channels, or a PhotoError."""
    files = {path.name: path for path in (real_photos / "awkward").iterdir()}
    assert files.keys() == AWKWARD.keys()
    for name, expected in AWKWARD.items():
        for channels in (1, 2, 3, 4):
            if isinstance(expected, str):
                with pytest.raises(PhotoError, match=expected):
                    open_photo(files[name], channels)
            else:
                result = opened(files[name], channels)
                assert (result.shape[1], result.shape[0], open_photo(files[name]).format) == expected, name


def test_orientations_of_one_scene_agree(real_photos: Path) -> None:
    upright = opened(real_photos / "awkward" / "orient_landscape_1.jpg").astype(int)
    for orientation in (2, 3, 7, 8):
        other = opened(real_photos / "awkward" / f"orient_landscape_{orientation}.jpg").astype(int)
        wrong = np.abs(upright - other[:, ::-1]).mean()
        assert np.abs(upright - other).mean() < wrong / 2, orientation


def test_phone_and_camera_originals(real_photos: Path, tmp_path: Path) -> None:
    sizes = {
        "canon70d_20mp.avif": (5472, 3648),
        "galaxy_s9plus_food_12mp_icc_srgb.jpg": (4032, 3024),
        "iphone13promax.HEIC": (3024, 4032),
        "iphone5_flower_8mp_orient3.jpg": (3264, 2448),
        "iphone_IMG_2927.HEIC": (3024, 4032),
        "leica_t_16mp_orient8.jpg": (3264, 4928),
    }
    for path in sorted((real_photos / "photos").iterdir()):
        header = read_header(path)
        assert (header.width, header.height) == sizes.get(path.name, (header.width, header.height))
        assert header.mode == "RGB"
    phone = open_photo(real_photos / "photos" / "iphone13promax.HEIC")
    assert phone.image.size == (3024, 4032)
    save_photo(phone.image.resize((300, 400)), tmp_path / "a.jpg", like=phone)
    with Image.open(tmp_path / "a.jpg") as again:
        exif = again.getexif()
        assert exif[0x0110] == "iPhone 13 Pro Max"
        assert exif[0x0112] == 1
        assert exif.get_ifd(0x8769)[0xA001] == 1
    fern = real_photos / "photos" / "iphone6plus_fern_8mp_icc_srgb.jpg"
    with Image.open(fern) as raw:  # its profile is sRGB: not a bit may change
        assert np.array_equal(opened(fern), np.asarray(raw))


def test_adobe_rgb_photograph(real_photos: Path) -> None:
    """The real Canon picture against the formula applied to its stored pixels."""
    path = real_photos / "awkward" / "adobe_rgb_canon7d_600x900.jpg"
    with Image.open(path) as image:
        stored = np.asarray(image)[::9, ::9] / 255.0
    to_srgb = np.linalg.inv(rgb_to_xyz(PRIMARIES["srgb"])) @ rgb_to_xyz(PRIMARIES["adobe"])
    expected = srgb_encode((stored**ADOBE_GAMMA) @ to_srgb.T) * 255
    difference = np.abs(opened(path)[::9, ::9] - expected)
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.999) <= 2
