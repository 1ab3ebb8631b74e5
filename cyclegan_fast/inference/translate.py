"""Translating pictures with trained generators: one in memory, or a folder of photographs from file to file."""

from __future__ import annotations

import fnmatch
import glob
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cyclegan_fast.config import ConfigError, ModelConfig, from_dict, upgraded
from cyclegan_fast.data.photo import EXTENSIONS, MODES, Photo, PhotoError, open_photo, save_photo
from cyclegan_fast.device import arithmetic, resolve_device, resolve_precision
from cyclegan_fast.errors import InputError
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import CheckpointError, find_checkpoint, read_checkpoint

DIRECTIONS = ("AtoB", "BtoA")
# File formats by name, as `format` takes them.
FORMATS = ("jpg", "jpeg", "png", "tif", "tiff", "webp", "avif", "heic", "heif", "bmp")

Pixels = npt.NDArray[np.uint8]
_PictureLike = str | Path | Image.Image | Pixels | Tensor

# The suffix an output gets for an input's, where it is not the same. Phones' HEIC becomes what everything can show.
_SUFFIXES = {".heic": ".jpg", ".heif": ".jpg", ".ppm": ".png", ".pgm": ".png"}
_WITH_ALPHA = frozenset((".png", ".tif", ".tiff", ".webp", ".avif"))


class TranslationError(InputError):
    """A picture that could not be translated: too large for the memory, or a result that is not finite."""


