"""What stands in front of the camera: one flower, its companions, and a background, each at its distance.

A scene is drawn from a random generator and knows nothing of pixels: positions are in frame widths, distances in
metres, colours linear RGB. `rasterise` draws it at a size, layer by layer from the farthest to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from functools import lru_cache

import numpy as np

from cyclegan_fast.data._raster import Blades, Blobs, Canvas, Floats, Light, fractal_noise, merged

Range = tuple[float, float]
_FOCAL, _SENSOR = 0.085, 0.036  # of the framing: an 85 mm lens on a 36 mm sensor; sets how sizes shrink with distance


@dataclass(frozen=True)
class Texture:
    """A surface that fills the frame or a part of it, described by noise instead of by pieces.

    kind: "sky" | "trees" | "ground" | "turf" | "planks" | "thicket"; `top` is where it begins, in frames from the upper border.
    """

    kind: str
    colours: tuple[Floats, ...]
    seed: int
    top: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """Everything at one distance (metres)."""

    depth: float
    items: tuple[Texture | Blades | Blobs, ...]
    shadows: float = 0.0  # strength of the shadows that its pieces cast on one another


@dataclass(frozen=True)
class Scene:
    """Layers from the farthest to the nearest; `focus` is the distance of the main flower in metres."""

    layers: tuple[Layer, ...]
    light: Light
    focus: float
    aperture: float
    exposure: Floats
    develop_seed: int


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
        (8, 8), (1, 1), (0.75, 0.30), (0.36, 0.44), (0.0, 0.3), 0.0, 0.0, (-0.4, 0.2), (-0.15, 0.25), (0.1, 0.8),
        (0.16, 0.22), (*_PINKS, *_PURPLES[:1], *_WHITES), _YELLOW_CENTRE, notch=(0.07, 4.0), veins=(9.0, 0.18, 0.0),
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
        (0.05, 0.06), (*_REDS, *_YELLOWS, *_PURPLES[:2], *_PINKS[:2]), _DARK_CENTRE, veins=(11.0, 0.14, 0.0), blotch=0.6,
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
_GREENS = ("#46621f", "#5a7530", "#34522c", "#6f8440", "#566b45", "#7f8d45", "#3d5438")
_LITTER = ("#6b4a2b", "#8a6a45", "#4e3a28", "#a08055", "#75603f", "#5d6b35")


@lru_cache(maxsize=256)
def linear(*codes: str) -> Floats:
    """Hex sRGB codes as linear RGB [n, 3]."""
    encoded = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes], np.float32) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _pick(rng: np.random.Generator, codes: Sequence[str], n: int) -> Floats:
    """n of the colours, linear RGB [n, 3]."""
    return linear(*codes)[rng.integers(len(codes), size=n)]


def _some(rng: np.random.Generator, codes: Sequence[str], n: int) -> list[str]:
    return [codes[int(i)] for i in rng.integers(len(codes), size=n)]


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene, every choice made by `rng`."""
    light = _light(rng)
    focus = float(rng.uniform(0.45, 0.8))
    setting = _SETTINGS[int(rng.choice(len(_SETTINGS), p=[0.26, 0.26, 0.14, 0.12, 0.12, 0.10]))]
    species = SPECIES[str(rng.choice(list(SPECIES)))]
    palette = int(rng.integers(len(species.colours)))
    layers = setting(rng, focus)
    layers += _companions(rng, species, palette, focus)
    layers += _main_flower(rng, species, palette, focus)
    if rng.random() < 0.3:
        layers.append(_foreground(rng, focus))
    layers.sort(key=lambda layer: -layer.depth)
    return Scene(
        layers=tuple(layers),
        light=light,
        focus=focus,
        aperture=float(np.exp(rng.uniform(np.log(2.0), np.log(5.6)))),
        exposure=rng.uniform(0.85, 1.15, 2).astype(np.float32),
        develop_seed=int(rng.integers(2**31)),
    )


def rasterise(scene: Scene, size: int) -> list[tuple[float, Floats, Floats]]:
    """The layers of a scene, farthest first: (distance in metres, premultiplied linear RGBA [4, S, S], distance [S, S]).

    The distance of a pixel is infinite where its layer is empty.
    """
    return [(layer.depth, *_rasterise_layer(layer, scene, size)) for layer in scene.layers]


