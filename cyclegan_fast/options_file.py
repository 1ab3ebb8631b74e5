"""The options file of the de-facto implementation, ``train_opt.txt``, as settings of ours; docs/migrate.md explains it.

It is the list that its training prints, ``name: value`` a line, with ``[default: ...]`` behind changed values since
2018; before, half of the options had other names. What has an equal here is taken over; what has none and no effect on
what is learned is named; what has none and would change what is learned is refused.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

from cyclegan_fast.config import ConfigError

__all__ = ["read_options"]

_FILE_BYTES = 100_000  # theirs have 3 kB

# Names until 2018 or 2020, and today's.
_RENAMED = {
    "batchSize": "batch_size",
    "fineSize": "crop_size",
    "identity": "lambda_identity",
    "loadSize": "load_size",
    "nThreads": "num_threads",
    "niter": "n_epochs",
    "niter_decay": "n_epochs_decay",
    "resize_or_crop": "preprocess",
    "which_direction": "direction",
    "which_epoch": "epoch",
    "which_model_netD": "netD",
    "which_model_netG": "netG",
}

# The same thing under another name.
_TEXTS = {"dataroot": "data.root", "name": "name"}
_INTEGERS = {
    "batch_size": "training.batch",
    "crop_size": "data.crop_size",
    "load_size": "data.load_size",
    "n_epochs": "training.epochs",
    "n_epochs_decay": "training.epochs_decay",
    "ndf": "model.ndf",
    "ngf": "model.ngf",
    "pool_size": "training.pool_size",
}
_NUMBERS = {
    "beta1": "training.beta1",
    "init_gain": "model.init_gain",
    "lambda_A": "loss.cycle_A",
    "lambda_B": "loss.cycle_B",
    "lambda_L1": "loss.l1",
    "lambda_identity": "loss.identity",
    "lr": "training.lr",
}

# Only one value has an equal; any other would train something else.
_REQUIRED = {
    "align_data": ("False", "the folders are trainA and trainB, or of pix2pix one of pictures side by side"),
    "continue_train": (
        "False",
        "its files hold neither optimisers nor image pools: begin a run with model.init_from=FOLDER instead, from the "
        "folder of its *_net_*.pth files",
    ),
    "epoch_count": ("1", "a run begins with its first epoch; model.init_from takes over weights"),
    "init_type": ("normal", "weights are initialised from a normal distribution"),
    "isTrain": ("True", "this is the options file of a test: `cyclegan-fast translate` does that"),
    "phase": ("train", "the folders are called trainA and trainB"),
}

# What is learned does not depend on these.
_NEUTRAL = frozenset(
    (
        *("checkpoints_dir", "suffix", "verbose", "num_threads", "epoch", "load_iter", "lr_decay_iters", "eval"),
        *("save_by_iter", "save_epoch_freq", "save_latest_freq", "print_freq", "use_wandb", "wandb_project_name"),
        *("update_html_freq", "no_html", "display_env", "display_freq", "display_id", "display_ncols", "display_port"),
        *("display_server", "display_single_pane_ncols", "display_winsize"),
    )
)


def read_options(path: str | Path) -> tuple[list[str], list[str]]:
    """``section.field=value`` overrides for what an options file says, and notes about what they leave out.

    Raises ConfigError naming the file, the line or the option, its value, and what to do.
    """
    path = Path(path)
    translation = _Translation(_parsed(_text(path), path))
    try:
        translation.run()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return translation.overrides, translation.notes


def _text(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _FILE_BYTES:
            raise ConfigError(f"cannot read the options {path}: not a file of at most {_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the options {path}: {getattr(error, 'strerror', 'it is not UTF-8')}") from None


def _parsed(text: str, path: Path) -> dict[str, str]:
    """The options by the names in the file, without the rules above and below, and what else was the default."""
    options: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.strip().startswith("---"):
            continue
        name, separator, value = line.partition(":")
        name = name.strip()
        if not separator or not re.fullmatch(r"\w{1,50}", name):
            raise ConfigError(f"{path}, line {number} is not `name: value`: {line.strip()[:99]!r}")
        if name in options:
            raise ConfigError(f"{path}, line {number}: {name} is given twice")
        options[name] = value.partition("[default: ")[0].strip()
    if not options:
        raise ConfigError(f"{path} holds no options")
    return options


class _Translation:
    """Options one after another, as overrides and notes."""

    def __init__(self, options: dict[str, str]) -> None:
        self.old = frozenset(_RENAMED.keys() & options.keys())
        self.options: dict[str, str] = {}
        for name, value in options.items():
            today = _RENAMED.get(name, name)
            if today in self.options:
                raise ConfigError(f"{name} and {today} are one option, and both are given")
            self.options[today] = value
        self.overrides: list[str] = []
        self.notes: list[str] = []

    def run(self) -> None:
        """Raises ConfigError at the first option that would change what is learned."""
        for name, value in self.options.items():
            if name in _REQUIRED:
                right, why = _REQUIRED[name]
                if value != right:
                    raise ConfigError(f"{name} = {value!r} has no equal here, only {right}: {why}")
            elif name in _TEXTS:
                self._set(_TEXTS[name], value)
            elif name in _INTEGERS:
                self._set(_INTEGERS[name], self._number(name, int))
            elif name in _NUMBERS:
                self._set(_NUMBERS[name], self._number(name, float))
            elif name in _SPECIAL:
                _SPECIAL[name](self, value)
            elif name not in _NEUTRAL:
                raise ConfigError(
                    f"{name} = {value!r} is no option of the de-facto implementation that is known here: if it has no "
                    "effect on the training, remove its line"
                )
        if "model" not in self.options:
            raise ConfigError("it does not say which model, cycle_gan or pix2pix")
        if neutral := [name for name in self.options if name in _NEUTRAL]:
            self.notes.append(f"not taken over, and without effect on what is learned: {', '.join(neutral)}")
        if "niter" in self.old:
            self.notes.append(
                "the learning rate falls from the first epoch after n_epochs on, as in newer versions; in those that "
                "call it niter it begins to fall up to two epochs before"
            )

    def method(self, value: str) -> None:
        """`model`, and what goes with it: dataset_mode, direction and the channels."""
        pix2pix, direction = value == "pix2pix", self.options.get("direction", "AtoB")
        mode = self.options.get("dataset_mode", "aligned" if pix2pix else "unaligned")
        if value not in ("cycle_gan", "pix2pix"):
            raise ConfigError(f"model = {value!r} has no equal here, only cycle_gan and pix2pix")
        if mode != ("aligned" if pix2pix else "unaligned"):
            raise ConfigError(f"dataset_mode = {mode!r} has no equal here with model {value}")
        if direction not in ("AtoB", *(["BtoA"] * pix2pix)):
            raise ConfigError(
                f"direction = {direction!r} has no equal here with model {value}: exchange the folders trainA and "
                "trainB, or train as AtoB and translate --direction BtoA"
            )
        if pix2pix:
            for field, given in (("method", value), ("direction", direction)):
                self._set(f"model.{field}", given)
            self._set("data.source", "side_by_side")
            self._set("data.pairing", "aligned")
        ends = ("model.channels_A", "model.channels_B")
        for option, field in zip(("input_nc", "output_nc"), ends if direction == "AtoB" else ends[::-1], strict=True):
            if option in self.options:
                self._set(field, self._number(option, int))

    def generator(self, value: str) -> None:
        if match := re.fullmatch(r"resnet_(\d{1,3})blocks", value):
            self._set("model.blocks", int(match[1]))
        elif re.fullmatch(r"unet_(128|256)", value):
            self._set("model.generator", value)
        else:
            raise ConfigError(f"netG = {value!r} is not known: resnet_9blocks, resnet_6blocks, unet_256 or unet_128")

    def discriminator(self, value: str) -> None:
        if value not in ("basic", "n_layers", "pixel"):
            raise ConfigError(f"netD = {value!r} is not known: basic, n_layers or pixel")
        self._set("model.discriminator", "pixel" if value == "pixel" else "patch")
        if value == "n_layers" and "n_layers_D" in self.options:
            self._set("model.discriminator_layers", self._number("n_layers_D", int))

    def norm(self, value: str) -> None:
        if value == "instance":
            return
        if value != "batch" or self.options.get("batch_size", "1") != "1":
            why = "batch norm shares statistics between pictures, here each has its own" if value == "batch" else ""
            raise ConfigError(f"norm = {value!r} has no equal here, only instance, and batch at batch size 1; {why}")
        self._set("model.affine", True)
        self.notes.append(
            "norm batch at batch size 1 is taken over as model.affine=true, which computes the same; what --eval would "
            "do with running statistics has no equal"
        )

    def adversarial(self, value: str) -> None:
        self._set("loss.gan", value)
        if value == "wgangp":
            self._set("loss.gradient_penalty", 0.0)
            self.notes.append(
                "wgangp without gradient penalty, as theirs computes it; loss.gradient_penalty=10 adds one"
            )

    def no_lsgan(self, value: str) -> None:
        self._set("loss.gan", "vanilla" if self._truth("no_lsgan", value) else "lsgan")

    def dropout(self, value: str) -> None:
        self._set("model.dropout", not self._truth("no_dropout", value))

    def flip(self, value: str) -> None:
        self._set("data.flip", not self._truth("no_flip", value))

    def serial(self, value: str) -> None:
        if self._truth("serial_batches", value):
            self._set("data.pairing", "ordered")
            self.notes.append("serial_batches: the same pairs, as data.pairing=ordered, but visited in random order")

    def preprocess(self, value: str) -> None:
        self._set("data.preprocess", value)
        if value == "scale_width" and "resize_or_crop" in self.old:
            self._set("data.load_size", self._number("crop_size", int))
            self.notes.append("scale_width scales to fineSize in this version, taken over as data.load_size")

    def limit(self, value: str) -> None:
        if value != "inf":
            self._set("data.limit_train", self._number("max_dataset_size", int))
            self.notes.append(
                f"max_dataset_size: {value} pictures a domain drawn by `seed`, not the first ones; they are others"
            )

    def policy(self, value: str) -> None:
        if value not in ("linear", "lambda"):
            raise ConfigError(f"lr_policy = {value!r} has no equal here, only linear, called lambda until 2019")

    def devices(self, value: str) -> None:
        """gpu_ids: `0,1`, or `[0, 1]` before 2018; none or -1 is the CPU."""
        devices = [device for device in re.findall(r"-?\d{1,6}", value) if not device.startswith("-")]
        if not devices:
            self._set("training.device", "cpu")
        elif len(devices) > 1:
            self._set("training.global_batch", self._number("batch_size", int))
            self.notes.append(
                f"gpu_ids {value}: `torchrun --nproc-per-node={len(devices)} train.py --from-options FILE` shares "
                "training.global_batch among the devices"
            )

    def nothing(self, value: str) -> None:
        """For what another option has taken into account."""

    def _set(self, field: str, value: str | int | float | bool) -> None:
        self.overrides.append(f"{field}={json.dumps(value)}")

    def _number(self, name: str, kind: Callable[[str], int | float]) -> int | float:
        value = self.options.get(name, "")
        try:
            return kind(value[:99])
        except ValueError:
            raise ConfigError(f"{name} = {value!r} is not {'an integer' if kind is int else 'a number'}") from None

    def _truth(self, name: str, value: str) -> bool:
        if value not in ("True", "False"):
            raise ConfigError(f"{name} = {value!r} is neither True nor False")
        return value == "True"


_SPECIAL: dict[str, Callable[[_Translation, str], None]] = {
    "dataset_mode": _Translation.nothing,
    "direction": _Translation.nothing,
    "gan_mode": _Translation.adversarial,
    "gpu_ids": _Translation.devices,
    "input_nc": _Translation.nothing,
    "lr_policy": _Translation.policy,
    "max_dataset_size": _Translation.limit,
    "model": _Translation.method,
    "n_layers_D": _Translation.nothing,
    "netD": _Translation.discriminator,
    "netG": _Translation.generator,
    "no_dropout": _Translation.dropout,
    "no_flip": _Translation.flip,
    "no_lsgan": _Translation.no_lsgan,
    "norm": _Translation.norm,
    "output_nc": _Translation.nothing,
    "preprocess": _Translation.preprocess,
    "serial_batches": _Translation.serial,
}
