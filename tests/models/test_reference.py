"""The networks against independent arithmetic (numpy loops), the de-facto keys and counts, and any picture size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models import build_discriminators, build_generators
from cyclegan_fast.models.reference import (
    InstanceNorm,
    PatchDiscriminator,
    PixelDiscriminator,
    ResnetGenerator,
    SameConv2d,
    SameConvTranspose2d,
    _reflect_by_copies,
)

PRESETS = ["original", "keras"]
# Two orders of float32 summation through a dozen layers of `randomised` weights, whose outputs are of order 1.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("blocks", [6, 9])
def test_generator_keys_and_shapes_are_the_de_facto_ones(blocks: int, dropout: bool) -> None:
    with torch.device("meta"):
        G = ResnetGenerator(3, 5, blocks=blocks, dropout=dropout)
    expected: dict[str, tuple[int, ...]] = {}

    def conv(key: str, weight: tuple[int, int, int, int], bias: int) -> None:
        expected[f"model.{key}.weight"] = weight
        expected[f"model.{key}.bias"] = (bias,)

    conv("1", (64, 3, 7, 7), 64)
    conv("4", (128, 64, 3, 3), 128)
    conv("7", (256, 128, 3, 3), 256)
    for block in range(10, 10 + blocks):
        conv(f"{block}.conv_block.1", (256, 256, 3, 3), 256)
        conv(f"{block}.conv_block.{6 if dropout else 5}", (256, 256, 3, 3), 256)
    up1, up2, last = (19, 22, 26) if blocks == 9 else (16, 19, 23)
    conv(f"{up1}", (256, 128, 3, 3), 128)
    conv(f"{up2}", (128, 64, 3, 3), 64)
    conv(f"{last}", (5, 64, 7, 7), 5)
    assert shapes(G) == expected
    assert list(shapes(G)) == list(expected)
    assert len(expected) == 48 - 4 * (9 - blocks)


@pytest.mark.parametrize("preset", PRESETS)
def test_resizing_keeps_the_keys_and_turns_the_weights(preset: str) -> None:
    with torch.device("meta"):
        transposed, resized = (ResnetGenerator(preset=preset, upsample=kind) for kind in ("transposed", "resize"))
    expected = shapes(transposed)
    assert list(shapes(resized)) == list(expected)
    expected |= {"model.19.weight": (128, 256, 3, 3), "model.22.weight": (64, 128, 3, 3)}
    assert shapes(resized) == expected


def test_a_constant_map_stays_constant_through_a_resizing_convolution() -> None:
    """A transposed one draws a checkerboard into it; Odena et al. 2016."""
    x = torch.ones(1, 8, 5, 6)
    for upsample, flat in (("resize", True), ("transposed", False)):
        double = ResnetGenerator(ngf=2, blocks=1, upsample=upsample).model[11]
        y = double(x).detach()
        assert y.shape == (1, 4, 10, 12)
        spread = float((y - y[:, :, 4:5, 4:5]).abs().max())
        assert (spread < 1e-6) == flat


def test_discriminator_keys_and_shapes_are_the_de_facto_ones() -> None:
    with torch.device("meta"):
        D, pixel = PatchDiscriminator(3), PixelDiscriminator(3)
    widths = {"0": (64, 3), "2": (128, 64), "5": (256, 128), "8": (512, 256), "11": (1, 512)}
    expected = {}
    for key, (out_channels, in_channels) in widths.items():
        expected[f"model.{key}.weight"] = (out_channels, in_channels, 4, 4)
        expected[f"model.{key}.bias"] = (out_channels,)
    assert shapes(D) == expected
    assert shapes(pixel) == {
        "net.0.weight": (64, 3, 1, 1),
        "net.0.bias": (64,),
        "net.2.weight": (128, 64, 1, 1),
        "net.2.bias": (128,),
        "net.5.weight": (1, 128, 1, 1),
        "net.5.bias": (1,),
    }


def test_keras_preset_has_the_same_layer_numbers() -> None:
    with torch.device("meta"):
        G, D = ResnetGenerator(blocks=1, preset="keras"), PatchDiscriminator(preset="keras")
    assert [key for key in shapes(G) if key.endswith("bias")] == [
        "model.2.bias",
        "model.5.bias",
        "model.8.bias",
        "model.10.conv_block.2.bias",
        "model.10.conv_block.6.bias",
        "model.12.bias",
        "model.15.bias",
        "model.18.bias",  # the last convolution, the only one with a bias
    ]
    keys = ["0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight", "6.weight", "6.bias", "8.weight"]
    assert list(shapes(D)) == [f"model.{key}" for key in [*keys, "9.weight", "9.bias", "11.weight", "11.bias"]]


def test_parameter_counts() -> None:
    with torch.device("meta"):
        G9, G6, D = ResnetGenerator(), ResnetGenerator(blocks=6), PatchDiscriminator()
        keras_G, keras_D = ResnetGenerator(preset="keras"), PatchDiscriminator(preset="keras")
        pixel = PixelDiscriminator()
        four = [*build_generators(ModelConfig()), *build_discriminators(ModelConfig())]
    assert count(G9) == 11_378_179
    assert count(G6) == 7_837_699
    assert count(D) == 2_764_737
    assert count(keras_G) == 11_383_427
    assert count(keras_D) == 2_765_633
    assert count(pixel) == (3 * 64 + 64) + (64 * 128 + 128) + (128 + 1)
    assert sum(count(network) for network in four) == 28_285_832


@pytest.mark.parametrize(
    ("layers", "widths"), [(1, [8, 16, 1]), (3, [8, 16, 32, 64, 1]), (5, [8, 16, 32, 64, 64, 64, 1])]
)
def test_discriminator_widths_stop_at_eight_times(layers: int, widths: list[int]) -> None:
    D = PatchDiscriminator(3, 8, layers)
    convs = [module for module in D.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == widths
    assert [conv.stride[0] for conv in convs] == [2] * layers + [1, 1]


def test_norms_without_affine_hold_nothing() -> None:
    G = ResnetGenerator(ngf=2, blocks=1)
    norms = [module for module in G.modules() if isinstance(module, InstanceNorm)]
    assert len(norms) == 7
    assert all(not list(norm.parameters()) and not list(norm.buffers()) for norm in norms)
    assert not list(G.buffers())


@pytest.mark.parametrize(("options", "mean"), [({}, 1.0), ({"gamma": 0.0}, 0.0), ({"gamma": 0.5}, 0.5)])
@pytest.mark.parametrize("network", [ResnetGenerator, PatchDiscriminator, PixelDiscriminator])
def test_affine_norms_begin_around_gamma(network: Any, options: dict[str, float], mean: float) -> None:
    torch.manual_seed(0)
    made = network(3, 3, 64, affine=True, **options) if network is ResnetGenerator else network(affine=True, **options)
    scales = torch.cat([module.weight for module in made.modules() if isinstance(module, InstanceNorm)])
    assert len(scales) >= 128
    assert scales.mean().item() == pytest.approx(mean, abs=0.02 * 5 / math.sqrt(len(scales)))
    assert scales.std().item() == pytest.approx(0.02, rel=0.4)


def np_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, before: int, size: tuple) -> np.ndarray:
    """[C, H, W] -> [O, *size], zeros outside the picture: output i looks at stride * i + k - before."""
    out = np.zeros((weight.shape[0], *size))
    for (o, i, j), (c, ky, kx) in itertools.product(np.ndindex(out.shape), np.ndindex(weight.shape[1:])):
        y, z = stride * i + ky - before, stride * j + kx - before
        if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
            out[o, i, j] += weight[o, c, ky, kx] * x[c, y, z]
    return out + bias[:, None, None]


def np_double(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, before: int) -> np.ndarray:
    """Each input i adds its 3x3 kernel at 2 i - before; what falls outside twice the size is dropped."""
    out = np.zeros((weight.shape[1], 2 * x.shape[1], 2 * x.shape[2]))
    for (c, i, j), (o, ky, kx) in itertools.product(np.ndindex(x.shape), np.ndindex(weight.shape[1:])):
        y, z = 2 * i + ky - before, 2 * j + kx - before
        if 0 <= y < out.shape[1] and 0 <= z < out.shape[2]:
            out[o, y, z] += weight[c, o, ky, kx] * x[c, i, j]
    return out + bias[:, None, None]


def np_reflect(x: np.ndarray, pad: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")


def np_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for c, plane in enumerate(x):
        mean = plane.sum() / plane.size
        variance = ((plane - mean) ** 2).sum() / plane.size
        out[c] = (plane - mean) / math.sqrt(variance + eps) * scale[c] + shift[c]
    return out


class Weights:
    """A network's state as numpy arrays; parameters that a preset lacks are the neutral ones."""

    def __init__(self, network: nn.Module, preset: str) -> None:
        self.state = {key: tensor.double().numpy() for key, tensor in network.state_dict().items()}
        self.eps = 1e-5 if preset == "original" else 1e-3

    def conv(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        return self.state[f"{key}.weight"], self.state.get(f"{key}.bias", np.zeros(1))

    def norm(self, key: str, x: np.ndarray) -> np.ndarray:
        scale, shift = self.state.get(f"{key}.weight"), self.state.get(f"{key}.bias")
        assert (scale is None) == (self.eps == 1e-5)
        return np_norm(
            x,
            np.ones(len(x)) if scale is None else scale,
            np.zeros(len(x)) if shift is None else shift,
            self.eps,
        )


def randomised(network: nn.Module) -> nn.Module:
    """Weights and biases far from their initial values, so that every one of them matters."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def inner(x: np.ndarray, kernel: int) -> tuple[int, int]:
    return x.shape[1] - kernel + 1, x.shape[2] - kernel + 1


def np_resize_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Each position as 2 x 2, then a 3x3 convolution over the reflected border."""
    padded = np_reflect(x.repeat(2, axis=1).repeat(2, axis=2), 1)
    return np_conv(padded, weight, bias, 1, 0, inner(padded, 3))


def np_generator(x: np.ndarray, weights: Weights, before_down: int, before_up: int | None) -> np.ndarray:
    """A generator with one block: layers 1-8, block 10, layers 11-16, convolution 18; no before_up: by resize."""
    padded = np_reflect(x, 3)
    x = np_conv(padded, *weights.conv("model.1"), 1, 0, inner(padded, 7))
    x = np.maximum(weights.norm("model.2", x), 0)
    for conv, norm in (("model.4", "model.5"), ("model.7", "model.8")):
        x = np_conv(x, *weights.conv(conv), 2, before_down, (x.shape[1] // 2, x.shape[2] // 2))
        x = np.maximum(weights.norm(norm, x), 0)
    padded = np_reflect(x, 1)
    y = np_conv(padded, *weights.conv("model.10.conv_block.1"), 1, 0, inner(padded, 3))
    y = np_reflect(np.maximum(weights.norm("model.10.conv_block.2", y), 0), 1)
    y = np_conv(y, *weights.conv("model.10.conv_block.5"), 1, 0, inner(y, 3))
    x = x + weights.norm("model.10.conv_block.6", y)
    for conv, norm in (("model.11", "model.12"), ("model.14", "model.15")):
        weight = weights.conv(conv)
        x = np_resize_conv(x, *weight) if before_up is None else np_double(x, *weight, before_up)
        x = np.maximum(weights.norm(norm, x), 0)
    padded = np_reflect(x, 3)
    return np.tanh(np_conv(padded, *weights.conv("model.18"), 1, 0, inner(padded, 7)))


@pytest.mark.parametrize(
    ("preset", "before_down", "before_up"),
    [("original", 1, 1), ("keras", 0, 0), ("original", 1, None), ("keras", 0, None)],
)
def test_generator_against_numpy_loops(preset: str, before_down: int, before_up: int | None) -> None:
    upsample = "resize" if before_up is None else "transposed"
    G = randomised(ResnetGenerator(2, 1, 1, 1, preset=preset, upsample=upsample).double())
    x = torch.randn(2, 2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = Weights(G, preset)
    expected = np.stack([np_generator(picture, weights, before_down, before_up) for picture in x.numpy()])
    np.testing.assert_allclose(G(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("preset", PRESETS)
def test_discriminator_against_numpy_loops(preset: str) -> None:
    D = randomised(PatchDiscriminator(2, 1, 2, preset=preset).double())
    x = torch.randn(1, 2, 16, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = Weights(D, preset)
    # 16 x 12 -> 8 x 6 -> 4 x 3, then stride 1: smaller by one each time with padding 1, unchanged with "same"
    small, last = ((3, 2), (2, 1)) if preset == "original" else ((4, 3), (4, 3))
    y = leaky(np_conv(x[0].numpy(), *weights.conv("model.0"), 2, 1, (8, 6)))
    y = leaky(weights.norm("model.3", np_conv(y, *weights.conv("model.2"), 2, 1, (4, 3))))
    y = leaky(weights.norm("model.6", np_conv(y, *weights.conv("model.5"), 1, 1, small)))
    expected = np_conv(y, *weights.conv("model.8"), 1, 1, last)
    np.testing.assert_allclose(D(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_pixel_discriminator_against_numpy() -> None:
    D = randomised(PixelDiscriminator(2, 3).double())
    x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = Weights(D, "original")
    y = leaky(np_conv(x[0].numpy(), *weights.conv("net.0"), 1, 0, (4, 5)))
    y = leaky(weights.norm("net.3", np_conv(y, *weights.conv("net.2"), 1, 0, (4, 5))))
    expected = np_conv(y, *weights.conv("net.5"), 1, 0, (4, 5))
    np.testing.assert_allclose(D(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kernel", "stride", "sides", "before"),
    [
        (3, 2, (8, 6), 0),  # generator, even: one zero, after
        (3, 2, (7, 5), 1),  # odd: one before, one after
        (4, 2, (8, 6), 1),  # discriminator, even: one before, one after
        (4, 2, (7, 5), 1),  # odd: one before, two after
        (4, 1, (5, 6), 1),  # stride 1, any size: one before, two after
    ],
)
def test_same_convolution_against_numpy_loops(kernel: int, stride: int, sides: tuple[int, int], before: int) -> None:
    conv = randomised(SameConv2d(2, 3, kernel, stride).double())
    x = torch.randn(1, 2, *sides, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    size = (math.ceil(sides[0] / stride), math.ceil(sides[1] / stride))
    expected = np_conv(x[0].numpy(), conv.weight.detach().numpy(), conv.bias.detach().numpy(), stride, before, size)
    result = conv(x)[0].detach().numpy()
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


def test_same_convolutions_by_hand() -> None:
    down = SameConv2d(1, 1, 3, 2, bias=False)
    up = SameConvTranspose2d(1, 1, bias=False)
    row = torch.zeros(3, 3)
    row[0] = torch.tensor([1.0, 10.0, 100.0])
    down.weight.data[:] = up.weight.data[:] = row
    # 1 + 2 * 10 + 3 * 100 at column 0, 3 + 4 * 10 and a zero at column 2
    assert down(torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]]).view(1, 1, 2, 4)).flatten().tolist() == [321, 43]
    # 1 spread to columns 0, 1, 2 and 2 to columns 2, 3, 4, of which the last is cropped
    result = up(torch.tensor([1.0, 2.0]).view(1, 1, 1, 2))
    assert result[0, 0].tolist() == [[1, 10, 102, 20], [0, 0, 0, 0]]


SIZES = [(1, 1), (2, 2), (1, 9), (3, 4), (4, 4), (5, 7), (7, 8), (8, 8), (9, 12), (13, 31), (64, 48), (250, 255)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_output_has_exactly_the_size_of_the_input(preset: str, size: tuple[int, int]) -> None:
    G = ResnetGenerator(3, 2, 2, 1, preset=preset)
    y = G(torch.rand(2, 3, *size) * 2 - 1)
    assert y.shape == (2, 2, *size)
    assert torch.isfinite(y).all()
    assert y.abs().max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (36, 28)])
def test_sizes_the_network_can_take_are_not_touched(preset: str, size: tuple[int, int]) -> None:
    G = ResnetGenerator(1, 1, 2, 1, preset=preset)
    x = torch.rand(1, 1, *size)
    assert torch.equal(G(x), G.model(x))


@pytest.mark.parametrize(
    ("size", "padding", "modes"),
    [
        ((5, 7), (3, 1), ("reflect", "reflect")),
        ((4, 12), (4, 0), ("edge", "edge")),
        ((2, 9), (6, 3), ("edge", "reflect")),
        ((1, 1), (7, 7), ("edge", "edge")),
        ((250, 255), (2, 1), ("reflect", "reflect")),
    ],
)
def test_other_sizes_are_extended_below_and_to_the_right(
    size: tuple[int, int], padding: tuple[int, int], modes: tuple[str, str]
) -> None:
    G = ResnetGenerator(1, 1, 1, 1)
    x = torch.rand(1, 1, *size)
    extended = np.pad(x.numpy(), ((0, 0), (0, 0), (0, padding[0]), (0, 0)), mode=modes[0])
    extended = np.pad(extended, ((0, 0), (0, 0), (0, 0), (0, padding[1])), mode=modes[1])
    expected = G.model(torch.from_numpy(extended))[:, :, : size[0], : size[1]]
    assert torch.equal(G(x), expected)


@pytest.mark.parametrize(
    ("preset", "layers", "size", "expected"),
    [
        ("original", 3, (256, 256), (30, 30)),
        ("keras", 3, (256, 256), (32, 32)),
        ("original", 3, (24, 31), (1, 1)),
        ("keras", 3, (9, 1), (2, 1)),
        ("keras", 3, (250, 255), (32, 32)),
        ("original", 1, (9, 6), (2, 1)),
    ],
)
def test_size_of_the_patch_map(preset: str, layers: int, size: tuple, expected: tuple) -> None:
    D = PatchDiscriminator(1, 1, layers, preset=preset)
    assert D(torch.rand(1, 1, *size)).shape == (1, 1, *expected)


@pytest.mark.parametrize(("preset", "size"), [("original", (23, 256)), ("original", (256, 23)), ("keras", (8, 8))])
def test_pictures_too_small_for_the_discriminator_are_refused(preset: str, size: tuple[int, int]) -> None:
    D = PatchDiscriminator(1, 1, 3, preset=preset)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too small"):
        D(torch.rand(1, 1, *size))


def test_inputs_of_another_shape_are_refused() -> None:
    G, D, pixel = ResnetGenerator(3, 3, 1, 1), PatchDiscriminator(3, 1), PixelDiscriminator(3, 1)
    for network in (G, D, pixel):
        with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\) is not \[N, 3, H, W\]"):
            network(torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match="is not"):
            network(torch.zeros(3, 32, 32))
        with pytest.raises(ValueError, match="no pixels"):
            network(torch.zeros(1, 3, 0, 32))
    with pytest.raises(ValueError, match="1 x 1"):
        pixel(torch.zeros(1, 3, 1, 1))


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="preset = 'tensorflow' is not known: one of original, keras"):
        ResnetGenerator(preset="tensorflow")
    with pytest.raises(ValueError, match="upsample = 'bilinear' is not known: one of transposed, resize"):
        ResnetGenerator(upsample="bilinear")
    with pytest.raises(ValueError, match=r"gamma = 0.0 is not possible without affine norms"):
        ResnetGenerator(gamma=0.0)
    with pytest.raises(ValueError, match="blocks = 0"):
        ResnetGenerator(blocks=0)
    with pytest.raises(ValueError, match="layers = 0"):
        PatchDiscriminator(layers=0)
    with pytest.raises(ValueError, match="in_channels = 0"):
        PixelDiscriminator(0)


def exact_norm(x: Tensor, eps: float) -> Tensor:
    x = x.double()
    return torch.from_numpy(np.stack([np_norm(p, np.ones(len(p)), np.zeros(len(p)), eps) for p in x.numpy()]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 16, 20), (3, 2, 8, 8), (2, 1, 5, 7), (1, 2, 300, 301)])
def test_norm_against_numpy(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
    y = InstanceNorm(shape[1])(x.to(memory_format=memory_format))
    # The sequential float32 sums of the channels-last kernel stay below 2e-5 up to 256 x 256 positions.
    torch.testing.assert_close(y.double(), exact_norm(x, 1e-5), rtol=0, atol=2e-5)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("size", [(64, 64), (300, 300)], ids=["native", "composed"])
@pytest.mark.parametrize(
    ("dtype", "half_ulp"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_norm_of_16_bit_input_has_float32_statistics(
    dtype: torch.dtype, half_ulp: float, size: tuple[int, int], autocast: bool
) -> None:
    # A mean of 8 deviations: rounding it to bf16 would shift everything by up to 0.03.
    x = (torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0)) + 8.03).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = InstanceNorm(2)(x.to(memory_format=torch.channels_last))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = exact_norm(x, 1e-5)
    # Rounded once, from a value that float32 arithmetic gives: half a unit in the last place, and 2e-5.
    assert ((y.double() - exact).abs() <= 2 * half_ulp * exact.abs() + 2e-5).all()


@pytest.mark.parametrize("affine", [False, True])
def test_both_forms_of_the_norm_have_the_same_gradients(affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = randomised(InstanceNorm(3, affine=affine).double())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    inputs = [x, *norm.parameters()]
    assert len(inputs) == (3 if affine else 1)
    native = norm(x)
    native_gradients = torch.autograd.grad(native, inputs, g)
    monkeypatch.setattr("cyclegan_fast.models.reference._NATIVE_POSITIONS", 0)
    composed = norm(x)
    composed_gradients = torch.autograd.grad(composed, inputs, g)
    torch.testing.assert_close(native, composed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(native_gradients, composed_gradients, rtol=1e-11, atol=1e-11)


def test_norm_is_the_same_in_evaluation() -> None:
    norm = InstanceNorm(2)
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(norm.train()(x), norm.eval()(x))


def test_norm_of_a_large_picture_with_a_large_mean() -> None:
    # Two megapixels, channels last, mean of 30 deviations: plain sequential float32 sums would be off by 1e-3.
    x = torch.randn(1, 2, 1024, 2048, generator=torch.Generator().manual_seed(0)) + 30
    y = InstanceNorm(2)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y.double(), exact_norm(x, 1e-5), rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_channels_last_goes_through(preset: str) -> None:
    G = randomised(ResnetGenerator(3, 3, 4, 1, preset=preset)).float()
    D = randomised(PatchDiscriminator(3, 4, preset=preset)).float()
    formats: list[bool] = []

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    x = torch.rand(2, 3, 32, 48)
    plain = G(x), D(x)
    for network in (G, D):
        network.to(memory_format=torch.channels_last)
        for module in network.modules():
            if not isinstance(module, (SameConvTranspose2d, PatchDiscriminator)) and module is not D.model:
                module.register_forward_hook(watch)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close((G(x), D(x)), plain, **FLOAT32)
    assert len(formats) > 30
    assert all(formats[:-1])  # the last is the one-channel map


@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_autocast_is_close_to_float32(preset: str) -> None:
    torch.manual_seed(0)
    G, D = ResnetGenerator(3, 3, 8, 2, preset=preset), PatchDiscriminator(3, 8, preset=preset)
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).to(memory_format=torch.channels_last)
    exact = G(x), D(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logits = G(x), D(x)
        (y.float().mean() + logits.float().mean()).backward()
    assert y.dtype == torch.bfloat16
    for value, truth in zip((y.float(), logits.float()), exact, strict=True):
        assert (value - truth).norm() < 0.05 * truth.norm()
    gradients = [parameter.grad for network in (G, D) for parameter in network.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo looks at D's input, which is no leaf, and so warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("preset", PRESETS)
def test_compiles_without_graph_breaks(preset: str) -> None:
    G = randomised(ResnetGenerator(1, 1, 2, 1, preset=preset)).float()
    D = randomised(PatchDiscriminator(1, 2, preset=preset)).float()
    x = torch.rand(2, 1, 30, 33)
    compiled_G = torch.compile(G, fullgraph=True, backend="aot_eager")
    compiled_D = torch.compile(D, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_G(x), G(x), **FLOAT32)
    torch.testing.assert_close(compiled_D(x), D(x), **FLOAT32)
    compiled_D(compiled_G(x)).sum().backward()
    assert G.get_parameter("model.18.weight").grad is not None


@pytest.mark.parametrize("preset", PRESETS)
def test_exports_for_any_batch_and_multiple_of_four(preset: str) -> None:
    G = randomised(ResnetGenerator(1, 1, 2, 1, preset=preset)).float().eval()
    fixed = torch.export.export(G, (torch.rand(1, 1, 30, 33),)).module()
    x = torch.rand(1, 1, 30, 33)
    torch.testing.assert_close(fixed(x), G(x), **FLOAT32)
    batch, h, w = (
        torch.export.Dim("batch"),
        torch.export.Dim("h", min=3, max=500),
        torch.export.Dim("w", min=3, max=500),
    )
    exported = torch.export.export(G, (torch.rand(2, 1, 16, 24),), dynamic_shapes=({0: batch, 2: 4 * h, 3: 4 * w},))
    for shape in ((3, 1, 12, 40), (1, 1, 64, 16)):
        x = torch.rand(shape)
        torch.testing.assert_close(exported.module()(x), G(x), **FLOAT32)


def test_dead_biases_change_nothing_and_get_no_gradient() -> None:
    G = ResnetGenerator(1, 1, 2, 1).double()
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    before = G(x)
    before.square().sum().backward()
    dead = [name for name, _ in G.named_parameters() if name.endswith("bias")][:-1]
    assert len(dead) == 7
    for name in dead:
        bias = G.get_parameter(name)
        assert bias.grad.abs().max() < 1e-12 * G.get_parameter("model.18.bias").grad.abs().max()
        bias.data.fill_(0.7)
    torch.testing.assert_close(G(x), before, rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    G = ResnetGenerator(1, 1, 4, 2, dropout=True)
    x = torch.rand(1, 1, 16, 16)
    assert not torch.equal(G(x), G(x))
    G.eval()
    assert torch.equal(G(x), G(x))
    drops = [module for module in G.modules() if isinstance(module, nn.Dropout)]
    assert [drop.p for drop in drops] == [0.5, 0.5]


def convolutions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]


@pytest.mark.parametrize("preset", PRESETS)
def test_initial_weights(preset: str) -> None:
    torch.manual_seed(0)
    G, D = ResnetGenerator(3, 3, 32, 1, preset=preset), PatchDiscriminator(3, 32, preset=preset)
    *normal, last = convolutions(G)
    normal += convolutions(D)
    if preset == "original":
        normal.append(last)
    for conv in normal:
        values = conv.weight.detach().flatten()
        error = 0.02 / math.sqrt(len(values))  # five standard errors, of the mean and of the deviation
        assert abs(values.mean().item()) < 5 * error
        assert abs(values.std().item() - 0.02) < 5 * error / math.sqrt(2)
    for network in (G, D):
        assert all(not p.detach().any() for name, p in network.named_parameters() if name.endswith("bias"))
    scales = [module.weight for module in [*G.modules(), *D.modules()] if isinstance(module, InstanceNorm)]
    if preset == "original":
        assert all(scale is None for scale in scales)
        return
    limit = math.sqrt(6 / (32 * 49 + 3 * 49))
    values = last.weight.detach()
    assert values.abs().max() <= limit
    assert values.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    gamma = torch.cat([scale.detach() for scale in scales])
    assert abs(gamma.mean().item()) < 5 * 0.02 / math.sqrt(len(gamma))
    assert gamma.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("preset", PRESETS)
def test_initial_weights_come_from_the_default_generator(preset: str) -> None:
    config = ModelConfig(preset=preset, ngf=2, ndf=2, blocks=1)

    def build(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        networks = [*build_generators(config), *build_discriminators(config)]
        return [parameter.detach() for network in networks for parameter in network.parameters()]

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_gain_sets_the_deviation() -> None:
    D = PatchDiscriminator(3, 32, init_gain=0.1)
    assert D.get_parameter("model.5.weight").std().item() == pytest.approx(0.1, rel=0.05)


def test_builders_follow_the_configuration() -> None:
    config = ModelConfig(channels_A=1, channels_B=3, blocks=2, ngf=4, ndf=5, dropout=True, discriminator_layers=2)
    G_A, G_B = build_generators(config)
    D_A, D_B = build_discriminators(config)
    real_A, real_B = torch.rand(1, 1, 24, 24), torch.rand(1, 3, 24, 24)
    fake_B, fake_A = G_A(real_A), G_B(real_B)
    assert fake_B.shape == real_B.shape
    assert fake_A.shape == real_A.shape
    assert D_A(fake_B).shape == D_B(fake_A).shape == (1, 1, 4, 4)
    assert shapes(G_A)["model.11.conv_block.6.weight"] == (16, 16, 3, 3)
    assert shapes(D_A)["model.0.weight"] == (5, 3, 4, 4)
    assert shapes(D_B)["model.0.weight"] == (5, 1, 4, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_builders_make_the_pixel_discriminator(preset: str) -> None:
    D_A, D_B = build_discriminators(ModelConfig(discriminator="pixel", ndf=4, channels_A=2, preset=preset))
    assert isinstance(D_A, PixelDiscriminator)
    assert D_A(torch.rand(1, 3, 6, 7)).shape == (1, 1, 6, 7)
    assert D_B(torch.rand(1, 2, 6, 7)).shape == (1, 1, 6, 7)
    assert ("net.3.weight" in shapes(D_A)) == (preset == "keras")


def test_builders_refuse_an_unknown_discriminator() -> None:
    with pytest.raises(ValueError, match=r"model\.discriminator = 'stylegan'"):
        build_discriminators(ModelConfig(discriminator="stylegan"))


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 3, 3, 3), (0, 2, 0, 0), (0, 0, 1, 4)])
def test_deterministic_reflection_is_reflection(padding: tuple[int, int, int, int]) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = F.pad(x, padding, mode="reflect")
    padded = _reflect_by_copies(x, *padding)
    assert torch.equal(padded, expected)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_are_deterministic_on_cuda_when_asked_for() -> None:
    x = torch.randn(1, 3, 33, 40, device="cuda", requires_grad=True)
    generator = ResnetGenerator(3, 3, 4, 1).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(generator(x).square().sum(), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*gradients)
