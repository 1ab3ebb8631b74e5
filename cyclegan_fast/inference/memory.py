"""How much memory there is, sizes of it in words, and whether an error says that it was not enough."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cyclegan_fast.errors import InputError

__all__ = ["available_memory", "is_out_of_memory", "parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and oneDNN have no exception of their own.
    words = ("can't allocate memory", "not enough memory", "could not create a memory", "out of memory")
    return any(word in str(error).lower() for word in words)


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that new allocations can get on a device, or None where the system does not say.

    On the CPU without swapping, and within the limits of the process's control groups (a container's); on CUDA what
    the driver has free and what torch keeps unused.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [*_group_memory(), *_system_memory()]
    return min(known, default=None)


def _system_memory() -> list[int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return []


def _group_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group (version 2) around this process leaves: its limit less what it cannot give up."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    left = []
    for group in (root / path, *(root / path).parents):
        try:
            used = int((group / "memory.current").read_text(encoding="ascii"))
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="ascii"), re.M)
            left.append(
                int((group / "memory.max").read_text(encoding="ascii")) - used + int(cached[1] if cached else 0)
            )
        except (OSError, ValueError):  # no limit ("max"), or no such file at the root
            pass
        if group == root:
            break
    return [max(bytes_left, 0) for bytes_left in left]


def parse_size(text: str) -> int:
    """Bytes of ``4GB``, ``512 MiB``, ``1.5G`` or a plain number. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?)B?\s*", text, re.I)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise InputError(f"{text!r} is not a size of memory such as 4GB, 512MB or 1.5GiB")
    return int(float(found[1]) * unit)
