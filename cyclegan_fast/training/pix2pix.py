"""pix2pix: one generator from aligned pairs (Isola et al., "Image-to-Image Translation with Conditional Adversarial
Networks", CVPR 2017, arXiv:1611.07004).

    fake = G(source)        D sees pairs: the source beside the target, and beside the fake
    loss_G = gan(D(source, fake)) + l1 |fake - target|                                          eq. 4
    loss_D = half the sum of D's losses on both kinds of pairs                                  section 3.3

For AtoB the networks are G_A and D_A, the source is real_A and the target real_B; for BtoA G_B and D_B, mirrored. The
noise of the paper is dropout (model.dropout). With a pool, pairs go through it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.step import Exchange, StepBatch, TrainState, judge, l1_loss, score

__all__ = ["Pair", "Pix2PixState"]


class Pair(NamedTuple):
    """A source and its generated target, one beside the other in the channels, [N, C_A + C_B, H, W], detached."""

    fake: Tensor


@dataclass(kw_only=True)
class Pix2PixState(TrainState):
    """The networks of one direction; ``exchange_pairs`` passes generated pairs through the pool."""

    G: nn.Module
    D: nn.Module
    exchange_pairs: Exchange
    direction: str = "AtoB"
    gan: GANLoss = field(default_factory=lambda: GANLoss("lsgan"))
    l1: float = 100.0
    gradient_penalty: float = 0.0

    @property
    def suffix(self) -> str:
        """That of the names of networks and scalars."""
        return self.direction[0]

    def generate(self, batch: StepBatch, k: int) -> tuple[Tensor, dict[str, Tensor], Pair]:
        """The generator's loss on micro-batch ``k``, its terms ``G_*``, ``L1_*``, ``loss_G``, and the fake pairs."""
        source, target = self._ends(batch, k)
        with self.casting(source):
            fake = self.G(source)
            pair = beside(source, fake)
            logits = self.D(pair)
        terms = {
            f"G_{self.suffix}": self.gan.generator(logits),
            f"L1_{self.suffix}": self.l1 * l1_loss(fake, target),
        }
        loss = torch.stack(list(terms.values())).sum()
        terms["loss_G"] = loss
        return loss, {name: term.detach() for name, term in terms.items()}, Pair(pair.detach())

    def exchange(self, batch: StepBatch, made: Pair, k: int) -> Pair:
        """What the pool gives for the pairs of micro-batch ``k``, by the draws of the target's domain."""
        accept, slot = (batch.accept_B, batch.slot_B) if self.suffix == "A" else (batch.accept_A, batch.slot_A)
        return Pair(self.exchange_pairs(made.fake, accept[k], slot[k]))

    def discriminate(self, batch: StepBatch, shown: Pair, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on micro-batch ``k``; its terms ``D_*``, ``D_*_real`` and ``D_*_fake``."""
        real = beside(*self._ends(batch, k))
        alpha = batch.alpha_B if self.suffix == "A" else batch.alpha_A
        terms: dict[str, Tensor] = {}
        scores = score(self, self.D, real, shown.fake)
        name = f"D_{self.suffix}"
        loss = judge(self.gan, self.gradient_penalty, self.D, real, shown.fake, scores, alpha[k], name, terms)
        return loss, terms

    def _ends(self, batch: StepBatch, k: int) -> tuple[Tensor, Tensor]:
        """Source and target of micro-batch ``k``."""
        A, B = batch.real_A[k], batch.real_B[k]
        return (A, B) if self.suffix == "A" else (B, A)


def beside(source: Tensor, target: Tensor) -> Tensor:
    """Two pictures as the channels of one, in the source's dtype, channels-last."""
    pair = torch.cat([source, target.to(source.dtype)], dim=1)
    return pair.contiguous(memory_format=torch.channels_last)
