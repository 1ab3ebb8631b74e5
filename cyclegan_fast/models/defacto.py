"""The de-facto implementation's state dicts: which network one belongs to, and the ways between its tensors and ours.

Its files hold nothing but names and tensors, so the architecture is inferred: the kind of network from the names,
widths and channels from the shapes, the rest from what else is there. Then the network itself is built, without memory
for its weights, and says which tensors there must be; what does not fit is named. Undetectable from a file, and so not
checked, are settings without a tensor: the padding's mode and a U-Net's dropout.

Variants that are read: the prefixes ``module.`` (DataParallel) and ``_orig_mod.`` (torch.compile); running statistics
of instance norms, which some versions of 2018 saved and none used; affine instance norms of 2017; networks of
``--norm batch``. The last two become norms with a scale and a shift over the picture's own statistics. That is what the
de-facto test script computes with them, unless ``--eval`` is given, which would use the running statistics instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator
from cyclegan_fast.models.reference import InstanceNorm
from cyclegan_fast.models.unet import UnetGenerator

__all__ = ["Architecture", "MisfitError", "Recognised", "defacto_state", "recognise"]

_PREFIXES = ("module.", "_orig_mod.")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BLOCK = re.compile(r"model\.(\d{1,6})\.conv_block\.(\d)\.weight")
_FIRST_BLOCK = 10
_PIXEL_BIAS = "net.5.bias"  # the pixel discriminator has it, but not with --norm batch
_MOST_BLOCKS = 1000
_LEAST_DOWNS, _MOST_DOWNS = 5, 10  # of a U-Net
_MOST_LAYERS = 8  # of a PatchGAN


class MisfitError(ValueError):
    """A state dict that is none of the known networks; the message names the key and what would be right."""


@dataclass(frozen=True)
class Architecture:
    """A network by its kind: ``resnet`` and ``unet`` generators, ``patch`` and ``pixel`` discriminators."""

    kind: str
    in_channels: int
    out_channels: int
    width: int
    """Filters of the first convolution: ngf or ndf."""
    depth: int
    """Residual blocks, halvings of a U-Net, or layers of a patch discriminator."""
    affine: bool
    dropout: bool = False

    @property
    def is_generator(self) -> bool:
        return self.kind in ("resnet", "unet")

    @property
    def words(self) -> str:
        """The architecture in a line."""
        what = {
            "resnet": f"ResNet generator, {self.depth} blocks, ngf {self.width}",
            "unet": f"U-Net {2**self.depth} generator, ngf {self.width}",
            "patch": f"PatchGAN discriminator, {self.depth} layers, ndf {self.width}",
            "pixel": f"pixel discriminator, ndf {self.width}",
        }[self.kind]
        channels = (
            f"{self.in_channels} -> {self.out_channels} channels"
            if self.is_generator
            else (f"{self.in_channels} channels")
        )
        return f"{what}, {channels}{', affine norms' * self.affine}{', dropout' * self.dropout}"

    def network(self) -> nn.Module:
        """The network, without memory for its weights (on the device ``meta``)."""
        with torch.device("meta"):
            if self.kind == "resnet":
                arguments = (self.in_channels, self.out_channels, self.width, self.depth)
                return ResnetGenerator(*arguments, affine=self.affine, dropout=self.dropout)
            if self.kind == "unet":
                return UnetGenerator(self.in_channels, self.out_channels, self.width, self.depth, affine=self.affine)
            if self.kind == "patch":
                return PatchDiscriminator(self.in_channels, self.width, self.depth, affine=self.affine)
            return PixelDiscriminator(self.in_channels, self.width, affine=self.affine)


@dataclass(frozen=True)
class Recognised:
    """A state dict and what it is: weights by the network's own keys and in their order, float32."""

    architecture: Architecture
    weights: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    """What was changed on the way, in words."""


