"""The fused execution against the reference on one set of weights: results, all gradients, layouts, keys."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cyclegan_fast as cf
from cyclegan_fast.models import PatchDiscriminator, PixelDiscriminator, ResnetGenerator, fused, reference
from cyclegan_fast.models.reference import InstanceNorm, ResizeConv2d
from cyclegan_fast.ops import _native

needs_native = pytest.mark.skipif(not _native.available(), reason="the native operations are not built")
Make = Callable[..., nn.Module]

GENERATORS = [
    pytest.param(
        preset,
        {"blocks": blocks, **more},
        shape,
        id=f"{preset}-{more.get('upsample', blocks)}-{'x'.join(map(str, shape))}",
    )
    for preset, blocks, more, shape in [
        ("original", 2, {}, (2, 3, 24, 20)),
        ("original", 1, {"in_channels": 1, "out_channels": 4}, (1, 1, 16, 8)),
        ("original", 3, {}, (1, 3, 21, 35)),  # extended to multiples of 4, and cropped
        ("original", 1, {}, (1, 3, 3, 5)),
        ("keras", 2, {}, (3, 3, 24, 20)),
        ("keras", 1, {"in_channels": 4, "out_channels": 1}, (1, 4, 12, 16)),
        ("original", 2, {"upsample": "resize"}, (2, 3, 24, 20)),
        ("original", 1, {"upsample": "resize"}, (1, 3, 3, 5)),
        ("keras", 2, {"upsample": "resize"}, (2, 3, 20, 24)),
    ]
]
DISCRIMINATORS = [
    pytest.param(PatchDiscriminator, {"preset": "original"}, (2, 3, 33, 26), id="patch"),
    pytest.param(PatchDiscriminator, {"preset": "keras", "layers": 2}, (1, 3, 24, 20), id="patch-keras"),
    pytest.param(
        PatchDiscriminator, {"preset": "original", "layers": 1, "in_channels": 1}, (3, 1, 16, 16), id="patch-1"
    ),
    pytest.param(PixelDiscriminator, {"preset": "original"}, (2, 3, 9, 7), id="pixel"),
    pytest.param(PixelDiscriminator, {"preset": "keras"}, (1, 3, 8, 8), id="pixel-keras"),
    pytest.param(PatchDiscriminator, {"spectral_norm": True}, (2, 3, 33, 26), id="patch-spectral"),
    pytest.param(
        PatchDiscriminator, {"preset": "keras", "layers": 2, "spectral_norm": True}, (1, 3, 24, 20), id="keras-spectral"
    ),
    pytest.param(PixelDiscriminator, {"spectral_norm": True}, (2, 3, 9, 7), id="pixel-spectral"),
]


def make(kind: Make, dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    width = {"ngf": 8} if kind is ResnetGenerator else {"ndf": 8}
    network = kind(**width, init_gain=0.2, **options).to(dtype).to(memory_format=torch.channels_last)
    for norm in network.modules():
        if isinstance(norm, InstanceNorm) and norm.weight is not None and norm.bias is not None:
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return network


def run(network: nn.Module, impl: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and the gradients of a weighted sum of it: of x and of every parameter that has one."""
    network.impl = impl  # type: ignore[assignment]
    x = x.clone().requires_grad_()
    y = network(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    named = {"x": x, **dict(network.named_parameters())}
    grads = torch.autograd.grad((y * weights).sum(), list(named.values()), allow_unused=True)
    return y, {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def compare(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype) * 2 - 1
    wanted, wanted_grads = run(network, "reference", x)
    got, grads = run(network, "fused", x)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    # A bias that a norm subtracts again has no gradient; the reference's is rounding error.
    dead = wanted_grads.keys() - grads.keys()
    convs = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    norms = sum(isinstance(m, InstanceNorm) for m in network.modules())
    assert dead <= {f"{name}.bias" for name in convs}
    assert len(dead) == (norms if any(getattr(m, "bias", None) is not None for m in _hidden(network)) else 0)
    for name in dead:
        weight = name.removesuffix("bias") + "weight"
        weight = weight if weight in wanted_grads else name.removesuffix("bias") + "parametrizations.weight.original"
        assert wanted_grads[name].abs().max() <= 100 * tolerance * wanted_grads[weight].abs().max().clamp_min(1)
    # Between the blocks and a resize, a constant passes convolutions over reflected borders as a constant, and the next
    # norm subtracts it: the shifts that end blocks have no effect there, and gradients of rounding errors.
    resized = any(isinstance(m, ResizeConv2d) for m in network.modules())
    for name, grad in grads.items():
        scale = wanted_grads[name].abs().max()
        if resized and name.endswith("conv_block.6.bias"):
            scale = wanted_grads[name.removesuffix("bias") + "weight"].abs().max()
        error = (grad - wanted_grads[name]).abs().max()
        assert error <= tolerance * scale, (name, float(error))


def _hidden(network: nn.Module) -> list[nn.Module]:
    """Convolutions that a norm follows."""
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, InstanceNorm))]
    return [a for a, b in itertools.pairwise(layers) if isinstance(b, InstanceNorm)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("preset", "options", "shape"), GENERATORS)
def test_generator_in_float64(preset: str, options: dict[str, Any], shape: tuple[int, ...], recompute: bool) -> None:
    network = make(ResnetGenerator, torch.float64, preset=preset, recompute=recompute, **options)
    compare(network, shape, torch.float64, 1e-11)


