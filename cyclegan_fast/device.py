"""The device and the arithmetic a network runs with, resolved in one place for training and for inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from cyclegan_fast.errors import InputError
from cyclegan_fast.machine import usable_cores

__all__ = ["AUTOCAST", "PRECISIONS", "arithmetic", "resolve_device", "resolve_precision", "usable_cores"]

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
# The type that a resolved precision casts to; the others cast nothing.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """The device meant by ``auto`` (CUDA when there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises InputError for any other name, and for CUDA devices that this machine or this build of torch lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "finds no usable GPU" if torch.version.cuda or torch.version.hip else "is a build for CPUs only"
        raise InputError(f"device {device!r} is not there: torch {torch.__version__} {why}; use `auto` or `cpu`")
    if resolved.index is not None and resolved.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device {device!r} is not there: this machine has {count}, cuda:0 to cuda:{count - 1}")
    return resolved


def resolve_precision(precision: str, device: torch.device) -> str:
    """``fp32``, ``tf32``, ``bf16`` or ``fp16``: what ``precision`` means on ``device``.

    ``auto`` is bf16 where the hardware multiplies in bf16 (CUDA of capability 8 and above; CPUs with AMX or
    AVX512-BF16), else fp16 on CUDA, else fp32. Raises InputError for unknown names, and for tf32 and fp16 on a CPU.
    """
    if precision not in PRECISIONS:
        raise InputError(f"training.precision = {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise InputError(
            f"training.precision = {precision!r} needs a CUDA device, not {device.type}: use auto, fp32 or bf16"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run the block's convolutions in a *resolved* precision: autocast for bf16 and fp16, cuDNN's switch for the rest.

    torch lets cuDNN round fp32 convolutions to TF32 by default; here fp32 means fp32. The switch belongs to the whole
    process, so what stood there is put back afterwards, and CPU devices never touch it.
    """
    if precision in AUTOCAST:
        with torch.autocast(device.type, dtype=AUTOCAST[precision]):
            yield
        return
    if device.type != "cuda":
        yield
        return
    before = _tf32_switches()
    try:
        wanted = "tf32" if precision == "tf32" else "ieee"
        _set_tf32_switches(precision == "tf32", wanted, wanted)
        yield
    finally:
        _set_tf32_switches(*before)


def _tf32_switches() -> tuple[bool | None, str, str]:
    """cuDNN's switches: torch's older one (None where it is at odds with the others), and for conv and rnn."""
    cudnn: Any = torch.backends.cudnn
    try:
        older = bool(cudnn.allow_tf32)
    except RuntimeError:
        older = None
    return older, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


def _set_tf32_switches(older: bool | None, conv: str, rnn: str) -> None:
    """Set all three, as parts of torch read the older one and raise when it does not agree with the others."""
    cudnn: Any = torch.backends.cudnn
    if older is not None:
        cudnn.allow_tf32 = older
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn


def _cpu_multiplies_bf16() -> bool:
    # Private names of torch: absent in some version or on some platform means "not known to", hence fp32.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)
