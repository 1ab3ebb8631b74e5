"""Photographs from files to files through networks that change nothing: every awkward kind, in one batch."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from photo_files import (
    camera_exif,
    gray_profile,
    in_profile,
    in_srgb,
    png,
    png_samples,
    rgb_profile,
    tiff_colour,
    tiff_samples,
)
from PIL import Image, ImageOps
from tiny_models import save_run
from torch import nn

from cyclegan_fast.cli import main
from cyclegan_fast.data.photo import PhotoError, open_original, open_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference import files as module
from cyclegan_fast.inference.files import Result, translate_files
from cyclegan_fast.inference.translate import Translator

Y, X = np.mgrid[0:24, 0:36]
PICTURE = np.stack([40 + X * 4, 60 + Y * 5, 200 - X * 2 - Y], axis=-1).astype(np.uint8)
DEEP = (PICTURE.astype(np.uint16) << 8) + (X * 7 + Y).astype(np.uint16)[..., None] % 256
ALPHA = np.broadcast_to(np.where(X < 4, 0, 100 + X * 4), X.shape).astype(np.uint8)
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "AVIF": ".avif", "HEIF": ".heic"}


class Tint(nn.Module):
    """A network that answers with three channels of its own: what it was given, and its negative in the last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[:, :1], x[:, :1], -x[:, :1]), dim=1)


def identity(channels: int = 3) -> Translator:
    counts = {"channels_A": channels, "channels_B": channels}
    return Translator(nn.Identity(), nn.Identity(), **counts, device="cpu", precision="fp32")


def run(inputs: list[Path], out: Path, model: Translator | None = None, **options: Any) -> Result:
    return translate_files(model or identity(), inputs, out, progress=False, **options)


def encoded(image: Image.Image | np.ndarray, name: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if name == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, quality=95, chroma=444, **options)
    else:
        image.save(buffer, name, **({"quality": 98, "subsampling": "4:4:4"} if name == "JPEG" else {}), **options)
    return buffer.getvalue()


def chunk_of(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"x\0\0" + zlib.compress(profile)


def several(name: str, **options: Any) -> bytes:
    frames = [Image.new("RGB", (8, 8), (80 * i, 9, 9)) for i in range(3)]
    return encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)


def bomb() -> bytes:
    content = bytearray(png(PICTURE, 2, depth=8))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def ten_bits() -> bytes:
    heif = pillow_heif.from_bytes("RGB;16", (36, 24), (DEEP & 0xFFC0).tobytes())
    buffer = io.BytesIO()
    heif.save(buffer, quality=-1, chroma=444)
    return buffer.getvalue()


@dataclass(frozen=True)
class Kind:
    """One awkward file: its bytes, and what has to come out of a network that changes nothing.

    ``pixels``: what the output shows in sRGB (alpha included), to within ``off`` levels of 255 (None: not compared);
    ``mode`` and ``bits`` of the output file; or ``refused``: words of the error.
    """

    name: str
    content: Callable[[], bytes]
    pixels: np.ndarray | None = None
    off: float = 0
    mode: str = "RGB"
    bits: int = 8
    refused: str = ""


GRAY = PICTURE[..., 0]
RGBA = np.dstack((PICTURE, ALPHA))
WHITENED = np.where(RGBA[..., 3:] == 0, [255, 255, 255, 0], RGBA).astype(np.uint8)
GRAY_ALPHA = np.dstack((GRAY, np.maximum(ALPHA, 1)))
P3, ADOBE = (np.rint(in_profile(name, PICTURE / 255) * 255).astype(np.uint8) for name in ("p3", "adobe"))
FROM_P3, FROM_ADOBE = (
    np.rint(in_srgb(name, values / 255) * 255).astype(np.uint8) for name, values in (("p3", P3), ("adobe", ADOBE))
)
CMYK = Image.fromarray(PICTURE).convert("CMYK")
TURNED = {
    1: PICTURE,
    2: PICTURE[:, ::-1],
    3: PICTURE[::-1, ::-1],
    4: PICTURE[::-1],
    5: PICTURE.swapaxes(0, 1),
    6: PICTURE.swapaxes(0, 1)[:, ::-1],
    7: PICTURE.swapaxes(0, 1)[::-1, ::-1],
    8: PICTURE.swapaxes(0, 1)[::-1],
}
PALETTE = Image.fromarray(PICTURE).quantize(16)
LEVELS = Image.fromarray(GRAY).point(lambda v: 255 * (v > 90)).convert("1")