class Translator:
    """Two trained generators, ready to run: on their device, in channels-last order, in evaluation mode.

    ``G_A`` translates A to B, ``G_B`` B to A (the paper's G and F), each mapping float [N, C, H, W] in [-1, 1] to the
    same H and W. The modules are taken over, not copied: they are moved, set to evaluation and stop taking gradients.
    ``device`` and ``precision`` are as in ``resolve_device`` and ``resolve_precision``, which say what they raise;
    ``auto`` computes in bf16 (fp32 weights, autocast) where the hardware multiplies in it.
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
    ) -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.channels_A, self.channels_B = channels_A, channels_B
        self.G_A, self.G_B = self._prepare(G_A), self._prepare(G_B)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, which: str = "latest", device: str = "auto", precision: str = "auto"
    ) -> Translator:
        """The generators of a checkpoint file, or of a run folder's ``latest``, ``best`` or ``epoch-N`` checkpoint.

        Raises CheckpointError when it is missing, damaged, or its weights and its configuration do not belong
        together.
        """
        file = find_checkpoint(Path(path), which)
        content = read_checkpoint(file)
        try:
            model = from_dict(upgraded(content["config"])).model
        except ConfigError as error:
            raise CheckpointError(f"{file} holds a configuration that this version cannot use: {error}") from error
        generators = _unfilled_generators(model, content["G_A"], file)
        for name, generator in zip(("G_A", "G_B"), generators, strict=True):
            weights = {key: weight.float() for key, weight in content[name].items()}
            try:
                generator.load_state_dict(weights, assign=True)
            except RuntimeError as error:
                raise CheckpointError(f"{file}: the weights of {name} do not fit its configuration: {error}") from error
        G_A, G_B = generators
        A, B = model.channels_A, model.channels_B
        return cls(G_A, G_B, channels_A=A, channels_B=B, device=device, precision=precision)

    def channels(self, direction: str) -> tuple[int, int]:
        """Channels of the input and of the output of a direction. Raises InputError unless it is AtoB or BtoA."""
        if direction not in DIRECTIONS:
            raise InputError(f"direction {direction!r} is not one of {', '.join(DIRECTIONS)}")
        pair = (self.channels_A, self.channels_B)
        return pair if direction == "AtoB" else pair[::-1]

    @overload
    def translate(
        self, image: str | Path | Image.Image, direction: str = ..., *, truncate: bool = ...
    ) -> Image.Image: ...
    @overload
    def translate(self, image: Pixels, direction: str = ..., *, truncate: bool = ...) -> Pixels: ...
    @overload
    def translate(self, image: Tensor, direction: str = ..., *, truncate: bool = ...) -> Tensor: ...
    def translate(self, image: _PictureLike, direction: str = "AtoB", *, truncate: bool = False) -> Any:
        """Translate a whole picture; the result is of the same kind and of exactly the same size.

        * a path: the photograph, upright and in sRGB (``open_photo``); gives a PIL image
        * a PIL image of 8 bits a channel, its pixels taken as sRGB as they lie; alpha that the network does not take
          is laid over white; gives a PIL image of mode ``MODES[channels]``
        * a uint8 array [H, W, C] (or [H, W] for one channel); gives the same
        * a floating-point tensor [N, C, H, W] in [-1, 1]; gives one of the same dtype on the same device

        8-bit results are rounded; ``truncate`` cuts off the fraction instead, as the de-facto implementation does
        (tensors have nothing to cut off).

        Raises PhotoError for a file that cannot be used, ValueError for a wrong shape, dtype, mode or direction, and
        TranslationError when memory runs out (naming the size) or the result is not finite.
        """
        return self._run(image, direction, 1, truncate)[0]

    @overload
    def cycle(self, image: str | Path | Image.Image, direction: str = ...) -> tuple[Image.Image, Image.Image]: ...
    @overload
    def cycle(self, image: Pixels, direction: str = ...) -> tuple[Pixels, Pixels]: ...
    @overload
    def cycle(self, image: Tensor, direction: str = ...) -> tuple[Tensor, Tensor]: ...
    def cycle(self, image: _PictureLike, direction: str = "AtoB") -> Any:
        """Translate there and back: (generated, reconstructed), both as ``translate`` gives them.

        The way back starts from the unrounded result, as in the cycle loss of the training.
        """
        return self._run(image, direction, 2, truncate=False)

    def _prepare(self, generator: nn.Module) -> nn.Module:
        generator = generator.eval().requires_grad_(False)
        # mypy knows only the signatures of Module.to that have no memory format.
        moved: nn.Module = generator.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return moved

    def _run(self, image: _PictureLike, direction: str, passes: int, truncate: bool) -> tuple[Any, ...]:
        """The results of one or two passes, each as the kind of picture that came in."""
        channels = self.channels(direction)
        batch, restore = _as_batch(image, channels[0], truncate)
        networks = (self.G_A, self.G_B) if direction == "AtoB" else (self.G_B, self.G_A)
        height, width = batch.shape[2:]
        self._refuse_too_large(networks[0], batch)
        try:
            outputs = self._forward(networks[:passes], batch)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            outputs = []
        if not outputs:  # raised here, where no traceback keeps the activations alive
            raise self._too_large(height, width)
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise TranslationError(
                f"the translation of a {width} x {height} picture is not finite in {self.precision}: "
                "use precision fp32, and if that gives the same, an earlier checkpoint"
            )
        return tuple(restore(output) for output in outputs)

    @torch.inference_mode()
    def _forward(self, networks: Sequence[nn.Module], batch: Tensor) -> list[Tensor]:
        """uint8 or floating-point [N, C, H, W] through one network after the other: each output, float32."""
        x = batch.to(self.device)
        x = x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()
        x = x.contiguous(memory_format=torch.channels_last)
        outputs = []
        with arithmetic(self.precision, self.device):
            for network in networks:
                x = network(x).float()
                outputs.append(x)
        return outputs

    def _refuse_too_large(self, network: nn.Module, batch: Tensor) -> None:
        """Raise before a CPU starts to swap, or the system ends the process, over a picture that cannot fit.

        The bound is a low one: the first convolution's output and its normalisation, at full resolution.
        """
        available = _available_memory() if self.device.type == "cpu" else None
        filters = next((weight.shape[0] for weight in network.parameters() if weight.ndim == 4), 0)
        count, _, height, width = batch.shape
        needed = 2 * count * filters * height * width * (2 if self.precision == "bf16" else 4)
        if available is not None and needed > available:
            raise self._too_large(
                height, width, f"at least {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB is free"
            )

    def _too_large(self, height: int, width: int, why: str = "") -> TranslationError:
        return TranslationError(
            f"not enough memory on {self.device} for a {width} x {height} picture in {self.precision}"
            f"{': it takes ' + why if why else ''}; shrink the picture or free memory"
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
            return build_generators(model)
    except (RuntimeError, TypeError, ValueError) as error:  # more than torch can count
        raise CheckpointError(f"{misfit}, model.ngf = {model.ngf}: {error}") from error


def load(path: str | Path, *, which: str = "latest", device: str = "auto", precision: str = "auto") -> Translator:
    """The translator of a run folder or a checkpoint file; see ``Translator.from_checkpoint``."""
    return Translator.from_checkpoint(path, which, device, precision)


@dataclass(frozen=True)
class Result:
    """What became of a batch of files: those written, and inputs that failed with the reason."""

    done: list[Path]
    failed: list[tuple[Path, str]]


def translate_files(
    translator: Translator,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    direction: str = "AtoB",
    suffix: str = "",
    format: str | None = None,  # noqa: A002 - the word users know
    quality: int = 95,
    overwrite: bool = False,
    truncate: bool = False,
    progress: bool = True,
) -> Result:
    """Translate photographs from files to files of the same size, with their EXIF.

    ``inputs`` are files, folders (all pictures inside, hidden ones left out) and glob patterns; below folders and the
    fixed part of a pattern, sub-folders are kept. What lies in ``out_dir`` is not taken up when that is inside one of
    the folders. An output is named after its input, with ``suffix`` added to the stem, in the input's format or the
    one named by ``format`` (one of FORMATS); HEIC becomes JPEG, and pictures with alpha become PNG where the input's
    format has none. ``quality`` (1 to 100) is that of lossy formats; ``truncate`` is as in ``Translator.translate``.

    A file that fails does not stop the others. Refused for their file alone are also an output that exists (without
    ``overwrite``), one that another input writes already, one that is itself among the inputs, and one that a link
    would lead out of ``out_dir``. Links to folders are not followed below folders and by ``**``. The next picture is
    decoded and the last one encoded while the network runs; three pictures at most are held.

    Raises InputError for a wrong direction, format, quality or suffix, for no inputs at all, and when ``out_dir``
    cannot be created.
    """
    translator.channels(direction)
    _check_options(inputs, suffix, format, quality)
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"cannot create the output folder {out}: {getattr(error, 'strerror', error)}") from error
    found, failed = _collect(inputs, out)
    alpha = translator.channels(direction)[1] in (2, 4)
    jobs, refused = _plan(found, out, lambda name: _output_name(name, suffix, format, alpha), overwrite)
    result = Result([], failed + refused)
    with tqdm(total=len(jobs), unit="picture", file=sys.stderr, disable=not progress, dynamic_ncols=True) as bar:
        for job, reason in _translate_jobs(translator, jobs, direction, truncate, quality):
            if reason is None:
                result.done.append(job.target)
            else:
                result.failed.append((job.source, reason))
            bar.update()
    return result


@dataclass(frozen=True)
class _Job:
    source: Path
    target: Path


def _translate_jobs(
    translator: Translator, jobs: Sequence[_Job], direction: str, truncate: bool, quality: int
) -> Iterator[tuple[_Job, str | None]]:
    """Each job with None, or why it failed, in order. One thread reads ahead by one picture, another writes behind."""
    channels = translator.channels(direction)[0]
    saving: tuple[_Job, Future[None]] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for job, reading in _read_ahead(reader, jobs, channels):
            reason = ""
            try:
                photo = reading.result()
                image = translator.translate(photo.image, direction, truncate=truncate)
            except (ValueError, OSError, MemoryError) as error:
                reason = _reason(error)
            if saving is not None:
                yield saving[0], _outcome(saving[1])
                saving = None
            if reason:
                yield job, reason
            else:
                saving = job, writer.submit(_save, image, job.target, photo, quality)
        if saving is not None:
            yield saving[0], _outcome(saving[1])


def _read_ahead(
    reader: ThreadPoolExecutor, jobs: Sequence[_Job], channels: int
) -> Iterator[tuple[_Job, Future[Photo]]]:
    """Each job with its photograph to come; that of the next job is under way by then, and no more."""
    ahead = [reader.submit(open_photo, job.source, channels) for job in jobs[:1]]
    for index, job in enumerate(jobs):
        reading = ahead.pop()
        ahead += [reader.submit(open_photo, after.source, channels) for after in jobs[index + 1 : index + 2]]
        yield job, reading


def _save(image: Image.Image, target: Path, photo: Photo, quality: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    save_photo(image, target, like=photo, quality=quality)


def _outcome(saving: Future[None]) -> str | None:
    try:
        saving.result()
    except (ValueError, OSError, MemoryError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PhotoError) else str(error) or type(error).__name__


def _check_options(inputs: Sequence[str | Path], suffix: str, file_format: str | None, quality: int) -> None:
    if isinstance(inputs, (str, Path)):
        raise InputError(f"inputs must be a list of files, folders and patterns, not the single {str(inputs)!r}")
    if not inputs:
        raise InputError("inputs is empty: name at least one file, folder or pattern")
    if file_format is not None and file_format not in FORMATS:
        raise InputError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise InputError(f"quality = {quality!r} is not allowed: an integer from 1 to 100")
    if "/" in suffix or os.sep in suffix or "\0" in suffix:
        raise InputError(f"suffix {suffix!r} is not allowed: it is added to a file's name and cannot hold a path")


def _collect(inputs: Sequence[str | Path], out: Path) -> tuple[list[tuple[Path, Path]], list[tuple[Path, str]]]:
    """(picture, its path relative to the folder it was found in) for all inputs; and the inputs that give none."""
    found: list[tuple[Path, Path]] = []
    failed: list[tuple[Path, str]] = []
    for item in inputs:
        try:
            here, reason = _found_by(Path(item).expanduser(), out, failed)
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, of an unknown user
            here, reason = [], f"no such file or folder: {getattr(error, 'strerror', None) or error}"
        found += here
        if not here:
            failed.append((Path(item), reason))
    return list(dict.fromkeys(found)), failed


def _found_by(path: Path, out: Path, failed: list[tuple[Path, str]]) -> tuple[list[tuple[Path, Path]], str]:
    """The pictures meant by one input, and what to say if there are none."""
    if path.is_dir():
        return _below(path, path, out, failed), "no pictures in this folder"
    if path.exists():  # a name may hold [brackets] and still be that of a file
        return [(path, Path(path.name))], ""
    if not glob.has_magic(str(path)):
        return [], "no such file or folder"
    first = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
    if ".." in path.parts[first:]:
        return [], "`..` cannot follow a wildcard: outputs would leave the output folder"
    return _matching(path, first, out, failed), "no picture matches this pattern"


def _below(folder: Path, base: Path, out: Path, failed: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The pictures below a folder with their paths relative to ``base``, sorted; what it cannot read is a failure."""

    def unreadable(error: OSError) -> None:
        failed.append((Path(error.filename or folder), f"cannot read this folder: {error.strerror}"))

    skipped = _output_inside(out, base)
    pictures: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        folders[:] = [name for name in folders if name[0] != "." and _real(here / name) != skipped]
        pictures += [here / name for name in files if name[0] != "." and Path(name).suffix.lower() in EXTENSIONS]
    return sorted((path, path.relative_to(base)) for path in pictures)


