"""What is kept of a photograph: 16 bits, its profile, alpha, metadata, times; and the ways to write it."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from photo_files import (
    camera_exif,
    gray_profile,
    in_profile,
    in_srgb,
    png,
    png_samples,
    rgb_profile,
    srgb_encode,
    tiff_colour,
    tiff_samples,
)
from PIL import Image

from cyclegan_fast.data import colour, deep
from cyclegan_fast.data.photo import PhotoError, open_original, save_photo

RNG = np.random.default_rng(0)
GRADIENT = np.stack(np.mgrid[0:32, 0:48][[0, 1, 0]], axis=-1) * (7, 5, 3) + (0, 10, 99)
PICTURE = GRADIENT.astype(np.uint8)


def deep_noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_come_in_and_go_out_to_the_bit(tmp_path: Path, kind: int, channels: int, suffix: str) -> None:
    samples = deep_noise(37, 53, channels)
    original = open_original(written(tmp_path / "a.png", png(samples, kind)), 1 if channels <= 2 else 3)
    assert (original.pixels.dtype, original.bits, original.gray) == (np.uint16, 16, channels <= 2)
    shown = samples[..., :-1] if channels in (2, 4) else samples
    assert np.array_equal(original.pixels, shown)
    assert (original.alpha is None) == (channels in (1, 3))
    target = tmp_path / f"b{suffix}"
    save_photo(original.pixels, target, like=original)
    read = (png_samples if suffix == ".png" else tiff_samples)(target.read_bytes())
    as_colour = suffix == ".tif" and channels == 2  # what few programs can read otherwise
    assert np.array_equal(read, samples[..., [0, 0, 0, 1]] if as_colour else samples)
    again = open_original(target, channels)
    assert np.array_equal(again.pixels, samples)


def test_16_bit_tiff_in_both_byte_orders_and_compressed(tmp_path: Path) -> None:
    samples = deep_noise(40, 30, 3)
    plain = written(tmp_path / "plain.tif", tiff_colour(samples))
    assert np.array_equal(open_original(plain).pixels, samples)
    big = plain.read_bytes()
    entries = struct.unpack_from("<H", big, 8)[0]
    swapped = bytearray(b"MM\0*" + struct.pack(">IH", 8, entries))
    for at in range(10, 10 + 12 * entries, 12):
        tag, kind, count, value = struct.unpack_from("<HHII", big, at)
        packed = struct.pack(">HH", value, 0) if kind == 3 and count == 1 else struct.pack(">I", value)
        swapped += struct.pack(">HHI", tag, kind, count) + packed
    swapped += big[len(swapped) : len(swapped) + 4] + samples.astype(">u2").tobytes()
    swapped += struct.pack(">6H", 16, 16, 16, 1, 1, 1)
    assert np.array_equal(open_original(written(tmp_path / "big.tif", bytes(swapped))).pixels, samples)
    packed_file = written(tmp_path / "packed.tif", deep.tiff(samples, tags={}))
    assert np.array_equal(open_original(packed_file).pixels, samples)


def test_a_transparent_colour_of_16_bits_is_exact(tmp_path: Path) -> None:
    samples = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD]]], np.uint16)
    content = png(samples, 2, chunks=((b"tRNS", struct.pack(">3H", *samples[0, 0])),))
    alpha = open_original(written(tmp_path / "a.png", content)).alpha
    assert alpha is not None
    assert alpha.tolist() == [[0, 65535]]


def test_10_bits_of_heic_are_all_there(tmp_path: Path) -> None:
    levels = np.repeat(np.repeat(np.arange(0, 1024, 16).reshape(8, 8), 16, 0), 16, 1)
    samples = np.stack([levels] * 3, axis=-1).astype(np.uint16)
    heif = pillow_heif.from_bytes("RGB;16", (128, 128), (samples << 6).tobytes())
    heif.save(tmp_path / "a.heic", quality=-1, chroma=444)
    original = open_original(tmp_path / "a.heic")
    assert (original.bits, original.pixels.dtype) == (16, np.uint16)
    assert np.abs(original.pixels / 65535 - samples / 1023).max() <= 1.01 / 1023  # YCbCr of 10 bits rounds
    assert len(np.unique(original.pixels)) > 60  # 8 bits would leave all 64, but elsewhere:
    assert np.abs(open_original(tmp_path / "a.heic", bits=8).pixels / 255 - samples / 1023).max() > 1.01 / 1023


@pytest.mark.parametrize("name", ["p3", "adobe"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_go_to_srgb_by_the_formula_and_back(tmp_path: Path, name: str, bits: int) -> None:
    """All within a level of the file's depth (8), or of what 32-bit floats and a 16-bit sRGB leave of 16 (4e-4)."""
    top = 2**bits - 1
    srgb = RNG.random((40, 50, 3))
    values = np.rint(in_profile(name, srgb) * top).astype(np.uint16 if bits == 16 else np.uint8)
    chunk = (b"iCCP", b"x\0\0" + zlib.compress(rgb_profile(name)))
    path = written(tmp_path / "a.png", png(values, 2, depth=bits, chunks=(chunk,)))
    for profile, expected in (("original", values / top), ("srgb", in_srgb(name, values / top))):
        original = open_original(path, profile=profile)
        assert original.pixels.dtype == (np.uint8 if (bits, profile) == (8, "srgb") else np.uint16)
        target = tmp_path / f"{profile}.png"
        save_photo(original.pixels, target, like=original)
        samples = png_samples(target.read_bytes())
        assert samples.dtype.itemsize * 8 == bits
        # lcms rounds colours of 8 bits once more, dark ones worse (see test_photo.py).
        allowed = (1.6 if profile == "srgb" else 1.0) if bits == 8 else 4e-4 * 65535
        assert np.abs(samples - expected * top).max() <= allowed
        with Image.open(target) as image:
            assert (image.info["icc_profile"] == rgb_profile(name)) == (profile == "original")


