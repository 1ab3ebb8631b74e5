"""The cost model against what PyTorch counts, and against the table that the design was made with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cyclegan_fast.config import ModelConfig, load_config
from cyclegan_fast.models import build_discriminators, build_generators, build_pix2pix, cost
from cyclegan_fast.models.cost import Step, Work
from cyclegan_fast.training.cyclegan import CycleGANState, Objective
from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.pix2pix import Pix2PixState
from cyclegan_fast.training.step import StepBatch, TrainState, train_step

PAPER = Step(ModelConfig())
SMALL = ModelConfig(ngf=4, ndf=4, blocks=2)


def counted_step(step: Step) -> int:
    """FLOP of the real networks in the real training step, on tensors without memory."""
    with FakeTensorMode():
        k, n, h, w = step.accumulate, step.batch, step.height, step.width
        pool = (torch.zeros(k, n), torch.zeros(k, n, dtype=torch.int64))
        pictures = (torch.zeros(k, n, c, h, w) for c in (step.model.channels_A, step.model.channels_B))
        state = state_of(step)
        with FlopCounterMode(display=False) as counter:
            train_step(state, StepBatch(*pictures, *pool, *pool, torch.zeros(k, n), torch.zeros(k, n)))
    return counter.get_total_flops()


def state_of(step: Step) -> TrainState:
    """The networks and what trains them, without pools."""

    def sgd(*networks: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD([p for net in networks for p in net.parameters()], lr=0.1)

    def exchange(images: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
        return images

    if step.model.method == "pix2pix":
        G, D = build_pix2pix(step.model, impl="reference", impl_D="reference", recompute=step.recompute).values()
        options = {"direction": step.model.direction, "batched": step.batched}
        return Pix2PixState(G=G, D=D, exchange_pairs=exchange, optimizer_G=sgd(G), optimizer_D=sgd(D), **options)
    G_A, G_B = build_generators(step.model, impl="reference", recompute=step.recompute)
    D_A, D_B = build_discriminators(step.model, impl="reference")
    identity = 0.5 if step.identity else 0.0
    return CycleGANState(
        G_A=G_A,
        G_B=G_B,
        D_A=D_A,
        D_B=D_B,
        optimizer_G=sgd(G_A, G_B),
        optimizer_D=sgd(D_A, D_B),
        exchange_A=exchange,
        exchange_B=exchange,
        objective=Objective(gan=GANLoss("lsgan"), identity=identity, own_gradient=step.own_gradient),
        batched=step.batched,
    )


class TestFlop:
    def test_the_papers_networks(self) -> None:
        """The figures of the design; exact, since both sides count integers."""
        assert round(cost.generator_forward(PAPER).flop / 1e9, 1) == 99.1
        assert round(cost.training_step(PAPER).flop / 1e9, 1) == 1879.2
        assert round(cost.training_step(dataclasses.replace(PAPER, identity=False)).flop / 1e9) == 1287

    @pytest.mark.parametrize(
        "step",
        [
            PAPER,
            Step(SMALL, height=32, width=48),
            Step(SMALL, height=32, width=32, identity=False, batched=True),
            Step(SMALL, height=32, width=32, batched=True, batch=3, accumulate=2),
            Step(SMALL, height=32, width=32, own_gradient=True),
            Step(dataclasses.replace(SMALL, discriminator="pixel"), height=32, width=32),
            Step(dataclasses.replace(SMALL, discriminator_layers=1), height=24, width=40),
            # no multiple of 4: the generators extend it, the discriminators take it as it is
            Step(dataclasses.replace(SMALL, discriminator_layers=2), height=30, width=45, batch=2),
            Step(dataclasses.replace(SMALL, preset="keras"), height=32, width=48),
            Step(dataclasses.replace(SMALL, preset="keras", discriminator_layers=2), height=30, width=45, batched=True),
            Step(dataclasses.replace(SMALL, channels_A=1, channels_B=4), height=32, width=32, identity=False),
            Step(dataclasses.replace(SMALL, upsample="resize"), height=30, width=48),
            Step(dataclasses.replace(SMALL, method="pix2pix", channels_A=1), height=32, width=48),
            Step(dataclasses.replace(SMALL, method="pix2pix", direction="BtoA", channels_A=1), 2, 32, 32, batched=True),
        ],
        ids=[
            *("paper", "oblong", "no-identity", "batch-3", "own-gradient", "pixel", "one-layer", "odd-size", "keras"),
            *("keras-odd-size", "channels", "resize", "pix2pix", "pix2pix-BtoA"),
        ],
    )
    def test_equals_what_pytorch_counts(self, step: Step) -> None:
        assert cost.training_step(step).flop == counted_step(step)

    def test_what_resizing_costs(self) -> None:
        """Four times the doublings' arithmetic, 14 % more in all, and a copy of the resized map unless it is fused."""
        resized = dataclasses.replace(PAPER, model=ModelConfig(upsample="resize"))
        layers = {layer.name: layer for layer in cost.generator_layers(resized.model, 3, 3, 256, 256)}
        assert layers["up2"].flop == 4 * cost.generator_layers(PAPER.model, 3, 3, 256, 256)[-2].flop
        assert (layers["up2"].source, layers["up2"].input) == (128 * 128**2, 128 * 258**2)
        assert cost.training_step(resized).flop / cost.training_step(PAPER).flop == pytest.approx(1.14, abs=0.005)
        for level, copies in (("i", 1), ("ii", 1), ("iii", 0)):
            more, less = (cost.generator_forward(dataclasses.replace(s, level=level)) for s in (resized, PAPER))
            assert more.kernels - less.kernels == 2 * copies

    def test_recomputed_blocks_are_computed_twice(self) -> None:
        """28 % more for the paper's networks, says the design; exact is one more forward of the blocks."""
        once, twice = cost.training_step(PAPER), cost.training_step(dataclasses.replace(PAPER, recompute=True))
        block = sum(layer.flop for layer in cost.generator_layers(PAPER.model, 3, 3, 256, 256) if layer.block)
        assert twice.flop - once.flop == 6 * block
        assert twice.flop / once.flop == pytest.approx(1.28, abs=0.005)

    @pytest.mark.parametrize("preset", ["original", "keras"])
    @pytest.mark.parametrize("discriminator", ["patch", "pixel"])
    def test_parameters_equal_those_of_the_networks(self, preset: str, discriminator: str) -> None:
        model = dataclasses.replace(SMALL, preset=preset, discriminator=discriminator, channels_A=1)
        with torch.device("meta"):
            nets = (*build_generators(model, impl="reference"), *build_discriminators(model, impl="reference"))
        expected = sum(p.numel() for net in nets for p in net.parameters())
        assert cost.optimiser(Step(model)) == Work(0, 28 * expected, 2)


