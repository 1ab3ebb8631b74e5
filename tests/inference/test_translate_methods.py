"""Translating with what the other methods of training leave: one direction alone, or many translations of a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cyclegan_fast as cf
from cyclegan_fast.cli import main
from cyclegan_fast.config import load_config, to_dict
from cyclegan_fast.errors import InputError
from cyclegan_fast.models import build_augmented, build_pix2pix
from cyclegan_fast.models.augmented import StyledGenerator
from cyclegan_fast.training.checkpoint import CheckpointError, write_checkpoint

SMALL = ("model.ngf=4", "model.ndf=4", "model.blocks=1", "model.latent=3", "model.init_gain=0.2", "loss.identity=0")


def checkpoint(path: Path, *overrides: str) -> Path:
    """A checkpoint of a method, with untrained networks."""
    config = load_config(None, [*SMALL, "data.pairing=aligned", *overrides])
    torch.manual_seed(0)
    build = build_augmented if config.model.method == "augmented" else build_pix2pix
    weights = {name: network.state_dict() for name, network in build(config.model).items()}
    write_checkpoint(path, {"config": to_dict(config), **weights, "position": {"step": 1}})
    return path


def picture(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (18, 22, channels), dtype=np.uint8)


@pytest.mark.parametrize(("direction", "other"), [("AtoB", "BtoA"), ("BtoA", "AtoB")])
def test_pix2pix_translates_its_direction_and_says_so_of_the_other(tmp_path: Path, direction: str, other: str) -> None:
    file = checkpoint(tmp_path / "a.ckpt", "model.method=pix2pix", f"model.direction={direction}", "model.channels_A=1")
    model = cf.load(file, device="cpu", precision="fp32")
    source, target = (1, 3) if direction == "AtoB" else (3, 1)
    assert model.channels(direction) == (source, target)
    assert model.translate(picture(source), direction).shape == (18, 22, target)
    with pytest.raises(InputError, match=f"translates in the direction {direction} only"):
        model.translate(picture(target), other)
    with pytest.raises(InputError, match="seed = 1: these generators take no latent code"):
        model.translate(picture(source), direction, seed=1)


def test_a_seed_chooses_among_many_translations(tmp_path: Path) -> None:
    """Each is that of the generator with the seed's code; a seed's is always the same, and others are others."""
    file = checkpoint(tmp_path / "a.ckpt", "model.method=augmented")
    model = cf.load(file, device="cpu", precision="fp32")
    image = picture()
    translations = [model.translate(image, seed=seed) for seed in range(4)]
    assert np.array_equal(model.translate(image), translations[0])
    assert np.array_equal(model.styled(2).translate(image), translations[2])
    assert np.array_equal(model.styled(3).translate(image, seed=2), translations[2])
    spread = np.stack(translations).astype(float)
    for i in range(4):
        for j in range(i):
            assert np.abs(spread[i] - spread[j]).mean() > 1
    assert not np.array_equal(model.translate(image, "BtoA", seed=1), model.translate(image, "BtoA", seed=2))
    with pytest.raises(InputError, match="seed = -1 is not allowed: an integer >= 0"):
        model.translate(image, seed=-1)
    with pytest.raises(InputError, match="translate one way"):
        model.cycle(image)


def test_a_translation_is_that_of_the_generator_with_its_code(tmp_path: Path) -> None:
    model = cf.load(checkpoint(tmp_path / "a.ckpt", "model.method=augmented"), device="cpu", precision="fp32")
    assert model._with_codes is not None
    G_A = model._with_codes[0]
    assert isinstance(G_A, StyledGenerator)
    x = torch.rand(1, 3, 18, 22) * 2 - 1
    from cyclegan_fast.training.latents import latent_draws

    z = torch.from_numpy(latent_draws(5, np.zeros(1, np.int64), 3, 1)).float()
    with torch.no_grad():
        torch.testing.assert_close(model.translate(x, seed=5), G_A(x, z), rtol=0, atol=1e-5)


def test_the_command_takes_a_seed(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "a.ckpt", "model.method=augmented")
    Image.fromarray(picture()).save(tmp_path / "in.png")
    for seed in (0, 1):
        arguments = ["translate", str(file), str(tmp_path / "in.png"), "-o", str(tmp_path / f"{seed}")]
        assert main([*arguments, "--seed", str(seed), "--device", "cpu", "--precision", "fp32"]) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{seed}" / "in.png")) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_weights_of_another_code_size_are_refused(tmp_path: Path) -> None:
    config = load_config(None, [*SMALL, "model.method=augmented", "model.latent=4"])
    weights = {name: net.state_dict() for name, net in build_augmented(load_config(None, [*SMALL]).model).items()}
    write_checkpoint(tmp_path / "a.ckpt", {"config": to_dict(config), **weights, "position": {"step": 1}})
    with pytest.raises(CheckpointError, match="weights of G_A do not fit"):
        cf.load(tmp_path / "a.ckpt", device="cpu")
