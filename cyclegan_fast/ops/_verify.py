"""Nothing unverified is a default: an implementation is chosen by itself only where it matched its reference once.

An op registers a check beside each implementation: a function of a device that runs the implementation at small
shapes, forward and backward, and raises when a result differs from the reference. `verified` runs the check the first
time somebody asks, remembers the answer for the process, and keeps a success in the user's cache folder for as long as
device, driver, torch, triton and the sources of the ops stay what they were. A failure is never kept: it is checked and
warned about again in the next process, because its cause may be gone then.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Check", "Row", "UnverifiedWarning", "register_check", "report", "verified"]

Check = Callable[[torch.device], None]


class UnverifiedWarning(RuntimeWarning):
    """An implementation differs from its reference here, or could not be checked, and is not used by itself."""


@dataclass(frozen=True)
class Row:
    """What is known of one implementation of one op on one device."""

    op: str
    impl: str
    device: str  # a name for people: "cuda:0, NVIDIA H200"
    ok: bool | None  # None: not run, because there is no such device here
    detail: str  # how it was found out, or the error


@dataclass(frozen=True)
class _Registered:
    check: Check
    devices: tuple[str, ...]


_checks: dict[tuple[str, str], _Registered] = {}
_rows: dict[tuple[str, str, torch.device], Row] = {}
_lock = threading.RLock()
_in_check = threading.local()


def register_check(op: str, impl: str, check: Check, *, devices: Sequence[str] = ("cuda",)) -> None:
    """Let `check` decide whether implementation `impl` of `op` may be chosen by itself on the given device types.

    `check(device)` runs the op with that implementation named, at shapes small enough for a fraction of a second, and
    raises any exception when a result is not the reference's. It draws its numbers from a generator of its own. It
    runs in a thread of its own, with gradients enabled and without autocast or deterministic mode, whoever asks.
    """
    _checks[op, impl] = _Registered(check, tuple(devices))


def verified(op: str, impl: str, device: torch.device) -> bool:
    """Whether implementation `impl` of `op` matched its reference on `device`; found out now if it is not known yet.

    False, with an `UnverifiedWarning` that names op and error, when the check fails or none is registered; each
    failure is warned about once in a process. While the current stream is captured into a CUDA graph nothing can be
    run: an implementation that is not known to be good is refused then, and checked at the next call outside. Within a
    check, other implementations that are not known yet are refused silently.
    """
    row = _rows.get((op, impl, device))
    if row is None:
        if getattr(_in_check, "running", False):  # the thread that asked for that check waits with the lock
            return False
        with _lock:
            row = _find_out(op, impl, device)
    return row.ok is True


def report() -> list[Row]:
    """One row for every registered implementation and device here, checking what has not been checked yet."""
    rows: list[Row] = []
    for (op, impl), registered in sorted(_checks.items(), key=lambda item: item[0]):
        for kind in registered.devices:
            devices = _devices(kind)
            if not devices:
                rows.append(Row(op, impl, kind, None, f"not run: no {kind} device here"))
            for device in devices:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UnverifiedWarning)
                    verified(op, impl, device)
                row = _rows.get((op, impl, device))
                if row is not None:
                    rows.append(row)
    return rows


def _find_out(op: str, impl: str, device: torch.device) -> Row:
    key = (op, impl, device)
    if key in _rows:  # another thread was first
        return _rows[key]
    registered = _checks.get((op, impl))
    if registered is None:
        row = Row(op, impl, _name(device), False, "no check is registered")
    else:
        environment = _environment(device)
        file = _cache_file(op, impl, environment)
        if _kept(file, environment):
            row = Row(op, impl, _name(device), True, "matched the reference before (kept)")
        elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            detail = "not checked before the capture of a CUDA graph: run one step first"
            row = Row(op, impl, _name(device), False, detail)
            _warn(row)
            return row
        else:
            row = _run(op, impl, device, registered.check)
            if row.ok:
                _keep(file, environment)
    _rows[key] = row
    if not row.ok:
        _warn(row)
    return row


def _run(op: str, impl: str, device: torch.device, check: Check) -> Row:
    """Run the check in a thread of its own.

    Who asks may be inside an op, where gradients are not recorded, under autocast, inference mode or a tracer: all of
    that belongs to the thread that asks, and a new thread starts without it. A kernel that reads outside its memory
    leaves the process without a working CUDA context; that cannot be helped from inside the process.
    """
    errors: list[Exception] = []

    def work() -> None:
        _in_check.running = True
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                check(device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:  # whatever is wrong with an implementation, the answer is not to use it
            errors.append(error)

    start = time.perf_counter()
    with _without_deterministic_mode():
        thread = threading.Thread(target=work, name=f"check of {op}")
        thread.start()
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        return Row(op, impl, _name(device), False, f"{type(errors[0]).__name__}: {errors[0]}")
    return Row(op, impl, _name(device), True, f"matches the reference (checked in {seconds:.1f} s)")


@contextlib.contextmanager
def _without_deterministic_mode() -> Iterator[None]:
    """PyTorch's own gradients of some references refuse to run in that mode, which is global to the process."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _warn(row: Row) -> None:
    warnings.warn(
        f"{row.op}: implementation {row.impl!r} is not used on {row.device}, because its check failed: {row.detail}. "
        "A slower implementation takes its place; `cyclegan-fast doctor` lists all of them.",
        UnverifiedWarning,
        stacklevel=4,
    )


def _devices(kind: str) -> list[torch.device]:
    if kind == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device(kind)]


def _name(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _environment(device: torch.device) -> dict[str, Any]:
    """Everything a check's result depends on."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        hardware = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"
    else:
        hardware = f"{device.type}: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {_processor()}"
    return {
        "device": hardware,
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "sources": _sources(),
    }


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a file of the user's
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _driver() -> str:
    """The version of the NVIDIA driver: in full where Linux tells it, else the CUDA version that it supports."""
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    getter = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {getter()}" if getter is not None else "unknown"


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _sources() -> str:
    """A digest of the sources of the ops and of the compiled library, which the package's version stands for."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in (*sorted(folder.glob("*.py")), *sorted(folder.parent.glob("_C*.so"))):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path:
    """`verified` in $CYCLEGAN_FAST_CACHE, else in `cyclegan_fast` in the user's cache folder of the platform."""
    chosen = os.environ.get("CYCLEGAN_FAST_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "verified"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cyclegan_fast" / "verified"


def _cache_file(op: str, impl: str, environment: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return _cache_folder() / f"{op}.{impl}.{digest}.json"


def _kept(file: Path, environment: dict[str, Any]) -> bool:
    """Whether `file` says that the check succeeded in this very environment; a damaged file says nothing."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(kept, dict) and kept.get("ok") is True and kept.get("environment") == environment


def _keep(file: Path, environment: dict[str, Any]) -> None:
    """Write by one rename, so that processes that check at the same time never read half a file."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    # A folder that cannot be written to costs a second in each process and nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"ok": True, "environment": environment}, indent=1), encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