@needs_native
@pytest.mark.parametrize(("preset", "options", "shape"), GENERATORS)
def test_generator_with_kernels(preset: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """float32, 1e-3: roundings of 6e-8 through up to 12 norms, whose gradients grow where a map has few pixels."""
    compare(make(ResnetGenerator, torch.float32, preset=preset, **options), shape, torch.float32, 1e-3)


@pytest.mark.parametrize(("kind", "options", "shape"), DISCRIMINATORS)
def test_discriminator_in_float64(kind: Make, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    compare(make(kind, torch.float64, **options), shape, torch.float64, 1e-11)


@needs_native
@pytest.mark.parametrize(("kind", "options", "shape"), DISCRIMINATORS)
def test_discriminator_with_kernels(kind: Make, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    compare(make(kind, torch.float32, **options), shape, torch.float32, 1e-3)


@needs_native
@pytest.mark.parametrize("preset", ["original", "keras"])
def test_bfloat16_autocast_is_as_close_as_the_reference(preset: str) -> None:
    """Fused bf16 is not farther from float64 than the reference in bf16, give or take a half."""
    network = make(ResnetGenerator, torch.float32, preset=preset, blocks=3)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    errors = {}
    for norm in network.modules():
        if isinstance(norm, InstanceNorm) and norm.weight is not None:
            nn.init.ones_(norm.weight)  # others make the networks so rough that bf16 tells nothing
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        for impl in ("reference", "fused"):
            network.impl = impl  # type: ignore[assignment]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                errors[impl] = float((network(x).double() - exact).norm() / exact.norm())
    assert errors["fused"] < 1.5 * errors["reference"] < 0.2


@pytest.mark.parametrize("options", [{}, {"dropout": True}, {"upsample": "resize"}], ids=["plain", "dropout", "resize"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_layouts(options: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution and norm sees and gives channels-last, so that nothing is copied between them."""
    network = make(ResnetGenerator, torch.float32, blocks=2, impl="fused", recompute=recompute, **options)
    seen = []

    def watch(name: str) -> None:
        original = getattr(fused, name)

        def watched(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            y: Tensor = original(x, *arguments, **options)
            seen.append((name, x.is_contiguous(memory_format=torch.channels_last), y.stride(1)))
            return y

        monkeypatch.setattr(fused, name, watched)

    for name in ("instance_norm", "reflect_conv2d", "_conv"):
        watch(name)
    y = network(torch.rand(2, 3, 16, 16))
    y.sum().backward()
    assert len(seen) >= 9 + 9
    assert all(dense and stride == 1 for _, dense, stride in seen), seen


def test_the_residual_stream_is_the_padded_buffer() -> None:
    """No copy of the stream: the sum reads the interior of what the convolution reads."""
    x = torch.rand(1, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    padded, interior = fused._Stream.apply(x)
    assert padded.data_ptr() == x.data_ptr()
    assert interior.data_ptr() == x[:, :, 1:, 1:].data_ptr()
    (grad,) = torch.autograd.grad((padded * 2).sum() + (interior * 3).sum(), x)
    assert torch.equal(grad, torch.nn.functional.pad(torch.full((1, 4, 4, 4), 3.0), (1,) * 4) + 2)


def test_dropout_is_mirrored_with_the_padding_and_drawn_anew() -> None:
    network = make(ResnetGenerator, torch.float64, blocks=1, dropout=True)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    results = {}
    for impl in ("reference", "fused"):
        network.impl = impl  # type: ignore[assignment]
        torch.manual_seed(5)
        first, second = network(x), network(x)
        assert not torch.equal(first, second)
        results[impl] = network.eval()(x)
        network.train()
    assert (results["fused"] - results["reference"]).abs().max() < 1e-12


def test_recomputation_keeps_only_the_blocks_inputs() -> None:
    kept = []
    for recompute in (False, True):
        network = make(ResnetGenerator, torch.float32, blocks=4, impl="fused", recompute=recompute)
        tensors: dict[int, int] = {}

        def pack(x: Tensor, tensors: dict[int, int] = tensors) -> Tensor:
            tensors[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = network(torch.rand(1, 3, 64, 64))
        kept.append(sum(tensors.values()))
        y.sum().backward()
    assert kept[1] < 0.75 * kept[0]


def test_keys_and_weights_are_the_references() -> None:
    for kind in ("ResnetGenerator", "PatchDiscriminator", "PixelDiscriminator"):
        torch.manual_seed(0)
        ours = getattr(cf, kind)() if kind != "PixelDiscriminator" else PixelDiscriminator()
        torch.manual_seed(0)
        theirs = getattr(reference, kind)()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_auto_is_fused_where_kernels_run() -> None:
    network = make(ResnetGenerator, torch.float32, blocks=1)
    chosen = network._is_fused(torch.rand(1, 3, 8, 8))  # type: ignore[operator]
    assert chosen == _native.available()
    assert not network._is_fused(torch.rand(1, 3, 8, 8, dtype=torch.float64))  # type: ignore[operator]


def test_unknown_impl_is_refused() -> None:
    with pytest.raises(ValueError, match="impl = 'fast' is not known: one of auto, fused, reference"):
        ResnetGenerator(impl="fast")


COMPILED = {
    "generator": (ResnetGenerator, {"blocks": 1}),
    "resize": (ResnetGenerator, {"blocks": 1, "upsample": "resize"}),
    "discriminator": (PatchDiscriminator, {"layers": 1}),
    "spectral": (PatchDiscriminator, {"layers": 1, "spectral_norm": True}),
    "spectral-keras": (PatchDiscriminator, {"layers": 1, "preset": "keras", "spectral_norm": True}),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiles_without_a_graph_break(kind: str) -> None:
    network_class, options = COMPILED[kind]
    network = make(network_class, torch.float32, impl="fused", **options)
    x = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for run_network in (network, compiled):
        network.zero_grad()
        y = run_network(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
