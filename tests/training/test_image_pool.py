"""The image pool against a naive one, the law of its draws, and its state."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast import distributed
from cyclegan_fast.training import build
from cyclegan_fast.training.image_pool import ImagePool, pool_draws


class NaivePool:
    """The law as it is written down, on plain numbers, one picture at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stored: list[float] = []

    def exchange(self, image: float, accept: float, slot: int) -> float:
        if self.size == 0:
            return image
        if len(self.stored) < self.size:
            self.stored.append(image)
            return image
        if accept < 0.5:
            old, self.stored[slot] = self.stored[slot], image
            return old
        return image


def numbered(first: int, count: int, shape: tuple[int, ...] = (2, 3, 3)) -> Tensor:
    """Pictures that each hold their own number in every element."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()


def numbers(images: Tensor) -> list[float]:
    flat = images.flatten(1)
    assert (flat == flat[:, :1]).all()  # no picture is a mixture of two
    return flat[:, 0].tolist()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 50])
def test_same_as_the_naive_pool_for_any_batch(size: int) -> None:
    rng = np.random.default_rng(size)
    pool, naive = ImagePool(size), NaivePool(size)
    seen = 0
    while seen < 1500:
        # Up to 9 pictures at once: batches that fill the pool in their middle, and several draws of one slot.
        n = int(rng.integers(1, 10))
        images = numbered(seen, n)
        accept, slot = rng.random(n), rng.integers(0, max(size, 1), n)
        expected = [naive.exchange(float(seen + i), accept[i], int(slot[i])) for i in range(n)]
        result = pool.exchange(images, torch.from_numpy(accept), torch.from_numpy(slot))
        assert numbers(result) == expected
        seen += n
    if size:
        assert numbers(pool.state_dict()["images"]) == naive.stored


def test_two_pictures_of_one_batch_in_one_slot() -> None:
    pool = ImagePool(1)
    pool.exchange(numbered(10, 1), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    result = pool.exchange(numbered(20, 3), torch.tensor([0.1, 0.2, 0.9]), torch.zeros(3, dtype=torch.int64))
    assert numbers(result) == [10, 20, 22]
    assert numbers(pool.state_dict()["images"]) == [21]


def test_exchange_threshold_is_one_half() -> None:
    pool = ImagePool(1)
    slot = torch.zeros(1, dtype=torch.int64)
    pool.exchange(numbered(0, 1), torch.zeros(1), slot)
    below = float(np.nextafter(0.5, 0))
    assert numbers(pool.exchange(numbered(1, 1), torch.tensor([0.5], dtype=torch.float64), slot)) == [1]
    assert numbers(pool.exchange(numbered(2, 1), torch.tensor([below], dtype=torch.float64), slot)) == [0]


def test_result_is_detached_and_the_pool_keeps_its_own_copy() -> None:
    pool = ImagePool(2)
    images = numbered(1, 2).requires_grad_()
    result = pool.exchange(images * 1.0, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert not result.requires_grad
    result.fill_(-1)
    later = pool.exchange(numbered(5, 1), torch.zeros(1), torch.ones(1, dtype=torch.int64))
    assert numbers(later) == [2]
    later.fill_(-1)
    assert numbers(pool.state_dict()["images"]) == [1, 5]


def test_numpy_draws_are_taken_as_they_are() -> None:
    pool = ImagePool(1)
    pool.exchange(numbered(0, 1), np.array([0.9]), np.array([0]))
    assert numbers(pool.exchange(numbered(1, 1), np.array([0.1]), np.array([0]))) == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype: torch.dtype) -> None:
    pool = ImagePool(2)
    for first in range(6):
        images = numbered(3 * first, 3).to(dtype).to(memory_format=torch.channels_last)
        result = pool.exchange(images, torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0, 1, 1]))
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert pool.state_dict()["images"].is_contiguous(memory_format=torch.channels_last)


def test_buffer_and_counter_stay_where_they_are() -> None:
    """A recorded CUDA graph goes on reading and writing them there."""
    pool = ImagePool(2)
    pool.exchange(numbered(0, 1), np.array([0.9]), np.array([0]))
    assert pool._buffer is not None
    addresses = pool._buffer.data_ptr(), pool._offered.data_ptr()
    for first in range(1, 8):
        assert pool.count == min(first, 2)
        pool.exchange(numbered(first, 1), np.array([0.1]), np.array([first % 2]))
        assert (pool._buffer.data_ptr(), pool._offered.data_ptr()) == addresses


def test_a_resumed_pool_takes_the_dtype_and_memory_order_of_what_comes() -> None:
    pool, resumed = ImagePool(2), ImagePool(2)
    pool.exchange(numbered(1, 2), np.ones(2), np.zeros(2, np.int64))
    resumed.load_state_dict(pool.state_dict())
    images = numbered(7, 1).bfloat16().to(memory_format=torch.channels_last)
    result = resumed.exchange(images, np.array([0.1]), np.array([1]))
    assert result.dtype == torch.bfloat16
    assert result.stride() == images.stride()
    assert numbers(result.float()) == [2]
    assert numbers(resumed.state_dict()["images"].float()) == [1, 7]


def test_pictures_of_several_sizes() -> None:
    rng = np.random.default_rng(1)
    pool, naive = ImagePool(3), NaivePool(3)
    shapes = [(2, 2, 2), (2, 2, 2), (2, 3, 5), (2, 4, 2)]
    sizes = {}
    for number in range(200):
        shape = sizes[float(number)] = shapes[number % 4]
        accept, slot = rng.random(1), rng.integers(0, 3, 1)
        expected = naive.exchange(float(number), accept[0], int(slot[0]))
        images = numbered(number, 1, shape).to(memory_format=torch.channels_last)
        result = pool.exchange(images, accept, slot)
        assert numbers(result) == [expected]
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.shape[1:] == sizes[expected]
        if number % 50 == 2:
            state = pool.state_dict()
            pool = ImagePool(3)
            pool.load_state_dict(state)


def test_several_sizes_in_one_batch_are_refused() -> None:
    pool = ImagePool(1)
    pool.exchange(numbered(0, 1, (1, 2, 2)), np.array([0.9]), np.array([0]))
    with pytest.raises(ValueError, match="several sizes"):
        pool.exchange(numbered(1, 2, (1, 3, 3)), np.array([0.1, 0.9]), np.array([0, 0]))


@pytest.mark.parametrize("seen", [0, 2, 3, 11])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_state_goes_through_a_file_exactly(seen: int, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(seen)

    def picture() -> Tensor:
        return torch.randn(1, 3, 4, 5, generator=generator).to(memory_format=memory_format)

    def draws(position: int) -> tuple[np.ndarray, np.ndarray]:
        return pool_draws(3, np.array([position]), 3, 0)

    pool = ImagePool(3)
    for position in range(seen):
        pool.exchange(picture(), *draws(position))
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    resumed = ImagePool(3)
    resumed.load_state_dict(torch.load(file, weights_only=True), torch.device("cpu"))
    for position in range(seen, seen + 20):
        image = picture()
        result, again = pool.exchange(image, *draws(position)), resumed.exchange(image, *draws(position))
        assert torch.equal(result, again)
        assert result.stride() == again.stride()
    assert torch.equal(pool.state_dict()["images"], resumed.state_dict()["images"])


def test_state_is_a_copy_both_ways() -> None:
    pool, other = ImagePool(1), ImagePool(1)
    pool.exchange(numbered(1, 1), np.array([0.9]), np.array([0]))
    state = pool.state_dict()
    other.load_state_dict(state)
    for each in (pool, other):
        each.exchange(numbered(2, 1), np.array([0.1]), np.array([0]))
    assert numbers(state["images"]) == [1]


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="size 50, this one 3"):
        ImagePool(3).load_state_dict(ImagePool(50).state_dict())
    with pytest.raises(ValueError, match="count = 2 but holds 1"):
        ImagePool(3).load_state_dict({"size": 3, "count": 2, "images": numbered(0, 1)})
    with pytest.raises(ValueError, match="pool size = -1"):
        ImagePool(-1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="accept"):
        ImagePool(3).exchange(numbered(0, 2), torch.zeros(1), torch.zeros(2, dtype=torch.int64))


def test_draws_depend_on_the_position_alone() -> None:
    positions = np.arange(1000, 1040)
    accept, slot = pool_draws(7, positions, 50, 1)
    order = np.random.default_rng(0).permutation(40)
    for chunk in np.array_split(order, 7):
        part_accept, part_slot = pool_draws(7, positions[chunk], 50, 1)
        np.testing.assert_array_equal(part_accept, accept[chunk])
        np.testing.assert_array_equal(part_slot, slot[chunk])
    assert accept.dtype == np.float64
    assert slot.dtype == np.int64


def test_draws_follow_their_law() -> None:
    n, size = 20_000, 50
    accept, slot = pool_draws(0, np.arange(n), size, 0)
    assert accept.min() >= 0
    assert accept.max() < 1
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9. These limits are five of them away.
    for values in (slot, (accept * 50).astype(int)):
        counts = np.bincount(values, minlength=size)
        assert len(counts) == size
        assert ((counts - n / size) ** 2 / (n / size)).sum() < 49 + 5 * 9.9
    # Correlations are normal with standard deviation 1 / sqrt(n) = 0.007.
    other_accept, other_slot = pool_draws(0, np.arange(n), size, 1)
    next_seed, _ = pool_draws(1, np.arange(n), size, 0)
    for left, right in (
        (accept, slot),
        (accept, other_accept),
        (slot, other_slot),
        (accept, next_seed),
        (accept[1:], accept[:-1]),
        (slot[1:], slot[:-1]),
    ):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.035


def test_half_of_the_pictures_come_from_the_pool() -> None:
    n, size = 6000, 5
    pool = ImagePool(size)
    accept, slot = pool_draws(11, np.arange(n), size, 0)
    returned = numbers(pool.exchange(numbered(0, n, (1, 1, 1)), accept, slot))
    old = [number for position, number in enumerate(returned) if number != position]
    # Binomial(5995, 1/2): standard deviation 38.7.
    assert abs(len(old) - (n - size) / 2) < 5 * 38.7
    assert len(set(old)) == len(old)  # a picture leaves the pool when it is returned


def test_draws_for_no_pool_and_for_large_seeds() -> None:
    _, slot = pool_draws(2**70, np.array([0, 2**40]), 0, 0)
    assert slot.tolist() == [0, 0]


def test_draws_are_the_same_for_ever() -> None:
    # A resumed run must draw what the interrupted one would have drawn, also with another numpy.
    accept, slot = pool_draws(0, np.array([0, 1, 123456]), 50, 0)
    assert accept.round(12).tolist() == [0.200787416325, 0.704874222887, 0.048242963914]
    assert slot.tolist() == [41, 44, 30]


def test_without_a_pool_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes each keeps its own pictures: none has to travel."""

    def gather(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("pictures were gathered")

    monkeypatch.setattr(distributed, "gather_batch", gather)
    images, draws = torch.rand(2, 3, 4, 4), torch.zeros(4)  # the draws of two processes
    assert torch.equal(build._shared(ImagePool(0))(images, draws, draws.long()), images)
    with pytest.raises(AssertionError, match="gathered"):
        build._shared(ImagePool(1))(images, draws, draws.long())
