"""crop_flip in every implementation: the bits of a naive loop and of the loader, strides, registration, refusals."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cyclegan_fast.ops import _native, _verify
from cyclegan_fast.ops._launch import HAS_TRITON, INTERPRETED
from cyclegan_fast.ops.crop_flip import _MOST_VALUES, crop_flip, crop_flip_ref

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs CUDA")])]
IMPLS = ["reference"]
if INTERPRETED or (HAS_TRITON and CUDA):
    IMPLS.append("triton")
if _native.available():
    IMPLS.append("native")

# (pictures, height, width, channels, window): H != W; windows as large as the picture, of one pixel, of one row, and
# of more values than one program of the kernel handles
SHAPES = [
    (3, 9, 7, 3, (4, 5)),
    (1, 9, 7, 3, (9, 7)),
    (2, 5, 8, 1, (1, 1)),
    (4, 6, 6, 4, (6, 3)),
    (5, 33, 17, 2, (16, 17)),
    (2, 40, 31, 3, (37, 29)),
    (2, 3, 50, 4, (1, 50)),
]

Shape = tuple[int, int, int, int, tuple[int, int]]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]


def drawn(
    pictures: int, height: int, width: int, channels: int, size: tuple[int, int], n: int, seed: int = 0
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    store = torch.randint(0, 256, (pictures, height, width, channels), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, pictures, (n,), generator=generator)
    y = torch.randint(0, height - size[0] + 1, (n,), generator=generator)
    x = torch.randint(0, width - size[1] + 1, (n,), generator=generator)
    return store, index, y, x, torch.rand(n, generator=generator) < 0.5, size


def naive(store: Tensor, index: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """One window after the other, in double precision, rounded to float32 at the end."""
    h, w = size
    windows = []
    for i, top, left, mirrored in zip(index.tolist(), y.tolist(), x.tolist(), flip.tolist(), strict=True):
        window = store[i].numpy()[top : top + h, left : left + w]
        window = window[:, ::-1] if mirrored else window
        windows.append((window.astype(np.float64) / 127.5 - 1).astype(np.float32).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(windows))


def on(device: str, arguments: Arguments) -> Arguments:
    return (*(tensor.to(device) for tensor in arguments[:5]), arguments[5])  # type: ignore[return-value]


def usable(impl: str, device: str) -> None:
    if impl == "triton" and device == "cpu" and not INTERPRETED:
        pytest.skip("Triton on the CPU needs its interpreter")
    if impl == "native" and device != "cpu":
        pytest.skip("the native crop_flip is for the CPU")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_a_naive_loop(shape: Shape, n: int, impl: str, device: str) -> None:
    usable(impl, device)
    arguments = drawn(*shape, n)
    result = crop_flip(*on(device, arguments), impl=impl)
    assert torch.equal(result.cpu(), naive(*arguments))
    assert result.dtype == torch.float32
    assert result.device.type == device


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_same_bits_as_the_definition(data: st.DataObject) -> None:
    pictures, n = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    arguments = drawn(pictures, height, width, data.draw(st.integers(1, 4)), size, n, data.draw(st.integers(0, 99)))
    store, index, y, x, flip, _ = arguments
    expected = crop_flip_ref(store, index, y, x, flip, size)
    for impl in IMPLS:
        result = crop_flip(*arguments, impl=impl)
        assert torch.equal(result, expected)
        assert result.shape == expected.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_every_byte_is_rounded_once_and_the_ends_are_exact(impl: str) -> None:
    usable(impl, "cpu")
    store = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    zero = torch.tensor([0])
    values = crop_flip(store, zero, zero, zero, torch.tensor([False]), (16, 16), impl=impl).flatten()
    assert torch.equal(values, (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float())
    assert values[0] == -1
    assert values[255] == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize(("n", "channels"), [(1, 3), (2, 3), (3, 4), (2, 2), (2, 1), (0, 3)])
def test_strides_are_those_of_channels_last(n: int, channels: int, impl: str, device: str) -> None:
    usable(impl, device)
    result = crop_flip(*on(device, drawn(2, 6, 7, channels, (4, 5), n)), impl=impl)
    assert result.shape == (n, channels, 4, 5)
    assert result.stride() == (4 * 5 * channels, 1, 5 * channels, channels)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_may_be_strided_views(impl: str) -> None:
    usable(impl, "cpu")
    store, *positions, size = drawn(3, 9, 8, 3, (4, 4), 6)
    strided = [tensor[::2] for tensor in positions]
    expected = naive(store, *(tensor.clone() for tensor in strided), size)  # type: ignore[misc]
    assert torch.equal(crop_flip(store, *strided, size, impl=impl), expected)


def test_operator_registration() -> None:
    *tensors, size = drawn(3, 9, 7, 3, (4, 5), 2)
    for impl in IMPLS:
        torch.library.opcheck(torch.ops.cyclegan_fast.crop_flip.default, (*tensors, *size, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl: str) -> None:
    usable(impl, "cpu")

    def step(*arguments: Tensor) -> Tensor:
        return crop_flip(*arguments, (4, 5), impl=impl) * 2  # type: ignore[call-arg, arg-type]

    *tensors, _ = drawn(3, 9, 7, 3, (4, 5), 2)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    result = compiled(*tensors)
    assert torch.equal(result, naive(*tensors, (4, 5)) * 2)  # type: ignore[call-arg, arg-type]
    assert result.stride() == step(*tensors).stride()


def test_no_value_is_read_on_the_host() -> None:
    """On any device but the CPU: tensors without values go through checks and reference."""
    *tensors, size = drawn(3, 9, 7, 3, (4, 5), 2)
    store, index, y, x, flip = (tensor.to("meta") for tensor in tensors)
    module = importlib.import_module("cyclegan_fast.ops.crop_flip")
    module._check(store, index, y, x, flip, size)
    module._check_values(store, index, y, x, size)
    assert crop_flip_ref(store, index, y, x, flip, size).shape == (2, 3, 4, 5)


def test_vmap_is_refused_clearly() -> None:
    *tensors, size = drawn(3, 9, 7, 3, (4, 5), 2)
    repeated = [tensor.expand(2, *tensor.shape) for tensor in tensors]
    with pytest.raises(NotImplementedError, match="crop_flip cannot be used under"):
        torch.func.vmap(lambda *arguments: crop_flip(*arguments, size))(*repeated)


def test_wrong_arguments_are_refused() -> None:
    store, index, y, x, flip, _ = drawn(2, 6, 7, 3, (4, 4), 2)
    with pytest.raises(ValueError, match=r"store must be contiguous uint8.*float32"):
        crop_flip(store.float(), index, y, x, flip, (4, 4))
    with pytest.raises(ValueError, match="store must be contiguous uint8"):
        crop_flip(store.permute(0, 3, 1, 2), index, y, x, flip, (4, 4))
    with pytest.raises(ValueError, match="5 channels in its last dimension: 1 to 4"):
        crop_flip(torch.zeros(1, 6, 7, 5, dtype=torch.uint8), index, y, x, flip, (4, 4))
    with pytest.raises(ValueError, match=r"y must be torch.int64 \[2\].*torch.int64 \[1\]"):
        crop_flip(store, index, y[:1], x, flip, (4, 4))
    with pytest.raises(ValueError, match=r"flip must be torch.bool"):
        crop_flip(store, index, y, x, y, (4, 4))
    with pytest.raises(ValueError, match=r"index must be torch.int64 \[2\] on cpu, but is torch.int32"):
        crop_flip(store, index.int(), y, x, flip, (4, 4))
    with pytest.raises(ValueError, match=r"size = \(7, 7\) does not fit into pictures of 6 x 7"):
        crop_flip(store, index, y, x, flip, (7, 7))
    with pytest.raises(ValueError, match=r"size = \(0, 4\) does not fit"):
        crop_flip(store, index, y, x, flip, (0, 4))
    with pytest.raises(ValueError, match=r"size = \(4, 4, 3\) is not \(height, width\)"):
        crop_flip(store, index, y, x, flip, (4, 4, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl = 'fastest' is not known"):
        crop_flip(store, index, y, x, flip, (4, 4), impl="fastest")


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_positions_outside_are_refused_on_the_cpu(impl: str) -> None:
    store, index, y, x, flip, _ = drawn(2, 6, 7, 3, (4, 4), 2)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 2\].*ranges from 3 to 3"):
        crop_flip(store, index, torch.full_like(y, 3), x, flip, (4, 4), impl=impl)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 3\].*from -1"):
        crop_flip(store, index, y, torch.full_like(x, -1), flip, (4, 4), impl=impl)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 1\]"):
        crop_flip(store, torch.full_like(index, 2), y, x, flip, (4, 4), impl=impl)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_reads_nothing_outside_the_store(device: str) -> None:
    """Where the host does not look at positions, a window outside becomes NaN and its neighbours stay right."""
    usable("triton", device)
    from cyclegan_fast.ops.crop_flip import _crop_flip_triton

    for name, value in (("index", 3), ("index", -1), ("y", 6), ("y", -1), ("x", 3), ("x", 2**40)):
        arguments = dict(zip(("store", "index", "y", "x", "flip"), drawn(3, 9, 7, 3, (4, 5), 3)[:5], strict=True))
        expected = naive(**arguments, size=(4, 5))  # type: ignore[arg-type]
        arguments[name][1] = value
        result = _crop_flip_triton(**{k: v.to(device) for k, v in arguments.items()}, size=(4, 5)).cpu()
        assert result[1].isnan().all(), name
        assert torch.equal(result[::2], expected[::2]), name


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
def test_offsets_are_64_bit() -> None:
    """A window that begins beyond 2**31 bytes, in a store whose pages before it are never touched."""
    height, width = 1 << 16, (1 << 15) + 1
    store = torch.from_numpy(np.zeros((1, height, width, 1), np.uint8))  # mapped lazily: 2 GB of address space
    store[0, -3:, -5:, 0] = torch.arange(15, dtype=torch.uint8).view(3, 5)
    last = torch.tensor([0]), torch.tensor([height - 3]), torch.tensor([width - 5]), torch.tensor([True])
    expected = crop_flip_ref(store, *last, (3, 5))
    assert torch.equal(crop_flip(store, *last, (3, 5), impl="triton"), expected)
    assert expected[0, 0, 0, 0] == (torch.tensor(4.0) * 2 - 255) / 255


def test_a_window_of_too_many_values_is_refused() -> None:
    huge = torch.empty((1, 1 << 16, 1 << 15, 1), dtype=torch.uint8, device="meta")
    assert huge.numel() > _MOST_VALUES
    zero, flip = torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=f"at most {_MOST_VALUES} values a window"):
        crop_flip(huge, zero, zero, zero, flip, (1 << 16, 1 << 15))


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
def test_the_check_that_makes_it_a_default_passes_here_and_sees_a_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cyclegan_fast.ops.crop_flip")
    device = torch.device("cuda" if CUDA else "cpu")
    check = _verify._checks["crop_flip", "triton"].check
    check(device)
    right = module._crop_flip_triton
    monkeypatch.setattr(module, "_crop_flip_triton", lambda *arguments: right(*arguments).nextafter(torch.tensor(2.0)))
    with pytest.raises(AssertionError, match="values differ at 1 channels"):
        check(device)
