"""Checkpoints: one self-describing file each, written atomically, verified when read, never unpickling code.

A checkpoint is an ordinary ``torch.save`` file of tensors and plain values, whose zip comment holds the SHA-256 of
everything before it. ``torch.load(path, weights_only=True)`` reads it like any other; ``read_checkpoint`` verifies
it first. A file is written under a temporary name, synced, and renamed, so that its name only ever shows a whole one.

In a run's folder::

    checkpoints/step-00001200.ckpt     the latest `checkpoint.keep` of these are kept
    checkpoints/epoch-0010.ckpt        the epochs of `checkpoint.milestones`, for good
    checkpoints/best.ckpt              the lowest `checkpoint.best` measure so far
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cyclegan_fast.errors import InputError

logger = logging.getLogger("cyclegan_fast.checkpoint")

FORMAT = 1
_COMMENT = b"cyclegan_fast sha256 "
_COMMENT_BYTES = len(_COMMENT) + 64
_REQUIRED = ("format", "config", "G_A", "G_B", "position")
_STEP_FILE = re.compile(r"step-(\d{8,})\.ckpt")


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file and what is wrong."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, whole or not at all.

    Raises CheckpointError naming the file when it cannot be written (full disk, no permission); what stood under
    that name before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"format": FORMAT, **content}, temporary)
        _append_checksum(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises CheckpointError when the file is missing, truncated, damaged, holds anything but tensors and plain values,
    or is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    _verify(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, which is never loaded") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"{path} is not a cyclegan_fast checkpoint: it lacks {', '.join(missing)}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {content['format']}; this version reads format {FORMAT}")
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
    elif match := re.fullmatch(r"epoch-(\d+)", which):
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
    temporary = alias.with_name(f".{alias.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(alias)
        _sync_folder(alias.parent)
    except OSError as error:
        raise CheckpointError(f"cannot keep {path.name} as {alias}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def prune(run: str | Path, keep: int) -> None:
    """Remove all but the newest ``keep`` step checkpoints, and what an interrupted write may have left."""
    for path in step_checkpoints(run)[:-keep]:
        path.unlink(missing_ok=True)
    for path in checkpoint_dir(run).glob(".*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


def _append_checksum(path: Path) -> None:
    """Store the SHA-256 of the file in its zip comment (the last field of the format) and sync it to the disk."""
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)
        if file.read(2) != b"\0\0":
            raise RuntimeError("the zip file written by torch has a comment already")
        # The digest covers the length field of the comment too, so it is written first.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        file.seek(0)
        digest = _digest(file, None)
        file.seek(0, os.SEEK_END)
        file.write(_COMMENT + digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_BYTES))
        comment = file.read()
        if not comment.startswith(_COMMENT):
            raise CheckpointError(
                f"{path} has no checksum at its end: it is cut off, or not a cyclegan_fast checkpoint"
            )
        file.seek(0)
        digest = _digest(file, size - _COMMENT_BYTES).hexdigest().encode()
    if digest != comment[len(_COMMENT) :]:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")


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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