def test_gray_goes_back_into_its_gray_profile(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=gray_profile(1.0))
    original = open_original(tmp_path / "a.png", 1, profile="original")
    assert np.abs(original.pixels[..., 0] / 65535 - srgb_encode(values / 255)).max() < 1e-4
    save_photo(original.pixels, tmp_path / "b.png", like=original)
    with Image.open(tmp_path / "b.png") as image:
        assert (image.mode, image.info["icc_profile"]) == ("L", gray_profile(1.0))
        assert np.array_equal(np.asarray(image), values)


def test_curves_of_every_kind_of_profile() -> None:
    """Parametric types by their formulas (ICC.1:2022, 10.18), and what is not made of a matrix and curves."""
    x = np.linspace(0, 1, 65536)

    def light(kind: int, *parameters: float) -> np.ndarray:
        tag = b"para\0\0\0\0" + struct.pack(f">HH{len(parameters)}i", kind, 0, *(round(65536 * p) for p in parameters))
        profile = gray_profile(1.0)
        position = profile.index(b"kTRC")
        offset = len(profile)
        profile = profile[: position + 4] + struct.pack(">II", offset, len(tag)) + profile[position + 12 :] + tag
        curves = colour.curves_of(profile)
        assert curves is not None
        return curves.light[0]

    g, a, b, c, d = 2.4, 0.75, 0.25, 0.25, 0.5
    assert np.allclose(light(0, g), x**g, atol=1e-4)
    assert np.allclose(light(1, g, 1.25, -0.25), np.where(x >= 0.2, np.maximum(1.25 * x - 0.25, 0) ** g, 0), atol=1e-4)
    bent = np.where(x >= 0.2, 0.75 * np.maximum(1.25 * x - 0.25, 0) ** g, 0) + 0.25
    assert np.allclose(light(2, g, 1.25, -0.25, 0.25), np.where(x >= 0.2, bent, 0.25), atol=0.3)
    expected = np.maximum.accumulate(np.where(x >= d, (a * x + b) ** g, c * x))
    assert np.allclose(light(3, g, a, b, c, d), expected, atol=1e-4)
    assert np.allclose(light(4, g, a, b, c, d, 0.0, 0.0), expected, atol=1e-4)
    p3 = rgb_profile("p3")
    for wrong in (
        b"",
        p3[:100],
        p3[:128] + b"\xff" * 4 + p3[132:],
        p3.replace(b"para", b"xxxx"),
        p3.replace(b"rXYZ", b"A2B0"),
    ):
        assert colour.curves_of(wrong) is None


