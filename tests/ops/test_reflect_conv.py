"""`reflect_conv2d` and `flat_conv3x3` against their definitions in float64: results, gradients, layout, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import Tolerance, assert_close
from torch import Tensor

from cyclegan_fast.ops import _launch, reflect_conv
from cyclegan_fast.ops.flat_conv import flat_conv3x3, flat_conv3x3_ref
from cyclegan_fast.ops.reflect_conv import MEASURED, layer_kind, reflect_conv2d, reflect_conv2d_ref

if not _launch.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from cyclegan_fast.ops import _border_triton as borders
from cyclegan_fast.ops import _flat_conv_triton as flat
from cyclegan_fast.ops import _reflect_conv_triton as thin

CHANNELS_LAST = torch.channels_last
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROUNDOFF = {FP32: 2.0**-24, FP16: 2.0**-11, BF16: 2.0**-8}


def tolerance_of_result(dtype: torch.dtype) -> Tolerance:
    if dtype == FP32:
        return Tolerance(8 * ROUNDOFF[FP32], 32 * ROUNDOFF[FP32], "sums of up to 980 products of both signs, and tanh")
    return Tolerance(1.01 * ROUNDOFF[dtype], 32 * ROUNDOFF[FP32], "one rounding of a float32 sum")


def tolerance_of_grad(dtype: torch.dtype) -> Tolerance:
    if dtype == FP32:
        return Tolerance(16 * ROUNDOFF[FP32], 64 * ROUNDOFF[FP32], "tanh' loses digits where y is near 1; then sums")
    return Tolerance(
        1.01 * ROUNDOFF[dtype],
        2 * ROUNDOFF[dtype],
        "y and the gradient behind the activation are rounded, then up to nine copies before they are folded",
    )


@dataclass(frozen=True)
class Layer:
    n: int
    inputs: int
    outputs: int
    h: int
    w: int
    size: int
    padding: int
    activation: str | None
    bias: bool
    dtype: torch.dtype
    why: str

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        grow = 2 * self.padding - self.size + 1
        return self.n, self.outputs, self.h + grow, self.w + grow

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.n}x{self.inputs}x{self.h}x{self.w}"
        return f"{sizes}-{self.outputs}-k{self.size}p{self.padding}-{self.activation}-{dtype}"


LAYERS = (
    Layer(2, 3, 20, 5, 7, 7, 3, None, True, FP32, "stem: odd sides, channels that fill no block"),
    Layer(1, 1, 64, 4, 5, 7, 3, "relu", False, BF16, "stem of a gray picture: its stride of channels means nothing"),
    Layer(1, 4, 70, 4, 6, 3, 1, "tanh", True, FP16, "as many thin channels as there may be, and two blocks of wide"),
    Layer(3, 2, 3, 4, 4, 5, 2, None, True, FP32, "thin on both sides, three pictures"),
    Layer(1, 3, 8, 7, 9, 7, 0, None, True, FP32, "padded by somebody else"),
    Layer(2, 20, 3, 6, 5, 7, 3, "tanh", True, FP32, "head: odd sides, channels that fill no block"),
    Layer(1, 64, 1, 4, 5, 7, 3, None, True, BF16, "head of a gray picture"),
    Layer(1, 70, 4, 5, 4, 3, 2, "relu", False, FP16, "two steps of wide channels, padding wider than the kernel needs"),
    Layer(1, 5, 2, 1, 80, 1, 0, None, True, FP32, "a single row of 1x1, longer than a tile"),
    Layer(2, 32, 48, 4, 7, 3, 1, None, True, FP32, "3x3 by descriptors, two pictures"),
    Layer(1, 5, 7, 5, 4, 3, 1, "relu", True, FP32, "3x3 by pointers: rows of 20 bytes"),
    Layer(3, 16, 16, 5, 4, 3, 0, None, False, BF16, "3x3 on a padded input, three pictures"),
    Layer(1, 70, 64, 3, 25, 3, 1, "tanh", True, BF16, "3x3 with two steps of channels, the second partly filled"),
    Layer(1, 8, 136, 2, 2, 3, 1, None, True, FP16, "the smallest map that can be reflected; two blocks of columns"),
)
SMALL = (
    Layer(1, 2, 5, 4, 3, 3, 1, "tanh", True, FP32, "thin in"),
    Layer(1, 5, 2, 4, 3, 3, 1, "relu", True, FP32, "thin out"),
    Layer(1, 8, 16, 4, 3, 3, 1, None, True, FP32, "flat"),
)


def draw(layer: Layer, *, weight_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """x, weight and bias (if there is one) as leaves."""
    generator = torch.Generator().manual_seed(layer.inputs + 7 * layer.outputs + layer.w)
    x = torch.randn(layer.n, layer.inputs, layer.h, layer.w, generator=generator)
    weight = torch.randn(layer.outputs, layer.inputs, layer.size, layer.size, generator=generator)
    weight = weight / (layer.inputs * layer.size**2) ** 0.5
    tensors = [x.contiguous(memory_format=CHANNELS_LAST), weight.contiguous(memory_format=weight_format)]
    if layer.bias:
        tensors.append(torch.randn(layer.outputs, generator=generator))
    return [tensor.to(DEVICE, layer.dtype).requires_grad_() for tensor in tensors]


def draw_grad(layer: Layer) -> Tensor:
    grad = torch.randn(layer.output_shape, generator=torch.Generator().manual_seed(5))
    return grad.to(DEVICE, layer.dtype).contiguous(memory_format=CHANNELS_LAST)


def run(layer: Layer, leaves: Sequence[Tensor], impl: str = "triton") -> Tensor:
    return reflect_conv2d(*leaves, padding=layer.padding, activation=layer.activation, impl=impl)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_result_and_all_gradients(layer: Layer) -> None:
    leaves, grad = draw(layer), draw_grad(layer)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = reflect_conv2d_ref(*exact[:2], exact[2] if layer.bias else None, layer.padding, layer.activation)
    true_grads = torch.autograd.grad(truth, exact, grad.double())

    y = run(layer, leaves)
    assert y.dtype == layer.dtype
    assert y.stride() == dense_strides(layer.output_shape)
    assert_close(y, truth, tolerance_of_result(layer.dtype), "y")
    grads = torch.autograd.grad(y, leaves, grad)
    for name, leaf, result, wanted in zip(("dx", "dweight", "dbias"), leaves, grads, true_grads, strict=False):
        assert result.dtype == layer.dtype
        assert result.stride() == (dense_strides(leaf.shape) if name == "dx" else leaf.stride())
        assert_close(result, wanted, tolerance_of_grad(layer.dtype), name)


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_the_same_bits_each_time_and_whatever_is_asked_for(layer: Layer) -> None:
    leaves, grad = draw(layer), draw_grad(layer)
    first, second = run(layer, leaves), run(layer, leaves)
    assert torch.equal(first, second)
    together = torch.autograd.grad(first, leaves, grad)
    for leaf, wanted in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(second, leaf, grad, retain_graph=True)
        assert torch.equal(alone, wanted)


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_layout_of_weight_and_gradient_changes_no_bit(layer: Layer) -> None:
    leaves, grad = draw(layer), draw_grad(layer)
    other = draw(layer, weight_format=CHANNELS_LAST)
    y, same = run(layer, leaves), run(layer, other)
    assert torch.equal(y, same)
    grads = torch.autograd.grad(y, leaves, grad)
    others = torch.autograd.grad(same, other, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert others[1].stride() == other[1].stride()


def test_gradient_of_a_sum_is_expanded() -> None:
    layer = SMALL[2]
    leaves = draw(layer)
    grads = torch.autograd.grad(run(layer, leaves).sum(), leaves)
    wanted = torch.autograd.grad(run(layer, leaves, "reference").sum(), leaves)
    for result, truth in zip(grads, wanted, strict=True):
        assert_close(result, truth.double(), tolerance_of_grad(FP32))


@pytest.mark.parametrize("layer", [*SMALL, LAYERS[3], LAYERS[4]], ids=str)
def test_the_registered_reference_is_the_definition(layer: Layer) -> None:
    """Where a verification fails, the op runs the library inside: its own backward formulas, not autograd's."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in draw(layer)]
    bias = leaves[2] if layer.bias else None
    code = _launch.activation_code(layer.activation)

    def registered(*tensors: Tensor) -> Tensor:
        y: Tensor = torch.ops.cyclegan_fast.reflect_conv2d(
            tensors[0], tensors[1], tensors[2] if layer.bias else None, layer.padding, code, "reference"
        )
        return y

    y = registered(*leaves)
    assert torch.equal(y, reflect_conv2d_ref(leaves[0], leaves[1], bias, layer.padding, layer.activation))
    assert y.stride() == dense_strides(layer.output_shape)
    assert torch.autograd.gradcheck(registered, leaves, fast_mode=True)


