"""pix2pix and Augmented CycleGAN: a step against plain arithmetic in float64, and whole runs of the trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_graph import TapeRecorder
from test_trainer import assert_same_state, losses
from tiny_runs import write_pictures
from torch import Tensor, nn

from cyclegan_fast.config import Config, ConfigError, load_config
from cyclegan_fast.models import build_augmented, build_pix2pix
from cyclegan_fast.models.augmented import StyledGenerator
from cyclegan_fast.models.reference import InstanceNorm
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import trainer
from cyclegan_fast.training.augmented import AugmentedState
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.latents import latent_draws
from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.pix2pix import Pix2PixState
from cyclegan_fast.training.step import StepBatch, TrainState, train_step
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]
LR, EPS = 2e-3, 1e-8
PIX2PIX = ("model.method=pix2pix", "data.pairing=aligned", "data.unreadable=skip")
AUGMENTED = ("model.method=augmented", "model.latent=3")
METHODS = {"pix2pix": PIX2PIX, "augmented": AUGMENTED}
Z = 3


def model_of(*overrides: str) -> Any:
    small = ("model.ngf=4", "model.ndf=4", "model.blocks=1", "model.discriminator_layers=1", "model.init_gain=0.2")
    return load_config(None, [*small, "model.latent=3", "data.pairing=aligned", *overrides]).model


def batch_of(step: int, size: int, count: int = 1) -> StepBatch:
    draw = torch.Generator().manual_seed(100 + step)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((count, size, *shape), generator=draw, dtype=torch.float64)

    A, B = (uniform(3, 16, 16) * 2 - 1 for _ in "AB")
    slots = [torch.randint(0, 2, (count, size), generator=draw) for _ in "AB"]
    latents = [torch.randn((count, size, Z), generator=draw, dtype=torch.float64) for _ in "AB"]
    return StepBatch(A, B, uniform(), slots[0], uniform(), slots[1], uniform(), uniform(), *latents)


def parameters(modules: dict[str, nn.Module], *names: str) -> list[nn.Parameter]:
    return [parameter for name in names for parameter in modules[name].parameters()]


def adam(modules: dict[str, nn.Module], *names: str) -> torch.optim.Adam:
    return torch.optim.Adam(parameters(modules, *names), lr=LR, betas=(0.5, 0.999), eps=EPS)


def pix2pix(suffix: str = "A", pool: int = 0) -> tuple[dict[str, nn.Module], Pix2PixState]:
    torch.manual_seed(0)
    direction = f"model.direction={'AtoB' if suffix == 'A' else 'BtoA'}"
    modules = build_pix2pix(model_of("model.method=pix2pix", direction), impl="reference", impl_D="reference")
    modules = {name: module.double() for name, module in modules.items()}
    return modules, Pix2PixState(
        G=modules[f"G_{suffix}"],
        D=modules[f"D_{suffix}"],
        exchange_pairs=ImagePool(pool).exchange,
        direction="AtoB" if suffix == "A" else "BtoA",
        optimizer_G=adam(modules, f"G_{suffix}"),
        optimizer_D=adam(modules, f"D_{suffix}"),
    )


def augmented() -> tuple[dict[str, nn.Module], AugmentedState]:
    torch.manual_seed(0)
    modules = build_augmented(model_of("model.method=augmented"), impl="reference", impl_D="reference")
    modules = {name: module.double() for name, module in modules.items()}
    networks: dict[str, Any] = {**modules}
    return modules, AugmentedState(
        **networks,
        exchange_A=ImagePool(0).exchange,
        exchange_B=ImagePool(0).exchange,
        gan=GANLoss("lsgan"),
        cycle_A=10.0,
        cycle_B=7.0,
        latent=2.0,
        latent_size=Z,
        optimizer_G=adam(modules, "G_A", "G_B", "E_A", "E_B"),
        optimizer_D=adam(modules, "D_A", "D_B", "D_Z_A", "D_Z_B"),
    )


def squared(x: Tensor, goal: float) -> Tensor:
    return ((x - goal) ** 2).mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean()


def beside(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


def dot(z: Tensor) -> Tensor:
    return z[:, :, None, None]


def pix2pix_losses(m: dict[str, nn.Module], batch: StepBatch, suffix: str) -> tuple[Tensor, Tensor]:
    """Isola et al. 2017, eq. 1 (with least squares), 3 and 4."""
    A, B = batch.real_A[0], batch.real_B[0]
    x, y = (A, B) if suffix == "A" else (B, A)
    G, D = m[f"G_{suffix}"], m[f"D_{suffix}"]
    fake = G(x)
    loss_G = squared(D(beside(x, fake)), 1) + 100 * l1(y, fake)
    loss_D = 0.5 * (squared(D(beside(x, y)), 1) + squared(D(beside(x, fake.detach())), 0))
    return loss_G, loss_D


def augmented_losses(m: dict[str, nn.Module], batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Almahairi et al. 2018, section 3.2, in the names of the paper."""
    G_AB, G_BA, E_A, E_B = m["G_A"], m["G_B"], m["E_A"], m["E_B"]
    D_B, D_A, D_Za, D_Zb = m["D_A"], m["D_B"], m["D_Z_A"], m["D_Z_B"]
    a, b, z_a, z_b = batch.real_A[0], batch.real_B[0], batch.latent_A[0], batch.latent_B[0]
    b_made = G_AB(a, z_b)
    z_a_found = E_A(beside(a, b_made))
    a_made = G_BA(b, z_a)
    z_b_found = E_B(beside(a_made, b))
    loss_G = squared(D_B(b_made), 1) + squared(D_Za(dot(z_a_found)), 1)
    loss_G = loss_G + squared(D_A(a_made), 1) + squared(D_Zb(dot(z_b_found)), 1)
    loss_G = loss_G + 10 * l1(G_BA(b_made, z_a_found), a) + 7 * l1(G_AB(a_made, z_b_found), b)
    loss_G = loss_G + 2 * l1(E_B(beside(a, b_made)), z_b) + 2 * l1(E_A(beside(a_made, b)), z_a)
    pairs = [(D_B, b, b_made), (D_A, a, a_made), (D_Za, dot(z_a), dot(z_a_found)), (D_Zb, dot(z_b), dot(z_b_found))]
    loss_D = sum(0.5 * (squared(D(real), 1) + squared(D(fake.detach()), 0)) for D, real, fake in pairs)
    return loss_G, torch.as_tensor(loss_D)


