"""The networks: `reference` defines them, `fused` runs them fast, `build` makes those of a configuration."""

from cyclegan_fast.models.build import (
    Discriminator,
    build_augmented,
    build_discriminators,
    build_generators,
    build_pix2pix,
)
from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator

__all__ = [
    "Discriminator",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ResnetGenerator",
    "build_augmented",
    "build_discriminators",
    "build_generators",
    "build_pix2pix",
]
