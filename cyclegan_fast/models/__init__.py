"""The networks: `reference` defines them, `build` makes those of a configuration."""

from cyclegan_fast.models.build import Discriminator, build_discriminators, build_generators
from cyclegan_fast.models.reference import PatchDiscriminator, PixelDiscriminator, ResnetGenerator

__all__ = [
    "Discriminator",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ResnetGenerator",
    "build_discriminators",
    "build_generators",
]
