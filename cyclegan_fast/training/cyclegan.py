"""CycleGAN: two generators and two discriminators, unpaired pictures.

Names are those of the de-facto implementation; the paper (Zhu et al., "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", ICCV 2017) writes G for G_A, F for G_B, D_Y for D_A and D_X for D_B:

    G_A: A -> B, judged by D_A, which sees real_B and fake_B        G_B: B -> A, judged by D_B
    fake_B = G_A(real_A)   rec_A = G_B(fake_B)   idt_A = G_A(real_B)      and the mirror image
    loss_G = gan(D_A(fake_B)) + gan(D_B(fake_A))                                          eq. 1, both ways
           + cycle_A |rec_A - real_A| + cycle_B |rec_B - real_B|                          eq. 2
           + identity (cycle_B |idt_A - real_B| + cycle_A |idt_B - real_A|)               section 5.2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.step import Exchange, StepBatch, TrainState, judge, l1_loss, score

__all__ = ["CycleGANState", "Fakes", "Objective", "discriminator_pass", "generator_pass"]


@dataclass(frozen=True)
class Objective:
    """Weights and kinds of the losses; see the module's formulas."""

    gan: GANLoss = field(default_factory=lambda: GANLoss("lsgan"))
    cycle_A: float = 10.0
    cycle_B: float = 10.0
    identity: float = 0.5
    gradient_penalty: float = 0.0
    own_gradient: bool = False
    """Each generator is trained by its own losses only: the inner generator of a cycle gets no gradient (Keras)."""


class Fakes(NamedTuple):
    """Generated pictures of one micro-batch, detached."""

    fake_A: Tensor
    fake_B: Tensor


@dataclass(kw_only=True)
class CycleGANState(TrainState):
    """The networks of CycleGAN; ``exchange_A`` and ``exchange_B`` pass a domain's fakes through its pool."""

    G_A: nn.Module
    G_B: nn.Module
    D_A: nn.Module
    D_B: nn.Module
    exchange_A: Exchange
    exchange_B: Exchange
    objective: Objective = field(default_factory=Objective)

    def generate(self, batch: StepBatch, k: int) -> tuple[Tensor, dict[str, Tensor], Fakes]:
        """See `generator_pass`."""
        return generator_pass(self, batch.real_A[k], batch.real_B[k])

    def exchange(self, batch: StepBatch, made: Fakes, k: int) -> Fakes:
        """What the pools give for the fakes of micro-batch ``k``."""
        return Fakes(
            self.exchange_A(made.fake_A, batch.accept_A[k], batch.slot_A[k]),
            self.exchange_B(made.fake_B, batch.accept_B[k], batch.slot_B[k]),
        )

    def discriminate(self, batch: StepBatch, shown: Fakes, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `discriminator_pass`."""
        return discriminator_pass(self, batch, shown, k)


def generator_pass(state: CycleGANState, real_A: Tensor, real_B: Tensor) -> tuple[Tensor, dict[str, Tensor], Fakes]:
    """The generators' loss of one micro-batch [N, C, H, W], its terms (detached) and the fakes."""
    objective = state.objective
    with state.casting(real_A):
        (fake_B, idt_A), (fake_A, idt_B) = _side_by_side(
            state,
            lambda: _translate(state, state.G_A, real_A, real_B),
            lambda: _translate(state, state.G_B, real_B, real_A),
        )
        (rec_B, score_A), (rec_A, score_B) = _side_by_side(
            state,
            lambda: (state.G_A(fake_A.detach() if objective.own_gradient else fake_A), state.D_A(fake_B)),
            lambda: (state.G_B(fake_B.detach() if objective.own_gradient else fake_B), state.D_B(fake_A)),
        )
    terms = {
        "G_A": objective.gan.generator(score_A),
        "G_B": objective.gan.generator(score_B),
        "cycle_A": objective.cycle_A * l1_loss(rec_A, real_A),
        "cycle_B": objective.cycle_B * l1_loss(rec_B, real_B),
    }
    if objective.identity:
        terms["idt_A"] = objective.identity * objective.cycle_B * l1_loss(idt_A, real_B)
        terms["idt_B"] = objective.identity * objective.cycle_A * l1_loss(idt_B, real_A)
    loss = torch.stack(list(terms.values())).sum()
    terms["loss_G"] = loss
    return loss, {name: term.detach() for name, term in terms.items()}, Fakes(fake_A.detach(), fake_B.detach())


def _translate(state: CycleGANState, G: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """G(source), the fake, and G(target), which should be the target; without identity loss the fake twice."""
    if not state.objective.identity:
        fake = G(source)
        return fake, fake
    if not state.batched or source.shape != target.shape:
        return G(source), G(target)
    fake, idt = G(torch.cat([source, target])).chunk(2)
    return fake, idt


def _side_by_side(
    state: CycleGANState, first: Callable[[], tuple[Tensor, Tensor]], second: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both results; with a side stream, `second` runs in it, and autograd runs its backward there too."""
    side = state.side_stream
    if side is None:
        return first(), second()
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        there = second()
    here = first()
    current.wait_stream(side)
    # Either stream reads the other's results later on: their memory must not be given away before that.
    for tensor in there:
        tensor.record_stream(current)
    for tensor in here:
        tensor.record_stream(side)
    return here, there


def discriminator_pass(
    state: CycleGANState, batch: StepBatch, pooled: Fakes, k: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of both discriminators' losses on micro-batch ``k`` and pictures of the pools; its terms (detached)."""
    pooled_A, pooled_B = pooled
    scores_A, scores_B = _side_by_side(
        state,
        lambda: score(state, state.D_A, batch.real_B[k], pooled_B),
        lambda: score(state, state.D_B, batch.real_A[k], pooled_A),
    )
    terms: dict[str, Tensor] = {}
    adversarial = state.objective.gan, state.objective.gradient_penalty
    losses = [
        judge(*adversarial, state.D_A, batch.real_B[k], pooled_B, scores_A, batch.alpha_B[k], "D_A", terms),
        judge(*adversarial, state.D_B, batch.real_A[k], pooled_A, scores_B, batch.alpha_A[k], "D_B", terms),
    ]
    return torch.stack(losses).sum(), terms
