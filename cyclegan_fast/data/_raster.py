"""Surfaces in three dimensions -> one picture layer: point splatting with a z-buffer and deferred shading.

Coordinates are in frame widths: x right, y down, z towards the camera, the frame is [0, 1] x [0, 1], the projection
orthographic within a layer. Colours are linear light, float32. Everything a plant is made of is one of two
primitives, held as structures of arrays so that a layer costs a few numpy calls whatever the number of petals:
`Blades` (petals, leaves, grass, stems) and `Blobs` (seeds, anthers, berries, lamps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.intp]  # what numpy indexes with: anything else is converted at every use

_FEW = 40_000  # points below which a further call costs more than it saves
_OFFSET = np.float32(8)  # added to z where it has to be above 0; no surface reaches as far
_CHUNK = 3_000_000  # points held at a time, which bounds the memory of a 4096 px picture


_NEXT, _AFTER = np.array([1, 2, 0]), np.array([2, 0, 1])
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

    @cached_property
    def side(self) -> Floats:
        """The direction across each blade, [n, 3]."""
        return cross(self.normal, self.out)

    def take(self, rows: slice | Bools) -> Blades:
        """The blades `rows`."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS[type(self)]})

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

    def grid(self, density: float, extent: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Samples (t, v) at `density` samples a frame."""
        rows, columns = (int(float(size.max()) * density) + 2 for size in extent)
        # A blunt tip narrows within a pixel: there the edge needs rows of its own.
        return _rows(rows, self.outline[1] < 0.5), _columns(columns)

    def points(self, t: Floats, v: Floats) -> Floats:
        """x, y, z of every sample, blade by blade and row by row: [3, n len(t) len(v)].

        Across a blade (along v) its shape is a sum of a few curves that all blades share; their weights depend on t.
        """
        # A straight blade is a slightly bent one: the integral of the direction divides by the bend.
        curl = np.where(np.abs(self.curl) < 0.02, np.float32(0.02), self.curl)[:, None]
        start = self.elevation[:, None]
        angle = start + curl * t
        sine, cosine = np.sin(angle), np.cos(angle)
        scale = self.length[:, None] / curl
        out, normal, side = (vectors.T[:, :, None] for vectors in (self.out, self.normal, self.side))
        width = self.width[:, None] * self.width_at(t)
        lift = (cosine * normal - sine * out) * width
        square = v * v
        centre = out * (scale * (sine - np.sin(start))) + self.base.T[:, :, None]
        centre += normal * (scale * (np.cos(start) - cosine))
        centre += side * ((self.sway * self.length)[:, None] * (t * t))
        slope = side * width
        if self.twist:
            slope += self.twist * lift
        parts = [(np.ones_like(v), centre), (v, slope), (square, lift * self.cup[:, None])]
        if self.ruffle:  # sin(a + b) = sin a cos b + cos a sin b
            along, across = self._ruffle_angles(t, v)
            lift *= self.ruffle
            parts += [(square * np.cos(across), lift * np.sin(along)), (square * np.sin(across), lift * np.cos(along))]
        if self.notch[0]:
            depth = self.length[:, None] * (self.notch[0] * t * t * t)
            parts.append((np.cos(np.pi * self.notch[1] * v), -depth * (cosine * out + sine * normal)))
        curves, weights = (np.stack(part) for part in zip(*parts, strict=True))
        points: Floats = weights.reshape(len(weights), -1).T @ curves
        return points.reshape(3, -1)

    def _ruffle_angles(self, t: Floats, v: Floats) -> tuple[Floats, Floats]:
        """Phase of the ruffles, as the sum of a part of each row [n, len(t)] and one of each column [len(v)]."""
        return self.phase[:, None] + 13 * t, np.float32(2.2) * v

    def shade(self, points: Ints, t: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [3, m] of m of the samples `points` returns: sun, sky, light through the blade, gloss.

        What is the same along a row, down a column or on all blades is found once and looked up.
        """
        row = points // len(v)
        which = row // len(t)
        column = points - row * len(v)
        cell = points - which * (len(t) * len(v))
        axes = np.stack([light.direction, light.halfway, _DOWN, _TOWARDS])
        # Cosines of each blade's frame with each axis: [4, n, 1] for each vector of the frame.
        out, normal, side = ((axes @ vectors.T)[:, :, None] for vectors in (self.out, self.normal, self.side))
        angle = self.elevation[:, None] + self.curl[:, None] * t
        sine, cosine = np.sin(angle), np.cos(angle)
        pattern, groove = self._veins(t[:, None], v)
        across = (2 * self.cup).take(which)
        across *= v.take(column)
        across += self.twist
        if groove is not None:
            across += groove.take(cell)
        steepness = across * across
        cosines = (cosine * normal - sine * out).reshape(4, -1).take(row, axis=1)
        if self.ruffle:
            along, phase = self._ruffle_angles(t, v)
            wave = along.take(row) + phase.take(column)
            ripple = (self.ruffle * 2 * v).take(column) * np.sin(wave)
            climb = (self.ruffle * 13 * v * v).take(column) * np.cos(wave)
            climb *= (self.width / self.length).take(which)
            cosines -= climb * (cosine * out + sine * normal).reshape(4, -1).take(row, axis=1)
            steepness += ripple * ripple + climb * climb
            across += ripple
        cosines -= across * side[:, :, 0].take(which, axis=1)
        # Signed for the side that the camera sees.
        cosines[:3] *= np.copysign(1 / np.sqrt(1 + steepness), cosines[3])
        sun, mirror, down, _ = cosines
        direct = np.maximum(sun, -self.through * sun)
        ambient = 0.55 - 0.45 * down
        shine = self.gloss * _power16(np.maximum(1.12 * mirror - 0.12, 0))
        colour = self._colour(row, which, cell, t, v, pattern)
        for c in range(3):
            sky, bounce = light.sky[c], light.bounce[c]
            colour[c] *= direct * light.sun[c] + ambient * (sky - bounce) + bounce
            colour[c] += shine * light.sun[c]
        return colour

    def _veins(self, t: Floats, v: Floats) -> tuple[Floats | np.float32, Floats | None]:
        """Factor of the colour along the veins, and the slope of the grooves they run in (None: there are none)."""
        count, strength, slant = self.veins
        if not strength:
            return np.float32(1), None
        wave = np.pi * count * ((1 - slant) * v + slant * (t - 0.45 * np.abs(v)))
        line = np.cos(wave)
        fourth = line * line * line * line
        pattern = 1 - strength * fourth * (1 - 0.6 * t)
        if slant:  # a leaf has a pale midrib
            pattern = pattern * 0.9 + 0.4 * np.clip(1 - np.abs(v) / 0.1, 0, 1)
        groove = np.asarray(0.6 * strength * line * np.sin(wave), np.float32)
        return pattern, np.broadcast_to(groove, pattern.shape)

    def _colour(self, row: Ints, which: Ints, cell: Ints, t: Floats, v: Floats, pattern: Floats | np.float32) -> Floats:
        """Linear RGB [3, m] of the blade itself."""
        mix = np.clip((t - 0.12) / max(self.blotch, 1e-3), 0, 1)
        mix = mix * mix * (3 - 2 * mix)
        square = v * v
        rim = np.maximum(square * square * 0.8, np.clip(4 * t - 3, 0, 1)[:, None] * 0.6)
        body = self.inner.T[:, :, None] * (1 - mix) + self.outer.T[:, :, None] * mix
        colour = body.reshape(3, -1).take(row, axis=1)
        colour *= ((1 - rim) * pattern).take(cell)
        colour += self.edge.T.take(which, axis=1) * (rim * pattern).take(cell)
        return np.asarray(colour)


@lru_cache(maxsize=512)
def _rows(count: int, blunt: bool) -> Floats:
    t = np.asarray((np.arange(count, dtype=np.float32) + 0.5) / count, np.float32)
    if blunt:
        t = np.concatenate([t, 1 - np.geomspace(0.02, 6, min(24, count // 4), dtype=np.float32) / count])
    return t


@lru_cache(maxsize=512)
def _columns(count: int) -> Floats:
    return np.asarray(2 * (np.arange(count, dtype=np.float32) + 0.5) / count - 1, np.float32)


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
    names = _ARRAYS[type(items[0])]
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
        return replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS[type(self)]})

    def extent(self) -> tuple[Floats, Floats]:
        """Width and height [n] in frames."""
        return 2 * self.radius, 2 * self.radius

    def grid(self, density: float, extent: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Samples (u, v) of the unit disc, at `density` samples a frame."""
        count = int(float(extent[0].max()) * density) + 2
        line = np.asarray(2 * (np.arange(count, dtype=np.float32) + 0.5) / count - 1, np.float32)
        u, v = np.meshgrid(line, line)
        inside = u * u + v * v <= 1.02
        return u[inside], v[inside]

    def points(self, u: Floats, v: Floats) -> Floats:
        """x, y, z of every sample, ball by ball: [3, n len(u)]."""
        unit = np.stack([u, v, np.sqrt(np.clip(1 - u * u - v * v, 0, 1))])
        points = self.centre.T[:, :, None] + self.radius[:, None] * unit[:, None]
        return np.asarray(points.reshape(3, -1))

    def shade(self, points: Ints, u: Floats, v: Floats, light: Light) -> Floats:
        """Linear RGB [3, m] of m of the samples `points` returns."""
        which = points // len(u)
        place = points - which * len(u)
        bulge = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        x, y, z = light.direction
        sun = np.clip(u * x + v * y + bulge * z, 0, 1)
        shine = (self.gloss * _power16(sun)).take(place)
        ambient, glow = 0.55 - 0.45 * v, self.glow.take(which)
        colour = self.colour.T.take(which, axis=1)
        for c in range(3):
            received = sun * light.sun[c] + ambient * (light.sky[c] - light.bounce[c]) + light.bounce[c]
            colour[c] *= received.take(place) + glow
            colour[c] += shine * light.sun[c]
        return np.asarray(colour)


_ARRAYS: dict[type[Blades | Blobs], list[str]] = {
    kind: [f.name for f in fields(kind) if f.type == "Floats"] for kind in (Blades, Blobs)
}


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
        return self.items.shade(points, self.first, self.second, light)


class Canvas:
    """A square layer being drawn, `side` pixels a frame: z of the nearest surface (-inf: none), then linear RGB.

    Surfaces are put in first; only what of them is seen in the end is shaded.
    """

    def __init__(self, side: int, samples: float = 0.85) -> None:
        """`samples` a pixel along each direction of a surface; the holes this leaves are a pixel wide, and closed."""
        self.side = side
        self._density = side * samples
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
        grid = items.grid(self._density, extent)
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
        """Pixels hit by any of the points [3, N] in rising order, and the index and z of the nearest one of each."""
        cells = (points[:2] * np.float32(self.side)).astype(np.int32)
        z = points[2]
        index = np.arange(len(z))
        column, row = cells.view(np.uint32)  # what is below 0 is far above the side
        if max(column.max(), row.max()) >= self.side:
            index = np.flatnonzero((column < self.side) & (row < self.side))
            if not len(index):
                return index, index, np.zeros(0, np.float32)
            cells, z = cells.take(index, axis=1), z.take(index)
        target = (cells[1] * np.int32(self.side) + cells[0]).astype(np.intp)
        first = max(0, int(target.min()) - self.side)
        target -= first
        # z and the point in one integer, z first: floats above 0 are ordered as their bits are.
        key = (z + _OFFSET).view(np.int32).astype(np.int64)
        key <<= 32
        key |= index
        nearest = np.zeros(min(self.side * self.side, int(target.max()) + first + 1 + self.side) - first, np.int64)
        np.maximum.at(nearest, target, key)
        height = (nearest >> 32).astype(np.int32).view(np.float32)  # 0: nothing
        for step in (1, self.side, 1):  # close holes of one pixel, along and down: both neighbours are nearer by far
            rim = np.minimum(height[: -2 * step], height[2 * step :]) - np.float32(2 / self.side)
            gap = np.flatnonzero(height[step:-step] < rim) + step
            nearest[gap], height[gap] = nearest[gap - step], height[gap - step]
        pixels = np.flatnonzero(nearest)
        return pixels + first, nearest.take(pixels) & 0xFFFFFFFF, height.take(pixels) - _OFFSET

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


def cross(a: Floats, b: Floats) -> Floats:
    """Cross products of vectors [..., 3]."""
    return np.asarray(a[..., _NEXT] * b[..., _AFTER] - a[..., _AFTER] * b[..., _NEXT])


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
    return np.asarray(total * np.float32(1 / np.sqrt(power * 0.6)))
