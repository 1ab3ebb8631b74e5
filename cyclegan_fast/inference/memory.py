"""How much memory there is, and whether an error says that it was not enough."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["available_memory", "is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and oneDNN have no exception of their own.
    words = ("can't allocate memory", "not enough memory", "could not create a memory", "out of memory")
    return any(word in str(error).lower() for word in words)


def available_memory() -> int | None:
    """Bytes that new allocations can get without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
