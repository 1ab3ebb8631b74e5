"""Plants: the shapes and colours of flower species, and the pieces a scene is planted with.

Every function draws its choices from the generator it is given; positions and lengths are in frame widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cyclegan_fast.data._raster import Blades, Blobs, Floats, cross

Array: TypeAlias = npt.NDArray[Any]
Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Species:
    """Shape of a flower. Ranges are drawn from uniformly; lengths are in flower radii, angles in radians."""

    petals: tuple[int, int]
    whorls: tuple[int, int]
    outline: tuple[float, float]
    width: Range
    elevation: Range
    rise: float  # elevation gained from whorl to whorl
    shrink: float  # length lost from whorl to whorl
    curl: Range
    cup: Range
    pitch: Range  # how far the head looks up from the camera
    disc: Range
    colours: tuple[tuple[str, str, str], ...]  # inner, outer, edge of a petal
    centre: tuple[tuple[str, str], ...]
    stamens: tuple[int, int] = (0, 0)
    stamen_length: float = 0.35
    notch: tuple[float, float] = (0.0, 1.0)
    ruffle: float = 0.0
    twist: float = 0.12
    veins: tuple[float, float, float] = (5.0, 0.12, 0.0)
    blotch: float = 0.45


_YELLOW_CENTRE = (("#8a5a00", "#ffcf24"), ("#b07800", "#ffd94a"), ("#7d8a12", "#f2c81e"))
_DARK_CENTRE = (("#120a08", "#5b3413"), ("#1c1210", "#3a2412"))
_PINKS = (("#ffd9e6", "#e83e8c", "#ff9cc6"), ("#f7a6c4", "#d81b60", "#f06292"), ("#fff0f5", "#f8a5c8", "#ffd6e8"))
_WHITES = (("#f4f0c8", "#ffffff", "#ffffff"), ("#e9e6ff", "#fbf8ff", "#efe9ff"))
_YELLOWS = (("#ff9d00", "#ffd400", "#ffe34d"), ("#d86a00", "#ffb300", "#ffd54f"), ("#c7b200", "#fff04a", "#fff58a"))
_REDS = (("#5e0008", "#c8102e", "#ff4136"), ("#ffb000", "#d62718", "#ff5a36"), ("#ff8a00", "#f4511e", "#ff8a50"))
_PURPLES = (("#f2eaff", "#7b3fb5", "#b185e0"), ("#3a1466", "#8e44c9", "#c39be8"), ("#fff8d0", "#5b5fd0", "#9aa4f0"))

SPECIES: dict[str, Species] = {
    "daisy": Species(
        (16, 26), (1, 2), (0.30, 0.22), (0.085, 0.12), (0.0, 0.25), 0.15, 0.06, (-0.5, 0.1), (-0.3, 0.3), (0.1, 0.9),
        (0.24, 0.33), (*_WHITES, *_PINKS, *_YELLOWS[:1]), _YELLOW_CENTRE, veins=(3.0, 0.15, 0.0), twist=0.1,
    ),
    "cosmos": Species(
        (8, 8), (1, 1), (0.75, 0.14), (0.36, 0.44), (0.0, 0.3), 0.0, 0.0, (-0.4, 0.2), (-0.15, 0.25), (0.1, 0.8),
        (0.16, 0.22), (*_PINKS, *_PURPLES[:1], *_WHITES), _YELLOW_CENTRE, notch=(0.035, 3.0), veins=(9.0, 0.18, 0.0),
    ),
    "poppy": Species(
        (4, 6), (1, 2), (0.55, 0.28), (0.62, 0.8), (0.35, 0.8), 0.3, 0.12, (-0.3, 0.5), (0.25, 0.5), (0.3, 1.1),
        (0.12, 0.18), (*_REDS, *_PINKS[:2], *_PURPLES[:1], *_WHITES[:1]), _DARK_CENTRE, stamens=(24, 40),
        stamen_length=0.26, ruffle=0.22, veins=(9.0, 0.16, 0.0), blotch=0.3,
    ),
    "rose_wild": Species(
        (5, 5), (1, 1), (0.62, 0.26), (0.46, 0.58), (0.1, 0.5), 0.0, 0.0, (-0.4, 0.4), (0.1, 0.35), (0.0, 0.9),
        (0.08, 0.13), (*_PINKS, *_PURPLES, *_YELLOWS[1:], *_WHITES), _YELLOW_CENTRE, stamens=(14, 26),
        stamen_length=0.3, notch=(0.05, 1.0), ruffle=0.08, veins=(11.0, 0.18, 0.0), twist=0.25,
    ),
    "lily": Species(
        (6, 6), (1, 1), (0.75, 0.75), (0.26, 0.34), (0.6, 0.9), 0.0, 0.0, (-1.6, -0.9), (0.15, 0.4), (0.2, 0.9),
        (0.05, 0.07), (*_REDS[1:], *_PINKS[:1], *_YELLOWS[:2], *_WHITES[:1]), _DARK_CENTRE, stamens=(6, 6),
        stamen_length=0.7, ruffle=0.12, veins=(3.0, 0.25, 0.0), blotch=0.6,
    ),
    "tulip": Species(
        (3, 3), (2, 2), (0.55, 0.55), (0.42, 0.5), (1.05, 1.2), 0.12, 0.03, (0.15, 0.5), (0.5, 0.7), (1.0, 1.35),
        (0.05, 0.06), (*_REDS, *_YELLOWS, *_PURPLES[:2], *_PINKS[:2]), _DARK_CENTRE, veins=(11.0, 0.14, 0.0),
        blotch=0.6,
    ),
    "dahlia": Species(
        (12, 15), (4, 6), (0.55, 0.45), (0.16, 0.2), (0.0, 0.15), 0.2, 0.11, (-0.3, 0.5), (0.3, 0.6), (0.0, 0.7),
        (0.08, 0.12), (*_REDS, *_PINKS, *_PURPLES, *_YELLOWS, *_WHITES[:1]), _YELLOW_CENTRE, veins=(3.0, 0.15, 0.0),
    ),
    "rose": Species(
        (5, 5), (4, 5), (0.55, 0.25), (0.55, 0.65), (0.15, 0.3), 0.24, 0.13, (-0.5, 0.3), (0.35, 0.5), (0.3, 0.9),
        (0.03, 0.04), (*_PINKS, *_REDS[:1], *_REDS[2:], *_YELLOWS[2:], *_WHITES[:1]), _YELLOW_CENTRE, ruffle=0.12,
        veins=(7.0, 0.06, 0.0), twist=0.2, blotch=0.8,
    ),
    "sunflower": Species(
        (20, 28), (2, 2), (0.5, 0.55), (0.1, 0.13), (0.0, 0.3), -0.15, 0.05, (-0.5, 0.5), (0.1, 0.5), (0.0, 0.7),
        (0.36, 0.45), (*_YELLOWS[:2],), _DARK_CENTRE, veins=(3.0, 0.2, 0.0), ruffle=0.1,
    ),
}  # fmt: skip

_BLADE_COLUMNS = {
    name: 3 if name in ("base", "out", "normal", "inner", "outer", "edge") else 0
    for name, kind in Blades.__annotations__.items()
    if kind == "Floats"
}
GREENS = ("#46621f", "#5a7530", "#34522c", "#6f8440", "#566b45", "#7f8d45", "#3d5438")
LITTER = ("#6b4a2b", "#8a6a45", "#4e3a28", "#a08055", "#75603f", "#5d6b35")


@lru_cache(maxsize=256)
def linear(*codes: str) -> Floats:
    """Hex sRGB codes as linear RGB [n, 3]."""
    encoded = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes], np.float32) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


def pick(rng: np.random.Generator, codes: Sequence[str], n: int) -> Floats:
    """n of the colours, linear RGB [n, 3]."""
    return linear(*codes)[rng.integers(len(codes), size=n)]


def pick_codes(rng: np.random.Generator, codes: Sequence[str], n: int) -> list[str]:
    """n of the colours, as codes."""
    return [codes[int(i)] for i in rng.integers(len(codes), size=n)]


def unit_vectors(vectors: Array) -> Floats:
    """Vectors [..., 3] scaled to length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def make_blades(n: int, **given: Any) -> Blades:
    """Blades whose missing arrays are 0; scalars and single rows are repeated n times."""
    filled: dict[str, Any] = dict.fromkeys(("elevation", "curl", "cup", "sway", "phase"), 0.0) | given
    for name, columns in _BLADE_COLUMNS.items():
        array = np.empty((n, columns) if columns else n, np.float32)
        array[...] = filled[name]
        filled[name] = array
    return Blades(**filled)


