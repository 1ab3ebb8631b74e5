"""The compiled convolutions against float64 PyTorch, by themselves and behind `reflect_conv2d(impl="native")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import Tolerance, assert_close
from torch import Tensor

from cyclegan_fast.ops import _native, reflect_conv
from cyclegan_fast.ops.reflect_conv import cpu_kind, reflect_conv2d, reflect_conv2d_ref

if not _native.available():
    pytest.skip(_native.why_not(), allow_module_level=True)

NATIVE = torch.ops.cyclegan_fast_native
CHANNELS_LAST = torch.channels_last
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16")
WINOGRAD = Tolerance(0.0, 2e-5, "numbers up to 30 times the result's meet in Winograd's transforms")
DIRECT = Tolerance(0.0, 2e-6, "float32 sums in parts of a few hundred products")

# N, C, K, H, W, padding, and why.
CASES_3X3 = [
    (1, 64, 64, 16, 12, 1, "whole tiles, whole vectors"),
    (3, 5, 7, 7, 9, 1, "three pictures, odd sides, fewer channels than a vector"),
    (1, 1, 1, 3, 3, 0, "one result"),
    (1, 3, 17, 2, 2, 1, "the smallest picture that can be reflected, and one output more than a vector of AVX-512"),
    (2, 33, 20, 5, 6, 3, "a border wider than the kernel needs"),
    (1, 8, 40, 3, 30, 0, "one row of results"),
    (1, 300, 12, 9, 8, 0, "more channels than a block of the inner dimension"),
    (1, 96, 96, 112, 110, 1, "more tiles than are worked on at a time"),
]
# N, C, K, H, W, size, stride, padding, reflected, swapped, and why.
CASES_WEIGHT = [
    (1, 64, 128, 16, 20, 3, 2, 1, False, False, "the generator's strided layers"),
    (2, 3, 64, 12, 9, 7, 1, 3, True, False, "the stem: all taps of a row at once"),
    (1, 64, 3, 12, 9, 7, 1, 3, True, True, "the head: x and grad_y change places"),
    (2, 24, 1, 7, 6, 4, 1, 1, False, True, "the discriminator's last layer"),
    (3, 7, 5, 9, 11, 4, 2, 1, False, False, "odd sides, stride 2, an even kernel"),
    (1, 40, 20, 5, 5, 5, 3, 2, False, False, "stride 3"),
    (1, 33, 17, 4, 4, 1, 1, 0, False, False, "1x1"),
    (1, 4, 9, 3, 3, 3, 1, 0, False, False, "a single result"),
    (1, 16, 24, 70, 300, 3, 1, 1, True, False, "rows longer than a block, several chunks of rows"),
    (2, 20, 40, 150, 12, 3, 1, 2, False, False, "several rows in a block, several chunks, a zero border of two"),
]


def rand(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=CHANNELS_LAST) if len(shape) == 4 else values


def pad(x: Tensor, padding: int, reflect: bool) -> Tensor:
    return F.pad(x, (padding,) * 4, mode="reflect" if reflect else "constant") if padding else x


def dense_strides(shape: Any) -> tuple[int, ...]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


@pytest.mark.parametrize("case", CASES_3X3, ids=lambda case: case[-1])
def test_3x3_result_and_gradients(case: tuple[Any, ...], isa: str) -> None:
    n, c, k, h, w, padding, _ = case
    x, weight, bias = rand(n, c, h, w, seed=1), rand(k, c, 3, 3, seed=2) / (9 * c) ** 0.5, rand(k, seed=3)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    wanted = F.conv2d(pad(exact[0], padding, reflect=True), exact[1], bias.double())
    grad = rand(*wanted.shape, seed=4)
    grads = torch.autograd.grad(wanted, exact, grad.double())

    y = NATIVE.conv3x3_forward(x, weight, bias, padding, 0)
    assert_close(y, wanted, WINOGRAD, "y")
    assert y.stride() == dense_strides(y.shape)
    rectified = NATIVE.conv3x3_forward(x, weight, bias, padding, 1)
    assert torch.equal(rectified, y.relu())
    plain = NATIVE.conv3x3_forward(x, weight.contiguous(), None, padding, 0)
    assert_close(plain, wanted - bias.double()[:, None, None], WINOGRAD, "y without bias")
    assert_close(NATIVE.conv3x3_input_grad(grad, weight, padding, True), grads[0], WINOGRAD, "dx")
    grad_weight = NATIVE.conv3x3_weight_grad(grad, x, padding, True, False)
    assert_close(grad_weight, grads[1], WINOGRAD, "dweight")
    other = NATIVE.conv3x3_weight_grad(grad, x, padding, True, True)
    assert torch.equal(grad_weight, other)
    assert grad_weight.is_contiguous()
    assert other.stride() == dense_strides(other.shape)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_3x3_gradients_with_zeros_around(padding: int, isa: str) -> None:
    x, weight = rand(2, 9, 6, 7, seed=1), rand(11, 9, 3, 3, seed=2)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    wanted = F.conv2d(exact[0], exact[1], padding=padding)
    grad = rand(*wanted.shape, seed=4)
    grads = torch.autograd.grad(wanted, exact, grad.double())
    assert_close(NATIVE.conv3x3_input_grad(grad, weight, padding, False), grads[0], WINOGRAD, "dx")
    assert_close(NATIVE.conv3x3_weight_grad(grad, x, padding, False, True), grads[1], WINOGRAD, "dweight")


def test_3x3_errors_at_the_size_of_a_residual_block() -> None:
    x, weight = rand(1, 256, 66, 66, seed=1), rand(256, 256, 3, 3, seed=2) / 48
    wanted = F.conv2d(x.double(), weight.double())
    assert_close(NATIVE.conv3x3_forward(x, weight, None, 0, 0), wanted, WINOGRAD, "y")


# N, C, K, H, W, size, padding, and why.
CASES_THIN = [
    (2, 20, 3, 12, 9, 7, 3, "the head"),
    (1, 17, 1, 8, 60, 7, 3, "a gray picture, rows longer than a block"),
    (1, 5, 4, 6, 5, 5, 0, "padded by somebody else"),
    (1, 9, 2, 3, 3, 3, 2, "every pixel is mirrored"),
    (1, 300, 3, 4, 4, 4, 0, "one result, an even kernel, more channels than a block of the inner dimension"),
]


@pytest.mark.parametrize("case", CASES_THIN, ids=lambda case: case[-1])
def test_few_outputs(case: tuple[Any, ...], isa: str) -> None:
    n, c, k, h, w, size, padding, _ = case
    x, weight = rand(n, c, h, w, seed=1), rand(k, c, size, size, seed=2) / (c * size**2) ** 0.5
    bias = rand(k, seed=3)
    wanted = F.conv2d(pad(x.double(), padding, reflect=True), weight.double(), bias.double())
    y = NATIVE.thin_conv_forward(x, weight, bias, padding, 0)
    assert_close(y, wanted, DIRECT, "y")
    assert y.stride() == dense_strides(y.shape)
    assert torch.equal(NATIVE.thin_conv_forward(x, weight, bias, padding, 1), y.relu())
    plain = NATIVE.thin_conv_forward(x, weight.contiguous(), None, padding, 0)
    assert_close(plain, wanted - bias.double()[:, None, None], DIRECT, "y without bias")


@pytest.mark.parametrize("case", CASES_THIN, ids=lambda case: case[-1])
def test_input_gradient_of_few_inputs(case: tuple[Any, ...], isa: str) -> None:
    n, k, c, h, w, size, padding, _ = case
    x = torch.zeros(n, c, h, w, dtype=torch.float64, requires_grad=True)
    weight = rand(k, c, size, size, seed=2)
    y = F.conv2d(pad(x, padding, reflect=True), weight.double())
    grad = rand(*y.shape, seed=3)
    (wanted,) = torch.autograd.grad(y, x, grad.double())
    assert_close(NATIVE.thin_conv_input_grad(grad, weight, padding), wanted, DIRECT, "dx")


@pytest.mark.parametrize("case", CASES_WEIGHT, ids=lambda case: case[-1])
def test_weight_gradient(case: tuple[Any, ...], isa: str) -> None:
    n, c, k, h, w, size, stride, padding, reflect, swap, _ = case
    x, weight = rand(n, c, h, w, seed=1), torch.zeros(k, c, size, size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(pad(x.double(), padding, reflect), weight, stride=stride)
    grad = rand(*y.shape, seed=2)
    (wanted,) = torch.autograd.grad(y, weight, grad.double())
    for channels_last in (False, True):
        result = NATIVE.conv_weight_grad(grad, x, size, stride, padding, reflect, swap, channels_last)
        assert_close(result, wanted, DIRECT, "dweight")
        assert result.stride() == (dense_strides(result.shape) if channels_last else weight.stride())


def test_same_bits_for_any_number_of_threads_and_again(isa: str, threads: None) -> None:
    x, weight = rand(2, 40, 30, 41, seed=1), rand(24, 40, 3, 3, seed=2)
    grad = rand(2, 24, 30, 41, seed=3)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(
            (
                NATIVE.conv3x3_forward(x, weight, None, 1, 0),
                NATIVE.conv3x3_input_grad(grad, weight, 1, True),
                NATIVE.conv3x3_weight_grad(grad, x, 1, True, False),
                NATIVE.conv_weight_grad(grad, x, 3, 1, 1, True, False, False),
                NATIVE.thin_conv_forward(x, weight[:3], None, 1, 0),
                NATIVE.thin_conv_input_grad(grad, weight[:, :3], 1),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_visible(isa: str) -> None:
    """They may spoil the tile that they are in, and nothing else may happen to them."""
    weight = rand(5, 8, 3, 3, seed=2)
    for value in (float("nan"), float("inf")):
        x = rand(1, 8, 20, 20, seed=1)
        x[0, 3, 6, 6] = value
        y = NATIVE.conv3x3_forward(x, weight, None, 1, 0)
        assert not y[0, :, 5:8, 5:8].isfinite().any()
        assert y[0, :, 12:].isfinite().all()
        assert y[0, :, :, 12:].isfinite().all()


X, G, W = rand(1, 8, 6, 6, seed=1), rand(1, 4, 6, 6, seed=2), torch.zeros(4, 8, 3, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("conv3x3_forward", (X.contiguous(), W, None, 1, 0), "channels_last"),
        ("conv3x3_forward", (X.double(), W, None, 1, 0), "float32"),
        ("conv3x3_forward", (X, W[:, :7], None, 1, 0), "channels of x"),
        ("conv3x3_forward", (X, W[:, :, :2], None, 1, 0), "3, 3"),
        ("conv3x3_forward", (X, W, torch.zeros(5), 1, 0), "bias"),
        ("conv3x3_forward", (X, W, None, 6, 0), "padding = 6"),
        ("conv3x3_forward", (X, W, None, 1, 2), "activation = 2"),
        ("conv3x3_forward", (X[:, :, :2, :2].contiguous(memory_format=CHANNELS_LAST), W, None, 0, 0), "padding = 0"),
        ("conv3x3_input_grad", (G, W[:3], 1, True), "outputs of weight"),
        ("conv3x3_input_grad", (G, W, 4, True), "padding = 4"),
        ("conv3x3_weight_grad", (G, X, 0, True, False), "grad_y must be"),
        ("thin_conv_forward", (X, torch.zeros(5, 8, 3, 3), None, 1, 0), "at most 4 outputs"),
        ("thin_conv_forward", (X, W, None, 6, 0), "padding = 6"),
        ("thin_conv_forward", (X, W, None, 1, 3), "activation = 3"),
        ("thin_conv_input_grad", (G, W, 1), "at most 4 inputs"),
        ("thin_conv_input_grad", (G, W[:, :2], 4), "padding = 4"),
        ("conv_weight_grad", (G, X, 3, 2, 1, True, False, False), "grad_y must be"),
        ("conv_weight_grad", (G, X, 3, 2, 1, True, True, False), "stride"),
        ("conv_weight_grad", (G, X, 3, 1, 6, True, False, False), "padding"),
    ],
)
def test_wrong_inputs_are_refused(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(NATIVE, name)(*arguments)


# N, C, K, H, W, size, padding, activation, bias.
LAYERS = [
    (2, 16, 12, 9, 7, 3, 1, None, True),
    (1, 5, 20, 8, 6, 3, 0, "relu", False),
    (1, 3, 20, 9, 8, 3, 1, "tanh", True),
    (1, 20, 2, 9, 8, 3, 1, "tanh", True),
    (1, 3, 20, 9, 8, 7, 3, None, True),
    (2, 20, 3, 9, 8, 7, 3, "tanh", True),
    (1, 9, 10, 9, 8, 5, 2, "relu", True),
]


def leaves_of(layer: tuple[Any, ...]) -> list[Tensor]:
    n, c, k, h, w, size, _, _, bias = layer
    leaves = [rand(n, c, h, w, seed=1), rand(k, c, size, size, seed=2) / (c * size**2) ** 0.5]
    if bias:
        leaves.append(rand(k, seed=3))
    return [leaf.requires_grad_() for leaf in leaves]


def run(layer: tuple[Any, ...], leaves: list[Tensor], impl: str = "native") -> Tensor:
    return reflect_conv2d(*leaves, padding=layer[6], activation=layer[7], impl=impl)


@pytest.mark.parametrize("contiguous_weight", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_reflect_conv2d_and_all_its_gradients(layer: tuple[Any, ...], contiguous_weight: bool) -> None:
    leaves = leaves_of(layer)
    if contiguous_weight:
        leaves[1] = leaves[1].detach().contiguous().requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = reflect_conv2d_ref(exact[0], exact[1], exact[2] if len(exact) > 2 else None, layer[6], layer[7])
    y = run(layer, leaves)
    assert y.stride() == dense_strides(y.shape)
    assert_close(y, wanted, WINOGRAD, "y")
    grad = rand(*y.shape, seed=4)
    results = torch.autograd.grad(y, leaves, grad)
    references = torch.autograd.grad(wanted, exact, grad.double())
    for name, leaf, result, reference in zip(("dx", "dweight", "dbias"), leaves, results, references, strict=False):
        assert_close(result, reference, WINOGRAD, name)
        assert result.stride() == leaf.stride()


@pytest.mark.parametrize("layer", LAYERS[:5], ids=str)
def test_registration(layer: tuple[Any, ...]) -> None:
    leaves = leaves_of(layer)
    bias = leaves[2] if len(leaves) > 2 else None
    code = {None: 0, "relu": 1, "tanh": 3}[layer[7]]
    op = torch.ops.cyclegan_fast.reflect_conv2d.default
    torch.library.opcheck(op, (leaves[0], leaves[1], bias, layer[6], code, "native"))


@pytest.mark.parametrize("need", [[True, False, True], [False, True, False]])
def test_registration_of_backward(need: list[bool]) -> None:
    x, weight, *_ = (leaf.detach() for leaf in leaves_of(LAYERS[0]))
    grad = rand(2, 12, 9, 7, seed=5)
    op = torch.ops.cyclegan_fast.reflect_conv2d_backward.default
    torch.library.opcheck(op, (grad, x, weight, None, 1, 0, "native", need))


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflect_conv, "_FEWEST_PIXELS", 0)
    monkeypatch.setattr(reflect_conv, "MEASURED_ON_CPU", {(reflect_conv.cpu_capability(), "flat"): (1, 1)})
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    for impl in ("native", "auto"):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def network(*tensors: Tensor, impl: str = impl) -> Tensor:
            return run(layer, [2 * tensors[0], *tensors[1:]], impl).sin()

        y = network(*leaves)
        wanted = run(layer, [2 * leaves[0], *leaves[1:]], "native").sin()
        assert torch.equal(y, wanted)
        grads, others = (torch.autograd.grad(result.sum(), leaves) for result in (y, wanted))
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_auto_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = reflect_conv.cpu_capability()
    monkeypatch.setattr(reflect_conv, "MEASURED_ON_CPU", {(capability, "flat"): (32, 32)})
    x, weight = rand(1, 32, 32, 32, seed=1), rand(32, 32, 3, 3, seed=2)
    assert torch.equal(reflect_conv2d(x, weight, padding=1), reflect_conv2d(x, weight, padding=1, impl="native"))
    library = reflect_conv2d_ref(x, weight, None, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert reflect_conv2d(x, weight, padding=1).dtype == torch.bfloat16
    small = x[:, :, :8, :8].contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(reflect_conv2d(small, weight, padding=1), reflect_conv2d_ref(small, weight, None, 1))
    monkeypatch.setattr(reflect_conv, "MEASURED_ON_CPU", {(capability, "flat"): (32, 33)})
    assert torch.equal(reflect_conv2d(x, weight, padding=1), library)
    monkeypatch.setattr(reflect_conv, "MEASURED_ON_CPU", {("another", "flat"): (1, 1)})
    assert torch.equal(reflect_conv2d(x, weight, padding=1), library)


def test_measured_choices_name_kinds_that_exist() -> None:
    for (capability, kind), channels in reflect_conv.MEASURED_ON_CPU.items():
        assert capability in ("DEFAULT", "AVX2", "AVX512")
        assert kind in ("thin_in", "thin_out", "flat", "other")
        assert 0 < channels[0] <= channels[1]
    assert cpu_kind((256, 256, 3, 3)) == "flat"
    assert cpu_kind((64, 3, 7, 7)) == "thin_in"
    assert cpu_kind((3, 64, 7, 7)) == "thin_out"
    assert cpu_kind((64, 64, 5, 5)) == "other"


def test_what_the_kernels_cannot_do_is_said() -> None:
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    (grad,) = torch.autograd.grad(run(layer, leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    x, weight, bias = (leaf.detach() for leaf in leaves)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda v: reflect_conv2d(v, weight, bias, padding=1, impl="native"))(x[None])
    with pytest.raises(ValueError, match="no such implementation"):
        reflect_conv2d(x.double(), weight.double(), padding=1, impl="native")
    with pytest.raises(ValueError, match="no such implementation"), torch.autocast("cpu", torch.bfloat16):
        reflect_conv2d(x, weight, padding=1, impl="native")
    with pytest.raises(ValueError, match="channels-last"):
        reflect_conv2d(x.contiguous(), weight, padding=1, impl="native")
