"""The history of generated pictures (Shrivastava et al. 2017, section 2.3) on the device, in one kernel.

Picture i of a batch, in order, with p = count + i pictures before it and a buffer of S slots:

    p < S:                       buffer[p] <- images[i];  result[i] = images[i]
    p >= S and accept[i] < 1/2:  result[i] = buffer[slot[i]];  buffer[slot[i]] <- images[i]
    otherwise:                   result[i] = images[i]

which is the law of `training.image_pool.ImagePool`, also when several pictures of a batch draw one slot: the second
then gets the first. `count` is a device tensor, so that a captured CUDA graph goes on filling the pool at every replay;
the op does not advance it, because it belongs to the step: one counter of pictures serves both domains' pools.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyclegan_fast.ops._launch import HAS_TRITON, on_device, resolve_impl, tl, triton
from cyclegan_fast.ops._verify import register_check

__all__ = ["pool_exchange", "pool_exchange_ref"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = 1024
_NUM_WARPS = 4


def pool_exchange_ref(images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
    """The definition in plain PyTorch, for any device and without reading a value on the host."""
    returned = _empty(images).copy_(images)
    size = buffer.shape[0]
    if size == 0:
        return returned
    # As they lie in memory, where a picture is one block: other orders are copied value by value.
    order = (0, *sorted((1, 2, 3), key=images.stride, reverse=True))
    images, buffer, result = (tensor.permute(order) for tensor in (images, buffer, returned))
    for i in range(images.shape[0]):
        image, position = images[i : i + 1], count.view(1) + i
        stored = position < size
        swapped = ~stored & (accept[i] < 0.5)
        place = torch.where(stored, position, slot[i])
        old = buffer.index_select(0, place)
        result[i : i + 1] = torch.where(swapped, old, image)
        buffer.index_copy_(0, place, torch.where(stored | swapped, image, old))
    return returned


if HAS_TRITON:

    @triton.jit
    def _pool_exchange_kernel(
        images,  # [N, NUMEL] with a pitch
        buffer,  # [SIZE, NUMEL] with a pitch, read and written
        count,  # int64, one element
        accept,  # float32 or float64 [N]
        slot,  # int64 [N]
        result,  # [N, NUMEL]
        N,
        SIZE,
        NUMEL,
        image_pitch,
        buffer_pitch,
        BLOCK: tl.constexpr,
    ):
        """BLOCK values, the same in each picture, through the whole batch in order.

        What the pictures of a batch exchange with one another happens between the same values of each, so within one
        program, and programs need nothing of one another.
        """
        value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        used = value < NUMEL
        position = tl.load(count)
        nothing = tl.full((BLOCK,), float("nan"), tl.float32).to(images.dtype.element_ty)
        for _ in range(N):
            image = tl.load(images + value, mask=used)
            stored = position < SIZE
            swapped = (position >= SIZE) & (tl.load(accept) < 0.5) & (SIZE > 0)
            place = tl.where(stored, position, tl.load(slot))
            inside = (place >= 0) & (place < SIZE)
            at = buffer + place * buffer_pitch + value
            old = tl.load(at, mask=used & swapped & inside)
            # Nobody looks at the slots on the host, which would have to wait for the device.
            old = tl.where(inside, old, nothing)
            tl.store(result + value, tl.where(swapped, old, image), mask=used)
            tl.store(at, image, mask=used & (stored | swapped) & inside)
            # The next picture may read what was just written, and perhaps with another thread.
            tl.debug_barrier()
            images += image_pitch
            result += NUMEL
            accept += 1
            slot += 1
            position += 1


def _pool_exchange_triton(images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
    result = _empty(images)
    numel = images[0].numel() if images.shape[0] else 0
    if numel:
        # One stage: a pipelined loop would load a slot before the picture before has been written to it.
        with on_device(images):
            _pool_exchange_kernel[(triton.cdiv(numel, _BLOCK),)](
                images, buffer, count, accept.contiguous(), slot.contiguous(), result,
                images.shape[0], buffer.shape[0], numel, images.stride(0), buffer.stride(0), _BLOCK,
                num_warps=_NUM_WARPS, num_stages=1,
            )  # fmt: skip
    return result


def _empty(images: Tensor) -> Tensor:
    """Memory for [N, C, H, W] with the pictures in the memory order of `images` and dense one after another."""
    numel = images.shape[1] * images.shape[2] * images.shape[3]
    strides = (numel, *images.stride()[1:])
    return torch.empty_strided(images.shape, strides, dtype=images.dtype, device=images.device)


torch.library.define(
    "cyclegan_fast::pool_exchange",
    "(Tensor images, Tensor(a!) buffer, Tensor count, Tensor accept, Tensor slot, str impl) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


@torch.library.impl("cyclegan_fast::pool_exchange", "default")
def _pool_exchange(images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor, impl: str) -> Tensor:
    _check(images, buffer, count, accept, slot)
    _check_values(buffer, count, accept, slot)
    available = {"triton": HAS_TRITON, "native": False, "reference": True}
    chosen = resolve_impl("pool_exchange", impl, images, available)
    if chosen == "triton":
        return _pool_exchange_triton(images, buffer, count, accept, slot)
    return pool_exchange_ref(images, buffer, count, accept, slot)


@torch.library.register_fake("cyclegan_fast::pool_exchange")
def _pool_exchange_fake(
    images: Tensor,
    buffer: Tensor,
    count: Tensor,
    accept: Tensor,
    slot: Tensor,
    impl: str,  # noqa: ARG001
) -> Tensor:
    _check(images, buffer, count, accept, slot)
    return _empty(images)


@torch.library.register_vmap("cyclegan_fast::pool_exchange")
def _pool_exchange_vmap(*_: Any) -> Any:
    raise NotImplementedError("pool_exchange cannot be used under torch.func.vmap: its pictures come one after another")


def pool_exchange(
    images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Pictures for the discriminator in the place of `images`; `buffer` is changed in place.

    images [N, C, H, W], float32, bfloat16, float16 or float64, each picture dense in memory, in whatever order, with
    any distance from one to the next; buffer [S, C, H, W], the same dtype and the same memory order of a picture, not
    overlapping `images`; S may be 0. count int64, one element: how many pictures were offered before this batch, of
    which buffer[:min(count, S)] holds those that were kept; the caller advances it by N. accept float32 or float64
    [N] in [0, 1), below 1/2 means exchange; slot int64 [N] in [0, S). Draws for pictures that are stored because the
    pool is not full are ignored. All on one device; the host never waits for it, and nothing but the result is
    allocated, so that the op can be captured into a CUDA graph.

    Returns [N, C, H, W] in the dtype and memory order of `images`, detached: there is no gradient.

    impl: "auto", "triton" (CUDA, or the CPU in Triton's interpreter) or "reference".

    Raises ValueError for a wrong shape, dtype, device or layout, for a buffer that requires a gradient, for an
    implementation that is not available here, and on the CPU for a negative count or a slot outside the buffer. On CUDA
    those values are not read by the host: the Triton kernel then returns NaN for such a picture and leaves the buffer
    alone, and the reference stops with PyTorch's device-side assertion.
    """
    result: Tensor = torch.ops.cyclegan_fast.pool_exchange(images.detach(), buffer, count, accept, slot, impl)
    return result