def test_definition_on_paper() -> None:
    """3x3 with padding 1 of a 2x3 picture, by loops."""
    x = torch.arange(6, dtype=torch.float64).reshape(1, 1, 2, 3)
    weight = torch.arange(9, dtype=torch.float64).reshape(1, 1, 3, 3)
    y = reflect_conv2d(x, weight, torch.tensor([0.5], dtype=torch.float64), padding=1, activation="relu")
    for h in range(2):
        for w in range(3):
            rows = [abs(h + r - 1) if h + r - 1 < 2 else 0 for r in range(3)]
            cols = [abs(w + s - 1) if w + s - 1 < 3 else 1 for s in range(3)]
            total = sum(weight[0, 0, r, s] * x[0, 0, rows[r], cols[s]] for r in range(3) for s in range(3))
            assert y[0, 0, h, w] == total + 0.5


@pytest.mark.parametrize("channels", [2, 5])
def test_a_nan_reaches_its_window_only(channels: int) -> None:
    layer = Layer(1, 7 - channels, channels, 7, 9, 3, 1, "relu", False, FP32, "one thin side or the other")
    leaves = draw(layer)
    with torch.no_grad():
        leaves[0][0, 0, 3, 4] = torch.nan
        y = run(layer, leaves)
    bad = torch.zeros(7, 9, dtype=torch.bool, device=DEVICE)
    bad[2:5, 3:6] = True
    assert torch.equal(y.isnan()[0, 0], bad)


