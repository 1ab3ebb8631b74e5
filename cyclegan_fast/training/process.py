"""What belongs to the whole process while a run goes on: signals and torch's global settings."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from cyclegan_fast import distributed
from cyclegan_fast.config import Config
from cyclegan_fast.device import AUTOCAST, arithmetic, resolve_precision
from cyclegan_fast.machine import keep_freed_memory, usable_cores

# A launcher passes on a signal that its workers got themselves, as when a job scheduler or a terminal signals them all:
# within this time, in seconds, it is one request.
_ONE_REQUEST = 3.0


@dataclass
class Stop:
    """The signal that asked for an end, if any."""

    signum: int | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a request to stop after the step; a later one acts as it did before, at once."""
    stop = Stop()
    since = 0.0

    def request(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        nonlocal since
        if stop.signum is None:
            stop.signum, since = signum, time.monotonic()
        elif time.monotonic() - since > _ONE_REQUEST:
            signal.signal(signum, previous[signum])
            signal.raise_signal(signum)

    with _handled(request) as previous:
        yield stop


@contextlib.contextmanager
def stopped_by_signals(error: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise ``error(signum)`` at SIGTERM and SIGINT: for when there is nothing to finish, but something to tidy up."""
    since: float | None = None

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        nonlocal since
        if since is None or time.monotonic() - since > _ONE_REQUEST:
            since = time.monotonic()
            raise error(signum)

    with _handled(stop):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Handle SIGTERM and SIGINT; yields the handlers before, which come back at the end."""
    previous: dict[int, Any] = {}
    try:
        for wanted in (signal.SIGTERM, signal.SIGINT):
            previous[wanted] = signal.signal(wanted, handler)
    except ValueError:  # not in the main thread: whoever runs us there keeps the signals
        previous.clear()
    try:
        yield previous
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


@contextlib.contextmanager
def process_settings(config: Config, device: torch.device) -> Iterator[None]:
    """The settings of torch and of the C library that belong to the process, for the duration of a run."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    precision = resolve_precision(config.training.precision, device)
    torch.set_num_threads(config.training.threads or max(1, usable_cores() // distributed.local_world_size()))
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.training.deterministic)
    torch.backends.cudnn.benchmark = not config.training.deterministic
    on_cpu = device.type == "cpu"  # on CUDA torch keeps freed memory by itself
    if on_cpu:
        keep_freed_memory()
    try:
        # Autocast is the step's own affair; here only the switch between fp32 and TF32 convolutions is set.
        with contextlib.nullcontext() if precision in AUTOCAST else arithmetic(precision, device):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        if on_cpu:
            keep_freed_memory(False)
