"""Weights of the de-facto implementation, in and out, against its networks as `published` has them."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from PIL import Image
from published import patch, pixel, resnet, unet
from tiny_models import make_generators, picture, save_run
from torch import Tensor, nn

import cyclegan_fast as cf
from cyclegan_fast.cli import main
from cyclegan_fast.config import from_dict, load_config, to_dict
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.weights import (
    NETWORKS,
    WeightsError,
    describe,
    export_weights,
    import_weights,
    initialise,
    is_weights,
    read_weights,
    report,
)
from cyclegan_fast.models import build_discriminators, build_generators
from cyclegan_fast.training.checkpoint import read_checkpoint, step_path, write_checkpoint

State = dict[str, Tensor]


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    """With random weights, and as the de-facto test script runs it: batch norm by the picture, but no dropout."""
    published.scramble(network, seed).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return network


def save(path: Path, network: nn.Module | State) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict() if isinstance(network, nn.Module) else network, path)
    return path


def make_folder(folder: Path, label: str = "latest", seed: int = 0) -> dict[str, nn.Module]:
    """A folder as a de-facto training leaves it; its networks by name."""
    networks = {
        "G_A": scrambled(resnet(3, 1, 4, 2), seed),
        "G_B": scrambled(resnet(1, 3, 4, 2), seed + 1),
        "D_A": scrambled(patch(1, 4), seed + 2),
        "D_B": scrambled(patch(3, 4), seed + 3),
    }
    for name, network in networks.items():
        save(folder / f"{label}_net_{name}.pth", network)
    return networks


def noise(channels: int, height: int = 64, width: int = 128) -> Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


def assert_translates_like(path: Path, network: nn.Module, channels: int, direction: str = "AtoB") -> None:
    x = noise(channels)
    with torch.no_grad():
        expected = network(x)
    assert float(expected.std()) > 0.05  # else anything would do
    result = cf.load(path, device="cpu", precision="fp32").translate(x, direction)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


# --- reading ----------------------------------------------------------------------------------------------------------

GENERATORS = {
    "6 blocks": (lambda norm: resnet(3, 3, 4, 6, norm), "ResNet generator, 6 blocks, ngf 4, 3 -> 3 channels"),
    "9 blocks, gray": (lambda norm: resnet(1, 3, 3, 9, norm), "ResNet generator, 9 blocks, ngf 3, 1 -> 3 channels"),
    "dropout": (lambda norm: resnet(3, 2, 4, 2, norm, dropout=True), "ngf 4, 3 -> 2 channels"),
    "unet 32": (lambda norm: unet(3, 1, 4, 5, norm), "U-Net 32 generator, ngf 4, 3 -> 1 channels"),
    "unet 64": (lambda norm: unet(3, 3, 2, 6, norm, dropout=True), "U-Net 64 generator, ngf 2, 3 -> 3 channels"),
}


@pytest.mark.parametrize("norm", list(published.NORMS))
@pytest.mark.parametrize("kind", list(GENERATORS))
def test_generators_of_all_kinds_translate_alike(kind: str, norm: str, tmp_path: Path) -> None:
    make, words = GENERATORS[kind]
    network = scrambled(make(norm))
    if kind.startswith("unet") and norm == "instance 2017":  # two of its biases come before no norm
        for level in ("model.model.0", "model.model.1" + ".model.3" * (3 + int(kind[5:] == "64")) + ".model.1"):
            nn.init.zeros_(network.get_parameter(f"{level}.bias"))
    path = save(tmp_path / "latest_net_G.pth", network)
    assert_translates_like(path, network, 1 if "gray" in kind else 3)
    said = report(path)
    assert words in said
    assert ("affine norms" in said) == (norm in ("instance 2017", "batch"))
    assert ("running statistics of norms dropped" in said) == (norm in ("instance 2018", "batch"))
    assert ("dropout" in said) == (kind == "dropout")


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("_orig_mod.module."),
        lambda state: {"state_dict": state, "epoch": 200},
        lambda state: OrderedDict((key, nn.Parameter(value)) for key, value in state.items()),
        lambda state: {key: state[key] for key in reversed(state)},
        lambda state: {key: value.double() for key, value in state.items()},
    ],
    ids=["module", "compiled", "both", "in a state_dict", "parameters", "another order", "float64"],
)
def test_variants_of_a_state_dict(change: Callable[[State], State], tmp_path: Path) -> None:
    network = scrambled(resnet(3, 3, 4, 2))
    path = save(tmp_path / "a.pth", change(dict(network.state_dict())))
    assert_translates_like(path, network, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", " of PyTorch 1.5.pt"])
def test_formats_of_a_file(suffix: str, tmp_path: Path) -> None:
    network = scrambled(resnet(3, 3, 4, 2))
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization="1.5" not in suffix)
    assert_translates_like(path, network, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda norm: patch(3, 4, 3, norm), "PatchGAN discriminator, 3 layers, ndf 4, 3 channels"),
        (lambda norm: patch(6, 5, 1, norm), "PatchGAN discriminator, 1 layers, ndf 5, 6 channels"),
        (lambda norm: patch(1, 2, 5, norm), "PatchGAN discriminator, 5 layers, ndf 2, 1 channels"),
        (lambda norm: pixel(3, 4, norm), "pixel discriminator, ndf 4, 3 channels"),
    ],
)
@pytest.mark.parametrize("norm", list(published.NORMS))
def test_discriminators_judge_alike(make: Callable[[str], nn.Module], words: str, norm: str, tmp_path: Path) -> None:
    network = scrambled(make(norm))
    read = read_weights(save(tmp_path / "latest_net_D_A.pth", network))
    assert words in describe(read)
    ours = read.networks["D_A"].architecture.network()
    ours.load_state_dict(read.networks["D_A"].weights, assign=True)
    x = noise(read.networks["D_A"].architecture.in_channels, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), network(x), rtol=0, atol=1e-4)  # logits of ten and more
    with pytest.raises(WeightsError, match="has no generator"):
        cf.load(tmp_path / "latest_net_D_A.pth", device="cpu")


def test_the_full_size_networks_are_recognised(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {key: value.half() for key, value in resnet(3, 3, 64, 9).state_dict().items()})
    assert "11,378,179 parameters in 48 tensors" in report(path)
    assert "settings: the defaults" in report(path)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_has_both_directions_and_epochs(tmp_path: Path) -> None:
    latest, fifth = make_folder(tmp_path), make_folder(tmp_path, "5", seed=10)
    iteration = make_folder(tmp_path, "iter_2000", seed=20)
    (tmp_path / "train_opt.txt").write_text("----")
    assert_translates_like(tmp_path, latest["G_A"], 3)
    assert_translates_like(tmp_path, latest["G_B"], 1, "BtoA")
    for which, networks in (("5", fifth), ("epoch-5", fifth), ("iter_2000", iteration)):
        result = cf.load(tmp_path, which=which, device="cpu", precision="fp32").translate(noise(3))
        with torch.no_grad():
            torch.testing.assert_close(result, networks["G_A"](noise(3)), rtol=0, atol=1e-5)
    with pytest.raises(WeightsError, match=r"no weights of epoch '6'; there is 5, iter_2000, latest"):
        cf.load(tmp_path, which="6")


@pytest.mark.parametrize(
    ("name", "direction"), [("latest_net_G", "AtoB"), ("latest_net_G_A", "AtoB"), ("latest_net_G_B", "BtoA")]
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_one_direction_alone(name: str, direction: str, as_folder: bool, tmp_path: Path) -> None:
    network = scrambled(resnet(3, 3, 4, 2))
    file = save(tmp_path / "few" / f"{name}.pth", network)
    source = file.parent if as_folder else file
    assert_translates_like(source, network, 3, direction)
    other = "BtoA" if direction == "AtoB" else "AtoB"
    with pytest.raises(InputError, match=f"it translates in the direction {direction} only"):
        cf.load(source, device="cpu").translate(noise(3), other)
    with pytest.raises(InputError, match="only"):
        cf.load(source, device="cpu").cycle(noise(3), direction)
    run, _ = import_weights(source, tmp_path / "run")
    assert_translates_like(run, network, 3, direction)
    assert_translates_like(tmp_path / "run", network, 3, direction)
    with pytest.raises(InputError, match="only"):
        cf.load(run, device="cpu").translate(noise(3), other)


def test_what_counts_as_weights(tmp_path: Path) -> None:
    assert not is_weights(save_run(tmp_path / "run"))
    make_folder(tmp_path / "run")  # a run in the folder of its weights
    assert not is_weights(tmp_path / "run")
    make_folder(tmp_path / "checkpoints")
    assert is_weights(tmp_path / "checkpoints")
    assert is_weights("nowhere/latest_net_G.pth")
    assert not is_weights("nowhere")


# --- import, export, and back -----------------------------------------------------------------------------------------


def test_export_loads_strictly_and_translates_alike(tmp_path: Path) -> None:
    """The published networks take the files of a run of ours, and compute the same."""
    settings = ["model.ngf=4", "model.ndf=4", "model.blocks=9", "model.channels_B=1", "loss.identity=0",
                "model.init_gain=0.1"]  # fmt: skip
    torch.manual_seed(0)
    config = load_config(None, settings)
    names = ("G_A", "G_B", "D_A", "D_B")
    networks = dict(zip(names, (*build_generators(config.model), *build_discriminators(config.model)), strict=True))
    others = {"G_A": resnet(3, 1, 4, 9), "G_B": resnet(1, 3, 4, 9), "D_A": patch(1, 4), "D_B": patch(3, 4)}
    last = {name: network.to(memory_format=torch.channels_last) for name, network in networks.items()}
    content = {"config": to_dict(config), **{name: network.state_dict() for name, network in last.items()}}
    write_checkpoint(step_path(tmp_path / "run", 3), {**content, "position": {"step": 3}})
    files = export_weights(tmp_path / "run", tmp_path / "out", label="30")
    assert [file.name for file in files] == [f"30_net_{name}.pth" for name in names]
    for name, file in zip(names, files, strict=True):
        state, other = torch.load(file, weights_only=True), others[name]
        assert list(state) == list(other.state_dict())
        assert type(state) is OrderedDict
        assert len(state) == (48 if name.startswith("G") else 10)
        for key, value in state.items():
            assert value.dtype == torch.float32
            assert value.device.type == "cpu"
            assert value.is_contiguous()
            assert torch.equal(value, networks[name].state_dict()[key])
            assert value.untyped_storage().nbytes() == 4 * value.numel()
        other.load_state_dict(state, strict=True)
        x = noise(next(iter(state.values())).shape[1])
        with torch.no_grad():
            torch.testing.assert_close(other(x), networks[name](x), rtol=0, atol=1e-5)
    assert not bool(torch.load(files[0], weights_only=True)["model.1.bias"].any())


ROUND_TRIPS = {
    "resnet": lambda norm: (resnet(3, 3, 4, 2, norm), resnet(3, 3, 4, 2, norm), patch(3, 4, 3, norm)),
    "unet, pixel": lambda norm: (unet(3, 3, 2, 6, norm), unet(3, 3, 2, 6, norm), pixel(3, 4, norm)),
    "dropout": lambda norm: (resnet(3, 3, 4, 2, norm, True), resnet(3, 3, 4, 2, norm, True), patch(3, 4, 2, norm)),
}


@pytest.mark.parametrize("kind", list(ROUND_TRIPS))
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_there_and_back_to_the_bit(kind: str, norm: str, tmp_path: Path) -> None:
    """Import, export as safetensors, export those as .pth: the files that one began with, running statistics apart."""
    pytest.importorskip("safetensors")
    G_A, G_B, D_A = ROUND_TRIPS[kind](norm)
    for seed, (name, network) in enumerate({"G_A": G_A, "G_B": G_B, "D_A": D_A, "D_B": D_A}.items()):
        save(tmp_path / "theirs" / f"latest_net_{name}.pth", published.scramble(network, seed))
    import_weights(tmp_path / "theirs", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "safe", file_format="safetensors")
    files = export_weights(tmp_path / "safe", tmp_path / "back")
    assert len(files) == 4
    for file in files:
        before = torch.load(tmp_path / "theirs" / file.name, weights_only=True)
        after = torch.load(file, weights_only=True)
        assert list(after) == list(before)
        for key, value in before.items():
            assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape)
            if "running" not in key and "tracked" not in key:
                assert torch.equal(after[key], value), key
    G_A.load_state_dict(torch.load(tmp_path / "back" / "latest_net_G_A.pth", weights_only=True), strict=True)


def test_an_imported_run_says_what_it_is(tmp_path: Path) -> None:
    make_folder(tmp_path / "theirs")
    file, weights = import_weights(tmp_path / "theirs", tmp_path / "run")
    assert file == step_path(tmp_path / "run", 0)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.name, config.run_dir) == ("run", tmp_path / "run")
    assert config.model == weights.model == from_dict(read_checkpoint(file)["config"]).model
    assert (config.model.channels_A, config.model.channels_B, config.model.blocks) == (3, 1, 2)
    one, _ = import_weights(tmp_path / "theirs", tmp_path / "one.ckpt")
    assert one == tmp_path / "one.ckpt"
    assert "D_B: " in report(one)
    for taken in ("run", "one.ckpt"):
        with pytest.raises(WeightsError, match="is there already"):
            import_weights(tmp_path / "theirs", tmp_path / taken)


def test_one_direction_for_their_test_script(tmp_path: Path) -> None:
    networks = make_folder(tmp_path / "theirs")
    (file,) = export_weights(tmp_path / "theirs", tmp_path / "out", direction="BtoA")
    assert file.name == "latest_net_G.pth"
    networks["G_B"].load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_translates_like(file, networks["G_B"], 1)
    with pytest.raises(WeightsError, match="--overwrite"):
        export_weights(tmp_path / "theirs", tmp_path / "out", direction="BtoA")
    assert export_weights(tmp_path / "theirs", tmp_path / "out", direction="AtoB", overwrite=True) == [file]
    with pytest.raises(WeightsError, match="has no G_B, which translates BtoA"):
        export_weights(file, tmp_path / "other", direction="BtoA")


def test_pix2pix_keeps_its_names(tmp_path: Path) -> None:
    """Its discriminator sees both pictures, and its files have no side."""
    folder = tmp_path / "theirs"
    save(folder / "latest_net_G.pth", scrambled(unet(3, 1, 2, 5, "batch")))
    save(folder / "latest_net_D.pth", scrambled(patch(4, 4, 3, "batch")))
    file, _ = import_weights(folder, tmp_path / "run")
    model = load_config(tmp_path / "run" / "config.yaml").model
    assert (model.method, model.direction, model.generator, model.affine) == ("pix2pix", "AtoB", "unet_32", True)
    names = [path.name for path in export_weights(file, tmp_path / "back")]
    assert names == ["latest_net_G.pth", "latest_net_D.pth"]


# --- what is refused --------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_(key: str, value: Tensor | object) -> Callable[[State], State]:
    return lambda state: {**state, key: value}


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (lambda: resnet(3, 3, 4, 2), without("model.11.conv_block.5.bias"), "model.11.conv_block.5.bias of a ResNet"),
        (lambda: resnet(3, 3, 4, 2), without("model.19.weight"), "model.19.weight is missing"),
        (lambda: resnet(3, 3, 4, 2), with_("model.4.weight", torch.zeros(8, 4, 4, 4)),
         "model.4.weight has shape [8, 4, 4, 4], but [8, 4, 3, 3] in a ResNet generator, 2 blocks"),
        (lambda: resnet(3, 3, 4, 2), with_("model.6.filt", torch.zeros(8, 1, 3, 3)),
         "model.6.filt is no part of a ResNet generator, 2 blocks, ngf 4, 3 -> 3 channels"),
        (lambda: resnet(3, 3, 4, 2), with_("model.13.conv_block.1.weight", torch.zeros(1)), "10 to model.13"),
        (lambda: resnet(3, 3, 4, 2), with_("model.99.running_mean", torch.zeros(1)), "model.99.running_mean is no"),
        (lambda: resnet(3, 3, 4, 2), with_("model.1.weight", torch.zeros(4, 3, 7, 7, dtype=torch.int64)),
         "model.1.weight has dtype torch.int64"),
        (lambda: resnet(3, 3, 4, 2), with_("model.1.weight", torch.zeros(4)), "model.1.weight has shape [4]"),
        (lambda: resnet(3, 3, 4, 2), with_("epoch", 3), "epoch has type int"),
        (lambda: resnet(3, 3, 4, 2),
         lambda state: {k: v for k, v in state.items() if v.dim() > 1 or k == "model.19.bias"}, "--norm none"),
        (lambda: resnet(3, 3, 4, 0), lambda state: state, "are those of no ResNet generator"),
        (lambda: unet(3, 3, 2, 5), without("model.model.1.model.3.model.5.bias"), "model.3.model.5.bias of a U-Net 32"),
        (lambda: unet(3, 3, 2, 5), with_("model.model.1.model.6.weight", torch.zeros(2)), "model.6.weight is no part"),
        (lambda: unet(3, 3, 1, 11), lambda state: state, "5 to 10 times"),
        (lambda: unet(3, 3, 2, 5, "instance 2017"), lambda state: state, "model.model.0.bias is no part of a U-Net"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), lambda state: state, "0.weight, 0.bias, ...) are those of no ResNet"),
        (lambda: patch(3, 4), without("model.5.bias"), "model.5.bias of a PatchGAN"),
        (lambda: patch(3, 4), lambda state: {k: state[k] for k in list(state)[:4]}, "has 2 convolutions"),
    ],
)  # fmt: skip
def test_the_key_that_does_not_fit_is_named(
    make: Callable[[], nn.Module], change: Callable[[State], State], words: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "latest_net_G.pth", change(dict(published.scramble(make()).state_dict())))
    with pytest.raises(WeightsError) as error:
        cf.load(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        ({"G_A": resnet(3, 3, 4, 2), "G_B": resnet(3, 3, 4, 1)}, "G_B is a ResNet generator, 1 blocks, ngf 4"),
        ({"G_A": resnet(3, 1, 4, 1), "G_B": resnet(3, 1, 4, 1)}, "must be a ResNet generator, 1 blocks, ngf 4, 1 -> 3"),
        ({"G_A": resnet(3, 3, 4, 1), "G_B": patch(3, 4)}, "holds a PatchGAN discriminator"),
        ({"G_A": resnet(3, 3, 4, 1), "D_A": patch(3, 4, norm="batch")}, "one model has one norm"),
        ({"G_A": resnet(3, 3, 4, 1), "D_A": patch(2, 4)}, "sees 3 channels, or 6 in pix2pix"),
        ({"D_A": patch(3, 4), "D_B": patch(3, 4, 2)}, "D_B is a PatchGAN discriminator, 2 layers"),
        ({"D_A": patch(3, 4), "D_B": patch(3, 4)}, "has no generator"),
        ({"G_A": resnet(6, 3, 4, 1)}, "model.channels_A = 6"),
    ],
)
def test_networks_that_do_not_belong_together(networks: dict[str, nn.Module], words: str, tmp_path: Path) -> None:
    for name, network in networks.items():
        save(tmp_path / "theirs" / f"latest_net_{name}.pth", network)
    with pytest.raises(WeightsError) as error:
        import_weights(tmp_path / "theirs", tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_more_channels_than_a_picture_work_on_tensors(tmp_path: Path) -> None:
    network = scrambled(resnet(6, 5, 4, 1))
    assert_translates_like(save(tmp_path / "a.pth", network), network, 6)


@pytest.mark.parametrize("setting", ["model.preset=keras", "model.upsample=resize", "model.spectral_norm=true"])
def test_networks_that_they_do_not_have_are_not_exported(setting: str, tmp_path: Path) -> None:
    config = load_config(None, ["model.ngf=2", "model.ndf=2", "model.blocks=1", setting])
    networks = zip(NETWORKS, (*build_generators(config.model), *build_discriminators(config.model)), strict=True)
    states = {name: network.state_dict() for name, network in networks}
    write_checkpoint(tmp_path / "a.ckpt", {"config": to_dict(config), **states, "position": {"step": 0}})
    with pytest.raises(WeightsError, match=r"a\.ckpt.* (does not have|has no such [GD]_A)"):
        export_weights(tmp_path / "a.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if "spectral" in setting:  # which is about discriminators
        assert len(export_weights(tmp_path / "a.ckpt", tmp_path / "out", direction="AtoB")) == 1


def test_averages_are_exported_or_not(tmp_path: Path) -> None:
    config, G_A, G_B = make_generators(seed=0)
    _, other, _ = make_generators(seed=1)
    states = {"G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "G_A_ema": other.state_dict()}
    write_checkpoint(tmp_path / "a.ckpt", {"config": config, **states, "position": {"step": 0}})
    for weights, right in (("auto", other), ("ema", other), ("raw", G_A)):
        (file,) = export_weights(tmp_path / "a.ckpt", tmp_path / weights, weights=weights, direction="AtoB")
        assert torch.equal(torch.load(file, weights_only=True)["model.1.weight"], right.state_dict()["model.1.weight"])


def test_other_mistakes(tmp_path: Path) -> None:
    make_folder(tmp_path / "theirs")
    for label in ("best", "../x", "iter_", "1_net_G"):
        with pytest.raises(WeightsError, match="is not one of latest, N, iter_N"):
            export_weights(tmp_path / "theirs", tmp_path / "out", label=label)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot write to .*file"):
        export_weights(tmp_path / "theirs", tmp_path / "file")
    for name, content in {"a.pth": b"", "b.pth": b"no weights", "c.safetensors": b"\x05"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"is neither a torch\.save file nor safetensors"):
            cf.load(tmp_path / name)
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        tar.add(tmp_path / "a.pth", "storages")
    with pytest.raises(WeightsError, match=r"old\.pth is a tar file"):
        cf.load(tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"none\.pth cannot be read: No such file"):
        cf.load(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        cf.load(save(tmp_path / "list.pth", [torch.zeros(1)]))  # type: ignore[arg-type]


# --- training from weights --------------------------------------------------------------------------------------------


def test_networks_start_from_weights_of_either_kind(tmp_path: Path) -> None:
    theirs = make_folder(tmp_path / "theirs")
    import_weights(tmp_path / "theirs", tmp_path / "run")
    model = load_config(tmp_path / "run" / "config.yaml").model
    for source in ("theirs", "run", "theirs/latest_net_G_A.pth"):
        names = ("G_A", "G_B", "D_A", "D_B")
        modules = dict(zip(names, (*build_generators(model), *build_discriminators(model)), strict=True))
        taken = initialise(modules, str(tmp_path / source))
        assert taken == ["G_A"] if source.endswith("pth") else list(names)
        for name in taken:
            for key, value in theirs[name].state_dict().items():
                assert torch.equal(modules[name].state_dict()[key], value)
    _, G_A, G_B = make_generators()
    with pytest.raises(
        WeightsError, match=r"its G_A is another network .*: model\.\d+\.\S+ is \S+.* there and .* here"
    ):
        initialise({"G_A": G_A, "G_B": G_B}, str(tmp_path / "theirs"))
    with pytest.raises(WeightsError, match="no generator in it"):
        initialise({"G_A": G_A}, str(tmp_path / "theirs" / "latest_net_D_A.pth"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = scrambled(resnet(3, 3, 4, 2))
    for name in ("G_A", "G_B"):
        save(tmp_path / "theirs" / f"7_net_{name}.pth", network)
    assert main(["weights", "show", "theirs", "--which", "7"]) == 0
    said = capfd.readouterr().out
    assert "G_A: ResNet generator, 2 blocks, ngf 4, 3 -> 3 channels; " in said
    assert "settings: model.blocks=2 model.ngf=4" in said
    assert main(["weights", "import", "theirs", "-o", "run", "--which", "7"]) == 0
    assert "run/checkpoints/step-00000000.ckpt" in capfd.readouterr().out
    assert main(["weights", "export", "run", "-o", "back", "--label", "iter_5"]) == 0
    assert "back/iter_5_net_G_B.pth" in capfd.readouterr().out
    photo = picture(tmp_path / "a.png", 30, 21)
    plain = ["--device", "cpu", "--precision", "fp32"]
    for index, source in enumerate((["run"], ["theirs", "--which", "7"], ["theirs/7_net_G_A.pth"], ["back", "--which",
                                                                                               "iter_5"])):  # fmt: skip
        assert main(["translate", source[0], str(photo), "-o", f"out{index}", *source[1:], *plain]) == 0
    first, *rest = (np.asarray(Image.open(tmp_path / f"out{index}" / "a.png")) for index in range(4))
    assert first.shape == (21, 30, 3)
    for other in rest:
        np.testing.assert_array_equal(first, other)
    save(tmp_path / "one" / "latest_net_G.pth", network)
    capfd.readouterr()
    assert main(["translate", "one", str(photo), "-o", "out", "--direction", "BtoA"]) == 2
    assert "one has no G_B: it translates in the direction AtoB only" in capfd.readouterr().err
    assert main(["weights", "show", "nowhere.pth"]) == 2
    assert "nowhere.pth cannot be read" in capfd.readouterr().err
