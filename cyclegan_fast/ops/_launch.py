"""What every fused operation needs to choose and launch an implementation.

Triton is optional: `triton` and `tl` are None where it is not installed, and HAS_TRITON says so. With
TRITON_INTERPRET=1 in the environment before Triton is first imported, kernels run on CPU tensors in its interpreter
(INTERPRETED): slow, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cyclegan_fast.ops import _native, _verify

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "IMPLEMENTATIONS",
    "INTERPRETED",
    "activation_code",
    "default_impl",
    "is_plain",
    "multiprocessors",
    "on_device",
    "refuse_transforms",
    "resolve_impl",
    "tl",
    "triton",
]

HAS_TRITON: bool = triton is not None
INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
IMPLEMENTATIONS = ("auto", "triton", "native", "reference")

# The numbers by which kernels know an activation; csrc uses the same.
_ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "tanh": 3}

# Compile gate and interpreter plan for the GPU that the kernels are tuned for: an H100 or H200.
_MULTIPROCESSORS_WITHOUT_GPU = 132


def activation_code(name: str | None, allowed: tuple[str | None, ...] = tuple(_ACTIVATIONS)) -> int:
    """0 for None, 1 relu, 2 leaky_relu, 3 tanh. ValueError for a name that is not in `allowed`."""
    if name not in allowed:
        raise ValueError(f"activation = {name!r} is not known: one of {', '.join(map(repr, allowed))}")
    return _ACTIVATIONS[name]


def resolve_impl(op: str, impl: str, x: Tensor, available: Mapping[str, bool]) -> str:
    """The implementation to run: "triton", "native" or "reference".

    available: which of them the op has for this call (device aside); a missing name is not there, "reference" always
    is. impl "auto" takes, on CUDA, the Triton kernel if it has been verified on that device, and on the CPU the native
    one if it is built; else the reference. Call it inside an op's kernel, where tensors are real: the verification
    runs kernels, which a tracer cannot.

    Raises ValueError, naming the reason, for an implementation that is unknown or cannot be used here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl = {impl!r} is not known: one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return impl
    if impl == "auto":
        return default_impl(op, x.device, available)
    reason = _obstacle(impl, x.device)
    if reason is None and not available.get(impl, False):
        reason = f"the op has no such implementation for this call ({x.dtype} on {x.device.type})"
    if reason is not None:
        raise ValueError(f"{op}: impl = {impl!r} cannot be used: {reason}")
    return impl


def default_impl(op: str, device: torch.device, available: Mapping[str, bool]) -> str:
    """What "auto" is on a device, given the implementations that the op has there."""
    # A native CUDA kernel is never chosen by itself: none has been measured to be faster yet.
    candidate = {"cuda": "triton", "cpu": "native"}.get(device.type, "reference")
    if candidate == "reference" or not available.get(candidate, False) or _obstacle(candidate, device) is not None:
        return "reference"
    if device.type == "cuda":
        return candidate if _verify.verified(op, candidate, device) else "reference"
    return candidate


def _obstacle(impl: str, device: torch.device) -> str | None:
    """Why no op can run `impl` on this device, or None."""
    if impl == "triton":
        if not HAS_TRITON:
            return "triton is not installed; pip install triton"
        if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
            return f"Triton kernels need CUDA tensors, not {device.type} (or TRITON_INTERPRET=1, for tests)"
        return None
    if not _native.available():
        return f"the compiled library is not there: {_native.why_not()}"
    if device.type == "cuda" and not _native.has_cuda():
        return "the compiled library was built without CUDA"
    if device.type not in ("cpu", "cuda"):
        return f"it needs CPU or CUDA tensors, not {device.type}"
    return None


def refuse_transforms(op: str) -> None:
    """RuntimeError inside torch.func transforms (vmap, grad, jvp ...), which no fused kernel supports."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f'{op} cannot be used inside torch.func transforms (vmap, grad, jvp ...): impl="reference" can'
        )


def is_plain(x: Tensor) -> bool:
    """Whether `x` is all that PyTorch's dispatcher would look at: no tracer, no subclass, no mode that wants to know.

    Then an op may be called without it, which saves an eager call most of what it costs.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which Triton launches kernels for `x`: on its GPU, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; that of an H200 for any other."""
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
