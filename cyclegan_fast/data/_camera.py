"""Two cameras that look at the same scene: optics in linear light, then development to 8-bit sRGB."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from cyclegan_fast.data._raster import Floats, box_blur

_WIDEST = 20.0  # pixels: a disc of a larger radius is convolved on a coarser grid, so the cost does not grow with it
_POINT = 0.56  # pixels: a disc of a smaller radius lies within a pixel
_SAME_DISC = 0.35  # pixels: layers whose discs differ by less are blurred together
_STEPS = 60_000  # of light that the encoding tells apart


@dataclass(frozen=True)
class Lens:
    """Focal length (m), f-number, width of the sensor (m)."""

    focal: float
    aperture: float
    sensor: float

    def circle_of_confusion(self, depth: float, focus: float) -> float:
        """Diameter, in frame widths, of the disc that a point at `depth` metres makes with the lens focused at `focus`.

        Thin lens: c = A f |d - s| / (d (s - f)), where A = f / N is the width of the aperture, f the focal length, N
        the f-number, d the distance of the point and s the distance in focus; divided by the width of the sensor.
        """
        opening = self.focal / self.aperture
        disc = opening * self.focal * abs(depth - focus) / (depth * (focus - self.focal))
        return disc / self.sensor


PHONE = Lens(focal=0.0042, aperture=1.8, sensor=0.0056)


def dslr(aperture: float) -> Lens:
    """An 85 mm portrait lens on a full-frame sensor."""
    return Lens(focal=0.085, aperture=aperture, sensor=0.036)


class Exposure:
    """Light gathered on a sensor from layers of a scene, added from the farthest to the nearest.

    Each layer is spread by the disc of its distance, colour and coverage alike, and laid over what is behind it: a
    sharp flower does not bleed into the blurred background, and a blurred edge in front lets it through. Neighbouring
    layers with the same disc are spread together.
    """

    def __init__(self, lens: Lens, focus: float, size: int) -> None:
        self._lens, self._focus, self._size = lens, focus, size
        self._picture = np.zeros((4, size, size), np.float32)
        self._group: Floats | None = None
        self._radius = 0.0

    def add(self, depth: float, rgba: Floats) -> None:
        """Add premultiplied linear RGBA [4, S, S] at `depth` metres."""
        radius = self._lens.circle_of_confusion(depth, self._focus) * self._size / 2
        alike = abs(radius - self._radius) < _SAME_DISC or max(radius, self._radius) < _POINT
        if self._group is not None and alike:
            self._group = rgba + self._group * (1 - rgba[3])
            return
        self._flush()
        self._group, self._radius = rgba, radius

    def light(self) -> Floats:
        """Linear RGB [3, S, S] of all that was added."""
        self._flush()
        return self._picture[:3]

    def _flush(self) -> None:
        """Lay the group over the picture, in the rows it reaches."""
        if self._group is None:
            return
        rgba, self._group = self._group, None
        rows = np.flatnonzero(rgba[3].any(axis=1))
        if not len(rows):
            return
        reach = int(np.ceil(self._radius)) + 2
        part = slice(max(0, int(rows[0]) - reach), int(rows[-1]) + 1 + reach)
        blurred = disc_blur(rgba[:, part], self._radius)
        self._picture[:, part] *= 1 - blurred[3]
        self._picture[:, part] += blurred


def _low_pass(light: Floats) -> Floats:
    """The filter in front of a sensor, a little wider than a pixel: without it fine leaves would alias."""
    for axis in (1, 2):
        padded = np.pad(light, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = (padded[:, :-2], padded[:, 2:]) if axis == 1 else (padded[:, :, :-2], padded[:, :, 2:])
        light = light * np.float32(0.64) + (before + after) * np.float32(0.18)
    return light


def disc_blur(planes: Floats, radius: float) -> Floats:
    """Planes [C, H, W] convolved with a uniform disc of `radius` pixels and sum 1; the border is repeated.

    The disc is a stack of rows, each the difference of two entries of a running sum; fractional ends are interpolated,
    so that the disc has a smooth outline at any radius.
    """
    if radius < _POINT:
        return planes
    factor = int(np.ceil(radius / _WIDEST))
    if factor > 1:
        return _coarse_disc_blur(planes, radius, factor)
    channels, height, width = planes.shape
    reach = int(np.ceil(radius + 0.5))
    inner = (np.arange(8) + 0.5) / 8 - 0.5
    offsets = np.arange(reach + 1)
    half = np.sqrt(np.clip(radius**2 - (offsets[:, None] + inner) ** 2, 0, None)).mean(axis=1)
    pad = reach + 1
    padded = np.pad(planes, ((0, 0), (pad, pad), (pad + 1, pad)), mode="edge")
    sums = np.cumsum(padded, axis=2, dtype=np.float32)
    total = np.zeros((channels, height, width), np.float32)
    for offset, extent in zip(offsets.tolist(), half.tolist(), strict=True):
        if extent <= 0:
            continue
        row = _between(sums, extent, pad, width)
        total += row[:, pad + offset : pad + offset + height]
        if offset:
            total += row[:, pad - offset : pad - offset + height]
    return np.asarray(total / np.float32(4 * half.sum() - 2 * half[0]))


def _between(sums: Floats, extent: float, pad: int, width: int) -> Floats:
    """Integral of every row over [x + 0.5 - extent, x + 0.5 + extent], for x in [0, width)."""
    whole = int(np.floor(extent + 0.5))
    part = np.float32(extent + 0.5 - whole)
    # sums[k + 1] is the integral up to the right border of padded pixel k, pad pixels before the first pixel.
    right, left = pad + whole, pad + 1 - whole
    row = sums[:, :, right : right + width] - sums[:, :, left : left + width]
    row *= 1 - part
    ends = sums[:, :, right + 1 : right + 1 + width] - sums[:, :, left - 1 : left - 1 + width]
    ends *= part
    row += ends
    return row


def _coarse_disc_blur(planes: Floats, radius: float, factor: int) -> Floats:
    channels, height, width = planes.shape
    rows, columns = -(-height // factor), -(-width // factor)
    grow = ((0, 0), (0, rows * factor - height), (0, columns * factor - width))
    blocks = np.pad(planes, grow, mode="edge").reshape(channels, rows, factor, columns, factor).mean(axis=(2, 4))
    blurred = disc_blur(np.asarray(blocks, np.float32), radius / factor)
    full = (columns * factor, rows * factor)
    smooth = [np.asarray(Image.fromarray(p).resize(full, Image.Resampling.BILINEAR)) for p in blurred]
    return np.asarray(np.clip(np.stack(smooth)[:, :height, :width], 0, None))


def develop_phone(light: Floats, gain: float, seed: int) -> npt.NDArray[np.uint8]:
    """A phone's picture [S, S, 3]: clipped highlights, noise, lifted shadows, little colour, sharpening, JPEG."""
    rng = np.random.default_rng((seed, 0))
    size = light.shape[-1]
    # The merged exposures of a phone hold highlights back before they spread; what is left above 1 clips.
    raw = _low_pass(np.minimum(light * np.float32(gain * _metered(light, 1.35)), 1.6))
    raw = np.minimum(raw, 1)
    noise = rng.standard_normal((3, size, size), dtype=np.float32)
    coarse = rng.standard_normal((3, -(-size // 3), -(-size // 3)), dtype=np.float32)
    blotches = coarse.repeat(3, axis=1).repeat(3, axis=2)[:, :size, :size]
    deviation = np.sqrt(0.0005 * raw + 0.000006)
    raw = np.clip(raw + deviation * (noise + 0.5 * (blotches - blotches.mean(axis=0))), 0, 1)
    grey = luminance(raw)
    raw = np.clip(grey + 0.94 * (raw - grey), 0, 1) * np.array([0.97, 1.0, 1.02], np.float32)[:, None, None]
    picture = encode(raw) * 0.97 + 0.03
    return _jpeg(_to_bytes(_sharpen(picture, 0.9)), quality=86)


def develop_dslr(light: Floats, gain: float, seed: int) -> npt.NDArray[np.uint8]:
    """A DSLR's picture [S, S, 3]: a soft shoulder, contrast, colour, warm lights and cool shadows, vignette."""
    rng = np.random.default_rng((seed, 1))
    size = light.shape[-1]
    raw = _low_pass(light) * np.float32(gain * _metered(light, 0.95))
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    raw = raw * (1 - 0.16 * (line[:, None] ** 2 + line[None, :] ** 2))
    raw = raw * (1 + raw / 9) / (1 + 0.55 * raw) * 1.15
    raw = raw + np.sqrt(0.000015 * np.clip(raw, 0, 1)) * rng.standard_normal((3, size, size), dtype=np.float32)
    grey = luminance(raw)
    raw = np.clip(grey + 1.06 * (raw - grey), 0, 1)
    picture = encode(raw)
    picture = 0.55 * picture + 0.45 * picture * picture * (3 - 2 * picture)
    picture = _sharpen(picture, 0.4)
    tone = luminance(picture)
    warm = np.array([0.025, 0.008, -0.035], np.float32)[:, None, None]
    return _to_bytes(np.clip(picture + warm * (2 * tone - 0.75) * 1.2, 0, 1))


def _sharpen(picture: Floats, amount: float) -> Floats:
    """Unsharp mask on the lightness: the halo along edges is as wide as the mask."""
    lightness = luminance(picture)
    radius = max(1, round(picture.shape[-1] / 400))
    return np.asarray(np.clip(picture + np.float32(amount) * (lightness - box_blur(lightness, radius)), 0, 1))


def _metered(light: Floats, brightest: float) -> float:
    """Gain that brings the centre-weighted geometric mean of the luminance near 0.155, unless bright parts forbid it.

    A tenth of the frame may be brighter than `brightest`: what a large white flower needs.
    """
    step = max(1, light.shape[-1] // 64)
    bright = luminance(light[:, ::step, ::step])
    size = len(bright)
    line = np.exp(-((((np.arange(size) + 0.5) / size - 0.5) / 0.42) ** 2))
    weight = line[:, None] * line[None, :]
    mean = float(np.exp((np.log(bright + 0.01) * weight).sum() / weight.sum()))
    tenth = float(np.sort(bright, axis=None)[int(0.9 * bright.size)])
    return float(np.clip((0.155 / mean) ** 0.8, 0.4, min(2.5, max(0.4, brightest / max(tenth, 1e-3)))))


def luminance(rgb: Floats) -> Floats:
    """Weighted sum [H, W] of the planes of [3, H, W] (BT.709)."""
    return np.asarray(np.float32(0.2126) * rgb[0] + np.float32(0.7152) * rgb[1] + np.float32(0.0722) * rgb[2])


def encode(linear: Floats) -> Floats:
    """Linear light in [0, 1.05] as sRGB values (IEC 61966-2-1), to 0.0002."""
    return np.asarray(_encoded().take((linear * np.float32(_STEPS) + np.float32(0.5)).astype(np.intp)))


@lru_cache
def _encoded() -> Floats:
    """The sRGB value of each step of light."""
    light = np.arange(int(1.06 * _STEPS)) / _STEPS
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def _to_bytes(picture: Floats) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray((picture * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _jpeg(picture: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    """The picture after the phone's own JPEG (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer))
