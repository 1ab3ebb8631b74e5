"""The compiled operations by themselves, against plain float64 PyTorch: `torch.ops.cyclegan_fast_native.*`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.ops import _native
from cyclegan_fast.ops.crop_flip import crop_flip_ref

if not _native.available():
    pytest.skip(_native.why_not(), allow_module_level=True)

NATIVE = torch.ops.cyclegan_fast_native
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16")
# A relative error of float32 sums, and of one rounding to bfloat16 (8 bits): the reference is exact beside both.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8}
EPS = 1e-5

# (N, C, H, W), pad, and why.
SHAPES = [
    ((1, 64, 32, 24), 3, "the stem's channels, H != W"),
    ((2, 256, 9, 8), 1, "a residual block's channels, odd height"),
    ((1, 32, 4, 4), 3, "every pixel is mirrored: the side is pad + 1"),
    ((3, 5, 7, 6), 1, "fewer channels than a vector"),
    ((1, 17, 5, 9), 2, "one channel more than a vector of AVX2"),
    ((2, 33, 3, 3), 2, "one channel more than a vector of AVX-512, pixels that mirror to both sides"),
    ((1, 1, 6, 5), 0, "one channel"),
    ((2, 3, 1, 7), 0, "one row"),
    ((1, 70, 40, 50), 3, "several chunks of rows, a tail of channels"),
    ((1, 512, 6, 6), 0, "more channels than a block of the first-level cache likes"),
    ((9, 8, 2, 2), 1, "a batch, sides of two"),
    ((2, 64, 96, 80), 1, "several chunks and blocks for each of two pictures"),
]
# Activation, residual, affine: every pair of values occurs.
OPTIONS = [
    (0, None, False),
    (0, "strided", True),
    (1, None, True),
    (1, "dense", False),
    (1, "strided", False),
    (2, "dense", True),
    (2, None, False),
    (2, "strided", False),
    (0, "dense", False),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody writes is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def rand(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def interior(shape: tuple[int, ...], *, seed: int, dtype: torch.dtype) -> Tensor:
    """The interior of a padded tensor, as the residual stream hands it over."""
    n, c, h, w = shape
    return rand(n, c, h + 2, w + 4, seed=seed, dtype=dtype)[:, :, 1:-1, 2:-2]


def expected(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    slope: float,
    pad: int,
) -> Tensor:
    """The operation in the dtype of x, from the plainest functions there are."""
    mean = x.mean((2, 3), keepdim=True)
    y = (x - mean) / ((x - mean).square().mean((2, 3), keepdim=True) + EPS).sqrt()
    if weight is not None and bias is not None:
        y = y * weight[:, None, None] + bias[:, None, None]
    if activation:
        y = torch.where(y > 0, y, y * (slope if activation == 2 else 0.0))
    if residual is not None:
        y = y + residual
    return F.pad(y, (pad,) * 4, mode="reflect") if pad else y


def assert_near(actual: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within `scale` tolerances of the largest number of `wanted` or of 1."""
    assert actual.shape == wanted.shape
    error = (actual.double() - wanted).abs().max().item()
    assert error <= TOLERANCE[dtype] * scale * max(1.0, wanted.abs().max().item()), error