def recognise(state: Mapping[str, Tensor]) -> Recognised:
    """The network that a de-facto state dict belongs to, and its weights. Raises MisfitError."""
    state, notes = _without_prefixes(state)
    for key, value in state.items():
        if not isinstance(value, Tensor) or (not value.is_floating_point() and not key.endswith(_STATISTICS[2])):
            what = f"dtype {value.dtype}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise MisfitError(f"{key} has {what}; weights are floating-point tensors")
    architecture = _inferred(state)
    try:
        network = architecture.network()
    except RuntimeError as error:  # more elements than torch can count
        raise MisfitError(f"a {architecture.words} is too large: {error}") from None
    weights = _fitted(network.state_dict(), state, architecture, _norms(network), notes)
    return Recognised(architecture, weights, notes)


def defacto_state(weights: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The state dict that the de-facto network of this architecture has: its keys in its order, on the CPU, contiguous.

    float32, running statistics of ``--norm batch`` excepted, which count in int64. Affine norms are exported as those,
    with the statistics of a network that has seen nothing, which it uses with ``--eval`` only. Raises MisfitError where
    weights are not those of that network.
    """
    network = architecture.network()
    norms = _norms(network)
    fitted = _fitted(network.state_dict(), weights, architecture, norms, [])
    state: dict[str, Tensor] = {}
    for key, value in fitted.items():
        name, _, part = key.rpartition(".")
        if architecture.affine and key == _PIXEL_BIAS:
            if bool(value.any()):
                raise MisfitError(f"{key} is not 0, and the de-facto pixel discriminator has none with --norm batch")
            continue
        state[key] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if part == "bias" and name in norms:
            state |= _fresh_statistics(name, len(value))
    return state


def _fresh_statistics(norm: str, channels: int) -> dict[str, Tensor]:
    values = torch.zeros(channels), torch.ones(channels), torch.tensor(0)
    return {f"{norm}.{part}": value for part, value in zip(_STATISTICS, values, strict=True)}


def _without_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state without what wrappers put before every name."""
    plain, notes = dict(state), []
    while found := next((p for p in _PREFIXES if plain and all(str(k).startswith(p) for k in plain)), None):
        plain = {key[len(found) :]: value for key, value in plain.items()}
        notes.append(f"prefix `{found}` removed")
    return plain, notes


def _inferred(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture that names and shapes stand for; whether all of it is there is for `_fitted` to say."""
    if any(key.startswith("model.model.") for key in state):
        return _unet(state)
    if any(_BLOCK.match(key) for key in state):
        return _resnet(state)
    if "net.0.weight" in state:
        first = _shape(state, "net.0.weight")
        return Architecture("pixel", first[1], 1, first[0], 0, affine="net.3.weight" in state)
    if "model.0.weight" in state:
        return _patch(state)
    names = ", ".join(f"{key:.60}" for key in list(state)[:3]) or "none"
    raise MisfitError(
        f"its names ({names}, ...) are those of no ResNet generator (model.10.conv_block.1.weight), U-Net "
        "(model.model.0.weight), PatchGAN (model.0.weight) or pixel discriminator (net.0.weight)"
    )


def _resnet(state: Mapping[str, Tensor]) -> Architecture:
    blocks = sorted({int(match[1]) for key in state if (match := _BLOCK.match(key))})
    if len(blocks) > _MOST_BLOCKS:
        raise MisfitError(f"it has {len(blocks)} residual blocks; at most {_MOST_BLOCKS} are read")
    if blocks != list(range(_FIRST_BLOCK, _FIRST_BLOCK + len(blocks))):
        raise MisfitError(
            f"its {len(blocks)} residual blocks are model.{blocks[0]} to model.{blocks[-1]}; the layout has them one "
            f"after another from model.{_FIRST_BLOCK} on"
        )
    stem = _shape(state, "model.1.weight")
    last = _shape(state, f"model.{_FIRST_BLOCK + len(blocks) + 7}.weight")
    second = state.get(f"model.{_FIRST_BLOCK}.conv_block.6.weight")  # .5 without dropout, where .6 is the norm
    dropout = second is not None and second.dim() == 4
    affine = "model.2.weight" in state
    return Architecture("resnet", stem[1], last[0], stem[0], len(blocks), affine=affine, dropout=dropout)


def _unet(state: Mapping[str, Tensor]) -> Architecture:
    """A U-Net is as deep as its names are nested."""
    first, last = _shape(state, "model.model.0.weight"), _shape(state, "model.model.3.weight")
    level, downs = "model.model.1.model", 1
    while f"{level}.1.weight" in state and downs <= _MOST_DOWNS:
        level, downs = f"{level}.3.model", downs + 1
    if not _LEAST_DOWNS <= downs <= _MOST_DOWNS:
        raise MisfitError(
            f"a U-Net that halves the picture {_LEAST_DOWNS} to {_MOST_DOWNS} times is read; here {level}.1.weight is "
            f"{'there too' if downs > _MOST_DOWNS else 'missing'}"
        )
    affine = "model.model.1.model.2.weight" in state
    return Architecture("unet", first[1], last[1], first[0], downs, affine=affine)


def _patch(state: Mapping[str, Tensor]) -> Architecture:
    first = _shape(state, "model.0.weight")
    layers = sum(value.dim() == 4 for value in state.values()) - 2
    if not 1 <= layers <= _MOST_LAYERS:
        raise MisfitError(f"it has {layers + 2} convolutions; a PatchGAN discriminator has 3 to {_MOST_LAYERS + 2}")
    norm = state.get("model.3.weight")
    return Architecture("patch", first[1], 1, first[0], layers, affine=norm is not None and norm.dim() == 1)


def _shape(state: Mapping[str, Tensor], key: str) -> Sequence[int]:
    """The shape of a convolution's weight. Raises MisfitError where there is none."""
    if key not in state:
        raise MisfitError(f"{key} is missing")
    shape = list(state[key].shape)
    if len(shape) != 4 or 0 in shape:
        raise MisfitError(f"{key} has shape {shape}; a convolution's weight has four dimensions")
    return shape


def _norms(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, InstanceNorm)}


def _is_dead(bias: str, norms: set[str]) -> bool:
    """Whether a convolution's bias has no effect, because a norm follows."""
    sequence, _, place = bias.removesuffix(".bias").rpartition(".")
    return place.isdecimal() and f"{sequence}.{int(place) + 1}" in norms


def _fitted(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: Architecture, norms: set[str], notes: list[str]
) -> dict[str, Tensor]:
    """The given weights by the expected names, in their order, float32. Raises MisfitError naming what does not fit.

    Left out, with a note, is what has no effect. In its place stands nothing that was not in the file but zeros for the
    one bias that the de-facto networks lack and ours have.
    """
    unused = given.keys() - expected.keys()
    dropped = {key for key in unused if key.rpartition(".")[0] in norms and key.endswith(_STATISTICS)}
    biases = {key for key in unused if key.endswith(".bias") and key.removesuffix("bias") + "weight" in expected}
    dead = {key for key in biases if _is_dead(key, norms) or not bool(given[key].any())}
    if unknown := sorted(unused - dropped - dead):
        raise MisfitError(f"{unknown[0]:.99} is no part of a {what.words}{_more(unknown)}")
    if dropped:
        notes.append(f"{len(dropped)} running statistics of norms dropped")
    if dead:
        notes.append(f"{len(dead)} biases without effect dropped")
    weights = {}
    for key, tensor in expected.items():
        value = given.get(key)
        if value is None and what.affine and key == _PIXEL_BIAS:
            value = torch.zeros(tensor.shape)
        if value is None:
            none = not what.affine and _is_dead(key, norms)
            hint = ": without it and without weights of norms this looks like --norm none, which is not read" * none
            raise MisfitError(f"{key} of a {what.words} is missing{hint}")
        if value.shape != tensor.shape:
            raise MisfitError(f"{key} has shape {list(value.shape)}, but {list(tensor.shape)} in a {what.words}")
        weights[key] = value.float()
    return weights


def _more(names: Sequence[str]) -> str:
    return f", nor are {len(names) - 1} more" if len(names) > 1 else ""
