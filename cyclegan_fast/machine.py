"""What the machine offers, asked without loading torch: rendering and decoding processes need none of it."""

from __future__ import annotations

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