def _check(images: Tensor, buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor) -> None:
    """Everything that can be known without reading a value."""
    if images.dim() != 4 or buffer.dim() != 4 or images.shape[1:] != buffer.shape[1:]:
        raise ValueError(
            f"pool_exchange: images {list(images.shape)} and buffer {list(buffer.shape)} are not [N, C, H, W] and "
            "[S, C, H, W]"
        )
    if images.dtype not in _DTYPES or buffer.dtype != images.dtype or buffer.device != images.device:
        raise ValueError(
            f"pool_exchange: images ({images.dtype} on {images.device}) and buffer ({buffer.dtype} on "
            f"{buffer.device}) must have one floating dtype (of 2 bytes at least) and one device"
        )
    if buffer.requires_grad:
        raise ValueError("pool_exchange: buffer is changed in place and must not require a gradient")
    if not _same_dense_order(images, buffer):
        raise ValueError(
            f"pool_exchange: pictures must be dense and in one memory order, but images have strides "
            f"{list(images.stride())} and buffer {list(buffer.stride())} for {list(images.shape)}"
        )
    n = images.shape[0]
    for name, tensor, shapes, dtypes in (
        ("count", count, ((), (1,)), (torch.int64,)),
        ("accept", accept, ((n,),), (torch.float32, torch.float64)),
        ("slot", slot, ((n,),), (torch.int64,)),
    ):
        if tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes or tensor.device != images.device:
            raise ValueError(
                f"pool_exchange: {name} must be {' or '.join(map(str, dtypes))} {list(shapes[-1])} on "
                f"{images.device}, but is {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _same_dense_order(images: Tensor, buffer: Tensor) -> bool:
    """Whether each picture of both occupies consecutive memory, its values in the same order."""
    dims = [d for d in (1, 2, 3) if images.shape[d] > 1]
    if any(images.stride(d) != buffer.stride(d) for d in dims):
        return False
    expected = 1
    for d in sorted(dims, key=images.stride):
        if images.stride(d) != expected:
            return False
        expected *= images.shape[d]
    return buffer.shape[0] <= 1 or buffer.stride(0) >= expected


def _check_values(buffer: Tensor, count: Tensor, accept: Tensor, slot: Tensor) -> None:
    """Values, on the CPU only: reading them from another device would make the host wait."""
    size = buffer.shape[0]
    if buffer.device.type != "cpu" or not size or not slot.numel():
        return
    first = int(count)
    if first < 0:
        raise ValueError(f"pool_exchange: count must be at least 0, but is {first}")
    exchanged = slot[max(size - first, 0) :][accept[max(size - first, 0) :] < 0.5]
    if exchanged.numel() and not bool((exchanged >= 0).all() and (exchanged < size).all()):
        raise ValueError(f"pool_exchange: slot must lie in [0, {size}), but is {slot.tolist()}")


def _matches_reference(device: torch.device, impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = torch.zeros(3, 3, 20, 21, dtype=dtype).to(memory_format=torch.channels_last)
        held = expected.clone().to(device)
        for step in range(3):
            # Seven pictures fill the pool in their middle and draw some slots several times.
            images = torch.randn(7, 3, 20, 21, generator=generator).to(dtype).to(memory_format=torch.channels_last)
            accept = torch.rand(7, generator=generator, dtype=torch.float64)
            slot = torch.randint(0, 3, (7,), generator=generator)
            count = torch.tensor([7 * step])
            right = pool_exchange_ref(images, expected, count, accept, slot)
            arguments = (tensor.to(device) for tensor in (count, accept, slot))
            result = pool_exchange(images.to(device), held, *arguments, impl=impl)
            if not torch.equal(result.cpu(), right) or not torch.equal(held.cpu(), expected):
                raise AssertionError(f"pictures or buffer differ in {dtype} after {step + 1} batches")


register_check("pool_exchange", "triton", lambda device: _matches_reference(device, "triton"))


def gate_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, bool]]:
    """The kernel at 3 x 256 x 256, in bf16 and fp32, for the compile gate."""
    cases = []
    for dtype, batch in (("bf16", 1), ("bf16", 2), ("fp32", 1), ("fp32", 2)):
        pictures = {"images": f"*{dtype}", "buffer": f"*{dtype}"}
        draws = {"count": "*i64", "accept": "*fp64", "slot": "*i64", "result": f"*{dtype}"}
        sizes = {"SIZE": "i32", "NUMEL": "i32:16", "image_pitch": "i32:16", "buffer_pitch": "i32:16"}
        # Triton makes a constant of an argument that is 1.
        constants = {"BLOCK": _BLOCK} | ({"N": 1} if batch == 1 else {})
        signature = {**pictures, **draws, **sizes} | ({} if batch == 1 else {"N": "i32"})
        name = f"pool_exchange {dtype}, batch {'1' if batch == 1 else 'above 1'}"
        cases.append((name, _pool_exchange_kernel, signature, constants, _NUM_WARPS, 1, False))
    return cases
