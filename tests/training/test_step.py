"""The step against plain arithmetic: explicit losses, autograd on them, Adam written out, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cyclegan_fast.models.reference import PatchDiscriminator, ResnetGenerator
from cyclegan_fast.training.cyclegan import CycleGANState, Objective
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.step import StepBatch, train_step

LR, BETAS, EPS = 2e-3, (0.5, 0.999), 1e-8


def networks(dtype: torch.dtype = torch.float64, preset: str = "original") -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "G_A": ResnetGenerator(3, 3, 4, 1, preset=preset, init_gain=0.2),
        "G_B": ResnetGenerator(3, 3, 4, 1, preset=preset, init_gain=0.2),
        "D_A": PatchDiscriminator(3, 4, 1, preset=preset, init_gain=0.2),
        "D_B": PatchDiscriminator(3, 4, 1, preset=preset, init_gain=0.2),
    }
    return {name: module.to(dtype) for name, module in made.items()}


def state_of(modules: dict[str, nn.Module], pool: int = 2, **objective: Any) -> CycleGANState:
    def adam(*names: str) -> torch.optim.Adam:
        return torch.optim.Adam([p for n in names for p in modules[n].parameters()], lr=LR, betas=BETAS, eps=EPS)

    return CycleGANState(
        **modules,
        optimizer_G=adam("G_A", "G_B"),
        optimizer_D=adam("D_A", "D_B"),
        exchange_A=ImagePool(pool).exchange,
        exchange_B=ImagePool(pool).exchange,
        objective=Objective(**objective),
    )


def batch_of(step: int, count: int, size: int, dtype: torch.dtype = torch.float64) -> StepBatch:
    generator = torch.Generator().manual_seed(100 + step)
    pictures = [torch.rand((count, size, 3, 16, 16), generator=generator, dtype=torch.float64) * 2 - 1 for _ in "AB"]
    uniform = [torch.rand((count, size), generator=generator, dtype=torch.float64) for _ in range(4)]
    slots = [torch.randint(0, 2, (count, size), generator=generator) for _ in "AB"]
    A, B = (picture.to(dtype) for picture in pictures)
    return StepBatch(A, B, uniform[0], slots[0], uniform[1], slots[1], uniform[2], uniform[3])


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean()


class PlainTrainer:
    """CycleGAN for one micro-batch a step, written out with nothing shared with the implementation but the networks."""

    def __init__(self, modules: dict[str, nn.Module], identity: float, own: bool) -> None:
        self.m, self.identity, self.own = modules, identity, own
        self.moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.pools: dict[str, list[Tensor]] = {"A": [], "B": []}
        self.t = 0

    def adam(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        parameters = list(self.m[name].parameters())
        before = self.moments.get(name, [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters])
        self.moments[name] = []
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, before, strict=True):
                m = BETAS[0] * m + (1 - BETAS[0]) * g
                v = BETAS[1] * v + (1 - BETAS[1]) * g * g
                self.moments[name].append((m, v))
                p -= LR * (m / (1 - BETAS[0] ** self.t)) / ((v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)

    def pooled(self, domain: str, images: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
        pool, out = self.pools[domain], []
        for image, u, k in zip(images, accept.tolist(), slot.tolist(), strict=True):
            if len(pool) < 2:
                pool.append(image)
                out.append(image)
            elif u < 0.5:
                out.append(pool[k])
                pool[k] = image
            else:
                out.append(image)
        return torch.stack(out)

    def step(self, batch: StepBatch) -> dict[str, float]:
        self.t += 1
        G, F, D_Y, D_X = (self.m[n] for n in ("G_A", "G_B", "D_A", "D_B"))
        x, y = batch.real_A[0], batch.real_B[0]
        fake_y, fake_x = G(x), F(y)
        if self.own:
            # Each generator's own sum, differentiated with respect to it alone, with the other one constant.
            loss_G = ((D_Y(fake_y) - 1) ** 2).mean() + 10 * l1(G(F(y).detach()), y) + 10 * self.identity * l1(G(y), y)
            loss_F = ((D_X(fake_x) - 1) ** 2).mean() + 10 * l1(F(G(x).detach()), x) + 10 * self.identity * l1(F(x), x)
            grads_G = torch.autograd.grad(loss_G, list(G.parameters()))
            grads_F = torch.autograd.grad(loss_F, list(F.parameters()))
            total = (loss_G + loss_F).item()
        else:
            loss = ((D_Y(fake_y) - 1) ** 2).mean() + ((D_X(fake_x) - 1) ** 2).mean()
            loss = loss + 10 * l1(F(fake_y), x) + 10 * l1(G(fake_x), y)
            if self.identity:
                loss = loss + 10 * self.identity * (l1(G(y), y) + l1(F(x), x))
            both = torch.autograd.grad(loss, [*G.parameters(), *F.parameters()])
            grads_G, grads_F = both[: len(list(G.parameters()))], both[len(list(G.parameters())) :]
            total = loss.item()
        self.adam("G_A", grads_G)
        self.adam("G_B", grads_F)
        out = {"loss_G": total}
        for name, D, real, fake, domain, accept, slot in (
            ("D_A", D_Y, y, fake_y, "B", batch.accept_B[0], batch.slot_B[0]),
            ("D_B", D_X, x, fake_x, "A", batch.accept_A[0], batch.slot_A[0]),
        ):
            shown = self.pooled(domain, fake.detach(), accept, slot)
            loss_D = 0.5 * (((D(real) - 1) ** 2).mean() + (D(shown) ** 2).mean())
            self.adam(name, torch.autograd.grad(loss_D, list(D.parameters())))
            out[name] = loss_D.item()
        return out


@pytest.mark.parametrize("preset", ["original", "keras"])
@pytest.mark.parametrize(("identity", "own"), [(0.5, False), (0.0, False), (0.5, True)])
@pytest.mark.parametrize("size", [1, 3])
def test_losses_and_weights_are_those_of_plain_arithmetic(preset: str, identity: float, own: bool, size: int) -> None:
    ours = networks(preset=preset)
    plain = PlainTrainer(copy.deepcopy(ours), identity, own)
    state = state_of(ours, identity=identity, own_gradient=own)
    for step in range(4):
        batch = batch_of(step, 1, size)
        logs, expected = train_step(state, batch), plain.step(batch)
        for name, value in expected.items():
            assert float(logs[name]) == pytest.approx(value, rel=1e-10), (step, name)
    for name, module in ours.items():
        for mine, theirs in zip(module.parameters(), plain.m[name].parameters(), strict=True):
            # Dead biases get gradients of rounding size, which Adam turns into steps of any sign.
            if mine.dim() > 1:
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_two_micro_batches_are_one_batch_of_both() -> None:
    one, two = networks(), networks()
    state_one, state_two = state_of(one), state_of(two)
    for step in range(3):
        batch = batch_of(step, 2, 1)
        together = StepBatch(*(tensor.flatten(0, 1)[None] for tensor in batch))
        logs_one, logs_two = train_step(state_one, together, measure=True), train_step(state_two, batch, measure=True)
        assert logs_one.keys() == logs_two.keys()
        for name in logs_one:
            rel = 1e-6 if name.endswith(("_real", "_fake")) else 1e-9  # scores are recorded in float32
            assert float(logs_one[name]) == pytest.approx(float(logs_two[name]), rel=rel), name


def test_the_sum_of_the_terms_is_the_loss_and_norms_are_measured_on_request() -> None:
    state = state_of(networks())
    logs = train_step(state, batch_of(0, 1, 1))
    terms = ("G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B")
    assert float(logs["loss_G"]) == pytest.approx(sum(float(logs[name]) for name in terms), rel=1e-12)
    assert "grad_G" not in logs
    logs = train_step(state, batch_of(1, 1, 1), measure=True)
    gradients = [p.grad for group in state.optimizer_G.param_groups for p in group["params"]]
    assert float(logs["grad_G"]) == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()))


def test_weights_scale_their_terms() -> None:
    batch, state = batch_of(0, 1, 1), state_of(networks())
    base = train_step(state, batch)
    state = state_of(networks())
    state.objective = replace(state.objective, cycle_A=5.0, cycle_B=20.0, identity=0.25)
    logs = train_step(state, batch)
    for name, factor in {"G_A": 1, "cycle_A": 0.5, "cycle_B": 2, "idt_A": 0.5 * 2, "idt_B": 0.5 * 0.5}.items():
        assert float(logs[name]) == pytest.approx(factor * float(base[name])), name


@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "hinge", "wgangp"])
def test_every_adversarial_loss_trains_both_sides(kind: str) -> None:
    modules = networks()
    before = copy.deepcopy(modules)
    state = state_of(modules, gan=GANLoss(kind), gradient_penalty=10.0 if kind == "wgangp" else 0.0)
    for step in range(2):
        logs = train_step(state, batch_of(step, 1, 2))
        assert all(bool(value.isfinite()) for value in logs.values())
    for name, module in modules.items():
        first, second = next(module.parameters()), next(before[name].parameters())
        assert not torch.equal(first, second), name


def test_the_gradient_penalty_is_part_of_the_critics_loss() -> None:
    with_penalty = train_step(state_of(networks(), gan=GANLoss("wgangp"), gradient_penalty=10.0), batch_of(0, 1, 2))
    without = train_step(state_of(networks(), gan=GANLoss("wgangp")), batch_of(0, 1, 2))
    assert float(with_penalty["D_A"]) > float(without["D_A"])
    assert float(with_penalty["G_A"]) == float(without["G_A"])


def test_discriminators_get_no_gradient_in_the_generators_step() -> None:
    modules = networks()
    state = state_of(modules)
    batch = batch_of(0, 1, 1)
    gradients: list[bool] = []
    original = state.optimizer_G.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        gradients.extend(p.grad is not None for name in ("D_A", "D_B") for p in modules[name].parameters())
        return original(*args, **kwargs)

    state.optimizer_G.step = spy  # type: ignore[method-assign]
    train_step(state, batch)
    assert gradients
    assert not any(gradients)
    assert all(p.requires_grad for p in modules["D_A"].parameters())


def test_bf16_keeps_float32_weights_and_losses() -> None:
    modules = networks(torch.float32)
    state = state_of(modules)
    state.autocast = torch.bfloat16
    exact = train_step(state_of(networks(torch.float32)), batch_of(0, 1, 2, torch.float32))
    logs = train_step(state, batch_of(0, 1, 2, torch.float32))
    assert all(value.dtype == torch.float32 for value in logs.values())
    assert all(p.dtype == torch.float32 for module in modules.values() for p in module.parameters())
    for name in ("cycle_A", "idt_B", "D_A", "loss_G"):
        # bf16 keeps 8 bits: single activations are off by 2**-9, their means over a picture by far less than 2 %.
        assert float(logs[name]) == pytest.approx(float(exact[name]), rel=2e-2), name
