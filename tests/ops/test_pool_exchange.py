"""pool_exchange against a naive pool and against ImagePool, in every implementation; memory order and registration."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cyclegan_fast.ops import _verify
from cyclegan_fast.ops._launch import HAS_TRITON, INTERPRETED
from cyclegan_fast.ops.image_pool import _BLOCK, pool_exchange
from cyclegan_fast.training.image_pool import ImagePool

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs CUDA")])]
IMPLS = ["reference"]
if INTERPRETED or (HAS_TRITON and CUDA):
    IMPLS.append("triton")
LAST = torch.channels_last


class NaivePool:
    """The law as it is written down, on plain numbers, one picture at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stored: list[float] = []

    def exchange(self, image: float, accept: float, slot: int) -> float:
        if len(self.stored) < self.size:
            self.stored.append(image)
            return image
        if accept < 0.5 and self.size:
            old, self.stored[slot] = self.stored[slot], image
            return old
        return image


def numbered(first: int, count: int, shape: tuple[int, int, int] = (2, 3, 3)) -> Tensor:
    """Pictures that each hold their own number in every element."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()


def numbers(images: Tensor) -> list[float]:
    flat = images.cpu().float().flatten(1)
    assert (flat == flat[:, :1]).all()  # no picture is a mixture of two
    return flat[:, 0].tolist()


def usable(impl: str, device: str) -> None:
    if impl == "triton" and device == "cpu" and not INTERPRETED:
        pytest.skip("Triton on the CPU needs its interpreter")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_same_as_the_naive_pool_for_any_batch(size: int, impl: str, device: str) -> None:
    usable(impl, device)
    rng = np.random.default_rng(size)
    naive, seen = NaivePool(size), 0
    buffer = torch.full((size, 2, 3, 3), float("nan"), device=device)
    while seen < 150:
        # Up to 9 pictures at once: batches that fill the pool in their middle, and several draws of one slot.
        n = int(rng.integers(1, 10))
        accept, slot = rng.random(n), rng.integers(0, max(size, 1), n)
        expected = [naive.exchange(float(seen + i), accept[i], int(slot[i])) for i in range(n)]
        count = torch.tensor(seen, device=device)
        draws = torch.from_numpy(accept).to(device), torch.from_numpy(slot).to(device)
        result = pool_exchange(numbered(seen, n).to(device), buffer, count, *draws, impl=impl)
        assert numbers(result) == expected
        assert int(count) == seen
        seen += n
    assert numbers(buffer) == naive.stored if size else True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["NCHW", "NHWC"])
def test_same_bits_as_the_image_pool(
    memory_format: torch.memory_format, dtype: torch.dtype, impl: str, device: str
) -> None:
    """More values a picture than one program handles, odd sizes, every dtype and memory order."""
    usable(impl, device)
    generator = torch.Generator().manual_seed(1)
    pool, shape = ImagePool(3), (3, 19, 23)
    assert _BLOCK < 3 * 19 * 23
    buffer = torch.zeros(3, *shape, dtype=dtype).to(memory_format=memory_format).to(device)
    for seen in range(0, 12, 4):
        images = torch.randn(4, *shape, generator=generator).to(dtype).to(memory_format=memory_format)
        images[1, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
        accept = torch.rand(4, generator=generator, dtype=torch.float64)
        slot = torch.randint(0, 3, (4,), generator=generator)
        expected = pool.exchange(images, accept, slot)
        arguments = (tensor.to(device) for tensor in (torch.tensor([seen]), accept, slot))
        result = pool_exchange(images.to(device), buffer, *arguments, impl=impl)
        assert result.dtype == dtype
        assert result.stride() == images.stride()
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(buffer.cpu(), pool.state_dict()["images"], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_draws_in_any_batches(data: st.DataObject) -> None:
    size, n, seen = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9))
    draws = st.lists(st.floats(0, 1, exclude_max=True), min_size=n, max_size=n)
    accept = torch.tensor(data.draw(draws), dtype=torch.float64)
    slot = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n)))
    naive = NaivePool(size)
    naive.stored = [float(i) for i in range(min(seen, size))]
    expected = [naive.exchange(100.0 + i, accept[i].item(), int(slot[i])) for i in range(n)]
    for impl in IMPLS:
        buffer = numbered(0, size)
        result = pool_exchange(numbered(100, n), buffer, torch.tensor([seen]), accept, slot, impl=impl)
        assert numbers(result) == expected
        assert numbers(buffer)[: len(naive.stored)] == naive.stored


@pytest.mark.parametrize("impl", IMPLS)
def test_two_pictures_of_one_batch_in_one_slot(impl: str) -> None:
    usable(impl, "cpu")
    buffer = numbered(10, 1)
    accept, slot = torch.tensor([0.1, 0.2, 0.9]), torch.zeros(3, dtype=torch.int64)
    result = pool_exchange(numbered(20, 3), buffer, torch.tensor([1]), accept, slot, impl=impl)
    assert numbers(result) == [10, 20, 22]
    assert numbers(buffer) == [21]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exchange_threshold_is_one_half(dtype: torch.dtype, impl: str) -> None:
    usable(impl, "cpu")
    half = torch.tensor([0.5], dtype=dtype)
    below = half.nextafter(torch.zeros(1, dtype=dtype))
    slot, count = torch.zeros(1, dtype=torch.int64), torch.tensor([1])
    for accept, expected in ((half, 7), (below, 3)):
        assert numbers(pool_exchange(numbered(7, 1), numbered(3, 1), count, accept, slot, impl=impl)) == [expected]


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_of_pictures_that_are_stored_are_ignored(impl: str) -> None:
    usable(impl, "cpu")
    buffer = numbered(50, 3)
    slot = torch.tensor([-5, 99, 0])
    result = pool_exchange(numbered(5, 3), buffer, torch.tensor([1]), torch.zeros(3), slot, impl=impl)
    assert numbers(result) == [5, 6, 50]
    assert numbers(buffer) == [7, 5, 6]


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_and_buffers_may_be_slices_of_larger_ones(impl: str) -> None:
    usable(impl, "cpu")
    whole = numbered(0, 8, (3, 4, 5)).to(memory_format=LAST)
    store = numbered(50, 6, (3, 4, 5)).to(memory_format=LAST)
    draws = torch.tensor([0.0, 0.0, 0.9]), torch.tensor([0, 2, 1])
    result = pool_exchange(whole[1:7:2], store[::2], torch.tensor([9]), *draws, impl=impl)
    assert numbers(result) == [50, 54, 5]
    assert result.is_contiguous(memory_format=LAST)
    assert numbers(store) == [1, 51, 52, 53, 3, 55]
    assert numbers(whole) == list(range(8))


def test_the_result_is_new_memory_and_detached() -> None:
    for impl in IMPLS:
        images = numbered(1, 2).requires_grad_()
        result = pool_exchange(
            images, numbered(5, 1), torch.tensor([4]), torch.ones(2), torch.tensor([0, 0]), impl=impl
        )
        assert not result.requires_grad
        assert result.data_ptr() != images.data_ptr()


EIGHT_BITS = torch.zeros(2, 2, 3, 3).to(torch.float8_e4m3fn)


def arguments(**changed: Tensor) -> dict[str, Tensor]:
    usual = {
        "images": numbered(0, 2),
        "buffer": numbered(5, 3),
        "count": torch.tensor([3]),
        "accept": torch.tensor([0.1, 0.7]),
        "slot": torch.tensor([1, 2]),
    }
    return usual | changed


def test_operator_registration() -> None:
    for impl in IMPLS:
        for memory_format in (torch.contiguous_format, LAST):
            usual = arguments()
            for name in ("images", "buffer"):
                usual[name] = usual[name].to(memory_format=memory_format)
            torch.library.opcheck(torch.ops.cyclegan_fast.pool_exchange.default, (*usual.values(), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph_and_still_changes_the_buffer(impl: str) -> None:
    usable(impl, "cpu")

    def step(images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
        result = pool_exchange(images, buffer, count, accept, slot, impl=impl)
        count.add_(images.shape[0])
        return result * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, graph = arguments(), arguments()
    for _ in range(3):
        assert torch.equal(compiled(**graph), step(**eager))
        assert torch.equal(graph["buffer"], eager["buffer"])
        assert torch.equal(graph["count"], eager["count"])
    assert int(graph["count"]) == 9


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_captured_graph_fills_the_pool_and_goes_on_exchanging() -> None:
    pool, rng = ImagePool(3), np.random.default_rng(0)
    static = {name: tensor.cuda() for name, tensor in arguments(buffer=torch.zeros(3, 2, 3, 3)).items()}
    static["count"].zero_()
    static["accept"] = static["accept"].double()

    def step() -> Tensor:
        result = pool_exchange(**static, impl="triton")
        static["count"].add_(2)
        return result

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    static["buffer"].zero_()
    static["count"].zero_()
    for seen in range(0, 40, 2):
        accept, slot = rng.random(2), rng.integers(0, 3, 2)
        static["images"].copy_(numbered(seen, 2))
        static["accept"].copy_(torch.from_numpy(accept))
        static["slot"].copy_(torch.from_numpy(slot))
        graph.replay()
        assert numbers(result) == numbers(pool.exchange(numbered(seen, 2), accept, slot))


def test_no_value_is_read_on_the_host() -> None:
    """On any device but the CPU: tensors without values go through checks and reference."""
    tensors = [tensor.to("meta") for tensor in arguments().values()]
    module = importlib.import_module("cyclegan_fast.ops.image_pool")
    module._check(*tensors)
    module._check_values(*tensors[1:])
    assert module.pool_exchange_ref(*tensors).shape == tensors[0].shape


def test_vmap_is_refused_clearly() -> None:
    repeated = [tensor.expand(2, *tensor.shape) for tensor in arguments().values()]
    with pytest.raises(NotImplementedError, match="pool_exchange cannot be used under"):
        torch.func.vmap(pool_exchange)(*repeated)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(2, 3, 3)}, r"images \[2, 3, 3\] and buffer \[3, 2, 3, 3\] are not \[N, C, H, W\]"),
        ({"buffer": torch.zeros(3, 2, 3, 4)}, r"buffer \[3, 2, 3, 4\] are not"),
        ({"buffer": torch.zeros(3, 2, 3, 3, dtype=torch.bfloat16)}, "must have one floating dtype"),
        ({"images": torch.zeros(2, 2, 3, 3).int()}, "must have one floating dtype"),
        ({"images": EIGHT_BITS, "buffer": EIGHT_BITS}, "must have one floating dtype"),
        ({"buffer": torch.zeros(3, 2, 3, 3).requires_grad_()}, "must not require a gradient"),
        ({"buffer": torch.zeros(3, 2, 3, 3).to(memory_format=LAST)}, "dense and in one memory order"),
        ({"images": torch.zeros(2, 2, 3, 6)[..., ::2], "buffer": torch.zeros(3, 2, 3, 6)[..., ::2]}, "dense"),
        ({"buffer": torch.zeros(1, 2, 3, 3).expand(3, 2, 3, 3)}, "dense"),
        ({"count": torch.tensor([1, 2])}, r"count must be torch.int64 \[1\]"),
        ({"count": torch.tensor([1.0])}, "count must be torch.int64"),
        ({"accept": torch.zeros(3)}, r"accept must be torch.float32 or torch.float64 \[2\].*\[3\]"),
        ({"accept": torch.zeros(2).half()}, "accept must be torch.float32 or torch.float64"),
        ({"slot": torch.zeros(2, dtype=torch.int32)}, "slot must be torch.int64"),
        ({"slot": torch.tensor([3, 0])}, r"slot must lie in \[0, 3\), but is \[3, 0\]"),
        ({"slot": torch.tensor([-1, 0])}, r"slot must lie in \[0, 3\)"),
        ({"count": torch.tensor([-1])}, "count must be at least 0, but is -1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_exchange(**arguments(**changed))


def test_native_is_not_there() -> None:
    with pytest.raises(ValueError, match="pool_exchange: impl = 'native' cannot be used"):
        pool_exchange(**arguments(), impl="native")


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_touches_nothing_outside_the_buffer(device: str) -> None:
    """Where the host does not look at slots, one outside gives NaN, and buffer and neighbours stay right."""
    usable("triton", device)
    from cyclegan_fast.ops.image_pool import _pool_exchange_triton

    for wrong in (3, -1, 2**40):
        usual = {name: tensor.to(device) for name, tensor in arguments(slot=torch.tensor([wrong, 0])).items()}
        usual["accept"].zero_()
        result = _pool_exchange_triton(**usual).cpu()
        assert result[0].isnan().all()
        assert numbers(result[1:]) == [5]
        assert numbers(usual["buffer"]) == [1, 6, 7]


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
def test_the_check_that_makes_it_a_default_passes_here() -> None:
    _verify._checks["pool_exchange", "triton"].check(torch.device("cuda" if CUDA else "cpu"))
