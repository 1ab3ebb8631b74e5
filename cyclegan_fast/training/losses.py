"""The adversarial losses, on logits, and the gradient penalty.

Everything is computed in float32 whatever the dtype of the input (float64 stays float64), under autocast too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GANLoss", "gradient_penalty"]

_KINDS = ("lsgan", "vanilla", "hinge", "wgangp")


class GANLoss:
    """Adversarial loss of one kind, means over all logits of the patch map and the batch.

    ======== ======================== =============================== ==========================================
    kind     generator                discriminator, real + fake      source
    ======== ======================== =============================== ==========================================
    lsgan    (D(fake) - 1)^2          (D(real) - 1)^2 + D(fake)^2     Mao et al. 2017 (arXiv:1611.04076)
    vanilla  -log s(D(fake))          -log s(D(real)) - log(1 - s(D(fake))), s the logistic function;
                                                                      Goodfellow et al. 2014, non-saturating
    hinge    -D(fake)                 max(0, 1 - D(real)) + max(0, 1 + D(fake)); Lim and Ye 2017
    wgangp   -D(fake)                 -D(real) + D(fake)              Gulrajani et al. 2017 (arXiv:1704.00028)
    ======== ======================== =============================== ==========================================

    The discriminator's sum is halved for every kind, as the de-facto implementation does, which slows D down
    relative to G; the generator's loss is not. The gradient penalty of wgangp is not part of it: the caller adds
    `gradient_penalty` with its own weight, not halved.

    Raises ValueError for an unknown kind.
    """

    def __init__(self, kind: str) -> None:
        if kind not in _KINDS:
            raise ValueError(f"GAN loss {kind!r} is not known: one of {', '.join(_KINDS)}")
        self.kind = kind

    def generator(self, fake_logits: Tensor) -> Tensor:
        """Scalar loss of the generator for D's logits [N, 1, h, w] on its pictures."""
        fake = _at_least_float32(fake_logits)
        if self.kind == "lsgan":
            return (fake - 1).square().mean()
        if self.kind == "vanilla":
            return F.softplus(-fake).mean()
        return -fake.mean()

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Scalar loss of the discriminator for its logits [N, 1, h, w] on real and on generated pictures."""
        real, fake = _at_least_float32(real_logits), _at_least_float32(fake_logits)
        if self.kind == "lsgan":
            total = (real - 1).square().mean() + fake.square().mean()
        elif self.kind == "vanilla":
            total = F.softplus(-real).mean() + F.softplus(fake).mean()
        elif self.kind == "hinge":
            total = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        else:
            total = fake.mean() - real.mean()
        return 0.5 * total


def gradient_penalty(D: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Mean over the batch of (||grad D(x)||_2 - 1)^2 at x = alpha real + (1 - alpha) fake (arXiv:1704.00028, eq. 3).

    real, fake: [N, C, H, W]; alpha: [N, 1, 1, 1], one uniform draw a picture. The gradient is that of the sum of all
    logits of the map, its norm is over C, H and W; 1e-16 is added to every component, as the de-facto implementation
    does, which keeps the norm differentiable where the gradient vanishes. The result can be differentiated with
    respect to D's weights, and not with respect to real or fake. D runs without autocast: the second derivative
    needs float32.

    Raises ValueError when the shapes do not fit.
    """
    if real.shape != fake.shape:
        raise ValueError(f"gradient_penalty: real {tuple(real.shape)} and fake {tuple(fake.shape)} differ in shape")
    if alpha.shape != (real.shape[0], 1, 1, 1):
        raise ValueError(
            f"gradient_penalty: alpha of shape {tuple(alpha.shape)} is not [{real.shape[0]}, 1, 1, 1], one a picture"
        )
    real, fake = _at_least_float32(real.detach()), _at_least_float32(fake.detach())
    alpha = alpha.to(real.dtype)
    mixed = (alpha * real + (1 - alpha) * fake).requires_grad_()
    with torch.autocast(device_type=mixed.device.type, enabled=False):
        total = D(mixed).sum()
        (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)
        norm: Tensor = torch.linalg.vector_norm(gradient + 1e-16, dim=(1, 2, 3))
        return (norm - 1).square().mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