# (channels, padding, scale and shift, ReLU, dtype)
FUSED = ((16, 1, True, True, FP32), (16, 0, True, False, BF16), (5, 0, False, False, FP32), (7, 1, True, True, FP16))


@pytest.mark.parametrize("case", FUSED, ids=lambda case: "-".join(map(str, case)))
def test_prologue_and_statistics(case: tuple[int, int, bool, bool, torch.dtype]) -> None:
    channels, padding, scaled, relu, dtype = case
    layer = Layer(2, channels, 12, 6, 21, 3, padding, None, True, dtype, "more than one tile, the last partly filled")
    x, weight, bias = (leaf.detach() for leaf in draw(layer))
    options: dict[str, Any] = {"padding": padding, "relu": relu, "eps": 1e-3}
    if scaled:
        generator = torch.Generator().manual_seed(2)
        for name in ("scale", "shift"):
            options[name] = torch.randn(2, channels, generator=generator).to(DEVICE)
    y, mean, rstd = flat_conv3x3(x, weight, bias, statistics=True, impl="triton", **options)
    assert y.stride() == dense_strides(layer.output_shape)
    # The prologue rounds to x's dtype, so the definition must too: it runs in x's dtype, with exact products.
    truth, _, _ = flat_conv3x3_ref(x, weight, bias, **options)
    # Two results, each rounded once, may be a whole unit apart.
    tolerance = Tolerance(2.02 * ROUNDOFF[dtype], 32 * ROUNDOFF[FP32], "a rounding of either side")
    assert_close(y, truth.double(), tolerance, "y")
    var, true_mean = torch.var_mean(y.double(), dim=(2, 3), correction=0)
    statistics = Tolerance(8 * ROUNDOFF[FP32], 8 * ROUNDOFF[FP32], "float32 sums of 126 values, merged")
    assert_close(mean, true_mean, statistics, "mean")
    assert_close(rstd, torch.rsqrt(var + 1e-3), statistics, "rstd")
    plain, empty, _ = flat_conv3x3(x, weight, bias, impl="triton", **options)
    assert torch.equal(plain, y)
    assert empty.numel() == 0


def test_statistics_of_large_means() -> None:
    """Mean 1e4, standard deviation about 1: E[x^2] - E[x]^2 in float32 would be off by whole units."""
    layer = Layer(1, 8, 8, 9, 40, 3, 1, None, True, FP32, "several tiles")
    x, weight, _ = (leaf.detach() for leaf in draw(layer))
    bias = torch.full((8,), 1e4, device=DEVICE)
    y, mean, rstd = flat_conv3x3(x, weight, bias, padding=1, statistics=True, impl="triton")
    var, true_mean = torch.var_mean(y.double(), dim=(2, 3), correction=0)
    assert_close(mean, true_mean, Tolerance(2 * ROUNDOFF[FP32], 0.0, "a float32 near 1e4"), "mean")
    # A tile's mean is off by up to 4.9e-4, and by 0.1 to 0.3 from the others: 2 x 4.9e-4 x 0.1 of the variance at most.
    assert_close(rstd, torch.rsqrt(var + 1e-5), Tolerance(1e-4, 0.0, "deviations from rounded means"), "rstd")


