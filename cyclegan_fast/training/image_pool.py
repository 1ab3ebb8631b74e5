"""A history of generated pictures for the discriminators (Shrivastava et al. 2017, arXiv:1612.07828, section 2.3)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cyclegan_fast.ops.image_pool import pool_exchange

__all__ = ["ImagePool", "pool_draws"]

# Separates these draws from others made with the same seed.
_STREAM = int.from_bytes(b"pool", "big")


class ImagePool:
    """Up to `size` generated pictures, of which the discriminator sees an old one half of the time.

    For each picture, in order: while the pool is not full the picture is stored and returned; after that, with
    probability 1/2 a uniformly drawn stored picture is returned and the new one takes its slot, else the new one is
    returned and not stored. Size 0 returns every picture. What is returned is detached.

    The random numbers are arguments (see `pool_draws`), and the number of pictures offered so far, from which follows
    how full the pool is, is kept on the device, so that nothing is read back and a CUDA graph may hold the exchange.
    Pictures are kept in the dtype, memory order and device of those exchanged. Where pictures have several sizes the
    pool keeps them one by one, and then reads the draws on the host.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"pool size = {size} is not allowed: an integer >= 0")
        self.size = size
        self._offered = torch.zeros(1, dtype=torch.int64)  # pictures offered so far
        self._buffer: Tensor | None = None  # [size, C, H, W]; the first `count` slots are in use
        self._pictures: list[Tensor] | None = None  # instead of the buffer, once sizes differ: `count` of [1, C, H, W]

    @property
    def count(self) -> int:
        """Pictures stored. The host waits for the device."""
        return min(int(self._offered), self.size)

    @torch.no_grad()
    def exchange(self, images: Tensor, accept: Tensor | np.ndarray, slot: Tensor | np.ndarray) -> Tensor:
        """Pictures for the discriminator in the place of images [N, C, H, W]; same dtype and device.

        accept: float [N] in [0, 1), below 1/2 means exchange; slot: int64 [N] in [0, size). Tensors on the images'
        device are used without synchronisation; draws for pictures that are stored because the pool is not full are
        ignored. Raises ValueError when the shapes do not fit.
        """
        images = images.detach()
        if images.dim() != 4 or tuple(accept.shape) != images.shape[:1] or tuple(slot.shape) != images.shape[:1]:
            raise ValueError(
                f"ImagePool: images {tuple(images.shape)}, accept {tuple(accept.shape)} and slot {tuple(slot.shape)} "
                "are not [N, C, H, W], [N] and [N]"
            )
        if self.size == 0:
            return images
        if self._pictures is None and self._buffer is not None and self._buffer.shape[1:] != images.shape[1:]:
            self._pictures = [picture.clone() for picture in self._buffer[: self.count].split(1)]
            self._buffer = None
        if self._pictures is not None:
            return self._exchange_one_by_one(images, accept, slot)
        buffer = self._allocated(images)
        accept, slot = (torch.as_tensor(draws, device=images.device) for draws in (accept, slot))
        result = pool_exchange(images, buffer, self._offered, accept, slot)
        self._offered += images.shape[0]
        return result

    def _exchange_one_by_one(self, images: Tensor, accept: Tensor | np.ndarray, slot: Tensor | np.ndarray) -> Tensor:
        pictures = self._pictures
        if pictures is None:
            raise RuntimeError("ImagePool: no list of pictures to exchange with")
        results: list[Tensor] = []
        for image, draw, index in zip(images.split(1), accept.tolist(), slot.tolist(), strict=True):
            if len(pictures) < self.size:
                pictures.append(image.clone())
                results.append(image)
            elif draw < 0.5:
                results.append(pictures[index].to(images.device, images.dtype))
                pictures[index] = image.clone()
            else:
                results.append(image)
        self._offered += images.shape[0]
        if len({result.shape for result in results}) > 1:
            raise ValueError(
                "ImagePool: pictures of several sizes cannot be returned as one batch: use batch 1, or pool size 0"
            )
        return results[0] if len(results) == 1 else torch.cat(results)

    def _allocated(self, images: Tensor) -> Tensor:
        """The buffer: made on first use, and on the device, in the dtype and memory order of `images` after a resume.

        It stays where it is from then on, as does the counter: a recorded CUDA graph knows their addresses.
        """
        if self._offered.device != images.device:
            self._offered = self._offered.to(images.device)
        if self._buffer is None:
            self._buffer = self._new_buffer(images)
        elif not self._fits(self._buffer, images):
            self._buffer = self._new_buffer(images).copy_(self._buffer)
        return self._buffer

    @staticmethod
    def _fits(buffer: Tensor, images: Tensor) -> bool:
        same_order = all(
            buffer.stride(d) == images.stride(d) for d in (1, 2, 3) if images.shape[d] > 1
        )  # a dimension of size 1 may have any stride
        return same_order and buffer.device == images.device and buffer.dtype == images.dtype

    def _new_buffer(self, like: Tensor) -> Tensor:
        """Zeros [size, C, H, W] in the dtype, memory order and device of `like` [N, C, H, W]."""
        strides = (like[0].numel(), *like.stride()[1:])
        shape = (self.size, *like.shape[1:])
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device).zero_()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: size, count, and `images`, a tensor [count, C, H, W] or a list of [1, C, H, W]."""
        count = self.count
        images: Tensor | list[Tensor] | None = None
        if self._pictures is not None:
            images = [picture.clone() for picture in self._pictures]
        elif self._buffer is not None:
            images = self._buffer[:count].clone()
        return {"size": self.size, "count": count, "images": images}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue exactly where `state_dict` was taken, on `device` (where the saved pictures are, without one).

        Raises ValueError for a state that does not fit this pool.
        """
        size, count, images = state["size"], state["count"], state["images"]
        if size != self.size:
            raise ValueError(f"the saved image pool has size {size}, this one {self.size}: use the saved pool_size")
        held = 0 if images is None else len(images)
        if held != count or count > size:
            raise ValueError(f"the saved image pool of size {size} says count = {count} but holds {held} pictures")
        self._offered = torch.tensor([count], device=device)  # that more were offered makes no difference
        self._buffer, self._pictures = None, None
        if isinstance(images, Tensor):
            self._buffer = self._new_buffer(images.to(device))
            self._buffer[:count].copy_(images)
        elif images is not None:
            self._pictures = [picture.to(device, copy=True) for picture in images]


def pool_draws(seed: int, step_position: np.ndarray, size: int, domain: int) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers of one domain's pool (0 for A, 1 for B) for pictures at the given positions of the run.

    step_position: int64 [n], >= 0. Returns accept, float64 [n] uniform in [0, 1), and slot, int64 [n] uniform in
    [0, size) (0 for size 0). Counter-based (Philox): the draws at a position depend on seed, domain, size and that
    position only, not on the other positions asked for.
    """
    key = _key(seed, domain)
    accept = np.empty(len(step_position), np.float64)
    slot = np.empty(len(step_position), np.int64)
    for i, position in enumerate(step_position.tolist()):
        # Raw words instead of a Generator's methods, whose streams may change with numpy's version.
        high, low = np.random.Philox(key=key, counter=position).random_raw(2).tolist()
        accept[i] = (high >> 11) * 2.0**-53
        slot[i] = (low * size) >> 64
    return accept, slot


@functools.lru_cache(maxsize=64)
def _key(seed: int, domain: int) -> np.ndarray:
    return np.random.SeedSequence([seed, _STREAM, domain]).generate_state(2, np.uint64)