@dataclass(frozen=True)
class _Head:
    """Where a flower head is: its middle, the unit vector it faces, two axes across it [2, 3], and its radii."""

    middle: Floats
    facing: Floats
    axes: Floats
    radius: float
    disc: float
    closed: float

    def around(self, azimuth: Array) -> Floats:
        """Unit vectors [n, 3] away from the middle."""
        return np.asarray(np.cos(azimuth)[:, None] * self.axes[0] + np.sin(azimuth)[:, None] * self.axes[1], np.float32)


def flower_head(
    rng: np.random.Generator,
    species: Species,
    palette: int,
    centre: Sequence[float],
    radius: float,
    closed: float = 0.0,
) -> list[Blades | Blobs]:
    """A flower head: petals in whorls, sepals, disc, stamens. `closed` in [0, 1] makes a bud of it."""
    pitch, yaw = rng.uniform(*species.pitch), rng.uniform(-0.6, 0.6)
    facing = unit_vectors(np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)]))
    right = unit_vectors(cross(np.array([0, 1, 0], np.float32), facing))
    axes = np.stack([right, cross(facing, right)])
    disc = float(rng.uniform(*species.disc)) * radius
    head = _Head(np.asarray(centre, np.float32), facing, axes, radius, disc, closed)
    parts: list[Blades | Blobs] = [_petals(rng, species, palette, head)]
    if pitch > 0.5 or closed > 0.5:  # seen from the side
        parts.append(_sepals(rng, head))
    if closed < 0.5:
        parts += _disc(rng, species, head)
    return parts


