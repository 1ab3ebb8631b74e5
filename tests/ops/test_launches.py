"""What is launched at the networks' shapes: enough programs, kernels that the compile gate knows, 64-bit offsets."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclegan_fast.ops import _launch

if not _launch.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from launches import outermost_programs, recorded

from cyclegan_fast.ops import _border_triton as borders
from cyclegan_fast.ops import _flat_conv_triton as flat
from cyclegan_fast.ops import _instance_norm_launch as norm
from cyclegan_fast.ops import _instance_norm_triton as norm_kernels
from cyclegan_fast.ops import _reflect_conv_triton as thin

# The package's names of these are its functions.
crop_flip: Any = importlib.import_module("cyclegan_fast.ops.crop_flip")
image_pool: Any = importlib.import_module("cyclegan_fast.ops.image_pool")
MODULES = (borders, flat, norm_kernels, thin, crop_flip, image_pool)
BF16 = torch.bfloat16
DTYPES = {"bf16": BF16, "fp16": torch.float16, "fp32": torch.float32}


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)


def normalise(c: int, side: int, pad: int, activation: int, affine: bool, residual: bool, dtype: str) -> None:
    kind = DTYPES[dtype]
    x, more = meta(1, c, side, side, dtype=kind), meta(1, c, side + 2, side + 2, dtype=kind)[:, :, 1:-1, 1:-1]
    parameters = (meta(c, dtype=torch.float32), meta(c, dtype=torch.float32)) if affine else (None, None)
    y, mean, rstd = norm.forward(x, *parameters, more if residual else None, 1e-5, activation, 0.2, pad)
    norm.backward(y, x, mean, rstd, *parameters, activation, 0.2, pad, residual)


def convolve_thin(dtype: torch.dtype, weight_format: torch.memory_format) -> None:
    """Stem and head with all their gradients."""
    picture, wide = meta(1, 3, 256, 256, dtype=dtype), meta(1, 64, 256, 256, dtype=dtype)
    for inputs, outputs, activation in ((3, 64, 0), (64, 3, 3)):
        weight = meta(outputs, inputs, 7, 7, dtype=dtype).contiguous(memory_format=weight_format)
        bias = meta(outputs, dtype=dtype)
        x, y = (picture, wide) if inputs == 3 else (wide, picture)
        forward, backward = (thin.thin_in, thin.thin_out) if inputs == 3 else (thin.thin_out, thin.thin_in)
        forward(x, weight, bias, 3, activation, full=False)
        borders.fold(backward(y, weight, None, 3, 0, full=True), 3)
    thin.thin_weight_grad(picture, wide, 7, 3, full=False)
    thin.thin_weight_grad(picture, wide, 7, 3, full=True)


def convolve_flat(batch: int, dtype: torch.dtype) -> None:
    """A convolution of a residual block, padded by itself and by the norm before it, with all gradients."""
    x, padded = meta(batch, 256, 64, 64, dtype=dtype), meta(batch, 256, 66, 66, dtype=dtype)
    weight, bias = meta(256, 256, 3, 3, dtype=dtype), meta(256, dtype=dtype)
    flat.flat_conv(x, weight, bias, pad=1)
    flat.flat_conv(padded, weight, bias)
    zeroed = flat.zeroed(x, (66, 66))
    borders.fold(flat.flat_input_grad(zeroed, weight), 1)
    flat.flat_weight_grad(borders.border(x, 1, 66, 66, reflect=True), zeroed)


def fused_flat() -> None:
    """The forms of `flat_conv3x3`, forward only."""
    x, padded = meta(1, 256, 64, 64), meta(1, 256, 66, 66)
    weight, bias, scale = meta(256, 256, 3, 3), meta(256), meta(1, 256, dtype=torch.float32)
    flat.flat_conv(x, weight, bias, pad=1, scale=scale, shift=scale, relu=True)
    flat.flat_conv(padded, weight, bias, scale=scale, shift=scale, relu=True)
    flat.flat_conv(padded, weight, bias, statistics=True)


def cut(batch: int) -> None:
    index, flip = meta(batch, dtype=torch.int64), meta(batch, dtype=torch.bool)
    store = torch.empty(500, 286, 286, 3, dtype=torch.uint8, device="meta")
    crop_flip._crop_flip_triton(store, index, index, index, flip, (256, 256))


def exchange(batch: int, dtype: torch.dtype) -> None:
    draws = meta(1, dtype=torch.int64), meta(batch, dtype=torch.float64), meta(batch, dtype=torch.int64)
    image_pool._pool_exchange_triton(meta(batch, 3, 256, 256, dtype=dtype), meta(50, 3, 256, 256, dtype=dtype), *draws)


CALLS: dict[str, Callable[[], Any]] = {
    **{f"instance_norm {layer}": lambda layer=layer: normalise(*layer) for layer in norm._LAYERS},
    "7x7": lambda: convolve_thin(BF16, torch.contiguous_format),
    "7x7, channels-last weight": lambda: convolve_thin(BF16, torch.channels_last),
    "7x7 fp16": lambda: convolve_thin(torch.float16, torch.channels_last),
    "7x7 fp32": lambda: convolve_thin(torch.float32, torch.channels_last),
    "3x3": lambda: convolve_flat(1, BF16),
    "3x3 batch 16": lambda: convolve_flat(16, BF16),
    "3x3 fp32": lambda: convolve_flat(1, torch.float32),
    "3x3 fused": fused_flat,
    "crop_flip": lambda: cut(1),
    "pool_exchange": lambda: exchange(1, BF16),
    "pool_exchange fp32": lambda: exchange(2, torch.float32),
}


def in_the_gate() -> set[tuple[Any, ...]]:
    return {
        _described(function.__name__, signature, constants, warps, stages)
        for module in (borders, flat, norm, thin, crop_flip, image_pool)
        for _, function, signature, constants, warps, stages, *_ in module.gate_cases()
    }


def _described(
    kernel: str, signature: dict[str, str], constants: dict[str, Any], warps: int, stages: int | None
) -> tuple[Any, ...]:
    return kernel, frozenset(signature.items()), frozenset(constants.items()), warps, stages or 3


@pytest.mark.parametrize("tma", [True, False], ids=["TMA", "pointers"])
@pytest.mark.parametrize("name", CALLS)
def test_the_gate_compiles_what_is_launched(name: str, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same types, constants, alignments, warps and stages: else the gate would judge another kernel."""
    monkeypatch.setattr(flat, "INTERPRETED", True)  # which has descriptors
    if not tma:
        monkeypatch.setattr(flat, "_has_tma", lambda *_: False)
    with recorded(*MODULES) as launches:
        CALLS[name]()
    assert launches
    known = in_the_gate()
    for launch in launches:
        described = _described(launch.kernel, launch.signature, launch.constants, launch.num_warps, launch.num_stages)
        assert described in known, launch


