"""The same learning: two hundred steps of the reference and of the fused networks from one seed.

Training a CycleGAN is chaotic. Adam divides a gradient by its own size, and the L1 losses have kinks, so that a
difference of one rounding grows: with the usual settings, by a factor of 1e5 in some five steps. No two orders of
summation stay together for long, and a tolerance for 200 such steps could hold no mistake out. So:

* in float64, with an epsilon of Adam above the rounding and a small learning rate, the curves are compared step by
  step: the difference grows from 1e-16 to 1e-9, and the smallest mistake makes one of 1e-4;
* in float32, where the kernels are, the first steps are compared in the same way, and then means over 25 steps, with
  the difference that a rounding of the starting weights makes to the reference itself as the measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclegan_fast.device import arithmetic
from cyclegan_fast.models import PatchDiscriminator, ResnetGenerator, fused
from cyclegan_fast.training.cyclegan import CycleGANState, Objective
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.step import StepBatch, train_step

LOSSES = ("loss_G", "G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B", "D_A", "D_B")
STEPS, WINDOW, FIRST = 200, 25, 8
CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs CUDA")])]


@dataclass(frozen=True)
class Training:
    """A small training; the defaults are those of the reference."""

    impl: str = "reference"
    batched: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    size: int = 16
    steps: int = STEPS
    lr: float = 2e-5
    beta1: float = 0.5
    pool: int = 2
    perturbation: float = 0.0
    objective: Objective = Objective()  # noqa: RUF009 - it is frozen

    def curves(self) -> Tensor:
        """Every loss at every step, float64 [steps, losses]."""
        state = self._state()
        generator = torch.Generator().manual_seed(1)
        pictures = [picture.to(self.device, self.dtype) for picture in domains(self.size)]
        logs = []
        with arithmetic("fp32", torch.device(self.device)):  # on CUDA, no TF32 by the back door
            for _ in range(self.steps):
                chosen = [domain[torch.randint(0, 16, (1,), generator=generator)][None] for domain in pictures]
                accept_A, accept_B, alpha = torch.rand((3, 1, 1), generator=generator, dtype=torch.float64)
                slot_A, slot_B = torch.randint(0, 2, (2, 1, 1), generator=generator)
                draws = (accept_A, slot_A, accept_B, slot_B, alpha, alpha)
                log = train_step(state, StepBatch(*chosen, *(draw.to(self.device) for draw in draws)))
                logs.append(torch.stack([log[name].double() for name in LOSSES]))
        return torch.stack(logs).cpu()

    def _state(self) -> CycleGANState:
        torch.manual_seed(0)
        networks: dict[str, Any] = {name: ResnetGenerator(3, 3, 8, 1, impl=self.impl) for name in ("G_A", "G_B")}
        networks |= {name: PatchDiscriminator(3, 8, 1, impl=self.impl) for name in ("D_A", "D_B")}
        for network in networks.values():
            network.to(self.device, self.dtype).to(memory_format=torch.channels_last)
            for parameter in network.parameters():
                parameter.data *= 1 + self.perturbation * torch.randn(parameter.shape).to(parameter)

        def adam(*modules: nn.Module) -> torch.optim.Adam:
            parameters = [parameter for module in modules for parameter in module.parameters()]
            return torch.optim.Adam(parameters, lr=self.lr, betas=(self.beta1, 0.999), eps=1e-2, fused=True)

        return CycleGANState(
            **networks,
            optimizer_G=adam(networks["G_A"], networks["G_B"]),
            optimizer_D=adam(networks["D_A"], networks["D_B"]),
            exchange_A=ImagePool(self.pool).exchange,
            exchange_B=ImagePool(self.pool).exchange,
            objective=self.objective,
            batched=self.batched,
        )


REFERENCE = Training()
FUSED = replace(REFERENCE, impl="fused", batched=True)


def domains(size: int) -> tuple[Tensor, Tensor]:
    """Sixteen smooth pictures of A, and of B: darker, in other colours, with stripes."""
    coarse = torch.rand((2, 16, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    smooth = F.interpolate(coarse.flatten(0, 1), (size, size), mode="bicubic").clamp(0, 1) * 2 - 1
    A, B = smooth.unflatten(0, (2, 16))
    stripes = 0.1 * torch.sin(1.5 * torch.arange(size, dtype=torch.float64)).sign()
    return A, (stripes - 0.6 * B.flip(1)).clamp(-1, 1)


def difference(curves: Tensor, expected: Tensor) -> Tensor:
    """The largest relative difference of any loss at each step."""
    return ((curves - expected).abs() / expected.abs().clamp_min(1e-3)).amax(1)


def smoothed(curves: Tensor) -> Tensor:
    return curves.unfold(0, WINDOW, WINDOW).mean(-1)


def assert_learned(curves: Tensor) -> None:
    """Curves that stand still would agree whatever was wrong."""
    means = smoothed(curves)
    assert (means[-1] < 0.97 * means[0]).all(), means[-1] / means[0]


EXACT = replace(REFERENCE, dtype=torch.float64)
# Roundings grow to 2e-9 by the end; another machine may be some hundred times worse.
EXACT_TOLERANCE = 1e-6


@pytest.mark.slow
def test_curves_are_the_same_to_rounding_in_float64() -> None:
    expected = EXACT.curves()
    assert_learned(expected)
    curves = replace(EXACT, impl="fused", batched=True).curves()
    assert difference(curves, expected).max() < EXACT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_curves_are_the_same_to_chaos_in_float32(device: str) -> None:
    here = replace(REFERENCE, device=device)
    expected = here.curves()
    assert_learned(expected)
    curves = replace(FUSED, device=device).curves()
    # A rounding has no time to grow: 1e-6 was seen, and 3e-4 with the smallest of the mistakes below.
    assert difference(curves, expected)[:FIRST].max() < 1e-4
    # What one rounding of the weights at the start does to means over 25 steps, some 0.5 %, is what chaos may do; the
    # factor is because a maximum over few numbers scatters. Whatever learns differently goes on growing.
    chaos = difference(smoothed(replace(here, perturbation=1e-7).curves()), smoothed(expected)).max()
    assert chaos < 0.03
    assert difference(smoothed(curves), smoothed(expected)).max() < max(3 * float(chaos), 0.01)


def slightly_wrong(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: function(*arguments, **options) * 1.001


MISTAKES: dict[str, dict[str, Any]] = {
    "identity halved": {"objective": Objective(identity=0.25)},
    "no pool": {"pool": 0},
    "a cycle loses half its gradient": {"objective": Objective(own_gradient=True)},
    "a half percent of a weight": {"objective": Objective(cycle_A=10.05)},
    "momentum": {"beta1": 0.6},
    "learning rate": {"lr": 2.02e-5},
    "one part in a thousand of the norm": {},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_would_show(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them in the first steps, in float64 and, by the tolerance of that test, in float32."""
    if not MISTAKES[mistake]:
        monkeypatch.setattr(fused, "instance_norm", slightly_wrong(fused.instance_norm))
    for right, tolerance in ((EXACT, 100 * EXACT_TOLERANCE), (REFERENCE, 1e-4)):
        short = replace(right, steps=FIRST)
        wrong = replace(short, impl="fused", batched=True, **MISTAKES[mistake])
        assert difference(wrong.curves(), short.curves()).max() > 2 * tolerance
