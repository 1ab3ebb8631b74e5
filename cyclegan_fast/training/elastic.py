"""Runs whose processes come and go: whose run it is that a folder holds, and who takes which share of a step."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclegan_fast.atomic import replacing
from cyclegan_fast.config import Config, ConfigError

__all__ = ["begun_by_this_launch", "partitioned", "shares", "sign"]

# In a run's folder: which launch of torchrun works on it.
_LAUNCH = "launch"


def launch() -> str | None:
    """What tells this launch of torchrun from all others, and stays the same when it restarts its workers.

    Its rendezvous id, or, where it was given none (as for one node), the launcher's process. None without torchrun.
    """
    chosen = os.environ.get("TORCHELASTIC_RUN_ID")
    if chosen is None:
        return None
    if chosen not in ("", "none"):
        return f"rendezvous {chosen}"
    return f"{socket.gethostname()} {os.getppid()} {_started(os.getppid())}"


def sign(run_dir: Path) -> None:
    """Note that this launch works on the run. Raises OSError."""
    with replacing(run_dir / _LAUNCH) as temporary:
        temporary.write_text(launch() or "", encoding="utf-8")


def begun_by_this_launch(run_dir: Path) -> bool:
    """Whether a worker of this launch worked on the run before, so that this one is its replacement.

    A restart alone says little: a launch that was refused because the folder holds another's run is restarted too.
    """
    try:
        signed = (run_dir / _LAUNCH).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return signed != "" and signed == launch()


def partitioned(config: Config, world_size: int, checkpoint: Mapping[str, Any] | None) -> Config:
    """The configuration with the batch and the accumulation that this number of processes shares a step by.

    The pairs of a step stay those of training.global_batch, or, where that is not set but the number of processes is
    another than in the run that is resumed, those of its checkpoint. Raises ConfigError when they cannot be shared
    equally, with the numbers of processes that could.
    """
    training = config.training
    wanted, source = training.global_batch, "training.global_batch"
    if wanted is None and checkpoint is not None:
        then = checkpoint["config"].get("training")
        if isinstance(then, dict) and (then.get("batch"), then.get("accumulate")) == (
            training.batch,
            training.accumulate,
        ):
            wanted, source = checkpoint["position"].get("pairs_per_step"), "pairs a step of the run that is resumed"
    if wanted is None or (training.global_batch is None and wanted == _pairs(config, world_size)):
        return config
    share, rest = divmod(wanted, world_size)
    if rest:
        raise ConfigError(f"{source} = {wanted}: {shares(wanted, world_size)}")
    batch = max(count for count in _divisors(share) if count <= training.batch)
    changed = dataclasses.replace(training, batch=batch, accumulate=share // batch)
    return dataclasses.replace(config, training=changed)


def shares(pairs: int, world_size: int) -> str:
    """Every training.batch x training.accumulate by which these processes can share so many pairs a step, in words."""
    share, rest = divmod(pairs, world_size)
    if rest:
        fitting = ", ".join(str(count) for count in _divisors(pairs))
        return f"{world_size} processes cannot share {pairs} pairs equally, {fitting} processes can"
    ways = ", ".join(f"{batch} x {share // batch}" for batch in _divisors(share))
    return f"with this number of processes, {world_size}, training.batch x training.accumulate can be {ways}"


def _pairs(config: Config, world_size: int) -> int:
    return config.training.batch * config.training.accumulate * world_size


def _divisors(number: int) -> list[int]:
    small = [count for count in range(1, int(number**0.5) + 1) if number % count == 0]
    return sorted({*small, *(number // count for count in small)})


def _started(pid: int) -> str:
    """When a process was started, in the system's ticks, where the system tells: its id may be given again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
