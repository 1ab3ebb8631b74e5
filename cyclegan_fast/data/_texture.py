"""Backgrounds described by noise instead of by pieces: sky, distant trees, grass, soil, boards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cyclegan_fast.data._raster import Floats, Light, fractal_noise, shifted


@dataclass(frozen=True)
class Texture:
    """A surface that fills the frame or a part of it, described by noise instead of by pieces.

    kind: one of `_PAINTERS`; `top` is where it begins, in frames from the upper border; a larger `scale` is finer.
    """

    kind: str
    colours: tuple[Floats, ...]
    seed: int
    top: float = 0.0
    scale: float = 1.0


def paint(texture: Texture, size: int, light: Light) -> Floats:
    """Premultiplied linear RGBA [4, size, size] of a texture."""
    rgb, alpha = _PAINTERS[texture.kind](texture, size)
    if texture.kind != "sky":  # a rough surface, lit by a part of the sun and the sky
        rgb = rgb * (light.sun * 0.57 + light.sky)[:, None, None]
    return np.concatenate([rgb * alpha, alpha[None]]).astype(np.float32)


def _rows(size: int) -> Floats:
    """Height of each row of pixels in frames from the top, [size, 1]."""
    return np.asarray((np.arange(size, dtype=np.float32) + 0.5) / size, np.float32)[:, None]


def _mix(weight: Floats, low: Floats, high: Floats) -> Floats:
    """Colours [3, S, S] between two, by weight [S, S]."""
    return np.asarray(low[:, None, None] + (high - low)[:, None, None] * weight)


def _ramp(x: Floats, low: float, high: float) -> Floats:
    u = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(u * u * (3 - 2 * u))


def _sky(texture: Texture, size: int) -> tuple[Floats, Floats]:
    zenith, horizon, cloud = texture.colours
    rows = np.broadcast_to(_rows(size), (size, size))
    puffs = _ramp(fractal_noise(texture.seed, size, (3 * texture.scale, 2 * texture.scale)), 0.2, 1.4)
    rgb = _mix(rows, zenith, horizon)
    return rgb + (cloud[:, None, None] - rgb) * puffs, np.ones((size, size), np.float32)


def _relief(noise: Floats, step: float) -> Floats:
    """Noise as heights lit from above: bright where it falls off upwards, dark below; about [-1, 1]."""
    return noise - shifted(noise, max(1, round(step * len(noise))), 0)


def _foliage(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """Brightness of leaves that are too far or too many to draw, and the clumps they grow in."""
    leaves = fractal_noise(texture.seed, size, (13 * texture.scale, 16 * texture.scale), gain=0.7, finest=2.2)
    clumps = fractal_noise(texture.seed + 1, size, (4 * texture.scale, 5 * texture.scale), gain=0.5)
    return 0.4 * leaves + 0.5 * _relief(leaves, 0.015) + 0.8 * _relief(clumps, 0.05) + 0.4 * clumps, clumps


def _trees(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """A wall of foliage seen from afar, with a ragged skyline at `top`."""
    bright, clumps = _foliage(texture, size)
    rgb = _mix(_ramp(bright, -1.7, 2.6), *texture.colours)
    skyline = _rows(size) - texture.top + 0.03 * clumps + 0.006 * bright
    return rgb, _ramp(skyline, -0.004, 0.004)


def _ground(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """Soil and litter."""
    grain = fractal_noise(texture.seed, size, (22 * texture.scale, 14 * texture.scale), gain=0.75, finest=2.0)
    patches = fractal_noise(texture.seed + 1, size, (3, 2))
    rgb = _mix(_ramp(grain + 0.5 * patches, -2.0, 2.6), *texture.colours)
    return rgb, np.ones((size, size), np.float32)


def _turf(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """Grass seen from the side: upright streaks, finer and paler towards the horizon at `top`."""
    blades = fractal_noise(texture.seed, size, (8 * texture.scale, 45 * texture.scale), gain=0.75, finest=2.0)
    patches = fractal_noise(texture.seed + 1, size, (7, 3))
    below = np.clip((_rows(size) - texture.top) / max(0.05, 1 - texture.top), 0, 1)
    rgb = _mix(_ramp(blades * (0.45 + 0.75 * below) + 0.35 * patches, -1.7, 2.4), *texture.colours)
    rgb = rgb * (1.15 - 0.5 * below)
    edge = _ramp(_rows(size) - texture.top + 0.006 * blades, -0.008, 0.008)
    return rgb, edge


def _planks(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """A fence of upright boards with dark gaps between them."""
    across = _rows(size).T
    boards = np.asarray(across * texture.scale + 0.3, np.float32)
    own = np.random.default_rng(texture.seed).uniform(0.72, 1.0, 64).astype(np.float32)[boards.astype(int)]
    grain = fractal_noise(texture.seed, size, (1.6, 34), gain=0.85)
    stains = fractal_noise(texture.seed + 1, size, (5, 9), gain=0.7)
    rgb = _mix(_ramp(0.8 * grain + 0.5 * stains, -3.2, 3.2), *texture.colours) * own
    gap = np.abs(boards % 1 - 0.5)
    rgb = rgb * (1 - 0.95 * _ramp(gap, 0.468, 0.482)) * (1 + 0.25 * _ramp(boards % 1, 0.88, 0.95))
    return rgb, np.ones((size, size), np.float32)


def _thicket(texture: Texture, size: int) -> tuple[Floats, Floats]:
    """Foliage in the shade that fills the frame."""
    bright, _ = _foliage(texture, size)
    rgb = _mix(_ramp(bright, -1.4, 3.2), *texture.colours)
    return rgb, np.ones((size, size), np.float32)


_PAINTERS: dict[str, Callable[[Texture, int], tuple[Floats, Floats]]] = {
    "sky": _sky,
    "trees": _trees,
    "ground": _ground,
    "turf": _turf,
    "planks": _planks,
    "thicket": _thicket,
}