@pytest.mark.parametrize(("activation", "residual", "affine"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "pad", "why"), SHAPES, ids=[why for *_, why in SHAPES])
def test_forward_and_gradients(
    shape: tuple[int, int, int, int],
    pad: int,
    why: str,
    dtype: torch.dtype,
    activation: int,
    residual: str | None,
    affine: bool,
    isa: str,
    poisoned: None,
) -> None:
    n, c, h, w = shape
    x = rand(*shape, seed=1, dtype=dtype) * 2 + 0.5
    weight = torch.linspace(0.5, 1.5, c) if affine else None
    bias = torch.linspace(-0.4, 0.4, c) if affine else None
    more = None
    if residual is not None:
        more = interior(shape, seed=2, dtype=dtype) if residual == "strided" else rand(*shape, seed=2, dtype=dtype)
    grad_y = rand(n, c, h + 2 * pad, w + 2 * pad, seed=3, dtype=dtype)

    y, mean, rstd = NATIVE.instance_norm_forward(x, weight, bias, more, EPS, activation, 0.2, pad)
    grads = NATIVE.instance_norm_backward(grad_y, x, mean, rstd, weight, bias, activation, 0.2, pad, more is not None)

    leaves = [t.double().requires_grad_() if t is not None else None for t in (x, weight, bias, more)]
    wanted = expected(*leaves, activation, 0.2, pad)
    wanted.backward(grad_y.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, wanted.detach(), dtype)
    assert_near(mean, leaves[0].detach().mean((2, 3)), torch.float32)
    # The sums of a weight's gradient have N H W terms of either sign, each as wrong as a rounding is.
    for actual, leaf, scale in zip(grads, [leaves[0], leaves[3], leaves[1], leaves[2]], [4, 4, 4, 4], strict=True):
        if leaf is None:
            assert actual.numel() == 0
            continue
        assert leaf.grad is not None
        # Pixels whose activation lies within a rounding of its kink may take either side's slope.
        assert_near(_without_kinks(actual, leaf.grad, wanted=expected(*leaves, 0, 0.0, 0)), leaf.grad, dtype, scale)


def _without_kinks(actual: Tensor, wanted_gradient: Tensor, wanted: Tensor) -> Tensor:
    if actual.dim() != 4:
        return actual
    return torch.where(wanted.detach().abs() < 1e-5, wanted_gradient.to(actual.dtype), actual)


def test_gradients_of_float32_agree_with_autograd_to_its_precision(isa: str) -> None:
    x = rand(2, 24, 12, 10, seed=1, dtype=torch.float32)
    grad_y = rand(2, 24, 14, 12, seed=2, dtype=torch.float32)
    _, mean, rstd = NATIVE.instance_norm_forward(x, None, None, None, EPS, 0, 0.0, 1)
    grad_x = NATIVE.instance_norm_backward(grad_y, x, mean, rstd, None, None, 0, 0.0, 1, False)[0]
    leaf = x.double().requires_grad_()
    expected(leaf, None, None, None, 0, 0.0, 1).backward(grad_y.double())
    assert leaf.grad is not None
    assert (grad_x.double() - leaf.grad).abs().max() < 5e-6


def test_statistics_survive_a_mean_far_above_the_deviation(isa: str) -> None:
    x = rand(2, 20, 70, 60, seed=4, dtype=torch.float32) + 1e4
    y, mean, rstd = NATIVE.instance_norm_forward(x, None, None, None, EPS, 0, 0.0, 0)
    exact = x.double()
    assert (mean.double() - exact.mean((2, 3))).abs().max() <= 2.0**-11  # half a unit in the last place of 1e4
    deviation = (exact.var((2, 3), correction=0) + EPS).rsqrt()
    assert (rstd.double() / deviation - 1).abs().max() < 1e-6
    assert (y.double() - expected(exact, None, None, None, 0, 0.0, 0)).abs().max() < 1e-5


