"""What the machine offers a process, without loading torch: rendering and decoding processes need none of it."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path


def usable_cores() -> int:
    """Number of CPU cores that this process may use: those of its affinity mask where the platform has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name: as Linux tells it, else what the platform calls it, which may be its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Names of settings in glibc's malloc.h, and what they are by default.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep what is freed for the next allocation, or no longer; returns whether it can (glibc).

    It gives large blocks back to the system at once otherwise, and every page of the next one has to be mapped and
    zeroed again: in a training step on two AVX2 cores (256 x 256, fp32) that was a sixth of the time, 180,000 to
    270,000 page faults against 55,000 (`getrusage`, two runs each). For work that asks for the same sizes again and
    again: in other work the holes between blocks of many sizes could not be used. What is kept goes back when it ends.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    mallopt(_M_MMAP_MAX, 0 if keep else _DEFAULT_MMAP_MAX)
    mallopt(_M_TRIM_THRESHOLD, -1 if keep else _DEFAULT_TRIM_THRESHOLD)
    if not keep:
        malloc_trim(ctypes.c_size_t(0))
    return True