def test_descriptors_and_pointers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(2, 16, 16, 4, 5, 3, 0, None, True, FP32, "whole 16-byte rows")
    leaves, grad = draw(layer), draw_grad(layer)
    assert flat._has_tma(leaves[0], (16, 16))
    y = run(layer, leaves)
    grads = torch.autograd.grad(y, leaves, grad)
    monkeypatch.setattr(flat, "_has_tma", lambda *_: False)
    by_pointers = run(layer, leaves)
    assert torch.equal(y, by_pointers)
    others = torch.autograd.grad(by_pointers, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_border_and_fold_are_transposes(padding: int) -> None:
    x = torch.randn(2, 5, 4, 6, device=DEVICE).contiguous(memory_format=CHANNELS_LAST)
    padded = borders.border(x, padding, 4 + 2 * padding, 6 + 2 * padding, reflect=True)
    assert torch.equal(padded, torch.nn.functional.pad(x, (padding,) * 4, mode="reflect"))
    other = torch.randn_like(padded)
    folded = borders.fold(other, padding)
    assert_close((padded * other).sum(), (x.double() * folded).sum(), Tolerance(1e-5, 0.0, "sums of 600 products"))
    assert_close(folded, reflect_conv._fold_ref(other.double(), padding), tolerance_of_result(FP32))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_registration(layer: Layer, impl: str) -> None:
    leaves = draw(layer)
    code = _launch.activation_code(layer.activation)
    op = torch.ops.cyclegan_fast.reflect_conv2d.default
    torch.library.opcheck(op, (*leaves, layer.padding, code, impl))


def test_registration_of_backward_and_fused() -> None:
    layer = SMALL[2]
    x, weight, bias = (leaf.detach() for leaf in draw(layer))
    grad = draw_grad(layer)
    for need in ([True, False, True], [False, True, False]):
        op = torch.ops.cyclegan_fast.reflect_conv2d_backward.default
        torch.library.opcheck(op, (grad, x, weight, None, 1, 0, "triton", need))
    scale = torch.ones(1, 8, device=DEVICE)
    for statistics in (False, True):
        op = torch.ops.cyclegan_fast.flat_conv3x3.default
        torch.library.opcheck(op, (x, weight, bias, 1, scale, scale, True, statistics, 1e-5, "triton"))


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("layer", SMALL[:2], ids=str)
def test_compiles_without_a_break(layer: Layer, impl: str) -> None:
    leaves, grad = draw(layer), draw_grad(layer)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def network(*tensors: Tensor) -> Tensor:
        return run(layer, [2 * tensors[0], *tensors[1:]], impl).sin()

    y = network(*leaves)
    wanted = run(layer, [2 * leaves[0], *leaves[1:]], impl).sin()
    assert torch.equal(y, wanted)
    grads, others = (torch.autograd.grad(result, leaves, grad) for result in (y, wanted))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_autocast_runs_in_its_dtype(impl: str) -> None:
    layer = SMALL[0]
    leaves, grad = draw(layer), draw_grad(layer)
    with torch.autocast(DEVICE.type, BF16):
        y = run(layer, leaves, impl)
    assert y.dtype == BF16
    narrow = [leaf.detach().to(BF16).requires_grad_() for leaf in leaves]
    assert torch.equal(y, run(layer, narrow, impl))
    grads = torch.autograd.grad(y, leaves, grad.to(BF16))
    assert all(result.dtype == FP32 for result in grads)


def test_what_the_kernels_cannot_do_is_said() -> None:
    layer = SMALL[1]
    leaves = draw(layer)
    y = run(layer, leaves)
    (grad,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    x, weight, bias = (leaf.detach() for leaf in leaves)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda v: reflect_conv2d(v, weight, bias, padding=1, impl="triton"))(x[None])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: reflect_conv2d(v, weight, bias, padding=1, impl="triton").sum())(x)
    fused, _, _ = flat_conv3x3(leaves[0], leaves[1], padding=1, impl="triton")
    with pytest.raises(RuntimeError, match="no gradient"):
        fused.sum().backward()


def test_auto_is_the_library_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SMALL[0]
    x, weight, bias = (leaf.detach() for leaf in draw(layer))
    monkeypatch.setattr(reflect_conv.thin, "thin_in", None)
    y = reflect_conv2d(x, weight, bias, padding=1, activation="tanh")
    assert torch.equal(y, reflect_conv2d_ref(x, weight, bias, 1, "tanh"))