class TestTraffic:
    @pytest.mark.parametrize(
        ("level", "gigabytes", "kernels"),
        [("i+", 13.9, 2663), ("i", 10.7, 2039), ("ii", 6.2, 997), ("ii+", 5.5, 895), ("iii", 4.0, 505)],
    )
    def test_the_designs_table(self, level: str, gigabytes: float, kernels: int) -> None:
        """Bytes to the table's rounding and a half per cent, kernels exactly.

        The table counts one kernel for the optimisers; here they are counted apart. At (iii) ours is 2.4 % above: what
        the input gradient's epilogue reads for the sums counts here for the residual stream's norms as well.
        """
        work = cost.training_step(dataclasses.replace(PAPER, level=level))
        assert work.kernels == kernels - 1
        tolerance = 0.05 + (0.025 if level == "iii" else 0.005) * gigabytes
        assert work.bytes / 1e9 == pytest.approx(gigabytes, abs=tolerance)

    @pytest.mark.parametrize(
        ("level", "recompute", "megabytes"),
        [("i", False, 993), ("ii", False, 815), ("iii", False, 518), ("iii", True, 292)],
    )
    def test_activations_kept(self, level: str, recompute: bool, megabytes: float) -> None:
        """The design's figures to 2 %: what small tensors of the discriminators count differs by some megabytes."""
        kept = cost.activation_bytes(dataclasses.replace(PAPER, level=level, recompute=recompute))
        assert kept / 1e6 == pytest.approx(megabytes, rel=0.02)

    def test_a_layer_by_hand(self) -> None:
        """A pixel discriminator of one picture, forward only, in float32 at level i, counted on paper."""
        model = ModelConfig(discriminator="pixel", ndf=2)
        layers = cost.discriminator_layers(model, 3, 4, 4)
        assert [(layer.input, layer.output, layer.flop) for layer in layers] == [
            (48, 32, 2 * 6 * 16),
            (32, 64, 2 * 8 * 16),
            (64, 16, 2 * 4 * 16),
        ]
        one = cost.Pass("D_A", layers, 1, weight_gradient=False, input_gradient=False)
        step = Step(model, height=4, width=4, precision="fp32")
        kernels = [(kernel.kind, kernel.bytes) for kernel in cost._forward(one, step)]
        assert kernels == [
            *(("conv", 4 * 80), ("bias", 4 * 64), ("activation", 4 * 64)),
            *(("conv", 4 * 96), ("bias", 4 * 128), ("norm", 4 * 64), ("norm", 4 * 128), ("activation", 4 * 128)),
            *(("conv", 4 * 80), ("bias", 4 * 32)),
        ]

    def test_batching_moves_the_same_bytes_with_fewer_kernels(self) -> None:
        apart, together = cost.training_step(PAPER), cost.training_step(dataclasses.replace(PAPER, batched=True))
        assert (together.flop, together.bytes) == (apart.flop, apart.bytes)
        # The two identities joined the fakes, and each discriminator's pictures one another.
        assert len(cost.step_passes(PAPER)) == 12
        assert len(cost.step_passes(dataclasses.replace(PAPER, batched=True))) == 8
        assert together.kernels < 0.7 * apart.kernels
        assert cost.weights(dataclasses.replace(PAPER, batched=True)).bytes < 0.75 * cost.weights(PAPER).bytes

    def test_work_grows_with_the_pictures_and_the_type(self) -> None:
        one = cost.training_step(PAPER)
        assert cost.training_step(dataclasses.replace(PAPER, batch=4)) == Work(4 * one.flop, 4 * one.bytes, one.kernels)
        assert cost.training_step(dataclasses.replace(PAPER, accumulate=4)) == one * 4
        assert cost.training_step(dataclasses.replace(PAPER, precision="tf32")).bytes == 2 * one.bytes

    def test_each_level_moves_less(self) -> None:
        for model in (SMALL, dataclasses.replace(SMALL, preset="keras"), dataclasses.replace(SMALL, channels_A=1)):
            steps = [cost.training_step(Step(model, level=level)) for level in cost.LEVELS]
            assert [step.bytes for step in steps] == sorted((step.bytes for step in steps), reverse=True)
            assert [step.kernels for step in steps] == sorted((step.kernels for step in steps), reverse=True)

    def test_weights_in_float32_need_no_casts(self) -> None:
        """Three passes a generator, three a discriminator of which two train it: counted on paper."""
        step = dataclasses.replace(PAPER, precision="fp32")
        G = sum(layer.filters for layer in cost.generator_layers(step.model, 3, 3, 256, 256))
        D = sum(layer.filters for layer in cost.discriminator_layers(step.model, 3, 256, 256))
        # reads forward and for the input gradient, writes of the weight gradient, sums of two gradients
        assert cost.weights(step).bytes == 4 * 2 * (G * (2 * 3 + 3 + 3 * 2) + D * (2 * 3 + 2 + 3 * 1))


def test_the_step_of_a_run() -> None:
    """As configured, but without recomputation, which is no work that the step needs."""
    config = load_config(
        None,
        ["training.batch=2", "training.accumulate=3", "loss.identity=0", "training.recompute=true", "model.ngf=8"],
    )
    step = cost.configured(config, 64, 48, precision="tf32", fused=True)
    assert step == Step(
        ModelConfig(ngf=8), batch=2, height=64, width=48, identity=False, level="ii", precision="tf32", batched=True,
        accumulate=3,
    )  # fmt: skip
    assert step.pairs == 6
    own = load_config(None, ["loss.generator_gradient=own"])
    step = cost.configured(own, 256, 256, precision="bf16", fused=False)
    assert (step.own_gradient, step.identity, step.level) == (True, True, "i")


@pytest.mark.parametrize(
    ("wrong", "words"), [({"level": "iv"}, "level = 'iv'"), ({"precision": "auto"}, "precision = 'auto'")]
)
def test_unknown_names_are_refused(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PAPER, **wrong)  # type: ignore[arg-type]