def metadata_of(path: Path) -> tuple[Image.Exif, bytes]:
    original = open_original(path, profile="original")  # which leaves the words on colour as they are
    exif = Image.Exif()
    exif.load(original.exif)
    return exif, original.xmp


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6" exif:ColorSpace="65535" '
    b'hdrgm:Version="1.0" GCamera:MotionPhoto="1" xmp:Rating="4"><xmp:Thumbnails>old</xmp:Thumbnails>'
    b"<dc:title>Rose</dc:title></rdf:Description></rdf:RDF></x:xmpmeta>"
)
IPTC = b"\x1c\x02\x78\x00\x0ba red rose." + b"\x1c\x02\x19\x00\x04rose"


@pytest.fixture
def camera_file(tmp_path: Path) -> Path:
    """A JPEG on its side with GPS, a maker note, XMP, IPTC, and times long ago."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Optics", 300.0
    exif.get_ifd(0x8769).update({0x927C: b"maker\0\1\2note" * 9, 0xA001: 65535, 0xA002: 48, 0xA003: 32, 0x829A: 0.008})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 12.0, 30.5)})
    path = tmp_path / "camera.jpg"
    Image.fromarray(PICTURE).save(path, exif=exif, xmp=XMP, icc_profile=rgb_profile("p3"), quality=95)
    content = path.read_bytes()
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC + bytes(len(IPTC) % 2)
    body = b"Photoshop 3.0\0" + resource
    path.write_bytes(content[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + content[2:])
    os.utime(path, ns=(1_000_000_000_123_456_789, 900_000_000_987_654_321))
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif", ".heic"])
@pytest.mark.parametrize("profile", ["srgb", "original"])
def test_metadata_stays(camera_file: Path, suffix: str, profile: str) -> None:
    original = open_original(camera_file, profile=profile)
    assert original.pixels.shape == (48, 32, 3)
    target = camera_file.with_name("b" + suffix)
    save_photo(original.pixels, target, like=original, keep_times=True)
    exif, xmp = metadata_of(target)
    camera, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert (exif[0x010F], exif.get(0x0112, 1), exif[0x011A]) == ("Optics", 1, 300)
    assert camera[0x927C] == b"maker\0\1\2note" * 9
    assert camera[0x829A] == 0.008
    assert (camera[0xA002], camera[0xA003]) == (32, 48)
    assert camera[0xA001] == (1 if profile == "srgb" else 65535)
    assert (place[1], place[2]) == ("N", (48.0, 12.0, 30.5))
    assert b'tiff:Orientation="1"' in xmp
    assert b"Rose" in xmp
    assert b'xmp:Rating="4"' in xmp
    assert (b'exif:ColorSpace="1"' in xmp) == (profile == "srgb")
    assert not any(word in xmp for word in (b"Thumbnails", b"hdrgm", b'MotionPhoto="1"'))
    assert open_original(target).iptc == (IPTC if suffix in (".jpg", ".tif") else b"")
    assert target.stat().st_mtime_ns == original.times[1]
    assert original.times[1] == 900_000_000_987_654_321
    again = open_original(target, profile=profile)
    assert np.abs(again.pixels.astype(float) - original.pixels).mean() / original.pixels.max() < 0.02


def test_the_exif_block_is_not_moved(camera_file: Path) -> None:
    """Maker notes hold offsets into the block: every byte but those that must change is where it was."""
    with Image.open(camera_file) as image:
        before = image.info["exif"]
    original = open_original(camera_file)
    assert len(original.exif) == len(before)
    changed = [i for i, (a, b) in enumerate(zip(before, original.exif, strict=True)) if a != b]
    assert 0 < len(changed) <= 8
    save_photo(original.pixels, camera_file.with_name("b.jpg"), like=original)
    with Image.open(camera_file.with_name("b.jpg")) as image:
        assert image.info["exif"] == original.exif


def test_the_mark_of_adobe_rgb_goes_when_the_colours_do(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 65535, 0xA005: {1: "R03"}})
    block = exif.tobytes()
    assert b"R03\0" in block
    Image.fromarray(PICTURE).save(tmp_path / "a.jpg", exif=block)
    assert b"R98\0" in open_original(tmp_path / "a.jpg").exif
    assert b"R03\0" in open_original(tmp_path / "a.jpg", profile="original").exif


def test_metadata_too_long_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = XMP + b" " * 70_000
    Image.fromarray(PICTURE).save(tmp_path / "a.webp", xmp=long)
    original = open_original(tmp_path / "a.webp")
    save_photo(original.pixels, tmp_path / "b.jpg", like=original)
    assert "XMP packet" in caplog.text
    assert open_original(tmp_path / "b.jpg").xmp == b""
    save_photo(original.pixels, tmp_path / "b.png", like=original)
    assert len(open_original(tmp_path / "b.png").xmp) > 65_536


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".avif", ".heic"])
def test_alpha_stays_beside_the_colours(tmp_path: Path, suffix: str) -> None:
    alpha = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    Image.fromarray(np.dstack((PICTURE, alpha))).save(tmp_path / "a.png")
    original = open_original(tmp_path / "a.png")
    assert original.alpha is not None
    assert np.array_equal(original.alpha, alpha)
    hidden = alpha == 0
    assert (original.pixels[hidden] == 255).all()
    assert np.array_equal(original.pixels[~hidden], PICTURE[~hidden])
    save_photo(original.pixels, tmp_path / ("b" + suffix), like=original, quality=100)
    again = open_original(tmp_path / ("b" + suffix)).alpha
    assert again is not None
    assert np.abs(again.astype(int) - alpha).max() <= (0 if suffix in (".png", ".tif", ".webp") else 3)
    save_photo(original.pixels, tmp_path / "c.bmp", like=original)
    flat = open_original(tmp_path / "c.bmp")
    over_white = 255 + (original.pixels.astype(float) - 255) * alpha[..., None] / 255
    assert flat.alpha is None
    assert np.abs(flat.pixels - over_white).max() <= 1


def test_cmyk_goes_back_into_its_profile(real_photos: Path, tmp_path: Path) -> None:
    source = real_photos / "awkward" / "cmyk_multi_segment_icc_swop.jpg"
    original = open_original(source, profile="original")
    for name in ("a.tif", "a.jpg"):
        save_photo(original.pixels, tmp_path / name, like=original, quality=100)
        with Image.open(tmp_path / name) as image, Image.open(source) as before:
            assert (image.mode, image.info["icc_profile"]) == ("CMYK", before.info["icc_profile"])
        again = open_original(tmp_path / name)
        assert np.abs(again.pixels.astype(int) - original.pixels).mean() < 2
    with pytest.raises(PhotoError, match="PNG holds no CMYK"):
        save_photo(original.pixels, tmp_path / "a.png", like=original)


def layers(path: Path) -> list[tuple[int, int]]:
    with Image.open(path) as image:
        return [layer[1:3] for layer in image.layer]  # type: ignore[attr-defined]


def test_chroma_and_lossless(tmp_path: Path) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for chroma, first in (("420", (2, 2)), ("422", (2, 1)), ("444", (1, 1)), (None, (1, 1))):
        save_photo(noise, tmp_path / "a.jpg", chroma=chroma)
        assert layers(tmp_path / "a.jpg") == [first, (1, 1), (1, 1)]
    for suffix in (".avif", ".heic"):
        sizes = []
        for chroma in ("420", "422", "444"):
            save_photo(noise, tmp_path / ("a" + suffix), chroma=chroma)
            sizes.append((tmp_path / ("a" + suffix)).stat().st_size)
        assert sizes == sorted(set(sizes)), suffix
    for suffix in (".webp", ".heic", ".png", ".tif", ".bmp"):
        path = tmp_path / ("b" + suffix)
        save_photo(noise, path, lossless=True)
        assert np.array_equal(open_original(path).pixels, noise), suffix


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("a.webp", {"chroma": "444"}, "WEBP has no chroma 444, only 420"),
        ("a.jpg", {"lossless": True}, "JPEG cannot be written lossless: use one of PNG"),
        ("a.avif", {"lossless": True}, "AVIF cannot be written lossless"),
        ("a.jpg", {"bits": 16}, "JPEG is written with 8 bits a channel: 16 go into PNG and TIFF"),
    ],
)
def test_what_a_format_does_not_hold_is_refused(tmp_path: Path, name: str, options: dict, reason: str) -> None:
    with pytest.raises(PhotoError, match=reason):
        save_photo(PICTURE, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="bits = 12"):
        open_original(tmp_path / "a.png", bits=12)
    with pytest.raises(ValueError, match="profile = 'p3'"):
        open_original(tmp_path / "a.png", profile="p3")
    with pytest.raises(ValueError, match="chroma = '411'"):
        save_photo(PICTURE, tmp_path / "b.jpg", chroma="411")
    for wrong in (PICTURE.astype(float), PICTURE[None], PICTURE[:0], np.dstack([PICTURE] * 2)):
        with pytest.raises(ValueError, match="pixels are uint8 or uint16"):
            save_photo(wrong, tmp_path / "b.png")


def test_depths_are_changed_by_rounding(tmp_path: Path) -> None:
    samples = np.arange(0, 65536, 7, dtype=np.uint16)[None]
    save_photo(samples, tmp_path / "a.png", bits=8)
    assert np.array_equal(png_samples((tmp_path / "a.png").read_bytes())[0, :, 0], np.rint(samples[0] / 257))
    save_photo(np.arange(256, dtype=np.uint8)[None], tmp_path / "b.png", bits=16)
    assert np.array_equal(png_samples((tmp_path / "b.png").read_bytes())[0, :, 0], np.arange(256) * 257)


def test_a_deep_picture_in_another_kind_of_profile_says_what_is_lost(
    real_photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Image.open(real_photos / "awkward" / "cmyk_multi_segment_icc_swop.jpg") as image:
        press = image.info["icc_profile"]
    chunk = (b"iCCP", b"x\0\0" + zlib.compress(press))
    path = written(tmp_path / "a.png", png(deep_noise(8, 8, 3), 2, chunks=(chunk,)))
    with caplog.at_level(logging.WARNING, "cyclegan_fast.photo"):
        assert open_original(path).pixels.dtype == np.uint16
    assert "converted with 8 bits" in caplog.text


def test_damaged_deep_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    good = {"a.png": png(deep_noise(20, 20, 3), 2), "a.tif": deep.tiff(deep_noise(20, 20, 3), tags={})}
    usable = 0
    for name, content in good.items():
        for trial in range(80):
            damaged = bytearray(content)
            for position in rng.integers(0, len(content) if trial % 2 else 200, 1 + trial % 5):
                damaged[position] = rng.integers(0, 256)
            try:
                usable += open_original(written(tmp_path / name, bytes(damaged[: len(damaged) - trial % 3]))).bits > 0
            except PhotoError:
                continue
    assert usable < 80


def test_blocks_of_metadata_may_be_anything(tmp_path: Path) -> None:
    camera = camera_exif(6)
    for block in (camera[:40], b"Exif\0\0" + bytes(50), b"Exif\0\0MM\0*" + b"\xff" * 60, camera.replace(b"MM", b"II")):
        Image.fromarray(PICTURE).save(tmp_path / "a.jpg", exif=block, xmp=b"<" * 500 + b"tiff:Orientation" * 400)
        original = open_original(tmp_path / "a.jpg")
        for suffix in (".tif", ".png", ".jpg"):
            save_photo(original.pixels, tmp_path / ("b" + suffix), like=original)
