"""What stands in front of the camera: one flower, its companions, and a background, each at its distance.

A scene is drawn from a random generator and knows nothing of pixels: positions are in frame widths, distances in
metres, colours linear RGB. `rasterise` draws it at a size, layer by layer from the farthest to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cyclegan_fast.data._flora import (
    GREENS,
    LITTER,
    SPECIES,
    Species,
    far_flowers,
    flower_head,
    grass,
    hanging_leaves,
    lamps,
    leafy_stem,
    linear,
    make_blades,
    pick,
    pick_codes,
    twigs,
    unit_vectors,
)
from cyclegan_fast.data._raster import Blades, Blobs, Canvas, Floats, Light, merged
from cyclegan_fast.data._texture import Texture, paint

_FOCAL, _SENSOR = 0.085, 0.036  # of the framing: an 85 mm lens on a 36 mm sensor; sets how sizes shrink with distance


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


def rasterise(scene: Scene, size: int, *, distances: bool) -> Iterator[tuple[float, Floats, Floats | None]]:
    """The layers of a scene, farthest first: distance (metres), premultiplied linear RGBA [4, S, S], distance [S, S].

    The distance of a pixel is infinite where its layer is empty; without `distances` there are none.
    """
    for layer in scene.layers:
        rgba, z = _rasterise_layer(layer, scene, size)
        yield layer.depth, rgba, _distances(layer, rgba, z) if distances else None


def _distances(layer: Layer, rgba: Floats, z: Floats) -> Floats:
    depth = np.where(np.isfinite(z), layer.depth - z * frame_width(layer.depth), np.inf)
    depth = np.where((rgba[3] > 0.5) & ~np.isfinite(depth), layer.depth, depth)
    return np.maximum(depth, 0.05).astype(np.float32)


def _rasterise_layer(layer: Layer, scene: Scene, size: int) -> tuple[Floats, Floats]:
    """Premultiplied linear RGBA [4, S, S] and z [S, S] of the nearest piece, -inf where there is none."""
    textures = [item for item in layer.items if isinstance(item, Texture)]
    pieces = [item for item in layer.items if not isinstance(item, Texture)]
    if not pieces:
        return paint(textures[0], size, scene.light), np.full((size, size), -np.inf, np.float32)
    main = abs(layer.depth - scene.focus) < 0.1 * scene.focus
    # Two samples a pixel each way; small pictures do without except on the flower, very large ones everywhere.
    factor = 1 if size > 1024 or (64 < size < 192 and not main) else 2
    canvas = Canvas(size * factor, 0.72 if size < 192 else 0.85)
    for item in pieces:
        canvas.draw(item)
    canvas.shade(scene.light)
    canvas.contact_shadows(scene.light, strength=layer.shadows)
    rgba, z = canvas.layer(size)
    for texture in reversed(textures):
        behind = paint(texture, size, scene.light)
        rgba = rgba + behind * (1 - rgba[3])
    return rgba, z


def frame_width(depth: float) -> float:
    """Metres across the frame at a distance in metres (thin lens)."""
    return _SENSOR * (depth - _FOCAL) / _FOCAL


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


def _main_flower(rng: np.random.Generator, species: Species, palette: int, focus: float) -> list[Layer]:
    radius = float(rng.uniform(0.2, 0.34) if rng.random() < 0.75 else rng.uniform(0.34, 0.46))
    x, y = rng.uniform(0.34, 0.66), rng.uniform(0.32, 0.56)
    head = (float(x), float(y), 0.0)
    if species.pitch[0] > 0.9:  # a flower seen from the side hides half of its width
        radius *= 1.3
    head = (head[0], max(head[1], 0.1 + 0.75 * radius), 0.0)
    flower = flower_head(rng, species, palette, head, radius)
    stem = leafy_stem(rng, head, radius, int(rng.integers(0, 5)))
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
            items += flower_head(rng, species, other, head, radius * (0.6 if bud else 1.0), closed=1.0 if bud else 0.0)
            items += leafy_stem(rng, head, radius, int(rng.integers(0, 2)))
        layers.append(Layer(depth, tuple(merged(items)), 0.5))
    return layers


def _foreground(rng: np.random.Generator, focus: float) -> Layer:
    """A few leaves or blades of grass between the camera and the flower, low in the frame."""
    n = int(rng.integers(2, 6))
    side = float(rng.choice([0.0, 1.0]))
    base = np.stack([side + rng.normal(0, 0.16, n), rng.uniform(1.05, 1.2, n), rng.normal(0, 0.03, n)], 1)
    green = pick(rng, GREENS, n)
    length = rng.uniform(0.3, 0.55, n)
    blades = make_blades(
        n, base=base, out=unit_vectors(np.stack([rng.normal(0, 0.35, n), -np.ones(n), rng.normal(0, 0.2, n)], 1)),
        normal=(0, 0, 1), length=length, width=length * rng.uniform(0.05, 0.14, n), curl=rng.normal(0, 0.5, n), cup=0.3,
        sway=rng.normal(0, 0.25, n), inner=green, outer=green, edge=green * 1.15, outline=(0.35, 0.9),
        veins=(7.0, 0.2, 0.0), gloss=0.2,
    )  # fmt: skip
    return Layer(focus * float(rng.uniform(0.68, 0.8)), (blades,))


def _skylight(rng: np.random.Generator, clouds: float = 1.0) -> Layer:
    blue = rng.uniform(0.35, 1.0)
    zenith = np.array([0.42, 0.8, 1.45]) * (1 - 0.55 * blue) + np.array([0.04, 0.05, 0.0])
    horizon = np.array([1.15, 1.3, 1.45])
    cloud = np.array([1.9, 1.9, 1.95]) * rng.uniform(0.8, 1.1)
    colours = tuple(np.asarray(colour, np.float32) for colour in (zenith, horizon, cloud))
    return Layer(200.0, (Texture("sky", colours, int(rng.integers(2**31)), 0.0, clouds),))


def _meadow(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Sky, a line of trees, and grass with flowers in it coming nearer."""
    horizon = float(rng.uniform(0.12, 0.42))
    seed = int(rng.integers(2**31))
    codes = pick_codes(rng, GREENS, 3) + (["#a8a04a"] if rng.random() < 0.4 else [])
    trees = Texture("trees", tuple(linear("#0e1a0c", "#7d9a4f")), seed, horizon - rng.uniform(0.05, 0.3))
    field_ = Texture("turf", tuple(linear("#1c3010", "#9db35a")), seed + 2, horizon)
    middle = (horizon + 0.08, horizon + 0.5)
    return [
        _skylight(rng),
        Layer(25.0, (trees,)),
        Layer(6.0, (*far_flowers(rng, int(rng.integers(0, 50)), (horizon + 0.02, 0.75), (0.006, 0.014)),
                    grass(rng, 260, (0.05, 0.13), codes, middle, 0.0035), field_)),
        Layer(3.0 * focus, (*far_flowers(rng, int(rng.integers(0, 14)), (horizon + 0.2, 0.95), (0.02, 0.045)),
                            grass(rng, 160, (0.16, 0.34), codes, (horizon + 0.42, 1.25), 0.006))),
        Layer(1.6 * focus, (grass(rng, 28, (0.25, 0.5), codes, (0.95, 1.3), 0.008),)),
    ]  # fmt: skip


