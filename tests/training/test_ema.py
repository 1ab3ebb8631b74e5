"""Averaged generators: the arithmetic by hand, whole runs to the bit, and which weights a translator takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import assert_same_state, losses
from torch import nn

from cyclegan_fast.cli import main
from cyclegan_fast.config import Config
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.translate import load
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.ema import averaged, preferred
from cyclegan_fast.training.trainer import Trainer, train

Tiny = Callable[..., Config]
CPU = torch.device("cpu")


def content(run: Path) -> dict:
    return ckpt.read_checkpoint(ckpt.find_checkpoint(run))


def test_the_average_by_hand() -> None:
    """d is 2/11, 3/12, 4/13 and then 0.3; a parameter without a gradient is averaged too."""
    G = nn.Linear(3, 2)
    G.bias.requires_grad_(False)
    modules = {"G_A": G, "D_A": nn.Linear(1, 1)}
    optimizer = torch.optim.Adam(G.parameters(), lr=0.1)
    copies = averaged(modules, optimizer, 0.3)
    assert list(copies) == ["G_A_ema"]
    expected = G.weight.detach().double().clone()
    for step in range(1, 6):
        optimizer.zero_grad()
        G(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * G.weight.detach().double()
        torch.testing.assert_close(copies["G_A_ema"].weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(copies["G_A_ema"].bias, G.bias)
    assert not any(parameter.requires_grad for parameter in copies["G_A_ema"].parameters())
    assert preferred(modules | copies) == {"G_A": copies["G_A_ema"], "D_A": modules["D_A"]}


@pytest.mark.parametrize("more", [(), ("training.accumulate=2", "model.spectral_norm=true", "model.upsample=resize")])
def test_resuming_is_exact_and_training_is_not_changed(tiny: Tiny, more: tuple[str, ...]) -> None:
    ema = ("training.ema=0.9", *more)
    straight = train(tiny("straight", "training.steps=6", *ema))
    stopped = train(tiny("stopped", "training.steps=2", *ema))
    train(tiny("stopped", "training.steps=6", *ema), resume=True)
    assert_same_state(straight, stopped, but=("best",))
    plain = train(tiny("plain", "training.steps=6", *more))
    assert losses(plain) == losses(straight)
    saved, without = content(straight), content(plain)
    assert saved.keys() - without.keys() == {"G_A_ema", "G_B_ema"}
    for name in ("G_A", "D_A"):
        assert all(torch.equal(value, saved[name][key]) for key, value in without[name].items())
    assert not torch.equal(saved["G_A_ema"]["model.1.weight"], saved["G_A"]["model.1.weight"])
    assert saved["G_A_ema"].keys() == saved["G_A"].keys()


def test_a_run_may_begin_and_end_to_average_when_it_resumes(tiny: Tiny) -> None:
    """From the weights that it has then; a checkpoint of an earlier version has no averages either."""
    train(tiny("run", "training.steps=2"))
    trainer = Trainer(tiny("run", "training.steps=3", "training.ema=0.9"), CPU, resume=True)
    for name in ("G_A", "G_B"):
        pairs = zip(trainer.modules[name].parameters(), trainer.modules[f"{name}_ema"].parameters(), strict=True)
        assert all(torch.equal(weight, average) for weight, average in pairs)
    run = train(tiny("run", "training.steps=3", "training.ema=0.9"), resume=True)
    assert "G_A_ema" in content(run)
    run = train(tiny("run", "training.steps=4"), resume=True)
    assert "G_A_ema" not in content(run)


def test_the_samples_are_made_by_the_averages(tiny: Tiny) -> None:
    trainer = Trainer(tiny("run", "training.ema=0.9"), CPU)
    assert trainer.samples.modules["G_A"] is trainer.modules["G_A_ema"]
    assert trainer.samples.modules["D_A"] is trainer.modules["D_A"]


def test_processes_compare_their_averages(tiny: Tiny) -> None:
    trainer = Trainer(tiny("run", "training.ema=0.9", "model.spectral_norm=true"), CPU)
    parts = trainer.run_state.replicated()
    assert {"G_A_ema", "G_B_ema"} <= parts.keys()
    assert len(parts["D_A"]) > len(list(trainer.modules["D_A"].parameters())), "no vectors of the spectral norms"


def test_which_weights_a_translator_takes(tiny: Tiny, dataset: Path, tmp_path: Path) -> None:
    run = train(tiny("run", "training.steps=3", "training.ema=0.9"))
    saved = content(run)
    for weights, name in (("auto", "G_A_ema"), ("ema", "G_A_ema"), ("raw", "G_A")):
        G_A = load(run, device="cpu", weights=weights).G_A
        assert all(torch.equal(value, saved[name][key]) for key, value in G_A.state_dict().items()), weights
    translated = []
    for weights in ("ema", "raw"):
        options = ["-o", str(tmp_path / weights), "--device", "cpu", "--weights", weights]
        assert main(["translate", str(run), str(dataset / "testA" / "000.png"), *options]) == 0
        translated.append((tmp_path / weights / "000.png").read_bytes())
    assert translated[0] != translated[1]
    with pytest.raises(InputError, match="weights 'mean' is not one of auto, ema, raw"):
        load(run, device="cpu", weights="mean")


def test_a_checkpoint_without_averages(tiny: Tiny) -> None:
    run = train(tiny("run", "training.steps=1"))
    saved = content(run)
    assert torch.equal(load(run, device="cpu").G_A.state_dict()["model.1.weight"], saved["G_A"]["model.1.weight"])
    with pytest.raises(ckpt.CheckpointError, match=r"holds no averaged weights.*--weights raw"):
        load(run, device="cpu", weights="ema")
