"""The peer that we are measured against does the same work: de-facto keys, the same losses, the same updates."""

from __future__ import annotations

import peers
import pytest
import torch
from torch import Tensor, nn

from cyclegan_fast.models import reference
from cyclegan_fast.training.cyclegan import CycleGANState, Objective
from cyclegan_fast.training.step import StepBatch, train_step

# float64: what is left is the order of sums, which Adam's division by small second moments may enlarge.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def networks() -> tuple[list[nn.Module], list[nn.Module]]:
    """Ours and the peer's, with the same weights."""
    torch.manual_seed(0)
    ours: list[nn.Module] = [reference.ResnetGenerator(ngf=4, blocks=2) for _ in range(2)]
    ours += [reference.PatchDiscriminator(ndf=4, layers=2) for _ in range(2)]
    theirs: list[nn.Module] = [peers.Generator(4, 2) for _ in range(2)]
    theirs += [peers.Discriminator(4, 2) for _ in range(2)]
    for mine, their in zip(ours, theirs, strict=True):
        their.load_state_dict(mine.state_dict())  # strict: the same keys and shapes
        mine.double()
        their.double()
    return ours, theirs


def no_pool(images: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize("identity", [0.5, 0.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_peer_trains_as_the_reference_does(batch: int, identity: float) -> None:
    ours, theirs = networks()
    parameters = [[p for network in pair for p in network.parameters()] for pair in (ours[:2], ours[2:])]
    G, D = (torch.optim.Adam(group, lr=2e-4, betas=(0.5, 0.999)) for group in parameters)
    state = CycleGANState(
        **dict(zip(("G_A", "G_B", "D_A", "D_B"), ours, strict=True)),
        optimizer_G=G,
        optimizer_D=D,
        exchange_A=no_pool,
        exchange_B=no_pool,
        objective=Objective(identity=identity),
    )
    peer = peers.CycleGANModel(*theirs, identity=identity, pool_size=0)
    for _ in range(3):
        real_A, real_B = (torch.rand(batch, 3, 32, 40, dtype=torch.float64) * 2 - 1 for _ in range(2))
        draws = torch.zeros(1, batch)
        losses = train_step(state, StepBatch(real_A[None], real_B[None], *[draws] * 6))
        peer.optimize_parameters(real_A, real_B)
        names = ["G_A", "G_B", "cycle_A", "cycle_B", "D_A", "D_B", *(["idt_A", "idt_B"] if identity else [])]
        assert set(names) == set(peer.losses)
        for name in names:
            torch.testing.assert_close(peer.losses[name].detach(), losses[name], **CLOSE)
    for mine, their in zip(ours, theirs, strict=True):
        for name, weight in mine.state_dict().items():
            if not is_bias_before_a_norm(mine, name):
                torch.testing.assert_close(their.state_dict()[name], weight, **CLOSE)


def is_bias_before_a_norm(network: nn.Module, name: str) -> bool:
    """Its gradient is zero but for rounding, which Adam enlarges to steps of the learning rate."""
    path, _, kind = name.rpartition(".")
    parent, _, index = path.rpartition(".")
    layers = list(network.get_submodule(parent))
    following = layers[int(index) + 1 :][:1]
    return kind == "bias" and any(isinstance(layer, reference.InstanceNorm) for layer in following)


def test_the_pool_keeps_fifty_and_hands_out_old_ones() -> None:
    pool = peers.ImagePool(50)
    for i in range(50):
        assert pool.query(torch.full((1, 3, 2, 2), float(i)))[0, 0, 0, 0] == i
    handed = [float(pool.query(torch.full((1, 3, 2, 2), float(i)))[0, 0, 0, 0]) for i in range(50, 150)]
    swapped = sum(value != i for i, value in enumerate(handed, 50))
    assert len(pool.images) == 50
    assert 25 < swapped < 75  # a hundred fair draws: five standard deviations
