"""Spectral norms of the discriminators' weights against numpy's singular values and PyTorch's own parametrization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cyclegan_fast.models.reference import PatchDiscriminator, PixelDiscriminator, SpectralNorm, power_iteration

KINDS = [(PatchDiscriminator, {"layers": 2}), (PatchDiscriminator, {"preset": "keras"}), (PixelDiscriminator, {})]


def make(kind: Any, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(3)
    D: nn.Module = kind(3, 4, spectral_norm=True, **options)
    return D


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def largest(weight: Tensor) -> float:
    return float(np.linalg.svd(weight.detach().double().flatten(1).numpy(), compute_uv=False)[0])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_largest_singular_values_are_one_and_stay_so(kind: Any, options: dict[str, Any]) -> None:
    """From the start to 2 %, and after steps that move every weight by about a quarter of its size."""
    D = make(kind, options)
    assert [largest(conv.weight) for conv in convolutions(D)] == pytest.approx([1] * len(convolutions(D)), rel=0.02)
    before = [conv.weight.detach().clone() for conv in convolutions(D)]
    optimizer = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    for _ in range(25):
        optimizer.zero_grad()
        D(x).square().mean().backward()
        optimizer.step()
        power_iteration(D)
    after = [conv.weight.detach() for conv in convolutions(D)]
    assert all(float((a - b).norm() / b.norm()) > 0.02 for a, b in zip(after, before, strict=True))
    assert [largest(weight) for weight in after] == pytest.approx([1] * len(after), rel=0.02)


def test_running_a_network_changes_nothing() -> None:
    D = make(PatchDiscriminator, {"layers": 1})
    before = {name: tensor.clone() for name, tensor in D.state_dict().items()}
    D.train()(torch.rand(1, 3, 16, 16)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in D.state_dict().items())
    power_iteration(D)
    moved = {name for name, tensor in D.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"_u", "_v"}
    assert len(moved) == 2 * (len(convolutions(D)) - 1)  # the logits' matrix has one row: its vectors are found at once


def test_keys_values_and_gradients_are_those_of_pytorchs_parametrization() -> None:
    D = make(PatchDiscriminator, {"layers": 2}).double()
    other = PatchDiscriminator(3, 4, 2).double()
    for conv in convolutions(other):
        parametrizations.spectral_norm(conv)
    other.load_state_dict(D.state_dict(), strict=True)
    other.eval()  # or it would iterate
    x = torch.rand(2, 3, 16, 20, dtype=torch.float64)
    results = []
    for network in (D, other):
        y = network(x)
        grads = torch.autograd.grad(y.square().sum(), list(network.parameters()))
        results.append([y, *grads])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_an_iteration_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    norm = SpectralNorm(weight, iterations=0)
    norm._u.copy_(torch.tensor([1.0, 1.0]))
    norm.iterate(weight)
    assert norm._v.tolist() == pytest.approx([3 / 5, 4 / 5])
    u = np.array([9, 16]) / np.hypot(9, 16)
    assert norm._u.tolist() == pytest.approx(u)
    sigma = u @ np.diag([3.0, 4.0]) @ np.array([0.6, 0.8])
    np.testing.assert_allclose(norm(weight).numpy(), weight.numpy() / sigma, rtol=1e-6)


def test_weights_stay_float32_under_autocast() -> None:
    D = make(PatchDiscriminator, {"layers": 1})
    exact = D.model[0].weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(D.model[0].weight, exact)
        assert D(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16


def test_without_it_there_is_nothing() -> None:
    D = PatchDiscriminator(3, 4)
    assert not list(D.buffers())
    assert not any(parametrize.is_parametrized(module) for module in D.modules())
