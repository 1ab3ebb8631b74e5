"""Shapes that have broken kernels before, each with a word of why, and the shapes of the model; shared with bench/."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODEL_MAPS", "UGLY_MAPS", "Map"]


@dataclass(frozen=True)
class Map:
    """A feature map [n, c, h, w]."""

    n: int
    c: int
    h: int
    w: int
    why: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


# Small enough for an interpreter, and each wrong in a way of its own.
UGLY_MAPS = (
    Map(1, 64, 9, 7, "odd sides, H > W, channels that fill one block"),
    Map(2, 3, 5, 4, "an image: three channels, less than one 16-byte access"),
    Map(1, 1, 3, 2, "one channel, whose stride means nothing"),
    Map(3, 8, 2, 2, "the smallest map that can be reflected; every pixel is shown four times"),
    Map(1, 5, 1, 9, "one row, nothing to reflect there"),
    Map(2, 67, 4, 6, "three channels more than one block, none aligned"),
    Map(1, 32, 11, 13, "two tiles, the second one nearly empty"),
    Map(2, 64, 8, 9, "two pictures, each in two splits"),
    Map(1, 130, 5, 8, "three blocks of channels, the last one with two of them"),
    Map(1, 24, 4, 100, "a panorama: a tile does not reach the end of its row"),
)

# What the networks normalise at 256 x 256, per picture: (generator or discriminator, channels, side).
MODEL_MAPS = (
    Map(1, 64, 256, 256, "generator: first and last norm"),
    Map(1, 128, 128, 128, "generator: after the first halving and the first doubling"),
    Map(1, 256, 64, 64, "generator: residual blocks, 18 of its 23 norms"),
    Map(1, 128, 64, 64, "discriminator: second layer"),
    Map(1, 256, 32, 32, "discriminator: third layer"),
    Map(1, 512, 31, 31, "discriminator: fourth layer, odd side"),
)
