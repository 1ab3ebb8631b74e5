"""Random crop, mirroring and normalisation of a whole batch on the device that holds the pictures."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crop_flip"]


def crop_flip(
    images: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int], index: Tensor | None = None
) -> Tensor:
    """Cut a window from each picture, mirror it left-right where asked, and bring it to [-1, 1].

    images uint8 [N, H, W, C] contiguous; y, x int64 [n], the window's top left corner in pixels; flip bool [n]; size
    (h, w) in pixels; index int64 [n], which picture each window is cut from (None: every picture once, n = N). All on
    one device. Returns float32 [n, C, h, w] in channels_last memory order: v / 127.5 - 1, rounded once, so that every
    device gives the same bits. The picture is cropped first and mirrored then.

    Raises ValueError for a wrong shape, dtype or layout, and on the CPU for a window outside its picture; on other
    devices the values are not read, because that would make the host wait.
    """
    _check(images, y, x, flip, size, index)
    _, height, width, channels = images.shape
    h, w = size
    n = y.shape[0]
    device = images.device
    if index is None:
        index = torch.arange(n, device=device)
    rows = (index * height + y)[:, None] + torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    columns = x[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    values = (columns[:, :, None] * channels + torch.arange(channels, device=device)).view(n, 1, w * channels)
    # Two gathers along one axis each, of whole rows and then of the bytes within them, are four times as fast on a
    # CPU as one gather along both: the first is a memcpy a row, and neither needs an index a pixel.
    lines = images.view(-1, width * channels).index_select(0, rows.view(-1)).view(n, h, width * channels)
    windows = lines.gather(2, values.expand(n, h, w * channels)).view(n, h, w, channels)
    # (2 v - 255) / 255 is exact up to its one division. The divisor is a tensor because CUDA replaces division by a
    # number with multiplication by its rounded inverse.
    result = windows.permute(0, 3, 1, 2).to(torch.float32).mul_(2).sub_(255)
    return result.div_(torch.full((1,), 255.0, device=device))


def _check(images: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int], index: Tensor | None) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"images must be contiguous uint8 [N, H, W, C], but are {images.dtype} {list(images.shape)} "
            f"with strides {list(images.stride())}"
        )
    n = images.shape[0] if index is None else index.numel()
    expected = [("y", y, torch.int64), ("x", x, torch.int64), ("flip", flip, torch.bool)]
    if index is not None:
        expected.append(("index", index, torch.int64))
    for name, tensor, dtype in expected:
        if tensor.shape != (n,) or tensor.dtype != dtype or tensor.device != images.device:
            raise ValueError(
                f"{name} must be {dtype} [{n}] on {images.device}, but is {tensor.dtype} {list(tensor.shape)} "
                f"on {tensor.device}"
            )
    count, height, width, _ = images.shape
    h, w = size
    if not (1 <= h <= height and 1 <= w <= width):
        raise ValueError(f"size = {size} does not fit into pictures of {height} x {width} (height x width)")
    if images.device.type == "cpu" and n:
        inside = bool((y >= 0).all() and (y <= height - h).all() and (x >= 0).all() and (x <= width - w).all())
        if not inside:
            raise ValueError(f"a window of {size} lies outside its picture of {height} x {width} (height x width)")
        if index is not None and not bool((index >= 0).all() and (index < count).all()):
            raise ValueError(f"index must lie in [0, {count}), but ranges from {index.min()} to {index.max()}")
