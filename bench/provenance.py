"""Where and with what a result was measured: `python bench/provenance.py` prints it as JSON."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Everything that a figure depends on and a reader cannot see; values None where unknown."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *(_as_here(word) for word in sys.orig_argv[1:])]),
        "commit": _commit(),
        "sources": _sources(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as one paragraph for a Markdown page."""
    device = f"{facts['gpu']}, driver {facts['driver']}, cuDNN {facts['cudnn']}" if facts["gpu"] else facts["cpu"]
    triton = f", Triton {facts['triton']}" if facts["triton"] else ""
    return (
        f"{device}; {facts['threads']} CPU threads ({facts['cpu_capability']}, load {facts['load']} at the start); "
        f"torch {facts['torch']}{triton}, Python {facts['python']}; commit {facts['commit']}, sources "
        f"{facts['sources']}; {facts['date']}; `{facts['command']}`"
    )


def _as_here(word: str) -> str:
    """A word of the command; a path into this project as seen from its root, which is what can be called elsewhere."""
    return word[len(str(ROOT)) + 1 :] if word.startswith(f"{ROOT}{os.sep}") else word


def _commit() -> str | None:
    """The commit, with a mark if files differ from it; None outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return f"{head} with changes" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _sources() -> str:
    """A digest of the code that is measured: it tells versions apart where there is no git."""
    digest = hashlib.sha256()
    for folder, pattern in (("cyclegan_fast", "*.py"), ("csrc", "*.*"), ("bench", "*.py")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return next((word for word in line.split() if word[0].isdigit() and "." in word), line)
    except (OSError, IndexError):
        return None


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(provenance(), indent=1))
