"""Who takes part in the microbenchmarks here: our implementations that can run, and what PyTorch offers."""

from __future__ import annotations

import importlib.util

import torch
from measure import DEVICE

from cyclegan_fast.ops import _native
from cyclegan_fast.ops._launch import HAS_TRITON

CUDA = DEVICE.type == "cuda"
BATCHES = (1, 8, 16)
DTYPES = ("bfloat16",) if CUDA else ("bfloat16", "float32")
DIRECTIONS = ("forward", "forward + backward")
PYTORCH = ("eager NCHW", "eager channels-last", "torch.compile")
CUDNN = ("cuDNN frontend",) if CUDA and importlib.util.find_spec("cudnn") is not None else ()


def ours(*, native: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of our contestants on this device, the reference only where there is nothing else.

    native: the device types for which the op has a native implementation.
    """
    names = []
    if CUDA and HAS_TRITON:
        names.append("ours, triton")
    if DEVICE.type in native and (_native.has_cuda() if CUDA else _native.available()):
        names.append("ours, native")
    return tuple(names) or ("ours, reference",)


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - for the type checker
    return dtype
