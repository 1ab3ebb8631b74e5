"""Weights from and for other programs: the de-facto implementation's files and folders, and safetensors of the same.

There a model is a folder of bare state dicts, ``<epoch>_net_<network>.pth``, with epoch ``latest``, ``N`` or ``iter_N``
and network ``G_A``, ``G_B``, ``D_A`` or ``D_B``; one direction alone is ``latest_net_G.pth``. They are read by
`tensor_file`, which trusts nothing in them, and recognised by `models.defacto`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cyclegan_fast.atomic import replacing
from cyclegan_fast.config import (
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    from_dict,
    to_dict,
    to_yaml,
    upgraded,
)
from cyclegan_fast.errors import InputError
from cyclegan_fast.models.defacto import Architecture, MisfitError, Recognised, defacto_state, recognise
from cyclegan_fast.tensor_file import Refused, read_tensors
from cyclegan_fast.training.checkpoint import (
    checkpoint_dir,
    find_checkpoint,
    read_checkpoint,
    step_path,
    write_checkpoint,
)
from cyclegan_fast.training.ema import select

__all__ = [
    "NETWORKS",
    "AbsentGenerator",
    "Weights",
    "WeightsError",
    "absent_generator",
    "describe",
    "export_weights",
    "import_weights",
    "initialise",
    "is_weights",
    "read_weights",
    "report",
]

NETWORKS = ("G_A", "G_B", "D_A", "D_B")
_SUFFIXES = (".pth", ".pt", ".safetensors")
_FILE = re.compile(
    r"(?:(latest|\d{1,9}|iter_\d{1,9})_)?net_(G_A|G_B|D_A|D_B|G|D)\.(?:pth|pt|safetensors)", re.IGNORECASE
)
_LABEL = re.compile(r"latest|\d{1,9}|iter_\d{1,9}")
_MISSING = 'reading and writing safetensors needs another package: pip install "cyclegan_fast[safetensors]"'


class WeightsError(InputError):
    """Weights that cannot be read, recognised or written; the message names the file, the key and what is right."""


class AbsentGenerator(nn.Module):
    """Stands for a direction that a model does not have. Called, it raises WeightsError saying so."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        raise WeightsError(self.reason)


def absent_generator(source: Path, name: str) -> AbsentGenerator:
    """What stands for a missing G_A or G_B."""
    there = "BtoA" if name == "G_A" else "AtoB"
    return AbsentGenerator(f"{source} has no {name}: it translates in the direction {there} only")


@dataclass(frozen=True)
class Weights:
    """Networks of one model, by name, and the settings that make them."""

    source: Path
    model: ModelConfig
    networks: dict[str, Recognised]
    formats: dict[str, str]
    """The format of each network's file."""

    def generators(self) -> tuple[nn.Module, nn.Module]:
        """(G_A, G_B) with their weights; an `AbsentGenerator` for one that is not there.

        Raises WeightsError if there is neither.
        """
        if not self.networks.keys() & {"G_A", "G_B"}:
            raise WeightsError(f"{self.source} has no generator: there is nothing to translate with")
        made: list[nn.Module] = []
        for name in ("G_A", "G_B"):
            if name not in self.networks:
                made.append(absent_generator(self.source, name))
                continue
            network = self.networks[name].architecture.network()
            network.load_state_dict(self.networks[name].weights, assign=True)
            made.append(network)
        return made[0], made[1]


def is_weights(path: str | Path) -> bool:
    """Whether a path means weights of others: a file by its ending, a folder by what lies in it."""
    path = Path(path)
    if not path.is_dir():
        return path.suffix.lower() in _SUFFIXES
    folder = checkpoint_dir(path)
    has_checkpoints = folder.is_dir() and any(item.suffix == ".ckpt" for item in folder.iterdir())
    return not has_checkpoints and any(_FILE.fullmatch(item.name) for item in path.iterdir())