def _hedge(rng: np.random.Generator, focus: float) -> list[Layer]:
    """A wall of leaves with the light coming through its gaps."""
    codes = pick_codes(rng, GREENS, 3)
    seed = int(rng.integers(2**31))
    back = Texture("thicket", tuple(linear("#050a04", "#5c7d38")), seed)
    gaps = lamps(rng, int(rng.integers(4, 24)), (0.0, 0.75), (6, 60), np.array([1.0, 1.0, 0.9]), (0.003, 0.008))
    size = float(rng.uniform(0.07, 0.12))
    return [
        Layer(5.5 * focus, (gaps, back)),
        Layer(4.0 * focus, (hanging_leaves(rng, 180, (0.6 * size, size), codes, (-0.1, 1.1)),
                            twigs(rng, int(rng.integers(2, 8)), (0, 1))), 0.6),
        Layer(2.6 * focus, (hanging_leaves(rng, 75, (size, 1.7 * size), codes, (0.1, 1.15)),), 0.5),
    ]  # fmt: skip


def _forest_floor(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Looking down on soil, fallen leaves and twigs."""
    seed = int(rng.integers(2**31))
    codes = pick_codes(rng, LITTER, 4) + pick_codes(rng, GREENS, 1)
    soil = Texture("ground", tuple(linear("#120c07", "#97805f")), seed, -0.2)
    litter = hanging_leaves(rng, 170, (0.07, 0.17), codes, (-0.1, 1.1))
    near = hanging_leaves(rng, 26, (0.12, 0.22), list(GREENS[:4]), (0.45, 1.15), wide=(0.25, 0.4))
    return [Layer(3.2 * focus, (litter, twigs(rng, 22, (0, 1)), soil), 0.6), Layer(1.9 * focus, (near,), 0.5)]


def _fence(rng: np.random.Generator, focus: float) -> list[Layer]:
    """Boards with leaves in front of them."""
    stain = (("#3b2c20", "#b79a78"), ("#4a4a48", "#c9c6bf"), ("#2c3a40", "#7d939c"), ("#5a2d1c", "#b5704a"))
    seed = int(rng.integers(2**31))
    planks = Texture("planks", tuple(linear(*stain[int(rng.integers(4))])), seed, 0.0, float(rng.uniform(3.5, 7.5)))
    codes = pick_codes(rng, GREENS, 3)
    return [
        Layer(3.6 * focus, (planks,)),
        Layer(2.8 * focus, (hanging_leaves(rng, 70, (0.07, 0.14), codes, (0.45, 1.2)), twigs(rng, 5, (0.1, 1)))),
        Layer(2.0 * focus, (grass(rng, 50, (0.2, 0.45), codes, (0.95, 1.3), 0.006),)),
    ]


def _against_sky(rng: np.random.Generator, focus: float) -> list[Layer]:
    """From below, against the sky, with treetops and branches."""
    seed = int(rng.integers(2**31))
    codes = pick_codes(rng, GREENS, 3)
    trees = Texture("trees", tuple(linear("#0c160a", "#7d9a4f")), seed, float(rng.uniform(0.55, 0.95)))
    return [
        _skylight(rng, 1.4),
        Layer(14.0, (trees,)),
        Layer(3.4 * focus, (hanging_leaves(rng, int(rng.integers(10, 60)), (0.06, 0.12), codes, (-0.15, 0.35)),
                            twigs(rng, int(rng.integers(3, 9)), (0.0, 0.6)))),
        Layer(2.2 * focus, (grass(rng, 60, (0.2, 0.5), codes, (0.9, 1.3), 0.006),)),
    ]  # fmt: skip


def _evening_garden(rng: np.random.Generator, focus: float) -> list[Layer]:
    """A dark garden with lamps far behind."""
    seed = int(rng.integers(2**31))
    back = Texture("thicket", tuple(linear("#040608", "#3c4a2c")), seed)
    tint = np.array([[1.0, 0.78, 0.42], [1.0, 0.9, 0.75], [0.75, 0.85, 1.0]])[int(rng.integers(3))]
    lights = lamps(rng, int(rng.integers(10, 34)), (0.02, 0.8), (10, 120), tint, (0.002, 0.006))
    codes = pick_codes(rng, GREENS, 3)
    return [
        Layer(9.0, (lights, back)),
        Layer(3.4 * focus, (hanging_leaves(rng, 60, (0.06, 0.13), codes, (0.35, 1.15)),)),
        Layer(2.2 * focus, (grass(rng, 60, (0.2, 0.5), codes, (0.9, 1.3), 0.006),)),
    ]


_SETTINGS: tuple[Callable[[np.random.Generator, float], list[Layer]], ...] = (
    _meadow, _hedge, _forest_floor, _fence, _against_sky, _evening_garden,
)  # fmt: skip
