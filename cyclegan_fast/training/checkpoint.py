"""Checkpoints: one self-describing file each, written atomically, verified when read, never unpickling code.

A checkpoint is an ordinary ``torch.save`` file of tensors and plain values, whose zip comment holds the SHA-256 of
everything before it. A file is written under a temporary name, synced, and renamed, so that its name only ever shows a
whole one.

``torch.load(path, weights_only=True)`` reads it like any other. ``read_checkpoint`` does not use it, nor pickle: a
checksum tells of damage, not of malice, and a file that was made to harm may decompress without end, ask for
allocations of any size, or hold values of the wrong kind in every place. It is taken apart here instead, by the few
instructions that ``torch.save`` writes, and can become nothing but dictionaries, lists, tuples, numbers, text and
tensors, which together take no more memory than a small multiple of the file.

In a run's folder::

    checkpoints/step-00001200.ckpt     the latest `checkpoint.keep` of these are kept
    checkpoints/epoch-0010.ckpt        the epochs of `checkpoint.milestones`, for good
    checkpoints/best.ckpt              the best by the `checkpoint.best` measure so far
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cyclegan_fast.atomic import replacing
from cyclegan_fast.errors import InputError
from cyclegan_fast.tensor_file import Archive, Refused, check_directory, physical_memory

logger = logging.getLogger("cyclegan_fast.checkpoint")

FORMAT = 1
_COMMENT = b"cyclegan_fast sha256 "
_COMMENT_BYTES = len(_COMMENT) + 64
_REQUIRED = ("format", "config", "position")
_STEP_FILE = re.compile(r"step-(\d{8,})\.ckpt")


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file and what is wrong."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, whole or not at all.

    Raises CheckpointError naming the file when it cannot be written (full disk, no permission); what stood under
    that name before is then still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save({"format": FORMAT, **content}, temporary)
            _append_checksum(temporary)
    except (OSError, RuntimeError, Refused) as error:  # torch reports a failed write as RuntimeError
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error


def read_checkpoint(path: str | Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises CheckpointError when the file is missing, truncated, damaged, too large for the memory, holds anything but
    tensors and plain values, or is not a checkpoint of this project: lacks a part, or has one of the wrong kind. What
    a caller does not use may be missing; what is there is of the right kind.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            _verify(path, file)
            content = Archive(file).load(map_location)
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{path} {error}") from None
    except MemoryError as error:
        raise CheckpointError(f"{path} cannot be read: there is not enough memory for it") from error
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    missing = [
        key
        for key in (*_REQUIRED[:2], *_generators(content), *_REQUIRED[2:])
        if not isinstance(content, dict) or key not in content
    ]
    if missing:
        raise CheckpointError(f"{path} is not a cyclegan_fast checkpoint: it lacks {', '.join(missing)}")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        found = _kind(content["format"])
        raise CheckpointError(f"{path} has checkpoint format {found}; this version reads format {FORMAT}")
    for key, (is_right, right) in _PARTS.items():
        if key in content and not is_right(content[key]):
            raise CheckpointError(f"{path}: its {key} is not {right}, but {_kind(content[key])}")
    for key, networks in _TRAINED_BY.items():
        if key in content and not _fits(content[key], [content.get(name) for name in networks]):
            raise CheckpointError(f"{path}: its {key} has moments of other shapes than the weights of its networks")
    result: dict[str, Any] = content
    return result


def checkpoint_dir(run: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run) / "checkpoints"


def step_checkpoints(run: str | Path) -> list[Path]:
    """The run's ``step-*.ckpt`` files, oldest first."""
    folder = checkpoint_dir(run)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(run_or_file: str | Path, which: str = "latest") -> Path:
    """The checkpoint file meant by a run folder and ``latest``, ``best`` or ``epoch-N``; a file is taken as it is.

    Raises CheckpointError listing what there is.
    """
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no run folder or checkpoint {path}")
    steps = step_checkpoints(path)
    wanted: Path | None = None
    if which == "latest":
        wanted = steps[-1] if steps else None
    elif which == "best":
        wanted = checkpoint_dir(path) / "best.ckpt"
    elif match := re.fullmatch(r"epoch-(\d{1,9})", which):
        wanted = milestone_path(path, int(match[1]))
    else:
        raise CheckpointError(f"checkpoint {which!r} is not one of latest, best, epoch-N")
    if wanted is None or not wanted.is_file():
        folder = checkpoint_dir(path)
        there = ", ".join(sorted(item.name for item in folder.glob("*.ckpt"))) if folder.is_dir() else ""
        raise CheckpointError(f"{path} has no `{which}` checkpoint; there is {there or 'none at all'}")
    return wanted


