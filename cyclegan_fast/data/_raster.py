"""Surfaces in three dimensions -> one picture layer: point splatting with a z-buffer and deferred shading.

Coordinates are in frame widths: x right, y down, z towards the camera, the frame is [0, 1] x [0, 1], the projection
orthographic within a layer. Colours are linear light, float32. Everything a plant is made of is one of two
primitives, held as structures of arrays so that a layer costs a few numpy calls whatever the number of petals:
`Blades` (petals, leaves, grass, stems) and `Blobs` (seeds, anthers, berries, lamps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.intp]  # what numpy indexes with: anything else is converted at every use

_SAMPLES_PER_PIXEL = 0.85  # along each direction of a surface; the holes this leaves are a pixel wide and get closed
_FEW = 40_000  # points below which a further call costs more than it saves
_CHUNK = 3_000_000  # points held at a time, which bounds the memory of a 4096 px picture


_DOWN, _TOWARDS = np.array([0, 1, 0], np.float32), np.array([0, 0, 1], np.float32)


@dataclass(frozen=True)
class Light:
    """Sun and sky. `direction`: unit vector towards the sun; colours linear RGB, 1 = a white surface facing the sun."""

    direction: Floats
    sun: Floats
    sky: Floats
    bounce: Floats

    @property
    def halfway(self) -> Floats:
        """Unit vector between the sun and the camera: the normal of a surface that mirrors one into the other."""
        both = self.direction + _TOWARDS
        return np.asarray(both / np.linalg.norm(both))


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
        """The direction across each blade, [n, 3]."""
        a, b = self.normal, self.out
        return np.stack([a[:, i - 2] * b[:, i - 1] - a[:, i - 1] * b[:, i - 2] for i in range(3)], axis=1)

    def take(self, rows: slice | Bools) -> Blades:
        """The blades `rows`."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.type == "Floats"}
        return replace(self, **arrays)

    def width_at(self, t: Floats) -> Floats:
        a, b = self.outline
        peak = a / (a + b) if a + b > 0 else 0.5
        top = peak**a * (1 - peak) ** b
        return np.asarray(t**a * (1 - t) ** b / top, np.float32)

    def extent(self) -> tuple[Floats, Floats]:
        """Length and width [n] as the camera sees them, in frames: a surface seen edge-on needs few samples."""
        angle = self.elevation[:, None] + self.curl[:, None] * np.array([0.0, 0.5, 1.0], np.float32)
        sine, cosine = np.sin(angle)[:, None], np.cos(angle)[:, None]
        out, normal = self.out[:, :2, None], self.normal[:, :2, None]
        along = np.sqrt(((cosine * out + sine * normal) ** 2).sum(axis=1)).max(axis=1)
        upright = np.sqrt(((cosine * normal - sine * out) ** 2).sum(axis=1)).max(axis=1)
        steep = 1.4 * np.abs(self.cup) + abs(self.twist) + self.ruffle
        across = np.sqrt((self.side[:, :2] ** 2).sum(axis=1)) + steep * upright
        # Where the blade widens or narrows, its lifted edges climb along it.
        along = along + 0.6 * steep * upright * (self.width / self.length) + self.ruffle + self.notch[0]
        return self.length * np.minimum(1.3, along + 0.1), 2 * self.width * np.minimum(1.3, across + 0.1)

    def grid(self, side: int, extent: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Samples (t, v) that leave no hole at `side` pixels a frame."""
        rows, columns = (int(float(size.max()) * side * _SAMPLES_PER_PIXEL) + 2 for size in extent)
        t = np.asarray((np.arange(rows, dtype=np.float32) + 0.5) / rows, np.float32)
        if self.outline[1] < 0.5:  # a blunt tip narrows within a pixel: there the edge needs rows of its own
            tip = 1 - np.geomspace(0.02, 6, min(24, rows // 4), dtype=np.float32) / rows
            t = np.concatenate([t, tip])
        v = 2 * (np.arange(columns, dtype=np.float32) + 0.5) / columns - 1
        return t, np.asarray(v, np.float32)

    def points(self, t: Floats, v: Floats) -> Floats:
        """x, y, z of every sample: [n, 3, len(t) len(v)]."""
        # A straight blade is a slightly bent one: the integral of the direction divides by the bend.
        curl = np.where(np.abs(self.curl) < 0.02, np.float32(0.02), self.curl)[:, None]
        start = self.elevation[:, None]
        angle = start + curl * t
        sine, cosine = np.sin(angle), np.cos(angle)
        scale = self.length[:, None] / curl
        width = self.width[:, None] * self.width_at(t)
        square = v * v
        height = self.cup[:, None, None] * square + self.twist * v
        if self.ruffle:
            height = (
                height + self.ruffle * np.sin(self._ruffle_angle(t[:, None], v, self.phase[:, None, None])) * square
            )
        height = height * width[:, :, None]
        local = np.empty((len(self), 3, len(t), len(v)), np.float32)  # along `out`, along `normal`, across
        np.multiply(height, -sine[:, :, None], out=local[:, 0])
        np.multiply(height, cosine[:, :, None], out=local[:, 1])
        np.multiply(width[:, :, None], v, out=local[:, 2])
        local[:, 0] += (scale * (sine - np.sin(start)))[:, :, None]
        local[:, 1] += (scale * (np.cos(start) - cosine))[:, :, None]
        local[:, 2] += ((self.sway * self.length)[:, None] * (t * t))[:, :, None]
        if self.notch[0]:
            wave = np.cos(np.pi * self.notch[1] * v)
            depth = self.length[:, None, None] * (self.notch[0] * t * t * t)[:, None] * wave
            local[:, 0] -= depth * cosine[:, :, None]
            local[:, 1] -= depth * sine[:, :, None]
        frames = np.stack([self.out, self.normal, self.side], axis=2)
        points: Floats = frames @ local.reshape(len(self), 3, -1)
        points += self.base[:, :, None]
        return points

    @staticmethod
    def _ruffle_angle(t: Floats, v: Floats, phase: Floats) -> Floats:
        return phase + 13 * t + 2.2 * v

    def shade(self, which: Ints, t: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [3, m] of m samples (blade `which`, t, v): sun, sky, light through the blade, gloss."""
        axes = np.stack([light.direction, light.halfway, _DOWN, _TOWARDS])
        # Cosines of each blade's frame with each axis, found once a blade: [4, m] for each vector of the frame.
        out, normal, side = ((axes @ vectors.T).take(which, axis=1) for vectors in (self.out, self.normal, self.side))
        angle = self.elevation.take(which) + self.curl.take(which) * t
        sine, cosine = np.sin(angle), np.cos(angle)
        pattern, groove = self._veins(t, v)
        across = 2 * self.cup.take(which) * v + self.twist + groove
        steepness = 1 + across * across
        cosines = cosine * normal - sine * out - across * side
        if self.ruffle:
            wave = self._ruffle_angle(t, v, self.phase.take(which))
            across = self.ruffle * 2 * v * np.sin(wave)
            along = self.ruffle * 13 * v * v * np.cos(wave) * (self.width / self.length).take(which)
            cosines -= across * side + along * (cosine * out + sine * normal)
            steepness += across * across + along * along
        cosines /= np.sqrt(steepness)
        cosines *= np.sign(cosines[3])  # the side that the camera sees
        sun, mirror, down, _ = cosines
        direct = np.maximum(sun, -self.through * sun)
        ambient = 0.55 - 0.45 * down
        shine = self.gloss * _power16(np.maximum(1.12 * mirror - 0.12, 0))
        colour = self._colour(which, t, v, pattern)
        for c in range(3):
            sky, bounce = light.sky[c], light.bounce[c]
            colour[c] *= direct * light.sun[c] + ambient * (sky - bounce) + bounce
            colour[c] += shine * light.sun[c]
        return colour

    def _veins(self, t: Floats, v: Floats) -> tuple[Floats, Floats | np.float32]:
        """Factor of the colour along the veins, and the slope of the grooves they run in."""
        count, strength, slant = self.veins
        if not strength:
            return np.ones_like(t), np.float32(0)
        wave = np.pi * count * ((1 - slant) * v + slant * (t - 0.45 * np.abs(v)))
        line = np.cos(wave)
        fourth = line * line * line * line
        pattern = 1 - strength * fourth * (1 - 0.6 * t)
        if slant:  # a leaf has a pale midrib
            pattern = pattern * 0.9 + 0.4 * np.clip(1 - np.abs(v) / 0.1, 0, 1)
        return pattern, np.asarray(0.6 * strength * line * np.sin(wave), np.float32)

    def _colour(self, which: Ints, t: Floats, v: Floats, pattern: Floats) -> Floats:
        """Linear RGB [3, m] of the blade itself."""
        mix = np.clip((t - 0.12) / max(self.blotch, 1e-3), 0, 1)
        mix = mix * mix * (3 - 2 * mix)
        square = v * v
        rim = np.maximum(square * square * 0.8, np.clip(4 * t - 3, 0, 1) * 0.6)
        inner, outer, edge = (1 - mix) * (1 - rim) * pattern, mix * (1 - rim) * pattern, rim * pattern
        colour = self.inner.T.take(which, axis=1) * inner
        colour += self.outer.T.take(which, axis=1) * outer
        colour += self.edge.T.take(which, axis=1) * edge
        return np.asarray(colour)


def merged(items: Sequence[Blades | Blobs]) -> list[Blades | Blobs]:
    """The same surfaces in as few structures as possible: each costs a fixed time to draw."""
    groups: dict[tuple[object, ...], list[Blades | Blobs]] = {}
    for item in items:
        fixed = tuple(getattr(item, f.name) for f in fields(item) if f.type != "Floats")
        groups.setdefault((type(item), *fixed), []).append(item)
    return [_concatenated(group) for group in groups.values()]


def _concatenated(items: list[Blades | Blobs]) -> Blades | Blobs:
    if len(items) == 1:
        return items[0]
    names = [f.name for f in fields(items[0]) if f.type == "Floats"]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(item, name) for item in items]) for name in names}
    return replace(items[0], **arrays)


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

    def take(self, rows: slice | Bools) -> Blobs:
        """The balls `rows`."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.type == "Floats"}
        return replace(self, **arrays)

    def extent(self) -> tuple[Floats, Floats]:
        """Width and height [n] in frames."""
        return 2 * self.radius, 2 * self.radius

    def grid(self, side: int, extent: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Samples (u, v) of the unit disc, without holes at `side` pixels a frame."""
        count = int(float(extent[0].max()) * side * _SAMPLES_PER_PIXEL) + 2
        line = np.asarray(2 * (np.arange(count, dtype=np.float32) + 0.5) / count - 1, np.float32)
        u, v = np.meshgrid(line, line)
        inside = u * u + v * v <= 1.02
        return u[inside], v[inside]

    def points(self, u: Floats, v: Floats) -> Floats:
        """x, y, z of every sample: [n, 3, len(u)]."""
        unit = np.stack([u, v, np.sqrt(np.clip(1 - u * u - v * v, 0, 1))])
        return np.asarray(self.centre[:, :, None] + self.radius[:, None, None] * unit)

    def shade(self, which: Ints, u: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [3, m] of m samples."""
        bulge = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        x, y, z = (float(c) for c in light.direction)
        sun = np.clip(u * x + v * y + bulge * z, 0, 1)
        shine = self.gloss * _power16(sun)
        ambient, glow = 0.55 - 0.45 * v, self.glow.take(which)
        colour = np.empty((3, len(u)), np.float32)
        for c in range(3):
            received = sun * light.sun[c] + ambient * (light.sky[c] - light.bounce[c]) + light.bounce[c] + glow
            colour[c] = self.colour[:, c].take(which) * received + shine * light.sun[c]
        return colour


@dataclass(frozen=True)
class _Drawn:
    """Surfaces that have been put on a canvas, and the grid they were sampled on."""

    items: Blades | Blobs
    first: Floats
    second: Floats

    @property
    def samples(self) -> int:
        """Points of one surface."""
        return len(self.first) if isinstance(self.items, Blobs) else len(self.first) * len(self.second)

    def shade(self, points: Ints, light: Light) -> Floats:
        """Linear RGB [3, m] of points, counted surface by surface."""
        which = points // self.samples
        rest = points - which * self.samples
        if isinstance(self.items, Blobs):
            return self.items.shade(which, self.first.take(rest), self.second.take(rest), light)
        row = rest // len(self.second)
        return self.items.shade(which, self.first.take(row), self.second.take(rest - row * len(self.second)), light)


class Canvas:
    """A square layer being drawn, `side` pixels a frame: z of the nearest surface (-inf: none), then linear RGB.

    Surfaces are put in first; only what of them is seen in the end is shaded.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.rgb = np.zeros((3, side * side), np.float32)
        self.z = np.full(side * side, -np.inf, np.float32)
        self._drawn: list[_Drawn] = []
        self._source = np.zeros(side * side, np.uint16)  # of each pixel: 1 + which of _drawn
        self._point = np.empty(side * side, np.int32)  # and which of its points
        self._rows = [side, 0]  # first and last + 1 that anything was drawn in

    def draw(self, items: Blades | Blobs) -> None:
        """Put in what is nearer than what is there."""
        if not len(items):
            return
        extent = items.extent()
        area = extent[0] * extent[1]
        if len(items) * float(area.max()) * self.side**2 < _FEW:
            self._draw_alike(items, extent)
            return
        # Surfaces are sampled alike within a factor of two of area: small petals need not what large ones do.
        octave = np.log2(np.maximum(area, 1e-6 * area.max())).astype(np.int32)
        for value in np.unique(octave):
            rows = octave == value
            self._draw_alike(items.take(rows), (extent[0][rows], extent[1][rows]))

    def _draw_alike(self, items: Blades | Blobs, extent: tuple[Floats, Floats]) -> None:
        grid = items.grid(self.side, extent)
        step = max(1, _CHUNK // _Drawn(items, *grid).samples)
        for start in range(0, len(items), step):
            self._put(_Drawn(items.take(slice(start, start + step)), *grid))

    def _put(self, drawn: _Drawn) -> None:
        pixels, points, z = self._nearest(drawn.items.points(drawn.first, drawn.second))
        nearer = np.flatnonzero(z > self.z.take(pixels))
        if not len(nearer):
            return
        pixels = pixels.take(nearer)
        self._drawn.append(drawn)
        self._source[pixels] = len(self._drawn)
        self._point[pixels] = points.take(nearer)
        self.z[pixels] = z.take(nearer)
        top, bottom = int(pixels[0]) // self.side, int(pixels[-1]) // self.side + 1
        self._rows = [min(self._rows[0], top), max(self._rows[1], bottom)]

    def shade(self, light: Light) -> None:
        """Colour what is seen."""
        pixels = np.flatnonzero(self._source)
        source = self._source.take(pixels)
        pixels = pixels.take(np.argsort(source, kind="stable"))
        ends = np.cumsum(np.bincount(source, minlength=len(self._drawn) + 1))
        for k, drawn in enumerate(self._drawn):
            seen = pixels[ends[k] : ends[k + 1]]
            if len(seen):
                colour = drawn.shade(self._point.take(seen).astype(np.intp), light)
                for c in range(3):
                    self.rgb[c, seen] = colour[c]

    def _nearest(self, points: Floats) -> tuple[Ints, Ints, Floats]:
        """Pixels hit by any of the points [n, 3, K] in rising order, and the index and z of the nearest one of each."""
        side = np.float32(self.side)
        column, row = ((points[:, c] * side).astype(np.int32).ravel() for c in range(2))
        pixel = row * np.int32(self.side) + column
        inside = np.flatnonzero((column.view(np.uint32) < self.side) & (row.view(np.uint32) < self.side))
        if not len(inside):
            return inside, inside, np.zeros(0, np.float32)
        z = np.ascontiguousarray(points[:, 2]).ravel()
        depth = z.take(inside)
        low, high = float(depth.min()), float(depth.max())
        # 16 bits are what numpy sorts by radix; a stable sort writes the nearest point of a pixel last.
        key = ((depth - low) * np.float32(65535 / max(high - low, 1e-6))).astype(np.uint16)
        order = inside.take(np.argsort(key, kind="stable"))
        target = pixel.take(order).astype(np.intp)
        first = max(0, int(target.min()) - self.side)
        hit = np.full(min(self.side * self.side, int(target.max()) + 1 + self.side) - first, -1, np.intp)
        target -= first
        hit[target] = order
        height = np.full(len(hit), -np.inf, np.float32)
        height[target] = z.take(order)
        for step in (1, self.side, 1):  # close holes of one pixel, along and down: both neighbours are nearer by far
            rim = np.minimum(height[: -2 * step], height[2 * step :]) - np.float32(2 / self.side)
            gap = np.flatnonzero(height[step:-step] < rim) + step
            hit[gap], height[gap] = hit[gap - step], height[gap - step]
        pixels = np.flatnonzero(hit >= 0)
        return pixels + first, hit.take(pixels), height.take(pixels)

    def contact_shadows(self, light: Light, reach: float = 0.02, strength: float = 0.6) -> None:
        """Darken what lies behind something that stands towards the sun within about `reach` frames."""
        top, bottom = self._rows
        if top >= bottom or strength <= 0:
            return
        block = slice(top * self.side, bottom * self.side)
        z = self.z[block].reshape(-1, self.side)
        step = max(1, self.side // 128)  # the mean around a pixel is smooth: a coarse grid will do
        coarse = z[::step, ::step]
        covered = np.isfinite(coarse)
        if not covered.any():
            return
        floor = coarse[covered].min()
        around = box_blur(np.maximum(coarse, floor), max(1, round(reach * self.side / step)))
        down, right = (-round(float(light.direction[c]) * reach * self.side / step) for c in (1, 0))
        around = shifted(around, down, right) * np.float32(1 / (1.6 * reach))
        hidden = _enlarged(around, step)[: len(z), : self.side]
        hidden -= np.maximum(z, floor) * np.float32(1 / (1.6 * reach))
        np.clip(hidden, 0, 1, out=hidden)
        self.rgb[:, block] *= (1 - np.float32(strength) * hidden).ravel()

    def layer(self, size: int) -> tuple[Floats, Floats]:
        """Premultiplied linear RGBA [4, size, size] and z [size, size] (the nearest surface; -inf where empty)."""
        factor = self.side // size
        if factor == 1:
            rgba = np.concatenate([self.rgb, np.isfinite(self.z)[None]])
            return rgba.astype(np.float32, copy=False).reshape(4, size, size), self.z.reshape(size, size)
        rgba = np.zeros((4, size, size), np.float32)
        z = np.full((size, size), -np.inf, np.float32)
        top, bottom = self._rows[0] // factor, -(-self._rows[1] // factor)
        if top >= bottom:
            return rgba, z
        block = slice(top * factor * self.side, bottom * factor * self.side)
        fine = self.z[block].reshape(-1, self.side)
        z[top:bottom] = _reduce(fine, factor, np.maximum)
        share = np.float32(1 / factor**2)
        for c in range(3):
            rgba[c, top:bottom] = _reduce(self.rgb[c, block].reshape(-1, self.side), factor, np.add) * share
        rgba[3, top:bottom] = _reduce(np.isfinite(fine).astype(np.float32), factor, np.add) * share
        return rgba, z


def _reduce(image: Floats, factor: int, operation: np.ufunc) -> Floats:
    """Blocks of factor x factor pixels as one."""
    for _ in range(2):
        parts = [image[i::factor] for i in range(factor)]
        total = parts[0]
        for part in parts[1:]:
            total = operation(total, part)
        image = total.T
    return np.asarray(image)


def _power16(x: Floats) -> Floats:
    x = x * x
    x = x * x
    x = x * x
    return x * x


def _enlarged(image: Floats, factor: int) -> Floats:
    """[factor H, factor W], interpolated where the steps would show."""
    if factor <= 2:
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = image.shape
    return np.array(Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BILINEAR))


def shifted(image: Floats, down: int, right: int) -> Floats:
    """[H, W] moved by whole pixels; the border is repeated."""
    rows = np.clip(np.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
    columns = np.clip(np.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
    return np.asarray(image[rows[:, None], columns])


def box_blur(image: Floats, radius: int) -> Floats:
    """Mean over (2 radius + 1)^2 pixels of [H, W]; the border is repeated."""
    window = 2 * radius + 1
    for _ in range(2):
        count = len(image)
        padded = image.take(np.clip(np.arange(-radius, count + radius), 0, count - 1), axis=0)
        total = padded[:count] + padded[window - 1 :]
        for offset in range(1, window - 1):
            total += padded[offset : offset + count]
        image = (total * np.float32(1 / window)).T
    return image


def fractal_noise(
    seed: int, size: int, cells: tuple[float, float], *, gain: float = 0.55, finest: float = 1.5
) -> Floats:
    """Smooth noise [size, size] of mean 0 and standard deviation about 1.

    The coarsest grid has `cells` = (down, across) cells a frame; octaves are added until a cell is `finest` pixels, so
    that a larger picture of the same scene shows the same noise with more detail.
    """
    total = np.zeros((size, size), np.float32)
    power, octave = 0.0, 0
    while octave == 0 or max(cells) * 2**octave * finest <= size:
        rng = np.random.default_rng((seed, octave))
        down, across = (cell * 2**octave for cell in cells)
        y, x = rng.uniform(0, 1, 2)  # grids that met at their nodes would show as a lattice
        grid = rng.standard_normal((int(down + y) + 2, int(across + x) + 2), dtype=np.float32)
        smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + across, y + down))
        total += np.asarray(smooth) * np.float32(gain**octave)
        power += gain ** (2 * octave)
        octave += 1
    return np.asarray(total / np.sqrt(power * 0.6), np.float32)
