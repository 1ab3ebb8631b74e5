"""The order of pictures: pure, the same for every number of processes, and with the laws it claims."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cyclegan_fast.data import sampler
from cyclegan_fast.data.sampler import batch_positions, crop_draws, epoch_length, epoch_order, steps_per_epoch

# Recorded once: another value means that every seeded run changes.
KNOWN_A = [3, 2, 1, 1, 0, 0, 4]
KNOWN_B = [3, 3, 2, 4, 3, 3, 2]
KNOWN_Y = [0.27653975140384646, 0.8670867899780473]
KNOWN_X = [0.735989472206062, 0.13160065450142988]
KNOWN_FLIP = [False, False]


def test_hash_is_splitmix64() -> None:
    # The first values of SplitMix64 with state 1234567, as its reference implementation prints them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert sampler._hash(np.arange(4), 1234567).tolist() == expected


def test_known_values_do_not_change_between_versions() -> None:
    index_A, index_B = epoch_order(5, 7, pairing="unpaired", seed=3, epoch=2)
    draws = crop_draws(3, 2, np.array([0, 6]), 1)
    assert index_A.tolist() == KNOWN_A
    assert index_B.tolist() == KNOWN_B
    assert draws.y.tolist() == KNOWN_Y
    assert draws.x.tolist() == KNOWN_X
    assert draws.flip.tolist() == KNOWN_FLIP


@pytest.mark.parametrize(("n_A", "n_B"), [(5, 9), (9, 5), (1, 4), (4, 1), (1, 1), (6, 6)])
def test_unpaired_visits_the_whole_epoch_with_the_first_domain_modulo_its_size(n_A: int, n_B: int) -> None:
    length = max(n_A, n_B)
    index_A, index_B = epoch_order(n_A, n_B, pairing="unpaired", seed=1, epoch=1)
    assert index_A.dtype == index_B.dtype == np.int64
    assert epoch_length(n_A, n_B, "unpaired") == length
    assert sorted(index_A.tolist()) == sorted(i % n_A for i in range(length))
    assert len(index_B) == length
    assert index_B.min() >= 0
    assert index_B.max() < n_B


@pytest.mark.parametrize(("n_A", "n_B"), [(5, 9), (9, 5), (1, 3)])
def test_ordered_pairs_the_ith_with_the_ith(n_A: int, n_B: int) -> None:
    index_A, index_B = epoch_order(n_A, n_B, pairing="ordered", seed=1, epoch=4)
    pairs = sorted(zip(index_A.tolist(), index_B.tolist(), strict=True))
    assert pairs == sorted((i % n_A, i % n_B) for i in range(max(n_A, n_B)))


@pytest.mark.parametrize(("n_A", "n_B"), [(5, 9), (9, 5), (7, 7)])
def test_zip_takes_two_shuffles_side_by_side(n_A: int, n_B: int) -> None:
    index_A, index_B = epoch_order(n_A, n_B, pairing="zip", seed=1, epoch=1)
    assert len(index_A) == len(index_B) == epoch_length(n_A, n_B, "zip") == min(n_A, n_B)
    assert len(set(index_A.tolist())) == len(set(index_B.tolist())) == min(n_A, n_B)  # without replacement
    # Over the epochs every picture of the larger set gets its turn.
    seen = {i for epoch in range(60) for i in epoch_order(n_A, n_B, pairing="zip", seed=1, epoch=epoch)[0].tolist()}
    assert seen == set(range(n_A))
    if n_A == n_B:
        assert index_A.tolist() != index_B.tolist()


@pytest.mark.parametrize("pairing", ["unpaired", "ordered", "zip"])
def test_order_depends_on_seed_and_epoch_alone(pairing: str) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [part.tolist() for part in epoch_order(40, 31, pairing=pairing, seed=seed, epoch=epoch)]

    first = order(5, 3)
    np.random.default_rng(0).random(100)
    order(5, 4)
    assert order(5, 3) == first
    assert order(5, 4) != first
    assert order(6, 3) != first
    assert order(3, 5) != order(5, 3)  # seed and epoch are not exchangeable


def test_another_process_draws_the_same() -> None:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import numpy as np\n"
        "from cyclegan_fast.data.sampler import crop_draws, epoch_order\n"
        "print([part.tolist() for part in epoch_order(12, 9, pairing='unpaired', seed=8, epoch=2)])\n"
        "print(crop_draws(8, 2, np.arange(5), 0).y.tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    order = [part.tolist() for part in epoch_order(12, 9, pairing="unpaired", seed=8, epoch=2)]
    assert run.stdout.splitlines() == [str(order), str(crop_draws(8, 2, np.arange(5), 0).y.tolist())]


def test_the_second_domain_is_drawn_with_replacement() -> None:
    n_A, n_B, epochs = 400, 20, 100
    counts = np.zeros(n_B)
    for epoch in range(1, epochs + 1):
        counts += np.bincount(epoch_order(n_A, n_B, pairing="unpaired", seed=11, epoch=epoch)[1], minlength=n_B)
    expected = n_A * epochs / n_B
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 19 degrees of freedom: 0.001 and 0.999 quantiles of chi-square. Drawn without replacement it would be 0.
    assert 5.4 < chi_square < 43.8
    # With replacement 20 draws of 20 hold each picture with probability 1 - (1 - 1/20)^20 = 0.6415.
    held = [len(set(epoch_order(20, 20, pairing="unpaired", seed=2, epoch=e)[1].tolist())) for e in range(400)]
    assert np.mean(held) / 20 == pytest.approx(0.6415, abs=4 * 0.06 / np.sqrt(400))


def test_shuffles_are_uniform() -> None:
    orders = [tuple(epoch_order(3, 3, pairing="ordered", seed=9, epoch=e)[0].tolist()) for e in range(3000)]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.999


def test_draws_are_uniform_and_independent() -> None:
    positions = np.arange(20_000)
    streams = []
    for domain in (0, 1):
        draws = crop_draws(4, 1, positions, domain)
        streams += [draws.y, draws.x, draws.flip.astype(np.float64)]
        for values in (draws.y, draws.x):
            assert values.dtype == np.float64
            assert values.min() >= 0
            assert values.max() < 1
            counts = np.histogram(values, bins=10, range=(0, 1))[0]
            assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.999
        assert draws.flip.dtype == np.bool_
        assert draws.flip.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(20_000))
    streams.append(crop_draws(4, 2, positions, 0).y)  # the next epoch
    streams.append(crop_draws(5, 1, positions, 0).y)  # another seed
    streams.append(np.roll(streams[0], 1))  # the position before
    correlation = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(20_000)


def test_a_draw_does_not_depend_on_what_else_is_asked_for() -> None:
    whole = crop_draws(7, 3, np.arange(100), 1)
    for some in (np.array([41]), np.array([99, 0, 41, 41])):
        part = crop_draws(7, 3, some, 1)
        assert part.y.tolist() == whole.y[some].tolist()
        assert part.x.tolist() == whole.x[some].tolist()
        assert part.flip.tolist() == whole.flip[some].tolist()


def test_no_draw_reaches_the_end() -> None:
    # The largest draw must not become an offset outside the picture, whatever the room.
    largest = 1 - 2.0**-53
    rooms = np.arange(1, 20_000)
    assert (np.floor(largest * rooms) == rooms - 1).all()


@pytest.mark.parametrize("length", [1, 7, 24, 25])
@pytest.mark.parametrize("global_batch", [1, 4, 12])
def test_every_split_of_a_global_batch_holds_the_same_positions(length: int, global_batch: int) -> None:
    def positions(step: int, world_size: int, accumulate: int) -> tuple[int, list[int]]:
        batch = global_batch // (world_size * accumulate)
        parts, epochs = [], set()
        for rank in range(world_size):
            epoch, part = batch_positions(
                step, batch=batch, accumulate=accumulate, world_size=world_size, rank=rank, length=length
            )
            assert part.shape == (accumulate, batch)
            parts.append(part)
            epochs.add(epoch)
        assert len(epochs) == 1
        # Micro-batch by micro-batch, rank by rank: the order itself is the same, not just the set.
        return epochs.pop(), np.stack(parts, axis=1).reshape(-1).tolist()

    splits = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (3, 2), (12, 1)]
    for step in range(2 * steps_per_epoch(length, global_batch) + 1):
        alone = positions(step, 1, 1)
        for world_size, accumulate in splits:
            if global_batch % (world_size * accumulate) == 0:
                assert positions(step, world_size, accumulate) == alone


def test_positions_count_through_the_epoch_and_wrap_at_its_end() -> None:
    def run(steps: int, length: int) -> list[tuple[int, list[int]]]:
        found = []
        for step in range(steps):
            epoch, part = batch_positions(step, batch=4, accumulate=1, world_size=1, rank=0, length=length)
            found.append((epoch, part.reshape(-1).tolist()))
        return found

    assert run(4, 6) == [(1, [0, 1, 2, 3]), (1, [4, 5, 0, 1]), (2, [0, 1, 2, 3]), (2, [4, 5, 0, 1])]
    assert run(2, 3) == [(1, [0, 1, 2, 0]), (2, [0, 1, 2, 0])]  # a batch larger than the set
    assert steps_per_epoch(6, 4) == 2
    assert steps_per_epoch(8, 4) == 2


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="pairing = 'random' is not allowed: one of unpaired, ordered, zip"):
        epoch_length(3, 3, "random")
    with pytest.raises(ValueError, match="A has 0 and B has 3"):
        epoch_order(0, 3, pairing="zip", seed=0, epoch=1)
    with pytest.raises(ValueError, match="domain = 2"):
        crop_draws(0, 1, np.arange(3), 2)
    with pytest.raises(ValueError, match="rank 2 in 2"):
        batch_positions(0, batch=1, accumulate=1, world_size=2, rank=2, length=3)
    with pytest.raises(ValueError, match="step -1"):
        batch_positions(-1, batch=1, accumulate=1, world_size=1, rank=0, length=3)
    with pytest.raises(ValueError, match="at least 1"):
        steps_per_epoch(0, 4)
