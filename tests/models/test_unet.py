"""The U-Net generator against the published layout, written down a second time in `published`."""

from __future__ import annotations

import dataclasses

import published
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cyclegan_fast.config import ConfigError, ModelConfig, load_config
from cyclegan_fast.models import UnetGenerator, build_generators, cost


def pair(norm: str = "instance", downs: int = 5, seed: int = 0) -> tuple[UnetGenerator, torch.nn.Module]:
    """Ours and the published one with the same weights, 3 -> 2 channels; batch norm by the picture's own statistics."""
    other = published.scramble(published.unet(3, 2, 4, downs, norm), seed)
    ours = UnetGenerator(3, 2, 4, downs, affine=norm == "batch")
    ours.load_state_dict({k: v for k, v in other.state_dict().items() if "running" not in k and "tracked" not in k})
    return ours, other


@pytest.mark.parametrize(
    ("downs", "affine", "parameters"),
    [(8, False, 54_409_603), (8, True, 54_413_955), (7, False, 41_825_667), (7, True, 41_828_995)],
)
def test_parameters(downs: int, affine: bool, parameters: int) -> None:
    """The affine ones are the published 54.414 and 41.829 million of `--norm batch`."""
    with torch.device("meta"):
        ours = UnetGenerator(downs=downs, affine=affine)
        other = published.unet(3, 3, 64, downs, "batch" if affine else "instance")
    shapes = {key: value.shape for key, value in other.named_parameters()}
    assert {key: value.shape for key, value in ours.named_parameters()} == shapes
    assert sum(value.numel() for value in ours.parameters()) == parameters


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("downs", [5, 6])
def test_results_and_gradients_are_the_published_ones(norm: str, downs: int) -> None:
    ours, other = pair(norm, downs)
    ours.double(), other.double()
    x = torch.rand(1, 3, 64, 128, dtype=torch.float64) * 2 - 1
    y, z = ours(x), other(x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    weight = torch.rand_like(y)
    (y * weight).sum().backward(), (z * weight).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_pictures_of_a_batch_do_not_mix() -> None:
    ours, _ = pair()
    x = torch.rand(3, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1:2], ours(x[1:2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 70), (20, 100)], ids=str)
def test_any_size_is_that_of_the_extended_picture(size: tuple[int, int]) -> None:
    ours, other = pair()
    x = torch.rand(1, 3, *size) * 2 - 1
    h, w = (-(-side // 32) * 32 for side in size)
    rows, columns = (torch.arange(n) for n in (h, w))

    def folded(index: torch.Tensor, side: int) -> torch.Tensor:
        """Reflection about the last position where that reaches, else its repetition."""
        mirrored = 2 * (side - 1) - index
        return torch.where(index < side, index, mirrored if len(index) < 2 * side else torch.full_like(index, side - 1))

    extended = x[:, :, folded(rows, size[0])][:, :, :, folded(columns, size[1])]
    with torch.no_grad():
        y = ours(x)
        assert y.shape == (1, 2, *size)
        torch.testing.assert_close(y, other(extended)[:, :, : size[0], : size[1]], rtol=0, atol=1e-5)


def test_channels_last_is_kept_and_changes_nothing() -> None:
    ours, _ = pair()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        y = ours(x)
        last = torch.channels_last
        z = ours.to(memory_format=last)(x.contiguous(memory_format=last))
    assert z.is_contiguous(memory_format=last)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-5)


def test_the_input_is_left_alone() -> None:
    ours, _ = pair()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    kept = x.clone()
    ours(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_bf16_is_near_fp32() -> None:
    ours = UnetGenerator(3, 3, 8, 5)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        y = ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = ours(x)
    assert z.dtype == torch.bfloat16
    # 8 bits a value through ten layers: a few hundredths of the results' range.
    assert 0 < (y - z).abs().mean() < 0.02


def test_dropout_is_where_the_published_one_has_it() -> None:
    ours, other = UnetGenerator(3, 3, 4, 7, dropout=True), published.unet(3, 3, 4, 7, dropout=True)
    places = [
        [name for name, module in net.named_modules() if isinstance(module, torch.nn.Dropout)] for net in (ours, other)
    ]
    assert places[0] == places[1]
    assert len(places[0]) == 2
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert not torch.equal(ours(x), ours(x))
        ours.eval()
        torch.testing.assert_close(ours(x), ours(x), rtol=0, atol=0)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    ours = UnetGenerator(ngf=16, downs=5, affine=True, init_gain=0.05)
    norms = [weight.detach() for key, weight in ours.named_parameters() if weight.dim() == 1 and key.endswith("weight")]
    convolutions = [weight.detach() for weight in ours.parameters() if weight.dim() == 4]
    assert abs(float(torch.cat([w.flatten() for w in convolutions]).std()) - 0.05) < 0.001
    assert abs(float(torch.cat(norms).mean()) - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "words"), [({"downs": 4}, "downs = 4"), ({"ngf": 0}, "ngf = 0"), ({"in_channels": 0}, "in_channels")]
)
def test_impossible_arguments(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UnetGenerator(**arguments)


def test_input_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"UnetGenerator: input of shape \(1, 4, 32, 32\) is not \[N, 3, H, W\]"):
        UnetGenerator(ngf=2, downs=5)(torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize("generator", ["unet_32", "unet_128", "unet_256"])
def test_a_configuration_builds_it_and_its_cost_is_counted(generator: str) -> None:
    model = ModelConfig(generator=generator, channels_B=1, ngf=4, dropout=True)
    with FakeTensorMode():
        G_A, G_B = build_generators(model)
        with FlopCounterMode(display=False) as counter:
            assert G_A(torch.zeros(1, 3, 250, 256)).shape == (1, 1, 250, 256)
    assert isinstance(G_A, UnetGenerator)
    assert (G_A.in_channels, G_B.in_channels) == (3, 1)
    assert G_A.multiple == int(generator[5:])
    step = cost.Step(model, height=250, width=256)
    assert cost.generator_forward(step).flop == counter.get_total_flops()
    for affine in (False, True):
        made = dataclasses.replace(model, affine=affine)
        counted = sum(layer.parameters for layer in cost.generator_layers(made, 3, 1, 256, 256))
        assert counted == sum(weight.numel() for weight in build_generators(made)[0].parameters())


@pytest.mark.parametrize(
    "other", ["model.preset=keras", "model.upsample=resize", "training.recompute=true", "model.method=augmented"]
)
def test_settings_that_it_does_not_have(other: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.generator"):
        load_config(None, ["model.generator=unet_256", other])