def _rasterise_layer(layer: Layer, scene: Scene, size: int) -> tuple[Floats, Floats]:
    near = layer.depth < 1.6 * scene.focus
    # Two samples a pixel each way; small pictures do without behind the flower, very large ones everywhere.
    factor = 1 if size > 1024 or (64 < size < 192 and not near) else 2
    canvas = Canvas(size * factor)
    textures = [item for item in layer.items if isinstance(item, Texture)]
    pieces = [item for item in layer.items if not isinstance(item, Texture)]
    for item in pieces:
        canvas.draw(item, scene.light)
    if pieces:
        canvas.contact_shadows(scene.light, strength=layer.shadows)
    rgba, z = canvas.layer(size)
    depth = np.where(np.isfinite(z), layer.depth - z * frame_width(layer.depth), np.inf)
    for texture in reversed(textures):
        behind = paint(texture, size, scene.light)
        rgba = rgba + behind * (1 - rgba[3])
    depth = np.where((rgba[3] > 0.5) & ~np.isfinite(depth), layer.depth, depth)
    return rgba.astype(np.float32), np.maximum(depth, 0.05).astype(np.float32)


def frame_width(depth: float) -> float:
    """Metres across the frame at a distance in metres (thin lens)."""
    return _SENSOR * (depth - _FOCAL) / _FOCAL


def paint(texture: Texture, size: int, light: Light) -> Floats:
    """Premultiplied linear RGBA [4, size, size] of a texture."""
    painters: dict[str, Callable[[Texture, int, Light], tuple[Floats, Floats]]]
    painters = {"sky": _sky, "trees": _trees, "ground": _ground, "turf": _turf}
    painters |= {"planks": _planks, "thicket": _thicket}
    rgb, alpha = painters[texture.kind](texture, size, light)
    return np.concatenate([rgb * alpha, alpha[None]]).astype(np.float32)


def _rows(size: int) -> Floats:
    return ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]


def _mix(weight: Floats, low: Floats, high: Floats) -> Floats:
    """Colours [3, S, S] between two, by weight [S, S]."""
    return np.asarray(low[:, None, None] + (high - low)[:, None, None] * weight)


def _ramp(x: Floats, low: float, high: float) -> Floats:
    u = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(u * u * (3 - 2 * u))


