"""Surfaces in three dimensions -> one picture layer: point splatting with a z-buffer and deferred shading.

Coordinates are in frame widths: x right, y down, z towards the camera, the frame is [0, 1] x [0, 1], the projection
orthographic within a layer. Colours are linear light, float32. Everything a plant is made of is one of two
primitives, held as structures of arrays so that a layer costs a few numpy calls whatever the number of petals:
`Blades` (petals, leaves, grass, stems) and `Blobs` (seeds, anthers, berries, lamps).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]

_SAMPLES_PER_PIXEL = 1.3  # along each direction of a surface: fewer leaves holes, more only costs time
_CHUNK = 3_000_000  # points held at a time, which bounds the memory of a 4096 px picture


@dataclass(frozen=True)
class Light:
    """Sun and sky. `direction`: unit vector towards the sun; colours linear RGB, 1 = a white surface facing the sun."""

    direction: Floats
    sun: Floats
    sky: Floats
    bounce: Floats


@dataclass(frozen=True)
class Blades:
    """n curved strips with one outline: a centre line that leaves `base` along `out`, and a width about it.

    With t in [0, 1] along the strip and v in [-1, 1] across it, the centre line turns from `out` towards `normal` by
    the angle elevation + curl t (radians); the half-width is width * t^a (1 - t)^b (its maximum scaled to 1) for
    outline (a, b); cup, twist and ruffle lift the strip off its centre line. All arrays have n rows.
    """

    base: Floats
    out: Floats
    normal: Floats
    length: Floats
    width: Floats
    elevation: Floats
    curl: Floats
    cup: Floats
    sway: Floats
    phase: Floats
    inner: Floats
    outer: Floats
    edge: Floats
    outline: tuple[float, float] = (0.6, 0.8)
    twist: float = 0.0
    ruffle: float = 0.0
    notch: tuple[float, float] = (0.0, 1.0)  # depth of the notches in the tip, in lengths; how many
    veins: tuple[float, float, float] = (0.0, 0.0, 0.0)  # count across, strength, slant (0 along, 1 as on a leaf)
    blotch: float = 0.35  # how far the inner colour reaches, in lengths
    gloss: float = 0.1
    through: float = 0.35  # share of the light that comes through from behind

    def __len__(self) -> int:
        return len(self.length)

    @property
    def side(self) -> Floats:
        return np.cross(self.normal, self.out).astype(np.float32)

    def take(self, rows: slice) -> Blades:
        """The blades `rows`."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.type == "Floats"}
        return replace(self, **arrays)

    def width_at(self, t: Floats) -> Floats:
        a, b = self.outline
        peak = a / (a + b) if a + b > 0 else 0.5
        top = peak**a * (1 - peak) ** b
        return (t**a * (1 - t) ** b / top).astype(np.float32)

    def grid(self, side: int) -> tuple[Floats, Floats]:
        """Samples (t, v) that leave no hole at `side` pixels a frame."""
        rows = int(float(self.length.max()) * side * _SAMPLES_PER_PIXEL) + 3
        columns = int(2 * float((self.width * np.maximum(1, np.abs(self.cup))).max()) * side * _SAMPLES_PER_PIXEL) + 2
        t = (np.arange(rows, dtype=np.float32) + 0.5) / rows
        v = (2 * (np.arange(columns, dtype=np.float32) + 0.5) / columns - 1).astype(np.float32)
        return t, v

    def points(self, t: Floats, v: Floats) -> list[Floats]:
        """x, y, z of every sample, each [n, len(t), len(v)]."""
        angle = self.elevation[:, None] + self.curl[:, None] * t
        curl = np.where(np.abs(self.curl) < 1e-3, np.float32(1e-3), self.curl)[:, None]
        sine, cosine = np.sin(angle), np.cos(angle)
        start = self.elevation[:, None]
        along = self.length[:, None] * (sine - np.sin(start)) / curl
        lift = self.length[:, None] * (np.cos(start) - cosine) / curl
        width = self.width[:, None] * self.width_at(t)
        height = self.cup[:, None, None] * (v * v) + self.twist * v
        if self.ruffle:
            height = height + self.ruffle * np.sin(self._ruffle_angle(t[:, None], v, self.phase[:, None, None])) * (v * v)
        height = height * width[:, :, None]
        along, lift = along[:, :, None] - height * sine[:, :, None], lift[:, :, None] + height * cosine[:, :, None]
        if self.notch[0]:
            depth = self.length[:, None, None] * (self.notch[0] * t**3)[:, None] * np.cos(np.pi * self.notch[1] * v)
            along, lift = along - depth * cosine[:, :, None], lift - depth * sine[:, :, None]
        across = width[:, :, None] * v + ((self.sway * self.length)[:, None] * t**2)[:, :, None]
        side = self.side
        return [
            self.base[:, c, None, None]
            + along * self.out[:, c, None, None]
            + lift * self.normal[:, c, None, None]
            + across * side[:, c, None, None]
            for c in range(3)
        ]

    @staticmethod
    def _ruffle_angle(t: Floats, v: Floats, phase: Floats) -> Floats:
        return phase + 13 * t + 2.2 * v

    def shade(self, which: Ints, t: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [m, 3] of m samples (blade `which`, t, v): sun, sky, light through the blade, gloss."""
        angle = self.elevation[which] + self.curl[which] * t
        sine, cosine = np.sin(angle), np.cos(angle)
        across = 2 * self.cup[which] * v + self.twist
        along = np.float32(0)
        if self.ruffle:
            wave = self._ruffle_angle(t, v, self.phase[which])
            across = across + self.ruffle * 2 * v * np.sin(wave)
            along = self.ruffle * 13 * v * v * np.cos(wave) * (self.width / self.length)[which]
        pattern, groove = self._veins(t, v)
        across = across + groove
        scale = 1 / np.sqrt(1 + across * across + along * along)
        side = self.side
        half = light.direction + np.array([0, 0, 1], np.float32)
        half = half / np.linalg.norm(half)

        def facing(axis: Floats) -> Floats:
            """Cosine between the surface normal and a unit vector."""
            out, normal, sideways = (self.out @ axis)[which], (self.normal @ axis)[which], (side @ axis)[which]
            tangent = cosine * out + sine * normal
            return np.asarray((cosine * normal - sine * out - across * sideways - along * tangent) * scale)

        back = np.sign(facing(np.array([0, 0, 1], np.float32)))
        sun = facing(light.direction) * back
        up = -facing(np.array([0, 1, 0], np.float32)) * back
        glint = self.gloss * np.clip(facing(half) * back, 0, 1) ** 24
        direct = np.where(sun > 0, sun, -self.through * sun)
        colour = self._colour(which, t, v, pattern)
        ambient = (0.55 + 0.45 * up)[:, None] * (light.sky - light.bounce) + light.bounce
        return np.asarray(colour * (direct[:, None] * light.sun + ambient) + glint[:, None] * light.sun, np.float32)

    def _veins(self, t: Floats, v: Floats) -> tuple[Floats, Floats]:
        """Darkening of the colour by the veins, and the slope of the grooves they run in."""
        count, strength, slant = self.veins
        if not strength:
            return np.ones_like(t), np.zeros_like(t)
        where = (1 - slant) * v + slant * (t - 0.45 * np.abs(v))
        wave = np.pi * count * where
        line = np.cos(wave) ** 2
        pattern = 1 - strength * line**3 * (1 - 0.6 * t)
        if slant:  # a leaf has a pale midrib
            pattern = pattern * 0.9 + 0.45 * np.exp(-((v / 0.07) ** 2))
        return pattern.astype(np.float32), (0.5 * strength * np.sin(2 * wave)).astype(np.float32)

    def _colour(self, which: Ints, t: Floats, v: Floats, pattern: Floats) -> Floats:
        mix = np.clip((t - 0.12) / max(self.blotch, 1e-3), 0, 1)
        mix = (mix * mix * (3 - 2 * mix))[:, None]
        rim = np.maximum(v**4 * 0.8, np.clip(4 * t - 3, 0, 1) * 0.6)[:, None]
        colour = self.inner[which] * (1 - mix) + self.outer[which] * mix
        colour = colour * (1 - rim) + self.edge[which] * rim
        return np.asarray(colour * pattern[:, None])


@dataclass(frozen=True)
class Blobs:
    """n balls: centre [n, 3], radius [n], linear colour [n, 3]; `glow` adds light of the ball's own [n]."""

    centre: Floats
    radius: Floats
    colour: Floats
    glow: Floats
    gloss: float = 0.15

    def __len__(self) -> int:
        return len(self.radius)

    def take(self, rows: slice) -> Blobs:
        """The balls `rows`."""
        return replace(
            self, centre=self.centre[rows], radius=self.radius[rows], colour=self.colour[rows], glow=self.glow[rows]
        )

    def grid(self, side: int) -> tuple[Floats, Floats]:
        """Samples (u, v) of the unit disc, without holes at `side` pixels a frame."""
        count = int(2 * float(self.radius.max()) * side * _SAMPLES_PER_PIXEL) + 2
        line = 2 * (np.arange(count, dtype=np.float32) + 0.5) / count - 1
        u, v = np.meshgrid(line, line)
        inside = u * u + v * v <= 1.02
        return u[inside], v[inside]

    def points(self, u: Floats, v: Floats) -> list[Floats]:
        """x, y, z of every sample, each [n, len(u)]."""
        bulge = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        return [self.centre[:, c, None] + self.radius[:, None] * unit for c, unit in enumerate((u, v, bulge))]

    def shade(self, which: Ints, u: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [m, 3] of m samples."""
        bulge = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        x, y, z = (float(c) for c in light.direction)
        sun = np.clip(u * x + v * y + bulge * z, 0, 1)
        glint = self.gloss * sun**24
        ambient = (0.55 - 0.45 * v)[:, None] * (light.sky - light.bounce) + light.bounce
        lit = self.colour[which] * (sun[:, None] * light.sun + ambient + self.glow[which][:, None])
        return np.asarray(lit + glint[:, None] * light.sun, np.float32)


class Canvas:
    """A square layer being drawn: linear RGB, coverage and z of the nearest surface, `side` pixels a frame."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.rgb = np.zeros((side * side, 3), np.float32)
        self.z = np.full(side * side, -np.inf, np.float32)

    def draw(self, items: Blades | Blobs, light: Light) -> None:
        """Draw what is nearer than what is there."""
        if not len(items):
            return
        first, second = items.grid(self.side)
        per_item = len(first) if isinstance(items, Blobs) else len(first) * len(second)
        step = max(1, _CHUNK // per_item)
        for start in range(0, len(items), step):
            self._draw(items.take(slice(start, start + step)), first, second, per_item, light)

    def _draw(self, items: Blades | Blobs, first: Floats, second: Floats, per_item: int, light: Light) -> None:
        x, y, z = (np.asarray(axis, np.float32).ravel() for axis in items.points(first, second))
        pixels, points = self._nearest(x, y, z)
        nearer = z[points] > self.z[pixels]
        pixels, points = pixels[nearer], points[nearer]
        which, rest = np.divmod(points, per_item)
        if isinstance(items, Blobs):
            colour = items.shade(which, first[rest], second[rest], light)
        else:
            row, column = np.divmod(rest, len(second))
            colour = items.shade(which, first[row], second[column], light)
        self.rgb[pixels] = colour
        self.z[pixels] = z[points]

    def _nearest(self, x: Floats, y: Floats, z: Floats) -> tuple[Ints, Ints]:
        """Pixels hit by any point, and the nearest point of each."""
        column = np.floor(x * self.side).astype(np.int32)
        row = np.floor(y * self.side).astype(np.int32)
        inside = np.flatnonzero((column >= 0) & (column < self.side) & (row >= 0) & (row < self.side))
        if not len(inside):
            return inside, inside
        depth = z[inside]
        low, high = float(depth.min()), float(depth.max())
        # 16 bits are what numpy sorts by radix; a stable sort writes the nearest point of a pixel last.
        key = ((depth - low) * (65535 / max(high - low, 1e-6))).astype(np.uint16)
        points = inside[np.argsort(key, kind="stable")]
        hit = np.full(self.side * self.side, -1, np.int64)
        hit[(row[points] * self.side + column[points])] = points
        gap = np.flatnonzero((hit[1:-1] < 0) & (hit[:-2] >= 0) & (hit[2:] >= 0)) + 1
        hit[gap] = hit[gap - 1]
        pixels = np.flatnonzero(hit >= 0)
        return pixels, hit[pixels]

    def contact_shadows(self, light: Light, reach: float = 0.02, strength: float = 0.6) -> None:
        """Darken what lies behind something that stands towards the sun within about `reach` frames."""
        covered = np.isfinite(self.z)
        if not covered.any():
            return
        floor = self.z[covered].min()
        z = np.where(covered, self.z, floor).reshape(self.side, self.side)
        around = box_blur(z, max(1, round(reach * self.side)))
        shift = np.round(light.direction[:2] * reach * self.side).astype(int)
        around = np.roll(around, (-int(shift[1]), -int(shift[0])), axis=(0, 1))
        hidden = np.clip((around - z) / (1.6 * reach), 0, 1).ravel()
        self.rgb *= (1 - strength * hidden)[:, None]

    def layer(self, size: int) -> tuple[Floats, Floats]:
        """Premultiplied linear RGBA [4, size, size] and z [size, size] (the nearest surface; -inf where empty)."""
        factor = self.side // size
        covered = np.isfinite(self.z)
        rgba = np.concatenate([self.rgb.T * covered, covered[None].astype(np.float32)])
        if factor == 1:
            return rgba.reshape(4, size, size), self.z.reshape(size, size)
        blocks = rgba.reshape(4, size, factor, size, factor)
        averaged = sum(blocks[:, :, i, :, j] for i in range(factor) for j in range(factor)) / factor**2
        z = self.z.reshape(size, factor, size, factor).max(axis=(1, 3))
        return np.asarray(averaged, np.float32), z


def box_blur(image: Floats, radius: int) -> Floats:
    """Mean over (2 radius + 1)^2 pixels of [H, W]; the border is repeated."""
    window = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(image, ((radius + 1, radius), (0, 0)), mode="edge").cumsum(axis=0, dtype=np.float32)
        image = ((padded[window:] - padded[:-window]) / window).T
    return image


def fractal_noise(seed: int, size: int, cells: tuple[float, float], *, gain: float = 0.55, finest: float = 1.5) -> Floats:
    """Smooth noise [size, size] of mean 0 and standard deviation about 1.

    The coarsest grid has `cells` = (down, across) cells a frame; octaves are added until a cell is `finest` pixels, so
    that a larger picture of the same scene shows the same noise with more detail.
    """
    total = np.zeros((size, size), np.float32)
    power, octave = 0.0, 0
    while octave == 0 or max(cells) * 2**octave * finest <= size:
        rows, columns = (int(np.ceil(cell * 2**octave)) + 1 for cell in cells)
        grid = np.random.default_rng((seed, octave)).standard_normal((rows, columns), dtype=np.float32)
        box = (0.0, 0.0, columns - 1 + 1e-3, rows - 1 + 1e-3)
        smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC, box=box)
        total += np.asarray(smooth) * gain**octave
        power += gain ** (2 * octave)
        octave += 1
    return np.asarray(total / np.sqrt(power * 0.6), np.float32)
