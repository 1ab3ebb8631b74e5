"""The U-Net generator of pix2pix (Isola et al. 2017, arXiv:1611.07004, section 6.1.1) in plain PyTorch.

Layer order and state-dict keys are those of the de-facto implementation, whose generators `unet_128` and `unet_256`
halve the picture 7 and 8 times. One level holds the next one inside:

    x -> leaky relu -> conv 4x4 s2 -> norm -> [the level inside] -> relu -> transposed conv 4x4 s2 -> norm -> [dropout]
      \\-------------------------------------- beside it, as further channels --------------------------------/

The outermost level has neither the first activation nor norms, and ends in tanh; the innermost has no norm before the
bottleneck. There the leaky relu works in place, so what goes past a level is its result and not x. Nobody can see that:
a relu follows, and the relu of both is the same. Here it saves a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cyclegan_fast.models.reference import InstanceNorm, _check_input, _check_positive, _initialise, extend

__all__ = ["UnetGenerator"]

_LEAST_DOWNS = 5  # the widths ngf, 2 ngf, 4 ngf, 8 ngf, and the bottleneck
_WIDEST = 8


class UnetGenerator(nn.Module):
    """U-Net that halves the picture `downs` times: 8 for the de-facto `unet_256`, 7 for `unet_128`.

    x: [N, in_channels, H, W] in [-1, 1], any H, W >= 1 -> [N, out_channels, H, W] in [-1, 1]. Sides that are no
    multiple of 2**downs are extended at the bottom and right, by reflection where the picture is large enough for it,
    else by repeating its border, and cropped at the end.

    affine: norms with a scale and a shift for each channel, and no bias but in the last convolution, as with the
    de-facto `--norm batch`; without it, as with `--norm instance`, every convolution has a bias and norms have nothing.
    Statistics are always the picture's own. dropout: 0.5 behind the upward steps that are 8 ngf wide on both sides.
    Raises ValueError for an impossible argument and for an input of another shape.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        downs: int = 8,
        *,
        affine: bool = False,
        dropout: bool = False,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, out_channels=out_channels, ngf=ngf)
        if not _LEAST_DOWNS <= downs <= 16:
            raise ValueError(f"downs = {downs} is not allowed: an integer from {_LEAST_DOWNS} to 16")
        self.in_channels = in_channels
        self.multiple = 2**downs
        widths = [ngf * min(2**level, _WIDEST) for level in range(downs)]
        level: _Level | None = None
        for outer, inner in zip(widths[-2::-1], widths[:0:-1], strict=True):
            between = level is not None and outer == inner == _WIDEST * ngf
            level = _Level(outer, inner, level, affine=affine, dropout=dropout and between)
        self.model = _Outermost(in_channels, ngf, out_channels, level, affine=affine)
        _initialise(self, init_gain, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_channels, "UnetGenerator")
        height, width = x.shape[2], x.shape[3]
        extended = extend(extend(x, 2, self.multiple, 0), 3, self.multiple, 0)
        y: Tensor = self.model(extended)
        return y if extended is x else y[:, :, :height, :width]


class _Outermost(nn.Module):
    """First and last convolution; [N, C, H, W] -> [N, out_channels, H, W]."""

    def __init__(
        self, in_channels: int, ngf: int, out_channels: int, inside: nn.Module | None, *, affine: bool
    ) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(in_channels, ngf, 4, stride=2, padding=1, bias=not affine),
            *([] if inside is None else [inside]),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * ngf, out_channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class _Level(nn.Module):
    """[N, outer, H, W] -> [N, 2 outer, H, W]: the activated input, and what was made of it at half the size.

    Changes x. `inside` is None for the bottleneck.
    """

    def __init__(self, outer: int, inner: int, inside: nn.Module | None, *, affine: bool, dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=not affine),
        ]
        if inside is not None:
            layers += [InstanceNorm(inner, affine=affine), inside]
        width = inner if inside is None else 2 * inner
        layers += [
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(width, outer, 4, stride=2, padding=1, bias=not affine),
            InstanceNorm(outer, affine=affine),
        ]
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], dim=1)
