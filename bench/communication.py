"""What many processes cost: a model of the communication of a training step. bench/scaling.py predicts by it.

A step computes the generators' pass, reduces their gradients, computes the discriminators' pass on fakes that came
through the image pool, and reduces the discriminators' gradients. What travels: all gradients, in float32 if not
compressed; the fakes of all processes to every process, because they share one pool; the vote on stopping, one integer,
by the CPU.

`timeline` lays a step out in time: one processor that computes, one channel that takes one collective after another.
A `Plan` says which of them may run side by side. How long a collective takes is a `Network`'s business: `Gloo`, two or
more hosts joined by a plain link, follows gloo's ring message by message; `Cluster` is NCCL on nodes of GPUs, with the
latencies that NCCL's own tuner assumes (src/graph/tuning.cc, 2.12) and bandwidths from data sheets. What a process
computes comes from bench/model.py, a prediction itself, or from a measurement.

Not modelled: processes that wait for the slowest, multiprocessors that NCCL's kernels take from the step, a network
shared with others, NCCL's reduction inside NVSwitch, and the reading of data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from model import DEVICES, STREAMING, WAYS, Task, predicted

from cyclegan_fast.models import cost

FLOAT = 4
WAY = next(way for way in WAYS if way.name == "ours bf16 graph")


class Network(Protocol):
    """How long collectives take, in seconds."""

    def all_reduce(self, processes: int, size: float) -> float:
        """Of ``size`` bytes on every process."""
        ...

    def all_gather(self, processes: int, size: float) -> float:
        """Of ``size`` bytes from every process to every process."""
        ...

    def vote(self, processes: int) -> float:
        """One integer, reduced by the processes' CPUs."""
        ...


def ring_all_reduce(processes: int, size: float, bandwidth: float, latency: float) -> float:
    """Each process passes n-1 times a part of 1/n on while it is summed, and n-1 times while it is spread."""
    return 2 * (processes - 1) * (size / processes / bandwidth + latency)


def ring_all_gather(processes: int, size: float, bandwidth: float, latency: float) -> float:
    """Each process passes n-1 times one process's ``size`` bytes on."""
    return (processes - 1) * (size / bandwidth + latency)


@dataclass(frozen=True)
class Gloo:
    """Hosts in a ring of equal links, each way at ``bandwidth`` bytes/s with ``latency`` seconds one way.

    Gloo cuts a buffer into segments of 1 MiB at most, at least two for each process, and keeps two under way. Data
    leave when the receiver has said that it is ready, which takes a latency of its own. ``overhead`` is the seconds
    that a collective takes beside its messages, and ``gather`` how much longer an all_gather takes than its bytes.
    """

    bandwidth: float
    latency: float
    overhead: float = 0.0
    gather: float = 1.0

    SEGMENT = 2**20

    def all_reduce(self, processes: int, size: float) -> float:
        """Both halves of the ring: the sums, then their spreading."""
        if processes == 1:
            return 0.0
        segment = min(size / (2 * processes), self.SEGMENT)
        per_process = max(2, math.ceil(size / segment / processes))
        half = self._pipeline((processes - 1) * per_process, size / processes / per_process)
        return self.overhead + 2 * half

    def all_gather(self, processes: int, size: float) -> float:
        """One round for each other process, each in two parts."""
        if processes == 1:
            return 0.0
        return (
            self.overhead
            + 2 * self.latency * (processes - 1)
            + self.gather * ring_all_gather(processes, size, self.bandwidth, 0.0)
        )

    def vote(self, processes: int) -> float:
        """A single element makes a chain: round the ring to be summed, round again to be spread."""
        return 0.0 if processes == 1 else self.overhead + 2 * (processes - 1) * self.latency

    def _pipeline(self, segments: int, size: float) -> float:
        """Seconds until the last of so many segments has arrived; the one after next waits for each."""
        free, arrived = 0.0, [0.0, 0.0]
        for index in range(segments):
            ready = arrived[index % 2] + self.latency  # the receiver's word, given when its buffer was empty
            free = max(ready, free) + size / self.bandwidth
            arrived[index % 2] = free + self.latency
        return max(arrived)


