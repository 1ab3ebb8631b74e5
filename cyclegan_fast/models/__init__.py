"""The networks: `reference` defines them, `fused` runs them fast, `build` makes those of a configuration."""

from cyclegan_fast.models.build import (
    Discriminator,
    Generator,
    build_augmented,
    build_discriminators,
    build_generators,
    build_pix2pix,
)
from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator
from cyclegan_fast.models.unet import UnetGenerator

__all__ = [
    "Discriminator",
    "Generator",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ResnetGenerator",
    "UnetGenerator",
    "build_augmented",
    "build_discriminators",
    "build_generators",
    "build_pix2pix",
]
