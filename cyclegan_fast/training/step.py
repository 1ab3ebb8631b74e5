"""One training step: a function of modules and tensors, which sees neither configuration, files nor other processes.

Names are those of the de-facto implementation; the paper (Zhu et al., "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", ICCV 2017) writes G for G_A, F for G_B, D_Y for D_A and D_X for D_B:

    G_A: A -> B, judged by D_A, which sees real_B and fake_B        G_B: B -> A, judged by D_B
    fake_B = G_A(real_A)   rec_A = G_B(fake_B)   idt_A = G_A(real_B)      and the mirror image
    loss_G = gan(D_A(fake_B)) + gan(D_B(fake_A))                                          eq. 1, both ways
           + cycle_A |rec_A - real_A| + cycle_B |rec_B - real_B|                          eq. 2
           + identity (cycle_B |idt_A - real_B| + cycle_A |idt_B - real_A|)               section 5.2

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

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from cyclegan_fast.training.losses import GANLoss, gradient_penalty

Exchange = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepBatch(NamedTuple):
    """The tensors of one optimiser step, K micro-batches of N pairs.

    ``real_A`` [K, N, C_A, H, W] and ``real_B`` [K, N, C_B, H, W], float32 in [-1, 1]. The random draws come with the
    batch, so that a step is a pure function: ``accept_*`` [K, M] in [0, 1) and ``slot_*`` [K, M] int64 for the pools,
    where M is N times the number of processes that share a pool, and ``alpha_*`` [K, N] in [0, 1) for the gradient
    penalty of the discriminator of the domain. A suffix names the domain of the pictures concerned.
    """

    real_A: Tensor
    real_B: Tensor
    accept_A: Tensor
    slot_A: Tensor
    accept_B: Tensor
    slot_B: Tensor
    alpha_A: Tensor
    alpha_B: Tensor


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


class Reduction(Protocol):
    """Who makes the gradients of one optimiser's parameters their means over the processes."""

    def during(self) -> AbstractContextManager[None]:
        """Around the one backward pass that completes the gradients, which set out as it makes them."""

    def finish(self) -> None:
        """Wait until all have arrived: the parameters' gradients are means from here on."""


@dataclass
class TrainState:
    """Everything a step reads and changes.

    The networks may be compiled; the optimisers hold the parameters of the plain modules. ``reduction_G`` and
    ``reduction_D`` average gradients over the processes, if there are several (both or neither); ``exchange_A`` and
    ``exchange_B`` pass a domain's fakes through its pool.
    """

    G_A: nn.Module
    G_B: nn.Module
    D_A: nn.Module
    D_B: nn.Module
    optimizer_G: Optimizer
    optimizer_D: Optimizer
    exchange_A: Exchange
    exchange_B: Exchange
    objective: Objective = field(default_factory=Objective)
    autocast: torch.dtype | None = None
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    reduction_G: Reduction | None = None
    reduction_D: Reduction | None = None
    batched: bool = True
    """Passes that share weights run as one batch, where the pictures' shapes allow: nothing that is computed changes,
    because instance norm never mixes pictures, but there are fewer and larger kernels."""
    side_stream: torch.cuda.Stream | None = None
    """Where given, what G_B computes runs there, beside what G_A computes in the current stream."""


class Fakes(NamedTuple):
    """Generated pictures of one micro-batch, detached."""

    fake_A: Tensor
    fake_B: Tensor