def assert_step_is(
    state: TrainState, modules: dict[str, nn.Module], G: tuple[str, ...], D: tuple[str, ...], arithmetic: Any
) -> None:
    """Three steps: losses, gradients, and weights after Adam written by torch, those of the explicit losses."""
    plain = copy.deepcopy(modules)
    optimizers = adam(plain, *G), adam(plain, *D)
    for step in range(3):
        batch = batch_of(step, 2)
        logs = train_step(state, batch)
        loss_G, loss_D = arithmetic(plain, batch)
        assert float(logs["loss_G"]) == pytest.approx(loss_G.item(), rel=1e-10)
        assert sum(float(logs[name]) for name in D) == pytest.approx(loss_D.item(), rel=1e-10)
        for names, loss in ((G, loss_G), (D, loss_D)):
            theirs = torch.autograd.grad(loss, parameters(plain, *names), retain_graph=True)
            for parameter, gradient in zip(parameters(plain, *names), theirs, strict=True):
                parameter.grad = gradient
            for mine, gradient in zip(parameters(modules, *names), theirs, strict=True):
                assert mine.grad is not None
                torch.testing.assert_close(mine.grad, gradient, rtol=1e-7, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(parameters(modules, *G, *D), parameters(plain, *G, *D), strict=True):
        if mine.dim() > 1:  # dead biases have gradients of rounding size, which Adam turns into steps of any sign
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("suffix", ["A", "B"])
def test_a_step_of_pix2pix_is_plain_arithmetic(suffix: str) -> None:
    modules, state = pix2pix(suffix)
    assert set(modules) == {f"G_{suffix}", f"D_{suffix}"}
    losses_of = lambda plain, batch: pix2pix_losses(plain, batch, suffix)  # noqa: E731
    assert_step_is(state, modules, (f"G_{suffix}",), (f"D_{suffix}",), losses_of)


def test_a_step_of_augmented_cyclegan_is_plain_arithmetic() -> None:
    modules, state = augmented()
    assert_step_is(state, modules, ("G_A", "G_B", "E_A", "E_B"), ("D_A", "D_B", "D_Z_A", "D_Z_B"), augmented_losses)


def test_pix2pix_pools_pairs() -> None:
    """A fake is never shown beside another's source."""
    _, state = pix2pix(pool=2)
    seen: list[Tensor] = []
    state.D.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    sources = []
    for step in range(6):
        batch = batch_of(step, 1)
        sources.append(batch.real_A[0])
        train_step(state, batch)
    shown = [pair[1:] for pair in seen[1::2]]  # of each step's second pass the pool's, behind the real one
    places = [next(i for i, source in enumerate(sources) if torch.equal(pair[:, :3], source)) for pair in shown]
    assert len(places) == 6
    assert places != list(range(6)), "the pool gave nothing back"


def test_a_styled_generator_with_its_code_fixed_is_an_ordinary_one() -> None:
    torch.manual_seed(1)
    for preset in ("original", "keras"):
        styled = StyledGenerator(3, 3, 4, 2, latent=Z, preset=preset, init_gain=0.2).double().eval()
        x, z = torch.rand(2, 3, 18, 16, dtype=torch.float64) * 2 - 1, torch.randn(2, Z, dtype=torch.float64)
        both = styled(x, z)
        for i in range(2):
            plain = styled.styled(z[i])
            assert all(
                isinstance(norm.weight, nn.Parameter) for norm in plain.modules() if isinstance(norm, InstanceNorm)
            )
            torch.testing.assert_close(plain(x[i : i + 1]), both[i : i + 1].detach(), rtol=0, atol=1e-12)
        assert (styled(x, z[[1, 0]]) - both).abs().mean().item() > 1e-3  # the code tells
    with pytest.raises(ValueError, match=r"codes of shape \(1, 3\) are not \[2, 3\]"):
        styled(x, z[:1])


def test_codes_are_standard_normal_and_a_function_of_their_position() -> None:
    codes = latent_draws(3, np.arange(4000), 5, 0)
    assert abs(codes.mean()) < 0.02
    assert abs(codes.std() - 1) < 0.02
    assert abs((codes**4).mean() - 3) < 0.15
    assert np.abs(np.corrcoef(codes.T) - np.eye(5)).max() < 0.06
    assert (latent_draws(3, np.array([17, 5]), 5, 0) == codes[[17, 5]]).all()
    assert (latent_draws(3, np.array([17]), 5, 1) != codes[17]).all()
    assert latent_draws(3, np.arange(2), 0, 0).shape == (2, 0)


@pytest.mark.parametrize("method", list(METHODS))
def test_resuming_is_exact(tiny: Tiny, method: str) -> None:
    overrides = (*METHODS[method], "training.accumulate=2")
    straight = train(tiny("straight", "training.steps=5", *overrides))
    train(tiny("stopped", "training.steps=2", *overrides))
    stopped = train(tiny("stopped", "training.steps=5", *overrides), resume=True)
    assert_same_state(straight, stopped, but=("best",))
    assert losses(stopped)[-1] == losses(straight)[-1]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_recorded_step_is_the_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Mode graph by a recorder that replays Python: all that a step reads is static memory, its codes too."""
    eager = train(tiny("eager", "training.steps=6", *METHODS[method]))
    recorder = TapeRecorder()
    monkeypatch.setattr(trainer, "_recorder", lambda _: recorder)
    graph = train(tiny("graph", "training.steps=6", "training.mode=graph", *METHODS[method]))
    assert recorder.replayed == 3
    assert_same_state(eager, graph)


@pytest.mark.parametrize("method", list(METHODS))
def test_runs_show_and_measure_their_samples(tiny: Tiny, method: str) -> None:
    run = train(tiny("run", "training.steps=2", "monitor.images_every=1", "monitor.samples=2", *METHODS[method]))
    grids = sorted(path.name for path in (run / "samples").iterdir())
    state = ckpt.read_checkpoint(ckpt.find_checkpoint(run))
    assert 0 < state["best"] < 2
    if method == "pix2pix":
        assert grids == ["A-to-B-step-00000002.jpg"]
        assert not {"G_B", "D_B"} & state.keys()
    else:
        assert grids == ["A-to-B-step-00000002.jpg", "B-to-A-step-00000002.jpg"]
        assert {"E_A", "E_B", "D_Z_A", "D_Z_B"} <= state.keys()


def test_pix2pix_in_the_other_direction(tiny: Tiny) -> None:
    run = train(tiny("run", "training.steps=2", "model.direction=BtoA", *PIX2PIX))
    state = ckpt.read_checkpoint(ckpt.find_checkpoint(run))
    assert {"G_B", "D_B"} <= state.keys()
    assert not {"G_A", "D_A"} & state.keys()
    assert {"G_B", "L1_B", "D_B"} <= losses(run)[-1].keys()


def test_a_checkpoint_of_pix2pix_without_its_generator_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny("run", "training.steps=1", *PIX2PIX))
    content = ckpt.read_checkpoint(ckpt.find_checkpoint(run))
    del content["G_A"], content["format"]
    ckpt.write_checkpoint(tmp_path / "less.ckpt", content)
    with pytest.raises(ckpt.CheckpointError, match="lacks G_A"):
        ckpt.read_checkpoint(tmp_path / "less.ckpt")


def test_pix2pix_learns_what_unpaired_pictures_cannot_tell(tiny: Tiny, tmp_path: Path) -> None:
    """B is A in the opposite colours: after some steps the output is nearer to the truth than the input is."""
    from PIL import Image, ImageOps

    root = tmp_path / "inverse"
    for split, seed in (("trainA", 1), ("testA", 2)):
        write_pictures(root / split, 8, seed)
        (root / split.replace("A", "B")).mkdir()
        for path in (root / split).iterdir():
            ImageOps.invert(Image.open(path)).save(root / split.replace("A", "B") / path.name)
    config = tiny(
        "run", "model.method=pix2pix", "data.pairing=aligned", "training.steps=60", "training.lr=5e-3",
        "checkpoint.every_epochs=0", "model.ngf=8", "model.init_gain=0.1", f"data.root={root}",
    )  # fmt: skip
    untouched = 1.0  # in [0, 2], of these pictures, about
    assert ckpt.read_checkpoint(ckpt.find_checkpoint(train(config)))["best"] < 0.5 * untouched


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.method=pix2pix",), r"data\.pairing = 'unpaired': model\.method=pix2pix needs data\.pairing=aligned"),
        (("data.source=side_by_side",), r"data\.source=side_by_side needs data\.pairing=aligned"),
        ((*AUGMENTED, "training.mode=compile"), r"training\.mode = 'compile' is not possible with .*augmented"),
        ((*AUGMENTED, "training.recompute=true"), r"training\.recompute = True is not possible"),
        ((*AUGMENTED, "loss.generator_gradient=own"), r"loss\.generator_gradient = 'own' is not possible"),
        ((*PIX2PIX, "loss.generator_gradient=own"), r"model\.method=pix2pix has none"),
    ],
)
def test_what_a_method_cannot_do_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, list(overrides))


def test_another_method_is_another_experiment(tiny: Tiny) -> None:
    train(tiny("run", "training.steps=1"))
    with pytest.raises(ConfigError, match=r"model\.method was 'cyclegan' and is now 'augmented'"):
        train(tiny("run", "training.steps=2", *AUGMENTED), resume=True)
