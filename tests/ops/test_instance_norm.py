"""`instance_norm` against its reference in float64: results, all gradients, layout, registration, refusals."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import UGLY_MAPS, Map
from tolerances import TOLERANCES, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cyclegan_fast.ops import _launch, _native
from cyclegan_fast.ops.instance_norm import _matches_reference, instance_norm, instance_norm_ref

CHANNELS_LAST = torch.channels_last
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
HAS_CUDA = torch.cuda.is_available()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "leaky_relu")

needs_triton = pytest.mark.skipif(not _launch.HAS_TRITON, reason="triton is not installed")
needs_native = pytest.mark.skipif(not _native.available(), reason=f"no compiled library: {_native.why_not()}")

# (implementation, where it runs). "op" is the registered op with the reference inside, so its own backward formulas.
IMPLEMENTATIONS = [
    pytest.param(("triton", CUDA if HAS_CUDA else CPU), marks=needs_triton, id="triton"),
    pytest.param(("native", CPU), marks=needs_native, id="native"),
    pytest.param(("op", CPU), id="op"),
]
if HAS_CUDA:
    IMPLEMENTATIONS.append(pytest.param(("op", CUDA), id="op-cuda"))
Implementation = tuple[str, torch.device]

# Every option with every other, over the shapes: (map, pad, activation, affine, residual, dtype). Residuals are None,
# "dense" or the "interior" of a padded tensor. The interpreter is slow, so not every shape meets every combination.
_OPTIONS = itertools.cycle(itertools.product(ACTIVATIONS, (False, True), (None, "dense", "interior")))
COVER = [
    (shape, pad, *next(_OPTIONS), dtype)
    for i, shape in enumerate(UGLY_MAPS)
    for pad, dtype in ((1, torch.float32), ((3, 0)[i % 2], torch.bfloat16), ((0, 1)[i % 2], FLOATS[i % 3]))
    if pad < min(shape.h, shape.w)
]


def name_of(case: Any) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


def call(impl: str, x: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    """instance_norm by `impl`; "op" is the registered op with impl = "reference", which the public one goes around."""
    if impl != "op":
        return instance_norm(x, *tensors, impl=impl, **options)
    weight, bias, residual = (*tensors, None, None, None)[:3]
    code = _launch.activation_code(options.get("activation"))
    y: Tensor = torch.ops.cyclegan_fast.instance_norm(
        x, weight, bias, residual, options.get("eps", 1e-5), code, options.get("negative_slope", 0.2),
        options.get("pad", 0), "reference",
    )[0]  # fmt: skip
    return y


def make(shape: Map, affine: bool, residual: str | None, dtype: torch.dtype) -> list[Tensor | None]:
    """x, weight, bias, residual as seen by a network: channels_last, on the CPU."""
    generator = torch.Generator().manual_seed(sum(shape.shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n, c, h, w = shape.shape
    x = (draw(n, c, h, w) * 2 + 1).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    weight, bias = (draw(c) + 1, draw(c)) if affine else (None, None)
    if residual is None:
        return [x, weight, bias, None]
    padded = draw(n, c, h + 2, w + 2).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    interior = padded[:, :, 1:-1, 1:-1]
    return [x, weight, bias, interior if residual == "interior" else interior.contiguous(memory_format=CHANNELS_LAST)]


def leaves_on(tensors: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Leaves that require gradients, with the strides that the tensors have."""
    leaves: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None:
            leaves.append(None)
        elif device.type == "cpu":
            leaves.append(tensor.detach().requires_grad_())
        else:
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            leaves.append(moved.copy_(tensor).requires_grad_())
    return leaves


def gradients(y: Tensor, leaves: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))