def _petals(rng: np.random.Generator, species: Species, palette: int, head: _Head) -> Blades:
    count = int(rng.integers(species.petals[0], species.petals[1] + 1))
    whorls = int(rng.integers(species.whorls[0], species.whorls[1] + 1))
    whorl = np.repeat(np.arange(whorls), count).astype(np.float32)
    n = len(whorl)
    step = 2 * np.pi / count
    turn = rng.uniform(0, 2 * np.pi)
    azimuth = turn + np.tile(np.arange(count), whorls) * step + whorl * step * 0.5 + rng.normal(0, 0.06 * step, n)
    out = head.around(azimuth)
    elevation = rng.uniform(*species.elevation) + species.rise * whorl + rng.normal(0, 0.06, n)
    size = 1 - species.shrink * whorl
    # Petals of the middle of a full flower stand on a smaller circle.
    start = head.disc * 0.75
    base = head.middle + out * (start * size**2)[:, None] + head.facing * (0.04 * head.radius * whorl)[:, None]
    inner, outer, edge = linear(*species.colours[palette])
    tone = rng.normal(1, 0.07, (n, 1))
    length = (head.radius - start) * size * rng.normal(1, 0.05, n)
    cup = rng.uniform(*species.cup) + rng.normal(0, 0.06, n)
    curl = rng.uniform(*species.curl) + rng.normal(0, 0.12, n) + 0.35 * max(0.0, species.rise) * whorl
    closed, opened = head.closed, 1 - head.closed
    return make_blades(
        n, base=base, out=out, normal=head.facing, length=length,
        width=length * rng.uniform(*species.width) * (1 - 0.45 * closed), elevation=elevation * opened + 1.35 * closed,
        curl=curl * opened + 0.5 * closed, cup=cup * opened + 0.7 * closed, sway=rng.normal(0, 0.05, n),
        phase=rng.uniform(0, 6.28, n), inner=inner * tone, outer=outer * tone, edge=edge * tone,
        outline=species.outline, twist=species.twist, ruffle=species.ruffle, notch=species.notch, veins=species.veins,
        blotch=species.blotch, gloss=0.12, through=0.45,
    )  # fmt: skip


