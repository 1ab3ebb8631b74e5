"""Random crop, mirroring and normalisation of a batch, straight from the decoded pictures on the device.

    result[n, c, i, j] = store[index[n], y[n] + i, x[n] + (flip[n] ? w - 1 - j : j), c] / 127.5 - 1

store uint8 [M, H, W, C], result float32 [N, C, h, w] in channels_last order, C from 1 to 4. One kernel reads each byte
of the windows once and writes each float once: 5 bytes a value. Each value is rounded once, so every implementation
gives the same bits. There is no gradient: pictures and positions are integers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyclegan_fast.ops import _native
from cyclegan_fast.ops._launch import HAS_TRITON, on_device, resolve_impl, tl, triton
from cyclegan_fast.ops._layout import empty_channels_last
from cyclegan_fast.ops._verify import register_check

__all__ = ["crop_flip", "crop_flip_ref"]

_BLOCK = 1024
_NUM_WARPS = 4
# Positions within one window are 32-bit numbers, everything else that addresses memory is 64-bit.
_MOST_VALUES = 2**30


def crop_flip_ref(store: Tensor, index: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """The definition in plain PyTorch, for any device; arguments as `crop_flip`."""
    _, height, width, channels = store.shape
    h, w = size
    n, device = index.shape[0], store.device
    rows = (index * height + y)[:, None] + torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    columns = x[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    values = (columns[:, :, None] * channels + torch.arange(channels, device=device)).view(n, 1, w * channels)
    # Whole rows first and then the bytes within them: on a CPU four times as fast as one gather along both.
    lines = store.view(-1, width * channels).index_select(0, rows.view(-1)).view(n, h, width * channels)
    windows = lines.gather(2, values.expand(n, h, w * channels)).view(n, h, w, channels)
    # (2 v - 255) / 255 is exact up to its one division. The divisor is a tensor because CUDA replaces division by a
    # number with multiplication by its rounded inverse.
    result = windows.permute(0, 3, 1, 2).to(torch.float32).mul_(2).sub_(255)
    return result.div_(torch.full((1,), 255.0, device=device))


if HAS_TRITON:

    @triton.jit
    def _crop_flip_kernel(
        store,  # uint8 [M, H, W, C]
        index,  # int64 [N]
        y,  # int64 [N]
        x,  # int64 [N]
        flip,  # bool [N]
        result,  # float32 [N, HEIGHT, WIDTH, C]
        M,
        H,
        W,
        HEIGHT,
        WIDTH: tl.constexpr,
        C: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """BLOCK consecutive values of one window, in the order in which they lie in the result."""
        # One axis for all: a grid's others end at 65535.
        tiles = tl.cdiv(HEIGHT * (WIDTH * C), BLOCK)
        n = (tl.program_id(0) // tiles).to(tl.int64)
        value = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
        used = value < HEIGHT * (WIDTH * C)
        picture = tl.load(index + n)
        top = tl.load(y + n)
        left = tl.load(x + n)
        mirrored = tl.load(flip + n)
        # Nobody looks at these numbers on the host, which would have to wait for the device.
        inside = (picture >= 0) & (picture < M)
        inside = inside & (top >= 0) & (top <= H - HEIGHT) & (left >= 0) & (left <= W - WIDTH)
        # WIDTH and C are known to the compiler, so these divisions are multiplications.
        row = value // (WIDTH * C)
        within = value % (WIDTH * C)
        column = within // C
        column = tl.where(mirrored, WIDTH - 1 - column, column)
        start = ((picture * H + top) * W + left) * C
        offset = start + row.to(tl.int64) * W * C + (column * C + within % C)
        byte = tl.load(store + offset, mask=used & inside, other=0)
        normalised = tl.math.div_rn(byte.to(tl.float32) * 2.0 - 255.0, 255.0)
        normalised = tl.where(inside, normalised, float("nan"))
        tl.store(result + n * HEIGHT * (WIDTH * C) + value, normalised, mask=used)


def _crop_flip_triton(
    store: Tensor, index: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int]
) -> Tensor:
    pictures, height, width, channels = store.shape
    n, (h, w) = index.shape[0], size
    result = _empty(store, n, size)
    if n:
        grid = (triton.cdiv(h * w * channels, _BLOCK) * n,)
        with on_device(store):
            _crop_flip_kernel[grid](
                store, index.contiguous(), y.contiguous(), x.contiguous(), flip.contiguous(), result,
                pictures, height, width, h, w, channels, _BLOCK, num_warps=_NUM_WARPS, num_stages=1,
            )  # fmt: skip
    return result


def _empty(store: Tensor, n: int, size: tuple[int, int]) -> Tensor:
    return empty_channels_last(store, (n, store.shape[3], *size), torch.float32)


torch.library.define(
    "cyclegan_fast::crop_flip",
    "(Tensor store, Tensor index, Tensor y, Tensor x, Tensor flip, SymInt height, SymInt width, str impl) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


@torch.library.impl("cyclegan_fast::crop_flip", "default")
def _crop_flip(
    store: Tensor, index: Tensor, y: Tensor, x: Tensor, flip: Tensor, height: int, width: int, impl: str
) -> Tensor:
    size = (height, width)
    _check(store, index, y, x, flip, size)
    _check_values(store, index, y, x, size)
    available = {"triton": HAS_TRITON, "native": _native.available() and store.device.type == "cpu", "reference": True}
    chosen = resolve_impl("crop_flip", impl, store, available)
    if chosen == "triton":
        return _crop_flip_triton(store, index, y, x, flip, size)
    if chosen == "native":
        positions = (tensor.contiguous() for tensor in (index, y, x, flip))
        result: Tensor = torch.ops.cyclegan_fast_native.crop_flip(store, *positions, height, width)
        return result
    return crop_flip_ref(store, index, y, x, flip, size)


@torch.library.register_fake("cyclegan_fast::crop_flip")
def _crop_flip_fake(
    store: Tensor,
    index: Tensor,
    y: Tensor,
    x: Tensor,
    flip: Tensor,
    height: int,
    width: int,
    impl: str,  # noqa: ARG001
) -> Tensor:
    _check(store, index, y, x, flip, (height, width))
    return _empty(store, index.shape[0], (height, width))


@torch.library.register_vmap("cyclegan_fast::crop_flip")
def _crop_flip_vmap(*_: Any) -> Any:
    raise NotImplementedError("crop_flip cannot be used under torch.func.vmap: it takes a whole batch already")


def crop_flip(
    store: Tensor,
    index: Tensor,
    y: Tensor,
    x: Tensor,
    flip: Tensor,
    size: tuple[int, int],
    *,
    impl: str = "auto",
) -> Tensor:
    """Cut a window from each chosen picture, mirror it left-right where asked, and bring it to [-1, 1].

    store uint8 [M, H, W, C] contiguous, C from 1 to 4; index int64 [N], which picture each window is cut from; y, x
    int64 [N], the window's top left corner in pixels; flip bool [N]; size (h, w) in pixels. All on one device. Returns
    float32 [N, C, h, w] with the strides of channels_last: v / 127.5 - 1, rounded once. The picture is cropped first
    and mirrored then. The host never waits for the device.

    impl: "auto", "triton" (CUDA, or the CPU in Triton's interpreter), "native" (CPU) or "reference".

    Raises ValueError for a wrong shape, dtype, layout or size, for an implementation that is not available here, and
    on the CPU for a window outside its picture. On CUDA those values are not read by the host: such a window comes
    back as NaN from the Triton kernel, and the reference stops with PyTorch's device-side assertion.
    """
    if len(size) != 2:
        raise ValueError(f"crop_flip: size = {size} is not (height, width)")
    result: Tensor = torch.ops.cyclegan_fast.crop_flip(store, index, y, x, flip, size[0], size[1], impl)
    return result


def _check(store: Tensor, index: Tensor, y: Tensor, x: Tensor, flip: Tensor, size: tuple[int, int]) -> None:
    """Everything that can be known without reading a value."""
    if store.dim() != 4 or store.dtype != torch.uint8 or not store.is_contiguous():
        raise ValueError(
            f"crop_flip: store must be contiguous uint8 [M, H, W, C], but is {store.dtype} {list(store.shape)} with "
            f"strides {list(store.stride())}"
        )
    _, height, width, channels = store.shape
    if not 1 <= channels <= 4:
        raise ValueError(f"crop_flip: store has {channels} channels in its last dimension: 1 to 4 are possible")
    n = index.numel()
    for name, tensor, dtype in (
        ("index", index, torch.int64),
        ("y", y, torch.int64),
        ("x", x, torch.int64),
        ("flip", flip, torch.bool),
    ):
        if tensor.shape != (n,) or tensor.dtype != dtype or tensor.device != store.device:
            raise ValueError(
                f"crop_flip: {name} must be {dtype} [{n}] on {store.device}, but is {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    h, w = size
    if not (1 <= h <= height and 1 <= w <= width):
        raise ValueError(f"crop_flip: size = {size} does not fit into pictures of {height} x {width} (height x width)")
    if h * w * channels > _MOST_VALUES:
        raise ValueError(f"crop_flip: size = {size} with {channels} channels: at most {_MOST_VALUES} values a window")


def _check_values(store: Tensor, index: Tensor, y: Tensor, x: Tensor, size: tuple[int, int]) -> None:
    """Positions, on the CPU only: reading them from another device would make the host wait."""
    if store.device.type != "cpu" or not index.numel():
        return
    count, height, width, _ = store.shape
    h, w = size
    for name, tensor, last in (("index", index, count - 1), ("y", y, height - h), ("x", x, width - w)):
        low, high = (int(bound) for bound in torch.aminmax(tensor))
        if low < 0 or high > last:
            raise ValueError(
                f"crop_flip: {name} must lie in [0, {last}] for {count} pictures of {height} x {width} and windows of "
                f"{h} x {w}, but ranges from {low} to {high}"
            )


def _sample(channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
    """Arguments with every byte value, every corner, both directions, and more values than one program's."""
    generator = torch.Generator().manual_seed(channels)
    store = torch.randint(0, 256, (3, 41, 37, channels), dtype=torch.uint8, generator=generator)
    store.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    index = torch.tensor([0, 2, 1, 0, 2])
    y, x = torch.tensor([0, 8, 3, 8, 0]), torch.tensor([0, 4, 4, 0, 1])
    flip = torch.tensor([False, True, False, True, True])
    arguments = (tensor.to(device) for tensor in (store, index, y, x, flip))
    return (*arguments, (33, 33))  # type: ignore[return-value]


def _matches_reference(device: torch.device, impl: str) -> None:
    for channels in (1, 2, 3, 4):
        expected = crop_flip_ref(*_sample(channels, torch.device("cpu")))
        result = crop_flip(*_sample(channels, device), impl=impl)
        if not torch.equal(result.cpu(), expected):
            wrong = int((result.cpu() != expected).sum())
            raise AssertionError(f"{wrong} of {expected.numel()} values differ at {channels} channels")


register_check("crop_flip", "triton", lambda device: _matches_reference(device, "triton"))
register_check("crop_flip", "native", lambda device: _matches_reference(device, "native"), devices=("cpu",))


def gate_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, bool]]:
    """The kernel as training at 256 x 256 from pictures of 286 x 286 uses it, for the compile gate."""
    pointers = {"store": "*u8", "index": "*i64", "y": "*i64", "x": "*i64", "flip": "*i1", "result": "*fp32"}
    signature = {**pointers, "M": "i32", "H": "i32", "W": "i32", "HEIGHT": "i32:16"}
    return [
        (
            f"crop_flip C={channels}",
            _crop_flip_kernel,
            signature,
            {"WIDTH": 256, "C": channels, "BLOCK": _BLOCK},
            _NUM_WARPS,
            1,
            False,
        )
        for channels in (3, 1)
    ]
