"""Translating pictures in memory with trained generators; `files` does whole folders."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cyclegan_fast.config import ConfigError, ModelConfig, from_dict, upgraded
from cyclegan_fast.device import arithmetic, resolve_device, resolve_precision
from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.inference.familiarity import Familiarity, Reference, features, thinned
from cyclegan_fast.inference.memory import available_memory, is_out_of_memory
from cyclegan_fast.inference.pictures import PictureLike, Pixels, as_batch
from cyclegan_fast.inference.tiles import (
    Plan,
    Progress,
    as_input,
    can_tile,
    plan_tiles,
    row_filters,
    translate_tiled,
    whole_bytes,
)
from cyclegan_fast.inference.upsample import enlarge, shrink, small_size
from cyclegan_fast.inference.weights import AbsentGenerator, absent_generator, is_weights, read_weights
from cyclegan_fast.models import build_augmented, build_generators
from cyclegan_fast.models.augmented import StyledGenerator
from cyclegan_fast.training.checkpoint import CheckpointError, find_checkpoint, read_checkpoint
from cyclegan_fast.training.ema import select
from cyclegan_fast.training.latents import latent_draws

__all__ = ["DIRECTIONS", "Execution", "TranslationError", "Translator", "load"]

logger = logging.getLogger("cyclegan_fast.translate")

DIRECTIONS = ("AtoB", "BtoA")

# Of the memory that is free, what a translation may plan with; the rest is for what no estimate knows.
_SHARE_OF_FREE = 0.85
_UNLIMITED = 2**62


class TranslationError(InputError):
    """A picture that could not be translated: too large for the memory, or a result that is not finite."""


@dataclass(frozen=True)
class Execution:
    """How large a picture is translated: options of ``Translator.translate``, where they are explained.

    Raises InputError for a scale, tile or max_memory that is not allowed.
    """

    scale: int | str | None = None
    tile: int | None = None
    max_memory: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) and self.scale != "train":
            raise InputError(f"scale = {self.scale!r} is not allowed: a number of pixels, or 'train'")
        least = {"scale": (self.scale, 8), "tile": (self.tile, 1), "max_memory": (self.max_memory, 1)}
        for name, (value, minimum) in least.items():
            if value is not None and not isinstance(value, str) and value < minimum:
                raise InputError(f"{name} = {value!r} is not allowed: an integer >= {minimum}")


class Translator:
    """Two trained generators, ready to run: on their device, in channels-last order, in evaluation mode.

    ``G_A`` translates A to B, ``G_B`` B to A (the paper's G and F), each mapping float [N, C, H, W] in [-1, 1] to the
    same H and W. The modules are taken over, not copied: they are moved, set to evaluation and stop taking gradients.
    ``device`` and ``precision`` are as in ``resolve_device`` and ``resolve_precision``, which say what they raise;
    ``auto`` computes in bf16 (fp32 weights, autocast) where the hardware multiplies in it. ``training_size`` is the
    short side of the pictures that they were trained on, None where pictures of any size were.

    ``references``: what the training pictures of A and of B are like, where that is known: see ``familiarity``.

    Generators that take a latent code beside the picture (`StyledGenerator`, of Augmented CycleGAN) have theirs fixed:
    ``styled`` gives them another.
    """

    def __init__(
        self,
        G_A: nn.Module,
        G_B: nn.Module,
        *,
        channels_A: int = 3,
        channels_B: int = 3,
        device: str = "auto",
        precision: str = "auto",
        training_size: int | None = None,
        references: Mapping[str, Reference] | None = None,
    ) -> None:
        self.training_size = training_size
        self.references = dict(references or {})
        self._told: set[str] = set()  # directions that a warning was given for
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.channels_A, self.channels_B = channels_A, channels_B
        self._with_codes: tuple[StyledGenerator, StyledGenerator] | None = None
        if isinstance(G_A, StyledGenerator) and isinstance(G_B, StyledGenerator):
            self._with_codes = G_A, G_B
            G_A, G_B = (G.styled(_code(G, 0, domain)) for G, domain in ((G_A, 1), (G_B, 0)))
        self.G_A, self.G_B = self._prepare(G_A), self._prepare(G_B)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        which: str = "latest",
        device: str = "auto",
        precision: str = "auto",
        weights: str = "auto",
    ) -> Translator:
        """The generators of a checkpoint file, or of a run folder's ``latest``, ``best`` or ``epoch-N`` checkpoint.

        Or of the de-facto implementation's: a weights file, or a folder of them at epoch ``latest``, ``N`` or
        ``iter_N`` (see ``inference.weights``). Raises CheckpointError or WeightsError when it is missing, damaged, or
        its weights and its configuration do not belong together.

        weights: ``ema``, the averages that `training.ema` keeps, ``raw``, the weights of the last step, or ``auto``,
        the averages if the checkpoint has any.
        """
        if is_weights(path):
            theirs = read_weights(path, which, networks=("G_A", "G_B"))
            G_A, G_B = theirs.generators()
            A, B = theirs.model.channels_A, theirs.model.channels_B
            return cls(G_A, G_B, channels_A=A, channels_B=B, device=device, precision=precision)
        file = find_checkpoint(Path(path), which)
        content = select(read_checkpoint(file), weights, file)
        try:
            config = from_dict(upgraded(content["config"]))
            model = config.model
        except ConfigError as error:
            raise CheckpointError(f"{file} holds a configuration that this version cannot use: {error}") from error
        G_A, G_B = (_generator(model, content, name, file) for name in ("G_A", "G_B"))
        A, B = model.channels_A, model.channels_B
        size = None if config.data.preprocess in ("crop", "none") else config.data.load_size
        options: dict[str, Any] = {"device": device, "precision": precision, "training_size": size}
        references = _references(content.get("familiarity", {}), {"A": A, "B": B}, file)
        return cls(G_A, G_B, channels_A=A, channels_B=B, references=references, **options)

    def styled(self, seed: int) -> Translator:
        """The translator with the random latent codes of a seed, an integer >= 0; a new one's are those of seed 0.

        Raises InputError for another seed, and where the generators take no codes.
        """
        if self._with_codes is None:
            raise InputError(f"seed = {seed}: these generators take no latent code, each picture has one translation")
        if seed < 0:
            raise InputError(f"seed = {seed} is not allowed: an integer >= 0")
        G_A, G_B = self._with_codes
        other = Translator(
            G_A.styled(_code(G_A, seed, 1)),
            G_B.styled(_code(G_B, seed, 0)),
            channels_A=self.channels_A,
            channels_B=self.channels_B,
            device=str(self.device),
            precision=self.precision,
            training_size=self.training_size,
            references=self.references,
        )
        other._with_codes, other._told = self._with_codes, self._told
        return other

    def channels(self, direction: str) -> tuple[int, int]:
        """Channels of the input and of the output of a direction. Raises InputError unless it is AtoB or BtoA."""
        if direction not in DIRECTIONS:
            raise InputError(f"direction {direction!r} is not one of {', '.join(DIRECTIONS)}")
        if isinstance(generator := self.G_A if direction == "AtoB" else self.G_B, AbsentGenerator):
            raise InputError(generator.reason)
        pair = (self.channels_A, self.channels_B)
        return pair if direction == "AtoB" else pair[::-1]

    @overload
    def translate(
        self,
        image: str | Path | Image.Image,
        direction: str = ...,
        *,
        truncate: bool = ...,
        seed: int | None = ...,
        scale: int | str | None = ...,
        tile: int | None = ...,
        max_memory: int | None = ...,
        progress: Progress | None = ...,
    ) -> Image.Image: ...
    @overload
    def translate(
        self,
        image: Pixels,
        direction: str = ...,
        *,
        truncate: bool = ...,
        seed: int | None = ...,
        scale: int | str | None = ...,
        tile: int | None = ...,
        max_memory: int | None = ...,
        progress: Progress | None = ...,
    ) -> Pixels: ...
    @overload
    def translate(
        self,
        image: Tensor,
        direction: str = ...,
        *,
        truncate: bool = ...,
        seed: int | None = ...,
        scale: int | str | None = ...,
        tile: int | None = ...,
        max_memory: int | None = ...,
        progress: Progress | None = ...,
    ) -> Tensor: ...
    def translate(
        self,
        image: PictureLike,
        direction: str = "AtoB",
        *,
        truncate: bool = False,
        seed: int | None = None,
        scale: int | str | None = None,
        tile: int | None = None,
        max_memory: int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Translate a whole picture; the result is of the same kind and of exactly the same size.

        * a path: the photograph, upright and in sRGB (``open_photo``); gives a PIL image
        * a PIL image of 8 bits a channel, its pixels taken as sRGB as they lie; alpha that the network does not take
          is laid over white; gives a PIL image of mode ``MODES[channels]``
        * a uint8 or uint16 array [H, W, C] (or [H, W] for one channel); gives the same
        * a floating-point tensor [N, C, H, W] in [-1, 1]; gives one of the same dtype on the same device

        8-bit results are rounded; ``truncate`` cuts off the fraction instead, as the de-facto implementation does
        (tensors have nothing to cut off). ``seed`` chooses one of the possible translations, where there are many
        (``styled``).

        A picture whose translation does not fit into free memory is computed in bands of rows, with the same result
        to rounding (``inference.tiles``). ``max_memory``: bytes that the translation may take at its peak, beside what
        the process held before it; ``tile``: rows of a map in a band, which forces bands. ``progress`` is called after
        each band with the bands done, all bands, and the share of the work that is done.

        ``scale``: translate at a short side of so many pixels, or ``"train"`` for the pictures' size in training, and
        return to full size with the picture's own detail (``inference.upsample``); smaller pictures are left as
        they are. A network knows flowers of the size it was trained on: docs/full_size.md.

        The first path or PIL image that is unlike the training pictures is logged as a warning, later ones are not:
        ``familiarity`` tells of any picture.

        Raises PhotoError for a file that cannot be used, ValueError for a wrong shape, dtype, mode, direction or
        option, and TranslationError when memory runs out (naming the size) or the result is not finite.
        """
        translator = self if seed is None else self.styled(seed)
        return translator._run(image, direction, 1, truncate, Execution(scale, tile, max_memory, progress))[0]

    @overload
    def cycle(self, image: str | Path | Image.Image, direction: str = ...) -> tuple[Image.Image, Image.Image]: ...
    @overload
    def cycle(self, image: Pixels, direction: str = ...) -> tuple[Pixels, Pixels]: ...
    @overload
    def cycle(self, image: Tensor, direction: str = ...) -> tuple[Tensor, Tensor]: ...
    def cycle(self, image: PictureLike, direction: str = "AtoB") -> Any:
        """Translate there and back: (generated, reconstructed), both as ``translate`` gives them.

        The way back starts from the unrounded result, as in the cycle loss of the training. Raises InputError for
        generators with latent codes, whose way back needs one that an encoder finds.
        """
        if self._with_codes is not None:
            raise InputError("generators with latent codes translate one way; there and back needs their encoders too")
        return self._run(image, direction, 2, False, Execution())

    def familiarity(self, image: PictureLike, direction: str = "AtoB") -> Familiarity | None:
        """How like the training pictures of a direction's input a picture is; of a batch, the least familiar one.

        None where that is not known: of weights of others, of older checkpoints, and of fewer than 20 training
        pictures. ``unfamiliar`` of the result says whether a translation is likely to be bad, as far as colours and
        structure tell (docs/familiarity.md). ``image`` is as for ``translate``, which says what is raised.
        """
        channels, reference = self.channels(direction)[0], self.references.get(direction[0])
        if reference is None:
            return None
        batch, _ = as_batch(thinned(image) if isinstance(image, np.ndarray) else image, channels, False)
        return reference.compare(features(batch))

    def short_side(self, scale: int | str | None) -> int | None:
        """The short side, in pixels, at which ``scale`` translates; None for full size.

        Raises InputError for ``"train"`` where the training had no size of its own.
        """
        if scale != "train":
            return None if scale is None else int(scale)
        if self.training_size is None:
            raise InputError("scale 'train' is not known for these networks: give a number of pixels, such as 286")
        return self.training_size

    def _prepare(self, generator: nn.Module) -> nn.Module:
        generator = generator.eval().requires_grad_(False)
        # mypy knows only the signatures of Module.to that have no memory format.
        moved: nn.Module = generator.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return moved

    def _run(
        self, image: PictureLike, direction: str, passes: int, truncate: bool, execution: Execution
    ) -> tuple[Any, ...]:
        """The results of one or two passes, each as the kind of picture that came in."""
        channels = self.channels(direction)
        short_side = self.short_side(execution.scale)
        batch, restore = as_batch(image, channels[0], truncate)
        if isinstance(image, (str, Path, Image.Image)):
            self._warn_once(image, batch, direction)
        networks = (self.G_A, self.G_B) if direction == "AtoB" else (self.G_B, self.G_A)
        height, width = batch.shape[2:]
        x, outputs = batch, []
        for network in networks[:passes]:
            if short_side is None or short_side >= min(height, width):
                x = self._full_size(network, x, execution)
            else:
                small = shrink(x, small_size(height, width, short_side))
                x = enlarge(self._full_size(network, small, execution), small, x)
            outputs.append(x)
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise TranslationError(
                f"the translation of a {width} x {height} picture is not finite in {self.precision}: "
                "use precision fp32, and if that gives the same, an earlier checkpoint"
            )
        return tuple(restore(output) for output in outputs)

    def _warn_once(self, image: str | Path | Image.Image, batch: Tensor, direction: str) -> None:
        """Log the first picture that is unlike the training pictures: as many as there are would be noise."""
        reference = self.references.get(direction[0])
        if self._told or reference is None:
            return
        try:
            found = reference.compare(features(batch))
        except (MemoryError, RuntimeError) as error:  # no translation fails of it
            logger.debug("the familiarity of a picture is not known: %s", error)
            return
        if found.unfamiliar:
            self._told.add(direction)
            name = "a picture" if isinstance(image, Image.Image) else shown(image)
            logger.warning("%s is %s (said once; familiarity() tells of each picture)", name, found)

    def _full_size(self, network: nn.Module, batch: Tensor, execution: Execution) -> Tensor:
        """One network over uint8 or floating-point [N, C, H, W]: float32, whole if that fits and else in bands."""
        if execution.tile is not None and not can_tile(network):
            raise InputError(f"tile cannot be used with a {type(network).__name__}: it needs the whole picture at once")
        limit = self._limit(execution)
        if execution.tile is None and self._whole_bytes(network, batch) <= limit:
            try:
                return self._whole(network, batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here, where no traceback keeps the activations alive.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            limit = self._limit(execution)
        height, width = batch.shape[2:]
        if not can_tile(network):
            raise self._too_large(height, width, self._whole_bytes(network, batch), limit)
        plan = self._plan(network, batch, execution, limit)
        try:
            with arithmetic(self.precision, self.device):
                bands = [
                    translate_tiled(network, picture, plan, device=self.device, progress=execution.progress)
                    for picture in batch.split(1)
                ]
        except OSError as error:
            raise TranslationError(
                f"a temporary file in {tempfile.gettempdir()} cannot be used: {error.strerror or error}; name another "
                "folder by TMPDIR, or allow more memory"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            bands = []
        if not bands:
            raise self._too_large(height, width, plan.bytes, limit)
        return bands[0] if len(bands) == 1 else torch.cat(bands)

    @torch.inference_mode()
    def _whole(self, network: nn.Module, batch: Tensor) -> Tensor:
        x = as_input(batch, self.device).contiguous(memory_format=torch.channels_last)
        with arithmetic(self.precision, self.device):
            y: Tensor = network(x).float()
        return y

    def _limit(self, execution: Execution) -> int:
        """Bytes that a translation may take on the device."""
        free = available_memory(self.device)
        free = _UNLIMITED if free is None else int(free * _SHARE_OF_FREE)
        return free if execution.max_memory is None else execution.max_memory

    def _whole_bytes(self, network: nn.Module, batch: Tensor) -> int:
        """What a whole picture takes; of unknown networks the least, two maps of the first layer's filters."""
        count, _, height, width = batch.shape
        if can_tile(network):
            return count * whole_bytes(network, height, width, self.precision, self.device)
        element = 2 if self.precision in ("bf16", "fp16") else 4
        return 2 * count * row_filters(network) * height * width * element

    def _plan(self, network: nn.Module, batch: Tensor, execution: Execution, limit: int) -> Plan:
        """The fastest way in bands that fits. Raises TranslationError if none does."""
        host = None if self.device.type == "cpu" else int((available_memory() or _UNLIMITED) * _SHARE_OF_FREE)
        height, width = batch.shape[2:]
        plan = plan_tiles(network, height, width, self.precision, limit=limit, host_limit=host, tile=execution.tile)
        if plan.bytes > limit:
            raise self._too_large(height, width, plan.bytes, limit)
        return plan

    def _too_large(self, height: int, width: int, needed: int, limit: int) -> TranslationError:
        return TranslationError(
            f"not enough memory on {self.device} for a {width} x {height} picture in {self.precision}: it takes at "
            f"least {needed / 1e9:.2g} GB, and {limit / 1e9:.2g} GB may be used; shrink the picture (scale), or free "
            "memory"
        )


def _unfilled_generators(model: ModelConfig, weights: Mapping[str, Tensor], file: Path) -> tuple[nn.Module, nn.Module]:
    """Generators without memory for their weights. Raises CheckpointError for a size that the weights cannot have.

    A configuration may ask for any number of blocks, and building them all would come before finding that they have
    no weights.
    """
    misfit = f"{file}: the weights of G_A do not fit its configuration: model.blocks = {model.blocks}"
    if model.blocks > len(weights):
        raise CheckpointError(f"{misfit}, but there are {len(weights)} tensors")
    try:
        with torch.device("meta"):  # without spending time and random numbers on weights that are replaced next
            if model.method == "augmented":
                networks = build_augmented(model)
                return networks["G_A"], networks["G_B"]
            return build_generators(model)
    except (RuntimeError, TypeError, ValueError) as error:  # more than torch can count
        raise CheckpointError(f"{misfit}, model.ngf = {model.ngf}: {error}") from error


def _generator(model: ModelConfig, content: Mapping[str, Any], name: str, file: Path) -> nn.Module:
    """A generator with its weights, or what stands for one that the checkpoint lacks. Raises CheckpointError."""
    if name not in content:
        return absent_generator(file, name)
    generator = _unfilled_generators(model, content[name], file)[name == "G_B"]
    try:
        generator.load_state_dict({key: weight.float() for key, weight in content[name].items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: the weights of {name} do not fit its configuration: {error}") from error
    return generator


def _references(states: Mapping[str, Any], channels: Mapping[str, int], file: Path) -> dict[str, Reference]:
    """What a checkpoint holds of its training pictures, by domain; what cannot be used is left out with a warning."""
    found = {}
    for domain in channels.keys() & states.keys():
        try:
            reference = Reference.from_state(states[domain])
            if reference.channels != channels[domain]:
                raise ValueError(f"it is of pictures with {reference.channels} channels, not {channels[domain]}")
            found[domain] = reference
        except ValueError as error:
            logger.warning("%s: what its training pictures %s are like is not known: %s", file, domain, error)
    return found


def _code(generator: StyledGenerator, seed: int, domain: int) -> Tensor:
    """The random code [latent] of a seed for pictures of a domain, 0 for A."""
    (code,) = latent_draws(seed, np.zeros(1, dtype=np.int64), generator.latent, domain)
    return torch.from_numpy(code).to(generator.style.weight)


def load(
    path: str | Path,
    *,
    which: str = "latest",
    device: str = "auto",
    precision: str = "auto",
    weights: str = "auto",
) -> Translator:
    """The translator of a run folder, a checkpoint file or de-facto weights; see ``Translator.from_checkpoint``."""
    return Translator.from_checkpoint(path, which, device, precision, weights)