def _sepals(rng: np.random.Generator, head: _Head) -> Blades:
    length = head.radius * (0.34 + 0.4 * head.closed)
    green = pick(rng, GREENS, 5)
    return make_blades(
        5, base=head.middle - 0.03 * head.radius * head.facing, normal=head.facing,
        out=head.around(np.arange(5) * 1.2566 + rng.uniform(0, 6.28)), length=length, width=length * 0.22,
        elevation=-0.25 if head.closed < 0.5 else 1.25, curl=0.3, cup=0.5, inner=green * 0.8, outer=green,
        edge=green * 1.2, outline=(0.4, 0.9), veins=(3.0, 0.2, 0.0),
    )  # fmt: skip


def _disc(rng: np.random.Generator, species: Species, head: _Head) -> list[Blades | Blobs]:
    """Seeds on a dome in the order of a sunflower (golden angle), and stamens with their anthers."""
    low, high = linear(*species.centre[int(rng.integers(len(species.centre)))])
    n = int(np.clip(900 * head.disc, 24, 260))
    order = (np.arange(n) + 0.5) / n
    across = head.around(2.39996 * np.arange(n)) * np.sqrt(order)[:, None]
    dome = 0.32 * (1 - order) + 0.22
    tone = rng.normal(1, 0.12, (n, 1)) * (0.55 + 0.6 * order[:, None])
    colour = (high + (low - high) * np.exp(-(((order - 0.55) / 0.25) ** 2))[:, None] * 0.8) * tone
    centre = head.middle + head.disc * (across + dome[:, None] * head.facing)
    seeds = make_blobs(centre, np.full(n, 1.25 * head.disc / np.sqrt(n)), colour, gloss=0.25)
    count = int(rng.integers(species.stamens[0], species.stamens[1] + 1))
    return [seeds, *(_stamens(rng, species, head, count, low, high) if count else ())]


def _stamens(
    rng: np.random.Generator, species: Species, head: _Head, count: int, dark: Floats, bright: Floats
) -> tuple[Blades, Blobs]:
    """A few long stamens in a regular ring, or many short ones at random; on each an anther."""
    many = count > 8
    out = head.around(rng.uniform(0, 6.28, count) if many else np.arange(count) * 6.2832 / count)
    angle = rng.uniform(0.5, 1.3, count) if many else rng.normal(0.95, 0.08, count)
    length = species.stamen_length * head.radius * rng.uniform(0.75, 1.05, count)
    base = head.middle + head.disc * (0.6 * out + 0.2 * head.facing)
    threads = make_blades(
        count, base=base, out=out, normal=head.facing, length=length, width=0.011 * head.radius, elevation=angle,
        inner=bright, outer=bright, edge=bright, outline=(0.0, 0.0),
    )  # fmt: skip
    tip = base + (np.cos(angle) * length)[:, None] * out + (np.sin(angle) * length)[:, None] * head.facing
    size = head.radius * (0.024 if many else 0.03) * rng.uniform(0.8, 1.3, count)
    return threads, make_blobs(tip, size, (bright if many else dark) * rng.uniform(0.6, 1.2, (count, 1)))


def make_blobs(centre: Array, radius: Array, colour: Array, glow: Array | float = 0.0, gloss: float = 0.15) -> Blobs:
    """Balls of float32 arrays; a scalar glow is repeated."""
    n = len(radius)
    spread = np.broadcast_to(np.asarray(glow, np.float32), (n,))
    return Blobs(
        np.asarray(centre, np.float32),
        np.asarray(radius, np.float32),
        np.clip(np.broadcast_to(colour, (n, 3)), 0, 1).astype(np.float32),
        np.ascontiguousarray(spread),
        gloss,
    )