def test_statistics_survive_a_step_between_halves(isa: str) -> None:
    """The first rows say nothing about the others: a shift taken from them would cancel."""
    x = rand(1, 16, 64, 40, seed=4, dtype=torch.float32)
    x[:, :, :8] += 1e4
    _, mean, rstd = NATIVE.instance_norm_forward(x, None, None, None, EPS, 0, 0.0, 0)
    exact = x.double()
    assert (mean.double() / exact.mean((2, 3)) - 1).abs().max() < 1e-6
    assert (rstd.double() * (exact.var((2, 3), correction=0) + EPS).sqrt() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_for_any_number_of_threads_and_again(dtype: torch.dtype, isa: str, threads: None) -> None:
    x = rand(3, 40, 90, 70, seed=5, dtype=dtype)
    weight, bias = torch.linspace(0.5, 1.5, 40), torch.linspace(-1, 1, 40)
    grad_y = rand(3, 40, 96, 76, seed=6, dtype=dtype)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        y, mean, rstd = NATIVE.instance_norm_forward(x, weight, bias, x, EPS, 1, 0.0, 3)
        results.append(
            (y, mean, rstd, *NATIVE.instance_norm_backward(grad_y, x, mean, rstd, weight, bias, 1, 0.0, 3, True))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_contiguous_gradient_is_converted(isa: str) -> None:
    x = rand(2, 8, 6, 5, seed=7, dtype=torch.float32)
    _, mean, rstd = NATIVE.instance_norm_forward(x, None, None, None, EPS, 1, 0.0, 1)
    grad_y = rand(2, 8, 8, 7, seed=8, dtype=torch.float32)
    variants = [grad_y, grad_y.contiguous(), grad_y.new_ones(1).expand_as(grad_y), torch.ones_like(grad_y)]
    grads = [NATIVE.instance_norm_backward(g, x, mean, rstd, None, None, 1, 0.0, 1, False)[0] for g in variants]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[2], grads[3])


def test_nan_and_infinity_stay_visible(isa: str) -> None:
    for value in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            x = rand(1, 32, 8, 8, seed=9, dtype=dtype)
            x[0, 3, 4, 5] = value
            y, _, _ = NATIVE.instance_norm_forward(x, None, None, None, EPS, 1, 0.0, 1)
            assert y[0, 3].isnan().all()
            assert y[0, :3].isfinite().all()
            assert y[0, 4:].isfinite().all()


def test_a_nan_parameter_of_any_bits_stays_visible(isa: str) -> None:
    weight = torch.tensor([-1], dtype=torch.int32).view(torch.float32).repeat(32)
    x = rand(1, 32, 4, 4, seed=9, dtype=torch.bfloat16)
    y, _, _ = NATIVE.instance_norm_forward(x, weight, torch.zeros(32), None, EPS, 0, 0.0, 0)
    assert y.isnan().all()


def test_bfloat16_is_rounded_to_nearest_even(isa: str) -> None:
    """The numbers that a residual brings through an identity are rounded as PyTorch rounds."""
    x = torch.zeros(1, 64, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    residual = rand(1, 64, 16, 16, seed=10, dtype=torch.bfloat16)
    weight, bias = torch.ones(64), torch.full((64,), 1 / 3)
    y, _, _ = NATIVE.instance_norm_forward(x, weight, bias, residual, EPS, 0, 0.0, 0)
    assert torch.equal(y, (residual.float() + bias[:, None, None]).to(torch.bfloat16))


@pytest.mark.parametrize("channels", [64, 19])
def test_numbers_half_way_between_two_of_bfloat16_go_to_the_even_one(channels: int, isa: str) -> None:
    """All channels but the first are half-way, of either sign, above an even number and above an odd one."""
    x = torch.zeros(1, channels, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    bias = 1 + (2 * torch.arange(channels, dtype=torch.float32) + 1) * 2.0**-8
    bias[0] = 1 / 3
    bias[1::2] *= -1
    y, _, _ = NATIVE.instance_norm_forward(x, torch.ones(channels), bias, None, EPS, 0, 0.0, 1)
    assert torch.equal(y, bias.to(torch.bfloat16)[None, :, None, None].expand_as(y))


@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_half_way_between_two_of_bfloat16_go_to_the_even_one(channels: int, residual: bool, isa: str) -> None:
    """dx is g less its mean, -2^-8: half-way for 1, above an even number, and 1 + 2^-7, above an odd one."""
    pixels = torch.tensor([-0.25, 0.0] + [1.0, -1.0] * 15 + [1 + 2.0**-7, -1 - 2.0**-7] * 16)
    grad = pixels.view(1, 1, 8, 8).repeat(1, channels, 1, 1).to(torch.bfloat16)
    grad = grad.contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros_like(grad)
    mean, rstd = torch.zeros(1, channels), torch.ones(1, channels)
    dx, dresidual, _, _ = NATIVE.instance_norm_backward(grad, zeros, mean, rstd, None, None, 0, 0.0, 0, residual)
    expected = (grad.float() + 2.0**-8).to(torch.bfloat16)
    assert set(expected[0, 0].flatten().tolist()) >= {1.0, 1 + 2.0**-6}
    assert torch.equal(dx, expected)
    if residual:
        assert torch.equal(dresidual, grad)


def test_an_empty_batch() -> None:
    x = torch.empty(0, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    y, mean, rstd = NATIVE.instance_norm_forward(x, torch.ones(8), torch.ones(8), None, EPS, 0, 0.0, 1)
    assert y.shape == (0, 8, 6, 6)
    grads = NATIVE.instance_norm_backward(y, x, mean, rstd, torch.ones(8), torch.ones(8), 0, 0.0, 1, False)
    assert torch.equal(grads[2], torch.zeros(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "channels_last"),
        ({"x": torch.zeros(8, 4, 4)}, "dimensions"),
        ({"x": torch.zeros(1, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)}, "float32"),
        ({"pad": 4}, "pad = 4"),
        ({"pad": -1}, "pad = -1"),
        ({"activation": 3}, "activation = 3"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, "bias"),
        ({"residual": torch.zeros(1, 8, 4, 5)}, "residual"),
        ({"residual": torch.zeros(1, 8, 4, 4)}, "adjacent"),
        ({"residual": torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16)}, "residual"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, object], message: str) -> None:
    x = torch.zeros(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "weight": None, "bias": None, "residual": None, "eps": EPS, "activation": 0} | {
        "negative_slope": 0.2,
        "pad": 0,
    }
    with pytest.raises(RuntimeError, match=message):
        NATIVE.instance_norm_forward(**(arguments | change))


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    before = NATIVE.current_isa()
    with pytest.raises(RuntimeError, match="instruction set 4"):
        NATIVE.set_isa(4)
    assert NATIVE.current_isa() == before


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crop_flip_gives_the_bits_of_the_reference(channels: int) -> None:
    generator = torch.Generator().manual_seed(11)
    store = torch.randint(0, 256, (5, 40, 33, channels), generator=generator, dtype=torch.uint8)
    store.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    index = torch.tensor([4, 0, 0, 2, 1])
    y, x = torch.tensor([0, 7, 16, 3, 1]), torch.tensor([0, 1, 13, 8, 2])
    flip = torch.tensor([False, True, False, True, True])
    actual = NATIVE.crop_flip(store, index, y, x, flip, 24, 20)
    wanted = crop_flip_ref(store, index, y, x, flip, (24, 20))
    assert torch.equal(actual, wanted)
    assert actual.stride() == wanted.stride()


@pytest.mark.parametrize(("name", "value"), [("index", 5), ("index", -1), ("y", 17), ("x", 14), ("x", -1)])
def test_crop_flip_refuses_a_window_outside(name: str, value: int) -> None:
    store = torch.zeros(5, 40, 33, 3, dtype=torch.uint8)
    arguments = {key: torch.tensor([0, 1]) for key in ("index", "y", "x")}
    arguments[name][1] = value
    with pytest.raises(RuntimeError, match="window 1"):
        NATIVE.crop_flip(store, *arguments.values(), torch.zeros(2, dtype=torch.bool), 24, 20)


def test_the_cuda_part_loads_without_a_gpu_and_says_so() -> None:
    if not _native.has_cuda():
        assert _native.why_not(cuda=True)
        pytest.skip(_native.why_not(cuda=True))
    assert NATIVE.set_cuda_path(0) == 0
