"""The four networks of a run, as its configuration describes them."""

from __future__ import annotations

from typing import Any

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator
from cyclegan_fast.models.unet import UnetGenerator

__all__ = ["Discriminator", "Generator", "build_discriminators", "build_generators", "unet_downs"]

Generator = ResnetGenerator | UnetGenerator
Discriminator = PatchDiscriminator | PixelDiscriminator


def build_generators(model: ModelConfig, *, impl: str = "auto", recompute: bool = False) -> tuple[Generator, Generator]:
    """(G_A, G_B): G_A translates domain A to B, G_B domain B to A. Weights come from torch's default generator.

    impl and recompute: how a `ResnetGenerator` runs, see `models.fused`; a U-Net is always plain PyTorch.
    """
    downs = unet_downs(model.generator)

    def build(in_channels: int, out_channels: int) -> Generator:
        if downs is not None:
            options: dict[str, Any] = {"dropout": model.dropout, "init_gain": model.init_gain}
            return UnetGenerator(in_channels, out_channels, model.ngf, downs, affine=model.affine, **options)
        return ResnetGenerator(
            in_channels,
            out_channels,
            model.ngf,
            model.blocks,
            preset=model.preset,
            affine=model.affine,
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

    options: dict[str, Any] = {"preset": model.preset, "affine": model.affine, "init_gain": model.init_gain}

    def build(channels: int) -> Discriminator:
        if model.discriminator == "patch":
            layers = model.discriminator_layers
            return PatchDiscriminator(channels, model.ndf, layers, impl=impl, **options)
        if model.discriminator == "pixel":
            return PixelDiscriminator(channels, model.ndf, impl=impl, **options)
        raise ValueError(f"model.discriminator = {model.discriminator!r} is not allowed: one of patch, pixel")

    return build(model.channels_B), build(model.channels_A)


def unet_downs(generator: str) -> int | None:
    """How often a `model.generator` of the form unet_N halves the picture; None for another."""
    if not generator.startswith("unet_"):
        return None
    return int(generator.removeprefix("unet_")).bit_length() - 1