def read_latest(run: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole, or None if the run has none.

    A damaged one is passed over with a warning that names it. Raises CheckpointError if there are some but all are
    damaged.
    """
    candidates = step_checkpoints(run)[::-1]
    for path in candidates:
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before it", error)
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {checkpoint_dir(run)} can be read")
    return None


def step_path(run: str | Path, step: int) -> Path:
    """File of the checkpoint after ``step`` optimiser steps."""
    return checkpoint_dir(run) / f"step-{step:08d}.ckpt"


def milestone_path(run: str | Path, epoch: int) -> Path:
    """File of the checkpoint kept for good after ``epoch`` epochs."""
    return checkpoint_dir(run) / f"epoch-{epoch:04d}.ckpt"


def keep_also_as(path: Path, alias: Path) -> None:
    """Give a checkpoint a second name that survives ``prune``: a hard link where there are such, else a copy."""
    try:
        with replacing(alias) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot keep {path.name} as {alias}: {error}") from error


def prune(run: str | Path, keep: int) -> None:
    """Remove all but the newest ``keep`` step checkpoints, and what an interrupted write may have left."""
    _remove(step_checkpoints(run)[:-keep])
    remove_unfinished(run)


def remove_unfinished(run: str | Path) -> None:
    """Remove what an interrupted `replacing` may have left. No other process may be writing there."""
    _remove([*checkpoint_dir(run).glob(".*.ckpt.*.tmp"), *Path(run).glob(".*.tmp")])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # what cannot be removed, a folder of that name say, is no reason to stop
            path.unlink()


def set_aside(run: str | Path, latest: Path) -> None:
    """Rename the step checkpoints newer than ``latest``, which were found damaged, to ``*.ckpt.damaged``.

    Otherwise they would count among the newest, and ``prune`` would remove whole ones for them. Raises CheckpointError.
    """
    steps = step_checkpoints(run)
    for path in steps[steps.index(latest) + 1 :]:
        try:
            path.replace(path.with_name(path.name + ".damaged"))
        except OSError as error:
            raise CheckpointError(f"cannot set aside the damaged checkpoint {path}: {error}") from error
        logger.warning("%s is damaged: it was renamed to %s.damaged", path, path.name)


def _append_checksum(path: Path) -> None:
    """Store the SHA-256 of the file in its zip comment (the last field of the format)."""
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)
        if file.read(2) != b"\0\0":
            raise RuntimeError("the zip file written by torch has a comment already")
        # The digest covers the length field of the comment too, so it is written first.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        file.seek(0)
        digest = _digest(file, None)
        check_directory(file, file.seek(0, os.SEEK_END))  # or nobody would read it
        file.seek(0, os.SEEK_END)
        file.write(_COMMENT + digest.hexdigest().encode())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, if it is one that can be read to its end: opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise CheckpointError(f"there is no checkpoint {path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"there is no checkpoint {path}: it is {'a folder' if stat.S_ISDIR(mode) else 'no file'}")
    with path.open("rb") as file:
        yield file


def _verify(path: Path, file: IO[bytes]) -> None:
    """Check the end of the file, its directory and its checksum, in this order: the dearest comes last."""
    size = file.seek(0, os.SEEK_END)
    memory = physical_memory()
    file.seek(max(0, size - _COMMENT_BYTES))
    comment = file.read(_COMMENT_BYTES)
    if not comment.startswith(_COMMENT):
        raise CheckpointError(f"{path} has no checksum at its end: it is cut off, or not a cyclegan_fast checkpoint")
    if memory is not None and size > memory:
        raise Refused(f"has {size / 1e9:.0f} GB, more than this machine's memory, {memory / 1e9:.0f} GB")
    check_directory(file, size - _COMMENT_BYTES)
    file.seek(0)
    digest = _digest(file, size - _COMMENT_BYTES).hexdigest().encode()
    if digest != comment[len(_COMMENT) :]:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")


def _kind(value: Any) -> str:
    """A value of the wrong kind, in a few words."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: {str(list(value)[:3])[:99]}"
    return f"a tensor of size {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.99}"


def _is_number(value: Any, low: float = -float("inf"), kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= low


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, Tensor) and item.is_floating_point() for key, item in value.items()
    )


def _is_position(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_number(value.get("step"), 0, int)
        and all(_is_number(value.get(key, 1), 1, int) for key in ("steps_per_epoch", "pairs_per_step"))
    )


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    moments = value["state"].values()
    return (
        isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(moment, dict) and all(isinstance(m, Tensor) for m in moment.values()) for moment in moments)
    )


