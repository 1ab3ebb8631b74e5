"""The four networks of a run, as its configuration describes them."""

from __future__ import annotations

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models.reference import PatchDiscriminator, PixelDiscriminator, ResnetGenerator

__all__ = ["Discriminator", "build_discriminators", "build_generators"]

Discriminator = PatchDiscriminator | PixelDiscriminator


def build_generators(model: ModelConfig) -> tuple[ResnetGenerator, ResnetGenerator]:
    """(G_A, G_B): G_A translates domain A to B, G_B domain B to A. Weights come from torch's default generator."""

    def build(in_channels: int, out_channels: int) -> ResnetGenerator:
        return ResnetGenerator(
            in_channels,
            out_channels,
            model.ngf,
            model.blocks,
            preset=model.preset,
            dropout=model.dropout,
            init_gain=model.init_gain,
        )

    return build(model.channels_A, model.channels_B), build(model.channels_B, model.channels_A)


def build_discriminators(model: ModelConfig) -> tuple[Discriminator, Discriminator]:
    """(D_A, D_B): D_A judges what G_A makes and so sees domain B, D_B sees domain A.

    Weights come from torch's default generator. Raises ValueError for an unknown `model.discriminator`.
    """

    def build(channels: int) -> Discriminator:
        if model.discriminator == "patch":
            return PatchDiscriminator(
                channels, model.ndf, model.discriminator_layers, preset=model.preset, init_gain=model.init_gain
            )
        if model.discriminator == "pixel":
            return PixelDiscriminator(channels, model.ndf, preset=model.preset, init_gain=model.init_gain)
        raise ValueError(f"model.discriminator = {model.discriminator!r} is not allowed: one of patch, pixel")

    return build(model.channels_B), build(model.channels_A)
