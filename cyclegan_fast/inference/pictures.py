"""A picture in memory, of any kind, as a batch for a network, and a network's result as that kind of picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from cyclegan_fast.data.photo import MODES, open_photo

__all__ = ["PictureLike", "Pixels", "as_batch"]

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
PictureLike = str | Path | Image.Image | Pixels | Tensor


def as_batch(image: PictureLike, channels: int, truncate: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A picture of any kind as uint8 or floating point [N, C, H, W], and the way back for results of the network.

    uint16 goes as float32 in [-1, 1], which holds all of its values apart, and comes back rounded to 16 bits.
    """
    if isinstance(image, Tensor):
        # A copy: tensors made in inference mode cannot take part in autograd later.
        return _checked_tensor(image, channels), lambda y: y.to(device=image.device, dtype=image.dtype, copy=True)
    if isinstance(image, (str, Path)):
        image = open_photo(image, channels).image
    if isinstance(image, Image.Image):
        pixels = np.array(_in_mode(image, channels))
        return _pixels_to_batch(pixels, channels), lambda y: Image.fromarray(_to_pixels(y, 255, truncate))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a picture is a path, a PIL image, an array or a tensor, not a {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"the array has dtype {image.dtype}; it must be uint8 with values from 0 to 255, or uint16 from 0 to 65535"
        )
    flat, top = image.ndim == 2, int(np.iinfo(image.dtype).max)
    return _pixels_to_batch(image, channels), lambda y: _like_array(_to_pixels(y, top, truncate), flat)


def _checked_tensor(image: Tensor, channels: int) -> Tensor:
    shape = list(image.shape)
    if not image.is_floating_point():
        raise ValueError(f"the tensor has dtype {image.dtype}; it must be floating point with values in [-1, 1]")
    if image.ndim != 4 or image.shape[1] != channels or 0 in shape:
        raise ValueError(f"the tensor has shape {shape}; this direction takes [N, {channels}, H, W]")
    return image.detach()


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image in ``MODES[channels]``, with alpha over white where there is no channel for it."""
    mode = MODES[channels]
    if image.mode == mode and not ("A" not in mode and image.has_transparency_data):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"the image has mode {image.mode!r}, whose range is unknown: give the path of its file, or 8 bits a channel"
        )
    if "A" not in mode and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _pixels_to_batch(pixels: Pixels, channels: int) -> Tensor:
    """uint8 or uint16 [H, W, C], or [H, W], to uint8 or float32 [1, C, H, W] in channels-last order."""
    shape = list(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.size == 0:
        or_flat = " or [H, W]" if channels == 1 else ""
        raise ValueError(f"the picture has shape {shape}; this direction takes [H, W, {channels}]{or_flat}")
    if pixels.dtype == np.uint16:
        signed = torch.from_numpy(pixels.astype(np.float32, order="C")).div_(32767.5).sub_(1)
        return signed.permute(2, 0, 1)[None]
    # A copy: arrays may be read-only or mirrored, which torch does not take.
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]


def _to_pixels(output: Tensor, top: int, truncate: bool) -> Pixels:
    """[1, C, H, W] float32 in [-1, 1] to 0 ... top: uint8 for 255, else uint16; [H, W, C], or [H, W] for one channel.

    Rounded unless ``truncate``.
    """
    scaled = output[0].permute(1, 2, 0).add(1).div_(2).mul_(top)
    scaled = (scaled if truncate else scaled.round_()).clamp_(0, top)
    pixels: Any = scaled.to(torch.uint8).cpu().numpy() if top == 255 else scaled.cpu().numpy().astype(np.uint16)
    flat: Pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return flat


def _like_array(pixels: Pixels, flat: bool) -> Pixels:
    """Gray stays [H, W] if the input was, and is [H, W, 1] otherwise."""
    return pixels[:, :, None] if pixels.ndim == 2 and not flat else pixels
