"""Reading ahead and writing behind: order, bounds, failures, interruptions, and that the worker hardly waits."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from cyclegan_fast.inference.pipeline import pipelined


class Counted:
    """Jobs are numbers; every step notes when it ran, and how many bytes were held at most."""

    def __init__(self, read: float = 0, work: float = 0, write: float = 0, cost: Callable[[int], int] = lambda _: 1):
        self.seconds = {"read": read, "work": work, "write": write}
        self.cost = cost
        self.spans: dict[str, list[tuple[int, float, float]]] = {"read": [], "work": [], "write": []}
        self.lock, self.held, self.most = threading.Lock(), 0, 0

    def _step(self, name: str, job: int, change: int) -> None:
        begin = time.perf_counter()
        with self.lock:
            self.held += max(change, 0)
            self.most = max(self.most, self.held)
        time.sleep(self.seconds[name])
        with self.lock:
            self.held += min(change, 0)
            self.spans[name].append((job, begin, time.perf_counter()))

    def read(self, job: int) -> int:
        self._step("read", job, self.cost(job))
        return job * 10

    def work(self, job: int, item: int) -> int:
        assert item == job * 10
        self._step("work", job, 0)
        return item + 1

    def write(self, job: int, item: int, result: int) -> None:
        assert (item, result) == (job * 10, job * 10 + 1)
        self._step("write", job, -self.cost(job))

    def run(self, jobs: int, limit: int = 100, **threads: int) -> list[tuple[int, Exception | None]]:
        return list(pipelined(range(jobs), self.read, self.work, self.write, cost=self.cost, limit=limit, **threads))


def test_everything_is_done_once_and_told_in_order() -> None:
    steps = Counted(write=0.002)
    assert steps.run(40, readers=3, writers=4) == [(job, None) for job in range(40)]
    for name in ("read", "work", "write"):
        assert sorted(job for job, _, _ in steps.spans[name]) == list(range(40))
    assert [job for job, _, _ in steps.spans["work"]] == list(range(40))
    assert steps.held == 0
    assert Counted().run(0) == []


def test_the_worker_hardly_waits_for_readers_and_writers() -> None:
    """Reading and writing take four times as long as the work, and are hidden by the threads for them."""
    steps = Counted(read=0.04, work=0.02, write=0.06)
    steps.run(25, readers=3, writers=4)
    work = steps.spans["work"]
    idle = [begin - end for (_, _, end), (_, begin, _) in itertools.pairwise(work)]
    assert sorted(idle)[len(idle) // 2] < 0.005
    alone = Counted(read=0.04, work=0.02, write=0.06)
    alone.run(4, limit=1)  # room for one: everything waits for everything
    gaps = [begin - end for (_, _, end), (_, begin, _) in itertools.pairwise(alone.spans["work"])]
    assert min(gaps) > 0.09


@pytest.mark.parametrize(("limit", "cost", "most"), [(25, 10, 20), (10, 10, 10), (5, 10, 10), (1000, 10, 80)])
def test_bytes_are_bounded_but_one_picture_always_goes(limit: int, cost: int, most: int) -> None:
    steps = Counted(write=0.003, cost=lambda _: cost)
    assert len(steps.run(20, limit, readers=4, writers=3)) == 20
    assert cost <= steps.most <= min(most, 20 * cost) or limit == 1000


def test_a_large_one_among_small_ones_is_waited_for() -> None:
    steps = Counted(write=0.002, cost=lambda job: 90 if job % 5 == 0 else 10)
    assert steps.run(30, 100, readers=4, writers=4) == [(job, None) for job in range(30)]
    assert steps.most <= 100


@pytest.mark.parametrize("place", ["cost", "read", "work", "write"])
@pytest.mark.parametrize("error", [ValueError("bad"), OSError("disk"), MemoryError()], ids=lambda e: type(e).__name__)
def test_failures_stand_in_their_place_and_free_their_bytes(place: str, error: Exception) -> None:
    steps = Counted(cost=lambda _: 60)  # one at a time: what is not given back would stop everything
    broken = getattr(steps, place)

    def fail(job: int, *rest: int) -> object:
        if job % 3 == 1 and (place != "cost" or threading.current_thread() is not threading.main_thread()):
            raise error
        return broken(job, *rest)

    setattr(steps, place, fail)
    told = steps.run(10, 100, readers=2, writers=2)
    assert [job for job, _ in told] == list(range(10))
    assert [job for job, failure in told if failure is not None] == [1, 4, 7]
    assert all(failure in (None, error) for _, failure in told)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_an_interruption_ends_everything(error: BaseException) -> None:
    """What is being written is finished, nothing else is begun, no thread is left, also of those that wait for room."""
    steps = Counted(write=0.05, cost=lambda _: 40)
    before = threading.active_count()

    def work(job: int, item: int) -> int:
        if job == 3:
            raise error
        return steps.work(job, item)

    results = pipelined(range(50), steps.read, work, steps.write, cost=steps.cost, limit=100, readers=4)
    with pytest.raises(type(error)):
        list(results)
    assert threading.active_count() == before
    assert [job for job, _, _ in steps.spans["write"]][:1] == [0]
    assert len(steps.spans["read"]) <= 8


def test_a_reader_of_results_who_stops_ends_everything() -> None:
    steps = Counted(cost=lambda _: 40)
    before = threading.active_count()
    results = pipelined(range(50), steps.read, steps.work, steps.write, cost=steps.cost, limit=100, readers=3)
    assert next(results) == (0, None)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(steps.spans["work"]) < 10