KINDS = [
    *(
        Kind(f"turned{n}.png", lambda n=n: encoded(PICTURE, "PNG", exif=camera_exif(n)), upright)  # type: ignore[misc]
        for n, upright in TURNED.items()
    ),
    Kind("turned6.jpg", lambda: encoded(PICTURE, "JPEG", exif=camera_exif(6)), TURNED[6], 6),
    Kind("turned6.heic", lambda: encoded(PICTURE, "HEIF", exif=camera_exif(6)), TURNED[6], 12),
    Kind("display_p3.png", lambda: encoded(P3, "PNG", icc_profile=rgb_profile("p3")), FROM_P3, 2),
    Kind("adobe_rgb.tif", lambda: encoded(ADOBE, "TIFF", icc_profile=rgb_profile("adobe")), FROM_ADOBE, 2),
    Kind("gray.png", lambda: encoded(GRAY, "PNG"), GRAY, mode="L"),
    Kind("gray.jpg", lambda: encoded(GRAY, "JPEG"), GRAY, 3, mode="L"),
    Kind("gray_gamma.png", lambda: encoded(GRAY, "PNG", icc_profile=gray_profile(2.2)), GRAY, 6, mode="L"),
    Kind("bilevel.png", lambda: encoded(LEVELS, "PNG"), np.asarray(LEVELS.convert("L")), mode="L"),
    Kind("cmyk.tif", lambda: encoded(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    Kind("cmyk.jpg", lambda: encoded(CMYK, "JPEG"), np.asarray(CMYK.convert("RGB")), 9),
    Kind("deep.png", lambda: png(DEEP, 2), DEEP, bits=16),
    Kind("deep.tif", lambda: tiff_colour(DEEP), DEEP, bits=16),
    Kind("deep_gray.png", lambda: png(DEEP[..., 1], 0), DEEP[..., 1], mode="L", bits=16),
    Kind("deep_gray_alpha.png", lambda: png(DEEP[..., :2], 4), DEEP[..., :2], mode="LA", bits=16),
    Kind("deep_alpha.png", lambda: png(DEEP[..., [0, 1, 2, 1]], 6), DEEP[..., [0, 1, 2, 1]], mode="RGBA", bits=16),
    Kind("deep_p3.png", lambda: png(DEEP, 2, chunks=(chunk_of(rgb_profile("srgb")),)), DEEP, bits=16),
    Kind("ten_bits.heic", ten_bits, PICTURE, 8),
    Kind("palette.png", lambda: encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    Kind(
        "palette_alpha.png",
        lambda: encoded(PALETTE, "PNG", transparency=bytes([200] * 16)),
        np.dstack((np.asarray(PALETTE.convert("RGB")), np.full_like(GRAY, 200))),
        mode="RGBA",
    ),
    Kind("alpha.png", lambda: encoded(RGBA, "PNG"), WHITENED, mode="RGBA"),
    Kind("alpha.webp", lambda: encoded(RGBA, "WEBP", lossless=True), WHITENED, 40, mode="RGBA"),
    Kind("gray_alpha.png", lambda: encoded(GRAY_ALPHA, "PNG"), GRAY_ALPHA, mode="LA"),
    Kind("plain.webp", lambda: encoded(PICTURE, "WEBP", lossless=True), PICTURE, 30),
    Kind("plain.avif", lambda: encoded(PICTURE, "AVIF", quality=95), PICTURE, 8),
    Kind("plain.bmp", lambda: encoded(PICTURE, "BMP"), PICTURE),
    Kind("plain.ppm", lambda: encoded(PICTURE, "PPM"), PICTURE),
    Kind("a_png_named.jpg", lambda: encoded(PICTURE, "PNG"), PICTURE, 4),
    Kind("a_jpeg_named.png", lambda: encoded(PICTURE, "JPEG"), PICTURE, 6),
    Kind("two_pictures.jpg", lambda: several("MPO"), np.full((8, 8, 3), (0, 9, 9), np.uint8), 3),
    Kind("still.gif", lambda: encoded(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
    Kind("one_pixel.png", lambda: encoded(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1]),
    Kind("bad_profile.png", lambda: encoded(PICTURE, "PNG", icc_profile=b"nonsense"), PICTURE),
    Kind("bad_exif.jpg", lambda: encoded(PICTURE, "JPEG", exif=b"Exif\0\0nonsense"), PICTURE, 6),
    Kind("truncated.jpg", lambda: encoded(PICTURE, "JPEG")[:-200], refused="truncated"),
    Kind("truncated.png", lambda: png(DEEP, 2)[:-300], refused="truncated|broken|cannot be read"),
    Kind("truncated.heic", lambda: encoded(PICTURE, "HEIF")[:-100], refused="damaged|cannot be read|Invalid"),
    Kind("bomb.png", bomb, refused="3600 megapixels"),
    Kind("empty.jpg", bytes, refused="0 bytes"),
    Kind("text.jpg", lambda: b"Dear Sir or Madam", refused="not a picture in a known format"),
    Kind("moving.gif", lambda: several("GIF"), refused="animation of 3 frames"),
    Kind("moving.png", lambda: several("PNG"), refused="animation of 3 frames"),
    Kind("moving.webp", lambda: several("WEBP"), refused="animation of 3 frames"),
    Kind("moving.avif", lambda: several("AVIF"), refused="animation of 3 frames"),
    Kind("pages.tif", lambda: several("TIFF"), refused="document of 3 pages"),
]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """All kinds in one folder, translated at once: the names differ in more than the suffix where HEIC becomes JPEG."""
    folder = tmp_path_factory.mktemp("awkward")
    for kind in KINDS:
        (folder / f"{kind.name.replace('.', '_')}{Path(kind.name).suffix}").write_bytes(kind.content())
    out = tmp_path_factory.mktemp("out")
    return out, run([folder], out)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_awkward_file_is_right_or_clearly_refused(kind: Kind, batch: tuple[Path, Result]) -> None:
    out, result = batch
    stem = kind.name.replace(".", "_")
    written = [path for path in result.done if path.stem == stem]
    reasons = [reason for path, reason in result.failed if path.stem == stem]
    if kind.refused:
        assert written == []
        assert not list(out.glob(f"{stem}.*"))
        assert re.search(kind.refused, reasons[0]), reasons
        return
    assert (reasons, len(written)) == ([], 1)
    path = written[0]
    alpha = kind.mode in ("LA", "RGBA")
    original = open_original(path, {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[kind.mode])
    assert (original.bits, original.gray, original.alpha) == (kind.bits, kind.mode in ("L", "LA"), None)
    assert (open_original(path, 3).alpha is not None) == alpha
    assert kind.pixels is not None
    shown = original.pixels if kind.pixels.ndim == 3 else original.pixels[..., 0]
    assert shown.dtype == kind.pixels.dtype
    visible = kind.pixels[..., -1] > 0 if alpha else np.ones(shown.shape[:2], bool)
    assert np.abs(shown.astype(int) - kind.pixels)[visible].max() <= kind.off
    assert not alpha or np.array_equal(shown[..., -1], kind.pixels[..., -1])
    exif = Image.Exif()
    exif.load(original.exif)
    assert exif.get(0x0112, 1) == 1
    assert exif.get(0x010F) == ("Optics" if kind.name.startswith("turned") else None)


def test_the_batch_is_in_order_and_leaves_nothing_else(batch: tuple[Path, Result]) -> None:
    out, result = batch
    assert len(result.done) + len(result.failed) == len(KINDS)
    assert result.done == sorted(result.done, key=lambda path: path.stem + path.suffix)
    assert sorted(out.iterdir()) == sorted(result.done)


# What an unchanging network must make of the real ones: (mode, bits) of the output as PNG, or the reason.
REAL: dict[str, tuple[str, int] | str] = {
    "adobe_rgb_canon7d_600x900.jpg": ("RGB", 8),
    "animated.gif": "animation of 30 frames",
    "big_height.webp": "animation of 97 frames",
    "broken_data_stream.png": "unrecognized data stream",
    "centered_image.jpeg": ("RGB", 8),
    "cmyk_multi_segment_icc_swop.jpg": ("RGB", 8),
    "cmyk_no_profile.jpg": ("RGB", 8),
    "flickr_photo_unavailable_placeholder.png": ("RGB", 8),
    "flowers_ok.jpeg": ("RGB", 8),
    "gray.jpg": ("L", 8),
    "gray_bad_exif.jpg": ("L", 8),
    "invalid_exif_image01137.jpg": ("RGB", 8),
    "not_an_image_beach.jpg": "damaged",
    "official_testA_truncated_gray.png": ("RGB", 8),
    **{f"orient_landscape_{n}.jpg": ("RGB", 8) for n in (1, 2, 3, 7, 8)},
    **{f"orient_portrait_{n}.jpg": ("RGB", 8) for n in (3, 6)},
    "png16_gray_alpha.png": ("LA", 16),
    "png16_gray_alpha_small.png": ("LA", 16),
    "png16_rgb.png": ("RGB", 16),
    "png16_rgb_trns.png": ("RGBA", 16),
    "png_display_p3.png": ("RGBA", 8),
    "png_palette_alpha.png": ("RGB", 8),  # the palette has none
    "png_xyz.png": ("RGB", 8),
    "tiff16_gray.tif": ("L", 16),
    "tiny_2x2.png": ("RGB", 8),
    "truncated_2725x2225.jpg": "truncated",
    "truncated_small.png": "truncated",
    "ultrahdr_truncated_1512x2688.jpg": "truncated",
}


@pytest.mark.parametrize("profile", ["srgb", "original"])
def test_the_real_awkward_files(real_photos: Path, tmp_path: Path, profile: str) -> None:
    """The colours of every one stay within a level, by both profiles; those that cannot be read are listed."""
    folder = real_photos / "awkward"
    assert {path.name for path in folder.iterdir()} == REAL.keys()
    result = run(sorted(folder.iterdir()), tmp_path, format="tif", profile=profile)
    failed = {path.name: reason for path, reason in result.failed}
    assert failed.keys() == {name for name, expected in REAL.items() if isinstance(expected, str)}
    for name, expected in REAL.items():
        if isinstance(expected, str):
            assert expected in failed[name]
            continue
        target = tmp_path / (Path(name).stem + ".tif")
        before, after = open_original(folder / name), open_original(target)
        assert after.bits == expected[1], name
        assert (after.alpha is not None) == expected[0].endswith("A"), name
        space = before.icc_profile[16:20] if before.icc_profile else b""
        assert profile == "srgb" or after.icc_profile == before.icc_profile, name
        if profile == "original" and space == b"CMYK":
            continue  # its inks have other colours, and a test of their own
        wide = open_original(folder / name, profile=profile)
        if wide.pixels.itemsize > before.pixels.itemsize:  # compared is what is stored, where sRGB has the colour
            inside = ((wide.pixels > 0) & (wide.pixels < 65535)).all(axis=-1)
            with Image.open(folder / name) as stored, Image.open(target) as back:
                pairs = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")), np.asarray(back.convert("RGB"))
            difference = np.abs(pairs[0].astype(int) - pairs[1])[inside]
            assert inside.mean() > 0.2 or name == "png_display_p3.png"  # all of it the red that sRGB has not
        else:
            difference = np.abs(after.pixels.astype(int) - before.pixels) / (257 if expected[1] == 16 else 1)
        assert difference.max(initial=0) <= 1, name


@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_colours_stay_within_a_level_by_both_profiles(tmp_path: Path, name: str) -> None:
    values = np.rint(in_profile(name, np.random.default_rng(0).random((60, 80, 3))) * 255).astype(np.uint8)
    source = tmp_path / "a.png"
    source.write_bytes(encoded(values, "PNG", icc_profile=rgb_profile(name)))
    run([source], tmp_path / "original", profile="original")
    run([source], tmp_path / "srgb")
    back = png_samples((tmp_path / "original" / "a.png").read_bytes())
    assert np.abs(back.astype(int) - values).max() <= 1
    with Image.open(tmp_path / "original" / "a.png") as image:
        assert image.info["icc_profile"] == rgb_profile(name)
    assert np.array_equal(png_samples((tmp_path / "srgb" / "a.png").read_bytes()), open_photo(source).image)


def test_a_network_is_given_all_16_bits(tmp_path: Path) -> None:
    """Halving in the network, and 16 bits out: no value of the input has been cut to 8."""
    source = tmp_path / "a.png"
    ramp = np.arange(0, 65536, 5, dtype=np.uint16).reshape(1, -1)
    source.write_bytes(png(np.dstack([ramp] * 3), 2))

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 1) / 2

    model = Translator(Half(), Half(), device="cpu", precision="fp32")
    run([source], tmp_path / "same", model)
    assert np.abs(png_samples((tmp_path / "same" / "a.png").read_bytes())[0, :, 0] - ramp[0] / 2).max() <= 0.51
    run([source], tmp_path / "eight", model, depth=8)
    assert png_samples((tmp_path / "eight" / "a.png").read_bytes()).dtype == np.uint8
    run([source], tmp_path / "tiff", model, format="tif")
    tiff = tiff_samples((tmp_path / "tiff" / "a.tif").read_bytes())
    assert np.abs(tiff[0, :, 0] - ramp[0] / 2).max() <= 0.51


def test_16_bits_of_an_8_bit_picture_are_the_networks_own(tmp_path: Path) -> None:
    source = tmp_path / "a.jpg"
    source.write_bytes(encoded(PICTURE, "JPEG"))

    class Third(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 3

    model = Translator(Third(), Third(), device="cpu", precision="fp32")
    assert run([source], tmp_path / "out", model, depth=16, format="png").failed == []
    samples = png_samples((tmp_path / "out" / "a.png").read_bytes())
    assert samples.dtype == np.dtype(">u2")
    assert (samples % 257 != 0).mean() > 0.5
    result = run([source], tmp_path / "refused", model, depth=16)
    assert "JPEG is written with 8 bits a channel" in result.failed[0][1]


def test_16_bits_out_of_a_coarse_network_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(png(DEEP, 2))
    translate_files(Translator(nn.Identity(), nn.Identity(), device="cpu", precision="bf16"), [source], tmp_path / "b")
    assert "1 pictures were written with 16 bits a channel, but computed in bf16" in caplog.text


def test_gray_stays_gray_unless_the_model_is_to_colour_it(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(encoded(GRAY, "PNG"))
    tint = Translator(Tint(), Tint(), device="cpu", precision="fp32")
    run([source], tmp_path / "keep", tint)
    run([source], tmp_path / "model", tint, gray="model")
    coloured = np.dstack((GRAY, GRAY, 255 - GRAY))
    assert np.array_equal(open_photo(tmp_path / "model" / "a.png").image, coloured)
    kept = png_samples((tmp_path / "keep" / "a.png").read_bytes())[..., 0]
    assert np.abs(kept - coloured @ [0.299, 0.587, 0.114]).max() <= 0.51
    colourer = Translator(Tint(), Tint(), channels_A=1, channels_B=3, device="cpu", precision="fp32")
    run([source], tmp_path / "colourer", colourer)  # which is there to colour gray pictures
    assert np.array_equal(open_photo(tmp_path / "colourer" / "a.png").image, coloured)
    run([source], tmp_path / "gray_model", identity(1))
    assert np.array_equal(png_samples((tmp_path / "gray_model" / "a.png").read_bytes())[..., 0], GRAY)


def test_times_are_kept_on_request(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(encoded(PICTURE, "PNG"))
    os.utime(source, ns=(10**18, 9 * 10**17))
    run([source], tmp_path / "kept", keep_times=True)
    run([source], tmp_path / "new")
    assert (tmp_path / "kept" / "a.png").stat().st_mtime_ns == 9 * 10**17
    assert (tmp_path / "new" / "a.png").stat().st_mtime_ns > 10**18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chroma": "411"}, "chroma = '411' is not allowed: one of None, 420, 422, 444"),
        ({"depth": 12}, "depth = 12 is not allowed: one of 8, 16, same"),
        ({"profile": "p3"}, "profile = 'p3' is not allowed: one of srgb, original"),
        ({"gray": "maybe"}, "gray = 'maybe' is not allowed: one of keep, model"),
    ],
)
def test_wrong_ways_to_write_are_refused_first(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run([tmp_path / "a.png"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_fails_before_it_is_translated(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(encoded(PICTURE, "WEBP"))
    model = identity()
    model.translate = lambda *_, **__: pytest.fail("translated")  # type: ignore[assignment, method-assign]
    assert "WEBP has no chroma 444" in run([tmp_path / "a.webp"], tmp_path / "out", model, chroma="444").failed[0][1]


def test_a_full_disk_ends_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(12):
        (tmp_path / f"{index:02}.png").write_bytes(encoded(PICTURE, "PNG"))
    really_save, saves = module.save_photo, []

    def full(image: Any, path: Path, **options: Any) -> None:
        saves.append(path.stem)
        if path.stem >= "02":
            raise PhotoError(path, "cannot be written: No space left") from OSError(28, "No space left on device")
        really_save(image, path, **options)

    monkeypatch.setattr(module, "save_photo", full)
    result = run([tmp_path], tmp_path / "out")
    assert [path.stem for path in result.done] == ["00", "01"]
    assert len(result.failed) == 10
    assert result.failed[-1][1] == "not begun: the disk is full"
    assert len(saves) < 8


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with it ignored
sys.path.insert(0, {tests!r})
from test_photographs import identity, translate_files
model = identity()
really = model.translate
def slow(*arguments, **options):
    time.sleep(0.2)
    return really(*arguments, **options)
model.translate = slow
try:
    translate_files(model, [{folder!r}], {out!r}, progress=False)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_leaves_whole_files_only(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index:02}.png").write_bytes(png(np.random.default_rng(index).integers(0, 9999, (400, 300, 3)), 2))
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(folder), out=str(out))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    written = list(out.iterdir())
    assert 0 < len(written) < 60
    for path in written:
        assert path.suffix == ".png"
        assert open_original(path).pixels.shape == (400, 300, 3)


def test_the_command_has_every_choice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each flag changes the file: depth and profile of a TIFF, chroma of a JPEG, a lossless WebP, gray, times."""
    run_folder = str(save_run(tmp_path / "run"))
    source, gray = tmp_path / "a.png", tmp_path / "gray.png"
    source.write_bytes(encoded(P3, "PNG", icc_profile=rgb_profile("p3")))
    gray.write_bytes(encoded(GRAY, "PNG"))
    os.utime(source, ns=(10**18, 9 * 10**17))

    def translated(name: str, *flags: str, path: Path = source) -> Path:
        out = tmp_path / name
        assert main(["translate", run_folder, str(path), "-o", str(out), "--precision", "fp32", *flags]) == 0
        return next(out.iterdir())

    deep = open_original(translated("t", "--format", "tif", "--depth", "16", "--profile", "original", "--keep-times"))
    assert (deep.bits, deep.icc_profile, deep.times[1]) == (16, rgb_profile("p3"), 9 * 10**17)
    with Image.open(translated("j", "--format", "jpg", "--chroma", "422", "--quality", "80")) as image:
        assert image.layer[0][1:3] == (2, 1)  # type: ignore[attr-defined]
    plain, lossless = translated("p"), translated("w", "--format", "webp", "--lossless")
    assert np.array_equal(open_original(lossless).pixels, open_original(plain).pixels)
    assert open_original(translated("h", "--format", "heic")).format == "HEIF"
    assert open_original(translated("g", path=gray)).gray
    assert "1 gray pictures were kept gray" in capfd.readouterr().err
    assert not open_original(translated("m", "--gray", "model", path=gray)).gray
