"""The communication model has the limits it must have, and the page shows what it says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import communication
import matplotlib as mpl
import network
import pytest
import scaling
from communication import CLUSTERS, Cluster, Compute, Gloo, Network, Plan, computed, ring_all_gather, ring_all_reduce
from communication import timeline as laid_out
from model import Task

from cyclegan_fast.config import ModelConfig
from cyclegan_fast.models import build_discriminators, build_generators

PLANS = [
    *(
        Plan(overlap, gather)
        for overlap in ("none", "backward", "discriminators")
        for gather in ("late", "forward", "beside")
    ),
    Plan("discriminators", shared=False),
    Plan("discriminators", "beside", half=True),
]
GLOO = Gloo(bandwidth=25e6, latency=5e-3, overhead=1e-3, gather=1.1)
NETWORKS: dict[str, Network] = {"gloo": GLOO, **CLUSTERS}


@dataclass
class Constant:
    """A network on which each collective takes the same time whatever its size."""

    reduce: float = 0.0
    gather: float = 0.0
    votes: float = 0.0

    def all_reduce(self, *_: float) -> float:
        return self.reduce

    def all_gather(self, *_: float) -> float:
        return self.gather

    def vote(self, *_: float) -> float:
        return self.votes


# Two gradients of G become final after 6 and 8 of its pass's 8 seconds, one of D after 2 of 2.
STEP = Compute(8.0, 2.0, 3.0, 10, (((6.0, 100), (8.0, 100)),), (((2.0, 50),),), adam_G=0.5, adam_D=0.25)


def total(plan: Plan, link: Network, compute: Compute = STEP) -> float:
    return laid_out(compute, link, 2, plan).total


def test_ring_by_hand() -> None:
    # 4 processes, 800 bytes at 100 bytes/s: 6 times 200 bytes, and 6 latencies.
    assert ring_all_reduce(4, 800, 100.0, 0.5) == pytest.approx(6 * 2.0 + 6 * 0.5)
    assert ring_all_gather(4, 200, 100.0, 0.5) == pytest.approx(3 * 2.0 + 3 * 0.5)
    assert ring_all_reduce(1, 800, 100.0, 0.5) == ring_all_gather(1, 800, 100.0, 0.5) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_one_process_has_no_communication(name: str) -> None:
    link = NETWORKS[name]
    assert link.all_reduce(1, 1e9) == link.all_gather(1, 1e9) == link.vote(1) == 0
    for plan in PLANS:
        step = laid_out(STEP, link, 1, plan)
        assert step.total == STEP.alone == 10.75
        assert step.communication == 0


def test_gloo_without_latency_is_the_ring_formula() -> None:
    link = Gloo(1e6, 0.0)
    for processes in (2, 3, 8):
        for size in (1e3, 1e6, 5e7):
            assert link.all_reduce(processes, size) == pytest.approx(ring_all_reduce(processes, size, 1e6, 0.0))
            assert link.all_gather(processes, size) == pytest.approx(ring_all_gather(processes, size, 1e6, 0.0))


def test_gloo_tiny_messages_are_latency() -> None:
    link = Gloo(1e9, 0.01, 0.002)
    assert link.all_reduce(2, 8) == pytest.approx(0.002 + 4 * 0.01, rel=1e-5)
    assert link.all_gather(2, 8) == pytest.approx(0.002 + 2 * 0.01, rel=1e-5)
    assert link.vote(2) == pytest.approx(0.002 + 2 * 0.01)
    assert replace(link, bandwidth=math.inf).all_reduce(2, 2**22) == pytest.approx(0.002 + 4 * 0.01)


def test_gloo_keeps_two_segments_under_way() -> None:
    # 8 MiB between two: four segments a half. A segment takes 1 s, a latency 10 s. The first two leave at 10 and 11 and
    # arrive at 21 and 22, the next two leave at 31 and 32 and have arrived at 43.
    link = Gloo(2**20, 10.0)
    assert link.all_reduce(2, 8 * 2**20) == pytest.approx(2 * 43)
    # With a latency of 0.4 s the link is never idle: the first word of being ready, four segments, the last flight.
    assert replace(link, latency=0.4).all_reduce(2, 8 * 2**20) == pytest.approx(2 * (0.4 + 4 + 0.4))


def test_cluster_limits() -> None:
    cluster = Cluster("H200", 8, 100e9, 25e9)
    # Large: a ring at the narrowest link; within a node that is the inside one.
    assert cluster.all_reduce(8, 1e12) == pytest.approx(2 * 7 / 8 * 1e12 / 100e9, rel=1e-3)
    assert cluster.all_reduce(16, 1e12) == pytest.approx(2 * 15 / 16 * 1e12 / 25e9, rel=1e-3)
    assert cluster.all_gather(16, 1e12) == pytest.approx(15 * 1e12 / 25e9, rel=1e-3)
    # Tiny: a tree's depth for many nodes, protocol LL: 4.4 + 2 (7 x 0.52 + 7 x 5.0) microseconds.
    assert cluster.all_reduce(1024, 8) == pytest.approx(1e-6 * (4.4 + 2 * (7 * 0.52 + 7 * 5.0)), rel=1e-3)
    # And a ring within a node of 2: 3.6 + 2 x 0.47.
    assert cluster.all_reduce(2, 8) == pytest.approx(1e-6 * (3.6 + 2 * 0.47), rel=1e-3)
    free = replace(cluster, inside=math.inf, outside=math.inf)
    assert free.all_reduce(1024, 1e12) == free.all_reduce(1024, 8) > 0
    assert cluster.nodes(9) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_more_never_takes_less(name: str) -> None:
    link = NETWORKS[name]
    counts, sizes = [2**exponent for exponent in range(11)], [8, 1e3, 1e5, 1e7, 1e9]
    for collective in (link.all_reduce, link.all_gather):
        for size in sizes:
            times = [collective(count, size) for count in counts]
            assert times == sorted(times)
        for count in counts:
            times = [collective(count, size) for size in sizes]
            assert times == sorted(times)
    votes = [link.vote(count) for count in counts]
    assert votes == sorted(votes)


def test_a_slower_link_never_takes_less() -> None:
    for size in (8, 1e6, 1e8):
        slow = (replace(GLOO, bandwidth=1e6), replace(GLOO, latency=0.1), replace(GLOO, overhead=0.1))
        assert all(link.all_reduce(4, size) >= GLOO.all_reduce(4, size) for link in slow)
        assert all(link.all_gather(4, size) >= GLOO.all_gather(4, size) for link in slow)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_overlap_is_between_the_maximum_and_the_sum(name: str, accumulate: int) -> None:
    compute = computed(Task(2), "H200", accumulate)
    for processes in (2, 64):
        for plan in PLANS:
            step = laid_out(compute, NETWORKS[name], processes, plan)
            rest = step.copies + step.waits["vote"] + step.waits["reading"]
            assert step.total >= max(compute.alone, step.communication)
            assert step.total <= (compute.alone + step.communication + rest) * (1 + 1e-12)
            assert step.total == pytest.approx(compute.alone + step.copies + sum(step.waits.values()))


def test_one_reduction_hides_nothing() -> None:
    step = laid_out(STEP, Constant(reduce=3.0, gather=1.0), 2, Plan())
    assert step.total == pytest.approx(STEP.alone + 3 + 2 * 1 + 3 + 3 / 50)
    assert step.waits == pytest.approx({"generators": 3, "fakes": 2, "discriminators": 3, "vote": 0, "reading": 3 / 50})


def test_timelines_by_hand() -> None:
    link = Constant(reduce=3.0, gather=1.0)
    small = Plan("backward", bucket=100, log_every=10**12)
    # Buckets leave at 6 and 8 and are through at 9 and 12. Adam to 12.5, both gathers, D to 16.5, its bucket, Adam.
    assert total(small, link) == pytest.approx(12.5 + 2 + 2 + 3 + 0.25)
    # Beside the discriminators: the gathers queue behind the buckets, to 13 and 14; D to 16, its bucket to 19,
    # and G's Adam meanwhile.
    assert total(replace(small, overlap="discriminators"), link) == pytest.approx(19 + 0.25)
    # Beside the backward pass they are there at 4 and 5: D from 8 to 10, the generators' reduction to 12, D's to 15.
    assert total(replace(small, overlap="discriminators", gather="beside"), link) == pytest.approx(15 + 0.25)
    # After the forward pass, which waits for them: all of that two seconds later.
    assert total(replace(small, overlap="discriminators", gather="forward"), link) == pytest.approx(17 + 0.25)
    # A pool for each process: nothing to gather.
    assert total(replace(small, shared=False), link) == pytest.approx(12.5 + 2 + 3 + 0.25)
    # A bucket larger than all gradients leaves when the last is final.
    assert total(replace(small, bucket=1e9), link) == pytest.approx(8 + 3 + 0.5 + 2 + 2 + 3 + 0.25)


def test_a_step_is_no_shorter_than_a_vote() -> None:
    link = Constant(votes=100.0)
    plan = Plan(log_every=10**9)
    assert total(plan, link) == pytest.approx(100)
    assert total(replace(plan, vote_every=4), link) == pytest.approx(25)
    assert total(replace(plan, vote_every=50), link) == pytest.approx(STEP.alone)


def test_copies_cost_memory_traffic() -> None:
    compute, link = replace(STEP, copy=100.0), Constant()
    # Flat: 6 passes over 250 bytes; four passes over twice 2 x 10 bytes of fakes.
    assert laid_out(compute, link, 2, Plan()).copies == pytest.approx((6 * 250 + 4 * 2 * 2 * 10) / 100)
    assert laid_out(compute, link, 2, Plan("backward")).copies == pytest.approx((2 * 250 + 4 * 2 * 2 * 10) / 100)
    assert laid_out(compute, link, 2, Plan("backward", shared=False, half=True)).copies == pytest.approx(7 * 250 / 100)


def test_buckets_hold_every_gradient_once() -> None:
    compute = computed(Task(), "H200")
    for ready, end in ((compute.ready_G, compute.generators), (compute.ready_D, compute.discriminators)):
        size = communication.total_bytes(ready)
        assert communication.buckets(ready, Plan()) == [(pytest.approx(end), size)]
        largest = max(part for one in ready for _, part in one)
        for most in (1.0, 5e6, 25e6, 1e9):
            parts = communication.buckets(ready, Plan("backward", bucket=most))
            assert sum(part for _, part in parts) == size
            assert all(part <= max(most, largest) for _, part in parts)
            assert [when for when, _ in parts] == sorted(when for when, _ in parts)
            assert parts[-1][0] == pytest.approx(end)
        assert len(parts) == 2  # one for each network
        assert sum(part for _, part in communication.buckets(ready, Plan("backward", half=True))) == size / 2


def test_what_travels_is_what_the_networks_have() -> None:
    model = ModelConfig()
    compute = computed(Task(4), "RTX 4090")
    for ready, networks in ((compute.ready_G, build_generators(model)), (compute.ready_D, build_discriminators(model))):
        parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
        assert communication.total_bytes(ready) == 4 * parameters
    assert compute.fake == 4 * 3 * 256 * 256 * 2
    assert compute.alone == pytest.approx(communication.predicted(Task(4), communication.WAY, "RTX 4090"))
    three = computed(Task(4), "RTX 4090", accumulate=3)
    assert three.alone == pytest.approx(3 * compute.alone - 2 * (compute.adam_G + compute.adam_D))


def test_unknown_plans() -> None:
    with pytest.raises(ValueError, match="overlap = 'all' is not one of"):
        Plan("all")
    with pytest.raises(ValueError, match="gather = 'never' is not one of"):
        Plan(gather="never")


def test_a_fit_finds_the_link_that_made_the_times() -> None:
    for link in (Gloo(25e6, 5e-3, 1e-3, 1.2), Gloo(125e6, 0.2e-3, 0.1e-3)):
        sizes = (8, 2**16, 2**18, 2**20, 2**22)
        reduced = {str(size): link.all_reduce(2, size) if size > 8 else link.vote(2) for size in sizes}
        gathered = {str(size): link.all_gather(2, size) for size in sizes}
        found = network.fitted({"all_reduce": reduced, "all_gather": gathered})
        for name, value in vars(link).items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


def test_the_page_is_what_the_script_makes() -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.page(text) == text, "python bench/scaling.py --write"
    assert (scaling.RESULTS / "scaling-model.md").read_text(encoding="utf-8") == scaling.full()
    assert (scaling.RESULTS / "scaling-model.json").read_text(encoding="utf-8") == scaling.as_json()
    for cell in ("1,024", "H200", "Mbit/s"):
        assert cell in text
    with pytest.raises(ValueError, match="no place for 'measured'"):
        scaling.page("nothing")


@pytest.mark.parametrize("path", scaling.MEASURED.values(), ids=scaling.MEASURED)
def test_the_measured_rows_were_predicted_first(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 2
    for row in rows:
        assert row["predicted_at"] < row["measured_at"]
        assert 1e3 * row["predicted"] > 1e3 * row["alone"]


def test_the_plot_is_what_the_script_makes(tmp_path: Path) -> None:
    scaling.plot(tmp_path / "plot.svg")
    made, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "plot.svg", scaling.PLOT))
    if f"Matplotlib v{mpl.__version__}" in kept:  # others may place things differently
        assert made == kept, "python bench/scaling.py --write"
    curves = [len(re.findall(r'<g id="line2d_', text)) for text in (made, kept)]
    assert curves[0] == curves[1] > 36