def train_step(state: TrainState, batch: StepBatch, *, measure: bool = False) -> dict[str, Tensor]:
    """Update the generators, then the discriminators.

    Collectives of several processes come in one order: those of the pools, the generators' gradients, those of the
    discriminators. Returns detached float32 scalars on the device, averaged over the micro-batches: the weighted terms
    ``G_A``, ``G_B``, ``cycle_A``, ``cycle_B``, ``idt_A``, ``idt_B`` and their sum ``loss_G``; ``D_A``, ``D_B``; the
    mean outputs ``D_A_real``, ``D_A_fake``, ``D_B_real``, ``D_B_fake``; with ``measure`` also the gradient norms
    ``grad_G`` and ``grad_D``. Nothing is read back to the host.
    """
    count = batch.real_A.shape[0]
    parameters_G, parameters_D = _parameters(state.optimizer_G), _parameters(state.optimizer_D)
    logs: list[dict[str, Tensor]] = []

    finish_generators = partial(_finish, state, state.reduction_G, state.optimizer_G, parameters_G, measure)

    with _frozen(parameters_D):
        state.optimizer_G.zero_grad(set_to_none=True)
        pooled = []
        for k in range(count):
            loss, terms, fakes = generator_pass(state, batch.real_A[k], batch.real_B[k])
            # Before the backward pass: behind the gradients, what pools share would wait for these to arrive.
            pooled.append(_exchanged(state, batch, fakes, k))
            with _sending(state.reduction_G, k + 1 == count):
                state.scaler.scale(loss / count).backward()
            logs.append(terms)
        norm_G = finish_generators() if state.reduction_G is None else None

    state.optimizer_D.zero_grad(set_to_none=True)
    for k in range(count):
        loss, terms = discriminator_pass(state, batch, pooled[k], k)
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


def generator_pass(state: TrainState, real_A: Tensor, real_B: Tensor) -> tuple[Tensor, dict[str, Tensor], Fakes]:
    """The generators' loss of one micro-batch [N, C, H, W], its terms (detached) and the fakes."""
    objective = state.objective
    with _autocast(state, real_A):
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


def _translate(state: TrainState, G: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """G(source), the fake, and G(target), which should be the target; without identity loss the fake twice."""
    if not state.objective.identity:
        fake = G(source)
        return fake, fake
    if not state.batched or source.shape != target.shape:
        return G(source), G(target)
    fake, idt = G(torch.cat([source, target])).chunk(2)
    return fake, idt


def _side_by_side(
    state: TrainState, first: Callable[[], tuple[Tensor, Tensor]], second: Callable[[], tuple[Tensor, Tensor]]
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


def _exchanged(state: TrainState, batch: StepBatch, fakes: Fakes, k: int) -> Fakes:
    """What the pools give for the fakes of micro-batch ``k``."""
    return Fakes(
        state.exchange_A(fakes.fake_A, batch.accept_A[k], batch.slot_A[k]),
        state.exchange_B(fakes.fake_B, batch.accept_B[k], batch.slot_B[k]),
    )


def discriminator_pass(state: TrainState, batch: StepBatch, pooled: Fakes, k: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of both discriminators' losses on micro-batch ``k`` and pictures of the pools; its terms (detached)."""
    pooled_A, pooled_B = pooled
    scores_A, scores_B = _side_by_side(
        state,
        lambda: _score(state, state.D_A, batch.real_B[k], pooled_B),
        lambda: _score(state, state.D_B, batch.real_A[k], pooled_A),
    )
    terms: dict[str, Tensor] = {}
    losses = [
        _judge(state, state.D_A, batch.real_B[k], pooled_B, scores_A, batch.alpha_B[k], "D_A", terms),
        _judge(state, state.D_B, batch.real_A[k], pooled_A, scores_B, batch.alpha_A[k], "D_B", terms),
    ]
    return torch.stack(losses).sum(), terms


def _score(state: TrainState, D: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """D's logits on real and on generated pictures."""
    with _autocast(state, real):
        if not state.batched or real.shape != fake.shape:
            return D(real), D(fake)
        score_real, score_fake = D(torch.cat([real, fake.to(real.dtype)])).chunk(2)
    return score_real, score_fake


def _judge(
    state: TrainState,
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
    loss = state.objective.gan.discriminator(score_real, score_fake)
    if state.objective.gradient_penalty:
        penalty = gradient_penalty(D, real, fake, alpha.view(-1, 1, 1, 1))
        loss = loss + state.objective.gradient_penalty * penalty
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


def _autocast(state: TrainState, like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, dtype=state.autocast, enabled=state.autocast is not None)


def l1_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of two pictures, in float32 (float64 stays) whatever the networks computed in."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    return F.l1_loss(x.to(dtype), y.to(dtype))
