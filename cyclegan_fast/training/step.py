"""One training step: a function of modules and tensors, which sees neither configuration, files nor other processes.

Every method of training takes the same step; what its networks learn is in its `TrainState`: `cyclegan`, `pix2pix`,
`augmented`. `_A` is what belongs to translating A to B, `_B` the mirror image.

The generators step first, with both discriminators frozen; then the discriminators step on the fakes made before
the generators moved, taken through the image pools. As these fakes are made already, the generators' optimiser may as
well wait until the discriminators' pass is over. With several processes it does, and the generators' gradients travel
meanwhile; those of the discriminators travel while the generators' optimiser runs:

    one process     G backward -> G Adam -> D forward, backward -> D Adam
    several         G backward -> D forward, backward -> G Adam -> D Adam
    travelling          [ G's gradients ........... ]
                                            [ D's gradients .. ]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from cyclegan_fast.training.losses import GANLoss, gradient_penalty

__all__ = ["Exchange", "Made", "Reduction", "StepBatch", "TrainState", "judge", "l1_loss", "score", "train_step"]

Exchange = Callable[[Tensor, Tensor, Tensor], Tensor]
Made: TypeAlias = Any
"""What a method's generators made and its discriminators are shown: a tuple of tensors of its own."""
_NO_LATENTS = torch.zeros(1, 1, 0)


class StepBatch(NamedTuple):
    """The tensors of one optimiser step, K micro-batches of N pairs.

    ``real_A`` [K, N, C_A, H, W] and ``real_B`` [K, N, C_B, H, W], float32 in [-1, 1]. The random draws come with the
    batch, so that a step is a pure function: ``accept_*`` [K, M] in [0, 1) and ``slot_*`` [K, M] int64 for the pools,
    where M is N times the number of processes that share a pool, and ``alpha_*`` [K, N] in [0, 1) for the gradient
    penalty of the discriminator of the domain. A suffix names the domain of the pictures concerned. ``latent_*``
    [K, N, Z] are standard normal, for methods whose pictures have a latent code (else Z = 0).
    """

    real_A: Tensor
    real_B: Tensor
    accept_A: Tensor
    slot_A: Tensor
    accept_B: Tensor
    slot_B: Tensor
    alpha_A: Tensor
    alpha_B: Tensor
    latent_A: Tensor = _NO_LATENTS
    latent_B: Tensor = _NO_LATENTS


class Reduction(Protocol):
    """Who makes the gradients of one optimiser's parameters their means over the processes."""

    def during(self) -> AbstractContextManager[None]:
        """Around the one backward pass that completes the gradients, which set out as it makes them."""

    def finish(self) -> None:
        """Wait until all have arrived: the parameters' gradients are means from here on."""


