"""The de-facto implementation's networks, written down from the published layout alone, as plain PyTorch modules.

Nothing of the package is used here: this is what its exported files have to load into, and what makes files to import.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm2d,  # no parameters, no running statistics
    "instance 2017": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "instance 2018": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
    "batch": nn.BatchNorm2d,
}


class Block(nn.Module):
    def __init__(self, width: int, norm: str, dropout: bool) -> None:
        super().__init__()
        bias, make = norm != "batch", NORMS[norm]
        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), make(width), nn.ReLU()),
            *([nn.Dropout(0.5)] if dropout else []),
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), make(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Holder(nn.Module):
    """What has its layers under the name `model`, or another."""

    def __init__(self, layers: nn.Module, name: str = "model") -> None:
        super().__init__()
        self.add_module(name, layers)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


def resnet(a: int, b: int, ngf: int, blocks: int, norm: str = "instance", dropout: bool = False) -> nn.Module:
    bias, make, n = norm != "batch", NORMS[norm], ngf
    up = {"stride": 2, "padding": 1, "output_padding": 1, "bias": bias}
    layers = nn.Sequential(
        *(nn.ReflectionPad2d(3), nn.Conv2d(a, n, 7, bias=bias), make(n), nn.ReLU()),
        *(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1, bias=bias), make(2 * n), nn.ReLU()),
        *(nn.Conv2d(2 * n, 4 * n, 3, stride=2, padding=1, bias=bias), make(4 * n), nn.ReLU()),
        *(Block(4 * n, norm, dropout) for _ in range(blocks)),
        *(nn.ConvTranspose2d(4 * n, 2 * n, 3, **up), make(2 * n), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * n, n, 3, **up), make(n), nn.ReLU()),
        *(nn.ReflectionPad2d(3), nn.Conv2d(n, b, 7), nn.Tanh()),
    )
    return Holder(layers)


class Skip(nn.Module):
    """A level of the U-Net, with the activation that works in place on what goes past it."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.model = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


def unet(a: int, b: int, ngf: int, downs: int, norm: str = "instance", dropout: bool = False) -> nn.Module:
    bias, make = norm != "batch", NORMS[norm]
    halve = {"kernel_size": 4, "stride": 2, "padding": 1}
    wide = 8 * ngf
    level = Skip(
        nn.Sequential(
            *(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(wide, wide, bias=bias, **halve)),
            *(nn.ReLU(inplace=True), nn.ConvTranspose2d(wide, wide, bias=bias, **halve), make(wide)),
        )
    )
    outers = [(wide, wide, dropout)] * (downs - 5) + [
        (4 * ngf, wide, False),
        (2 * ngf, 4 * ngf, False),
        (ngf, 2 * ngf, False),
    ]
    for outer, inner, drop in outers:
        level = Skip(
            nn.Sequential(
                *(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(outer, inner, bias=bias, **halve), make(inner), level),
                *(nn.ReLU(inplace=True), nn.ConvTranspose2d(2 * inner, outer, bias=bias, **halve), make(outer)),
                *([nn.Dropout(0.5)] if drop else []),
            )
        )
    last = nn.ConvTranspose2d(2 * ngf, b, **halve)
    layers = nn.Sequential(nn.Conv2d(a, ngf, bias=bias, **halve), level, nn.ReLU(inplace=True), last, nn.Tanh())
    return Holder(Holder(layers))


def patch(a: int, ndf: int, layers: int = 3, norm: str = "instance") -> nn.Module:
    bias, make = norm != "batch", NORMS[norm]
    stages: list[nn.Module] = [nn.Conv2d(a, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    width = ndf
    for stage in range(1, layers + 1):
        before, width = width, ndf * min(2**stage, 8)
        conv = nn.Conv2d(before, width, 4, stride=2 if stage < layers else 1, padding=1, bias=bias)
        stages += [conv, make(width), nn.LeakyReLU(0.2)]
    return Holder(nn.Sequential(*stages, nn.Conv2d(width, 1, 4, padding=1)))


def pixel(a: int, ndf: int, norm: str = "instance") -> nn.Module:
    bias = norm != "batch"
    layers = nn.Sequential(
        *(nn.Conv2d(a, ndf, 1), nn.LeakyReLU(0.2), nn.Conv2d(ndf, 2 * ndf, 1, bias=bias), NORMS[norm](2 * ndf)),
        *(nn.LeakyReLU(0.2), nn.Conv2d(2 * ndf, 1, 1, bias=bias)),
    )
    return Holder(layers, "net")


def scramble(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights far from initial ones, biases before norms too, and running statistics of some other network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.dim() > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            elif value.is_floating_point():
                value.uniform_(0.5, 1.5, generator=generator)
            assert not name.endswith("num_batches_tracked") or value.dim() == 0
    return network