# NCCL's latencies in microseconds, by protocol (LL, LL128, Simple): of a collective, and of a hop. Those of plain
# Ethernet are not NCCL's: we take 30 us for a hop by TCP, thread wake-ups included.
_PROTOCOLS = ("LL", "LL128", "Simple")
_BASE = {"ring": (3.6, 10.0, 8.4), "tree": (4.4, 4.4, 0.0)}
_HOP = {
    "NVLink": {"ring": (0.47, 1.9, 3.4), "tree": (0.52, 1.2, 28.0)},
    "PCIe": {"ring": (1.0, 2.5, 5.7), "tree": (1.0, 1.9, 28.0)},
    "InfiniBand": {"ring": (2.7, 4.0, 9.6), "tree": (5.0, 8.5, 50.0)},
    "Ethernet": {"ring": (30.0, 30.0, 30.0), "tree": (30.0, 30.0, 50.0)},
}
# The share of the bandwidth that is left for payload.
_SHARE = {"ring": (1 / 4, 0.92, 1.0), "tree": (0.9 / 3.8, 0.9 * 0.92, 0.9)}
# A link's software reaches this share of what its data sheet says, as a kernel does of the memory's.
LINK = 0.8
# Seconds of a hop between two hosts' CPUs by gloo.
_CPU_HOP = 30e-6


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs under NCCL: bytes/s each way that a GPU has inside its node, and that a node has to others."""

    device: str
    per_node: int
    inside: float
    outside: float
    link: str = "NVLink"
    network: str = "InfiniBand"

    def all_reduce(self, processes: int, size: float) -> float:
        """The faster of a ring through all GPUs and a tree between nodes, each with its best protocol."""
        if processes == 1:
            return 0.0
        nodes = self.nodes(processes)
        inner, outer = processes - nodes, nodes - 1
        rings = self._times("ring", processes, 2 * inner, 2 * outer, 2 * (processes - 1) / processes * size)
        depth = math.ceil(math.log2(nodes))
        trees = self._times("tree", processes, 2 * (math.ceil(processes / nodes) - 1), 2 * depth, 2 * size)
        return min(*rings, *trees)

    def all_gather(self, processes: int, size: float) -> float:
        """A ring through all GPUs, with its best protocol."""
        if processes == 1:
            return 0.0
        nodes = self.nodes(processes)
        return min(self._times("ring", processes, processes - nodes, nodes - 1, (processes - 1) * size))

    def vote(self, processes: int) -> float:
        """By gloo, a chain through all processes' CPUs and back."""
        return 2 * (processes - 1) * _CPU_HOP

    def nodes(self, processes: int) -> int:
        """Nodes that so many GPUs fill."""
        return math.ceil(processes / self.per_node)

    def _times(self, algorithm: str, processes: int, inner: float, outer: float, size: float) -> list[float]:
        """Seconds by protocol: so many hops inside nodes and between them, and ``size`` bytes through the narrowest."""
        bandwidth = self.inside if self.nodes(processes) == 1 else min(self.inside, self.outside)
        if self.per_node == 1:
            bandwidth = self.outside
        times = []
        for index, protocol in enumerate(_PROTOCOLS):
            if protocol == "LL128" and self.link != "NVLink":
                continue
            hops = inner * _HOP[self.link][algorithm][index] + outer * _HOP[self.network][algorithm][index]
            latency = 1e-6 * (_BASE[algorithm][index] + hops)
            times.append(latency + size / (bandwidth * _SHARE[algorithm][index]))
        return times


# H200: NVLink 450 GB/s each way. PCIe 4.0 x16: 25 GB/s each way, half of it where, as between GeForce GPUs, data pass
# through the host's memory. Ports by their name.
CLUSTERS = {
    "H200, a 400 Gb/s port for each GPU": Cluster("H200", 8, 450e9 * LINK, 8 * 50e9 * LINK),
    "H200, one 400 Gb/s port for each node of 8": Cluster("H200", 8, 450e9 * LINK, 50e9 * LINK),
    "RTX 4090, 4 in a host by PCIe, 10 Gb/s Ethernet": Cluster(
        "RTX 4090", 4, 12.5e9 * LINK, 1.25e9 * LINK, "PCIe", "Ethernet"
    ),
    "RTX 3060 Laptop, 1 Gb/s Ethernet": Cluster("RTX 3060 Laptop", 1, math.inf, 0.125e9 * LINK, "PCIe", "Ethernet"),
}


