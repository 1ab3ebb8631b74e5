"""`conv2d` and `conv_transpose2d` against the library in float64: results, gradients, layout, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import Tolerance, assert_close
from torch import Tensor

from cyclegan_fast.ops import _native, conv
from cyclegan_fast.ops.conv import conv2d, conv_transpose2d

if not _native.available():
    pytest.skip(_native.why_not(), allow_module_level=True)

CHANNELS_LAST = torch.channels_last
SUMS = Tolerance(0.0, 2e-6, "float32 sums of up to a thousand products, the library's too")

# Transposed, N, C, K, H, W, size, stride, padding, output padding, bias, and why.
LAYERS = [
    (False, 2, 16, 24, 10, 12, 3, 2, 1, 0, True, "a strided layer of the generator"),
    (False, 1, 3, 20, 9, 7, 4, 2, 1, 0, True, "the discriminator's first layer, odd sides"),
    (False, 3, 20, 1, 7, 5, 4, 1, 1, 0, True, "the discriminator's last layer"),
    (False, 1, 20, 3, 7, 9, 7, 1, 0, 0, False, "one row of results: the head on a padded picture"),
    (False, 1, 5, 7, 6, 6, 1, 1, 0, 0, True, "1x1"),
    (False, 2, 5, 7, 8, 6, 5, 3, 2, 0, False, "stride 3, where the last pixels are not read"),
    (True, 2, 24, 16, 5, 6, 3, 2, 1, 1, True, "an upsampling layer of the generator"),
    (True, 1, 7, 5, 5, 4, 4, 3, 0, 2, False, "stride 3"),
    (True, 1, 7, 5, 5, 4, 3, 1, 1, 0, True, "stride 1"),
    (True, 1, 20, 3, 5, 4, 3, 2, 1, 1, True, "few outputs"),
]
Layer = tuple[Any, ...]


def rand(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=CHANNELS_LAST) if len(shape) == 4 else values


def leaves_of(layer: Layer) -> list[Tensor]:
    transposed, n, c, k, h, w, size, *_, bias, _ = layer
    leaves = [rand(n, c, h, w, seed=1), rand(*((c, k) if transposed else (k, c)), size, size, seed=2)]
    if bias:
        leaves.append(rand(k, seed=3))
    return [leaf.requires_grad_() for leaf in leaves]


def run(layer: Layer, leaves: list[Tensor], impl: str = "native") -> Tensor:
    stride, padding, output_padding = layer[7:10]
    bias = leaves[2] if len(leaves) > 2 else None
    if layer[0]:
        return conv_transpose2d(leaves[0], leaves[1], bias, stride, padding, output_padding, impl=impl)
    return conv2d(leaves[0], leaves[1], bias, stride, padding, impl=impl)


def definition(layer: Layer, leaves: list[Tensor]) -> Tensor:
    stride, padding, output_padding = layer[7:10]
    bias = leaves[2] if len(leaves) > 2 else None
    if layer[0]:
        return F.conv_transpose2d(leaves[0], leaves[1], bias, stride, padding, output_padding)
    return F.conv2d(leaves[0], leaves[1], bias, stride, padding)


def op_arguments(layer: Layer, leaves: list[Tensor], impl: str) -> tuple[Any, ...]:
    bias = leaves[2] if len(leaves) > 2 else None
    return (leaves[0], leaves[1], bias, *layer[7:10], layer[0], impl)


@pytest.mark.parametrize("contiguous_weight", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[-1])
def test_result_and_all_gradients(layer: Layer, contiguous_weight: bool) -> None:
    leaves = leaves_of(layer)
    if contiguous_weight:
        leaves[1] = leaves[1].detach().contiguous().requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = definition(layer, exact)
    y = run(layer, leaves)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert_close(y, wanted, SUMS, "y")
    grad = rand(*y.shape, seed=4)
    results = torch.autograd.grad(y, leaves, grad)
    references = torch.autograd.grad(wanted, exact, grad.double())
    for name, leaf, result, reference in zip(("dx", "dweight", "dbias"), leaves, results, references, strict=False):
        assert_close(result, reference, SUMS, name)
        assert result.stride() == leaf.stride()


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[6]], ids=lambda layer: layer[-1])
def test_the_reference_is_the_library(layer: Layer) -> None:
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves_of(layer)]
    assert torch.equal(run(layer, leaves, "reference"), definition(layer, leaves))
    registered = torch.ops.cyclegan_fast.conv2d

    def op(*tensors: Tensor) -> Tensor:
        y: Tensor = registered(*op_arguments(layer, list(tensors), "reference"))
        return y

    assert torch.equal(op(*leaves), definition(layer, leaves))
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_alone_is_the_same(wanted: int) -> None:
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    grads = torch.autograd.grad(run(layer, leaves).sum(), leaves)
    frozen = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves)]
    (alone,) = torch.autograd.grad(run(layer, frozen).sum(), frozen[wanted])
    assert torch.equal(alone, grads[wanted])


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[2], LAYERS[6]], ids=lambda layer: layer[-1])
def test_registration(layer: Layer, impl: str) -> None:
    leaves = leaves_of(layer)
    torch.library.opcheck(torch.ops.cyclegan_fast.conv2d.default, op_arguments(layer, leaves, impl))
    x, weight = leaves[0].detach(), leaves[1].detach()
    grad = rand(*definition(layer, leaves).shape, seed=5)
    for need in ([True, False, True], [False, True, False]):
        arguments = (grad, x, weight, *layer[7:10], layer[0], impl, need)
        torch.library.opcheck(torch.ops.cyclegan_fast.conv2d_backward.default, arguments)


@pytest.mark.parametrize("impl", ["native", "auto"])
def test_compiles_without_a_break(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MEASURED_ON_CPU", {conv.cpu_capability(): 1})
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def network(*tensors: Tensor) -> Tensor:
        return run(layer, [2 * tensors[0], *tensors[1:]], impl).sin()

    y = network(*leaves)
    wanted = run(layer, [2 * leaves[0], *leaves[1:]], "native").sin()
    assert torch.equal(y, wanted)
    grads, others = (torch.autograd.grad(result.sum(), leaves) for result in (y, wanted))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_auto_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(conv, "_weight_grad", lambda *arguments: called.append(1) or torch.zeros_like(arguments[2]))
    layer = LAYERS[0]

    def native(leaves: list[Tensor]) -> bool:
        called.clear()
        run(layer, leaves, "auto").sum().backward()
        return bool(called)

    monkeypatch.setattr(conv, "MEASURED_ON_CPU", {conv.cpu_capability(): 16})
    assert native(leaves_of(layer))
    assert not native([leaf.detach().double().requires_grad_() for leaf in leaves_of(layer)])
    assert not native([leaf.detach().contiguous().requires_grad_() for leaf in leaves_of(layer)])
    with torch.autocast("cpu", torch.bfloat16):
        assert not native(leaves_of(layer))
    frozen = leaves_of(layer)
    frozen[1].requires_grad_(False)
    assert not native(frozen)
    monkeypatch.setattr(conv, "MEASURED_ON_CPU", {conv.cpu_capability(): 17})
    assert not native(leaves_of(layer))
    monkeypatch.setattr(conv, "MEASURED_ON_CPU", {})
    assert not native(leaves_of(layer))


def test_autocast_runs_in_its_dtype() -> None:
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.cyclegan_fast.conv2d(*op_arguments(layer, leaves, "reference"))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, definition(layer, [leaf.bfloat16() for leaf in leaves]))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), leaves))


def test_what_the_kernel_cannot_do_is_said() -> None:
    layer = LAYERS[0]
    leaves = leaves_of(layer)
    (grad,) = torch.autograd.grad(run(layer, leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    x, weight, _ = (leaf.detach() for leaf in leaves)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda v: conv2d(v, weight, impl="native"))(x[None])


X, W = rand(1, 8, 6, 6, seed=1), torch.zeros(4, 8, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W), {}, "4 dimensions"),
        ((X, W[:, :7]), {}, "with the C of x"),
        ((X, W[:, :, :2]), {}, "size, size"),
        ((X[:0], W), {}, "empty"),
        ((X, W, torch.zeros(5)), {}, "bias"),
        ((X, W, None, 0), {}, "stride = 0"),
        ((X, W, None, 1, -1), {}, "padding = -1"),
        ((X[:, :, :2], W), {"impl": "reference"}, "nothing is left"),
        ((X.contiguous(), W), {"impl": "native"}, "channels-last"),
        ((X, W.double()), {}, "must be the same"),
        ((X.int(), W.int()), {}, "torch.int32"),
        ((X.double(), W.double()), {"impl": "native"}, "no such implementation"),
        ((X, W), {"impl": "triton"}, "triton"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d(*arguments, **options)


def test_wrong_arguments_of_the_transposed_form() -> None:
    weight = torch.zeros(8, 4, 3, 3)
    with pytest.raises(ValueError, match="output_padding = 2"):
        conv_transpose2d(X, weight, None, 2, 1, 2)
    with pytest.raises(ValueError, match="with the C of x"):
        conv_transpose2d(X, W)
    with pytest.raises(ValueError, match="nothing is left"):
        conv_transpose2d(X, weight, None, 1, 5)