def _is_pools(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"A", "B"} and all(_is_pool(pool) for pool in value.values())


def _is_pool(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_number(value.get(key), 0, int) for key in ("size", "count")):
        return False
    images = value.get("images", 0)
    pictures = [] if images is None else images if isinstance(images, list) else [images]
    return all(isinstance(item, Tensor) and item.dim() == 4 and item.is_floating_point() for item in pictures)


def _is_history(value: Any) -> bool:
    """Names and values [steps, names]; in the first version a list of rows [names] instead."""
    if not isinstance(value, dict) or not isinstance(value.get("names"), list):
        return False
    rows, dim = (value.get("rows"), 1) if "rows" in value else ([value.get("values")], 2)
    return (
        all(isinstance(name, str) for name in value["names"])
        and isinstance(rows, list)
        and all(isinstance(row, Tensor) and row.is_floating_point() and row.dim() == dim for row in rows)
        and all(row.shape[-1] == len(value["names"]) for row in rows)
    )


def _is_digest(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_number(value.get(key), 0, int) for key in ("count_A", "count_B"))
        and isinstance(value.get("names"), str)
        and ("files" not in value or _is_files(value["files"], value["count_A"] + value["count_B"]))
    )


def _is_files(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == (count,)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


# The networks of all methods by their optimiser, in its order.
_TRAINED_BY = {"optimizer_G": ("G_A", "G_B", "E_A", "E_B"), "optimizer_D": ("D_A", "D_B", "D_Z_A", "D_Z_B")}
_WEIGHTS = (_is_weights, "a dictionary of floating-point tensors by name")
_OPTIMIZER = (_is_optimizer, "the state of an optimiser")
# What each part of a checkpoint must be, and that in words.
_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (_is_settings, "a dictionary of settings by name"),
    **dict.fromkeys((*_TRAINED_BY["optimizer_G"], *_TRAINED_BY["optimizer_D"], "G_A_ema", "G_B_ema"), _WEIGHTS),
    **dict.fromkeys(("optimizer_G", "optimizer_D"), _OPTIMIZER),
    "scaler": (_is_settings, "the state of a loss scaler"),
    "pools": (_is_pools, "two image pools, A and B, with size, count and pictures [N, C, H, W]"),
    "position": (_is_position, "a position: step >= 0, steps_per_epoch and pairs_per_step >= 1, all integers"),
    "best": (_is_number, "a number"),
    "best_step": (lambda value: _is_number(value, 0, int), "a step"),
    "best_measure": (lambda value: isinstance(value, str), "the name of a measure"),
    "since_best": (lambda value: _is_number(value, 0, int), "a number of measurements"),
    "history": (_is_history, "names and as many scalars a step"),
    "data": (_is_digest, "count_A, count_B and names of the pictures, and as many hashes of their files"),
    "familiarity": (_is_settings, "what was measured of the training pictures, by domain"),
    "provenance": (_is_settings, "a dictionary of words by name"),
}


def _generators(content: Any) -> tuple[str, ...]:
    """The generators that a checkpoint of its method of training must have."""
    config = content.get("config") if isinstance(content, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict) and model.get("method") == "pix2pix":
        return ("G_B",) if model.get("direction") == "BtoA" else ("G_A",)
    return "G_A", "G_B"


def _fits(optimizer: dict[str, Any], networks: list[Mapping[str, Tensor] | None]) -> bool:
    """Whether an optimiser's tensors have the shapes of their weights, which fused kernels take as given."""
    weights = [item for network in networks if network is not None for item in network.items()]
    # The vectors of a spectral norm are no parameters.
    shapes = [weight.shape for key, weight in weights if not key.endswith(("._u", "._v"))]
    for index, moments in optimizer["state"].items():
        if not isinstance(index, int) or not 0 <= index < len(shapes):
            return False
        if any(m.shape != (() if key == "step" else shapes[index]) for key, m in moments.items()):
            return False
    return True


def _digest(file: Any, length: int | None) -> hashlib._Hash:
    """SHA-256 of the next ``length`` bytes of an open file, or of all the rest."""
    digest = hashlib.sha256()
    for block in _blocks(file, length):
        digest.update(block)
    return digest


def _blocks(file: Any, length: int | None, size: int = 1 << 20) -> Iterator[bytes]:
    while block := file.read(size if length is None else min(size, length)):
        yield block
        if length is not None:
            length -= len(block)
