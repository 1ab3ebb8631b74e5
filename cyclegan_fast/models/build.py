"""The networks of a run, as its configuration describes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models.augmented import LatentDiscriminator, LatentEncoder, StyledGenerator
from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator
from cyclegan_fast.models.unet import UnetGenerator

__all__ = [
    "Discriminator",
    "Generator",
    "build_augmented",
    "build_discriminators",
    "build_generators",
    "build_pix2pix",
]

Generator = ResnetGenerator | UnetGenerator
Discriminator = PatchDiscriminator | PixelDiscriminator


def build_generators(model: ModelConfig, *, impl: str = "auto", recompute: bool = False) -> tuple[Generator, Generator]:
    """(G_A, G_B): G_A translates domain A to B, G_B domain B to A. Weights come from torch's default generator.

    impl and recompute: how a `ResnetGenerator` runs, see `models.fused`; a U-Net is always plain PyTorch.
    """
    A, B = model.channels_A, model.channels_B
    return (
        _generator(model, A, B, impl=impl, recompute=recompute),
        _generator(model, B, A, impl=impl, recompute=recompute),
    )


def build_discriminators(model: ModelConfig, *, impl: str = "auto") -> tuple[Discriminator, Discriminator]:
    """(D_A, D_B): D_A judges what G_A makes and so sees domain B, D_B sees domain A.

    Weights come from torch's default generator; impl: how they run, see `models.fused`. Raises ValueError for an
    unknown `model.discriminator`.
    """
    return _discriminator(model, model.channels_B, impl=impl), _discriminator(model, model.channels_A, impl=impl)


def build_pix2pix(
    model: ModelConfig, *, impl: str = "auto", impl_D: str = "auto", recompute: bool = False
) -> dict[str, nn.Module]:
    """The generator of `model.direction` and the discriminator of its pairs, by name: G_A and D_A for AtoB."""
    A, B = model.channels_A, model.channels_B
    suffix, source, target = ("A", A, B) if model.direction == "AtoB" else ("B", B, A)
    return {
        f"G_{suffix}": _generator(model, source, target, impl=impl, recompute=recompute),
        f"D_{suffix}": _discriminator(model, A + B, impl=impl_D),
    }


def build_augmented(model: ModelConfig, *, impl: str = "auto", impl_D: str = "auto") -> dict[str, nn.Module]:
    """The eight networks of Augmented CycleGAN by name.

    G_A and G_B as in CycleGAN, with a latent code; E_A and E_B, which find the code of a picture of A or of B from the
    pair of pictures; D_A and D_B as in CycleGAN; D_Z_A and D_Z_B, which judge the codes of E_A and of E_B.
    """
    A, B, Z = model.channels_A, model.channels_B, model.latent

    def generator(source: int, target: int) -> StyledGenerator:
        options: dict[str, Any] = {"preset": model.preset, "dropout": model.dropout, "init_gain": model.init_gain}
        options["upsample"] = model.upsample
        return StyledGenerator(source, target, model.ngf, model.blocks, latent=Z, impl=impl, **options)

    D_A, D_B = build_discriminators(model, impl=impl_D)
    return {
        "G_A": generator(A, B),
        "G_B": generator(B, A),
        "E_A": LatentEncoder(A + B, model.ndf, Z),
        "E_B": LatentEncoder(A + B, model.ndf, Z),
        "D_A": D_A,
        "D_B": D_B,
        "D_Z_A": LatentDiscriminator(Z, model.ndf),
        "D_Z_B": LatentDiscriminator(Z, model.ndf),
    }


def _generator(model: ModelConfig, in_channels: int, out_channels: int, *, impl: str, recompute: bool) -> Generator:
    if model.generator != "resnet":
        downs = int(model.generator.removeprefix("unet_")).bit_length() - 1
        options: dict[str, Any] = {"dropout": model.dropout, "init_gain": model.init_gain}
        return UnetGenerator(in_channels, out_channels, model.ngf, downs, affine=model.affine, **options)
    return ResnetGenerator(
        in_channels,
        out_channels,
        model.ngf,
        model.blocks,
        preset=model.preset,
        affine=model.affine,
        gamma=model.gamma,
        upsample=model.upsample,
        dropout=model.dropout,
        init_gain=model.init_gain,
        impl=impl,
        recompute=recompute,
    )


def _discriminator(model: ModelConfig, channels: int, *, impl: str) -> Discriminator:
    options: dict[str, Any] = {"preset": model.preset, "affine": model.affine, "init_gain": model.init_gain}
    options |= {"gamma": model.gamma, "spectral_norm": model.spectral_norm}
    if model.discriminator == "patch":
        return PatchDiscriminator(channels, model.ndf, model.discriminator_layers, impl=impl, **options)
    if model.discriminator == "pixel":
        return PixelDiscriminator(channels, model.ndf, impl=impl, **options)
    raise ValueError(f"model.discriminator = {model.discriminator!r} is not allowed: one of patch, pixel")
