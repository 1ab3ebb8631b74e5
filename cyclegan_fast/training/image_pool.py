"""A history of generated pictures for the discriminators (Shrivastava et al. 2017, arXiv:1612.07828, section 2.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImagePool", "pool_draws"]

# Separates these draws from others made with the same seed.
_STREAM = int.from_bytes(b"pool", "big")


class ImagePool:
    """Up to `size` generated pictures, of which the discriminator sees an old one half of the time.

    For each picture, in order: while the pool is not full the picture is stored and returned; after that, with
    probability 1/2 a uniformly drawn stored picture is returned and the new one takes its slot, else the new one is
    returned and not stored. Size 0 returns every picture. What is returned is detached.

    The random numbers are arguments (see `pool_draws`), and how full the pool is follows from the number of pictures
    seen, so nothing is read back from the device. Pictures are kept in the dtype, memory format and device of those
    exchanged. Where pictures have several sizes the pool keeps them one by one, and then reads the draws on the host.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"pool size = {size} is not allowed: an integer >= 0")
        self.size = size
        self.count = 0  # pictures stored
        self._buffer: Tensor | None = None  # [size, C, H, W]; the first `count` slots are in use
        self._pictures: list[Tensor] | None = None  # instead of the buffer, once sizes differ: `count` of [1, C, H, W]

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
        return self._exchange_on_device(images, accept, slot)

    def _exchange_on_device(self, images: Tensor, accept: Tensor | np.ndarray, slot: Tensor | np.ndarray) -> Tensor:
        buffer = self._allocated(images)
        stored_now = min(self.size - self.count, images.shape[0])
        if stored_now > 0:
            buffer[self.count : self.count + stored_now].copy_(images[:stored_now])
            self.count += stored_now
        if stored_now == images.shape[0]:
            return images
        swap = torch.as_tensor(accept, device=images.device) < 0.5
        slot = torch.as_tensor(slot, device=images.device)
        result = images.clone()
        # One after another: two pictures of a batch may draw the same slot, and the second then gets the first.
        for i in range(stored_now, images.shape[0]):
            image, index = images[i : i + 1], slot[i : i + 1]
            old = buffer.index_select(0, index)
            result[i : i + 1] = torch.where(swap[i], old, image)
            buffer.index_copy_(0, index, torch.where(swap[i], image, old))
        return result

    def _exchange_one_by_one(self, images: Tensor, accept: Tensor | np.ndarray, slot: Tensor | np.ndarray) -> Tensor:
        pictures = self._pictures
        if pictures is None:
            raise RuntimeError("ImagePool: no list of pictures to exchange with")
        results: list[Tensor] = []
        for image, draw, index in zip(images.split(1), accept.tolist(), slot.tolist(), strict=True):
            if self.count < self.size:
                pictures.append(image.clone())
                self.count += 1
                results.append(image)
            elif draw < 0.5:
                results.append(pictures[index].to(images.device, images.dtype))
                pictures[index] = image.clone()
            else:
                results.append(image)
        if len({result.shape for result in results}) > 1:
            raise ValueError(
                "ImagePool: pictures of several sizes cannot be returned as one batch: use batch 1, or pool size 0"
            )
        return results[0] if len(results) == 1 else torch.cat(results)

    def _allocated(self, images: Tensor) -> Tensor:
        """The buffer, made on first use, and on the device and in the dtype of `images` also after a resume."""
        if self._buffer is None:
            self._buffer = self._new_buffer(images)
        elif self._buffer.device != images.device or self._buffer.dtype != images.dtype:
            self._buffer = self._buffer.to(images.device, images.dtype)
        return self._buffer

    def _new_buffer(self, like: Tensor) -> Tensor:
        """Zeros [size, C, H, W] in the dtype, memory format and device of `like` [N, C, H, W]."""
        channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        buffer = torch.zeros((self.size, *like.shape[1:]), dtype=like.dtype, device=like.device)
        return buffer.to(memory_format=torch.channels_last) if channels_last else buffer

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: size, count, and `images`, a tensor [count, C, H, W] or a list of [1, C, H, W]."""
        images: Tensor | list[Tensor] | None = None
        if self._pictures is not None:
            images = [picture.clone() for picture in self._pictures]
        elif self._buffer is not None:
            images = self._buffer[: self.count].clone()
        return {"size": self.size, "count": self.count, "images": images}

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
        self.count = count
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
    key = np.random.SeedSequence([seed, _STREAM, domain]).generate_state(2, np.uint64)
    accept = np.empty(len(step_position), np.float64)
    slot = np.empty(len(step_position), np.int64)
    for i, position in enumerate(step_position.tolist()):
        # Raw words instead of a Generator's methods, whose streams may change with numpy's version.
        high, low = np.random.Philox(key=key, counter=position).random_raw(2).tolist()
        accept[i] = (high >> 11) * 2.0**-53
        slot[i] = (low * size) >> 64
    return accept, slot