@dataclass(kw_only=True)
class TrainState(ABC):
    """Everything a step reads and changes, and a method's two passes, which say what the networks learn.

    The networks may be compiled; the optimisers hold the parameters of the plain modules: ``optimizer_G`` those that
    the generators' loss trains, ``optimizer_D`` the discriminators'. ``reduction_G`` and ``reduction_D`` average
    gradients over the processes, if there are several (both or neither).
    """

    optimizer_G: Optimizer
    optimizer_D: Optimizer
    autocast: torch.dtype | None = None
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    reduction_G: Reduction | None = None
    reduction_D: Reduction | None = None
    batched: bool = True
    """Passes that share weights run as one batch, where the pictures' shapes allow: nothing that is computed changes,
    because instance norm never mixes pictures, but there are fewer and larger kernels."""
    side_stream: torch.cuda.Stream | None = None
    """Where given, what G_B computes runs there, beside what G_A computes in the current stream."""

    @abstractmethod
    def generate(self, batch: StepBatch, k: int) -> tuple[Tensor, dict[str, Tensor], Made]:
        """The generators' loss on micro-batch ``k``, its terms (detached), and what was made (detached)."""

    @abstractmethod
    def exchange(self, batch: StepBatch, made: Made, k: int) -> Made:
        """What the discriminators see in place of what was made for micro-batch ``k``: passed through the pools."""

    @abstractmethod
    def discriminate(self, batch: StepBatch, shown: Made, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminators' loss on micro-batch ``k`` and what `exchange` gave for it; its terms (detached)."""

    def casting(self, like: Tensor) -> torch.autocast:
        """The autocast in which networks run on the device of this tensor."""
        return torch.autocast(like.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def train_step(state: TrainState, batch: StepBatch, *, measure: bool = False) -> dict[str, Tensor]:
    """Update the generators, then the discriminators.

    Collectives of several processes come in one order: those of the pools, the generators' gradients, those of the
    discriminators. Returns detached float32 scalars on the device, averaged over the micro-batches: the weighted terms
    of the generators' loss and their sum ``loss_G``; the discriminators' losses and mean outputs; with ``measure`` also
    the gradient norms ``grad_G`` and ``grad_D``. Nothing is read back to the host.

    CycleGAN's terms are ``G_A``, ``G_B``, ``cycle_A``, ``cycle_B``, ``idt_A``, ``idt_B``; ``D_A``, ``D_B``;
    ``D_A_real``, ``D_A_fake``, ``D_B_real``, ``D_B_fake``.
    """
    count = batch.real_A.shape[0]
    parameters_G, parameters_D = _parameters(state.optimizer_G), _parameters(state.optimizer_D)
    logs: list[dict[str, Tensor]] = []

    finish_generators = partial(_finish, state, state.reduction_G, state.optimizer_G, parameters_G, measure)

    with _frozen(parameters_D):
        state.optimizer_G.zero_grad(set_to_none=True)
        shown = []
        for k in range(count):
            loss, terms, made = state.generate(batch, k)
            # Before the backward pass: behind the gradients, what pools share would wait for these to arrive.
            shown.append(state.exchange(batch, made, k))
            with _sending(state.reduction_G, k + 1 == count):
                state.scaler.scale(loss / count).backward()
            logs.append(terms)
        norm_G = finish_generators() if state.reduction_G is None else None

    state.optimizer_D.zero_grad(set_to_none=True)
    for k in range(count):
        loss, terms = state.discriminate(batch, shown[k], k)
        with _sending(state.reduction_D, k + 1 == count):
            state.scaler.scale(loss / count).backward()
        logs[k].update(terms)
    if state.reduction_G is not None:
        norm_G = finish_generators()
    norm_D = _finish(state, state.reduction_D, state.optimizer_D, parameters_D, measure)
    state.scaler.update()

    means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
    if norm_G is not None and norm_D is not None:
        means.update(grad_G=norm_G, grad_D=norm_D)
    return means


def score(state: TrainState, D: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """D's logits on real and on generated pictures."""
    with state.casting(real):
        if not state.batched or real.shape != fake.shape:
            return D(real), D(fake)
        score_real, score_fake = D(torch.cat([real, fake.to(real.dtype)])).chunk(2)
    return score_real, score_fake


def judge(
    gan: GANLoss,
    penalty_weight: float,
    D: nn.Module,
    real: Tensor,
    fake: Tensor,
    scores: tuple[Tensor, Tensor],
    alpha: Tensor,
    name: str,
    terms: dict[str, Tensor],
) -> Tensor:
    """Loss of one discriminator; writes ``name``, ``name_real`` and ``name_fake`` into ``terms``."""
    score_real, score_fake = scores
    loss = gan.discriminator(score_real, score_fake)
    if penalty_weight:
        loss = loss + penalty_weight * gradient_penalty(D, real, fake, alpha.view(-1, 1, 1, 1))
    terms[name] = loss.detach()
    terms[f"{name}_real"] = score_real.detach().float().mean()
    terms[f"{name}_fake"] = score_fake.detach().float().mean()
    return loss


def _sending(reduction: Reduction | None, completes: bool) -> AbstractContextManager[None]:
    """Around a backward pass, of which the last one of a step completes the gradients."""
    return reduction.during() if reduction is not None and completes else nullcontext()


def _finish(
    state: TrainState, reduction: Reduction | None, optimizer: Optimizer, parameters: list[nn.Parameter], measure: bool
) -> Tensor | None:
    """Wait for the gradients, unscale them, step; returns their norm over all parameters if it is to be measured."""
    if reduction is not None:
        reduction.finish()
    state.scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) if measure else None
    state.scaler.step(optimizer)
    return norm


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters inside the block: activations pass them through, nothing is kept for them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def l1_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of two pictures, in float32 (float64 stays) whatever the networks computed in."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    return F.l1_loss(x.to(dtype), y.to(dtype))
