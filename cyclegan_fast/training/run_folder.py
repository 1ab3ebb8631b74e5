"""The folder of a run: whose it is, what it holds when a run begins, and the settings kept in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclegan_fast import distributed
from cyclegan_fast.atomic import replacing
from cyclegan_fast.config import Config, ConfigError, to_yaml
from cyclegan_fast.errors import InputError
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import elastic
from cyclegan_fast.training.lock import run_lock

__all__ = ["RunExistsError", "locked", "prepare", "write_config"]

logger = logging.getLogger("cyclegan_fast.train")


class RunExistsError(InputError):
    """The run folder holds a run already."""


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """The run folder, for this run alone: the first process holds its lock. Raises RunLockedError, ConfigError."""
    with contextlib.ExitStack() as stack:
        with distributed.main_first():
            if distributed.is_main():
                with _writing(config):
                    stack.enter_context(run_lock(config.run_dir))
        yield


def prepare(config: Config, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """Find what to resume from, and clear away what a killed run left. Raises RunExistsError, CheckpointError."""
    run_dir = config.run_dir
    if not resume and distributed.any_rank(distributed.is_main() and elastic.begun_by_this_launch(run_dir)):
        logger.info("a restarted worker: continuing the run that this launch began")
        resume = True
    with distributed.main_first():
        found = ckpt.read_latest(run_dir) if resume else None
        if not distributed.is_main():
            return found
        ckpt.remove_unfinished(run_dir)
        if not resume and ckpt.checkpoint_dir(run_dir).is_dir() and any(ckpt.checkpoint_dir(run_dir).iterdir()):
            raise RunExistsError(
                f"{run_dir} holds a run already: continue it with --resume, or choose another `name` or `out`"
            )
        with _writing(config):
            run_dir.mkdir(parents=True, exist_ok=True)
            elastic.sign(run_dir)
        if found is not None:
            ckpt.set_aside(run_dir, found[0])
    return found


def write_config(config: Config) -> None:
    """Keep the settings with the run, whole or not at all: `--resume RUN` reads them. Raises ConfigError."""
    with _writing(config), replacing(config.run_dir / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


@contextlib.contextmanager
def _writing(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot write the folder {config.run_dir}: {error.strerror}"
        raise ConfigError(f"out = {config.out!r}: {what}") from error
