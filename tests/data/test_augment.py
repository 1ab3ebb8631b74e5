"""The whole-batch crop against a loop over samples and pixels, and its memory order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast.data.augment import crop_flip


def naive(
    images: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int], index: Tensor | None = None
) -> Tensor:
    """One sample after the other, in double precision, rounded to float32 at the end."""
    h, w = size
    results = []
    for n in range(len(y)):
        picture = images[n if index is None else int(index[n])].numpy()
        window = picture[int(y[n]) : int(y[n]) + h, int(x[n]) : int(x[n]) + w]
        if flip[n]:
            window = window[:, ::-1]
        results.append((window.astype(np.float64) / 127.5 - 1).astype(np.float32).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(results))


# H != W, windows as large as the picture and of one pixel, channels 1 to 4, batch 1
SHAPES = [
    (3, 9, 7, 3, (4, 5)),
    (1, 9, 7, 3, (9, 7)),
    (2, 5, 8, 1, (1, 1)),
    (4, 6, 6, 4, (6, 3)),
    (5, 33, 17, 2, (16, 17)),
]


@pytest.mark.parametrize(("n", "height", "width", "channels", "size"), SHAPES)
def test_values_are_those_of_a_naive_loop(
    n: int, height: int, width: int, channels: int, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    for _ in range(4):
        y = torch.randint(0, height - size[0] + 1, (n,), generator=generator)
        x = torch.randint(0, width - size[1] + 1, (n,), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        result = crop_flip(images, y, x, flip, size)
        assert result.dtype == torch.float32
        assert result.shape == (n, channels, *size)
        assert torch.equal(result, naive(images, y, x, flip, size))
        assert result.isfinite().all()


def test_every_corner_and_both_directions() -> None:
    images = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3)
    for y in (0, 2):
        for x in (0, 3):
            for flip in (False, True):
                arguments = (torch.tensor([y, 2 - y]), torch.tensor([x, 3 - x]), torch.tensor([flip, not flip]), (2, 2))
                assert torch.equal(crop_flip(images, *arguments), naive(images, *arguments))


def test_cropped_first_and_mirrored_then() -> None:
    images = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(1, 1, 4, 1)
    result = crop_flip(images, torch.tensor([0]), torch.tensor([1]), torch.tensor([True]), (1, 2))
    assert ((result.flatten() + 1) * 127.5).tolist() == pytest.approx([30, 20])


def test_index_chooses_pictures_in_any_order_and_number() -> None:
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([3, 0, 3, 1, 2, 2])
    y, x = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 0, 1, 0, 1, 0])
    flip = torch.tensor([True, False, False, True, False, True])
    assert torch.equal(crop_flip(images, y, x, flip, (3, 4), index), naive(images, y, x, flip, (3, 4), index))


def test_every_byte_is_rounded_once_and_the_ends_are_exact() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    zero = torch.tensor([0])
    values = crop_flip(images, zero, zero, torch.tensor([False]), (16, 16)).flatten()
    assert torch.equal(values, (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float())
    assert values[0] == -1
    assert values[255] == 1


@pytest.mark.parametrize(("n", "channels"), [(1, 3), (2, 3), (3, 4), (2, 2)])
def test_memory_order_is_channels_last(n: int, channels: int) -> None:
    images = torch.zeros(n, 6, 7, channels, dtype=torch.uint8)
    zeros = torch.zeros(n, dtype=torch.int64)
    result = crop_flip(images, zeros, zeros, zeros.bool(), (4, 5))
    assert result.stride() == (4 * 5 * channels, 1, 5 * channels, channels)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_wrong_arguments_are_refused() -> None:
    images = torch.zeros(2, 6, 7, 3, dtype=torch.uint8)
    zeros, flip = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"images must be contiguous uint8.*float32"):
        crop_flip(images.float(), zeros, zeros, flip, (4, 4))
    with pytest.raises(ValueError, match="images must be contiguous uint8"):
        crop_flip(images.permute(0, 3, 1, 2), zeros, zeros, flip, (4, 4))
    with pytest.raises(ValueError, match=r"y must be torch.int64 \[2\].*torch.int64 \[1\]"):
        crop_flip(images, zeros[:1], zeros, flip, (4, 4))
    with pytest.raises(ValueError, match=r"flip must be torch.bool"):
        crop_flip(images, zeros, zeros, zeros, (4, 4))
    with pytest.raises(ValueError, match=r"size = \(7, 7\) does not fit into pictures of 6 x 7"):
        crop_flip(images, zeros, zeros, flip, (7, 7))
    with pytest.raises(ValueError, match="outside its picture"):
        crop_flip(images, zeros + 3, zeros, flip, (4, 4))
    with pytest.raises(ValueError, match="outside its picture"):
        crop_flip(images, zeros, zeros - 1, flip, (4, 4))
    with pytest.raises(ValueError, match=r"index must lie in \[0, 2\)"):
        crop_flip(images, zeros, zeros, flip, (4, 4), zeros + 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_gives_the_same_bits() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(3, 1, 1, 3)
    y, x, flip = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]), torch.tensor([True, False, True])
    here = crop_flip(images, y, x, flip, (14, 14))
    there = crop_flip(images.cuda(), y.cuda(), x.cuda(), flip.cuda(), (14, 14))
    assert torch.equal(there.cpu(), here)
    assert there.is_contiguous(memory_format=torch.channels_last)