def leafy_stem(rng: np.random.Generator, head: Sequence[float], radius: float, leaves: int) -> list[Blades | Blobs]:
    """A stem from behind the head to below the frame, and leaves along it."""
    x, y, z = head
    lean = rng.uniform(-0.25, 0.25)
    length = max(0.3, 1.25 - y)
    direction = unit_vectors(np.array([lean, 1.0, 0.0]))
    green = pick(rng, GREENS, 1)[0]
    width = radius * rng.uniform(0.035, 0.055)
    start = np.array([x, y, z - 0.10 * radius])
    sway = rng.uniform(-0.15, 0.15)
    stem = make_blades(
        1, base=start, out=direction, normal=(0, 0, 1), length=length, width=width, cup=-1.0, sway=sway,
        inner=green * 1.1, outer=green, edge=green * 0.8, outline=(0.0, 0.0), gloss=0.08,
    )  # fmt: skip
    if not leaves:
        return [stem]
    t = np.sort(rng.uniform(0.25, 0.85, leaves))
    across = cross(np.array([0, 0, 1], np.float32), direction)
    base = start + direction * (t * length)[:, None] + across * (sway * length * t**2)[:, None]
    sides = np.where(np.arange(leaves) % 2 == 0, 1.0, -1.0) * rng.choice([-1.0, 1.0])
    out = unit_vectors(np.stack([sides, rng.uniform(-1.1, -0.2, leaves), rng.uniform(-0.2, 0.6, leaves)], 1))
    toward = unit_vectors(np.stack([np.zeros(leaves), rng.uniform(-0.9, -0.3, leaves), np.ones(leaves)], 1))
    normal = unit_vectors(toward - (toward * out).sum(1, keepdims=True) * out)
    size = radius * rng.uniform(0.8, 1.5, leaves)
    colour = green * rng.uniform(0.7, 1.2, (leaves, 1))
    blades = make_blades(
        leaves, base=base, out=out, normal=normal, length=size, width=size * rng.uniform(0.16, 0.3, leaves),
        elevation=0.3, curl=rng.uniform(-1.3, -0.4, leaves), cup=0.35, phase=rng.uniform(0, 6.28, leaves),
        inner=colour, outer=colour, edge=colour * 1.1, outline=(0.5, 0.85), ruffle=0.12, veins=(11.0, 0.16, 1.0),
        gloss=0.2,
    )  # fmt: skip
    return [stem, blades]


def hanging_leaves(
    rng: np.random.Generator, n: int, size: Range, codes: Sequence[str], rows: Range, *, wide: Range = (0.2, 0.34)
) -> Blades:
    """n leaves hanging every way between the heights `rows` (frames from the top)."""
    base = np.stack([rng.uniform(-0.1, 1.1, n), rng.uniform(*rows, n), rng.uniform(-0.12, 0.12, n)], 1)
    out = unit_vectors(np.stack([rng.normal(0, 1, n), rng.normal(0.25, 0.8, n), rng.normal(0, 0.5, n)], 1))
    toward = unit_vectors(np.stack([rng.normal(0, 0.45, n), rng.normal(-0.45, 0.4, n), np.ones(n)], 1))
    normal = unit_vectors(toward - (toward * out).sum(1, keepdims=True) * out)
    colour = pick(rng, codes, n) * rng.uniform(0.45, 1.25, (n, 1)) * (1 + 2.2 * base[:, 2:])
    length = rng.uniform(*size, n)
    return make_blades(
        n, base=base, out=out, normal=normal, length=length, width=length * rng.uniform(*wide),
        curl=rng.normal(-0.5, 0.4, n), cup=rng.uniform(0.1, 0.6), phase=rng.uniform(0, 6.28, n),
        inner=colour, outer=colour, edge=colour * 1.12, outline=(0.5, 0.8), veins=(9.0, 0.18, 1.0), gloss=0.22,
    )  # fmt: skip


