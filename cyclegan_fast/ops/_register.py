"""Parts of an op's registration with torch.library that several ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclegan_fast.ops import _native

__all__ = ["cpu_capability", "refuse_derivative", "refuse_vmap", "register_autocast"]

_NAMESPACE = "cyclegan_fast"
# What is registered lives as long as this object.
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def register_autocast(op: str) -> None:
    """Under autocast, `op` runs in the reduced dtype: its tensors x, weight and bias, the first three, are cast.

    As the library does for its own convolutions: float64 stays, and what comes after those three is handed on.
    """
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(op, _cast_and_run(op, device), f"Autocast{device.upper()}")


def _cast_and_run(op: str, device: str) -> Callable[..., Any]:
    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.cyclegan_fast, op)(cast(x), cast(weight), cast(bias), *options)

    return run


def refuse_vmap(*ops: str, message: str) -> None:
    """torch.func transforms of these ops raise RuntimeError."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(message)

    for op in ops:
        torch.library.register_vmap(f"{_NAMESPACE}::{op}", refuse)


def refuse_derivative(op: str, message: str) -> None:
    """Differentiating `op` raises RuntimeError: of a gradient, or of what has none."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(message)

    torch.library.register_autograd(f"{_NAMESPACE}::{op}", refuse)


@torch.compiler.assume_constant_result
def cpu_capability() -> str:
    """What torch calls this CPU's instruction set; "" where the compiled kernels are not there."""
    return torch.backends.cpu.get_cpu_capability() if _native.available() else ""