def test_the_table_is_read_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def scaled(x: Tensor) -> Tensor:
        return x * 2 if reflect_conv._capability(0) == (9, 0) else x

    assert scaled(torch.ones(())) == 2


def test_measured_choices_name_layers_that_have_kernels() -> None:
    for (capability, kind, channels), impl in MEASURED.items():
        assert len(capability) == 2
        assert kind in ("thin_in", "thin_out", "flat")
        assert channels > 0
        assert impl in ("triton", "reference")
    assert layer_kind((64, 3, 7, 7), 3) == "thin_in"
    assert layer_kind((3, 64, 7, 7), 3) == "thin_out"
    assert layer_kind((256, 256, 3, 3), 1) == "flat"
    assert layer_kind((256, 256, 5, 5), 1) is None


def test_the_check_of_a_device_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor, padding: int, *_: int, full: bool) -> Tensor:
        return reflect_conv2d_ref(x, weight, bias, padding) * 1.001

    monkeypatch.setattr(reflect_conv.thin, "thin_in", wrong)
    with pytest.raises(RuntimeError, match="y of 3 -> 64 channels"):
        reflect_conv._matches_reference(DEVICE)


def test_gate_cases_are_complete() -> None:
    cases = borders.gate_cases() + thin.gate_cases() + flat.gate_cases()
    names = [case[0] for case in cases]
    assert len(set(names)) == len(names)
    for name, kernel, signature, constants, *_ in cases:
        assert set(signature) | set(constants) == set(kernel.arg_names), name
        assert not set(signature) & set(constants), name


X = torch.zeros(1, 8, 4, 5, device=DEVICE).contiguous(memory_format=CHANNELS_LAST)
W = torch.zeros(2, 8, 3, 3, device=DEVICE)
B = torch.zeros(2, device=DEVICE)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "dimensions": ((X[0], W), {}, "4 dimensions"),
    "channels": ((X[:, :4].contiguous(memory_format=CHANNELS_LAST), W), {}, "as x"),
    "not square": ((X, W[:, :, :2]), {}, "size, size"),
    "empty": ((X[:0], W), {}, "empty"),
    "padding": ((X, W), {"padding": 4}, "padding = 4"),
    "negative padding": ((X, W), {"padding": -1}, "padding = -1"),
    "kernel too large": ((X, torch.zeros(2, 8, 7, 7, device=DEVICE)), {"padding": 1}, "kernel of 7"),
    "bias": ((X, W, B[:1]), {"padding": 1}, r"bias \(1,\)"),
    "layout": ((X.contiguous(), W), {"padding": 1, "impl": "triton"}, "channels-last"),
    "layout, auto": ((X.contiguous(), W), {"padding": 1}, "channels-last"),
    "sliced": ((X[:, :, :, :3], W), {"padding": 1}, "channels-last"),
    "dtype": ((X, W.half()), {"padding": 1}, "must be the same"),
    "integers": ((X.int(), W.int()), {"padding": 1}, "torch.int32"),
    "activation": ((X, W), {"padding": 1, "activation": "leaky_relu"}, "leaky_relu"),
    "impl": ((X, W), {"padding": 1, "impl": "fastest"}, "fastest"),
    "no kernel": ((X, torch.zeros(8, 8, 5, 5, device=DEVICE)), {"padding": 2, "impl": "triton"}, "no such"),
    "float64": ((X.double(), W.double()), {"padding": 1, "impl": "triton"}, "no such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    args, options, match = WRONG[name]
    with pytest.raises(ValueError, match=match):
        reflect_conv2d(*args, **options)


def test_wrong_arguments_of_the_fused_form() -> None:
    scale = torch.ones(1, 8, device=DEVICE)
    with pytest.raises(ValueError, match="3x3"):
        flat_conv3x3(X, torch.zeros(8, 8, 1, 1, device=DEVICE))
    with pytest.raises(ValueError, match="come together"):
        flat_conv3x3(X, W, scale=scale)
    with pytest.raises(ValueError, match="relu with them"):
        flat_conv3x3(X, W, relu=True)
    with pytest.raises(ValueError, match="scale must be float32"):
        flat_conv3x3(X, W, scale=scale.half(), shift=scale)
    with pytest.raises(ValueError, match="shift must be contiguous"):
        flat_conv3x3(X, W, scale=scale, shift=torch.ones(1, 16, device=DEVICE)[:, ::2])