# When gradients are final, in seconds since the pass began, and their bytes; by network, in the order of the backward
# pass.
Ready = tuple[tuple[tuple[float, int], ...], ...]


@dataclass(frozen=True)
class Compute:
    """What one process computes in a step, in seconds.

    ``generators`` and ``discriminators`` are the passes of one micro-batch, forward and backward, of which there are
    ``accumulate``; ``forward``: the generators' forward pass alone; ``fake``: bytes of one domain's fakes. A gradient
    is final when the backward pass is through with its layer for the last time.
    """

    generators: float
    discriminators: float
    forward: float
    fake: int
    ready_G: Ready
    ready_D: Ready
    adam_G: float = 0.0
    adam_D: float = 0.0
    accumulate: int = 1
    copy: float = math.inf
    """Bytes/s, read and written, of what moves gradients and fakes in memory."""

    @property
    def alone(self) -> float:
        """Seconds of a step without other processes."""
        return self.accumulate * (self.generators + self.discriminators) + self.adam_G + self.adam_D


@dataclass(frozen=True)
class Plan:
    """What may run beside what, and what travels.

    ``overlap``: ``none``, one reduction after each backward pass; ``backward``, buckets of at most ``bucket`` bytes of
    one network leave as their gradients become final; ``discriminators``, and the generators' optimiser runs after the
    discriminators' pass only, so that their reduction may last so long. ``gather``: fakes travel ``late``, when the
    discriminators need them; after the generators' ``forward`` pass, which waits for them; or from then on ``beside``
    the backward pass. ``shared``: one pool for all processes, else no fakes travel. ``half``: gradients travel in
    bfloat16. ``log_every``: steps between readings of the losses, which wait for all processes; ``vote_every``: steps
    between votes on stopping, of which one is under way at a time.
    """

    overlap: str = "none"
    gather: str = "late"
    bucket: float = 25e6
    shared: bool = True
    half: bool = False
    log_every: int = 50
    vote_every: int = 1

    def __post_init__(self) -> None:
        allowed = {"overlap": ("none", "backward", "discriminators"), "gather": ("late", "forward", "beside")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(values)}")


@dataclass
class Timeline:
    """Where the seconds of a step go: ``waits`` are those of computing for a collective, by its name."""

    total: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)
    copies: float = 0.0
    communication: float = 0.0
    """Of all collectives, hidden or not; the vote is not in it, it has a channel of its own."""


def computed(task: Task, device: str, accumulate: int = 1) -> Compute:
    """A step as bench/model.py predicts it for a device, its phases in proportion to their arithmetic."""
    step = task.step(WAY.level, WAY.precision, batched=True)
    copy = STREAMING * DEVICES[device].bandwidth
    adam = cost.optimiser(step).bytes / copy
    return divided(step, predicted(task, WAY, device) - adam, adam, copy, accumulate)


def divided(step: cost.Step, passes: float, adam: float, copy: float = math.inf, accumulate: int = 1) -> Compute:
    """Seconds of a micro-batch's passes and of both optimisers, divided among phases by their arithmetic."""
    runs = cost.step_passes(step)
    first, again, judged, trained = runs[:2], runs[2:4], runs[4:6], runs[6:]
    scale = passes / sum(_forward(run) + _backward(run) for run in runs)
    forward = sum(map(_forward, first + again + judged))
    ready_G, generators = _ready(first, forward + sum(map(_backward, again + judged)), scale)
    ready_D, discriminators = _ready(trained, sum(map(_forward, trained)), scale)
    adam_G = adam * total_bytes(ready_G) / (total_bytes(ready_G) + total_bytes(ready_D))
    pixels = step.batch * step.height * step.width * cost.BYTES[step.precision]
    return Compute(
        generators=generators,
        discriminators=discriminators,
        forward=scale * forward,
        fake=pixels * max(step.model.channels_A, step.model.channels_B),
        ready_G=ready_G,
        ready_D=ready_D,
        adam_G=adam_G,
        adam_D=adam - adam_G,
        accumulate=accumulate,
        copy=copy,
    )


def _forward(run: cost.Pass) -> float:
    return run.pictures * sum(layer.flop for layer in run.layers)


def _backward(run: cost.Pass) -> float:
    return sum(_layer_backward(run, index) for index in range(len(run.layers)))


def _layer_backward(run: cost.Pass, index: int) -> float:
    gradients = run.weight_gradient + (index > 0 or run.input_gradient)
    return run.pictures * run.layers[index].flop * gradients