def read_weights(path: str | Path, which: str = "latest", networks: tuple[str, ...] = NETWORKS) -> Weights:
    """The networks of a weights file, or those named of a folder at epoch ``latest``, ``N`` or ``iter_N``.

    In a file alone is the A or the B that its name says, else A. Raises WeightsError when there is none, when one
    cannot be read or recognised, or when they do not belong together.
    """
    path = Path(path)
    found: dict[str, Recognised] = {}
    formats: dict[str, str] = {}
    if path.is_dir():
        for name, file in _files(path, which).items():
            if name in networks:
                found[name], formats[name] = _read(file)
                if found[name].architecture.is_generator != name.startswith("G"):
                    raise WeightsError(f"{file} holds a {found[name].architecture.words}")
    else:
        one, file_format = _read(path)
        match = _FILE.fullmatch(path.name)
        name = ("G" if one.architecture.is_generator else "D") + ("_B" if match and match[2].endswith("_B") else "_A")
        found, formats = {name: one}, {name: file_format}
    architectures = {name: one.architecture for name, one in found.items()}
    return Weights(path, _settings(path, architectures), found, formats)


def import_weights(source: str | Path, out: str | Path, which: str = "latest") -> tuple[Path, Weights]:
    """Make a run folder, or a checkpoint if ``out`` ends in .ckpt, of de-facto weights: its file and what was read.

    Raises WeightsError, CheckpointError when it cannot be written or is there already.
    """
    weights, out = read_weights(source, which), Path(out)
    run = out.parent if out.suffix == ".ckpt" else out
    file = out if out.suffix == ".ckpt" else step_path(run, 0)
    if file.exists() or (file != out and checkpoint_dir(run).is_dir() and any(checkpoint_dir(run).iterdir())):
        raise WeightsError(f"{out} is there already: choose another name")
    weights.generators()  # or there is nothing to translate with
    config = _run_config(weights, run)
    networks = {name: dict(one.weights) for name, one in weights.networks.items()}
    position = {"step": 0, "epoch": 0.0}
    provenance = {"imported": str(Path(source).resolve()), "which": which}
    write_checkpoint(file, {"config": to_dict(config), **networks, "position": position, "provenance": provenance})
    if file != out:
        (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return file, weights


def export_weights(
    source: str | Path,
    out: str | Path,
    *,
    which: str = "latest",
    label: str = "latest",
    file_format: str = "pth",
    direction: str | None = None,
    weights: str = "auto",
    overwrite: bool = False,
) -> list[Path]:
    """Write a model's networks as the de-facto implementation's files, ``<label>_net_<network>.pth``, into a folder.

    ``source`` is a run, a checkpoint or de-facto weights; file_format ``pth`` or ``safetensors``. A model of one
    direction is written as ``<label>_net_G.pth``, which ``--model test`` reads, and so is, where it is given, the
    generator of ``direction``. ``weights`` chooses averages or not, as in ``load``. Files appear whole or not at all.
    Raises WeightsError when a network is none that the de-facto implementation has, CheckpointError.
    """
    if not _LABEL.fullmatch(label):
        raise WeightsError(f"label {label!r} is not one of latest, N, iter_N, which the de-facto implementation reads")
    wanted = NETWORKS if direction is None else ("G_A",) if direction == "AtoB" else ("G_B",)
    networks = _any_networks(source, which, weights, wanted)
    if not networks:
        raise WeightsError(f"{source} has no {wanted[0]}, which translates {direction}")
    states = {name: _exported(source, name, one) for name, one in networks.items()}
    if not states.keys() >= {"G_A", "G_B"}:  # of one direction, and called so
        states = {name[0]: state for name, state in states.items()}
    files = {name: Path(out) / f"{label}_net_{name}.{file_format}" for name in states}
    there = [file for file in files.values() if file.exists()]
    if there and not overwrite:
        raise WeightsError(f"{there[0]} is there already: use --overwrite to replace it")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            _write(file, states[name])
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise WeightsError(f"cannot write to {out}: {error}") from error
    return list(files.values())


def report(source: str | Path, which: str = "latest") -> str:
    """What a model's files hold, as was inferred, and the settings of a run with such networks, in lines."""
    if is_weights(source):
        return describe(read_weights(source, which))
    file, content = _checkpoint(source, which)
    found = [(name, content[name]) for name in NETWORKS if name in content]
    lines = [f"{name}: {_count(weights)}; {file.name}" for name, weights in found]
    return "\n".join([*lines, _settings_line(_saved_model(file, content))])


def describe(weights: Weights) -> str:
    """What was read, in lines, and the settings of a run with such networks."""
    lines = []
    for name, one in weights.networks.items():
        lines.append(f"{name}: {one.architecture.words}; {_count(one.weights)}; {weights.formats[name]}")
        lines += [f"     {note}" for note in one.notes]
    return "\n".join([*lines, _settings_line(weights.model)])


def _settings_line(model: ModelConfig) -> str:
    usual, given = to_dict(Config())["model"], to_dict(Config(model=model))["model"]
    changed = [f"model.{key}={str(value).lower()}" for key, value in given.items() if value != usual[key]]
    return "settings: " + (" ".join(changed) or "the defaults")


def _count(weights: Mapping[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in weights.values()):,} parameters in {len(weights)} tensors"


def initialise(modules: Mapping[str, nn.Module], source: str) -> list[str]:
    """Put the weights of a run, a checkpoint or de-facto files into networks; the names of those that got some.

    Raises WeightsError, CheckpointError, saying what does not fit, and when there is no generator.
    """
    where = f"model.init_from = {source!r}"
    if is_weights(source):
        found = {name: one.weights for name, one in read_weights(source).networks.items()}
    else:
        _, content = _checkpoint(source, "latest")
        found = {name: content[name] for name in NETWORKS if name in content}
    taken = [name for name in modules if name in found]
    if not any(name.startswith("G") for name in taken):
        raise WeightsError(f"{where}: there is no generator in it")
    for name in taken:
        expected, given = modules[name].state_dict(), found[name]
        for key in dict.fromkeys([*expected, *given]):
            a, b = (list(state[key].shape) if key in state else "missing" for state in (expected, given))
            if a != b:
                raise WeightsError(
                    f"{where}: its {name} is another network than the one configured: {key} is {b} there and {a} here. "
                    f"`cyclegan-fast weights show {source}` says with which settings it fits"
                )
        modules[name].load_state_dict(given)
    return taken


def _files(folder: Path, which: str) -> dict[str, Path]:
    """The files of one epoch by network. One direction alone counts as A -> B. Raises WeightsError."""
    label = which.removeprefix("epoch-")
    found: dict[str, dict[str, Path]] = {}
    for item in sorted(folder.iterdir(), key=lambda item: (item.suffix.lower() == ".safetensors", item.name)):
        if match := _FILE.fullmatch(item.name):
            found.setdefault(match[1] or "latest", {}).setdefault(match[2], item)
    if label not in found:
        raise WeightsError(f"{folder} has no weights of epoch {which!r}; there is {', '.join(sorted(found)) or 'none'}")
    files = found[label]
    if not files.keys() & {"G_A", "G_B"}:
        files = {f"{name}_A" if name in ("G", "D") else name: file for name, file in files.items()}
    return {name: files[name] for name in NETWORKS if name in files}


def _read(file: Path) -> tuple[Recognised, str]:
    """The network in a file, and the file's format. Raises WeightsError."""
    try:
        content, file_format = read_tensors(file)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
            raise Refused("holds no state dict, names and tensors")
        return recognise(content), file_format
    except Refused as error:
        raise WeightsError(f"{file} {error}") from None
    except MisfitError as error:
        raise WeightsError(f"{file} is no network of the de-facto implementation that is known here: {error}") from None
    except ImportError:
        raise WeightsError(f"{file}: {_MISSING}") from None
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from error


def _settings(path: Path, found: Mapping[str, Architecture]) -> ModelConfig:
    """The settings that make these networks. Raises WeightsError when they cannot be those of one model."""
    model = ModelConfig()
    if one := found.get("G_A") or found.get("G_B"):
        _check_pair(path, found, "G_A", "G_B")
        channels = (one.in_channels, one.out_channels)
        A, B = channels if "G_A" in found else channels[::-1]
        kind = {"blocks": one.depth} if one.kind == "resnet" else {"generator": f"unet_{2**one.depth}"}
        options: dict[str, Any] = {**kind, "affine": one.affine, "dropout": one.dropout}
        model = replace(model, channels_A=A, channels_B=B, ngf=one.width, **options)
    if two := found.get("D_A") or found.get("D_B"):
        _check_pair(path, found, "D_A", "D_B")
        if one is not None and one.affine != two.affine:
            raise WeightsError(
                f"{path}: generators are {one.words}, but discriminators {two.words}: one model has one norm"
            )
        if one is not None:
            _check_sight(path, found, model)
        model = replace(model, ndf=two.width, discriminator=two.kind, affine=two.affine)
        model = replace(model, discriminator_layers=two.depth) if two.kind == "patch" else model
    return model


def _check_pair(path: Path, found: Mapping[str, Architecture], first: str, second: str) -> None:
    """Refuse two networks of one model that are not alike, from A to B and from B to A."""
    if first not in found or second not in found:
        return
    one, two = found[first], found[second]
    right = (
        replace(one, in_channels=two.in_channels)
        if not one.is_generator
        else (replace(one, in_channels=one.out_channels, out_channels=one.in_channels))
    )
    if two != right:
        raise WeightsError(f"{path}: {second} is a {two.words}; beside its {first} it must be a {right.words}")


def _check_sight(path: Path, found: Mapping[str, Architecture], model: ModelConfig) -> None:
    """Refuse a discriminator that sees neither what its generator makes nor, in pix2pix, that beside its input."""
    A, B = model.channels_A, model.channels_B
    for name, seen in (("D_A", B), ("D_B", A)):
        if name in found and found[name].in_channels not in (seen, A + B):
            raise WeightsError(
                f"{path}: {name} is a {found[name].words}; beside these generators it sees {seen} channels, or {A + B} "
                "in pix2pix"
            )


def _run_config(weights: Weights, run: Path) -> Config:
    """The configuration of an imported run, of pix2pix if it has one direction alone.

    Raises WeightsError where a run cannot have such networks.
    """
    model, data, place = weights.model, DataConfig(), run.resolve()
    if not weights.networks.keys() >= {"G_A", "G_B"}:
        model = replace(model, method="pix2pix", direction="AtoB" if "G_A" in weights.networks else "BtoA")
        data = replace(data, pairing="aligned")
    identity = LossConfig().identity if model.channels_A == model.channels_B else 0.0
    config = Config(place.name, str(place.parent), data=data, model=model, loss=LossConfig(identity=identity))
    try:
        return from_dict(to_dict(config))
    except ConfigError as error:
        raise WeightsError(f"{weights.source} cannot be a run, though it can be used directly: {error}") from error


def _any_networks(source: str | Path, which: str, weights: str, wanted: tuple[str, ...]) -> dict[str, Recognised]:
    """Those wanted of the networks of a run, a checkpoint or de-facto weights. Raises WeightsError, CheckpointError."""
    if is_weights(source):
        found = read_weights(source, which, wanted).networks
        return {name: found[name] for name in wanted if name in found}
    file, content = _checkpoint(source, which, weights)
    model = _saved_model(file, content)
    if model.preset != "original":
        raise WeightsError(
            f"{file} has the networks of preset {model.preset!r}, whose paddings and norms the de-facto implementation "
            "does not have: there is no file that it would read"
        )
    found = {}
    for name in wanted:
        try:
            if name in content:
                found[name] = recognise(content[name])
        except MisfitError as error:
            hint = "; --direction exports one generator alone" * name.startswith("D")
            what = f"{file}: the de-facto implementation has no such {name}: {error}{hint}"
            raise WeightsError(what) from error
    return found


def _checkpoint(source: str | Path, which: str, weights: str = "auto") -> tuple[Path, dict[str, Any]]:
    """A checkpoint's file and content, with averaged weights as ``G_A`` and ``G_B`` if they are asked for."""
    file = find_checkpoint(source, which)
    return file, select(read_checkpoint(file), weights, file)


def _saved_model(file: Path, content: dict[str, Any]) -> ModelConfig:
    try:
        return from_dict(upgraded(content["config"])).model
    except ConfigError as error:
        raise WeightsError(f"{file} holds a configuration that this version cannot use: {error}") from error


def _exported(source: str | Path, name: str, one: Recognised) -> dict[str, Tensor]:
    try:
        return defacto_state(one.weights, one.architecture)
    except MisfitError as error:
        raise WeightsError(f"{source}: {name} cannot be exported: {error}") from error


def _write(file: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict, whole or not at all. Raises WeightsError without the package for safetensors, OSError."""
    with replacing(file) as temporary:
        if file.suffix == ".pth":
            torch.save(OrderedDict(state), temporary)
            return
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise WeightsError(_MISSING) from None
        save_file(state, temporary, metadata={"format": "pt"})