def _matching(pattern: Path, first: int, out: Path, failed: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The pictures that match a pattern, and those below the folders that do. ``first``: its first part with magic."""
    base = Path(*pattern.parts[:first])
    skipped = _output_inside(out, base)
    found: list[tuple[Path, Path]] = []
    for match in sorted(set(_expanded(base, pattern.parts[first:]))):
        resolved = _real(match)
        if skipped is not None and (resolved == skipped or skipped in resolved.parents):
            continue
        if match.is_dir():
            found += _below(match, base, out, failed)
        elif match.suffix.lower() in EXTENSIONS:
            found.append((match, match.relative_to(base)))
    return found


def _expanded(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What matches the parts of a pattern below a folder; hidden names only by parts that begin with a dot.

    Unlike that of ``glob``, the `**` here follows no links: two links to their own folder are enough for 2**40 paths.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        rest = rest[next((i for i, later in enumerate(rest) if later != "**"), len(rest)) :]
        if not rest:
            yield folder  # and with it all that is below
            return
        for parent, folders, _ in os.walk(folder):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            yield from _expanded(Path(parent), rest)
    elif glob.has_magic(part):
        names = fnmatch.filter((item.name for item in folder.iterdir()), part) if folder.is_dir() else []
        for name in names:
            if name[0] != "." or part[0] == ".":
                yield from _expanded(folder / name, rest)
    elif os.path.lexists(folder / part):
        yield from _expanded(folder / part, rest)


def _real(path: Path) -> Path:
    """The path without links, as far as they lead somewhere: ``Path.resolve`` raises for a link to itself."""
    return Path(os.path.realpath(path))


def _output_inside(out: Path, folder: Path) -> Path | None:
    """The output folder, resolved, if it lies inside a folder (and is not that folder itself)."""
    resolved = _real(out)
    return resolved if _real(folder) in resolved.parents else None


def _output_name(name: Path, suffix: str, file_format: str | None, alpha: bool) -> Path:
    """Relative path of the output for the relative path of an input."""
    if file_format is not None:
        ending = f".{file_format}"
    else:
        known = name.suffix.lower() in EXTENSIONS
        ending = _SUFFIXES.get(name.suffix.lower(), name.suffix) if known else ".jpg"
        if alpha and ending.lower() not in _WITH_ALPHA:
            ending = ".png"
    return name.with_name(f"{name.stem}{suffix}{ending}")


def _plan(
    found: Sequence[tuple[Path, Path]], out: Path, output_name: Callable[[Path], Path], overwrite: bool
) -> tuple[list[_Job], list[tuple[Path, str]]]:
    """Which input writes which output, and the inputs whose output must not be written."""
    sources = {_real(source) for source, _ in found}
    inside = _real(out)
    writers: dict[Path, Path] = {}
    jobs: list[_Job] = []
    refused: list[tuple[Path, str]] = []
    for source, name in found:
        target = out / output_name(name)
        writer = writers.setdefault(_real(target), source)
        if writer is not source and _real(writer) == _real(source):
            continue  # named twice in different words
        reason = f"its output {target} is that of {writer} already" if writer is not source else None
        if reason is None and not _real(target.parent).is_relative_to(inside):
            reason = f"its output {target} lies outside of {out}: a link leads to {_real(target.parent)}"
        reason = reason or _obstacle(source, target, sources, overwrite)
        if reason is None:
            jobs.append(_Job(source, target))
        else:
            refused.append((source, reason))
    return jobs, refused


def _obstacle(source: Path, target: Path, sources: set[Path], overwrite: bool) -> str | None:
    """Why what stands, or does not stand, under the output's name forbids to write it."""
    try:
        exists = target.exists()
        if exists and target.samefile(source):
            return f"its output {target} would replace the input itself: use another folder or a suffix"
        if _real(target) in sources:
            return f"its output {target} would replace another input: use another folder or a suffix"
    except OSError as error:
        return f"its output {target} cannot be written: {error.strerror}"
    if exists and not overwrite:
        return f"its output {target} exists already; overwriting was not asked for"
    return None


def _as_batch(image: _PictureLike, channels: int, truncate: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A picture of any kind as uint8 or floating point [N, C, H, W], and the way back for results of the network."""
    if isinstance(image, Tensor):
        # A copy: tensors made in inference mode cannot take part in autograd later.
        return _checked_tensor(image, channels), lambda y: y.to(device=image.device, dtype=image.dtype, copy=True)
    if isinstance(image, (str, Path)):
        image = open_photo(image, channels).image
    if isinstance(image, Image.Image):
        pixels = np.array(_in_mode(image, channels))
        return _pixels_to_batch(pixels, channels), lambda y: Image.fromarray(_to_pixels(y, truncate))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a picture is a path, a PIL image, an array or a tensor, not a {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(f"the array has dtype {image.dtype}; it must be uint8 with values from 0 to 255")
    flat = image.ndim == 2
    return _pixels_to_batch(image, channels), lambda y: _like_array(_to_pixels(y, truncate), flat)


def _checked_tensor(image: Tensor, channels: int) -> Tensor:
    shape = list(image.shape)
    if not image.is_floating_point():
        raise ValueError(f"the tensor has dtype {image.dtype}; it must be floating point with values in [-1, 1]")
    if image.ndim != 4 or image.shape[1] != channels or 0 in shape:
        raise ValueError(f"the tensor has shape {shape}; this direction takes [N, {channels}, H, W]")
    return image.detach()


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image in ``MODES[channels]``, with alpha over white where there is no channel for it."""
    mode = MODES[channels]
    if image.mode == mode and not ("A" not in mode and image.has_transparency_data):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"the image has mode {image.mode!r}, whose range is unknown: give the path of its file, or 8 bits a channel"
        )
    if "A" not in mode and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _pixels_to_batch(pixels: Pixels, channels: int) -> Tensor:
    """uint8 [H, W, C], or [H, W], to [1, C, H, W] in channels-last order."""
    shape = list(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.size == 0:
        or_flat = " or [H, W]" if channels == 1 else ""
        raise ValueError(f"the picture has shape {shape}; this direction takes [H, W, {channels}]{or_flat}")
    # A copy: arrays may be read-only or mirrored, which torch does not take.
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]


def _to_pixels(output: Tensor, truncate: bool) -> Pixels:
    """[1, C, H, W] float32 in [-1, 1] to uint8 [H, W, C], or [H, W] for one channel; rounded unless ``truncate``."""
    scaled = output[0].permute(1, 2, 0).add(1).div_(2).mul_(255)
    scaled = scaled if truncate else scaled.round_()
    pixels: Pixels = scaled.clamp_(0, 255).to(torch.uint8).cpu().numpy()
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def _like_array(pixels: Pixels, flat: bool) -> Pixels:
    """Gray stays [H, W] if the input was, and is [H, W, 1] otherwise."""
    return pixels[:, :, None] if pixels.ndim == 2 and not flat else pixels


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and oneDNN have no exception of their own.
    words = ("can't allocate memory", "not enough memory", "could not create a memory", "out of memory")
    return any(word in str(error).lower() for word in words)


def _available_memory() -> int | None:
    """Bytes that new allocations can get without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
