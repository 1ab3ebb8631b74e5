"""The four networks of a run, as its configuration describes them."""

from __future__ import annotations

from typing import Any

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator

__all__ = ["Discriminator", "build_discriminators", "build_generators"]

Discriminator = PatchDiscriminator | PixelDiscriminator


def build_generators(
    model: ModelConfig, *, impl: str = "auto", recompute: bool = False
) -> tuple[ResnetGenerator, ResnetGenerator]:
    """(G_A, G_B): G_A translates domain A to B, G_B domain B to A. Weights come from torch's default generator.

    impl and recompute: how they run, see `models.fused`.
    """

    def build(in_channels: int, out_channels: int) -> ResnetGenerator:
        return ResnetGenerator(
            in_channels,
            out_channels,
            model.ngf,
            model.blocks,
            preset=model.preset,
            upsample=model.upsample,
            dropout=model.dropout,
            init_gain=model.init_gain,
            impl=impl,
            recompute=recompute,
        )

    return build(model.channels_A, model.channels_B), build(model.channels_B, model.channels_A)


def build_discriminators(model: ModelConfig, *, impl: str = "auto") -> tuple[Discriminator, Discriminator]:
    """(D_A, D_B): D_A judges what G_A makes and so sees domain B, D_B sees domain A.

    Weights come from torch's default generator; impl: how they run, see `models.fused`. Raises ValueError for an
    unknown `model.discriminator`.
    """

    options: dict[str, Any] = {"preset": model.preset, "init_gain": model.init_gain}
    options["spectral_norm"] = model.spectral_norm

    def build(channels: int) -> Discriminator:
        if model.discriminator == "patch":
            layers = model.discriminator_layers
            return PatchDiscriminator(channels, model.ndf, layers, impl=impl, **options)
        if model.discriminator == "pixel":
            return PixelDiscriminator(channels, model.ndf, impl=impl, **options)
        raise ValueError(f"model.discriminator = {model.discriminator!r} is not allowed: one of patch, pixel")

    return build(model.channels_B), build(model.channels_A)