def truth(tensors: list[Tensor | None], grad: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """y and gradients in float64 through plain autograd."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y = instance_norm_ref(*wide, **options)
    return y, gradients(y, wide, grad.double())


@pytest.mark.parametrize("case", COVER, ids=name_of)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_result_and_all_gradients(implementation: Implementation, case: tuple[Any, ...]) -> None:
    impl, device = implementation
    shape, pad, activation, affine, residual, dtype = case
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the compiled CPU kernels have no float16")
    tensors = make(shape, affine, residual, dtype)
    n, c, h, w = shape.shape
    size = (n, c, h + 2 * pad, w + 2 * pad)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    options = {"activation": activation, "pad": pad, "eps": 1e-3, "negative_slope": 0.3}
    expected, expected_grads = truth(tensors, grad, **options)

    leaves = leaves_on(tensors, device)
    y = call(impl, *leaves, **options)
    assert y.dtype == dtype
    assert y.stride() == (size[1] * size[2] * size[3], 1, size[1] * size[3], size[1])
    assert_close(y, expected, TOLERANCES["instance_norm.y", dtype], "y")
    results = gradients(y, leaves, grad.to(device))
    names = ["dx", "dweight", "dbias", "dresidual"] if affine else ["dx", "dresidual"]
    for name, result, wanted in zip(names, results, expected_grads, strict=False):
        sums = name in ("dweight", "dbias")
        assert result.dtype == (torch.float32 if sums else dtype)
        assert_close(result, wanted, TOLERANCES[f"instance_norm.{'sums' if sums else 'grad'}", dtype], name)
    assert results[0].stride() == (c * h * w, 1, c * w, c)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
def test_every_combination_of_options_is_covered(activation: str | None, affine: bool) -> None:
    met = {(case[1] > 0, case[4]) for case in COVER if case[2:4] == (activation, affine)}
    assert {residual for _, residual in met} == {None, "dense", "interior"}


@needs_triton
@pytest.mark.parametrize("pad", [0, 3])
def test_many_splits_are_merged_by_a_kernel_of_their_own(pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclegan_fast.ops import _instance_norm_launch as launch

    monkeypatch.setattr(launch, "_MERGED_SPLITS", 0)
    monkeypatch.setattr(launch, "_FINISH_SPLITS", 2)  # more than two splits take two rounds
    monkeypatch.setattr(launch, "_TILE_BYTES", 2048)
    launch._plan.cache_clear()
    try:
        shape = Map(2, 40, 6, 7, "42 pixels in splits of 8")
        device = CUDA if HAS_CUDA else CPU
        plan = launch._plan(2, 40, 42, 4, device)
        assert plan.splits > 2
        assert not plan.merged
        options = {"activation": "relu", "pad": pad}
        check(("triton", device), make(shape, True, None, torch.float32), options)
    finally:
        launch._plan.cache_clear()


def check(implementation: Implementation, tensors: list[Tensor | None], options: dict[str, Any]) -> None:
    """One float32 call against the truth."""
    impl, device = implementation
    leaves = leaves_on(tensors, device)
    y = call(impl, *leaves, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).contiguous(memory_format=CHANNELS_LAST)
    expected, expected_grads = truth(tensors, grad, **options)
    assert_close(y, expected, TOLERANCES["instance_norm.y", torch.float32], "y")
    for result, wanted in zip(gradients(y, leaves, grad.to(device)), expected_grads, strict=True):
        kind = "sums" if result.dim() == 1 else "grad"
        assert_close(
            result, wanted, TOLERANCES[f"instance_norm.{kind}", torch.float32], f"{kind} {tuple(result.shape)}"
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mean_far_above_the_deviation(implementation: Implementation) -> None:
    impl, device = implementation
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 24, 9, 33, generator=generator).add_(1e4).contiguous(memory_format=CHANNELS_LAST)
    expected = instance_norm_ref(x.double())
    y = call(impl, x.to(device))
    assert_close(y, expected, TOLERANCES["instance_norm.mean_1e4", torch.float32], "y")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_pixel_far_from_all_others(implementation: Implementation) -> None:
    """Whatever a kernel takes as its origin, an outlier there must not cost precision."""
    x = make(Map(1, 24, 9, 33, ""), False, None, torch.float32)[0]
    assert x is not None
    x[:, :, 0, 0] = 1e4
    check(implementation, [x, None, None, None], {})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_constant_channel_is_zero(implementation: Implementation) -> None:
    impl, device = implementation
    x = torch.full((1, 3, 5, 4), 0.1, device=device).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y = call(impl, x)
    assert y.abs().max() <= 1e-5  # 0.1 is not a float32: half a unit in its last place, times 1 / sqrt(eps) = 316
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_visible_and_in_its_channel(implementation: Implementation, activation: str | None) -> None:
    impl, device = implementation
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=CHANNELS_LAST)
    x[1, 2, 3, 1] = float("nan")
    y = call(impl, x.to(device), activation=activation, pad=1).cpu()
    nan = y.isnan()
    assert nan[1, 2].all()
    assert int(nan.sum()) == nan[1, 2].numel()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_every_time(implementation: Implementation) -> None:
    impl, device = implementation
    shape = Map(2, 24, 11, 13, "")
    results = []
    for _ in range(2):
        leaves = leaves_on(make(shape, True, "interior", torch.bfloat16), device)
        y = call(impl, *leaves, activation="relu", pad=1)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(device, y.dtype)
        results.append([y, *gradients(y, leaves, grad)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
def test_gradient_in_any_layout(implementation: Implementation, kind: str) -> None:
    impl, device = implementation
    x = make(Map(1, 5, 4, 3, ""), False, "dense", torch.float32)
    dense = torch.randn(1, 5, 6, 5, generator=torch.Generator().manual_seed(4))
    grad = {
        "contiguous": dense,
        "expanded": torch.tensor(0.5).expand(1, 5, 6, 5),
        "sliced": torch.cat([dense, dense], 3).contiguous(memory_format=CHANNELS_LAST)[..., :5],
    }[kind]
    _, expected = truth(x, grad, activation="relu", pad=1)
    leaves = leaves_on(x, device)
    moved = grad if device.type == "cpu" else grad.to(device)
    results = gradients(call(impl, *leaves, activation="relu", pad=1), leaves, moved)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted, TOLERANCES["instance_norm.grad", torch.float32], kind)


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_only_one_gradient_is_asked_for(wanted: int) -> None:
    tensors = make(Map(1, 5, 4, 3, ""), True, "dense", torch.float32)
    grad = torch.randn(1, 5, 6, 5, generator=torch.Generator().manual_seed(4))
    _, expected = truth(tensors, grad, pad=1)
    leaves = [t if t is None else t.detach() for t in tensors]
    leaf = leaves[wanted]
    assert leaf is not None
    leaf.requires_grad_()
    (result,) = torch.autograd.grad(call("op", *leaves, pad=1), leaf, grad)
    assert_close(result, expected[wanted], TOLERANCES["instance_norm.sums", torch.float32])


def test_reference_agrees_with_pytorch() -> None:
    x, weight, bias, residual = make(Map(2, 6, 5, 7, ""), True, "dense", torch.float64)
    assert x is not None and weight is not None and bias is not None and residual is not None  # noqa: PT018
    y = torch.nn.functional.instance_norm(x, weight=weight.double(), bias=bias.double(), eps=1e-3)
    y = torch.nn.functional.leaky_relu(y, 0.3) + residual
    expected = torch.nn.functional.pad(y, (3, 3, 3, 3), mode="reflect")
    result = instance_norm(
        x, weight.double(), bias.double(), residual, eps=1e-3, activation="leaky_relu", negative_slope=0.3, pad=3
    )
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("activation", "pad"), [(None, 0), ("relu", 1), ("leaky_relu", 2)])
def test_gradcheck_in_float64(impl: str, activation: str | None, pad: int) -> None:
    """Impl "auto" is the registered op with its own backward formulas, "reference" plain autograd."""
    tensors = make(Map(2, 3, 4, 3, ""), True, "dense", torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in tensors if t is not None]
    assert torch.autograd.gradcheck(
        lambda *args: instance_norm(*args, activation=activation, pad=pad, eps=1e-2, impl=impl), leaves
    )


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision:UserWarning")
def test_gradcheck_of_the_kernels() -> None:
    device = CUDA if HAS_CUDA else CPU
    tensors = make(Map(1, 2, 3, 3, ""), True, "dense", torch.float32)
    leaves = [t for t in leaves_on(tensors, device) if t is not None]
    # Differences over 2e-2 of float32 values near 1: rounding 6e-8 / 1e-2, and the cubic term of the norm.
    assert torch.autograd.gradcheck(
        lambda *args: instance_norm(*args, pad=1, eps=0.1, impl="triton"),
        leaves,
        eps=1e-2,
        atol=2e-3,
        rtol=2e-3,
        fast_mode=True,
    )


def test_the_reference_has_second_derivatives() -> None:
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: instance_norm(v, pad=1, eps=0.1, impl="reference"), (x,))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation: Implementation, full: bool) -> None:
    impl, device = implementation
    if impl == "triton" and not full and not HAS_CUDA:
        pytest.skip("the interpreter is slow, and the arguments are the same")
    impl = "reference" if impl == "op" else impl
    leaves = leaves_on(make(Map(1, 3, 4, 3, ""), full, "interior" if full else None, torch.float32), device)
    torch.library.opcheck(torch.ops.cyclegan_fast.instance_norm.default, (*leaves, 1e-5, 1, 0.2, 1, impl))
    x, weight, bias, _ = (t if t is None else t.detach() for t in leaves)
    y, mean, rstd = torch.ops.cyclegan_fast.instance_norm(x, weight, bias, None, 1e-5, 1, 0.2, 1, impl)
    arguments = (torch.randn_like(y), x, mean, rstd, weight, bias, 1, 0.2, 1, full, impl)
    torch.library.opcheck(torch.ops.cyclegan_fast.instance_norm_backward.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_without_a_break(implementation: Implementation) -> None:
    """Between convolutions, forward and backward, with the residual a view of a padded tensor."""
    impl, device = implementation
    dynamic = impl == "op"
    impl = "auto" if impl == "op" else impl
    conv = torch.nn.Conv2d(5, 5, 3).to(device, memory_format=CHANNELS_LAST)

    def layers(x: Tensor, padded: Tensor) -> Tensor:
        y = instance_norm(conv(x), activation="relu", pad=1, impl=impl)
        return instance_norm(conv(y), residual=padded[:, :, 1:-1, 1:-1], pad=1, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 6) if dynamic else (5,):
        generator = torch.Generator().manual_seed(size)
        results = []
        x = torch.randn(1, 5, size, size + 1, generator=generator).to(device, memory_format=CHANNELS_LAST)
        padded = torch.randn(1, 5, size, size + 1, generator=generator).to(device, memory_format=CHANNELS_LAST)
        for function in (layers, compiled):
            leaves = [x.detach().requires_grad_(), padded.detach().requires_grad_()]
            y = function(*leaves)
            assert y.is_contiguous(memory_format=CHANNELS_LAST)
            results.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, conv.weight])])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=0, atol=0)


def test_an_eager_call_and_the_registered_op_are_the_same() -> None:
    """Eager calls go around the dispatcher; what looks at tensors on their way must still see the op."""
    tensors = make(Map(1, 5, 4, 3, ""), True, "interior", torch.float32)
    results = []
    for call_it in (
        instance_norm,
        lambda *args: torch.ops.cyclegan_fast.instance_norm(*args, 1e-5, 0, 0.2, 0, "auto")[0],
    ):
        leaves = leaves_on(tensors, CPU)
        y = call_it(*leaves)
        results.append([y, *gradients(y, leaves, torch.ones_like(y))])
    for direct, dispatched in zip(*results, strict=True):
        assert torch.equal(direct, dispatched)
    with FakeTensorMode() as mode:
        fake = instance_norm(mode.from_tensor(tensors[0]), pad=1)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == (1, 5, 6, 5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_leaves_dtypes_alone(dtype: torch.dtype) -> None:
    x, weight, bias, residual = make(Map(1, 4, 5, 3, ""), True, "dense", dtype)
    assert x is not None
    plain = instance_norm(x, weight, bias, residual, pad=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = instance_norm(x, weight, bias, residual, pad=1)
    assert y.dtype == dtype
    assert torch.equal(y, plain)


def test_torch_func_is_refused() -> None:
    x = torch.randn(1, 2, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    with pytest.raises(RuntimeError, match=r"torch.func transforms .* impl=\"reference\""):
        torch.func.grad(lambda v: instance_norm(v).sum())(x)
    with pytest.raises(RuntimeError, match=r"torch.func transforms .* impl=\"reference\""):
        torch.func.vmap(instance_norm)(x[None])
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda v: torch.ops.cyclegan_fast.instance_norm(v, None, None, None, 1e-5, 0, 0.2, 0, "auto"))(
            x[None]
        )
    by_func = torch.func.grad(lambda v: (instance_norm(v, impl="reference") ** 3).sum())(x)
    leaf = x.detach().requires_grad_()
    (by_op,) = torch.autograd.grad((instance_norm(leaf) ** 3).sum(), leaf)
    torch.testing.assert_close(by_op, by_func)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 2, 3, 3).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    (dx,) = torch.autograd.grad((instance_norm(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again .* impl=\"reference\""):
        dx.sum().backward()


def channels_last(*size: int, **options: Any) -> Tensor:
    return torch.zeros(size, **options).contiguous(memory_format=CHANNELS_LAST)


GOOD = channels_last(1, 4, 5, 6)
WRONG: list[tuple[str, Callable[[], Any]]] = [
    (r"x must be floating \[N, C, H, W\], but is torch.float32 \[4, 5, 6\]", lambda: instance_norm(GOOD[0])),
    (r"x must be floating .* torch.int64", lambda: instance_norm(GOOD.long())),
    (r"x must be dense channels_last", lambda: instance_norm(GOOD.contiguous())),
    (r"x must be dense channels_last", lambda: instance_norm(channels_last(1, 4, 5, 7)[..., 1:])),
    (r"has no variance", lambda: instance_norm(channels_last(1, 4, 1, 1))),
    (r"has no variance", lambda: instance_norm(channels_last(0, 4, 5, 6))),
    (r"pad = 5 does not fit 5 x 6 pixels: 0 to 4", lambda: instance_norm(GOOD, pad=5)),
    (r"pad = -1 does not fit", lambda: instance_norm(GOOD, pad=-1)),
    (r"eps = 0.0 is not allowed", lambda: instance_norm(GOOD, eps=0.0)),
    (r"eps = nan is not allowed", lambda: instance_norm(GOOD, eps=float("nan"))),
    (r"eps = inf is not allowed", lambda: instance_norm(GOOD, eps=float("inf"))),
    (r"pad = 1.0 does not fit", lambda: instance_norm(GOOD, pad=1.0)),  # type: ignore[arg-type]
    (
        r"activation = 'gelu' is not known: one of None, 'relu', 'leaky_relu'",
        lambda: instance_norm(GOOD, activation="gelu"),
    ),
    (r"activation = 'tanh' is not known", lambda: instance_norm(GOOD, activation="tanh")),
    (r"weight and bias go together", lambda: instance_norm(GOOD, torch.ones(4))),
    (r"weight and bias go together", lambda: instance_norm(GOOD, None, torch.ones(4))),
    (r"weight must be torch.float32 \[4\]", lambda: instance_norm(GOOD, torch.ones(5), torch.ones(5))),
    (r"bias must be .* torch.bfloat16", lambda: instance_norm(GOOD, torch.ones(4), torch.ones(4).bfloat16())),
    (r"bias must be contiguous", lambda: instance_norm(GOOD, torch.ones(4), torch.ones(8)[::2])),
    (r"weight must be .* on meta", lambda: instance_norm(GOOD, torch.ones(4, device="meta"), torch.ones(4))),
    (r"residual must be .* \[1, 4, 5, 6\]", lambda: instance_norm(GOOD, residual=channels_last(1, 4, 5, 5))),
    (r"residual must be torch.float32", lambda: instance_norm(GOOD, residual=GOOD.bfloat16())),
    (r"residual must be channels_last within", lambda: instance_norm(GOOD, residual=GOOD.contiguous())),
    (r"residual must be channels_last within", lambda: instance_norm(GOOD, residual=channels_last(1, 8, 5, 6)[:, :4])),
    (r"impl = 'cuda' is not known: one of auto, triton", lambda: instance_norm(GOOD, impl="cuda")),
    (
        r"impl = 'triton' cannot be used: .* \(torch.float64 on cpu\)",
        lambda: instance_norm(GOOD.double(), impl="triton"),
    ),
]


@pytest.mark.parametrize(("message", "mistake"), WRONG, ids=[message[:40] for message, _ in WRONG])
def test_mistakes_are_named(message: str, mistake: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "HAS_TRITON", True)
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        mistake()


def test_implementations_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"'triton' cannot be used: .* (need CUDA tensors|not installed)"):
        instance_norm(GOOD, impl="triton")
    monkeypatch.setattr(_launch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        instance_norm(GOOD, impl="triton")
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "why_not", lambda: "no compiler was there")
    with pytest.raises(ValueError, match="compiled library is not there: no compiler was there"):
        instance_norm(GOOD, impl="native")


def test_what_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"triton": True, "native": True}
    monkeypatch.setattr(_launch, "HAS_TRITON", True)
    for built, there, expected in ((True, both, "native"), (True, {}, "reference"), (False, both, "reference")):
        monkeypatch.setattr(_native, "available", lambda built=built: built)
        assert _launch.resolve_impl("op", "auto", GOOD, there) == expected
    from cyclegan_fast.ops import _verify

    for good, expected in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(_verify, "verified", lambda *_, good=good: good)
        assert _launch.default_impl("op", CUDA, both) == expected
    assert _launch.default_impl("op", torch.device("mps"), both) == "reference"


@needs_native
def test_own_check_of_the_compiled_kernels() -> None:
    _matches_reference(CPU, "native")


def test_own_check_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[instance_norm.__module__]
    right = module._forward_ref
    monkeypatch.setattr(module, "_resolve", lambda *_: "reference")

    def slightly_wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = right(*arguments)
        return y * (1.001 if y.dtype != torch.float64 else 1.0), mean, rstd

    _matches_reference(CPU, "auto")
    monkeypatch.setattr(module, "_forward_ref", slightly_wrong)
    with pytest.raises(AssertionError, match=r"y differs from the reference by 1\.0e-03"):
        _matches_reference(CPU, "auto")


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_own_check_on_the_gpu() -> None:
    _matches_reference(CUDA, "triton")


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_more_than_two_billion_elements() -> None:
    """Three photographs of 12 megapixels with 64 channels: offsets beyond 32 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    torch.use_deterministic_algorithms(False)  # this much poison takes its time
    x = torch.randn(3, 64, 3024, 4032, device="cuda", dtype=torch.bfloat16).to(memory_format=CHANNELS_LAST)
    whole = instance_norm(x, activation="relu", pad=1, impl="triton")[2:]
    assert torch.equal(whole, instance_norm(x[2:], activation="relu", pad=1, impl="triton"))


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_in_a_cuda_graph() -> None:
    x = torch.randn(1, 64, 33, 31, device="cuda").to(memory_format=CHANNELS_LAST).requires_grad_()

    def step() -> list[Tensor]:
        y = instance_norm(x, activation="relu", pad=1, impl="triton")
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for result, wanted in zip(captured, expected, strict=True):
        assert torch.equal(result, wanted)
