"""Training that starts from weights of others, and training of U-Nets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch

import cyclegan_fast as cf
from cyclegan_fast.config import Config
from cyclegan_fast.inference.weights import WeightsError, export_weights
from cyclegan_fast.training.checkpoint import find_checkpoint, read_checkpoint
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]
ONE_STEP = ("training.steps=1", "training.lr=1e-9", "training.ema=0.999")


def write_generators(folder: Path) -> dict[str, torch.nn.Module]:
    folder.mkdir()
    networks = {name: published.resnet(3, 3, 4, 1) for name in ("G_A", "G_B")}
    for seed, (name, network) in enumerate(networks.items()):
        torch.save(published.scramble(network, seed).state_dict(), folder / f"latest_net_{name}.pth")
    return networks


def test_a_new_run_starts_from_them_and_does_not_need_them_again(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = write_generators(tmp_path / "theirs")
    config = tiny("tuned", *ONE_STEP, f"model.init_from={tmp_path / 'theirs'}")
    with caplog.at_level(logging.INFO, "cyclegan_fast.train"):
        run = train(config)
    assert f"weights of G_A, G_B from {tmp_path / 'theirs'}; D_A, D_B start anew" in caplog.text
    content = read_checkpoint(find_checkpoint(run))
    for name, network in theirs.items():
        for key, value in network.state_dict().items():
            for part in (name, f"{name}_ema"):
                torch.testing.assert_close(content[part][key], value, rtol=0, atol=1e-6)
    (tmp_path / "theirs").rename(tmp_path / "elsewhere")
    elsewhere = tiny("tuned", *ONE_STEP, "training.steps=2", f"model.init_from={tmp_path / 'elsewhere'}")
    assert read_checkpoint(find_checkpoint(train(elsewhere, resume=True)))["position"]["step"] == 2
    # Our own runs serve as well, with their discriminators.
    again = train(tiny("again", *ONE_STEP, f"model.init_from={run}"))
    first, second = (read_checkpoint(find_checkpoint(path)) for path in (run, again))
    for key, value in second["D_A"].items():
        torch.testing.assert_close(first["D_A"][key], value, rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_are_refused_before_the_first_step(tiny: Tiny, tmp_path: Path) -> None:
    write_generators(tmp_path / "theirs")
    config = tiny("a", f"model.init_from={tmp_path / 'theirs'}", "model.blocks=2")
    with pytest.raises(WeightsError, match=r"its G_A is another network than the one configured: model\.1"):
        train(config)
    with pytest.raises(WeightsError, match=r"none\.pth cannot be read"):
        train(tiny("b", "model.init_from=none.pth"))


@pytest.mark.parametrize("affine", ["false", "true"])
def test_a_unet_is_trained_exported_and_translates(affine: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = ("model.generator=unet_32", "model.dropout=true", f"model.affine={affine}", "training.steps=3")
    run = train(tiny("unet", *settings, "data.load_size=64", "data.crop_size=64"))
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    y = cf.load(run, device="cpu", precision="fp32").translate(x)
    export_weights(run, tmp_path / "out")
    other = published.unet(3, 3, 4, 5, "batch" if affine == "true" else "instance", dropout=True)
    other.load_state_dict(torch.load(tmp_path / "out" / "latest_net_G_A.pth", weights_only=True), strict=True)
    for module in other.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    with torch.no_grad():
        torch.testing.assert_close(y, other(x), rtol=0, atol=1e-5)
