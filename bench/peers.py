"""The peer: CycleGAN as users of the de-facto PyTorch implementation train it today, with torch.nn's own modules.

Layer for layer and call for call as there: `nn.ReflectionPad2d` and `nn.InstanceNorm2d` (which gives up channels-last
order, see pytorch #72341), a forward pass for each use of a network, targets expanded to the size of the score map,
plain Adam, an image pool that draws with Python's generator. `models/reference.py` computes the same and has the same
state-dict keys, but its instance norm already avoids part of what makes this one slow, so it is no fair peer.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _ResnetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, kernel_size=3), nn.InstanceNorm2d(dim), nn.ReLU(True)),
            *(nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, kernel_size=3), nn.InstanceNorm2d(dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_block(x)
        return out


class Generator(nn.Module):
    """The residual generator. [N, 3, H, W] in [-1, 1] -> the same; H and W multiples of 4."""

    def __init__(self, ngf: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, kernel_size=7)]
        layers += [nn.InstanceNorm2d(ngf), nn.ReLU(True)]
        for width in (ngf, 2 * ngf):
            layers += [nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1)]
            layers += [nn.InstanceNorm2d(2 * width), nn.ReLU(True)]
        layers += [_ResnetBlock(4 * ngf) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            layers += [nn.ConvTranspose2d(width, width // 2, kernel_size=3, stride=2, padding=1, output_padding=1)]
            layers += [nn.InstanceNorm2d(width // 2), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, kernel_size=7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class Discriminator(nn.Module):
    """The 70x70 patch discriminator. [N, 3, H, W] -> logits [N, 1, h, w]."""

    def __init__(self, ndf: int = 64, layers: int = 3) -> None:
        super().__init__()
        sequence: list[nn.Module] = [nn.Conv2d(3, ndf, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for stage in range(1, layers + 1):
            before, width = width, ndf * min(2**stage, 8)
            stride = 2 if stage < layers else 1
            sequence += [nn.Conv2d(before, width, kernel_size=4, stride=stride, padding=1)]
            sequence += [nn.InstanceNorm2d(width), nn.LeakyReLU(0.2, True)]
        sequence += [nn.Conv2d(width, 1, kernel_size=4, stride=1, padding=1)]
        self.model = nn.Sequential(*sequence)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ImagePool:
    """Fifty generated pictures; each new one is swapped for a stored one half of the time."""

    def __init__(self, pool_size: int = 50) -> None:
        self.pool_size = pool_size
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        """Pictures for the discriminator in the place of images [N, 3, H, W]."""
        if self.pool_size == 0:
            return images
        return_images = []
        for image in images:
            image = torch.unsqueeze(image.data, 0)
            if len(self.images) < self.pool_size:
                self.images.append(image)
                return_images.append(image)
            elif random.uniform(0, 1) > 0.5:  # noqa: S311 - a draw of the pool
                random_id = random.randint(0, self.pool_size - 1)  # noqa: S311 - a draw of the pool
                return_images.append(self.images[random_id].clone())
                self.images[random_id] = image
            else:
                return_images.append(image)
        return torch.cat(return_images, 0)


@dataclass
class CycleGANModel:
    """The networks and one optimisation step, `optimize_parameters`.

    identity: weight relative to the cycles', 0 leaves it out; autocast: the type of the mixed precision a user of
    today may have added, None for fp32 as it comes; capturable: optimisers that can stand in a CUDA graph.
    """

    netG_A: nn.Module
    netG_B: nn.Module
    netD_A: nn.Module
    netD_B: nn.Module
    identity: float = 0.5
    autocast: torch.dtype | None = None
    capturable: bool = False
    pool_size: int = 50
    lambda_A: float = 10.0
    lambda_B: float = 10.0

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"lr": 2e-4, "betas": (0.5, 0.999), "capturable": self.capturable}
        G = itertools.chain(self.netG_A.parameters(), self.netG_B.parameters())
        D = itertools.chain(self.netD_A.parameters(), self.netD_B.parameters())
        self.optimizer_G, self.optimizer_D = torch.optim.Adam(G, **options), torch.optim.Adam(D, **options)
        self.fake_A_pool, self.fake_B_pool = ImagePool(self.pool_size), ImagePool(self.pool_size)
        self.criterion_cycle, self.criterion_idt, self.mse = nn.L1Loss(), nn.L1Loss(), nn.MSELoss()
        device = next(self.netG_A.parameters()).device
        self.real_label, self.fake_label = torch.ones((), device=device), torch.zeros((), device=device)
        self.losses: dict[str, Tensor] = {}

    def criterion_GAN(self, prediction: Tensor, target_is_real: bool) -> Tensor:  # noqa: N802 - its name there
        """Least squares against a map of ones or zeros."""
        label = self.real_label if target_is_real else self.fake_label
        loss: Tensor = self.mse(prediction, label.expand_as(prediction))
        return loss

    def optimize_parameters(self, real_A: Tensor, real_B: Tensor) -> None:
        """Update the generators, then the discriminators, on a batch of pairs [N, 3, H, W]."""
        self._require(False)
        with self._cast(real_A):
            fake_B = self.netG_A(real_A)
            rec_A = self.netG_B(fake_B)
            fake_A = self.netG_B(real_B)
            rec_B = self.netG_A(fake_A)
            loss_G = self._generator_loss(real_A, real_B, fake_A, fake_B, rec_A, rec_B)
        self.optimizer_G.zero_grad()
        loss_G.backward()
        self.optimizer_G.step()
        self._require(True)
        self.optimizer_D.zero_grad()
        self.losses["D_A"] = self._backward_discriminator(self.netD_A, real_B, self.fake_B_pool.query(fake_B))
        self.losses["D_B"] = self._backward_discriminator(self.netD_B, real_A, self.fake_A_pool.query(fake_A))
        self.optimizer_D.step()

    def _generator_loss(
        self, real_A: Tensor, real_B: Tensor, fake_A: Tensor, fake_B: Tensor, rec_A: Tensor, rec_B: Tensor
    ) -> Tensor:
        losses = {}
        if self.identity > 0:
            losses["idt_A"] = self.criterion_idt(self.netG_A(real_B), real_B) * self.lambda_B * self.identity
            losses["idt_B"] = self.criterion_idt(self.netG_B(real_A), real_A) * self.lambda_A * self.identity
        losses["G_A"] = self.criterion_GAN(self.netD_A(fake_B), True)
        losses["G_B"] = self.criterion_GAN(self.netD_B(fake_A), True)
        losses["cycle_A"] = self.criterion_cycle(rec_A, real_A) * self.lambda_A
        losses["cycle_B"] = self.criterion_cycle(rec_B, real_B) * self.lambda_B
        total: Tensor = losses["G_A"] + losses["G_B"] + losses["cycle_A"] + losses["cycle_B"]
        if self.identity > 0:
            total = total + losses["idt_A"] + losses["idt_B"]
        self.losses.update(losses)
        return total

    def _backward_discriminator(self, netD: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        with self._cast(real):
            loss_D_real = self.criterion_GAN(netD(real), True)
            loss_D_fake = self.criterion_GAN(netD(fake.detach()), False)
            loss_D: Tensor = (loss_D_real + loss_D_fake) * 0.5
        loss_D.backward()
        return loss_D

    def _require(self, wanted: bool) -> None:
        for parameter in itertools.chain(self.netD_A.parameters(), self.netD_B.parameters()):
            parameter.requires_grad = wanted

    def _cast(self, like: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(like.device.type, dtype=self.autocast)