FILLING = 132 * 0.95  # of the multiprocessors of an H200


@pytest.mark.parametrize("layer", norm._LAYERS, ids=str)
def test_a_single_picture_fills_the_gpu(layer: tuple[Any, ...]) -> None:
    """At batch 1 every pass over a map has a program for each multiprocessor."""
    with recorded(*MODULES) as launches:
        normalise(*layer)
    passes = [launch for launch in launches if "finish" not in launch.kernel]
    assert len(passes) == 4
    assert min(launch.programs for launch in passes) >= FILLING


@pytest.mark.parametrize("name", ["7x7", "3x3", "crop_flip", "pool_exchange"])
def test_a_single_picture_fills_the_gpu_elsewhere_too(name: str) -> None:
    with recorded(*MODULES) as launches:
        CALLS[name]()
    assert min(launch.programs for launch in launches) >= FILLING


@pytest.mark.parametrize("name", CALLS)
def test_no_grid_is_larger_than_cuda_allows(name: str) -> None:
    with recorded(*MODULES) as launches:
        CALLS[name]()
        cut(100_000)
    assert all(max(launch.grid[1:], default=0) <= 65535 for launch in launches)


LARGE = (3, 64, 4032, 3024)  # a batch of three photographs of 12 megapixels: more than 2**31 values


def lazy(n: int, c: int, h: int, w: int) -> Tensor:
    """bfloat16 zeros [n, c, h, w], channels-last, of which only what is touched takes memory."""
    return torch.from_numpy(np.zeros((n, h, w, c), np.uint16)).view(BF16).permute(0, 3, 1, 2)


def normalise_large() -> None:
    n, c, h, w = LARGE
    x, floats = lazy(*LARGE), torch.ones(n, c)
    _, mean, rstd = norm.forward(x, floats[0], floats[0], lazy(*LARGE), 1e-5, 1, 0.2, 1)
    norm.backward(lazy(n, c, h + 2, w + 2), x, mean, rstd, floats[0], floats[0], 1, 0.2, 1, True)


def convolve_thin_large() -> None:
    n, _, h, w = LARGE
    weight, few = torch.ones(64, 3, 7, 7, dtype=BF16), lazy(n, 3, h, w)
    thin.thin_in(few, weight, None, 3, 0, full=False)
    thin.thin_out(lazy(*LARGE), weight, None, 3, 0, full=True)
    thin.thin_weight_grad(few, lazy(*LARGE), 7, 3, full=False)


def convolve_flat_large() -> None:
    weight = torch.ones(64, 64, 3, 3, dtype=BF16).contiguous(memory_format=torch.channels_last)
    x = lazy(*LARGE)
    flat.flat_conv(x, weight)
    flat.flat_conv(x, weight, pad=1)
    flat.flat_input_grad(x, weight)
    flat.flat_weight_grad(x, x)


def borders_large() -> None:
    _, _, h, w = LARGE
    x = lazy(*LARGE)
    borders.border(x, 1, h + 2, w + 2, reflect=True)
    borders.fold(x, 1)


@pytest.mark.skipif(not _launch.INTERPRETED, reason="the interpreter checks addresses")
@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of arithmetic with what the programs left out would have written
@pytest.mark.parametrize(
    ("call", "tma"),
    [
        (normalise_large, True),
        (convolve_thin_large, True),
        (convolve_flat_large, True),
        (convolve_flat_large, False),
        (borders_large, True),
    ],
)
def test_offsets_are_64_bit(call: Callable[[], None], tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outermost programs of each kernel stay within their tensors: offsets of 32 bits would leave them."""
    # Poison would fill all that memory; and with so many multiprocessors splits are short.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for module in (norm, thin, flat):
        monkeypatch.setattr(module, "multiprocessors", lambda _: 5_000)
    norm._plan.cache_clear()
    if not tma:
        monkeypatch.setattr(flat, "_has_tma", lambda *_: False)
    with outermost_programs(*MODULES) as furthest:
        call()
    norm._plan.cache_clear()
    reach = {name: elements for name, elements in furthest.items() if "finish" not in name}
    assert reach
    assert min(reach.values()) > 2**31, reach