def _sky(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    zenith, horizon, cloud = texture.colours
    rows = np.broadcast_to(_rows(size), (size, size))
    puffs = _ramp(fractal_noise(texture.seed, size, (3 * texture.scale, 2 * texture.scale)), 0.2, 1.4)
    rgb = _mix(rows, zenith, horizon)
    return rgb + (cloud[:, None, None] - rgb) * puffs, np.ones((size, size), np.float32)


def _relief(noise: Floats, step: float) -> Floats:
    """Noise as heights lit from above: bright where it falls off upwards, dark below; about [-1, 1]."""
    return np.asarray(noise - np.roll(noise, max(1, round(step * len(noise))), axis=0))


def _foliage(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """Brightness of leaves that are too far or too many to draw, and the clumps they grow in."""
    leaves = fractal_noise(texture.seed, size, (13 * texture.scale, 16 * texture.scale), gain=0.7, finest=2.2)
    clumps = fractal_noise(texture.seed + 1, size, (4 * texture.scale, 5 * texture.scale), gain=0.5)
    return 0.4 * leaves + 0.5 * _relief(leaves, 0.015) + 0.8 * _relief(clumps, 0.05) + 0.4 * clumps, clumps


def _trees(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    """A wall of foliage seen from afar, with a ragged skyline at `top`."""
    bright, clumps = _foliage(texture, size)
    rgb = _mix(_ramp(bright, -1.7, 2.6), *texture.colours)
    skyline = _rows(size) - texture.top + 0.03 * clumps + 0.006 * bright
    return rgb * (light.sun * 0.55 + light.sky)[:, None, None], _ramp(skyline, -0.004, 0.004)


def _ground(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    """Soil and litter."""
    grain = fractal_noise(texture.seed, size, (22 * texture.scale, 14 * texture.scale), gain=0.75, finest=2.0)
    patches = fractal_noise(texture.seed + 1, size, (3, 2))
    rgb = _mix(_ramp(grain + 0.5 * patches, -2.0, 2.6), *texture.colours)
    return rgb * (light.sun * 0.6 + light.sky)[:, None, None], np.ones((size, size), np.float32)


def _turf(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    """Grass seen from the side: upright streaks, finer and paler towards the horizon at `top`."""
    blades = fractal_noise(texture.seed, size, (8 * texture.scale, 45 * texture.scale), gain=0.75, finest=2.0)
    patches = fractal_noise(texture.seed + 1, size, (7, 3))
    below = np.clip((_rows(size) - texture.top) / max(0.05, 1 - texture.top), 0, 1)
    rgb = _mix(_ramp(blades * (0.45 + 0.75 * below) + 0.35 * patches, -1.7, 2.4), *texture.colours)
    rgb = rgb * (1.15 - 0.5 * below)
    edge = _ramp(_rows(size) - texture.top + 0.006 * blades, -0.008, 0.008)
    return rgb * (light.sun * 0.6 + light.sky)[:, None, None], edge


def _planks(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    """A fence of upright boards with dark gaps between them."""
    across = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :]
    boards = across * texture.scale + 0.3
    own = np.random.default_rng(texture.seed).uniform(0.72, 1.0, 64).astype(np.float32)[boards.astype(int)]
    grain = fractal_noise(texture.seed, size, (1.6, 34), gain=0.85)
    stains = fractal_noise(texture.seed + 1, size, (5, 9), gain=0.7)
    rgb = _mix(_ramp(0.8 * grain + 0.5 * stains, -3.2, 3.2), *texture.colours) * own
    gap = np.abs(boards % 1 - 0.5)
    rgb = rgb * (1 - 0.95 * _ramp(gap, 0.468, 0.482)) * (1 + 0.25 * _ramp(boards % 1, 0.88, 0.95))
    return rgb * (light.sun * 0.6 + light.sky)[:, None, None], np.ones((size, size), np.float32)


def _thicket(texture: Texture, size: int, light: Light) -> tuple[Floats, Floats]:
    """Foliage in the shade that fills the frame."""
    bright, _ = _foliage(texture, size)
    rgb = _mix(_ramp(bright, -1.4, 3.2), *texture.colours)
    return rgb * (light.sun * 0.45 + light.sky)[:, None, None], np.ones((size, size), np.float32)


def _light(rng: np.random.Generator) -> Light:
    side = float(rng.choice([-1.0, 1.0]))
    behind = rng.random() < 0.22
    direction = np.array(
        [side * rng.uniform(0.25, 0.8), -rng.uniform(0.55, 1.0), -0.45 if behind else rng.uniform(0.3, 0.9)]
    )
    overcast = float(rng.random() < 0.3)
    warm = rng.uniform(0.0, 1.0)
    sun = np.array([1.0, 0.95 - 0.13 * warm, 0.88 - 0.33 * warm]) * (1.5 - 1.0 * overcast)
    sky = np.array([0.78, 0.9, 1.1]) * (0.42 + 0.38 * overcast)
    bounce = np.array([0.9, 1.0, 0.6]) * (0.12 + 0.1 * overcast)
    unit = direction / np.linalg.norm(direction)
    return Light(*(a.astype(np.float32) for a in (unit, sun, sky, bounce)))


def _unit(vectors: Floats) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _blades(n: int, **given: object) -> Blades:
    """Blades whose missing arrays are 0; scalars and single rows are repeated n times."""
    filled: dict[str, object] = dict.fromkeys(("elevation", "curl", "cup", "sway", "phase"), 0.0) | given
    for name, columns in _BLADE_COLUMNS.items():
        array = np.empty((n, columns) if columns else n, np.float32)
        array[...] = filled[name]
        filled[name] = array
    return Blades(**filled)  # type: ignore[arg-type]


def _head(
    rng: np.random.Generator, species: Species, palette: int, centre: Sequence[float], radius: float, closed: float = 0.0
) -> list[Blades | Blobs]:
    """A flower head: petals in whorls, sepals, disc, stamens. `closed` in [0, 1] makes a bud of it."""
    pitch, yaw = rng.uniform(*species.pitch), rng.uniform(-0.6, 0.6)
    facing = _unit(np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)]))
    right = _unit(np.cross([0.0, 1.0, 0.0], facing))
    axes = np.stack([right, np.cross(facing, right)])
    middle = np.asarray(centre, np.float32)
    disc = float(rng.uniform(*species.disc)) * radius
    petals = _petals(rng, species, palette, middle, facing, axes, radius, disc, closed)
    parts: list[Blades | Blobs] = [petals]
    if pitch > 0.5 or closed > 0.5:
        parts.append(_sepals(rng, middle - 0.03 * radius * facing, facing, axes, radius * (0.34 + 0.4 * closed), closed))
    if closed < 0.5:
        parts += _disc(rng, species, middle, facing, axes, radius, disc)
    return parts


def _around(azimuth: Floats, axes: Floats) -> Floats:
    return (np.cos(azimuth)[:, None] * axes[0] + np.sin(azimuth)[:, None] * axes[1]).astype(np.float32)


def _petals(
    rng: np.random.Generator,
    species: Species,
    palette: int,
    middle: Floats,
    facing: Floats,
    axes: Floats,
    radius: float,
    disc: float,
    closed: float,
) -> Blades:
    count = int(rng.integers(species.petals[0], species.petals[1] + 1))
    whorls = int(rng.integers(species.whorls[0], species.whorls[1] + 1))
    whorl = np.repeat(np.arange(whorls), count).astype(np.float32)
    n = len(whorl)
    step = 2 * np.pi / count
    turn = rng.uniform(0, 2 * np.pi)
    azimuth = turn + np.tile(np.arange(count), whorls) * step + whorl * step * 0.5 + rng.normal(0, 0.06 * step, n)
    out = _around(azimuth, axes)
    elevation = rng.uniform(*species.elevation) + species.rise * whorl + rng.normal(0, 0.06, n)
    elevation = elevation * (1 - closed) + 1.35 * closed
    size = 1 - species.shrink * whorl
    # Petals of the middle of a full flower stand on a smaller circle.
    base = middle + out * (disc * 0.75 * size**2)[:, None] + facing * (0.04 * radius * whorl)[:, None]
    inner, outer, edge = linear(*species.colours[palette])
    tone = rng.normal(1, 0.07, (n, 1))
    length = (radius - disc * 0.75) * size * rng.normal(1, 0.05, n)
    cup = rng.uniform(*species.cup) + rng.normal(0, 0.06, n)
    curl = rng.uniform(*species.curl) + rng.normal(0, 0.12, n) + 0.35 * np.maximum(0, species.rise) * whorl
    return _blades(
        n,
        base=base,
        out=out,
        normal=facing,
        length=length,
        width=length * rng.uniform(*species.width) * (1 - 0.45 * closed),
        elevation=elevation,
        curl=curl * (1 - closed) + 0.5 * closed,
        cup=cup * (1 - closed) + 0.7 * closed,
        sway=rng.normal(0, 0.05, n),
        phase=rng.uniform(0, 6.28, n),
        inner=inner * tone,
        outer=outer * tone,
        edge=edge * tone,
        outline=species.outline,
        twist=species.twist,
        ruffle=species.ruffle,
        notch=species.notch,
        veins=species.veins,
        blotch=species.blotch,
        gloss=0.12,
        through=0.45,
    )


def _sepals(
    rng: np.random.Generator, middle: Floats, facing: Floats, axes: Floats, length: float, closed: float
) -> Blades:
    out = _around(np.arange(5) * 1.2566 + rng.uniform(0, 6.28), axes)
    green = _pick(rng, _GREENS, 5)
    elevation = -0.25 if closed < 0.5 else 1.25
    return _blades(
        5, base=middle, out=out, normal=facing, length=length, width=length * 0.22, elevation=elevation, curl=0.3,
        cup=0.5, inner=green * 0.8, outer=green, edge=green * 1.2, outline=(0.4, 0.9), veins=(3.0, 0.2, 0.0),
    )  # fmt: skip


def _disc(
    rng: np.random.Generator, species: Species, middle: Floats, facing: Floats, axes: Floats, radius: float, disc: float
) -> list[Blades | Blobs]:
    """Seeds on a dome in the order of a sunflower (golden angle), and stamens with their anthers."""
    low, high = linear(*species.centre[int(rng.integers(len(species.centre)))])
    n = int(np.clip(900 * disc, 24, 260))
    order = (np.arange(n) + 0.5) / n
    azimuth = 2.39996 * np.arange(n)
    where = np.sqrt(order)
    dome = 0.32 * (1 - order) + 0.22
    centre = middle + disc * (where[:, None] * _around(azimuth, axes) + dome[:, None] * facing)
    tone = rng.normal(1, 0.12, (n, 1)) * (0.55 + 0.6 * order[:, None])
    colour = (high + (low - high) * np.exp(-(((order - 0.55) / 0.25) ** 2))[:, None] * 0.8) * tone
    seeds = Blobs(*_float32(centre, 1.25 * disc / np.sqrt(n) * np.ones(n), np.clip(colour, 0, 1), np.zeros(n)), gloss=0.25)
    parts: list[Blades | Blobs] = [seeds]
    count = int(rng.integers(species.stamens[0], species.stamens[1] + 1))
    if count:
        out = _around(rng.uniform(0, 6.28, count) if count > 8 else np.arange(count) * 6.2832 / count, axes)
        angle = rng.uniform(0.5, 1.3, count) if count > 8 else rng.normal(0.95, 0.08, count)
        length = species.stamen_length * radius * rng.uniform(0.75, 1.05, count)
        base = middle + disc * 0.6 * out + facing * 0.2 * disc
        parts.append(
            _blades(
                count, base=base, out=out, normal=facing, length=length, width=0.011 * radius, elevation=angle,
                inner=high, outer=high, edge=high, outline=(0.0, 0.0),
            )
        )  # fmt: skip
        tip = base + (np.cos(angle) * length)[:, None] * out + (np.sin(angle) * length)[:, None] * facing
        size = radius * (0.024 if count > 8 else 0.03) * rng.uniform(0.8, 1.3, count)
        anther = (low if count <= 8 else high) * rng.uniform(0.6, 1.2, (count, 1))
        parts.append(Blobs(*_float32(tip, size, np.clip(anther, 0, 1), np.zeros(count))))
    return parts


def _float32(*arrays: Floats) -> tuple[Floats, ...]:
    return tuple(np.asarray(a, np.float32) for a in arrays)


def _stem(rng: np.random.Generator, head: Sequence[float], radius: float, leaves: int) -> list[Blades | Blobs]:
    """A stem from behind the head to below the frame, and leaves along it."""
    x, y, z = head
    lean = rng.uniform(-0.25, 0.25)
    length = max(0.3, 1.25 - y)
    direction = _unit(np.array([lean, 1.0, 0.0]))
    green = _pick(rng, _GREENS, 1)[0]
    width = radius * rng.uniform(0.035, 0.055)
    start = np.array([x, y, z - 0.10 * radius])
    sway = rng.uniform(-0.15, 0.15)
    stem = _blades(
        1, base=start, out=direction, normal=(0, 0, 1), length=length, width=width, cup=-1.0, sway=sway,
        inner=green * 1.1, outer=green, edge=green * 0.8, outline=(0.0, 0.0), gloss=0.08,
    )  # fmt: skip
    if not leaves:
        return [stem]
    t = np.sort(rng.uniform(0.25, 0.85, leaves))
    across = np.cross([0, 0, 1.0], direction)
    base = start + direction * (t * length)[:, None] + across * (sway * length * t**2)[:, None]
    sides = np.where(np.arange(leaves) % 2 == 0, 1.0, -1.0) * rng.choice([-1.0, 1.0])
    out = _unit(np.stack([sides, rng.uniform(-1.1, -0.2, leaves), rng.uniform(-0.2, 0.6, leaves)], 1))
    toward = _unit(np.stack([np.zeros(leaves), rng.uniform(-0.9, -0.3, leaves), np.ones(leaves)], 1))
    normal = _unit(toward - (toward * out).sum(1, keepdims=True) * out)
    size = radius * rng.uniform(0.8, 1.5, leaves)
    colour = green * rng.uniform(0.7, 1.2, (leaves, 1))
    blades = _blades(
        leaves, base=base, out=out, normal=normal, length=size, width=size * rng.uniform(0.16, 0.3, leaves), elevation=0.3,
        curl=rng.uniform(-1.3, -0.4, leaves), cup=0.35, phase=rng.uniform(0, 6.28, leaves), inner=colour, outer=colour,
        edge=colour * 1.1, outline=(0.5, 0.85), ruffle=0.12, veins=(11.0, 0.16, 1.0), gloss=0.2,
    )  # fmt: skip
    return [stem, blades]


def _main_flower(rng: np.random.Generator, species: Species, palette: int, focus: float) -> list[Layer]:
    radius = float(rng.uniform(0.2, 0.34) if rng.random() < 0.75 else rng.uniform(0.34, 0.46))
    x, y = rng.uniform(0.34, 0.66), rng.uniform(0.32, 0.56)
    head = (float(x), float(y), 0.0)
    if species.pitch[0] > 0.9:  # a flower seen from the side hides half of its width
        radius *= 1.3
    head = (head[0], max(head[1], 0.1 + 0.75 * radius), 0.0)
    flower = _head(rng, species, palette, head, radius)
    stem = _stem(rng, head, radius, int(rng.integers(0, 5)))
    return [Layer(focus + 0.02, tuple(stem), 0.5), Layer(focus, tuple(flower), 0.65)]


def _companions(rng: np.random.Generator, species: Species, palette: int, focus: float) -> list[Layer]:
    """Flowers and buds of the same kind farther away; sometimes of another colour."""
    layers = []
    for _ in range(int(rng.choice([0, 1, 2], p=[0.3, 0.45, 0.25]))):
        depth = focus * float(rng.uniform(1.25, 2.2))
        items: list[Blades | Blobs] = []
        for _ in range(int(rng.integers(1, 3))):
            radius = float(rng.uniform(0.22, 0.3)) * focus / depth
            head = (float(rng.uniform(0.02, 0.98)), float(rng.uniform(0.2, 0.8)), float(rng.uniform(-0.05, 0.05)))
            other = palette if rng.random() < 0.7 else int(rng.integers(len(species.colours)))
            bud = rng.random() < 0.25
            items += _head(rng, species, other, head, radius * (0.6 if bud else 1.0), closed=1.0 if bud else 0.0)
            items += _stem(rng, head, radius, int(rng.integers(0, 2)))
        layers.append(Layer(depth, tuple(merged(items)), 0.5))
    return layers


def _foreground(rng: np.random.Generator, focus: float) -> Layer:
    """A few leaves or blades of grass between the camera and the flower, low in the frame."""
    n = int(rng.integers(2, 6))
    side = float(rng.choice([0.0, 1.0]))
    base = np.stack([side + rng.normal(0, 0.16, n), rng.uniform(1.05, 1.2, n), rng.normal(0, 0.03, n)], 1)
    green = _pick(rng, _GREENS, n)
    length = rng.uniform(0.3, 0.55, n)
    blades = _blades(
        n, base=base, out=_unit(np.stack([rng.normal(0, 0.35, n), -np.ones(n), rng.normal(0, 0.2, n)], 1)),
        normal=(0, 0, 1), length=length, width=length * rng.uniform(0.05, 0.14, n), curl=rng.normal(0, 0.5, n), cup=0.3,
        sway=rng.normal(0, 0.25, n), inner=green, outer=green, edge=green * 1.15, outline=(0.35, 0.9),
        veins=(7.0, 0.2, 0.0), gloss=0.2,
    )  # fmt: skip
    return Layer(focus * float(rng.uniform(0.68, 0.8)), (blades,))


def _leaves(
    rng: np.random.Generator, n: int, size: Range, codes: Sequence[str], rows: Range, *, wide: Range = (0.2, 0.34)
) -> Blades:
    """n leaves hanging every way between the heights `rows` (frames from the top)."""
    base = np.stack([rng.uniform(-0.1, 1.1, n), rng.uniform(*rows, n), rng.uniform(-0.12, 0.12, n)], 1)
    out = _unit(np.stack([rng.normal(0, 1, n), rng.normal(0.25, 0.8, n), rng.normal(0, 0.5, n)], 1))
    toward = _unit(np.stack([rng.normal(0, 0.45, n), rng.normal(-0.45, 0.4, n), np.ones(n)], 1))
    normal = _unit(toward - (toward * out).sum(1, keepdims=True) * out)
    colour = _pick(rng, codes, n) * rng.uniform(0.45, 1.25, (n, 1)) * (1 + 2.2 * base[:, 2:])
    length = rng.uniform(*size, n)
    return _blades(
        n, base=base, out=out, normal=normal, length=length, width=length * rng.uniform(*wide),
        curl=rng.normal(-0.5, 0.4, n), cup=rng.uniform(0.1, 0.6), phase=rng.uniform(0, 6.28, n), inner=colour, outer=colour,
        edge=colour * 1.12, outline=(0.5, 0.8), veins=(9.0, 0.18, 1.0), gloss=0.22,
    )  # fmt: skip


def _grass(rng: np.random.Generator, n: int, height: Range, codes: Sequence[str], rows: Range, width: float) -> Blades:
    """n blades of grass rooted between the heights `rows`; roots lower in the frame are nearer."""
    y = np.sort(rng.uniform(*rows, n))
    near = (y - rows[0]) / max(1e-3, rows[1] - rows[0])
    base = np.stack([rng.uniform(-0.1, 1.1, n), y, 0.2 * near - 0.1], 1)
    colour = _pick(rng, codes, n) * rng.uniform(0.5, 1.4, (n, 1))
    out = _unit(np.stack([rng.normal(0, 0.3, n), -np.ones(n), rng.normal(0, 0.2, n)], 1))
    return _blades(
        n, base=base, out=out, normal=(0, -0.2, 0.98), length=rng.uniform(*height, n), width=width,
        curl=rng.normal(0, 0.5, n), cup=0.4, sway=rng.normal(0, 0.3, n), inner=colour * 0.6, outer=colour,
        edge=colour * 1.15, outline=(0.1, 0.6), gloss=0.15, through=0.6, blotch=0.6,
    )  # fmt: skip


def _twigs(rng: np.random.Generator, n: int, rows: Range) -> Blades:
    """Thin branches: half of them come in from a side of the frame."""
    brown = _pick(rng, _LITTER, n) * rng.uniform(0.4, 1.0, (n, 1))
    side = rng.choice(np.array([-1.0, 1.0]), n)
    x = np.where(rng.random(n) < 0.5, 0.5 - 0.58 * side, rng.uniform(0, 1, n))
    base = np.stack([x, rng.uniform(*rows, n), rng.uniform(-0.1, 0.1, n)], 1)
    angle = rng.normal(0, 0.45, n)
    return _blades(
        n, base=base, out=np.stack([side * np.cos(angle), np.sin(angle), np.zeros(n)], 1), normal=(0, 0, 1),
        length=rng.uniform(0.25, 0.7, n), width=rng.uniform(0.003, 0.008, n), cup=-1.0, sway=rng.normal(0, 0.3, n),
        inner=brown, outer=brown, edge=brown * 0.8, outline=(0.0, 0.5),
    )  # fmt: skip


def _lamps(rng: np.random.Generator, n: int, rows: Range, glow: Range, colour: Floats, size: Range) -> Blobs:
    """Small lights: gaps in the leaves, glints, lamps. Far out of focus each becomes a disc."""
    centre = np.stack([rng.uniform(0, 1, n), rng.uniform(*rows, n), rng.uniform(0.1, 0.15, n)], 1)
    tint = colour * rng.uniform(0.75, 1.0, (n, 3))
    strength = np.exp(rng.uniform(np.log(glow[0]), np.log(glow[1]), n))
    return Blobs(*_float32(centre, rng.uniform(*size, n), tint, strength))


def _far_flowers(rng: np.random.Generator, n: int, rows: Range, size: Range) -> tuple[Blades, Blobs]:
    """Small heads of two colours: six petals and a centre each."""
    codes = [colours[1] for species in SPECIES.values() for colours in species.colours]
    tones = _pick(rng, codes, 2)[rng.integers(2, size=n)]
    centre = np.stack([rng.uniform(0, 1, n), rng.uniform(*rows, n), rng.uniform(0.05, 0.15, n)], 1)
    radius = rng.uniform(*size, n)
    facing = _unit(np.stack([rng.normal(0, 0.5, n), rng.uniform(-1.5, 0, n), np.ones(n)], 1))
    right = _unit(np.stack([facing[:, 2], np.zeros(n), -facing[:, 0]], 1))
    up = np.cross(facing, right)
    azimuth = np.arange(6) * np.pi / 3
    out = np.cos(azimuth)[None, :, None] * right[:, None] + np.sin(azimuth)[None, :, None] * up[:, None]
    colour = tones.repeat(6, axis=0)
    petals = _blades(
        6 * n, base=centre.repeat(6, axis=0), out=out.reshape(-1, 3), normal=facing.repeat(6, axis=0),
        length=radius.repeat(6), width=0.4 * radius.repeat(6), elevation=0.3, inner=colour, outer=colour,
        edge=np.minimum(1, 1.2 * colour), outline=(0.6, 0.3), through=0.5,
    )  # fmt: skip
    return petals, Blobs(*_float32(centre, 0.25 * radius, linear("#c99a1c").repeat(n, axis=0), np.zeros(n)))


def _skylight(rng: np.random.Generator, clouds: float = 1.0) -> Layer:
    blue = rng.uniform(0.35, 1.0)
    zenith = np.array([0.42, 0.8, 1.45]) * (1 - 0.55 * blue) + np.array([0.04, 0.05, 0.0])
    horizon = np.array([1.15, 1.3, 1.45])
    cloud = np.array([1.9, 1.9, 1.95]) * rng.uniform(0.8, 1.1)
    return Layer(200.0, (Texture("sky", _float32(zenith, horizon, cloud), int(rng.integers(2**31)), 0.0, clouds),))


def _meadow(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Sky, a line of trees, and grass with flowers in it coming nearer."""
    horizon = float(rng.uniform(0.12, 0.42))
    seed = int(rng.integers(2**31))
    codes = _some(rng, _GREENS, 3) + (["#a8a04a"] if rng.random() < 0.4 else [])
    trees = Texture("trees", tuple(linear("#0e1a0c", "#7d9a4f")), seed, horizon - rng.uniform(0.05, 0.3))
    field_ = Texture("turf", tuple(linear("#1c3010", "#9db35a")), seed + 2, horizon)
    middle = (horizon + 0.08, horizon + 0.5)
    return [
        _skylight(rng),
        Layer(25.0, (trees,)),
        Layer(6.0, (*_far_flowers(rng, int(rng.integers(0, 50)), (horizon + 0.02, 0.75), (0.006, 0.014)),
                    _grass(rng, 420, (0.05, 0.13), codes, middle, 0.0035), field_)),
        Layer(3.0 * focus, (*_far_flowers(rng, int(rng.integers(0, 14)), (horizon + 0.2, 0.95), (0.02, 0.045)),
                            _grass(rng, 210, (0.16, 0.34), codes, (horizon + 0.42, 1.25), 0.006))),
        Layer(1.6 * focus, (_grass(rng, 28, (0.25, 0.5), codes, (0.95, 1.3), 0.008),)),
    ]  # fmt: skip


def _hedge(rng: np.random.Generator, focus: float) -> list[Layer]:
    """A wall of leaves with the light coming through its gaps."""
    codes = _some(rng, _GREENS, 3)
    seed = int(rng.integers(2**31))
    back = Texture("thicket", tuple(linear("#050a04", "#5c7d38")), seed)
    gaps = _lamps(rng, int(rng.integers(4, 24)), (0.0, 0.75), (6, 60), np.array([1.0, 1.0, 0.9]), (0.003, 0.008))
    size = float(rng.uniform(0.07, 0.12))
    return [
        Layer(5.5 * focus, (gaps, back)),
        Layer(4.0 * focus, (_leaves(rng, 230, (0.6 * size, size), codes, (-0.1, 1.1)),
                            _twigs(rng, int(rng.integers(2, 8)), (0, 1))), 0.6),
        Layer(2.6 * focus, (_leaves(rng, 75, (size, 1.7 * size), codes, (0.1, 1.15)),), 0.5),
    ]  # fmt: skip


def _forest_floor(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Looking down on soil, fallen leaves and twigs."""
    seed = int(rng.integers(2**31))
    codes = _some(rng, _LITTER, 4) + _some(rng, _GREENS, 1)
    soil = Texture("ground", tuple(linear("#120c07", "#97805f")), seed, -0.2)
    litter = _leaves(rng, 170, (0.07, 0.17), codes, (-0.1, 1.1))
    near = _leaves(rng, 26, (0.12, 0.22), list(_GREENS[:4]), (0.45, 1.15), wide=(0.25, 0.4))
    return [Layer(3.2 * focus, (litter, _twigs(rng, 22, (0, 1)), soil), 0.6), Layer(1.9 * focus, (near,), 0.5)]


def _fence(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Boards with leaves in front of them."""
    stain = (("#3b2c20", "#b79a78"), ("#4a4a48", "#c9c6bf"), ("#2c3a40", "#7d939c"), ("#5a2d1c", "#b5704a"))
    seed = int(rng.integers(2**31))
    planks = Texture("planks", tuple(linear(*stain[int(rng.integers(4))])), seed, 0.0, float(rng.uniform(3.5, 7.5)))
    codes = _some(rng, _GREENS, 3)
    return [
        Layer(3.6 * focus, (planks,)),
        Layer(2.8 * focus, (_leaves(rng, 70, (0.07, 0.14), codes, (0.45, 1.2)), _twigs(rng, 5, (0.1, 1)))),
        Layer(2.0 * focus, (_grass(rng, 50, (0.2, 0.45), codes, (0.95, 1.3), 0.006),)),
    ]


def _against_sky(rng: np.random.Generator, focus: float) -> list[Layer]:
    """From below, against the sky, with treetops and branches."""
    seed = int(rng.integers(2**31))
    codes = _some(rng, _GREENS, 3)
    trees = Texture("trees", tuple(linear("#0c160a", "#7d9a4f")), seed, float(rng.uniform(0.55, 0.95)))
    return [
        _skylight(rng, 1.4),
        Layer(14.0, (trees,)),
        Layer(3.4 * focus, (_leaves(rng, int(rng.integers(10, 60)), (0.06, 0.12), codes, (-0.15, 0.35)),
                            _twigs(rng, int(rng.integers(3, 9)), (0.0, 0.6)))),
        Layer(2.2 * focus, (_grass(rng, 60, (0.2, 0.5), codes, (0.9, 1.3), 0.006),)),
    ]  # fmt: skip


def _evening_garden(rng: np.random.Generator, focus: float) -> list[Layer]:
    """A dark garden with lamps far behind."""
    seed = int(rng.integers(2**31))
    back = Texture("thicket", tuple(linear("#040608", "#3c4a2c")), seed)
    tint = np.array([[1.0, 0.78, 0.42], [1.0, 0.9, 0.75], [0.75, 0.85, 1.0]])[int(rng.integers(3))]
    lamps = _lamps(rng, int(rng.integers(10, 34)), (0.02, 0.8), (10, 120), tint, (0.002, 0.006))
    codes = _some(rng, _GREENS, 3)
    return [
        Layer(9.0, (lamps, back)),
        Layer(3.4 * focus, (_leaves(rng, 60, (0.06, 0.13), codes, (0.35, 1.15)),)),
        Layer(2.2 * focus, (_grass(rng, 60, (0.2, 0.5), codes, (0.9, 1.3), 0.006),)),
    ]


_SETTINGS: tuple[Callable[[np.random.Generator, float], list[Layer]], ...] = (
    _meadow, _hedge, _forest_floor, _fence, _against_sky, _evening_garden,
)  # fmt: skip
