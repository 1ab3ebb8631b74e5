"""Adversarial losses by hand, and the gradient penalty against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cyclegan_fast.models.reference import PatchDiscriminator
from cyclegan_fast.training.losses import GANLoss, gradient_penalty

# One picture with a 2x2 map of logits for each side.
REAL = torch.tensor([0.5, 2.0, -1.0, 1.0]).view(1, 1, 2, 2)
FAKE = torch.tensor([-2.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2)


def log_logistic(x: float) -> float:
    return -math.log(1 + math.exp(-x))


BY_HAND = {
    # ((0.5^2 + 1 + 4 + 0) / 4 + (4 + 0 + 0.25 + 1) / 4) / 2;   (9 + 1 + 0.25 + 0) / 4
    "lsgan": ((0.25 + 1 + 4 + 0) / 8 + (4 + 0 + 0.25 + 1) / 8, (9 + 1 + 0.25 + 0) / 4),
    "vanilla": (
        -sum(log_logistic(x) for x in (0.5, 2, -1, 1)) / 8 - sum(log_logistic(-x) for x in (-2, 0, 0.5, 1)) / 8,
        -sum(log_logistic(x) for x in (-2, 0, 0.5, 1)) / 4,
    ),
    # (0.5 + 0 + 2 + 0) and (0 + 1 + 1.5 + 2)
    "hinge": (2.5 / 8 + 4.5 / 8, 0.5 / 4),
    "wgangp": (-2.5 / 8 - 0.5 / 8, 0.5 / 4),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_values_by_hand(kind: str) -> None:
    loss = GANLoss(kind)
    discriminator, generator = BY_HAND[kind]
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, rel=1e-6)
    assert loss.generator(FAKE).item() == pytest.approx(generator, rel=1e-6)


def test_half_is_on_the_discriminator_only() -> None:
    loss = GANLoss("lsgan")
    zeros = torch.zeros(2, 1, 3, 3)
    assert loss.discriminator(zeros, zeros).item() == 0.5  # MSE(0, 1) = 1 for real, 0 for fake
    assert loss.generator(zeros).item() == 1.0


def test_vanilla_does_not_overflow() -> None:
    loss = GANLoss("vanilla")
    assert loss.generator(torch.full((1, 1, 1, 1), -1e4)).item() == pytest.approx(1e4)
    assert loss.discriminator(torch.full((1, 1, 1, 1), 1e4), torch.full((1, 1, 1, 1), -1e4)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BY_HAND)
def test_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    # 4,096 logits of 1 + 1/64 and the like: a 16-bit mean or square of them would be off in the third digit.
    real = torch.linspace(-1.5, 1.5, 4096).view(1, 1, 64, 64).to(dtype)
    fake = torch.linspace(-1.0, 2.0, 4096).view(1, 1, 64, 64).to(dtype)
    loss = GANLoss(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = loss.discriminator(real, fake), loss.generator(fake)
    exact = loss.discriminator(real.double(), fake.double()), loss.generator(fake.double())
    for value, truth in zip(values, exact, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(truth.item(), rel=2e-6, abs=1e-6)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="lsgan, vanilla, hinge, wgangp"):
        GANLoss("wasserstein")


class LinearCritic(nn.Module):
    """One logit a picture, <weight, x>: its gradient is the weight at every point."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(dim=(1, 2, 3)).view(-1, 1, 1, 1)


def test_penalty_of_a_linear_critic_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    critic = LinearCritic(weight)
    real, fake = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    penalty = gradient_penalty(critic, real, fake, torch.rand(2, 1, 1, 1, generator=generator, dtype=torch.float64))
    norm = weight.norm().item()
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-12)
    penalty.backward()
    # d/dw (||w|| - 1)^2 = 2 (||w|| - 1) w / ||w||
    torch.testing.assert_close(critic.weight.grad, 2 * (norm - 1) * weight / norm)


class QuadraticCritic(nn.Module):
    """D(x) = scale |x|^2 / 2, whose gradient at x is scale x: the penalty tells where it was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.scale * x.square()


def test_penalty_is_taken_between_real_and_fake_for_each_picture() -> None:
    real = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 2.0)])
    fake = torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 4.0)])
    alpha = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1)
    # The points are 0.5 and 3.5 in all four pixels, so the norms are 3 * 2 * 0.5 and 3 * 2 * 3.5.
    expected = ((3.0 - 1) ** 2 + (21.0 - 1) ** 2) / 2
    assert gradient_penalty(QuadraticCritic(), real, fake, alpha).item() == pytest.approx(expected, rel=1e-6)


def test_penalty_of_a_flat_critic_has_a_finite_gradient() -> None:
    critic = LinearCritic(torch.zeros(1, 2, 2))
    penalty = gradient_penalty(critic, torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 1, 1))
    penalty.backward()
    assert penalty.item() == pytest.approx(1.0)
    assert critic.weight.grad is not None
    assert torch.isfinite(critic.weight.grad).all()


def test_penalty_reaches_the_discriminator_through_its_norms() -> None:
    torch.manual_seed(0)
    D = PatchDiscriminator(1, 2, 1, init_gain=0.5).double()
    real, fake = torch.randn(2, 2, 1, 10, 12, dtype=torch.float64)
    alpha = torch.rand(2, 1, 1, 1, dtype=torch.float64)
    weight = D.get_parameter("model.2.weight")

    def penalty() -> Tensor:
        return gradient_penalty(D, real, fake, alpha)

    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
    above = penalty()
    with torch.no_grad():
        weight -= 2 * step * direction
    slope = (above - penalty()).item() / (2 * step)
    assert abs(slope) > 1e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_penalty_is_float32_under_autocast_and_not_differentiated_for_the_fake() -> None:
    torch.manual_seed(0)
    D = PatchDiscriminator(1, 2, 1, init_gain=0.5)
    real, fake = torch.randn(2, 1, 1, 12, 12)
    fake = fake.bfloat16().requires_grad_()
    alpha = torch.rand(1, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = gradient_penalty(D, real, fake, alpha)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert fake.grad is None
    exact = gradient_penalty(D.double(), real.double(), fake.double(), alpha)
    assert penalty.item() == pytest.approx(exact.item(), rel=1e-4)


def test_penalty_refuses_shapes_that_do_not_fit() -> None:
    critic = QuadraticCritic()
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="differ in shape"):
        gradient_penalty(critic, x, x[:1], torch.zeros(2, 1, 1, 1))
    with pytest.raises(ValueError, match="alpha of shape"):
        gradient_penalty(critic, x, x, torch.zeros(2))
