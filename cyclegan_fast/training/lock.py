"""One run a folder: a lock that ends with the process, however that ends.

The lock is the kernel's (``flock``) on the file ``.lock`` in the run's folder, which says who holds it. A killed
process leaves the file and loses the lock. NFS passes such locks on to its server, so they hold between hosts too; of
a host that died, the server keeps them until its lease runs out. Where a file system has no locks a run goes on without
one and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cyclegan_fast.errors import InputError

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None

__all__ = ["RunLockedError", "run_lock"]

logger = logging.getLogger("cyclegan_fast.train")

_NAME = ".lock"
_PATIENCE = 3.0  # seconds for a run that is just ending, or that was just killed
_POLL_SECONDS = 0.1
_OWNER_BYTES = 1000


class RunLockedError(InputError):
    """Another process is at work in the run folder; the message names folder, host and process."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Make the folder and be the only run in it for the duration of the block.

    Raises RunLockedError when another process is at work there, OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is still locked: who waits for it sees that it is gone, and makes another
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """The locked file, or None where there are no locks. Raises RunLockedError, OSError."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor, writable = _open(path)
        try:
            if _fcntl is None:
                raise OSError("this platform has no flock")
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise RunLockedError(
                    f"{path.parent} is in use by {owner}: two runs cannot share a folder. Wait for that one, or choose "
                    "another `name` or `out`"
                ) from None
            time.sleep(_POLL_SECONDS)
            continue
        except OSError as error:
            logger.warning(
                "%s: the file system has no locks (%s): nothing would keep a second run out of this folder, so see "
                "that there is none (last here: %s)",
                *(path.parent, error.strerror or error, _owner(descriptor)),
            )
            _sign(descriptor, writable)
            os.close(descriptor)
            return None
        if not _still_there(path, descriptor):  # who held it has taken the file away meanwhile
            os.close(descriptor)
        elif not writable:  # left over by another user: with the lock held, it can make room for our own
            path.unlink()
            os.close(descriptor)
        else:
            _sign(descriptor, writable)
            return descriptor


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether it can be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int, writable: bool) -> None:
    """Say in the file who is at work. A full disk is no reason not to be."""
    owner = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    if writable:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(owner).encode())


def _owner(descriptor: int) -> str:
    """Who signed the file, in words."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        owner: Any = json.loads(os.read(descriptor, _OWNER_BYTES))
        return f"process {int(owner['pid'])} on host {owner['host']!s:.99} since {owner['since']!s:.99}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that did not sign"
