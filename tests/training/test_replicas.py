"""The hash that tells whether processes hold the same, and what is said when they do not; one process, stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cyclegan_fast import distributed
from cyclegan_fast.cli import main
from cyclegan_fast.training import trainer
from cyclegan_fast.training.replicas import ReplicaError, Replicas, fingerprint


def example() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((40, 30, 3, 3), generator=generator).contiguous(memory_format=torch.channels_last)
    return [weight, torch.randn(7, generator=generator), torch.zeros(0), torch.randn((), generator=generator)]


def test_equal_bits_give_equal_numbers() -> None:
    wanted = fingerprint(example())
    assert wanted.dtype == torch.int64
    assert wanted.shape == ()
    assert torch.equal(fingerprint(example()), wanted)
    assert int(fingerprint([])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_any_single_bit_shows(dtype: torch.dtype) -> None:
    """Also the sign of a zero, and the last bit of a NaN, which no comparison of numbers would see."""
    tensor = (torch.arange(3000).remainder(50) - (0 if dtype == torch.uint8 else 20)).to(dtype)
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    before = fingerprint([tensor])
    for place in (0, 20, 1023, 1024, 2999):
        for bit in range(8 * tensor.element_size()):
            flip = torch.tensor(1 << bit if bit < 8 * tensor.element_size() - 1 else -1).to(bits.dtype)
            old = bits[place].clone()
            bits[place] ^= flip
            assert not torch.equal(fingerprint([tensor]), before), (place, bit)
            bits[place] = old
    assert torch.equal(fingerprint([tensor]), before)


def test_places_order_and_memory_order_count() -> None:
    weight, *others = example()
    before = fingerprint([weight, *others])
    for i, j in ((0, 1), (0, 1024), (5, 2 * 1024 + 7)):
        swapped = weight.clone()
        flat = swapped.permute(0, 2, 3, 1).reshape(-1)
        flat[i], flat[j] = flat[j].clone(), flat[i].clone()
        swapped = flat.view(40, 3, 3, 30).permute(0, 3, 1, 2)
        assert swapped.stride() == weight.stride()
        assert not torch.equal(fingerprint([swapped, *others]), before)
    assert not torch.equal(fingerprint([*others, weight]), before)
    assert not torch.equal(fingerprint([weight.contiguous(), *others]), before)


class Ranks:
    """Stand-in for several processes: what the others hold is what this one has, but for planted differences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.planted = count, dict[tuple[int, int], int]()
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "disagreement", self.disagreement)

    def disagreement(self, values: Tensor) -> Tensor | None:
        held = values.repeat(self.count, 1)
        for (rank, column), change in self.planted.items():
            held[rank, column] += change
        return None if (held == held[0]).all() else held


def parts() -> dict[str, list[Tensor]]:
    return {"G_A": example(), "D_B": example()[:1], "pool_A": []}


def test_the_message_names_step_parts_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 8)
    replicas = Replicas(parts, every=10)
    replicas.check(0)
    replicas.check(30)
    ranks.planted = {(5, 0): 1, (2, 1): 7, (5, 1): 9}
    with pytest.raises(ReplicaError) as error:
        replicas.check(40)
    message = str(error.value)
    assert "8 processes" in message
    assert "after step 40" in message
    assert "G_A on rank 5; D_B on ranks 2, 5." in message
    assert "same after step 30" in message


def test_of_two_that_differ_the_second_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ranks.planted = {(0, 0): 1, (1, 3): 100}
    with pytest.raises(ReplicaError, match=r"at the start, with 12 steps done.*G_A on rank 1; the number of steps on"):
        Replicas(parts, every=0).check(12)


def test_thousands_of_ranks_fit_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 1024)
    ranks.planted = {(rank, 2): rank for rank in range(1, 500)}
    with pytest.raises(ReplicaError, match=r"pool_A on ranks 1, 2, 3, .*, 16 and 483 more\."):
        Replicas(parts, every=1).check(5)


def test_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    def due(every: int) -> list[int]:
        replicas = Replicas(parts, every=every)
        return [step for step in range(1, 8) if replicas.due(step, last=step == 7)]

    assert due(3) == []  # one process has nobody to compare with
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert due(3) == [3, 6, 7]
    assert due(0) == []


def test_one_process_computes_nothing() -> None:
    def never() -> Any:
        raise AssertionError("asked for")

    Replicas(never, every=1).check(1)


def test_the_command_says_so_and_exits_with_the_documented_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*_: Any, **__: Any) -> None:
        raise ReplicaError("D_B on rank 1")

    monkeypatch.setattr(trainer, "train", differ)
    assert main(["train", "training.steps=1"]) == 3
    assert "cyclegan-fast: D_B on rank 1" in capsys.readouterr().err
