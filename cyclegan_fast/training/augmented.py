"""Augmented CycleGAN: many-to-many translation of unpaired pictures (Almahairi et al., "Augmented CycleGAN: Learning
Many-to-Many Mappings from Unpaired Data", ICML 2018, arXiv:1802.10151).

A picture of B holds what its picture of A does not tell, the code z_B, and the other way round. A generator takes a
picture and the code of what it makes; an encoder finds the code from both pictures. In the paper's words G_A is
G_AB, G_B is G_BA, D_A is D_B, and D_Z_A is D_Za; the codes of the step are standard normal, z_A and z_B:

    fake_B = G_A(real_A, z_B)    code_A = E_A(real_A, fake_B)    rec_A = G_B(fake_B, code_A)
                                 back_B = E_B(real_A, fake_B)                       and the mirror image
    loss_G = gan(D_A(fake_B)) + gan(D_Z_A(code_A))          marginals of B and of Z_A      section 3.2
           + cycle_A |rec_A - real_A|                       cycle of the picture
           + latent |back_B - z_B|                          cycle of the code: fake_B must show it
           + the mirror image

Encoders are trained with the generators. Left out of the paper: the supervised losses of its semi-supervised part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.pix2pix import beside
from cyclegan_fast.training.step import Exchange, StepBatch, TrainState, judge, l1_loss, score

__all__ = ["AugmentedState", "MadeWithCodes"]


class MadeWithCodes(NamedTuple):
    """Generated pictures [N, C, H, W] and found codes [N, Z, 1, 1] of one micro-batch, detached."""

    fake_A: Tensor
    fake_B: Tensor
    code_A: Tensor
    code_B: Tensor


@dataclass(kw_only=True)
class AugmentedState(TrainState):
    """The eight networks, as `models.build.build_augmented` names them; ``exchange_*`` as in CycleGAN."""

    G_A: nn.Module
    G_B: nn.Module
    E_A: nn.Module
    E_B: nn.Module
    D_A: nn.Module
    D_B: nn.Module
    D_Z_A: nn.Module
    D_Z_B: nn.Module
    exchange_A: Exchange
    exchange_B: Exchange
    gan: GANLoss
    cycle_A: float
    cycle_B: float
    latent: float
    latent_size: int
    """Numbers in a code."""
    gradient_penalty: float = 0.0

    def generate(self, batch: StepBatch, k: int) -> tuple[Tensor, dict[str, Tensor], MadeWithCodes]:
        """The loss of generators and encoders on micro-batch ``k``, its terms (detached), and what they made.

        The terms are ``G_*``, ``Z_*`` (of the codes' discriminators), ``cycle_*``, ``latent_*`` and ``loss_G``.
        """
        A, B, z_A, z_B = batch.real_A[k], batch.real_B[k], batch.latent_A[k], batch.latent_B[k]
        with self.casting(A):
            fake_B, fake_A = self.G_A(A, z_B), self.G_B(B, z_A)
            there, here = beside(A, fake_B), beside(fake_A, B)
            code_A, code_B = self.E_A(there), self.E_B(here)
            back_B, back_A = self.E_B(there), self.E_A(here)
            rec_A, rec_B = self.G_B(fake_B, code_A), self.G_A(fake_A, code_B)
            scores = self.D_A(fake_B), self.D_B(fake_A), self.D_Z_A(_dot(code_A)), self.D_Z_B(_dot(code_B))
        terms = {
            name: self.gan.generator(logits) for name, logits in zip(("G_A", "G_B", "Z_A", "Z_B"), scores, strict=True)
        }
        terms |= {
            "cycle_A": self.cycle_A * l1_loss(rec_A, A),
            "cycle_B": self.cycle_B * l1_loss(rec_B, B),
            "latent_A": self.latent * l1_loss(back_A, z_A),
            "latent_B": self.latent * l1_loss(back_B, z_B),
        }
        loss = torch.stack(list(terms.values())).sum()
        terms["loss_G"] = loss
        made = MadeWithCodes(fake_A, fake_B, _dot(code_A), _dot(code_B))
        return loss, {name: term.detach() for name, term in terms.items()}, MadeWithCodes(*(m.detach() for m in made))

    def exchange(self, batch: StepBatch, made: MadeWithCodes, k: int) -> MadeWithCodes:
        """What the pools give for the pictures of micro-batch ``k``; codes have no pool."""
        return made._replace(
            fake_A=self.exchange_A(made.fake_A, batch.accept_A[k], batch.slot_A[k]),
            fake_B=self.exchange_B(made.fake_B, batch.accept_B[k], batch.slot_B[k]),
        )

    def discriminate(self, batch: StepBatch, shown: MadeWithCodes, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the four discriminators' losses on micro-batch ``k``; its terms (detached)."""
        terms: dict[str, Tensor] = {}
        losses = []
        for name, D, real, fake, alpha in (
            ("D_A", self.D_A, batch.real_B[k], shown.fake_B, batch.alpha_B[k]),
            ("D_B", self.D_B, batch.real_A[k], shown.fake_A, batch.alpha_A[k]),
            ("D_Z_A", self.D_Z_A, _dot(batch.latent_A[k]), shown.code_A, batch.alpha_B[k]),
            ("D_Z_B", self.D_Z_B, _dot(batch.latent_B[k]), shown.code_B, batch.alpha_A[k]),
        ):
            scores = score(self, D, real, fake)
            losses.append(judge(self.gan, self.gradient_penalty, D, real, fake, scores, alpha, name, terms))
        return torch.stack(losses).sum(), terms


def _dot(code: Tensor) -> Tensor:
    """Codes [N, Z] as pictures of one pixel."""
    return code[:, :, None, None]