def grass(rng: np.random.Generator, n: int, height: Range, codes: Sequence[str], rows: Range, width: float) -> Blades:
    """n blades of grass rooted between the heights `rows`; roots lower in the frame are nearer."""
    y = np.sort(rng.uniform(*rows, n))
    near = (y - rows[0]) / max(1e-3, rows[1] - rows[0])
    base = np.stack([rng.uniform(-0.1, 1.1, n), y, 0.2 * near - 0.1], 1)
    colour = pick(rng, codes, n) * rng.uniform(0.5, 1.4, (n, 1))
    out = unit_vectors(np.stack([rng.normal(0, 0.3, n), -np.ones(n), rng.normal(0, 0.2, n)], 1))
    return make_blades(
        n, base=base, out=out, normal=(0, -0.2, 0.98), length=rng.uniform(*height, n), width=width,
        curl=rng.normal(0, 0.5, n), cup=0.4, sway=rng.normal(0, 0.3, n), inner=colour * 0.6, outer=colour,
        edge=colour * 1.15, outline=(0.1, 0.6), gloss=0.15, through=0.6, blotch=0.6,
    )  # fmt: skip


def twigs(rng: np.random.Generator, n: int, rows: Range) -> Blades:
    """Thin branches: half of them come in from a side of the frame."""
    brown = pick(rng, LITTER, n) * rng.uniform(0.4, 1.0, (n, 1))
    side = rng.choice(np.array([-1.0, 1.0]), n)
    x = np.where(rng.random(n) < 0.5, 0.5 - 0.58 * side, rng.uniform(0, 1, n))
    base = np.stack([x, rng.uniform(*rows, n), rng.uniform(-0.1, 0.1, n)], 1)
    angle = rng.normal(0, 0.45, n)
    return make_blades(
        n, base=base, out=np.stack([side * np.cos(angle), np.sin(angle), np.zeros(n)], 1), normal=(0, 0, 1),
        length=rng.uniform(0.25, 0.7, n), width=rng.uniform(0.003, 0.008, n), cup=-1.0, sway=rng.normal(0, 0.3, n),
        inner=brown, outer=brown, edge=brown * 0.8, outline=(0.0, 0.5),
    )  # fmt: skip


def lamps(rng: np.random.Generator, n: int, rows: Range, glow: Range, colour: Floats, size: Range) -> Blobs:
    """Small lights: gaps in the leaves, glints, lamps. Far out of focus each becomes a disc."""
    centre = np.stack([rng.uniform(0, 1, n), rng.uniform(*rows, n), rng.uniform(0.1, 0.15, n)], 1)
    tint = colour * rng.uniform(0.75, 1.0, (n, 3))
    strength = np.exp(rng.uniform(np.log(glow[0]), np.log(glow[1]), n))
    return make_blobs(centre, rng.uniform(*size, n), tint, strength)


def far_flowers(rng: np.random.Generator, n: int, rows: Range, size: Range) -> tuple[Blades, Blobs]:
    """Small heads of two colours: six petals and a centre each."""
    codes = [colours[1] for species in SPECIES.values() for colours in species.colours]
    tones = pick(rng, codes, 2)[rng.integers(2, size=n)]
    centre = np.stack([rng.uniform(0, 1, n), rng.uniform(*rows, n), rng.uniform(0.05, 0.15, n)], 1)
    radius = rng.uniform(*size, n)
    facing = unit_vectors(np.stack([rng.normal(0, 0.5, n), rng.uniform(-1.5, 0, n), np.ones(n)], 1))
    right = unit_vectors(np.stack([facing[:, 2], np.zeros(n), -facing[:, 0]], 1))
    up = cross(facing, right)
    azimuth = np.arange(6) * np.pi / 3
    out = np.cos(azimuth)[None, :, None] * right[:, None] + np.sin(azimuth)[None, :, None] * up[:, None]
    colour = tones.repeat(6, axis=0)
    petals = make_blades(
        6 * n, base=centre.repeat(6, axis=0), out=out.reshape(-1, 3), normal=facing.repeat(6, axis=0),
        length=radius.repeat(6), width=0.4 * radius.repeat(6), elevation=0.3, inner=colour, outer=colour,
        edge=np.minimum(1, 1.2 * colour), outline=(0.6, 0.3), through=0.5,
    )  # fmt: skip
    return petals, make_blobs(centre, 0.25 * radius, linear("#c99a1c"))
