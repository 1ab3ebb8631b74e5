"""The networks of Augmented CycleGAN (Almahairi et al. 2018, arXiv:1802.10151), section 4 and appendix.

A generator takes a picture and a latent code, which sets the scale and shift of every instance norm (conditional
instance norm, Dumoulin et al. 2017, arXiv:1610.07629; Perez et al. 2018, arXiv:1709.07871). With its code fixed it is
an ordinary `ResnetGenerator` with affine norms, see `StyledGenerator.styled`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cyclegan_fast.models.fused import ResnetGenerator
from cyclegan_fast.models.reference import InstanceNorm

__all__ = ["LatentDiscriminator", "LatentEncoder", "StyledGenerator"]

_STYLE_STD = 0.1  # of the weights that make a norm's scale and shift of a code: codes differ from the start


class _GivenNorm(InstanceNorm):
    """An instance norm whose scale and shift, float [C], are given before each use instead of learned."""

    weight: Tensor | None  # type: ignore[assignment]
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__(channels, eps=eps)
        del self.weight, self.bias
        self.weight = self.bias = None


class StyledGenerator(nn.Module):
    """A `ResnetGenerator` with a latent code. Arguments as there, and latent: numbers in a code.

    x: [N, in_channels, H, W], z: [N, latent] -> [N, out_channels, H, W]. Pictures run one after the other, each with
    norms of its own. State-dict keys are those of `ResnetGenerator` and `style.weight`, `style.bias`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, ngf: int, blocks: int, *, latent: int, **options: Any
    ) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"latent = {latent} is not allowed: an integer >= 1")
        self._arguments: tuple[int, ...] = (in_channels, out_channels, ngf, blocks)
        self._options = options
        self.latent = latent
        body = ResnetGenerator(*self._arguments, **options)
        self.model = body.model
        _give_norms(self.model)
        self._body = [body]  # not registered: its parameters are those of self.model
        norms = self._norms()
        self.style = nn.Linear(latent, 2 * sum(norm.channels for norm in norms))
        nn.init.normal_(self.style.weight, 0.0, _STYLE_STD)
        nn.init.zeros_(self.style.bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if z.shape != (x.shape[0], self.latent):
            raise ValueError(f"StyledGenerator: codes of shape {tuple(z.shape)} are not [{x.shape[0]}, {self.latent}]")
        body, norms = self._body[0], self._norms()
        body.train(self.training)
        pictures = []
        for picture, code in zip(x.split(1), z, strict=True):
            for norm, (scale, shift) in zip(norms, self._scales(code), strict=True):
                norm.weight, norm.bias = scale, shift
            pictures.append(body(picture))
        for norm in norms:
            norm.weight = norm.bias = None
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    @torch.no_grad()
    def styled(self, z: Tensor) -> ResnetGenerator:
        """The generator for one code [latent]: an ordinary one with affine norms, which shares the convolutions."""
        with torch.device("meta"):  # without spending time and random numbers on weights that are replaced next
            plain = ResnetGenerator(*self._arguments, **self._options)
        weights = {f"model.{key}": value for key, value in self.model.state_dict(keep_vars=True).items()}
        plain.load_state_dict(weights, strict=False, assign=True)  # all but the norms'
        norms = [module for module in plain.model.modules() if isinstance(module, InstanceNorm)]
        for norm, (scale, shift) in zip(norms, self._scales(z), strict=True):
            norm.weight, norm.bias = nn.Parameter(scale.clone()), nn.Parameter(shift.clone())
        return plain.train(self.training)

    def _norms(self) -> list[_GivenNorm]:
        return [module for module in self.model.modules() if isinstance(module, _GivenNorm)]

    def _scales(self, code: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift of each norm, [C] each, float32 at least, for a code [latent]."""
        with torch.autocast(code.device.type, enabled=False):
            made = self.style(code.to(self.style.weight.dtype))
        parts = made.split([size for norm in self._norms() for size in (norm.channels, norm.channels)])
        return [(1 + scale, shift) for scale, shift in zip(parts[::2], parts[1::2], strict=True)]


class LatentEncoder(nn.Module):
    """The code of a picture from the picture and its translation, side by side in the channels.

    x: [N, in_channels, H, W], sides of at least 8 pixels -> [N, latent]. Three halvings, without norms, which would
    take away the colour of a whole picture that a code often is about; the mean over all positions; a linear map.
    """

    def __init__(self, in_channels: int, filters: int, latent: int) -> None:
        super().__init__()
        widths = (in_channels, filters, 2 * filters, 4 * filters)
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        self.model = nn.Sequential(*layers)
        self.code = nn.Linear(widths[-1], latent)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(x).mean(dim=(2, 3))
        code: Tensor = self.code(features)
        return code


class LatentDiscriminator(nn.Module):
    """Judges codes, given as pictures of one pixel: [N, latent, 1, 1] -> logits [N, 1, 1, 1]."""

    def __init__(self, latent: int, filters: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(latent, filters, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(filters, filters, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(filters, 1, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(z)
        return logits


def _give_norms(network: nn.Module) -> None:
    """Put a `_GivenNorm` in the place of each instance norm."""
    for module in network.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, InstanceNorm) and not isinstance(child, _GivenNorm):
                setattr(module, name, _GivenNorm(child.channels, eps=child.eps))
