"""The compiled operations of csrc/, if they are built: `torch.ops.cyclegan_fast_native.*`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["available", "has_cuda", "why_not"]

_FOLDER = Path(__file__).resolve().parent.parent
_HOW = "run `make native` in the sources of the package, where a C++ compiler and torch are installed"


class _Loaded(NamedTuple):
    cpu: str  # why there is no such part; empty if there is
    cuda: str


def _load_library(name: str) -> str:
    path = _FOLDER / name
    if not path.is_file():
        return f"{path} is not built: {_HOW}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} cannot be loaded ({error}): rebuild it with the torch that is installed; {_HOW}"
    return ""


@functools.cache
def _load() -> _Loaded:
    cpu = _load_library("_C.so")
    # The CUDA part adds kernels to the operations that the first part defines.
    return _Loaded(cpu, cpu or _load_library("_C_cuda.so"))


def available() -> bool:
    """Whether the native operations are there, with their CPU kernels. Loads them at the first call."""
    return not _load().cpu


def has_cuda() -> bool:
    """Whether their CUDA kernels are there too. Needs no GPU, nor a torch with CUDA."""
    return not _load().cuda


def why_not(*, cuda: bool = False) -> str:
    """Why they (or with ``cuda`` their CUDA kernels) are missing, and what to do about it; empty if they are there."""
    return _load().cuda if cuda else _load().cpu
