"""Options files of the de-facto implementation: taken over, noted or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from cyclegan_fast.cli import main
from cyclegan_fast.config import Config, ConfigError, load_config
from cyclegan_fast.options_file import read_options

NEWER = {
    "batch_size": "1", "beta1": "0.5", "checkpoints_dir": "./checkpoints", "continue_train": "False",
    "crop_size": "256", "dataroot": "./datasets/maps", "dataset_mode": "unaligned", "direction": "AtoB",
    "display_env": "main", "display_freq": "400", "display_id": "1", "display_ncols": "4", "display_port": "8097",
    "display_server": "http://localhost", "display_winsize": "256", "epoch": "latest", "epoch_count": "1",
    "gan_mode": "lsgan", "gpu_ids": "0", "init_gain": "0.02", "init_type": "normal", "input_nc": "3", "isTrain": "True",
    "lambda_A": "10.0", "lambda_B": "10.0", "lambda_identity": "0.5", "load_iter": "0", "load_size": "286",
    "lr": "0.0002", "lr_decay_iters": "50", "lr_policy": "linear", "max_dataset_size": "inf", "model": "cycle_gan",
    "n_epochs": "100", "n_epochs_decay": "100", "n_layers_D": "3", "name": "maps", "ndf": "64", "netD": "basic",
    "netG": "resnet_9blocks", "ngf": "64", "no_dropout": "True", "no_flip": "False", "no_html": "False",
    "norm": "instance", "num_threads": "4", "output_nc": "3", "phase": "train", "pool_size": "50",
    "preprocess": "resize_and_crop", "print_freq": "100", "save_by_iter": "False", "save_epoch_freq": "5",
    "save_latest_freq": "5000", "serial_batches": "False", "suffix": "", "update_html_freq": "1000",
    "use_wandb": "False", "verbose": "False", "wandb_project_name": "CycleGAN-and-pix2pix",
}  # fmt: skip
OLDER = {
    "align_data": "False", "batchSize": "1", "beta1": "0.5", "checkpoints_dir": "./checkpoints",
    "continue_train": "False", "dataroot": "./datasets/maps", "display_freq": "100",
    "display_id": "1", "display_port": "8097",
    "display_single_pane_ncols": "0", "display_winsize": "256", "epoch_count": "1", "fineSize": "256", "gpu_ids": "[0]",
    "identity": "0.5", "input_nc": "3", "isTrain": "True", "lambda_A": "10.0", "lambda_B": "10.0", "loadSize": "286",
    "lr": "0.0002", "lr_decay_iters": "50", "lr_policy": "lambda", "max_dataset_size": "inf", "model": "cycle_gan",
    "nThreads": "2", "n_layers_D": "3", "name": "maps", "ndf": "64", "ngf": "64", "niter": "100", "niter_decay": "100",
    "no_dropout": "True", "no_flip": "False", "no_html": "False", "no_lsgan": "False", "norm": "instance",
    "output_nc": "3", "phase": "train", "pool_size": "50", "print_freq": "100", "resize_or_crop": "resize_and_crop",
    "save_epoch_freq": "5", "save_latest_freq": "5000", "serial_batches": "False", "which_direction": "AtoB",
    "which_epoch": "latest", "which_model_netD": "basic", "which_model_netG": "resnet_9blocks",
}  # fmt: skip
USUAL = load_config(None, ["name=maps", "data.root=./datasets/maps"])


def newer(**changed: str) -> str:
    """As printed since the end of 2018: aligned, with the default behind what differs from it."""
    lines = ["----------------- Options ---------------"]
    for name, value in sorted((NEWER | changed).items()):
        comment = f"\t[default: {NEWER.get(name)}]" if name in changed or name in ("dataroot", "name") else ""
        lines.append(f"{name:>25}: {value:<30}{comment}")
    return "\n".join([*lines, "----------------- End -------------------", ""])


def older(**changed: str) -> str:
    """As printed in 2017."""
    options = sorted((OLDER | changed).items())
    return "\n".join(
        [
            "------------ Options -------------",
            *(f"{name}: {value}" for name, value in options),
            "-------------- End ----------------\n",
        ]
    )


def read(tmp_path: Path, text: str) -> tuple[Config, str]:
    file = tmp_path / "train_opt.txt"
    file.write_text(text)
    overrides, notes = read_options(file)
    return load_config(None, overrides), "\n".join(notes)


@pytest.mark.parametrize("text", [newer(), older()], ids=["newer", "older"])
def test_their_defaults_are_ours(text: str, tmp_path: Path) -> None:
    config, notes = read(tmp_path, text)
    assert config == USUAL
    assert "without effect on what is learned: checkpoints_dir, display" in notes


@pytest.mark.parametrize(
    ("changed", "expected", "note"),
    [
        ({"netG": "resnet_6blocks", "ngf": "32"}, ["model.blocks=6", "model.ngf=32"], ""),
        ({"netG": "unet_128", "no_dropout": "False"}, ["model.generator=unet_128", "model.dropout=true"], ""),
        ({"netD": "n_layers", "n_layers_D": "4"}, ["model.discriminator_layers=4"], ""),
        ({"netD": "basic", "n_layers_D": "4"}, [], ""),  # which only n_layers reads
        ({"netD": "pixel", "ndf": "32"}, ["model.discriminator=pixel", "model.ndf=32"], ""),
        ({"input_nc": "1", "output_nc": "1"}, ["model.channels_A=1", "model.channels_B=1"], ""),
        ({"gan_mode": "vanilla", "pool_size": "0"}, ["loss.gan=vanilla", "training.pool_size=0"], ""),
        ({"gan_mode": "wgangp"}, ["loss.gan=wgangp", "loss.gradient_penalty=0"], "without gradient penalty"),
        ({"lambda_A": "5", "lambda_B": "8.5", "lambda_identity": "0"},
         ["loss.cycle_A=5", "loss.cycle_B=8.5", "loss.identity=0"], ""),
        ({"n_epochs": "30", "n_epochs_decay": "0", "lr": "1e-4", "beta1": "0.9"},
         ["training.epochs=30", "training.epochs_decay=0", "training.lr=1e-4", "training.beta1=0.9"], ""),
        ({"preprocess": "scale_width_and_crop", "load_size": "1024", "crop_size": "360", "no_flip": "True"},
         ["data.preprocess=scale_width_and_crop", "data.load_size=1024", "data.crop_size=360", "data.flip=false"], ""),
        ({"preprocess": "scale_width", "load_size": "512"}, ["data.preprocess=scale_width", "data.load_size=512"], ""),
        ({"serial_batches": "True"}, ["data.pairing=ordered"], "visited in random order"),
        ({"max_dataset_size": "500"}, ["data.limit_train=500"], "not the first ones"),
        ({"norm": "batch"}, ["model.affine=true"], "running statistics"),
        ({"gpu_ids": "-1"}, ["training.device=cpu"], ""),
        ({"gpu_ids": "0,2", "batch_size": "4"}, ["training.batch=4", "training.global_batch=4"], "--nproc-per-node=2"),
        ({"name": "on", "dataroot": "./a: b #c"}, ["name='on'", "data.root='./a: b #c'"], ""),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_taken_over(changed: dict[str, str], expected: list[str], note: str, tmp_path: Path) -> None:
    config, notes = read(tmp_path, newer(**changed))
    assert config == load_config(None, ["name=maps", "data.root=./datasets/maps", *expected])
    assert note in notes


def test_pix2pix(tmp_path: Path) -> None:
    changed = {
        "model": "pix2pix", "dataset_mode": "aligned", "direction": "BtoA", "netG": "unet_256", "norm": "batch",
        "gan_mode": "vanilla", "pool_size": "0", "lambda_L1": "50.0", "no_dropout": "False", "input_nc": "1",
    }  # fmt: skip
    options = {name: value for name, value in (NEWER | changed).items() if name not in ("lambda_A", "lambda_identity")}
    config, _ = read(tmp_path, "\n".join(f"{name}: {value}" for name, value in options.items()))
    assert config == load_config(
        None,
        [
            *("name=maps", "data.root=./datasets/maps", "data.source=side_by_side", "data.pairing=aligned"),
            *("model.method=pix2pix", "model.direction=BtoA", "model.channels_B=1", "model.generator=unet_256"),
            *("model.affine=true", "model.dropout=true", "loss.gan=vanilla", "loss.l1=50", "training.pool_size=0"),
        ],
    )


def test_older_names(tmp_path: Path) -> None:
    changed = {
        "which_model_netG": "unet_256", "which_model_netD": "n_layers", "n_layers_D": "2", "no_lsgan": "True",
        "identity": "0.0", "niter": "3", "niter_decay": "4", "batchSize": "2", "resize_or_crop": "scale_width",
        "loadSize": "700", "fineSize": "512", "gpu_ids": "[0, 1]",
    }  # fmt: skip
    config, notes = read(tmp_path, older(**changed))
    assert config == load_config(
        None,
        [
            *("name=maps", "data.root=./datasets/maps", "model.generator=unet_256", "model.discriminator_layers=2"),
            *("loss.gan=vanilla", "loss.identity=0", "training.epochs=3", "training.epochs_decay=4"),
            *("training.batch=2", "training.global_batch=2", "data.preprocess=scale_width", "data.load_size=512"),
            "data.crop_size=512",
        ],
    )
    assert "begins to fall" in notes
    assert "scales to fineSize" in notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (newer(direction="BtoA"), "direction = 'BtoA' has no equal here with model cycle_gan: exchange the folders"),
        (newer(dataset_mode="aligned"), "dataset_mode = 'aligned' has no equal here with model cycle_gan"),
        (newer(model="pix2pix"), "dataset_mode = 'unaligned' has no equal here with model pix2pix"),
        (newer().replace("model: cycle_gan", "verbose2: no"), "verbose2 = 'no' is no option"),
        (newer(norm="batch", batch_size="4"), "norm = 'batch' has no equal"),
        (newer(norm="none"), "norm = 'none'"),
        (newer(norm="syncbatch"), "norm = 'syncbatch'"),
        (newer(init_type="xavier"), "init_type = 'xavier'"),
        (newer(lr_policy="cosine"), "lr_policy = 'cosine'"),
        (newer(continue_train="True"), "model.init_from=FOLDER"),
        (newer(epoch_count="12"), "epoch_count = '12'"),
        (newer(isTrain="False"), "cyclegan-fast translate"),
        (newer(model="colorization"), "model = 'colorization'"),
        (newer(phase="val"), "phase = 'val'"),
        (newer(netG="global"), "netG = 'global' is not known: resnet_9blocks"),
        (newer(netD="multiscale"), "netD = 'multiscale'"),
        (newer(gan_mode="relativistic"), "loss.gan = 'relativistic' is not allowed"),
        (newer(preprocess="zoom"), "data.preprocess = 'zoom'"),
        (newer(lambda_ssim="1.0"), "lambda_ssim = '1.0' is no option"),
        (newer(load_size="many"), "load_size = 'many' is not an integer"),
        (newer(lr="fast"), "lr = 'fast' is not a number"),
        (newer(no_flip="1"), "no_flip = '1' is neither True nor False"),
        (older(batch_size="2"), "one option, and both are given"),
        (newer() + "                ngf: 64\n", "ngf is given twice"),
        (newer() + "nonsense\n", "line 63 is not `name: value`: 'nonsense'"),
        ("", "holds no options"),
    ],
)
def test_what_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert words in str(error.value)


def test_files_that_are_no_options(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long").write_text("#" * 100_001)
    for name in ("none", "pipe", "binary", "long", "."):
        with pytest.raises(ConfigError, match="cannot read the options"):
            read_options(tmp_path / name)


def test_the_command_prints_settings_that_it_would_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train_opt.txt"
    file.write_text(newer(netG="resnet_6blocks", serial_batches="True"))
    assert main(["train", "--from-options", str(file), "--print", "training.epochs=7"]) == 0
    said = capfd.readouterr()
    settings = yaml.safe_load(said.out)
    assert (settings["model"]["blocks"], settings["training"]["epochs"], settings["name"]) == (6, 7, "maps")
    assert "train_opt.txt: serial_batches" in said.err
    (tmp_path / "a.yaml").write_text(said.out)
    assert load_config(tmp_path / "a.yaml").model.blocks == 6
    assert main(["train", "--from-options", str(file), "--config", "a.yaml"]) == 2
    assert "leave out the others" in capfd.readouterr().err
    file.write_text(newer(direction="BtoA"))
    assert main(["train", "--from-options", str(file)]) == 2
    assert "train_opt.txt: direction = 'BtoA'" in capfd.readouterr().err