def _ready(runs: Sequence[cost.Pass], begin: float, scale: float) -> tuple[Ready, float]:
    """When each layer's gradient is final, and when the last is: backward through the last run first."""
    now, networks = begin, []
    for run in reversed(runs):
        layers = []
        for index in reversed(range(len(run.layers))):
            now += _layer_backward(run, index)
            layers.append((scale * now, FLOAT * run.layers[index].parameters))
        networks.append(tuple(layers))
    return tuple(networks), scale * now


def total_bytes(ready: Ready) -> int:
    """Of all gradients."""
    return sum(size for network in ready for _, size in network)


def buckets(ready: Ready, plan: Plan) -> list[tuple[float, float]]:
    """(when it may leave, bytes that travel) of each reduction, in their order."""
    share = 0.5 if plan.half else 1.0
    if plan.overlap == "none":
        return [(ready[-1][-1][0], share * total_bytes(ready))]
    result = []
    for network in ready:
        filled, last = 0, 0.0
        for when, size in network:
            if filled and filled + size > plan.bucket:
                result.append((last, share * filled))
                filled = 0
            filled, last = filled + size, when
        result.append((last, share * filled))
    return result


def timeline(compute: Compute, network: Network, processes: int, plan: Plan) -> Timeline:
    """One step: the processor goes from phase to phase and waits, the channel takes collectives in their order."""
    step = Timeline(waits=dict.fromkeys(("generators", "fakes", "discriminators", "vote", "reading"), 0.0))
    if processes == 1:
        step.total = compute.alone
        return step
    now = channel = 0.0

    def send(ready: float, seconds: float) -> float:
        nonlocal channel
        step.communication += seconds
        channel = max(channel, ready) + seconds
        return channel

    def wait(name: str, until: float) -> float:
        step.waits[name] += max(0.0, until - now)
        return max(now, until)

    def copied(size: float) -> float:
        step.copies += size / compute.copy
        return now + size / compute.copy

    gathered: list[float] = []
    gather = functools.partial(network.all_gather, processes, compute.fake)
    pooled = 4 * processes * compute.fake  # bytes moved in memory: to channels-last, and through the pool
    for index in range(compute.accumulate):
        begin = now
        if plan.shared and plan.gather != "late":
            now += compute.forward
            for _ in range(2):
                arrival = send(now, gather())
                if plan.gather == "forward":
                    now = wait("fakes", arrival)
                    now = copied(pooled)
                gathered.append(arrival)
            begin = now - compute.forward
        if index + 1 == compute.accumulate:
            leaving = [(begin + when, size) for when, size in buckets(compute.ready_G, plan)]
        now = begin + compute.generators
    for when, size in leaving:
        reduced_G = send(when, network.all_reduce(processes, size))
    if plan.overlap != "discriminators":
        now = wait("generators", reduced_G)
        now = copied(_moved(compute.ready_G, plan)) + compute.adam_G
    for index in range(compute.accumulate):
        if plan.shared and plan.gather != "forward":
            for domain in range(2):
                now = wait("fakes", send(now, gather()) if plan.gather == "late" else gathered[2 * index + domain])
                now = copied(pooled)
        if index + 1 == compute.accumulate:
            leaving = [(now + when, size) for when, size in buckets(compute.ready_D, plan)]
        now += compute.discriminators
    for when, size in leaving:
        reduced_D = send(when, network.all_reduce(processes, size))
    if plan.overlap == "discriminators":
        now = wait("generators", reduced_G)
        now = copied(_moved(compute.ready_G, plan)) + compute.adam_G
    now = wait("discriminators", reduced_D)
    now = copied(_moved(compute.ready_D, plan)) + compute.adam_D
    vote = network.vote(processes)
    now = wait("vote", vote / plan.vote_every)  # the one before has had so many steps' time
    now = wait("reading", now + (vote + network.all_reduce(processes, 64)) / plan.log_every)
    step.total = now
    return step


def _moved(ready: Ready, plan: Plan) -> float:
    """Bytes read and written beside a reduction.

    Flattened, divided and copied back; or packed, and divided by NCCL on the way; or cast, cast back and divided too.
    """
    passes = 6 if plan.overlap == "none" else 2
    return (passes + 5 * plan.half) * total_bytes(ready)
