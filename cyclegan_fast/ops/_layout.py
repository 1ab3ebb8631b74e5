"""Channels-last memory with exact strides, which are part of every op's contract.

A dimension of size 1 lets PyTorch call several strides channels-last, and a library returns any of them; compiled code
expects those that the op's fake promised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dense_strides", "empty_channels_last", "exact_channels_last"]


def dense_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The strides of [N, C, H, W] over dense [N, H, W, C]."""
    _, channels, height, width = shape
    return (height * width * channels, 1, width * channels, channels)


def empty_channels_last(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, C, H, W] on the device of `like`, in its dtype or another one."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def exact_channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] with exactly these strides; a copy only where its memory is in another order."""
    strides = dense_strides(x.shape)
    if x.stride() == strides:
        return x
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, strides)
